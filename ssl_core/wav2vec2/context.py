"""The context network: feature projection, positions and transformer layers."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ssl_core.wav2vec2.attention import attention, self_attention
from ssl_core.wav2vec2.config import ModelConfig
from ssl_core.wav2vec2.cpu import products
from ssl_core.wav2vec2.cpu.products import Linear
from ssl_core.wav2vec2.dropout import Dropout
from ssl_core.wav2vec2.feed_forward import FeedForward
from ssl_core.wav2vec2.positions import PositionalConvolution
from ssl_core.wav2vec2.precision import compute_dtype
from ssl_core.wav2vec2.recompute import recomputed
from ssl_core.wav2vec2.residual import (
    Biased,
    added_and_normed,
    linear,
    normed,
    normed_and_dropped,
)

PROJECTED, ENCODER_INPUT, _SITES = 0, 1, 8
"""Sites of dropout (see `keyed_bits`) before the layers, and how many each layer has from its own
first one on, which follows those before it; `model` and the heads have others."""


class FeatureProjection(nn.Module):
    """Layer norm of the features, then a projection to the transformer's width."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.layer_norm = nn.LayerNorm(config.conv_dim[-1], eps=config.layer_norm_eps)
        self.projection = Linear(config.conv_dim[-1], config.hidden_size)
        self.dropout = Dropout(config.feat_proj_dropout, PROJECTED)

    def forward(
        self, features: Tensor, seeds: Tensor | None = None, lengths: Sequence[int] = ()
    ) -> tuple[Tensor, Tensor]:
        """Normalise and project features.

        Args:
            features: `[batch, frame, channel]`.
            seeds: `[batch]` int64, one per crop, for dropout; None drops nothing.
            lengths: frames of each packed crop (see `packing`), else empty.

        Returns:
            The projection, `[batch, frame, hidden]`, and the normalised features,
            `[batch, frame, channel]`.
        """
        normalised, narrow = normed(features, self.layer_norm)
        return self.dropout(self.projection(narrow), seeds, lengths), normalised


class Attention(nn.Module):
    """Multi-head self-attention among the frames of a crop."""

    def __init__(self, config: ModelConfig, site: int) -> None:
        """`site`: number of the dropout's site in the network."""
        super().__init__()
        size = config.hidden_size
        self.site = site
        self.heads = config.num_attention_heads
        self.rate = config.attention_dropout
        self.keep_weights = False
        self.joined: tuple[Tensor, Tensor] | None = None
        """Weights and biases of q, k and v in one, `[3 hidden, hidden]` and `[3 hidden]`, where a
        step has them so: one product then takes the place of three."""
        self.k_proj = Linear(size, size)
        self.v_proj = Linear(size, size)
        self.q_proj = Linear(size, size)
        self.out_proj = Linear(size, size)

    def forward(
        self, x: Tensor, wanted: Tensor, seeds: Tensor | None, lengths: Sequence[int] = ()
    ) -> Biased:
        """Attend from the wanted frames to all frames.

        Args:
            x: `[batch, frame, hidden]`, all frames.
            wanted: `[batch, wanted frame, hidden]`, frames whose output is wanted.
            seeds: `[batch]` int64, one per crop, for dropout; None drops nothing.
            lengths: frames of each packed crop (see `packing`), else empty.

        Returns:
            `[batch, wanted frame, hidden]`, perhaps without the last bias.
        """
        if self.joined is not None:
            mixed = self._joined_attention(x, wanted, seeds, lengths)
        else:
            mixed = attention(
                self.q_proj(wanted),
                self.k_proj(x),
                self.v_proj(x),
                heads=self.heads,
                rate=self.rate,
                seeds=seeds,
                site=self.site,
                keep=self.keep_weights,
                lengths=lengths,
            )
        return linear(self.out_proj, mixed)

    def _joined_attention(
        self, x: Tensor, wanted: Tensor, seeds: Tensor | None, lengths: Sequence[int]
    ) -> Tensor:
        assert self.joined is not None
        weight, bias = self.joined
        if wanted is x and not lengths:
            projected = products.linear(x, weight, bias)
            return self_attention(
                projected, heads=self.heads, rate=self.rate, seeds=seeds, site=self.site
            )
        size = x.shape[-1]
        (own, other), (own_bias, other_bias) = (
            part.split([size, 2 * size]) for part in (weight, bias)
        )
        query = products.linear(wanted, own, own_bias)
        keys_and_values = products.linear(x, other, other_bias)
        key, value = keys_and_values.split(size, -1)
        return attention(
            query, key, value, heads=self.heads, rate=self.rate, seeds=seeds, site=self.site,
            lengths=lengths,
        )  # fmt: skip


