"""What people do with a recurrent layer: at rounds 0 as torch.nn.LSTM, else as the reference.

Cases come from torch's own tests of its RNNs and from what users of recurrent layers report.
"""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, rnn
from torch.utils.checkpoint import checkpoint

from mogrifier_lm.kernels.recurrence import BACKENDS, resolve
from mogrifier_lm.library.drop_in import MogrifierLSTM

I, H, T, B = 5, 16, 6, 4  # noqa: E741
LENGTHS = [3, 6, 1, 3]


def runs(backend: str) -> bool:
    try:
        return resolve(backend, "cpu") == backend
    except ValueError:
        return False


HERE = [name for name in BACKENDS if runs(name)]

# A layer of either kind, as the options say → what comes of the use.
Make = Callable[..., nn.Module]
Use = Callable[[Make], Any]
USES: dict[str, Use] = {}


def use(function: Use) -> Use:
    USES[function.__name__.replace("_", " ")] = function
    return function


def inputs(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def with_gradients(layer: nn.Module, x: Any, state: Any = None) -> list[Tensor]:
    """Output, state, and the gradient of every parameter, of the input and of the state."""
    output, (h, c) = layer(x, state)
    output = output.data if isinstance(output, rnn.PackedSequence) else output
    loss = output.square().sum() + (h * c).sum()
    wanted = [*layer.parameters(), *(() if state is None else state)]
    if isinstance(x, Tensor) and x.requires_grad:
        wanted.append(x)
    wanted = [p for p in wanted if p.requires_grad]
    return [output, h, c, *torch.autograd.grad(loss, wanted, allow_unused=True)]


def states(layers: int, *batch: int) -> tuple[Tensor, Tensor]:
    shape = (layers, *batch, H)
    return inputs(*shape, seed=2).requires_grad_(), inputs(*shape, seed=3).requires_grad_()


@use
def the_state_given(make):
    return with_gradients(make(), inputs(T, B, I).requires_grad_(), states(1, B))


@use
def two_layers_without_bias(make):
    return with_gradients(make(num_layers=2, bias=False), inputs(T, B, I), states(2, B))


@use
def arguments_by_position(make):
    return with_gradients(make(2, False, True, 0.0, True), inputs(B, T, I), states(4, B))


@use
def arguments_by_name(make):
    layer, (h, c) = make(), states(1, B)
    return layer(input=inputs(T, B, I), hx=(h, c))[1]


@use
def both_directions_of_three_layers(make):
    layer = make(num_layers=3, bidirectional=True)
    return with_gradients(layer, inputs(T, B, I).requires_grad_(), states(6, B))


@use
def one_sequence_in_both_directions(make):
    return with_gradients(make(bidirectional=True, batch_first=True), inputs(T, I), states(2))


@use
def a_batch_of_none(make):
    output, (h, c) = make()(inputs(T, 0, I))
    return output, h, c


def packed(enforce_sorted: bool, batch_first: bool = False) -> rnn.PackedSequence:
    lengths = sorted(LENGTHS, reverse=True) if enforce_sorted else LENGTHS
    x = inputs(*((B, T) if batch_first else (T, B)), I)
    return rnn.pack_padded_sequence(x, lengths, batch_first, enforce_sorted)


@use
def packed_and_sorted(make):
    return with_gradients(make(), packed(True), states(1, B))


@use
def packed_and_unsorted(make):
    return with_gradients(make(), packed(False), states(1, B))


@use
def packed_in_both_directions(make):
    layer = make(num_layers=2, bidirectional=True, batch_first=True)
    return with_gradients(layer, packed(False, batch_first=True), states(4, B))


@use
def packed_without_a_state_and_padded_again(make):
    output, state = make()(packed(False))
    return *rnn.pad_packed_sequence(output), *state


@use
def packed_of_one_length(make):
    x = rnn.pack_sequence([inputs(T, I), inputs(T, I, seed=4)])
    return with_gradients(make(bidirectional=True), x)


@use
def weight_norm(make):
    layer = parametrizations.weight_norm(make(), "weight_hh_l0")
    return with_gradients(layer, inputs(T, B, I))


@use
@pytest.mark.filterwarnings("ignore::FutureWarning")
def weight_norm_of_old(make):
    layer = torch.nn.utils.weight_norm(make(), "weight_hh_l0")
    return with_gradients(layer, inputs(T, B, I))


@use
def spectral_norm(make):
    layer = make()
    torch.manual_seed(3)
    layer = parametrizations.spectral_norm(layer, "weight_ih_l0").eval()  # each access is a step
    return with_gradients(layer, inputs(T, B, I))


@use
def pruning(make):
    layer = make()
    prune.l1_unstructured(layer, "weight_hh_l0", amount=0.3)
    return with_gradients(layer, inputs(T, B, I))


@use
def weight_drop(make):
    """As AWD-LSTM's wrapper: the parameter is kept aside, a tensor takes its place."""
    layer = make()
    raw = layer._parameters.pop("weight_hh_l0")
    layer.register_parameter("weight_hh_l0_raw", nn.Parameter(raw.data))
    dropped = layer.weight_hh_l0_raw * (inputs(*raw.shape, seed=9) > 0)
    layer.weight_hh_l0 = dropped
    layer.flatten_parameters()
    return with_gradients(layer, inputs(T, B, I))


@use
def a_replica_of_data_parallel(make):
    layer = make(num_layers=2)
    replica = layer._replicate_for_data_parallel()
    replica._former_parameters = {}
    for key, parameter in layer._parameters.items():
        tensor = parameter * 1.0
        setattr(replica, key, tensor)
        replica._former_parameters[key] = tensor
    if isinstance(layer, nn.LSTM):
        replica._flat_weights = [getattr(replica, name) for name in replica._flat_weights_names]
    output, (h, c) = replica(inputs(T, B, I))
    loss = output.sum() + c.sum()
    return [output, h, c, *torch.autograd.grad(loss, list(layer.parameters()))]


@use
def a_functional_call(make):
    layer = make()
    weights = {name: p * 0.5 for name, p in layer.named_parameters()}
    return torch.func.functional_call(layer, weights, (inputs(T, B, I),))


@use
def copies_and_pickles(make):
    layer = make(num_layers=2)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    loaded = make(num_layers=2)
    loaded.load_state_dict(torch.load(file))
    twins = (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), loaded)
    return [twin(inputs(T, B, I)) for twin in twins]


