"""How updates are launched, captured and replayed on a GPU, with stand-ins for CUDA's objects."""

import contextlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from ssl_core.training import cuda_runner
from ssl_core.training.cuda_runner import CudaRunner
from ssl_core.training.step_inputs import BatchInputs, Controls, Stage

CPU = torch.device("cpu")


class Graph:
    """Remembers what was captured, and does it again at a replay."""

    def __init__(self) -> None:
        self.captured: Callable[[], object] = lambda: None

    def replay(self) -> None:
        self.captured()


class Lab:
    """A runner on the CPU, and what it did."""

    def __init__(self, graph: bool = True) -> None:
        self.did: list[str] = []
        self.result = torch.zeros(1)
        self.capturing: Graph | None = None
        self.runner = CudaRunner(self.compute, CPU, graph, self.begin)

    def begin(self, capture: bool) -> None:
        self.did.append("capture" if capture else "launch")

    def compute(self, inputs: BatchInputs, stage: Stage) -> Tensor:
        def take() -> None:
            total = inputs.waveforms.sum() * torch.as_tensor(inputs.controls.rate)
            self.result.copy_(total[None] + stage.masked)

        if self.capturing is None:
            take()
        else:
            self.capturing.captured = take
        return self.result

    @contextlib.contextmanager
    def capture(self, graph: Graph, **_: Any) -> Iterator[None]:
        self.capturing = graph
        yield
        self.capturing = None

    def take(
        self,
        value: float,
        keep: tuple[bool, ...] = (True,),
        batch: int = 2,
        stage: Stage | None = None,
    ) -> float:
        waveforms = torch.full((batch, 5), value)
        masked, seeds = torch.zeros(batch, 3, dtype=torch.int64), torch.zeros(batch).long()
        controls = Controls(0.5, 0.0, 0.0, 1.0)
        inputs = BatchInputs(waveforms, masked, seeds, controls)
        self.runner.run(inputs, stage or Stage(True, True, 7, keep))
        return float(self.result)


@pytest.fixture
def lab(monkeypatch: pytest.MonkeyPatch) -> Lab:
    stream = SimpleNamespace(wait_stream=lambda _: None)
    event = SimpleNamespace(synchronize=lambda: None, record=lambda *_: None)
    for name, stand_in in {
        "Stream": lambda *_: stream,
        "Event": lambda *_: event,
        "CUDAGraph": Graph,
        "stream": lambda _: contextlib.nullcontext(),
        "current_stream": lambda *_: stream,
        "empty_cache": lambda: None,
        "graph_pool_handle": lambda: (0, 0),
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    cuda_runner._stream.cache_clear()
    monkeypatch.setattr(cuda_runner._Slot, "fill", lambda self, tensors: tensors)
    lab = Lab()
    monkeypatch.setattr(torch.cuda, "graph", lab.capture)
    return lab


def test_a_kind_of_batch_is_launched_then_captured_then_replayed(lab: Lab) -> None:
    assert [lab.take(value) for value in (1.0, 2.0, 3.0, 4.0)] == [12.0, 17.0, 22.0, 27.0]
    assert lab.did == ["launch", "capture"]


def test_other_layers_and_other_shapes_have_graphs_of_their_own(lab: Lab) -> None:
    for _ in range(3):
        assert lab.take(1.0) == 12.0
        assert lab.take(1.0, keep=(False,)) == 12.0
        assert lab.take(1.0, batch=3) == 14.5
    assert lab.did == ["launch", "capture", "launch", "capture", "capture"]


def test_nothing_is_captured_before_a_whole_update_was_launched(lab: Lab) -> None:
    for _ in range(2):
        for stage in (Stage(True, False, 0, ()), *[Stage(False, False, 0, ())] * 2):
            lab.take(1.0, stage=stage)
        lab.take(1.0, stage=Stage(False, True, 7, ()))
    assert lab.did == ["launch"] * 4 + ["capture"] * 3


def test_the_graph_unused_for_longest_makes_room(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_runner, "GRAPHS", 1)
    for keep in ((True,), (True,), (False,), (False,)):
        lab.take(1.0, keep)
    assert lab.did == ["launch", "capture", "capture"]
    assert [lab.take(2.0) for _ in range(3)] == [17.0] * 3
    assert lab.did[3:] == ["capture"]


def test_without_graphs_every_update_is_launched(lab: Lab) -> None:
    lab.runner._graph = False
    for _ in range(3):
        lab.take(1.0)
    assert lab.did == ["launch"] * 3


def test_what_cannot_be_captured_is_launched(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refused(*_: Any) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(lab.runner, "_capture", refused)
    assert [lab.take(value) for value in (1.0, 2.0, 3.0)] == [12.0, 17.0, 22.0]
    assert lab.did == ["launch"] * 3
    assert "not permitted" in caplog.text
