"""The installed lm-evaluation-harness runs local tasks with a model of this package."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from mogrifier_lm import load_model
from tests.conftest import ROOT

pytest.importorskip("lm_eval", reason='needs pip install "mogrifier_lm[harness]"')
RUN = ROOT / "tests/fixtures/v0/run"
TASKS = {
    "pairs": """
task: pairs
dataset_path: json
dataset_kwargs: {data_files: {validation: FOLDER/pairs.jsonl}}
output_type: multiple_choice
validation_split: validation
doc_to_text: ""
doc_to_target: 0
doc_to_choice: "{{[good, bad]}}"
metric_list: [{metric: acc}]
""",
    "texts": """
task: texts
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/texts.jsonl}}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}]
""",
    "goes_on": """
task: goes_on
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/goes_on.jsonl}}
output_type: generate_until
test_split: test
doc_to_text: "{{text}}"
doc_to_target: "{{next}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 3, do_sample: false}
metric_list: [{metric: exact_match}]
""",
}


def request(*arguments: Any) -> Any:
    from lm_eval.api.instance import Instance

    return Instance("loglikelihood", {}, arguments, 0)


def test_likelihoods_are_the_models() -> None:
    from mogrifier_lm.inference.harness import HarnessModel

    model, known = HarnessModel(str(RUN), device="cpu"), load_model(RUN)
    a, b, c = known.tokenizer.vocabulary[2:5]
    best = known.next_word(f"{a} {b}", 1)[0][0]

    def expected(text: str) -> list[float]:
        """ln p of each token, from the distributions themselves."""
        ids = known.tokenizer.encode(text.split("\n"))[:-1].tolist()
        log_p, _ = known(torch.tensor([known.tokenizer.eos_id, *ids])[:, None])
        return [log_p[i, 0, token].item() for i, token in enumerate(ids)]

    cases = [
        (f"{a} {b}", f" {c} {a}", 2), (f"{a} {b}", f" {best}", 2), ("", f"{a} {b} {c}", 0),
        (f"{a}\n{b}", f"\n{c}", 3), (f"{a} {b[:1]}", f"{b[1:]} {c}", 1),
    ]  # fmt: skip
    found = model.loglikelihood([request(x, y) for x, y, _ in cases])
    for (context, more, before), (log_p, _) in zip(cases, found, strict=True):
        assert log_p == pytest.approx(sum(expected(context + more)[before:]), rel=1e-4)
    assert found[1][1] and not all(greedy for _, greedy in found)
    (rolling,) = model.loglikelihood_rolling([request(f"{a} {b}\n{c}")])
    assert rolling == pytest.approx(sum(expected(f"{a} {b}\n{c}")), rel=1e-4)
    (text,) = model.generate_until([request(f"{a} {b}", {"until": ["\n"], "max_gen_toks": 4})])
    (greedy,) = known.generate(f"{a} {b}", max_words=4, top_k=1)
    assert text.strip() == greedy.split("\n")[0].strip()


@pytest.mark.slow
def test_its_command_line_runs_local_tasks(tmp_path: Path) -> None:
    known = load_model(RUN)
    words = [w for w in known.tokenizer.vocabulary if w not in ("<eos>", "<unk>")][:6]
    pairs = [{"good": f"{a} {b}", "bad": f"{b} {a}"} for a in words for b in words if a < b]
    texts = [{"text": " ".join(words)}, {"text": f"{words[3]} {words[1]}"}]
    greedy = [known.generate(a, max_words=3, top_k=1)[0].split("\n")[0] for a in words]
    goes_on = [
        {"text": a, "next": f" {g}" if g else ""} for a, g in zip(words, greedy, strict=True)
    ]
    for name, rows in (("pairs", pairs), ("texts", texts), ("goes_on", goes_on)):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{name}.jsonl").write_text(lines)
        (tmp_path / f"{name}.yaml").write_text(TASKS[name].replace("FOLDER", str(tmp_path)))
    done = subprocess.run(
        [
            sys.executable, "-m", "mogrifier_lm.inference.harness", "run", "--model",
            "mogrifier_lm", "--model_args", f"run={RUN}", "--device", "cpu", "--include_path",
            str(tmp_path), "--tasks", *TASKS, "--output_path", str(tmp_path / "out"),
        ],
        cwd=ROOT, capture_output=True, text=True,
        env=os.environ | {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    (file,) = (tmp_path / "out").rglob("results*.json")
    results = json.loads(file.read_text())["results"]

    def nats(text: str) -> float:
        return sum(word.nats for word in list(known.score(text))[:-1])

    right = [nats(pair["good"]) < nats(pair["bad"]) for pair in pairs]
    assert results["pairs"]["acc,none"] == pytest.approx(sum(right) / len(right))
    sums = sum(nats(text["text"]) for text in texts) / 8
    assert results["texts"]["word_perplexity,none"] == pytest.approx(math.exp(sums), rel=1e-4)
    assert results["goes_on"]["exact_match,none"] == 1.0
