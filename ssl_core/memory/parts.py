"""What memory is made up of."""

import dataclasses

from partitions.units import format_bytes


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Bytes at the peak, by name."""

    parts: dict[str, int]

    @property
    def total(self) -> int:
        """Bytes of the whole process."""
        return sum(self.parts.values())

    def describe(self) -> str:
        """A line for each part, the largest first."""
        order = sorted(self.parts.items(), key=lambda item: -item[1])
        return "\n".join(f"{format_bytes(size):>10}  {name}" for name, size in order)
