"""The statistics are right: known values, brute force, simulation, and properties that must always hold."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from math import comb, sqrt
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest  # type: ignore[import-untyped]

from stages.run.errors import UserError
from stages.stats import one, p_value, paired
from tests.stats.rows import policies, row

# --- intervals


@given(st.integers(1, 3000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_is_scipys_and_holds_the_rate(case: tuple[int, int]) -> None:
    right, n = case
    low, high = one.wilson(right, n)
    theirs = binomtest(right, n).proportion_ci(method="wilson")
    assert (low, high) == pytest.approx((theirs.low, theirs.high), abs=1e-9)
    assert 0 <= low <= right / n <= high <= 1


def test_intervals_cover_as_often_as_they_say() -> None:
    """Of 400 simulated evaluations of 300 questions, about 95 % of the intervals hold the true value.

    400 trials put the observed coverage within +-3.3 points (3 sigma) of the nominal 95 %."""
    rng = np.random.default_rng(5)
    wilson_holds = boot_holds = 0
    for trial in range(400):
        chance = rng.beta(2, 1, size=300)  # questions differ in difficulty; the mean chance is 2/3
        greedy = int((rng.random(300) < chance).sum())
        low, high = one.wilson(greedy, 300)
        wilson_holds += low <= 2 / 3 <= high
        low, high = one.bootstrap_interval(rng.binomial(8, chance) / 8, seed=trial, resamples=2000)
        boot_holds += low <= 2 / 3 <= high
    assert abs(wilson_holds / 400 - 0.95) < 0.033
    assert abs(boot_holds / 400 - 0.95) < 0.033


def test_bootstrap_by_counts_is_the_ordinary_bootstrap() -> None:
    """Drawing counts of distinct values has the distribution of drawing questions."""
    rng = np.random.default_rng(1)
    values = rng.integers(0, 9, 400) / 8
    plain = values[rng.integers(0, 400, (10_000, 400))].mean(axis=1)
    ours = one.bootstrap_means(values, seed=2)
    assert ours.mean() == pytest.approx(plain.mean(), abs=1e-3)
    assert ours.std() == pytest.approx(plain.std(), rel=0.03)


# --- paired tests


@given(st.integers(0, 400), st.integers(0, 400))
def test_mcnemar_is_the_exact_binomial_test(gained: int, lost: int) -> None:
    expected = binomtest(gained, gained + lost).pvalue if gained + lost else 1.0
    assert p_value.mcnemar_p(gained, lost) == pytest.approx(expected, rel=1e-9)
    assert p_value.mcnemar_p(gained, lost) == p_value.mcnemar_p(lost, gained)


@given(st.lists(st.integers(-4, 4), max_size=9))
def test_sign_flip_is_the_count_over_all_sign_choices(differences: list[int]) -> None:
    sums = [sum(s * d for s, d in zip(signs, differences, strict=True))
            for signs in itertools.product((1, -1), repeat=len(differences))]  # fmt: skip
    expected = sum(abs(s) >= abs(sum(differences)) for s in sums) / len(sums)
    assert p_value.sign_flip_p(differences) == pytest.approx(expected, abs=1e-12)


@given(st.integers(0, 200), st.integers(0, 200))
def test_sign_flip_on_one_sample_is_mcnemar(gained: int, lost: int) -> None:
    assert p_value.sign_flip_p([1] * gained + [-1] * lost + [0] * 5) == pytest.approx(
        p_value.mcnemar_p(gained, lost), rel=1e-9
    )


def test_sign_flip_drawn_agrees_with_exact() -> None:
    """The drawn version, used only for very large logs, gives the exact p within its noise."""
    rng = np.random.default_rng(0)
    many = np.concatenate([rng.integers(-4, 5, 20_000), np.ones(150, dtype=np.int64)])
    drawn = p_value.sign_flip_p(many, seed=1)  # 20,000 x 44,000 steps: drawn
    normal = 2 * (1 - NormalDist().cdf(abs(many.sum()) / sqrt((many**2).sum())))
    assert drawn == pytest.approx(normal, abs=0.01)
    assert drawn == p_value.sign_flip_p(many, seed=1)


def test_sign_flip_rejects_as_often_as_it_says() -> None:
    """With two equal policies p <= 0.05 comes up in at most about 5 % of 400 experiments."""
    rng = np.random.default_rng(9)
    rejected = 0
    for _ in range(400):
        chance = rng.beta(1, 1, 60)
        rejected += p_value.sign_flip_p(rng.binomial(8, chance) - rng.binomial(8, chance)) <= 0.05
    assert rejected / 400 <= 0.05 + 0.033


# --- the smallest visible difference


def test_smallest_visible_difference_has_the_power_it_claims() -> None:
    """Simulated: at the difference named, the exact McNemar test rejects in four of five repetitions."""
    n, discordance = 1209, 0.08
    difference = paired.smallest_visible_difference(n, discordance)
    assert difference is not None
    rng = np.random.default_rng(4)
    gain, loss = (discordance + difference) / 2, (discordance - difference) / 2
    counts = rng.multinomial(n, [gain, loss, 1 - gain - loss], size=2000)
    power = np.mean([p_value.mcnemar_p(int(g), int(lo)) <= 0.05 for g, lo, _ in counts])
    assert abs(power - 0.8) < 0.03


def test_smallest_visible_difference_with_few_changes() -> None:
    """Without six changes no exact test rejects: with under six questions nothing could be seen, and with
    none changed the answer is the gain that would have brought six changes in four of five repetitions."""
    assert paired.smallest_visible_difference(5, 0.4) is None
    assert paired.smallest_visible_difference(0, 0) is None
    floor = paired.smallest_visible_difference(1209, 0)
    assert floor is not None
    assert sum(comb(1209, i) * floor**i * (1 - floor) ** (1209 - i) for i in range(6)) == pytest.approx(
        0.2, abs=1e-6
    )


# --- samples


@given(st.integers(1, 9).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n))))
def test_pass_at_k_is_brute_force(case: tuple[int, int, int]) -> None:
    n, correct, k = case
    draws = list(itertools.combinations([True] * correct + [False] * (n - correct), k))
    assert one.pass_at_k(n, correct, k) == pytest.approx(sum(map(any, draws)) / len(draws))
    assert one.pass_hat_k(n, correct, k) == pytest.approx(sum(map(all, draws)) / len(draws))


def vote(answer: str | None, correct: bool = False) -> dict[str, Any]:
    return {"answer": answer, "correct": correct}


@pytest.mark.parametrize(
    ("samples", "expected"),
    [
        ([vote("5", True), vote("5.0", True), vote("6")], 1.0),
        ([vote("5", True), vote("6")], 0.5),
        ([vote("5", True), vote("6"), vote("7")], 1 / 3),
        ([vote("5", True), vote("6"), vote("6.0")], 0.0),
        ([vote("5", True), vote("1000"), vote("1,000")], 0.0),
        ([vote(None), vote(None), vote("5", True)], 1.0),
        ([vote(None), vote(None)], 0.0),
        ([vote("x = y"), vote("x = y"), vote("5", True)], 0.0),
    ],
)
def test_majority_counts_equal_numbers_together_and_averages_ties(
    samples: list[Any], expected: float
) -> None:
    assert one.majority(samples) == pytest.approx(expected)


def test_agreement() -> None:
    assert one.agreement([vote("5", True)] * 4) == 1
    assert one.agreement([vote("5", True), vote("5", True), vote("6"), vote(None)]) == pytest.approx(1 / 6)
    assert one.agreement([vote(None), vote(None)]) == 0
    assert one.agreement([vote("5", True)]) == 1


# --- repetition


@pytest.mark.parametrize(
    ("text", "loop"),
    [
        ("Start. " + "The answer is 5. " * 6, True),
        ("x" * 80, True),
        ("So it is 12. " * 10 + "So it", True),  # cut inside a copy
        (("A long paragraph about apples and pears. " * 8 + "End of it.\n") * 4, True),
        ("", False),
        ("7 * 8 = <<7*8=56>>56\n56 + 4 = <<56+4=60>>60\n#### 60", False),
        ("4 + 4 + 4 + 4 + 4 + 4 = 24. #### 24", False),
        ("He buys 3 apples. He buys 3 apples.", False),
        (
            "1 apple costs 2 dollars so 2 apples cost 4 dollars and 3 apples cost 6 dollars and 4 cost 8 dollars",
            False,
        ),
    ],
)
def test_repeats_finds_loops_and_leaves_solutions_alone(text: str, loop: bool) -> None:
    assert one.repeats(text) == loop


@given(
    st.text(alphabet="ab ", max_size=30),
    st.text(alphabet="abc 1", min_size=1, max_size=40),
    st.integers(0, 6),
    st.text(alphabet="abc 1", max_size=3),
)
def test_repeats_is_its_definition(head: str, block: str, copies: int, end: str) -> None:
    """The same as trying every length of 60 or more and every period of up to a third of it."""
    text = (head + block * copies + end).rstrip()
    looping = any(
        text[-length:-period] == text[-length + period :]
        for length in range(60, len(text) + 1)
        for period in range(1, length // 3 + 1)
    )
    assert one.repeats(text) == looping


def test_repeats_is_linear(ends_soon: Callable[[Callable[[], object]], bool]) -> None:
    """Periodic text almost everywhere is the worst case of naive searches."""
    text = ("a" * 997 + "b") * 2000 + "c" + "ab" * 20
    assert not one.repeats(text)
    assert ends_soon(lambda: one.repeats(text))


# --- summarise


def test_summarise_counts_and_intervals() -> None:
    rows = [row(i, i < 6, [True] * (i % 3) + [False] * (4 - i % 3)) for i in range(10)]
    rows[0] |= {"finish": "length", "leak": True}
    rows[1] |= {"answers_found": 2}
    rows[9] |= {"answer": None, "completion": " \n", "flexible_correct": True}
    made = one.summarise(rows, seed=1)
    assert (made["accuracy"], made["flexible"], made["questions"]) == (0.6, 0.7, 10)
    assert (made["accuracy_low"], made["accuracy_high"]) == one.wilson(6, 10)
    assert made["mean_at_4"] == pytest.approx(9 / 40)
    assert made["pass_at_4"] == pytest.approx(0.6)
    assert made["pass_hat_4"] == 0
    for name in ("mean_at_4", "maj_at_4", "pass_at_2", "pass_at_4", "agreement"):
        assert 0 <= made[f"{name}_low"] <= made[name] <= made[f"{name}_high"] <= 1
    health = [
        made[key]
        for key in ("end_token", "truncated", "leak", "second_answer", "no_answer", "empty", "repeats")
    ]
    assert health == [0.9, 0.1, 0.1, 0.1, 0.1, 0.1, 0]
    assert (made["leak_low"], made["leak_high"]) == one.wilson(1, 10)
    assert (made["end_token_low"], made["end_token_high"]) == one.wilson(9, 10)
    assert made["tokens_p95"] == np.percentile([r["tokens"] for r in rows], 95)
    assert made == one.summarise(rows, seed=1)
    assert all(isinstance(value, (int, float)) for value in made.values())


@given(st.lists(st.integers(0, 5000), min_size=1, max_size=200), st.sampled_from([0, 5, 50, 95, 100]))
def test_percentile_is_numpys_to_the_last_bit(lengths: list[int], percent: int) -> None:
    counts = {length: lengths.count(length) for length in lengths}
    assert one.percentile(counts, percent) == np.percentile(lengths, percent)


@pytest.mark.parametrize(
    ("field", "names"),
    [
        ("finish", {f"{name}{end}" for name in ("end_token", "truncated") for end in ("", "_low", "_high")}),
        ("tokens", {"tokens_mean", "tokens_p95"}),
    ],
)
def test_what_a_row_does_not_tell_is_left_out(field: str, names: set[str]) -> None:
    """Logs from elsewhere: a rate over some of the rows would be taken for one over all of them."""
    rows = [row(i, True) for i in range(5)]
    whole = one.summarise(rows, seed=0)
    assert not [key for key in whole if "_at_" in key or "agreement" in key]
    del rows[3][field]
    assert whole.keys() - one.summarise(rows, seed=0).keys() == names


def test_summarise_refuses_what_it_cannot_mean() -> None:
    with pytest.raises(UserError, match="no rows"):
        one.summarise([], seed=0)
    with pytest.raises(UserError, match="'q1' has 1 samples where another has 2"):
        one.summarise([row(0, True, [True, True]), row(1, True, [True])], seed=0)


def test_health_warnings_are_loud_only_above_the_limits() -> None:
    assert one.health_warnings({"leak": one.LEAK_LIMIT, "truncated": one.TRUNCATED_LIMIT}, "SFT") == []
    loud = one.health_warnings({"leak": 0.9, "truncated": 0.5}, "SFT")
    assert len(loud) == 2
    assert loud[0].startswith("SFT: 90.0% of the completions hold pieces of the prompt")


# --- compare


def test_compare_says_that_71_38_against_71_22_is_nothing() -> None:
    """The result once reported: 863 and 861 of 1,209 right, 7 gained, 9 lost."""
    sft, dpo = policies(gained=7, lost=9, both=854, neither=339)
    made = paired.compare(sft, dpo, "SFT", "DPO", seed=3)
    assert (made["questions"], made["gained"], made["lost"]) == (1209, 7, 9)
    assert made["accuracy_a"] == pytest.approx(0.7138, abs=5e-5)
    assert made["accuracy_b"] == pytest.approx(0.7122, abs=5e-5)
    assert made["p"] == pytest.approx(0.80, abs=0.005)
    assert made["difference_low"] < 0 < made["difference_high"]
    assert made["verdict"] == "no difference can be seen; one of at least 1.0 points would have been"
    assert made["identical_completions"] == 1209 - 16


def test_compare_says_which_is_better() -> None:
    sft, dpo = policies(gained=60, lost=30, both=900, neither=219)
    forward, backward = paired.compare(sft, dpo, "SFT", "DPO"), paired.compare(dpo, sft, "DPO", "SFT")
    assert forward["verdict"] == backward["verdict"] == "DPO is better (p = 0.0021)"
    assert forward["difference"] == -backward["difference"] == pytest.approx(30 / 1209)
    assert forward["difference_low"] > 0
    assert "mean_a" not in forward


def test_compare_of_samples_is_separate_from_greedy() -> None:
    """Greedy ties while the samples differ: each verdict speaks for itself. Sample counts may differ."""
    a = [row(i, True, [True, False, False, False]) for i in range(60)]
    b = [row(i, True, [True, False] if i % 2 else [True, True]) for i in range(60)]
    made = paired.compare(a, b, "SFT", "DPO", seed=1)
    assert made["verdict"].startswith("no difference can be seen")
    assert made["mean_verdict"] == "DPO is better (p < 0.0001)"
    assert (made["mean_a"], made["mean_b"], made["mean_difference"]) == (0.25, 0.75, 0.5)
    assert made["mean_difference_low"] <= 0.5 <= made["mean_difference_high"]


def test_compare_with_itself() -> None:
    a = [row(i, i % 2 == 0, [True, False]) for i in range(100)]
    made = paired.compare(a, a)
    assert (made["p"], made["mean_p"], made["identical_completions"]) == (1, 1, 100)
    assert made["mean_verdict"] == "no difference can be seen: every question scored the same"


def test_compare_pairs_by_id_and_counts_what_has_no_partner() -> None:
    a, b = policies(3, 1, 5, 2)
    shuffled = [*b[4:], row(99, True), *b[2:4]]
    made = paired.compare(a, shuffled)
    assert (made["questions"], made["only_a"], made["only_b"], made["gained"]) == (9, 2, 1, 1)


def test_compare_refuses_what_it_cannot_pair() -> None:
    a, b = policies(1, 1, 1, 1)
    with pytest.raises(UserError, match="two rows with id 'q0'"):
        paired.compare([*a, a[0]], b)
    with pytest.raises(UserError, match="share no question id"):
        paired.compare(a, [row(50, True)])


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60), st.integers(0, 3))
@settings(max_examples=40, deadline=None)
def test_compare_properties(kinds: list[tuple[bool, bool]], seed: int) -> None:
    """The difference is that of the accuracies, lies in its interval, and turns round with the order."""
    a = [row(i, x) for i, (x, _) in enumerate(kinds)]
    b = [row(i, y) for i, (_, y) in enumerate(kinds)]
    made, turned = paired.compare(a, b, seed=seed), paired.compare(b, a, seed=seed)
    assert made["difference"] == pytest.approx(made["accuracy_b"] - made["accuracy_a"])
    assert made["difference_low"] - 1e-12 <= made["difference"] <= made["difference_high"] + 1e-12
    assert (made["p"], made["gained"]) == (turned["p"], turned["lost"])
    assert ("better" in made["verdict"]) == (made["p"] < 0.05)


def test_p_words() -> None:
    words = [p_value.p_words(p) for p in (0.803, 0.0031, 0.003, 1e-9, 1.0)]
    assert words == ["p = 0.80", "p = 0.0031", "p = 0.003", "p < 0.0001", "p = 1.00"]
