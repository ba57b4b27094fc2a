"""The architecture of wav2vec 2.0, with the presets `base` and `tiny`."""

import dataclasses
import math
from typing import Any, Literal

from common.command import nearest
from common.errors import DataError, UsageError


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Architecture of wav2vec 2.0; field names and defaults as in transformers' `Wav2Vec2Config`.

    Default dropout rates are those of the original base recipe (fairseq
    `wav2vec2_base_librispeech.yaml`) instead of transformers'.
    """

    conv_dim: tuple[int, ...] = (512,) * 7
    """Output channels of each convolution of the feature extractor."""
    conv_kernel: tuple[int, ...] = (10, 3, 3, 3, 3, 2, 2)
    """Taps of each convolution: samples for the first, rows of the layer before for the others."""
    conv_stride: tuple[int, ...] = (5, 2, 2, 2, 2, 2, 2)
    """Stride of each convolution; their product, 320 samples (20 ms), is the hop between frames."""
    conv_bias: bool = False
    feat_extract_norm: Literal["group", "layer"] = "group"
    """`group`: layer 0 only, over time per channel (base); `layer`: all layers, over channels."""
    do_stable_layer_norm: bool = False
    """Layer norm before (True) or after (False, base) attention and feed-forward network."""
    do_normalize: bool = False
    """Whether each waveform is brought to mean 0 and variance 1 first. In a checkpoint this is in
    `preprocessor_config.json`, as transformers has it."""
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    num_conv_pos_embeddings: int = 128
    """Taps of the positional convolution, in frames."""
    num_conv_pos_embedding_groups: int = 16
    layer_norm_eps: float = 1e-5
    hidden_dropout: float = 0.1
    activation_dropout: float = 0.0
    attention_dropout: float = 0.1
    feat_proj_dropout: float = 0.1
    """Dropout of the projected features (fairseq `dropout_input`)."""
    feat_quantizer_dropout: float = 0.1
    """Dropout of the features to be quantised (fairseq `dropout_features`)."""
    layerdrop: float = 0.05
    """Probability that a transformer layer is skipped for a whole batch."""
    num_codevector_groups: int = 2
    num_codevectors_per_group: int = 320
    codevector_dim: int = 256
    proj_codevector_dim: int = 256
    num_negatives: int = 100
    contrastive_logits_temperature: float = 0.1
    diversity_loss_weight: float = 0.1
    mask_time_prob: float = 0.65
    """Fraction of frames in masked spans if none overlapped (fairseq `mask_prob`)."""
    mask_time_length: int = 10
    """Frames in a masked span."""
    mask_time_min_masks: int = 2
    """Minimum number of spans in a crop."""
    initializer_range: float = 0.02
    """Standard deviation of the transformer's initial weights (BERT)."""
    initial_taps: Literal["independent", "shared"] = "independent"
    """Initial weights of the convolutions after the first. `independent`: one draw for each tap
    (the original); neighbouring frames are almost unrelated at first. `shared`: one draw for all
    taps of a filter, a low-pass filter of the first layer's rectified output; neighbouring frames
    are similar from the first update on, and small models beat chance at once."""

    def validate(self) -> None:
        """Check that the fields fit together.

        Raises:
            UsageError: an unsupported combination; the message names the fields.
        """
        if not len(self.conv_dim) == len(self.conv_kernel) == len(self.conv_stride) > 0:
            raise UsageError("conv_dim, conv_kernel and conv_stride must have the same length")
        pairs = list(zip(self.conv_kernel, self.conv_stride, strict=True))
        if len(pairs) < 2 or not all(stride <= kernel <= 2 * stride for kernel, stride in pairs):
            raise UsageError(
                "at least two convolutions are needed, each with stride <= kernel <= 2 * stride; "
                f"conv_kernel is {self.conv_kernel}, conv_stride is {self.conv_stride}"
            )
        if self.hidden_size % self.num_attention_heads:
            raise UsageError(
                f"hidden_size {self.hidden_size} is not a multiple of "
                f"num_attention_heads {self.num_attention_heads}"
            )
        if self.hidden_size % self.num_conv_pos_embedding_groups:
            raise UsageError(
                f"hidden_size {self.hidden_size} is not a multiple of "
                f"num_conv_pos_embedding_groups {self.num_conv_pos_embedding_groups}"
            )
        if self.codevector_dim % self.num_codevector_groups:
            raise UsageError("codevector_dim is not a multiple of num_codevector_groups")
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, float) and not math.isfinite(value):
                raise UsageError(f"{field.name} must be finite, not {value}")
            if field.name.endswith(("dropout", "layerdrop")) and not 0 <= value < 1:
                raise UsageError(f"{field.name} must be in [0, 1), not {value}")
        if not 0 <= self.mask_time_prob <= 1:
            raise UsageError(f"mask_time_prob must be in [0, 1], not {self.mask_time_prob}")

    def frames(self, samples: int) -> int:
        """Number of frames of a waveform of `samples` samples; 0 if it is too short."""
        for kernel, stride in zip(self.conv_kernel, self.conv_stride, strict=True):
            samples = (samples - kernel) // stride + 1 if samples >= kernel else 0
        return samples

    def to_hf(self) -> dict[str, Any]:
        """The contents of transformers' `config.json`; `do_normalize` is not among them."""
        values = dataclasses.asdict(self)
        del values["do_normalize"]
        return {
            **{key: list(v) if isinstance(v, tuple) else v for key, v in values.items()},
            "architectures": ["Wav2Vec2ForPreTraining"],
            "model_type": "wav2vec2",
            "num_feat_extract_layers": len(self.conv_dim),
            "feat_extract_activation": "gelu",
            "hidden_act": "gelu",
            "final_dropout": 0.0,
            "mask_feature_prob": 0.0,
            "torch_dtype": "float32",
        }

    @classmethod
    def from_hf(cls, values: dict[str, Any], where: str) -> "ModelConfig":
        """Read transformers' `config.json`; `where` names it in errors.

        Raises:
            DataError: not a wav2vec 2.0 model, one with unsupported parts, or a bad value.
        """
        if not isinstance(values, dict):
            raise DataError(f"{where} is not a configuration of a model")
        if values.get("model_type") != "wav2vec2":
            raise DataError(f"{where}: model_type is '{values.get('model_type')}', not wav2vec2")
        for key in ("feat_extract_activation", "hidden_act"):
            if values.get(key, "gelu") != "gelu":
                raise DataError(f"{where}: {key} '{values[key]}' is not supported, only gelu")
        for key, advice in _UNSUPPORTED.items():
            if values.get(key):
                raise DataError(f"{where}: {key} {values[key]!r} is not supported: {advice}")
        chosen = {
            field.name: _checked(field.name, values[field.name], field.default, where)
            for field in dataclasses.fields(cls)
            if field.name in values
        }
        config = cls(**chosen)
        try:
            config.validate()
        except UsageError as error:
            raise DataError(f"{where}: {error}") from None
        return config


