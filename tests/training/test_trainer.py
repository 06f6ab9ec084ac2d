"""The training step against its definition, and what the loop does beside it."""

import io
import json
import logging
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mogrifier_lm import terminal
from mogrifier_lm.data import ORDERS
from mogrifier_lm.errors import UserError
from mogrifier_lm.evaluators.score import Score
from mogrifier_lm.model import LanguageModel
from mogrifier_lm.options import ModelConfig, OptimizerConfig, RegularizationConfig, TrainerConfig
from mogrifier_lm.regularization import draw_masks
from mogrifier_lm.runs.build import build_model
from mogrifier_lm.runs.folder import RunFolder
from mogrifier_lm.training.averaging import Averaging
from mogrifier_lm.training.optim import build_optimizer, lr_factor
from mogrifier_lm.training.progress import window_length
from mogrifier_lm.training.trainer import Trainer

V, B, T = 30, 4, 10
IDS = np.random.default_rng(0).integers(0, V, 4 * 60).astype(np.uint16)


def constant() -> Score:
    return Score(nats=1.0, tokens=1, words=1, bytes=1)


def trainer_of(
    folder: Path,
    optimizer: dict[str, Any] | None = None,
    regularization: dict[str, Any] | None = None,
    validate: Callable[[], Score] = constant,
    **options: Any,
) -> Trainer:
    torch.manual_seed(0)
    model = build_model(ModelConfig(hidden_size=12, rounds=2), V)
    config = TrainerConfig(**{"bptt": T, "batch_size": B, "max_steps": 5, **options})
    return Trainer(
        model=model,
        train=ORDERS[config.streams](IDS, B, 0),
        optimizer=build_optimizer(
            OptimizerConfig(**{"name": "sgd", "lr": 0.5, **(optimizer or {})}), model.parameters()
        ),
        averaging=Averaging(model.parameters()),
        regularization=RegularizationConfig(**(regularization or {})),
        config=config,
        validate=validate,
        files=RunFolder(folder),
        seed=3,
    )


