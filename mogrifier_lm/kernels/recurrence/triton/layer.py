"""One layer on its way through time: its padded weights, its buffers, and the kernels of a step.

Shape legend: T time steps, B streams, I input size, H hidden size, n target size of a round, k
rank, each feature size padded as `kernels` says. S is T where a backward may follow, else 1.
"""

from typing import Any

import torch
import triton
from torch import Tensor

from mogrifier_lm.kernels.recurrence.autograd import gradients
from mogrifier_lm.kernels.recurrence.reference import Options, Weights
from mogrifier_lm.kernels.recurrence.triton import blocks, kernels, rlstm
from mogrifier_lm.kernels.recurrence.triton.blocks import Blocks
from mogrifier_lm.kernels.recurrence.triton.weights import pack, padded, unpack, width


class Layer:
    """The steps of one layer, in any order of spans that respects time.

    Args:
        weights: of the layer.
        options: of the layer.
        x: [T, B, I] padded, in the dtype of products; a buffer that is filled before it is read.
        input_size: without the padding.
        mask: [1 or T, B, H] padded, float32, or None.
        save: whether a backward may follow.
    """

    def __init__(
        self,
        weights: Weights,
        options: Options,
        x: Tensor,
        input_size: int,
        mask: Tensor | None,
        save: bool,
    ) -> None:
        cell, self.zigzag = options.cell, options.zigzag
        self.cell = cell
        self.cap = options.cap_input_gate or cell == "rlstm"
        self.x, self.mask, self.save = x, mask, save
        self.input_size, self.hidden_size = input_size, weights.hh.shape[1]
        self.w = w = pack(weights, cell, input_size, x.dtype)
        (self.T, self.B, self.I), self.H = x.shape, width(self.hidden_size)
        self.S = self.T if save else 1
        exact = torch.get_float32_matmul_precision() == "highest"
        self.precision = "ieee" if exact else "tf32"  # of float32
        self.half = x.dtype != torch.float32
        # Without rounds it made a whole step slower (PTB, 24 M: 5.3 to 6.1 ms; AWD-LSTM 5.1 to
        # 7.4), with them faster (11.6 to 11.0; 3 M: 2.6 to 2.2).
        hopper = x.is_cuda and torch.cuda.get_device_capability(x.device) >= (9, 0)
        self.early = hopper and bool(w.rounds)
        # A state of before the first step stands in front.
        self.hs = self.empty(self.T + 1, self.H)  # masked
        self.cs = self.empty(self.T + 1, self.H, torch.float32)
        self.output = self.empty(self.T, self.H, torch.float32)
        # Not in bf16: of an f near 1 it leaves little of the 1 - f that caps the input gate.
        self.acts = self.empty(self.S, 4 * self.H, torch.float32)
        self.inner = [None if r.right is None else self._of(r.right.shape[0]) for r in w.rounds]
        self.gates = [self._of(r.weight.shape[0]) for r in w.rounds]
        self.targets = [self._of(r.weight.shape[0]) for r in w.rounds]
        self.px, self.ph, self.m = self._of_cell("mlstm", 3)
        self.update, self.masked_c, self.o = self._of_cell("rlstm", 3)
        # x is not gated: its product waits for no state
        self.before = None
        if not w.rounds and cell == "lstm":
            self.before = self.empty(self.T, 4 * self.H)

    def empty(self, steps: int, size: int, dtype: torch.dtype | None = None) -> Tensor:
        return self.x.new_empty(steps, self.B, size, dtype=dtype or self.x.dtype)

    def _of(self, size: int) -> Tensor:
        return self.empty(self.S, size)

    def _of_cell(self, cell: str, number: int) -> list[Any]:
        """Buffers [S, B, H] that one cell alone has, for the others None."""
        return [self._of(self.H) if self.cell == cell else None for _ in range(number)]

    def mask_at(self, t: int) -> Tensor | None:
        return None if self.mask is None else self.mask[min(t, len(self.mask) - 1)]

    # -- kernels with their blocks -------------------------------------------------------------

    def _launch(
        self, kernel: Any, grid: tuple[int, int], cut: Blocks, *args: Any, **constants: Any
    ) -> None:
        options = {"num_warps": cut.warps, "num_stages": cut.stages, "enable_fp_fusion": True}
        if self.early:
            options["launch_pdl"] = True
        kernel[grid](*args, self.B, **constants, EARLY=self.early, **options)

    def _product(
        self, kernel: Any, cut: Blocks, *args: Any, N: int, K: int, **constants: Any
    ) -> None:
        """`kernel`, of N columns and sums over K."""
        grid = (triton.cdiv(self.B, cut.streams), triton.cdiv(N, cut.columns))
        constants |= {"N": N, "K": K, "BM": cut.streams, "BN": cut.columns, "BK": cut.depth}
        self._launch(kernel, grid, cut, *args, PRECISION=self.precision, **constants)

    def _units(self, kernel: Any, cut: Blocks, *args: Any, **constants: Any) -> None:
        """`kernel` over blocks of units."""
        grid = (triton.cdiv(self.H, cut.columns), triton.cdiv(self.B, cut.streams))
        constants |= {"H": self.H, "BM": cut.streams, "BU": cut.columns}
        if cut.depth:
            constants |= {"BK": cut.depth, "PRECISION": self.precision}
        self._launch(kernel, grid, cut, *args, **constants)

    # -- forward -------------------------------------------------------------------------------

    def begin(self, h: Tensor, c: Tensor) -> None:
        """Set the state [B, H] that enters the first step."""
        mask = self.mask_at(0)
        h = padded(h, self.B, self.H, dtype=torch.float32)
        torch.mul(h, 1.0 if mask is None else mask, out=self.hs[0])
        self.cs[0] = padded(c, self.B, self.H, dtype=torch.float32)

    def forward(self, span: range) -> None:
        """Run the steps of `span`, whose inputs are there."""
        if self.before is not None:
            part = slice(span.start, span.stop)
            rows = self.x[part].flatten(0, 1)
            torch.mm(rows, self.w.w[:, : self.I].t(), out=self.before[part].flatten(0, 1))
        for t in span:
            x, h = self._mogrify(t)
            self._cell(t, x, h)

    def _mogrify(self, t: int) -> tuple[Tensor, Tensor]:
        a = t if self.save else 0
        x = x0 = self.x[t]
        h = h0 = self.hs[t]
        for i, r in enumerate(self.w.rounds):
            source = (h if self.zigzag else h0) if i % 2 == 0 else (x if self.zigzag else x0)
            inner = self.inner[i]
            if inner is not None and r.right is not None:
                k, n = r.right.shape
                product = (source, r.right, inner[a])
                cut = blocks.inner(self.B, n, self.half)
                self._product(kernels.multiply, cut, *product, N=k, K=n, W_N=n, W_K=1)
                source = inner[a]
            n, k = r.weight.shape
            made, target = self.targets[i][a], h if i % 2 else x
            args: tuple[Any, ...] = (source, r.weight, r.bias, target, self.gates[i][a], made)
            self._product(kernels.gate, blocks.gate(self.B, k, self.half), *args, N=n, K=k)
            x, h = (x, made) if i % 2 else (made, h)
        return x, h

    def _cell(self, t: int, x: Tensor, h: Tensor) -> None:
        a, w, H = t if self.save else 0, self.w, self.H
        mask = self.mask_at(t + 1) if t + 1 < self.T else None
        c, c_new, out, h_next = self.cs[t], self.cs[t + 1], self.output[t], self.hs[t + 1]
        masked, cut = {"MASKED": mask is not None}, blocks.cell(self.B, H, self.half)
        if self.cell == "rlstm":
            u, c_in, o = self.update[a], self.masked_c[a], self.o[a]
            args: tuple[Any, ...] = (x, h, w.w, w.bias, self.acts[a], u)
            self._units(rlstm.update, cut, *args, IN=self.I)
            m = self.mask_at(t)
            args = (u, w.fu, self.acts[a], c, m, c_new, c_in)
            single = blocks.single(self.B, H, self.half)
            self._units(rlstm.forget, single, *args, MASKED=m is not None)
            args = (c_in, w.oc, w.bias_o, c_new, mask, o, out, h_next)
            self._units(rlstm.output, single, *args, **masked)
            return
        if self.m is not None:
            args = (x, h, w.mx, w.mh, self.px[a], self.ph[a], self.m[a])
            single = blocks.single(self.B, self.I, self.half)
            self._product(kernels.multiplicative, single, *args, N=H, K=self.I)
            h = self.m[a]
        x = x if self.before is None else self.before[t]
        args = (x, h, w.w, w.bias, c, mask, self.acts[a], c_new, out, h_next)
        flags = {"BEFORE": self.before is not None, "CAP": self.cap, **masked}
        self._units(kernels.lstm, cut, *args, IN=self.I, **flags)

    # -- backward ------------------------------------------------------------------------------

    def begin_backward(self, d_output: Tensor, d_h: Tensor, d_c: Tensor) -> None:
        """Take the gradients of the outputs, d_output [T, B, H] padded and float32."""
        self.d_output = d_output
        self.d_h, self.d_c = (
            padded(d, self.B, self.H, dtype=torch.float32).clone() for d in (d_h, d_c)
        )
        self.d_x = self.empty(self.T, self.I, torch.float32)
        self.d_acts = torch.empty_like(self.acts, dtype=self.x.dtype)
        self.d_gates = [torch.empty_like(g) for g in self.gates]
        self.d_inner = [None if z is None else torch.empty_like(z) for z in self.inner]
        self.d_px, self.d_ph = self._of_cell("mlstm", 2)
        self.d_m = torch.empty_like(self.d_h) if self.cell == "mlstm" else None
        self.d_f, self.d_o = self._of_cell("rlstm", 2)

    def backward(self, span: range) -> None:
        """Run back through the steps of `span`, the last one first."""
        for t in reversed(span):
            self._cell_backward(t)
            self._inputs_backward(t)
            if not self.zigzag:
                self._rounds_backward_apart(t)
            else:
                self._rounds_backward(t)
        if self.before is not None:
            part = slice(span.start, span.stop)
            rows = self.d_acts[part].flatten(0, 1)
            d_x = rows @ self.w.w[:, : self.I]
            self.d_x[part] = d_x.view(len(span), self.B, self.I)

    def _cell_backward(self, t: int) -> None:
        w, d_out, acts, d_acts = self.w, self.d_output[t], self.acts[t], self.d_acts[t]
        c, c_new = self.cs[t], self.cs[t + 1]
        if self.cell != "rlstm":
            args: tuple[Any, ...] = (d_out, self.d_h, self.d_c, acts, c, c_new, d_acts)
            self._units(kernels.lstm_backward, blocks.elementwise(self.H), *args, CAP=self.cap)
            return
        d_f, d_o, o, mask = self.d_f[t], self.d_o[t], self.o[t], self.mask_at(t)
        args = (d_out, self.d_h, self.d_c, o, c_new, d_o)
        self._units(rlstm.output_backward, blocks.elementwise(self.H), *args)
        args = (d_o, w.oc, self.d_c, mask, acts, c, d_f)
        masked = {"MASKED": mask is not None}
        single = blocks.single(self.B, self.H, self.half)
        self._units(rlstm.forget_backward, single, *args, **masked)
        args = (d_f, w.fu, self.d_c, acts, d_acts)
        self._units(rlstm.update_backward, single, *args)

    def _inputs_backward(self, t: int) -> None:
        """Through the cell's products to x and h, and on through the last round's gate."""
        d_x, d_h, last = self.d_x[t], self.d_h, len(self.w.rounds) - 1
        out = d_h if self.d_m is None else self.d_m
        through = last if self.zigzag and self.d_m is None else None
        saved, gated = self._saved(through, t)
        mask = self.mask_at(t) if last < 0 and self.d_m is None else None
        cut, start = (
            blocks.inputs_backward(self.B, 4 * self.H, self.half),
            0 if self.before is None else self.I,
        )
        constants: dict[str, Any] = {"IN": self.I, "H": self.H, "K": 4 * self.H, "FIRST": start}
        constants |= {"GATED_X": gated and last % 2 == 0, "GATED_H": gated and last % 2 == 1}
        constants |= {"BM": cut.streams, "BN": cut.columns, "BK": cut.depth}
        constants |= {"PRECISION": self.precision, "MASKED": mask is not None}
        grid = (triton.cdiv(self.B, cut.streams), (self.I + self.H - start) // cut.columns)
        args: tuple[Any, ...] = (self.d_acts[t], self.w.w, d_x, out, *saved, mask)
        self._launch(kernels.inputs_backward, grid, cut, *args, **constants)
        if self.d_m is None:
            return
        d_px, d_ph = self.d_px[t], self.d_ph[t]
        torch.mul(self.d_m, self.ph[t], out=d_px)
        torch.mul(self.d_m, self.px[t], out=d_ph)
        d_h.zero_()
        through = last if self.zigzag else None
        self._source_backward(d_px, self.w.mx, d_x, t, through if last % 2 == 0 else None)
        mask = self.mask_at(t) if last < 0 else None
        self._source_backward(d_ph, self.w.mh, d_h, t, through if last % 2 else None, mask)

    def _saved(self, i: int | None, t: int) -> tuple[tuple[Tensor | None, ...], bool]:
        """What the gradient on its way through the gate of round i reads and writes, if any."""
        if i is None or i < 0:
            return (None, None, None), False
        return (self.gates[i][t], self.targets[i][t], self.d_gates[i][t]), True

    def _source_backward(
        self,
        d: Tensor,
        w: Tensor | None,
        d_source: Tensor,
        t: int,
        through: int | None = None,
        mask: Tensor | None = None,
    ) -> None:
        """d_source += d @ w, and on through the gate of round `through` or a mask."""
        assert w is not None
        k, n = w.shape
        saved, gated = self._saved(through, t)
        flags = {"GATED": gated, "MASKED": mask is not None}
        args: tuple[Any, ...] = (d, w, d_source, *saved, mask)
        cut = blocks.gate(self.B, k, self.half)
        self._product(kernels.source_backward, cut, *args, N=n, K=k, **flags)

    def _round_backward(
        self, i: int, t: int, d_source: Tensor, through: int | None, mask: Tensor | None
    ) -> None:
        """Through the products of round i to its source."""
        r, d, d_inner = self.w.rounds[i], self.d_gates[i][t], self.d_inner[i]
        if d_inner is None or r.right is None:
            self._source_backward(d, r.weight, d_source, t, through, mask)
            return
        n, k = r.weight.shape
        args: tuple[Any, ...] = (d, r.weight, d_inner[t])
        cut = blocks.inner(self.B, n, self.half)
        self._product(kernels.multiply, cut, *args, N=k, K=n, W_N=1, W_K=k)
        self._source_backward(d_inner[t], r.right, d_source, t, through, mask)

    def _rounds_backward(self, t: int) -> None:
        """The source of a round is what the round before it made."""
        for i in reversed(range(len(self.w.rounds))):
            d_source = self.d_x[t] if i % 2 else self.d_h
            self._round_backward(i, t, d_source, i - 1, None if i else self.mask_at(t))

    def _rounds_backward_apart(self, t: int) -> None:
        """Without zigzag the sources are the first x and h: what reaches them is added last."""
        d_x, d_h, mask = self.d_x[t], self.d_h, self.mask_at(t)
        d_x0, d_h0 = torch.zeros_like(d_x), torch.zeros_like(d_h)
        for i in reversed(range(len(self.w.rounds))):
            d_target, d_source = (d_h, d_x0) if i % 2 else (d_x, d_h0)
            gate, made = self.gates[i][t], self.targets[i][t]
            self.d_gates[i][t] = d_target * made * (1 - 0.5 * gate.float())
            d_target.mul_(gate)
            self._round_backward(i, t, d_source, None, None)
        d_x.add_(d_x0)
        d_h.add_(d_h0)
        if mask is not None and self.w.rounds:
            d_h.mul_(mask)

    def gradients(self, weights: Weights) -> Weights:
        """Of the weights, one product over all T * B rows each."""
        x, h, product = self.x, self.hs[:-1], self.x.dtype
        x0, h0 = x, h
        rounds: list[tuple[Any, ...]] = []
        for i in range(len(weights.rounds)):
            source = (h if self.zigzag else h0) if i % 2 == 0 else (x if self.zigzag else x0)
            inner, d, d_inner = self.inner[i], self.d_gates[i], self.d_inner[i]
            if inner is None or d_inner is None:
                rounds.append((gradients(d, source, product), None, _sum(d)))
            else:
                factors = gradients(d, inner, product), gradients(d_inner, source, product)
                rounds.append((*factors, _sum(d)))
            x, h = (x, self.targets[i]) if i % 2 else (self.targets[i], h)
        d = self.d_acts
        cell = gradients(d, x, product), gradients(d, h if self.m is None else self.m, product)
        others: dict[str, Tensor] = {}
        if self.cell == "mlstm":
            others |= {"mx": gradients(self.d_px, x, product)}
            others |= {"mh": gradients(self.d_ph, h, product)}
        if self.cell == "rlstm":
            others |= {"fu": gradients(self.d_f, self.update, product)}
            others |= {"oc": gradients(self.d_o, self.masked_c, product), "bias_o": _sum(self.d_o)}
        return unpack(weights, self.cell, cell, _sum(d), rounds, others)


def _sum(rows: Tensor) -> Tensor:
    return rows.flatten(0, 1).sum(0, dtype=torch.float32)
