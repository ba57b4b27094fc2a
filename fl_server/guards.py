"""Guards against clients that err or lie: bounds on an update's weight and norm, and its direction.

A **weight** is bounded by what the client said it has when it joined, and by what the run's plan
lets any client train on. An honest client states no more than either.

A **norm** is bounded by a multiple of the cohort's median: Adam gives the updates of a round about
the same norm, whoever trains, and the median holds while fewer than half of the cohort are bad. An
update beyond the bound is scaled down to the median, as its size says nothing.

A **direction** is judged over several rounds: a flipped sign has a plausible norm, but points
against the others' updates, and noise points nowhere. One round does not tell, as a client's batch
may do so by chance. So each client has a score, which grows while its updates do not point to the
side of the others' and falls while they do (a CUSUM chart; Page, 1954). Updates of a client with a
high score are refused, until it has fallen again.

Norms and directions are known once all replies are there, but the server cannot hold them until
then. It keeps the norm and a sketch of each update, folds most updates at once, and lets those that
may have to be bounded or refused wait on disk: those that are long for the round before, those of
clients with a score, and in the first round all. What waits depends on the update and the rounds
before, and the judgement on all the cohort's updates: neither depends on the order of the replies.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fl_client.federation_settings import RunSettings, TaskFederation
from fl_client.updates import Floats
from fl_server.fold import SKETCH, Measured
from fl_server.roster import Client
from partitions.sampling import SAMPLE_RATE

LONGEST_CLIP = 60.0
"""Seconds of a long clip of a task; a client's clips are no longer than this on average."""
SMALLEST_COHORT = 4
"""Updates without which directions are not judged: of three, one cannot outvote the other two."""
CHANCE = 0.02
"""Median cosine of an update with the sum of the others' below which a round shows nothing: five
times the error of a sketch."""
CLEAR = 0.25
"""Median cosine below which a round counts for less. In 28 rounds of ten honest clients of `tiny`
one update had a cosine of -0.13 where the median was 0.06, and none had one below -0.02 where the
median was above this."""
ASIDE = 0.2
"""Cosine of an update, as a fraction of the median, below which it speaks against its client. Over
34 rounds the means of ten honest clients of `tiny` were 0.87 to 1.15, and those of noise 0."""
SPREAD = 0.35
"""Deviation of the cosines, as a fraction of their median, above which a round counts for less."""
WATCHED = 0.5
"""An update waits if it is longer than this fraction of what was the bound in the round before."""


def largest_weight(client: Client, settings: RunSettings) -> int:
    """The most samples of audio that a client's update may count for.

    In pretraining a client counts the sequences that it has trained on in the round; in a task, all
    clips it trains on in the course of the run.
    """
    declared = math.ceil(client.seconds * SAMPLE_RATE)
    if isinstance(settings, TaskFederation):
        of_head = (settings.head_updates or settings.local_updates) * (settings.method == "fedrep")
        updates = settings.rounds * (of_head + settings.local_updates)
        items = min(client.crops, updates * settings.recipe.batch)
        return min(declared, items * round(LONGEST_CLIP * SAMPLE_RATE))
    plan = settings.step_plan()
    crops = min(client.crops, settings.local_updates * plan.batch * plan.accumulation)
    return min(declared, crops * plan.samples)


class Judgement(NamedTuple):
    """What a cohort's updates say about one another."""

    norm: float
    """Median of the norms, the lower one of two; 0 without updates."""
    agreement: float
    """Median over the updates of the cosine with the sum of the others; 0 if too few to tell."""
    against: dict[int, float]
    """How much the update of each client, by key, points against the others': `ASIDE` minus its
    cosine with their sum, as a fraction of the agreement (near -0.8 for most), and less if the
    cohort agrees little. Empty if the round shows nothing."""


