"""Timers and Such: tagged transcripts, numbers in words and digits, and the coffee orders."""

import csv
from collections.abc import Sequence
from pathlib import Path

import pytest
from noise_files import real_data, write_noise

from common.errors import DataError
from ssl_core.downstream.corpora import slots
from ssl_core.downstream.corpora.spoken_numbers import forms

COLUMNS = ("path", "speakerId", "transcription", "semantics")
SUM = "{'intent': 'SimpleMath', 'slots': {'number1': 78, 'op': ' plus ', 'number2': -2.5}}"
TIMER = "{'intent': 'SetTimer', 'slots': {'minutes': 5, 'seconds': 0}}"

Row = tuple[str, str, str]


def write_table(root: Path, name: str, rows: Sequence[Row], audio: bool = True) -> None:
    with open(root / f"{name}.csv", "w", encoding="utf-8", newline="") as stream:
        table = csv.writer(stream)
        table.writerow(COLUMNS)
        for number, row in enumerate(rows):
            path = f"{name}/{number}.wav"
            table.writerow((path, *row))
            if audio:
                write_noise(root / path)


@pytest.fixture
def timers(tmp_path: Path) -> Path:
    """A row or two in each of the published tables."""
    root = tmp_path / "timers"
    root.mkdir()
    write_table(
        root, "train-real", [("ann", "what is seventy eight plus minus two point five", SUM)]
    )
    write_table(root, "train-synth", [("bot", "time five minutes", TIMER.replace(",", "|"))])
    write_table(root, "dev-real", [("bob", "set a timer for 5 minutes", TIMER)])
    write_table(root, "dev-synth", [("bot", "dev", TIMER)])
    write_table(root, "test-real", [("eve", "zebra for five minutes zero seconds", TIMER)])
    write_table(root, "test-synth", [("bot", "test", TIMER)])
    return root


def test_splits_texts_and_labels(timers: Path) -> None:
    data = slots.read(timers)
    names = slots.slot_names(timers)
    assert names == ("minutes", "number1", "number2", "op", "seconds")
    assert [clip.name for clip in (*data.train, *data.valid, *data.test)] == [
        "train-real/0.wav",
        "train-synth/0.wav",
        "dev-real/0.wav",
        "test-real/0.wav",
    ]
    assert [
        slots.readable(clip.text, names) for clip in (*data.train, *data.valid, *data.test)
    ] == [
        "what is <number1>seventy eight</> <op>plus</> <number2>minus two point five</>",
        "time <minutes>five</> minutes <seconds>zero</>",
        "set a timer for <minutes>5</> minutes <seconds>zero</>",
        "zebra for <minutes>five</> minutes <seconds>zero</> seconds",
    ]
    assert data.train[1].text == "time \ue000five\ue0ff minutes \ue004zero\ue0ff"
    assert data.train[0].speaker == "ann"
    assert data.labels == tuple(sorted(set(data.train[0].text + data.train[1].text)))
    assert {"\ue000", "\ue001", "\ue002", "\ue003", "\ue004", "\ue0ff"} <= set(data.labels)
    # A symbol that only the test set has counts as an error; its clip stays.
    assert "b" not in data.labels
    assert data.skips == {}


def test_readable_without_names_numbers_the_slots() -> None:
    assert slots.readable("a \ue001b\ue0ff c") == "a <1>b</> c"


@pytest.mark.parametrize(
    ("transcript", "values", "shown"),
    [
        (
            "what is five plus twenty-five",
            {"a": 5, "b": 25},
            "what is <a>five</> plus <b>twenty-five</>",
        ),
        ("five minus five", {"a": 5, "b": 5}, "<a>five</> minus <b>five</>"),
        ("twenty five", {"a": 5}, "twenty <a>five</>"),
        ("fortyfive", {"a": 5}, "fortyfive <a>five</>"),
        ("15 or 5.5 or 5", {"a": 5}, "15 or 5.5 or <a>5</>"),
        ("alarm at 8:05AM", {"h": 8, "m": 5, "half": "AM"}, "alarm at <h>8</>:<m>05</><half>AM</>"),
        ("SIXTEEN HUNDRED", {"a": 1600}, "<a>SIXTEEN HUNDRED</>"),
        ("A HUNDRED", {"a": 100}, "A HUNDRED <a>ONE HUNDRED</>"),
        (
            "about  point five  miles",
            {"a": 0.5, "u": "Mile"},
            "about <a>point five</> miles <u>Mile</>",
        ),
        ("take negative seven", {"a": -7.0}, "take <a>negative seven</>"),
        ("minus 3", {"a": "3"}, "minus <a>3</>"),
        ("10-5", {"a": -5}, "10-5 <a>minus five</>"),
        ("one third", {"a": 1 / 3}, "one third <a>zero point three three</>"),
        ("no slot", {}, "no slot"),
    ],
)
def test_values_are_found_as_whole_words(
    transcript: str, values: dict[str, slots.Value], shown: str
) -> None:
    names = sorted(values)
    tags = {name: chr(0xE000 + number) for number, name in enumerate(names)}
    assert slots.readable(slots.tag(transcript, values, tags), names) == shown


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (0, "zero"),
        (13, "thirteen"),
        (40, "forty"),
        (99, "ninety nine"),
        (101, "one hundred one"),
        (1001, "one thousand one"),
        (1_000_000, "one million"),
        (12_345_678, "twelve million three hundred forty five thousand six hundred seventy eight"),
        (37.67, "thirty seven point six seven"),
        (10.05, "ten point zero five"),
        (-0.5, "minus zero point five"),
        (
            1e15 - 1,
            "nine hundred ninety nine trillion nine hundred ninety nine billion nine hundred "
            "ninety nine million nine hundred ninety nine thousand nine hundred ninety nine",
        ),
    ],
)
def test_numbers_in_words(number: float, words: str) -> None:
    assert forms(number)[0] == words


