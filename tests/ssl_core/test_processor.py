"""Precision and threads follow from what the processor and torch's library can do."""

import ctypes
import platform
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from common.errors import UsageError
from common.settings import from_mapping
from ssl_core.downstream.task_settings import TaskSettings
from ssl_core.planning import processor
from ssl_core.planning.step_plan import Precision
from ssl_core.training import torch_device
from ssl_core.training.pretraining_settings import PretrainingSettings
from ssl_core.training.torch_device import choose_precision


@pytest.fixture(autouse=True)
def afresh() -> Iterator[None]:
    threads, speed = torch.get_num_threads(), processor.product_speed
    for clear in (speed.cache_clear, processor.warn_once.cache_clear):
        clear()
    yield
    speed.cache_clear()
    torch.set_num_threads(threads)


def pretend(monkeypatch: pytest.MonkeyPatch, speeds: dict[str, float], supported: bool) -> None:
    """A processor with these speeds, which the library says it supports or not."""
    monkeypatch.setattr(processor, "product_speed", speeds.__getitem__)
    monkeypatch.setattr(torch_device, "product_speed", speeds.__getitem__)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: supported)


@pytest.mark.parametrize(
    ("speed", "supported", "chosen"),
    [
        (4.5, True, "bf16"),  # AVX-512 with bf16 units
        (16.0, True, "bf16"),  # AMX
        (0.8, True, "fp32"),  # AVX-512 alone
        (0.02, False, "fp32"),  # AVX2
    ],
)
def test_auto_takes_bf16_where_products_are_faster(
    monkeypatch: pytest.MonkeyPatch, speed: float, supported: bool, chosen: str
) -> None:
    pretend(monkeypatch, {"bf16": speed}, supported)
    assert choose_precision("auto", "cpu") == chosen
    assert ("bf16" in processor.cpu_precisions()) == (chosen == "bf16")


def test_without_support_nothing_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, {}, supported=False)  # any look raises KeyError
    assert processor.cpu_precisions() == ("fp32",)


@pytest.mark.parametrize(("name", "factor"), [("bf16", 50.0), ("fp16", 1.25)])
def test_a_slow_precision_is_taken_with_a_warning_that_names_the_factor(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    name: Precision,
    factor: float,
) -> None:
    pretend(monkeypatch, {name: 1 / factor}, supported=False)
    for _ in range(2):
        assert choose_precision(name, "cpu") == name
    (record,) = caplog.records
    assert f"in {name} a product takes this processor {factor:.1f} times as long" in record.message


@pytest.mark.parametrize("name", ["bf16", "fp16"])
def test_a_precision_that_cannot_be_multiplied_in_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, name: Precision
) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("could not create a primitive descriptor for a matmul primitive")

    monkeypatch.setattr(torch.nn.functional, "linear", refuse)
    assert processor.product_speed(name) == 0.0
    with pytest.raises(UsageError, match=f"precision {name}: torch cannot multiply in {name} on"):
        choose_precision(name, "cpu")
    assert choose_precision("fp32", "cpu") == "fp32"


def test_the_real_processor_is_timed_once_and_its_threads_stay() -> None:
    threads = torch.get_num_threads()
    speed = processor.product_speed("bf16")
    assert speed > 0
    assert processor.product_speed("bf16") == speed
    assert torch.get_num_threads() == threads


class GetAuxVal:
    """The C library's function, for a processor with these capabilities."""

    def __init__(self, bits: int) -> None:
        self.bits = bits

    def __call__(self, kind: int) -> int:
        return self.bits if kind == 16 else 0


CORTEX_A72, CORTEX_A76 = 0x8FF & ~0x100, 0x119FFF
NVPL, OPENBLAS = "BLAS_INFO=nvpl, LAPACK_INFO=nvpl", "BLAS_INFO=open, LAPACK_INFO=open"


@pytest.mark.parametrize(
    ("machine", "bits", "blas", "most"),
    [
        ("aarch64", CORTEX_A72, NVPL, 1),
        ("aarch64", CORTEX_A72, OPENBLAS, 0),
        ("aarch64", CORTEX_A76, NVPL, 0),
        ("x86_64", 0, "BLAS_INFO=mkl", 0),
    ],
)
def test_one_thread_where_more_would_be_an_illegal_instruction(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    machine: str,
    bits: int,
    blas: str,
    most: int,
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(torch.__config__, "show", lambda: f"  - Build settings: {blas}, CUDA")
    monkeypatch.setattr(ctypes, "CDLL", lambda _: SimpleNamespace(getauxval=GetAuxVal(bits)))
    assert processor.usable_threads() == most
    processor.use_threads(2)
    assert torch.get_num_threads() == (most or 2)
    told = [record.message for record in caplog.records]
    assert bool(told) == bool(most)
    if most:
        assert told[0].startswith("one thread only: ")
        torch.set_num_threads(2)
        processor.use_threads(0)
        assert torch.get_num_threads() == 1


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"device": "cuda:99"}, "device 'cuda:99' is not there"),
        ({"device": "mps"}, "device 'mps' is not supported"),
        ({"device": "gpu"}, "'gpu' is not a torch device"),
        ({"device": "cpu", "precision": "fp16"}, "torch cannot multiply in fp16"),
        ({"precision": "fp16", "device": "cuda:99"}, "device 'cuda:99' is not there"),
    ],
)
@pytest.mark.parametrize("kind", [PretrainingSettings, TaskSettings])
def test_settings_that_this_machine_cannot_follow_are_refused_when_they_are_read(
    monkeypatch: pytest.MonkeyPatch, kind: type[Any], values: dict[str, str], words: str
) -> None:
    pretend(monkeypatch, {"fp16": 0.0}, supported=False)
    with pytest.raises(UsageError, match=words):
        from_mapping(kind, {"task": "kws12", **values} if kind is TaskSettings else values, "test")


@pytest.mark.parametrize("kind", [PretrainingSettings, TaskSettings])
def test_settings_that_suit_every_machine_are_checked_without_asking_it(
    monkeypatch: pytest.MonkeyPatch, kind: type[Any]
) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("torch is asked")

    monkeypatch.setattr(torch_device, "choose_device", fail)
    given = {"task": "kws12"} if kind is TaskSettings else {}
    for device in ("auto", "cpu"):
        for precision in ("auto", "fp32"):
            from_mapping(kind, {**given, "device": device, "precision": precision}, "test")
    with pytest.raises(UsageError, match="micro-batch and threads must not be below zero"):
        from_mapping(kind, {**given, "micro_batch": -1}, "test")
