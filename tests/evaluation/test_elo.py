"""Elo, Bradley-Terry, win rates, order bias and the % of a reference, against plain loops and known answers."""

import math
from collections import Counter
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from verdict_files import round_robin

from qlora_lightning.evaluation.tournament import elo as elo_module
from qlora_lightning.evaluation.tournament.bradley_terry import bradley_terry
from qlora_lightning.evaluation.tournament.elo import elo, orders_played
from qlora_lightning.evaluation.tournament.matches import OrderBias, matches_of, order_bias
from qlora_lightning.evaluation.tournament.relative import percents
from qlora_lightning.evaluation.tournament.verdicts import Score, Verdict, own_verdict


def verdict(first: str, second: str, score: Score, question: int = 1, judge: str = "judge") -> Verdict:
    kind = "relative" if isinstance(score, tuple) else "pairwise"
    return Verdict(str(question), "generic", kind, first, second, score, judge)  # type: ignore[arg-type]


def played(verdicts: list[Verdict], k: float) -> dict[str, float]:
    """The protocol in plain Python, in the order given."""
    rating = {name: 1000.0 for one in verdicts for name in one.pair}
    for one in verdicts:
        expected = 1 / (1 + 10 ** ((rating[one.second] - rating[one.first]) / 400))
        assert one.share is not None
        change = k * (one.share - expected)
        rating[one.first] += change
        rating[one.second] -= change
    return rating


some_verdicts = st.lists(
    st.tuples(st.permutations("abcd"), st.sampled_from([1, 2, 3]), st.integers(0, 3)).map(lambda x: verdict(x[0][0], x[0][1], x[1], x[2])),
    min_size=1,
    max_size=12,
)


