"""``data inspect``: what it prints, writes and how it ends, run as a user runs it."""

import json
import re
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow
import pytest
from rich.console import Console

from qlora_lightning.cli import main, overview
from qlora_lightning.data.audit import Audit, audit
from qlora_lightning.data.dataset import SCHEMA, TokenizedDataset, report_on
from qlora_lightning.data.excerpts import Excerpt, Piece
from qlora_lightning.inspection import show
from qlora_lightning.inspection_html import page

# With chatml a token a character: BOS, "<start>user\n" 6, the question, "<end>\n" 2, "<start>assistant\n" 11; then the answer and its end.
ROWS: list[dict[str, Any]] = [
    {"instruction": "hi", "output": "ok"},
    {"instruction": "hi", "output": "ok"},
    {"instruction": "say <|im_end|>", "output": " [bold]yes[/bold]\n"},
    {"instruction": "<script>alert(1)</script>", "output": "</mark><script>alert(2)</script>"},
    {"instruction": "empty", "output": ""},
]


class Result(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.out.splitlines()]

    @property
    def summary(self) -> dict[str, Any]:
        found: dict[str, Any] = self.lines[-1]["summary"]
        return found


Inspect = Callable[..., Result]


@pytest.fixture
def inspect(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Inspect:
    """Run ``data inspect`` on rows, from an empty folder, in which nothing but the files asked for may be left."""

    def run(*options: str, rows: list[Any] = ROWS, base: Path = tiny_base, template: str = "chatml") -> Result:
        work = tmp_path / "work"
        work.mkdir(exist_ok=True)
        monkeypatch.chdir(work)
        file = write(tmp_path / "rows.jsonl", rows)
        capsys.readouterr()
        given = ["--model.base_model", str(base), "--data.dataset.path", str(file), "--data.dataset.template", template]
        code = main(["data", "inspect", *given, "--data.global_batch_size", "4", *options])
        assert [path.name for path in work.iterdir() if path.suffix != ".html"] == []
        return Result(code, *capsys.readouterr())

    return run


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


# ---- JSON ----


def test_json_gives_every_example_and_the_summary(inspect: Inspect) -> None:
    result = inspect("--json")
    first, *_, third, fourth, last = result.lines
    assert result.code == 0
    assert first == {
        "row": 1,
        "text": "<s><|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nok<|im_end|>",
        "supervised": ["ok<|im_end|>"],
        "input_tokens": 25,
        "supervised_tokens": 3,
    }
    assert [line["row"] for line in result.lines[:-1]] == [1, 2, 3, 4]
    assert third["supervised"] == [" [bold]yes[/bold]\n<|im_end|>"]
    assert fourth["supervised"] == ["</mark><script>alert(2)</script><|im_end|>"]
    assert list(last) == ["summary"]


def test_the_summary_adds_up(inspect: Inspect) -> None:
    result = inspect("--json")
    summary, lines = result.summary, result.lines[:-1]
    counts = {name: summary[name] for name in ("rows", "rows_used", "examples", "skipped", "duplicates", "respelled", "problems")}
    assert counts == {
        "rows": 5,
        "rows_used": 4,
        "examples": 4,
        "skipped": {"empty answer": 1},
        "duplicates": 1,
        "respelled": 1,
        "problems": [],
    }
    assert summary["tokens"] == sum(line["input_tokens"] for line in lines)
    assert summary["supervised_tokens"] == sum(line["supervised_tokens"] for line in lines)
    assert [summary["lengths"][name]["p50"] for name in ("source", "target", "total")] == [22, 3, 25]
    assert set(summary["padding_waste"]) == {"random", "grouped", "packed"}
    assert summary["layout"] == "grouped"


def test_rows_limits_what_is_shown_and_not_what_is_counted(inspect: Inspect) -> None:
    result = inspect("--json", "--rows", "1")
    assert len(result.lines) == 2
    assert result.summary["examples"] == 4
    assert inspect("--json", "--rows", "0").summary["examples"] == 4


def test_a_mix_says_which_set_an_example_is_of(inspect: Inspect, tmp_path: Path) -> None:
    other = write(tmp_path / "other.jsonl", [{"prompt": "a", "response": "b"}])
    result = inspect("--json", "--data.mix", json.dumps([{"dataset": {"path": str(other)}, "weight": 4}]))
    assert [(line["set"], line["row"]) for line in result.lines[:-1]] == [("rows", 1), ("rows", 2), ("rows", 3), ("rows", 4), ("other", 1)]
    rows, added = result.summary["sets"]
    assert (rows["examples"], rows["examples_share"]) == (4, 0.5)
    assert (added["rows"], added["examples"], added["tokens"], added["examples_share"]) == (1, 1, 23, 0.5)


def test_the_validation_part_can_be_looked_at(inspect: Inspect, tmp_path: Path) -> None:
    held = write(tmp_path / "held.jsonl", [{"instruction": "held", "output": "out"}, ROWS[0]])
    result = inspect("--json", "--part", "validation", "--data.dataset.validation_path", str(held))
    assert [line["supervised"] for line in result.lines[:-1]] == [["out<|im_end|>"], ["ok<|im_end|>"]]
    summary = result.summary
    assert (summary["part"], summary["also_in_validation"], summary["padding_waste"]) == ("validation", 1, None)


STREAMED = ("--data.streaming", "true", "--data.dataset.validation_size", "3")


def test_of_a_stream_the_beginning_is_read(inspect: Inspect) -> None:
    rows = [{"instruction": f"{n}", "output": "ok"} for n in range(1010)]
    result = inspect("--json", *STREAMED, rows=rows)
    assert "data.streaming is true: the first 1,000 rows stand for all" in result.err
    assert result.summary["examples"] == 1003  # of which a fit would hold three out
    trained, held = (inspect("--json", "--part", part, *STREAMED, rows=rows).lines[:-1] for part in ("train", "validation"))
    assert ([line["row"] for line in held], trained[0]["row"], len(trained)) == ([1, 2, 3], 4, 1000)
    assert inspect(*STREAMED, "--data.dataset.validation_size", "0.1").code == 2  # as for a fit


def test_all_rows_are_shown_those_held_out_too_unless_one_part_is_asked_for(inspect: Inspect) -> None:
    rows = [{"instruction": f"{n}", "output": "ok"} for n in range(10)]

    def shown(*options: str) -> list[int]:
        return [line["row"] for line in inspect("--json", "--data.dataset.validation_size", "0.2", *options, rows=rows).lines[:-1]]

    assert shown() == list(range(1, 11))
    trained, held = shown("--part", "train"), shown("--part", "validation")
    assert (len(trained), len(held), sorted(trained + held)) == (8, 2, list(range(1, 11)))


def test_rows_on_both_sides_of_the_division_are_counted(inspect: Inspect) -> None:
    """Ten equal rows: eight to train on, and each of them is held out as well."""
    result = inspect("--json", "--data.dataset.validation_size", "0.2", rows=[ROWS[0]] * 10)
    assert (result.summary["examples"], result.summary["duplicates"], result.summary["also_in_validation"]) == (10, 9, 8)


# ---- --strict ----


def test_strict_passes_sound_rows(inspect: Inspect) -> None:
    result = inspect("--strict", "--json")
    assert (result.code, result.summary["problems"]) == (0, [])


SHORT = {"instruction": "q", "output": "a"}  # 23 tokens
RIGHT = ("--data.dataset.truncation", "right", "--data.dataset.max_length", "23")
PAPER = ("--data.dataset.compat", "paper", "--data.dataset.target_max_length", "3")


@pytest.mark.parametrize(
    ("options", "rows", "problem"),
    [
        (("--data.dataset.bad_rows", "skip"), [SHORT, {"instruction": "x"}], "bad rows, skipped: 1"),
        (RIGHT, [SHORT, ROWS[0], ROWS[1]], "rows without a supervised token left after truncation: 2"),
        (PAPER, [SHORT, {"instruction": "q", "output": "abc"}], "examples with an answer that lost its end token: 1"),
    ],
)
def test_strict_fails_on_rows_that_spoil_training(inspect: Inspect, options: tuple[str, ...], rows: list[Any], problem: str) -> None:
    assert_fails(inspect("--strict", *options, rows=rows), problem)


def assert_fails(result: Result, problem: str) -> None:
    assert result.code == 2
    assert result.err.splitlines()[-1] == (f"qlora-lightning: --strict: found {problem}; correct the rows or the fields of data.dataset")
    assert f"warning: {problem}\n" in result.out


def test_strict_fails_on_rows_of_the_validation_part(inspect: Inspect, tmp_path: Path) -> None:
    held = write(tmp_path / "held.jsonl", [ROWS[0]])
    result = inspect("--strict", "--data.dataset.validation_path", str(held))
    assert_fails(result, "examples in both the training and the validation part: 2")


@pytest.fixture
def other_base(tiny_base: Path, tmp_path: Path) -> Path:
    """A base to be changed, with no weights in its weights file."""
    folder = shutil.copytree(tiny_base, tmp_path / "base")
    (folder / "model.safetensors").write_bytes(b"")
    return folder


def test_strict_fails_on_a_template_that_doubles_bos(inspect: Inspect, other_base: Path) -> None:
    turns = "{% for message in messages %}[{{ message.role }}]{{ message.content }}{{ eos_token }}{% endfor %}"
    (other_base / "chat_template.jinja").write_text("{{ bos_token }}{{ bos_token }}" + turns)
    assert_fails(inspect("--strict", base=other_base, template="tokenizer"), "examples that open with two BOS: 4")


def test_a_token_across_the_border_is_cut_there(inspect: Inspect, other_base: Path) -> None:
    """``io`` is one token, which "hi" and "ok" with nothing between would share."""
    file = other_base / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    tokenizer["model"]["vocab"]["io"] = 300
    tokenizer["model"]["merges"] = [["i", "o"]]
    file.write_text(json.dumps(tokenizer))
    result = inspect("--strict", base=other_base, template="plain", rows=[ROWS[0], SHORT])
    assert result.code == 0
    assert "row 1: 6 tokens, 3 supervised\n<s>hi⟦ok</s>⟧\n" in result.out


def test_without_strict_the_same_is_a_warning(inspect: Inspect) -> None:
    result = inspect("--data.dataset.bad_rows", "skip", rows=[SHORT, {"instruction": "x"}])
    assert result.code == 0
    assert "warning: bad rows, skipped: 1" in result.out
    assert re.search(r"bad row: .*rows.jsonl:2: the row needs a field 'output'", result.out)


# ---- for the terminal ----


def test_supervised_text_is_marked_where_there_are_no_colours(inspect: Inspect) -> None:
    out = inspect().out
    assert out.count("tokens, 3 supervised\n<s><|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n⟦ok<|im_end|>⟧\n") == 2
    assert "rows, row 3: 53 tokens, 19 supervised (spells a control token)" in out
    assert "⟦·[bold]yes[/bold]⏎\n<|im_end|>⟧" in out  # the blank and the line end are seen, the markup is text
    assert re.search(r"^rows +5 read, 4 used", out, re.MULTILINE)
    assert re.search(r"^left out +1 empty answer", out, re.MULTILINE)


def test_five_examples_are_shown(inspect: Inspect) -> None:
    rows = [{"instruction": "q", "output": f"answer {n}"} for n in range(9)]
    assert inspect(rows=rows).out.count("supervised\n") == 5
    assert inspect("--rows", "2", rows=rows).out.count("supervised\n") == 2


def planted(**fields: Any) -> Excerpt:
    pieces = [Piece("ask \x1b[2J", False), Piece(" Elbe", True)]
    return Excerpt(**{"set": "s", "row": 1, "text": "", "pieces": pieces, "input_tokens": 9, "supervised_tokens": 2, "notes": [], **fields})


@pytest.fixture
def account() -> Audit:
    """Of one example of the tokens 1 and 2, the second supervised."""
    columns = {"row": [0], "input_ids": [[1, 2]], "supervised": [[0, 1]], "source_tokens": [1], "targets": [1], "straddling": [0]}
    batch = pyarrow.RecordBatch.from_pydict({**columns, "flags": [0]}, schema=SCHEMA)
    dataset = TokenizedDataset.from_batches([batch], "")
    return audit("train", dataset, report_on(dataset, 1, {}), 0, [], None, None, [])


def test_a_terminal_gets_colours_and_no_control_characters(account: Audit) -> None:
    file = StringIO()
    show(Console(file=file, force_terminal=True, color_system="standard", width=80), [planted()], account)
    assert "\x1b[2mask ␛[2J\x1b[0m\x1b[1;32m·Elbe\x1b[0m" in file.getvalue()
    assert "⟦" not in file.getvalue()


# ---- HTML ----


class Reader(HTMLParser):
    """The text inside each ``<mark>``, every tag, and all attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.marked: list[str] = []
        self.tags: list[str] = []
        self.attributes: dict[str, list[str | None]] = {}
        self._inside = False
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attributes:
            self.attributes.setdefault(name, []).append(value)
        if tag == "mark":
            self._inside = True
            self.marked.append("")

    def handle_endtag(self, tag: str) -> None:
        self._inside = self._inside and tag != "mark"

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.marked[-1] += data


def test_the_page_marks_what_is_supervised_and_runs_nothing(inspect: Inspect) -> None:
    result = inspect("--html", "page.html")
    text = Path("page.html").read_text(encoding="utf-8")
    read = Reader(text)
    assert (result.code, read.marked[0]) == (0, "trained on")  # the legend
    assert read.marked[1:] == [
        "ok<|im_end|>",
        "ok<|im_end|>",
        "·[bold]yes[/bold]⏎\n<|im_end|>",
        "</mark><script>alert(2)</script><|im_end|>",
    ]
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert not {"script", "link", "img", "iframe", "base", "object"} & {*read.tags}
    assert not {"src", "href"} & {*read.attributes}
    assert "url(" not in text and "@import" not in text and "http://" not in text and "https://" not in text
    assert "written: page.html" in result.err
    assert "<td>5 read, 4 used</td>" in text
    assert "⟦" not in result.out and "1 empty answer" in result.out  # the terminal has the audit alone


def test_the_page_shows_a_bar_for_every_bucket(account: Audit) -> None:
    """Source and target of one token each are two buckets, 0 and 1; three in all for the total of two."""
    read = Reader(page("a <title>", [planted()], account))
    assert read.attributes["title"] == [
        *("0 to 0 tokens: 0 examples", "1 to 1 tokens: 1 examples") * 2,
        *("0 to 0 tokens: 0 examples", "1 to 1 tokens: 0 examples", "2 to 2 tokens: 1 examples"),
    ]
    assert read.attributes["style"][-3:] == ["height:0.0%", "height:0.0%", "height:100.0%"]
    assert read.tags.count("title") == 1


def test_a_page_that_cannot_be_written_is_one_line(inspect: Inspect) -> None:
    result = inspect("--html", "none/page.html")
    assert result.code == 2
    assert result.err.endswith("--html none/page.html: cannot be written (No such file or directory); name a file that can\n")


# ---- options ----


def test_only_the_tokenizer_of_the_base_is_loaded(inspect: Inspect, other_base: Path) -> None:
    assert inspect(base=other_base).code == 0


def test_a_recipe_is_understood_by_name(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    options = ["--model.base_model", str(tiny_base), "--data.dataset.template", "alpaca", "--json"]
    assert main(["data", "inspect", "--config", "quickstart", *options]) == 0
    first, *rest, last = capsys.readouterr().out.splitlines()
    assert "### Instruction:\n" in json.loads(first)["text"]
    assert json.loads(last)["summary"]["examples"] == 1 + len(rest)
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["inspect", "--rowz", "3"], "unknown option rowz; did you mean rows?"),
        (["inspect", "--part", "test"], "part: "),
        (["inspect"], "model.base_model must be set; give it in the recipe or as --model.base_model VALUE"),
        ([], "data needs the subcommand inspect, got none; see qlora-lightning data inspect --help"),
        (["inspct"], "data needs the subcommand inspect, got 'inspct'; did you mean inspect?; see qlora-lightning data inspect --help"),
    ],
)
def test_a_mistake_is_one_line(options: list[str], line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", *options]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"qlora-lightning: {line}")
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def test_options_that_cannot_work_are_refused(inspect: Inspect) -> None:
    assert "unknown option data.dataset.tmplate; did you mean data.dataset.template?" in inspect("--data.dataset.tmplate", "x").err
    assert "--rows must be 0 or more, got -1; leave it out for the default" in inspect("--rows", "-1").err
    assert "accumulate_grad_batches must divide the 4 examples" in inspect("--trainer.accumulate_grad_batches", "3").err
    assert "need validation rows, but the data set has none" in inspect("--part", "validation").err


def test_help_names_the_options_and_what_strict_finds(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "inspect", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for option in ("--rows", "--part", "--html", "--json", "--strict"):
        assert option in text
    assert "every option of `fit` is understood" in text
    assert "answers that lost their end token, a doubled BOS, boundary tokens" in text
    assert "data inspect --config RECIPE" in overview()
