"""A trained model reads and writes text: the three lines of the README and what is behind them."""

import io
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from mogrifier_lm import load_model
from mogrifier_lm.data import Tokenizer
from mogrifier_lm.data.subwords import SentencePieceTokenizer
from mogrifier_lm.data.tokenizer import CharTokenizer
from mogrifier_lm.errors import UserError
from mogrifier_lm.evaluators.static import static_nats
from mogrifier_lm.inference.counts import read_counts, training_counts, write_counts
from mogrifier_lm.inference.gates import gates
from mogrifier_lm.inference.lines import Line, read_tsv
from mogrifier_lm.inference.score import Totals, score_lines, write_tsv
from mogrifier_lm.inference.trained import TrainedModel
from mogrifier_lm.kernels.recurrence.reference import mogrify
from mogrifier_lm.launch.commands.score import main as score_command
from mogrifier_lm.options import ModelConfig
from mogrifier_lm.runs.build import build_model
from mogrifier_lm.runs.folder import RunFolder
from tests.conftest import ROOT

RUN = ROOT / "tests/fixtures/v0/run"
TEXT = (ROOT / "tests/fixtures/v0/text/test.txt").read_text()


@pytest.fixture(scope="module")
def lm() -> TrainedModel:
    return load_model(RUN)


@pytest.fixture(scope="module")
def subwords() -> TrainedModel:
    return build_trained(SentencePieceTokenizer.train([b"abc ab a b c bc\n" * 9], vocab_size=266))


def build_trained(tokenizer: Tokenizer) -> TrainedModel:
    """A model of chance, as if it was loaded."""
    torch.manual_seed(0)
    model = build_model(ModelConfig(hidden_size=12, rounds=2), len(tokenizer))
    model.__class__ = TrainedModel
    with torch.no_grad():
        model.output_bias.normal_()
    model.tokenizer, model.folder = tokenizer, RunFolder("nowhere")
    assert isinstance(model, TrainedModel)
    return model.eval()


def static(lm: TrainedModel, text: str) -> np.ndarray:
    ids = lm.tokenizer.encode(text.splitlines())
    return static_nats(lm, ids, lm.tokenizer.eos_id).double().numpy()


def test_the_text_as_the_unit_is_the_static_evaluator(lm: TrainedModel) -> None:
    assert not lm.training
    text = TEXT * 4  # more than one window
    scores = lm.score(text, unit="text")
    assert [word.nats for word in scores] == static(lm, text).tolist()
    assert scores.totals.nats == pytest.approx(static(lm, text).sum())
    assert [w.word for w in scores] == [
        w for line in text.splitlines() for w in [*line.split(), "<eos>"]
    ]


def test_the_command_prints_the_static_evaluators_nats(
    lm: TrainedModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = ROOT / "tests/fixtures/v0/text/test.txt"
    score_command(run=str(RUN), text=str(path), unit="text", to=str(tmp_path / "out.tsv.gz"))
    expected = static(lm, TEXT)
    said = f"unit=text: {len(expected):,} words, {expected.sum():.4f} nats"
    assert said in capsys.readouterr().err
    frame = pd.read_csv(tmp_path / "out.tsv.gz", sep="\t", keep_default_na=False, quoting=3)
    np.testing.assert_allclose(frame["nats"], expected, atol=5e-7)


def test_a_run_knows_how_often_each_word_was_in_its_training_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, subwords: TrainedModel
) -> None:
    monkeypatch.chdir(ROOT / "tests/fixtures/v0")
    train = Path("text/train.txt").read_text()
    counts = load_model(RUN).counts
    assert counts is not None and counts["<eos>"] == train.count("\n")
    assert all(counts[word] == n for word, n in Counter(train.split()).items() if word in counts)
    # Of pieces, words are counted; what was written is read again.
    tokenizer, folder = subwords.tokenizer, RunFolder(tmp_path)
    found = training_counts(tokenizer, tokenizer.encode(["abc ab abc", "é"]))
    assert dict(found) == {"abc": 2, "ab": 1, "é": 1, "<eos>": 2}
    write_counts(folder, tokenizer, found)
    assert read_counts(folder, tokenizer) == found


def test_a_line_as_the_unit_knows_no_other_line(lm: TrainedModel) -> None:
    lines = [*TEXT.splitlines()[:9], ""]
    scores = lm.score(lines)
    alone = np.concatenate([static(lm, f"{line}\n") for line in lines])
    np.testing.assert_allclose([word.nats for word in scores], alone, rtol=1e-5)
    assert [(w.sentence, w.position) for w in scores][-1] == (10, 1)
    items = ["a"] * 4 + ["b"] * 6
    by_item = [word.nats for word in lm.score(lines, "item", items=items)]
    both = [static(lm, "\n".join(part) + "\n") for part in (lines[:4], lines[4:])]
    np.testing.assert_allclose(by_item, np.concatenate(both), rtol=1e-5)
    again = score_lines(
        lm, lm.tokenizer, (Line(line) for line in lines * 200), "line"
    )  # many batches
    assert [w.sentence for w in again if w.word == "<eos>"] == list(range(1, 2001))


