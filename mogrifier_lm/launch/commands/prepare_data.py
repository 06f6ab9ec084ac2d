"""Fetch, check and cut into tokens the text that a run would train on, and say what it is.

    python scripts/prepare_data.py data=ptb
    python scripts/prepare_data.py data=wikitext2 tokenizer=sentencepiece data.cache_dir=FOLDER

It takes the keys of data and tokenizer that train.py takes, and does what train.py does first: text
from the hub and arrays of tokens are kept in data.cache_dir, for machines without a network too.
"""

from functools import partial

from mogrifier_lm.config import validate
from mogrifier_lm.errors import UserError
from mogrifier_lm.launch.cli import script
from mogrifier_lm.launch.job import compose


def main(*overrides: str) -> None:
    from mogrifier_lm.runs.build import build_corpus
    from mogrifier_lm.texts.fetch import fetch

    if wrong := [o for o in overrides if not o.startswith(("data", "tokenizer"))]:
        raise UserError(f"{wrong[0]}: only the keys of data and tokenizer are taken here")
    config = validate(compose(overrides))
    fetch(config.data)
    corpus = build_corpus(config)
    print(f"{corpus.name}: {len(corpus.tokenizer):,} types of {config.tokenizer.name} tokens")
    print(f"{'':5}  {'words':>11}  {'tokens':>11}  {'bytes':>11}  {'<unk>':>7}  sha256")
    for name, split in corpus.splits.items():
        print(
            f"{name:5}  {split.words:11,}  {len(split.ids):11,}  {split.bytes:11,}  "
            f"{split.unknown / len(split.ids):7.2%}  {split.sha256[:16]}"
        )


command = partial(script, main)
