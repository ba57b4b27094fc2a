"""JSON without NaN and infinity, and readers that take null for a number that does not exist."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from common import strict_json
from common.units import format_number

ROOT = Path(__file__).parents[2]


def refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is not JSON")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_do_not_exist_are_null_at_any_depth(value: float) -> None:
    nested = {"a": value, "b": [1.5, (value, {"c": value, "d": "NaN"})], "e": True, "f": None}
    text = strict_json.dumps(nested, indent=1)
    expected = {"a": None, "b": [1.5, [None, {"c": None, "d": "NaN"}]], "e": True, "f": None}
    assert json.loads(text, parse_constant=refuse) == expected
    assert strict_json.loads(text) == expected


def test_what_version_0_1_wrote_is_read_as_none() -> None:
    assert strict_json.loads('{"a": NaN, "b": [Infinity, -Infinity, 1]}') == {
        "a": None,
        "b": [None, None, 1],
    }


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "not finite"), (math.nan, "not finite"), (math.inf, "not finite"), (1.26, "1.3")],
)
def test_a_number_that_does_not_exist_is_named(value: Any, text: str) -> None:
    assert format_number(value, 1) == text


def test_files_that_hold_measured_numbers_are_written_by_it_alone() -> None:
    """Others write whole numbers and texts, or talk to a process of their own."""
    free = {
        "common/strict_json.py", "ssl_core/training/tensor_file.py",
        "ssl_core/training/hf_checkpoint.py", "ssl_core/planning/estimate.py",
        "ssl_core/downstream/task_model.py", "partitions/demo_corpus.py", "partitions/__main__.py",
        "fl_client/identity.py", "fl_client/round_plan.py", "fl_client/warm_start.py",
        "fl_server/__main__.py", "partitions/corpus_record.py", "fl_client/client_state.py",
        "simulation/supervisor.py", "partitions/columns.py",
    }  # fmt: skip
    found = {
        str(file.relative_to(ROOT))
        for floor in ("common", "partitions", "ssl_core", "fl_client", "fl_server", "simulation")
        for file in (ROOT / floor).rglob("*.py")
        if re.search(r"(?<!strict_)json\.dump", file.read_text(encoding="utf-8"))
    }
    assert found <= free
