"""CellSpec: sizes against the published parameter budget, and what it refuses."""

import pytest
import torch

from mogrifier_lm.cells import CellSpec, RecurrentLayer

BUDGET, VOCABULARY = 24_000_000, 10_001
# Largest hidden sizes at 24M parameters on PTB, two layers, tied, for 0 to 6 rounds.
HIDDEN = {
    84: [951, 943, 935, 927, 919, 912, 904],
    None: [951, 909, 873, 841, 812, 787, 763],
}


def total(hidden: int, rounds: int, rank: int | None) -> int:
    spec = CellSpec(input_size=hidden, hidden_size=hidden, rounds=rounds, rank=rank)
    return VOCABULARY * hidden + VOCABULARY + 2 * spec.num_params()


@pytest.mark.parametrize("rounds", range(7))
@pytest.mark.parametrize("rank", HIDDEN)
def test_the_largest_hidden_size_within_24m_parameters_is_the_published_one(rank, rounds):
    largest = next(h for h in range(1000, 0, -1) if total(h, rounds, rank) <= BUDGET)
    assert abs(largest - HIDDEN[rank][rounds]) <= 1


@pytest.mark.parametrize("cell", ["lstm", "mlstm", "rlstm"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rounds": 5},
        {"rounds": 4, "rank": 2, "round_bias": False},
        {"rounds": 5, "bias": False},
        {"rounds": 6, "share_rounds": True},
    ],
    ids=str,
)
def test_num_params_counts_what_a_layer_has(options, cell):
    spec = CellSpec(input_size=5, hidden_size=7, cell=cell, **options)
    assert spec.num_params() == sum(p.numel() for p in RecurrentLayer(spec).parameters())


def test_rlstm_has_seven_matrices_in_place_of_eight():
    count = {
        cell: CellSpec(input_size=7, hidden_size=7, cell=cell, bias=False).num_params() // 49
        for cell in ("lstm", "rlstm", "mlstm")
    }
    assert count == {"lstm": 8, "rlstm": 7, "mlstm": 10}


@pytest.mark.parametrize("rounds, matrices", [(0, 0), (1, 1), (2, 2), (6, 2)])
def test_shared_rounds_have_one_matrix_a_side(rounds, matrices):
    spec = CellSpec(input_size=5, hidden_size=7, rounds=rounds, share_rounds=True)
    assert sum(name.endswith("_weight") for name in spec.shapes()) == matrices


@pytest.mark.parametrize(
    "options, message",
    [
        ({"cell": "gro"}, "cell is 'gro'.*lstm, rlstm, mlstm"),
        ({"rank": 8}, "rank is 8.*between 1 and 5"),
        ({"init": "normal"}, "init is 'normal'.*melis2020"),
    ],
    ids=str,
)
def test_a_wrong_value_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        CellSpec(**({"input_size": 5, "hidden_size": 7} | options))


def test_a_layer_carries_its_state_from_window_to_window():
    torch.manual_seed(0)
    layer = RecurrentLayer(CellSpec(input_size=5, hidden_size=7, rounds=3))
    x, state = torch.randn(6, 3, 5), layer.zero_state(3)
    whole, _ = layer(x, state)
    first, state = layer(x[:2], state)
    second, _ = layer(x[2:], state)
    torch.testing.assert_close(torch.cat((first, second)), whole)
