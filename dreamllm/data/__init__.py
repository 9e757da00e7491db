"""Data: readers of every kind, their mixture, and batches that are a function of the seed and the step."""

from dreamllm.data.arrow import ArrowPairs
from dreamllm.data.conversations import Conversations
from dreamllm.data.encode_latents import EncodeReport, EncodeSettings, encode_latents
from dreamllm.data.filters import Filters
from dreamllm.data.interleaved import Instructions, Interleaved, TarInterleaved
from dreamllm.data.latent_files import LatentCacheError
from dreamllm.data.latents import LatentCache, picture_key
from dreamllm.data.loader import Batches, LoadedBatch, LoaderSettings, load_steps
from dreamllm.data.mixture import Draw, Mixture, Part, parse_size
from dreamllm.data.open import UnknownDataError, open_data, open_pairs
from dreamllm.data.packing_report import PackingReport, measure_packing
from dreamllm.data.pairs import CaptionInstructions, FilteredPairs, FolderPairs, Pair, PairMode, Pairs, PairSource
from dreamllm.data.plans import BatchPlan, LaneState, LoaderState
from dreamllm.data.preparation import Encoder, prepare
from dreamllm.data.problems import BadSampleError, FilteredSampleError, Problem, ProblemLog, TooManyBadSamplesError
from dreamllm.data.reader import DocumentList, Reader
from dreamllm.data.registry import KINDS, make_part, make_reader
from dreamllm.data.seeds import Permutation, derive_seed, uniform
from dreamllm.data.streams import StepStream
from dreamllm.data.tars import TarPairs

__all__ = [
    "KINDS",
    "ArrowPairs",
    "BadSampleError",
    "BatchPlan",
    "Batches",
    "CaptionInstructions",
    "Conversations",
    "DocumentList",
    "Draw",
    "EncodeReport",
    "EncodeSettings",
    "Encoder",
    "FilteredPairs",
    "FilteredSampleError",
    "Filters",
    "FolderPairs",
    "Instructions",
    "Interleaved",
    "LaneState",
    "LatentCache",
    "LatentCacheError",
    "LoadedBatch",
    "LoaderSettings",
    "LoaderState",
    "Mixture",
    "PackingReport",
    "Pair",
    "PairMode",
    "PairSource",
    "Pairs",
    "Part",
    "Permutation",
    "Problem",
    "ProblemLog",
    "Reader",
    "StepStream",
    "TarInterleaved",
    "TarPairs",
    "TooManyBadSamplesError",
    "UnknownDataError",
    "derive_seed",
    "encode_latents",
    "load_steps",
    "make_part",
    "make_reader",
    "measure_packing",
    "open_data",
    "open_pairs",
    "parse_size",
    "picture_key",
    "prepare",
    "uniform",
]
