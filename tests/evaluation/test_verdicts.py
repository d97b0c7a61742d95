"""Rating files: both schemas, the traps of the released ones, archives, and what a user can get wrong."""

import io
import json
import math
import tarfile
from pathlib import Path
from typing import Any

import pytest
from verdict_files import own_row, released_row, write_rows

from qlora_lightning.errors import UserError
from qlora_lightning.evaluation.tournament.ratings import read_ratings
from qlora_lightning.evaluation.tournament.released import system_name
from qlora_lightning.evaluation.tournament.verdicts import Verdict


def test_rows_of_judge_are_read_from_a_folder_and_what_lies_in_it(tmp_path: Path) -> None:
    write_rows(tmp_path / "a-vs-b.jsonl", [own_row(1, "a", "b", 1), own_row(2, "a", "b", -1)])
    write_rows(tmp_path / "more" / "b-vs-a.jsonl", [own_row(1, "b", "a", [7, 8.5], kind="relative")])
    (tmp_path / "judge.json").write_text("{}")
    read = read_ratings(str(tmp_path))
    assert read.verdicts == [
        Verdict("1", "generic", "pairwise", "a", "b", 1, "judge"),
        Verdict("2", "generic", "pairwise", "a", "b", None, "judge"),
        Verdict("1", "generic", "relative", "b", "a", (7.0, 8.5), "judge"),
    ]
    assert (read.unparsed, read.judges, read.notes) == (1, ["judge"], [])


@pytest.mark.parametrize(
    ("kind", "score", "share"),
    [
        ("pairwise", 1, 1.0),
        ("pairwise", 2, 0.0),
        ("pairwise", 3, 0.5),
        ("pairwise", -1, None),
        ("relative", [9, 8], 1.0),
        ("relative", [8, 9.5], 0.0),
        ("relative", [0, 0], 0.5),
        ("relative", [-1, -1], None),
        ("relative", -1, None),
    ],
)
def test_a_score_is_a_share_of_the_win_and_an_unparsed_one_is_no_tie(kind: str, score: Any, share: float | None, tmp_path: Path) -> None:
    rows = [own_row(1, "a", "b", score, kind=kind), own_row(2, "a", "b", 1)]
    assert read_ratings(str(write_rows(tmp_path / "r.jsonl", rows))).verdicts[0].share == share


@pytest.mark.parametrize(
    ("name", "system"),
    [
        ("13b-guanaco-oa-generations-topp0.9-temp0.7", "13b-guanaco"),
        ("65b-hh-rlhf-vicuna-generations-topp0.9-temp0.7", "65b-hh-rlhf"),
        ("gpt-3.5-oa-generations", "gpt-3.5"),
        ("answer-gpt35", "gpt-3.5"),
        ("answer-gpt4", "gpt-4"),
        ("answer-vicuna-13b", "vicuna-13b"),
        ("my-model", "my-model"),
    ],
)
def test_released_files_spell_a_system_in_several_ways(name: str, system: str) -> None:
    assert system_name(name) == system


def released(folder: Path, name: str, rows: list[tuple[str, str, Any]], id_field: str = "question_id") -> None:
    located = [released_row(question, *row, id_field=id_field) for question, row in enumerate(rows)]
    write_rows(folder / f"{name}-reviewer.jsonl", located)


def test_the_order_comes_from_answer_ids_where_a_name_has_it_backwards(tmp_path: Path) -> None:
    """The hub h answers with h0 and h1 in every file; that of a is named backwards, that of b rightly. b's answers are new in the other
    order, as two systems' are in the released files."""
    folder = tmp_path / "relative"
    released(folder, "a-vs-h-gpt4", [("h0", "a0", [9, 5]), ("h1", "a1", [-1, -1])])
    released(folder, "h-vs-a-gpt4", [("a0", "h0", [5, 9]), ("a1", "h1", [5, 9])])
    released(folder, "b-vs-h-gpt4", [("b0", "h0", [5, 9]), ("b1", "h1", [5, 9])])
    released(folder, "h-vs-b-gpt4", [("h0", "new0", [9, 5]), ("h1", "new1", [9, 5])])
    read = read_ratings(str(tmp_path))
    assert all(verdict.score is None or verdict.score[verdict.first != "h"] == 9 for verdict in read.verdicts)  # type: ignore[index]
    assert read.notes == ["relative: 2 of 4 file names give the order of the answers backwards; the answer ids settled it"]
    assert (read.unparsed, read.judges) == (1, ["gpt-4"])


