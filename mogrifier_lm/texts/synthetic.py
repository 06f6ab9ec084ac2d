"""The synthetic language: text whose exact probability is known.

On a real corpus nobody knows how low a perplexity can get. Here the source itself can be asked:
the perplexity that `SyntheticLanguage.nats` gives a text is a floor that no model beats except
by luck. What a model is above it is left to learn; a model below it has seen the answers.
"""

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mogrifier_lm.data.text import EOS

TRAIN_TOKENS = 400_000
EVAL_TOKENS = 30_000
VOCAB_SIZE = 2000

# Few topics with words of their own: with 12 topics and HOME_BOOST 60 a small LSTM was slower to
# find them (2.4 x the floor after one epoch, not 2.0).
TOPICS = 6
TOPIC_PERSISTENCE = 0.92  # chance that the topic is not drawn anew after a sentence
HOME_BOOST = 80.0  # how much likelier a word is in its home topic than in another one
ZIPF_EXPONENT = 1.0
ZIPF_SHIFT = 2.0  # Mandelbrot's: without it the first few words of a class take most of it

MOODS = 3
AGREEMENTS = 4  # 2 x gender + number
P_ADJECTIVE = 0.5
P_ANOTHER_ADJECTIVE = 0.2
P_PREPOSITION = 0.45  # chance that a noun is followed by a modifier phrase
P_ADVERB = 0.5
P_OBJECT = 0.7

Floats = NDArray[np.float64]
WordClass = tuple[str, int]  # a slot and the mood or agreement its words show, 0 for neither


class Paradigm(NamedTuple):
    """Stems of one slot; stem + suffixes[i] is the form that shows kinds[i]."""

    slot: str
    kinds: tuple[int, ...]
    suffixes: tuple[str, ...]
    size: float  # stems of a function word; of a content word, its share of all content words


FUNCTION_WORDS = (
    *(Paradigm("opener", (mood,), ("",), 4) for mood in range(MOODS)),
    Paradigm("determiner", (0, 1, 2, 3), ("o", "os", "a", "as"), 3),
    Paradigm("preposition", (0,), ("",), 16),
    *(Paradigm("closer", (mood,), ("",), 1) for mood in range(MOODS)),
)
CONTENT_WORDS = (
    Paradigm("noun", (0, 1), ("o", "os"), 0.25),
    Paradigm("noun", (2, 3), ("a", "as"), 0.25),
    Paradigm("verb", (0, 1, 2, 3), ("ei", "eis", "ui", "uis"), 0.25),
    Paradigm("adjective", (0,), ("e",), 0.19),
    *(Paradigm("adverb", (mood,), ("emi",), 0.06 / MOODS) for mood in range(MOODS)),
)
ONSETS = "b d f g k l m n p r s t v z br dr kl pl st tr".split()
VOWELS = "a e i o u".split()
CODAS = "k l m n r s t".split()


class State(NamedTuple):
    """The grammatical half of the hidden state: the slot being filled and what it remembers."""

    slot: str
    mood: int = 0
    subject: int | None = None  # the agreement that the verb is still to show
    phrase: int = 0  # the agreement of the noun phrase under way

    @property
    def word_class(self) -> WordClass:
        """Where the word of this slot is drawn from."""
        if self.slot in ("opener", "adverb", "closer"):
            return self.slot, self.mood
        if self.slot in ("determiner", "noun"):
            return self.slot, self.phrase
        return self.slot, (self.subject or 0) if self.slot == "verb" else 0

    def successors(self) -> Iterator[tuple["State", float]]:
        """Yield each state that can come next, with its probability."""
        slot, mood, subject, phrase = self
        if slot == EOS:
            yield from ((State("opener", new), 1 / MOODS) for new in range(MOODS))
        elif slot == "opener":
            for new in range(AGREEMENTS):
                yield State("determiner", mood, new, new), 1 / AGREEMENTS
        elif slot in ("determiner", "adjective"):
            more = P_ADJECTIVE if slot == "determiner" else P_ANOTHER_ADJECTIVE
            yield State("adjective", mood, subject, phrase), more
            yield State("noun", mood, subject, phrase), 1 - more
        elif slot == "noun":
            yield State("preposition", mood, subject), P_PREPOSITION
            after = State("closer", mood) if subject is None else State("verb", mood, subject)
            yield after, 1 - P_PREPOSITION
        elif slot == "preposition":
            for new in range(AGREEMENTS):
                yield State("determiner", mood, subject, new), 1 / AGREEMENTS
        elif slot in ("verb", "adverb"):
            rest = 1.0
            if slot == "verb":
                yield State("adverb", mood), P_ADVERB
                rest -= P_ADVERB
            for new in range(AGREEMENTS):
                yield State("determiner", mood, None, new), rest * P_OBJECT / AGREEMENTS
            yield State("closer", mood), rest * (1 - P_OBJECT)
        else:
            yield State(EOS), 1.0


