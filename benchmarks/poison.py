"""What a client that lies or errs answers, made from what it would have answered honestly.

It imports nothing of the project, so that a real device's double can use it too (`bad_updates`).
"""

import hashlib

import numpy as np
from flwr.app import Array, ArrayRecord, Message, MetricRecord
from safetensors.numpy import load, save

KINDS = {
    "audio": "states a million times the audio it has, when it joins and with each update",
    "scaled": "multiplies its update by 100",
    "flipped": "flips the sign of its update",
    "noise": "sends Gaussian noise, in each tensor of the norm of its update",
}
FACTOR = 100.0
LIE = 1e6


def poison(reply: Message, kind: str) -> None:
    """Alter a reply to a describe or train message in place.

    Args:
        reply: an honest one, whose update is fp32.
        kind: one of `KINDS`.
    """
    metrics, update = reply.content.get("metrics"), reply.content.get("update")
    if kind == "audio" and isinstance(metrics, MetricRecord):
        for name in ("seconds", "crops", "samples"):
            if name in metrics and ("seconds" in metrics or name == "samples"):
                value = metrics[name]
                assert isinstance(value, int | float)
                metrics[name] = value * LIE
    elif kind != "audio" and isinstance(update, ArrayRecord):
        reply.content["update"] = ArrayRecord(
            {name: _spoilt(array, kind) for name, array in update.items()}
        )


def _spoilt(array: Array, kind: str) -> Array:
    """A bundle of tensors, spoilt; the noise follows from the bundle, so it repeats."""
    tensors = load(bytes(array.data))
    digest = hashlib.sha256(array.data).digest()
    rng = np.random.default_rng(int.from_bytes(digest[:8], "little"))
    for name, value in tensors.items():
        if kind == "noise":
            noise = rng.standard_normal(value.shape)
            norm = float(np.linalg.norm(noise))
            tensors[name] = np.float32(noise * (np.linalg.norm(value) / norm if norm else 0.0))
        else:
            tensors[name] = value * np.float32(FACTOR if kind == "scaled" else -1.0)
        tensors[name] = np.asarray(tensors[name], np.float32).reshape(value.shape)
    data = save(tensors)
    return Array(dtype=array.dtype, shape=(len(data),), stype=array.stype, data=data)
