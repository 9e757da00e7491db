"""The benchmarks as data, one file per family."""

from dreamllm.evaluation.benchmarks.base import (
    PROTOCOLS,
    AnswerBenchmark,
    Benchmark,
    Decoding,
    DigitsBenchmark,
    Drawing,
    Figure,
    LanguageBenchmark,
    PictureBenchmark,
    PictureSample,
    Probe,
    Prompting,
    Protocol,
    Sample,
    Scores,
)
from dreamllm.evaluation.benchmarks.catalogue import BENCHMARKS, find_benchmark

__all__ = [
    "BENCHMARKS",
    "PROTOCOLS",
    "AnswerBenchmark",
    "Benchmark",
    "Decoding",
    "DigitsBenchmark",
    "Drawing",
    "Figure",
    "LanguageBenchmark",
    "PictureBenchmark",
    "PictureSample",
    "Probe",
    "Prompting",
    "Protocol",
    "Sample",
    "Scores",
    "find_benchmark",
]
