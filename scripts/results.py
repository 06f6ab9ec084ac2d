"""Write the tables of results/README.md, and of README.md, out of the files beside the former.

    python scripts/results.py

A table stands between `<!-- table NAME -->` and `<!-- end -->` on the page; what is between them is
written anew. No figure of such a table is typed. Tokens per second are left out: other work held
the cores in most of these runs.
"""

import argparse
import csv
import json
import re
import shlex
from collections.abc import Iterable
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

import yaml

from mogrifier_lm.files import read_json
from mogrifier_lm.reports import plots
from mogrifier_lm.reports.table import markdown_table
from mogrifier_lm.runs.folder import RunFolder

FOLDER = Path(__file__).resolve().parent.parent / "results"
BLOCK = re.compile(r"(<!-- table (.+?) -->\n).*?(<!-- end -->)", re.DOTALL)
# Not part of what a run is.
PLACES = ("tracker", "hydra.", "data.dir=", "data.cache_dir=")
# Of an evaluator's entry, beside its figures.
SHOWN = ("temperature", "lr", "decay", "weight", "theta", "window", "passes", "scale")


def run(name: str) -> RunFolder:
    return RunFolder(FOLDER / name)


def command_of(arguments: list[str]) -> str:
    kept = [a for a in arguments[1:] if not a.startswith(PLACES)]
    return f"`python train.py {shlex.join(kept)}`"


def commit_of(git: dict[str, Any]) -> str:
    """With a mark where the checkout differed; files that git does not know are no change."""
    return git["commit"][:7] + " and changes" * bool(git["diff"])


def run_rows(*names: str) -> list[dict[str, str]]:
    """A row per folder of results/, scored by the static evaluator."""
    rows = []
    for name in names:
        summary, facts = run(name).read_summary(), read_json(run(name).provenance)
        git = facts["git"]
        minutes = summary["seconds"] / 60
        static = [summary[split]["static"] for split in ("valid", "test")]
        rows.append(
            {
                "run": command_of(facts["command"]),
                "files": f"{name}/",
                "commit": commit_of(git),
                "on": f"{facts['device']}, {facts['cpu']['threads']} thread",
                "parameters": f"{summary['params']:,}",
                "tokens": f"{summary['tokens'] / 1e6:.1f} M",
                "epochs": f"{summary['epochs']:.1f}",
                "minutes": f"{minutes:.0f}",
                "temperature": f"{temperature(name, static[1]):.3g}",
                "validation": f"{static[0]['ppl']:.2f}",
                "test": f"{static[1]['ppl']:.2f}",
                "n": f"1 (seed {summary['seed']})",
            }
        )
    return rows


def temperature(name: str, entry: dict[str, Any]) -> float:
    """What divides the logits; configs without a version had a factor on them."""
    config = yaml.safe_load(run(name).config.read_text(encoding="utf-8"))
    value = float(entry.get("temperature", 1.0))
    return value if "version" in config else 1 / value


def evaluator_rows(name: str) -> list[dict[str, str]]:
    """A row per evaluator of a run, with the settings that were chosen."""
    summary = run(name).read_summary()
    rows = []
    for evaluator, entry in summary["test"].items():
        chosen = {
            k: entry[k] for k in SHOWN if k in entry and evaluator not in ("static", "rounds")
        }
        if "temperature" in entry:
            chosen["temperature"] = temperature(name, entry)
        settings = ", ".join(f"{k} {float(f'{v:.3g}'):,g}" for k, v in chosen.items())
        for key in (k for k in entry if k.endswith("ppl") and k != "token_ppl"):
            variant = key.removesuffix("ppl").rstrip("_").replace("_", " ")
            share = entry[key] / summary["test"]["static"]["ppl"] - 1
            rows.append(
                {
                    "evaluator": f"{evaluator} {variant}".strip(),
                    "validation": f"{summary['valid'][evaluator][key]:.2f}",
                    "test": f"{entry[key]:.2f}",
                    "test beside static": f"{share:+.1%}",
                    "settings": settings if key == "ppl" else "",
                }
            )
    return rows


def sweep_rows(name: str, key: str) -> list[dict[str, str]]:
    """A row per value of a swept key: mean ± sample standard deviation over seeds."""
    with open(FOLDER / name / "sweep.csv", newline="", encoding="utf-8") as file:
        runs = list(csv.DictReader(file))
    rows = []
    for value in dict.fromkeys(run[key] for run in runs):
        group = [run for run in runs if run[key] == value and run["status"] == "completed"]
        row = {key.rpartition(".")[2]: value}
        row["hidden size"], row["parameters"] = (
            group[0]["hidden_size"],
            f"{int(group[0]['params']):,}",
        )
        row["n"] = str(len(group))
        for split in ("valid", "test"):
            scores = [float(run[f"{split}/static/ppl"]) for run in group]
            row[{"valid": "validation"}.get(split, split)] = spread(scores)
        rows.append(row)
    return rows