def test_names_are_trusted_where_no_answer_id_tells_and_that_is_said(tmp_path: Path) -> None:
    released(tmp_path / "oa", "a-vs-answer-gpt4-gpt-4", [("x", "y", 1)], id_field="message_id")
    read = read_ratings(str(tmp_path))
    assert (read.verdicts[0].first, read.verdicts[0].second, read.verdicts[0].judge) == ("a", "gpt-4", "gpt-4")
    assert read.notes == ["oa: of 1 of 1 files no answer id settles the order; their names were trusted"]


def archive(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:xz") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def test_an_archive_is_read_without_unpacking_it(tmp_path: Path) -> None:
    one, two = (write_rows(tmp_path / "rows.jsonl", [own_row(n, "a", "b", 1)]).read_bytes() for n in (1, 2))
    file = archive(tmp_path / "ratings.tar.xz", {"all/x/a.jsonl": one, "all/y/b.jsonl": two, "all/notes.md": b"no rows"})
    before = sorted(tmp_path.rglob("*"))
    assert [verdict.question for verdict in read_ratings(str(file)).verdicts] == ["1", "2"]
    assert [verdict.question for verdict in read_ratings(f"{file}/y").verdicts] == ["2"]
    assert sorted(tmp_path.rglob("*")) == before
    with pytest.raises(UserError, match=r"ratings.tar.xz/z: needs rating files \(\*.jsonl\), found none there in the archive"):
        read_ratings(f"{file}/z")


@pytest.mark.parametrize("name", ["../outside.jsonl", "/etc/outside.jsonl", "all/../../outside.jsonl"])
def test_an_archive_whose_members_leave_it_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"members must stay in the archive's folder, found '.*outside.jsonl'; pack it anew"):
        read_ratings(str(archive(tmp_path / "ratings.tar.xz", {name: b"{}"})))


