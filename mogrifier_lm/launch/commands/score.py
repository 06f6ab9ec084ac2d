"""What each word of a text costs a trained model.

    python scripts/score.py run=RUN_DIR text=FILE                 # a table to stdout; - is stdin
    python scripts/score.py run=RUN_DIR text=FILE to=scores.tsv   # .jsonl and .gz are understood
    python scripts/score.py run=RUN_DIR text=items.tsv column=sentence item=item
    python scripts/score.py run=RUN_DIR text=FILE page=page.html  # in colour; beside other=RUN_DIR
    python scripts/score.py run=RUN_DIR split=test                # tables and a plot in RUN_DIR

run is the folder of a run, an exported one or a name on the Hugging Face hub. A row is a word,
<eos> at the end of each line among them: item, sentence, position (from 1), word, surprisal (bits),
nats, unk (scored as <unk>), count (in the training text), entropy (bits) and rank of the
distribution that predicts it. pandas: read_csv(FILE, sep="\\t", keep_default_na=False, quoting=3).

    unit=line     each line alone (default); unit=text carries the state over all lines, and
                  unit=item over lines in a row with the same item
    column=NAME   the text is this column of a tab-separated table; item=NAME is that of the items
    edge=right    where a word in pieces ends; edge=left is the bare sum over its pieces
    adapt=true    the weights learn from each window after it has been scored (dynamic evaluation),
                  over the whole text, whatever its unit
    top=0         so many of the likeliest words in a last column
    device=auto   a GPU where there is one

With split= the words of the run's own text are summed up: by training count, by place, and one by
one, in RUN_DIR/words_SPLIT.md and .png; save=FILE keeps each word, min_count=10 is how often a word
must occur to be listed by itself.
"""

import json
import sys
from functools import partial
from pathlib import Path

from mogrifier_lm.errors import UserError, nearest
from mogrifier_lm.launch.cli import script
from mogrifier_lm.terminal import plain


def main(
    *,
    run: str,
    split: str = "",
    text: str = "",
    column: str = "",
    item: str = "",
    unit: str = "",
    edge: str = "right",
    adapt: bool = False,
    top: int = 0,
    to: str = "-",
    page: str = "",
    other: str = "",
    save: str = "",
    device: str = "auto",
    min_count: int = 10,
) -> None:
    if bool(split) == bool(text):
        raise UserError("give either text=FILE or split=NAME")
    if split:
        return _of_split(run, split, save, device, min_count)
    if save:
        raise UserError("save=FILE is of split=NAME; with text=FILE give to=FILE")
    if item and not column:
        raise UserError("item=NAME is a column of a table: give column=NAME for its text")
    if unit == "item" and not item:
        raise UserError("unit=item needs a table: column=NAME of its text, item=NAME of its items")
    if page and (item or to != "-"):
        raise UserError("page=FILE shows lines of a text: item=NAME and to=FILE are of tables")
    if page:
        runs = [run, other] if other else [run]
        return _page(page, runs, text, column, unit or "line", edge, adapt, device)
    if other:
        raise UserError("other=RUN_DIR stands beside run on a page: give page=FILE.html")
    from mogrifier_lm import load_model
    from mogrifier_lm.inference.lines import lines_of, opened
    from mogrifier_lm.inference.score import Totals, write_tsv

    model, totals = load_model(run, device), Totals()
    unit = unit or ("item" if item else "line")
    lines = lines_of(text, model.tokenizer, column, item)
    with opened(to, "wt") as target:
        words = totals.watch(model.words(lines, unit, edge=edge, top=top, adapt=adapt))
        if to.removesuffix(".gz").endswith(".jsonl"):
            for word in words:
                target.write(json.dumps(word.to_dict(), ensure_ascii=False) + "\n")
        else:
            write_tsv(words, target, guesses=top > 0)
        if not totals.words:
            raise UserError(f"{text} is empty")
    said = f", adapt=true ({model.adaptation})" if adapt else ""
    print(f"unit={unit}{said}: {totals}", file=sys.stderr)


def _page(
    page: str,
    runs: list[str],
    text: str,
    column: str,
    unit: str,
    edge: str,
    adapt: bool,
    device: str,
) -> None:
    """A text with its surprisal as colour, under one model or two."""
    from mogrifier_lm import load_model
    from mogrifier_lm.files import write_whole
    from mogrifier_lm.inference.lines import lines_of
    from mogrifier_lm.reports.surprisal import surprisal_page

    if len(set(runs)) < len(runs):
        raise UserError("other=RUN_DIR is the run itself")
    models = {r: load_model(r, device) for r in runs}
    lines = [line.text for line in lines_of(text, models[runs[0]].tokenizer, column)]
    scored = {
        r: model.score(lines, unit, edge=edge, top=5, adapt=adapt) for r, model in models.items()
    }
    write_whole(Path(page), surprisal_page(scored))
    for name, scores in scored.items():
        print(f"{name}, unit={unit}: {scores.totals}", file=sys.stderr)
    print(page)


def _of_split(run: str, split: str, save: str, device: str, min_count: int) -> None:
    """Tables and a plot of a split of the run's text."""
    from mogrifier_lm import load_model
    from mogrifier_lm.data import SPLITS
    from mogrifier_lm.evaluators.static import static_nats
    from mogrifier_lm.files import write_whole
    from mogrifier_lm.inference.counts import training_counts
    from mogrifier_lm.reports.words import plot_words, word_nats, words_table
    from mogrifier_lm.runs.folder import RunFolder, check_inside
    from mogrifier_lm.texts.fetch import fetched_corpus

    if split not in SPLITS:
        raise UserError(f"no split {split}; {nearest(split, list(SPLITS))}")
    folder, model = RunFolder(run), load_model(run, device)
    corpus = fetched_corpus(folder)
    tokenizer, ids = corpus.tokenizer, corpus.splits[split].ids
    counts = training_counts(tokenizer, corpus.splits["train"].ids)
    nats = static_nats(model, ids, tokenizer.eos_id).double().numpy()
    scored = word_nats(tokenizer, ids, nats, counts)
    title = f"{corpus.name} {split}"
    page = words_table(scored, title, min_count)
    print(plain(page))
    if save:
        scored.save(Path(save))
    check_inside(folder.path)
    write_whole(folder.path / f"words_{split}.md", page)
    plot_words(scored, title, folder.path / f"words_{split}.png")


command = partial(script, main)
