"""The table at the end of a run."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any


def final_table(summary: Mapping[str, Any], run_dir: Path) -> str:
    """summary.json as a person reads it: perplexities, size, speed, where the files are."""
    rows = [("", "validation", "test")]
    for evaluator in (name for name in summary["valid"] if name != "floor_ppl"):
        valid, test = summary["valid"][evaluator], summary["test"][evaluator]
        rows.append((f"{evaluator} perplexity", f"{valid['ppl']:.2f}", f"{test['ppl']:.2f}"))
        if valid["tokens"] != valid["words"]:  # subwords
            for key, what in (
                ("token_ppl", "perplexity a subword"),
                ("bits_per_byte", "bits a byte"),
            ):
                rows.append((f"  {what}", f"{valid[key]:.3f}", f"{test[key]:.3f}"))
    if "floor_ppl" in summary["valid"]:
        valid, test = summary["valid"]["floor_ppl"], summary["test"]["floor_ppl"]
        rows.append(("floor (the source itself)", f"{valid:.2f}", f"{test:.2f}"))
    width = max(len(row[0]) for row in rows)
    lines = [f"{name:<{width}}  {valid:>10}  {test:>10}" for name, valid, test in rows]
    minutes, seconds = divmod(round(summary["seconds"]), 60)
    facts = {
        "parameters": f"{summary['params']:,}",
        "trained on": f"{summary['tokens']:,} tokens, {summary['epochs']:.2f} epochs",
        "speed": f"{summary['tokens_per_second']:,.0f} tokens/s",
        "time": f"{minutes} min {seconds:02d} s",
        "files": str(run_dir),
    }
    lines += [f"{name:<{width}}  {value}" for name, value in facts.items()]
    return "\n".join(["", *lines, ""])
