"""A device has an identity of its own, however its card was made."""

import json
import shutil
from pathlib import Path

import pytest

from common.errors import DataError, UsageError
from fl_client import identity as module
from fl_client.identity import LARGEST, SMALLEST, identity


@pytest.fixture(autouse=True)
def no_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WAIT", 0.0)


def number(folder: Path, trains_on: str = "data", serial: Path = Path("/none")) -> int:
    """The identity of a device that starts and ends."""
    found = identity(folder, trains_on, serial=serial)
    assert found.lock is not None
    found.lock.close()
    return found.number


def test_it_is_made_once_and_differs_between_equal_boards(tmp_path: Path) -> None:
    first = number(tmp_path / "one")
    assert SMALLEST <= first < LARGEST
    assert number(tmp_path / "one") == first
    assert number(tmp_path / "two") != first, "the same data, another card"
    assert number(tmp_path / "one", "other data") != first
    assert float(first) == first, "it travels as a metric"


def test_a_copied_card_gets_its_own_where_boards_have_serial_numbers(tmp_path: Path) -> None:
    serials = [tmp_path / "serial-1", tmp_path / "serial-2"]
    for place, serial in enumerate(serials):
        serial.write_bytes(b"10000000abcdef0%d\0" % place)
    first = number(tmp_path / "one", serial=serials[0])
    shutil.copytree(tmp_path / "one", tmp_path / "copy")
    assert number(tmp_path / "one", serial=serials[0]) == first
    found = identity(tmp_path / "copy", "data", serial=serials[1])
    assert found.number != first
    assert "copied from another board" in found.note
    for path in (tmp_path / "one").glob("*.json"):
        assert "abcdef" not in path.read_text(), "the serial number itself is kept nowhere"


def test_a_copied_card_without_a_serial_number_is_the_same_device(tmp_path: Path) -> None:
    zeros = tmp_path / "serial"
    zeros.write_bytes(b"0000000000000000\0")
    first = number(tmp_path / "one", serial=zeros)
    shutil.copytree(tmp_path / "one", tmp_path / "copy")
    assert number(tmp_path / "copy") == first  # the server tells both, see test_rounds.py


def test_a_new_card_is_a_new_device(tmp_path: Path) -> None:
    first = number(tmp_path / "one")
    shutil.rmtree(tmp_path / "one")
    found = identity(tmp_path / "one", "data")
    assert found.number != first
    assert str(tmp_path / "one") in found.note


def test_two_devices_with_one_identity_do_not_run_on_one_machine(tmp_path: Path) -> None:
    running = identity(tmp_path, "data")
    with pytest.raises(UsageError, match=r"already runs here .* --state of its own"):
        identity(tmp_path, "data")
    assert identity(tmp_path, "other data").number != running.number
    assert running.lock is not None
    running.lock.close()
    assert number(tmp_path) == running.number


def test_a_device_of_version_0_1_keeps_its_number_with_its_state(tmp_path: Path) -> None:
    (tmp_path / "run" / "1000017").mkdir(parents=True)
    found = identity(tmp_path, "data", 1_000_017)
    assert found.number == 1_000_017
    assert identity(tmp_path, "other data", 1_000_018).number != 1_000_018


@pytest.mark.parametrize("text", ["", "[]", '{"identity": "x", "board": ""}', "{"])
def test_a_broken_identity_is_named(tmp_path: Path, text: str) -> None:
    number(tmp_path)
    (path,) = tmp_path.glob("*.json")
    assert json.loads(path.read_text())["board"] == ""
    path.write_text(text)
    with pytest.raises(DataError, match=r"identity-.*\.json does not hold .*; remove it"):
        identity(tmp_path, "data")
