"""``report``: a page of runs, made of whatever their folders hold."""

import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from qlora_lightning.cli import main
from qlora_lightning.report.reading import distinct_names

HOSTILE = "<script>alert(1)</script>\x1b[31m\u202etxt\u2066 & \"quotes' $x_1$ \ud800"
CONFIG = {
    "seed_everything": 0,
    "model": {"base_model": "a/base", "lora": {"r": 64, "dropout": 0.1}, "optimizer": {"learning_rate": 2e-4}},
    "data": {"dataset": {"name": "my rows", "validation_size": 8}, "global_batch_size": 16, "mix": None},
    "trainer": {"default_root_dir": "anywhere", "max_steps": -1},
}
Make = Callable[..., Path]


class Page(HTMLParser):
    """A page's tags, texts outside the style sheet, attributes, and cells by row."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.words: list[str] = []
        self.rows: list[list[str]] = []
        self.titles: list[str] = []
        """Of figures: what readers of a screen hear."""
        self._in_cell = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag == "tr":
            self.rows.append([])
        elif tag in ("th", "td"):
            self._in_cell = True
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        self._in_cell = self._in_cell and tag not in ("th", "td")

    def handle_data(self, data: str) -> None:
        if self.tags[-1:] == ["style"]:
            return
        self.words.append(data)
        if self.tags[-1:] == ["title"] and "svg" in self.tags and data.strip():
            self.titles.append(data)
        if self._in_cell:
            self.rows[-1][-1] += data

    def row(self, name: str) -> list[str]:
        """The cells behind the first row head of this name."""
        return next(cells for first, *cells in filter(None, self.rows) if first == name)


class Result(NamedTuple):
    code: int
    out: str
    err: str
    page: str


def metrics(steps: int, loss: float = 2.0) -> str:
    """A metrics.csv as the logger writes it: held-out loss before training, then a row a step, held-out loss after the last."""
    lines = ["step,val/loss,val/perplexity,train/loss,train/grad_norm,train/learning_rate,train/tokens_per_second,memory/peak_gib"]
    lines += ["0,3.0,20.1,,,,,"]
    lines += [f"{step},,,{loss - step / 1000},0.5,0.0002,{1000 + step},{4 + step / 100}" for step in range(steps)]
    return "\n".join([*lines, f"{steps - 1},1.5,4.48,,,,,"]) + "\n"


def evaluation(step: int | None, accuracy: float = 0.5, questions: int = 40, **more: Any) -> dict[str, Any]:
    """An MMLU result of two subjects."""
    one = {"accuracy": accuracy, "interval": [accuracy - 0.1, accuracy + 0.1]}
    return {
        "step": step,
        "style": "paper",
        "shots": 5,
        "split": "test",
        "limit": None,
        "questions": questions,
        "accuracy": accuracy,
        "accuracy_interval": [accuracy - 0.1, accuracy + 0.1],
        "accuracy_micro": accuracy,
        "categories": {"STEM": {**one, "questions": questions, "subjects": 2}},
        "subjects": {
            "astronomy": {**one, "accuracy": accuracy - 0.1, "questions": 20, "shortened": 0},
            "anatomy": {**one, "questions": 20, "shortened": 1},
        },
        "shortened": 1,
        "seconds": 12.0,
        **more,
    }


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Write a run folder: metrics.csv and the files given."""

    def run(name: str, csv: str | None = None, files: dict[str, Any] | None = None) -> Path:
        folder = tmp_path / name
        folder.mkdir(parents=True)
        (folder / "metrics.csv").write_text(metrics(8) if csv is None else csv, encoding="utf-8")
        for path, content in (files or {}).items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        return folder

    return run


@pytest.fixture
def report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """Run the command; give what it printed and the page."""

    def run(*arguments: str | Path) -> Result:
        target = tmp_path / "page.html"
        code = main(["report", *map(str, arguments), "--output", str(target)])
        page = target.read_text(encoding="utf-8") if target.is_file() else ""
        return Result(code, *capsys.readouterr(), page)

    return run


