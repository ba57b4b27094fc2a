"""Checkpoint directories that transformers opens with `Wav2Vec2ForPreTraining.from_pretrained`."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common.errors import DataError
from partitions.sampling import SAMPLE_RATE
from ssl_core.training.tensor_file import write_tensors
from ssl_core.training.weight_files import WEIGHTS, read_weights
from ssl_core.wav2vec2.config import OF_TRAINING, ModelConfig
from ssl_core.wav2vec2.model import PretrainingModel

CONFIG = "config.json"
_ADAPTER = "adapter_config.json"
_PREPROCESSOR, _PROCESSOR = "preprocessor_config.json", "processor_config.json"
_WEIGHT_NORM = {
    "pos_conv_embed.conv.weight_g": "pos_conv_embed.conv.parametrizations.weight.original0",
    "pos_conv_embed.conv.weight_v": "pos_conv_embed.conv.parametrizations.weight.original1",
}


_PRETRAINED = ("wav2vec2", "quantizer", "project_hid", "project_q")
"""Parts of a pretraining model, the first words of its parameters' names."""


def save_model(directory: Path, config: ModelConfig, weights: dict[str, Tensor]) -> None:
    """Write architecture, weights and input normalisation into an existing directory.

    Args:
        directory: must exist.
        config: architecture of the model.
        weights: by parameter name, `[*parameter shape]` each.
    """
    _write(directory / CONFIG, config.to_hf())
    save_preprocessor(directory, config.do_normalize)
    write_tensors(directory / WEIGHTS, weights, metadata={"format": "pt"})


def save_preprocessor(directory: Path, normalise: bool) -> None:
    """Write `preprocessor_config.json`: whether waveforms are normalised, and the sample rate."""
    values = {
        "feature_extractor_type": "Wav2Vec2FeatureExtractor",
        "do_normalize": normalise,
        "feature_size": 1,
        "padding_value": 0.0,
        "return_attention_mask": True,
        "sampling_rate": SAMPLE_RATE,
    }
    _write(directory / _PREPROCESSOR, values)


def _write(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def load_config(directory: Path) -> ModelConfig:
    """Read architecture and input normalisation from a checkpoint directory.

    Raises:
        DataError: no checkpoint there, of another architecture than wav2vec 2.0, or of an adapter.
    """
    path = directory / CONFIG
    if (directory / _ADAPTER).exists():
        raise DataError(
            f"{directory} holds an adapter of PEFT ({_ADAPTER}), which is not supported: merge it "
            "into its model (merge_and_unload) and save that"
        )
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise DataError(f"{directory} is not a checkpoint: {CONFIG}: {error.strerror}") from None
    except ValueError as error:
        raise DataError(f"{path} is not JSON: {error}") from None
    config = ModelConfig.from_hf(values, str(path))
    return dataclasses.replace(config, do_normalize=normalises(directory))


def normalises(directory: Path) -> bool:
    """Whether a model expects waveforms of mean 0 and variance 1, by its preprocessor's settings.

    They are in `preprocessor_config.json`, or since transformers 5 in `processor_config.json`.

    Raises:
        DataError: a file cannot be read, the two contradict each other, or another sample rate.
    """
    found: dict[str, bool] = {}
    for name in (_PREPROCESSOR, _PROCESSOR):
        file = directory / name
        try:
            values = json.loads(file.read_text(encoding="utf-8-sig"))
            if name == _PROCESSOR:
                values = values.get("feature_extractor", {})
            stated, rate = values.get("do_normalize"), values.get("sampling_rate", SAMPLE_RATE)
        except FileNotFoundError:
            continue
        except (OSError, ValueError, AttributeError, TypeError) as error:
            raise DataError(f"{file} cannot be read: {error}") from None
        if rate != SAMPLE_RATE:
            raise DataError(f"{file}: sampling_rate {rate} is not supported, only {SAMPLE_RATE}")
        if stated is not None:
            found[name] = bool(stated)
    if len(set(found.values())) > 1:
        raise DataError(
            f"{directory}: {_PREPROCESSOR} and {_PROCESSOR} contradict each other in do_normalize; "
            "remove the one that is wrong"
        )
    return any(found.values())


def require_same(config: ModelConfig, directory: Path) -> None:
    """Check that a model computes what the weights of a checkpoint were trained for.

    Args:
        config: architecture of the model; how it is trained may differ (`OF_TRAINING`).
        directory: of the checkpoint.

    Raises:
        DataError: a field differs, or no checkpoint there.
    """
    stated = load_config(directory)
    for field in dataclasses.fields(ModelConfig):
        name = field.name
        ours, theirs = getattr(config, name), getattr(stated, name)
        if name not in OF_TRAINING and ours != theirs:
            raise DataError(
                f"{directory}: its {name} is {theirs}, that of the settings {ours}: leave "
                f"architecture.{name.replace('_', '-')} out, so that the checkpoint's is taken"
            )


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


def take_parts(
    weights: dict[str, Tensor], parts: tuple[str, ...]
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Keep the parts of a model that are needed.

    Args:
        weights: by parameter name, `[*parameter shape]` each.
        parts: first words of the names to keep.

    Returns:
        The weights of these parts, and the sorted names of all other parts.
    """
    kept = {name: value for name, value in weights.items() if name.split(".")[0] in parts}
    return kept, tuple(sorted({name.split(".")[0] for name in weights.keys() - kept.keys()}))


def load_pretrained(model: PretrainingModel, directory: Path) -> tuple[str, ...]:
    """Load a checkpoint's weights into a model to pretrain.

    Args:
        model: changed in place.
        directory: of this project or of transformers.

    Returns:
        Names of the checkpoint's other parts, such as the head of a task, which are not used.

    Raises:
        DataError: missing or broken, another architecture, or parts are missing.
    """
    require_same(model.config, directory)
    weights, unused = take_parts(load_weights(directory), _PRETRAINED)
    there = {name.split(".")[0] for name in weights}
    lost = [part for part in _PRETRAINED if part not in there]
    if lost:
        raise DataError(
            f"{directory} has no {', '.join(lost)}, which pretraining needs: it holds a backbone "
            f"{'with ' + ', '.join(unused) if unused else 'alone'}; take the checkpoint of "
            "pretraining (Wav2Vec2ForPreTraining) that it was made from"
        )
    load_into(model, weights, str(directory))
    return unused


def load_model(directory: Path) -> PretrainingModel:
    """Load a pretraining model from a checkpoint directory of this project or of transformers.

    Raises:
        DataError: missing or broken, wrong shapes, or no quantizer and projections for pretraining.
    """
    model = PretrainingModel(load_config(directory))
    load_pretrained(model, directory)
    return model


def load_into(model: nn.Module, weights: dict[str, Tensor], where: str) -> None:
    """Copy weights into a model in fp32, by name; the names must match exactly.

    Args:
        model: changed in place.
        weights: by parameter name, `[*parameter shape]` each.
        where: source of the weights, for error messages.

    Raises:
        DataError: a missing, unexpected or wrongly shaped tensor, or one of integers or NaN.
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
        if not weights[name].is_floating_point():
            kind = str(weights[name].dtype).removeprefix("torch.")
            raise DataError(f"{where}: {name} is {kind}; weights must be fp32, fp16 or bf16")
        if not bool(torch.isfinite(weights[name]).all()):
            raise DataError(f"{where}: {name} holds NaN or infinity; take another checkpoint")
        value.copy_(weights[name])
