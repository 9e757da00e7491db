"""The training forward of a ...ForCausalLM: the loss from the last states, without logits."""

from __future__ import annotations

import warnings
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import CausalLMOutputWithPast

from dreamkernels.integrations.llama_layout import has_hooks
from dreamkernels.ops import linear_cross_entropy
from dreamkernels.ops.operator import FLOAT_DTYPES, FallbackWarning


def causal_lm_forward(
    self: Any,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    past_key_values: Any = None,
    inputs_embeds: Tensor | None = None,
    labels: Tensor | None = None,
    use_cache: bool | None = None,
    logits_to_keep: int | Tensor = 0,
    skip_logits: bool | None = None,
    **kwargs: Any,
) -> CausalLMOutputWithPast | tuple[Any, ...]:
    """As the model's own, except that with `labels` in training mode no logits are computed: `output.logits` is None.

    `skip_logits` decides it explicitly, in either mode. Everything that does not skip them is the model's own forward.
    """
    inputs = {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "position_ids": position_ids,
        "past_key_values": past_key_values,
        "inputs_embeds": inputs_embeds,
        "use_cache": use_cache,
    }
    if skip_logits and labels is None:
        raise ValueError("skip_logits=True needs labels: without them there is no loss to compute instead")
    if skip_logits is None:
        skip_logits = self.training and labels is not None
    if skip_logits and (reason := fused_loss_obstacle(self)):
        warnings.warn(
            f"linear_cross_entropy is not used: {reason}; the logits of all tokens are held in memory",
            FallbackWarning,
            stacklevel=2,
        )
        skip_logits = False
    if not skip_logits or labels is None:
        return type(self).forward(self, **inputs, labels=labels, logits_to_keep=logits_to_keep, **kwargs)

    return_dict = kwargs.pop("return_dict", None)
    outputs = self.model(**inputs, **kwargs)
    result = CausalLMOutputWithPast(
        loss=fused_loss(self, outputs.last_hidden_state, labels, **kwargs),
        past_key_values=outputs.past_key_values,
        hidden_states=outputs.hidden_states,
        attentions=outputs.attentions,
    )
    return result if (self.config.return_dict if return_dict is None else return_dict) else result.to_tuple()


def fused_loss(
    model: Any,
    states_BTH: Tensor,
    labels: Tensor,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    **_: Any,
) -> Tensor:
    """What transformers' ForCausalLMLoss makes of the logits: position t predicts label t + 1; the mean over all
    labels, or their sum over `num_items_in_batch`."""
    if shift_labels is None:
        shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    reduction = "mean" if num_items_in_batch is None else "sum"
    targets = shift_labels.to(states_BTH.device).flatten()
    loss = linear_cross_entropy(
        states_BTH.flatten(0, 1), model.lm_head.weight, targets, ignore_index=ignore_index, reduction=reduction
    )
    if num_items_in_batch is None:
        return loss
    count = num_items_in_batch.to(loss.device) if isinstance(num_items_in_batch, Tensor) else num_items_in_batch
    return loss / count


def fused_loss_obstacle(model: Any) -> str:
    """Why the loss needs the logits, or "". Asked again at every call: adapters may come after `optimize`."""
    head, function = model.lm_head, model.loss_function
    if function is not ForCausalLMLoss:
        return f"the model's loss is {getattr(function, '__name__', function)}, not ForCausalLMLoss"
    if type(head) is not nn.Linear:
        return f"lm_head is a {type(head).__name__}, not a Linear"
    if head.bias is not None:
        return "lm_head is a Linear with a bias"
    if type(head.weight) is not nn.Parameter or head.weight.dtype not in FLOAT_DTYPES:
        return f"the weight of lm_head is a {type(head.weight).__name__} of {head.weight.dtype}"
    return "lm_head has hooks" if has_hooks(head) or "forward" in head.__dict__ else ""