def full(**config: Any) -> dict[str, Any]:
    """All files of a run."""
    samples = [{"step": step, "prompt": "Why?", "generation": f"answer {step}", "reference": "Because."} for step in (0, 4, 8)]
    entry = {"name": "my rows", "part": "training", "weight": 1.0, "kept": 100, "tokens": 20_000, "supervised_tokens": 5_000}
    entry |= {"skipped": {"no supervised token": 3}, "lost_ends": 0, "supervised_share": 0.25, "a new field": 7}
    return {
        "config.yaml": yaml.safe_dump(CONFIG | config),
        "samples.jsonl": "".join(json.dumps(row) + "\n" for row in samples),
        "audit.json": {"sets": [entry]},
        "mmlu/a.json": evaluation(4, 0.4),
        "mmlu/b.json": evaluation(8, 0.5),
    }


# ---- one run ----


def test_a_run_with_nothing_but_metrics(report: Callable[..., Result], make: Make) -> None:
    """Each part that is missing says what would make it appear."""
    result = report(make("alone"))
    words = " ".join(Page(result.page).words)
    assert result.code == 0 and result.err.startswith("Report of 1 run: ") and result.err.count("\n") == 1
    for way in ("--mmlu.path", "--samples.count", "audit.json", "config.yaml"):
        assert way in words
    assert "data.dataset.validation_size" not in words  # held-out loss is there


def test_the_summary_counts_steps_taken(report: Callable[..., Result], make: Make) -> None:
    """The logger's step 7 is the eighth update; what stands above the first update is of the untrained model."""
    result = report(make("run", files=full()), "--json")
    (run,) = json.loads(result.out)["runs"]
    assert (run["steps"], run["val_loss_first"], run["val_loss_best"], run["val_loss_best_step"]) == (8, 3.0, 1.5, 8)
    assert run["train_loss"] == pytest.approx(2.0 - 7 / 1000)  # a tenth of eight steps is the last one
    assert (run["base_model"], run["data_set"], run["peak_gib"]) == ("a/base", "my rows", pytest.approx(4.07))
    assert (run["mmlu_accuracy"], run["mmlu_interval"], run["mmlu_step"]) == (0.5, [0.4, 0.6], 8)
    seconds = sum(16 * 200 / (1000 + step) for step in range(8))  # 16 examples of 200 tokens a step
    assert run["training_seconds_estimated"] == pytest.approx(seconds)


def test_a_mix_is_named_with_the_set_it_is_mixed_into(report: Callable[..., Result], make: Make) -> None:
    data = CONFIG["data"] | {"mix": [{"dataset": {"path": "data/other.jsonl"}, "weight": 0.5}]}  # type: ignore[operator]
    assert Page(report(make("run", files=full(data=data))).page).row("data set") == ["my rows + other"]


def test_evaluations_that_are_gone_are_not_taken_for_none(report: Callable[..., Result], make: Make) -> None:
    page = report(make("run", "step,train/loss,mmlu/accuracy\n0,2,\n0,,0.4\n")).page
    assert "metrics.csv holds mmlu/accuracy, but" in page and "No MMLU yet" not in page


def test_questions_that_were_not_asked_are_counted(report: Callable[..., Result], make: Make) -> None:
    page = Page(report(make("run", files={"mmlu/a.json": evaluation(8, unanswered=3, seconds=0.25)})).page)
    assert page.row("too long to ask, so wrong") == ["3"] and page.row("time") == ["0.25 s"]


def test_runs_without_an_account_of_their_data_are_named(report: Callable[..., Result], make: Make) -> None:
    assert "Without an account of the data: bare." in report(make("whole", files=full()), make("bare")).page


