"""A trained model to give away: weights, tokenizer, config, training counts and a card, no more.

    python scripts/export.py run=RUN_DIR to=FOLDER                  # what load_model reads
    python scripts/export.py run=RUN_DIR to=FOLDER dtype=bf16       # half the size
    python scripts/export.py run=RUN_DIR to=FOLDER hub=OWNER/NAME   # and uploaded (huggingface_hub)

The folder is laid out as a run's. For the counts, and for the statistics of gradients with which
score.py adapt=true works, the training text has to be found (data=FOLDER, if it has moved); whether
weights trained on it may be passed on is for you to know. The statistics are as large as the
weights in fp32, and a byte a weight beside bf16; adapt=false leaves them out.
"""

from dataclasses import replace
from functools import partial

from mogrifier_lm.errors import UserError
from mogrifier_lm.launch.cli import script

DTYPES = ("fp32", "bf16")


def main(
    *, run: str, to: str, dtype: str = "fp32", adapt: bool = True, data: str = "", hub: str = ""
) -> None:
    if dtype not in DTYPES:
        raise UserError(f"dtype is {dtype!r}, it must be one of {', '.join(DTYPES)}")
    import torch

    from mogrifier_lm import load_model
    from mogrifier_lm.config import load_config, save_config
    from mogrifier_lm.evaluators import EvaluatorsConfig
    from mogrifier_lm.inference.adapt import adaptation
    from mogrifier_lm.inference.counts import training_counts, write_counts
    from mogrifier_lm.inference.hub import hub as asked
    from mogrifier_lm.reports.card import card
    from mogrifier_lm.runs.folder import RunFolder
    from mogrifier_lm.texts.fetch import fetched_corpus
    from mogrifier_lm.training import checkpoint

    source, target = RunFolder(run), RunFolder(to)
    if target.path.is_file() or target.path.is_dir() and any(target.path.iterdir()):
        raise UserError(f"{target} is there already: give another folder")
    model = load_model(run, "cpu")
    if not source.provenance.is_file():
        raise UserError(f"{source} was exported itself: a run is exported")
    if not source.is_completed():
        raise UserError(f"{source} has not completed: its card would hold no results")
    config = load_config(source.config)
    if data:
        config = replace(config, data=replace(config.data, dir=data))
    corpus = fetched_corpus(source, config)
    if hub:
        with asked(f"hub={hub}") as package:
            package.HfApi().create_repo(hub, exist_ok=True)
    made = source.read_provenance(required=True)
    page = card(config, source.read_summary(), made, dtype)
    target.path.mkdir(parents=True, exist_ok=True)
    plain = replace(config.data, dir=None, cache_dir=None)
    any_kernel = replace(config.model, backend="auto")
    save_config(
        replace(config, data=plain, model=any_kernel, evaluators=EvaluatorsConfig()), target.config
    )
    model.tokenizer.save(target.tokenizer)
    kind = torch.bfloat16 if dtype == "bf16" else torch.float32
    tensors = {name: tensor.to(kind) for name, tensor in model.state_dict().items()}
    checkpoint.save(target.best, tensors, {})
    counts = training_counts(corpus.tokenizer, corpus.splits["train"].ids)
    write_counts(target, corpus.tokenizer, counts)
    if adapt:
        adaptation(source, model, corpus).save(target, exact=dtype == "fp32")
    (target.path / "README.md").write_text(page, encoding="utf-8")
    size = sum(file.stat().st_size for file in target.path.rglob("*") if file.is_file())
    print(f"{target}: {size / 1e6:.1f} MB")
    if hub:
        with asked(f"hub={hub}") as package:
            print(package.HfApi().upload_folder(folder_path=target.path, repo_id=hub))


command = partial(script, main)
