"""The synthetic language: exact probabilities, and something to win for a recurrent model."""

import math
import time
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest

from mogrifier_lm.data import EOS
from mogrifier_lm.texts import synthetic
from mogrifier_lm.texts.synthetic import EVAL_TOKENS, TRAIN_TOKENS, State, SyntheticLanguage

ORDER = 5


class KneserNey:
    """Interpolated modified Kneser-Ney, the discounts estimated as Chen & Goodman (1999) do."""

    def __init__(self, tokens: Sequence[str]) -> None:
        self.types = len(set(tokens))
        counts = Counter(zip(*(tokens[i:] for i in range(ORDER)), strict=False))
        self.counts = [counts]
        while len(next(iter(self.counts[0]))) > 1:  # shorter n-grams count distinct left contexts
            self.counts.insert(0, Counter(gram[1:] for gram in self.counts[0]))
        self.discounts: list[list[float]] = []
        self.contexts: list[dict[tuple[str, ...], tuple[int, float]]] = []
        for counts in self.counts:
            n1, n2, n3, n4 = (list(counts.values()).count(n) for n in (1, 2, 3, 4))
            discount = [0.0, 0.5, 0.5, 0.5]  # for a unigram table without rare words
            if n1 and n2 and n3:
                y = n1 / (n1 + 2 * n2)
                raw = [0.0, 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3]
                discount = [max(d, 0.0) for d in raw]
            contexts: dict[tuple[str, ...], tuple[int, float]] = {}
            for gram, n in counts.items():
                total, freed = contexts.get(gram[:-1], (0, 0.0))
                contexts[gram[:-1]] = total + n, freed + discount[min(n, 3)]
            self.discounts.append(discount)
            self.contexts.append(contexts)

    def probability(self, history: Sequence[str], word: str) -> float:
        p = 1 / self.types
        for n in range(min(ORDER, len(history) + 1)):
            context = tuple(history[len(history) - n :])
            if context not in self.contexts[n]:
                break
            total, freed = self.contexts[n][context]
            count = self.counts[n][(*context, word)]
            p = (max(count - self.discounts[n][min(count, 3)], 0.0) + freed * p) / total
        return p

    def perplexity(self, tokens: Sequence[str]) -> float:
        nats = sum(
            math.log(self.probability(tokens[max(i - ORDER + 1, 0) : i], token))
            for i, token in enumerate(tokens)
        )
        return math.exp(-nats / len(tokens))


def tokens_of(lines: Sequence[str]) -> list[str]:
    return [token for line in lines for token in (*line.split(), EOS)]


def path_sum(language: SyntheticLanguage, tokens: Sequence[str], state: State, topic: int) -> float:
    """p(tokens | state, topic), one hidden path after the other."""
    if not tokens:
        return 1.0
    stay = synthetic.TOPIC_PERSISTENCE
    total = 0.0
    for new, p_state in state.successors():
        words = language.words[new.word_class]
        if tokens[0] not in words:
            continue
        p_word = language.emissions[new.word_class][topic, words.index(tokens[0])]
        for new_topic in range(synthetic.TOPICS) if new.slot == EOS else (topic,):
            p_topic = 1.0
            if new.slot == EOS:
                p_topic = (1 - stay) / synthetic.TOPICS + stay * (new_topic == topic)
            later = path_sum(language, tokens[1:], new, new_topic)
            total += p_state * p_word * p_topic * later
    return total


@pytest.fixture(scope="module")
def language() -> SyntheticLanguage:
    return SyntheticLanguage()


@pytest.fixture(scope="module")
def train(language: SyntheticLanguage) -> list[str]:
    return tokens_of(language.sample(TRAIN_TOKENS, seed=0))


@pytest.fixture(scope="module")
def test_lines(language: SyntheticLanguage) -> list[str]:
    return language.sample(EVAL_TOKENS, seed=2)


