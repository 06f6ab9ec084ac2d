"""Streams and windows: how a flat array of tokens becomes batches."""

import numpy as np
import torch
from torch import Tensor

from mogrifier_lm.errors import UserError

IGNORE = -100  # the target of a place that holds no token; torch's own ignore_index


class Streams:
    """A text cut into consecutive columns that are read side by side, every token once.

    Column b predicts tokens [offset_b, offset_b + length_b) of the text; lengths differ by at
    most one, so no tail is dropped: the last time step has IGNORE in the shorter columns. The
    input of a token is its predecessor in the text, also across columns; before the first token
    stands an <eos>.

    Args:
        ids: [N] token ids.
        batch_size: B, number of columns.
        eos_id: the token fed before the first.

    Raises:
        UserError: more streams than tokens.
    """

    def __init__(self, ids: np.ndarray, batch_size: int, eos_id: int) -> None:
        if len(ids) < batch_size:
            raise UserError(
                f"{batch_size} streams over a text of {len(ids)} tokens: lower the batch size"
            )
        self.ids, self.batch_size, self.eos_id = ids, batch_size, eos_id
        self.num_tokens = len(ids)
        short, longer = divmod(len(ids), batch_size)
        self.lengths = np.full(batch_size, short)
        self.lengths[:longer] += 1
        self.offsets = np.cumsum(self.lengths) - self.lengths
        self.num_steps = int(self.lengths[0])  # time steps of one pass

    def window(self, start: int, length: int) -> tuple[Tensor, Tensor]:
        """Time steps [start, start + length) of every column, cut at the end of the pass.

        Returns:
            inputs and targets, each [T, B] int64; a target without token is IGNORE.
        """
        steps_T1 = np.arange(start, min(start + length, self.num_steps))[:, None]
        places_TB = np.minimum(self.offsets + steps_T1, self.num_tokens - 1)
        targets_TB = self.ids[places_TB].astype(np.int64)
        targets_TB[steps_T1 >= self.lengths] = IGNORE
        inputs_TB = self.ids[np.maximum(places_TB - 1, 0)].astype(np.int64)
        inputs_TB[places_TB == 0] = self.eos_id
        return torch.from_numpy(inputs_TB), torch.from_numpy(targets_TB)
