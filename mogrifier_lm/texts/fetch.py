"""Texts that do not lie in a folder yet: downloaded from the hub, or generated."""

import json
import logging
from pathlib import Path

from mogrifier_lm.config import Config, load_config
from mogrifier_lm.data import SPLITS, Corpus
from mogrifier_lm.data.source import SYNTHETIC, fetched_place, local_place
from mogrifier_lm.errors import UserError
from mogrifier_lm.files import fill_folder
from mogrifier_lm.options import DataConfig
from mogrifier_lm.runs.folder import RunFolder
from mogrifier_lm.texts.synthetic import EVAL_TOKENS, TRAIN_TOKENS, SyntheticLanguage

log = logging.getLogger(__name__)

HUB_SPLITS = {"train": "train", "valid": "validation", "test": "test"}


def fetch(source: DataConfig) -> None:
    """Put the text of a source where the core reads it, unless it is on this machine already.

    Raises:
        UserError: a hub that cannot be reached, or that has no such text.
    """
    folder = fetched_place(source)
    if local_place(source) or folder.is_dir():
        return
    if source.name == SYNTHETIC:
        fill_folder(folder, lambda new: _generate(source.seed, new))
    elif source.hub_path:
        fill_folder(folder, lambda new: _download(source, new))


def fetched_corpus(folder: RunFolder, config: Config | None = None) -> Corpus:
    """`runs.build.saved_corpus`, which documents the arguments, of a text that is fetched first."""
    from mogrifier_lm.runs.build import saved_corpus

    config = config or load_config(folder.config)
    fetch(config.data)
    return saved_corpus(folder, config)


def _generate(seed: int, folder: Path) -> None:
    """The synthetic text and, beside it, -ln p of each split under its source."""
    log.info("generating the synthetic language")
    language = SyntheticLanguage(seed)
    floors = {}
    for i, split in enumerate(SPLITS):
        size = TRAIN_TOKENS if split == "train" else EVAL_TOKENS
        lines = language.sample(size, seed=3 * seed + i)
        (folder / f"{split}.txt").write_text(
            "".join(f"{line}\n" for line in lines), encoding="utf-8"
        )
        if split != "train":
            floors[split] = language.nats(lines)
    (folder / "floor.json").write_text(json.dumps(floors), encoding="utf-8")


def _download(source: DataConfig, folder: Path) -> None:
    hint = "give data.dir=FOLDER with train.txt, valid.txt, test.txt, or set MOGRIFIER_LM_DATA"
    try:
        import datasets
    except ImportError as error:
        raise UserError(f"data={source.name} needs the package datasets, or {hint}") from error
    log.info("downloading %s from the hub", source.hub_path)
    try:
        splits = datasets.load_dataset(
            source.hub_path, source.hub_name, revision=source.hub_revision
        )
    except Exception as error:  # the hub's errors have no common base
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"data={source.name}: {source.hub_path} cannot be had from the hub ({reason}); {hint}"
        ) from error
    for split, hub_split in HUB_SPLITS.items():
        if hub_split not in splits or source.hub_column not in splits[hub_split].column_names:
            raise UserError(
                f"data={source.name}: {source.hub_path} has no split {hub_split} with a column "
                f"{source.hub_column}; {hint}"
            )
        with open(folder / f"{split}.txt", "w", encoding="utf-8", newline="\n") as file:
            for line in splits[hub_split][source.hub_column]:
                file.write(line.rstrip("\n") + "\n")