def test_the_source_is_that_of_its_seed_and_the_text_that_of_both_seeds(
    language: SyntheticLanguage,
) -> None:
    twin = SyntheticLanguage()
    twin.sample(500, seed=9)
    assert twin.words == language.words
    for word_class, table in language.emissions.items():
        np.testing.assert_array_equal(twin.emissions[word_class], table)
    assert twin.sample(500, seed=1) == language.sample(500, seed=1)
    assert twin.sample(500, seed=1) != language.sample(500, seed=2)
    other = SyntheticLanguage(seed=1).words["noun", 0]
    assert len(set(other) & set(language.words["noun", 0])) < len(other) / 10


def test_the_text_is_the_same_on_every_machine(language: SyntheticLanguage) -> None:
    assert language.sample(1, seed=0) == ["vek temo vudiso tregumei fut"]


def test_words_are_unique_lower_case_and_as_many_as_asked_for(language: SyntheticLanguage) -> None:
    words = [word for listed in language.words.values() for word in listed if word != EOS]
    assert len(words) == len(set(words)) == pytest.approx(synthetic.VOCAB_SIZE, rel=0.01)
    assert all(word.isascii() and word.isalpha() and word.islower() for word in words)


def test_too_small_a_vocabulary_is_refused() -> None:
    with pytest.raises(ValueError, match="199"):
        SyntheticLanguage(vocab_size=199)
    assert SyntheticLanguage(vocab_size=200).sample(100, seed=0)


@pytest.mark.parametrize("num_tokens", [1, 100, 1000])
def test_a_text_stops_at_the_first_sentence_end_that_reaches_its_size(
    language: SyntheticLanguage, num_tokens: int
) -> None:
    lines = language.sample(num_tokens, seed=4)
    assert len(tokens_of(lines[:-1])) < num_tokens <= len(tokens_of(lines))
    assert lines == [" ".join(line.split()) for line in lines]


def test_the_next_states_of_every_state_have_probability_one(language: SyntheticLanguage) -> None:
    for state in language._states:
        assert math.fsum(p for _, p in state.successors()) == pytest.approx(1, abs=1e-12)
    for table in language.emissions.values():
        np.testing.assert_allclose(table.sum(axis=1), 1, atol=1e-12)


def test_nats_is_the_sum_over_all_hidden_paths(language: SyntheticLanguage) -> None:
    lines = language.sample(25, seed=7)
    assert len(lines) >= 2
    tokens = tokens_of(lines)
    start = State(EOS)
    paths = [path_sum(language, tokens, start, topic) for topic in range(synthetic.TOPICS)]
    assert language.nats(lines) == pytest.approx(-math.log(np.mean(paths)), rel=1e-12)


@pytest.mark.parametrize("length", [0, 1, 4, 9, 40])
def test_the_probabilities_of_all_next_words_sum_to_one(
    language: SyntheticLanguage, length: int
) -> None:
    prefix = tokens_of(language.sample(100, seed=3))[:length]
    words = [word for listed in language.words.values() for word in listed]
    total = math.fsum(math.exp(-language.token_nats([*prefix, word])[-1]) for word in words)
    assert total == pytest.approx(1, abs=1e-9)


def test_nats_of_a_text_is_that_of_its_tokens(
    language: SyntheticLanguage, test_lines: list[str]
) -> None:
    nats = language.token_nats(tokens_of(test_lines))
    assert language.nats(test_lines) == pytest.approx(math.fsum(nats), rel=1e-12)
    assert language.nats([]) == 0


@pytest.mark.parametrize(
    ("constant", "value"),
    [
        ("TOPIC_PERSISTENCE", 0.89),
        ("TOPIC_PERSISTENCE", 0.945),
        ("HOME_BOOST", 55.0),
        ("HOME_BOOST", 115.0),
        ("ZIPF_EXPONENT", 0.9),
        ("ZIPF_EXPONENT", 1.1),
        ("P_ADJECTIVE", 0.55),
        ("P_PREPOSITION", 0.4),
        ("P_ADVERB", 0.55),
        ("P_OBJECT", 0.65),
    ],
)
def test_sampler_and_scorer_agree_so_any_other_source_scores_the_sample_worse(
    language: SyntheticLanguage,
    test_lines: list[str],
    monkeypatch: pytest.MonkeyPatch,
    constant: str,
    value: float,
) -> None:
    floor = language.nats(test_lines)
    monkeypatch.setattr(synthetic, constant, value)
    assert SyntheticLanguage().nats(test_lines) > floor + 2


