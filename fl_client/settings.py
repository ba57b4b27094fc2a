"""Settings of a federation: the same on the command line, in YAML and in Flower's run config."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from partitions.errors import UsageError
from partitions.settings import from_mapping
from partitions.units import parse_length
from ssl_core.devices import choose_device, choose_precision
from ssl_core.memory.plan import Plan
from ssl_core.overrides import resolve
from ssl_core.wav2vec2.config import ModelConfig, Recipe


@dataclasses.dataclass(frozen=True, kw_only=True)
class FederationSettings:
    """What server and clients agree on. Scalars only, as Flower's run config needs."""

    data: str = ""
    """Corpus in LibriSpeech's layout; empty is the demo corpus. A device may have its own."""
    subset: str = ""
    """Subsets of the corpus, separated by commas; empty is all `train-*`."""
    length: str = "5s"
    """Length of every crop."""
    model: str = "base"
    """Preset: `base` or `tiny`."""
    checkpoint: str = ""
    """Directory of weights to start from, this project's or transformers'; empty starts fresh."""
    rounds: int = 10
    """Rounds of the whole run; the learning-rate schedule spans them."""
    clients: int = 100
    """Clients the corpus is divided among in a simulation."""
    clients_per_round: int = 4
    """Size of the cohort of a round."""
    local_updates: int = 2
    """Optimiser updates a client takes in a round."""
    batch: int = 4
    """Crops in a batch, over which one loss is taken."""
    micro_batch: int = 0
    """Crops in memory at a time; 0 is the whole batch. Does not change the result."""
    accumulation: int = 1
    """Batches in an update."""
    precision: Literal["auto", "fp32", "bf16"] = "fp32"
    """`bf16`: matrix products in bfloat16 (not exact); `auto`: where the device is made for it."""
    device: str = "auto"
    """Torch device that clients train on and the server evaluates on."""
    threads: int = 1
    """CPU threads of a client's step. Part of the result's last bits, so not tied to --workers."""
    partition: Literal["speaker", "iid", "skewed"] = "speaker"
    """How speech is divided: whole speakers, evenly at random, or with skewed durations."""
    held_out: float = 0.05
    """Share of speakers kept from every client for evaluation."""
    eval_crops: int = 32
    """Held-out crops to evaluate on after each round; 0 does not evaluate."""
    server_optimizer: Literal["fedavg", "fedavgm", "fedadam"] = "fedavg"
    """How the mean update is applied."""
    server_rate: float = 0.0
    """The server's learning rate; 0 is the usual one: 1, or 0.001 for fedadam."""
    server_momentum: float = 0.9
    """First moment's decay of fedavgm and fedadam."""
    min_clients: int = 1
    """Clients that must be connected, and must reply in a round, for the run to go on."""
    wait: float = 600.0
    """Seconds to wait for that many clients to connect."""
    seed: int = 0
    """Seeds everything: weights, cohorts, crops, masks, dropout."""
    keep: int = 2
    """Checkpoints to keep."""
    output: str = ""
    """Run directory; empty makes one under `runs/`."""
    resume: str = ""
    """Run directory to go on with (its own settings are used)."""
    set: str = ""
    """Single settings of recipe and model: `recipe.learning-rate=1e-3 model.layerdrop=0`."""

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
    def seconds(self) -> float:
        """The crop length in seconds."""
        return parse_length(self.length)

    @property
    def subsets(self) -> tuple[str, ...]:
        """The chosen subsets."""
        return tuple(name.strip() for name in self.subset.split(",") if name.strip())

    @property
    def total_updates(self) -> int:
        """Global updates of the whole run."""
        return self.rounds * self.local_updates

    def model_and_recipe(self) -> tuple[ModelConfig, Recipe]:
        """The architecture and recipe."""
        return resolve(self.model, self.set)

    def resolved_plan(self) -> Plan:
        """How this machine takes a step."""
        device = choose_device(self.device)
        plan = Plan(
            length=self.seconds,
            batch=self.batch,
            micro_batch=self.micro_batch,
            accumulation=self.accumulation,
            precision=choose_precision(self.precision, device),
            device=device,
            threads=self.threads,
        )
        config, recipe = self.model_and_recipe()
        plan.validate(config, recipe)
        return plan
