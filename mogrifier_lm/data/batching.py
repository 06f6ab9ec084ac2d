"""Streams and windows: how a flat array of tokens becomes batches.

Two orders: `Streams`, columns that end with each pass (AWD-LSTM's), and `ReadHeads`, which never
end (LAMB's).
"""

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

    endless = False  # whether windows count on over the passes

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


class ReadHeads(Streams):
    """B heads at equal distances, each reading the whole text in order, round and round.

    LAMB's order of the training data: the heads drift against the passes, so a text's place meets
    other streams each time, and no state starts anew with a pass. A pass is N // B steps, after
    which the heads together have read N tokens, give or take B. The input of a text's first token
    is its last.

    Args, errors: as `Streams`.
    """

    endless = True

    def __init__(self, ids: np.ndarray, batch_size: int, eos_id: int) -> None:
        super().__init__(ids, batch_size, eos_id)
        self.offsets = np.arange(batch_size) * self.num_tokens // batch_size
        self.num_steps = self.num_tokens // batch_size

    def window(self, start: int, length: int) -> tuple[Tensor, Tensor]:
        """Time steps [start, start + length) of every head; `start` counts on over the passes."""
        steps_T1 = np.arange(start, start + length)[:, None]
        places_TB = (self.offsets + steps_T1) % self.num_tokens
        inputs_TB, targets_TB = self.ids[places_TB - 1], self.ids[places_TB]
        return torch.from_numpy(inputs_TB.astype(np.int64)), torch.from_numpy(
            targets_TB.astype(np.int64)
        )


ORDERS = {"columns": Streams, "read_heads": ReadHeads}  # by the names of `trainer.streams`
