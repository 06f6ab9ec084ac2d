"""The shape of the code, as scripts/measures.py finds it from the files."""

import runpy
from pathlib import Path
from types import SimpleNamespace

from tests.conftest import ROOT

measures = SimpleNamespace(**runpy.run_path(str(ROOT / "scripts/measures.py")))
MOST_CODE = 4500  # lines of the core, without fast kernels


def test_no_modules_import_each_other_in_a_circle() -> None:
    assert measures.circles(measures.imports()) == []


def test_the_core_imports_no_wing() -> None:
    assert measures.wing_imports(measures.imports()) == []


def test_no_file_is_long() -> None:
    assert measures.long_files() == []


def test_no_function_is_long() -> None:
    assert measures.long_functions() == []


def test_one_file_names_the_files_of_a_run() -> None:
    assert len(measures.spellers()) == 1


def test_the_core_is_small() -> None:
    assert 1000 < measures.sizes()["core"] <= MOST_CODE


def test_the_hour_of_reading_is_one() -> None:
    assert len(measures.hour()) > 20
    assert 1500 < sum(measures.hour().values()) <= 2500


def write(folder: Path, files: dict[str, str]) -> Path:
    """A package of these files."""
    package = folder / "house"
    for name, source in files.items():
        path = package / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    return package


def test_imports_are_found_wherever_they_stand(tmp_path: Path) -> None:
    package = write(tmp_path, {
        "__init__.py": "def f():\n    from house.a import x\n",
        "a.py": "import os\nimport house.folder.b as b\n",
        "folder/__init__.py": "from .b import name\nfrom house import c\n",
        "folder/b.py": "def f():\n    from ..a import x\n    from . import d\n",
        "folder/d.py": "from house.folder import something\nfrom house.folder.deep import e\n",
        "folder/deep/__init__.py": "",
        "folder/deep/e.py": "from ...c import x\nimport household\n",
        "c.py": "",
    })  # fmt: skip
    graph = measures.imports(package)
    assert graph == {
        "": {"a"},
        "a": {"folder.b"},
        "folder": {"folder.b", "c"},
        "folder.b": {"a", "folder.d"},
        "folder.d": {"folder", "folder.deep.e"},
        "folder.deep": set(),
        "folder.deep.e": {"c"},
        "c": set(),
    }
    # One knot: a → b → a, and b → d → folder → b.
    assert measures.circles(graph) == [["a", "folder", "folder.b", "folder.d"]]


def test_circles_are_told_apart() -> None:
    graph = {"a": ["b"], "b": ["a", "c"], "c": ["d"], "d": ["e"], "e": ["c"], "f": ["a"]}
    assert measures.circles(graph) == [["a", "b"], ["c", "d", "e"]]
    assert measures.circles({"a": ["b", "c"], "b": ["c"], "c": []}) == []


def test_wings_are_found_by_their_folders() -> None:
    graph = {
        "runs.run": ["tracking.tracker", "model"],
        "tracking.tracker": ["reports.table", "runs.folder"],
        "model": ["research"],
    }
    assert measures.wing_imports(graph) == [("runs.run", "tracking.tracker")]


def test_lines_of_code_are_those_that_do_something(tmp_path: Path) -> None:
    source = '''"""A module
of two lines."""

# a comment
X = (1,  # another

     2)
"""Of X."""


def f() -> str:
    """Docstring."""
    return """text
that counts"""
'''
    assert measures.code_lines(source) == 5
    package = write(tmp_path, {
        "kernels/__init__.py": "x = 1\n",
        "kernels/loop/reference.py": "x = 1\n" * 2,
        "kernels/loop/native.py": "x = 1\n" * 40,
        "model.py": "x = 1\n" * 4,
        "reports/table.py": "x = 1\n" * 100,
    })  # fmt: skip
    assert measures.sizes(package) == {
        "core": 7, "core and fast kernels": 47, "./": 4, "kernels/": 43, "reports/": 100,
    }  # fmt: skip


def test_long_ones_and_names_of_files_are_found(tmp_path: Path) -> None:
    package = write(tmp_path, {
        "a.py": "def f():\n" + "    x = 1\n" * 80,
        "b.py": "def f():\n" + "    x = 1\n" * 79 + "y = 2\n" * 321,
        "c.py": '"""Writes summary.json."""\n\nX = ("*/config.yaml", "my_summary.json")\n',
    })  # fmt: skip
    assert measures.long_functions(package) == [("a:f", 81)]
    assert measures.long_files(package) == [("b", 401)]
    assert measures.spellers([package]) == {"house/c.py": ["config.yaml"]}