def test_other_forms_of_a_number() -> None:
    assert forms(1500) == (
        "one thousand five hundred",
        "fifteen hundred",
        "1500",
        "1,500",
        "1500.0",
    )
    assert forms(2005)[:2] == ("two thousand five", "two thousand and five")
    assert forms(5.0) == ("five", "5", "5.0", "05")
    assert forms(10**18)[0] == "1000000000000000000"


def test_synthetic_development_only_without_a_real_one(timers: Path) -> None:
    (timers / "dev-real.csv").unlink()
    assert [clip.piece.path for clip in slots.read(timers).valid] == ["dev-synth/0.wav"]
    (timers / "dev-synth.csv").unlink()
    with pytest.raises(DataError, match=r"no dev-real\.csv in"):
        slots.read(timers)


@pytest.mark.parametrize("table", ["train-synth", "test-real"])
def test_a_missing_table_is_an_error(timers: Path, table: str) -> None:
    (timers / f"{table}.csv").unlink()
    with pytest.raises(DataError, match=rf"no {table}\.csv in .*timers; unpack"):
        slots.read(timers)


def test_skipped_files_are_counted(timers: Path) -> None:
    write_table(timers, "test-real", [("eve", "x", TIMER), ("eve", "  ", TIMER)])
    write_table(
        timers, "train-real", [("ann", "a", TIMER), ("ann", "b", TIMER), ("ann", "c", TIMER)]
    )
    (timers / "train-real" / "0.wav").unlink()
    (timers / "train-real" / "1.wav").write_bytes(b"no audio")
    data = slots.read(timers)
    assert data.skips == {"missing": 1, "unreadable": 1, "empty transcript": 1}
    assert len(data.test) == 1


@pytest.mark.parametrize(
    ("semantics", "problem"),
    [
        ("__import__('os').getcwd()", "semantics is not a dictionary with 'slots'"),
        ("{'intent': 'SetTimer'}", "semantics is not a dictionary with 'slots'"),
        ("", "semantics is not a dictionary with 'slots'"),
        (
            "{'slots': {'a': [1]}}",
            r"slot 'a' is \[1\], neither text nor a finite number",
        ),
        ("{'slots': {'a': 1e999}}", "slot 'a' is inf, neither text nor a finite number"),
        (
            "{'slots': {'a': '\ue000'}}",
            r"a symbol between U\+E000 and U\+E0FF, which are reserved for tags",
        ),
    ],
)
def test_bad_semantics_name_their_line(timers: Path, semantics: str, problem: str) -> None:
    write_table(timers, "dev-real", [("bob", "fine", TIMER), ("bob", "text", semantics)])
    with pytest.raises(DataError, match=rf"dev-real\.csv:3: {problem}"):
        slots.read(timers)


def test_values_that_are_not_given_are_no_slots(timers: Path) -> None:
    write_table(timers, "dev-real", [("bob", "wake me", '{"slots": {"hour": null, "day": ""}}')])
    assert slots.read(timers).valid[0].text == "wake me"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("path,transcription\na,b\n", r"no column 'semantics' \(found path, transcription\)"),
        ("path,transcription,semantics\na,b\n", ":2: fewer columns than the header"),
        (f'path,transcription,semantics\n../a.wav,b,"{SUM}"\n', r":2: a path '\.\./a\.wav' with"),
        (f'path,transcription,semantics\n/a.wav,b,"{SUM}"\n', r":2: an absolute path '/a\.wav'"),
    ],
)
def test_bad_tables(timers: Path, text: str, problem: str) -> None:
    (timers / "train-real.csv").write_text(text)
    with pytest.raises(DataError, match=problem):
        slots.read(timers)


def test_tables_that_are_not_utf_8(timers: Path) -> None:
    (timers / "train-real.csv").write_bytes(b"path,semantics\n\xff,\n")
    with pytest.raises(DataError, match=r"train-real\.csv: not UTF-8 text"):
        slots.read(timers)


def test_a_clip_in_two_splits_is_an_error(timers: Path) -> None:
    (timers / "test-real.csv").write_text((timers / "train-real.csv").read_text())
    with pytest.raises(DataError, match=r"train-real/0\.wav is in the tables of two splits"):
        slots.read(timers)


def test_another_corpus_says_what_was_expected_and_found(corpus: Path) -> None:
    with pytest.raises(DataError, match=r"expected \{train,dev,test\}-.* found train-small;"):
        slots.read(corpus)


def test_real_recordings() -> None:
    root = real_data("slu-coffee")
    data = slots.read(root)
    names = slots.slot_names(root)
    assert [len(data.train), len(data.valid), len(data.test)] == [180, 40, 40]
    assert names == (
        "coffeeDrink",
        "milkAmount",
        "numberOfShots",
        "roast",
        "size",
        "sugarAmount",
    )
    assert slots.readable(data.train[0].text, names) == (
        "<coffeeDrink>coffee</> <roast>light roast</> <size>twelve ounce</>"
    )
    assert len(data.labels) == 31
    assert data.skips == {}
