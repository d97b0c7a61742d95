"""``verify`` passes a sound setup, and of every fault that is planted the one check finds it that is there for it."""

import gc
import json
import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import START
from lightning.pytorch import Callback
from running import base_options, line_of
from torch import Tensor
from transformers import PreTrainedModel

from qlora_lightning import lightning_cli
from qlora_lightning.cli import main
from qlora_lightning.data import steps, tokenize
from qlora_lightning.data.collate import Collator
from qlora_lightning.fused import runner
from qlora_lightning.fused.budget import GIB, Budget
from qlora_lightning.fused.family import fuse
from qlora_lightning.kernels import reference
from qlora_lightning.modeling import adapters
from qlora_lightning.modeling.flat import FlatAdapter
from qlora_lightning.module import QLoRAModule
from qlora_lightning.strategies import QLoRAStrategy
from qlora_lightning.verification import Verification
from qlora_lightning.verify import ranks, subject
from qlora_lightning.verify.checks import CHECKS
from qlora_lightning.verify.outcome import Outcome

IN_PROCESS = [check for check in CHECKS if check != "ranks"]
Verify = Callable[..., dict[str, Outcome]]
Patch = pytest.MonkeyPatch


@pytest.fixture
def options(tiny_base: Path, rows_file: Path, tmp_path: Path) -> list[str]:
    """fp32, four rows a step, dropout: every check has something to see."""
    given = base_options(tiny_base, rows_file, tmp_path / "untouched")
    return [*given, "--model.lora.dropout=0.1", "--data.num_proc=1", "--trainer.accumulate_grad_batches=1"]


@pytest.fixture
def verify(options: list[str], tmp_path: Path) -> Verify:
    """Outcomes by check, of all that one process can make."""

    def run(*more: str, checks: list[str] = IN_PROCESS) -> dict[str, Outcome]:
        folder = tmp_path / "verification"
        folder.mkdir()
        outcomes = Verification([*options, f"--checks={','.join(checks)}", *more], folder, fresh=False).run()
        return {outcome.check: outcome for outcome in outcomes}

    return run


def verdicts(outcomes: dict[str, Outcome]) -> dict[str, str]:
    return {check: outcome.verdict for check, outcome in outcomes.items()}


def sound(but: str | None = None) -> dict[str, str]:
    """What is expected of a CPU, where one check may fail."""
    return {check: "failed" if check == but else "not here" if check == "fused" else "passed" for check in IN_PROCESS}


def test_a_sound_setup_passes(verify: Verify, tmp_path: Path) -> None:
    outcomes = verify()
    assert verdicts(outcomes) == sound()
    assert len(outcomes["accumulation"].measured) == 6  # accumulate 2 and 4, and the short step: gradient and loss of each
    assert any(one.difference > 0 for one in outcomes["accumulation"].measured)  # it was computed otherwise
    assert {one.bound.value for one in outcomes["resume"].measured} == {0.0}
    assert outcomes["fused"].note == "not on this device: the fused path needs a GPU"
    assert not (tmp_path / "untouched").exists()


@pytest.mark.parametrize(
    "more",
    [
        ("--model.compute=bf16", "--trainer.accumulate_grad_batches=2"),
        ("--data.packing=true", "--trainer.accumulate_grad_batches=4", "--rows=6"),
        ("--data.dataset.train_on_source=true", "--rows=3", "--model.lora.dropout=0.0"),
        ("--data.dataset.template=guanaco", "--rows=5"),
        ("--data.dataset.template=llama2", "--data.dataset.system_prompt=Be brief.", "--trainer.accumulate_grad_batches=2", "--rows=5"),
        ("--data.dataset.max_length=64", "--data.dataset.truncation=right", "--rows=22"),
    ],
    ids=["bf16", "packed", "trained on the prompts too", "guanaco", "llama2", "truncated"],
)
def test_other_sound_recipes_pass(verify: Verify, more: tuple[str, ...]) -> None:
    assert verdicts(verify(*more, checks=["labels", "accumulation", "packing"])) == dict.fromkeys(
        ["labels", "accumulation", "packing"], "passed"
    )


