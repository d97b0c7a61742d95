"""What a judge is asked, and that only plain verdicts are read from its replies."""

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from qlora_lightning.errors import UserError
from qlora_lightning.evaluation.judge.reviews import Mode, own_prompts, parse_score, read_review_prompts

REAL = os.environ.get("QLORA_LIGHTNING_REAL_DATA")


@pytest.mark.parametrize(
    ("reply", "score"),
    [
        ("Both are fine.\n\n3", 3),
        ("1", 1),
        ("The first one is wrong.\n2\n\n", 2),
        ("…\n**2**", 2),
        ("…\n2.", 2),
        ("…\n`3`", 3),
        ("…\nBest answer: 2", 2),
        ("…\n**Best answer:** 1", 1),
        ("…\nMejor respuesta: 3.", 3),
        ("…\n最佳答案\uff1a2", 2),
        # what can be read in two ways, or says something else, is not read
        ("", -1),
        ("\n \n", -1),
        ("4", -1),
        ("0", -1),
        ("1 2", -1),
        ("1 or 2", -1),
        ("1/2", -1),
        ("12", -1),
        ("2\nbecause assistant 1 is wrong", -1),
        ("The best answer is the answer of Assistant 2.", -1),
        ("Assistant 1: 2", -1),
        ("Scores: 1: 2", -1),
        ("The best answer is given by the assistant who came first, which makes it this one: 1", -1),
        ("2.5", -1),
        ("-1", -1),
        ("½", -1),
        ("\uff12", -1),
    ],
)
def test_a_choice_is_a_number_alone_on_the_last_line(reply: str, score: int) -> None:
    assert parse_score("pairwise", reply) == score


@pytest.mark.parametrize(
    ("reply", "score"),
    [
        ("8 9\nBoth are good.", [8, 9]),
        ("8.5 9", [8.5, 9]),
        ("\n10 1\n", [10, 1]),
        ("8, 9\n…", [8, 9]),
        ("8,9", [8, 9]),
        ("8/9\n…", [8, 9]),
        ("(8, 9)\n…", [8, 9]),
        ("**8 9**", [8, 9]),
        ("0 8\nThe first is empty.", [0, 8]),  # off the scale but plain
        ("First I solve it.\nThe point (2, 4) lies on it.\nOutput: (10, 1)", [10, 1]),
        ("First I solve it.\n\n(2, 10)", [2, 10]),
        # not read
        ("", -1),
        ("8", -1),
        ("8/10\n…", -1),  # one score out of ten?
        ("11 9", -1),
        ("-1 9", -1),
        ("8 9 10", -1),
        ("8 and 9", -1),
        ("89", -1),
        ("Assistant 1: 8\nAssistant 2: 9", -1),
        ("First I solve it.\nThe points (2, 4) and (3, 5) are given.\nAssistant 2 did better.", -1),
        ("First I solve it.\nThe answer is the point (2, 4)", -1),
    ],
)
def test_scores_are_two_numbers_alone_on_the_first_line(reply: str, score: Any) -> None:
    assert parse_score("relative", reply) == score


def test_the_end_of_a_cut_reply_is_no_verdict() -> None:
    """ "2." may be the start of a list that the longest length cut off; scores on the first line are whole all the same."""
    assert parse_score("pairwise", "There are three differences:\n1. Style\n2.", cut=True) == -1
    assert parse_score("relative", "8 9\nThe first is", cut=True) == [8, 9]


@pytest.mark.parametrize("mode", ["pairwise", "relative"])
def test_our_own_prompts_hold_question_and_answers(mode: Mode) -> None:
    """Braces in what systems write are text, not blanks."""
    prompt = own_prompts(mode).choose("any category")
    system, user = prompt.messages("Why {x}?", "{question}", "because {answer_1}")
    assert (system["role"], user["role"]) == ("system", "user")
    positions = [user["content"].index(text) for text in ("Why {x}?", "{question}", "because {answer_1}")]
    assert positions == sorted(positions)


def prompt_row(**changes: Any) -> dict[str, Any]:
    template = "{question} {answer_1} {answer_2} {prompt}"
    row = {"prompt_id": 1, "system_prompt": "Judge.", "prompt_template": template, "defaults": {"prompt": "Well?"}, "category": "general"}
    return row | changes