def grid_rows(name: str) -> list[dict[str, str]]:
    """A row per run below a folder, by rounds, then best first, with what was searched over."""
    rows = []
    for path in (FOLDER / name).glob("*/"):
        summary, facts = RunFolder(path).read_summary(), read_json(RunFolder(path).provenance)
        given = dict(a.split("=", 1) for a in facts["command"][1:])
        valid, test = (summary[split]["static"]["ppl"] for split in ("valid", "test"))
        rows.append(
            {
                "rounds": str(summary["rounds"]),
                "learning rate": given["optimizer.lr"],
                "dropout": given["regularization.input_dropout"],
                "state dropout": given["regularization.state_dropout"],
                "parameters": f"{summary['params']:,}",
                "epochs": f"{summary['epochs']:.0f}",
                "validation": f"{valid:.2f}",
                "test": f"{test:.2f}",
            }
        )
    return sorted(rows, key=lambda row: (row["rounds"], float(row["validation"])))


def settings(name: str) -> dict[str, list[RunFolder]]:
    """The runs SETTING,seed=S below a folder, by setting."""
    groups: dict[str, list[RunFolder]] = {}
    for path in sorted((FOLDER / name).glob("*,seed=*/")):
        groups.setdefault(path.name.rpartition(",seed=")[0], []).append(RunFolder(path))
    return groups


def ppls(runs: Iterable[RunFolder], split: str) -> list[float]:
    """Of the static evaluator at temperature 1."""
    entries = [run.read_summary()[split]["static"] for run in runs]
    assert all(entry["temperature"] == 1 for entry in entries)
    return [entry["ppl"] for entry in entries]


def spread(values: list[float], digits: int = 2) -> str:
    """Mean ± sample standard deviation; the value where it is one."""
    deviation = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{fmean(values):.{digits}f}{deviation}"


def front_rows(name: str) -> list[dict[str, str]]:
    """The rounds of `settings` that three seeds were trained of."""
    return [
        {
            "rounds": setting.removeprefix("rounds=").replace("0", "0 (LSTM)"),
            "validation": spread(ppls(runs, "valid"), 1),
            "test": spread(ppls(runs, "test"), 1),
        }
        for setting, runs in settings(name).items()
        if len(runs) > 2
    ]


def seed_rows(name: str) -> list[dict[str, str]]:
    """A row per setting of `settings`: mean ± sample standard deviation over seeds.

    SETTING.json, of `evaluate.py compare=[[its runs],[those of the baseline]] out=`, has its
    difference to the baseline.
    """
    rows = []
    for setting, runs in settings(name).items():
        summaries = [run.read_summary() for run in runs]
        git = [read_json(run.provenance)["git"] for run in runs]
        row = {
            "": setting,
            "hidden size": str(summaries[0]["hidden_size"]),
            "parameters": f"{summaries[0]['params']:,}",
            "epochs": f"{summaries[0]['epochs']:.0f}",
            "commit": ", ".join(sorted(set(map(commit_of, git)))),
            "minutes": f"{median(s['seconds'] for s in summaries) / 60:.0f}",
            "n": str(len(runs)),
        }
        for split, shown in (("valid", "validation"), ("test", "test")):
            row[shown] = spread(ppls(runs, split))
        compared = read_json(FOLDER / name / f"{setting}.json")
        for split, shown in (("valid", "validation"), ("test", "test")):
            row[f"nats, {shown}"] = ""
            if compared:
                mean, (low, high) = map(compared["static"][split].get, ("difference", "interval"))
                row[f"nats, {shown}"] = f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]"
        rows.append(row)
    return rows


