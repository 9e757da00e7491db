"""A key-value cache in pages: sequences grow, fork and end without moving what others hold.

Suffixes: L layers, P pages, S slots of a page, H heads, D width of a head.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

PAGE_SIZE = 16
FIRST_PAGES = 64


class CacheFullError(RuntimeError):
    """No page is left for new keys and values."""


@dataclass(eq=False)
class CachedSequence:
    """One sequence of the cache: its pages in order and how many positions are written. `row`: of the page table."""

    row: int
    length: int = 0
    pages: list[int] = field(default_factory=list)


class KeyValueCache:
    """Keys and values of all layers, in pages that sequences share where they begin alike.

    A page holds `page_size` positions of every layer. A fork of a sequence, such as a beam or a candidate of one
    prompt, refers to the pages of its origin; only the last one, where the two begin to differ, is copied, once, when
    the first of them writes. Memory grows in steps and is kept for later sequences.

    `max_pages`: no more are ever made; None: as many as are needed.
    """

    def __init__(
        self,
        num_layers: int,
        num_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        page_size: int = PAGE_SIZE,
        max_pages: int | None = None,
    ) -> None:
        if page_size < 1 or (max_pages is not None and max_pages < 1):
            raise ValueError(f"page_size and max_pages must be at least 1, not {page_size} and {max_pages}")
        self.page_size = page_size
        self.max_pages = max_pages
        pages = FIRST_PAGES if max_pages is None else min(FIRST_PAGES, max_pages)
        # One tensor for all layers, so that copying a page is one call.
        self._kv_LPSHD = torch.zeros(2 * num_layers, pages, page_size, num_heads, head_dim, dtype=dtype, device=device)
        self._users = [0] * pages  # sequences that refer to a page
        self._free = list(range(pages - 1, -1, -1))
        self._table = torch.zeros(0, 0, dtype=torch.int32)  # [rows, pages of a sequence], on the host
        self._free_rows: list[int] = []
        self._padding: CachedSequence | None = None

    # -- tensors -------------------------------------------------------------------------------------------------------

    @property
    def keys_and_values(self) -> Tensor:
        """Of every layer the keys and then the values, [2 L, P, S, H, D]."""
        return self._kv_LPSHD

    def keys(self, layer: int) -> Tensor:
        """[P, S, H, D]"""
        return self._kv_LPSHD[2 * layer]

    def values(self, layer: int) -> Tensor:
        """[P, S, H, D]"""
        return self._kv_LPSHD[2 * layer + 1]

    def block_table(self, sequences: Iterable[CachedSequence], least_pages: int = 1) -> Tensor:
        """int32 [sequences, pages of the longest but at least `least_pages`], on the cache's device."""
        chosen = list(sequences)
        widest = max((len(sequence.pages) for sequence in chosen), default=0)
        widest = max(widest, least_pages)
        if widest > self._table.shape[1]:
            self._grow_table(self._table.shape[0], widest)
        rows = torch.tensor([sequence.row for sequence in chosen], dtype=torch.long)
        return self._table[rows, :widest].to(self.device, non_blocking=True)

    @property
    def dtype(self) -> torch.dtype:
        return self._kv_LPSHD.dtype

    @property
    def device(self) -> torch.device:
        return self._kv_LPSHD.device

    @property
    def num_pages(self) -> int:
        """Pages that exist."""
        return len(self._users)

    @property
    def pages_in_use(self) -> int:
        """Without that of `padding`."""
        return self.num_pages - len(self._free) - (self._padding is not None)

    def pages_for(self, positions: int) -> int:
        """Pages that so many positions of one sequence take."""
        return -(-positions // self.page_size)

    # -- sequences -----------------------------------------------------------------------------------------------------

    def new(self) -> CachedSequence:
        """An empty sequence."""
        if not self._free_rows:
            rows, columns = self._table.shape
            self._grow_table(max(8, 2 * rows), columns)
            self._free_rows = list(range(self._table.shape[0] - 1, rows - 1, -1))
        return CachedSequence(self._free_rows.pop())

    @property
    def padding(self) -> CachedSequence:
        """A sequence of one position whose contents nobody needs, to fill up batches of a fixed size."""
        if self._padding is None:
            self._padding = self.new()
            self.extend([self._padding], [1])
        return self._padding

    def fork(self, origin: CachedSequence) -> CachedSequence:
        """A sequence that has so far been the same as `origin`. Nothing is copied."""
        fork = self.new()
        fork.length, fork.pages = origin.length, list(origin.pages)
        self._table[fork.row, : len(fork.pages)] = self._table[origin.row, : len(fork.pages)]
        for page in fork.pages:
            self._users[page] += 1
        return fork

    def release(self, sequence: CachedSequence) -> None:
        """Ends a sequence; pages that nobody else refers to are free again."""
        for page in sequence.pages:
            self._let_go(page)
        sequence.pages = []
        sequence.length = 0
        self._free_rows.append(sequence.row)

    def extend(self, sequences: Iterable[CachedSequence], counts: Iterable[int]) -> None:
        """Makes room for so many new positions of each sequence and counts them as written.

        Raises `CacheFullError` when there are not enough pages; sequences before the one that fails have their room.
        """
        copies: list[tuple[int, int]] = []
        try:
            for sequence, count in zip(sequences, counts, strict=True):
                self._extend(sequence, count, copies)
        finally:
            if copies:
                source, target = (torch.tensor(pages, device=self.device) for pages in zip(*copies, strict=True))
                self._kv_LPSHD.index_copy_(1, target, self._kv_LPSHD.index_select(1, source))

    def _extend(self, sequence: CachedSequence, count: int, copies: list[tuple[int, int]]) -> None:
        if count < 1:
            return
        begun, filled = divmod(sequence.length, self.page_size)
        if filled and self._users[sequence.pages[begun]] > 1:
            shared = sequence.pages[begun]
            self._place(sequence, begun, self._take())
            self._let_go(shared)
            copies.append((shared, sequence.pages[begun]))
        for index in range(len(sequence.pages), self.pages_for(sequence.length + count)):
            self._place(sequence, index, self._take())
        sequence.length += count

    def _place(self, sequence: CachedSequence, index: int, page: int) -> None:
        if index < len(sequence.pages):
            sequence.pages[index] = page
        else:
            sequence.pages.append(page)
        if index >= self._table.shape[1]:
            self._grow_table(self._table.shape[0], max(8, 2 * self._table.shape[1]))
        self._table[sequence.row, index] = page

    def _take(self) -> int:
        if not self._free:
            self._grow()
        page = self._free.pop()
        self._users[page] = 1
        return page

    def _let_go(self, page: int) -> None:
        self._users[page] -= 1
        if not self._users[page]:
            self._free.append(page)

    # -- growth --------------------------------------------------------------------------------------------------------

    def _grow(self) -> None:
        before = self.num_pages
        pages = 2 * before if self.max_pages is None else min(2 * before, self.max_pages)
        if pages == before:
            raise CacheFullError(
                f"the key-value cache of {before} pages of {self.page_size} positions is full; answer fewer requests "
                "at a time or allow more pages"
            )
        grown = self._kv_LPSHD.new_zeros(self._kv_LPSHD.shape[0], pages, *self._kv_LPSHD.shape[2:])
        grown[:, :before] = self._kv_LPSHD
        self._kv_LPSHD = grown
        self._users += [0] * (pages - before)
        self._free = list(range(pages - 1, before - 1, -1))

    def _grow_table(self, rows: int, columns: int) -> None:
        grown = torch.zeros(rows, columns, dtype=torch.int32)
        grown[: self._table.shape[0], : self._table.shape[1]] = self._table
        self._table = grown