@use
def frozen_weights(make):
    layer = make()
    layer.weight_hh_l0.requires_grad_(False)
    layer.bias_ih_l0.requires_grad_(False)
    return with_gradients(layer, inputs(T, B, I).requires_grad_())


@use
def a_gradient_penalty(make):
    layer, x = make(), inputs(T, B, I).requires_grad_()
    output, _ = layer(x)
    (gradient,) = torch.autograd.grad(output.sum(), x, create_graph=True)
    loss = output.square().mean() + 10 * (gradient.norm() - 1) ** 2
    return torch.autograd.grad(loss, list(layer.parameters()), allow_unused=True)


@use
def an_activation_in_place(make):
    layer = make()
    output, _ = layer(inputs(T, B, I))
    relu = torch.relu if isinstance(layer, nn.LSTM) else torch.relu_  # which oneDNN's refuses
    return torch.autograd.grad(relu(output).sum(), list(layer.parameters()))


@use
def recomputed_activations(make):
    layer, x = make(), inputs(T, B, I).requires_grad_()
    output, _ = checkpoint(layer, x, use_reentrant=False)
    return torch.autograd.grad(output.square().sum(), [x, *layer.parameters()])


@use
def inputs_of_other_strides(make):
    layer = make()
    spread = inputs(T, B, 2 * I)[:, :, ::2]
    return [
        layer(spread),
        layer(inputs(B, T, I).transpose(0, 1)),
        layer(inputs(1, 1, I).expand(T, B, I)),
    ]


@use
def inference_mode(make):
    layer = make(num_layers=2, bidirectional=True)
    with torch.inference_mode():
        output, state = layer(inputs(T, B, I))
        return output.clone(), *(s.clone() for s in state)


@use
def a_state_carried_and_detached(make):
    layer, state, outputs = make(), None, []
    for seed in range(3):
        output, state = layer(inputs(T, B, I, seed=seed), state)
        state = tuple(s.detach() for s in state)
        outputs.append(output)
    return outputs


@use
def hooks(make):
    layer, seen = make(), []
    layer.register_forward_hook(lambda module, args, result: seen.append(result[0].sum()))
    layer.weight_hh_l0.register_hook(lambda gradient: gradient * 2)
    return [*with_gradients(layer, inputs(T, B, I)), *seen]


@use
def a_vector_of_parameters(make):
    layer = make()
    vector = nn.utils.parameters_to_vector(layer.parameters())
    nn.utils.vector_to_parameters(vector * 0.9, layer.parameters())
    return layer(inputs(T, B, I))


@use
def the_lists_of_weights(make):
    layer = make(num_layers=2, bidirectional=True)
    layer.flatten_parameters()
    assert layer.mode == "LSTM"
    values = [layer.proj_size, layer.bidirectional, layer.bias, layer.num_layers, layer.dropout]
    return [*map(float, values), len(layer.all_weights), *(w[1] for w in layer.all_weights)]


@use
def a_subclass_with_a_norm_of_its_own(make):
    layer = make()

    class Normed(type(layer)):  # type: ignore[misc]
        def forward(self, *arguments: Any) -> Any:
            output, state = super().forward(*arguments)
            return self.norm(output), state

    layer.__class__ = Normed
    layer.norm = nn.LayerNorm(H)
    values = [p.detach().clone() for p in layer.parameters()]
    layer.reset_parameters()
    with torch.no_grad():
        for p, value in zip(layer.parameters(), values, strict=True):
            p.copy_(value)
    return with_gradients(layer, inputs(T, B, I))


@use
def autocast(make):
    layer = make()
    with torch.autocast("cpu", torch.bfloat16):
        output, (h, c) = layer(inputs(T, B, I))
    return output.float(), h.float(), c.float()


@pytest.mark.parametrize(
    ("rounds", "backend"), [(r, b) for r in range(7) for b in HERE if r == 0 or b != "reference"]
)
@pytest.mark.parametrize("name", USES)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_use(name, rounds, backend):
    def ours(*arguments: Any, **options: Any) -> nn.Module:
        torch.manual_seed(0)
        return MogrifierLSTM(I, H, *arguments, rounds=rounds, backend=backend, **options)

    def theirs(*arguments: Any, **options: Any) -> nn.Module:
        if rounds:
            other = MogrifierLSTM(I, H, *arguments, rounds=rounds, backend="reference", **options)
        else:
            other = nn.LSTM(I, H, *arguments, **options)
        other.load_state_dict(ours(*arguments, **options).state_dict())
        return other

    tolerance = 2e-2 if name == "autocast" else 2e-5
    values = USES[name](ours)
    try:
        expected = USES[name](theirs)
    except RuntimeError as error:  # torch's own layer, in bf16 on a processor without AVX-512
        if rounds or "primitive descriptor" not in str(error):
            raise
        pytest.skip("torch.nn.LSTM cannot run this here")
    torch.testing.assert_close(values, expected, rtol=tolerance, atol=tolerance)
