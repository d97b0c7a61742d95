"""MMLU's questions from every form they are published in, and what is wrong with a file in one line."""

import json
import os
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from exams import SUBJECTS, write_exam
from transformers import PreTrainedTokenizerFast

from qlora_lightning.errors import UserError
from qlora_lightning.evaluation.mmlu.prompts import Prompter, find_letters, prompt_text
from qlora_lightning.evaluation.mmlu.questions import Exam, Problem, Question, paper_header, written
from qlora_lightning.evaluation.mmlu.subjects import SUBJECTS as ALL

NAMES = list(SUBJECTS)
SUM = Problem(" 1 + 1 =\n", ("1", "2", "3", "4"), 1)


def read(path: Path, **options) -> list[Question]:
    return Exam(str(path), subjects=options.pop("subjects", NAMES), **options).read()


def test_both_editions_of_the_csvs_say_the_same(tmp_path: Path) -> None:
    first, later = write_exam(tmp_path / "first"), write_exam(tmp_path / "later" / "data", header=True)
    questions = read(first)
    assert questions == read(later) == read(tmp_path / "later")  # the archive has them in data/
    assert [question.subject for question in questions] == [name for name in NAMES for _ in range(6)]
    assert all(len(question.shots) == 5 for question in questions)


def test_the_hubs_parquet_says_the_same(tmp_path: Path) -> None:
    exam = write_exam(tmp_path / "csv")
    for split in ("test", "dev"):
        questions = read(exam, split=split, shots=0)
        table = [
            {"question": q.problem.question, "subject": q.subject, "choices": list(q.problem.choices), "answer": q.problem.answer}
            for q in questions
        ]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(table), tmp_path / f"{split}-00000-of-00001.parquet")
    assert read(tmp_path) == read(exam)


@pytest.mark.parametrize("shots", [0, 2, 5])
def test_the_authors_prompts_are_taken_apart_and_put_together_again(tmp_path: Path, shots: int) -> None:
    questions = read(write_exam(tmp_path), shots=shots)
    file = tmp_path / "prompts.json"  # JSON Lines under the name that the authors gave them
    lines = [{"subject": q.subject, "input": prompt_text(q, "paper"), "output": "ABCD"[q.problem.answer]} for q in questions]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read(file) == questions
    assert [prompt_text(q, "paper") for q in read(file)] == [line["input"] for line in lines]


def test_shots_come_from_dev_in_order_and_limit_counts_in_each_subject(tmp_path: Path) -> None:
    exam = write_exam(tmp_path)
    dev = [question.problem for question in read(exam, split="dev", shots=0, subjects=["anatomy"])]
    for shots in range(6):
        assert {question.shots for question in read(exam, shots=shots, subjects=["anatomy"])} == {tuple(dev[:shots])}
    assert [question.subject for question in read(exam, limit=2)] == [name for name in NAMES for _ in range(2)]


def test_the_two_styles_differ_in_a_blank_and_in_stripping() -> None:
    question = Question("abstract_algebra", SUM, (SUM,))
    choices = "\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer:"
    assert prompt_text(question, "paper") == (
        "The following are multiple choice questions (with answers) about  abstract algebra.\n\n"
        f" 1 + 1 =\n{choices} B\n\n 1 + 1 =\n{choices}"
    )
    assert prompt_text(question, "lm_eval") == (
        f"The following are multiple choice questions (with answers) about abstract algebra.\n\n1 + 1 ={choices} B\n\n1 + 1 ={choices}"
    )


