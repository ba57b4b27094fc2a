"""The house: a file imports only from floors below its own."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = ("partitions", "ssl_core", "fl_client", "fl_server", "simulation")
BARRED = {
    "partitions": {"torch", "torchaudio", "flwr", "ray", "transformers"},
    "ssl_core": {"flwr", "ray"},
    "fl_client": {"ray"},
    "fl_server": {"ray"},
    "simulation": set(),
}


def imports(file: Path) -> set[str]:
    """Top-level packages that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file}: relative import"
            found.add(str(node.module).split(".")[0])
    return found


FILES = [(floor, file) for floor in FLOORS for file in sorted((ROOT / floor).rglob("*.py"))]


@pytest.mark.parametrize(
    ("floor", "file"), FILES, ids=[str(file.relative_to(ROOT)) for _, file in FILES]
)
def test_a_file_imports_only_from_floors_below(floor: str, file: Path) -> None:
    above = set(FLOORS[FLOORS.index(floor) + 1 :])
    wrong = imports(file) & (above | BARRED[floor] | {"tests", "benchmarks"})
    assert not wrong, f"{file.relative_to(ROOT)} imports {sorted(wrong)}"


def test_every_floor_has_files() -> None:
    assert {floor for floor, _ in FILES} == set(FLOORS)