def test_every_part_is_shown(report: Callable[..., Result], make: Make) -> None:
    page = Page(report(make("run", files=full())).page)
    assert page.row("MMLU, mean of subjects") == ["50.0% (40.0 to 60.0)"]
    assert page.row("learning rate") == ["0.0002"] and page.row("seed") == ["0"]
    assert page.row("left out") == ["3 no supervised token"] and page.row("supervised") == ["25.0%"] and page.row("a new field") == ["7"]
    subjects = [cells[0] for cells in page.rows if cells and cells[0] in ("anatomy", "astronomy")]
    assert subjects == ["anatomy", "astronomy"]  # by accuracy, the highest first
    words = [word.strip() for word in page.words]
    answers = [word for word in words if word.startswith("answer ")]
    assert answers == ["answer 0", "answer 4", "answer 8"] and {"untrained", "step 4", "Because."} <= {*words}


def test_figures_can_be_read_without_seeing_them(report: Callable[..., Result], make: Make) -> None:
    page = Page(report(make("run", files=full())).page)
    assert page.tags.count("svg") == page.tags.count("figure") == page.attributes.count(("role", "img")) == len(page.titles)
    assert "Training loss. run: 2 at step 1, 1.993 at step 8" in page.titles
    assert "MMLU over the training. run: 40.0% at step 4, 50.0% at step 8" in page.titles
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len({*ids})


def test_long_curves_are_thinned_and_the_caption_says_so(report: Callable[..., Result], make: Make) -> None:
    page = report(make("long", metrics(30_000))).page
    assert "Bold: mean of the 601 logged values around each; light: as logged. Thinned to the lowest and highest of each of" in page
    assert len(page) < 400_000


def test_held_out_loss_by_length_and_by_set(report: Callable[..., Result], make: Make) -> None:
    """One run shows each bucket's curve, in the order of lengths; several runs their last values."""
    csv = "step,train/loss,val/loss,val/loss_by_length/1024+,val/loss_by_length/0-127,val/loss/a\n" + "".join(
        f"{step},2,,,,\n{step},,{3 - step},2.{step},1.{step},1.5\n" for step in range(2)
    )
    one, two = make("one", csv), make("two", csv)
    assert "Held-out loss by length. 0-127: 1 at step 1, 1.1 at step 2; 1024+: 2 at step 1, 2.1 at step 2" in Page(report(one).page).titles
    titles = Page(report(one, two).page).titles
    assert "Held-out loss by length. one: 0-127 1.1, 1024+ 2.1; two: 0-127 1.1, 1024+ 2.1" in titles
    assert "Held-out loss by data set. one: a 1.5; two: a 1.5" in titles


def test_values_that_are_no_number_are_left_out_and_counted(report: Callable[..., Result], make: Make) -> None:
    page = report(make("run", "step,train/loss\n0,2.5\n1,nan\n2,inf\n3,2.25\n")).page
    assert "Left out: 2 values that are no finite number." in page
    assert "Training loss. run: 2.5 at step 1, 2.25 at step 4" in page


# ---- several runs ----


def test_settings_that_differ_are_marked(report: Callable[..., Result], make: Make) -> None:
    other = {"model": CONFIG["model"] | {"lora": {"r": 16, "dropout": 0.1}}, "data": CONFIG["data"] | {"streaming": True}}  # type: ignore[operator]
    result = report(make("a", files=full()), make("b", files=full(**other, trainer={"default_root_dir": "elsewhere"})))
    page = Page(result.page)
    assert page.row("LoRA rank r") == ["64", "16"] and page.row("LoRA dropout") == ["0.1", "0.1"]
    assert page.row("data.streaming") == ["-", "yes"]  # not a main setting, but it differs
    marked = re.findall(r'<tr class="differs"><th scope="row">([^<]*)', result.page)
    assert marked == ["LoRA rank r", "data.streaming"]  # and not where the run lies
    assert result.page.count("<caption>a, b</caption>") == 1  # the same data: one table


