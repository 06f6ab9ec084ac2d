"""All options of a run, out of what Hydra composes or a run has saved, and back.

Hydra checks types against `Config`; `validate` checks the rest. Nothing below `run` sees Hydra or
OmegaConf.
"""

import dataclasses
import os
import re
from collections.abc import Collection
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from mogrifier_lm.errors import UserError, one_line
from mogrifier_lm.evaluators import EvaluatorsConfig
from mogrifier_lm.files import read_bytes, write_whole
from mogrifier_lm.option import SEED, Interval, option
from mogrifier_lm.options import (
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    RegularizationConfig,
    ReportConfig,
    TokenizerConfig,
    TrackerConfig,
    TrainerConfig,
)
from mogrifier_lm.terminal import plain

# Beside the package in a checkout, inside it in a wheel.
_HERE = Path(__file__).resolve().parent
CONFIG_DIR = _HERE / "configs" if (_HERE / "configs").is_dir() else _HERE.parent / "configs"

# Bytes, levels of nesting, and parts of a yaml file that is read.
MAX_YAML, MAX_DEPTH, MAX_PARTS = 2**18, 20, 2**14


@dataclass(kw_only=True)
class Config:
    data: DataConfig = field(default_factory=DataConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    regularization: RegularizationConfig = field(default_factory=RegularizationConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    evaluators: EvaluatorsConfig = field(default_factory=EvaluatorsConfig)
    tracker: TrackerConfig = field(default_factory=TrackerConfig)
    report: ReportConfig = field(default_factory=ReportConfig)
    seed: int = option(1, "of the initial weights and the dropout masks", SEED)
    debug: bool = option(False, "show the traceback of an error")
    resume: str | None = option(None, "folder of a run to go on with")


def _check_ranges(config: Any, path: str = "") -> None:
    for f in dataclasses.fields(config):
        value, where = getattr(config, f.name), f"{path}{f.name}"
        if dataclasses.is_dataclass(value):
            _check_ranges(value, f"{where}.")
            continue
        if value is None:
            continue
        if value == [] and where.startswith("evaluators."):
            raise UserError(f"{where} is empty, it needs a value to take or several to try")
        for v in value if isinstance(value, list) else [value]:
            _check_value(v, where, f.metadata.get("values"))


def _check_value(value: Any, where: str, values: Interval | Collection[str] | None) -> None:
    must = None
    if not isinstance(value, int | float | str):
        must = "one value"
    elif isinstance(values, Interval):
        must = values.missed(value)
    elif values and value not in values:
        must = f"one of {', '.join(values)}"
    elif isinstance(value, str) and ("${" in value or plain(value) != value.replace("\n", "")):
        must = "printable text in one line, without ${"
    if must:
        raise UserError(f"{where} is {value!r}, it must be {must}")


def validate(node: DictConfig) -> Config:
    """The composed config as objects, every key known and every value in its range.

    Raises:
        UserError: naming the key, what it is and what it may be.
    """
    config = OmegaConf.to_object(_over_defaults(OmegaConf.to_container(node)))
    assert isinstance(config, Config)
    _check_ranges(config)
    from mogrifier_lm.cells import CELLS  # here: torch comes with it, which --help does without

    _check_value(config.model.cell, "model.cell", CELLS)
    if not re.fullmatch(r"[\w.+-]+", config.data.name):
        raise UserError(
            f"data.name is {config.data.name!r}, it is part of file names: letters, digits, . _ + -"
        )
    model, trainer = config.model, config.trainer
    if model.num_params is not None and model.hidden_size is not None:
        raise UserError("model.num_params and model.hidden_size exclude each other: give one")
    if model.num_params is None and model.hidden_size is None:
        model.hidden_size = 200
    _check_tokenizer(config)
    if model.adaptive_softmax and (
        not model.tie_embeddings or model.mixture > 1 or config.regularization.samples > 1
    ):
        raise UserError(
            "model.adaptive_softmax needs model.tie_embeddings=true, model.mixture=1 and "
            "regularization.samples=1"
        )
    for paths, key in ((config.data, "dir"), (config.tokenizer, "vocabulary")):
        if path := getattr(paths, key):  # as the saved config is read in other folders too
            setattr(paths, key, str(Path(os.path.expanduser(path)).absolute()))
    if trainer.max_epochs is None and trainer.max_steps is None and trainer.max_minutes is None:
        raise UserError(
            "no end of training: give trainer.max_epochs, trainer.max_steps or trainer.max_minutes"
        )
    if model.top_hidden_size is not None and model.num_layers == 1:
        raise UserError("model.top_hidden_size needs two layers or more: give model.hidden_size")
    if config.data.name == "synthetic" and config.data.dir is not None:
        raise UserError(
            "data.dir with data=synthetic: give data=text, ptb or wikitext2 beside data.dir"
        )
    chosen = config.evaluators.chosen()
    for name, evaluator in chosen.items():
        for needed in evaluator.needs:
            if needed not in chosen:
                raise UserError(
                    f"evaluators=[{name}] needs {needed} beside it, and has its settings"
                )
        evaluator.check(config)
    if trainer.lr_decay != "none" and trainer.max_epochs is None and trainer.max_steps is None:
        raise UserError("trainer.lr_decay needs trainer.max_epochs or trainer.max_steps")
    return config


def _check_tokenizer(config: Config) -> None:
    from mogrifier_lm.data import TOKENIZERS  # here, as CELLS

    tokenizer, kinds = config.tokenizer, {name: kind.settings for name, kind in TOKENIZERS.items()}
    mine = kinds[tokenizer.name]
    for key in {key for keys in kinds.values() for key in keys}.difference(mine):
        if getattr(tokenizer, key) is not None:
            names = " or ".join(f"tokenizer={name}" for name, keys in kinds.items() if key in keys)
            raise UserError(f"tokenizer.{key} is of {names}, not of tokenizer={tokenizer.name}")
    if tokenizer.vocabulary and any(getattr(tokenizer, key) is not None for key in mine):
        raise UserError(
            f"tokenizer.vocabulary is taken as it is: leave {', '.join(mine)} of the tokenizer out"
        )
    if len(config.data.shares) != 3:
        raise UserError("data.shares needs three numbers, of train, valid and test")


VERSION = 1  # of the meaning of a saved config


def _over_defaults(values: Any, path: Path | None = None) -> DictConfig:
    """Values over the defaults of all keys; `path` is the file that they are of.

    Raises:
        UserError: a key that there is not, or a value of another type than its key's.
    """
    of_file = f"{path}: " if path else ""
    try:
        config = OmegaConf.merge(OmegaConf.structured(Config), values)
    except ConfigKeyError as error:
        raise UserError(f"{of_file}unknown key {error.full_key}") from error
    except (OmegaConfBaseException, ValueError, OverflowError) as error:
        raise UserError(f"{of_file}{one_line(error)}") from error
    assert isinstance(config, DictConfig)
    return config


def load_config(path: Path) -> Config:
    """The config that a run has saved.

    Raises:
        UserError: no such file, or one that does not fit this version.
    """
    return portable(validate(_saved(path)))


def portable(config: Config) -> Config:
    """What of a config holds for a folder, wherever it has come from.

    Where this machine keeps its cache is no business of the folder's, and from the hub only what
    the project's own data sets name is downloaded unasked.
    """
    source = config.data
    if (source.hub_path, source.hub_name, source.hub_revision) not in _shipped_sources():
        source = replace(source, hub_path=None, hub_name=None, hub_revision=None)
    return replace(config, data=replace(source, cache_dir=None), resume=None)


def _shipped_sources() -> set[tuple[str | None, ...]]:
    keys = ("hub_path", "hub_name", "hub_revision")
    data_sets = map(read_yaml, (CONFIG_DIR / "data").glob("*.yaml"))
    return {tuple(data_set.get(key) for key in keys) for data_set in data_sets}


def save_config(config: Config, path: Path) -> None:
    """Write every key, whole or not at all."""
    values = {"version": VERSION, **asdict(replace(config, resume=None))}
    write_whole(path, OmegaConf.to_yaml(OmegaConf.create(values)))


def read_yaml(path: Path) -> dict[Any, Any]:
    """The keys of a yaml file that may be a stranger's: plain values, nothing looked up.

    Raises:
        UserError: it is damaged, too large, or could grow: an alias stands for any part of it.
    """
    try:
        text, depth = read_bytes(path, MAX_YAML).decode(), 0
        for number, event in enumerate(yaml.parse(text, yaml.SafeLoader)):
            depth += isinstance(event, yaml.CollectionStartEvent)
            depth -= isinstance(event, yaml.CollectionEndEvent)
            if isinstance(event, yaml.AliasEvent) or depth > MAX_DEPTH or number > MAX_PARTS:
                raise ValueError("it holds an alias, is nested too deep, or has too many parts")
        values = OmegaConf.to_container(OmegaConf.create(text))
        repr(values)  # a number of so many digits that no message can show it is a ValueError
    except (yaml.YAMLError, ValueError, AssertionError) as error:
        raise UserError(f"{path} is damaged: {one_line(error)}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} is damaged: it does not hold keys and values")
    return values


def _saved(path: Path) -> DictConfig:
    """What a run has saved, over the defaults of the keys that it does not have."""
    if not path.is_file():
        raise UserError(f"no {path.name} in {path.parent}, so it is not a run's folder")
    values = read_yaml(path)
    _check_plain(values, path)
    version = values.pop("version", 0)
    if version not in list(range(VERSION + 1)):
        raise UserError(f"{path} is of version {version}, the last known is {VERSION}")
    if version == 0:
        _of_version_0(values)
    return _over_defaults(values, path)


def _of_version_0(values: dict[str, Any]) -> None:
    """Say what a config meant that was saved before configs had a version."""

    def part(of: Any, key: str) -> dict[str, Any]:
        found = of.get(key) if isinstance(of, dict) else None
        return found if isinstance(found, dict) else {}

    if part(values, "model").get("init") == "lamb":
        values["model"]["init"] = "melis2020"
    evaluators = part(values, "evaluators")
    for settings in (part(evaluators, name) for name in evaluators):
        temperatures = settings.get("temperature")
        if isinstance(temperatures, list):  # a factor on the logits then
            settings["temperature"] = [1 / t if _is_number(t) else t for t in temperatures]
    if part(evaluators, "mc_dropout").get("window", 0) is None:
        del evaluators["mc_dropout"]["window"]  # trainer.bptt, as it is by default


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and value > 0


def _check_plain(value: Any, path: Path) -> None:
    """Refuse what OmegaConf would look up, in the environment or by another way."""
    if isinstance(value, str) and ("${" in value or value == "???"):
        raise UserError(f"{path}: {value} is no plain value, which is all that a run saves")
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            _check_plain(part, path)
