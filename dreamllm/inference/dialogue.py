"""A growing dialogue: messages and answers as the document that the next answer continues."""

from __future__ import annotations

from collections.abc import Sequence

from dreamllm.documents import ChatTemplate, Document, End, Part, PictureSource, prompt
from dreamllm.inference.options import Answer


class Dialogue:
    """Collects user messages and the model's answers in a model's chat template, pictures included."""

    def __init__(self, template: ChatTemplate) -> None:
        self._template = template
        self._parts: list[Part] = []

    def ask(self, message: str, pictures: Sequence[PictureSource] = ()) -> Document:
        """The prompt for the answer to `message`; `<image>` in it stands for the next of `pictures`.

        Nothing is remembered until `remember` is called with the answer. Raises `ValueError` when placeholders and
        pictures do not match or the message is empty.
        """
        if not message.strip():
            raise ValueError("the message is empty; give it text or a picture")
        template = self._template
        rendered = f"{template.opening(first=not self._parts)}{message}{template.closing()}"
        return Document((*self._parts, *prompt(rendered, pictures, "message").parts), "error", "the dialogue")

    def remember(self, asked: Document, answer: Answer) -> None:
        """Makes `answer`, given to the prompt `asked`, part of the dialogue."""
        end = () if answer.stopped == "end" else (End(),)
        self._parts = [*asked.parts, *answer.document.parts, *end]

    def forget(self) -> None:
        """Starts anew."""
        self._parts = []
