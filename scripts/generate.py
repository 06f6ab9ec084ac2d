"""Text from a trained model, word by word.

    python scripts/generate.py run=RUN_DIR
    python scripts/generate.py run=RUN_DIR tokens=100 temperature=0.9 seed=1 prompt="they said"

The temperature divides the logits: below 1 likely words become likelier. The prompt follows an
<eos> and is printed before what is drawn; words of it that the model does not know are read as
<unk>. Other keys: device=cpu.
"""

import math
import os
import sys

from mogrifier_lm.errors import UserError
from mogrifier_lm.launch.cli import script


def main(
    *,
    run: str,
    tokens: int = 100,
    temperature: float = 1.0,
    seed: int = 1,
    prompt: str = "",
    device: str = "cpu",
) -> None:
    from mogrifier_lm import load_model
    from mogrifier_lm.data import read_lines
    from mogrifier_lm.inference.generate import sample
    from mogrifier_lm.runs.build import check_device, saved_tokenizer
    from mogrifier_lm.runs.folder import RunFolder

    if tokens < 1 or not 1e-3 <= temperature < math.inf or not 0 <= seed < 1 << 32:
        raise UserError("tokens must be at least 1, temperature 0.001, and seed 0 to 2^32 - 1")
    model, tokenizer = load_model(run, check_device(device)), saved_tokenizer(RunFolder(run))
    lines = read_lines(os.fsencode(prompt), "prompt", tokenizer)
    ids = tokenizer.encode(lines)[:-1].tolist()  # its last line goes on
    words = {word for line in lines for word in line.split()}
    if unknown := sorted(words - set(tokenizer.decode_words(ids))):
        print(f"not in the vocabulary, read as <unk>: {', '.join(unknown)}", file=sys.stderr)
    drawn = sample(model, ids, tokens, tokenizer.eos_id, temperature, seed)
    print(tokenizer.decode([*ids, *drawn]))


if __name__ == "__main__":
    script(main)
