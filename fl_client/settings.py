"""Settings of a federation: the same on the command line, in YAML and in Flower's run config."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from fl_client.encoding import Encoding
from partitions.errors import UsageError
from partitions.settings import from_mapping
from ssl_core.step_settings import StepSettings


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
    partition: Literal["speaker", "iid", "skewed"] = "speaker"
    """How speech is divided: whole speakers, evenly at random, or with skewed durations."""
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
        self.resolved_plan()

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
