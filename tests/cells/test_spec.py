"""Parameter counts, shapes and initial values of one layer."""

import math

import pytest
import torch

from mogrifier_lm.cells import CellSpec
from mogrifier_lm.kernels.recurrence.reference import mogrify

VOCAB, BUDGET = 10_001, 24_000_000


def params(hidden: int, rounds: int, rank: int | None) -> int:
    """Of LAMB's PTB model: two layers, embedding tied and as wide as the hidden state."""
    spec = CellSpec(input_size=hidden, hidden_size=hidden, rounds=rounds, rank=rank)
    return VOCAB * hidden + VOCAB + 2 * spec.num_params()


@pytest.mark.parametrize(
    "rank, sizes",
    [
        (84, [951, 943, 935, 927, 919, 912, 904]),
        (None, [951, 909, 873, 841, 812, 787, 763]),
    ],
)
def test_hidden_sizes_of_the_published_24m_models_just_fit_their_budget(rank, sizes):
    for rounds, published in enumerate(sizes):
        largest = max(
            h for h in range(published - 5, published + 6) if params(h, rounds, rank) <= BUDGET
        )
        assert abs(largest - published) <= 1, (rounds, largest)


@pytest.mark.parametrize("cell", ["lstm", "mlstm", "rlstm"])
def test_a_cell_has_the_matrices_of_its_formulas(cell):
    """In units of H squared: LSTM 8, mLSTM two more, RLSTM seven; biases 4 H each."""
    h = 10
    matrices = {"lstm": 8, "mlstm": 10, "rlstm": 7}[cell]
    spec = CellSpec(input_size=h, hidden_size=h, cell=cell)
    assert spec.num_params() == matrices * h * h + 4 * h


def test_shared_rounds_count_their_two_matrices_once():
    def num_params(**options):
        return CellSpec(input_size=3, hidden_size=5, round_bias=False, **options).num_params()

    plain = num_params()
    assert num_params(rounds=1, share_rounds=True) == plain + 15
    assert num_params(rounds=5, share_rounds=True) == plain + 2 * 15
    assert num_params(rounds=5) == plain + 5 * 15


def test_gates_are_near_one_at_initialisation():
    """Whatever the rank: std sqrt(1.3 / fan_in), a little less after truncation, biases zero."""
    torch.manual_seed(0)
    for rank in (None, 40):
        spec = CellSpec(input_size=300, hidden_size=200, rounds=2, rank=rank)
        parameters = {name: torch.empty(shape) for name, shape in spec.shapes().items()}
        for name, parameter in parameters.items():
            spec.init_(name, parameter)
        rounds = spec.weights(parameters).rounds
        for r, fan_in in zip(rounds, (200, 300), strict=True):
            matrix = r.weight if r.right is None else r.weight @ r.right
            assert 0.6 < matrix.std() * math.sqrt(fan_in) < 1.3
            assert (r.bias == 0).all()
        x, h = torch.ones(50, 300), 0.1 * torch.randn(50, 200)
        gated, _ = mogrify(x, h, rounds)
        assert 0.9 < gated.mean() < 1.1 and gated.std() < 0.2


@pytest.mark.parametrize(
    "options, message",
    [
        ({"rounds": -1}, "rounds is -1"),
        ({"input_size": 0}, "input_size is 0"),
        ({"hidden_size": 0}, "hidden_size is 0"),
        ({"rank": 4}, "rank is 4"),
        ({"rank": 0}, "rank is 0"),
        ({"cell": "gru"}, "cell is 'gru'"),
    ],
)
def test_what_cannot_be_is_an_error_that_names_it(options, message):
    with pytest.raises(ValueError, match=message):
        CellSpec(**{"input_size": 3, "hidden_size": 5, "rounds": 2} | options)
