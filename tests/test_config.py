"""Every yaml composes, every documented command composes, and the layers import downwards."""

import ast
import dataclasses
import importlib.util
import math
import re
import shlex
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
from omegaconf import OmegaConf

from mogrifier_lm.config import (
    Config,
    load_config,
    save_config,
    validate,
)
from mogrifier_lm.errors import UserError
from mogrifier_lm.evaluators import EvaluatorsConfig
from mogrifier_lm.launch.explain import schema_of
from mogrifier_lm.launch.overrides import resume_config, without_effect
from mogrifier_lm.options import Counts, ModelConfig
from tests.conftest import ROOT, compose_config

GROUP_FILES = sorted((ROOT / "configs").glob("*/**/*.yaml"))


@pytest.mark.parametrize("path", GROUP_FILES, ids=lambda p: str(p.relative_to(ROOT / "configs")))
def test_every_yaml_composes_and_is_valid(path: Path) -> None:
    group, option = path.relative_to(ROOT / "configs").parent, path.stem
    if group.parts[0] == "experiment":
        group, option = Path("experiment"), str(Path(*group.parts[1:], option))
    if option == "ray_cluster":
        pytest.importorskip("hydra_plugins.hydra_ray_launcher")
    if str(group) == "evaluators":
        option = "[dynamic,dynamic_cache]" if option == "dynamic_cache" else f"[{option}]"
    validate(compose_config([f"{group}={option}"]))


def documented_commands() -> list[str]:
    """`python train.py …` in the README and in the headers of the configs."""
    texts = [ROOT / "README.md", ROOT / "train.py", *GROUP_FILES, ROOT / "configs/config.yaml"]
    found = set()
    for path in texts:
        found |= set(
            re.findall(r"python train\.py(?:[ \t]+[^\s`#]+=\S+|[ \t]+-m)*", path.read_text())
        )
    return sorted(found)


def test_commands_are_documented() -> None:
    assert len(documented_commands()) >= 5


@pytest.mark.parametrize("command", documented_commands())
def test_every_documented_command_composes(command: str) -> None:
    arguments = [a.strip("`") for a in shlex.split(command)[2:]]
    overrides = []
    for argument in arguments:
        if argument == "-m" or argument.startswith("resume="):
            continue
        key, _, value = argument.partition("=")
        swept = "-m" in arguments and "," in value and "[" not in value
        overrides.append(f"{key}={value.split(',')[0]}" if swept else argument)
    validate(compose_config(overrides))


def test_constructors_refuse_unknown_keys() -> None:
    with pytest.raises(TypeError, match="roundz"):
        ModelConfig(roundz=3)  # type: ignore[call-arg]


def test_every_option_is_documented_and_checked_by_its_own_schema() -> None:
    def walk(schema: type) -> None:
        hints = get_type_hints(schema)
        for f in dataclasses.fields(schema):
            if nested := schema_of(hints[f.name]):
                walk(nested)
            else:
                assert f.metadata.get("doc"), f"{schema.__name__}.{f.name}"

    walk(Config)


NUMBERS = re.compile(r"\b(int|float)\b")


def numbers(schema: type, path: str = "") -> dict[str, dataclasses.Field[Any]]:
    """Dotted key → field, of every option that is a number or a list of numbers."""
    found = {}
    for name, hint in get_type_hints(schema).items():
        f = schema.__dataclass_fields__[name]
        nested = [t for t in (hint, *get_args(hint)) if dataclasses.is_dataclass(t)]
        if nested:
            found |= numbers(nested[0], f"{path}{name}.")
        elif NUMBERS.search(str(hint)):
            found[f"{path}{name}"] = f
    return found


@pytest.mark.parametrize("key", numbers(Config))
def test_every_number_has_a_range_and_both_ends_are_held(key: str) -> None:
    interval, hint = numbers(Config)[key].metadata["values"], str(numbers(Config)[key].type)
    low, high = max(interval.least, interval.above), min(interval.most, interval.below)
    assert -math.inf < low < high < math.inf, "give it both ends"
    config = OmegaConf.structured(Config)
    if key.startswith("evaluators."):
        for name, schema in get_type_hints(EvaluatorsConfig).items():
            config.evaluators[name] = OmegaConf.structured(get_args(schema)[0])
    if key.startswith("data.expected."):
        config.data.expected = OmegaConf.structured(Counts)
    step = max(1, 1e-6 * high) if "int" in hint else 1e-6 * max(1, high)
    for beyond in (low - step, high + step):
        beyond = int(beyond) if "int" in hint else beyond
        OmegaConf.update(config, key, [beyond] if "list" in hint else beyond)
        with pytest.raises(UserError, match=f"^{re.escape(key)} is .*, it must be"):
            validate(config)


