"""The language model's decoder over a key-value cache in pages: new positions of many sequences in one pass.

Suffixes: T new positions of all sequences, B sequences, N new positions of one, Hq and Hk heads, D width of a head,
H hidden width, K positions whose final states are wanted.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dreamkernels.frozen import FrozenLinear, why_not_frozen, why_not_packed
from dreamkernels.integrations.llama_layout import add_and_norm, has_hooks
from dreamkernels.integrations.paged_cache import CachedSequence, KeyValueCache
from dreamkernels.integrations.report import patched_by_us
from dreamkernels.integrations.transformers import FAMILIES, KINDS, obstacle, recognise
from dreamkernels.ops import append_kv, attention, decode_attention, swiglu

MOST_DECODED = 128
"""New positions of a sequence that `decode_attention` takes; longer pieces run `attention`."""

_STATIC_ROPES = ("default", "linear", "llama3", "yarn")
_EVERY_OPTION = {kind.option: True for kind in KINDS.values()}


class CachedDecoder:
    """Runs a decoder with LLaMA's layout (LLaMA, Qwen2, Mistral) over a `KeyValueCache`.

    Projections, norms and MLPs are the model's own modules, so adapters and quantised layers keep working. On CPU the
    products of layers whose parameters require no gradient run in oneDNN's weight layout, with those that take the same
    input joined, unless `pack_weights` is False: faster, for one or two further copies of these weights in memory.

    `decoder`: such as `model.get_decoder()`; `max_length`: no position is as high as this; `head`: makes logits of
    states, such as `model.get_output_embeddings()`.

    Raises ValueError for a decoder of another layout, and for rotary embeddings that depend on the length.
    """

    def __init__(
        self, decoder: nn.Module, max_length: int, pack_weights: bool = True, head: nn.Module | None = None
    ) -> None:
        layers = list(getattr(decoder, "layers", []))
        if reason := _why_not(decoder, layers):
            raise ValueError(f"{type(decoder).__name__} cannot be decoded here: {reason}")
        self._norm: Any = decoder.norm
        self._rotary: Any = decoder.rotary_emb
        self._kv_heads: int = decoder.config.num_key_value_heads  # type: ignore[union-attr, assignment]
        self._max_length = max_length
        self._made_for = max_length, pack_weights
        self._sources = _sources(decoder, head)
        self._head = None if head is None else _Products(pack_weights, head)
        self._layers = [_Layer(layer, pack_weights) for layer in layers]
        self._tables: tuple[tuple, Tensor, Tensor] | None = None

    @staticmethod
    def of(
        decoder: nn.Module, max_length: int, pack_weights: bool = True, head: nn.Module | None = None
    ) -> CachedDecoder:
        """The one made before for this decoder, while it still fits, so that weights are packed once."""
        kept = _KEPT.get(decoder)
        if kept is None or kept._made_for != (max_length, pack_weights) or kept._sources != _sources(decoder, head):
            kept = _KEPT[decoder] = CachedDecoder(decoder, max_length, pack_weights, head)
        return kept

    def new_cache(self, max_pages: int | None = None) -> KeyValueCache:
        """An empty cache for this decoder."""
        like = self._norm.weight  # of the activations' dtype, however the layers are quantised
        width = self._layers[0].head_dim
        return KeyValueCache(len(self._layers), self._kv_heads, width, like.dtype, like.device, max_pages=max_pages)

    def fits(self, cache: KeyValueCache) -> bool:
        """Whether a cache has the dtype and the device that the decoder has now."""
        like = self._norm.weight
        return (cache.dtype, cache.device) == (like.dtype, like.device)

    @torch.no_grad()
    def advance(
        self,
        cache: KeyValueCache,
        sequences: Sequence[CachedSequence],
        counts: Sequence[int],
        embeds_TH: Tensor,
        wanted_K: Tensor | None = None,
    ) -> Tensor:
        """Appends `counts[i]` embeddings to sequence i, as they follow each other in `embeds_TH`.

        Returns the states after the final norm at the positions `wanted_K` (int64, into the new positions; None: all),
        [K, H]. Sequences do not see each other. A sequence may appear once.
        """
        step = _Step.plan(cache, sequences, counts, embeds_TH.device)
        cos, sin = self._rotary_tables(embeds_TH)
        hidden, residual = embeds_TH, None
        for number, layer in enumerate(self._layers):
            wanted = wanted_K if number == len(self._layers) - 1 else None
            hidden, residual = layer.forward(hidden, residual, cache, number, step, cos, sin, wanted)
        assert residual is not None
        return add_and_norm(self._norm, hidden, residual)[0]

    @torch.no_grad()
    def logits(self, states: Tensor) -> Tensor:
        """States [K, H] -> logits [K, vocabulary], by the head."""
        assert self._head is not None, "this decoder was made without a head"
        return self._head(states)[0]

    def _rotary_tables(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin [positions, D] as the decoder makes them, kept until it changes."""
        rotary = self._rotary
        version = (like.dtype, like.device, id(rotary.inv_freq), rotary.inv_freq._version)
        if self._tables is None or self._tables[0] != version:
            positions = torch.arange(self._max_length, device=like.device)[None]
            cos, sin = rotary(like, positions)
            self._tables = version, cos[0].contiguous(), sin[0].contiguous()
        return self._tables[1:]


