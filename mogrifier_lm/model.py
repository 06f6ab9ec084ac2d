"""The language model: embedding → stacked recurrent layers → tied softmax.

Shape legend: T time steps, B streams, E embedding size, H hidden size, V vocabulary, N = T * B.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, linear

from mogrifier_lm.adaptive import Tails
from mogrifier_lm.cells import CellSpec, RecurrentLayer, State
from mogrifier_lm.cells.spec import drawn_on_cpu
from mogrifier_lm.data import IGNORE
from mogrifier_lm.kernels import cross_entropy
from mogrifier_lm.kernels.recurrence import STACKS
from mogrifier_lm.regularization import Masks, drop

States = list[State]


def layer_specs(sizes: Sequence[int], **options: object) -> list[CellSpec]:
    """The specs of a stack: `sizes` are E and the hidden size of each layer, bottom first;
    `options` are those of `CellSpec`."""
    return [
        CellSpec(input_size=below, hidden_size=size, **options)  # type: ignore[arg-type]
        for below, size in itertools.pairwise(sizes)
    ]


class LanguageModel(nn.Module):
    """Predicts each token from those before it.

    The softmax sees the encoder's output [N, H], projected to E where H and E differ and the
    matrices are tied; logits = projected @ output_weight.T + output_bias.

    Args:
        vocab_size: V.
        embedding_size: E.
        specs: the recurrent layers, bottom first; the first takes E features.
        tie_embeddings: the output layer uses the embedding matrix.
        skip_sum: the encoder's output is the sum of the layers' outputs (of one size), not the
            last one's (LAMB).
        residual: each layer's input is added to its output (all of one size).
        mixture: M softmaxes mixed by weights that depend on the encoder's output (Mixture of
            Softmaxes, Yang et al., arXiv 1711.03953); each sees tanh of its own projection to E.
        adaptive_softmax: first ids of the clusters of rare types, whose vectors are shorter
            (`adaptive.Tails`); tied, without a mixture and with one dropout sample.
        backend: kernel of the recurrence and, where it has one of that name, of the output layer,
            whose own choice is `output_backend`.
        device: where the parameters live.

    Raises:
        ValueError: layers that do not fit on each other.
    """

    embedding_weight: nn.Parameter  # [V, E], or of an adaptive softmax's head
    projection: nn.Parameter | None  # [E, H]
    mixture_weight: nn.Parameter | None  # [M * E, H]; these three only with a mixture
    mixture_bias: nn.Parameter | None  # [M * E]
    prior_weight: nn.Parameter | None  # [M, H]
    output_weight_untied: nn.Parameter | None  # [V, H]
    output_bias: nn.Parameter  # [V]

    def __init__(
        self,
        vocab_size: int,
        embedding_size: int,
        specs: Sequence[CellSpec],
        tie_embeddings: bool = True,
        skip_sum: bool = False,
        residual: bool = False,
        mixture: int = 1,
        adaptive_softmax: Sequence[int] = (),
        backend: str = "auto",
        device: str = "cpu",
    ) -> None:
        super().__init__()
        sizes = [embedding_size, *(spec.hidden_size for spec in specs)]
        if any(spec.input_size != size for spec, size in zip(specs, sizes, strict=False)):
            raise ValueError(f"layers do not fit on each other: {list(specs)}")
        if skip_sum and len({spec.hidden_size for spec in specs}) > 1:
            raise ValueError("skip_sum needs layers of one hidden size")
        if residual and len(set(sizes)) > 1:
            raise ValueError("residual needs an embedding and layers of one size")
        if residual and skip_sum:
            raise ValueError("residual and skip_sum exclude each other: give one")
        self.vocab_size, self.skip_sum, self.residual = vocab_size, skip_sum, residual
        self.embedding_size, self.output_size = embedding_size, specs[-1].hidden_size
        self.tails: Tails | None = None
        if adaptive_softmax:
            self.tails = Tails(adaptive_softmax, vocab_size, embedding_size, device)
        self.layers = nn.ModuleList(RecurrentLayer(spec, backend, device) for spec in specs)
        self.mixture = mixture
        latent_size = embedding_size if tie_embeddings else self.output_size
        projected = tie_embeddings and self.output_size != embedding_size and mixture == 1
        mixed = mixture > 1
        shapes = {
            "embedding_weight": ([*adaptive_softmax, vocab_size][0], embedding_size),
            "projection": (embedding_size, self.output_size) if projected else None,
            "mixture_weight": (mixture * latent_size, self.output_size) if mixed else None,
            "mixture_bias": (mixture * latent_size,) if mixed else None,
            "prior_weight": (mixture, self.output_size) if mixed else None,
            "output_weight_untied": None if tie_embeddings else (vocab_size, self.output_size),
            "output_bias": (vocab_size,),
        }
        for name, shape in shapes.items():
            values = None if shape is None else nn.Parameter(torch.empty(shape, device=device))
            self.register_parameter(name, values)
        self.requested_backend = backend
        self._resolve_output_backend()
        if device != "meta":  # without values; torch takes seconds to learn to draw none
            self.reset_parameters()

    def _resolve_output_backend(self) -> None:
        known, p = self.requested_backend in cross_entropy.BACKENDS, self.output_bias
        name = self.requested_backend if known else "auto"  # of those that the recurrence alone has
        self.output_backend = cross_entropy.resolve(name, p.device, dtype=p.dtype)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # what .to(), .cuda() and .double() call
        self._resolve_output_backend()
        return self

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Embedding normal with std 1 / sqrt(E), as in LAMB: logits of order one when tied."""
        with drawn_on_cpu(self.embedding_weight) as values:
            values.normal_(std=1 / math.sqrt(self.embedding_size))
        untied = self.output_weight_untied
        for matrix in (self.projection, untied, self.mixture_weight, self.prior_weight):
            if matrix is not None:
                with drawn_on_cpu(matrix) as values:
                    values.normal_(std=1 / math.sqrt(self.output_size))
        if self.mixture_bias is not None:
            self.mixture_bias.zero_()
        self.output_bias.zero_()
        if self.tails is not None:
            self.tails.reset_parameters()
        for layer in self.layers:
            layer.reset_parameters()  # type: ignore[operator]

    @property
    def backend(self) -> str:
        return str(self.layers[0].backend)

    @property
    def output_weight(self) -> Tensor:
        untied = self.output_weight_untied
        return self.embedding_weight if untied is None else untied

    @property
    def feature_size(self) -> int:
        """Of what the softmax sees, E or H."""
        return self.output_size if self.projection is None else len(self.projection)

    @property
    def mask_shapes(self) -> dict[str, tuple[int, ...]]:
        """What dropout masks may cover, for `regularization.draw_masks`.

        "embedding": whole words of the embedding (not of an output layer that shares its matrix);
        "input": the embedding's output; "inter_layer.i": the output of layer i on its way up;
        "state.i": the h that enters each step of layer i; "output": the encoder's output;
        "weight.i": layer i's `weight_hh` (DropConnect).
        """
        specs = [layer.spec for layer in cast(list[RecurrentLayer], list(self.layers))]
        return {
            "embedding": (self.vocab_size, 1),
            "input": (self.embedding_size,),
            **{f"inter_layer.{i}": (s.hidden_size,) for i, s in enumerate(specs[:-1])},
            **{f"state.{i}": (s.hidden_size,) for i, s in enumerate(specs)},
            "output": (self.output_size,),
            **{f"weight.{i}": s.shapes()["weight_hh"] for i, s in enumerate(specs)},
        }

    def num_params(self) -> int:
        return sum(p.numel() for p in self.parameters())

    def zero_states(self, batch_size: int) -> States:
        """Zeros for every layer: (h, c) where its cell is an LSTM."""
        return [layer.zero_state(batch_size) for layer in self.layers]  # type: ignore[operator]

    def named_states(self, states: States) -> dict[str, Tensor]:
        """The tensors of the states by their names in a checkpoint: state.0.h, say."""
        layers = cast(list[RecurrentLayer], list(self.layers))
        return {
            f"state.{i}.{name}": tensor
            for i, (layer, state) in enumerate(zip(layers, states, strict=True))
            for name, tensor in zip(layer.spec.state, state, strict=True)
        }

    def embed(self, ids: Tensor) -> Tensor:
        """The vectors of ids, [..., E]."""
        if self.tails is not None:
            return self.tails.embed(ids, self.embedding_weight)
        return embedding(ids, self.embedding_weight)

    def outputs(
        self, inputs_TB: Tensor, states: States, masks: Masks | None = None
    ) -> tuple[Tensor, States]:
        """The encoder's output [T, B, H] before its dropout, and the states after the window."""
        masks = masks or {}
        x_TBE = self.embed(inputs_TB)
        if "embedding" in masks:
            x_TBE = x_TBE * masks["embedding"][inputs_TB]
        x = drop(x_TBE, masks.get("input"))
        layers = cast(list[RecurrentLayer], list(self.layers))
        outputs: list[Tensor] = []
        new_states: States = []
        if self.backend in STACKS and not self.residual:
            outputs, new_states = STACKS[self.backend](
                x,
                states,
                [layer.weights(masks.get(f"weight.{i}")) for i, layer in enumerate(layers)],
                layers[0].spec.options,
                [masks.get(f"state.{i}") for i in range(len(layers))],
                [masks.get(f"inter_layer.{i}") for i in range(len(layers) - 1)],
            )
            layers, x = [], outputs[-1]
        for i, layer in enumerate(layers):
            h_TBH, state = layer(x, states[i], masks.get(f"state.{i}"), masks.get(f"weight.{i}"))
            outputs.append(h_TBH)
            new_states.append(state)
            h_TBH = drop(h_TBH, masks.get(f"inter_layer.{i}"))
            x = x + h_TBH if self.residual else h_TBH
        return sum(outputs[1:], start=outputs[0]) if self.skip_sum else x, new_states

    def features(self, output_TBH: Tensor, mask: Tensor | None = None) -> Tensor:
        """What the softmax sees, [N, E or H]: the encoder's output dropped out and projected."""
        hidden = drop(output_TBH, mask).flatten(0, 1)
        return hidden if self.projection is None else linear(hidden, self.projection)

    def encode(
        self, inputs_TB: Tensor, states: States, masks: Masks | None = None
    ) -> tuple[Tensor, States]:
        """Hidden vectors that the softmax sees, [N, E or H], and the states after the window."""
        output_TBH, states = self.outputs(inputs_TB, states, masks)
        return self.features(output_TBH, (masks or {}).get("output")), states

    def _components(
        self, hidden: Tensor, temperature: float = 1.0, samples: int = 1
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Rows and bias of the softmaxes, and their log priors [N, samples * M] if several."""
        rows, bias, log_prior = hidden, cast(Tensor, self.output_bias), None
        if self.mixture_weight is not None and self.prior_weight is not None:
            latent = linear(hidden, self.mixture_weight, self.mixture_bias).tanh()
            rows = latent.view(len(hidden) * self.mixture, -1)
            log_prior = linear(hidden, self.prior_weight).float().log_softmax(1)
        if samples > 1:
            if log_prior is None:
                log_prior = hidden.new_zeros(len(hidden), 1, dtype=torch.float32)
            log_prior = log_prior.reshape(-1, samples * self.mixture) - math.log(samples)
        if temperature != 1:
            rows, bias = rows / temperature, bias / temperature
        return rows, bias, log_prior

    def output_loss(self, hidden: Tensor, targets_N: Tensor, samples: int = 1) -> Tensor:
        """Sum of -ln p over the targets, in nats (IGNORE counts nothing).

        With `samples` D, hidden is [N * D, ...], the D dropout samples of a target side by side,
        and p is the mean of theirs (the objective of Melis, arXiv 2211.01848).
        """
        kernel = cross_entropy.BACKENDS[self.output_backend]
        softmaxes = self._softmaxes(hidden, targets_N, samples=samples)
        losses = [kernel.loss(*arguments, IGNORE) for arguments, _ in softmaxes]
        return sum(losses[1:], start=losses[0])

    def _softmaxes(
        self, hidden: Tensor, targets_N: Tensor, temperature: float = 1.0, samples: int = 1
    ) -> Iterable[tuple[tuple[Tensor | None, ...], Tensor | None]]:
        """What the kernel is called with, and the places of the targets that this is of (None:
        all); the results add up."""
        rows, bias, log_prior = self._components(hidden, temperature, samples)
        if self.tails is None:
            return [((rows, self.output_weight, bias, targets_N, log_prior), None)]
        parts = self.tails.softmaxes(rows, self.embedding_weight, bias, targets_N, temperature)
        return (((*arguments, None), places) for arguments, places in parts)

    def loss(
        self, inputs_TB: Tensor, targets_TB: Tensor, states: States, masks: Masks | None = None
    ) -> tuple[Tensor, States]:
        """Sum of -ln p over the targets, in nats (IGNORE counts nothing), and the new states."""
        hidden, states = self.encode(inputs_TB, states, masks)
        return self.output_loss(hidden, targets_TB.flatten()), states

    @torch.no_grad()
    def output_nats(self, hidden: Tensor, targets_N: Tensor, temperature: float = 1.0) -> Tensor:
        """-ln p of each target [N] float32 given what `encode` returned, 0 where it is IGNORE.

        `temperature` divides the logits: above 1 it flattens the distribution.
        """
        kernel = cross_entropy.BACKENDS[self.output_backend]
        softmaxes = iter(self._softmaxes(hidden, targets_N, temperature))
        nats_N: Tensor = kernel.token_nats(*next(softmaxes)[0], IGNORE)
        for arguments, places in softmaxes:
            further = kernel.token_nats(*arguments, IGNORE)
            nats_N = nats_N + further if places is None else nats_N.index_add(0, places, further)
        return nats_N

    @torch.no_grad()
    def log_probs(self, hidden: Tensor, temperature: float = 1.0) -> Tensor:
        """ln p of every type [N, V] float32 given what `encode` returned."""
        rows, bias, log_prior = self._components(hidden, temperature)
        if self.tails is not None:
            return self.tails.log_probs(rows, self.embedding_weight, bias, temperature)
        log_p = linear(rows, self.output_weight, bias).float().log_softmax(1)
        if log_prior is None:
            return log_p
        return (log_p.view(*log_prior.shape, -1) + log_prior.unsqueeze(2)).logsumexp(1)

    @torch.no_grad()
    def token_nats(
        self,
        inputs_TB: Tensor,
        targets_TB: Tensor,
        states: States,
        masks: Masks | None = None,
        temperature: float = 1.0,
    ) -> tuple[Tensor, States]:
        """-ln p of each target [T, B] float32, 0 where it is IGNORE, and the new states."""
        hidden, states = self.encode(inputs_TB, states, masks)
        nats = self.output_nats(hidden, targets_TB.flatten(), temperature)
        return nats.view_as(targets_TB), states


@contextmanager
def restored(parameters: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Yields copies of the parameters, and puts them back at the end, whatever happens."""
    saved = [parameter.detach().clone() for parameter in parameters]
    try:
        yield saved
    finally:
        copy_values(saved, parameters)


@torch.no_grad()
def copy_values(sources: Sequence[Tensor], targets: Sequence[Tensor]) -> None:
    """Copy in place: captured graphs hold addresses, caches of packed weights watch versions."""
    for source, target in zip(sources, targets, strict=True):
        target.copy_(source)
