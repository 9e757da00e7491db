"""The language model's decoder over a key-value cache in pages: new positions of many sequences in one pass.

Suffixes: T new positions of all sequences, B sequences, N new positions of one, Hq and Hk heads, D width of a head,
H hidden width, K positions whose final states are wanted.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dreamkernels.frozen import FrozenLinear, why_not_frozen, why_not_packed
from dreamkernels.graphs import GraphedCalls, addresses_of, bucket_of
from dreamkernels.integrations.decoding_step import Step, leading_ones
from dreamkernels.integrations.fused_decoding import FusedDecoder, FusedHead, why_not_fused
from dreamkernels.integrations.llama_layout import add_and_norm, has_hooks
from dreamkernels.integrations.paged_cache import CachedSequence, KeyValueCache
from dreamkernels.integrations.report import patched_by_us
from dreamkernels.integrations.transformers import FAMILIES, KINDS, obstacle, recognise
from dreamkernels.ops import append_kv, attention, decode_attention, swiglu

LEAST_GRAPHED_PAGES = 8
"""Pages of a sequence for which there is a graph, at least."""

_STATIC_ROPES = ("default", "linear", "llama3", "yarn")
_EVERY_OPTION = {kind.option: True for kind in KINDS.values()}


class CachedDecoder:
    """Runs a decoder with LLaMA's layout (LLaMA, Qwen2, Mistral) over a `KeyValueCache`.

    Projections, norms and MLPs are the model's own modules, so adapters and quantised layers keep working. On CPU
    single positions of a model over our operators run as one operator, `decode_layers`, where it computes the same; the
    products of longer pieces with layers whose parameters require no gradient run in oneDNN's weight layout, with those
    that take the same input joined, unless `pack_weights` is False: faster, for one or two further copies of these
    weights in memory.

    `decoder`: such as `model.get_decoder()`; `max_length`: no position is as high as this; `head`: makes logits of
    states, such as `model.get_output_embeddings()`. `graphs`: passes of single positions are captured there, on CUDA,
    for numbers of sequences and of pages that are powers of two; every module must then compute the same in each call.

    Raises ValueError for a decoder of another layout, and for rotary embeddings that depend on the length.
    """

    def __init__(
        self,
        decoder: nn.Module,
        max_length: int,
        pack_weights: bool = True,
        head: nn.Module | None = None,
        graphs: GraphedCalls | None = None,
    ) -> None:
        layers = list(getattr(decoder, "layers", []))
        if reason := _why_not(decoder, layers):
            raise ValueError(f"{type(decoder).__name__} cannot be decoded here: {reason}")
        self._norm: Any = decoder.norm
        self._rotary: Any = decoder.rotary_emb
        self._kv_heads: int = decoder.config.num_key_value_heads  # type: ignore[union-attr, assignment]
        self._max_length = max_length
        self._made_for = max_length, pack_weights, graphs
        self._graphs = graphs
        self._parameters = list(decoder.parameters())
        self._sources = _sources(decoder, head)
        self._head = None if head is None else _Products(pack_weights, head)
        self._layers = [_Layer(layer, pack_weights) for layer in layers]
        self._tables: tuple[tuple, Tensor, Tensor] | None = None
        windows = {layer.window for layer in self._layers}
        fits = len(windows) == 1 and not why_not_fused(decoder)
        self._fused = FusedDecoder(decoder, windows.pop()) if fits else None
        self._fused_head = FusedHead(head) if fits and head is not None else None

    @staticmethod
    def of(
        decoder: nn.Module,
        max_length: int,
        pack_weights: bool = True,
        head: nn.Module | None = None,
        graphs: GraphedCalls | None = None,
    ) -> CachedDecoder:
        """The one made before for this decoder, while it still fits, so that weights are packed once."""
        kept = _KEPT.get(decoder)
        made_for = max_length, pack_weights, graphs
        if kept is None or kept._made_for != made_for or kept._sources != _sources(decoder, head):
            kept = _KEPT[decoder] = CachedDecoder(decoder, max_length, pack_weights, head, graphs)
        return kept

    def new_cache(self, max_pages: int | None = None) -> KeyValueCache:
        """An empty cache for this decoder."""
        like = self._norm.weight  # of the activations' dtype, however the layers are quantised
        if max_pages is not None and self._graphs is not None:
            max_pages += 1  # for the padding of graphs
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
        cos, sin = self._rotary_tables(embeds_TH)
        singles = leading_ones(counts)
        if self._graphs is not None and singles == len(counts) > 0:
            states = self._advance_graphed(self._graphs, cache, sequences, embeds_TH, cos, sin)
            return states if wanted_K is None else states[wanted_K]
        if not singles or self._fused is None or not self._fused.runs(embeds_TH):
            return self._advance_layer_by_layer(cache, sequences, counts, embeds_TH, cos, sin, wanted_K)
        # Apart from the pieces, so that a sequence is computed alike whatever else there is.
        states = self._fused.advance(cache, sequences[:singles], embeds_TH[:singles], cos, sin)
        if singles == len(counts):
            return states if wanted_K is None else states[wanted_K]
        pieces = (cache, sequences[singles:], counts[singles:], embeds_TH[singles:], cos, sin)
        if wanted_K is None:
            return torch.cat([states, self._advance_layer_by_layer(*pieces, None)])
        of_pieces = wanted_K >= singles
        found = states.new_empty(len(wanted_K), states.shape[1])
        found[~of_pieces] = states[wanted_K[~of_pieces]]
        found[of_pieces] = self._advance_layer_by_layer(*pieces, wanted_K[of_pieces] - singles)
        return found

    def _advance_layer_by_layer(
        self,
        cache: KeyValueCache,
        sequences: Sequence[CachedSequence],
        counts: Sequence[int],
        embeds_TH: Tensor,
        cos: Tensor,
        sin: Tensor,
        wanted_K: Tensor | None,
    ) -> Tensor:
        step = Step.plan(cache, sequences, counts, embeds_TH.device)
        return self._run_layers(cache, step, embeds_TH, cos, sin, wanted_K)

    def _advance_graphed(
        self,
        graphs: GraphedCalls,
        cache: KeyValueCache,
        sequences: Sequence[CachedSequence],
        embeds_BH: Tensor,
        cos: Tensor,
        sin: Tensor,
    ) -> Tensor:
        """One position of each sequence by one launch. Rows that fill up the batch write to the cache's padding."""
        padding = cache.padding  # before the addresses are taken: it may be what lets the cache grow
        count, device = len(sequences), embeds_BH.device
        positions = [sequence.length for sequence in sequences]
        cache.extend(sequences, [1] * count)
        rows = bucket_of(count)
        every = [*sequences, *[padding] * (rows - count)]
        pages = bucket_of(max(LEAST_GRAPHED_PAGES, *(len(sequence.pages) for sequence in sequences)))
        tables = cache.block_table(every, pages)
        before = torch.tensor(positions + [0] * (rows - count), dtype=torch.int32).to(device, non_blocking=True)
        embeds = torch.cat([embeds_BH, embeds_BH[-1:].expand(rows - count, -1)])

        def run(embeds: Tensor, before: Tensor, tables: Tensor) -> Tensor:
            lengths = before + 1
            return self._run_layers(cache, Step(before, tables, rows, 0, 0, lengths, tables), embeds, cos, sin, None)

        moving = (*self._parameters, cache.keys_and_values, cos, sin)
        return graphs(("decode", addresses_of(moving)), run, embeds, before, tables)[:count]

    def _run_layers(
        self, cache: KeyValueCache, step: Step, embeds_TH: Tensor, cos: Tensor, sin: Tensor, wanted_K: Tensor | None
    ) -> Tensor:
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
        if self._fused_head is not None and self._fused_head.runs(states):
            return self._fused_head(states)
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


class _Layer:
    """One decoder layer."""

    def __init__(self, layer: Any, pack_weights: bool) -> None:
        self._norms = layer.input_layernorm, layer.post_attention_layernorm
        self.attention: Any = layer.self_attn
        self.head_dim: int = self.attention.head_dim
        _, cls = recognise(self.attention) or ("", None)
        assert cls is not None
        self.window: int | None = (
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
        step: Step,
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

    def _attend(self, x: Tensor, cache: KeyValueCache, number: int, step: Step, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (1, -1, self.head_dim)) for y in self._qkv(x))
        keys, values = cache.keys(number), cache.values(number)
        q = append_kv(q, k, v, keys, values, step.positions, cos, sin, block_table=step.token_tables)
        scale, window, singles = self.attention.scaling, self.window, step.singles
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
    """What a decoder is made of: other modules, others that are trained, and quantised weights make another one."""
    parts = [decoder] if head is None else [decoder, head]
    modules = tuple(id(module) for part in parts for module in part.modules())
    parameters = [parameter for part in parts for parameter in part.parameters()]
    return modules, tuple((parameter.requires_grad, type(parameter)) for parameter in parameters)


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