# ---- faults ----


def wrong_mask(patch: Patch) -> None:
    """The token before each answer is trained on too."""
    right = tokenize.answer_mask

    def wider(tokens: Any, spans: Any) -> Any:
        mask, straddling = right(tokens, spans)
        mask[:-1] |= mask[1:]
        return mask, straddling

    patch.setattr(tokenize, "answer_mask", wider)


def lost_end(patch: Patch) -> None:
    """End tokens are not trained on."""
    right = tokenize.answer_mask
    patch.setattr(tokenize, "answer_mask", lambda tokens, spans: right(tokens, [(start, end - len("<|im_end|>")) for start, end in spans]))


def unsaved_random_state(patch: Patch) -> None:
    patch.setattr(lightning_cli, "RandomState", Callback)


def lost_moments(patch: Patch) -> None:
    """Checkpoints hold the optimizer's settings, but not its state."""
    right = QLoRAStrategy.optimizer_state
    patch.setattr(QLoRAStrategy, "optimizer_state", lambda self, optimizer: right(self, optimizer) | {"state": {}})


def mean_of_means(patch: Patch) -> None:
    """Each microbatch counts alike, however many tokens it has."""

    def training_step(self: QLoRAModule, batch: dict[str, Any], batch_idx: int) -> Tensor:
        return self.cross_entropy_sum(batch) / batch["num_supervised"]

    patch.setattr(QLoRAModule, "training_step", training_step)


def leak_between_sequences(patch: Patch) -> None:
    """Positions run on through a packed row, so that a sequence sees those before it."""
    right = Collator.train

    def train(self: Collator, fetched: Any) -> Any:
        batch = right(self, fetched)
        if "position_ids" in batch:
            batch["position_ids"] = torch.arange(batch["input_ids"].shape[1]).expand_as(batch["input_ids"])
        return batch

    patch.setattr(Collator, "train", train)


def forgotten_dropout(patch: Patch) -> None:
    """Backward computes blocks again with other random numbers than forward."""
    right = PreTrainedModel.gradient_checkpointing_enable

    def enable(self: PreTrainedModel, options: dict[str, Any]) -> None:
        right(self, {**options, "preserve_rng_state": False})

    patch.setattr(PreTrainedModel, "gradient_checkpointing_enable", enable)


def another_alpha(patch: Patch) -> None:
    right = adapters.save_adapter

    def save(model: Any, folder: Path, metadata: dict[str, Any], card: str) -> None:
        right(model, folder, metadata, card)
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 2 * config["lora_alpha"]}))

    patch.setattr(adapters, "save_adapter", save)


@pytest.mark.parametrize(
    ("fault", "check"),
    [
        (wrong_mask, "labels"),
        (lost_end, "labels"),
        (unsaved_random_state, "resume"),
        (lost_moments, "resume"),
        (mean_of_means, "accumulation"),
        (leak_between_sequences, "packing"),
        (forgotten_dropout, "checkpointing"),
        (another_alpha, "reload"),
    ],
    ids=lambda one: getattr(one, "__name__", one),
)
def test_a_planted_fault_fails_its_check_and_no_other(
    fault: Callable[[Patch], None], check: str, verify: Verify, tmp_path: Path, monkeypatch: Patch
) -> None:
    monkeypatch.setenv("QLORA_LIGHTNING_CACHE", str(tmp_path / "cache"))  # wrongly prepared rows are for this test alone
    fault(monkeypatch)
    assert verdicts(verify()) == sound(but=check)


@pytest.fixture
def forked(monkeypatch: Patch) -> None:
    """The two ranks are forked from a process that has imported everything; a user's are fresh."""
    monkeypatch.setattr(ranks.processes, "spawn", partial(ranks.processes.start_processes, start_method=START))