def test_a_damaged_archive_is_named(tmp_path: Path) -> None:
    whole = archive(tmp_path / "ratings.tar.xz", {"a.jsonl": b"{}" * 5000}).read_bytes()
    (tmp_path / "ratings.tar.xz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"ratings.tar.xz: the archive cannot be read \(.*\); fetch it again"):
        read_ratings(str(tmp_path / "ratings.tar.xz"))


GOOD = own_row(1, "a", "b", 1)
RELEASED = released_row(1, "x", "y", 1)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question_id": 1, "text": "Why?"}, r"r.jsonl:2: a verdict needs question_id, kind, .*, found question_id, text; give a folder"),
        ({**GOOD, "kind": "triple"}, r"r.jsonl:2: a verdict needs .* \(kind: pairwise or relative\), found .* with kind 'triple'"),
        ({**GOOD, "second": "a"}, r"r.jsonl:2: a verdict needs two systems, found 'a' on both sides"),
        ({**GOOD, "score": 4}, r"r.jsonl:2: score must be 1 \(first\), .*, found 4"),
        ({**GOOD, "score": True}, r"r.jsonl:2: score must be .*, found True"),
        ({**GOOD, "score": None}, r"r.jsonl:2: score must be .*, found None"),
        ({**GOOD, "score": [7, "8"]}, r"r.jsonl:2: score must be .*, found \[7, '8'\]"),
        ({**GOOD, "score": [7, 8]}, r"r.jsonl:2: the score \[7, 8\] is none of a pairwise verdict"),
        ({**GOOD, "kind": "relative", "score": 2}, r"r.jsonl:2: the score 2 is none of a relative verdict"),
        ({**GOOD, "kind": "relative", "score": [1, math.inf]}, r"r.jsonl:2: score must be .*, found \[1, inf\]"),
        ({**GOOD, "first": ["a"]}, r"r.jsonl:2: first must be a name, found \"\['a'\]\"; correct the row"),
        ({**GOOD, "second": " "}, r"r.jsonl:2: second must be a name, found ' '"),
        ({**GOOD, "judge": "j\ud800"}, r"r.jsonl:2: judge must be a name, found 'j\\ud800'"),
        ({**GOOD, "question_id": None}, r"r.jsonl:2: question_id must be a number or text, found None"),
        ({"\x1b[2J": 1}, r"r.jsonl:2: a verdict needs .* found \\u001b\[2J; give"),
    ],
)
def test_a_wrong_row_is_named_with_its_line(row: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        read_ratings(str(write_rows(tmp_path / "r.jsonl", [GOOD, row])))


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        (
            "a-vs-b-gpt4-reviewer.jsonl",
            {"answer1_id": "x", "score": 1},
            r"a-vs-b-gpt4-reviewer.jsonl:2: a released verdict needs question_id",
        ),
        ("a-vs-b-gpt4-reviewer.jsonl", {**RELEASED, "score": 7}, r":2: score must be"),
        ("a-vs-a-gpt4-reviewer.jsonl", RELEASED, r"reviewer.jsonl: the file's name must give two systems, found 'a' on both sides"),
        ("answer-gpt35-vs-gpt-3.5-gpt4-reviewer.jsonl", RELEASED, r"two systems, found 'gpt-3.5' on both sides"),
        ("ratings.jsonl", RELEASED, r"ratings.jsonl: the rows give answer ids alone, so the file's name must give the systems"),
    ],
)
def test_a_wrong_released_row_is_named_too(name: str, row: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        read_ratings(str(write_rows(tmp_path / name, [RELEASED, row])))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"question_id": 1, "ki\n', r"r.jsonl:1: a line must hold JSON \(.*\); correct or delete it"),
        (b"\xff\xfe\n", r"r.jsonl:1: a line must hold JSON"),
        (b"[" * 100_000 + b"\n", r"r.jsonl:1: a line must hold JSON \(.*recursion.*\)"),
        (b"[1, 2]", r"r.jsonl:1: a line must hold a JSON object, found list"),
        (b"", r"needs verdicts that could be parsed, found none among 0"),
    ],
)
def test_a_line_that_is_no_row_is_named(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "r.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_ratings(str(tmp_path))


def test_half_a_line_that_a_stopped_judge_left_is_passed_over_and_told(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "r.jsonl", [GOOD])
    file.write_text(file.read_text() + json.dumps({**GOOD, "first": "Müller"}, ensure_ascii=False)[:-9], "utf-8")
    read = read_ratings(str(tmp_path))
    assert len(read.verdicts) == 1
    assert read.notes == [f"{file}:2: the last line is cut short and left out; the `judge` that was stopped can go on"]


def test_a_folder_or_file_that_only_looks_like_ratings(tmp_path: Path) -> None:
    (tmp_path / "folder.jsonl").mkdir()
    file = write_rows(tmp_path / "r.jsonl", [GOOD])
    assert len(read_ratings(str(tmp_path)).verdicts) == 1
    file.rename(tmp_path / ("a.jsonl"))
    (tmp_path / "r.jsonl").symlink_to("r.jsonl")  # to itself: there, but no file
    with pytest.raises(UserError, match=r"there is no such file|cannot be read"):
        read_ratings(str(tmp_path / "r.jsonl"))


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--ratings .*missing: there is no such file or folder; give what `judge` wrote"):
        read_ratings(str(tmp_path / "missing"))
    with pytest.raises(UserError, match=r"needs rating files \(\*.jsonl\), found none; give what `judge` wrote"):
        read_ratings(str(tmp_path))
    write_rows(tmp_path / "r.jsonl", [own_row(1, "a", "b", -1)])
    with pytest.raises(UserError, match=r"needs verdicts that could be parsed, found none among 1; judge again"):
        read_ratings(str(tmp_path))
