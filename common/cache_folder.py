"""The folder for files that can be rebuilt: the user's XDG cache directory."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/shortwave`, or `~/.cache/shortwave` if that is unset or relative."""
    chosen = os.environ.get("XDG_CACHE_HOME", "")
    base = Path(chosen) if os.path.isabs(chosen) else Path.home() / ".cache"
    return base / "shortwave"
