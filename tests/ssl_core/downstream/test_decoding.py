"""CTC decoding: greedy on exact cases, and a beam search with a lexicon and n-grams."""

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from common.errors import UsageError
from ssl_core.downstream.decoding import Decoder, beam_search, greedy

LABELS = (" ", "A", "B")
BIGRAMS = """\\data\\
ngram 1=6
ngram 2=2

\\1-grams:
-2.0\t<unk>
-99\t<s>\t0
-1.0\t</s>
-1.0\tAB\t0
-1.0\tBA\t0
-1.0\tBB\t0

\\2-grams:
-0.01\tAB BA
-3.0\tAB BB

\\end\\
"""
"""AB is followed by BA."""


def frames(text: str, sure: float = 20.0) -> Tensor:
    """Logits `[1, frame, symbol]` with one symbol per frame; `_` is the blank."""
    places = [0 if symbol == "_" else LABELS.index(symbol) + 1 for symbol in text]
    return sure * torch.nn.functional.one_hot(torch.tensor(places), 4).float()[None]


def decoded(decoder: Decoder, text: str) -> str:
    return decoder(frames(text), [len(text)])[0]


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("AAB_B", "ABB"),
        ("_____", ""),
        ("A", "A"),
        ("__AA__A", "AA"),
        ("ABAB", "ABAB"),
        ("AB__ __BA", "AB BA"),
    ],
)
def test_repeats_are_merged_and_blanks_removed(path: str, text: str) -> None:
    assert decoded(greedy(LABELS), path) == text


def test_padded_frames_are_not_written() -> None:
    both = torch.cat([frames("ABABABAB"), frames("BBBBBBBB")])
    assert greedy(LABELS)(both, [3, 1]) == ["ABA", "B"]


@pytest.fixture
def flashlight() -> None:
    pytest.importorskip("flashlight.lib.text.decoder")


@pytest.fixture
def words(tmp_path: Path) -> str:
    path = tmp_path / "words.txt"
    path.write_text("AB\n\n BA \r\nBB\nCAB\n")
    return str(path)


@pytest.mark.usefixtures("flashlight")
@pytest.mark.parametrize(
    ("path", "text"), [("AAB_B", "ABB"), ("_____", ""), ("AB _BA_", "AB BA"), (" A ", "A")]
)
def test_a_beam_search_without_words_finds_any_text(path: str, text: str) -> None:
    assert decoded(beam_search(LABELS, 10), path) == text


@pytest.mark.usefixtures("flashlight")
def test_a_beam_search_adds_the_paths_of_a_text() -> None:
    """The text A has the best path (A, blank) and the highest probability over all paths."""
    scores = torch.tensor([[[0.0, -9, 2.0, -9], [3.0, -9, 0.0, -9]]])
    assert greedy(LABELS)(scores, [2]) == beam_search(LABELS, 10)(scores, [2]) == ["A"]


@pytest.mark.usefixtures("flashlight")
@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("AB BA", "AB BA"),  # no frame for the space after the last word
        ("_AAB_ _B_A__", "AB BA"),
        ("B_B", "BB"),
        ("_____", ""),
    ],
)
def test_words_of_the_list_are_found(words: str, path: str, text: str) -> None:
    assert decoded(beam_search(LABELS, 10, words), path) == text


@pytest.mark.usefixtures("flashlight")
def test_only_words_of_the_list_are_found(words: str) -> None:
    unsure = frames("AB AA ", 4.0)
    assert greedy(LABELS)(unsure, [6]) == ["AB A "]
    found = beam_search(LABELS, 50, words)(unsure, [6])[0].split()
    assert found[0] == "AB"
    assert found[1] in ("BA", "AB", "BB")


@pytest.mark.usefixtures("flashlight")
def test_a_batch_is_searched_clip_by_clip(words: str) -> None:
    texts = ("AB BA", "BB", "_A_B")
    longest = max(map(len, texts))
    batch = torch.cat(
        [frames(text + "B" * (longest - len(text))) for text in texts]  # padding says B
    )
    for decoder in (beam_search(LABELS, 10), beam_search(LABELS, 10, words)):
        found = decoder(batch, [len(text) for text in texts])
        assert found == ["AB BA", found[1], "AB"]
        assert found[1] == decoder(frames("BB"), [2])[0]


@pytest.mark.usefixtures("flashlight")
def test_an_n_gram_decides_between_words(words: str, tmp_path: Path) -> None:
    pytest.importorskip("flashlight.lib.text.decoder.kenlm")
    arpa = tmp_path / "words.arpa"
    arpa.write_text(BIGRAMS)
    # BA or BB: the logits slightly favour BB.
    scores = frames("AB B_A", 8.0)
    scores[0, 5] = torch.tensor([-8.0, -8.0, 2.0, 2.5])
    assert beam_search(LABELS, 50, words)(scores, [6]) == ["AB BB"]
    assert beam_search(LABELS, 50, words, str(arpa))(scores, [6]) == ["AB BA"]
    arpa.write_text("not an n-gram model\n")
    with pytest.raises(UsageError, match=r"--ngram .*words\.arpa: .*not an n-gram"):
        beam_search(LABELS, 50, words, str(arpa))


@pytest.mark.usefixtures("flashlight")
def test_symbols_of_slots_are_decoded() -> None:
    labels = ("\ue000", "\ue0ff", "a", "é")
    places = [3, 1, 4, 0, 4, 2]
    scores = 20 * torch.nn.functional.one_hot(torch.tensor(places), 5).float()[None]
    for decoder in (greedy(labels), beam_search(labels, 5)):
        assert decoder(scores, [6]) == ["a\ue000éé\ue0ff"]


def test_without_flashlight_the_error_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in [name for name in sys.modules if name.startswith("torchaudio.models.decoder")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "flashlight", None)
    for name in [name for name in sys.modules if name.startswith("flashlight.")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(UsageError, match=r"pip install 'shortwave\[beam\]', or leave --beam at 0"):
        beam_search(LABELS, 5)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, r"--words .*words: no such file"),
        (b"ab\ncab\n", "no word can be spelled in the task's symbols"),
        (b"", "no word can be spelled in the task's symbols"),
        (b"AB\nAB BA\n", r"words:2: expected one word, found 'AB BA'"),
        (b"AB\t12\n", r"words:1: expected one word"),
        (b"\xff\xfe", "not UTF-8 text"),
    ],
)
def test_a_bad_list_of_words_is_named(tmp_path: Path, content: bytes | None, problem: str) -> None:
    path = tmp_path / "words"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError, match=problem):
        beam_search(LABELS, 5, str(path))


def test_an_n_gram_needs_words(tmp_path: Path) -> None:
    (tmp_path / "arpa").write_text(BIGRAMS)
    with pytest.raises(UsageError, match="give the lexicon with --words"):
        beam_search(LABELS, 5, "", str(tmp_path / "arpa"))
    with pytest.raises(UsageError, match=r"--ngram .*none: no such file"):
        beam_search(LABELS, 5, "", str(tmp_path / "none"))
