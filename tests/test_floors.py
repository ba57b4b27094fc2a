"""The house: a file imports only from floors and rooms below its own, and no files in a circle."""

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = ("common", "partitions", "ssl_core", "fl_client", "fl_server", "simulation")
ROOMS = ("wav2vec2", "planning", "training", "downstream", "paper")
"""Of `ssl_core`, bottom up; its commands stand on top of them."""
BARRED = {
    "common": {"torch", "torchaudio", "flwr", "ray", "transformers", "soundfile"},
    "partitions": {"torch", "torchaudio", "flwr", "ray", "transformers"},
    "ssl_core": {"flwr", "ray"},
    "fl_client": {"ray"},
    "fl_server": {"ray"},
    "simulation": set(),
}
FILES = [(floor, file) for floor in FLOORS for file in sorted((ROOT / floor).rglob("*.py"))]
NAMES = [str(file.relative_to(ROOT)) for _, file in FILES]


def module_of(file: Path) -> str:
    """The name by which a file of the project is imported."""
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(file): file for _, file in FILES}


def imports(file: Path) -> set[str]:
    """Modules that a file imports, anywhere in it but for type checkers alone."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    typing_only = {
        id(child)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for child in ast.walk(node)
    }
    found = set()
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file}: relative import"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                found.add(whole if whole in MODULES else str(node.module))
    return found


GRAPH = {name: imports(file) & MODULES.keys() for name, file in MODULES.items()}


def room_of(module: str) -> str:
    """The room of a module of `ssl_core`; empty for a command."""
    parts = module.split(".")
    return parts[1] if len(parts) > 2 or (len(parts) == 2 and parts[1] in ROOMS) else ""


@pytest.mark.parametrize(("floor", "file"), FILES, ids=NAMES)
def test_a_file_imports_only_from_floors_below(floor: str, file: Path) -> None:
    above = set(FLOORS[FLOORS.index(floor) + 1 :])
    packages = {name.split(".")[0] for name in imports(file)}
    wrong = packages & (above | BARRED[floor] | {"tests", "benchmarks"})
    assert not wrong, f"{file.relative_to(ROOT)} imports {sorted(wrong)}"


@pytest.mark.parametrize("module", [name for name in MODULES if room_of(name) in ROOMS])
def test_a_room_of_ssl_core_imports_only_from_rooms_below(module: str) -> None:
    below = ROOMS[: ROOMS.index(room_of(module)) + 1]
    inside = {name for name in GRAPH[module] if name.startswith("ssl_core.")}
    wrong = sorted(name for name in inside if room_of(name) not in below)
    assert not wrong, f"{module} imports {wrong}"


def test_nothing_below_the_simulation_imports_what_is_not_shipped_to_devices() -> None:
    reached, new = set(), {"fl_client.client_app", "fl_server.server_app"}
    while new:
        reached |= new
        new = {name for module in new for name in GRAPH[module]} - reached
    assert not [name for name in reached if name.startswith("ssl_core.paper")]


def circle(graph: dict[str, set[str]]) -> list[str]:
    """The modules of one circle of imports, in order; empty where there is none."""
    done: set[str] = set()

    def walk(module: str, path: list[str]) -> Iterator[list[str]]:
        if module in path:
            yield path[path.index(module) :]
        elif module not in done:
            for other in sorted(graph[module]):
                yield from walk(other, [*path, module])
            done.add(module)

    return next((found for module in sorted(graph) for found in walk(module, [])), [])


def test_no_files_import_in_a_circle() -> None:
    assert circle(GRAPH) == []


def test_a_circle_is_found() -> None:
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c"]
    assert circle({"a": {"b"}, "b": set()}) == []


def test_no_two_files_have_the_same_name() -> None:
    special = ("__init__.py", "__main__.py")
    counts = Counter(file.name for _, file in FILES if file.name not in special)
    assert [name for name, count in counts.items() if count > 1] == []


def test_every_floor_and_room_has_files() -> None:
    assert {floor for floor, _ in FILES} == set(FLOORS)
    assert {room_of(name) for name in MODULES} >= set(ROOMS)
