"""The training loop: truncated backpropagation with carried state, exactly resumable.

Everything that the next step depends on is written by `Trainer.save`: a run that is killed at any
moment and resumed goes on from the last checkpoint to the same weights, bit for bit on one device
and thread count.
"""

import logging
import math
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import asdict

import torch
from torch import Tensor
from tqdm.contrib.logging import logging_redirect_tqdm

from mogrifier_lm.data import IGNORE, Streams
from mogrifier_lm.errors import UserError, one_line
from mogrifier_lm.evaluators.score import Score, perplexity
from mogrifier_lm.kernels.graphs import Graphed, sent
from mogrifier_lm.model import LanguageModel, States, copy_values
from mogrifier_lm.options import RegularizationConfig, TrainerConfig
from mogrifier_lm.regularization import activation_penalty, draw_masks, drop, masked, of_streams
from mogrifier_lm.terminal import progress_bar
from mogrifier_lm.training import checkpoint, metrics
from mogrifier_lm.training.averaging import Averaging, swapped
from mogrifier_lm.training.checkpoint import Checkpoints, Files
from mogrifier_lm.training.optim import lr_factor, set_lr
from mogrifier_lm.training.parallel import Processes
from mogrifier_lm.training.progress import Progress, Stopwatch, total_steps, window_length
from mogrifier_lm.training.signals import HeldSignals

log = logging.getLogger(__name__)

Track = Callable[[Mapping[str, float]], None]

DIVERGED = 2.0  # times the best validation perplexity