@pytest.fixture
def few_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interval is not looked at: ten samples of the questions, two orders each."""
    monkeypatch.setattr(elo_module, "RESAMPLES", 10)
    monkeypatch.setattr(elo_module, "ORDERS_EACH", 2)


@settings(deadline=None, max_examples=50)
@given(some_verdicts, st.floats(0.5, 200))
def test_one_order_is_the_plain_loop(verdicts: list[Verdict], k: float) -> None:
    matches = matches_of(verdicts)
    kinds, codes = elo_module._kinds(matches)
    expected = played(verdicts, k)
    np.testing.assert_allclose(kinds.play(codes[None], k)[0], [expected[name] for name in matches.systems], rtol=1e-12)


def test_the_rating_is_the_mean_over_orders() -> None:
    """Of four matches there are 24 orders; 20,000 random ones come to their mean."""
    verdicts = [verdict("a", "b", 1), verdict("b", "c", 1), verdict("c", "a", 3), verdict("a", "c", 1)]
    every = [played(list(order), 32) for order in permutations(verdicts)]
    exact = {name: sum(one[name] for one in every) / len(every) for name in "abc"}
    found = elo(matches_of(verdicts), 32, 20_000, seed=0)
    np.testing.assert_allclose(found.rating, [exact[name] for name in "abc"], atol=0.03)


@pytest.mark.usefixtures("few_samples")
@settings(deadline=None, max_examples=25)
@given(some_verdicts)
def test_points_are_neither_made_nor_lost_and_names_do_not_matter(verdicts: list[Verdict]) -> None:
    other = {"a": "z", "b": "c", "c": "b", "d": "a"}
    renamed = [verdict(other[one.first], other[one.second], one.score, int(one.question)) for one in verdicts]
    matches, again = matches_of(verdicts), matches_of(renamed)
    rating, renamed_rating = elo(matches, 32, 50, seed=3).rating, elo(again, 32, 50, seed=3).rating
    assert rating.sum() == pytest.approx(1000 * len(matches.systems))
    np.testing.assert_allclose(rating, [renamed_rating[again.systems.index(other[name])] for name in matches.systems])


def tournament(win: float, questions: int, seed: int = 0) -> list[Verdict]:
    """a against b in both orders; a wins each time with the same probability, which is drawn anew for each question."""
    generator = np.random.default_rng(seed)
    verdicts = []
    for question, wins in enumerate(generator.random(questions) < win):
        verdicts += [verdict("a", "b", 1 if wins else 2, question), verdict("b", "a", 2 if wins else 1, question)]
    return verdicts


def mean_rating(verdicts: list[Verdict]) -> float:
    """Of a, over 30 orders with K = 4."""
    kinds, codes = elo_module._kinds(matches_of(verdicts))
    return float(kinds.play(elo_module._shuffled(codes, 30, np.random.default_rng(0)), 4)[:, 0].mean())


def test_the_interval_covers_what_other_questions_would_have_given() -> None:
    """Both verdicts on a question are the same here, so there are only as many independent matches as questions."""
    found = elo(matches_of(tournament(0.7, 200)), 4, 500, seed=0)
    others = [mean_rating(tournament(0.7, 200, seed)) for seed in range(1, 101)]
    assert found.error[0] == pytest.approx(np.std(others), rel=0.25)
    assert found.low[0] < found.rating[0] < found.high[0]
    assert found.high[0] - found.low[0] == pytest.approx(2 * 1.96 * found.error[0], rel=1e-3)


def test_one_order_alone_is_less_certain_than_the_mean_of_many() -> None:
    matches = matches_of(tournament(0.6, 100))
    assert elo(matches, 32, 1, seed=0).error[0] > 1.5 * elo(matches, 32, 2000, seed=0).error[0]


def test_a_seed_gives_the_same_ratings_and_progress_comes_to_the_end() -> None:
    matches = matches_of(tournament(0.6, 20))
    done: list[int] = []
    one, again, other = elo(matches, 32, 100, 1, done.append), elo(matches, 32, 100, 1), elo(matches, 32, 100, 2)
    assert np.array_equal(one.rating, again.rating) and np.array_equal(one.error, again.error)
    assert not np.array_equal(one.rating, other.rating)
    assert sum(done) == orders_played(100)


def test_a_system_of_many_has_more_kinds_of_match_than_a_byte_holds() -> None:
    verdicts = [verdict(f"s{one}", f"s{two}", 1 + (one + two) % 3) for one in range(20) for two in range(20) if one != two]
    kinds, codes = elo_module._kinds(matches_of(verdicts))
    expected = played(verdicts, 32)
    assert codes.dtype == np.uint16
    np.testing.assert_allclose(kinds.play(codes[None], 32)[0], [expected[name] for name in matches_of(verdicts).systems])


# ---- Bradley-Terry ----


def test_two_systems_differ_by_the_log_of_their_odds() -> None:
    """30 wins, 10 losses and 8 ties: odds of 34 to 14, on Elo's scale 400 log10(34 / 14) points."""
    verdicts = [verdict("a", "b", score, n) for n, score in enumerate([1] * 30 + [2] * 10 + [3] * 8)]
    found = bradley_terry(matches_of(verdicts))
    assert found.rating[0] - found.rating[1] == pytest.approx(400 * math.log10(34 / 14))
    assert found.rating.mean() == pytest.approx(1000)
    assert (found.low < found.rating).all() and (found.rating < found.high).all() and not found.drawn


def test_strengths_explain_the_wins_that_were_seen() -> None:
    """At the maximum of the likelihood each system's expected wins are its wins (Bradley and Terry 1952)."""
    generator = np.random.default_rng(0)
    names = "abcde"
    verdicts = [verdict(*generator.choice([*names], 2, replace=False), int(generator.integers(1, 4)), n) for n in range(300)]
    matches = matches_of(verdicts)
    rating = bradley_terry(matches).rating
    expected = matches.met / (1 + 10 ** ((rating[None] - rating[:, None]) / 400))
    np.testing.assert_allclose(expected.sum(1), matches.wins.sum(1), atol=1e-5)


def test_saying_everything_twice_makes_bradley_terry_no_surer() -> None:
    """Two equal verdicts on one question are one piece of evidence."""
    verdicts = [verdict("a", "b", score, n) for n, score in enumerate([1, 1, 1, 2, 3] * 10)]
    once, twice = bradley_terry(matches_of(verdicts)), bradley_terry(matches_of(verdicts * 2))
    np.testing.assert_allclose(once.rating, twice.rating)
    np.testing.assert_allclose(once.low, twice.low, rtol=1e-3)


