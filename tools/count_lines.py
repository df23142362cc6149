"""Counts the lines of each package and file for `docs/size.md` and `docs/size-files.md`."""

from __future__ import annotations

import ast
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

TREE = Path(__file__).resolve().parents[1]
SOURCE = TREE / "src" / "capsight"
PACKAGES, FILES = TREE / "docs" / "size.md", TREE / "docs" / "size-files.md"
START, END = "<!-- counted by tools/count_lines.py -->", "<!-- /counted -->"
KINDS = ("files", "lines", "code", "docstrings", "imports", "blank")

FOREWORD = """\
<!-- made by tools/count_lines.py; do not edit -->

# Size, file by file

Every file of `src`: its lines, how many of them are code (not docstrings, imports or blank), how many other
files of `src` import it, and what its lines are for, which is the first sentence of the file. Why a package
has its size, and what would make it smaller: [size](size.md). A test fails where a file is missing here
(`python tools/count_lines.py` writes the page).
"""


@dataclass(frozen=True)
class File:
    """One file of `src`.

    Attributes:
        path: below `src/capsight`.
        counts: lines by kind.
        purpose: the first sentence of its docstring.
        imports: names of modules that it may import.
    """

    path: Path
    counts: Counter[str]
    purpose: str
    imports: frozenset[str]

    @classmethod
    def read(cls, path: Path) -> File:
        """Count a file's lines; what is none of the other kinds is code, comments among it."""
        text = path.read_text(encoding="utf-8")
        tree = ast.parse(text)
        kinds = dict.fromkeys(range(1, text.count("\n") + 1), "code")
        kinds |= {number: "blank" for number, line in enumerate(text.splitlines(), 1) if not line.strip()}
        imports: set[str] = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Import | ast.ImportFrom):
                kinds |= dict.fromkeys(range(node.lineno, node.end_lineno + 1), "imports")
                names = [name.name for name in node.names]
                parent = getattr(node, "module", None)
                imports |= {*names} if parent is None else {parent, *(f"{parent}.{name}" for name in names)}
            elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):  # of attributes, too
                kinds |= dict.fromkeys(range(node.lineno, node.end_lineno + 1), "docstrings")
        purpose = (ast.get_docstring(tree) or "").split("\n\n")[0].replace("\n", " ")
        counts = Counter(kinds.values()) + Counter(files=1, lines=len(kinds))
        return cls(path.relative_to(SOURCE), counts, purpose, frozenset(imports))

    @property
    def package(self) -> str:
        """The folder that it is counted in: at most two deep."""
        return "/".join(self.path.parts[:-1][:2]) or "(top)"

    @property
    def module(self) -> str:
        """The name that it is imported by."""
        return ".".join(("capsight", *self.path.with_suffix("").parts)).removesuffix(".__init__")


def by_package(files: list[File]) -> dict[str, list[File]]:
    """Files of each package, the largest package first."""
    packages: dict[str, list[File]] = {}
    for file in files:
        packages.setdefault(file.package, []).append(file)
    return dict(sorted(packages.items(), key=lambda item: -total(item[1])["lines"]))


def total(files: list[File]) -> Counter[str]:
    """Lines of files by kind."""
    return sum((file.counts for file in files), Counter())


def package_table(files: list[File]) -> str:
    """The sums, and a row for each package."""
    sums = total(files)
    rows = [(name, total(part)) for name, part in by_package(files).items()] + [("**all**", sums)]
    lines = [
        f"`src` has {sums['lines']:,} lines in {sums['files']} files; {sums['code']:,} of them are code.",
        "The rest are docstrings (shapes, dtypes, units, errors, sources), imports and blank lines.",
        "",
        f"| package | {' | '.join(KINDS)} |",
        f"|---|{'---:|' * len(KINDS)}",
        *(f"| {name} | {' | '.join(f'{counts[kind]:,}' for kind in KINDS)} |" for name, counts in rows),
    ]
    return "\n".join(lines)


def file_tables(files: list[File]) -> str:
    """A table for each package, the largest file first."""
    lines: list[str] = []
    for name, part in by_package(files).items():
        sums = total(part)
        lines += ["", f"## {name}", "", f"{sums['files']} files, {sums['lines']:,} lines.", ""]
        lines += ["| file | lines | code | imported by | what for |", "|---|---:|---:|---:|---|"]
        for file in sorted(part, key=lambda file: -file.counts["lines"]):
            users = sum(file.module in other.imports for other in files if other is not file)
            cells = (f"`{file.path}`", file.counts["lines"], file.counts["code"], users, file.purpose)
            lines.append("| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Write both pages."""
    files = [File.read(path) for path in sorted(SOURCE.rglob("*.py"))]
    page = PACKAGES.read_text(encoding="utf-8")
    before, after = page.split(START)[0], page.split(END)[1]
    PACKAGES.write_text(f"{before}{START}\n{package_table(files)}\n{END}{after}", encoding="utf-8")
    FILES.write_text(FOREWORD + file_tables(files), encoding="utf-8")


if __name__ == "__main__":
    main()
