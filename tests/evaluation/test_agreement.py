"""Agreement of judges: published examples through the files that a user has, and what a user can get wrong."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from verdict_files import own_row, round_robin, write_rows

from qlora_lightning.cli import main
from qlora_lightning.evaluation.tournament.agreement import example_kappa, majority
from qlora_lightning.evaluation.tournament.verdicts import Verdict

# Votes of 14 raters for five categories on ten examples: the worked example of Wikipedia, "Fleiss' kappa", which comes to 0.210.
FLEISS = [
    [0, 0, 0, 0, 14],
    [0, 2, 6, 4, 2],
    [0, 0, 3, 5, 6],
    [0, 3, 9, 2, 0],
    [2, 2, 8, 1, 1],
    [7, 7, 0, 0, 0],
    [3, 2, 6, 3, 0],
    [2, 5, 3, 2, 2],
    [6, 5, 2, 1, 0],
    [0, 2, 2, 3, 7],
]
# Two raters, three categories, 45 examples: the worked example of Wikipedia, "Scott's pi" (what Fleiss' kappa is for two). It comes to
# (0.333 - 0.369) / (1 - 0.369) = -0.057 with those rounded numbers, and to -0.0563 with exact ones.
SCOTT = [[1, 2, 3], [4, 5, 6], [7, 8, 9]]
# Ten people's IQ and hours of television a week: the worked example of Wikipedia, "Spearman's rank correlation coefficient": -29/165.
IQ = [106, 100, 86, 101, 99, 103, 97, 113, 112, 110]
HOURS = [7, 27, 2, 50, 28, 29, 20, 12, 6, 17]
# Example of scipy.stats.kendalltau's documentation, with ties: tau-b = -0.47140452079103173.
KENDALL = ([12, 2, 1, 12, 2], [1, 4, 7, 1, 0])


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Exit code, standard output, standard error."""
    code = main(["agreement", *map(str, arguments)])
    out, err = capsys.readouterr()
    return code, out, err


