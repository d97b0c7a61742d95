"""What goes wrong in the middle of a run: nothing is lost, one line says what happened and how to go on, and the exit code is 2.

Every fault is made to happen: an infinite weight, more memory than there is, a killed process, a file cut under the run.
"""

import json
import multiprocessing
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from running import base_options, line_of, read_metrics
from safetensors.torch import load_file, save_file

from qlora_lightning.callbacks.out_of_memory import what_to_lower
from qlora_lightning.cli import main
from qlora_lightning.data.datamodule import InstructionDataModule
from qlora_lightning.modeling.tokenizer import load_tokenizer, tokenizer_digest
from qlora_lightning.module import QLoRAModule
from qlora_lightning.strategies.policy import MemoryPolicy

POISON = "Z"
"""A letter that no row of ``rows_file`` has, whose embedding is infinite in ``poisoned_base``."""


@pytest.fixture(scope="session")
def poisoned_base(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny base, in which one letter makes the loss of its row NaN."""
    folder = tmp_path_factory.mktemp("poisoned") / "base"
    shutil.copytree(tiny_base, folder)
    letter = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"][POISON]
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][letter] = torch.inf
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def poison(rows: Path, target: Path, *lines: int) -> Path:
    """``rows`` with the letter in these lines, counted from 1."""
    found = [json.loads(line) for line in rows.read_text().splitlines()]
    for line in lines:
        found[line - 1]["instruction"] = POISON + found[line - 1]["instruction"][1:]  # lengths, and so the plan, stay
    target.write_text("".join(json.dumps(row) + "\n" for row in found))
    return target


def saved(root: Path, step: int) -> dict[str, Any]:
    """The checkpoint of a step."""
    return dict(torch.load(root / "checkpoints" / f"step-{step:08d}.ckpt", weights_only=True))


EVERY_STEP = ("--checkpoint.every_n_steps", "1", "--checkpoint.keep", "100")


@pytest.mark.parametrize("layout", [(), ("--trainer.accumulate_grad_batches", "4"), ("--data.packing", "true")], ids=str)
def test_a_loss_that_is_no_number_stops_the_run_and_names_the_rows(
    poisoned_base: Path, rows_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], layout: tuple[str, ...]
) -> None:
    root, rows = tmp_path / "run", poison(rows_file, tmp_path / "rows.jsonl", 3)
    line = line_of(capsys, "fit", *base_options(poisoned_base, rows, root), *EVERY_STEP, *layout)
    (bad,) = json.loads((root / "nonfinite.json").read_text())["steps"]
    (in_step,) = bad["sets"]
    named = ", ".join(map(str, in_step["rows"]))
    assert line == (
        f"step {bad['step']} has loss nan and gradient norm nan; its rows are {named} of rows ({root}/nonfinite.json has all); no update "
        "was made of it and earlier checkpoints are whole: correct the rows, begin anew with a lower model.optimizer.learning_rate, or "
        "pass over such steps: --ckpt_path last --nonfinite.policy skip"
    )
    assert 3 in in_step["rows"] and len(in_step["rows"]) in (4, 2)
    assert bad["step"] > 1
    last = torch.load(root / "checkpoints" / "last.ckpt", weights_only=True)
    assert last["global_step"] == bad["step"] - 1
    assert all(value.isfinite().all() for value in last["state_dict"].values())


def test_a_skipped_step_leaves_weights_and_optimizer_as_they_are(
    poisoned_base: Path, rows_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same after a stop: the run goes on with the other policy."""
    root, rows = tmp_path / "run", poison(rows_file, tmp_path / "rows.jsonl", 3)
    options = ["fit", *base_options(poisoned_base, rows, root), *EVERY_STEP, "--model.optimizer.schedule", "linear"]
    options += ["--trainer.accumulate_grad_batches", "2"]
    line_of(capsys, *options)
    assert main([*options, "--ckpt_path", "last", "--nonfinite.policy", "skip"]) == 0
    (bad,) = json.loads((root / "nonfinite.json").read_text())["steps"]
    rows_of = ", ".join(map(str, bad["sets"][0]["rows"]))
    assert f"warning: step {bad['step']} has loss nan and gradient norm nan; its rows are {rows_of} of rows" in capsys.readouterr().err
    before, after = saved(root, bad["step"] - 1), saved(root, bad["step"])
    assert after["global_step"] == before["global_step"] + 1
    assert all(torch.equal(after["state_dict"][name], value) for name, value in before["state_dict"].items())
    (mine,), (theirs,) = before["optimizer_states"], after["optimizer_states"]
    assert theirs["param_groups"][0]["lr"] < mine["param_groups"][0]["lr"]  # the schedule goes on
    for number, state in mine["state"].items():
        assert all(torch.equal(theirs["state"][number][name], value) for name, value in state.items())
    final = saved(root, 6)
    assert final["optimizer_states"][0]["state"][0]["step"] == 5
    assert any(not torch.equal(final["state_dict"][name], value) for name, value in after["state_dict"].items())
    steps = [row for row in read_metrics(root) if row["train/loss"]]
    assert [float(row["train/skipped"]) for row in steps[bad["step"] - 1 :]] == [1.0] * (7 - bad["step"])
    assert [number for number, row in enumerate(steps, 1) if row["train/loss"] == "nan"] == [bad["step"]]


def test_a_run_that_skips_gives_up_where_no_step_is_finite(
    poisoned_base: Path, rows_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = poison(rows_file, tmp_path / "rows.jsonl", *range(1, 23))
    options = base_options(poisoned_base, rows, tmp_path / "run")
    line = line_of(capsys, "fit", *options, "--nonfinite.policy", "skip", "--nonfinite.patience", "2")
    assert line.startswith("step 3 has loss nan and gradient norm nan; its rows are ")
    assert "nonfinite.patience is 2 and so many steps before it were skipped" in line
    assert not (tmp_path / "run" / "checkpoints").exists()
    assert len(json.loads((tmp_path / "run" / "nonfinite.json").read_text())["steps"]) == 3


def test_rows_of_a_stream_are_named_where_a_loaders_process_reads_them(
    poisoned_base: Path, rows_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, rows = tmp_path / "run", poison(rows_file, tmp_path / "rows.jsonl", 3)
    streamed = ("--data.streaming", "true", "--trainer.max_steps", "9", "--trainer.max_epochs", "-1", "--data.num_workers", "1")
    line = line_of(capsys, "fit", *base_options(poisoned_base, rows, root), *streamed, "--data.dataset.validation_size", "2")
    assert "has loss nan" in line
    (bad,) = json.loads((root / "nonfinite.json").read_text())["steps"]
    assert 3 in bad["sets"][0]["rows"] and len(bad["sets"][0]["rows"]) == 4


def test_memory_that_is_out_in_a_step(
    fit: Callable[..., Path],
    tiny_base: Path,
    rows_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An allocation of 64 TiB, which no allocator grants, in the third step; then on with what the line says."""
    step, root = QLoRAModule.training_step, tmp_path / "run"

    def greedy(self: QLoRAModule, batch: Any, number: int) -> torch.Tensor:
        if self.trainer.global_step == 2:
            torch.empty(2**46, dtype=torch.uint8)
        return step(self, batch, number)

    options = ["fit", *base_options(tiny_base, rows_file, root), *EVERY_STEP]
    with monkeypatch.context() as patch:
        patch.setattr(QLoRAModule, "training_step", greedy)
        line = line_of(capsys, *options)
    assert line.startswith("out of memory in step 3: a microbatch of 4 rows x ")
    assert " tokens asked for 65,536.00 GiB, with " in line and " GiB in use at most, " in line
    assert "the same command goes on with --ckpt_path last and --trainer.accumulate_grad_batches 2 (2 examples at a time, same " in line
    assert torch.load(root / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 2
    assert main([*options, "--ckpt_path", "last", "--trainer.accumulate_grad_batches", "2"]) == 0
    whole = load_file(fit(folder="whole") / "checkpoints" / "last" / "adapter_model.safetensors")
    gone_on = load_file(root / "checkpoints" / "last" / "adapter_model.safetensors")
    assert all(torch.allclose(gone_on[name], value, rtol=1e-3, atol=1e-5) for name, value in whole.items())


@pytest.mark.parametrize(
    ("batch_size", "accumulate", "policy", "line"),
    [
        (
            12,
            4,
            MemoryPolicy(),
            "goes on with --ckpt_path last and --trainer.accumulate_grad_batches 6 (2 examples at a time, same results)",
        ),
        (16, 16, MemoryPolicy(), "goes on with --ckpt_path last and --trainer.strategy.init_args.gradient_checkpointing full; "),
        (
            16,
            16,
            MemoryPolicy(gradient_checkpointing="full"),
            "only a new run can use less: --data.dataset.max_length 512 or --trainer.str",
        ),
        (1, 1, MemoryPolicy(True, 8, "full"), "only a new run can use less: --data.dataset.max_length 512; the checkpoints stay"),
    ],
)
def test_what_to_lower_is_what_is_left_to_lower(batch_size: int, accumulate: int, policy: MemoryPolicy, line: str) -> None:
    assert line in what_to_lower(batch_size, accumulate, 1024, policy, gpu=True)


def test_held_out_rows_that_do_not_fit_name_their_own_batch_size(
    tiny_base: Path, rows_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(QLoRAModule, "validation_step", lambda self, batch, number: torch.empty(2**46, dtype=torch.uint8))
    options = base_options(tiny_base, rows_file, tmp_path / "run")
    line = line_of(capsys, "fit", *options, "--data.dataset.validation_size", "4", "--data.eval_batch_size", "4")
    assert line.startswith("out of memory while scoring 4 held-out rows x ") and line.endswith("; set --data.eval_batch_size 2")


def at_step(number: int, deed: Callable[[], object]) -> Callable[[QLoRAModule, Any, int], torch.Tensor]:
    """``training_step`` that does something first, at one step."""
    step = QLoRAModule.training_step

    def doing(self: QLoRAModule, batch: Any, batch_idx: int) -> torch.Tensor:
        if self.trainer.global_step == number:
            deed()
        return step(self, batch, batch_idx)

    return doing


def kill_children() -> None:
    """SIGKILL to every process that this one has started, as the kernel sends it when memory is out."""
    children = multiprocessing.active_children()
    assert children
    for child in children:
        child.kill()
        child.join()


@pytest.mark.parametrize("streamed", [False, True], ids=["prepared", "streamed"])
def test_a_loaders_process_that_is_killed(
    tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, streamed: bool
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"instruction": f"{n}", "output": "so"}) + "\n" for n in range(200)))
    options = ["fit", *base_options(tiny_base, rows, tmp_path / "run"), *EVERY_STEP, "--data.num_workers", "1"]
    options += ["--trainer.max_steps", "10", *(("--data.streaming", "true", "--trainer.max_epochs", "-1") if streamed else ())]
    with monkeypatch.context() as patch:
        patch.setattr(QLoRAModule, "training_step", at_step(3, kill_children))
        line = line_of(capsys, *options)
    assert line.removeprefix("a process that makes batches ").removeprefix("is killed by signal: Killed").removeprefix(
        "exited unexpectedly"  # where torch sees it first
    ) == (
        ", most often because the kernel ended it for lack of memory; checkpoints stay: free some memory or set --data.num_workers 0, "
        "and go on with the same command and --ckpt_path last"
    )
    last = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert 2 <= last["global_step"] < 10
    assert main([*options, "--ckpt_path", "last", "--data.num_workers", "0"]) == 0


def test_a_source_of_a_stream_that_changes_while_it_is_read(
    tiny_base: Path, rows_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row is added during the first pass; the second one does not begin. Put back, the run goes on, and an edit is refused."""
    rows = Path(shutil.copy(rows_file, tmp_path / "rows.jsonl"))
    size, row = rows.stat().st_size, '{"instruction": "a", "output": "b"}\n'
    options = ["fit", *base_options(tiny_base, rows, tmp_path / "run"), *EVERY_STEP]
    options += ["--data.streaming", "true", "--trainer.max_steps", "12", "--trainer.max_epochs", "-1"]
    with monkeypatch.context() as patch:
        patch.setattr(QLoRAModule, "training_step", at_step(2, lambda: rows.write_text(rows_file.read_text() + row)))
        line = line_of(capsys, *options)
    assert line == (
        f"{rows} was changed from {size:,} to {size + len(row):,} bytes while it was being read; put it back as it was and start again "
        "(a fit goes on with --ckpt_path last)"
    )
    at = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)["global_step"]
    assert 2 <= at <= 5  # no step of the second pass
    assert "training rows was streamed (" in line_of(capsys, *options, "--ckpt_path", "last")
    shutil.copy(rows_file, rows)
    assert main([*options, "--ckpt_path", "last"]) == 0


def test_prepared_rows_that_are_cut_under_a_run(
    fit: Callable[..., Path],
    tiny_base: Path,
    rows_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Removed they do no harm. Cut, without the look at the file, the process would end by SIGBUS."""
    monkeypatch.setenv("QLORA_LIGHTNING_CACHE", str(tmp_path / "cache"))
    options = ["fit", *base_options(tiny_base, rows_file, tmp_path / "run"), *EVERY_STEP]

    def cut() -> None:
        (file,) = (tmp_path / "cache").rglob("examples.arrow")
        os.truncate(file, file.stat().st_size - 8)  # within the last page, so that this process lives

    with monkeypatch.context() as patch:
        patch.setattr(QLoRAModule, "training_step", at_step(2, cut))
        line = line_of(capsys, *options)
    assert "examples.arrow, prepared rows that the run reads, was changed from " in line
    assert line.endswith(" bytes; they will be prepared anew: start again (a fit goes on with --ckpt_path last)")
    with monkeypatch.context() as patch:
        patch.setattr(QLoRAModule, "training_step", at_step(4, lambda: shutil.rmtree(tmp_path / "cache")))
        assert main([*options, "--ckpt_path", "last"]) == 0
    whole = load_file(fit(folder="whole") / "checkpoints" / "last" / "adapter_model.safetensors")
    gone_on = load_file(tmp_path / "run" / "checkpoints" / "last" / "adapter_model.safetensors")
    assert all(torch.equal(gone_on[name], value) for name, value in whole.items())


def test_a_validation_file_that_is_no_longer_what_was_prepared(
    tiny_base: Path, rows_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts of held-out rows are read from the file itself, after the rows were prepared."""
    heldout = Path(shutil.copy(rows_file, tmp_path / "heldout.jsonl"))
    conversations = InstructionDataModule.heldout_conversations

    def later(self: InstructionDataModule, n: int | None = None) -> Any:
        heldout.write_text(heldout.read_text().replace("Say", "Cry"))
        return conversations(self, n)

    monkeypatch.setattr(InstructionDataModule, "heldout_conversations", later)
    options = base_options(tiny_base, rows_file, tmp_path / "run")
    line = line_of(capsys, "fit", *options, "--data.dataset.validation_path", str(heldout), "--samples.count", "1")
    assert line.startswith(f"{heldout} was written to while it was being read; put it back as it was")


def test_an_adapter_and_a_base_whose_tokenizer_has_changed(
    fit: Callable[..., Path], tiny_base: Path, rows_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = fit("trainer.max_steps=1", folder="trained") / "checkpoints" / "last"
    base = tmp_path / "base"
    shutil.copytree(tiny_base, base)
    rules = json.loads((base / "tokenizer.json").read_text())
    vocabulary = rules["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (base / "tokenizer.json").write_text(json.dumps(rules))
    was, now = (tokenizer_digest(load_tokenizer(str(folder))) for folder in (tiny_base, base))
    expected = (
        f"{adapter} was trained with another tokenizer ({was}) than the base model has now ({now}); give the base that it was trained on, "
        f"or give this one its tokenizer back: {adapter}/tokenizer.json is a copy"
    )
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "Say 1."}\n')
    options = [*base_options(base, rows_file, tmp_path / "run"), "--data.dataset.validation_path", str(rows_file)]
    for command in (
        ["chat", str(adapter), "--base_model", str(base)],
        ["generate", str(prompts), str(tmp_path / "answers.jsonl"), "--adapter", str(adapter), "--base_model", str(base)],
        ["perplexity", str(rows_file), "--field", "output", "--adapter", str(adapter), "--base_model", str(base)],
        ["validate", *options, "--ckpt_path", str(adapter)],
        ["fit", *options, "--ckpt_path", str(adapter)],
    ):
        assert line_of(capsys, *command) == expected, command
    checkpoint = ["validate", *options, "--ckpt_path", str(adapter.with_suffix(".ckpt"))]
    assert line_of(capsys, *checkpoint).startswith(f"tokenizer was {was} in the run of the checkpoint and is {now} now")
    shutil.copy(adapter / "tokenizer.json", base / "tokenizer.json")
    assert main(["validate", *options, "--ckpt_path", str(adapter)]) == 0


def test_memory_that_is_out_is_said_where_cleaning_up_fails_too(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(arguments: list[str]) -> int:
        try:
            torch.empty(2**46, dtype=torch.uint8)
        finally:
            raise RuntimeError("can't start new thread")

    monkeypatch.setattr("qlora_lightning.cli._run", failing)
    line = line_of(capsys, "perplexity")
    assert line.startswith("out of memory (") and line.endswith("; free some, use a smaller base or batch, or a device that has more")


def test_debug_shows_what_a_line_stands_for(tiny_base: Path, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(QLoRAModule, "training_step", lambda self, batch, number: torch.empty(2**46, dtype=torch.uint8))
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        main(["fit", *base_options(tiny_base, rows_file, tmp_path / "run"), "--debug"])
