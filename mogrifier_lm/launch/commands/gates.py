"""What the rounds of mogrification do while a trained model reads a line.

    python scripts/gates.py run=RUN_DIR line="they said it will rise"              # a table
    python scripts/gates.py run=RUN_DIR line="…" moved=moved.png                   # drawn
    python scripts/gates.py run=RUN_DIR line="…" picture=rounds.svg word=3 layer=1 # a step in parts

How far a round moves x or h is the root mean square of ln(gate) over its features: 0 leaves them as
they are. The picture is of the step that reads word=N, from 1 (default: the last): its strips are
the 16 features of x and of h that are moved most, and the gates on them. Files are png, pdf or svg.
load_model(RUN_DIR).gates(line) has the gates themselves, as arrays.
"""

from functools import partial
from pathlib import Path

from mogrifier_lm.errors import UserError
from mogrifier_lm.launch.cli import script


def main(
    *,
    run: str,
    line: str,
    moved: str = "",
    picture: str = "",
    word: int | None = None,
    layer: int = 1,
    device: str = "auto",
) -> None:
    from mogrifier_lm import load_model
    from mogrifier_lm.reports.gates import plot_interaction, plot_moved
    from mogrifier_lm.reports.plots import FORMATS
    from mogrifier_lm.reports.table import markdown_table

    for file in filter(None, (moved, picture)):
        if Path(file).suffix.removeprefix(".") not in FORMATS:
            raise UserError(f"{file} must end in .{', .'.join(FORMATS)}")
    if not line.strip():
        raise UserError("line= is empty: give a line of text")
    gates = load_model(run, device).gates(line)
    far = gates.moved()
    last = len(gates.words) - 1
    if not far.shape[1]:
        raise UserError(f"{run} has no rounds of mogrification to look at")
    for name, value, least, most in (("word", word, 0, last), ("layer", layer, 1, len(far))):
        if value is not None and not least <= value <= most:
            raise UserError(f"{name} is {value}, it must be between {least} and {most}")
    if moved:
        plot_moved(gates, Path(moved))
    if picture:
        plot_interaction(gates, Path(picture), last if word is None else word, layer)
    rows = [
        {"word": name}
        | {
            f"layer {k}, round {i} ({'h' if i % 2 == 0 else 'x'})": f"{far[k - 1, i - 1, t]:.2f}"
            for k in range(1, len(far) + 1)
            for i in range(1, far.shape[1] + 1)
        }
        for t, name in enumerate(gates.words)
    ]
    print(markdown_table(rows), end="")


command = partial(script, main)