def judge(measured: Mapping[int, Measured]) -> Judgement:
    """Compare the updates of a round, by the clients' keys. Each counts the same, however long."""
    keys = sorted(measured)
    norms = sorted(measured[key].norm for key in keys)
    norm = norms[(len(norms) - 1) // 2] if norms else 0.0
    if len(keys) < SMALLEST_COHORT:
        return Judgement(norm, 0.0, {})
    cosines = _cosines_with_others([measured[key].sketch for key in keys])
    agreement = float(np.median(cosines))
    if agreement < CHANCE:
        return Judgement(norm, agreement, {})
    relative = cosines / agreement
    spread = 1.4826 * float(np.median(np.abs(relative - 1)))  # a deviation, if they are normal
    certainty = min(1.0, agreement / CLEAR, (SPREAD / spread) ** 2 if spread else 1.0)
    against = np.round((ASIDE - relative) * certainty, 6)
    return Judgement(norm, agreement, dict(zip(keys, map(float, against), strict=True)))


def _cosines_with_others(sketches: Sequence[Floats]) -> npt.NDArray[np.float64]:
    """The cosine `[client]` of each sketch `[SKETCH]` with the sum of the others, of unit length.

    A zero vector has the cosine 0. Values are added in the order of the clients' keys, and the
    result is rounded, so that it has the same bits on any number of threads.
    """
    total = np.zeros(SKETCH)
    units = []
    for sketch in sketches:
        length = _length(sketch)
        units.append(1 / length if length else 0.0)
        total += sketch * units[-1]
    found = []
    for sketch, factor in zip(sketches, units, strict=True):
        own = sketch.astype(np.float64) * factor
        rest = total - own
        length = _length(rest)
        found.append(float((own * rest).sum()) / length if length else 0.0)
    return np.round(found, 6)


def _length(vector: npt.NDArray[Any]) -> float:
    return math.sqrt(float(np.square(vector, dtype=np.float64).sum()))


class Guards:
    """What earlier rounds say about the updates of the next one; part of a checkpoint."""

    def __init__(self, settings: RunSettings) -> None:
        """Start without an earlier round."""
        self.norm_bound, self.against_bound = settings.norm_bound, settings.against_bound
        self.norm = 0.0
        """Median norm of the last round; 0 before the first."""
        self.scores: dict[int, float] = {}
        """How long and how much each client's updates have pointed against the others', by key; 0
        is left out."""

    def trusts(self, key: int, update: Measured) -> bool:
        """Whether the update of client `key` may be folded before the cohort is known."""
        if self.against_bound and (not self.norm or key in self.scores):
            return False
        return not self.norm_bound or update.norm <= WATCHED * self.norm_bound * self.norm

    def scale(self, update: Measured, cohort: Judgement) -> float:
        """What an update is multiplied by; 1 unless it is too long."""
        too_long = 0 < self.norm_bound * cohort.norm < update.norm
        return cohort.norm / update.norm if too_long else 1.0

    def learn(self, cohort: Judgement) -> None:
        """Take a round's judgement into account, before `refuses` is asked about the round."""
        self.norm = cohort.norm or self.norm
        if not self.against_bound:
            return
        scores = dict(self.scores)
        for key, against in cohort.against.items():
            # The limit lets a client that was repaired back in after a few rounds.
            scores[key] = min(max(0.0, scores.get(key, 0.0) + against), 2 * self.against_bound)
        self.scores = {key: score for key, score in sorted(scores.items()) if score}

    def refuses(self, key: int) -> bool:
        """Whether the updates of client `key` have pointed against the others' too much."""
        return bool(self.against_bound and self.scores.get(key, 0.0) > self.against_bound)

    def state(self) -> dict[str, Any]:
        """Values for a checkpoint."""
        return {"guards": {"norm": self.norm, "scores": self.scores}}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint's state; one of 0.1 has none of it."""
        values = state.get("guards", {})
        self.norm = float(values.get("norm", 0.0))
        self.scores = {int(key): float(score) for key, score in values.get("scores", {}).items()}
