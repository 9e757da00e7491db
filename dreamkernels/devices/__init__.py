"""What is known of each GPU architecture: limits and launch parameters, as data (one JSON file each)."""

from dreamkernels.devices.loader import ARCHITECTURES, Device, architecture_of, launch_parameters, load_device

__all__ = ["ARCHITECTURES", "Device", "architecture_of", "launch_parameters", "load_device"]