def compared(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    code, out, _ = run(capsys, *arguments, "--json")
    assert code == 0
    found: dict[str, Any] = json.loads(out)
    return found


def test_fleiss_example_has_his_kappa() -> None:
    votes = [[category for category, count in enumerate(counts) for _ in range(count)] for counts in FLEISS]
    assert example_kappa(votes) == pytest.approx(0.210, abs=0.0005)


def test_scotts_example_has_his_pi(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = []
    for one, counts in enumerate(SCOTT):
        for other, count in enumerate(counts):
            for _ in range(count):
                question = len(rows)
                rows += [own_row(question, "a", "b", one + 1, "first judge"), own_row(question, "a", "b", other + 1, "second judge")]
    found = compared(capsys, write_rows(tmp_path / "r.jsonl", rows))
    assert found["fleiss_kappa"] == pytest.approx(-0.0563, abs=0.0001)
    assert (found["examples"], found["pairs"][0]["same"]) == (45, pytest.approx(15 / 45))


def ranked(values: list[int], judge: str) -> list[dict[str, Any]]:
    """Verdicts under which the systems' win rates are ordered, and tied, as the values are."""
    names = {f"system {index}": value for index, value in enumerate(values)}
    return round_robin(names, 1, judge)


def test_win_rates_in_the_order_of_published_ranks_have_their_correlation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    iq, hours = write_rows(tmp_path / "iq.jsonl", ranked(IQ, "iq")), write_rows(tmp_path / "tv.jsonl", ranked(HOURS, "tv"))
    (pair,) = compared(capsys, "--ratings", iq, hours)["pairs"]
    assert (pair["raters"], pair["examples"]) == (["iq", "tv"], 45)
    assert pair["spearman"] == pytest.approx(-29 / 165)


def test_kendalls_tau_takes_ties_into_account(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [write_rows(tmp_path / f"{name}.jsonl", ranked(values, name)) for name, values in zip("xy", KENDALL, strict=True)]
    (pair,) = compared(capsys, *files)["pairs"]
    assert pair["kendall_tau"] == pytest.approx(-0.47140452079103173)


def verdict(first: str, second: str, score: int | None, judge: str = "judge") -> Verdict:
    return Verdict("1", "", "pairwise", first, second, score, judge)


def test_a_judges_verdict_on_an_example_is_what_it_said_most_often() -> None:
    assert majority([verdict("a", "b", 1), verdict("b", "a", 2)]) == {("1", "a", "b"): 1.0}
    assert majority([verdict("a", "b", 1), verdict("b", "a", 1)]) == {("1", "a", "b"): 0.5}
    assert majority([verdict("a", "b", 2), verdict("a", "b", 3), verdict("b", "a", 1)]) == {("1", "a", "b"): 0.0}
    assert majority([verdict("a", "b", None)]) == {}


def test_people_in_one_folder_are_one_majority_next_to_a_judge(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    people = [own_row(n, "a", "b", score, who) for n in range(4) for who, score in (("p1", 1), ("p2", 1), ("p3", 2))]
    write_rows(tmp_path / "people" / "r.jsonl", people)
    write_rows(tmp_path / "model" / "r.jsonl", [own_row(n, "a", "b", score, "m") for n, score in enumerate((1, 1, 1, 2, 3, -1))])
    found = compared(capsys, "--ratings", tmp_path / "model", tmp_path / "people")
    assert (found["raters"], found["examples"], found["unparsed"]) == ({"m": 5, "p1 + p2 + p3": 4}, 4, 1)
    assert found["pairs"][0]["same"] == 0.75
    assert found["win_rates"]["a"] == {"m": 0.75, "p1 + p2 + p3": 1}
    assert [one["raters"] for one in compared(capsys, tmp_path / "people")["pairs"]] == [["p1", "p2"], ["p1", "p3"], ["p2", "p3"]]


def test_the_two_orders_of_a_judge_that_ignores_the_order_agree(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_rows(tmp_path / "r.jsonl", round_robin({"a": 3, "b": 2, "c": 1}, 10))
    found = compared(capsys, "--ratings", file, "--orders")
    assert found["raters"] == {"judge, one order": 30, "judge, the other": 30}
    assert (found["fleiss_kappa"], found["pairs"][0]["kendall_tau"]) == (1, 1)


def test_the_two_orders_of_a_judge_that_sees_only_the_order_disagree(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The first always wins: every example gets opposite verdicts, and no system looks better for its name."""
    rows = [{**row, "score": 1} for row in round_robin({"a": 3, "b": 2, "c": 1}, 10)]
    found = compared(capsys, write_rows(tmp_path / "r.jsonl", rows), "--orders")
    assert (found["fleiss_kappa"], found["pairs"][0]["same"]) == (-1, 0)
    assert {*map(tuple, (of.values() for of in found["win_rates"].values()))} == {(0.5, 0.5)}


def test_coefficients_without_a_meaning_are_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [own_row(n, "a", "b", 3, judge) for n in range(3) for judge in ("x", "y")]
    file = write_rows(tmp_path / "r.jsonl", rows)
    (pair,) = compared(capsys, file)["pairs"]
    assert (pair["fleiss_kappa"], pair["kendall_tau"], pair["spearman"], pair["same"]) == (None, None, None, 1)
    assert "not defined" in run(capsys, file)[2]


def test_what_cannot_be_compared_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = write_rows(tmp_path / "one.jsonl", [own_row(1, "a", "b", 1, "x")])
    other = write_rows(tmp_path / "other.jsonl", [own_row(2, "a", "b", 1, "y")])
    for arguments, message in (
        ([one], "agreement needs two judges or more, found x alone; give another --ratings, or --orders true"),
        ([one, other], "judges must have examples (a question and two systems) in common, found none of x and y"),
        ([one, other, "--orders"], "--orders compares the two orders of one judge, found 2: x, y; give the ratings of one"),
        ([one, tmp_path / "none"], "there is no such file or folder"),
    ):
        code, out, err = run(capsys, *arguments)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert message in err


def test_gpt_4_agrees_with_itself_on_systems_more_than_on_examples(capsys: pytest.CaptureFixture[str]) -> None:
    """The released verdicts in both orders. 1,367 of 2,227 examples got the same verdict twice."""
    root = os.environ.get("QLORA_LIGHTNING_REAL_DATA")
    if root is None:
        pytest.skip("needs the released verdicts: set QLORA_LIGHTNING_REAL_DATA to a folder with vicuna_oa_eval/ratings-gpt4.tar.xz")
    (pair,) = compared(capsys, f"{root}/vicuna_oa_eval/ratings-gpt4.tar.xz/pairwise", "--orders")["pairs"]
    assert (pair["examples"], pair["same"]) == (2227, pytest.approx(1367 / 2227))
    assert pair["fleiss_kappa"] == pytest.approx(0.352, abs=0.001)
    assert pair["kendall_tau"] > 0.9
