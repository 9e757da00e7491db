"""What a reader is: a sized, randomly accessible collection of documents."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from dreamllm.documents import Document


class Reader(ABC):
    """A collection of `len(reader)` documents with a `name`.

    A reader keeps no open file, so it can be used from any number of threads and forked processes. It does not decode
    pictures; it hands out their sources.
    """

    name: str

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def document(self, index: int, epoch: int = 0) -> Document:
        """Document `index`. `epoch`, how often the reader has been gone through before, may decide what is drawn.

        Raises `BadSampleError` for a sample that cannot be used and `IndexError` outside the collection.
        """

    def outline(self, index: int, epoch: int = 0) -> Document:
        """`document(index, epoch)` for who asks only how long it is: its pictures may be of no content.

        Readers for which pictures cost reading do not read them, and raise no error that only their bytes would tell.
        """
        return self.document(index, epoch)

    def __getitem__(self, index: int) -> Document:
        return self.document(index)

    def describe(self) -> dict[str, Any]:
        """What identifies the reader in a run's stored configuration, as JSON values."""
        return {"kind": type(self).__name__, "name": self.name, "documents": len(self)}


class DocumentList(Reader):
    """Documents that are already in memory, or any sequence that makes them on access."""

    def __init__(self, documents: Sequence[Document], name: str) -> None:
        self.documents, self.name = documents, name

    def __len__(self) -> int:
        return len(self.documents)

    def document(self, index: int, epoch: int = 0) -> Document:
        return self.documents[index]
