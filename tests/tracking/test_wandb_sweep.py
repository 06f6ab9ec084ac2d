"""Files for `wandb sweep` hold what the project's own grids and spaces hold."""

import itertools

import pytest
import yaml

from mogrifier_lm.config import validate
from mogrifier_lm.errors import UserError
from mogrifier_lm.launch.commands.wandb_sweep import main
from mogrifier_lm.launch.job import compose_grid
from mogrifier_lm.tracking.wandb_sweep import grid_file, search_file
from tests.conftest import ROOT, compose_config

GRIDS = sorted(path.stem for path in (ROOT / "configs/sweep").glob("*.yaml"))


def expanded(sweep: dict[str, object], job: dict[str, object]) -> list[str]:
    """Arguments of train.py, as wandb's agent expands a command: by wandb's own code."""
    utils = pytest.importorskip("wandb.sdk.launch.sweeps.utils")
    macros = utils.create_sweep_command_args({"args": {k: {"value": v} for k, v in job.items()}})
    macros |= {"env": [], "interpreter": ["python"], "program": [sweep["program"]]}
    arguments: list[str] = []
    for chunk in utils.create_sweep_command(sweep["command"]):
        arguments += macros[chunk[2:-1]] if chunk.startswith("${") else [chunk]
    assert arguments[:2] == ["python", "train.py"]
    return [a for a in arguments[2:] if not a.startswith("hydra.mode")]


@pytest.mark.parametrize("name", GRIDS)
def test_a_grid_for_wandb_has_the_runs_of_the_sweep(name: str) -> None:
    sweep, grid = yaml.safe_load(grid_file(name, [])), compose_grid([f"sweep={name}"])
    assert sweep["method"] == "grid" and sweep["metric"]["name"] == "valid/static/ppl"
    values = {key: spec["values"] for key, spec in sweep["parameters"].items()}
    assert {key: list(map(str, v)) for key, v in values.items()} == grid
    assert len(list(itertools.product(*values.values()))) >= 15
    own = compose_config([f"sweep={name}", *(f"{k}={v[-1]}" for k, v in grid.items())])
    config = validate(own)
    theirs = validate(compose_config(expanded(sweep, {k: v[-1] for k, v in values.items()})))
    theirs.tracker.mode = config.tracker.mode
    assert theirs == config


def test_a_space_for_wandb_has_its_ranges() -> None:
    fixed = ["experiment=ptb_mogrifier_24m", "regularization.l2=0"]
    sweep = yaml.safe_load(search_file("melis2020", fixed))
    assert sweep["method"] == "bayes" and sweep["early_terminate"]["type"] == "hyperband"
    spec = sweep["parameters"]
    assert "regularization.l2" not in spec, "what is given is not searched"
    assert spec["optimizer.lr"] == {
        "distribution": "log_uniform_values", "min": 0.001, "max": 0.004
    }  # fmt: skip
    assert spec["model.rounds"] == {"distribution": "int_uniform", "min": 0, "max": 6}
    assert spec["model.rank"] == {"values": ["null", 1, 26, 50, 75, 100]}
    values = {k: s.get("values") or [s["min"], s["max"]] for k, s in spec.items()}
    first = {k: v[0] for k, v in values.items()}
    for key, value in ((k, v) for k, options in values.items() for v in options):
        config = validate(compose_config(expanded(sweep, first | {key: value})))
        assert config.regularization.l2 == 0 and config.data.name == "ptb"


def test_what_cannot_be_a_sweep_is_one_line() -> None:
    with pytest.raises(UserError, match="give either sweep=NAME or space=NAME"):
        main("model.rounds=1")
    with pytest.raises(UserError, match="no space=melis; did you mean melis2020?"):
        main(space="melis")