class EncoderLayer(nn.Module):
    """A transformer layer; layer norm comes after each part (base), or before it (`stable`)."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        """`index`: of the layer, from 0."""
        super().__init__()
        site = _SITES * (index + 1)
        self.stable = config.do_stable_layer_norm
        self.attention = Attention(config, site)
        self.dropout = Dropout(config.hidden_dropout, site + 2)
        self.layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.feed_forward = FeedForward(config, site + 1)
        self.final_dropout = Dropout(config.hidden_dropout, site + 3)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(
        self,
        x: Tensor,
        frames: Tensor | None,
        seeds: Tensor | None,
        lengths: Sequence[int] = (),
        narrow: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Apply the layer.

        Args:
            x: `[batch, frame, hidden]`.
            frames: `[batch, wanted frame]`, indices of frames whose output is wanted; None for all.
            seeds: `[batch]` int64, one per crop, for dropout; None drops nothing.
            lengths: frames of each packed crop (see `packing`), else empty; not with `frames`.
            narrow: `x` in the precision of products, `[batch, frame, hidden]`, if there is one.

        Returns:
            `[batch, wanted frame, hidden]`, and the same in the precision of products if a kernel
            wrote it, else None.
        """
        if narrow is None:
            # Convert once for the three projections of the attention.
            narrow = (self.layer_norm(x) if self.stable else x).to(compute_dtype(x))
        wanted = narrow
        if frames is not None:
            x, wanted = take_frames(x, frames), take_frames(narrow, frames)
        mixed = self.attention(narrow, wanted, seeds, lengths)
        if self.stable:
            x = x + self.dropout(mixed.whole(), seeds, lengths)
            fed = self.feed_forward(self.final_layer_norm(x), seeds, lengths)
            return x + self.final_dropout(fed.whole(), seeds, lengths), None
        x, narrow = added_and_normed(x, mixed, self.dropout, self.layer_norm, seeds, lengths)
        fed = self.feed_forward(x if narrow is None else narrow, seeds, lengths)
        return added_and_normed(x, fed, self.final_dropout, self.final_layer_norm, seeds, lengths)


def take_frames(x: Tensor, frames: Tensor) -> Tensor:
    """Gather `frames`, `[batch, wanted frame]`, from `x`, `[batch, frame, hidden]`."""
    return x.gather(1, frames[:, :, None].expand(-1, -1, x.shape[2]))


class Encoder(nn.Module):
    """Positional convolution, dropout and all transformer layers."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.stable = config.do_stable_layer_norm
        self.recompute = False
        self.pos_conv_embed = PositionalConvolution(config)
        self.layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = Dropout(config.hidden_dropout, ENCODER_INPUT)
        self.layers = nn.ModuleList(
            EncoderLayer(config, index) for index in range(config.num_hidden_layers)
        )

    def forward(
        self,
        x: Tensor,
        keep: Sequence[bool] | None = None,
        seeds: Tensor | None = None,
        frames: Tensor | None = None,
        lengths: Sequence[int] = (),
    ) -> Tensor:
        """Run the transformer.

        Args:
            x: `[batch, frame, hidden]`.
            keep: for each layer, whether it runs (layerdrop); None runs all.
            seeds: `[batch]` int64, one per crop, for dropout; None drops nothing.
            frames: `[batch, wanted frame]`, indices of frames whose output is wanted; None for all.
            lengths: frames of each packed crop (see `packing`), else empty; not with `frames`.

        Returns:
            `[batch, wanted frame, hidden]`.
        """
        positions = self.pos_conv_embed(x, lengths)
        narrow: Tensor | None = None
        if self.stable:
            x = self.dropout(x + positions, seeds, lengths)
        else:
            x, narrow = normed_and_dropped(
                x, positions, self.layer_norm, self.dropout, seeds, lengths
            )
        running = [i for i in range(len(self.layers)) if keep is None or keep[i]]
        for index in running:
            # The last layer attends to all frames, but only from the wanted ones.
            wanted = frames if index == running[-1] else None
            if self.recompute and torch.is_grad_enabled():
                # Without `narrow`, which would be saved beside `x`.
                x, narrow = recomputed(self.layers[index], x, wanted, seeds, lengths)
            else:
                x, narrow = self.layers[index](x, wanted, seeds, lengths, narrow)
        if frames is not None and not running:
            x = take_frames(x, frames)
        return self.layer_norm(x) if self.stable else x


def initialise(module: Encoder, config: ModelConfig) -> None:
    """Initialise the encoder: normal weights, of BERT's deviation in linear layers; zero biases."""
    for child in module.modules():
        if isinstance(child, nn.Linear):
            nn.init.normal_(child.weight, std=config.initializer_range)
            nn.init.zeros_(child.bias)
    position = module.pos_conv_embed.conv
    taps, channels = config.num_conv_pos_embeddings, config.hidden_size
    weight = torch.empty_like(position.weight)
    nn.init.normal_(weight, std=(4 / (taps * channels)) ** 0.5)
    position.weight = weight
    if position.bias is not None:
        nn.init.zeros_(position.bias)
