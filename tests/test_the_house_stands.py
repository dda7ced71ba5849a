"""The way of the data is one way down: no room uses a room above it. What is found by reading the source alone."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# From the door down. Rooms of one line may use each other.
ROOMS = (
    ("cli", "__main__"),
    ("serve", "batch"),
    ("door",),
    ("evaluation",),
    ("builtin.evaluation", "builtin.moved"),
    ("builtin.training",),
    ("builtin.world",),
    ("tuning",),
    ("export",),
    ("runs",),
    ("distributed",),
    ("modes",),
    ("sampling",),
    ("models",),
    ("conditioning",),
    ("processors",),
    ("checkpoints",),
    ("story",),
    ("settings", "values", "presets", "events", "runtime", "pictures", "model_names", "builtin"),
    ("kernels",),
    ("files", "documents", "packages", "plugins", "threads", "wording", "intervals", "errors"),
)
FLOOR = {name: floor for floor, names in enumerate(ROOMS) for name in names}


def sources(*folders: str) -> Iterator[tuple[Path, ast.Module]]:
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*.py")):
            yield path, ast.parse(path.read_text(encoding="utf-8"))


def room_of(module: str) -> str:
    """`fastory.runs.folder` -> runs, `fastory.builtin.world.drawing` -> builtin.world; `fastory` itself is the public door."""
    parts = module.split(".")[1:]
    return ".".join(parts[:2]) if ".".join(parts[:2]) in FLOOR else "".join(parts[:1])


def imports(tree: ast.Module) -> Iterator[str]:
    """Modules of fastory that are imported anywhere in a file, for running and not for types alone."""
    for_types = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in for_types:
            continue
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "fastory":
            if node.module == "fastory":
                yield from (f"fastory.{alias.name}" for alias in node.names)
            else:
                yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("fastory."))


def test_no_room_uses_a_room_above_it() -> None:
    upwards = []
    for path, tree in sources("fastory", "kernels", "export"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        own = room_of(".".join(parts if parts[0] == "fastory" else ("fastory", *parts)))
        upwards += [
            f"{path.relative_to(ROOT)} uses {module}"
            for module in imports(tree)
            if own in FLOOR and room_of(module) in FLOOR and FLOOR[room_of(module)] < FLOOR[own]
        ]
    assert upwards == []


def test_every_room_has_its_floor() -> None:
    rooms = {
        p.stem for p in (ROOT / "fastory").iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()
    }
    assert rooms - {"__init__"} <= set(FLOOR)


def test_only_modes_ask_for_a_mode_by_its_name() -> None:
    asked = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path, tree in sources("fastory", "export")
        if path.parent.name != "modes"
        for node in ast.walk(tree)
        if isinstance(node, ast.Compare) and ast.unparse(node.left).split(".")[-1] == "mode"
        if any(isinstance(c, ast.Constant) and c.value in ("iterative", "causal") for c in node.comparators)
    ]
    assert asked == []


def test_no_test_imports_another_test() -> None:
    names = {path.stem for path, _ in sources("tests") if path.stem.startswith("test_")}
    found = [
        f"{path.relative_to(ROOT)} imports {node.module}"
        for path, tree in sources("tests")
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module in names
    ]
    assert found == []


# Words for which the field has others, or that meant several things (architecture.md, "Names"): parts of a name, and names.
PARTS = frozenset(
    (
        *("telling", "told", "company", "begun", "job", "jobs", "trainee", "lesson", "lessons"),
        *("sibling", "siblings", "families", "mending", "twin", "twins", "piece", "pieces", "weigh"),
    )
)
WHOLE = frozenset(("Base", "place", "one", "asked", "given"))
# The table of the families of UNets; the places of the drawn world are what its captions name.
FIELDS_OWN = {"FAMILIES": "fastory/checkpoints/", "place": "fastory/builtin/"}


def names(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """What a file calls its variables, arguments, attributes, functions and classes, each with its line."""
    for node in ast.walk(tree):
        for field in ("id", "arg", "attr", "name", "asname"):
            if isinstance(name := getattr(node, field, None), str):
                yield name, getattr(node, "lineno", 0)


def gone(name: str) -> bool:
    parts = {part.lower() for part in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", name)}
    return name in WHOLE or bool(parts & PARTS)


def test_a_thing_has_the_name_that_the_field_gives_it() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for path, tree in sources("fastory", "kernels", "export", "bench")
        for name, line in names(tree)
        if gone(name)
        and not (name in FIELDS_OWN and str(path.relative_to(ROOT)).startswith(FIELDS_OWN[name]))
    ]
    assert found == []


def test_no_file_is_too_long_to_read() -> None:
    long = [
        str(path.relative_to(ROOT))
        for path, _ in sources("fastory", "kernels", "export")
        if len(path.read_text(encoding="utf-8").splitlines()) > 450
    ]
    assert long == []


def test_no_function_is_too_long_to_read() -> None:
    long = [
        f"{path.relative_to(ROOT)}:{node.lineno}: {node.name}"
        for path, tree in sources("fastory", "kernels", "export", "bench")
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        # What a command takes is a list of one line an option, and no code.
        and (node.end_lineno or 0) - (node.body[0].lineno if node.name == "generate" else node.lineno) >= 60
    ]
    assert long == []


def decided_by_family(tree: ast.Module) -> Iterator[int]:
    """Lines that compare something with a family's name."""
    for node in ast.walk(tree):
        compared = [node.left, *node.comparators] if isinstance(node, ast.Compare) else []
        compared += (
            [node.pattern.value]
            if isinstance(node, ast.match_case) and isinstance(node.pattern, ast.MatchValue)
            else []
        )
        if any(isinstance(value, ast.Constant) and value.value in ("sd15", "sdxl") for value in compared):
            yield node.lineno if isinstance(node, ast.Compare) else node.pattern.lineno


def test_what_a_family_does_otherwise_stands_in_its_table() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line}"
        for path, tree in sources("fastory", "kernels", "export", "bench")
        for line in decided_by_family(tree)
    ]
    assert found == []


def test_the_check_of_families_finds_a_comparison() -> None:
    lines = (
        'if model.family == "sdxl": pass',
        'if "sd15" != name: pass',
        'match name:\n    case "sdxl": pass',
    )
    assert all(list(decided_by_family(ast.parse(line))) for line in lines)
    assert not list(decided_by_family(ast.parse('open("sdxl")')))


def test_the_check_of_imports_finds_one() -> None:
    lines = (
        "from fastory import files",
        "from fastory.cli import app",
        "import fastory.runs.folder",
        "from fastory.builtin.world.drawing import draw",
    )
    found = [room_of(module) for module in imports(ast.parse("\n".join(lines)))]
    assert found == ["files", "cli", "runs", "builtin.world"]
    with pytest.raises(KeyError):
        FLOOR["nowhere"]


def test_no_test_drives_the_private_steps_of_a_mode() -> None:
    """Its run and what that makes on the way are its own: a test draws, or asks for a round that is ready."""
    inner = {"IterativeRun", "references_of", "row_of", "groups_of", "StoryState", "CausalBatch"}
    found = [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for path, tree in sources("tests")
        for name, line in names(tree)
        if name in inner
    ]
    assert found == []
