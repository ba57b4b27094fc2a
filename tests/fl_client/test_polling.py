"""A device looks for messages often while it is likely to get one."""

import logging
import time

import pytest
from flwr.supercore.logger import LOGGER_NAME
from flwr.supernode import start_client_internal

from fl_client import polling
from fl_client.polling import QUICK, REPLY, Pace, quicken


class Forks:
    """Notes what it is told."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def task(self) -> None:
        self.told.append("task")

    def idle(self) -> None:
        self.told.append("idle")


def test_flowers_loop_sleeps_less_after_a_message(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    clock = 0.0
    monkeypatch.setattr(time, "sleep", slept.append)
    monkeypatch.setattr(time, "monotonic", lambda: clock)
    monkeypatch.setattr(start_client_internal, "time", time)
    log = logging.getLogger(LOGGER_NAME)
    pace = quicken()
    try:
        loop = start_client_internal.time
        loop.sleep(3)  # a device that has just started
        clock = polling.BUSY
        loop.sleep(3)
        log.info("Receiving: %s message (ID: %s)", "train", 7)
        loop.sleep(3)
        log.info("something else")
        clock *= 2
        loop.sleep(3)
        loop.sleep(0.5)
        log.info("Receiving: %s message (ID: %s)", "train", 8)
        loop.sleep(0.5)
    finally:
        log.removeHandler(pace)
    assert slept == [QUICK, 3, QUICK, 3, 0.5, REPLY]
    assert loop.monotonic() == clock
    assert loop.perf_counter() > 0


def test_it_tells_of_a_task_and_of_idle_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda _: None)
    clock = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: clock)
    forks = Forks()
    pace = Pace(forks)
    steps = [
        ("Connection attempt failed, retrying in %.2f seconds", ["idle"]),
        ("SuperNode ID: %s", []),
        ("Receiving: %s message (ID: %s)", []),
        ("Received successfully", ["task"]),
        ("Sending: %s message (ID: %s)", []),
        ("Sent successfully", ["idle"]),
    ]
    for text, told in steps:
        pace.emit(logging.LogRecord("flwr", logging.INFO, "", 1, text, (), None))
        assert forks.told == told
        forks.told.clear()
    pace.sleep(3)
    clock = polling.BUSY
    pace.sleep(0.5)  # for a ClientApp that trains
    assert forks.told == []
    pace.sleep(3)
    assert forks.told == ["idle"]