@dataclass
class _Step:
    """Where the new positions of one pass stand.

    The first `singles` of them are one each of the first sequences; the others are `pieces` of several positions. For
    pieces of one length that `decode_attention` takes, `piece_tokens` is that length; otherwise it is 0 and their keys
    are gathered from `slots` (int64, positions of the flattened pages).
    """

    positions: Tensor  # int32
    token_tables: Tensor  # int32, pages of the sequence of each position
    singles: int
    pieces: int
    piece_tokens: int
    lengths: Tensor  # int32, keys of each sequence, the new ones included
    tables: Tensor
    slots: Tensor | None = None
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    max_seqlen_q: int = 0
    max_seqlen_k: int = 0

    @staticmethod
    def plan(
        cache: KeyValueCache, sequences: Sequence[CachedSequence], counts: Sequence[int], device: torch.device
    ) -> _Step:
        singles = next((i for i, count in enumerate(counts) if count != 1), len(counts))
        starts = [sequence.length for sequence in sequences]
        cache.extend(sequences, counts)
        tables = cache.block_table(sequences)
        lengths = torch.tensor([sequence.length for sequence in sequences], dtype=torch.int32, device=device)
        if singles == len(counts):
            return _Step(lengths - 1, tables, singles, 0, 0, lengths, tables)
        repeats = torch.tensor(counts, device=device)
        positions = torch.cat([torch.arange(s, s + n, dtype=torch.int32) for s, n in zip(starts, counts, strict=True)])
        step = _Step(
            positions.to(device),
            tables.repeat_interleave(repeats, dim=0),
            singles,
            len(counts) - singles,
            0,
            lengths,
            tables,
        )
        widths = counts[singles:]
        if len(set(widths)) == 1 and widths[0] <= MOST_DECODED:
            step.piece_tokens = widths[0]
        else:
            step._gather(cache, sequences[singles:], widths, device)
        return step

    def _gather(
        self, cache: KeyValueCache, sequences: Sequence[CachedSequence], widths: Sequence[int], device: torch.device
    ) -> None:
        size = cache.page_size
        inside = torch.arange(size)
        self.slots = torch.cat(
            [(torch.tensor(s.pages)[:, None] * size + inside).flatten()[: s.length] for s in sequences]
        ).to(device)
        lengths = [sequence.length for sequence in sequences]
        self.cu_seqlens_q, self.cu_seqlens_k = (
            torch.tensor([0, *sizes]).cumsum(0).to(device, torch.int32) for sizes in (widths, lengths)
        )
        self.max_seqlen_q, self.max_seqlen_k = max(widths), max(lengths)


