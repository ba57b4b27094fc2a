"""The context network: projection, convolutional positions and transformer layers."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from ssl_core.wav2vec2.config import ModelConfig


class FeatureProjection(nn.Module):
    """Layer norm of the extractor's frames, then a projection to the transformer's width."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.layer_norm = nn.LayerNorm(config.conv_dim[-1], eps=config.layer_norm_eps)
        self.projection = nn.Linear(config.conv_dim[-1], config.hidden_size)
        self.dropout = nn.Dropout(config.feat_proj_dropout)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """`[batch, frame, channel]` to (`[batch, frame, hidden]`, the normalised features)."""
        normalised = self.layer_norm(features)
        return self.dropout(self.projection(normalised)), normalised


class PositionalConvolution(nn.Module):
    """A wide grouped convolution whose output, added to its input, tells frames their place."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        taps = config.num_conv_pos_embeddings
        conv = nn.Conv1d(
            config.hidden_size,
            config.hidden_size,
            taps,
            padding=taps // 2,
            groups=config.num_conv_pos_embedding_groups,
        )
        self.conv: nn.Conv1d = parametrizations.weight_norm(conv, dim=2)
        self.extra = 1 - taps % 2  # an even number of taps gives one frame too many

    def forward(self, x: Tensor) -> Tensor:
        """`[batch, frame, hidden]` to the same."""
        positions = self.conv(x.transpose(1, 2))
        return F.gelu(positions[:, :, : positions.shape[2] - self.extra]).transpose(1, 2)


class Attention(nn.Module):
    """Multi-head self-attention over the frames of a crop."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.heads = config.num_attention_heads
        self.dropout = config.attention_dropout
        self.k_proj = nn.Linear(size, size)
        self.v_proj = nn.Linear(size, size)
        self.q_proj = nn.Linear(size, size)
        self.out_proj = nn.Linear(size, size)

    def forward(self, x: Tensor) -> Tensor:
        """`[batch, frame, hidden]` to the same."""
        shape = (*x.shape[:2], self.heads, -1)
        query, key, value = (
            project(x).view(shape).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout)
        return self.out_proj(mixed.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """Two projections with a GELU between them."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.intermediate_dense = nn.Linear(config.hidden_size, config.intermediate_size)
        self.intermediate_dropout = nn.Dropout(config.activation_dropout)
        self.output_dense = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """`[batch, frame, hidden]` to the same."""
        hidden = self.intermediate_dropout(F.gelu(self.intermediate_dense(x)))
        return self.output_dense(hidden)


class EncoderLayer(nn.Module):
    """One transformer layer, normalising after each part (base) or before (`stable`)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.stable = config.do_stable_layer_norm
        self.attention = Attention(config)
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.feed_forward = FeedForward(config)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        """`[batch, frame, hidden]` to the same."""
        if self.stable:
            x = x + self.dropout(self.attention(self.layer_norm(x)))
            return x + self.dropout(self.feed_forward(self.final_layer_norm(x)))
        x = self.layer_norm(x + self.dropout(self.attention(x)))
        return self.final_layer_norm(x + self.dropout(self.feed_forward(x)))


class Encoder(nn.Module):
    """Positions, dropout and all transformer layers."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.stable = config.do_stable_layer_norm
        self.pos_conv_embed = PositionalConvolution(config)
        self.layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.num_hidden_layers))

    def forward(self, x: Tensor, keep: Sequence[bool] | None = None) -> Tensor:
        """Run the transformer.

        Args:
            x: `[batch, frame, hidden]`.
            keep: for each layer whether it runs (layerdrop); None runs all.

        Returns:
            `[batch, frame, hidden]`.
        """
        x = x + self.pos_conv_embed(x)
        x = self.dropout(x if self.stable else self.layer_norm(x))
        for index, layer in enumerate(self.layers):
            if keep is None or keep[index]:
                x = layer(x)
        return self.layer_norm(x) if self.stable else x


def initialise(module: Encoder, config: ModelConfig) -> None:
    """Initial weights of the transformer's linear layers: normal, as in BERT; biases zero."""
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
