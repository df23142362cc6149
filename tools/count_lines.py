"""Prints the table of `docs/size.md`: files and lines of each package, and what kind of lines they are."""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path

SOURCE = Path(__file__).resolve().parents[1] / "src" / "capsight"
KINDS = ("files", "lines", "code", "docstrings", "imports", "blank")


def count(path: Path) -> Counter[str]:
    """Lines of one file by kind; what is none of the others is code, comments among it."""
    text = path.read_text(encoding="utf-8")
    kinds = dict.fromkeys(range(1, text.count("\n") + 1), "code")
    kinds |= {number: "blank" for number, line in enumerate(text.splitlines(), 1) if not line.strip()}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            kinds |= dict.fromkeys(range(node.lineno, node.end_lineno + 1), "imports")
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):  # of attributes, too
            kinds |= dict.fromkeys(range(node.lineno, node.end_lineno + 1), "docstrings")
    return Counter(kinds.values()) + Counter(files=1, lines=len(kinds))


def main() -> None:
    """Print a Markdown table, the largest package first."""
    packages: dict[str, Counter[str]] = {}
    for path in sorted(SOURCE.rglob("*.py")):
        inside = path.relative_to(SOURCE).parts[:-1]
        packages.setdefault("/".join(inside[:2]) or "(top)", Counter()).update(count(path))
    rows = sorted(packages.items(), key=lambda row: -row[1]["lines"])
    rows.append(("**all**", sum(packages.values(), Counter())))
    print(f"| package | {' | '.join(KINDS)} |\n|---|{'---:|' * len(KINDS)}")
    for name, counts in rows:
        print(f"| {name} | {' | '.join(f'{counts[kind]:,}' for kind in KINDS)} |")


if __name__ == "__main__":
    main()
