"""Models of a few thousand weights with every kind of dropout, and noise clips as input."""

import dataclasses
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ssl_core.downstream.task_model import TaskModel, Upstream
from ssl_core.downstream.task_recipe import TaskRecipe, recipe_of
from ssl_core.training import hf_checkpoint as hf
from ssl_core.wav2vec2.config import ModelConfig
from ssl_core.wav2vec2.model import Backbone, PretrainingModel

SMALL = ModelConfig(
    conv_dim=(16,) * 7,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=48,
    num_conv_pos_embeddings=16,
    num_conv_pos_embedding_groups=4,
    codevector_dim=16,
    proj_codevector_dim=16,
    num_codevectors_per_group=8,
    num_negatives=5,
    hidden_dropout=0.1,
    attention_dropout=0.1,
    activation_dropout=0.1,
    feat_proj_dropout=0.1,
    layerdrop=0.0,
)
"""Group norm and post-norm layers, like base."""
LAYER_NORM = dataclasses.replace(
    SMALL, feat_extract_norm="layer", do_stable_layer_norm=True, conv_bias=True
)
"""Layer norm and pre-norm layers, like large."""
HEADS = {"mean-linear": "kws12", "lstm-ctc": "asr", "linear-ctc": "asr", "x-vector": "speaker"}
"""A task for each head."""


def pretraining_model(config: ModelConfig = SMALL, seed: int = 0) -> PretrainingModel:
    """Randomise biases and gains, which start at trivial values."""
    torch.manual_seed(seed)
    model = PretrainingModel(config)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.2 * torch.randn_like(parameter)
    return model


def backbone_of(config: ModelConfig = SMALL, seed: int = 0) -> Backbone:
    return pretraining_model(config, seed).wav2vec2


def small_recipe(head: str, **changes: object) -> TaskRecipe:
    """The recipe of a head's task with a narrow LSTM and no clipping."""
    values: dict[str, object] = {"head": head, "lstm_units": 8, "clip_norm": 0.0}
    return dataclasses.replace(recipe_of(HEADS[head]), **values | changes)  # type: ignore[arg-type]


def task_model(
    head: str, labels: int = 5, config: ModelConfig = SMALL, **changes: object
) -> TaskModel:
    upstream = Upstream(backbone_of(config), "random", False)
    return TaskModel.new(upstream, small_recipe(head, **changes), labels, 0)


def save_backbone(folder: Path, config: ModelConfig = SMALL, seed: int = 0) -> Path:
    """Write a pretraining checkpoint directory."""
    folder.mkdir(parents=True)
    model = pretraining_model(config, seed)
    hf.save_model(folder, config, {name: v.detach() for name, v in model.state_dict().items()})
    return folder


def noise(samples: int, seed: int = 0) -> Tensor:
    """Noise, `[sample]`."""
    rng = np.random.default_rng([samples, seed])
    return torch.from_numpy(rng.uniform(-0.5, 0.5, samples).astype(np.float32))


def padded(clips: list[Tensor], seed: int = 1) -> Tensor:
    """Batch of clips `[sample]` or `[frame, feature]`, padded with loud noise."""
    longest = max(len(clip) for clip in clips)
    generator = torch.Generator().manual_seed(seed)
    batch = 20 * torch.randn((len(clips), longest, *clips[0].shape[1:]), generator=generator)
    for row, clip in zip(batch, clips, strict=True):
        row[: len(clip)] = clip
    return batch