_UNSUPPORTED = {
    "add_adapter": "adapters after the backbone change what it computes; take a checkpoint without",
    "adapter_attn_dim": "adapters in the layers change what they compute; take a checkpoint "
    "without, such as the one that this was trained from",
    "quantization_config": "weights must be fp32, fp16 or bf16; save the model without it",
    "pruned_heads": "every layer must have all heads; save the model with pruned_heads empty",
}
"""Fields that must be empty, with what to do otherwise."""


def _checked(name: str, value: Any, default: Any, where: str) -> Any:
    """A value of the type of a field's default."""
    if isinstance(default, tuple):
        good = isinstance(value, list) and all(type(each) is int for each in value)
        value = tuple(value) if good else value
    elif name in _CHOICES:
        good = value in _CHOICES[name]
    elif type(default) is float:
        good = type(value) in (int, float)
    else:
        good = type(value) is type(default)
    if not good:
        kind = " or ".join(_CHOICES.get(name, ())) or f"as in {default!r}"
        raise DataError(f"{where}: {name} is {value!r}; expected {kind}")
    return value


_CHOICES = {"feat_extract_norm": ("group", "layer"), "initial_taps": ("independent", "shared")}

OF_TRAINING = frozenset(
    (
        "hidden_dropout", "activation_dropout", "attention_dropout", "feat_proj_dropout",
        "feat_quantizer_dropout", "layerdrop", "num_negatives", "contrastive_logits_temperature",
        "diversity_loss_weight", "mask_time_prob", "mask_time_length", "mask_time_min_masks",
        "initializer_range", "initial_taps",
    )
)  # fmt: skip
"""Fields that say how a model is trained. All others say what its weights compute."""


PRESETS: dict[str, ModelConfig] = {
    "base": ModelConfig(),
    "tiny": ModelConfig(
        conv_dim=(32, 48, 64, 96, 128, 128, 128),
        hidden_size=192,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=640,
        num_conv_pos_embeddings=64,
        codevector_dim=128,
        proj_codevector_dim=128,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        feat_proj_dropout=0.0,
        feat_quantizer_dropout=0.0,
        layerdrop=0.0,
        num_codevectors_per_group=64,
        diversity_loss_weight=0.8,
        initial_taps="shared",
    ),
}
"""`base`: the paper's, 95.04 M parameters. `tiny`: 1.96 M, for laptops, tests and first runs."""


def preset(name: str) -> ModelConfig:
    """The architecture named `name`.

    Raises:
        UsageError: no such preset.
    """
    if name not in PRESETS:
        raise UsageError(
            f"no model '{name}': choose from {', '.join(PRESETS)}{nearest(name, list(PRESETS))}"
        )
    return PRESETS[name]
