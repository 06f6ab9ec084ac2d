"""Text from a trained model, word by word.

    python scripts/generate.py run=RUN_DIR
    python scripts/generate.py run=RUN_DIR prompt="they said" max_words=100 temperature=0.9 seed=1
    python scripts/generate.py run=RUN_DIR number=100 stop=true top_p=0.95

run is the folder of a run, an exported one or a name on the Hugging Face hub. The prompt follows an
<eos> and is printed before what is drawn; words of it that the model does not know are read as
<unk>. A line break is an <eos>; of several texts each begins after an empty line. A single text
appears word by word as it is drawn.

    max_words=100     of each text, <eos> counted
    number=1          texts, drawn side by side
    temperature=1.0   divides the logits: below 1 likely words become likelier
    top_k=null        only from the likeliest k
    top_p=null        only from the likeliest that together have probability p
    unk=false         true: <unk> may be drawn
    stop=false        true: a text ends with its first <eos>
    seed=1            of the draws
    device=auto       a GPU where there is one
"""

import sys
from functools import partial

from mogrifier_lm.launch.cli import script
from mogrifier_lm.terminal import plain


def main(
    *,
    run: str,
    prompt: str = "",
    max_words: int = 100,
    number: int = 1,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    unk: bool = False,
    stop: bool = False,
    seed: int = 1,
    device: str = "auto",
) -> None:
    from mogrifier_lm import load_model

    model = load_model(run, device)
    if unknown := model.unknown(prompt):
        text = f"not in the vocabulary, read as <unk>: {', '.join(unknown)}"
        print(plain(text), file=sys.stderr)
    texts = model.continued(
        prompt, number=number, max_words=max_words, temperature=temperature, top_k=top_k,
        top_p=top_p, unk=unk, stop=stop, seed=seed,
    )  # fmt: skip
    if number == 1:
        for grown in texts:
            print(plain(grown[0]), end="", flush=True)
        print()
    else:
        print(plain("\n\n".join(map("".join, zip(*texts, strict=True)))))


command = partial(script, main)
