"""The grid on a Ray of this test's own: what becomes of messages whose workers die."""

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from flwr.app import ConfigRecord, Message, MessageType, RecordDict

from simulation import ray_grid
from simulation.ray_grid import RayGrid
from simulation.ray_runtime import RayFailed, RayLost
from simulation.ray_worker import Letter

Outcome = Callable[[], Any]


class Workers:
    """Stands for Ray: each call of a worker takes the next outcome of its kind."""

    exceptions = ray.exceptions

    def __init__(self, answers: list[Outcome], starts: list[Outcome]) -> None:
        self.answers, self.starts, self.made = answers, starts, 0

    def put(self, value: Any) -> Any:
        return value

    def wait(self, references: list[Any], num_returns: int, timeout: float) -> Any:
        return references[:num_returns], references[num_returns:]

    def get(self, reference: "Reference", timeout: float) -> Any:
        return reference.outcome()

    def options(self, **_: Any) -> "Workers":
        return self

    def remote(self, *_: Any) -> Any:
        """A new worker."""
        self.made += 1

        def start() -> Reference:
            return Reference(self.starts.pop(0) if self.starts else lambda: False)

        def answer(message: Message, *_: Any) -> Reference:
            if self.answers:
                return Reference(self.answers.pop(0))
            reply = Message(RecordDict({"told": ConfigRecord({"is": 1})}), reply_to=message)
            return Reference(lambda: (Letter(reply, {}), None))

        return SimpleNamespace(
            is_far=SimpleNamespace(remote=start), answer=SimpleNamespace(remote=answer)
        )


class Reference:
    """An object in the store."""

    def __init__(self, outcome: Outcome) -> None:
        self.outcome = outcome


def dies() -> Any:
    raise ray.exceptions.ActorDiedError


def fails() -> Any:
    raise ray.exceptions.RaySystemError(OSError("the store is full"))


Made = Callable[..., tuple[RayGrid, Workers]]


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Made:
    def grid(
        answers: Sequence[Outcome] = (), starts: Sequence[Outcome] = ()
    ) -> tuple[RayGrid, Workers]:
        workers = Workers(list(answers), list(starts))
        monkeypatch.setattr(ray_grid, "ray", workers)
        monkeypatch.setattr(ray_grid, "Worker", workers)
        runtime: Any = SimpleNamespace(
            address="",
            node="here",
            workers=2,
            gpus_each=0.0,
            check=lambda: None,
            free=lambda: "none free",
        )
        nodes = [{"partition-id": number, "state": "/none"} for number in range(3)]
        return RayGrid({}, nodes, runtime), workers

    return grid


def ask(grid: RayGrid) -> list[Message]:
    """The answers of all three clients."""
    content = RecordDict({"ask": ConfigRecord({"number": 1})})
    messages = [Message(content, node, MessageType.TRAIN) for node in grid.get_node_ids()]
    return list(grid.send_and_receive(messages))


@pytest.mark.parametrize(
    ("answers", "made"),
    [
        ([], 2),
        ([dies], 3),
        ([fails, fails], 2),
        ([dies, fails, dies], 3),  # the first and the third are of the same worker
    ],
)
def test_every_client_answers_whatever_dies(make: Made, answers: list[Outcome], made: int) -> None:
    grid, workers = make(answers)
    replies = ask(grid)
    assert len({reply.metadata.src_node_id for reply in replies}) == 3
    assert not any(reply.has_error() for reply in replies)
    assert workers.made == made


def test_a_message_that_kills_every_worker_stops_the_run(make: Made) -> None:
    grid, _ = make([dies] * 9)
    with pytest.raises(RayFailed, match=r"3 times no worker could answer for client [012]: its"):
        ask(grid)


def test_workers_that_do_not_start_are_named_with_the_cause(make: Made) -> None:
    grid, workers = make(starts=[fails] * 9)
    with pytest.raises(RayFailed, match=r"no worker starts: .*the store is full"):
        ask(grid)
    assert workers.made == 4


def test_one_worker_that_does_not_start_is_replaced(make: Made) -> None:
    grid, workers = make(starts=[dies, lambda: False, dies])
    assert len(ask(grid)) == 3
    assert workers.made == 4


def test_workers_that_wait_for_a_place_for_ever_stop_the_run(
    make: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid, workers = make()
    monkeypatch.setattr(workers, "wait", lambda references, **_: ([], references))
    monkeypatch.setattr(ray_grid, "_START", 0.0)
    with pytest.raises(RayFailed, match=r"no worker has started within 0 s.*none free"):
        ask(grid)


def test_a_lost_ray_is_no_fault_of_a_worker(make: Made) -> None:
    def lost() -> None:
        raise RayLost("Ray's process raylet has ended")

    grid, _ = make()
    grid._runtime.check = lost  # type: ignore[method-assign]
    with pytest.raises(RayLost):
        ask(grid)