def test_entropy_and_rank_are_of_the_distribution_that_predicts(lm: TrainedModel) -> None:
    line = TEXT.splitlines()[1]
    ids = lm.tokenizer.encode([line]).tolist()
    log_p, _ = lm(torch.tensor([lm.tokenizer.eos_id, *ids[:-1]])[:, None])
    for word, token, p in zip(lm.score(line, top=3), ids, log_p[:, 0].double(), strict=True):
        assert word.surprisal == pytest.approx(-p[token].item() / math.log(2), rel=1e-4)
        assert word.entropy == pytest.approx(-(p.exp() * p).sum().item() / math.log(2), rel=1e-4)
        assert word.rank == 1 + int((p > p[token]).sum())
        best = p.topk(3).indices.tolist()
        assert word.guesses == tuple(lm.tokenizer.vocabulary[i] for i in best)


def test_what_is_unknown_is_counted(lm: TrainedModel) -> None:
    known = TEXT.split()[0]
    scores = lm.score([f"{known} Xyzzy"])
    assert [w.unk for w in scores] == [False, "<unk>" in lm.tokenizer.index, False]
    assert "1 (33.3%) scored as <unk>" in str(scores.totals) and "warning" in str(scores.totals)
    assert lm.unknown(f"{known} Xyzzy") == ["Xyzzy"]


def test_tables_are_read_by_pandas_and_from_columns(lm: TrainedModel) -> None:
    lines = [Line("<unk> NA", "7"), Line(TEXT.splitlines()[0], "8")]
    table, totals = io.StringIO(), Totals()
    write_tsv(totals.watch(score_lines(lm, lm.tokenizer, lines, "item")), table)
    table.seek(0)
    frame = pd.read_csv(table, sep="\t", keep_default_na=False, quoting=3)
    direct = lm.score([line.text for line in lines], "item", items=["7", "8"]).to_dataframe()
    assert list(frame) == list(direct)[:-1] and len(frame) == totals.words == len(direct)
    np.testing.assert_allclose(frame["nats"], direct["nats"], atol=1e-6)
    assert frame["word"].tolist() == direct["word"].tolist()
    rows = ["id\tsentence", "3\ta b", "4\t"]
    assert list(read_tsv(rows, "sentence", "id", "x")) == [Line("a b", "3"), Line("", "4")]
    with pytest.raises(UserError, match="x has no column words, its columns are id, sentence"):
        list(read_tsv(rows, "words", "", "x"))


def test_a_word_in_pieces_ends_where_no_further_piece_follows(subwords: TrainedModel) -> None:
    line, t = "abcabc é a bcb", subwords.tokenizer
    ids = t.encode([line]).tolist()
    log_p, _ = subwords(torch.tensor([t.eos_id, *ids[:-1]])[:, None])
    p = log_p[:, 0].double()
    begins = torch.from_numpy(t.starts)
    left, right = (subwords.score(line, edge=edge) for edge in ("left", "right"))
    assert [w.word for w in right] == [*line.split(), "<eos>"]
    starts = [i for i, token in enumerate(ids) if t.starts[token]]
    for k, start in enumerate(starts):
        stop = starts[k + 1] if k + 1 < len(starts) else len(ids)
        raw = -sum(p[i, ids[i]].item() for i in range(start, stop))
        assert left.words[k].nats == pytest.approx(raw, rel=1e-4)
        edge = lambda i: -p[i, begins].logsumexp(0).item()  # noqa: E731
        after = edge(stop) if stop < len(ids) else 0.0
        before = edge(start) if start else 0.0
        assert right.words[k].nats == pytest.approx(raw + after - before, rel=1e-4, abs=1e-5)
    assert left.totals.nats == pytest.approx(right.totals.nats)
    assert max(abs(a.nats - b.nats) for a, b in zip(left, right, strict=True)) > 0.01


