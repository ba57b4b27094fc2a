"""Training waits while a limit of the owner's is passed, and goes on afterwards."""

import os
from pathlib import Path

import psutil
import pytest

from fl_client.limits import PAUSE, Limits, temperature


def zone(root: Path, number: int, text: str) -> None:
    folder = root / f"thermal_zone{number}"
    folder.mkdir(exist_ok=True)
    (folder / "temp").write_text(text)


def test_the_hottest_zone_counts(tmp_path: Path) -> None:
    assert temperature(tmp_path) is None
    zone(tmp_path, 0, "48312\n")
    zone(tmp_path, 1, "81000\n")
    zone(tmp_path, 2, "asleep")
    assert temperature(tmp_path) == 81.0
    assert Limits(temperature=80).passed(tmp_path) == "81 degrees, the limit is 80"
    assert not Limits(temperature=82).passed(tmp_path)


def test_load_and_memory_are_limits_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getloadavg", lambda: (3.2, 0.0, 0.0))
    assert Limits(load=3).passed(tmp_path) == "load 3.2, the limit is 3"
    assert not Limits(load=4).passed(tmp_path)
    available = psutil.virtual_memory().total
    assert "must be" in Limits(memory=available + 1).passed(tmp_path)
    assert not Limits().passed(tmp_path)


def test_it_waits_until_none_is_passed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    zone(tmp_path, 0, "90000")
    slept = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 3:
            zone(tmp_path, 0, "60000")

    assert Limits(temperature=80).wait(sleep, tmp_path) > 0
    assert slept == [PAUSE] * 3
    assert "paused: 90 degrees" in caplog.text
    assert "going on" in caplog.text
    assert Limits(temperature=80).wait(sleep, tmp_path) == 0.0
    assert Limits.of_node({"pause-load": 2.5, "pause-memory": 7}) == Limits(0.0, 2.5, 7)
