"""Measures of the code's shape: sizes, circles, and who knows what.

    python scripts/measures.py

Code lines are counted without docstrings, comments and blank lines. The core is what trains and
scores a model; the wings (WINGS) look at it and it never at them. A kernel that is not the
definition (reference.py) is counted beside the core.
"""

import argparse
import ast
import io
import re
import tokenize
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "mogrifier_lm"
WINGS = ("inference", "launch", "library", "reports", "search", "texts", "tracking")
MOST_LINES, MOST_LINES_OF_FUNCTION = 400, 80
# Of a run's folder; not tokenizer.json, which lies beside cached tokens too.
RUN_FILES = (
    "summary.json", "config.yaml", "overrides.json", "metrics.jsonl", "provenance.json",
    "tuning.json", "checkpoints", "curves.png", "train.log", "counts.json",
    "statistics.safetensors",
)  # fmt: skip


def modules(package: Path = PACKAGE) -> dict[str, Path]:
    """Dotted name inside the package → file; that of a folder is its __init__.py, "" the root's."""
    return {
        ".".join(path.relative_to(package).with_suffix("").parts)
        .removesuffix("__init__")
        .strip("."): path
        for path in sorted(package.rglob("*.py"))
    }


def imports(package: Path = PACKAGE) -> dict[str, set[str]]:
    """Module → the modules of the package that it imports, wherever in it the statement stands.

    What `if TYPE_CHECKING:` holds back is counted too: to know a module's types is to know it.
    """
    names, found = modules(package), {}
    for name, path in names.items():
        inside = name if path.name == "__init__.py" else name.rpartition(".")[0]
        wanted = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                wanted |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                base = node.module or ""
                if node.level:
                    parts = [package.name, *filter(None, inside.split("."))]
                    base = ".".join([*parts[: len(parts) + 1 - node.level], *filter(None, [base])])
                # `from package import name`: a module, or what a module holds.
                wanted |= {f"{base}.{alias.name}" for alias in node.names}
        found[name] = {_module(full, package.name, names) for full in wanted} - {None, name}
    return found  # type: ignore[return-value]


def _module(full: str, package: str, names: Mapping[str, Path]) -> str | None:
    """The module that holds an imported name; None outside the package."""
    if full != package and not full.startswith(f"{package}."):
        return None
    name = full.removeprefix(package).strip(".")
    while name not in names:
        name = name.rpartition(".")[0]
    return name


def circles(graph: Mapping[str, Iterable[str]]) -> list[list[str]]:
    """The sets of two or more modules that import each other, directly or on the way."""
    reached: dict[str, set[str]] = {}
    for start in graph:
        seen, todo = set(), list(graph[start])
        while todo:
            name = todo.pop()
            if name not in seen:
                seen.add(name)
                todo += graph.get(name, ())
        reached[start] = seen
    sets = {
        frozenset(b for b in reached[a] if a in reached.get(b, ()))
        for a in graph
        if a in reached[a]
    }
    return sorted(sorted(members) for members in sets)


def wing_imports(graph: Mapping[str, Iterable[str]]) -> list[tuple[str, str]]:
    """Imports of a wing by the core, as (importer, imported)."""
    return sorted(
        (name, other)
        for name, others in graph.items()
        for other in others
        if not in_wing(name) and in_wing(other)
    )


def in_wing(module: str) -> bool:
    return module.partition(".")[0] in WINGS


def is_fast_kernel(module: str, path: Path) -> bool:
    """Whether a module is what kernels/ has beside the definitions."""
    return module.startswith("kernels.") and path.name not in ("reference.py", "__init__.py")


def code_lines(source: str) -> int:
    """Lines that hold code: no blank ones, comments or docstrings."""
    skipped = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
    skipped |= {tokenize.ENCODING, tokenize.ENDMARKER}
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in skipped:
            lines |= set(range(token.start[0], token.end[0] + 1))
    return len(lines - set(_docstring_lines(source)))


