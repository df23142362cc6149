"""The house rules: no import circles, no long files, few short ones; pages name what is there."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import capsight

ROOT = Path(capsight.__file__).parent
TREE = Path(__file__).resolve().parents[1]


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_of(path): path for path in sorted(ROOT.rglob("*.py"))}


@cache
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


def test_no_file_is_long_and_few_are_short() -> None:
    lines = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in FILES.values()}
    assert {name: count for name, count in lines.items() if count > 250} == {}
    assert sum(count < 40 for name, count in lines.items() if not name.endswith("__init__.py")) <= 16


def test_no_test_tool_or_benchmark_is_long() -> None:
    paths = [path for folder in ("tests", "tools", "benchmarks") for path in (TREE / folder).rglob("*.py")]
    long = {str(x.relative_to(TREE)) for x in paths if len(x.read_text().splitlines()) > 250}
    assert not long


def test_every_file_is_in_the_page_of_sizes() -> None:
    """After a file has come or gone: `python tools/count_lines.py`."""
    rows = re.findall(r"^\| `([^`]+)` \|.*\| (.+) \|$", (TREE / "docs" / "size-files.md").read_text(), re.M)
    assert [name for name, _ in rows] == list(dict(rows))
    assert dict(rows).keys() == {str(path.relative_to(ROOT)) for path in FILES.values()}


def test_pages_for_contributors_name_what_is_there() -> None:
    pages = ["CONTRIBUTING.md", "DESIGN.md", "docs/architecture.md", ".ci/run", ".pre-commit-config.yaml"]
    pages += [str(path.relative_to(TREE)) for path in (TREE / ".github").rglob("*.*")]
    text = "\n".join((TREE / page).read_text() for page in pages)
    targets = re.findall(r"^([a-z-]+):", (TREE / "Makefile").read_text(), re.M)
    assert set(re.findall(r"(?:^|`)make ([a-z-]+)", text, re.M)) <= set(targets)
    folders = ("src", "tests", "tools", "docs", "benchmarks", "findings")
    there = [f"/{path.relative_to(TREE)}" for name in folders for path in (TREE / name).rglob("*.*")]
    there += [f"/{path.name}" for path in TREE.iterdir()]
    named = re.findall(r"[`(]((?:[\w-]+/)+(?:[\w.-]+\.\w+)?|[\w-]+\.(?:py|md|toml|txt|cff))[`)]", text)
    missing = [name for name in named if not any(f"/{name}" in path for path in there)]
    assert missing == []
    assert len(named) > 20


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


def test_toys_are_as_small_as_contributing_says() -> None:
    nodes = ast.parse((TREE / "tests" / "test_toys.py").read_text()).body
    sizes = [x.end_lineno - x.lineno + 1 for x in nodes if isinstance(x, ast.ClassDef | ast.FunctionDef)]
    assert len(sizes) >= 6
    assert max(sizes) < 40


def test_the_package_is_light() -> None:
    """What only commands and pictures need is not loaded with `import capsight`."""
    heavy = "('matplotlib', 'typer', 'pydantic', 'capsight.report', 'capsight.evaluation', 'capsight.cli')"
    code = f"import capsight, sys; print([name for name in {heavy} if name in sys.modules])"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"
