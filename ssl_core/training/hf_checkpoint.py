"""Checkpoint directories that transformers opens with `Wav2Vec2ForPreTraining.from_pretrained`."""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from common.errors import DataError
from ssl_core.training.tensor_file import write_tensors
from ssl_core.wav2vec2.config import ModelConfig
from ssl_core.wav2vec2.model import PretrainingModel

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
_WEIGHT_NORM = {
    "pos_conv_embed.conv.weight_g": "pos_conv_embed.conv.parametrizations.weight.original0",
    "pos_conv_embed.conv.weight_v": "pos_conv_embed.conv.parametrizations.weight.original1",
}


def save_model(directory: Path, config: ModelConfig, weights: dict[str, Tensor]) -> None:
    """Write `config.json` and `model.safetensors` into an existing directory.

    Args:
        directory: must exist.
        config: architecture of the model.
        weights: by parameter name, `[*parameter shape]` each.
    """
    text = json.dumps(config.to_hf(), indent=2, sort_keys=True)
    (directory / CONFIG).write_text(text + "\n", encoding="utf-8")
    write_tensors(directory / WEIGHTS, weights, metadata={"format": "pt"})


def load_config(directory: Path) -> ModelConfig:
    """Read the architecture from a checkpoint directory.

    Raises:
        DataError: no checkpoint there, or of another architecture than wav2vec 2.0.
    """
    path = directory / CONFIG
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{directory} is not a checkpoint: {CONFIG}: {error.strerror}") from None
    except ValueError as error:
        raise DataError(f"{path} is not JSON: {error}") from None
    return ModelConfig.from_hf(values, str(path))


def load_weights(directory: Path) -> dict[str, Tensor]:
    """Read all tensors of a checkpoint directory: safetensors, else `pytorch_model.bin`.

    Returns:
        Tensors by parameter name, `[*parameter shape]` each.

    Raises:
        DataError: missing or broken files.
    """
    path = directory / WEIGHTS
    try:
        if path.exists():
            tensors = load_file(path)
        else:
            binary = directory / "pytorch_model.bin"
            if not binary.exists():
                raise DataError(f"{directory} is not a checkpoint: {WEIGHTS} is missing")
            tensors = torch.load(binary, map_location="cpu", weights_only=True)
    except (OSError, SafetensorError, RuntimeError, ValueError) as error:
        raise DataError(f"cannot read the weights in {directory}: {error}") from None
    renamed = {}
    for name, value in tensors.items():
        for old, new in _WEIGHT_NORM.items():
            if name.endswith(old):
                name = name.removesuffix(old) + new
        renamed[name] = value
    return renamed


def load_model(directory: Path) -> PretrainingModel:
    """Load a pretraining model from a checkpoint directory of this project or of transformers.

    Raises:
        DataError: missing or broken, wrong shapes, or no quantizer and projections for pretraining.
    """
    model = PretrainingModel(load_config(directory))
    load_into(model, load_weights(directory), str(directory))
    return model


def load_into(model: nn.Module, weights: dict[str, Tensor], where: str) -> None:
    """Copy weights into a model by name; the names must match exactly.

    Args:
        model: changed in place.
        weights: by parameter name, `[*parameter shape]` each.
        where: source of the weights, for error messages.

    Raises:
        DataError: a missing, unexpected or wrongly shaped tensor.
    """
    own = model.state_dict()
    missing, unexpected = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
    if missing or unexpected:
        parts = [f"{len(missing)} missing (such as {missing[0]})"] if missing else []
        parts += [f"{len(unexpected)} unexpected (such as {unexpected[0]})"] if unexpected else []
        raise DataError(f"{where} does not fit the model: {', '.join(parts)}")
    for name, value in own.items():
        if weights[name].shape != value.shape:
            raise DataError(
                f"{where}: {name} has shape {tuple(weights[name].shape)}, not {tuple(value.shape)}"
            )
        value.copy_(weights[name])
