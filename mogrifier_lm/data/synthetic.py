"""The synthetic language: text whose exact probability is known.

On a real corpus nobody knows how good a perplexity can get. Here the source itself can be asked:
`SyntheticLanguage.nats` is the exact negative log-probability of a text, so the perplexity it
gives is a floor that no model beats except by luck. A model's distance to the floor is what is
left to learn, and a model below it has seen the answers.
"""

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

EOS = "<eos>"
VOCAB_SIZE = 2400
TRAIN_TOKENS = 400_000
EVAL_TOKENS = 30_000

TOPICS = 12
TOPIC_PERSISTENCE = 0.92  # chance that the next sentence keeps the topic
HOME_BOOST = 60.0  # how much likelier a word is in its home topic than in any other
ZIPF_EXPONENT = 1.0
ZIPF_SHIFT = 2.0  # Mandelbrot's shift: flattens the very top of each word class

MOODS = 4
AGREEMENTS = 4  # 2 genders x 2 numbers: agreement = 2 * gender + number
SUFFIXES = ("o", "os", "a", "as")
P_ADJECTIVE = 0.5
P_ANOTHER_ADJECTIVE = 0.2
P_MODIFIER = 0.45  # chance of a prepositional phrase after a noun
P_ADVERB = 0.4
P_OBJECT = 0.7

# Words of each closed class, for each mood or agreement it shows.
CLOSED = {"opener": 4, "determiner": 3, "preposition": 16, "closer": 1}
# Share of the rest of the vocabulary that each open class gets.
OPEN = {"noun": 0.5, "verb": 0.25, "adjective": 0.18, "adverb": 0.07}

Floats = NDArray[np.float64]
WordClass = tuple[str, int]


class State(NamedTuple):
    """Grammatical half of the hidden state: the slot being filled and what must be remembered."""

    slot: str
    mood: int = 0
    subject: int | None = None  # agreement of the subject until the verb has shown it
    phrase: int = 0  # agreement of the noun phrase under way

    @property
    def word_class(self) -> WordClass:
        """Which words fill the slot: its name and the mood or agreement they show."""
        if self.slot in ("opener", "closer"):
            return self.slot, self.mood
        if self.slot in ("determiner", "noun"):
            return self.slot, self.phrase
        if self.slot == "verb":
            assert self.subject is not None
            return self.slot, self.subject
        return self.slot, 0

    def successors(self) -> Iterator[tuple["State", float]]:
        """Yield every state that may come next, with its probability."""
        slot, mood, subject, phrase = self
        if slot == EOS:
            for new in range(MOODS):
                yield State("opener", new), 1 / MOODS
        elif slot == "opener":
            for new in range(AGREEMENTS):
                yield State("determiner", mood, new, new), 1 / AGREEMENTS
        elif slot in ("determiner", "adjective"):
            more = P_ADJECTIVE if slot == "determiner" else P_ANOTHER_ADJECTIVE
            yield State("adjective", mood, subject, phrase), more
            yield State("noun", mood, subject, phrase), 1 - more
        elif slot == "noun":
            yield State("preposition", mood, subject), P_MODIFIER
            after = State("closer", mood) if subject is None else State("verb", mood, subject)
            yield after, 1 - P_MODIFIER
        elif slot == "preposition":
            for new in range(AGREEMENTS):
                yield State("determiner", mood, subject, new), 1 / AGREEMENTS
        elif slot in ("verb", "adverb"):
            adverb = P_ADVERB if slot == "verb" else 0.0
            if adverb:
                yield State("adverb", mood), adverb
            for new in range(AGREEMENTS):
                yield State("determiner", mood, None, new), (1 - adverb) * P_OBJECT / AGREEMENTS
            yield State("closer", mood), (1 - adverb) * (1 - P_OBJECT)
        else:
            yield State(EOS), 1.0