@pytest.mark.slow
def test_two_ranks_make_the_step_of_one(verify: Verify) -> None:
    """With the processes that a user has."""
    outcome = verify("--trainer.accumulate_grad_batches=2", checks=["ranks"])["ranks"]
    assert (outcome.verdict, outcome.note) == ("passed", "4 rows on the recipe's base, in fp32 on the CPU")


@pytest.mark.slow
def test_two_ranks_take_a_smaller_base_in_place_of_a_large_one(verify: Verify, forked: None, monkeypatch: Patch) -> None:
    monkeypatch.setattr(ranks, "LARGEST", 1000)
    outcome = verify("--trainer.accumulate_grad_batches=2", checks=["ranks"])["ranks"]
    base = "a random model of the family with 2 layers, the base being too large"
    assert (outcome.verdict, outcome.note) == ("passed", f"4 rows on {base}, in fp32 on the CPU")


@pytest.mark.slow
def test_ranks_that_read_the_same_rows_fail_and_nothing_else_does(verify: Verify, forked: None, monkeypatch: Patch) -> None:
    right = steps.microbatches_of

    def of_rank_0(step: Any, lengths: Any, targets: Any, shape: steps.StepShape) -> Any:
        return right(step, lengths, targets, replace(shape, rank=0))

    monkeypatch.setattr(subject, "microbatches_of", of_rank_0)
    assert verdicts(verify(checks=[*IN_PROCESS, "ranks"])) == sound() | {"ranks": "failed"}


# ---- the fused path, with plain torch for kernels ----


class Replay:
    """Stands for a captured graph."""

    def __init__(self, replay: Callable[[], None]) -> None:
        self.replay = replay


def fused_on_cpu(patch: Patch, fault: float) -> None:
    """Let training take the fused path, and what stands for its graphs give gradients that are too large by ``fault``."""

    def make(model: Any, flat: FlatAdapter, policy: Any, device: torch.device, dtype: torch.dtype, *_: Any) -> runner.Runner:
        made = runner.Runner(fuse(model, flat, reference, dtype, 4096), flat, policy, state_bytes=0, graphs=True)
        made.planner._budget = Budget(24 * GIB, 4 * GIB)
        return made

    def capture(self: runner.Runner, place: runner.Place, shape: Any) -> runner.Graphs:
        states: list[Any] = []
        graphs: Any = runner.Graphs(None, None, torch.zeros(()), torch.ones(()))  # type: ignore[arg-type]

        def forward() -> None:
            states[:] = [self.decoder.forward(place.tokens, place.rungs)]
            graphs.loss.copy_(states[0].losses.sum())

        graphs.forward = Replay(forward)
        graphs.backward = Replay(lambda: self.decoder.backward(states[0], place.tokens, graphs.scale * (1 + fault)))
        self._pool = object()
        return graphs

    for place in ("module", "verify.subject"):
        patch.setattr(f"qlora_lightning.{place}.fused_runner", make)
    patch.setattr(runner.Runner, "_capture", capture)
    patch.setattr(torch.cuda, "synchronize", lambda _: None)
    patch.setattr(torch.cuda, "empty_cache", lambda: None)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("checks", [["fused"], ["resume", "fused"]], ids=str)
def test_graphs_that_compute_otherwise_fail_the_fused_check(verify: Verify, monkeypatch: Patch, dropout: float, checks: list[str]) -> None:
    """Also where every shape of the step has run before, as in the fits of ``resume``: the eager step is one."""
    fused_on_cpu(monkeypatch, fault=1e-6)
    found = verify(f"--model.lora.dropout={dropout}", checks=checks)["fused"]
    graphs, loss = found.measured[-2:]
    assert graphs.what == "graphs = eager: gradient" and 0 < graphs.difference < 1e-5 and not graphs.within
    assert loss.within and all(one.within for one in found.measured[:-2])


# ---- what a check leaves behind ----


