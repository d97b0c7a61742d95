"""Evaluation on two ranks: every row once, the metrics of one rank, each file written once; and what is wrong is seen."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from exams import SUBJECTS, write_exam
from running import read_metrics
from starting import Ranks, ddp_options, fit

from qlora_lightning.data.shares import share_of

# ---- whose rows are whose ----


@pytest.mark.parametrize("rows", [1, 3, 4, 5, 7, 8, 9, 22])
@pytest.mark.parametrize("ranks", [2, 3, 5])
def test_every_row_counts_once_in_the_batch_that_one_rank_would_make(rows: int, ranks: int) -> None:
    shares = [share_of(rows, 4, rank, ranks) for rank in range(ranks)]
    counted = [share.rows[: share.counted] for share in shares]
    assert sorted(row for part in counted for row in part) == list(range(rows))
    batches = [part[start : start + 4] for part in counted for start in range(0, len(part), 4)]
    assert {tuple(range(start, min(start + 4, rows))) for start in range(0, rows, 4)} == set(batches)
    assert len({-(-len(share.rows) // 4) for share in shares}) == 1  # as many batches for each


@pytest.mark.parametrize("limit", [1, 2, 3, 0.3, 0.5, 0.7, 1.0])
def test_a_limit_of_batches_is_of_all_ranks_together(limit: float) -> None:
    """The trainer takes its limit of each rank's loader; what is counted then are the rows that one rank would read."""
    whole = 6  # batches of two rows
    wanted = int(whole * limit) if isinstance(limit, float) else limit
    read: list[int] = []
    for rank in range(4):
        share = share_of(2 * whole, 2, rank, 4, limit)
        length = len(share.rows) // 2
        stops = int(length * limit) if isinstance(limit, float) else min(length, limit)
        assert stops == -(-wanted // 4)
        read += [row for index, row in enumerate(share.rows[: 2 * stops]) if share.counts(index)]
    assert sorted(read) == list(range(2 * wanted))


# ---- two ranks ----

HELDOUT = "data.dataset.validation_size=7", "data.eval_batch_size=2"


def evaluated(command: list[str], fault: str | None = None) -> tuple[str, int, dict[str, float]]:
    """In a rank: what a command prints, its exit code, and the metrics that this rank has; with a fault where one is named."""
    import contextlib
    import io

    from lightning.pytorch import Trainer
    from lightning.pytorch.strategies import SingleDeviceStrategy

    from qlora_lightning.data.shares import Share
    from qlora_lightning.module import QLoRAModule
    from qlora_lightning.strategies import QLoRADDPStrategy

    seen: dict[str, float] = {}
    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out):
        right = QLoRAModule._log_validation

        def noted(self: Any, stage: str) -> None:
            right(self, stage)
            trainer: Trainer = self.trainer
            seen.update({name: float(value) for name, value in trainer.callback_metrics.items()})

        patch.setattr(QLoRAModule, "_log_validation", noted)
        if fault == "a row counted twice":
            patch.setattr(Share, "counts", lambda self, index: True)
        if fault == "a rank's sums missing":
            patch.setattr(QLoRADDPStrategy, "reduce", SingleDeviceStrategy.reduce)
        code = fit(command).code
    return out.getvalue(), code, seen


def on(ranks: int, command: str, base: Path, rows: Path, root: Path, *options: str) -> list[str]:
    return [command, *ddp_options(ranks, base, rows, root, *options)[1:]]


