"""EleutherAI's lm-evaluation-harness with a trained model of this package.

    python -m mogrifier_lm.inference.harness run --model mogrifier_lm \\
        --model_args run=RUN_DIR --tasks blimp

Whatever follows the module is the harness's own command line, to which one model is added; run is
the folder of a run, an exported one or a name on the hub. It needs `pip install
"mogrifier_lm[harness]"`. Texts are read as this model's training text was written: words between
spaces, a line break is an <eos>, and none is added at the end. A word that the model does not know
is scored as <unk>, which is cheap: how many there were is said.
"""

import logging
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

from lm_eval.__main__ import cli_evaluate
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model

from mogrifier_lm.data import UNK
from mogrifier_lm.inference.lines import Line
from mogrifier_lm.inference.score import Word, score_lines
from mogrifier_lm.inference.trained import load_model

log = logging.getLogger(__name__)


@register_model("mogrifier_lm")
class HarnessModel(LM):
    """A trained model as the harness sees it.

    Args:
        run: what `load_model` takes.
        device: its device.
        options: of the harness that have no meaning here, the size of batches among them.
    """

    def __init__(self, run: str, device: str | None = None, **options: object) -> None:
        super().__init__()
        self.model = load_model(run, device or "auto")

    def loglikelihood(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """ln p of each continuation given its context, and whether each of its words is likeliest.

        A word that begins in the context and ends in the continuation is of the continuation.
        """
        pairs = [request.args for request in requests]
        found = []
        texts = self._words([context + continuation for context, continuation in pairs])
        for (context, continuation), words in zip(pairs, texts, strict=True):
            before = len(self._split(context))
            if context[-1:].strip() and continuation[:1].strip():
                before -= 1
            own = words[before:]
            found.append((-sum(w.nats for w in own), all(w.rank == 1 for w in own)))
        return found

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """ln p of each text."""
        texts = self._words([request.args[0] for request in requests])
        return [-sum(word.nats for word in words) for words in texts]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """What follows each context, up to the first of its `until` or `max_gen_toks` words."""
        texts = []
        for context, options in (request.args for request in requests):
            ends = options.get("until") or []
            ends = [ends] if isinstance(ends, str) else list(ends)
            drawn = bool(options.get("do_sample")) and options.get("temperature") != 0
            pieces = self.model.continued(
                context,
                max_words=int(options.get("max_gen_toks", 256)),
                temperature=float(options.get("temperature") or 1) if drawn else 1.0,
                top_k=options.get("top_k") if drawn else 1,
                top_p=options.get("top_p") if drawn else None,
            )
            next(pieces)  # the context
            text = ""
            for (piece,) in pieces:
                text += piece
                if at := [text.index(end) for end in ends if end in text]:
                    text = text[: min(at)]
                    break
            texts.append(text)
        return texts

    def _split(self, text: str) -> list[str]:
        """The words of a text, an <eos> for each line break."""
        lines = [self.model.tokenizer.split(line) for line in text.split("\n")]
        return [word for line in lines for word in [*line, "<eos>"]][:-1]

    def _words(self, texts: Sequence[str]) -> Iterator[list[Word]]:
        """The words of each text, scored from a state of its own."""
        lines = (Line(line, str(i)) for i, text in enumerate(texts) for line in text.split("\n"))
        words = score_lines(self.model, self.model.tokenizer, lines, "item", edge="left")
        unknown = total = 0
        for _, group in groupby(words, lambda word: word.item):
            own = list(group)[:-1]  # no <eos> stands at the end
            unknown, total = unknown + sum(word.unk for word in own), total + len(own)
            yield own
        if unknown:
            share = unknown / total
            log.warning(
                "%s of %s words (%.1f %%) were scored as %s", unknown, total, 100 * share, UNK
            )


if __name__ == "__main__":
    cli_evaluate()
