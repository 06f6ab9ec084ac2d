"""The W&B workspace and report of this project's runs, built through wandb-workspaces.

Keys of metrics and settings are those of metrics.jsonl, summary.json and config.yaml.
"""

import json
from typing import Any

from mogrifier_lm.errors import UserError

NAME = "Mogrifier LSTM"
VALID, TEST = "valid/static/ppl", "test/static/ppl"
ROUNDS, HIDDEN = "model.rounds", "model.hidden_size"
CURVES = (  # title, x, y
    ("Training perplexity", "tokens", "train/ppl"),
    ("Validation perplexity", "tokens", "valid/ppl"),
    ("Validation perplexity by epoch", "epoch", "valid/ppl"),
    ("Validation perplexity by seconds", "seconds", "valid/ppl"),
    ("Gradient norm before clipping", "tokens", "train/grad_norm"),
    ("Learning rate", "tokens", "train/lr"),
    ("Tokens per second", "tokens", "train/tokens_per_second"),
)
SYSTEM = ("system.proc.memory.rssMB", "system.cpu", "system.gpu.0.gpu", "system.gpu.0.memory")
COSTS = ("params", "seconds", "tokens", "tokens_per_second")
PARALLEL = (
    ROUNDS,
    HIDDEN,
    "model.num_layers",
    "optimizer.lr",
    "regularization.input_dropout",
    "regularization.state_dropout",
    "regularization.output_dropout",
)


def _libraries() -> tuple[Any, Any]:
    """Reports, whose panels workspaces use too, and workspaces."""
    try:
        from wandb_workspaces import workspaces
        from wandb_workspaces.reports import v2
    except ImportError as error:
        raise UserError(
            'dashboards need wandb-workspaces: pip install "mogrifier_lm[dashboards]"'
        ) from error
    return v2, workspaces


def sections() -> dict[str, list[Any]]:
    """Title → panels. Each call makes new ones: saving gives them ids."""
    wr, _ = _libraries()
    over_seeds = {"groupby_aggfunc": "mean", "groupby_rangefunc": "stddev"}
    column = wr.ParallelCoordinatesPlotColumn
    settings = [column(metric=wr.Config(key), display_name=key) for key in PARALLEL]
    return {
        "Rounds": [
            *(
                # Over the last row of each run, which holds its rounds and final perplexities.
                wr.LinePlot(
                    title=f"{split} perplexity against rounds by hidden size, mean ± sd",
                    x="rounds",
                    y=[key],
                    groupby=wr.Config(HIDDEN),
                    **over_seeds,
                )
                for split, key in (("Validation", VALID), ("Test", TEST))
            ),
            wr.BarPlot(
                title="Validation perplexity by rounds, mean ± sd",
                metrics=[VALID],
                groupby=wr.Config(ROUNDS),
                orientation="v",
                **over_seeds,
            ),
            wr.ScatterPlot(
                title="Each run",
                x=wr.Config(ROUNDS),
                y=wr.SummaryMetric(VALID),
                z=wr.Config(HIDDEN),
            ),
        ],
        "Curves": [wr.LinePlot(title=title, x=x, y=[y]) for title, x, y in CURVES],
        "Cost": [
            wr.ScatterPlot(
                title=f"Validation perplexity against {key}",
                x=wr.SummaryMetric(key),
                y=wr.SummaryMetric(VALID),
            )
            for key in COSTS
        ],
        "Settings": [
            wr.ParallelCoordinatesPlot(
                title="Settings and validation perplexity",
                columns=[*settings, column(metric=wr.SummaryMetric(VALID), log=True)],
            )
        ],
        "System": [
            wr.LinePlot(title=key.removeprefix("system."), x="RelativeTime(Process)", y=[key])
            for key in SYSTEM
        ],
    }


def _filter(job_type: str, group: str) -> str:
    """Of runs; json.dumps quotes as the filter's grammar, which is Python's, does."""
    text = f"Metric('JobType') == {json.dumps(job_type)}"
    return text + (f" and Metric('Group') == {json.dumps(group)}" if group else "")


def build_workspace(project: str, entity: str, group: str = "") -> Any:
    """A workspace of the training runs of a project; nothing is sent.

    Args:
        group: of a sweep; "" for every run.

    Raises:
        UserError: wandb-workspaces is missing.
    """
    _, ws = _libraries()
    return ws.Workspace(
        entity=entity,
        project=project,
        name=f"{NAME}: {group}" if group else NAME,
        sections=[
            ws.Section(name=name, panels=panels, is_open=name != "System")
            for name, panels in sections().items()
        ],
        settings=ws.WorkspaceSettings(x_axis="tokens", max_runs=100),
        runset_settings=ws.RunsetSettings(
            filters=_filter("train", group), groupby=[ws.Config(HIDDEN), ws.Config(ROUNDS)]
        ),
    )


def to_json(workspace: Any) -> str:
    """A workspace as the server takes it."""
    # The library has no public way to a workspace that is not saved.
    model = workspace._to_model()
    return str(model.model_dump_json(by_alias=True, exclude_none=True, indent=2))


def build_report(project: str, entity: str, group: str = "") -> Any:
    """A W&B report with the same panels, and the tables and plots of the sweeps."""
    wr, _ = _libraries()

    def grid(panels: list[Any], job_type: str = "train") -> Any:
        runs = wr.Runset(
            entity=entity, project=project, name=job_type, filters=_filter(job_type, group)
        )
        return wr.PanelGrid(runsets=[runs], panels=panels)

    blocks = []
    for name, panels in sections().items():
        blocks += [wr.H2(text=name), grid(panels)]
    plots = wr.MediaBrowser(title="Plots of sweeps", media_keys=["sweep/plot"])
    return wr.Report(
        entity=entity,
        project=project,
        title=f"{NAME}: {group}" if group else NAME,
        description="Perplexity per word; mean and sample standard deviation over seeds.",
        blocks=[*blocks, wr.H2(text="Sweeps"), grid([plots], "report")],
        width="fluid",
    )


def save(view: Any) -> str:
    """Save a workspace or a report on the W&B server; returns its address.

    Raises:
        UserError: without an account, such a project or the server.
    """
    try:
        return str(view.save().url)
    except Exception as error:  # the library raises what it comes across
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"W&B has not saved {view.entity}/{view.project}: {reason}") from error
