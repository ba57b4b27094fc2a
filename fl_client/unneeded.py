"""Leaves out of a device what Flower's SuperNode imports and never uses: a third of its import.

That is SQL, as a SuperNode keeps its messages in memory, and the command line of httpx.
"""

import contextlib
import importlib
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

_STORE = "flwr.supercore.object_store.sql_object_store"
_HTTPX = "httpx._main"
"""httpx goes without, as where click and rich are not installed."""


class SqlObjectStore:
    """Stands in for the class of Flower, which it imports when it is used after all."""

    def __new__(cls, *given: Any, **named: Any) -> Any:
        """An object of Flower's class."""
        sys.modules.pop(_STORE, None)
        return importlib.import_module(_STORE).SqlObjectStore(*given, **named)


@contextlib.contextmanager
def left_out() -> Iterator[None]:
    """Import Flower inside the block; what is there already stays."""
    store: Any = ModuleType(_STORE)
    store.SqlObjectStore = SqlObjectStore
    stand_ins = {_STORE: store, _HTTPX: None}
    added = {name: value for name, value in stand_ins.items() if name not in sys.modules}
    sys.modules.update(added)
    try:
        yield
    finally:
        for name in added:
            sys.modules.pop(name, None)
