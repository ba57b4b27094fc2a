"""`python -m partitions`: results, exit codes, and errors in one line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import Writer

from partitions.__main__ import main
from partitions.manifest_text import read_manifest


def run(*arguments: object) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "partitions", *map(str, arguments)],
        cwd=Path(__file__).parents[2],
        env=dict(os.environ),
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def corpus(root: Path, write: Writer) -> Path:
    for speaker in range(6):
        write("train-a", speaker, 1, 0, samples=48_000, words="HELLO")
    write("train-a", 6, 1, 0, samples=100)
    return root


def test_recut(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out"
    given = ["--data", str(corpus), "--output", str(output)]
    assert main(["recut", "--length", "1s", "1500ms", *given]) == 0
    assert sorted(path.name for path in output.iterdir()) == [
        "lengths.md",
        "lengths.png",
        "manifest-1.5s.tsv",
        "manifest-1s.tsv",
    ]
    shown = capsys.readouterr().out.splitlines()
    assert shown[-1] == f"results: {output}"
    assert "1s: skipped, speaker shorter than the length: 1 (6)" in shown
    assert "without transcript: 1 utterances (none is needed here)" in shown
    assert (output / "lengths.md").read_text().splitlines()[3] in shown
    manifest = read_manifest(output / "manifest-1s.tsv")
    assert len(manifest.sequences) == 18
    assert manifest.root == corpus


@pytest.mark.parametrize("how", ["speaker", "iid", "skewed"])
def test_split(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], how: str) -> None:
    output = tmp_path / "out"
    given = ["--data", str(corpus), "--output", str(output), "--partition", how]
    assert main(["split", "--length", "1s", "--clients", "8", "--seed", "3", *given]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[-1] == f"results: {output}"
    chosen = json.loads((output / "parts.json").read_text())
    assert len(chosen["held out"]) == 2
    assert sorted(i for part in chosen["parts"] for i in part).__len__() == 12
    rows = (output / "clients.tsv").read_text().splitlines()
    assert rows[0] == "client\tsequences\tseconds\tspeakers"
    assert len(rows) == 9
    assert (output / "clients.png").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["recut", "--data", "nowhere"], 1, "error: no such folder: nowhere"),
        (["recut", "--length", "0s"], 2, "a length of '0s' holds no audio"),
        (["recut", "--length", "long"], 2, "'long' is not a length"),
        (["recut", "--lenght", "5s"], 2, "unknown setting 'lenght'; did you mean 'length'?"),
        (["split", "--clients", "0"], 2, "0 is not above zero"),
        (
            ["split", "--partition", "speakers"],
            2,
            "--partition: 'speakers' is not one of speaker, iid, skewed; did you mean 'speaker'?",
        ),
        (["nothing"], 2, "no command 'nothing'"),
        (["spilt"], 2, "no command 'spilt'; did you mean 'split'?"),
        ([], 2, "no command given"),
    ],
)
def test_bad_arguments(arguments: list[str], code: int, message: str) -> None:
    done = run(*arguments)
    assert done.returncode == code
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_more_clients_than_sequences(corpus: Path, tmp_path: Path) -> None:
    done = run(
        *("split", "--data", corpus, "--length", "1s", "--clients", 99, "--output", tmp_path / "o")
    )
    assert done.returncode == 2
    assert done.stderr.startswith(
        "error: cannot divide 12 sequences of 1s among 99 clients: at most 12"
    )
    assert not (tmp_path / "o").exists()


def test_demo_corpus_is_named_where_no_data_is_given(
    tmp_path: Path,
    corpus: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("partitions.__main__.demo_corpus", lambda progress: corpus)
    assert main(["recut", "--length", "1s", "--output", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    assert "No --data given: using the demo corpus, 112 synthetic voices" in shown
    assert "python -m ssl_core.download --subset train-clean-100 --output DIR" in shown
