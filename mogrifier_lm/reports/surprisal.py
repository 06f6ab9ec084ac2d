"""A page to look at: a text with its surprisal as colour, under one model or two."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mogrifier_lm.errors import UserError
from mogrifier_lm.inference.score import Scores, Word

TEMPLATE = Path(__file__).with_suffix(".html")


def surprisal_page(scored: Mapping[str, Scores]) -> str:
    """One self-contained HTML page.

    Args:
        scored: the name of a model → the scores of the text under it; one model, or two of which
            the difference is shown.

    Raises:
        UserError: two models that cut the text into other words.
    """
    names, texts = list(scored), [list(scores) for scores in scored.values()]
    if any([w.word for w in text] != [w.word for w in texts[0]] for text in texts):
        raise UserError("the models read other words in this text: they cannot be set side by side")
    lines: list[dict[str, Any]] = []
    for words in zip(*texts, strict=True):
        if not lines or lines[-1]["number"] != words[0].sentence:
            lines.append({"number": words[0].sentence, "words": []})
        lines[-1]["words"].append(_entry(words))
    totals = [
        f"{scores.totals.ppl:.2f} perplexity a word, {scores.totals.words:,} words"
        for scores in scored.values()
    ]
    data = json.dumps({"models": names, "totals": totals, "lines": lines}, ensure_ascii=False)
    # Nothing in a text can end the script that holds it.
    safe = data.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    return TEMPLATE.read_text(encoding="utf-8").replace("/*DATA*/", safe)


def _entry(words: Sequence[Word]) -> dict[str, Any]:
    """A word under each model."""
    return {
        "word": words[0].word,
        "unk": any(w.unk for w in words),
        "count": words[0].count,
        "bits": [round(w.surprisal, 4) for w in words],
        "entropy": [round(w.entropy, 3) for w in words],
        "rank": [w.rank for w in words],
        "guesses": [list(w.guesses) for w in words],
    }
