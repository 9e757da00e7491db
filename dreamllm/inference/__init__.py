"""Using a model: answers of text and pictures, from one prompt or many."""

from dreamllm.inference.assistant import Assistant, load
from dreamllm.inference.dialogue import Dialogue
from dreamllm.inference.drawing import DrawingOptions, drawing_defaults
from dreamllm.inference.engine import Engine
from dreamllm.inference.options import Answer, GenerationOptions
from dreamllm.inference.page import document_page, write_page
from dreamllm.inference.quantisation import quantise_weights
from dreamllm.inference.request import NewPicture, NewText, Preview, Request
from dreamllm.inference.sampler import DenoisingGraphs, draw
from dreamllm.inference.selection import ClipJudge, best_candidate

__all__ = [
    "Answer",
    "Assistant",
    "ClipJudge",
    "DenoisingGraphs",
    "Dialogue",
    "DrawingOptions",
    "Engine",
    "GenerationOptions",
    "NewPicture",
    "NewText",
    "Preview",
    "Request",
    "best_candidate",
    "document_page",
    "draw",
    "drawing_defaults",
    "load",
    "quantise_weights",
    "write_page",
]
