"""Seeds and permutations as pure functions: the same on every machine, thread count and library version."""

from __future__ import annotations

import hashlib

_ROUNDS = 8
_MASK64 = (1 << 64) - 1


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed from any identifying parts, e.g. `derive_seed(run_seed, "stage2", step)`."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def uniform(*parts: int | str) -> float:
    """A number in [0, 1) from identifying parts."""
    return derive_seed(*parts) / (1 << 63)


class Permutation:
    """A pseudo-random permutation of range(size) in constant memory: a Feistel network with cycle walking.

    `permutation[i]` for 0 <= i < size. Eight rounds keyed by `seed`; points that leave the range are walked on until
    they return to it (fewer than four steps on average).
    """

    def __init__(self, size: int, seed: int) -> None:
        if size < 1:
            raise ValueError(f"a permutation needs at least one element, not {size}")
        self.size = size
        self._bits = max(1, ((size - 1).bit_length() + 1) // 2)
        self._keys = [derive_seed(seed, "round", r) for r in range(_ROUNDS)]

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> int:
        if not 0 <= index < self.size:
            raise IndexError(f"index {index} is outside [0, {self.size})")
        while True:
            index = self._once(index)
            if index < self.size:
                return index

    def _once(self, index: int) -> int:
        mask = (1 << self._bits) - 1
        left, right = index >> self._bits, index & mask
        for key in self._keys:
            left, right = right, left ^ (_mix(right + key) & mask)
        return left << self._bits | right


def _mix(value: int) -> int:
    # The finaliser of splitmix64 (Steele, Lea and Flood 2014).
    value = (value + 0x9E3779B97F4A7C15) & _MASK64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK64
    return value ^ (value >> 31)
