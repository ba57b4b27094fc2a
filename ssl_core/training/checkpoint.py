"""Checkpoint directories: a model that transformers opens, with what resuming needs beside it."""

import dataclasses
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from common import atomic, strict_json
from common.errors import DataError
from ssl_core.training import hf_checkpoint as hf
from ssl_core.training.divergence import Diverged, not_finite
from ssl_core.training.tensor_file import write_tensors
from ssl_core.wav2vec2.config import ModelConfig

STATE = "state.json"
OPTIMIZER = "optimizer.safetensors"
PART = "weights.safetensors"
_NUMBERED = re.compile(r"(?:update|round)-(\d+)")


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A checkpoint in memory."""

    config: ModelConfig
    weights: dict[str, Tensor]
    """By parameter name, fp32."""
    optimizer_state: dict[str, Tensor]
    """By `kind/parameter name`; may be empty."""
    state: dict[str, Any]
    """Values for resuming, such as the next update or round."""


def save(
    directory: Path,
    config: ModelConfig,
    weights: dict[str, Tensor],
    *,
    state: Mapping[str, Any],
    optimizer_state: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a checkpoint atomically; the same content gives the same bytes.

    Args:
        directory: to create or replace.
        config: architecture of the model.
        weights: by parameter name, `[*parameter shape]` each.
        state: values for resuming, as JSON.
        optimizer_state: by `kind/parameter name`.

    Raises:
        Diverged: the weights are not finite; nothing is written.
        OSError: the disk is full or not writable; no partial checkpoint remains.
    """
    _require_finite(directory, weights)
    with atomic.directory(directory) as partial:
        hf.save_model(partial, config, weights)
        _save_rest(partial, state, optimizer_state)


def save_tensors(
    directory: Path,
    weights: Mapping[str, Tensor],
    *,
    state: Mapping[str, Any],
    optimizer_state: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a checkpoint of part of a model, without its architecture, atomically.

    Args:
        directory: to create or replace.
        weights: by parameter name, `[*parameter shape]` each.
        state: values for resuming, as JSON.
        optimizer_state: by `kind/parameter name`.

    Raises:
        Diverged: the weights are not finite; nothing is written.
        OSError: the disk is full or not writable; no partial checkpoint remains.
    """
    _require_finite(directory, weights)
    with atomic.directory(directory) as partial:
        write_tensors(partial / PART, weights)
        _save_rest(partial, state, optimizer_state)


def _require_finite(directory: Path, weights: Mapping[str, Tensor]) -> None:
    found = not_finite(weights)
    if found:
        raise Diverged(
            f"{directory.name} is not written, as {len(found)} tensors of its weights are not "
            f"finite, such as {found[0]}",
            latest(directory.parent),
        )


def _save_rest(
    folder: Path, state: Mapping[str, Any], optimizer_state: Mapping[str, Tensor] | None
) -> None:
    if optimizer_state:
        write_tensors(folder / OPTIMIZER, optimizer_state)
    text = strict_json.dumps(dict(state), indent=2, sort_keys=True)
    (folder / STATE).write_text(text + "\n", encoding="utf-8")


def load(directory: Path) -> Checkpoint:
    """Read a checkpoint; one saved by transformers has an empty state.

    Raises:
        DataError: missing or broken.
    """
    config, weights = hf.load_config(directory), hf.load_weights(directory)
    state, optimizer_state = _load_rest(directory)
    return Checkpoint(config, weights, optimizer_state, state)


def load_tensors(
    directory: Path,
) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor]]:
    """Read a checkpoint that `save_tensors` wrote.

    Returns:
        State, weights and optimizer state; tensors by name, `[*parameter shape]` each.

    Raises:
        DataError: missing or broken.
    """
    try:
        weights = load_file(directory / PART)
    except (OSError, SafetensorError) as error:
        raise DataError(f"checkpoint {directory} is broken: {error}") from None
    state, optimizer_state = _load_rest(directory)
    return state, weights, optimizer_state


def _load_rest(directory: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        path = directory / OPTIMIZER
        optimizer_state = load_file(path) if path.exists() else {}
        path = directory / STATE
        state = strict_json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        return state, optimizer_state
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
    """Delete all but the newest `keep` checkpoints, and partial ones of killed processes."""
    for _, path in numbered(parent)[:-keep]:
        shutil.rmtree(path)
    for stale in (*parent.glob(".*.partial"), *parent.glob(".*.old")):
        shutil.rmtree(stale, ignore_errors=True)