def test_the_state_of_the_first_fit_is_gone_before_the_second(options: list[str], tmp_path: Path, monkeypatch: Patch) -> None:
    """Where memory is short, the second needs its room."""
    left: list[Any] = []

    def look(self: Verification, root: Path, checkpoint: Path) -> None:
        gc.collect()
        left.extend(one for one in gc.get_objects() if isinstance(one, torch.optim.Optimizer) and one.state)
        raise KeyboardInterrupt

    monkeypatch.setattr(Verification, "_in_this_process", look)
    with pytest.raises(KeyboardInterrupt):
        Verification([*options, "--checks=resume"], tmp_path, fresh=False).run()
    assert left == []


def test_roundings_that_differ_are_measured_and_taken_back(options: list[str], tmp_path: Path) -> None:
    subject = Verification([*options, "--model.compute=bf16"], tmp_path)._subject()
    before = subject.module.flat.parameter.detach().clone()
    gradient, loss = subject.jitter
    assert 1e-3 < gradient < 0.1 and 0 < loss < 1e-3
    assert torch.equal(subject.module.flat.parameter, before)
    assert subject.kernels_bounds[0].value >= 2 * gradient and subject.kernels_bounds[1].value >= 2 * loss


# ---- on a GPU ----

GPU = ("--trainer.accelerator=gpu", "--model.compute=bf16")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, found none")


@pytest.mark.gpu
@needs_gpu
def test_a_sound_setup_passes_on_the_fused_path(verify: Verify) -> None:
    outcomes = verify(*GPU)
    assert verdicts(outcomes) == dict.fromkeys(IN_PROCESS, "passed")
    assert [one.bound.value for one in outcomes["checkpointing"].measured] == [0.0] * 4  # full and auto, bit for bit
    assert [one.bound.value for one in outcomes["fused"].measured][-2:] == [0.0, 0.0]  # graphs = eager


@pytest.mark.gpu
@needs_gpu
def test_another_norm_in_the_fused_path_fails_the_fused_check(verify: Verify, monkeypatch: Patch) -> None:
    right = fuse
    monkeypatch.setattr("qlora_lightning.fused.start.fuse", lambda *given: replace(decoder := right(*given), eps=decoder.eps + 0.1))
    assert verdicts(verify(*GPU)) == dict.fromkeys(IN_PROCESS, "passed") | {"fused": "failed"}


# ---- the command ----


@pytest.mark.slow
def test_the_command_resumes_in_a_new_process_and_prints_one_document(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", *options, "--checks", "resume,fused", "--json", "--rows", "4"]) == 0
    document = json.loads(capsys.readouterr().out)
    resume, fused = document["checks"]
    assert document["passed"] and document["examples"] == 4 and not document["fused"]
    assert resume["verdict"] == "passed" and resume["note"] == "resumed in a new process"
    assert [(one["what"], one["difference"]) for one in resume["measured"]] == [
        ("loss of steps 3 to 4", 0.0),
        ("grad_norm of steps 3 to 4", 0.0),
        ("adapter at the end", 0.0),
        ("optimizer's state at the end", 0.0),
    ]
    assert fused["verdict"] == "not here" and fused["measured"] == []


def test_a_failed_check_ends_with_exit_code_2_and_says_which(
    options: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: Patch
) -> None:
    mean_of_means(monkeypatch)
    assert main(["verify", *options, "--checks", "labels,accumulation", "--json"]) == 2
    out, error = capsys.readouterr()
    document = json.loads(out)
    assert not document["passed"] and [one["verdict"] for one in document["checks"]] == ["passed", "failed"]
    assert "verify: accumulation failed" in error.splitlines()[-1]


@pytest.mark.parametrize(
    ("more", "line"),
    [
        (("--checks", "packin"), "--checks must name some of labels, resume, accumulation, .*; got 'packin', nearest is packing"),
        (("--rows", "0"), "--rows must be 1 or more, got 0"),
        (("--model.lora.rank", "4"), "unknown option model.lora.rank"),
        (("--ckpt_path", "nowhere"), "--ckpt_path nowhere: there is no nowhere"),
    ],
)
def test_mistakes_are_one_line(options: list[str], capsys: pytest.CaptureFixture[str], more: tuple[str, ...], line: str) -> None:
    assert re.match(line, line_of(capsys, "verify", *options, *more))
