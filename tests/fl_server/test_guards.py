"""Bounds on the weight and the norm of an update, and clients that push against the others."""

import itertools
import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fake_grid import FakeGrid, Reply, description, update
from flwr.app import Message
from flwr.supercore.task_identity import TaskIdentity
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from benchmarks.poison import poison
from common.errors import UsageError
from common.units import Seconds
from fl_client import protocol, updates
from fl_client.federation_settings import PretrainingFederation, TaskFederation, from_run_config
from fl_client.protocol import Encoding
from fl_server.fold import SKETCH, Fold
from fl_server.guards import Guards, judge, largest_weight
from fl_server.roster import Client, Roster
from fl_server.round_result import RoundResult
from fl_server.rounds import Federation
from fl_server.server_optimizer import ServerOptimizer
from fl_server.spool import Spool
from fl_server.status import Status


@pytest.fixture(autouse=True)
def in_a_server_app(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, name, 7)


def settings_of(**changes: Any) -> PretrainingFederation:
    values: dict[str, Any] = {"model": "tiny", "length": Seconds(1), "clients_per_round": 10}
    return PretrainingFederation(**(values | changes))


OFF: dict[str, Any] = {"norm_bound": 0.0, "against_bound": 0.0}


class Lab:
    """A federation of a model with a vector `w` and a scalar `b`, whose clients answer as told."""

    def __init__(self, status: Status | None = None, **changes: Any) -> None:
        self.settings, self.status = settings_of(**changes), status
        self.grid = FakeGrid({})
        kind = self.settings.server_optimizer
        weights = {"w": torch.zeros(2), "b": torch.zeros(())}
        self.server = Federation(weights, ServerOptimizer(kind, 0.0, 0.9), self.settings)
        self.next = 0

    def round(
        self, answers: Mapping[int, Reply], arrival: list[int] | None = None, **client: Any
    ) -> RoundResult:
        """The next round of clients that have 100 crops and 100 s, unless `client` says other."""
        has = {"crops": 100, "seconds": 100.0} | client
        self.grid.answers = {100 + key: [answer] for key, answer in answers.items()}
        self.grid.arrival = [100 + key for key in arrival or answers]
        clients = [Client(key, 100 + key, **has) for key in sorted(answers)]
        result = self.server.round(self.grid, clients, self.next, self.status, undoable=True)
        self.next += 1
        return result

    def bits(self) -> bytes:
        return b"".join(value.numpy().tobytes() for value in self.server.weights.values())

    def resumed(self, **changes: Any) -> "Lab":
        """As after a restart from this one's checkpoint."""
        other = Lab(**changes)
        other.next = self.next
        for name, value in self.server.weights.items():
            other.server.weights[name].copy_(value)
        state, tensors = self.server.state(self.next - 1), self.server.tensors()
        copied = {name: value.clone() for name, value in tensors.items()}
        other.server.restore(json.loads(json.dumps(state)), copied)
        return other


# Weights


@pytest.mark.parametrize(
    ("client", "changes", "samples"),
    [
        ((100, 1000.0), {}, 8 * 16000),  # 2 updates of 4 crops of 1 s
        ((100, 1000.0), {"accumulation": 3, "local_updates": 5}, 60 * 16000),
        ((100, 1000.0), {"length": Seconds(2.5)}, 8 * 40000),
        ((3, 1000.0), {}, 3 * 16000),  # each crop counts once, however often it is repeated
        ((100, 5.5), {}, 88000),
        ((10**12, 1e12), {}, 8 * 16000),  # more than is plausible
        ((0, 0.0), {}, 0),
        ((-4, -1.0), {}, -64000),
    ],
)
def test_a_weight_is_bounded_by_what_was_declared_and_by_the_plan(
    client: tuple[int, float], changes: dict[str, Any], samples: int
) -> None:
    assert largest_weight(Client(0, 1, *client), settings_of(**changes)) == samples