def test_runs_of_one_name_are_told_apart(report: Callable[..., Result], make: Make) -> None:
    page = Page(report(make("x/run"), make("y/run"), make("z")).page)
    assert ["", "x/run", "y/run", "z"] in page.rows


def test_names_are_the_shortest_ends_that_differ() -> None:
    paths = [Path(path) for path in ("/a/b/run", "/c/b/run", "/a/other")]
    assert distinct_names(paths) == ["a/b/run", "c/b/run", "other"]


def test_mmlu_is_compared_where_it_was_asked_alike(report: Callable[..., Result], make: Make) -> None:
    """The first run has a larger evaluation too, but the second has only the small one."""
    small = [{"mmlu/small.json": evaluation(8, accuracy, limit=5)} for accuracy in (0.4, 0.6)]
    runs = make("a", files=small[0] | {"mmlu/large.json": evaluation(8, 0.9, questions=400)}), make("b", files=small[1])
    result = report(*runs)
    assert Page(result.page).row("MMLU, mean of subjects") == ["40.0% (30.0 to 50.0)", "60.0% (50.0 to 70.0)"]
    assert "cannot be compared" not in result.page
    third = make("c", files={"mmlu/other.json": evaluation(8, shots=0)})
    assert "cannot be compared" in report(runs[0], third).page


# ---- what comes from data ----


def test_hostile_text_stays_text(report: Callable[..., Result], make: Make) -> None:
    """In the configuration, names of sets and metrics, samples, audit and subjects; and the page forbids what could slip through."""
    row = {"step": 0, "prompt": HOSTILE, "generation": HOSTILE, "reference": HOSTILE}
    config = CONFIG | {"model": {"base_model": HOSTILE.replace("\ud800", "")}, "data": {"dataset": {"name": "<img src=x>"}}}
    files = {
        "config.yaml": yaml.safe_dump(config),
        "samples.jsonl": json.dumps(row) + "\n",
        "audit.json": {"sets": [{"name": HOSTILE, "part": HOSTILE, "skipped": {HOSTILE: 1}, HOSTILE: HOSTILE}]},
        "mmlu/a.json": evaluation(1, subjects={HOSTILE: {"accuracy": 0.5, "interval": [0, 1], "questions": 1}}, split=HOSTILE),
        "checkpoints/last/qlora_lightning.json": {"base_model": HOSTILE},
    }
    csv = 'step,train/loss,"val/loss/<script>$\\frac","val/loss/""><i>"\n0,2,1,1\n'
    folders = [make(name, csv, files) for name in ("<b>bold", 'quote" onload="x')]
    for runs in (folders[:1], folders):
        result = report(*runs)
        page = Page(result.page)
        assert result.code == 0
        assert not {"script", "img", "b", "link", "iframe", "object", "base"} & {*page.tags}
        assert not [name for name, _ in page.attributes if name.startswith("on") or name == "src"]
        assert {value[0] for name, value in page.attributes if name in ("href", "xlink:href")} == {"#"}
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u202a-\u202e\u2066-\u2069\ud800-\udfff]", result.page)
        assert "://" not in result.page and "@import" not in result.page
        assert "default-src 'none'; style-src 'unsafe-inline'" in result.page
        assert "\\u202etxt\\u2066" in "".join(page.words) and "<script>alert(1)</script>␛[31m" in "".join(page.words)


def test_damaged_files_beside_the_metrics_are_left_out_and_named(report: Callable[..., Result], make: Make) -> None:
    files = {
        "config.yaml": "a: [",
        "samples.jsonl": '{"step": 1}\n',
        "audit.json": "[]",
        "mmlu/x.json": '{"questions": 3}',
        "mmlu/y.json": evaluation(3),
    }
    result = report(make("run", files=files))
    named = re.findall(r"^warning: \S*/run/(\S+) is left out: ", result.err, re.MULTILINE)
    assert (result.code, named) == (0, ["config.yaml", "samples.jsonl", "audit.json", "mmlu/x.json"])
    assert result.page.count("is left out: ") == 4 and "MMLU by category" in result.page


