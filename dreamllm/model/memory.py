"""What the decoder's layers keep between forward and backward pass, and what they compute again."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

if TYPE_CHECKING:
    from dreamllm.model.modeling import DreamLLM

Recompute = Literal["auto", "none", "selective", "full"]
RECOMPUTE: tuple[Recompute, ...] = ("auto", "none", "selective", "full")


def recompute_layers(model: DreamLLM, mode: Recompute) -> Recompute:
    """Switches what the decoder's layers compute again for the gradient; returns what "auto" chose.

    "full": a layer keeps its input. "selective": also what its attention returned. Attention is the only part of a
    layer whose time grows with the square of the length, and its result the smallest thing in it for that time; the
    projections, norms and the MLP are computed again.
    """
    if mode not in RECOMPUTE:
        raise ValueError(f"recompute_layers must be one of {', '.join(RECOMPUTE)}, not {mode!r}")
    if mode == "auto":
        apart = {
            id(p) for p in (*model.get_input_embeddings().parameters(), *model.get_output_embeddings().parameters())
        }
        trained = any(p.requires_grad and id(p) not in apart for p in model.language_model.parameters())
        mode = "selective" if trained else "none"
    options: dict[str, Any] = {"use_reentrant": False}
    if mode == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _keep_attention)
    language_model: Any = model.language_model
    name = "activation" if hasattr(language_model, "activation_checkpointing_enable") else "gradient"  # of transformers
    if mode == "none":
        getattr(language_model, f"{name}_checkpointing_disable")()
    else:
        getattr(language_model, f"{name}_checkpointing_enable")(options)
    return mode


def _keep_attention(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Ours, torch's `_scaled_dot_product_attention...` and flash-attn's alike."""
    name = operator._schema.name if hasattr(operator, "_schema") else operator.name()
    kept = "attention" in name or "attn" in name
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