@pytest.mark.parametrize(
    ("client", "changes", "seconds"),
    [
        ((50, 61.5), {}, 61.5),  # what an honest client states: all its clips
        ((50, 1e12), {}, 50 * 60),
        ((10**9, 1e12), {}, 10 * 2 * 4 * 60),  # all that a client can train on in the run
        ((10**9, 1e12), {"method": "fedrep", "head-updates": 5}, 10 * (5 + 2) * 4 * 60),
        ((10**9, 1e12), {"head-updates": 5}, 10 * 2 * 4 * 60),
    ],
)
def test_a_weight_of_a_task_is_bounded_by_the_clips_of_the_run(
    client: tuple[int, float], changes: dict[str, Any], seconds: float
) -> None:
    settings = from_run_config(
        {"task": "kws12", "checkpoint": "random", "model": "tiny", "batch": 4, **changes}
    )
    assert isinstance(settings, TaskFederation)
    assert largest_weight(Client(0, 1, *client), settings) == seconds * 16000


@hypothesis_settings(deadline=None, max_examples=200)
@given(
    lengths=st.lists(st.integers(16000, 40000), min_size=1, max_size=30),
    length=st.integers(16000, 40000),
    updates_=st.integers(1, 4),
    batch=st.integers(1, 4),
)
def test_an_honest_client_is_never_bounded(
    lengths: list[int], length: int, updates_: int, batch: int
) -> None:
    """Whatever its sequences, and with crops as long as the run's or, in a fleet, shorter."""
    settings = settings_of(length=Seconds(2.5), local_updates=updates_, batch=batch)
    client = Client(0, 1, len(lengths), sum(lengths) / 16000)
    heard = sorted(samples for samples in lengths if samples >= length)[: updates_ * batch]
    assert len(heard) * length <= largest_weight(client, settings)
    # A task's client states all its clips.
    whole = from_run_config({"task": "kws12", "checkpoint": "random", "rounds": 20, "batch": 4})
    assert sum(lengths) <= largest_weight(client, whole)


@pytest.mark.parametrize("stated", [128001, 1e9, 1e300])
@pytest.mark.parametrize("arrival", [[0, 1], [1, 0]])
def test_an_update_counts_for_no_more_audio_than_its_client_can_have(
    stated: float, arrival: list[int]
) -> None:
    lab = Lab()
    result = lab.round({0: update([2.0, 1.0], 64000), 1: update([1.0, 2.0], stated)}, arrival)
    assert lab.server.weights["w"].tolist() == [
        pytest.approx(4 / 3, abs=2e-7), pytest.approx(5 / 3, abs=2e-7)
    ]  # fmt: skip
    assert [client["samples"] for client in result.clients] == [64000, 128000]
    assert result.metrics["weights_bounded"] == 1
    assert result.failures == ()
    assert result.bounded[0].endswith(" s of audio counted as 8 s")
    assert result.bounded[0].startswith("client 1: ")


@pytest.mark.parametrize(
    ("stated", "failure"),
    [
        (-5, "the update comes from no audio"),
        (0, "the update comes from no audio"),
        (-1e300, "the update comes from no audio"),
        (1.5, "metric samples is 1.5, not a whole number"),
        (0.25, "metric samples is 0.25, not a whole number"),
        (float("nan"), "metric samples is not a finite number"),
        (float("inf"), "metric samples is not a finite number"),
    ],
)
def test_a_weight_that_cannot_be_is_refused(stated: float, failure: str) -> None:
    lab = Lab()
    result = lab.round({0: update([1.0, 1.0], 64000), 1: update([9.0, 9.0], stated)})
    assert result.failures == (f"client 1: {failure}",)
    assert lab.server.weights["w"].tolist() == [1.0, 1.0]


def test_who_declared_nothing_counts_for_nothing() -> None:
    lab = Lab(min_clients=1)
    grid = FakeGrid({100: [update([1.0, 1.0], 16000)], 101: [update([9.0, 9.0], 16000)]})
    clients = [Client(0, 100, 5, 5.0), Client(1, 101, 0, 0.0)]
    result = lab.server.round(grid, clients, 0)
    assert result.failures == ("client 1: the client said that it has no audio when it joined",)


