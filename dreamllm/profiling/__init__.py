"""Profiling: the training step of a workload by part and operator, with its memory and host synchronisations."""

from dreamllm.profiling.profile import Profile, Repetitions, device_name, profile_workload
from dreamllm.profiling.synchronisation import HostSynchronisations, Synchronisation
from dreamllm.profiling.workload import PreparedStep, Recording, as_fake, prepare

__all__ = [
    "HostSynchronisations",
    "PreparedStep",
    "Profile",
    "Recording",
    "Repetitions",
    "Synchronisation",
    "as_fake",
    "device_name",
    "prepare",
    "profile_workload",
]