def weights(model: LanguageModel) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def lines(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("loss_per", ["token", "window"])
def test_a_step_is_the_clipped_gradient_of_the_whole_loss(tmp_path: Path, loss_per: str) -> None:
    """Nats, L2 (inside the clipping), AR and TAR, weight decay (outside), dropout masks."""
    r = {"l2": 0.03, "ar": 2.0, "tar": 1.0, "output_dropout": 0.5, "weight_dropout": 0.3}
    trainer = trainer_of(
        tmp_path, {"weight_decay": 0.01}, r, clip=0.3, loss_per=loss_per, max_steps=1
    )
    model = trainer.model
    before = {k: v.clone() for k, v in model.state_dict().items()}
    masks = draw_masks(
        trainer.regularization, model.mask_shapes, (T, B), torch.Generator().manual_seed(3)
    )
    inputs, targets = trainer.train.window(0, T)
    output, _ = model.outputs(inputs, model.zero_states(B), masks)
    dropped = output * masks["output"]
    logits = model.features(dropped) @ model.output_weight.T + model.output_bias
    nats = torch.nn.functional.cross_entropy(logits, targets.flatten(), reduction="sum")
    loss = nats / (T * B if loss_per == "token" else B)
    loss = loss + 2 * dropped.square().mean() + output.diff(dim=0).square().mean()
    loss = loss + 0.03 / 2 * sum(p.square().sum() for p in model.parameters())
    parameters = list(model.parameters())
    grads = torch.autograd.grad(loss, parameters)
    norm = torch.sqrt(sum(g.square().sum() for g in grads))
    assert norm > 0.3
    expected = [
        p.detach() - 0.5 * (0.3 / norm * g + 0.01 * p.detach())
        for p, g in zip(parameters, grads, strict=True)
    ]
    trainer.fit()
    trainer.load()
    torch.testing.assert_close(list(model.parameters()), expected, rtol=1e-4, atol=1e-6)
    assert not torch.equal(before["embedding_weight"], model.embedding_weight)
    assert lines(tmp_path)[0]["train/grad_norm"] == pytest.approx(norm.item(), rel=1e-4)


def test_a_recipe_for_summed_loss_is_that_for_mean_loss_times_the_window(tmp_path: Path) -> None:
    mean = trainer_of(tmp_path / "a", {"lr": 1.0}, {"l2": 0.01}, clip=0.2)
    summed = trainer_of(
        tmp_path / "b", {"lr": 1.0 / T}, {"l2": 0.01 * T}, clip=0.2 * T, loss_per="window"
    )
    for trainer in (mean, summed):
        trainer.metrics.parent.mkdir()
        trainer.fit()
    torch.testing.assert_close(weights(mean.model), weights(summed.model))


def test_reset_state_zeroes_whole_streams_at_the_rate_given(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, {"lr": 1e-9}, {"reset_state": 0.5})
    entered: list[Any] = []
    outputs = trainer.model.outputs
    trainer.model.outputs = lambda x, s, m: entered.append(s) or outputs(x, s, m)  # type: ignore[method-assign,func-returns-value]
    kept = []
    for _ in range(20):
        trainer.progress.position = 0
        trainer.states = [(torch.ones(B, 12), torch.ones(B, 12)) for _ in range(2)]
        trainer.step()
        rows = [torch.cat([h, c], 1) for h, c in entered[-1]]
        assert torch.equal(*rows) and set(rows[0].flatten().tolist()) <= {0.0, 1.0}
        assert (rows[0] == rows[0][:, :1]).all()
        kept += rows[0][:, 0].tolist()
    assert 0.3 < sum(kept) / len(kept) < 0.7


def test_variable_windows_are_awd_lstms_and_scale_the_rate(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, bptt=70, variable_bptt=True, streams="read_heads")
    drawn = (window_length(trainer.config, trainer.lengths) for _ in range(4000))
    lengths = np.fromiter(drawn, int)
    short = lengths < 52
    assert short.mean() == pytest.approx(0.05, abs=0.015)
    assert lengths[~short].mean() == pytest.approx(69.5, abs=0.5)  # int() cuts half a step
    assert lengths[~short].std() == pytest.approx(5, abs=0.4)
    assert lengths[short].mean() == pytest.approx(34.5, abs=2)
    before = trainer.progress.tokens
    trainer.step()
    assert trainer.lr == pytest.approx(0.5 * (trainer.progress.tokens - before) / B / 70)


def test_read_heads_carry_state_and_order_over_passes(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, {"lr": 1e-9}, streams="read_heads", bptt=25, max_epochs=None)
    seen = []
    window = trainer.train.window
    trainer.train.window = lambda start, n: seen.append(start) or window(start, n)  # type: ignore[method-assign,func-returns-value]
    for _ in range(6):
        trainer.step()
        assert all(h.any() for state in trainer.states for h in state)
    assert seen == [0, 25, 50, 75, 100, 125]
    assert trainer.progress.epoch == 150 // 60 and trainer.progress.position == 150 % 60


@pytest.mark.parametrize("streams", ["columns", "read_heads"])
def test_null_valid_every_validates_once_a_pass(tmp_path: Path, streams: str) -> None:
    trainer = trainer_of(tmp_path, streams=streams, bptt=25, max_steps=None, max_epochs=4)
    trainer.fit()
    passes = [line["epoch"] for line in lines(tmp_path) if "valid/ppl" in line]
    assert [int(epoch) for epoch in passes] == [1, 2, 3, 4]


def test_after_divergence_training_goes_back_to_the_best_weights(tmp_path: Path) -> None:
    scores = iter([3.0, 2.0, 2.5, 4.5, 2.6])  # the fourth is over twice the best
    trainer = trainer_of(
        tmp_path,
        {"name": "radam", "lr": 0.01},
        validate=lambda: Score(nats=math.log(next(scores)), tokens=1, words=1, bytes=1),
        valid_every=1,
        lr_on_divergence=0.9,
    )
    states = {}
    log = lambda line: states.setdefault(line["step"], weights(trainer.model))  # noqa: E731
    go_back = trainer._go_back
    backs: list[tuple[int, torch.Tensor]] = []

    def spy(reason: str) -> None:
        go_back(reason)
        backs.append((trainer.progress.step, weights(trainer.model)))
        assert not any(h.any() for state in trainer.states for h in state)
        assert not any(v.any() for s in trainer.optimizer.state.values() for v in s.values())

    trainer._go_back = spy  # type: ignore[method-assign]
    trainer.fit(log)
    assert [step for step, _ in backs] == [4]
    assert torch.equal(backs[0][1], states[2])
    assert trainer.peak_lr == pytest.approx(0.009)


def test_a_loss_that_is_not_finite_is_divergence(tmp_path: Path) -> None:
    for factor in (None, 0.5):
        folder = tmp_path / str(factor)
        folder.mkdir()
        trainer = trainer_of(folder, valid_every=2, log_every=1, lr_on_divergence=factor)

        def poison(line: Any, trainer: Trainer = trainer) -> None:
            if line["step"] == 3:
                with torch.no_grad():
                    trainer.model.output_bias.fill_(math.nan)

        if factor is None:
            with pytest.raises(UserError, match="the loss is nan .* after step 4"):
                trainer.fit(poison)
        else:
            trainer.fit(poison)
            assert trainer.progress.step == 5 and trainer.peak_lr == 0.25
            assert weights(trainer.model).isfinite().all()


def test_dropout_samples_are_streams_with_states_of_their_own(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, regularization={"weight_dropout": 0.5, "samples": 3})
    assert trainer.states[0][0].shape == (3 * B, 12)
    trainer.step()
    assert trainer.progress.tokens == T * B


# Whatever a part of the streams could get wrong: masks, states, means over streams, short columns.
MASKED = {"input_dropout": 0.3, "output_dropout": 0.3, "state_dropout": 0.3, "weight_dropout": 0.3}
MASKED |= {"embedding_dropout": 0.2, "inter_layer_dropout": 0.3}


@pytest.mark.parametrize("parts", [2, 4])
@pytest.mark.parametrize(
    "extra, options",
    [
        ({"per_step": True, "ar": 2.0, "tar": 1.0, "samples": 3}, {}),
        ({"reset_state": 0.5, "l2": 0.01}, {"loss_per": "window", "streams": "read_heads"}),
    ],
)
def test_accumulated_parts_of_the_streams_train_as_all_at_once(
    tmp_path: Path, parts: int, extra: dict[str, Any], options: dict[str, Any]
) -> None:
    trainers = []
    for n in (1, parts):
        folder = tmp_path / str(n)
        folder.mkdir()
        trainer = trainer_of(
            folder, {"lr": 0.1}, MASKED | extra, accumulation_steps=n, bptt=7, **options
        )
        trainer.train.ids = trainer.train.ids[:-1]
        sizes: list[int] = []
        outputs = trainer.model.outputs

        def spy(x: torch.Tensor, *rest: Any, outputs: Any = outputs, sizes: Any = sizes) -> Any:
            sizes.append(x.shape[1])
            return outputs(x, *rest)

        trainer.model.outputs = spy  # type: ignore[method-assign]
        trainer.fit()
        samples = extra.get("samples", 1)
        assert set(sizes) == {B * samples // n} and len(sizes) == 5 * n
        trainers.append(trainer)
    one, split = trainers
    torch.testing.assert_close(weights(split.model), weights(one.model), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(split.states, one.states, rtol=1e-4, atol=1e-5)
    for a, b in zip(lines(tmp_path / "1"), lines(tmp_path / str(parts)), strict=True):
        clock = ("seconds", "train/tokens_per_second")
        assert all(a[k] == pytest.approx(b[k], rel=1e-4) for k in a if k not in clock)


@pytest.mark.parametrize("lr_decay", ["none", "linear", "cosine"])
def test_the_rate_is_what_torchs_schedulers_give(lr_decay: str) -> None:
    config, steps = TrainerConfig(warmup_steps=7, lr_decay=lr_decay, max_steps=30), 30
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], 0.3)
    s = torch.optim.lr_scheduler
    parts: list[Any] = [s.LinearLR(optimizer, 1 / 7, total_iters=6)]
    if lr_decay == "linear":
        parts.append(s.LinearLR(optimizer, 1.0, 0.0, steps))
    if lr_decay == "cosine":
        parts.append(s.CosineAnnealingLR(optimizer, steps))
    schedule = s.ChainedScheduler(parts)
    for step in range(steps):
        ours = 0.3 * lr_factor(config, step, step / steps)
        assert ours == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9, abs=1e-12)
        optimizer.step()
        schedule.step()


def test_the_trainer_follows_the_rate(tmp_path: Path) -> None:
    options = {"warmup_steps": 3, "lr_decay": "cosine", "log_every": 1, "max_steps": 8}
    trainer_of(tmp_path, **options).fit()
    rates = [line["train/lr"] for line in lines(tmp_path) if "train/lr" in line]
    config = TrainerConfig(**options)
    assert rates == pytest.approx([0.5 * lr_factor(config, i, i / 8) for i in range(8)])
    assert max(rates) == rates[2] and rates[0] < rates[1] > rates[-1]


def test_without_a_terminal_the_log_says_how_far_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with caplog.at_level(logging.INFO):
        trainer_of(tmp_path, log_every=1).fit()
        assert "/5 step" not in caplog.text  # within a minute
        monkeypatch.setattr(terminal, "LINES", 1e-9)
        (tmp_path / "metrics.jsonl").unlink()
        trainer_of(tmp_path, log_every=1).fit()
    said = [line for line in caplog.messages if "/5 step [" in line]
    assert [line[0] for line in said] == ["1", "2", "3", "4", "5"]
    assert "tokens/s, ppl " in said[-1] and "<00:00" in said[-1]
    assert "\r" not in sys.stderr.getvalue()  # type: ignore[attr-defined]
