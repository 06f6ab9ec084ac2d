"""Write docs/options.md, the reference of every option, out of the schemas in options.py.

    python scripts/options.py

A test fails where the page is not what this writes.
"""

import argparse
import dataclasses
import functools
import math
from pathlib import Path
from typing import Any, get_args, get_type_hints

from omegaconf import DictConfig, OmegaConf

from mogrifier_lm.config import Config
from mogrifier_lm.launch.job import compose
from mogrifier_lm.option import Interval

PAGE = Path(__file__).resolve().parent.parent / "docs" / "options.md"
HEAD = """# Options

Every key that `train.py` takes, written by `python scripts/options.py` out of
`mogrifier_lm/options.py` and the evaluators' files. Defaults are those of the schema; where the
files in `configs/` set another, *used* is what `python train.py` runs with (`--cfg job` shows that
of any command). A rate is a probability; a size is a number of features;
a step is one window; nats are natural logarithms. LAMB is the Mogrifier's
released code, github deepmind/lamb; AWD is github salesforce/awd-lstm-lm.
"""


def type_name(hint: Any) -> str:
    parts = [type_name(part) for part in get_args(hint)]
    if getattr(hint, "__origin__", None) is list:
        return f"list of {parts[0]}"
    return " or ".join(parts) if parts else "null" if hint is type(None) else hint.__name__


def span(values: Any) -> str:
    """The values that an option takes."""
    if not isinstance(values, Interval):
        return ", ".join(f"`{choice}`" for choice in values or ())
    signs = {"≥": values.least, ">": values.above, "≤": values.most, "<": values.below}
    ends = {sign: end for sign, end in signs.items() if math.isfinite(end)}
    return ", ".join(f"{s} {v:,}" if isinstance(v, int) else f"{s} {v:g}" for s, v in ends.items())


def default(field: dataclasses.Field[Any]) -> str:
    return shown(field.default_factory() if callable(field.default_factory) else field.default)


def shown(value: Any) -> str:
    return (
        "null" if value is None else str(value).lower() if isinstance(value, bool) else f"{value}"
    )


@functools.cache
def composed() -> DictConfig:
    """What `python train.py` runs with."""
    return compose([])


def rows(schema: type, prefix: str) -> list[str]:
    from mogrifier_lm.cells import CELLS  # here: torch comes with it, which --help does without

    known = {"model.cell": CELLS}  # of what options.py must not import
    lines = []
    for field in dataclasses.fields(schema):
        hint = get_type_hints(schema)[field.name]
        nested = [t for t in (hint, *get_args(hint)) if dataclasses.is_dataclass(t)]
        if nested:
            lines += rows(nested[0], f"{prefix}{field.name}.")
            continue
        cells = [f"`{prefix}{field.name}`", type_name(hint), default(field)]
        used = shown(OmegaConf.select(composed(), f"{prefix}{field.name}"))
        of_run = not prefix.startswith(("evaluators.", "data.expected."))  # else not asked for
        cells.append(used if of_run and used != cells[-1] else "")
        values = span(known.get(f"{prefix}{field.name}", field.metadata["values"]))
        cells += [values, field.metadata["doc"], field.metadata.get("paper", "")]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return lines


def page() -> str:
    """The whole page: a table for each group, the run's own keys last."""
    hints = get_type_hints(Config)
    tables = {
        name: rows(hint, f"{name}.")
        for name, hint in hints.items()
        if hasattr(hint, "__dataclass_fields__")
    }
    tables["run"] = [line for line in rows(Config, "") if "." not in line.split("`")[1]]
    header = "| key | type | default | used | values | | source |\n|---|---|---|---|---|---|---|\n"
    return HEAD + "".join(f"\n## {n}\n\n{header}" + "\n".join(t) + "\n" for n, t in tables.items())


if __name__ == "__main__":
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page(), encoding="utf-8")
