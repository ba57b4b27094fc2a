"""Tensor files: compatible with the safetensors library, one tensor at a time."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from common.errors import DataError
from ssl_core.training.tensor_file import TensorFile, write_tensors

TENSORS = {
    "w": torch.randn(3, 5),
    "half": torch.randn(7).bfloat16(),
    "codes": torch.arange(9, dtype=torch.uint8),
    "signed": torch.tensor([-3, 4], dtype=torch.int8),
    "one": torch.tensor(2.5),
    "none": torch.empty(0, 4),
    "turned": torch.randn(4, 6).t(),
}


def test_the_library_reads_what_is_written(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_tensors(path, TENSORS, {"format": "pt"})
    found = load_file(path)
    assert all(torch.equal(found[name], value) for name, value in TENSORS.items())
    first = path.read_bytes()
    write_tensors(path, TENSORS, {"format": "pt"})
    assert path.read_bytes() == first


def test_what_the_library_writes_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({name: value.contiguous() for name, value in TENSORS.items()}, path, {"a": "b"})
    found = TensorFile(path)
    assert set(found) == set(TENSORS)
    for name, value in TENSORS.items():
        assert torch.equal(found[name], value)
        assert found[name].dtype == value.dtype
    with pytest.raises(KeyError):
        found["absent"]


@pytest.mark.parametrize("cut", [0, 4, 20, -1])
def test_a_broken_file_is_refused(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "x.safetensors"
    write_tensors(path, TENSORS)
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(DataError, match="is broken"):
        TensorFile(path)
    path.write_bytes(b"\xff" * 64)
    with pytest.raises(DataError, match="is broken"):
        TensorFile(path)
