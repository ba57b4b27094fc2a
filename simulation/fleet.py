"""A simulated fleet: the device of each client, and the plan of its training step."""

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from common.errors import UsageError
from common.progress import track
from common.units import format_bytes, format_length, format_seconds
from fl_client.federation_settings import PretrainingFederation
from fl_client.round_plan import to_json
from ssl_core.paper.device_seconds import update_seconds
from ssl_core.planning.advice import Advice, Request, advise, candidate_lengths
from ssl_core.planning.advice_report import explain
from ssl_core.planning.device import DeviceProfile
from ssl_core.planning.device_profiles import find_profile
from ssl_core.planning.ladder import describe
from ssl_core.training.pretraining_recipe import RECIPES
from ssl_core.training.pretraining_work import PretrainingWork
from ssl_core.training.randomness import generator
from ssl_core.wav2vec2.config import preset


@dataclasses.dataclass(frozen=True)
class Fleet:
    """The device of each client, and the plan of each kind of device."""

    devices: tuple[str, ...]
    """Name of the device of each client, by client number."""
    advice: Mapping[str, Advice]
    """By device name; each has a plan that fits."""

    def node(self, client: int) -> dict[str, Any]:
        """The part of a client's node config that describes its device."""
        name = self.devices[client]
        option = self.advice[name].chosen
        assert option is not None
        return {"device": name, "length": option.plan.length, "plan": to_json(option.plan)}


def parse_fleet(text: str, clients: int) -> dict[str, int]:
    """Number of clients by device, from `rpi4:60,jetson-xavier-nx:30,rtx2080ti:10`.

    Raises:
        UsageError: not of that form, an unknown device, or a total other than `clients`.
    """
    counts: Counter[str] = Counter()
    for part in text.split(","):
        name, colon, count = part.strip().partition(":")
        if not colon or not count.strip().isdigit() or not int(count):
            raise UsageError(f"--fleet '{part}' is not DEVICE:CLIENTS, as in rpi4:60")
        find_profile(name.strip())
        counts[name.strip()] += int(count)
    if counts.total() != clients:
        raise UsageError(f"--fleet has {counts.total()} devices, --clients is {clients}")
    return dict(counts)


def make_fleet(settings: PretrainingFederation) -> Fleet:
    """Assign devices to clients at random by the seed, and plan for each kind of device.

    Raises:
        UsageError: as `parse_fleet`; or nothing fits a device (the message says what would).
    """
    counts = parse_fleet(settings.fleet, settings.clients)
    dealt = [name for name, count in counts.items() for _ in range(count)]
    order = generator(settings.seed, "fleet").permutation(len(dealt))
    advice = {
        name: _advise(find_profile(name), settings)
        for name in track(counts, len(counts), "plan for each device", True)
    }
    return Fleet(tuple(dealt[int(place)] for place in order), advice)


def _advise(profile: DeviceProfile, settings: PretrainingFederation) -> Advice:
    limit, length = settings.time_limit, settings.length
    asked = settings.step_plan().precision
    tiny = PretrainingWork(architecture=preset("tiny"), recipe=RECIPES["tiny"])
    request = Request(
        work=PretrainingWork(architecture=settings.architecture, recipe=settings.recipe),
        lengths=candidate_lengths(None if limit else length, longest=length),
        batches=(settings.batch,),
        precision=asked if asked in profile.precisions else "fp32",
        optimizer_state=settings.plan.optimizer_state,
        time_limit=limit,
        seconds=update_seconds,
        smaller=None if settings.model == "tiny" else tiny,
    )
    advice = advise(profile, request)
    if advice.chosen is None:
        raise UsageError("; ".join(explain(advice)))
    return advice


def table(
    fleet: Fleet, settings: PretrainingFederation, rows: Sequence[dict[str, Any]]
) -> list[str]:
    """Markdown table of the devices: plan, peak memory and estimated time of a round.

    Args:
        fleet: devices of the clients.
        settings: of the run.
        rows: metrics of each round.
    """
    heard: Counter[str] = Counter()
    took_part: Counter[str] = Counter()
    slowest = 0.0
    for row in rows:
        times = []
        for client in row["clients"]:
            name = fleet.devices[client["key"]]
            heard[name] += client["seconds"]
            took_part[name] += 1
            times.append(fleet.advice[name].seconds)
        known = [seconds for seconds in times if seconds is not None]
        slowest += settings.local_updates * max(known, default=0.0)
    lines = [
        "| device | clients | crops | plan | predicted peak | of | time of a round (estimate) | "
        "updates sent | audio trained on |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, advice in fleet.advice.items():
        option = advice.chosen
        assert option is not None
        seconds = advice.seconds
        lines.append(
            f"| {name} | {fleet.devices.count(name)} | {option.plan.batch} x "
            f"{format_length(option.plan.length)}, {option.plan.precision} | "
            f"{describe(option.plan)} | {format_bytes(option.estimate.total)} | "
            f"{format_bytes(advice.decision.available)} | "
            + ("not known" if seconds is None else format_seconds(settings.local_updates * seconds))
            + f" | {took_part[name]} | {format_seconds(heard[name])} |"
        )
    return [
        *lines,
        "",
        "Times are estimated from the paper's seconds per batch (Table 2) and count training only. "
        f"All rounds, each as long as its slowest device: about {format_seconds(slowest)}.",
    ]
