"""Divides the trained parameters of a task's model into shared and personal ones."""

from typing import NamedTuple

from common.errors import UsageError
from ssl_core.downstream.lora import add_lora
from ssl_core.downstream.task_model import TaskModel
from ssl_core.downstream.task_recipe import Method, Share


class Parts(NamedTuple):
    """Names of trained parameters."""

    shared: frozenset[str]
    personal: frozenset[str]

    @property
    def trained(self) -> frozenset[str]:
        """All trained parameters."""
        return self.shared | self.personal


def divide(
    model: TaskModel, method: Method, share: Share, *, layers: int, rank: int, seed: int
) -> Parts:
    """Divide the parameters; adds low-rank adapters to the model if `share` is `lora`.

    Args:
        model: upstream and head.
        method: of federated learning.
        share: part of the backbone that is trained.
        layers: number of last layers to train if `share` is `layers`.
        rank: of the adapters if `share` is `lora`.
        seed: for the adapters' initial values.

    Raises:
        UsageError: the model has no backbone or too few layers, the rank is out of range, or
            nothing would be shared.
    """
    if model.wav2vec2 is None and share != "none":
        raise UsageError(f"{model.upstream.name} has no backbone to train: set share to none")
    if share == "lora":
        assert model.wav2vec2 is not None
        add_lora(model.wav2vec2, rank, seed)
    head = model.trainable(unfrozen=False)
    body: frozenset[str] = frozenset()
    if share == "backbone":
        body = model.trainable(unfrozen=True) - head
    elif share == "lora":
        body = frozenset(name for name, _ in model.named_parameters() if ".lora_" in name)
    elif share == "layers":
        assert model.wav2vec2 is not None
        depth = model.wav2vec2.config.num_hidden_layers
        if not 1 <= layers <= depth:
            raise UsageError(f"shared-layers must be from 1 to {depth}, not {layers}")
        starts = tuple(f"wav2vec2.encoder.layers.{depth - 1 - n}." for n in range(layers))
        body = frozenset(name for name, _ in model.named_parameters() if name.startswith(starts))
    if method == "local":
        return Parts(frozenset(), head | body)
    if method == "fedavg":
        return Parts(head | body, frozenset())
    if not body:
        raise UsageError(
            f"{method} keeps the head on the device and shares part of the backbone: with share "
            "none there is nothing to share; use fedavg to share the head, or local"
        )
    return Parts(body, head)
