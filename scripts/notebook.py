"""The walk-through as a notebook, made from the script that is tested.

    python scripts/notebook.py

reads docs/walkthrough.py, whose cells begin with `# %%`, and writes docs/walkthrough.ipynb.
"""

import argparse
import json
import re
from pathlib import Path
from typing import Any

SCRIPT = Path(__file__).resolve().parent.parent / "docs/walkthrough.py"


def notebook(source: str) -> str:
    """The notebook, as JSON without outputs, of a script in cells."""
    cells: list[dict[str, Any]] = []
    for kind, text in re.findall(r"^# %%(.*)\n((?:(?!# %%).*\n)*)", source, re.M):
        lines = text.strip("\n").splitlines(keepends=True)
        name = f"cell-{len(cells)}"
        if kind.strip() == "[markdown]":
            lines = [re.sub("^# ?", "", line) for line in lines]
            cells.append({"cell_type": "markdown", "id": name, "metadata": {}, "source": lines})
        else:
            lines = [line.replace("  # noqa: E402", "") for line in lines]
            cells.append({"cell_type": "code", "id": name, "metadata": {}, "source": lines,
                          "execution_count": None, "outputs": []})  # fmt: skip
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    page = {"cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(page, indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    target = SCRIPT.with_suffix(".ipynb")
    target.write_text(notebook(SCRIPT.read_text(encoding="utf-8")), encoding="utf-8")
    print(target)
