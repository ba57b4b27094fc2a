"""Download and verify a LibriSpeech subset: `python -m ssl_core.download --output DIR`.

The download, its checksum and the unpacking are torchaudio's `LIBRISPEECH`.
"""

import urllib.error
from collections.abc import Sequence
from pathlib import Path

from common import command
from common.errors import ShortwaveError, UsageError

SUBSETS = {
    "dev-clean": 0.34,
    "dev-other": 0.31,
    "test-clean": 0.35,
    "test-other": 0.33,
    "train-clean-100": 6.4,
    "train-clean-360": 23.0,
    "train-other-500": 30.0,
}
"""Sizes in GB of the archives (openslr.org/12)."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Download; returns the exit code."""
    parser = command.Parser(prog="python -m ssl_core.download", description=__doc__)
    parser.add_argument("--subset", default="train-clean-100", help=f"one of {', '.join(SUBSETS)}")
    parser.add_argument("--output", type=Path, required=True, help="folder to unpack into")
    options = parser.parse_args(arguments)
    if options.subset not in SUBSETS:
        raise UsageError(
            f"no subset '{options.subset}'{command.nearest(options.subset, list(SUBSETS))} "
            f"Choose from {', '.join(SUBSETS)}"
        )
    from torchaudio.datasets import LIBRISPEECH

    options.output.mkdir(parents=True, exist_ok=True)
    print(
        f"downloading {options.subset}, {SUBSETS[options.subset]} GB, into {options.output}",
        flush=True,
    )
    try:
        corpus = LIBRISPEECH(str(options.output), url=options.subset, download=True)
    except (urllib.error.URLError, RuntimeError, OSError) as error:
        raise ShortwaveError(
            f"cannot download {options.subset}: {error}. Without a network, unpack the archive "
            f"from openslr.org/12 into {options.output} by hand"
        ) from None
    print(f"{len(corpus)} utterances, checksum verified")
    print(options.output / "LibriSpeech")
    return 0


if __name__ == "__main__":
    command.run(main)
