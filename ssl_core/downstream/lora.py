"""LoRA: low-rank adapters on the attention projections, for small updates (Hu et al., 2021).

Initial values and scale are peft's. peft itself is not used because it imports all of transformers,
and a device imports this project again for every message.
"""

import math

import torch
from torch import Tensor, nn

from common.errors import UsageError
from ssl_core.training import randomness
from ssl_core.wav2vec2.context import EncoderLayer
from ssl_core.wav2vec2.cpu.products import Linear, linear
from ssl_core.wav2vec2.model import Backbone

PROJECTIONS = ("q_proj", "v_proj")
"""Attention projections that get an adapter, as in the LoRA paper (section 4.2)."""
SCALE = 2.0
"""Factor of the adapter: `lora_alpha / rank` with peft's `lora_alpha` at twice the rank."""


class LoraLinear(nn.Linear):
    """A linear layer with a low-rank adapter."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        """Share the weights of `base`; the adapter's output is zero at first."""
        with torch.device("meta"):
            super().__init__(base.in_features, base.out_features, base.bias is not None)
        self.weight, self.bias = base.weight, base.bias
        self.lora_a = nn.Parameter(torch.empty(rank, base.in_features))
        self.lora_b = nn.Parameter(torch.zeros(base.out_features, rank))
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        """Map `[..., in]` to `[..., out]`."""
        change = linear(linear(x, self.lora_a), self.lora_b)
        return linear(x, self.weight, self.bias) + SCALE * change


def add_lora(backbone: Backbone, rank: int, seed: int) -> None:
    """Add adapters to the attention of every layer, in place.

    Args:
        backbone: changed in place.
        rank: of the adapters.
        seed: for their initial values.

    Raises:
        UsageError: a rank below 1, or not below the hidden size.
    """
    if not 1 <= rank < backbone.config.hidden_size:
        raise UsageError(
            f"lora-rank must be from 1 to {backbone.config.hidden_size - 1}, not {rank}"
        )
    with randomness.torch_seed(torch.device("cpu"), seed, "lora"):
        for layer in backbone.encoder.layers:
            assert isinstance(layer, EncoderLayer)
            for name in PROJECTIONS:
                base = getattr(layer.attention, name)
                setattr(layer.attention, name, LoraLinear(base, rank))


def merge_lora(backbone: Backbone) -> None:
    """Merge adapters into the weights and restore plain linear layers, in place."""
    for layer in backbone.encoder.layers:
        assert isinstance(layer, EncoderLayer)
        for name in PROJECTIONS:
            lora = getattr(layer.attention, name)
            if not isinstance(lora, LoraLinear):
                continue
            with torch.device("meta"):
                plain = Linear(lora.in_features, lora.out_features, lora.bias is not None)
            with torch.no_grad():
                lora.weight.addmm_(lora.lora_b, lora.lora_a, alpha=SCALE)
            plain.weight, plain.bias = lora.weight, lora.bias
            setattr(layer.attention, name, plain)
