"""The passes over logits as one Triton kernel; imported where it runs."""

import triton
import triton.language as tl

LAUNCH = {"BLOCK": 2048, "num_warps": 8, "enable_fp_fusion": True}


@triton.jit
def softmax(
    logits, targets, nats, stride, V: tl.constexpr, GRADIENT: tl.constexpr, BLOCK: tl.constexpr
):
    """A row: nats = ln sum exp - the target's logit; then the logits become their gradient.

    A target outside the V classes scores NaN.
    """
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    target = tl.load(targets + row)
    top, total = float("-inf"), 0.0
    for start in range(0, V, BLOCK):
        n = start + tl.arange(0, BLOCK)
        x = tl.load(logits + n, n < V, other=float("-inf")).to(tl.float32)
        new = tl.maximum(top, tl.max(x, 0))
        # Before the first finite logit: nothing to scale, and -inf - -inf would be NaN.
        new = tl.where(new == float("-inf"), 0.0, new)
        total = total * tl.exp(top - new) + tl.sum(tl.exp(x - new), 0)
        top = new
    normalizer = top + tl.log(total)
    inside = (target >= 0) & (target < V)
    hit = tl.load(logits + target, inside, other=float("nan")).to(tl.float32)
    tl.store(nats + row, normalizer - hit)
    if GRADIENT:
        for start in range(0, V, BLOCK):
            n = start + tl.arange(0, BLOCK)
            x = tl.load(logits + n, n < V, other=float("-inf")).to(tl.float32)
            d = tl.exp(x - normalizer) - (n == target).to(tl.float32)
            tl.store(logits + n, d.to(logits.dtype.element_ty), n < V)
