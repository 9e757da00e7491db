"""Watching a training run: samples as it learns, logs for other programs, and a page of everything."""

from dreamllm.monitoring.loggers import TensorBoard, WeightsAndBiases
from dreamllm.monitoring.page import write_run_page
from dreamllm.monitoring.samples import Sample, SampleSettings, SampleWriter, read_samples
from dreamllm.monitoring.watch import LogSettings, watching

__all__ = [
    "LogSettings",
    "Sample",
    "SampleSettings",
    "SampleWriter",
    "TensorBoard",
    "WeightsAndBiases",
    "read_samples",
    "watching",
    "write_run_page",
]
