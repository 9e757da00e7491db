"""Looking at training data: figures of a sample of it, and a page of documents as the model sees them."""

from dreamllm.inspection.page import page
from dreamllm.inspection.survey import Survey, survey

__all__ = ["Survey", "page", "survey"]
