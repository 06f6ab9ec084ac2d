"""The LSTM recurrence on a CPU, its two loops over time in C++ (native.cpp), fp32 and bf16.

What is not sequential stays here: packing the weights, the product of an input that no round gates,
and the weight gradients.

Shape legend: T time steps, B streams, I input size, H hidden size, n target size of a round,
k rank; Ip, Hp, kp the sizes padded with zeros to whole vectors.
"""

import ctypes
import functools
from ctypes import c_int64, c_void_p
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from mogrifier_lm.kernels import cpp
from mogrifier_lm.kernels.recurrence import operators
from mogrifier_lm.kernels.recurrence.arguments import checked
from mogrifier_lm.kernels.recurrence.autograd import flatten, twice_differentiable, unflatten
from mogrifier_lm.kernels.recurrence.reference import Options, Round, Weights

SOURCE = Path(__file__).with_suffix(".cpp")
SUFFIX = {torch.float32: "fp32", torch.bfloat16: "bf16"}
LANES = {torch.float32: 16, torch.bfloat16: 32}  # sizes are padded to multiples of these


def unsupported(cell: str, device: str | torch.device, dtype: torch.dtype) -> str | None:
    """Why this backend cannot run such a layer here, in one line; None where it can."""
    if torch.device(device).type != "cpu":
        return f"the native backend runs on cpu, not on {device}"
    if dtype != torch.float32:
        return f"the native backend takes float32 parameters, not {dtype}"
    if cell != "lstm":
        return f"the native backend has no {cell} cell"
    try:
        library()
    except OSError as e:
        return str(e)
    return None


@functools.cache
def library() -> ctypes.CDLL:
    """The compiled loops.

    Raises:
        OSError: they cannot be compiled here, or not run, with the reason in one line.
    """
    loaded = cpp.load(SOURCE, (ctypes.sizeof(_Job), ctypes.sizeof(_Round)))
    if loaded.prepare():
        raise OSError("the native backend was refused the AMX tiles by the operating system")
    return loaded


class _Round(ctypes.Structure):
    _fields_ = [("k", c_int64)] + [
        (name, c_void_p) for name in "left right bias inner gates targets d_inner d_gates".split()
    ]


class _Job(ctypes.Structure):
    _fields_ = [
        (name, c_int64)
        for name in (
            "T B I H rounds threads slots zigzag cap mask_step by_streams rows pre_width"
        ).split()
    ] + [
        (name, c_void_p)
        for name in (
            "x xw x_source bias mask ih hh round h c pre xs output hs cs acts d_output d_h d_c "
            "d_x d_h0 d_x0 d_acts"
        ).split()
    ]


