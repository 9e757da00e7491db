"""The model of the original's pattern: a causal LM that splices pictures and queries row by row, and its plugins.

Tensor name suffixes: B batch, T tokens, N pictures, P patches per picture, Q dream queries, H hidden width.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPVisionModel, LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast

from dreamllm.documents import SequenceLayout
from dreamllm.model import DreamLLM
from dreamllm.workloads import made_with


class OriginalPattern(LlamaForCausalLM):
    """Stock modules with a DreamLLM's weights (copied), on its device and in its dtype. `generate` is transformers'."""

    def __init__(self, model: DreamLLM) -> None:
        with made_with(0, model.device, model.dtype):
            self._make(model)
        self.scheduler = DDPMScheduler.from_config(model.config.scheduler_config)  # its tables are the host's
        self._copy(model)
        self.eval()

    def _make(self, model: DreamLLM) -> None:
        config = model.config
        llama = type(config.text_config).from_dict(config.text_config.to_dict())
        llama._attn_implementation = "sdpa"
        LlamaForCausalLM.__init__(self, llama)
        self.layout: SequenceLayout = model.layout
        self.select_layer = config.select_layer
        self.clip = CLIPVisionModel(type(config.vision_config).from_dict(config.vision_config.to_dict()))
        self.visual_projector = nn.Linear(config.vision_config.hidden_size, config.hidden_size)
        self.dream_queries = nn.Parameter(torch.empty(1, config.num_dream_queries, config.hidden_size))
        self.condition_projector = nn.Linear(config.hidden_size, config.condition_size, bias=False)
        self.unet = UNet2DConditionModel.from_config(config.unet_config)
        self.vae = AutoencoderKL.from_config(config.vae_config)

    def _copy(self, model: DreamLLM) -> None:
        own = LlamaForCausalLM.state_dict(self)
        language = model.language_model.state_dict()
        assert set(language) <= set(own)
        with torch.no_grad():
            for name, tensor in language.items():
                own[name].copy_(tensor)
            self.dream_queries.copy_(model.dream_queries[None])
        self.clip.load_state_dict(model.vision_model.state_dict())
        self.unet.load_state_dict(model.unet.state_dict())
        self.vae.load_state_dict(model.vae.state_dict())
        for mine, theirs in (
            (self.visual_projector, model.visual_projector),
            (self.condition_projector, model.condition_projector),
        ):
            mine.load_state_dict({name.split(".")[-1]: tensor for name, tensor in theirs.state_dict().items()})

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """As `DreamLLM.parameter_groups`, in the same order within each group."""
        return {
            "language_model": [*self.model.layers.parameters(), *self.model.norm.parameters()],
            "embeddings": [self.model.embed_tokens.weight],
            "lm_head": [self.lm_head.weight],
            "visual_projector": list(self.visual_projector.parameters()),
            "dream_queries": [self.dream_queries],
            "condition_projector": list(self.condition_projector.parameters()),
            "vision_model": list(self.clip.parameters()),
            "unet": list(self.unet.parameters()),
            "vae": list(self.vae.parameters()),
        }

    # -- embeddings ----------------------------------------------------------------------------------------------------

    def image_features(self, images: Tensor | None) -> tuple[Tensor | None, Tensor]:
        """Projected features [N, P, H], or None without pictures, and what is added to the embeddings (zero).

        A blank picture goes through CLIP where there is none, so that the projector is always part of the graph.
        """
        blank = images is None
        if images is None:
            side = self.clip.config.image_size
            images = torch.zeros(1, 3, side, side, dtype=self.dtype, device=self.device)
        states = self.clip(images.to(self.dtype), output_hidden_states=True).hidden_states[self.select_layer]
        features = self.visual_projector(states[:, 1:])
        return (None, 0.0 * features.sum()) if blank else (features, features.new_zeros(()))

    def splice(self, input_ids: Tensor, images: Tensor | None, with_queries: bool) -> Tensor:
        """Token embeddings [B, T, H] with queries and pictures in place (spec A.8)."""
        embeds = self.model.embed_tokens(input_ids)
        features, nothing = self.image_features(images)
        embeds = embeds + nothing
        queries = self.dream_queries.repeat(len(input_ids), 1, 1)
        rows, number = [], 0
        for ids, row, row_queries in zip(input_ids, embeds, queries, strict=True):
            if with_queries:
                for start in torch.where(ids == self.layout.dream_start)[0]:
                    row = torch.cat([row[: start + 1], row_queries, row[start + len(row_queries) + 1 :]])
            if features is not None:
                for start in torch.where(ids == self.layout.im_start)[0]:
                    if number == len(features):
                        break
                    row = torch.cat([row[: start + 1], features[number], row[start + len(features[number]) + 1 :]])
                    number += 1
            rows.append(row)
        return torch.stack(rows)

    def dream_contexts(self, states_BTH: Tensor, input_ids: Tensor, count: int) -> Tensor:
        """States at the queries of the first `count` pictures to draw, [M, Q, H]."""
        contexts: list[Tensor] = []
        for ids, states in zip(input_ids, states_BTH, strict=True):
            for start in torch.where(ids == self.layout.dream_start)[0]:
                if len(contexts) == count:
                    break
                contexts.append(states[start + 1 : start + 1 + self.layout.num_dream_queries])
        return torch.stack(contexts)

    # -- passes --------------------------------------------------------------------------------------------------------

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        images: Tensor | None = None,
        with_queries: bool = False,
        use_cache: bool | None = None,
        output_hidden_states: bool = False,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Float32 logits of all positions. Without `logits_to_keep`, so that `generate` gets all of them as well."""
        if inputs_embeds is None:
            assert input_ids is not None
            inputs_embeds = self.splice(input_ids, images, with_queries)
        else:
            inputs_embeds = inputs_embeds + self.image_features(None)[1]
        outputs = self.model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
        )
        return CausalLMOutputWithPast(
            logits=self.lm_head(outputs.last_hidden_state).float(),
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states if output_hidden_states else (outputs.last_hidden_state,),
        )

    def prepare_inputs_for_generation(self, input_ids: Tensor, **kwargs: Any) -> dict[str, Any]:
        inputs = super().prepare_inputs_for_generation(input_ids, **kwargs)
        cache = inputs.get("past_key_values")
        if cache is not None and cache.get_seq_length():
            inputs["images"] = None  # they are in the cache; CLIP runs all the same, on a blank picture
        return inputs