def test_a_client_that_joins_again_is_bounded_by_what_it_says_then() -> None:
    grid = FakeGrid({1: [description(0, 1.0)], 2: [description(1, 2.0)]})
    roster = Roster(grid, settings_of(), lambda text: None)
    assert [largest_weight(one, settings_of()) for one in roster.gather()] == [16000, 32000]
    del grid.answers[1]
    grid.answers[3], grid.arrival = [description(0, 1.5)], [2, 3]
    assert [largest_weight(one, settings_of()) for one in roster.refresh()] == [24000, 32000]


# Norms


def same(count: int, values: list[float]) -> dict[int, Reply]:
    return {key: update(values, 16000) for key in range(count)}


def test_an_update_beyond_the_bound_is_scaled_down_to_the_median_norm() -> None:
    lab = Lab(norm_bound=2.0)
    result = lab.round(same(4, [3.0, 4.0]) | {4: update([12.0, 16.0], 16000)})
    assert lab.server.weights["w"].tolist() == [3.0, 4.0]  # the fifth is [3, 4] after
    assert result.bounded == ("client 4: a norm of 4 medians of the cohort scaled down to one",)
    assert (result.metrics["norms_bounded"], result.metrics["update_norm"]) == (1, 5.0)
    assert result.metrics["samples"] == 5 * 16000


def test_an_update_at_the_bound_is_left_alone() -> None:
    lab = Lab(norm_bound=4.0)
    result = lab.round(same(4, [3.0, 4.0]) | {4: update([12.0, 16.0], 16000)})
    assert result.bounded == ()
    assert lab.server.weights["w"].tolist() == [np.float32(24 / 5), np.float32(32 / 5)]


def test_the_median_of_this_round_counts_not_that_of_the_last_one() -> None:
    lab = Lab()
    for size in (1.0, 8.0, 0.5):
        result = lab.round(same(4, [size, 0.0]))
        assert result.bounded == ()
    assert lab.server.weights["w"].tolist() == [9.5, 0.0]


@pytest.mark.parametrize("values", [[0.0, -16.0], [16.0, 16.0]])
def test_one_huge_value_is_a_long_update(values: list[float]) -> None:
    lab = Lab(norm_bound=1.0)
    result = lab.round(same(4, [0.01, 0.0]) | {4: update(values, 16000)})
    assert len(result.bounded) == 1
    norm = float(np.linalg.norm(values)) / 0.01
    expected = (0.04 + values[0] / norm) / 5
    assert lab.server.weights["w"][0].item() == pytest.approx(expected, rel=1e-5)


def test_updates_of_zeros_are_taken_and_bound_nothing() -> None:
    lab = Lab()
    result = lab.round(same(4, [1.0, 0.0]) | {4: update([0.0, 0.0], 16000)})
    assert (result.bounded, result.failures) == ((), ())
    assert lab.server.weights["w"].tolist() == [np.float32(0.8), 0.0]
    lab = Lab()
    result = lab.round(same(5, [0.0, 0.0]))
    assert (result.bounded, result.failures) == ((), ())


def test_whatever_waits_the_order_of_replies_does_not_matter() -> None:
    """Three rounds, in all of which updates are bounded and refused."""
    found = set()
    orders = list(itertools.permutations(range(5)))
    for arrival in (orders[0], orders[-1], *random.Random(1).sample(orders, 6)):
        lab = Lab()
        for turn in range(3):
            lie = update([float(turn), 1.0], 1e12)
            answers = same(3, [0.1, 0.3]) | {3: update([-0.1, -0.3], 9000), 4: lie}
            result = lab.round(answers, list(arrival))
            assert result.failures, "client 3 points against the others"
            assert result.bounded
        state = lab.server.state(2)
        found.add((lab.bits(), str(state), tuple(sorted(result.metrics)), result.bounded))
    assert len(found) == 1


# Directions