def recurrence(
    x: Tensor,
    h: Tensor,
    c: Tensor,
    weights: Weights,
    options: Options,
    state_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `reference.recurrence`; the mask has no gradient.

    Raises:
        ValueError: a cell, device or dtype that this backend does not have.
        ValueError, RuntimeError: as `arguments.checked`.
    """
    if operators.wanted():
        return operators.call("native", x, h, c, weights, options, state_mask)
    if reason := unsupported(options.cell, weights.hh.device, weights.hh.dtype):
        raise ValueError(reason)
    x, h, c, product = checked("native", x, h, c, weights, state_mask)
    if product not in SUFFIX:
        product = torch.float32  # which holds float16's values too
    flat = flatten(weights)
    if torch.is_grad_enabled() and any(p is not None and p.requires_grad for p in (x, h, c, *flat)):
        results: tuple[Tensor, Tensor, Tensor] = _Recurrence.apply(  # type: ignore[no-untyped-call]
            options, product, x, h, c, state_mask, *flat
        )
        return results
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        loop = _Loop(options, product, x, h, c, state_mask, weights, save=False)
        return loop.forward(x)


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


class _Loop:
    """The buffers of one call, padded and packed as native.cpp wants them.

    `save` keeps what a backward needs: sources of products and activations, of every step, in the
    dtype of the products.
    """

    def __init__(
        self,
        options: Options,
        product: torch.dtype,
        x_TBI: Tensor,
        h: Tensor,
        c: Tensor,
        mask: Tensor | None,
        weights: Weights,
        save: bool,
    ) -> None:
        self.dtype, self.zigzag, self.cap = product, options.zigzag, options.cap_input_gate
        self.lanes, self.weights, self.save = LANES[self.dtype], weights, save
        self.T, self.B, self.I = x_TBI.shape
        self.H, self.Ip, self.Hp = h.shape[1], self.padded(x_TBI.shape[2]), self.padded(h.shape[1])
        self.slots = self.T if save else 1
        self.mask = None if mask is None else self.pad(mask.float())
        self.x = self.pad(x_TBI)
        first = h if mask is None else h * mask[0]
        self.h, self.c = self.pad(first).clone(), self.pad(c).clone()
        self.hs, self.cs = self.saved(self.Hp, states=True), self.saved(self.Hp, states=True)
        self.hs[0], self.cs[0] = self.h, self.c
        self.acts = self.saved(4 * self.Hp)
        self.targets = [self.saved(self.size(i)) for i in range(len(weights.rounds))]
        self.gates = [self.saved(self.size(i)) for i in range(len(weights.rounds))]
        self.inner = [
            None if r.right is None else self.saved(self.padded(r.right.shape[0]))
            for r in weights.rounds
        ]
        self.x_source = None
        if not self.zigzag and len(weights.rounds) > 1:
            self.x_source = self.saved(self.Ip, self.T)
            self.x_source[: self.T] = self.x

    def by_streams(self) -> bool:
        """Whether each thread runs its own streams, without a barrier in the loop.

        That is robust: where other work takes a core now and then, each barrier waits for the
        scheduler, and 35 x 13 of them in a window took 20 times their time. Every core then reads
        all weights at each step, which costs up to 10 % where they outgrow its cache (H 650,
        B 20: 116 against 111 ms in fp32, 65 against 59 in bf16; at H 256 it gains as much).
        """
        return self.B >= 4 * torch.get_num_threads()

    def padded(self, size: int) -> int:
        return -(-size // self.lanes) * self.lanes

    def pad(self, tensor: Tensor) -> Tensor:
        size = tensor.shape[-1]
        return pad(tensor, (0, self.padded(size) - size)).resolve_neg().contiguous()

    def size(self, i: int) -> int:
        """Padded target size of round i, from 0."""
        return self.Hp if i % 2 else self.Ip

    def saved(self, size: int, slots: int | None = None, states: bool = False) -> Tensor:
        """[slots + 1, B, size]; the last, for states the last but one, is only read past its end.

        Products of bf16 tiles read some rows beyond the B that they need.
        """
        slots = (self.slots if slots is None else slots) + (2 if states else 1)
        return torch.empty(slots, self.B, size, dtype=self.dtype)

    def pack(self, weight: Tensor, transposed: bool, parts: int = 1) -> Tensor:
        """Panels of a weight [parts * n, m] for source @ weight.T, or transposed for d @ weight."""
        w = weight.detach().resolve_neg().contiguous()
        n, m = w.shape[0] // parts, w.shape[1]
        packed = torch.empty(parts * self.padded(n) * self.padded(m), dtype=self.dtype)
        function = getattr(library(), f"pack_{SUFFIX[self.dtype]}")
        sizes = (n, self.padded(n), m, self.padded(m), parts, transposed, torch.get_num_threads())
        function(c_void_p(packed.data_ptr()), c_void_p(w.data_ptr()), *map(c_int64, sizes))
        return packed

    def run(self, name: str, **tensors: Tensor | None) -> None:
        """Call a loop with the tensors that it has beside those of every job."""
        backward = name == "backward"
        keep: list[Tensor | None] = []  # packed weights and padded biases, alive during the call

        def hold(tensor: Tensor | None) -> int | None:
            keep.append(tensor)
            return _pointer(tensor)

        w = self.weights
        rounds = (_Round * len(w.rounds))()
        for i, r in enumerate(w.rounds):
            rounds[i] = _Round(
                k=0 if r.right is None else self.padded(r.right.shape[0]),
                left=hold(self.pack(r.weight, backward)),
                right=None if r.right is None else hold(self.pack(r.right, backward)),
                bias=None if r.bias is None else hold(self.pad(r.bias)),
                inner=_pointer(self.inner[i]),
                gates=_pointer(self.gates[i]),
                targets=_pointer(self.targets[i]),
                d_inner=_pointer(tensors.pop(f"d_inner{i}", None)),
                d_gates=_pointer(tensors.pop(f"d_gates{i}", None)),
            )
        ranks = [r.k for r in rounds]
        pre_width = max(4 * self.Hp, self.Ip, *ranks, 0)
        job = _Job(
            T=self.T,
            B=self.B,
            I=self.Ip,
            H=self.Hp,
            rounds=len(rounds),
            threads=torch.get_num_threads(),
            slots=self.slots,
            zigzag=self.zigzag,
            cap=self.cap,
            mask_step=0 if self.mask is None else int(self.mask.shape[0] > 1),
            by_streams=self.by_streams(),
            rows=self.B,
            pre_width=pre_width,
            x=_pointer(self.x),
            x_source=_pointer(self.x_source),
            bias=None if w.bias is None else hold(self.pad(w.bias.view(4, self.H))),
            mask=_pointer(self.mask),
            ih=hold(self.pack(w.ih, backward, 4)) if w.rounds else None,
            hh=hold(self.pack(w.hh, backward, 4)),
            round=ctypes.addressof(rounds),
            pre=hold(torch.empty(self.B, pre_width)),
            xs=hold(torch.empty(self.B, self.Ip)),
            hs=_pointer(self.hs),
            cs=_pointer(self.cs),
            acts=_pointer(self.acts),
            **{key: _pointer(tensor) for key, tensor in tensors.items()},
        )
        getattr(library(), f"{name}_{SUFFIX[self.dtype]}")(ctypes.byref(job))

    def forward(self, x_TBI: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """output [T, B, H], h [B, H], c [B, H]."""
        w = self.weights
        output = torch.empty(self.T, self.B, self.Hp)
        xw = None
        if not w.rounds:  # x is not gated: its product waits for no state
            ih = pad(w.ih.view(4, self.H, self.I), (0, 0, 0, self.Hp - self.H)).flatten(0, 1)
            rows = x_TBI.flatten(0, 1)
            xw = (rows.to(self.dtype) @ ih.to(self.dtype).t()).float()
            if w.bias is not None:
                xw += self.pad(w.bias.view(4, self.H)).flatten()
        self.run("forward", output=output, xw=xw, h=self.h, c=self.c)
        # Not a view of it, which its user could not change in place.
        result = output if self.Hp == self.H else output[..., : self.H].contiguous()
        return result, result[-1].clone(), self.c[:, : self.H].contiguous()

    def gradient(self, d: Tensor, source: Tensor) -> Tensor:
        """d^T @ source over all rows, [n, m]; both lie in rows padded to whole vectors."""
        if self.dtype != torch.float32:
            return (d.t() @ source).float()
        # Our own product: those of MKL run at half its rate on an AMD processor with AVX-512.
        (rows, n), m = d.shape, source.shape[1]
        padded = torch.empty(n, self.padded(m))
        pointers = [c_void_p(t.data_ptr()) for t in (padded, d, source)]
        sizes = d.stride(0), source.stride(0), n, padded.shape[1], rows, torch.get_num_threads()
        library().gradient_fp32(*pointers, *map(c_int64, sizes))
        return padded[:, :m].contiguous()


class _Recurrence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        options: Options,
        product: torch.dtype,
        x_TBI: Tensor,
        h: Tensor,
        c: Tensor,
        mask: Tensor | None,
        *flat: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        with torch.autocast("cpu", enabled=False):
            loop = _Loop(options, product, x_TBI, h, c, mask, unflatten(flat, "lstm"), save=True)
            results = loop.forward(x_TBI)
        # The buffers are fresh and are no inputs: only the others need autograd's version check.
        loop.weights = Weights(loop.hs, loop.hs)
        ctx.loop, ctx.options = loop, options
        ctx.save_for_backward(x_TBI, h, c, mask, *flat)
        return results

    @staticmethod
    def backward(ctx: Any, d_output: Tensor, d_h: Tensor, d_c: Tensor) -> tuple[Any, ...]:
        x, h, c, mask, *flat = ctx.saved_tensors
        loop: _Loop = ctx.loop
        if torch.is_grad_enabled():  # the gradients are to be differentiated
            inputs, d_outputs = (x, h, c), (d_output, d_h, d_c)
            found = twice_differentiable(
                ctx.options, loop.dtype, inputs, mask, tuple(flat), d_outputs
            )
            return None, None, *found[:3], None, *found[3:]
        loop.weights = unflatten(tuple(flat), "lstm")
        with torch.autocast("cpu", enabled=False):
            d_x, d_h, d_c, d_weights = _backward(loop, d_output, d_h, d_c)
        return None, None, d_x, d_h, d_c, None, *flatten(d_weights)


def _backward(
    loop: _Loop, d_output: Tensor, d_h: Tensor, d_c: Tensor
) -> tuple[Tensor, Tensor, Tensor, Weights]:
    """Gradients of x, h, c and the weights, as kernels/README.md derives them.

    The C++ loop leaves d pre-activations of every step (d_acts, d_gates, d_inner), padded; what is
    not sequential follows here: one product over all steps for each weight.
    """
    w, T, B, H, I = loop.weights, loop.T, loop.B, loop.H, loop.I  # noqa: E741
    d_h, d_c = loop.pad(d_h).clone(), loop.pad(d_c).clone()
    d_x = torch.empty(T, B, loop.Ip)
    d_acts = loop.saved(4 * loop.Hp)
    d_gates = [torch.empty_like(gate) for gate in loop.gates]
    d_inner = [None if z is None else torch.empty_like(z) for z in loop.inner]
    separate = (
        {} if loop.zigzag else {"d_h0": torch.empty_like(d_h), "d_x0": torch.empty_like(d_x[0])}
    )
    loop.run(
        "backward",
        d_output=loop.pad(d_output),
        d_h=d_h,
        d_c=d_c,
        d_x=d_x,
        d_acts=d_acts,
        **separate,
        **{f"d_gates{i}": d for i, d in enumerate(d_gates)},
        **{f"d_inner{i}": d for i, d in enumerate(d_inner)},
    )

    def rows(tensor: Tensor, size: int) -> Tensor:
        """[T * B, size] of a padded [T + 1 or more, B, ...]."""
        return tensor[:T].flatten(0, 1)[:, :size]

    def gate_gradients(d: Tensor, source: Tensor) -> Tensor:
        """[4H, m]; a product for each gate where the whole one's rows would hold padding."""
        if loop.Hp == H:
            return loop.gradient(d, source)
        gates = d.view(-1, 4, loop.Hp)[..., :H].unbind(1)
        return torch.cat([loop.gradient(gate, source) for gate in gates])

    ones = torch.ones(1, T * B, dtype=loop.dtype)

    def total(d: Tensor) -> Tensor:
        return (ones @ d)[0].float()  # a sum in float32 would first convert all of d

    x0 = x = rows(loop.x, I).to(loop.dtype)
    h0 = h = rows(loop.hs, H)
    rounds = []
    for i, r in enumerate(w.rounds):
        d, z, d_z = rows(d_gates[i], r.weight.shape[0]), loop.inner[i], d_inner[i]
        source = (x if loop.zigzag else x0) if i % 2 else (h if loop.zigzag else h0)
        k = r.weight.shape[1]
        rounds.append(
            Round(
                loop.gradient(d, source if z is None else rows(z, k)),
                None if d_z is None else loop.gradient(rows(d_z, k), source),
                None if r.bias is None else total(d),
            )
        )
        if i % 2:
            h = rows(loop.targets[i], H)
        else:
            x = rows(loop.targets[i], I)
    d = rows(d_acts, 4 * loop.Hp)
    d_ih, d_hh = (gate_gradients(d, s) for s in (x, h))
    d_bias = None if w.bias is None else total(d).view(4, -1)[:, :H].flatten()
    if w.rounds:
        d_x = d_x[..., :I]
    else:
        ih = pad(w.ih.view(4, H, I), (0, 0, 0, loop.Hp - H)).flatten(0, 1)
        d_x = (d @ ih.to(loop.dtype)).float().view(T, B, I)
    return d_x, d_h[:, :H], d_c[:, :H], Weights(d_ih, d_hh, d_bias, tuple(rounds))
