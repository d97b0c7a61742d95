"""``plan`` from the command line: nothing of a run is made, what cannot work ends with exit code 2, and measuring confirms the plan."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from byte_tokenizer import build_tokenizer
from running import base_options, line_of
from transformers import LlamaConfig

from qlora_lightning.cli import main

Plan = Callable[..., list[str]]


@pytest.fixture
def command(tiny_base: Path, rows_file: Path, tmp_path: Path) -> Plan:
    """The command ``plan`` on the tiny base, for a GPU unless it is None; options are ``name=value`` strings, or names of switches."""

    def options(*more: str, base: Path = tiny_base, gib: float | None = 24) -> list[str]:
        more = more if gib is None else (f"gpu-gib={gib}", "model.compute=auto", *more)
        rest = [part for option in more for part in (f"--{option}".split("=", 1) if "=" in option else [f"--{option}"])]
        return ["plan", *base_options(base, rows_file, tmp_path / "run"), *rest]

    return options


def document(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    """What ``--json`` prints: one document, alone on standard output."""
    assert main([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_steps_tokens_and_memory_without_weights(
    command: Plan, tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder with config.json and tokenizer alone."""
    folder = tmp_path / "base"
    shutil.copytree(tiny_base, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    plan = document(capsys, *command(base=folder, gib=None))
    assert plan["steps"] == 6 and plan["fits"] and not plan["problems"]
    assert plan["longest_microbatch"]["rows"] == 4 and plan["longest_microbatch"]["known"]
    assert [one["device"] for one in plan["memory"]] == [
        "this machine's CPU",
        *(f"a GPU of {gib} GiB" for gib in (24, 48, 80, 141)),
    ]
    linear = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128)
    assert plan["memory"][0]["parts"]["linear layers, 4 bits"] == linear // 2
    assert not (tmp_path / "run").exists()


def test_tokens_are_those_of_all_steps(command: Plan, capsys: pytest.CaptureFixture[str]) -> None:
    """An epoch counts each example once; a run that ends earlier only what it sees, the longest step first."""
    epoch, twice = (document(capsys, *command(f"trainer.max_epochs={epochs}")) for epochs in (1, 2))
    assert twice["tokens"] == 2 * epoch["tokens"] and twice["supervised_tokens"] == 2 * epoch["supervised_tokens"]
    one = document(capsys, *command("trainer.max_steps=1"))
    assert 4 / 22 < one["tokens"] / epoch["tokens"] < 1 / 2


def test_the_plan_for_a_gpu_that_is_not_here(command: Plan, capsys: pytest.CaptureFixture[str]) -> None:
    plan = document(capsys, *command("trainer.strategy.optimizer_bits=8"))
    (memory,) = plan["memory"]
    assert memory["fused"] and memory["fits"] and memory["modes"]["auto"]["blocks"] == "2 keep everything"
    assert "optimizer's state, 8 bits, paged" in memory["parts"]
    assert plan["run"]["device"] == "a GPU of 24 GiB, computing in bfloat16"
    assert plan["seconds_estimated"] is None


def test_what_does_not_fit_ends_with_a_change_that_does(tmp_path: Path, command: Plan, capsys: pytest.CaptureFixture[str]) -> None:
    """7B's shape: four rows of some hundred tokens are too much for 5.6 GiB, with everything kept."""
    folder = tmp_path / "7b"
    LlamaConfig(hidden_size=4096, intermediate_size=11008, num_attention_heads=32, max_position_embeddings=2048).save_pretrained(folder)
    build_tokenizer(folder)
    options = command("trainer.strategy.gradient_checkpointing=none", base=folder, gib=5.6)
    assert main([*options, "--json"]) == 2
    said = capsys.readouterr()
    plan = json.loads(said.out)
    assert not plan["fits"]
    change = plan["changes"][0]["options"]
    assert change == {"trainer.strategy.init_args.gradient_checkpointing": "auto"}
    line = said.err.strip().splitlines()[-1]
    assert "a GPU of 5.6 GiB has" in line and "--trainer.strategy.init_args.gradient_checkpointing auto" in line
    assert main([*options, "--trainer.strategy.gradient_checkpointing", "auto"]) == 0


@pytest.mark.parametrize(
    "option, line",
    [
        ("model.optimizer.warmup_steps=6", "warmup_steps must be below the run's 6 steps, got 6"),
        ("data.dataset.max_length=600", "examples must fit the base model's 512 positions, but data.dataset.max_length is 600"),
        ("model.lora.r=40", "model.lora.r must not be above a layer's smaller side, got 40"),
        ("model.lora.target_modules=[c_attn]", "model.lora.target_modules must name layers of"),
        ("trainer.accumulate_grad_batches=3", "got 3; use one of 1, 2, 4"),
        ("data.dataset.template=tokenizer", "tokenizer"),
        ("gpu-gib=0", "--gpu-gib must be above 0, got 0"),
        ("gpu-gib=0.2", "it needs a GPU of 1 GiB or a smaller base model"),
    ],
)
def test_what_cannot_work_is_one_line(command: Plan, option: str, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert line in line_of(capsys, *command(option))


def test_disk_that_is_too_small_is_a_problem(command: Plan, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    assert "checkpoints need" in line_of(capsys, *command())


def test_measuring_confirms_the_plan(command: Plan, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Real steps of the tiny model: what is held has the planned bytes, and nothing stays behind."""
    plan = document(
        capsys, *command("measure", "trainer.accumulate_grad_batches=2", "samples.count=1", "data.dataset.validation_size=2", gib=None)
    )
    measured = plan["measured"]
    weights, adapter, gradient, state, peak = measured["figures"]
    for figure in (weights, adapter, gradient):
        assert figure["measured"] == figure["planned"]
    assert state["measured"] - state["planned"] == 4  # torch's count of steps
    assert peak["within"] is None  # a process's memory is more than tensors
    assert measured["tokens_per_second"] > 0 and measured["save_seconds"] > 0 and measured["reload_seconds"] > 0
    assert measured["checkpoint"] == pytest.approx(plan["disk"]["checkpoint"], rel=0.5)
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_work_is_not_measured(command: Plan, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A step without room would end before the plan has said so."""
    monkeypatch.setattr("qlora_lightning.planning.measure", None)
    assert "warmup_steps must be below" in line_of(capsys, *command("measure", "model.optimizer.warmup_steps=6", gib=None))


def test_a_stream_is_planned_by_its_limits(command: Plan, capsys: pytest.CaptureFixture[str]) -> None:
    plan = document(capsys, *command("data.streaming=true", "trainer.max_steps=4", "data.dataset.max_length=100"))
    assert plan["longest_microbatch"] == {"rows": 4, "tokens_a_row": 100, "known": False}
    assert plan["tokens"] is None and plan["steps"] == 4


def test_help_lists_its_own_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--help"]) == 0
    said = capsys.readouterr().out
    assert all(name in said for name in ("--gpu-gib", "--measure", "--json", "qlora-lightning plan"))


def test_a_fit_says_its_memory_before_it_loads(fit: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    fit("trainer.max_steps=1")
    said = capsys.readouterr().err
    assert "memory before a step" in said and said.index("longest microbatch") < said.index("Loading")
