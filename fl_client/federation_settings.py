"""Settings of a federation: the same on the command line, in YAML and in Flower's run config."""

import dataclasses
import functools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from common.errors import UsageError
from common.options import short_names
from common.settings import flat, from_mapping, unflat
from common.units import Names, Seconds
from fl_client.protocol import Encoding
from partitions.speakers import How
from ssl_core.downstream.task_corpus import TRAIN
from ssl_core.downstream.task_recipe import Method, Share
from ssl_core.downstream.task_settings import TaskSettings
from ssl_core.training.compute_settings import ComputeSettings
from ssl_core.training.pretraining_settings import PretrainingSettings


@dataclasses.dataclass(frozen=True, kw_only=True)
class FederationSettings(ComputeSettings):
    """What server and clients agree on; a device may have its own `data`."""

    rounds: int = 10
    """Rounds of the whole run; the learning-rate schedule spans them."""
    clients: int = 100
    """Clients the corpus is divided among in a simulation."""
    clients_per_round: int = 4
    """Size of the cohort of a round."""
    local_updates: int = 2
    """Updates a client takes in a round."""
    threads: int = 0
    """CPU threads of a client's step; 0 is all cores of a device, and one in a simulation. Part of
    the result's last bits, so not tied to --workers."""
    model: str = "base"
    """Preset: `base` or `tiny`."""
    subset: Names = Names()
    """Subsets of the corpus, separated by commas; none is all `train-*`."""
    server_optimizer: Literal["fedavg", "fedavgm", "fedadam"] = "fedavg"
    """How the mean update is applied."""
    server_rate: float = 0.0
    """The server's learning rate; 0 is the usual one: 1, or 0.001 for fedadam."""
    server_momentum: float = 0.9
    """First moment's decay of fedavgm and fedadam."""
    min_clients: int = 1
    """Clients that must be connected, and must reply in a round, for the run to go on."""
    encoding: Encoding = "fp32"
    """How weights and updates travel; what an encoding loses is sent with the next update. `fp32`
    is exact and keeps no weights on the devices."""
    keep_optimizer_state: bool = False
    """Whether a client goes on with the optimizer state of its last round that counted, which it
    keeps on its disk (two models in fp32). Otherwise every round begins with none."""
    deadline: float = 0.0
    """Seconds a round may take; who has not answered by then is skipped. 0 waits for all."""
    patience: float = 0.0
    """Once half the cohort has answered, wait for the others this many times as long as the slowest
    of them took. 0 waits for all."""
    wait: float = 600.0
    """Seconds to wait for that many clients to connect."""
    norm_bound: float = 5.0
    """Longest an update may be, in median norms of its cohort's updates; a longer one is scaled
    down to the median. 0 is no bound. A client that begins without the optimizer state that others
    have kept is about 3 times as long."""
    against_bound: float = 0.9
    """How much a client's updates may point against those of its cohorts of four or more, added up
    over rounds (a flipped sign: about 1.2 a round; noise: 0.2), before they are refused. 0 refuses
    none."""
    keep: int = 2
    """Checkpoints to keep."""
    output: Path | None = None
    """Run directory; without it one is made under `runs/`."""
    resume: Path | None = None
    """Run directory to go on with (its own settings are used)."""

    def validate(self) -> None:
        """Check values and that they fit together.

        Raises:
            UsageError: what is wrong.
        """
        self.require_at_least(
            1, "rounds", "clients", "clients_per_round", "local_updates", "min_clients", "keep"
        )
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, float) and not math.isfinite(value):
                raise UsageError(f"{field.name.replace('_', '-')} must be finite, not {value}")
        if self.deadline < 0 or self.patience < 0:
            raise UsageError("deadline and patience must not be below zero")
        if self.norm_bound and not self.norm_bound >= 1:
            raise UsageError(f"norm-bound must be 0 or at least 1, not {self.norm_bound}")
        if not self.against_bound >= 0:
            raise UsageError(f"against-bound must not be below zero, not {self.against_bound}")
        if self.server_rate < 0 or not 0 <= self.server_momentum < 1:
            raise UsageError("server-rate must not be below zero, server-momentum in [0, 1)")
        super().validate()  # type: ignore[misc]

    @property
    def total_updates(self) -> int:
        """Global updates of the whole run."""
        return self.rounds * self.local_updates


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainingFederation(FederationSettings, PretrainingSettings):
    """Pretraining in a federation."""

    task: ClassVar[str] = ""
    """None."""

    partition: How = "speaker"
    """How speech is divided: whole speakers, evenly at random, or with skewed durations."""
    fleet: str = ""
    """Devices that simulated clients are, as in `rpi4:60,jetson-xavier-nx:30,rtx2080ti:10`: each
    plans for its own memory; empty: all take the plan of these settings."""
    time_limit: Seconds | None = None
    """Longest time an update may take a device of the fleet, as in `60s`: slower ones train on
    shorter crops, down to 1s, of the same sequences."""
    loss_margin: float = 0.25
    """Fraction by which a round may raise the held-out loss; a round that raises it more, or
    collapses the codebook, is undone. The first rounds of an honest run may raise it by 0.12; while
    more codes come into use, it may rise to that of guessing. 0 undoes none."""
    undone_rounds: int = 3
    """Rounds undone in a row after which the run stops; it can be resumed."""

    def validate(self) -> None:
        """Check values and that they fit together.

        Raises:
            UsageError: what is wrong.
        """
        super().validate()
        if not 0 <= self.held_out < 1:
            raise UsageError(f"held-out is a fraction of speakers in [0, 1), not {self.held_out}")
        if not self.loss_margin >= 0:
            raise UsageError(f"loss-margin must not be below zero, not {self.loss_margin}")
        self.require_at_least(1, "undone_rounds")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskFederation(FederationSettings, TaskSettings):
    """Fine-tuning a downstream task in a federation."""

    checkpoint: str = ""
    """Directory of the backbone that everyone begins with, or one of `random`, `logmel`."""
    partition: Literal[How, "labels"] = "speaker"
    """How clips are divided: whole speakers, evenly at random, with skewed amounts, or so that
    clients differ in what they say (`labels`)."""
    method: Method = "fedper"
    """`fedavg`: everything that is trained is shared; `fedper`: heads stay on the devices;
    `fedrep`: so they do, and are trained before the shared part; `local`: nothing is shared."""
    share: Share = "backbone"
    """What of the backbone is trained: `backbone`, `layers` (the last ones), `lora` (low-rank
    changes of its attention) or `none`."""
    shared_layers: int = 2
    """How many last layers are trained with `share layers`."""
    lora_rank: int = 8
    """Rank of the changes with `share lora`."""
    head_updates: int = 0
    """With `fedrep`: updates of the head before those of the shared part; 0 takes as many as
    `local-updates`."""
    own_test: float = 0.25
    """Fraction of its own clips that a client keeps to evaluate on."""

    @classmethod
    def defaults(cls, given: Mapping[str, Any]) -> dict[str, Any]:
        """See `TaskSettings`; a round counts as an epoch of the recipe's schedule."""
        found = super().defaults(given)
        if "recipe" in found and not given.get("resume"):
            rounds = int(given.get("rounds", cls.rounds))
            found["recipe"] = dataclasses.replace(found["recipe"], epochs=rounds)
        return found

    def validate(self) -> None:
        """Check values and that they fit together.

        Raises:
            UsageError: what is wrong.
        """
        super().validate()
        if not 0 < self.own_test < 1:
            raise UsageError(
                f"own-test is a fraction of clips between 0 and 1, not {self.own_test}"
            )
        self.require_at_least(0, "head_updates")
        if not self.checkpoint:
            raise UsageError("a task needs a checkpoint: a directory, or one of random, logmel")

    @property
    def subsets(self) -> tuple[str, ...]:
        """Of asr, the subsets whose clips are divided among clients."""
        return self.subset or TRAIN


RunSettings = PretrainingFederation | TaskFederation
"""Settings of either kind."""


def federation_kind(task: object) -> type[PretrainingFederation] | type[TaskFederation]:
    """The class of settings for a task's name, or for pretraining where it is empty."""
    return TaskFederation if task else PretrainingFederation


def from_run_config(values: Mapping[str, Any]) -> RunSettings:
    """Read Flower's run config, whose empty texts are settings that were not given.

    Raises:
        UsageError: an unknown key or a bad value.
    """
    return _from_items(tuple(sorted(values.items())))


@functools.lru_cache(maxsize=8)
def _from_items(items: tuple[tuple[str, Any], ...]) -> RunSettings:
    """Parsed and checked once a process, not once a message."""
    given = unflat(dict(items))
    resume = given.pop("resume", None)  # a path of the server, whose settings all are given here
    kind = federation_kind(given.get("task"))
    unused = _names(federation_kind(not given.get("task"))) - _names(kind)
    for name, value in items:
        if value != "" and name.replace("_", "-") in unused:
            other = "pretraining" if kind is TaskFederation else "a task"
            raise UsageError(f"run config: {name} is for {other}")
    settings = from_mapping(kind, given, "run config")
    return dataclasses.replace(settings, resume=Path(resume) if resume else None)


def _names(kind: type[RunSettings]) -> set[str]:
    """Names in the run config, nested ones too."""
    return {*flat(kind()), *short_names(kind)}
