"""Small corpora in LibriSpeech's layout, made by the tests themselves, and a cache of their own."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile

# Triton decides at its import, by whichever test imports it first, whether kernels run on a CPU.
os.environ["TRITON_INTERPRET"] = "1"
# Each test has a cache of its own, in which no choice between libraries is remembered.
os.environ["SHORTWAVE_PRODUCTS"] = "blas"

Writer = Callable[..., Path]


def pytest_configure() -> None:
    """Take Ctrl-C, and so do commands that tests start, when a shell started pytest with `&`."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of the test's own, and one for a device's state."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return folder


@pytest.fixture
def shared_estimates(cache: Path, pytestconfig: pytest.Config) -> None:
    """Keep estimates of memory, which follow from the code alone, for all tests and later runs."""
    (cache / "shortwave").mkdir(parents=True, exist_ok=True)
    kept = pytestconfig.cache.mkdir("estimates") if pytestconfig.cache else cache / "kept"
    (cache / "shortwave" / "estimates").symlink_to(kept)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """An empty folder for a corpus."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    return folder


@pytest.fixture
def write(root: Path) -> Writer:
    """Write one utterance of noise: `write("train-a", 7, 1, 0, samples=16000)`."""

    def writer(
        subset: str,
        speaker: object,
        chapter: object,
        number: int,
        *,
        samples: int = 16000,
        rate: int = 16000,
        channels: int = 1,
        suffix: str = "flac",
        words: str | None = None,
    ) -> Path:
        folder = root / subset / str(speaker) / str(chapter)
        folder.mkdir(parents=True, exist_ok=True)
        name = f"{speaker}-{chapter}-{number:04d}"
        noise = np.random.default_rng(number).uniform(-0.5, 0.5, (samples, channels))
        soundfile.write(folder / f"{name}.{suffix}", noise, rate, subtype="PCM_16")
        if words is not None:
            with open(folder / f"{speaker}-{chapter}.trans.txt", "a", encoding="utf-8") as stream:
                stream.write(f"{name} {words}\n")
        return folder / f"{name}.{suffix}"

    return writer


@pytest.fixture(scope="session")
def librispeech() -> Path:
    """Recordings of the real LibriSpeech that lie beside the checkout."""
    folder = Path(__file__).parents[1].parent / "shared" / "data" / "LibriSpeech"
    if not folder.is_dir():
        pytest.skip("no real LibriSpeech in ../shared/data")
    return folder


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight speakers with two utterances of 4 s of noise each; to be read only."""
    root = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    for speaker in range(1, 9):
        folder = root / "train-small" / str(speaker) / "1"
        folder.mkdir(parents=True)
        for number in range(2):
            sound = 0.1 * rng.standard_normal(4 * 16_000)
            soundfile.write(folder / f"{speaker}-1-{number:04d}.flac", sound, 16_000)
    return root