def test_an_unknown_word_is_named(language: SyntheticLanguage) -> None:
    with pytest.raises(KeyError, match="Xyz"):
        language.nats([*language.sample(20, seed=0), "Xyz"])


def test_a_sentence_that_the_grammar_forbids_is_impossible(language: SyntheticLanguage) -> None:
    line = language.sample(1, seed=0)[0]
    assert math.isfinite(language.nats([line]))
    assert language.nats([" ".join(reversed(line.split()))]) == math.inf
    assert language.nats([""]) == math.inf


def test_verb_and_closer_agree_with_words_further_back_than_a_5_gram_sees(
    language: SyntheticLanguage,
) -> None:
    def word(slot: str, kind: int = 0) -> str:
        return language.words[slot, kind][0]

    for kind in range(synthetic.AGREEMENTS):
        subject = [word("opener"), word("determiner", kind), word("noun", kind)]
        # The modifier has an agreement of its own, which must not show in the verb.
        modifier = [word("preposition"), word("determiner", 1), word("adjective"), word("noun", 1)]
        for shown in range(synthetic.AGREEMENTS):
            tokens = [*subject, *modifier, word("verb", shown), word("closer")]
            assert math.isfinite(language.token_nats(tokens)[-1]) == (shown == kind)
    tokens[-2] = word("verb", kind)
    for mood in range(1, synthetic.MOODS):
        assert language.token_nats([*tokens[:-1], word("closer", mood)])[-1] == math.inf


def test_the_topic_outlives_the_sentence(
    language: SyntheticLanguage, test_lines: list[str]
) -> None:
    shuffled = [test_lines[i] for i in np.random.default_rng(0).permutation(len(test_lines))]
    saved = (language.nats(shuffled) - language.nats(test_lines)) / len(test_lines)
    assert saved > 0.5  # nats a sentence


def test_word_frequencies_follow_zipf(train: list[str]) -> None:
    counts = np.array(sorted(Counter(train).values(), reverse=True))
    ranks = np.arange(5, 501)
    slope = np.polyfit(np.log(ranks), np.log(counts[ranks - 1]), 1)[0]
    assert -1.3 < slope < -0.7


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_training_text_has_every_word_so_no_unknown_word_lowers_a_perplexity(
    seed: int,
) -> None:
    language = SyntheticLanguage(seed)
    words = {word for listed in language.words.values() for word in listed}
    assert words == set(tokens_of(language.sample(TRAIN_TOKENS, seed=3 * seed)))


def test_kneser_ney_is_a_distribution(train: list[str]) -> None:
    model = KneserNey(train[:20_000])
    for end in (0, 3, 50, 1234):
        history = train[max(end - ORDER + 1, 0) : end]
        total = math.fsum(model.probability(history, word) for word in set(train[:20_000]))
        assert total == pytest.approx(1, abs=1e-9)


def test_a_smoothed_5_gram_model_stays_far_above_the_floor(
    language: SyntheticLanguage, train: list[str], test_lines: list[str]
) -> None:
    tokens = tokens_of(test_lines)
    floor = math.exp(language.nats(test_lines) / len(tokens))
    ratio = KneserNey(train).perplexity(tokens) / floor
    assert 1.3 < ratio < 5  # an upper bound too, or a broken n-gram model would pass


def test_texts_are_quick_to_make_and_to_score(language: SyntheticLanguage) -> None:
    start = time.process_time()
    lines = SyntheticLanguage().sample(TRAIN_TOKENS + EVAL_TOKENS, seed=0)
    assert time.process_time() - start < 9
    start = time.process_time()
    language.nats(lines[: EVAL_TOKENS // 14])
    assert time.process_time() - start < 3
