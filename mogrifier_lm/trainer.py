"""The training loop: truncated backpropagation with carried state, exactly resumable.

Everything that the next step depends on is written by `Trainer.save`: a run that is killed at any
moment and resumed goes on from the last checkpoint to the same weights, bit for bit on one device
and thread count.
"""

import json
import logging
import math
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from mogrifier_lm import checkpoint
from mogrifier_lm.config import TrainerConfig
from mogrifier_lm.data import IGNORE, Streams
from mogrifier_lm.errors import UserError
from mogrifier_lm.evaluators import Score
from mogrifier_lm.graphs import Graphed
from mogrifier_lm.model import LanguageModel
from mogrifier_lm.regularization import Masks, Rates, draw_masks

log = logging.getLogger(__name__)

Track = Callable[[Mapping[str, float]], None]


@dataclass
class Progress:
    """Where training stands; plain values, saved with each checkpoint."""

    epoch: int = 0  # passes begun before this one
    position: int = 0  # time steps of this pass that are done
    step: int = 0  # windows done in all
    tokens: int = 0  # targets trained on in all
    seconds: float = 0.0  # spent, validation included, over all parts of a resumed run
    pause_seconds: float = 0.0  # the part spent on validations and checkpoints
    best_ppl: float = math.inf
    best_step: int = 0
    since_best: int = 0  # validations
    since_drop: int = 0  # validations without improvement since the last drop of the rate
    metrics_bytes: int = 0  # length of metrics.jsonl
    run_id: str | None = None  # the tracker's
    finished: str | None = None  # why training ended


