"""Weights on their way to the clients and updates on their way back, over several rounds."""

from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import ArrayRecord
from torch import Tensor, nn

from fl_client import updates
from fl_client.client_state import ClientState, StateLost
from fl_client.encoding import Decoded
from fl_client.exchange import exchange_of
from fl_client.protocol import Encoding
from fl_server.broadcast import WHOLE, Broadcast

KEYS = (3, 8)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.wide, self.frozen = nn.Linear(40, 30), nn.Linear(20, 20)


def asked(number: int, base: int, kind: Encoding, folded: int = -1) -> dict[str, Any]:
    how = kind if base >= 0 else WHOLE[kind]
    return {
        "run": "abc", "round": number, "base_round": base, "encoding": how, "folded_round": folded
    }  # fmt: skip


def state(root: Path, key: int = 3) -> ClientState:
    return ClientState(root, "abc", key)


def copy(record: ArrayRecord) -> ArrayRecord:
    return ArrayRecord(dict(record))


def worst(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    return max(float((one[name] - other[name]).abs().max()) for name in one)


@pytest.mark.parametrize("kind", ["bf16", "int8", "int4", "topk"])
def test_clients_follow_the_weights_and_the_server_their_updates(
    kind: Encoding, tmp_path: Path
) -> None:
    weights = {name: value.clone() for name, value in Model().state_dict().items()}
    exact = {name: value.clone() for name, value in weights.items()}
    broadcast, sizes = Broadcast(kind), []
    shapes = {name: tuple(value.shape) for name, value in weights.items()}
    changed = ("wide.weight", "wide.bias")
    for number in range(12):
        record, base = broadcast.pack(weights, number, KEYS)
        assert base == (number - 1 if number else -1)
        sizes.append(updates.size(record))
        for key in KEYS:
            model = Model()
            instructions = asked(number, base, kind, number - 1)
            exchange = exchange_of(model, copy(record), instructions, state(tmp_path, key), kind)
            exchange.load()
            start = {name: value.clone() for name, value in model.state_dict().items()}
            assert worst(start, broadcast.sent) == 0
            torch.manual_seed(100 * number + key)
            with torch.no_grad():
                for name in changed:
                    step = 0.01 * torch.randn_like(weights[name])
                    model.get_parameter(name).add_(step)
                    exact[name] += step / len(KEYS)
            update = exchange.difference()
            assert set(updates.Views(update)) == set(changed)  # what has not changed is not sent
            received = Decoded(update, shapes, kind)
            for name in changed:
                weights[name] += torch.from_numpy(received[name].copy()) / len(KEYS)
            broadcast.held[key] = number
    left = {"bf16": 1e-3, "int8": 1e-3, "int4": 8e-3, "topk": 0.09}[kind]
    assert worst(weights, exact) < left
    assert (weights["wide.bias"] - exact["wide.bias"]).abs().max() < 1e-6  # vectors travel in fp32
    assert sizes[-1] <= sizes[0]
    if kind == "int4":
        assert sizes[-1] < 0.65 * sizes[0]  # whole weights travel in 8 bits, differences in 4


def test_whoever_lacks_the_round_before_makes_all_get_whole_weights(tmp_path: Path) -> None:
    weights = Model().state_dict()
    broadcast = Broadcast("int8")
    assert broadcast.pack(weights, 0, KEYS)[1] == -1
    broadcast.held = {3: 0, 8: 0}
    assert broadcast.pack(weights, 1, KEYS)[1] == 0
    broadcast.held = {3: 1}
    assert broadcast.pack(weights, 2, KEYS)[1] == -1
    assert broadcast.pack(weights, 3, [3])[1] == -1


def test_a_server_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    weights = Model().state_dict()
    one, other = Broadcast("int8"), Broadcast("int8")
    one.pack(weights, 0, KEYS)
    one.held = {3: 0, 8: 0}
    saved = {name: value.clone() for name, value in one.state().items()}
    other.load(saved, {"3": 0, "8": 0})
    moved = {name: value + 0.01 for name, value in weights.items()}
    first, second = one.pack(moved, 1, KEYS), other.pack(moved, 1, KEYS)
    assert first[1] == second[1] == 0
    assert all(first[0][name].data == second[0][name].data for name in first[0])


def test_a_client_without_its_state_says_so(tmp_path: Path) -> None:
    broadcast = Broadcast("int8")
    broadcast.pack(Model().state_dict(), 0, KEYS)
    broadcast.held = dict.fromkeys(KEYS, 0)
    record, base = broadcast.pack(Model().state_dict(), 1, KEYS)
    with pytest.raises(StateLost, match="weights of round 1 cannot be read"):
        exchange_of(Model(), record, asked(1, base, "int8"), state(tmp_path), "int8")
    with pytest.raises(StateLost, match="is not the name of a run"):
        ClientState(tmp_path, "../x", 3)


def test_only_two_rounds_are_kept(tmp_path: Path) -> None:
    broadcast = Broadcast("int8")
    for number in range(4):
        record, base = broadcast.pack(Model().state_dict(), number, [3])
        exchange = exchange_of(
            Model(), record, asked(number, base, "int8"), state(tmp_path), "int8"
        )
        exchange.load()
        exchange.difference()
        broadcast.held[3] = number
    names = sorted(path.name for path in (tmp_path / "abc" / "3").iterdir())
    assert [name.split(".")[0] for name in names] == [
        "residual-00002", "residual-00003", "weights-00002", "weights-00003"
    ]  # fmt: skip


def test_the_optimizer_state_of_version_0_1_is_read(tmp_path: Path) -> None:
    before = state(tmp_path)
    before.save("moments", 4, {"w.first": torch.ones(2)})
    after = state(tmp_path)
    assert after.rounds("optimizer") == [4]
    assert torch.equal(dict(after.load("optimizer", 4))["w.first"], torch.ones(2))
    assert after.rounds("moments") == []