def test_a_flipped_sign_is_refused_and_its_owner_told() -> None:
    lab = Lab()
    result = lab.round(same(4, [1.0, 2.0]) | {4: update([-1.0, -2.0], 16000)})
    assert lab.server.weights["w"].tolist() == [1.0, 2.0]
    assert result.failures == (
        "client 4: its updates do not point to the side of the other clients'",
    )
    assert (result.metrics["refused"], result.metrics["failures"]) == (1, 1)
    assert result.metrics["bytes_received"] == 4 * size_of([1.0, 2.0])
    assert lab.server.folded == dict.fromkeys(range(4), 0)
    assert lab.server.broadcast.held == dict.fromkeys(range(5), 0), "it has the round's weights"
    last = lab.grid.sent[-1]
    told = protocol.notice_text(last.content.config_records[protocol.INSTRUCTIONS])
    assert (last.metadata.dst_node_id, "could not use" in told) == (104, True)


def size_of(values: list[float]) -> int:
    arrays = {"w": np.array(values, np.float32), "b": np.zeros((), np.float32)}
    return updates.size(updates.pack(arrays.items()))


@pytest.mark.parametrize("values", [[0.0, 0.0], [2.0, -1.0]])
def test_updates_that_never_point_to_any_side_are_refused_after_some_rounds(
    values: list[float],
) -> None:
    lab = Lab()
    answers = same(6, [1.0, 2.0]) | {6: update(values, 16000)}
    refused = [len(lab.round(answers).failures) for _ in range(7)]
    assert refused == [0, 0, 0, 0, 1, 1, 1]  # 0.2 a round, and 0.9 is the bound


def test_a_repaired_client_takes_part_again_after_some_rounds() -> None:
    lab = Lab()
    refused = []
    for turn in range(8):
        sign = -1.0 if turn < 4 else 1.0
        result = lab.round(same(4, [1.0, 2.0]) | {4: update([sign, 2 * sign], 16000)})
        refused.append(len(result.failures))
    assert refused == [1, 1, 1, 1, 1, 0, 0, 0]
    assert lab.server.guards.scores == {}


def test_a_client_that_goes_bad_is_refused_once_it_is_known() -> None:
    lab = Lab()
    lab.round(same(5, [1.0, 2.0]))
    bad = same(4, [1.0, 2.0]) | {4: update([-1.0, -2.0], 16000)}
    assert [len(lab.round(bad).failures) for _ in range(3)] == [0, 1, 1]


def test_three_clients_cannot_outvote_one_another() -> None:
    lab = Lab()
    result = lab.round(same(2, [1.0, 2.0]) | {2: update([-1.0, -2.0], 16000)})
    assert result.failures == ()
    assert result.metrics["agreement"] == 0


def test_a_cohort_without_a_common_direction_refuses_no_one() -> None:
    lab = Lab()
    turns = {0: [1.0, 0.0], 1: [0.0, 1.0], 2: [-1.0, 0.0], 3: [0.0, -1.0]}
    for _ in range(4):
        result = lab.round({key: update(values, 16000) for key, values in turns.items()})
        assert result.failures == ()


def test_a_refusal_that_leaves_too_few_updates_ends_the_run() -> None:
    lab = Lab(min_clients=5)
    with pytest.raises(Exception, match="round 1: 4 updates could be used, 5 are needed: client 4"):
        lab.round(same(4, [1.0, 2.0]) | {4: update([-1.0, -2.0], 16000)})


def noisy(rng: np.random.Generator, size: float, encoding: Encoding = "fp32") -> Reply:
    """An honest update: a common direction, and as much of the client's own."""
    values = size * (np.array([1.0, 0.5]) + rng.normal(0, 0.4, 2))
    return update(list(values), 16000, encoding=encoding)


@pytest.mark.parametrize("encoding", ["fp32", "int8"])
@pytest.mark.parametrize("optimizer", ["fedavg", "fedadam"])
def test_guards_that_find_nothing_change_no_bit(encoding: Encoding, optimizer: str) -> None:
    """Also while the learning rate warms up and decays, by factors of 4 between two rounds."""
    runs = []
    for changes in ({}, OFF):
        kinds: dict[str, Any] = {"encoding": encoding, "server_optimizer": optimizer}
        lab, rng = Lab(**kinds, **changes), np.random.default_rng(5)
        for size in (0.01, 0.04, 0.16, 0.1, 0.02, 0.005):
            result = lab.round({key: noisy(rng, size, encoding) for key in range(6)})
            assert (result.failures, result.bounded) == ((), ())
        runs.append((lab.bits(), [value.tolist() for value in lab.server.tensors().values()]))
    assert runs[0] == runs[1]


