"""Simulate a federation on Ray: `python simulation/run.py --clients 100 --length 5s`.

The simulation itself is `simulation/simulate.py`, in a child process.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from simulation.supervisor import Supervisor


def main() -> int:
    """Simulate; returns the exit code."""
    return Supervisor(Path(__file__).with_name("simulate.py"), sys.argv[1:]).run()


if __name__ == "__main__":
    sys.exit(main())
