"""What is known of each device: limits, launch parameters and order of choice, as data (one JSON file each),
and launch parameters that a user measured on their own GPU (tuned.py)."""

from dreamkernels.devices.loader import (
    ARCHITECTURES,
    Device,
    architecture_of,
    launch_parameters,
    load_device,
    model_served_by,
    order_of_choice,
    trying,
)
from dreamkernels.devices.tuned import TunedParametersWarning, cache_folder, use_tuned

__all__ = [
    "ARCHITECTURES",
    "Device",
    "TunedParametersWarning",
    "architecture_of",
    "cache_folder",
    "launch_parameters",
    "load_device",
    "model_served_by",
    "order_of_choice",
    "trying",
    "use_tuned",
]
