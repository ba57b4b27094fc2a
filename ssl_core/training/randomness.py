"""Random generators seeded by purpose, independent of process, worker and order."""

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch


def _words(keys: tuple[int | str, ...]) -> list[int]:
    return [zlib.crc32(key.encode()) if isinstance(key, str) else int(key) for key in keys]


def generator(*keys: int | str) -> np.random.Generator:
    """A generator seeded by keys, such as (seed, "draws", partition, update)."""
    return np.random.default_rng(np.random.SeedSequence(_words(keys)))


def words(count: int, *keys: int | str) -> tuple[int, ...]:
    """`count` random words of 64 bits that follow from keys."""
    return tuple(map(int, np.random.SeedSequence(_words(keys)).generate_state(count, np.uint64)))


@contextmanager
def torch_seed(device: "torch.device", *keys: int | str) -> Iterator[None]:
    """Seed torch's global generators by keys inside the block, and restore them after it."""
    import torch  # takes seconds, and a device divides its clips without it

    seed = words(1, *keys)[0] >> 1
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield
