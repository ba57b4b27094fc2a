"""Settings of a federation: the same on the command line, in YAML and in Flower's run config."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from common.errors import UsageError
from common.settings import from_mapping
from fl_client.encoding import Encoding
from ssl_core.downstream.task_recipe import Method, Share, TaskRecipe
from ssl_core.downstream.task_settings import TaskSettings
from ssl_core.planning.step_plan import Plan
from ssl_core.training.pretraining_settings import StepSettings


@dataclasses.dataclass(frozen=True, kw_only=True)
class FederationSettings(StepSettings):
    """What server and clients agree on; a device may have its own `data`."""

    rounds: int = 10
    """Rounds of the whole run; the learning-rate schedule spans them."""
    clients: int = 100
    """Clients the corpus is divided among in a simulation."""
    clients_per_round: int = 4
    """Size of the cohort of a round."""
    local_updates: int = 2
    """Optimiser updates a client takes in a round."""
    threads: int = 1
    """CPU threads of a client's step. Part of the result's last bits, so not tied to --workers."""
    partition: Literal["speaker", "iid", "skewed", "labels"] = "speaker"
    """How speech is divided: whole speakers, evenly at random, with skewed durations, or, of a
    task's clips, so that clients differ in what they say (`labels`)."""
    task: str = ""
    """A downstream task to fine-tune in place of pretraining, such as `kws35`; `data` is its
    corpus, `checkpoint` its backbone (a directory, `random` or `logmel`)."""
    method: Method = "fedper"
    """Of a task. `fedavg`: everything that is trained is shared; `fedper`: heads stay on the
    devices; `fedrep`: so they do, and are trained before the shared part; `local`: nothing is
    shared."""
    share: Share = "backbone"
    """Of a task: what of the backbone is trained: `backbone`, `layers` (the last ones), `lora`
    (low-rank changes of its attention) or `none`."""
    shared_layers: int = 2
    """Of a task: how many last layers are trained with `share layers`."""
    lora_rank: int = 8
    """Of a task: rank of the changes with `share lora`."""
    head_updates: int = 0
    """Of a task with `fedrep`: updates of the head before those of the shared part; 0 takes as many
    as `local-updates`."""
    own_test: float = 0.25
    """Of a task: share of its own clips that a client keeps to evaluate on."""
    recipe: str = ""
    """Of a task: settings of its recipe, as in `head=linear-ctc head-rate=1e-3`."""
    server_optimizer: Literal["fedavg", "fedavgm", "fedadam"] = "fedavg"
    """How the mean update is applied."""
    server_rate: float = 0.0
    """The server's learning rate; 0 is the usual one: 1, or 0.001 for fedadam."""
    server_momentum: float = 0.9
    """First moment's decay of fedavgm and fedadam."""
    min_clients: int = 1
    """Clients that must be connected, and must reply in a round, for the run to go on."""
    encoding: Encoding = "fp32"
    """How weights and updates travel; what an encoding leaves out is sent with the next update.
    `fp32` is exact and keeps nothing on the devices."""
    keep_moments: bool = False
    """Whether a client goes on with the optimiser's moments of its last round that counted, which
    it keeps on its disk (two models in fp32). Else every round begins with moments of zero."""
    deadline: float = 0.0
    """Seconds a round may take; who has not answered by then is left out. 0 waits for all."""
    patience: float = 0.0
    """Once half the cohort has answered, wait for the others this many times as long as the slowest
    of them took. 0 waits for all."""
    fleet: str = ""
    """Devices that simulated clients are, as in `rpi4:60,jetson-xavier-nx:30,rtx2080ti:10`: each
    plans for its own memory; empty: all take the plan of these settings."""
    time_limit: str = ""
    """Longest time an update may take a device of the fleet, as in `60s`: slower ones train on
    shorter crops, down to 1s, of the same sequences."""
    wait: float = 600.0
    """Seconds to wait for that many clients to connect."""

    def validate(self) -> None:
        """Check values and that they fit together.

        Raises:
            UsageError: what is wrong.
        """
        for name in (
            "rounds",
            "clients",
            "clients_per_round",
            "local_updates",
            "min_clients",
            "keep",
        ):
            if getattr(self, name) < 1:
                raise UsageError(
                    f"{name.replace('_', '-')} must be at least 1, not {getattr(self, name)}"
                )
        if not 0 <= self.held_out < 1:
            raise UsageError(f"held-out is a share of speakers in [0, 1), not {self.held_out}")
        if self.deadline < 0 or self.patience < 0:
            raise UsageError("deadline and patience must not be below zero")
        if self.eval_crops < 0 or self.seed < 0:
            raise UsageError("eval-crops and seed must not be below zero")
        if self.server_rate < 0 or not 0 <= self.server_momentum < 1:
            raise UsageError("server-rate must not be below zero, server-momentum in [0, 1)")
        if not self.task:
            if self.partition == "labels":
                raise UsageError("partition labels is for the clips of a task")
            self.resolved_plan()
            return
        if not 0 < self.own_test < 1:
            raise UsageError(f"own-test is a share of clips between 0 and 1, not {self.own_test}")
        if self.head_updates < 0:
            raise UsageError("head-updates must not be below zero")
        if not self.checkpoint:
            raise UsageError("a task needs a checkpoint: a directory, or one of random, logmel")
        if self.fleet or self.time_limit:
            raise UsageError("fleet and time-limit are for pretraining")
        self.task_plan(self.task_recipe())

    def task_settings(self) -> TaskSettings:
        """What the task's own settings say."""
        return TaskSettings(
            task=self.task,
            data=self.data,
            train=self.subset or "train-clean-100",
            valid="",
            test="",
            set=self.recipe,
            epochs=self.rounds,
            batch=self.batch,
            micro_batch=self.micro_batch,
            precision=self.precision,
            device=self.device,
            threads=self.threads,
            seed=self.seed,
        )

    def task_recipe(self) -> TaskRecipe:
        """The task's recipe; a round counts as an epoch of its schedule."""
        return self.task_settings().task_recipe()

    def task_plan(self, recipe: TaskRecipe) -> Plan:
        """How this machine takes a step of the task."""
        return self.task_settings().task_plan(recipe)

    @classmethod
    def from_run_config(cls, values: Mapping[str, Any]) -> "FederationSettings":
        """Read Flower's run config.

        Raises:
            UsageError: an unknown key or a bad value.
        """
        return from_mapping(cls, values, "run config")

    @property
    def total_updates(self) -> int:
        """Global updates of the whole run."""
        return self.rounds * self.local_updates
