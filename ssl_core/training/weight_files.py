"""Reads the weights of a checkpoint directory in every form in which they are published."""

import json
import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from common.errors import DataError

WEIGHTS = "model.safetensors"
_FORMS = (WEIGHTS, "pytorch_model.bin")
_LFS = b"version https://git-lfs"
_FAIRSEQ = {"model", "cfg", "args", "optimizer_history"}


def read_weights(directory: Path) -> dict[str, Tensor]:
    """Read all tensors: safetensors, else `.bin`; in one file, or in parts with an index.

    Args:
        directory: of the checkpoint.

    Returns:
        Tensors by name, `[*parameter shape]` each, in the type in which they are stored.

    Raises:
        DataError: there are none, or a file is missing, broken or something else; names the file.
    """
    for name in _FORMS:
        if (directory / name).exists():
            return _read(directory / name)
        index = directory / f"{name}.index.json"
        if index.exists():
            return _read_parts(index)
    raise DataError(
        f"{directory} is not a checkpoint: it has none of {', '.join(_FORMS)}, nor their index"
    )


def _read_parts(index: Path) -> dict[str, Tensor]:
    """Read the files that an index names."""
    try:
        places: Mapping[str, str] = json.loads(index.read_text(encoding="utf-8-sig"))["weight_map"]
        files = sorted(set(places.values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{index} is not an index of weights: {error}") from None
    tensors: dict[str, Tensor] = {}
    for number, file in enumerate(files, 1):
        if not isinstance(file, str) or Path(file).name != file:
            raise DataError(f"{index} names '{file}', which is not a file beside it")
        path = index.with_name(file)
        if not path.exists():
            raise DataError(f"{path} is missing, part {number} of {len(files)} by {index.name}")
        tensors |= _read(path)
    lost = sorted(places.keys() - tensors.keys())
    if lost:
        raise DataError(f"{index} names {len(lost)} tensors that no file has, such as {lost[0]}")
    return tensors


def _read(path: Path) -> dict[str, Tensor]:
    try:
        with open(path, "rb") as stream:
            start = stream.read(len(_LFS))
        if not start:
            raise DataError(f"{path} is empty; fetch it again")
        if start == _LFS:
            raise DataError(
                f"{path} is a pointer of Git LFS, not the weights; fetch them with `git lfs pull`"
            )
        if path.suffix == ".safetensors":
            return dict(load_file(path))
        found = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        # torch's text advises to load code from the file.
        raise DataError(
            f"{path} holds more than tensors, or is broken; only tensors are read. If it is of "
            "fairseq, convert it to transformers first"
        ) from None
    except (OSError, SafetensorError, RuntimeError, ValueError, EOFError) as error:
        raise DataError(f"cannot read {path}: {error}") from None
    if isinstance(found, Mapping) and "model" in found and _FAIRSEQ & (found.keys() - {"model"}):
        raise DataError(f"{path} is a checkpoint of fairseq; convert it to transformers first")
    if not isinstance(found, Mapping) or not all(isinstance(x, Tensor) for x in found.values()):
        raise DataError(f"{path} is not a dictionary of tensors")
    return dict(found)
