"""Planning: memory, time and the best setting of a training stage on given devices, without running it."""

from dreamllm.planning.devices import Device, find_device, gpus, peak_flops
from dreamllm.planning.plan import DoesNotFitError, Plan, Request, make_plan
from dreamllm.planning.records import Records, load_records
from dreamllm.planning.report import assumptions, memory_table, time_table
from dreamllm.planning.sharding import SHARDINGS, Sharding

__all__ = [
    "SHARDINGS",
    "Device",
    "DoesNotFitError",
    "Plan",
    "Records",
    "Request",
    "Sharding",
    "assumptions",
    "find_device",
    "gpus",
    "load_records",
    "make_plan",
    "memory_table",
    "peak_flops",
    "time_table",
]
