"""An HTTP server with OpenAI's interface: chats of text and pictures, and pictures alone.

`dreamllm serve` runs it. The application itself is `dreamllm.server.app.create_app` (needs the extra `serve`).
"""

from dreamllm.server.backend import (
    Backend,
    Failed,
    Finished,
    Handle,
    Load,
    PictureDrawn,
    PictureStep,
    Started,
    TextPiece,
    Usage,
    Work,
)
from dreamllm.server.engine_backend import EngineBackend
from dreamllm.server.limits import Limits

__all__ = [
    "Backend",
    "EngineBackend",
    "Failed",
    "Finished",
    "Handle",
    "Limits",
    "Load",
    "PictureDrawn",
    "PictureStep",
    "Started",
    "TextPiece",
    "Usage",
    "Work",
]