def test_too_long_prompts_lose_examples_from_the_front_never_the_question(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    questions = read(write_exam(tmp_path), subjects=["anatomy"])  # one token a byte
    whole = [len(prompt.ids) for prompt in Prompter(tiny_tokenizer, "paper", 100_000).prompts(questions)]
    limit = max(whole) - 1
    for question, prompt, length in zip(questions, Prompter(tiny_tokenizer, "paper", limit).prompts(questions), whole, strict=True):
        text = tiny_tokenizer.decode(prompt.ids)
        assert len(prompt.ids) <= limit and prompt.fits
        assert prompt.dropped == (1 if length > limit else 0) and prompt.shots == 5 - prompt.dropped
        assert text.startswith(paper_header("anatomy") + written(question.shots[prompt.dropped]))
        assert text.rstrip().endswith(written(question.problem))
    lost = Prompter(tiny_tokenizer, "paper", 50).prompts(questions)
    assert all(not prompt.fits and prompt.ids == [] and prompt.dropped == 5 for prompt in lost)


def test_letters_are_found_where_a_blank_is_a_token_of_its_own(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    """Every letter begins with the same blank there: it belongs to the prompt, and the letters differ in one token."""
    letters = find_letters(tiny_tokenizer, "Answer:")
    assert tiny_tokenizer.decode(letters.before) == " "
    assert tiny_tokenizer.convert_ids_to_tokens(letters.ids) == ["A", "B", "C", "D"]


def test_categories_hold_every_subject_once() -> None:
    assert len(ALL) == 57
    assert {category: list(ALL.values()).count(category) for category in set(ALL.values())} == {
        "STEM": 18,
        "humanities": 13,
        "social sciences": 12,
        "other": 14,
    }


def complaint(path: Path, **options) -> str:
    with pytest.raises(UserError) as error:
        read(path, **options)
    assert "\n" not in str(error.value)
    return str(error.value).replace(f"{path}", "EXAM")


def test_a_published_exam_that_lacks_subjects_is_refused(tmp_path: Path) -> None:
    """A mean over some of the 57 would pass for the published figure; exams of one's own are scored as they are."""
    exam = write_exam(tmp_path / "part")
    assert complaint(exam, subjects=None) == (
        "EXAM lacks 54 of MMLU's 57 subjects (astronomy, business_ethics, clinical_knowledge, college_biology and 50 more); "
        "add them, or score a part with --mmlu.subjects abstract_algebra,anatomy,..."
    )
    assert complaint(exam, subjects=["virology"]) == "EXAM has no subject virology; it has abstract_algebra, anatomy, formal_logic"
    assert len(read(write_exam(tmp_path / "own", ("house_rules",)), subjects=None)) == 6


def test_the_hubs_folder_may_be_given_whole(tmp_path: Path) -> None:
    """A download of cais/mmlu has the file of all subjects in all/."""
    row = {"question": "1 + 1 =", "subject": "anatomy", "choices": ["1", "2", "3", "4"], "answer": 1}
    (tmp_path / "all").mkdir()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "all" / "validation-00000-of-00001.parquet")
    assert [question.problem.answer for question in read(tmp_path, split="val", shots=0, subjects=["anatomy"])] == [1]


def test_a_blank_first_line_is_no_row(tmp_path: Path) -> None:
    exam = write_exam(tmp_path, header=True)
    questions = read(exam)
    file = exam / "test" / "anatomy_test.csv"
    file.write_bytes(b"\xef\xbb\xbf\r\n" + file.read_bytes())
    assert read(exam) == questions


def test_a_broken_file_of_a_subject_that_is_not_asked_for_is_left_alone(tmp_path: Path) -> None:
    exam = write_exam(tmp_path)
    (exam / "test" / "anatomy_test.csv").write_bytes(b"")
    assert complaint(exam) == (
        "EXAM/test/anatomy_test.csv: has no questions; copy the file again, or leave the subject out with --mmlu.subjects"
    )
    assert len(read(exam, subjects=["formal_logic"])) == 6
    (exam / "test" / "anatomy_test.csv").unlink()
    (exam / "test" / "anatomy_test.csv").mkdir()
    assert complaint(exam).startswith("EXAM/test/anatomy_test.csv: cannot be read as CSV in UTF-8")


def test_the_examples_are_not_asked_behind_themselves(tmp_path: Path) -> None:
    exam = write_exam(tmp_path)
    line = "mmlu.split dev holds the examples, which would stand before themselves with their answers; set --mmlu.shots 0"
    assert complaint(exam, split="dev") == complaint(exam, split="dev", shots=2) == line


def test_missing_files(tmp_path: Path) -> None:
    exam = write_exam(tmp_path)
    assert complaint(tmp_path / "nowhere").startswith("--mmlu.path EXAM: no such file or folder; give a folder with dev/")
    assert complaint(exam, split="val").startswith("--mmlu.path EXAM: needs val/SUBJECT_val.csv for each subject")
    (exam / "dev" / "anatomy_dev.csv").unlink()
    assert complaint(exam) == "EXAM: anatomy needs 5 examples in its dev split, found 0; add them or set --mmlu.shots 0"
    assert len(read(exam, shots=0)) == len(read(exam, subjects=["anatomy"], shots=0)) * 3


@pytest.mark.parametrize(
    ("cells", "line"),
    [
        (["q", "1", "2", "3", "4", "5", "A"], "needs 6 columns (question, four choices, answer), found 7; correct the row"),
        (["q", "1", "2", "3", "A"], "needs 6 columns (question, four choices, answer), found 5; correct the row"),
        (["q", "1", "2", "3", "4", "E"], "the answer must be a letter from A to D or an index from 0 to 3, got 'E'; correct the row"),
        (["q", "1", "2", "3", "4", "4"], "the answer must be a letter from A to D or an index from 0 to 3, got '4'; correct the row"),
    ],
)
def test_wrong_rows_are_named(tmp_path: Path, cells: list[str], line: str) -> None:
    exam = write_exam(tmp_path)
    with (exam / "test" / "anatomy_test.csv").open("a") as file:
        file.write(",".join(cells) + "\n")
    assert complaint(exam) == f"EXAM/test/anatomy_test.csv: row 7: {line}"


def test_wrong_lines_of_the_authors_form_are_named(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    good = {"subject": "anatomy", "input": prompt_text(Question("anatomy", SUM, ()), "paper"), "output": "B"}
    for change, line in (
        ({"input": "Q"}, ":2: `input` must begin with 'The following are multiple"),
        ({"input": good["input"].replace("\nC. ", "\nc. ")}, ":2: a question must end in its choices A. to D. and Answer:"),
        ({"output": "F"}, ":2: the answer must be a letter from A to D"),
        ({"subject": None}, ":2: needs the texts subject, input and output"),
    ):
        file.write_text(json.dumps(good) + "\n" + json.dumps(good | change) + "\n")
        assert complaint(file, subjects=["anatomy"]).startswith(f"EXAM{line}")
    file.write_text(json.dumps(good) + "\n")
    assert "has 0 examples in its prompt, --mmlu.shots asks for 5" in complaint(file, subjects=["anatomy"], shots=5)


@pytest.fixture
def published() -> Path:
    if "QLORA_LIGHTNING_REAL_DATA" not in os.environ:
        pytest.skip("QLORA_LIGHTNING_REAL_DATA names no folder of published rows")
    return Path(os.environ["QLORA_LIGHTNING_REAL_DATA"], "mmlu")


def test_the_published_files_have_the_published_numbers_of_questions(published: Path) -> None:
    assert len(Exam(str(published / "data")).read()) == 14_079  # the first edition
    assert len(Exam(str(published / "data"), split="val").read()) == 1_542
    assert len(Exam(str(published / "zero_shot_mmlu_val.json.gz")).read()) == 1_531


def test_the_authors_prompts_are_ours_to_the_blank(published: Path) -> None:
    """Of their 1,531 prompts the 1,421 whose question the first edition words alike; the rest differ in the question itself."""
    theirs = {prompt_text(question, "paper") for question in Exam(str(published / "zero_shot_mmlu_val.json.gz")).read()}
    ours = {prompt_text(question, "paper") for question in Exam(str(published / "data"), split="val", shots=0).read()}
    assert len(theirs) == 1_531
    assert len(theirs & ours) == 1_421
