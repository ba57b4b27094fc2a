"""Two poisoned clients of ten, with and without the server's guards: held-out loss of `tiny`.

`python -m benchmarks.poisoned_clients --data LibriSpeech` runs each federation in this process: the
project's ServerApp and ClientApp, with the poison between them (`benchmarks.poison`). The loss
without poison is that of the eight other clients alone. The last line is one JSON object.
"""

import contextlib
import dataclasses
import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from flwr.app import ArrayRecord, Context, Message, MessageType, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from jsonargparse.typing import PositiveInt

from benchmarks.poison import KINDS, poison
from common import command
from common.options import settings_parser
from common.settings import parse
from common.units import Names
from fl_client.client_app import app
from fl_client.federation_settings import from_run_config
from fl_server import round_updates
from fl_server.server_app import serve
from ssl_core.training.run_directory import RunDirectory

CLIENTS = 10
POISONED = (2, 7)
NO_GUARDS = {"norm-bound": 0.0, "against-bound": 0.0, "loss-margin": 0.0}
WITHIN = 1.02
"""The largest ratio of held-out losses that is wanted."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PoisonedSettings:
    """What to train on, and for how long."""

    data: Path
    """LibriSpeech."""
    rounds: PositiveInt = PositiveInt(20)
    """Rounds of each run."""
    kinds: Names = Names(KINDS)
    """Kinds of poison: audio, scaled, flipped, noise."""
    seed: int = 0
    """Of the runs."""
    encoding: str = "fp32"
    """Of weights and updates; the poison reads fp32."""
    output: Path | None = None
    """Folder for the run directories; a temporary one without it."""


class InMemoryGrid:
    """The ClientApp of some clients in this process; answers each message when it is pulled."""

    def __init__(
        self, run: Mapping[str, Any], folder: Path, keys: Sequence[int], kind: str
    ) -> None:
        """Start without messages.

        Args:
            run: Flower's run config.
            folder: for the clients' state.
            keys: of the clients, of `CLIENTS` that the corpus is divided among.
            kind: of the poison of `POISONED`; empty for none.
        """
        self.run, self.folder, self.keys, self.kind = run, folder, keys, kind
        self.waiting: dict[str, Message] = {}
        self.sent = 0

    def get_node_ids(self) -> list[int]:
        """Node ids: keys plus 100."""
        return [100 + key for key in self.keys]

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Keep messages; returns their ids."""
        identifiers = []
        for message in messages:
            self.sent += 1
            identifiers.append(f"message-{self.sent}")
            message.metadata.__dict__["_message_id"] = identifiers[-1]
            self.waiting[identifiers[-1]] = message
        return identifiers

    def pull_messages(self, identifiers: Iterable[str]) -> list[Message]:
        """The clients' replies."""
        return [self._answer(self.waiting.pop(name)) for name in identifiers]

    def _answer(self, message: Message) -> Message:
        key = message.metadata.dst_node_id - 100
        node: dict[str, Any] = {
            "partition-id": key, "num-partitions": CLIENTS, "simulated": True,
            "state": str(self.folder),
        }  # fmt: skip
        content = RecordDict(dict(message.content.items()))
        for name, record in message.content.array_records.items():
            content[name] = ArrayRecord(dict(record.items()))  # a client empties its own
        own = Message(metadata=message.metadata, content=content)
        reply = app(own, Context(7, 100 + key, node, RecordDict(), dict(self.run)))
        asked = message.metadata.message_type in (MessageType.QUERY, MessageType.TRAIN)
        if self.kind and key in POISONED and asked and not reply.has_error():
            poison(reply, self.kind)
        return reply


@contextlib.contextmanager
def unbounded_weights() -> Iterator[None]:
    """Believe what clients state, as the server did before 0.2."""
    with mock.patch.object(round_updates, "largest_weight", return_value=2**62):
        yield


def federate(
    settings: PoisonedSettings, folder: Path, keys: Sequence[int], kind: str, guards: bool
) -> list[dict[str, Any]]:
    """Take a run; the metrics of its rounds.

    Args:
        settings: of the benchmark.
        folder: new, for the run directory and the clients' state.
        keys: of the clients that take part in every round.
        kind: of poison; empty for none.
        guards: whether the server guards the model.
    """
    config: dict[str, Any] = {
        "model": "tiny", "length": "1s", "batch": 4, "local-updates": 2, "threads": 1,
        "subset": "train-clean-100", "data": str(settings.data.resolve()),
        "clients": CLIENTS, "clients-per-round": len(keys), "min-clients": 1,
        "rounds": settings.rounds, "seed": settings.seed, "encoding": settings.encoding,
        "eval-crops": 64, "output": str(folder / "run"), **({} if guards else NO_GUARDS),
    }  # fmt: skip
    grid: Any = InMemoryGrid(config, folder / "clients", keys, kind)
    with contextlib.nullcontext() if guards else unbounded_weights():
        path = serve(grid, from_run_config(config))
    return RunDirectory.reopen(path).metrics()


def poisoned_row(rows: Sequence[Mapping[str, Any]], without: float) -> dict[str, Any]:
    """What poison did to a run.

    Args:
        rows: metrics of its rounds.
        without: held-out loss of the run without the poisoned clients.
    """
    loss = rows[-1]["held_out_loss"]
    folded = sum(client["key"] in POISONED for row in rows for client in row["clients"])
    bounded = sum(row["weights_bounded"] + row["norms_bounded"] for row in rows)
    return {
        "held_out_loss": round(loss, 4),
        "ratio": round(loss / without, 4),
        "sent": len(POISONED) * len(rows),
        "refused": sum(row["refused"] for row in rows),
        "bounded": bounded,
        "undone_rounds": sum(row["undone"] for row in rows),
        "whole_into_the_model": folded - bounded,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Take all runs; returns the exit code: 1 if a kind of poison costs more than 2 %."""
    parser = settings_parser(
        PoisonedSettings, prog="python -m benchmarks.poisoned_clients", description=__doc__
    )
    settings, _ = parse(PoisonedSettings, parser, arguments)
    for name in ("_run_id", "_node_id", "_task_id"):
        setattr(TaskIdentity, name, 7)  # as Flower does for the process of a ServerApp
    everyone = range(CLIENTS)
    honest = [key for key in everyone if key not in POISONED]
    with tempfile.TemporaryDirectory(prefix="poisoned-") as temporary:
        folder = (settings.output or Path(temporary)).resolve()

        def loss(name: str, keys: Sequence[int], guards: bool = True) -> float:
            rows = federate(settings, folder / name, keys, "", guards)
            return float(rows[-1]["held_out_loss"])

        without = loss("without", honest)
        result: dict[str, Any] = {
            "without_them": round(without, 4),
            "with_them_honest": round(loss("honest", everyone), 4),
            "with_them_honest_no_guards": round(loss("honest-off", everyone, False), 4),
        }
        for kind in settings.kinds:
            for guards in (True, False):
                name = f"{kind}-{'on' if guards else 'off'}"
                rows = federate(settings, folder / name, everyone, kind, guards)
                row = poisoned_row(rows, without)
                result.setdefault(kind, {})["guards" if guards else "no_guards"] = row
                print(name, json.dumps(row), flush=True)
    print(json.dumps(result))
    ratios = [result[kind]["guards"]["ratio"] for kind in settings.kinds]
    return int(max(ratios) > WITHIN)


if __name__ == "__main__":
    command.run(main)
