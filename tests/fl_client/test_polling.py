"""A device looks for messages often while it is likely to get one."""

import logging
import time

import pytest
from flwr.supercore.logger import LOGGER_NAME
from flwr.supernode import start_client_internal

from fl_client import polling
from fl_client.polling import QUICK, quicken


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
        loop.sleep(0.1)
    finally:
        log.removeHandler(pace)
    assert slept == [QUICK, 3, QUICK, 3, 0.1]
    assert loop.monotonic() == clock
    assert loop.perf_counter() > 0