@pytest.mark.parametrize(
    "override",
    ["trainer.lr_drop=1.5", "trainer.lr_on_divergence=7", "optimizer.averaging_start=2",
     "evaluators.dynamic.decay=[1e-3,60]", "optimizer.weight_decay=1e30", "model.rank=30000000",
     "model.rounds=70000", "model.num_layers=3000000", "model.mixture=5000"],
)  # fmt: skip
def test_a_number_that_means_nothing_is_refused(override: str) -> None:
    with pytest.raises(UserError, match=r"it must be at most [\d.]+$"):
        validate(compose_config(["evaluators=[static,dynamic]", override]))


@pytest.mark.parametrize(
    "override",
    [r"tracker.run_name=\${trainer.bptt}", r"tracker.group='of \${oc.env:HOME}'",
     r"tracker.tags=[good,'a\${b']", r"data.dir='texts/\${now}'"],
)  # fmt: skip
def test_what_a_saved_config_could_not_hold_is_refused_at_the_start(override: str) -> None:
    with pytest.raises(UserError, match=r"it must be printable text in one line, without \$\{"):
        validate(compose_config([override]))


def test_default_config_is_valid_and_round_trips(tmp_path: Path) -> None:
    config = validate(compose_config())
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config


SAVED = """data: {name: text, dir: here}
model: {cell: lstm, rounds: 2}
trainer: {max_epochs: 1}
"""


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (f"{SAVED}_target_: os.system\n", "unknown key _target_"),
        (f"{SAVED}tracker: {{entity: '${{oc.env:HOME}}'}}\n", "no plain value"),
        (f"{SAVED}tracker: {{tags: [a, 'b ${{run_dir:null}}']}}\n", "no plain value"),
        (f"{SAVED}seed: ${{trainer.max_epochs}}\n", "no plain value"),
        (f'{SAVED}tracker: {{group: "\\x24{{now:%s}}"}}\n', "no plain value"),
        (f"{SAVED}optimizer: {{lr: ???}}\n", "damaged"),
        (f"{SAVED}optimizer: {{lr: '???'}}\n", "no plain value"),
        ("a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n", "alias"),
        ("model: " + "{a: " * 30 + "1" + "}" * 30, "nested too deep"),
        ("#" * 2**19, "larger than"),
        (SAVED.replace("rounds: 2", "rounds: " + "7" * 5000), "damaged"),
        ("- model\n- trainer\n", "keys and values"),
        ("text", "unknown key text"),
        ("", "no end of training"),
        ("8", "damaged"),
        (f"{SAVED}seed: 1\nseed: 2\n", "duplicate key"),
        (f"{SAVED}optimizer: !!python/name:os.system\n", "damaged"),
        (f"{SAVED}optimizer: null\n", "'optimizer' is not Optional"),
        (f"{SAVED}regularization: 3\n", "RegularizationConfig"),
        (f"{SAVED}evaluators: {{static: {{temperature: {{low: 1}}}}}}\n", "Cannot merge"),
        (f"{SAVED}evaluators: {{static: {{temperature: [[1]]}}}}\n", "one value"),
        (f'{SAVED}tracker: {{run_name: "a\\e[2Jb"}}\n', "printable"),
        (SAVED.replace("name: text", "name: ../../text"), "part of file names"),
    ],
)
def test_a_strangers_config_is_refused_in_one_line(text: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(UserError) as caught:
        load_config(tmp_path / "config.yaml")
    assert says in str(caught.value) and str(caught.value).isprintable()


def test_a_saved_cache_and_a_hub_that_is_not_ours_are_not_obeyed(tmp_path: Path) -> None:
    own = ["data=text", "data.hub_path=else/where", f"data.cache_dir={tmp_path}/cache"]
    save_config(validate(compose_config(own)), tmp_path / "config.yaml")
    source = load_config(tmp_path / "config.yaml").data
    assert source.cache_dir is None and source.hub_path is None
    asked = [*own[1:], "data.hub_revision=1"]
    source = resume_config(compose_config(asked), tmp_path / "config.yaml", asked).data
    assert source.cache_dir == f"{tmp_path}/cache"
    assert (source.hub_path, source.hub_revision) == ("else/where", "1")
    for name in ("ptb", "wikitext2"):
        config = validate(compose_config([f"data={name}"]))
        save_config(config, tmp_path / "config.yaml")
        assert load_config(tmp_path / "config.yaml") == config


WINGS = {"inference", "launch", "library", "reports", "search", "texts", "tracking"}
LAYERS = {  # package → what it must not import, beside what ABOVE says
    "kernels": {"cells", "model", "training", "data", "evaluators", "options"},
    "cells": {"model", "training", "data", "evaluators", "options"},
    "data": {"kernels", "cells", "model", "training", "evaluators", "torch.nn"},
    "model": {"training", "evaluators", "options"},
    "evaluators": {"training", "config"},
    "regularization": {"training", "evaluators", "config"},
    "training": {"config"},
}  # fmt: skip
ABOVE = WINGS | {"runs", "hydra", "omegaconf", "wandb"}


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name.removeprefix("mogrifier_lm.") for name in names}


