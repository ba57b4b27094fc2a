"""JSON as other programs read it: a number that does not exist (NaN, infinity) is null."""

import json
import math
from typing import Any


def dumps(value: Any, **options: Any) -> str:
    """Write a value as JSON; numbers that are not finite become null, at any depth.

    Args:
        value: of dicts, lists, tuples, texts, numbers and None.
        options: of `json.dumps`, such as `indent`.
    """
    return json.dumps(_finite(value), allow_nan=False, **options)


def loads(text: str) -> Any:
    """Read JSON; NaN and infinity, which version 0.1 wrote, are None.

    Raises:
        ValueError: not JSON.
    """
    return json.loads(text, parse_constant=lambda _: None)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return value
