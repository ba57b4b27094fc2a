"""The round loop against a small Grid in this process."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from fake_grid import FakeGrid, Reply, description, update
from flwr.app import Error, Message, MetricRecord, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from common.units import Seconds
from fl_client import protocol, updates
from fl_client.federation_settings import PretrainingFederation
from fl_server.roster import Client, Roster, RoundFailed, choose_cohort
from fl_server.round_result import RoundResult
from fl_server.rounds import Federation
from fl_server.server_optimizer import ServerOptimizer

SETTINGS = PretrainingFederation(
    model="tiny", length=Seconds(1), clients_per_round=10, min_clients=1, norm_bound=0.0
)
"""Without a bound on norms: these updates are of any size."""
SUPERLINK_NODE = 1


@pytest.fixture(autouse=True)
def in_a_server_app(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Flower does for a ServerApp's process before it runs it."""
    for name in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, name, 7)


def notice_of(message: Message) -> str:
    return protocol.notice_text(message.content.config_records[protocol.INSTRUCTIONS])


def error(reason: str) -> Reply:
    return lambda message: Message(
        Error(code=protocol.CLIENT_FAILED, reason=reason), reply_to=message
    )


def gone(message: Message) -> Message:
    """What a SuperLink answers under its own id for a device that has gone offline."""
    reply = Message(Error(code=3, reason="Node Unavailable"), reply_to=message)
    reply.metadata.__dict__["_src_node_id"] = SUPERLINK_NODE
    assert reply.metadata.src_node_id == SUPERLINK_NODE
    return reply


def federation(settings: PretrainingFederation = SETTINGS) -> Federation:
    weights = {"w": torch.tensor([1.0, 2.0]), "b": torch.tensor(0.5)}
    return Federation(weights, ServerOptimizer("fedavg", 1.0, 0.9), settings)


def run_round(
    answers: dict[int, list[Reply]],
    *,
    arrival: list[int] | None = None,
    settings: PretrainingFederation = SETTINGS,
    unsendable: tuple[int, ...] = (),
) -> tuple[dict[str, torch.Tensor], RoundResult]:
    """A round of clients 0, 1, ... on nodes 100, 101, ...; `answers` is by client."""
    grid = FakeGrid(
        {100 + key: reply for key, reply in answers.items()},
        None if arrival is None else [100 + key for key in arrival],
    )
    grid.unsendable = {100 + key for key in unsendable}
    clients = [Client(key, 100 + key, 2, 10.0) for key in sorted(answers)]
    server = federation(settings)
    result = server.round(grid, clients, 0)
    return server.weights, result


def test_the_mean_is_weighted_by_seconds_of_audio() -> None:
    weights, result = run_round({0: [update([1.0, 0.0], 3)], 1: [update([0.0, 4.0], 1)]})
    assert weights["w"].tolist() == [1.75, 3.0]
    assert weights["b"].item() == 0.5
    assert result.failures == ()
    assert [(client["key"], client["samples"]) for client in result.clients] == [(0, 3), (1, 1)]


def test_metrics_are_means_by_audio_sums_and_maxima() -> None:
    low = {"accuracy": 0.1, "crops": 4, "peak_bytes": 10, "skipped_silent": 1}
    high = {"accuracy": 0.5, "crops": 6, "peak_bytes": 30, "skipped_silent": 2}
    _, result = run_round(
        {0: [update([0, 0], 30, metrics=low)], 1: [update([0, 0], 10, metrics=high)]}
    )
    assert result.metrics["accuracy"] == pytest.approx((0.1 * 30 + 0.5 * 10) / 40, rel=1e-12)
    assert result.metrics["samples"] == 40
    assert result.metrics["crops"] == 10
    assert result.metrics["peak_bytes"] == 30
    assert result.metrics["skipped_silent"] == 3
    assert (result.metrics["cohort"], result.metrics["failures"]) == (2, 0)


