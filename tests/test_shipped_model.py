"""models/wt2_small: what a user tries in the first minute."""

import random

from mogrifier_lm import load_model
from tests.conftest import ROOT

FOLDER = ROOT / "models/wt2_small"


def test_it_is_small_and_knows_some_english() -> None:
    size = sum(file.stat().st_size for file in FOLDER.rglob("*") if file.is_file())
    assert size <= 16e6
    assert "CC BY-SA" in (FOLDER / "README.md").read_text()
    lm = load_model(FOLDER)
    sentences = [
        "The film was released in the United States in 1998 .",
        "He was born in London , and died in the same year .",
        "It is the second largest city in the state .",
    ]
    shuffled = [" ".join(random.Random(0).sample(s.split(), len(s.split()))) for s in sentences]
    english, mixed = lm.score(sentences), lm.score(shuffled)
    assert english.totals.unknown == 0 and english.totals.ppl < 80 < 500 < mixed.totals.ppl
    words = {w.word: w.count for w in english}
    assert words["<eos>"] == 36_718 and words["London"] and words["London"] > 100
    assert lm.next_word("in the United", 1)[0][0] in ("States", "Kingdom")
    (text,) = lm.generate("The film was", max_words=20, seed=2)
    assert len(text.replace("\n", " <eos> ").split()) == 20 and "<unk>" not in text
    again = "The frigate Aldabra was built in Trieste . The Aldabra carried two guns ."
    plain, adapted = (lm.score([again] * 8, adapt=adapt) for adapt in (False, True))
    assert adapted.totals.nats < 0.9 * plain.totals.nats
