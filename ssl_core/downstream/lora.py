"""Low-rank changes of the attention's projections (Hu et al., "LoRA", 2021): a small update.

As peft makes them (its initial values and scale), without its imports: a device loads this project
anew for every message, and peft brings all of transformers with it.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.errors import UsageError
from ssl_core.training import randomness
from ssl_core.wav2vec2.context import EncoderLayer
from ssl_core.wav2vec2.model import Backbone

PROJECTIONS = ("q_proj", "v_proj")
"""Of the attention, that get a low-rank change: those of the paper (section 4.2)."""
SCALE = 2.0
"""What the change is multiplied by: peft's `lora_alpha` is twice the rank."""


class LoraLinear(nn.Linear):
    """A linear layer and a change of it of low rank."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        """Take over the weights of `base`; the change is zero at first."""
        with torch.device("meta"):
            super().__init__(base.in_features, base.out_features, base.bias is not None)
        self.weight, self.bias = base.weight, base.bias
        self.lora_a = nn.Parameter(torch.empty(rank, base.in_features))
        self.lora_b = nn.Parameter(torch.zeros(base.out_features, rank))
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in]` to `[..., out]`."""
        change = F.linear(F.linear(x, self.lora_a), self.lora_b)
        return F.linear(x, self.weight, self.bias) + SCALE * change


def add_lora(backbone: Backbone, rank: int, seed: int) -> None:
    """Give the attention of every layer low-rank changes, in place.

    Raises:
        UsageError: a rank below 1, or no lower than the layers'.
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
    """Add the changes to the weights and make plain layers of them again, in place."""
    for layer in backbone.encoder.layers:
        assert isinstance(layer, EncoderLayer)
        for name in PROJECTIONS:
            lora = getattr(layer.attention, name)
            if not isinstance(lora, LoraLinear):
                continue
            with torch.device("meta"):
                plain = nn.Linear(lora.in_features, lora.out_features, lora.bias is not None)
            with torch.no_grad():
                lora.weight.addmm_(lora.lora_b, lora.lora_a, alpha=SCALE)
            plain.weight, plain.bias = lora.weight, lora.bias
            setattr(layer.attention, name, plain)