@pytest.mark.parametrize("layer", LAYERS)
def test_imports_point_downwards(layer: str) -> None:
    package = ROOT / "mogrifier_lm"
    files = [package / f"{layer}.py", *(package / layer).rglob("*.py")]
    for path in filter(Path.is_file, files):
        for name in imported(path):
            for banned in LAYERS[layer] | ABOVE:
                assert name != banned and not name.startswith(f"{banned}."), f"{path.name}: {name}"


@pytest.mark.parametrize(
    ("library", "place"),
    [("wandb", "tracking/tracker.py"), ("wandb_workspaces", "tracking/dashboard.py")],
)
def test_a_library_of_wandb_is_imported_in_one_place(library: str, place: str) -> None:
    package = ROOT / "mogrifier_lm"
    for path in package.rglob("*.py"):
        if path != package / place:
            assert library not in {name.split(".")[0] for name in imported(path)}, path


def test_ranges_name_the_key() -> None:
    with pytest.raises(UserError, match="trainer.clip is -1.0, it must be above 0"):
        validate(compose_config(["trainer.clip=-1"]))


def test_a_key_without_effect_is_named() -> None:
    overrides = ["model.rounds=0", "model.rank=3", "optimizer.averaging_decay=0.9", "seed=2"]
    config = validate(compose_config(overrides))
    assert without_effect(config, overrides) == ["model.rank", "optimizer.averaging_decay"]
    config = validate(compose_config([*overrides, "optimizer.averaging=ema", "model.rounds=1"]))
    assert without_effect(config, overrides) == []


def test_the_option_reference_is_what_the_schemas_say() -> None:
    spec = importlib.util.spec_from_file_location("options", ROOT / "scripts" / "options.py")
    assert spec is not None and spec.loader is not None
    options = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(options)
    assert options.PAGE.read_text() == options.page(), "python scripts/options.py writes it anew"


def test_a_config_of_a_later_version_is_refused(tmp_path: Path) -> None:
    save_config(validate(compose_config()), tmp_path / "config.yaml")
    text = (tmp_path / "config.yaml").read_text()
    for wrong in ("2", "two", "null", "[1]"):
        (tmp_path / "config.yaml").write_text(text.replace("version: 1", f"version: {wrong}"))
        with pytest.raises(UserError, match="is of version .*, the last known is 1"):
            load_config(tmp_path / "config.yaml")


def test_a_config_without_a_version_has_its_old_meaning(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(
        f"{SAVED.replace('rounds: 2', 'init: lamb')}"
        "evaluators: {static: {temperature: [0.8, 1.25]}, mc_dropout: {window: null}}\n"
    )
    config = load_config(tmp_path / "config.yaml")
    assert config.model.init == "melis2020" and config.evaluators.static is not None
    assert config.evaluators.static.temperature == [1.25, 0.8]
    assert config.evaluators.mc_dropout is not None
    assert config.evaluators.mc_dropout.window == config.trainer.bptt
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config


@pytest.mark.parametrize(
    "line",
    [f"seed: 0x{'f' * 5000}", f"version: 0b{'1' * 20_000}", f"seed: 1{':59' * 4000}",
     f"trainer: {{clip: 0x{'e' * 400}}}", f"data: {{shares: [{'1,' * 50_000}]}}"],
)  # fmt: skip
def test_numbers_and_lists_without_end_are_one_line(line: str, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(f"{line}\n")
    with pytest.raises(UserError, match=r"config\.yaml"):
        load_config(path)
