"""Configuration of a DreamLLM: its components' configurations and what joins them."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from transformers import AutoConfig, PretrainedConfig

from dreamllm.documents.layout import SequenceLayout

LossScale = Literal["none", "l1_norm", "l2_norm"]
Compat = Literal["default", "original"]
ProjectorKind = Literal["linear", "mlp"]
TOKEN_FIELDS = ("bos", "eos", "pad", "im_start", "im_patch", "im_end", "dream_start", "dream_end")


class DreamLLMConfig(PretrainedConfig):
    """Everything that decides shapes, sequences and losses.

    Components
        `text_config`: a decoder's configuration (LLaMA; any causal LM that takes `inputs_embeds`).
        `vision_config`: CLIP vision configuration. `unet_config`, `vae_config`, `scheduler_config`: diffusers
        configurations as dictionaries; `vae_config={"_class_name": "IdentityCodec", "channels": c}` diffuses pixels.
    Joints
        `num_dream_queries`: learned queries per created picture (64 in the paper).
        `visual_projector`, `condition_projector`: "linear" (depth 1) or "mlp" (depth >= 2); the visual one has a bias,
        the condition one has none. `visual_projector_norm` adds a LayerNorm after the visual projector.
        `select_layer`: which hidden state of the vision encoder is projected (-2 in the paper); CLS is dropped.
    Sequences
        `token_ids`: ids of bos, eos, pad and the five marker tokens, read from the tokenizer.
        `max_sequence_length`: the longest sequence in tokens.
    Losses (spec A.9)
        total = (`loss_weight_lm` * lm + `loss_weight_vm` * vm) / scale, scale by `loss_scale_schedule`.
        `snr_gamma`: min-SNR weight; `noise_offset`: per-channel constant noise; `input_perturbation`: extra noise on
        the UNet's input only; `condition_dropout`: probability of replacing a condition by the empty prompt's.
    Inference
        `drawing`: the drawing options this model recommends (fields of `dreamllm.inference.DrawingOptions`); empty: the
        original program's.
    `compat`
        "original" reproduces what the original program does where it is defective (docs: ARCHITECTURE.md, table).
    """

    model_type = "dreamllm"
    sub_configs: ClassVar = {"text_config": AutoConfig, "vision_config": AutoConfig}

    def __init__(
        self,
        text_config: PretrainedConfig | dict[str, Any] | None = None,
        vision_config: PretrainedConfig | dict[str, Any] | None = None,
        unet_config: dict[str, Any] | None = None,
        vae_config: dict[str, Any] | None = None,
        scheduler_config: dict[str, Any] | None = None,
        token_ids: dict[str, int] | None = None,
        num_dream_queries: int = 64,
        visual_projector: ProjectorKind = "linear",
        visual_projector_depth: int = 1,
        visual_projector_norm: bool = False,
        condition_projector: ProjectorKind = "linear",
        condition_projector_depth: int = 1,
        select_layer: int = -2,
        max_sequence_length: int = 2048,
        loss_weight_lm: float = 1.0,
        loss_weight_vm: float = 10.0,
        loss_scale_schedule: LossScale = "none",
        snr_gamma: float | None = None,
        noise_offset: float = 0.0,
        input_perturbation: float = 0.0,
        condition_dropout: float = 0.0,
        drawing: dict[str, Any] | None = None,
        compat: Compat = "default",
        **kwargs: Any,
    ) -> None:
        self.text_config = _sub_config(text_config, "llama")
        self.vision_config = _sub_config(vision_config, "clip_vision_model")
        self.unet_config = unet_config or {}
        self.vae_config = vae_config or {}
        self.scheduler_config = scheduler_config or {}
        self.token_ids = token_ids or {}
        self.num_dream_queries = num_dream_queries
        self.visual_projector = visual_projector
        self.visual_projector_depth = visual_projector_depth
        self.visual_projector_norm = visual_projector_norm
        self.condition_projector = condition_projector
        self.condition_projector_depth = condition_projector_depth
        self.select_layer = select_layer
        self.max_sequence_length = max_sequence_length
        self.loss_weight_lm = loss_weight_lm
        self.loss_weight_vm = loss_weight_vm
        self.loss_scale_schedule = loss_scale_schedule
        self.snr_gamma = snr_gamma
        self.noise_offset = noise_offset
        self.input_perturbation = input_perturbation
        self.condition_dropout = condition_dropout
        self.drawing = drawing or {}
        self.compat = compat
        self._check()
        kwargs.setdefault("bos_token_id", self.token_ids.get("bos"))
        kwargs.setdefault("eos_token_id", self.token_ids.get("eos"))
        kwargs.setdefault("pad_token_id", self.token_ids.get("pad"))
        kwargs.setdefault("tie_word_embeddings", getattr(self.text_config, "tie_word_embeddings", False))
        super().__init__(**kwargs)

    def _check(self) -> None:
        _check_choice("loss_scale_schedule", self.loss_scale_schedule, ("none", "l1_norm", "l2_norm"))
        _check_choice("compat", self.compat, ("default", "original"))
        for side in ("visual_projector", "condition_projector"):
            kind, depth = getattr(self, side), getattr(self, f"{side}_depth")
            _check_choice(side, kind, ("linear", "mlp"))
            if (kind == "linear") != (depth == 1):
                raise ValueError(
                    f"{side} 'linear' has depth 1 and 'mlp' depth 2 or more; {kind!r} with {depth} was given"
                )
        if not 0.0 <= self.condition_dropout < 1.0:
            raise ValueError(f"condition_dropout must be in [0, 1), not {self.condition_dropout}")
        if self.num_dream_queries < 1:
            raise ValueError(f"num_dream_queries must be positive, not {self.num_dream_queries}")

    @property
    def hidden_size(self) -> int:
        return self.text_config.hidden_size

    @property
    def vocab_size(self) -> int:
        return self.text_config.vocab_size

    @property
    def tokens_per_image(self) -> int:
        return (self.vision_config.image_size // self.vision_config.patch_size) ** 2

    @property
    def condition_size(self) -> int:
        return self.unet_config["cross_attention_dim"]

    @property
    def identity_codec(self) -> bool:
        return self.vae_config.get("_class_name") == "IdentityCodec"

    @property
    def picture_channels(self) -> int:
        """Channels of created pictures: 3, or the identity codec's."""
        return self.vae_config["channels"] if self.identity_codec else self.vae_config.get("out_channels", 3)

    @property
    def spatial_factor(self) -> int:
        """Pixels per latent position, along one side."""
        return 1 if self.identity_codec else 2 ** (len(self.vae_config["block_out_channels"]) - 1)

    @property
    def picture_size(self) -> int:
        """Side of a created picture in pixels."""
        return self.unet_config["sample_size"] * self.spatial_factor

    def layout(self) -> SequenceLayout:
        """The sequence layout that this model was built for."""
        missing = [name for name in TOKEN_FIELDS if name not in self.token_ids]
        if missing:
            raise ValueError(
                f"the configuration lacks token ids for {', '.join(missing)}; read them from the tokenizer"
            )
        return SequenceLayout(
            **{name: self.token_ids[name] for name in TOKEN_FIELDS},
            tokens_per_image=self.tokens_per_image,
            num_dream_queries=self.num_dream_queries,
            max_length=self.max_sequence_length,
            vocab_size=self.vocab_size,
        )


def _sub_config(config: PretrainedConfig | dict[str, Any] | None, default_type: str) -> PretrainedConfig:
    if isinstance(config, PretrainedConfig):
        return config
    values = dict(config or {})
    return AutoConfig.for_model(values.pop("model_type", default_type), **values)


def _check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, not {value!r}")