class SyntheticLanguage:
    """A hidden Markov source of made-up text."""

    def __init__(self, seed: int = 0, vocab_size: int = VOCAB_SIZE) -> None:
        rng = np.random.default_rng(seed)
        self._emissions: dict[WordClass, tuple[list[str], Floats]] = {
            (EOS, 0): ([EOS], np.ones((TOPICS, 1)))
        }
        taken: set[str] = set()

        def coin(count: int, syllables: int, suffixes: Sequence[str]) -> list[list[str]]:
            coined: list[list[str]] = []
            while len(coined) < count:
                u = rng.random((syllables, 3))
                stem = "".join(
                    ONSETS[int(a * len(ONSETS))]
                    + VOWELS[int(b * 5)]
                    + CODAS[int(c * len(CODAS))] * 0
                    for a, b, c in u
                )
                stem += CODAS[int(u[-1, 2] * len(CODAS))]
                forms = [stem + s for s in suffixes]
                if taken.isdisjoint(forms):
                    taken.update(forms)
                    coined.append(forms)
            return coined

        def weights(count: int, topical: bool) -> Floats:
            zipf = (np.arange(count) + 1 + ZIPF_SHIFT) ** -ZIPF_EXPONENT
            home = (rng.random(count) * TOPICS).astype(int)
            w = zipf * np.where(topical & (home == np.arange(TOPICS)[:, None]), HOME_BOOST, 1.0)
            return w / w.sum(1, keepdims=True)

        kinds = {"opener": MOODS, "closer": MOODS, "determiner": AGREEMENTS, "preposition": 1}
        closed = 0
        for slot, count in CLOSED.items():
            for kind in range(kinds[slot]):
                words = [
                    f[0] for f in coin(count, 1, [SUFFIXES[kind]] if slot == "determiner" else [""])
                ]
                self._emissions[slot, kind] = words, weights(count, False)
                closed += count
        n = vocab_size - closed
        for gender in range(2):
            forms = coin(round(n * OPEN["noun"] / 4), 2, SUFFIXES[2 * gender : 2 * gender + 2])
            w = weights(len(forms), True)
            for number in range(2):
                self._emissions["noun", 2 * gender + number] = [f[number] for f in forms], w
        forms = coin(
            round(n * OPEN["verb"] / 4),
            2,
            [s.replace("o", "ei").replace("a", "ui") for s in SUFFIXES],
        )
        w = weights(len(forms), True)
        for a in range(AGREEMENTS):
            self._emissions["verb", a] = [f[a] for f in forms], w
        for slot, suf in (("adjective", "e"), ("adverb", "emi")):
            forms = coin(round(n * OPEN[slot]), 2, [suf])
            self._emissions[slot, 0] = [f[0] for f in forms], weights(len(forms), True)

        # states
        states = [State(EOS)]
        for s in states:
            states.extend(x for x, _ in s.successors() if x not in states)
        self._members: dict[WordClass, list[State]] = {}
        for s in states:
            self._members.setdefault(s.word_class, []).append(s)
        self._words = {
            w: (c, e[:, i].copy())
            for c, (ws, e) in self._emissions.items()
            for i, w in enumerate(ws)
        }
        self._steps: dict[tuple[WordClass, WordClass], Floats] = {}
        row = {s: i for m in self._members.values() for i, s in enumerate(m)}
        for s in states:
            for x, p in s.successors():
                key = s.word_class, x.word_class
                if key not in self._steps:
                    self._steps[key] = np.zeros(
                        (len(self._members[key[1]]), len(self._members[key[0]]))
                    )
                self._steps[key][row[x], row[s]] += p
        prior = np.arange(1, TOPICS + 1) ** -0.0
        self._prior = prior / prior.sum()

    def sample(self, num_tokens: int, seed: int) -> list[str]:
        rng = np.random.default_rng(seed)
        cum = {c: (ws, np.cumsum(e, 1).tolist()) for c, (ws, e) in self._emissions.items()}
        nxt = {}
        for m in chain.from_iterable(self._members.values()):
            xs, ps = zip(*m.successors())
            nxt[m] = xs, np.cumsum(ps).tolist()
        tp = np.cumsum(self._prior).tolist()

        def pick(c: list[float]) -> int:
            return min(bisect_right(c, rng.random()), len(c) - 1)

        topic = pick(tp)
        state = State(EOS)
        lines, words, total = [], [], 0
        while total < num_tokens:
            xs, ps = nxt[state]
            state = xs[pick(ps)]
            total += 1
            if state.slot == EOS:
                lines.append(" ".join(words))
                words = []
                if rng.random() >= TOPIC_PERSISTENCE:
                    topic = pick(tp)
            else:
                ws, cs = cum[state.word_class]
                words.append(ws[pick(cs[topic])])
            if words:
                continue
        return lines

    def token_nats(self, tokens):
        out = np.empty(len(tokens))
        cls = (EOS, 0)
        belief = self._prior[None]
        for i, t in enumerate(tokens):
            new, e = self._words[t]
            step = self._steps.get((cls, new))
            if step is None:
                out[i:] = math.inf
                return out
            belief = step @ belief * e
            p = belief.sum()
            out[i] = -math.log(p)
            belief = belief / p
            if t == EOS:
                belief = TOPIC_PERSISTENCE * belief + (1 - TOPIC_PERSISTENCE) * self._prior
            cls = new
        return out

    def nats(self, lines):
        return float(self.token_nats([t for l in lines for t in [*l.split(), EOS]]).sum())


ONSETS = [
    "b",
    "d",
    "f",
    "g",
    "k",
    "l",
    "m",
    "n",
    "p",
    "r",
    "s",
    "t",
    "v",
    "z",
    "br",
    "dr",
    "tr",
    "kl",
    "pl",
    "st",
]
VOWELS = "aeiou"
CODAS = ["l", "n", "r", "s", "t", "m", "k"]
