"""DreamLLM: a causal language model that reads CLIP features and writes conditions for a diffusion UNet.

Tensor name suffixes: B batch, T tokens, S sequences, N input pictures, M created pictures, P patches per picture,
Q dream queries, H hidden width, C condition width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import ModelOutput

from dreamkernels import DreamCondition
from dreamkernels.integrations.diffusers import DiffusersReport
from dreamkernels.integrations.diffusers import optimize as optimize_diffusion
from dreamkernels.integrations.transformers import Report, RowsWanted, optimize, takes_rows
from dreamkernels.integrations.transformers_attention import no_mask
from dreamkernels.ops import linear_cross_entropy, splice_embeddings
from dreamllm.documents.batch import PackedBatch
from dreamllm.model import padded
from dreamllm.model.attention import ATTENTION_NAME, PackedLayout, use_dreamkernels_attention
from dreamllm.model.codec import build_codec, encode_moments, encode_pictures, sample_moments
from dreamllm.model.configuration import DreamLLMConfig
from dreamllm.model.creation import CreationSplit, Packing, dependent_states, why_not_split
from dreamllm.model.diffusion import (
    DiffusionDraws,
    NoiseSchedule,
    diffusion_loss,
    draw_diffusion,
    dtype_of,
    mean_in_parts,
)
from dreamllm.model.memory import Recompute
from dreamllm.model.memory import recompute_layers as recompute_layers_of
from dreamllm.model.pixels import check_pixels
from dreamllm.model.projector import Projector
from dreamllm.model.slots import find_slots
from dreamllm.model.weights import CheckpointError

QUERY_INIT_STD = 0.02

PARAMETER_GROUPS = (
    "language_model",
    "embeddings",
    "lm_head",
    "visual_projector",
    "dream_queries",
    "condition_projector",
    "vision_model",
    "unet",
    "vae",
)
"""What `set_trainable` can switch. "language_model" is the decoder's layers without embeddings and head."""


