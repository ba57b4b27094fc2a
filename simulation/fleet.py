"""A simulated fleet: which device each client is, and the plan it has for its step."""

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
from ssl_core.training.pretraining_work import PretrainingWork
from ssl_core.training.randomness import generator


@dataclasses.dataclass(frozen=True)
class Fleet:
    """Devices by client, and what each kind of device does."""

    devices: tuple[str, ...]
    """Of each client, by number."""
    advice: Mapping[str, Advice]

    def node(self, client: int) -> dict[str, Any]:
        """What Flower's node config says of a client's device."""
        name = self.devices[client]
        option = self.advice[name].chosen
        assert option is not None
        return {"device": name, "length": option.plan.length, "plan": to_json(option.plan)}


def parse_fleet(text: str, clients: int) -> dict[str, int]:
    """Clients by device, from `rpi4:60,jetson-xavier-nx:30,rtx2080ti:10`.

    Raises:
        UsageError: not of that form, an unknown device, or not as many as there are clients.
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
    """Deal the devices out by the seed, and plan for each kind.

    Raises:
        UsageError: see `parse_fleet`; or a device that nothing fits; the message says what would.
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
    request = Request(
        work=PretrainingWork(architecture=settings.architecture, recipe=settings.recipe),
        lengths=candidate_lengths(None if limit else length, longest=length),
        batches=(settings.batch,),
        precision=asked if asked in profile.precisions else "fp32",
        optimizer_state=settings.plan.optimizer_state,
        time_limit=limit,
        seconds=update_seconds,
    )
    advice = advise(profile, request)
    if advice.chosen is None:
        raise UsageError("; ".join(explain(advice)))
    return advice


def table(
    fleet: Fleet, settings: PretrainingFederation, rows: Sequence[dict[str, Any]]
) -> list[str]:
    """Markdown: what each kind of device trained with, and how long a round would take it."""
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
        "| device | clients | crops | plan | predicted peak | of | a round there (estimate) | "
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
        f"Estimates follow from the seconds a batch that the paper measured (Table 2), training "
        f"alone. All rounds together, each as long as its slowest device: about "
        f"{format_seconds(slowest)}.",
    ]
