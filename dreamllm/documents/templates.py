"""Chat templates: turns of a conversation -> document parts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Role = Literal["user", "assistant"]


@dataclass(frozen=True)
class ChatTemplate:
    """A template of the Vicuna kind: system sentence, then `USER: ... ASSISTANT: ...`, an end token after each answer.

    `system` may be empty. A turn's text follows its role tag after one space.
    """

    name: str
    system: str
    user_tag: str = "USER:"
    assistant_tag: str = "ASSISTANT:"

    def opening(self, first: bool) -> str:
        """What stands before the user's text of a turn."""
        return f"{self.system} {self.user_tag} " if first and self.system else f"{self.user_tag} "

    def closing(self) -> str:
        """What stands between the user's text and the answer."""
        return f" {self.assistant_tag}"


VICUNA_V1_1 = ChatTemplate(
    name="vicuna_v1.1",
    system=(
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions."
    ),
)
"""The template of the released weights; the system sentence is a functional literal (spec section B.5)."""

PLAIN = ChatTemplate(name="plain", system="")
"""Role tags without a system sentence, for small models with short contexts."""

REWRITING = (
    "Rewrite the following request as a detailed caption of one picture. Answer with the caption only: {request}"
)
"""The message by which a model is asked to rewrite a request before it draws it (spec F.5; the wording is ours)."""

CHAT_TEMPLATES: dict[str, ChatTemplate] = {template.name: template for template in (VICUNA_V1_1, PLAIN)}


def chat_template(name: str) -> ChatTemplate:
    """Looks a template up by name; raises `ValueError` listing the known ones."""
    if name not in CHAT_TEMPLATES:
        raise ValueError(f"unknown chat template {name!r}; known: {', '.join(sorted(CHAT_TEMPLATES))}")
    return CHAT_TEMPLATES[name]


def check_roles(turns: Sequence[tuple[str, object]], name: str) -> None:
    """Raises `ValueError` unless the turns alternate user, assistant, user, ... starting with the user."""
    if not turns:
        raise ValueError(f"conversation {name or '(unnamed)'} has no turns")
    for i, (role, _) in enumerate(turns):
        expected = ("user", "assistant")[i % 2]
        if role != expected:
            raise ValueError(
                f"conversation {name or '(unnamed)'}: turn {i} is from {role!r}, but turns must alternate "
                f"user, assistant, ... ({expected!r} expected)"
            )
