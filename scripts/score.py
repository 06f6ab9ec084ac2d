"""What each word costs a trained model, in nats (-ln p; <eos> is a word, subwords are summed).

    python scripts/score.py run=RUN_DIR split=test               # tables, and a plot in RUN_DIR
    python scripts/score.py run=RUN_DIR split=valid save=FILE    # and each word, tab-separated
    python scripts/score.py run=RUN_DIR text=FILE                # each word of a text; - is stdin

A split's tables and plot are left in RUN_DIR as words_SPLIT.md and .png; words that a word model
reads as <unk> count there as that word. In a text every line ends with an <eos> and the state is
carried from line to line; words that the model does not know are scored as <unk>, and marked. Other
keys: device=cpu; min_count=10, how often a word must occur in the split to be listed by itself.
"""

import sys
from pathlib import Path

from mogrifier_lm.errors import UserError, nearest
from mogrifier_lm.launch.cli import script


def main(
    *,
    run: str,
    split: str = "",
    text: str = "",
    save: str = "",
    device: str = "cpu",
    min_count: int = 10,
) -> None:
    from mogrifier_lm import load_model
    from mogrifier_lm.data import EOS, SPLITS, read_lines
    from mogrifier_lm.evaluators import perplexity, static_nats
    from mogrifier_lm.reports.words import (
        per_word,
        plot_words,
        training_counts,
        word_nats,
        words_table,
    )
    from mogrifier_lm.runs.build import check_device, saved_corpus, saved_tokenizer
    from mogrifier_lm.runs.folder import RunFolder

    if bool(split) == bool(text) or (text and save):
        raise UserError("give split=NAME (with save=FILE if you like) or text=FILE")
    folder, model = RunFolder(run), load_model(run, check_device(device))
    if text:
        tokenizer = saved_tokenizer(folder)
        raw = sys.stdin.buffer.read() if text == "-" else Path(text).read_bytes()
        lines = read_lines(raw, text, tokenizer)
        ids = tokenizer.encode(lines)
        if not len(ids):
            raise UserError(f"{text} is empty")
        nats = per_word(tokenizer, ids, static_nats(model, ids, tokenizer.eos_id).double().numpy())
        words = [word for line in lines for word in (*tokenizer.split(line), EOS)]
        for word, seen, value in zip(words, tokenizer.decode_words(ids), nats, strict=True):
            print(f"{word}\t{value:.4f}" + (f"\tas {seen}" if seen != word else ""))
        ppl = perplexity(nats.mean())
        print(
            f"{len(words)} words, {nats.sum():.4f} nats, perplexity {ppl:.2f} a word",
            file=sys.stderr,
        )
        return
    if split not in SPLITS:
        raise UserError(f"no split {split}; {nearest(split, list(SPLITS))}")
    corpus = saved_corpus(folder)
    tokenizer, ids = corpus.tokenizer, corpus.splits[split].ids
    counts = training_counts(tokenizer, corpus.splits["train"].ids)
    nats = static_nats(model, ids, tokenizer.eos_id).double().numpy()
    scored = word_nats(tokenizer, ids, nats, counts)
    title = f"{corpus.name} {split}"
    page = words_table(scored, title, min_count)
    print(page)
    if save:
        scored.save(Path(save))
    (folder.path / f"words_{split}.md").write_text(page, encoding="utf-8")
    plot_words(scored, title, folder.path / f"words_{split}.png")


if __name__ == "__main__":
    script(main)