@hypothesis_settings(deadline=None, max_examples=40)
@given(arrival=st.permutations(range(6)), seed=st.integers(0, 2**31))
def test_any_order_of_arrival_gives_the_same_bits(arrival: list[int], seed: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        in_a_server_app.__wrapped__(patch)  # type: ignore[attr-defined]
        rng = np.random.default_rng(seed)
        changes = [list(rng.normal(0, 10.0 ** -rng.integers(0, 8), 2)) for _ in range(6)]
        samples = rng.integers(1, 10**6, 6)
        answers = {key: [update(changes[key], int(samples[key]))] for key in range(6)}
        ordered, first = run_round(answers)
        mixed, second = run_round(answers, arrival=arrival)
        for name in ordered:
            assert ordered[name].numpy().tobytes() == mixed[name].numpy().tobytes()
        assert first.clients == second.clients


BAD = {
    "an error reply": (error("DataError"), "client 1: DataError"),
    "an error without a reason": (error(""), "client 1: error 100"),
    "a device that has gone": (gone, "client 1: Node Unavailable"),
    "not a number": (update([float("nan"), 0.0], 5), "client 1: w has values not finite"),
    "infinite": (update([0.0, float("-inf")], 5), "client 1: w has values not finite"),
    "huge": (update([0.0, -1e9], 5), "client 1: w has values as large as 1e+09"),
    "another shape": (update([1.0], 5), "client 1: w is float32 (1,), not float32 (2,)"),
    "another dtype": (
        update([1.0, 1.0], 5, dtype=np.float64),
        "client 1: an array cannot be read: w is float64",
    ),
    "another name": (
        update([1.0, 1.0], 5, name="v"),
        "client 1: 2 tensors missing or unknown, such as v",
    ),
    "no audio": (update([1.0, 1.0], 0), "client 1: the update comes from no audio"),
    "nothing learned": (
        update([1.0, 1.0], 5, metrics={"applied": 0}),
        "client 1: no update had a finite gradient",
    ),
    "a metric that is not agreed": (
        update([1.0, 1.0], 5, metrics={"speaker": 84}),
        "client 1: metrics missing: [], not agreed: ['speaker']",
    ),
    "a metric that is not a number": (
        update([1.0, 1.0], 5, metrics={"loss": float("nan")}),
        "client 1: metric loss is not a finite number",
    ),
    "no update": (
        lambda message: Message(
            RecordDict(
                {protocol.METRICS: MetricRecord(dict.fromkeys(protocol.TRAIN_METRICS, 1.0))}
            ),
            reply_to=message,
        ),
        "client 1: the reply has no update",
    ),
    "no metrics": (
        lambda message: Message(RecordDict({}), reply_to=message),
        "client 1: the reply has no metrics",
    ),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("arrival", [[0, 1, 2], [1, 2, 0]])
def test_a_bad_reply_is_listed_and_leaves_no_trace(case: str, arrival: list[int]) -> None:
    answer, failure = BAD[case]
    good = {0: [update([1.0, 0.0], 3)], 2: [update([0.0, 4.0], 1)]}
    expected, _ = run_round(good)
    weights, result = run_round(good | {1: [answer]}, arrival=arrival)
    assert result.failures == (failure,)
    assert result.metrics["failures"] == 1
    assert [client["key"] for client in result.clients] == [0, 2]
    for name, value in expected.items():
        assert torch.equal(weights[name], value)


def test_a_second_update_of_a_client_does_not_count() -> None:
    once, _ = run_round({0: [update([1.0, 0.0], 3)], 1: [update([0.0, 4.0], 1)]})
    twice = {0: [update([1.0, 0.0], 3), update([5.0, 5.0], 9)], 1: [update([0.0, 4.0], 1)]}
    weights, result = run_round(twice)
    assert torch.equal(weights["w"], once["w"])
    assert result.failures == ("client 0: a second update in the same round",)


def test_a_message_that_cannot_be_sent_is_a_failure() -> None:
    answers = {0: [update([1.0, 0.0], 3)], 1: [update([0.0, 4.0], 1)]}
    weights, result = run_round(answers, unsendable=(1,))
    assert weights["w"].tolist() == [2.0, 2.0]
    assert result.failures == ("client 1: the message could not be sent",)


def test_too_few_updates_end_the_run_and_leave_the_weights() -> None:
    settings = dataclasses.replace(SETTINGS, min_clients=2)
    server = federation(settings)
    grid = FakeGrid({100: [update([1.0, 0.0], 3)], 101: [error("DataError")]})
    clients = [Client(0, 100, 2, 10.0), Client(1, 101, 2, 10.0)]
    with pytest.raises(RoundFailed, match="round 5: 1 updates could be used, 2 are needed: client"):
        server.round(grid, clients, 4)
    assert server.weights["w"].tolist() == [1.0, 2.0]


def test_a_cohort_smaller_than_the_least_number_of_clients_is_enough() -> None:
    settings = dataclasses.replace(SETTINGS, min_clients=3, clients_per_round=2)
    _, result = run_round({key: [update([1.0, 0.0], 3)] for key in range(5)}, settings=settings)
    assert result.metrics["cohort"] == 2


def test_every_client_of_a_round_gets_the_weights_and_the_global_update_number() -> None:
    settings = dataclasses.replace(SETTINGS, local_updates=3)
    server = federation(settings)
    grid = FakeGrid({node: [update([1.0, 0.0], 3)] for node in (100, 101)})
    server.round(grid, [Client(key, 100 + key, 2, 10.0) for key in (0, 1)], 4)
    assert len(grid.sent) == 2
    for message in grid.sent:
        assert message.metadata.message_type == "train"
        assert set(message.content) == {protocol.WEIGHTS, protocol.INSTRUCTIONS}
        instructions = message.content.config_records[protocol.INSTRUCTIONS]
        assert dict(instructions) == {
            "run": "run", "round": 4, "first_update": 12, "updates": 3, "base_round": -1,
            "encoding": "fp32", "folded_round": -1,
        }  # fmt: skip
        sent = message.content.array_records[protocol.WEIGHTS]
        assert updates.Views(sent)["w"].shape == (2,)


def test_a_cohort_follows_from_seed_and_round_not_from_node_ids() -> None:
    settings = dataclasses.replace(SETTINGS, clients_per_round=5, seed=3)
    first = [Client(key, 1000 + key, 2, 10.0) for key in range(50)]
    second = [Client(key, 9000 - 7 * key, 2, 10.0) for key in range(50)]
    cohorts = []
    for number in range(20):
        keys = [client.key for client in choose_cohort(first, settings, number)]
        assert keys == [client.key for client in choose_cohort(second, settings, number)]
        assert keys == sorted(set(keys))
        assert len(keys) == 5
        cohorts.append(keys)
    assert len({tuple(keys) for keys in cohorts}) == 20
    assert len({key for keys in cohorts for key in keys}) > 35
    other = dataclasses.replace(settings, seed=4)
    assert [c.key for c in choose_cohort(first, other, 0)] != cohorts[0]


def test_clients_are_found_and_ordered_by_their_number() -> None:
    answers = {55: [description(2)], 11: [description(0, 4.0)], 99: [description(1)]}
    settings = dataclasses.replace(SETTINGS, min_clients=3)
    clients = Roster(FakeGrid(answers), settings, lambda text: None).gather()
    assert [(client.key, client.node) for client in clients] == [(0, 11), (1, 99), (2, 55)]
    assert clients[0].seconds == 4.0


def test_a_client_that_cannot_take_part_is_named_and_skipped() -> None:
    said: list[str] = []
    answers: dict[int, list[Reply]] = {
        11: [description(0)],
        12: [error("DataError [/bold]")],
        13: [gone],
    }
    clients = Roster(FakeGrid(answers), SETTINGS, said.append).gather()
    assert [client.node for client in clients] == [11]
    assert sorted(said) == [
        "a client cannot take part: DataError [/bold]",
        "a client cannot take part: Node Unavailable",
    ]


def test_two_clients_with_one_number_take_part_once() -> None:
    said: list[str] = []
    answers = {12: [description(4)], 11: [description(4)], 13: [description(5)]}
    grid = FakeGrid(answers)
    clients = Roster(grid, SETTINGS, said.append).gather()
    assert [(client.key, client.node) for client in clients] == [(4, 11), (5, 13)]
    assert said == ["two clients say they are number 4; only one of them takes part, both are told"]
    told = [m.metadata.dst_node_id for m in grid.sent if notice_of(m)]
    assert told == [11, 12]
    assert "number as this one, 4: only one of them takes part" in notice_of(grid.sent[-1])


def test_of_a_device_that_was_restarted_the_node_that_answers_takes_part(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("fl_server.replies._TOLD_IN", 0.3)  # the old node never answers
    said: list[str] = []

    def once(message: Message) -> Message:
        grid.silent.add(11)  # from now on
        return description(4)(message)

    grid = FakeGrid({11: [once], 12: [description(4)]})
    roster = Roster(grid, SETTINGS, said.append)
    assert [client.node for client in roster.gather()] == [12]
    assert not said
    del grid.answers[11]
    assert [client.node for client in roster.refresh()] == [12]


def test_when_one_of_two_doubles_goes_the_other_takes_its_place() -> None:
    grid = FakeGrid({11: [description(4)], 12: [description(4)]})
    said: list[str] = []
    roster = Roster(grid, SETTINGS, said.append)
    assert [client.node for client in roster.gather()] == [11]
    sent = len(grid.sent)
    assert [client.node for client in roster.refresh()] == [11]
    assert len(grid.sent) == sent, "nobody is told again"
    del grid.answers[11]
    assert [client.node for client in roster.refresh()] == [12]


def test_owners_are_told_what_the_server_cannot_use() -> None:
    grid = FakeGrid(
        {
            11: [update([1.0, 0.0], 2, metrics={"loss": math.nan})],
            12: [update([1.0, 0.0], 2)],
        }
    )
    clients = [Client(0, 11, 5, 1.0), Client(1, 12, 5, 1.0)]
    result = federation().round(grid, clients, 2)
    assert len(result.failures) == 1
    assert [(m.metadata.dst_node_id, notice_of(m)) for m in grid.sent if notice_of(m)] == [
        (11, "the server could not use this device's update of round 3; its log says why")
    ]


def test_too_few_clients_end_the_wait_with_their_reasons() -> None:
    settings = dataclasses.replace(SETTINGS, min_clients=2, wait=0.2)
    answers = {11: [description(0)], 12: [error("DataError")]}
    with pytest.raises(RoundFailed, match="1 clients are ready, 2 are needed: DataError"):
        Roster(FakeGrid(answers), settings, lambda text: None).gather()
    with pytest.raises(RoundFailed, match="0 clients are ready, 2 are needed: none has connected"):
        Roster(FakeGrid({}), settings, lambda text: None).gather()


TWO = [Client(key, key, 5, 5.0) for key in (1, 2)]


def test_an_update_of_another_round_is_refused() -> None:
    grid = FakeGrid({1: [update([1.0, 2.0], 5)], 2: [update([9.0, 9.0], 5, metrics={"round": 3})]})
    result = federation().round(grid, TWO, 0)
    assert result.failures == ("client 2: an update of round 4",)
    assert result.metrics["samples"] == 5


@pytest.mark.parametrize("limit", ["deadline", "patience"])
def test_a_client_that_does_not_answer_in_time_is_skipped(limit: str) -> None:
    grid = FakeGrid({1: [update([1.0, 2.0], 5)], 2: [update([9.0, 9.0], 5)]})
    grid.silent = {2}
    settings = dataclasses.replace(SETTINGS, **{limit: 1.5})  # type: ignore[arg-type]
    result = federation(settings).round(grid, TWO, 0)
    assert result.failures == ("client 2: no answer in time",)
    assert result.metrics["samples"] == 5


def test_a_device_that_was_started_again_is_not_lost() -> None:
    def who(key: int) -> Reply:
        numbers = {"partition": float(key), "crops": 5.0, "seconds": 5.0}
        return lambda message: Message(
            RecordDict({protocol.METRICS: MetricRecord(numbers)}), reply_to=message
        )

    grid = FakeGrid({1: [who(4)], 2: [who(5)]})
    roster = Roster(grid, SETTINGS, lambda text: None)
    assert [client.node for client in roster.gather()] == [1, 2]
    grid.answers[3] = [who(4)]  # the same device under a new id, the old one still listed
    grid.arrival.append(3)
    assert [client.node for client in roster.refresh()] == [1, 2]
    del grid.answers[1]
    assert sorted(client.node for client in roster.refresh()) == [2, 3]
