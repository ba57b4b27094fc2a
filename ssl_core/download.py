"""Download and verify a LibriSpeech subset: `python -m ssl_core.download --output DIR`.

torchaudio's `LIBRISPEECH` downloads, checks and unpacks the archive.
"""

import dataclasses
import urllib.error
from collections.abc import Sequence
from pathlib import Path

from common import command
from common.errors import ShortwaveError, UsageError
from common.options import settings_parser
from common.settings import parse

SUBSETS = {
    "dev-clean": 0.34,
    "dev-other": 0.31,
    "test-clean": 0.35,
    "test-other": 0.33,
    "train-clean-100": 6.4,
    "train-clean-360": 23.0,
    "train-other-500": 30.0,
}
"""Sizes of the archives in GB (openslr.org/12)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DownloadSettings:
    """What to download, and where to unpack it."""

    subset: str = "train-clean-100"
    """One of dev-clean, dev-other, test-clean, test-other, train-clean-100, train-clean-360 and
    train-other-500."""
    output: Path | None = None
    """Folder to unpack into (required)."""

    def validate(self) -> None:
        """Check values; raises `UsageError`."""
        if self.output is None:
            raise UsageError("--output: give the folder to unpack into")
        if self.subset not in SUBSETS:
            raise UsageError(
                f"no subset '{self.subset}': choose from {', '.join(SUBSETS)}"
                f"{command.nearest(self.subset, list(SUBSETS))}"
            )


def main(arguments: Sequence[str] | None = None) -> int:
    """Download; returns the exit code."""
    parser = settings_parser(
        DownloadSettings, prog="python -m ssl_core.download", description=__doc__
    )
    settings, _ = parse(DownloadSettings, parser, arguments)
    subset, output = settings.subset, settings.output
    assert output is not None
    from torchaudio.datasets import LIBRISPEECH

    output.mkdir(parents=True, exist_ok=True)
    print(f"downloading {subset}, {SUBSETS[subset]} GB, into {output}", flush=True)
    try:
        corpus = LIBRISPEECH(str(output), url=subset, download=True)
    except (urllib.error.URLError, RuntimeError, OSError) as error:
        raise ShortwaveError(
            f"cannot download {subset}: {error}. Without a network, unpack the archive "
            f"from openslr.org/12 into {output} by hand"
        ) from None
    print(f"{len(corpus)} utterances, checksum verified")
    print(output / "LibriSpeech")
    return 0


if __name__ == "__main__":
    command.run(main)
