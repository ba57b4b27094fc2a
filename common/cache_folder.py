"""Where this user's rebuildable files are kept: the XDG cache directory."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/shortwave`, or `~/.cache/shortwave` where that is not set."""
    chosen = os.environ.get("XDG_CACHE_HOME", "")
    base = Path(chosen) if os.path.isabs(chosen) else Path.home() / ".cache"
    return base / "shortwave"
