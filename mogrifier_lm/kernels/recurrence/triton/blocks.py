"""How a kernel is cut into programs, which changes no result but the order of its sums.

Measured on an H100 in bf16, microseconds of one kernel among others of its kind in a graph:

- 64 streams, 912 units, rank 84: inner products 2.6 with 128 columns at a time, 2.5 with 256 (2.9,
  2.8 in the backward); the gates' products 1.7, all other blocks tried 1.8 or more; the cell 8.5,
  twelve others 8.6 to 12; its backward 2.0 by 64 streams and 8 units, 1.4 by 8 and 32; the gradient
  of its inputs 9.2 with 64 columns at a time, 7.7 with 128.
- 20 streams, 1,150 units, no rounds: the cell 7.2, with 16 units in 8 warps 6.5; the gradient of
  its inputs 12.2, with 128 columns at a time 11.0.
- 20 streams, 240 units, rounds of full rank: whatever takes all of a sum at once: gates 2.1 to 1.9,
  their backward 2.4 to 2.0, the cell 4.1 to 2.9, its backward 1.5 to 1.0.
"""

from typing import NamedTuple


class Blocks(NamedTuple):
    """Streams, columns (of a cell: units) and summed columns of a block; warps, loads in flight."""

    streams: int
    columns: int
    depth: int
    warps: int = 4
    stages: int = 4


def power_of_2(size: int) -> int:
    """The next one."""
    return 1 << (size - 1).bit_length()


def _fitted(blocks: Blocks, batch: int, summed: int) -> Blocks:
    """No larger than what there is; a product of blocks takes at least 16 streams."""
    streams = 1 if batch == 1 else min(blocks.streams, max(16, power_of_2(batch)))
    return blocks._replace(streams=streams, depth=min(blocks.depth, power_of_2(summed)))


def inner(batch: int, summed: int, half: bool) -> Blocks:
    """Of a product with few columns, the rank of a round."""
    if batch == 1:
        return _fitted(Blocks(1, 4, 256), batch, summed)
    return _fitted(Blocks(16, 16, 256, stages=3) if half else Blocks(16, 16, 128), batch, summed)


def gate(batch: int, summed: int, half: bool) -> Blocks:
    """Of a round's last product, and of the gradient of its source."""
    if batch == 1:
        return _fitted(Blocks(1, 8, 256), batch, summed)
    long = half and summed > 128
    return _fitted(Blocks(16, 32, 256, stages=2) if long else Blocks(16, 32, 128), batch, summed)


def cell(batch: int, units: int, half: bool) -> Blocks:
    """Of the products of a cell, four columns to a unit."""
    if batch == 1:
        blocks = Blocks(1, 8, 128)
    elif not half:
        blocks = Blocks(32, 8, 64)
    elif batch > 32:
        blocks = Blocks(64, 8, 64)
    elif units <= 256:
        blocks = Blocks(16, 8, 256, stages=2)
    else:
        blocks = Blocks(32, 16, 128, warps=8, stages=3)
    return _fitted(blocks, batch, units)


def single(batch: int, summed: int, half: bool) -> Blocks:
    """Of the products that the mLSTM and the RLSTM have besides, a column to a unit."""
    return _fitted(Blocks(16, 16, 128 if half else 64), batch, summed)


def inputs_backward(batch: int, summed: int, half: bool) -> Blocks:
    """Of the gradient of a cell's inputs."""
    if batch == 1:
        blocks = Blocks(1, 16, 128)
    elif not half:
        blocks = Blocks(64, 16, 64)
    elif batch <= 32 and summed <= 1024:
        blocks = Blocks(16, 16, 256, stages=3)
    else:
        blocks = Blocks(64, 16, 128)
    return _fitted(blocks, batch, summed)


def elementwise(units: int) -> Blocks:
    """Of the backward of a cell."""
    return Blocks(8, 16 if units <= 256 else 32, 0)