def _docstring_lines(source: str) -> Iterator[int]:
    """Lines of strings that stand alone: docstrings, and those below an attribute."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            if isinstance(node.value.value, str):
                yield from range(node.lineno, (node.end_lineno or node.lineno) + 1)


def long_functions(package: Path = PACKAGE) -> list[tuple[str, int]]:
    """Functions over MOST_LINES_OF_FUNCTION lines, as (module:name, lines), the longest first."""
    found = []
    for name, path in modules(package).items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > MOST_LINES_OF_FUNCTION:
                    found.append((f"{name}:{node.name}", lines))
    return sorted(found, key=lambda item: -item[1])


def long_files(package: Path = PACKAGE) -> list[tuple[str, int]]:
    """Files over MOST_LINES lines, as (module, lines), the longest first."""
    counts = {
        name: len(path.read_text(encoding="utf-8").splitlines())
        for name, path in modules(package).items()
    }
    return sorted(((k, n) for k, n in counts.items() if n > MOST_LINES), key=lambda item: -item[1])


def hour(readme: Path = ROOT / "README.md", package: Path = PACKAGE) -> dict[str, int]:
    """File → code lines of what README lists for an hour's reading, in its order."""
    section = (
        readme.read_text(encoding="utf-8").partition("## Reading the code")[2].partition("\n## ")[0]
    )
    names = re.findall(r"`([\w/]+\.py)`", "".join(re.findall(r"^\d+\. .*$", section, re.M)))
    return {name: code_lines((package / name).read_text(encoding="utf-8")) for name in names}


def spellers(folders: Iterable[Path] = (PACKAGE, ROOT / "scripts")) -> dict[str, list[str]]:
    """File → the names of files of a run's folder that stand in its code, docstrings left out."""
    found = {}
    for path in (path for folder in folders for path in sorted(folder.rglob("*.py"))):
        if path == Path(__file__).resolve():
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        alone = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        parts = {
            part
            for node in ast.walk(tree)
            if isinstance(node, ast.Constant) and isinstance(node.value, str)
            if id(node) not in alone
            for part in node.value.split("/")
        }
        if spelt := [file for file in RUN_FILES if file in parts]:
            found[f"{path.parent.name}/{path.name}"] = spelt
    return found


def sizes(package: Path = PACKAGE) -> dict[str, int]:
    """Code lines of the core without and with fast kernels, and of each folder."""
    totals: dict[str, int] = {"core": 0, "core and fast kernels": 0}
    folders: dict[str, int] = {}
    for name, path in modules(package).items():
        lines = code_lines(path.read_text(encoding="utf-8"))
        folder = path.relative_to(package).parts[0] if path.parent != package else "."
        folders[folder] = folders.get(folder, 0) + lines
        if not in_wing(name):
            totals["core and fast kernels"] += lines
            totals["core"] += 0 if is_fast_kernel(name, path) else lines
    return totals | {f"{folder}/": lines for folder, lines in sorted(folders.items())}


def main() -> None:
    graph = imports()
    for what, lines in sizes().items():
        print(f"{lines:6,}  {what}")
    print(f"{sum(hour().values()):6,}  the hour's reading, {len(hour())} files")
    found = {
        f"files over {MOST_LINES} lines": [f"{name} {n}" for name, n in long_files()],
        f"functions over {MOST_LINES_OF_FUNCTION} lines": [f"{k} {n}" for k, n in long_functions()],
        "circles": [" - ".join(members) for members in circles(graph)],
        "imports of a wing by the core": [f"{a} -> {b}" for a, b in wing_imports(graph)],
        "files that spell a file of a run": [f"{k}: {', '.join(v)}" for k, v in spellers().items()],
    }
    for title, items in found.items():
        print(f"\n{title}: {len(items)}")
        print("".join(f"  {item}\n" for item in items), end="")


if __name__ == "__main__":
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    main()
