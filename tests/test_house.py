"""The house rules that hold over all of `src/capsight`: no import circles, no long files."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import capsight

ROOT = Path(capsight.__file__).parent


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_of(path): path for path in sorted(ROOT.rglob("*.py"))}


def imports(module: str) -> set[str]:
    """Modules of the package that `module` imports, at the top or inside a function."""
    nodes = list(ast.walk(ast.parse(FILES[module].read_text())))
    named = [(name.name, name.name) for x in nodes if isinstance(x, ast.Import) for name in x.names]
    for node in nodes:
        if isinstance(node, ast.ImportFrom):
            named += [(node.module or "", f"{node.module}.{name.name}") for name in node.names]
    return {inner if inner in FILES else outer for outer, inner in named if {inner, outer} & FILES.keys()}


def room(module: str) -> str:
    """The package that a module of kvcapsule lies in; elsewhere the package under `capsight`."""
    parts = module.split(".")
    inside = parts[1:2] == ["kvcapsule"] and len(parts) > 2
    return ".".join(parts[:3] if inside else parts[:2])


def test_modules_import_each_other_in_one_direction() -> None:
    TopologicalSorter({module: imports(module) - {module} for module in FILES}).prepare()


def test_packages_import_each_other_in_one_direction() -> None:
    rooms: dict[str, set[str]] = {}
    for module in FILES:
        seen = {room(x) for x in imports(module)} - {room(module), "capsight", "capsight.kvcapsule"}
        rooms.setdefault(room(module), set()).update(seen)
    TopologicalSorter(rooms).prepare()


def test_no_file_is_long() -> None:
    lines = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in FILES.values()}
    assert {name: count for name, count in lines.items() if count > 250} == {}


def test_only_commands_print() -> None:
    """Elsewhere there are logging, warnings, and tqdm, which writes to stderr."""
    said = {}
    for module, path in FILES.items():
        nodes = list(ast.walk(ast.parse(path.read_text())))
        calls = [x.func.id for x in nodes if isinstance(x, ast.Call) and isinstance(x.func, ast.Name)]
        rich = [x.module or "" for x in nodes if isinstance(x, ast.ImportFrom)]
        if "print" in calls or any(name.split(".")[0] == "rich" for name in rich):
            said[module] = path
    assert {name for name in said if not name.startswith("capsight.cli.")} == set()


def test_the_package_is_light() -> None:
    """What only commands and pictures need is not loaded with `import capsight`."""
    heavy = "('matplotlib', 'typer', 'pydantic', 'capsight.report', 'capsight.evaluation', 'capsight.cli')"
    code = f"import capsight, sys; print([name for name in {heavy} if name in sys.modules])"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"
