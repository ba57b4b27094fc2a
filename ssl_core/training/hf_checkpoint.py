"""Checkpoint directories that transformers opens with `Wav2Vec2ForPreTraining.from_pretrained`."""

import json
from pathlib import Path

from torch import Tensor, nn

from common.errors import DataError
from ssl_core.training.tensor_file import write_tensors
from ssl_core.training.weight_files import WEIGHTS, read_weights
from ssl_core.wav2vec2.config import ModelConfig
from ssl_core.wav2vec2.model import PretrainingModel

CONFIG = "config.json"
_PREPROCESSOR, _PROCESSOR = "preprocessor_config.json", "processor_config.json"
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
        values = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise DataError(f"{directory} is not a checkpoint: {CONFIG}: {error.strerror}") from None
    except ValueError as error:
        raise DataError(f"{path} is not JSON: {error}") from None
    return ModelConfig.from_hf(values, str(path))


def normalises(directory: Path) -> bool:
    """Whether a model expects waveforms of mean 0 and variance 1, by its preprocessor's settings.

    They are in `preprocessor_config.json`, or since transformers 5 in `processor_config.json`.

    Raises:
        DataError: a file cannot be read, or the two files contradict each other.
    """
    found: dict[str, bool] = {}
    for name in (_PREPROCESSOR, _PROCESSOR):
        file = directory / name
        try:
            values = json.loads(file.read_text(encoding="utf-8-sig"))
            if name == _PROCESSOR:
                values = values.get("feature_extractor", {})
            stated = values.get("do_normalize")
            if stated is not None:
                found[name] = bool(stated)
        except FileNotFoundError:
            continue
        except (OSError, ValueError, AttributeError, TypeError) as error:
            raise DataError(f"{file} cannot be read: {error}") from None
    if len(set(found.values())) > 1:
        raise DataError(
            f"{directory}: {_PREPROCESSOR} and {_PROCESSOR} contradict each other in do_normalize; "
            "remove the one that is wrong"
        )
    return any(found.values())


def load_weights(directory: Path) -> dict[str, Tensor]:
    """Read all tensors of a checkpoint directory, in every published form (`weight_files`).

    Returns:
        Tensors by parameter name, `[*parameter shape]` each.

    Raises:
        DataError: missing or broken files.
    """
    renamed = {}
    for name, value in read_weights(directory).items():
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
