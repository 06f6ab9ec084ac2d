"""Text of a trained model's own."""

from collections.abc import Sequence

import torch

from mogrifier_lm.model import LanguageModel


@torch.no_grad()
def sample(
    model: LanguageModel,
    prompt: Sequence[int],
    num_tokens: int,
    eos_id: int,
    temperature: float = 1.0,
    seed: int = 1,
) -> list[int]:
    """Ids of tokens drawn one by one after an <eos> and the prompt, the state carried.

    Args:
        model: weights are used as they are.
        prompt: ids, may be empty.
        num_tokens: how many are drawn.
        eos_id: the token fed first.
        temperature: divides the logits, above 0: below 1 likely words become likelier.
        seed: of the draws.
    """
    generator = torch.Generator().manual_seed(seed)
    device, states = model.output_bias.device, model.zero_states(1)
    inputs, drawn = [eos_id, *prompt], []
    for _ in range(num_tokens):
        hidden_TH, states = model.encode(torch.tensor(inputs, device=device)[:, None], states)
        p_V = model.log_probs(hidden_TH[-1:], temperature)[0].exp().cpu()
        inputs = [int(torch.multinomial(p_V, 1, generator=generator))]
        drawn += inputs
    return drawn
