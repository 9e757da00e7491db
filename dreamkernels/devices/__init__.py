"""What is known of each device: limits, launch parameters and order of choice, as data (one JSON file each)."""

from dreamkernels.devices.loader import (
    ARCHITECTURES,
    Device,
    architecture_of,
    launch_parameters,
    load_device,
    order_of_choice,
)

__all__ = ["ARCHITECTURES", "Device", "architecture_of", "launch_parameters", "load_device", "order_of_choice"]