@pytest.fixture(scope="module")
def alone(tiny_base: Path, rows_file: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    """What validate measures on one rank."""
    printed, code, _ = evaluated([*on(1, "validate", tiny_base, rows_file, tmp_path_factory.mktemp("alone"), *HELDOUT), "--json"])
    assert code == 0
    found: dict[str, float] = json.loads(printed)
    return found


@pytest.mark.parametrize("command", ["validate", "test"])
def test_metrics_are_those_of_one_rank_on_every_rank_and_printed_once(
    two_ranks: Ranks, tiny_base: Path, rows_file: Path, tmp_path: Path, alone: dict[str, float], command: str
) -> None:
    """Seven rows in batches of two: the fourth batch is rank 1's and short."""
    first, second = two_ranks.run(evaluated, [*on(2, command, tiny_base, rows_file, tmp_path, *HELDOUT), "--json"])
    assert first[1] == second[1] == 0
    assert second[0] == ""
    stage = {"validate": "val", "test": "test"}[command]
    expected = {name.replace("val/", f"{stage}/"): value for name, value in alone.items()}
    assert json.loads(first[0]) == expected  # to the bit: each row in the same batch, sums in float64
    assert first[2] == second[2] == expected


def test_what_is_wrong_is_seen(two_ranks: Ranks, tiny_base: Path, rows_file: Path, tmp_path: Path) -> None:
    """Five rows of seven in three batches, so that one of them comes again to keep a rank in time."""
    few = [option.replace("=7", "=5") for option in HELDOUT]
    command = [*on(2, "validate", tiny_base, rows_file, tmp_path, *few), "--json"]
    first = [two_ranks.run(evaluated, command, fault)[0] for fault in (None, "a row counted twice", "a rank's sums missing")]
    right, *wrong = (json.loads(printed)["val/loss"] for printed, *_ in first)
    assert all(one != pytest.approx(right, rel=1e-6) for one in wrong)


PREDICTING = *(option.replace("=7", "=5") for option in HELDOUT), "generation.max_new_tokens=4", "generation.temperature=0.7"


@pytest.fixture(scope="module")
def predicted(tiny_base: Path, rows_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of one rank's predictions."""
    root = tmp_path_factory.mktemp("predicted") / "run"
    assert fit(on(1, "predict", tiny_base, rows_file, root, *PREDICTING)).code == 0
    return root


@pytest.mark.parametrize("strategy", ["qlora_ddp", "qlora_fsdp2"])
def test_predictions_are_in_one_file_each_row_once_in_order(
    two_ranks: Ranks, tiny_base: Path, rows_file: Path, tmp_path: Path, predicted: Path, strategy: str
) -> None:
    one, two = predicted, tmp_path / "two"
    (two / "predictions.jsonl.part-1").parent.mkdir()
    (two / "predictions.jsonl.part-1").write_text("of an earlier start that was killed\n")
    ended = two_ranks.run(fit, on(2, "predict", tiny_base, rows_file, two, *PREDICTING, f"trainer.strategy={strategy}"))
    assert [each.code for each in ended] == [0, 0]
    assert (two / "predictions.jsonl").read_text() == (one / "predictions.jsonl").read_text()
    assert len((one / "predictions.jsonl").read_text().splitlines()) == 5
    assert [file.name for file in two.iterdir()] == ["predictions.jsonl"]
    assert "5 answers" in ended[0].err and "5 answers" not in ended[1].err


@pytest.fixture(scope="module")
def evaluating(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Options of a fit that evaluates all that can be evaluated."""
    exam = write_exam(tmp_path_factory.mktemp("exam"), questions=3)
    asked = f"mmlu.path={exam}", f"mmlu.subjects={','.join(SUBJECTS)}", "mmlu.shots=1", "mmlu.every_n_steps=2"
    return *HELDOUT, *asked, "samples.count=5", "samples.max_new_tokens=4", "trainer.max_steps=3", "validation.every_n_steps=2"


@pytest.fixture(scope="module")
def fitted(tiny_base: Path, rows_file: Path, evaluating: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of that fit on one rank."""
    root = tmp_path_factory.mktemp("fitted") / "run"
    assert fit(ddp_options(1, tiny_base, rows_file, root, *evaluating)).code == 0
    return root


@pytest.mark.parametrize("strategy", ["qlora_ddp", "qlora_fsdp2"])
def test_a_fit_evaluates_as_on_one_rank(
    two_ranks: Ranks, tiny_base: Path, rows_file: Path, tmp_path: Path, fitted: Path, evaluating: tuple[str, ...], strategy: str
) -> None:
    """Held-out loss, MMLU and samples while a model learns; every row of metrics.csv once."""
    roots = [fitted, tmp_path / "two"]
    ended = two_ranks.run(fit, ddp_options(2, tiny_base, rows_file, roots[1], *evaluating, f"trainer.strategy={strategy}"))
    assert [each.code for each in ended] == [0, 0], ended[0].err + ended[1].err
    one, two = map(read_metrics, roots)
    compared = [name for name in one[0] if name.startswith(("val/", "mmlu/", "train/loss"))]
    assert {"val/loss", "mmlu/accuracy"} < set(compared)
    assert len(one) == len(two) == len({json.dumps(row) for row in two})
    for mine, other in zip(one, two, strict=True):
        assert mine["step"] == other["step"]
        found, expected = ([float(row[name] or "nan") for name in compared] for row in (other, mine))
        assert found == pytest.approx(expected, rel=1e-5, nan_ok=True)
    assert [file.name for file in sorted((roots[1] / "mmlu").iterdir())] == ["step-000002.json", "step-000003.json"]
    samples = [[json.loads(line) for line in (root / "samples.jsonl").read_text().splitlines()] for root in roots]
    assert [row["prompt"] for row in samples[0]] == [row["prompt"] for row in samples[1]]
    assert samples[0][:5] == samples[1][:5]  # of the untrained model
    assert Counter(row["step"] for row in samples[1]) == {0: 5, 3: 5}
    said = "Answering 5 held-out prompts before training", "MMLU after step 2"
    assert all(line in ended[0].err and line not in ended[1].err for line in said)
