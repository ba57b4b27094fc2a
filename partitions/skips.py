"""Counts skipped files and speakers by reason, with the first few examples."""

import re
from collections.abc import Mapping

_EXAMPLES = 3


class Skips:
    """Counts of skipped paths by reason, with the first few examples."""

    def __init__(self, counts: dict[str, int], examples: dict[str, tuple[str, ...]]) -> None:
        """Continue from `counts` and `examples`, both by reason."""
        self.counts = counts
        self.examples = examples

    def add(self, reason: str, path: str) -> None:
        """Count one path under a reason."""
        self.counts[reason] = self.counts.get(reason, 0) + 1
        named = self.examples.get(reason, ())
        if len(named) < _EXAMPLES:
            printable = path.encode("utf-8", "backslashreplace").decode()
            self.examples[reason] = (*named, re.sub(r"[\x00-\x1f\x7f]", "?", printable))


def describe_skips(skips: Mapping[str, int], examples: Mapping[str, tuple[str, ...]]) -> list[str]:
    """One line for each reason: `skipped, unreadable: 3 (a.flac, ...)`."""
    lines = []
    for reason, count in skips.items():
        named = examples.get(reason, ())
        more = ", ..." if count > len(named) else ""
        shown = f" ({', '.join(named)}{more})" if named else ""
        lines.append(f"skipped, {reason}: {count}{shown}")
    return lines
