"""A large vocabulary in clusters by frequency: adaptive softmax and adaptive inputs, tied.

Grave et al. (arXiv 1609.04309) give rare types shorter vectors and a softmax of their own, which is
computed only where the target is among them; Baevski and Auli (arXiv 1809.10853) take the same
vectors for the input. Ids have to be ordered by falling frequency, as those of words are.

Shape legend: N targets, E embedding size, F types of the head, K clusters of rare types.
"""

import itertools
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, linear

from mogrifier_lm.cells.spec import drawn_on_cpu
from mogrifier_lm.data import IGNORE

SHRINK = 4  # each cluster's vectors are so many times shorter than those of the one before


class Tails(nn.Module):
    """The clusters of rare types: p(w) = p_head(cluster) p_cluster(w), exactly normalised.

    Args:
        cutoffs: [K] the first id of each cluster, rising; the first is F.
        vocab_size: V.
        embedding_size: E, of the head's vectors.
        device: where the parameters live.

    Raises:
        ValueError: cutoffs that do not rise from 1 to below V.
    """

    def __init__(
        self, cutoffs: Sequence[int], vocab_size: int, embedding_size: int, device: str = "cpu"
    ) -> None:
        super().__init__()
        self.edges = [*cutoffs, vocab_size]
        if self.edges != sorted(set(self.edges)) or cutoffs[0] < 1:
            raise ValueError(
                f"adaptive_softmax is {list(cutoffs)}, it must rise to below the {vocab_size} types"
            )
        self.clusters = list(itertools.pairwise(self.edges))
        sizes = [max(1, embedding_size // SHRINK ** (k + 1)) for k in range(len(self.clusters))]
        self.weight = nn.Parameter(torch.empty(len(sizes), embedding_size, device=device))
        self.bias = nn.Parameter(torch.empty(len(sizes), device=device))
        self.tables = nn.ParameterList(
            torch.empty(high - low, size, device=device)
            for (low, high), size in zip(self.clusters, sizes, strict=True)
        )
        self.projections = nn.ParameterList(
            torch.empty(size, embedding_size, device=device) for size in sizes
        )

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """As the head's: what a table and its projection give has std 1 / sqrt(E)."""
        for matrix in (self.weight, *self.tables, *self.projections):
            with drawn_on_cpu(matrix) as values:
                values.normal_(std=1 / math.sqrt(matrix.shape[1]))
        self.bias.zero_()

    @torch.no_grad()
    def start_bias(self, log_frequencies: Tensor) -> None:
        """From the log frequency of each type [V]."""
        sums = [log_frequencies[low:high].logsumexp(0) for low, high in self.clusters]
        self.bias.copy_(torch.stack(sums))

    def embed(self, ids: Tensor, head_FE: Tensor) -> Tensor:
        """The vectors of ids, [..., E]."""
        x = embedding(ids.clamp(max=self.edges[0] - 1), head_FE)
        for (low, high), table, up in zip(
            self.clusters, self.tables, self.projections, strict=True
        ):
            inside = (ids >= low) & (ids < high)
            vectors = embedding((ids - low).clamp(0, high - low - 1), table) @ up
            x = torch.where(inside.unsqueeze(-1), vectors, x)
        return x

    def softmaxes(
        self,
        rows_NE: Tensor,
        head_FE: Tensor,
        bias_V: Tensor,
        targets_N: Tensor,
        temperature: float,
    ) -> Iterator[tuple[tuple[Tensor, Tensor, Tensor, Tensor], Tensor | None]]:
        """The softmaxes whose -ln p add up to that of each target.

        Args:
            rows_NE: what the softmax sees, divided by the temperature, as is `bias_V`.
            head_FE: vectors of the head's types.
            bias_V: of all types.
            targets_N: ids, or IGNORE.
            temperature: that divides the logits.

        Yields:
            Rows, weight, bias and targets of each, and the places of its rows; None: all.
        """
        first, head_N = self.edges[0], targets_N
        for k, (low, high) in enumerate(self.clusters):
            head_N = head_N.masked_fill((targets_N >= low) & (targets_N < high), first + k)
        yield (rows_NE, *self._head(head_FE, bias_V, temperature), head_N), None
        for (low, high), table, down in zip(
            self.clusters, self.tables, self.projections, strict=True
        ):
            inside_N = (targets_N >= low) & (targets_N < high)
            if rows_NE.is_cuda:  # shapes in a captured graph do not depend on values
                own_N = (targets_N - low).masked_fill(~inside_N, IGNORE)
                yield (linear(rows_NE, down), table, bias_V[low:high], own_N), None
            else:
                places = inside_N.nonzero().squeeze(1)
                rows = linear(rows_NE[places], down)
                yield (rows, table, bias_V[low:high], targets_N[places] - low), places

    def _head(self, head_FE: Tensor, bias_V: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        weight = torch.cat([head_FE, self.weight])
        return weight, torch.cat([bias_V[: self.edges[0]], self.bias / temperature])

    def log_probs(
        self, rows_NE: Tensor, head_FE: Tensor, bias_V: Tensor, temperature: float
    ) -> Tensor:
        """ln p of every type [N, V] float32; arguments as of `softmaxes`."""
        head = linear(rows_NE, *self._head(head_FE, bias_V, temperature)).float().log_softmax(1)
        first, parts = self.edges[0], []
        for k, (low, high) in enumerate(self.clusters):
            logits = linear(linear(rows_NE, self.projections[k]), self.tables[k], bias_V[low:high])
            parts.append(head[:, first + k, None] + logits.float().log_softmax(1))
        return torch.cat([head[:, :first], *parts], 1)
