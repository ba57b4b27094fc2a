"""`python -m partitions`: recut a corpus, divide it among clients, or make demo speech."""

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jsonargparse.typing import PositiveInt

from common import atomic, command
from common.figures import new_figure, plots, save_figure
from common.options import Parser, settings_parser
from common.settings import parse
from common.units import Names, Seconds, format_length, format_seconds
from partitions.demo_corpus import SUBSET, VOICES, demo_corpus
from partitions.librispeech import find_utterances
from partitions.manifest_text import write_manifest
from partitions.prepared import prepare
from partitions.recut import recut
from partitions.recut_report import plot_lengths, table
from partitions.speakers import (
    HELD_OUT_FRACTION,
    How,
    held_out_speakers,
    partition,
    seconds_of,
    speakers_of,
)

PROG = "python -m partitions"
USE_REAL = "python -m ssl_core.download --subset train-clean-100 --output DIR"
"""The command that downloads a subset of the real corpus."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CorpusSettings:
    """Which corpus."""

    data: Path | None = None
    """Folder that holds LibriSpeech's subsets; without it the demo corpus is used."""
    subset: Names = Names()
    """Subsets to use; none means every train-* or else all there are."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecutSettings(CorpusSettings):
    """Settings of `recut`."""

    length: tuple[Seconds, ...] = (Seconds(1), Seconds(5), Seconds(10), Seconds(15))
    """Nominal lengths, as in 5s; by default the paper's four."""
    output: Path = Path("recut")
    """Folder for the results."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SplitSettings(CorpusSettings):
    """Settings of `split`."""

    length: Seconds = Seconds(5)
    """Nominal length, as in 5s; a plain number is in seconds."""
    clients: PositiveInt = PositiveInt(100)
    """Number of clients."""
    partition: How = "speaker"
    """Whole speakers a client, evenly shuffled, or skewed in duration."""
    held_out: float = HELD_OUT_FRACTION
    """Fraction of the speakers that is kept for evaluation, 0 to 0.33."""
    seed: int = 0
    """The same seed gives the same parts."""
    output: Path = Path("split")
    """Folder for the results."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one subcommand; returns the exit code."""
    commands = {
        "recut": ("join and cut each speaker's utterances to the given lengths", _recut),
        "split": ("divide a corpus among clients", _split),
        "demo": ("make the demo corpus and print where it is", _demo),
    }
    words = sys.argv[1:] if arguments is None else arguments
    return command.subcommand(PROG, str(__doc__), commands, words)


def corpus_root(data: Path | None, progress: bool = True) -> Path:
    """`data`, or else the demo corpus, saying so and how to use the real one.

    Raises:
        UsageError: no `data`, and espeakng-loader is not installed.
    """
    if data is not None:
        return data
    print(
        f"No --data given: using the demo corpus, {VOICES} synthetic voices made by espeak-ng.\n"
        f"For real speech, give --data DIR with LibriSpeech in it; to download a part: {USE_REAL}"
    )
    return demo_corpus(progress)


def _recut(arguments: Sequence[str] | None) -> None:
    description = "Recut a corpus to one or more lengths: a manifest for each, a figure, a table."
    parser = settings_parser(RecutSettings, prog=f"{PROG} recut", description=description)
    settings, _ = parse(RecutSettings, parser, arguments)
    root = corpus_root(settings.data)
    corpus = find_utterances(root, settings.subset, progress=True)
    print(
        f"{corpus.root}: {', '.join(corpus.subsets)}; {len(corpus.utterances)} utterances of "
        f"{len(corpus.speakers)} speakers, {format_seconds(corpus.seconds)}"
    )
    if corpus.without_transcript:
        print(f"without transcript: {corpus.without_transcript} utterances (none is needed here)")
    manifests = []
    for length in dict.fromkeys(settings.length):
        manifest = recut(corpus, length)
        manifests.append(manifest)
        write_manifest(settings.output / f"manifest-{format_length(length)}.tsv", manifest)
    text = table(manifests)
    atomic.write_text(settings.output / "lengths.md", text)
    plot_lengths(manifests, settings.output / "lengths.png")
    print(f"\n{text}")
    for manifest in manifests:
        for line in manifest.describe_skips():
            print(f"{format_length(manifest.length)}: {line}")
    print(f"results: {settings.output}")


def _split(arguments: Sequence[str] | None) -> None:
    description = "Divide a recut corpus among clients: the audio of each, and a figure."
    parser = settings_parser(SplitSettings, prog=f"{PROG} split", description=description)
    settings, _ = parse(SplitSettings, parser, arguments)
    root = corpus_root(settings.data)
    manifest = prepare(root, settings.subset, settings.length, progress=True)
    for line in manifest.describe_skips():
        print(line)
    held_out = held_out_speakers(manifest, settings.held_out, settings.seed)
    parts = partition(manifest, settings.clients, settings.partition, settings.seed, held_out)
    seconds = [seconds_of(manifest, part) for part in parts]
    speakers = [speakers_of(manifest, part) for part in parts]
    lines = ["client\tsequences\tseconds\tspeakers"]
    for client, part in enumerate(parts):
        names = ",".join(speakers[client])
        lines.append(f"{client}\t{len(part)}\t{seconds[client]:.3f}\t{names}")
    atomic.write_text(settings.output / "clients.tsv", "\n".join(lines) + "\n")
    chosen = {
        "length": settings.length,
        "clients": settings.clients,
        "partition": settings.partition,
        "seed": settings.seed,
        "held out": held_out,
    }
    heading = json.dumps(chosen).removesuffix("}")
    with atomic.replacing(settings.output / "parts.json") as path, open(path, "w") as stream:
        for number, part in enumerate(parts):
            stream.write(", " if number else f'{heading}, "parts": [')
            json.dump(part.tolist(), stream)
        stream.write("]}\n")
    write_manifest(settings.output / "manifest.tsv", manifest)
    plot_clients(seconds, settings.output / "clients.png")
    several = sum(len(names) > 1 for names in speakers)
    print(
        f"{len(manifest.sequences)} sequences of {settings.length}, "
        f"{format_seconds(manifest.seconds)}, {len(manifest.speakers)} speakers\n"
        f"held out: {len(held_out)} speakers ({', '.join(held_out) or 'none'})\n"
        f"{len(parts)} clients by {settings.partition}: shortest {format_seconds(min(seconds))}, "
        f"median {format_seconds(float(np.median(seconds)))}, "
        f"longest {format_seconds(max(seconds))}; {several} clients with several speakers\n"
        f"results: {settings.output}"
    )


@plots
def plot_clients(seconds: Sequence[float], path: Path) -> None:
    """Draw the audio of each client, from the one with most to the one with least.

    Raises:
        OSError: the disk is full or the folder cannot be written.
    """
    figure = new_figure(8, 3.5)
    axes = figure.subplots()
    axes.bar(range(len(seconds)), sorted(seconds, reverse=True), width=1.0)
    axes.set(xlabel="client, by its audio", ylabel="audio (s)", xlim=(-0.5, len(seconds) - 0.5))
    save_figure(figure, path)


def _demo(arguments: Sequence[str] | None) -> None:
    description = "Make the demo corpus where the cache has none; the last line is its folder."
    Parser(prog=f"{PROG} demo", description=description).parse_args(arguments)
    folder = demo_corpus(progress=True)
    counts = json.loads((folder / "COMPLETE").read_text(encoding="utf-8"))
    print(
        f"{counts['voices']} voices, {counts['utterances']} utterances, "
        f"{format_seconds(counts['seconds'])} in {SUBSET}\n{folder}"
    )


if __name__ == "__main__":
    command.run(main)