class Trainer:
    """Trains `model` and keeps the best weights by validation perplexity.

    Args:
        model: already on its device.
        train: streams of the training text, of which each process takes its share.
        optimizer: over the model's parameters.
        averaging: of the model's parameters.
        regularization: see `RegularizationConfig`.
        config: see `TrainerConfig`.
        validate: scores the validation text with the current weights.
        files: where metrics and checkpoints are written.
        seed: of the dropout masks and of variable window lengths.
        processes: that train together; default this one alone.
    """

    def __init__(
        self,
        *,
        model: LanguageModel,
        train: Streams,
        optimizer: torch.optim.Optimizer,
        averaging: Averaging,
        regularization: RegularizationConfig,
        config: TrainerConfig,
        validate: Callable[[], Score],
        files: Files,
        seed: int,
        processes: Processes | None = None,
    ) -> None:
        self.model, self.train, self.optimizer, self.averaging = model, train, optimizer, averaging
        self.regularization = regularization
        self.config, self.validate, self.metrics = config, validate, files.metrics
        self.checkpoints = Checkpoints(files, config.keep_last, config.keep_best)
        self.device = model.output_bias.device
        self.generator = torch.Generator(self.device).manual_seed(seed)  # of masks
        self.lengths = torch.Generator().manual_seed(seed)  # of windows
        self.progress = Progress()
        self.processes = processes or Processes()
        # The dropout samples of one stream stand side by side, each with a state of its own.
        self.columns = self.processes.columns(train.batch_size * regularization.samples)
        self.states = model.zero_states(self.columns.stop - self.columns.start)
        # Sums since the last line of metrics: nats, squared gradient norms, tokens, steps.
        self.sums = torch.zeros(4, dtype=torch.float64, device=self.device)
        self.peak_lr = self.lr  # before decay
        alone = self.processes.size == 1  # graphs of sums over devices have not been tried
        self._update = Graphed(self._update_eagerly, self.device) if alone else self._update_eagerly

    def save(self) -> None:
        """Write a checkpoint: weights, optimizer, averages, state, generators, progress."""
        tensors = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        tensors |= checkpoint.optimizer_tensors(self.optimizer)
        states = self.model.named_states(self.states)
        tensors |= {name: self.processes.gather(s) for name, s in states.items()}
        averages, averaging = self.averaging.state_dict()
        tensors |= {f"averaging.{k}": v for k, v in averages.items()}
        tensors |= {"generator": self.generator.get_state(), "lengths": self.lengths.get_state()}
        tensors |= {"sums": self.sums}
        progress = asdict(self.progress)
        values = {"progress": progress, "peak_lr": self.peak_lr, "averaging": averaging}
        self.processes.first(lambda: self.checkpoints.save(tensors, values))

    def load(self) -> None:
        """Go back to the last checkpoint; the log of metrics is cut to what it held then.

        Raises:
            UserError: no checkpoint, a damaged one, or one of another run.
        """
        tensors, values = self.checkpoints.load(self.processes)
        try:
            self.model.load_state_dict(checkpoint.part(tensors, "model."))
            checkpoint.load_optimizer(self.optimizer, tensors)
            if not 0 < values["peak_lr"] < math.inf:
                raise ValueError(f"peak_lr is {values['peak_lr']}")
            self.peak_lr = float(values["peak_lr"])
            for name, s in self.model.named_states(self.states).items():
                saved = tensors[name][self.columns]
                checkpoint.check_shape(name, saved, s)
                s.copy_(saved)
            averages = checkpoint.part(tensors, "averaging.")
            self.averaging.load_state_dict(averages, values["averaging"])
            self.generator.set_state(tensors["generator"])
            self.lengths.set_state(tensors["lengths"])
            checkpoint.check_shape("sums", tensors["sums"], self.sums)
            self.sums.copy_(tensors["sums"])
            # Asked anew, since a resumed run may have been given further limits.
            self.progress = Progress.from_saved(values["progress"])
            if self.progress.position > self.train.num_steps:
                raise ValueError(f"position is {self.progress.position}, beyond the text")
            self.progress.finished = self.progress.why_ended(self.config)
        except (LookupError, RuntimeError, AttributeError, TypeError, ValueError) as error:
            reason = one_line(error)
            raise UserError(f"the last checkpoint does not fit this run: {reason}") from error
        if self.processes.is_first:
            p = self.progress
            p.metrics_bytes = metrics.cut(self.metrics, p.metrics_bytes)
            self.checkpoints.settle(p.step)

    @property
    def lr(self) -> float:
        return float(self.optimizer.param_groups[0]["lr"])

    def fit(self, track: Track = lambda line: None) -> None:
        """Train until a limit is reached, then load the best weights into the model.

        Args:
            track: called with each line of the log of metrics.

        Raises:
            UserError: the loss is not finite; a checkpoint cannot be written.
        """
        p, config = self.progress, self.config
        watch = Stopwatch(self.processes.clock)
        saved, mark, mark_tokens = p.seconds, p.training_seconds, p.tokens
        total = total_steps(self.train, self.config)
        bar = progress_bar(total=total, initial=p.step, unit="step")
        with closing(self.checkpoints), bar, logging_redirect_tqdm(), HeldSignals() as signals:
            while not p.finished:
                passes = p.epoch
                self.step()
                self.checkpoints.close(wait=False)
                p.seconds += watch.lap()
                p.finished = p.why_ended(config)
                bar.update()
                validate = self._validation_due(p.epoch > passes)
                if p.step % config.log_every == 0 or validate:
                    speed = (p.tokens - mark_tokens) / (p.training_seconds - mark)
                    ppl = self._log_training(speed, track)
                    bar.set_postfix_str(f"{speed:,.0f} tokens/s, ppl {ppl:.1f}", refresh=False)
                    mark, mark_tokens = p.training_seconds, p.tokens
                if validate:
                    self._validate(track)
                ending = self.processes.most(signals.received or 0)
                if validate or ending or p.seconds - saved > 60 * config.checkpoint_minutes:
                    p.pause(watch.lap())  # before it is saved, and once more for the saving
                    self.save()
                    p.pause(watch.lap())
                    saved = p.seconds
                if ending:
                    self.checkpoints.close()
                    signals.deliver(ending)
            if p.best_ppl == math.inf and not p.since_best:  # resumed with a limit passed before
                self._validate(track)
                self.save()
        log.info("training ended: %s", p.finished)
        if p.best_ppl == math.inf:
            raise UserError(
                "validation perplexity was never finite: lower optimizer.lr or trainer.clip"
            )
        self.checkpoints.restore_best(self.model)

    def _precision(self) -> torch.autocast:
        low = self.config.precision == "bf16"
        # A cache of cast weights would outlive the update inside a captured graph.
        return torch.autocast(self.device.type, torch.bfloat16, enabled=low, cache_enabled=False)

    def step(self) -> None:
        """Train on one window; nothing here waits for the device."""
        p, config, train = self.progress, self.config, self.train
        length = window_length(config, self.lengths)
        start = p.position + (p.epoch * train.num_steps if train.endless else 0)
        inputs_TB, targets_TB = train.window(start, length)
        num_tokens = int((targets_TB != IGNORE).sum())
        inputs_TB = inputs_TB.repeat_interleave(self.regularization.samples, dim=1)
        num_steps, batch_size = inputs_TB.shape
        inputs_TB = inputs_TB[:, self.columns]
        targets_TB = targets_TB[:, self.processes.columns(train.batch_size)]
        factor = lr_factor(config, p.step, p.share_done(config, train.num_steps))
        set_lr(self.optimizer, self.peak_lr * length / config.bptt * factor)
        shapes, size = self.model.mask_shapes, (num_steps, batch_size)
        masks = draw_masks(self.regularization, shapes, size, self.generator)
        keep_B1 = None
        if rate := self.regularization.reset_state:
            keep_B1 = torch.empty(batch_size, 1, device=self.device)
            keep_B1.bernoulli_(1 - rate, generator=self.generator)
            keep_B1 = keep_B1[self.columns]
        self._update(
            sent(inputs_TB, self.device),
            sent(targets_TB, self.device),
            torch.full((), float(num_tokens), device=self.device),
            keep_B1,
            *of_streams(masks, self.columns).values(),
        )
        p.step += 1
        p.tokens += num_tokens
        p.position += num_steps
        if p.position >= train.num_steps:
            p.epoch += 1
            p.position = p.position - train.num_steps if train.endless else 0
            if not train.endless:
                self._zero_states()

    def _zero_states(self) -> None:
        for state in self.states:
            for tensor in state:
                tensor.zero_()

    def _update_eagerly(
        self,
        inputs_TB: Tensor,
        targets_TB: Tensor,
        num_tokens: Tensor,
        keep_B1: Tensor | None,
        *masks_drawn: Tensor,
    ) -> None:
        """A window's loss, gradient, clipping, update, averages; states and sums in their place."""
        model, r, parts = self.model, self.regularization, self.config.accumulation_steps
        masks = dict(zip(masked(r, model.mask_shapes), masks_drawn, strict=True))
        of_parts = []
        pairs = zip(inputs_TB.chunk(parts, 1), targets_TB.chunk(parts, 1), strict=True)
        for i, (x_TB, y_TB) in enumerate(pairs):
            columns = slice(i * x_TB.shape[1], (i + 1) * x_TB.shape[1])
            keep = None if keep_B1 is None else keep_B1[columns]
            states = [tuple(s[columns] for s in state) for state in self.states]
            part = of_streams(masks, columns)
            entered = [tuple(drop(s, keep) for s in state) for state in states]
            loss, of_part, left = self._loss(x_TB, y_TB, num_tokens, entered, part)
            if i == 0:
                # Not earlier: fresh pages for the gradients took a CPU an eighth of the step.
                self.optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            of_parts.append(of_part)
            for old, new in zip(states, left, strict=True):
                copy_values(new, old)
        nats = torch.stack(of_parts).sum()
        parameters = list(model.parameters())
        self.processes.add_up([nats, *(p.grad for p in parameters if p.grad is not None)])
        if r.l2:
            grads = [p.grad for p in parameters]
            torch._foreach_add_(grads, [p.detach() for p in parameters], alpha=r.l2)  # type: ignore[arg-type]
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.config.clip or math.inf)
        self.optimizer.step()
        self.averaging.update()
        self.sums += torch.stack([nats, norm**2, num_tokens, torch.ones_like(nats)])

    def _loss(
        self,
        inputs_TB: Tensor,
        targets_TB: Tensor,
        num_tokens: Tensor,
        states: States,
        masks: Mapping[str, Tensor],
    ) -> tuple[Tensor, Tensor, States]:
        """Of some streams: their part of the loss, their nats, the states after the window."""
        r = self.regularization
        with self._precision():
            output_TBH, states = self.model.outputs(inputs_TB, states, masks)
            dropped_TBH = drop(output_TBH, masks.get("output"))
            features = self.model.features(dropped_TBH)
            nats = self.model.output_loss(features, targets_TB.flatten(), r.samples)
        # What follows adds up over parts and processes to the loss of all streams.
        per = self.train.batch_size if self.config.loss_per == "window" else num_tokens
        loss = nats / per
        if r.ar or r.tar:
            penalty = activation_penalty(output_TBH, dropped_TBH, r.ar, r.tar)
            loss = loss + penalty / (self.processes.size * self.config.accumulation_steps)
        return loss, nats.detach(), states

    def _validation_due(self, passed: bool) -> bool:
        """Whether to validate after this step; `passed`: it has ended a pass."""
        every = self.config.valid_every
        at_rhythm = self.progress.step % every == 0 if every else passed
        return at_rhythm or self.progress.finished is not None

    def _write(self, values: dict[str, float], track: Track) -> None:
        p = self.progress
        line = {
            "step": p.step,
            "epoch": p.epoch + p.position / self.train.num_steps,
            "tokens": p.tokens,
            "seconds": round(p.seconds, 3),
            **values,
        }
        if self.processes.is_first:
            p.metrics_bytes = metrics.append(self.metrics, line)
        track(line)

    def _log_training(self, rate: float, track: Track) -> float:
        """Write the means since the last line; returns the perplexity."""
        nats, square_norms, tokens, steps = self.sums.tolist()
        self.sums.zero_()
        mean = nats / tokens
        if not math.isfinite(mean + square_norms):
            self._go_back(f"the loss is {mean} and the squared gradient norm {square_norms}")
            return math.inf
        ppl = perplexity(mean)
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

    def _go_back(self, reason: str) -> None:
        """After divergence: the best weights again, a smaller rate, all else anew.

        Raises:
            UserError: where the config does not want it, or nothing has been validated yet.
        """
        p, factor = self.progress, self.config.lr_on_divergence
        if factor is None or not math.isfinite(p.best_ppl):
            raise UserError(f"{reason} after step {p.step}: lower optimizer.lr or trainer.clip")
        self.checkpoints.restore_best(self.model)
        self._zero_states()
        for slots in self.optimizer.state.values():
            for value in slots.values():
                value.zero_()
        self.averaging.reset()
        self.peak_lr *= factor
        log.warning("%s: back to the weights of step %d", reason, p.best_step)

    def _validate(self, track: Track) -> None:
        """Score the validation text; keep the weights if best; drop the rate or stop if not.

        What is scored is the raw weights and each average that has begun; the rule of averaging
        says whose score counts.
        """
        p, config = self.progress, self.config
        candidates, scores = self.averaging.candidates(), {}
        for name, weights in candidates.items():
            with swapped(self.averaging, weights), self._precision():
                scores[name] = self.processes.first(self.validate)
        chosen = self.averaging.after_validation({k: s.unit_ppl for k, s in scores.items()}, p.step)
        score = scores[chosen]
        ppl = score.unit_ppl
        improved = ppl < p.best_ppl
        facts = {"step": p.step, "valid_ppl": ppl, "weights": chosen}
        with swapped(self.averaging, candidates[chosen]):
            self.processes.first(lambda: self.checkpoints.keep_weights(self.model, facts))
            if improved:
                self.checkpoints.keep_best(self.model, facts)
        if improved:
            p.best_ppl, p.best_step, p.since_best, p.since_drop = ppl, p.step, 0, 0
        else:
            p.since_best += 1
            p.since_drop += 1
        log.info(
            "epoch %.2f  step %d  %.0f s  lr %.3g  validation ppl %.2f%s%s",
            p.epoch + p.position / self.train.num_steps,
            p.step,
            p.seconds,
            self.lr,
            ppl,
            "" if chosen == "raw" else f" ({chosen}; raw {scores['raw'].unit_ppl:.2f})",
            "" if improved else f" (best {p.best_ppl:.2f})",
        )
        others = {f"valid/{k}/ppl": s.unit_ppl for k, s in scores.items() if len(scores) > 1}
        nats = score.nats / (score.words if score.words_are_units else score.tokens)
        self._write({"valid/nats": nats, "valid/ppl": ppl, **others}, track)
        if config.lr_on_divergence is not None and ppl > DIVERGED * p.best_ppl:
            self._go_back(f"validation perplexity is {ppl:.2f}, the best {p.best_ppl:.2f}")
        elif p.since_drop > config.lr_patience and config.lr_drop != 1:
            p.since_drop = 0
            self.peak_lr *= config.lr_drop
        p.finished = p.finished or p.why_ended(config)
