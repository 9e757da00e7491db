"""Metrics: pure functions from predictions and references to numbers."""

from dreamllm.evaluation.metrics.anls import anls, edit_distance
from dreamllm.evaluation.metrics.captions import CaptionScores, bleu, cider_d, rouge_l, tokenised
from dreamllm.evaluation.metrics.choices import grouped_accuracy, match_numbered, match_option
from dreamllm.evaluation.metrics.clip import clip_score
from dreamllm.evaluation.metrics.frechet import (
    FeatureStatistics,
    KernelDistance,
    StatisticsSum,
    feature_statistics,
    frechet_distance,
    kernel_distance,
)
from dreamllm.evaluation.metrics.inception import FidInception, inception_pixels, load_inception
from dreamllm.evaluation.metrics.java import MetricUnavailableError, meteor, spice
from dreamllm.evaluation.metrics.ptb import ptb_tokens
from dreamllm.evaluation.metrics.vqa import normalise_answer, vqa_accuracy
from dreamllm.evaluation.metrics.yes_no import YesNoScores, read_yes_no, yes_no_scores

__all__ = [
    "CaptionScores",
    "FeatureStatistics",
    "FidInception",
    "KernelDistance",
    "MetricUnavailableError",
    "StatisticsSum",
    "YesNoScores",
    "anls",
    "bleu",
    "cider_d",
    "clip_score",
    "edit_distance",
    "feature_statistics",
    "frechet_distance",
    "grouped_accuracy",
    "inception_pixels",
    "kernel_distance",
    "load_inception",
    "match_numbered",
    "match_option",
    "meteor",
    "normalise_answer",
    "ptb_tokens",
    "read_yes_no",
    "rouge_l",
    "spice",
    "tokenised",
    "vqa_accuracy",
    "yes_no_scores",
]