class _Layer:
    """One decoder layer."""

    def __init__(self, layer: Any, pack_weights: bool) -> None:
        self._norms = layer.input_layernorm, layer.post_attention_layernorm
        self.attention: Any = layer.self_attn
        self.head_dim: int = self.attention.head_dim
        _, cls = recognise(self.attention) or ("", None)
        assert cls is not None
        self._window: int | None = (
            FAMILIES[cls.__module__.split(".")[2]].attention_arguments(self.attention).get("sliding_window")
        )
        a, mlp = self.attention, layer.mlp
        self._qkv = _Products(pack_weights, a.q_proj, a.k_proj, a.v_proj)
        self._out = _Products(pack_weights, a.o_proj)
        self._mlp = mlp
        self._gate_up = _Products(pack_weights, mlp.gate_proj, mlp.up_proj)
        self._down = _Products(pack_weights, mlp.down_proj)

    def forward(
        self,
        hidden: Tensor,
        residual: Tensor | None,
        cache: KeyValueCache,
        number: int,
        step: _Step,
        cos: Tensor,
        sin: Tensor,
        wanted: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """(what is to be added to the residual, the residual), at the positions `wanted` only."""
        if residual is None:
            x, residual = self._norms[0](hidden), hidden
        else:
            x, residual = add_and_norm(self._norms[0], hidden, residual)
        attended = self._attend(x, cache, number, step, cos, sin)
        if wanted is not None:
            attended, residual = attended[wanted], residual[wanted]
        (out,) = self._out(attended)
        x, residual = add_and_norm(self._norms[1], out, residual)
        gate, up = self._gate_up(x)
        (out,) = self._down(swiglu(gate, up))
        return out, residual

    def _attend(self, x: Tensor, cache: KeyValueCache, number: int, step: _Step, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (1, -1, self.head_dim)) for y in self._qkv(x))
        keys, values = cache.keys(number), cache.values(number)
        q = append_kv(q, k, v, keys, values, step.positions, cos, sin, block_table=step.token_tables)
        scale, window, singles = self.attention.scaling, self._window, step.singles
        parts = []
        if singles:
            lengths, tables = step.lengths[:singles], step.tables[:singles]
            out = decode_attention(q[:singles], keys, values, lengths, block_table=tables, scale=scale, window=window)
            parts.append(out.flatten(1))
        if step.piece_tokens:
            lengths, tables = step.lengths[singles:], step.tables[singles:]
            pieces = q[singles:].view(step.pieces, step.piece_tokens, *q.shape[2:])
            out = decode_attention(pieces, keys, values, lengths, block_table=tables, scale=scale, window=window)
            parts.append(out.flatten(0, 1).flatten(1))
        elif step.slots is not None:
            k, v = (t.flatten(0, 1).index_select(0, step.slots) for t in (keys, values))
            out = attention(
                q[singles:, 0],
                k,
                v,
                step.cu_seqlens_q,
                step.cu_seqlens_k,
                step.max_seqlen_q,
                step.max_seqlen_k,
                causal=True,
                scale=scale,
                window=window,
            )
            parts.append(out.flatten(1))
        return parts[0] if len(parts) == 1 else torch.cat(parts)


class _Products:
    """The products of layers that take the same input."""

    def __init__(self, pack: bool, *modules: nn.Module) -> None:
        self._modules = modules
        packed = pack and not any(why_not_frozen(m) or why_not_packed(m) for m in modules)
        if packed and len({m.bias is None for m in modules}) == 1:
            self._frozen: FrozenLinear | None = FrozenLinear(*modules)  # type: ignore[arg-type]
            self._widths: list[int] = [m.out_features for m in modules]  # type: ignore[misc]
        else:
            self._frozen = None

    def __call__(self, x: Tensor) -> Sequence[Tensor]:
        """One result of each layer."""
        if self._frozen is None or any(map(has_hooks, self._modules)):
            return [module(x) for module in self._modules]
        return self._frozen(x).split(self._widths, dim=-1)


# A CachedDecoder refers to the parts of its decoder, not to the decoder, so that an entry ends with it.
_KEPT: weakref.WeakKeyDictionary[nn.Module, CachedDecoder] = weakref.WeakKeyDictionary()


def _sources(decoder: nn.Module, head: nn.Module | None) -> tuple:
    """What a decoder is made of: other modules, or others that are trained, make another one."""
    parts = [decoder] if head is None else [decoder, head]
    modules = tuple(id(module) for part in parts for module in part.modules())
    return modules, tuple(parameter.requires_grad for part in parts for parameter in part.parameters())


def _why_not(decoder: Any, layers: Sequence[nn.Module]) -> str:
    for name in ("norm", "rotary_emb"):
        if not hasattr(decoder, name):
            return f"{type(decoder).__name__} has no {name}, as decoders of LLaMA's layout have"
    if not layers:
        return f"{type(decoder).__name__} has no layers"
    rope = getattr(decoder.rotary_emb, "rope_type", "default")
    if rope not in _STATIC_ROPES:
        return f"its rotary embedding {rope!r} depends on the length; only {', '.join(_STATIC_ROPES)} do not"
    for layer in layers:
        for part in (layer, getattr(layer, "self_attn", None), getattr(layer, "mlp", None)):
            found = None if part is None else recognise(part)
            if found is None:
                return f"{type(layer).__name__} is not a layer of LLaMA, Qwen2 or Mistral"
            if part is not layer and (reason := _unusable(part, *found)):
                return reason
    return ""


def _unusable(part: Any, kind: str, cls: type) -> str:
    """Why a part that is recognised does something else than its class, or ""."""
    return "" if patched_by_us(part) else obstacle(part, kind, cls, _EVERY_OPTION)
