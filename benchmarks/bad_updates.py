"""A client that sends poisoned, truncated or replayed updates, or lies, for `benchmarks.faults`.

The SuperNode of one client finds a `flwr-clientapp` that wraps Flower's `ClientApp.__call__` and
alters the reply, so that all of the project's code runs unchanged.
"""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

# Stands in for `flwr-clientapp`, behind a shebang line and constants that `write_double` adds.
DOUBLE = """
import json
import pickle
import sys
from pathlib import Path

from flwr.app import Array, ArrayRecord, Message
from flwr.clientapp import ClientApp

sys.path.append(ROOT)  # which the app that Flower installs does not hold
from benchmarks.poison import KINDS, poison

original = ClientApp.__call__


def altered(app, message, context):
    reply = original(app, message, context)
    instructions = message.content.config_records.get("instructions", {})
    if reply.has_error():
        return reply
    if FAULT in KINDS:
        poison(reply, FAULT)
    if "round" not in instructions:
        return reply
    number, kept = int(instructions["round"]), Path(FOLDER, "reply")
    if FAULT in KINDS:
        pass
    elif FAULT == "replayed":
        if number not in ROUNDS:
            kept.write_bytes(pickle.dumps(reply.content))
            return reply
        reply = Message(pickle.loads(kept.read_bytes()), reply_to=message)
    elif number not in ROUNDS:
        return reply
    else:
        update = reply.content.array_records["update"]
        reply.content["update"] = ArrayRecord(
            {name: spoilt(array) for name, array in update.items()}
        )
    with open(Path(FOLDER, "bad.jsonl"), "a", encoding="utf-8") as stream:
        stream.write(json.dumps(number) + "\\n")
    return reply


def spoilt(array):
    data = array.data
    if FAULT == "truncated":
        data = data[: len(data) // 2]
    else:
        header = 8 + int.from_bytes(data[:8], "little")  # of the safetensors format
        data = data[:header] + (PATTERN * len(data))[: len(data) - header]
    return Array(dtype=array.dtype, shape=array.shape, stype=array.stype, data=data)


ClientApp.__call__ = altered
from flwr.supernode.cli import flwr_clientapp

sys.argv[0] = "flwr-clientapp"
sys.exit(flwr_clientapp())
"""
POISONS = (b"\xff\xff\xff\xff", b"\xff\xff\x7f\x7f")
"""Bytes that read as NaN and as 3.4e38 in fp32; in int8 the scales become so."""


def write_double(
    folder: Path, fault: str, output: Path, rounds: Sequence[int], pattern: bytes
) -> None:
    """Write a `flwr-clientapp` that alters replies, and a `python` beside it.

    Args:
        folder: to make.
        fault: `poisoned`, `truncated`, `replayed` or one of `poison.KINDS`.
        output: existing folder for `bad.jsonl`, which lists the rounds whose replies were altered.
        rounds: numbers of the rounds to alter, from 0.
        pattern: bytes of a poisoned tensor, see `POISONS`.
    """
    folder.mkdir()
    (folder / "python").symlink_to(sys.executable)
    constants = {
        "FAULT": fault,
        "ROOT": str(Path(__file__).parents[1]),
        "FOLDER": str(output),
        "ROUNDS": list(rounds),
        "PATTERN": pattern,
    }
    lines = [f"#!{shlex.quote(sys.executable)}"]
    lines += [f"{name} = {value!r}" for name, value in constants.items()]
    script = folder / "flwr-clientapp"
    script.write_text("\n".join(lines) + DOUBLE, encoding="utf-8")
    script.chmod(0o755)
