"""Minimal pairs against a model whose preferences are known."""

import json
from pathlib import Path

import pytest
import torch

from mogrifier_lm import load_model
from mogrifier_lm.errors import UserError
from mogrifier_lm.launch.commands.pairs import Pair, accuracy_rows, main, score_pairs
from tests.conftest import ROOT

RUN = ROOT / "tests/fixtures/v0/run"


def test_the_likelier_sentence_wins_and_unknown_words_are_left_out() -> None:
    model = load_model(RUN)
    a, b, c = [w for w in model.tokenizer.vocabulary if w not in ("<eos>", "<unk>")][:3]
    with torch.no_grad():  # a unigram model: a is e times as likely as b, b as c
        for parameter in model.parameters():
            parameter.zero_()
        for i, word in enumerate((a, b, c)):
            model.output_bias[model.tokenizer.index[word]] = 9.0 - i
    pairs = [
        Pair(f"{a} {a}", f"{a} {b}", "x"), Pair(f"{c} {a}", f"{b} {b}", "x"),
        Pair(f"{b}", f"{a}", "x"), Pair(f"{a}", f"{b} {b}", "y"), Pair(f"{a}", "Xyzzy", "y"),
    ]  # fmt: skip
    scored = list(score_pairs(model, pairs))
    assert scored[0].bad - scored[0].good == pytest.approx(1, abs=1e-4)
    assert [s.right for s in scored[2:4]] == [0, 1] and not scored[4].known
    x, y, both = accuracy_rows(scored)
    assert (x["phenomenon"], x["pairs"], x["equal length"]) == ("x", "3", "3")
    assert (y["pairs"], y["accuracy"], y["equal length"], y["accuracy there"]) == (
        "1", "100.0%", "0", "",
    )  # fmt: skip
    assert y["left out for <unk>"] == both["left out for <unk>"] == "1"


def test_tables_and_blimps_files_are_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = load_model(RUN).tokenizer.vocabulary[2:4]
    table, lines = tmp_path / "pairs.tsv", tmp_path / "blimp.jsonl"
    table.write_text(f"phenomenon\tgood\tbad\nu\t{a} {b}\t{b} {b}\nv\t{b}\t{a}\n")
    rows = [("u", f"{a} {b}", f"{b} {b}"), ("v", b, a)]
    lines.write_text("".join(
        json.dumps({"sentence_good": g, "sentence_bad": x, "UID": name}) + "\n"
        for name, g, x in rows
    ))  # fmt: skip
    main(run=str(RUN), pairs=str(table), save=str(tmp_path / "scored.tsv"))
    out = capsys.readouterr().out
    main(run=str(RUN), pairs=str(lines))
    assert capsys.readouterr().out == out and out.count("\n") == 5
    saved = (tmp_path / "scored.tsv").read_text().splitlines()
    costs = [sum(w.nats for w in load_model(RUN).score(s)) for s in (f"{a} {b}", f"{b} {b}")]
    assert [float(c) for c in saved[1].split("\t")[3:5]] == pytest.approx(costs, abs=1e-5)
    for text, says in (
        ("a\tb\n", "needs good and bad"), ("good\tbad\nx\n", "a row lacks"),
        ('{"sentence_good": "x"}\n', "no object with"), ("good\tbad\n", "holds no pairs"),
    ):  # fmt: skip
        table.write_text(text)
        with pytest.raises(UserError, match=says):
            main(run=str(RUN), pairs=str(table))
