"""What a device does not import of Flower, and that Flower works nevertheless."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
CODE = """
import sys
from fl_client.unneeded import left_out

absent = {"sqlalchemy", "alembic", "pygments", "httpx._main"}
with left_out():
    import flwr.supernode.cli, flwr.supernode.main
print(sorted(absent & sys.modules.keys()))
import httpx
print(httpx.Client().timeout.read, callable(httpx.main))
from flwr.supercore.object_store import ObjectStoreFactory
print(type(ObjectStoreFactory().store()).__name__)
print(sorted(absent & sys.modules.keys()))
store = ObjectStoreFactory(sys.argv[1]).store()
print(store.get("nothing"))
print(type(store).__module__, "sqlalchemy" in sys.modules)
with left_out():
    import flwr.supercore.object_store.sql_object_store as there
print(type(store) is there.SqlObjectStore)
"""


def test_a_supernode_needs_no_sql_and_gets_it_if_asked(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CODE, str(tmp_path / "objects.db")],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "[]",
        "5.0 True",
        "InMemoryObjectStore",
        "[]",
        "None",
        "flwr.supercore.object_store.sql_object_store True",
        "True",
    ]
