"""What the rounds do, as a table and as pictures."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mogrifier_lm import load_model
from mogrifier_lm.errors import UserError
from mogrifier_lm.launch.commands.gates import main
from mogrifier_lm.reports.gates import _most_moved, plot_interaction
from tests.conftest import ROOT, table_rows

RUN = str(ROOT / "tests/fixtures/v0/run")
VOCABULARY = json.loads((ROOT / "tests/fixtures/v0/run/tokenizer.json").read_text())["words"]
LINE = " ".join(word for word in VOCABULARY[:6] if not word.startswith("<"))


def test_the_table_and_the_pictures_hold_the_models_numbers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    moved, picture = tmp_path / "moved.svg", tmp_path / "rounds.svg"
    main(run=RUN, line=LINE, moved=str(moved), picture=str(picture), word=2, layer=1)
    gates = load_model(RUN).gates(LINE)
    head, _, *rows = table_rows(capsys.readouterr().out)
    assert head[:2] == ["word", "layer 1, round 1 (x)"]
    assert gates.words == ["<eos>", *LINE.split()]
    assert [row[0].replace("\\", "") for row in rows] == gates.words
    shown = np.array([[float(cell) for cell in row[1:]] for row in rows])
    found = gates.moved().transpose(2, 0, 1).reshape(len(rows), -1)
    np.testing.assert_allclose(shown, found, atol=0.0051)
    for word in LINE.split():
        assert f">{word}</text>" in moved.read_text()
    assert f"layer 1 reads «{LINE.split()[1]}» after «{LINE.split()[0]}»" in picture.read_text()
    cells = len(re.findall("<path", picture.read_text()))
    features = sum(min(16, v.shape[1]) for v in gates.inputs[0])
    assert cells > 2 * features, "each strip is made of its cells"
    main(run=RUN, line=LINE, picture=str(tmp_path / "rounds.png"))
    assert (tmp_path / "rounds.png").stat().st_size > 5000
    plot_interaction(replace(gates, zigzag=False), tmp_path / "flat.svg", 0)


def test_features_that_move_most_are_shown_in_their_order() -> None:
    gates = [
        np.array([1.0, 0.1, 1.9, 1.0] + [1.0] * 20),
        np.array([1.0, 1.0, 1.0, 0.5] + [1.0] * 20),
    ]
    chosen = _most_moved(gates, 24)
    assert len(chosen) == 16 and list(chosen) == sorted(chosen) and {1, 2, 3} <= set(chosen)
    assert list(_most_moved([], 3)) == [0, 1, 2]


def test_what_cannot_be_shown_is_one_line() -> None:
    for options, says in (
        ({"word": 90}, "word is 90, it must be between 0 and"),
        ({"layer": 7}, "layer is 7, it must be between 1 and"),
        ({"moved": "x.gif"}, "x.gif must end in .png, .pdf, .svg"),
    ):
        with pytest.raises(UserError, match=says):
            main(run=RUN, line=LINE, **options)  # type: ignore[arg-type]