def curve_rows(*names: str) -> list[dict[str, str]]:
    """Validation while training at equal epochs, a row for each that all of the runs have."""
    curves = []
    for name in names:
        curve: dict[str, float] = {}
        for epoch, ppl in validation(name).items():
            curve.setdefault(f"{epoch:.1f}".removesuffix(".0"), ppl)
        curves.append(curve)
    common = [e for e in curves[0] if all(e in curve for curve in curves)]
    rows = []
    for e in common[:: max(1, len(common) // 8)]:
        row = {"epochs": e}
        for name, curve in zip(names, curves, strict=True):
            row[name] = f"{curve[e]:.2f}"
        rows.append(row)
    return rows


def piece_rows(name: str, base: str) -> list[dict[str, str]]:
    """A row per file of a folder, best first, beside that of `base`: those of one length."""
    files = {path.stem: read_json(path) for path in sorted((FOLDER / name).glob("*.json"))}
    start = files[base]["summary"]["valid"]["static"]["ppl"]
    same = [k for k in files if k.startswith("epoch") == base.startswith("epoch")]
    rows = []
    for key in sorted(same, key=lambda k: files[k]["summary"]["valid"]["static"]["ppl"]):
        found = files[key]
        valid, test = (found["summary"][split]["static"]["ppl"] for split in ("valid", "test"))
        arguments = shlex.split(found["command"])[2:]
        skipped = ("experiment=", "trainer.threads=", "trainer.max_epochs=", *PLACES)
        overrides = [a for a in arguments if not a.startswith(skipped)]
        rows.append(
            {
                "piece": f"{key}.json",
                "overrides": f"`{' '.join(overrides)}`",
                "commit": found["commit"],
                "parameters": f"{found['summary']['params']:,}",
                "step time": f"{found['step_time']['ratio']:.2f}",
                "validation": f"{valid:.2f}",
                "test": f"{test:.2f}",
                f"beside {base}": f"{valid - start:+.2f}",
            }
        )
    return rows


def table(asked: str) -> str:
    """The table that the page asks for: `runs NAME NAME`, `sweep NAME KEY`, `grid NAME`, …"""
    kind, *names = asked.split()
    kinds = {
        "runs": run_rows,
        "evaluators": evaluator_rows,
        "sweep": sweep_rows,
        "pieces": piece_rows,
        "grid": grid_rows,
        "seeds": seed_rows,
        "front": front_rows,
        "curve": curve_rows,
    }
    return markdown_table(kinds[kind](*names))


def validation(name: str) -> dict[float, float]:
    """Epoch → validation perplexity while training."""
    lines = run(name).metrics.read_text(encoding="utf-8").splitlines()
    return {x["epoch"]: x["valid/ppl"] for x in map(json.loads, lines) if "valid/ppl" in x}


def draw(file: Path) -> None:
    """LSTM beside Mogrifier: while 24 M parameters train; at 3 M over rates, and over rounds."""
    figure, (left, middle, right) = plots.pyplot().subplots(
        1, 3, figsize=(13, 3.6), layout="constrained"
    )
    for i, (rounds, label) in enumerate(((0, "LSTM"), (4, "Mogrifier, 4 rounds"))):
        curve = validation(f"ptb_24m_rounds{rounds}")
        left.plot(list(curve), list(curve.values()), **plots.look(i, 2), label=label)
        best: dict[float, float] = {}  # over dropout
        for row in grid_rows("ptb_search"):
            rate, ppl = float(row["learning rate"]), float(row["validation"])
            if row["rounds"] == str(rounds):
                best[rate] = min(ppl, best.get(rate, ppl))
        rates = sorted(best)
        middle.plot(rates, [best[x] for x in rates], **plots.look(i, 2), label=label)
    left.set(xlabel="epochs", ylabel="validation perplexity", ylim=(60, 90))
    left.set_title("PTB, 24 M parameters, one H100 (n = 1)", fontsize=10)
    middle.set(xlabel="learning rate", xscale="log", ylabel="validation perplexity")
    middle.set_xticks(rates, [f"{x:g}" for x in rates], minor=False)
    middle.minorticks_off()
    middle.set_title("PTB, 3 M, 6 epochs, best dropout (n = 1)", fontsize=10)
    for i, (name, label) in enumerate((("ptb_3m_rank", "rank 40"), ("ptb_3m", "full rank"))):
        found = {
            int(setting.removeprefix("rounds=")): ppls(runs, "test")
            for setting, runs in settings(name).items()
        }
        means = [fmean(seeds) for seeds in found.values()]
        right.plot(list(found), means, **plots.look(i + 1, 3), label=label)
        for rounds, seeds in found.items():
            right.plot([rounds] * len(seeds), seeds, "x", color="0.3", markersize=5)
    right.set(xlabel="rounds", ylabel="test perplexity")
    right.set_title("PTB, 3 M, 6 epochs: seeds (x) and their mean", fontsize=10)
    for axes in (left, middle, right):
        axes.grid(alpha=0.3)
        axes.legend()
    plots.save(figure, file)


def page(text: str) -> str:
    """The page with its tables as the files have them."""
    return BLOCK.sub(lambda match: f"{match[1]}\n{table(match[2])}\n{match[3]}", text)


if __name__ == "__main__":
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    for readme in (FOLDER / "README.md", FOLDER.parent / "README.md"):
        readme.write_text(page(readme.read_text(encoding="utf-8")), encoding="utf-8")
    draw(FOLDER / "lstm_and_mogrifier.png")
