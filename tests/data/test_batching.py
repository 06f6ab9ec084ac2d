import numpy as np
import pytest
import torch

from mogrifier_lm.data import IGNORE, ReadHeads, Streams
from mogrifier_lm.errors import UserError


@pytest.mark.parametrize("num_tokens", [7, 20, 61, 100])
@pytest.mark.parametrize("batch_size", [1, 3, 7])
@pytest.mark.parametrize("bptt", [1, 4, 1000])
def test_every_token_is_a_target_once_after_its_predecessor(
    num_tokens: int, batch_size: int, bptt: int
) -> None:
    ids = np.arange(100, 100 + num_tokens, dtype=np.uint16)  # distinct, so places can be told
    streams = Streams(ids, batch_size, eos_id=5)
    pairs = []
    for start in range(0, streams.num_steps, bptt):
        inputs, targets = streams.window(start, bptt)
        real = targets != IGNORE
        pairs += list(zip(inputs[real].tolist(), targets[real].tolist(), strict=True))
    expected = [(5 if i == 0 else 99 + i, 100 + i) for i in range(num_tokens)]
    assert sorted(pairs, key=lambda pair: pair[1]) == expected


def test_columns_are_consecutive_text() -> None:
    streams = Streams(np.arange(10, dtype=np.uint16), 3, eos_id=9)
    inputs, targets = streams.window(0, 10)
    assert targets.tolist() == [[0, 4, 7], [1, 5, 8], [2, 6, 9], [3, IGNORE, IGNORE]]
    assert inputs[:3].tolist() == [[9, 3, 6], [0, 4, 7], [1, 5, 8]]
    assert inputs.dtype == targets.dtype == torch.int64


def test_more_streams_than_tokens_is_an_error() -> None:
    with pytest.raises(UserError, match="8 streams over a text of 7 tokens"):
        Streams(np.arange(7), 8, eos_id=0)


@pytest.mark.parametrize(("num_tokens", "batch_size"), [(7, 1), (20, 3), (61, 7), (64, 8)])
def test_every_read_head_covers_the_whole_text_in_order(num_tokens: int, batch_size: int) -> None:
    heads = ReadHeads(np.arange(num_tokens, dtype=np.uint16), batch_size, eos_id=0)
    cut = [heads.window(start, 5) for start in range(0, num_tokens + 5, 5)]
    inputs, targets = (torch.cat(parts) for parts in zip(*cut, strict=True))
    starts = targets[0].tolist()
    assert starts == [b * num_tokens // batch_size for b in range(batch_size)]
    for b, start in enumerate(starts):
        expected = [(start + t) % num_tokens for t in range(len(targets))]
        assert targets[:, b].tolist() == expected
        assert inputs[:, b].tolist() == [(token - 1) % num_tokens for token in expected]
    assert heads.num_steps == num_tokens // batch_size
