"""Checkpoints: a directory that transformers opens, and beside it what resuming needs."""

import dataclasses
import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from common import atomic
from common.errors import DataError
from ssl_core.training import hf_checkpoint as hf
from ssl_core.training.tensor_file import write_tensors
from ssl_core.wav2vec2.config import ModelConfig

STATE = "state.json"
EXTRA = "optimizer.safetensors"
PART = "weights.safetensors"
_NUMBERED = re.compile(r"(?:update|round)-(\d+)")


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A checkpoint in memory."""

    config: ModelConfig
    weights: dict[str, Tensor]
    """By parameter name, fp32."""
    extra: dict[str, Tensor]
    """Optimiser moments by `kind/parameter name`; empty when there are none."""
    state: dict[str, Any]
    """Numbers that resuming needs, such as the next update or round."""


def save(
    directory: Path,
    config: ModelConfig,
    weights: dict[str, Tensor],
    *,
    state: Mapping[str, Any],
    extra: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a checkpoint whole or not at all; the same content gives the same bytes.

    Raises:
        OSError: no space, or the place cannot be written; nothing half-written stays.
    """
    with atomic.directory(directory) as partial:
        hf.save_model(partial, config, weights)
        _save_rest(partial, state, extra)


def save_tensors(
    directory: Path,
    weights: Mapping[str, Tensor],
    *,
    state: Mapping[str, Any],
    extra: Mapping[str, Tensor] | None = None,
) -> None:
    """Write part of a model, as `save` does a whole one.

    Raises:
        OSError: no space, or the place cannot be written; nothing half-written stays.
    """
    with atomic.directory(directory) as partial:
        write_tensors(partial / PART, weights)
        _save_rest(partial, state, extra)


def _save_rest(folder: Path, state: Mapping[str, Any], extra: Mapping[str, Tensor] | None) -> None:
    if extra:
        write_tensors(folder / EXTRA, extra)
    text = json.dumps(dict(state), indent=2, sort_keys=True)
    (folder / STATE).write_text(text + "\n", encoding="utf-8")


def load(directory: Path) -> Checkpoint:
    """Read a checkpoint; one made by transformers has an empty state.

    Raises:
        DataError: missing or broken.
    """
    config, weights = hf.load_config(directory), hf.load_weights(directory)
    state, extra = _load_rest(directory)
    return Checkpoint(config, weights, extra, state)


def load_tensors(
    directory: Path,
) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor]]:
    """State, weights and other tensors that `save_tensors` wrote.

    Raises:
        DataError: missing or broken.
    """
    try:
        weights = load_file(directory / PART)
    except (OSError, SafetensorError) as error:
        raise DataError(f"checkpoint {directory} is broken: {error}") from None
    state, extra = _load_rest(directory)
    return state, weights, extra


def _load_rest(directory: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        extra = load_file(directory / EXTRA) if (directory / EXTRA).exists() else {}
        path = directory / STATE
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}, extra
    except (OSError, ValueError, SafetensorError) as error:
        raise DataError(f"checkpoint {directory} is broken: {error}") from None


def numbered(parent: Path) -> list[tuple[int, Path]]:
    """Complete checkpoints `update-N` or `round-N` in a directory, oldest first."""
    if not parent.is_dir():
        return []
    found = [(_NUMBERED.fullmatch(path.name), path) for path in parent.iterdir() if path.is_dir()]
    return sorted((int(match[1]), path) for match, path in found if match)


def latest(parent: Path) -> Path | None:
    """The newest complete checkpoint in a directory, or None."""
    found = numbered(parent)
    return found[-1][1] if found else None


def prune(parent: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints, and what a killed process left half-written."""
    for _, path in numbered(parent)[:-keep]:
        shutil.rmtree(path)
    for stale in (*parent.glob(".*.partial"), *parent.glob(".*.old")):
        shutil.rmtree(stale, ignore_errors=True)