@dataclass
class DreamLLMOutput(ModelOutput):
    """`loss` and its parts (float32 scalars; None where not computed), `logits` [B, T, vocabulary], `past_key_values`.

    `num_loss_tokens` and `num_pictures` count what the two losses average over.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: Any = None
    lm_loss: Tensor | None = None
    vm_loss: Tensor | None = None
    hidden_states: Tensor | None = None
    num_loss_tokens: int | None = None
    num_pictures: int | None = None


class DreamLLM(PreTrainedModel, GenerationMixin):
    """The model. `forward` is the Hugging Face interface on padded batches; `forward_packed` is what training uses."""

    config_class = DreamLLMConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _no_split_modules: ClassVar = ["LlamaDecoderLayer", "CLIPEncoderLayer"]

    def __init__(self, config: DreamLLMConfig) -> None:
        super().__init__(config)
        self.language_model = AutoModelForCausalLM.from_config(config.text_config)
        self.vision_model = AutoModel.from_config(config.vision_config)
        self.visual_projector = Projector(
            config.vision_config.hidden_size,
            config.hidden_size,
            config.visual_projector,
            config.visual_projector_depth,
            norm=config.visual_projector_norm,
        )
        self.dream_queries = nn.Parameter(torch.empty(config.num_dream_queries, config.hidden_size))
        self.condition_projector = Projector(
            config.hidden_size,
            config.condition_size,
            config.condition_projector,
            config.condition_projector_depth,
            bias=False,
        )
        self.unet = UNet2DConditionModel.from_config(config.unet_config)
        self.vae = build_codec(config.vae_config)
        self.schedule = NoiseSchedule(config.scheduler_config)
        self.layout = config.layout()
        self.post_init()
        use_dreamkernels_attention(self.language_model)
        use_dreamkernels_attention(self.vision_model)
        self.unet.requires_grad_(False)  # both are frozen in every stage of the training
        self.vae.requires_grad_(False)
        self.pictures_per_pass: int | None = None
        self.recompute_layers: Recompute = "none"
        self.splits_creation = True
        self.operators: Report | None = None
        self.diffusion_operators: DiffusersReport | None = None
        self.use_fused_operators()

    def _init_weights(self, module: nn.Module) -> None:
        # Everything else keeps its library's own initialisation (the projectors PyTorch's, as in the original).
        if module is self and not getattr(self.dream_queries, "_is_hf_initialized", False):
            nn.init.normal_(self.dream_queries, std=QUERY_INIT_STD)

    def use_fused_operators(self, enabled: bool = True, keep_copies: bool = True) -> None:
        """Whether the model runs dreamkernels' fused operators (the default) or its libraries' own code.

        `keep_copies`: UNet and VAE may keep their frozen weights in further forms, which are faster.
        `self.operators` reports what they replaced in the language model, `self.diffusion_operators` what in UNet and
        VAE; None when they are not used.
        """
        if enabled and self.operators is None:
            self.operators = optimize(self.language_model)
            self.diffusion_operators = optimize_diffusion(self, frozen=keep_copies)
        elif not enabled and self.operators is not None:
            for report in (self.operators, self.diffusion_operators):
                if report is not None:
                    report.undo()
            self.operators = self.diffusion_operators = None

    def use_less_memory(self, recompute_layers: Recompute = "auto", pictures_per_pass: int | None = None) -> None:
        """Trades time for memory in training, without changing what is computed beyond rounding.

        `recompute_layers`: what the decoder's layers compute again for the gradient. "none"; "full": everything, a
        layer keeps its input only; "selective": everything but the attention; "auto": "selective" where layers are
        trained now, otherwise "none".
        `pictures_per_pass`: VAE and UNet take at most so many pictures at a time; None: all of a batch. Either way a
        frozen UNet's backward pass follows its forward pass at once, see `mean_in_parts`.
        Raises `ValueError` for an unknown choice and for fewer than one picture.
        """
        if pictures_per_pass is not None and pictures_per_pass < 1:
            raise ValueError(f"pictures_per_pass must be at least 1 (or None), not {pictures_per_pass}")
        self.pictures_per_pass = pictures_per_pass
        self.recompute_layers = recompute_layers_of(self, recompute_layers)

    @property
    def packs_attention(self) -> bool:
        """Whether packed batches stay packed through the decoder; with another attention they run on a padded grid."""
        return self.language_model.config._attn_implementation == ATTENTION_NAME

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, *args: Any, **kwargs: Any) -> DreamLLM:
        """Loads a model saved by `save_pretrained`.

        Takes transformers' arguments (dtype, device_map, ...). Unlike transformers' own, a missing, mis-shaped or
        unexpected tensor is a `CheckpointError` that names it with expected and found shape.
        """
        kwargs["ignore_mismatched_sizes"] = True  # so that all are found and named, not only the first
        source = str(pretrained_model_name_or_path)
        try:
            model, info = super().from_pretrained(source, *args, output_loading_info=True, **kwargs)
        except SafetensorError as error:
            raise CheckpointError(f"{source} holds a truncated or corrupt weight file: {error}") from error
        shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
        problems = [f"missing: {name} {shapes[name]}" for name in sorted(info["missing_keys"])]
        problems += [
            f"wrong shape: {name}, expected {list(expected)}, found {list(found)}"
            for name, found, expected in sorted(info["mismatched_keys"])
        ]
        problems += [f"unexpected: {name}" for name in sorted(info["unexpected_keys"])]
        if problems:
            raise CheckpointError(f"{source} does not fit the model:\n  " + "\n  ".join(problems[:20]))
        model.use_fused_operators(False)  # again, as they bring the weights into their memory format
        model.use_fused_operators()
        return model

    # -- parts ------------------------------------------------------------

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_output_embeddings(value)

    @property
    def decoder(self) -> nn.Module:
        """The language model without its head: inputs_embeds -> states after the final norm."""
        return self.language_model.get_decoder()

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """The parameters by group; every parameter is in exactly one."""
        embeddings = list(self.get_input_embeddings().parameters())
        head = list(self.get_output_embeddings().parameters())
        if self.config.tie_word_embeddings:
            head = []
        apart = {id(p) for p in [*embeddings, *head]}
        return {
            "language_model": [p for p in self.language_model.parameters() if id(p) not in apart],
            "embeddings": embeddings,
            "lm_head": head,
            "visual_projector": list(self.visual_projector.parameters()),
            "dream_queries": [self.dream_queries],
            "condition_projector": list(self.condition_projector.parameters()),
            "vision_model": list(self.vision_model.parameters()),
            "unet": list(self.unet.parameters()),
            "vae": list(self.vae.parameters()),
        }

    def set_trainable(self, groups: set[str]) -> None:
        """Makes exactly the parameters of `groups` require a gradient. Raises `ValueError` for an unknown group."""
        unknown = groups - set(PARAMETER_GROUPS)
        if unknown:
            raise ValueError(f"unknown parameter groups {sorted(unknown)}; known: {', '.join(PARAMETER_GROUPS)}")
        for name, parameters in self.parameter_groups().items():
            for parameter in parameters:
                parameter.requires_grad_(name in groups)

    def encode_images(self, pixel_values: Tensor) -> Tensor:
        """CLIP pixel values [N, 3, h, w] -> projected features [N, P, H]."""
        size = self.config.vision_config.image_size
        if pixel_values.shape[1:] != (3, size, size):
            raise ValueError(f"pixel_values must be [N, 3, {size}, {size}], not {list(pixel_values.shape)}")
        check_pixels(pixel_values)
        states = self.vision_model(pixel_values.to(self.vision_model.dtype), output_hidden_states=True).hidden_states
        return self.visual_projector(states[self.config.select_layer][:, 1:])

    def project_condition(self, dream_states: Tensor) -> Tensor:
        """States at the dream queries [M, Q, H] -> the UNet's condition [M, Q, C]."""
        return self.condition_projector(dream_states)

    def embed(self, input_ids: Tensor, splice_index: Tensor, image_features: Tensor | None) -> Tensor:
        """Token embeddings [T, H] with image features and dream queries placed by `splice_index` [T]."""
        tokens = self.get_input_embeddings()(input_ids)
        sources = [self.dream_queries] if image_features is None else [image_features.flatten(0, 1), self.dream_queries]
        return splice_embeddings(tokens, [s.to(tokens.dtype) for s in sources], splice_index)

    # -- packed: training and conditions ------------------------------------------------------------

    def states_packed(self, batch: PackedBatch, rows: Tensor | None = None) -> Tensor:
        """Final states [T, H] of a packed batch, or those of the positions `rows`; sequences do not see each other."""
        features = None if batch.pixel_values is None else self.encode_images(batch.pixel_values)
        embeds_TH = self.embed(batch.input_ids, batch.splice_index, features)
        if self.packs_attention:
            return self.decode_packed(embeds_TH, batch.position_ids, batch, batch, rows)
        # Causality keeps the grid's padding out.
        layout = PackedLayout.from_cu_seqlens(batch.cu_seqlens, batch.max_seqlen, batch.num_tokens)
        states = layout.scatter(self.decoder(inputs_embeds=layout.gather(embeds_TH), use_cache=False).last_hidden_state)
        return states if rows is None else states[rows]

    def decode_packed(
        self,
        embeds_TH: Tensor,
        position_ids: Tensor,
        queries: Packing,
        keys: Packing,
        rows: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        """Final states of packed embeddings: of all, [T, H], or of `rows`, whose last layer then computes no others.

        `queries` and `keys` are the lengths of the sequences and of what they attend to; `options` go to the attention.
        """
        last_layer = self.config.text_config.num_hidden_layers - 1
        if rows is not None and takes_rows(self.decoder):
            options["rows_wanted"] = RowsWanted(rows, last_layer)
        states = self.decoder(
            inputs_embeds=embeds_TH[None],
            attention_mask=no_mask(embeds_TH),
            position_ids=position_ids[None],
            use_cache=False,
            cu_seq_lens_q=queries.cu_seqlens,
            cu_seq_lens_k=keys.cu_seqlens,
            max_length_q=queries.max_seqlen,
            max_length_k=keys.max_seqlen,
            **options,
        ).last_hidden_state[0]
        return states if rows is None or "rows_wanted" in options else states[rows]

    def why_not_split(self, batch: PackedBatch) -> str:
        """Why `forward_packed` runs the whole of `batch` with autograd, or "".

        With a frozen language model whose own loss does not count, only the dream queries need it (`creation.py`). The
        answer depends on what `set_trainable` chose, on the loss weights, and on the batch.
        """
        return why_not_split(self, batch)

    def forward_packed(
        self,
        batch: PackedBatch,
        generator: torch.Generator | None = None,
        draws: DiffusionDraws | None = None,
        target_latents: Tensor | None = None,
    ) -> DreamLLMOutput:
        """Losses of a packed batch, without logits and without a host synchronisation.

        A language loss whose weight is 0 is not computed: `lm_loss` is None. What does not need autograd then runs
        without, see `why_not_split`. `generator` draws the diffusion's random numbers; `draws` and `target_latents`
        (scaled, [M, C, h, w]; default: those of the batch, if it has any) replace them. Raises `ValueError` when the
        dream slots do not match the target pictures.
        """
        dream, null = batch.dream_positions, batch.null_positions
        read = [batch.loss_positions if self.config.loss_weight_lm else batch.loss_positions[:0], dream.flatten()]
        read += [] if null is None else [null]
        states = self._states_at(batch, torch.cat(read)).split([positions.numel() for positions in read])
        lm_loss = vm_loss = None
        if self.config.loss_weight_lm:
            lm_loss = self._lm_loss(states[0], batch.loss_targets)
        count = dream.shape[0]
        if count:
            latents = self._packed_latents(batch, target_latents, generator)
            null_QH = None if null is None else states[2]
            vm_loss = self._vm_loss(states[1].unflatten(0, dream.shape), latents, null_QH, generator, draws)
        return DreamLLMOutput(
            loss=self._total_loss(lm_loss, vm_loss),
            lm_loss=lm_loss,
            vm_loss=vm_loss,
            num_loss_tokens=batch.loss_targets.numel(),
            num_pictures=count,
        )

    def _states_at(self, batch: PackedBatch, positions: Tensor) -> Tensor:
        """Final states [N, H] at `positions`, with no more autograd than necessary."""
        if self.why_not_split(batch):
            return self.states_packed(batch, positions)
        split = CreationSplit.of(batch)
        return dependent_states(self, batch, split, split.row_of[positions])

    def dream_states_packed(self, batch: PackedBatch) -> Tensor:
        """States at the dream queries of a packed batch, [M, Q, H], before the condition projector."""
        positions = batch.dream_positions
        return self.states_packed(batch, positions.flatten()).unflatten(0, positions.shape)

    # -- losses ------------------------------------------------------------

    def _lm_loss(self, states_KH: Tensor, targets_K: Tensor) -> Tensor:
        if targets_K.numel() == 0:
            return states_KH.float().sum()
        head = self.get_output_embeddings()
        if self.operators is not None and type(head) is nn.Linear and head.bias is None:
            return linear_cross_entropy(states_KH, head.weight, targets_K)
        return F.cross_entropy(head(states_KH).float(), targets_K)

    def _packed_latents(self, batch: PackedBatch, latents: Tensor | None, generator: torch.Generator | None) -> Tensor:
        """Scaled latents of the pictures to create: `latents`, or what the batch holds of them, or of its pixels."""
        known = batch.target_latents if latents is None else latents
        count, moments = batch.dream_positions.shape[0], batch.target_moments
        if known is not None or moments is None:
            return self._latents(batch.target_pixel_values, known, count, generator)
        if moments.shape[0] != count:
            raise ValueError(
                f"{count} dream slots but moments of {moments.shape[0]} pictures; they must match one to one"
            )
        with torch.no_grad():
            if batch.target_pixel_values is not None:
                assert batch.unknown_moments is not None
                encoded = encode_moments(self.vae, batch.target_pixel_values, self.pictures_per_pass)
                moments = moments.index_copy(0, batch.unknown_moments, encoded.to(moments.dtype))
            return sample_moments(self.vae, moments, generator)

    def _latents(
        self, pixels: Tensor | None, latents: Tensor | None, slots: int, generator: torch.Generator | None
    ) -> Tensor:
        given = latents if latents is not None else pixels
        if given is None or given.shape[0] != slots:
            found = 0 if given is None else given.shape[0]
            raise ValueError(f"{slots} dream slots but {found} target pictures; they must match one to one")
        if latents is not None:
            return latents
        with torch.no_grad():
            return encode_pictures(self.vae, given, generator, self.pictures_per_pass)

    def _vm_loss(
        self,
        states_MQH: Tensor,
        latents: Tensor,
        null_QH: Tensor | None,
        generator: torch.Generator | None,
        draws: DiffusionDraws | None,
    ) -> Tensor:
        if draws is None:
            draws = draw_diffusion(self.config, tuple(latents.shape), latents.device, generator)
        if draws.keep_condition is not None:
            if null_QH is None:
                raise ValueError("condition_dropout needs the empty prompt in the batch: pack it with with_null=True")
            states_MQH = torch.where(draws.keep_condition[:, None, None], states_MQH, null_QH)
        condition_MQC = self.project_condition(states_MQH)

        def loss_of(pictures: slice, part_MQC: Tensor) -> Tensor:
            prepared = self.prepare_condition(part_MQC)
            return diffusion_loss(
                self.config, self.schedule, self.unet, latents[pictures], prepared, draws.of(pictures)
            )

        if any(parameter.requires_grad for parameter in self.unet.parameters()):
            if self.pictures_per_pass is not None:
                raise ValueError("pictures_per_pass needs a UNet that is not trained; set it to None")
            return loss_of(slice(None), condition_MQC)
        return mean_in_parts(loss_of, condition_MQC, self.pictures_per_pass or condition_MQC.shape[0])

    def prepare_condition(self, condition_MQC: Tensor) -> Tensor | DreamCondition:
        """What the UNet takes as condition: with the fused operators, keys and values of all its layers at once."""
        condition_MQC = condition_MQC.to(dtype_of(self.unet))
        if self.diffusion_operators is None or not self.diffusion_operators.takes_conditions(self.unet):
            return condition_MQC
        return self.diffusion_operators.condition(condition_MQC, unet=self.unet)

    def prepare_times(self, timesteps: Tensor) -> Sequence[Any]:
        """What the UNet takes as time at each step of a schedule: with the fused operators, rows of a table."""
        if self.diffusion_operators is None or not self.diffusion_operators.takes_time_tables(self.unet):
            return timesteps.unbind()
        return self.diffusion_operators.time_table(timesteps, unet=self.unet)

    def _total_loss(self, lm_loss: Tensor | None, vm_loss: Tensor | None) -> Tensor | None:
        w_lm, w_vm = self.config.loss_weight_lm, self.config.loss_weight_vm
        scale = {"none": 1.0, "l1_norm": w_lm + w_vm, "l2_norm": (w_lm**2 + w_vm**2) ** 0.5}
        terms = [w * loss for w, loss in ((w_lm, lm_loss), (w_vm, vm_loss)) if loss is not None and w]
        return sum(terms) / scale[self.config.loss_scale_schedule] if terms else None

    # -- padded: the Hugging Face interface ------------------------------------------------------------

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        pixel_values: Tensor | None = None,
        target_pixel_values: Tensor | None = None,
        target_latents: Tensor | None = None,
        draws: DiffusionDraws | None = None,
        generator: torch.Generator | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> DreamLLMOutput:
        """Logits, and with `labels` or targets the losses, of a padded batch [B, T].

        `pixel_values` [N, 3, h, w] fill the `<im_start>` slots in reading order, `target_pixel_values` [M, C, H, W] in
        [-1, 1] (or `target_latents`) are what the `<dream_start>` slots shall create. Positions count real tokens, so
        padding on either side changes nothing. Raises `ValueError` for ids outside the vocabulary (CPU), slots that do
        not match the pictures, and input longer than the context.
        """
        slots = None
        if inputs_embeds is None:
            if input_ids is None:
                raise ValueError("input_ids or inputs_embeds must be given")
            padded.check_ids(self, input_ids, past_key_values)
            slots = find_slots(input_ids, self.layout, padded.is_first_call(past_key_values))
            if slots is not None:
                with_targets = target_pixel_values is not None or target_latents is not None
                inputs_embeds = padded.embed_slots(self, input_ids, slots, pixel_values, with_targets)
        if position_ids is None and attention_mask is not None and attention_mask.ndim == 2:
            given = input_ids if inputs_embeds is None else inputs_embeds
            assert given is not None
            position_ids = padded.positions(self, attention_mask, given.shape[1])
        outputs = self.decoder(
            input_ids=input_ids if inputs_embeds is None else None,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        states_BTH = outputs.last_hidden_state
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.get_output_embeddings()(states_BTH[:, kept])
        lm_loss = None if labels is None else padded.lm_loss(self, states_BTH, labels)
        vm_loss = None
        if target_pixel_values is not None or target_latents is not None:
            targets = target_pixel_values, target_latents
            vm_loss = padded.vm_loss(self, states_BTH, slots, targets, generator, draws)
        return DreamLLMOutput(
            loss=self._total_loss(lm_loss, vm_loss),
            logits=logits,
            past_key_values=outputs.past_key_values,
            lm_loss=lm_loss,
            vm_loss=vm_loss,
            hidden_states=states_BTH if kwargs.get("output_hidden_states") else None,
        )

    # -- generation ------------------------------------------------------------

    def prepare_inputs_for_generation(self, input_ids: Tensor, past_key_values: Any = None, **kwargs: Any) -> dict:
        first = padded.is_first_call(past_key_values)
        inputs = super().prepare_inputs_for_generation(input_ids, past_key_values=past_key_values, **kwargs)
        inputs["pixel_values"] = kwargs.get("pixel_values") if first else None
        return inputs

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, dict[str, Any]]:
        """Repeats rows for beams; the pictures of a row stay together and in order."""
        pictures = kwargs.pop("pixel_values", None)
        if pictures is not None and input_ids is not None and expand_size > 1:
            slots = find_slots(input_ids, self.layout, first_call=True)
            assert slots is not None
            rows = torch.bincount(slots.image_starts // input_ids.shape[1], minlength=input_ids.shape[0])
            pictures = torch.cat([row.repeat(expand_size, 1, 1, 1) for row in pictures.split(rows.tolist())])
        expanded, kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **kwargs
        )
        return expanded, kwargs if pictures is None else {**kwargs, "pixel_values": pictures}


AutoConfig.register(DreamLLMConfig.model_type, DreamLLMConfig, exist_ok=True)
AutoModel.register(DreamLLMConfig, DreamLLM, exist_ok=True)
AutoModelForCausalLM.register(DreamLLMConfig, DreamLLM, exist_ok=True)