def test_a_line_that_a_kill_cut_short_is_left_out(report: Callable[..., Result], make: Make) -> None:
    result = report(make("run", metrics(8) + "8,,,1.9"), "--json")
    assert json.loads(result.out)["runs"][0]["steps"] == 8


# ---- bad input ----


@pytest.mark.parametrize(
    "csv, message",
    [
        ("step,train/loss\n0,2\n1\n2,1\n", "metrics.csv:3: a line has a cell for each of the 2 columns, this one has 1; mend or delete it"),
        ("step,train/loss\n0,2\n1,two\n", "metrics.csv:3: train/loss is a number, found 'two'; mend or delete the line"),
        ("step,train/loss\n1.5,2\n", "metrics.csv:2: step is a number, found '1.5'; mend or delete the line"),
        ("step,train/loss\n", "metrics.csv holds no value yet; wait for the run's first step, or leave the run out"),
        ("", "metrics.csv holds no value yet; wait for the run's first step, or leave the run out"),
    ],
)
def test_damaged_metrics(report: Callable[..., Result], make: Make, csv: str, message: str) -> None:
    result = report(make("run", csv))
    assert (result.code, result.page) == (2, "")
    assert result.err.endswith(f"{message}\n") and result.err.count("\n") == 1


def test_metrics_that_are_no_text(report: Callable[..., Result], make: Make) -> None:
    folder = make("run")
    (folder / "metrics.csv").write_bytes(b"step,\xff\n")
    assert "metrics.csv cannot be read (" in report(folder).err


def test_folders_that_are_no_runs(report: Callable[..., Result], make: Make, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert f"{tmp_path}/none is not a run folder: there is no such folder; give one" in report(tmp_path / "none").err
    assert "empty is not a run folder: it has no metrics.csv; give a folder" in report(tmp_path / "empty").err
    run = make("run")
    assert "each run is reported once, and" in report(run, tmp_path / "empty" / ".." / "run").err
    assert "the following arguments are required: runs" in report().err


@pytest.mark.parametrize(
    "output, message",
    [
        ("run/metrics.csv", "--output must end in .html, got "),
        ("none/page.html", "make it, or name a file in another"),
        ("folder.html", "is a folder; give the name of a file in it"),
    ],
)
def test_outputs_that_cannot_be(make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str], output: str, message: str) -> None:
    folder = make("run")
    (tmp_path / "folder.html").mkdir()
    assert main(["report", str(folder), "--output", str(tmp_path / output)]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert (folder / "metrics.csv").read_text() == metrics(8)


def test_an_output_that_cannot_be_written(make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The place of the draft is taken by a folder; the earlier report stays."""
    (tmp_path / "page.html").write_text("earlier")
    (tmp_path / "page.html.partial").mkdir()
    assert main(["report", str(make("run")), "--output", str(tmp_path / "page.html")]) == 2
    assert "page.html cannot be written (" in capsys.readouterr().err
    assert (tmp_path / "page.html").read_text() == "earlier"


# ---- a run of our own ----


def test_a_run_that_fit_wrote(report: Callable[..., Result], fit: Callable[..., Path]) -> None:
    folder = fit("data.dataset.validation_size=4", "samples.count=1", "samples.max_new_tokens=4")
    result = report(folder, "--json")
    (run,) = json.loads(result.out)["runs"]
    assert result.code == 0 and "warning" not in result.err
    assert run["steps"] == 5 and run["val_loss_first"] > run["val_loss_final"] > 0 and run["data_set"] == "rows"
    page = Page(result.page)
    assert page.row("LoRA rank r") == ["4"] and any(title.startswith("Held-out loss.") for title in page.titles)
