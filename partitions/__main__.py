"""`python -m partitions`: recut a corpus to lengths, share it out, or make demo speech."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import numpy as np
from matplotlib.figure import Figure

from common import atomic, command
from common.figures import save_figure
from common.units import format_length, format_seconds, parse_length
from partitions.demo_corpus import SUBSET, VOICES, demo_corpus
from partitions.librispeech import find_utterances
from partitions.manifest import write_manifest
from partitions.prepared import prepare
from partitions.recut import recut
from partitions.recut_report import plot_lengths, table
from partitions.speakers import HELD_OUT_FRACTION, How, held_out_speakers, partition, seconds_of

USE_REAL = "python -m ssl_core.download --subset train-clean-100 --output DIR"
"""The command that downloads a subset of the real corpus."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one subcommand; returns the exit code."""
    parser = command.Parser(prog="python -m partitions", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_recut(commands)
    _add_split(commands)
    _add_demo(commands)
    options, unknown = parser.parse_known_args(arguments)
    if unknown:
        options.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    options.run(options)
    return 0


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


def _add_recut(commands: "argparse._SubParsersAction[command.Parser]") -> None:
    parser = commands.add_parser(
        "recut",
        help="join and cut each speaker's utterances to the given lengths",
        description="Recut a corpus to one or more lengths: writes a manifest for each, a figure "
        "and a table.",
    )
    parser.add_argument(
        "--length",
        type=command.argument(parse_length),
        nargs="+",
        default=[1.0, 5.0, 10.0, 15.0],
        metavar="LENGTH",
        help="nominal lengths, as in 5s; by default the paper's four, in seconds",
    )
    _add_corpus(parser)
    parser.add_argument("--output", type=Path, default=Path("recut"), help="folder for the results")
    parser.set_defaults(run=_recut, parser=parser)


def _add_split(commands: "argparse._SubParsersAction[command.Parser]") -> None:
    parser = commands.add_parser(
        "split",
        help="share a corpus out to clients",
        description="Share a recut corpus out to clients: writes the audio of each and a figure.",
    )
    parser.add_argument(
        "--length",
        type=command.argument(parse_length),
        default=5.0,
        help="nominal length, as in 5s; a plain number is in seconds",
    )
    parser.add_argument(
        "--clients", type=command.argument(command.positive), default=100, help="number of clients"
    )
    parser.add_argument(
        "--partition",
        choices=get_args(How),
        default="speaker",
        help="whole speakers a client, evenly shuffled, or skewed in duration",
    )
    parser.add_argument(
        "--held-out",
        type=float,
        default=HELD_OUT_FRACTION,
        help="fraction of the speakers that is kept for evaluation, 0 to 0.33",
    )
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same parts")
    _add_corpus(parser)
    parser.add_argument("--output", type=Path, default=Path("split"), help="folder for the results")
    parser.set_defaults(run=_split, parser=parser)


def _add_demo(commands: "argparse._SubParsersAction[command.Parser]") -> None:
    parser = commands.add_parser(
        "demo",
        help="make the demo corpus and print where it is",
        description="Make the demo corpus with espeak-ng where the cache has none; the last line "
        "is its folder.",
    )
    parser.set_defaults(run=_demo, parser=parser)


def _add_corpus(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data",
        type=Path,
        help="folder that holds LibriSpeech's subsets; without it the demo corpus is used",
    )
    parser.add_argument(
        "--subset",
        nargs="+",
        default=[],
        help="subsets to use; none means every train-* or else all there are",
    )


def _recut(options: argparse.Namespace) -> None:
    root = corpus_root(options.data)
    corpus = find_utterances(root, tuple(options.subset), progress=True)
    print(
        f"{corpus.root}: {', '.join(corpus.subsets)}; {len(corpus.utterances)} utterances of "
        f"{len(corpus.speakers)} speakers, {format_seconds(corpus.seconds)}"
    )
    if corpus.without_transcript:
        print(f"without transcript: {corpus.without_transcript} utterances (none is needed here)")
    manifests = []
    for length in dict.fromkeys(options.length):
        manifest = recut(corpus, length)
        manifests.append(manifest)
        write_manifest(options.output / f"manifest-{format_length(length)}.tsv", manifest)
    text = table(manifests)
    atomic.write_text(options.output / "lengths.md", text)
    plot_lengths(manifests, options.output / "lengths.png")
    print(f"\n{text}")
    for manifest in manifests:
        for line in manifest.describe_skips():
            print(f"{format_length(manifest.length)}: {line}")
    print(f"results: {options.output}")


def _split(options: argparse.Namespace) -> None:
    root = corpus_root(options.data)
    manifest = prepare(root, tuple(options.subset), options.length, progress=True)
    for line in manifest.describe_skips():
        print(line)
    held_out = held_out_speakers(manifest, options.held_out, options.seed)
    parts = partition(manifest, options.clients, options.partition, options.seed, held_out)
    seconds = [seconds_of(manifest, part) for part in parts]
    speakers = [sorted({manifest.sequences[i].speaker for i in part}) for part in parts]
    lines = ["client\tsequences\tseconds\tspeakers"]
    for client, part in enumerate(parts):
        names = ",".join(speakers[client])
        lines.append(f"{client}\t{len(part)}\t{seconds[client]:.3f}\t{names}")
    atomic.write_text(options.output / "clients.tsv", "\n".join(lines) + "\n")
    chosen = {
        "length": options.length,
        "clients": options.clients,
        "partition": options.partition,
        "seed": options.seed,
        "held out": held_out,
        "parts": parts,
    }
    atomic.write_text(options.output / "parts.json", json.dumps(chosen) + "\n")
    write_manifest(options.output / "manifest.tsv", manifest)
    plot_clients(seconds, options.output / "clients.png")
    several = sum(len(names) > 1 for names in speakers)
    print(
        f"{len(manifest.sequences)} sequences of {format_length(options.length)}, "
        f"{format_seconds(manifest.seconds)}, {len(manifest.speakers)} speakers\n"
        f"held out: {len(held_out)} speakers ({', '.join(held_out) or 'none'})\n"
        f"{len(parts)} clients by {options.partition}: shortest {format_seconds(min(seconds))}, "
        f"median {format_seconds(float(np.median(seconds)))}, "
        f"longest {format_seconds(max(seconds))}; {several} clients with several speakers\n"
        f"results: {options.output}"
    )


def plot_clients(seconds: Sequence[float], path: Path) -> None:
    """Draw the audio of each client, from the one with most to the one with least.

    Raises:
        OSError: the disk is full or the folder cannot be written.
    """
    figure = Figure(figsize=(8, 3.5), layout="constrained")
    axes = figure.subplots()
    axes.bar(range(len(seconds)), sorted(seconds, reverse=True), width=1.0)
    axes.set(xlabel="client, by its audio", ylabel="audio (s)", xlim=(-0.5, len(seconds) - 0.5))
    save_figure(figure, path)


def _demo(options: argparse.Namespace) -> None:
    folder = demo_corpus(progress=True)
    counts = json.loads((folder / "COMPLETE").read_text(encoding="utf-8"))
    print(
        f"{counts['voices']} voices, {counts['utterances']} utterances, "
        f"{format_seconds(counts['seconds'])} in {SUBSET}\n{folder}"
    )


if __name__ == "__main__":
    command.run(main)