def test_a_resumed_run_has_the_bits_of_one_that_was_not_stopped() -> None:
    def answers(turn: int) -> dict[int, Reply]:
        rng = np.random.default_rng(turn)
        aside = update([-0.08, 0.1], 16000)
        return {key: noisy(rng, 0.1) for key in range(5)} | {5: aside, 6: update([9.0, 9.0], 1e9)}

    whole = Lab(server_optimizer="fedavgm")
    stopped = Lab(server_optimizer="fedavgm")
    refused = []
    for turn in range(6):
        whole.round(answers(turn))
        stopped = stopped.resumed(server_optimizer="fedavgm")
        result = stopped.round(answers(turn))
        refused.append(len(result.failures))
        assert len(result.bounded) == 1
    assert refused[0] == 0
    assert refused[-1] == 1, "the score has grown over the restarts"
    assert stopped.bits() == whole.bits()
    assert stopped.server.state(5) == whole.server.state(5)


def test_an_undone_round_leaves_weights_and_moments_as_they_were() -> None:
    for kind in ("fedavg", "fedavgm", "fedadam"):
        lab, other = Lab(server_optimizer=kind), Lab(server_optimizer=kind)
        for one in (lab, other):
            one.round(same(4, [1.0, 2.0]))
        lab.round({key: update([-3.0, 5.0], 16000) for key in (1, 2, 3, 7)})
        lab.server.undo()
        assert lab.bits() == other.bits()
        assert lab.server.folded == other.server.folded
        moments, expected = lab.server.optimizer.state, other.server.optimizer.state
        assert moments.keys() == expected.keys()
        assert all(torch.equal(moments[name], expected[name]) for name in moments)


# What it takes


def test_what_agrees_is_folded_at_once_and_waits_for_no_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kept: list[int] = []
    keep = Spool.keep

    def counted(self: Spool, key: int, record: Any) -> None:
        kept.append(key)
        keep(self, key, record)

    monkeypatch.setattr(Spool, "keep", counted)
    lab = Lab()
    lab.round(same(4, [1.0, 2.0]))
    assert sorted(kept) == [0, 1, 2, 3], "nothing is known before the first round"
    kept.clear()
    lab.round(same(4, [1.0, 2.0]) | {4: update([6.0, 0.0], 16000)})
    assert kept == [4]
    kept.clear()
    off = Lab(**OFF)
    off.round(same(4, [1.0, 2.0]) | {4: update([-1.0, 0.0], 16000)})
    assert kept == []


def test_what_waits_leaves_no_file(tmp_path: Path) -> None:
    arrays = {"w": np.arange(5, dtype=np.float32), "b": np.zeros((), np.float32)}
    spool = Spool(tmp_path)
    for key in (7, 3):
        spool.keep(key, updates.pack(arrays.items()))
    spool.keep(5, updates.pack([]))
    assert spool.waiting() == [3, 5, 7]
    assert list(tmp_path.iterdir()) == []
    views = updates.Views(spool.take(7))
    assert {name: views[name].tolist() for name in views} == {"w": [0, 1, 2, 3, 4], "b": 0}
    assert dict(updates.Views(spool.take(5))) == {}
    assert spool.waiting() == [3]
    spool.close()
    assert spool.waiting() == []