def test_text_is_drawn_as_asked(lm: TrainedModel) -> None:
    prompt = " ".join(TEXT.split()[:3])
    (greedy,) = lm.generate(prompt, max_words=6, top_k=1)
    words = prompt.split()
    for word in greedy.replace("\n", " <eos> ").split():
        best = [w for w, _ in lm.next_word(" ".join(words), 3) if w != "<unk>"][0]
        assert word == best
        if word == "<eos>":
            break
        words.append(word)
    texts = lm.generate(prompt, number=5, max_words=12, seed=3)
    assert texts == lm.generate(prompt, number=5, max_words=12, seed=3)
    assert len(set(texts)) > 1 and "<unk>" not in " ".join(texts)
    assert all(len(t.replace("\n", " <eos> ").split()) == 12 for t in texts)
    for text in lm.generate(number=20, max_words=30, stop=True):
        assert text.count("\n") <= 1 and "\n" not in text[:-1]
    assert lm.generate(top_p=1e-9, max_words=5) == lm.generate(top_k=1, max_words=5)
    for wrong in ({"temperature": 0.0}, {"top_p": 0.0}, {"top_k": 0}, {"max_words": 0}):
        with pytest.raises(UserError, match=f"{next(iter(wrong))}.* must be"):
            lm.generate(**wrong)  # type: ignore[arg-type]


def test_top_p_and_top_k_draw_from_the_likeliest(subwords: TrainedModel) -> None:
    likely = [name for name, _ in subwords.next_word("a", 266)]
    p = np.cumsum([p for _, p in subwords.next_word("a", 266)])
    for options, allowed in (({"top_k": 3}, 3), ({"top_p": 0.3}, int((p < 0.3).sum()) + 1)):
        drawn = {
            subwords.tokenizer.vocabulary[t]
            for (t,) in (next(subwords.stream("a", seed=s, unk=True, **options)) for s in range(60))
        }
        assert drawn <= set(likely[:allowed]) and len(drawn) > 1


def test_a_text_grows_as_it_is_drawn_by_what_belongs_to_it(
    lm: TrainedModel, subwords: TrainedModel, tmp_path: Path
) -> None:
    characters = build_trained(CharTokenizer.train([b"the cat\n"] * 2))
    for model, prompt, begun in (
        (lm, "Xyzzy  it\nwas", "Xyzzy it\nwas"),
        (subwords, "abc  é ab", "abc é ab"),
        (characters, "the c", "the c"),
    ):
        asked: dict[str, Any] = {"max_words": 30, "temperature": 2.0, "unk": True}
        first, *pieces = model.continued(prompt, number=2, **asked)
        drawn = list(model.stream(prompt, number=2, **asked))
        assert first == [begun] * 2 and len(pieces) == len(drawn)
        ids = model.tokenizer.encode([*prompt.split("\n")[:-1], prompt.split("\n")[-1]])[:-1]
        for i in range(2):
            own = [step[i] for step in drawn if step[i] is not None]
            whole, head = (model.tokenizer.decode([*ids, *more]) for more in (own, []))
            grown = "".join(piece[i] for piece in pieces)
            assert whole[len(head) :].startswith(grown), "but for bytes without an end"
            assert len(whole) - len(head) - len(grown) < 4
    assert any(" " not in piece for (piece, _) in subwords.continued("ab", number=2, max_words=9))


@pytest.mark.parametrize("zigzag", [True, False])
def test_gates_are_what_each_round_multiplies(lm: TrainedModel, zigzag: bool) -> None:
    torch.manual_seed(1)
    config = ModelConfig(hidden_size=6, rounds=3, num_layers=2, zigzag=zigzag)
    model = build_model(config, len(lm.tokenizer))
    line = TEXT.splitlines()[0]
    found = gates(model, lm.tokenizer, line)
    ids = lm.tokenizer.encode([line])[:-1]
    assert found.words == ["<eos>", *lm.tokenizer.decode_words(ids)]
    assert found.moved().shape == (2, 3, len(found.words))
    x = model.embedding_weight[lm.tokenizer.encode(["", line]).tolist()[:-1]][:, None]
    for layer, rounds in zip(model.layers, found.layers, strict=True):
        output, _ = layer(x, layer.zero_state(1))
        h = torch.cat([torch.zeros(1, 1, 6), output[:-1]])
        x_in, h_in = mogrify(x.flatten(0, 1), h.flatten(0, 1), layer.weights().rounds, zigzag)
        gate = [torch.from_numpy(g) for g in rounds]
        torch.testing.assert_close(gate[0] * gate[2] * x[:, 0], x_in)
        torch.testing.assert_close(gate[1] * h[:, 0], h_in)
        x = output


def test_what_is_no_model_is_one_line(tmp_path: Path, lm: TrainedModel) -> None:
    for source, says in (("nowhere", "no folder nowhere"), (tmp_path, "no config.yaml in")):
        with pytest.raises(UserError, match=says):
            load_model(source)
    for call, says in (
        (lambda: lm.score(""), "no text to score"),
        (lambda: lm.score("a", unit="word"), "unit is 'word'"),
        (lambda: lm.score("a", edge="top"), "edge is 'top'"),
        (lambda: lm.score(["a", "b"], items=["x"]), "an item for each line"),
    ):
        with pytest.raises(UserError, match=says):
            call()
