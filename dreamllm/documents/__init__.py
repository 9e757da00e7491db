"""Documents: ordered text and pictures, their encoding into sequences, and batches of sequences."""

from dreamllm.documents.batch import PackedBatch, PictureTransforms, pack_batch
from dreamllm.documents.document import Document, End, Part, Picture, Text
from dreamllm.documents.encode import EncodedDocument, encode_document
from dreamllm.documents.formats import conversation, instruction_interleaved, interleaved, pair, prompt
from dreamllm.documents.layout import IGNORE_INDEX, SPECIAL_TOKENS, SequenceLayout
from dreamllm.documents.picture import OversizedPictureError, PictureError, PictureSource, load_picture, picture_size
from dreamllm.documents.templates import CHAT_TEMPLATES, PLAIN, REWRITING, VICUNA_V1_1, ChatTemplate, chat_template

__all__ = [
    "CHAT_TEMPLATES",
    "IGNORE_INDEX",
    "PLAIN",
    "REWRITING",
    "SPECIAL_TOKENS",
    "VICUNA_V1_1",
    "ChatTemplate",
    "Document",
    "EncodedDocument",
    "End",
    "OversizedPictureError",
    "PackedBatch",
    "Part",
    "Picture",
    "PictureError",
    "PictureSource",
    "PictureTransforms",
    "SequenceLayout",
    "Text",
    "chat_template",
    "conversation",
    "encode_document",
    "instruction_interleaved",
    "interleaved",
    "load_picture",
    "pack_batch",
    "pair",
    "picture_size",
    "prompt",
]
