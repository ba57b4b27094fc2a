"""Writes the report of a simulated pretraining run: Markdown and figures."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from common import atomic
from common.figures import new_figure, plots, save_figure
from common.units import format_bytes, format_number, format_seconds
from fl_client.federation_settings import PretrainingFederation
from partitions.manifest import Manifest
from partitions.sampling import SAMPLE_RATE
from partitions.sequences import Indices
from partitions.speakers import seconds_of, speakers_of
from simulation.fleet import Fleet
from simulation.fleet import table as fleet_table
from ssl_core.training.checkpoint import latest
from ssl_core.training.run_directory import METRICS, RunDirectory
from ssl_core.training.stored_settings import CONFIG


def write_report(
    run: RunDirectory,
    settings: PretrainingFederation,
    manifest: Manifest,
    parts: tuple[Indices, ...],
    held_out: tuple[str, ...],
    fleet: Fleet | None = None,
) -> Path:
    """Write `report.md`, `clients.png` and `data.png` into the run directory.

    Args:
        run: a run with at least one round.
        settings: of the run.
        manifest: the recut corpus.
        parts: indices of each client's sequences.
        held_out: speakers kept for evaluation.
        fleet: devices of the clients; None without a fleet.

    Returns:
        Path of the report.
    """
    rows = run.metrics()
    owned = [seconds_of(manifest, part) for part in parts]
    trained: Counter[int] = Counter()
    for row in rows:
        for client in row["clients"]:
            trained[client["key"]] += client["seconds"]
    _plot_clients(owned, [trained[key] for key in range(len(parts))], run.path / "clients.png")
    _plot_data(manifest, parts, run.path / "data.png")
    last = rows[-1]
    saved = latest(run.checkpoints)
    skipped = {
        name.removeprefix("skipped_").replace("_", " "): int(sum(row[name] for row in rows))
        for name in last
        if name.startswith("skipped_")
    }
    lines = [
        f"# {settings.model}, {settings.length} crops, {settings.clients} clients",
        "",
        "![Training and held-out curves](curves.png)",
        "",
        "| | |",
        "|---|---|",
        f"| rounds | {len(rows)} of {settings.rounds} |",
        f"| clients a round | {int(last['cohort'])} of {settings.clients}, "
        f"{settings.local_updates} updates of "
        f"{settings.batch * settings.accumulation} crops each |",
        f"| contrastive loss, training | {format_number(last['contrastive'], 4)} |",
        f"| contrastive accuracy, training | {format_number(last['accuracy'], 4)} |",
        f"| code perplexity, training | {format_number(last['perplexity'], 1)} |",
    ]
    if "held_out_loss" in last:
        lines += [
            f"| held-out speakers | {len(held_out)} |",
            f"| contrastive loss, held out | {format_number(last['held_out_loss'], 4)} |",
            f"| contrastive accuracy, held out | {format_number(last['held_out_accuracy'], 4)} |",
            f"| code perplexity, held out | {format_number(last['held_out_perplexity'], 1)} |",
        ]
    lines += [
        f"| masked fraction of frames | {format_number(last['masked_fraction'], 3)} |",
        f"| distinct negatives of a frame | {format_number(last['distinct_negatives'], 1)} |",
        f"| audio of all clients | {format_seconds(sum(owned))} |",
        f"| audio trained on, repeats included | {format_seconds(sum(trained.values()))} |",
        f"| sent to clients | {format_bytes(sum(row['bytes_sent'] for row in rows))} |",
        f"| received from clients | {format_bytes(sum(row['bytes_received'] for row in rows))} |",
        f"| time in rounds | {format_seconds(sum(row['round_seconds'] for row in rows))} |",
        f"| largest client process | {format_bytes(max(row['peak_bytes'] for row in rows))} |",
        f"| updates that failed | {int(sum(row['failures'] for row in rows))} |",
        *_guards(rows),
        f"| crops skipped | {_skips(skipped)} |",
        f"| recutting | {', '.join(manifest.describe_skips()) or 'nothing skipped'}; remainder "
        f"{format_seconds(manifest.remainder_seconds)} |",
        "",
        *(["## Devices", "", *fleet_table(fleet, settings, rows), ""] if fleet else []),
        "## Audio of each client",
        "",
        "![Audio of each client, and how much of it was trained on](clients.png)",
        "",
        "## Speakers and lengths",
        "",
        "![Speakers of each client and lengths of sequences](data.png)",
        "",
        "## Files",
        "",
        f"- `{CONFIG}`: all settings as run",
        f"- `{METRICS}`: one line a round; `tensorboard/`: the same for TensorBoard",
    ]
    if saved is not None:
        relative = saved.relative_to(run.path)
        lines.append(
            f"- `{relative}`: open it with `Wav2Vec2ForPreTraining.from_pretrained` of transformers"
        )
    path = run.path / "report.md"
    atomic.write_text(path, "\n".join(lines) + "\n")
    return path


def _guards(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the guards did; rounds of 0.1 have none."""
    sums = {
        name: sum(int(row.get(name, 0)) for row in rows)
        for name in ("weights_bounded", "norms_bounded", "refused", "undone")
    }
    return [
        f"| updates whose weight, or norm, was bounded | {sums['weights_bounded']}, "
        f"{sums['norms_bounded']} |",
        f"| updates refused, of clients that pushed against the others | {sums['refused']} |",
        f"| rounds undone as they harmed the model | {sums['undone']} |",
    ]


def _skips(skipped: dict[str, int]) -> str:
    found = [f"{count} {reason}" for reason, count in skipped.items() if count]
    return ", ".join(found) or "none"


@plots
def _plot_clients(owned: list[float], trained: list[float], path: Path) -> None:
    figure = new_figure(11, 3.5)
    axes = figure.subplots()
    order = sorted(range(len(owned)), key=owned.__getitem__, reverse=True)
    axes.bar(range(len(order)), [owned[i] for i in order], color="0.8", label="audio")
    axes.bar(
        range(len(order)), [trained[i] for i in order], width=0.45, label="trained on (all rounds)"
    )
    axes.set_xlabel("client, by audio")
    axes.set_ylabel("seconds of audio")
    axes.legend()
    save_figure(figure, path)


@plots
def _plot_data(manifest: Manifest, parts: tuple[Indices, ...], path: Path) -> None:
    figure = new_figure(11, 3.2)
    left, right = figure.subplots(1, 2)
    speakers = [len(speakers_of(manifest, part)) for part in parts]
    left.hist(speakers, bins=[n + 0.5 for n in range(max(speakers) + 1)], rwidth=0.9)
    left.set_xlabel("speakers of a client")
    left.set_ylabel("clients")
    lengths = manifest.sequences.samples[np.concatenate(parts)]
    right.hist(lengths.astype(np.float64) / SAMPLE_RATE, bins=40)
    right.set_xlabel("seconds in a sequence")
    right.set_ylabel("sequences")
    save_figure(figure, path)
