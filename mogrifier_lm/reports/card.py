"""The card of a model that is given away: what it is, what it reaches, how it was made."""

from collections.abc import Mapping
from typing import Any

from mogrifier_lm.config import Config
from mogrifier_lm.reports.table import score_table

# Of data sets by name, as their publishers state them: whether weights trained on a text may be
# passed on is for the person who passes them on to know.
LICENSES = {
    "wikitext2": "CC BY-SA, from Wikipedia (WikiText-2, Merity et al., arXiv 1609.07843)",
    "wikitext103": "CC BY-SA, from Wikipedia (WikiText-103, Merity et al., arXiv 1609.07843)",
    "ptb": "the Linguistic Data Consortium's, which does not let the text be passed on",
    "synthetic": "none needed: the text is generated",
}


def card(
    config: Config, summary: Mapping[str, Any], provenance: Mapping[str, Any], dtype: str
) -> str:
    """Markdown, with the hub's header.

    Args:
        config: of the run.
        summary: its summary.json.
        provenance: its provenance.json.
        dtype: of the exported weights.
    """
    model, data = config.model, provenance.get("data", {})
    tokens = data.get("tokens", {}).get("train")
    name = f"Mogrifier {model.cell.upper()}" if model.rounds else model.cell.upper()
    git, versions = provenance.get("git") or {}, provenance.get("versions", {})
    license_ = LICENSES.get(config.data.name, "not stated; ask the owner of the text")
    command = [
        argument
        for argument in provenance.get("command", [])
        if not argument.startswith(("hydra.", "data.dir=", "data.cache_dir="))  # of the machine
    ]
    weights = "raw" if config.optimizer.averaging == "none" else config.optimizer.averaging
    lines = [
        "---",
        "library_name: mogrifier_lm",
        "pipeline_tag: text-generation",
        *(["license: cc-by-sa-4.0"] if license_.startswith("CC BY-SA") else []),
        "---",
        "",
        f"# {name}, {config.data.name}",
        "",
        f"{summary.get('params', 0):,} parameters in {dtype}: {model.num_layers} layers, "
        f"hidden size {summary.get('hidden_size')}, {model.rounds} rounds, "
        f"tokenizer {config.tokenizer.name}.",
        "",
        "```python",
        "from mogrifier_lm import load_model",
        "",
        'lm = load_model("FOLDER")  # weights and plain text, nothing is executed',
        'lm.score(["a line of text"]).to_dataframe()',
        'lm.generate("a line", max_words=50)',
        "```",
        "",
        "## Perplexity",
        "",
        "Per word, `<eos>` counted, of the fp32 weights before export:",
        "",
        "```",
        score_table(summary),
        "```",
        "",
        "## How it was made",
        "",
        f"- data: {config.data.name}" + (f", {tokens:,} training tokens" if tokens else ""),
        f"- licence of the data: {license_}",
        f"- trained: {summary.get('epochs', 0):.1f} epochs, {summary.get('steps', 0):,} steps, "
        f"weights: {weights}, those best on validation (step {summary.get('best_step')})",
        f"- command: `python {' '.join(command)}`",
        f"- code: commit {git.get('commit', 'unknown')}"
        + (" with changes" * bool(git.get("dirty"))),
        f"- torch {versions.get('torch')}, seed {config.seed}",
        "",
        "`config.yaml` holds every option, `counts.json` how often each word occurs in the",
        "training text, `statistics.safetensors`, where it is, what `score(…, adapt=True)` needs.",
        "What a model of text has learned is what stood in the text: it is made for research, and",
        "states no facts.",
    ]
    return "\n".join(lines) + "\n"