def prompt_file(tmp_path: Path, *rows: dict[str, Any]) -> Path:
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_prompts_are_chosen_by_category(tmp_path: Path) -> None:
    prompts = read_review_prompts(prompt_file(tmp_path, prompt_row(), prompt_row(category="math", system_prompt="Compute.")))
    assert prompts.choose("math").messages("q", "a", "b")[0]["content"] == "Compute."
    assert prompts.choose("history").messages("q", "a", "b") == [
        {"role": "system", "content": "Judge."},
        {"role": "user", "content": "q a b Well?"},
    ]
    with pytest.raises(UserError, match="no review prompt for questions of category 'history', only for math"):
        read_review_prompts(prompt_file(tmp_path, prompt_row(category="math"))).choose("history")


def test_another_wording_has_another_hash(tmp_path: Path) -> None:
    digests = {read_review_prompts(prompt_file(tmp_path, prompt_row(system_prompt=text))).digest for text in ("a", "b", "a")}
    assert len(digests) == 2


@pytest.mark.parametrize(
    ("row", "line"),
    [
        ({"question_id": 1, "text": "q"}, r":1: a review prompt needs system_prompt \(str\), found question_id, text"),
        (prompt_row(defaults=None), r":1: a review prompt needs defaults \(dict\)"),
        (prompt_row(prompt_template="{answer_1} {answer_2}"), r":1: prompt_template must hold \{question\}, found answer_1, answer_2"),
        (prompt_row(prompt_template="{question} {answer_1} {answer_2} {rule}"), r":1: prompt_template holds \{rule\}, which is not in"),
        (prompt_row(prompt_template="{question} {answer_1} {answer_2} {"), r":1: prompt_template has a stray brace"),
        (prompt_row(prompt_template="{question.x} {question} {answer_1} {answer_2}"), r":1: prompt_template holds \{question.x\}"),
    ],
)
def test_prompts_of_another_schema(row: dict[str, Any], line: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=line):
        read_review_prompts(prompt_file(tmp_path, row))


@pytest.mark.skipif(not REAL, reason="needs the published prompts: set QLORA_LIGHTNING_REAL_DATA")
@pytest.mark.parametrize("name", ["vicuna_prompt_relative", "vicuna_prompt_threeclass", "oa_prompt_threeclass"])
def test_the_published_prompts_are_read(name: str) -> None:
    prompts = read_review_prompts(Path(str(REAL), "vicuna_oa_eval", "prompts", f"{name}.jsonl"))
    coding = prompts.choose("coding").messages("Sum a list", "A1", "A2")[1]["content"]
    assert "[Question]\nSum a list\n" in coding and coding.index("A1") < coding.index("A2")
    assert ("coding abilities" in coding) == name.startswith("vicuna")


def released_replies(part: str) -> list[dict[str, Any]]:
    import tarfile

    with tarfile.open(Path(str(REAL), "vicuna_oa_eval", "ratings-gpt4.tar.xz")) as archive:
        files = [archive.extractfile(member) for member in archive if f"/{part}/" in f"/{member.name}" and member.name.endswith(".jsonl")]
        return [json.loads(line) for file in files if file for line in file]


@pytest.mark.skipif(not REAL, reason="needs the released verdicts: set QLORA_LIGHTNING_REAL_DATA")
def test_no_reply_is_read_otherwise_than_it_was_released() -> None:
    """Of the 50,266 released replies none gets another verdict; 1,482 + 13 + 60 were released as unparsed."""
    outcomes: Counter[tuple[str, str]] = Counter()
    modes: list[tuple[str, Mode]] = [("oa", "pairwise"), ("pairwise", "pairwise"), ("relative-gpt-3.5", "relative")]
    for part, mode in modes:
        for row in released_replies(part):
            theirs = -1 if row["score"] == -1 or row["score"] == [-1, -1] else row["score"]
            ours = parse_score(mode, row["text"])
            outcome = "same" if ours == theirs else "theirs unparsed" if theirs == -1 else "ours unparsed" if ours == -1 else "other"
            outcomes[part, outcome] += 1
    assert outcomes == {
        ("oa", "same"): 39_391,
        ("oa", "theirs unparsed"): 635,  # "Best answer: 2"
        ("pairwise", "same"): 4_480,
        ("relative-gpt-3.5", "same"): 5_612,
        ("relative-gpt-3.5", "theirs unparsed"): 21,  # "(1, 10)" on the last line
        ("relative-gpt-3.5", "ours unparsed"): 127,  # questions of mathematics, scored by hand from prose
    }