def test_a_system_that_won_everything_gets_a_finite_strength() -> None:
    """With a draw against 1000 points each, a is d points above them and b d below: 9 / (1 + r^2) = r / (1 + r) - 1/2, r = 10^(d/400)."""
    found = bradley_terry(matches_of([verdict("a", "b", 1, n) for n in range(9)]))
    odds = 10 ** ((found.rating[0] - 1000) / 400)
    assert found.drawn
    assert 9 / (1 + odds**2) == pytest.approx(odds / (1 + odds) - 0.5, abs=1e-6)


@pytest.mark.parametrize("questions", [10, 20, 30])
def test_an_interval_is_a_number_where_questions_cancel_out(questions: int) -> None:
    """The middle one of three wins as often as it loses, on every question alike: its variance is 0, give or take rounding."""
    rows = round_robin({"a": 3, "b": 2, "c": 1}, questions)
    found = bradley_terry(matches_of([own_verdict(row, "a file") for row in rows]))
    assert found.rating[1] == pytest.approx(1000)
    assert (found.low <= found.rating).all() and (found.rating <= found.high).all()


# ---- win rates, order bias, % of a reference ----


def test_win_rates_count_ties_as_half_and_leave_out_what_was_not_parsed() -> None:
    scores: list[Score] = [1, 1, 3, None]
    matches = matches_of([*(verdict("a", "b", score) for score in scores), verdict("b", "c", 2)])
    assert len(matches) == 4
    np.testing.assert_array_equal(matches.win_rates, [[np.nan, 5 / 6, np.nan], [1 / 6, np.nan, 0], [np.nan, 1, np.nan]])


def test_the_bias_for_the_first_answer_is_counted_over_pairs_in_both_orders() -> None:
    verdicts = [
        verdict("a", "b", 1, 1),
        verdict("b", "a", 1, 1),  # the first answer won twice
        verdict("a", "b", 1, 2),
        verdict("b", "a", 2, 2),  # a won twice
        verdict("a", "b", 3, 3),
        verdict("b", "a", 3, 3),  # a tie twice
        verdict("a", "b", 2, 4),
        verdict("b", "a", 2, 4),  # the second answer won twice
        verdict("a", "b", 1, 5),
        verdict("b", "a", None, 5),
        verdict("b", "a", 1, 5, judge="another"),  # no pair with the verdict of the other judge
    ]
    counted = OrderBias(first_wins=5 / 8, decisive=8, ties=2, both_orders=4, same_verdict=2, first_twice=1, second_twice=1)
    assert order_bias(verdicts) == counted


def test_percent_of_a_reference_is_one_quotient_of_sums_over_both_orders() -> None:
    verdicts = [
        verdict("a", "r", (8.0, 10.0), 1),
        verdict("r", "a", (5.0, 10.0), 1),
        verdict("a", "r", (6.0, 9.0), 2),
        verdict("a", "r", None, 2),
        verdict("b", "r", (1.0, 10.0), 1),
        verdict("a", "b", (10.0, 1.0), 1),  # not next to the reference
        verdict("a", "r", 1, 1),  # pairwise: no scores
    ]
    verdicts[3] = Verdict("2", "generic", "relative", "a", "r", None, "judge")
    a, b = percents(verdicts, "r", seed=0)
    assert (a.name, a.percent, a.verdicts, a.unparsed) == ("a", 100 * 24 / 24, 3, 1)
    assert (a.shown_first, a.shown_second) == (100 * 14 / 19, 200)
    assert a.low <= a.percent <= a.high and a.low == pytest.approx(100 * 6 / 9)  # twice question 2
    assert (b.percent, b.shown_second) == (10, None)


def test_the_samples_of_an_interval_keep_questions_whole() -> None:
    """A question of 3 matches and two of 1: a sample has 3, 5, 7 or 9 matches, and never a part of the first question."""
    verdicts = [verdict("a", "b", 1, 1)] * 3 + [verdict("a", "b", 2, 2), verdict("a", "b", 2, 3)]
    matches = matches_of(verdicts)
    _, codes = elo_module._kinds(matches)
    rows = elo_module._samples(matches.question, codes, np.random.default_rng(0))
    counts = Counter((int((row == codes[0]).sum()), int((row == codes[3]).sum())) for row in rows)
    assert {*counts} == {(9, 0), (6, 1), (3, 2), (0, 3)}
    assert counts[0, 3] / sum(counts.values()) == pytest.approx((2 / 3) ** 3, abs=0.1)