def test_sketches_keep_norms_and_cosines() -> None:
    rng = np.random.default_rng(0)
    fold = Fold({"a": (700, 500), "b": (3,), "c": (SKETCH,)})

    def drawn() -> dict[str, Any]:
        return {n: rng.normal(0, 1, s.shape).astype(np.float32) for n, s in fold.sums.items()}

    one, two = drawn(), drawn()
    mixed = {name: (one[name] + two[name]) / np.float32(2) for name in one}
    found = [fold.check(each) for each in (one, two, mixed)]
    for each, values in zip(found, (one, two, mixed), strict=True):
        whole = np.concatenate([value.ravel() for value in values.values()]).astype(np.float64)
        assert each.norm == pytest.approx(float(np.linalg.norm(whole)), rel=1e-12)
    unit = [each.sketch / np.linalg.norm(each.sketch) for each in found]
    assert float(unit[0] @ unit[1]) == pytest.approx(0, abs=0.02)
    assert float(unit[0] @ unit[2]) == pytest.approx(0.5**0.5, abs=0.02)


def test_a_cohort_is_judged_by_exact_numbers() -> None:
    fold = Fold({"w": (2,)})
    rows = {0: [3.0, 4.0], 1: [3.0, 4.0], 2: [6.0, 8.0], 3: [4.0, -3.0], 4: [-3.0, -4.0]}
    made = {key: fold.check({"w": np.array(row, np.float32)}) for key, row in rows.items()}
    found = judge(made)
    # Unit vectors u, u, u, v (across) and -u: the others' sum is u + v for each u, 2u for v.
    assert (found.norm, found.agreement) == (5.0, 0.707107)
    assert found.against[3] == 0.2
    assert found.against[4] == pytest.approx(0.2 + 0.948683 / 0.707107, abs=1e-5)
    assert [found.against[key] for key in (0, 1, 2)] == [-0.8, -0.8, -0.8]
    assert judge({}) == (0.0, 0.0, {})


def test_who_looks_on_sees_what_was_bounded_and_refused(tmp_path: Path) -> None:
    status = Status(tmp_path, 3)
    lab = Lab(status)
    lab.round(same(4, [1.0, 2.0]) | {4: update([-1.0, -2.0], 16000), 5: update([6.0, 12.0], 16000)})
    rows = status.clients
    assert (rows[4]["state"], rows[4]["replies"], rows[4]["failures"]) == ("failed", 0, 1)
    assert rows[4]["error"] == "its updates do not point to the side of the other clients'"
    assert (rows[5]["state"], rows[5]["replies"], rows[5]["failures"]) == ("done", 1, 0)
    assert rows[5]["error"] == "a norm of 6 medians of the cohort scaled down to one"
    assert (rows[0]["state"], rows[0]["error"]) == ("done", "")


def test_a_checkpoint_of_before_has_no_guards() -> None:
    guards = Guards(settings_of())
    guards.restore({"next_round": 4})
    assert (guards.norm, guards.scores) == (0.0, {})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm_bound": 0.5}, "norm-bound must be 0 or at least 1, not 0.5"),
        ({"norm_bound": float("nan")}, "norm-bound"),
        ({"against_bound": -1.0}, "against-bound must not be below zero, not -1.0"),
        ({"loss_margin": float("nan")}, "loss-margin"),
        ({"undone_rounds": 0}, "undone-rounds must be at least 1"),
    ],
)
def test_settings_of_guards_are_checked(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        settings_of(**changes).validate()


def test_poison_does_to_an_answer_what_it_says() -> None:
    def spoilt(kind: str) -> Message:
        grid = FakeGrid({100: [update([0.03, -0.04], 16000)]})
        lab = Lab()
        seen: list[Message] = []

        def answer(message: Message) -> Message:
            reply = update([0.03, -0.04], 16000)(message)
            poison(reply, kind)
            seen.append(reply)
            return reply

        grid.answers = {100: [answer]}
        lab.server.round(grid, [Client(0, 100, 9, 9.0)], 0)
        return seen[0]

    def values(kind: str) -> Any:
        return updates.Views(spoilt(kind).content.array_records[protocol.UPDATE])["w"]

    assert values("scaled").tolist() == [3.0, -4.0]
    assert values("flipped").tolist() == [np.float32(-0.03), np.float32(0.04)]
    assert float(np.linalg.norm(values("noise"))) == pytest.approx(0.05, rel=1e-6)
    assert spoilt("audio").content.metric_records[protocol.METRICS]["samples"] == 16000 * 1e6
