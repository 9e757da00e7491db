"""Evaluation: how well a model does on data it has never seen, and reports of it."""

from dreamllm.evaluation.digits import DigitsEvaluation, DigitsOptions, DigitsResults, Judge, evaluate_digits
from dreamllm.evaluation.report import write_report
from dreamllm.evaluation.samples import DigitsSamples
from dreamllm.evaluation.statistics import Proportion

__all__ = [
    "DigitsEvaluation",
    "DigitsOptions",
    "DigitsResults",
    "DigitsSamples",
    "Judge",
    "Proportion",
    "evaluate_digits",
    "write_report",
]
