"""What the compiler made of every GPU kernel that ships; needs no GPU. `python -m dreamkernels report`."""

from dreamkernels.report.baseline import compare_with_baseline, load_baseline, save_baseline
from dreamkernels.report.kernels import KernelReport, report_kernels

__all__ = ["KernelReport", "compare_with_baseline", "load_baseline", "report_kernels", "save_baseline"]