class Trainer:
    """Trains `model` and keeps the best weights by validation perplexity.

    Args:
        model: already on its device.
        train: streams of the training text.
        optimizer: over the model's parameters.
        rates: dropout.
        config: see `TrainerConfig`.
        validate: scores the validation text with the current weights.
        run_dir: where metrics.jsonl and checkpoints/ are written.
        seed: of the dropout masks.
    """

    def __init__(
        self,
        *,
        model: LanguageModel,
        train: Streams,
        optimizer: torch.optim.Optimizer,
        rates: Rates,
        config: TrainerConfig,
        validate: Callable[[], Score],
        run_dir: Path,
        seed: int,
    ) -> None:
        self.model, self.train, self.optimizer, self.rates = model, train, optimizer, rates
        self.config, self.validate, self.run_dir = config, validate, run_dir
        self.device = model.output_bias.device
        self.generator = torch.Generator(self.device).manual_seed(seed)
        self.progress = Progress()
        self.states = model.zero_states(train.batch_size)
        # Sums since the last line of metrics: nats, squared gradient norms, tokens, steps.
        self.sums = torch.zeros(4, dtype=torch.float64, device=self.device)
        self.peak_lr = self.lr  # before decay
        self._update = Graphed(self._update_eagerly, self.device)

    # -- saving and resuming -------------------------------------------------------------------

    def save(self) -> None:
        """Write checkpoints/last: weights, optimizer, carried state, generator, progress."""
        tensors = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        optimizer = self.optimizer.state_dict()
        for index, slots in optimizer["state"].items():
            tensors |= {f"optimizer.{index}.{k}": v for k, v in slots.items() if v is not None}
        for i, (h, c) in enumerate(self.states):
            tensors |= {f"state.{i}.h": h, f"state.{i}.c": c}
        tensors |= {"generator": self.generator.get_state(), "sums": self.sums}
        values = {"progress": asdict(self.progress), "peak_lr": self.peak_lr}
        checkpoint.save(self.run_dir / checkpoint.LAST, tensors, values)

    def load(self) -> None:
        """Go back to checkpoints/last; metrics.jsonl is cut to what it held then."""
        tensors, values = checkpoint.load(self.run_dir / checkpoint.LAST)

        def part(prefix: str) -> dict[str, Tensor]:
            return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

        try:
            self.model.load_state_dict(part("model."))
            optimizer = self.optimizer.state_dict()
            for key, value in part("optimizer.").items():
                index, slot = key.split(".")
                optimizer["state"].setdefault(int(index), {})[slot] = value
            self.optimizer.load_state_dict(optimizer)
            self.peak_lr = values["peak_lr"]
            for i, (h, c) in enumerate(self.states):
                h.copy_(tensors[f"state.{i}.h"])
                c.copy_(tensors[f"state.{i}.c"])
            self.generator.set_state(tensors["generator"])
            self.sums.copy_(tensors["sums"])
            # Asked anew, since a resumed run may have been given further limits.
            self.progress = Progress(**{**values["progress"], "finished": None})
            self.progress.finished = self._finished()
        except (KeyError, RuntimeError, TypeError) as error:
            raise UserError(
                f"{self.run_dir / checkpoint.LAST} does not fit this run: {error}"
            ) from error
        metrics = self.run_dir / "metrics.jsonl"
        if metrics.is_file():
            with open(metrics, "r+b") as file:
                file.truncate(self.progress.metrics_bytes)

    @property
    def lr(self) -> float:
        return float(self.optimizer.param_groups[0]["lr"])

    @lr.setter
    def lr(self, value: float) -> None:
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):  # on a GPU, where a captured graph reads it
                group["lr"].fill_(value)
            else:
                group["lr"] = value

    # -- the loop ------------------------------------------------------------------------------

    def fit(self, track: Track = lambda line: None) -> None:
        """Train until a limit is reached, then load the best weights into the model.

        Args:
            track: called with each line of metrics.jsonl.

        Raises:
            UserError: the loss is not finite.
        """
        p, config = self.progress, self.config
        began, before = time.monotonic(), p.seconds
        last_save, mark, mark_tokens = began, began, p.tokens
        bar = tqdm(
            total=self.total_steps, initial=p.step, unit="step", disable=None, dynamic_ncols=True
        )
        with bar, logging_redirect_tqdm():
            while not p.finished:
                self._step()
                now = time.monotonic()
                p.seconds = before + now - began
                p.finished = self._finished()
                bar.update()
                validate = self._validation_due()
                if p.step % config.log_every == 0 or validate:
                    rate = (p.tokens - mark_tokens) / (now - mark)
                    ppl = self._log_training(rate, track)
                    bar.set_postfix_str(f"{rate:,.0f} tokens/s, ppl {ppl:.1f}")
                    mark, mark_tokens = now, p.tokens
                if validate:
                    self._validate(track)
                if validate or now - last_save > 60 * config.checkpoint_minutes:
                    pause = time.monotonic() - now
                    p.seconds, p.pause_seconds = p.seconds + pause, p.pause_seconds + pause
                    self.save()
                    last_save = time.monotonic()
                    mark += last_save - now  # the rate is that of training alone
        log.info("training ended: %s", p.finished)
        best, _ = checkpoint.load(self.run_dir / checkpoint.BEST)
        self.model.load_state_dict(best)

    @property
    def total_steps(self) -> int | None:
        """Steps until max_steps or max_epochs; None when only time ends."""
        epoch = math.ceil(self.train.num_steps / self.config.bptt)
        by_epochs = self.config.max_epochs and epoch * self.config.max_epochs
        return min(filter(None, (self.config.max_steps, by_epochs)), default=None)

    def _precision(self) -> AbstractContextManager[Any]:
        if self.config.precision == "bf16":
            # A cache of cast weights would outlive the update inside a captured graph.
            return torch.autocast(self.device.type, torch.bfloat16, cache_enabled=False)
        return nullcontext()

    def _step(self) -> None:
        """One window; nothing here waits for the device."""
        p = self.progress
        inputs_TB, targets_TB = self.train.window(p.position, self.config.bptt)
        num_steps, batch_size = inputs_TB.shape
        num_tokens = int((targets_TB != IGNORE).sum())
        if self.config.lr_decay == "linear" and self.total_steps is not None:
            self.lr = self.peak_lr * (1 - p.step / self.total_steps)
        else:
            self.lr = self.peak_lr
        masks = draw_masks(
            self.rates, self.model.mask_sizes, (num_steps, batch_size), self.generator
        )
        self._update(
            inputs_TB.to(self.device, non_blocking=True),
            targets_TB.to(self.device, non_blocking=True),
            torch.tensor(float(num_tokens), device=self.device),
            *masks.flatten(),
        )
        p.step += 1
        p.tokens += num_tokens
        p.position += num_steps
        if p.position >= self.train.num_steps:
            p.epoch, p.position = p.epoch + 1, 0
            for state in self.states:
                for tensor in state:
                    tensor.zero_()

    def _update_eagerly(
        self,
        inputs_TB: Tensor,
        targets_TB: Tensor,
        num_tokens: Tensor,
        *masks: Tensor | None,
    ) -> None:
        """Loss, gradient, clipping and update of one window; states and sums in their place."""
        with self._precision():
            nats, states = self.model.loss(
                inputs_TB, targets_TB, self.states, Masks.unflatten(masks)
            )
        self.optimizer.zero_grad(set_to_none=True)
        (nats / num_tokens).backward()  # type: ignore[no-untyped-call]
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip or math.inf)
        self.optimizer.step()
        with torch.no_grad():
            for old, new in zip(self.states, states, strict=True):
                old[0].copy_(new[0])
                old[1].copy_(new[1])
            self.sums += torch.stack([nats, norm**2, num_tokens, torch.ones_like(nats)])

    def _finished(self) -> str | None:
        """Why training ends here, or None."""
        p, config = self.progress, self.config
        if config.max_steps is not None and p.step >= config.max_steps:
            return f"{p.step} steps"
        if config.max_epochs is not None and p.epoch >= config.max_epochs:
            return f"{p.epoch} epochs"
        if config.max_minutes is not None and p.seconds >= 60 * config.max_minutes:
            return f"{p.seconds / 60:.1f} minutes"
        if config.early_stop is not None and p.since_best >= config.early_stop:
            return f"no improvement in {p.since_best} validations"
        return None

    def _validation_due(self) -> bool:
        every = self.config.valid_every
        at_rhythm = self.progress.step % every == 0 if every else self.progress.position == 0
        return at_rhythm or self.progress.finished is not None

    def _write(self, metrics: dict[str, float], track: Track) -> None:
        p = self.progress
        line = {
            "step": p.step,
            "epoch": p.epoch + p.position / self.train.num_steps,
            "tokens": p.tokens,
            "seconds": round(p.seconds, 3),
            **metrics,
        }
        with open(self.run_dir / "metrics.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")
            p.metrics_bytes = file.tell()
        track(line)

    def _log_training(self, rate: float, track: Track) -> float:
        """Write the means since the last line; returns the perplexity."""
        nats, square_norms, tokens, steps = self.sums.tolist()
        self.sums.zero_()
        mean = nats / tokens
        if not math.isfinite(mean + square_norms):
            raise UserError(
                f"the loss is {mean} and the squared gradient norm {square_norms} after step "
                f"{self.progress.step}: lower optimizer.lr or trainer.clip"
            )
        ppl = math.exp(min(mean, 700))
        self._write(
            {
                "train/nats": mean,
                "train/ppl": ppl,
                "train/grad_norm": math.sqrt(square_norms / steps),
                "train/lr": self.lr,
                "train/tokens_per_second": round(rate, 1),
            },
            track,
        )
        return ppl

    def _validate(self, track: Track) -> None:
        """Score the validation text; keep the weights if best; drop the rate or stop if not."""
        p, config = self.progress, self.config
        with self._precision():
            score = self.validate()
        improved = score.ppl < p.best_ppl
        if improved:
            p.best_ppl, p.best_step, p.since_best, p.since_drop = score.ppl, p.step, 0, 0
            checkpoint.save(
                self.run_dir / checkpoint.BEST,
                self.model.state_dict(),
                {"step": p.step, "valid_ppl": score.ppl},
            )
        else:
            p.since_best += 1
            p.since_drop += 1
        log.info(
            "epoch %.2f  step %d  %.0f s  lr %.3g  validation ppl %.2f%s",
            p.epoch + p.position / self.train.num_steps,
            p.step,
            p.seconds,
            self.lr,
            score.ppl,
            "" if improved else f" (best {p.best_ppl:.2f})",
        )
        self._write({"valid/nats": score.nats / score.words, "valid/ppl": score.ppl}, track)
        if p.since_drop > config.lr_patience and config.lr_drop != 1:
            p.since_drop = 0
            self.peak_lr *= config.lr_drop
        p.finished = p.finished or self._finished()