class SyntheticLanguage:
    """A hidden Markov source of made-up sentences.

    A sentence is an opener, a subject, a verb, perhaps an adverb and an object, and a closer;
    each noun phrase has a determiner, perhaps adjectives, and any number of modifier phrases
    (preposition, noun phrase). Opener, adverb and closer show the mood of the sentence, the verb
    shows gender and number of the subject: both reach over phrases of any length that have an
    agreement of their own. (With the mood shown by opener and closer alone, a small LSTM took
    more than three epochs to begin to see it.) Which nouns, verbs, adjectives and adverbs are
    used depends on a topic that is kept for some 15 sentences and never named.

    Attributes:
        words: the words of each class, in falling order of their Zipf weight.
        emissions: p(word | topic) for each class, [TOPICS, words of the class].
    """

    def __init__(self, seed: int = 0, vocab_size: int = VOCAB_SIZE) -> None:
        """Build the source; nothing random happens to it later.

        Args:
            seed: of the words and their topics.
            vocab_size: distinct words wanted, <eos> not counted; a few more or less are made,
                as a stem comes with all its forms.

        Raises:
            ValueError: vocab_size below 200, too few to give every class words.
        """
        if vocab_size < 200:
            raise ValueError(f"vocab_size: {vocab_size} words are too few, 200 are needed")
        rng = np.random.default_rng(seed)
        self.words: dict[WordClass, list[str]] = {(EOS, 0): [EOS]}
        self.emissions: dict[WordClass, Floats] = {(EOS, 0): np.ones((TOPICS, 1))}
        taken: set[str] = set()
        for paradigm in FUNCTION_WORDS:
            self._coin(paradigm, int(paradigm.size), 1, taken, rng)
        content = vocab_size - len(taken)
        for paradigm in CONTENT_WORDS:
            stems = round(content * paradigm.size / len(paradigm.kinds))
            self._coin(paradigm, stems, 2, taken, rng)

        self._states = [State(EOS)]
        for state in self._states:  # grows while it is read
            self._states += [s for s, _ in state.successors() if s not in self._states]
        members: dict[WordClass, list[State]] = {c: [] for c in self.words}
        for state in self._states:
            members[state.word_class].append(state)
        # A word leaves only the few states of its class possible, so the forward algorithm
        # needs the transitions between the states of two classes at a time.
        self._steps = {
            (before, after): np.zeros((len(members[after]), len(members[before])))
            for before in members
            for after in members
        }
        for state in self._states:
            before = state.word_class
            for new, p in state.successors():
                row, column = members[new.word_class].index(new), members[before].index(state)
                self._steps[before, new.word_class][row, column] = p
        self._lookup = {
            word: (word_class, self.emissions[word_class][:, i])
            for word_class, words in self.words.items()
            for i, word in enumerate(words)
        }

    def _coin(
        self,
        paradigm: Paradigm,
        stems: int,
        syllables: int,
        taken: set[str],
        rng: np.random.Generator,
    ) -> None:
        """Invent the words of a paradigm and say how likely each is under each topic."""
        for kind in paradigm.kinds:
            self.words[paradigm.slot, kind] = []
        coined = 0
        while coined < stems:
            sounds = (ONSETS, VOWELS) * syllables + (CODAS,)
            draws = rng.random(len(sounds))
            stem = "".join(s[int(u * len(s))] for s, u in zip(sounds, draws, strict=True))
            forms = [stem + suffix for suffix in paradigm.suffixes]
            if taken.isdisjoint(forms):
                taken.update(forms)
                coined += 1
                for kind, form in zip(paradigm.kinds, forms, strict=True):
                    self.words[paradigm.slot, kind].append(form)
        weights = np.tile((np.arange(stems) + 1 + ZIPF_SHIFT) ** -ZIPF_EXPONENT, (TOPICS, 1))
        if paradigm in CONTENT_WORDS:
            home = (rng.random(stems) * TOPICS).astype(int)
            weights[home, np.arange(stems)] *= HOME_BOOST
        for kind in paradigm.kinds:
            self.emissions[paradigm.slot, kind] = weights / weights.sum(axis=1, keepdims=True)

    def sample(self, num_tokens: int, seed: int) -> list[str]:
        """Draw a text.

        Args:
            num_tokens: words and one <eos> a line; the text ends with the sentence that
                reaches it.
            seed: of the text; the source does not depend on it.

        Returns:
            Sentences, their words joined by one space, without <eos>.
        """
        rng = np.random.default_rng(seed)

        def draw(cumulative: list[float]) -> int:
            return bisect_right(cumulative, rng.random())

        emissions = {c: [_cumulative(row) for row in e] for c, e in self.emissions.items()}
        successors = {}
        for state in self._states:
            targets, probabilities = zip(*state.successors(), strict=True)
            successors[state] = targets, _cumulative(probabilities)
        topic = int(rng.random() * TOPICS)
        state = State(EOS)
        lines: list[str] = []
        total = 0
        while total < num_tokens:
            words: list[str] = []
            while True:
                targets, cumulative = successors[state]
                state = targets[draw(cumulative)]
                if state.slot == EOS:
                    break
                word_class = state.word_class
                words.append(self.words[word_class][draw(emissions[word_class][topic])])
            lines.append(" ".join(words))
            total += len(words) + 1
            if rng.random() >= TOPIC_PERSISTENCE:
                topic = int(rng.random() * TOPICS)
        return lines

    def nats(self, lines: Sequence[str]) -> float:
        """Exact -ln p of a text under the source, each line's <eos> included.

        Args:
            lines: sentences in the order of the text, as from `sample`.

        Returns:
            Nats; divided by the number of words and lines it is the log of the floor. Infinite
            for a text that the source cannot produce.

        Raises:
            KeyError: a word that the language does not have.
        """
        return float(self.token_nats([t for line in lines for t in (*line.split(), EOS)]).sum())

    def token_nats(self, tokens: Sequence[str]) -> Floats:
        """-ln p(token | all tokens before it), by the forward algorithm in float64.

        Args:
            tokens: T words and <eos> tokens, from the start of a text; it may end anywhere.

        Returns:
            Nats, [T]; infinite from the first token that the source cannot produce there.

        Raises:
            KeyError: a word that the language does not have.
        """
        nats = np.full(len(tokens), math.inf)
        before: WordClass = (EOS, 0)
        belief = np.full((1, TOPICS), 1 / TOPICS)  # p(state, topic | tokens so far)
        for t, token in enumerate(tokens):
            after, emission = self._lookup[token]
            belief = self._steps[before, after] @ belief * emission
            p = float(belief.sum())
            if p == 0:
                break
            nats[t] = -math.log(p)
            belief /= p
            if token == EOS:
                belief = TOPIC_PERSISTENCE * belief + (1 - TOPIC_PERSISTENCE) / TOPICS
            before = after
        return nats


def _cumulative(probabilities: Sequence[float] | Floats) -> list[float]:
    """Running sums, [n], the last one exactly 1 so that every draw from [0, 1) has a place."""
    return [*np.cumsum(probabilities)[:-1].tolist(), 1.0]
