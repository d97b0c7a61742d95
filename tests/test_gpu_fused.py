"""Proofs that only a GPU can give of the fused path; run by hand: pytest -m gpu tests/test_gpu_fused.py.

Gradients against fp32 with the same weights, equal bits where they are promised, memory within its budget, and whole runs beside unfused
ones. benchmarks/gradients.py, whose functions are used here, prints the table of what the first test checks.
"""

import gc
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, cosine, packed, rows
from running import base_options, line_of, read_metrics
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaConfig

from qlora_lightning.fused import block
from qlora_lightning.fused.budget import GIB
from qlora_lightning.fused.rungs import Rung
from qlora_lightning.fused.runner import Runner
from qlora_lightning.fused.start import fused_runner
from qlora_lightning.optim import OptimizerSpec, build_optimizer
from qlora_lightning.strategies.policy import MemoryPolicy

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import gradients
from gradients import LAYOUTS, LENGTHS, RUNGS, Case, Result, build, decoder_of, error, on, runner_on, same_bits, wider

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, found none"),
]
needs_fp8 = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9), reason="needs a GPU of compute capability 8.9 or more"
)
DEVICE = torch.device("cuda", 0)
GPU_FIT = (
    "trainer.accelerator=gpu",
    "model.compute=bf16",
    "model.optimizer.learning_rate=0.001",
    "trainer.max_epochs=3",  # 18 steps of a few shapes: most of them from graphs
)


@dataclass(frozen=True)
class Proof:
    """A microbatch, its exact gradient, and that of transformers and PEFT."""

    batch: dict[str, Any]
    exact: Result
    unfused: Result


@dataclass(frozen=True)
class Proven:
    """A family's model, and a proof for each layout of its tokens."""

    case: Case
    proofs: dict[str, Proof]


@pytest.fixture(scope="module", params=FAMILIES)
def proven(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proven]:
    case = build(wider(FAMILIES[request.param]), tmp_path_factory.mktemp("base"), DEVICE)
    exactly = gradients.Exact(case)
    batches = {name: on(make(LENGTHS["small"]), DEVICE) for name, make in LAYOUTS.items()}
    yield Proven(case, {name: Proof(one, exactly.result(one), gradients.unfused(case, one)) for name, one in batches.items()})


@pytest.mark.parametrize("rungs", RUNGS.values(), ids=RUNGS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_are_as_near_to_exact_ones_as_those_of_transformers_and_peft(proven: Proven, layout: str, rungs: list[Rung]) -> None:
    """The first microbatch runs eagerly, the third is launched as graphs."""
    proof = proven.proofs[layout]
    runner = runner_on(rungs, decoder_of(proven.case), proven.case.flat)
    eager, _, captured = (gradients.fused(runner, proof.batch) for _ in range(3))
    allowed = error(proof.unfused.gradient, proof.exact.gradient)
    for result in (eager, captured):
        assert float(result.loss) == pytest.approx(float(proof.exact.loss), rel=1e-3)
        assert cosine(result.gradient, proof.exact.gradient) > 0.9999
        assert error(result.gradient, proof.exact.gradient) <= 1.2 * allowed


@needs_fp8
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_in_fp8_are_near(proven: Proven, layout: str) -> None:
    proof = proven.proofs[layout]
    runner = runner_on(RUNGS["mixed"], decoder_of(proven.case, fp8=True), proven.case.flat)
    eager, _, captured = (gradients.fused(runner, proof.batch) for _ in range(3))
    assert same_bits(eager, captured)
    assert float(captured.loss) == pytest.approx(float(proof.exact.loss), rel=0.02)
    assert error(captured.gradient, proof.exact.gradient) > 2 * error(proof.unfused.gradient, proof.exact.gradient)  # it was in e4m3
    assert cosine(captured.gradient, proof.exact.gradient) > 0.97


# ---- equal bits ----


@pytest.fixture(scope="module", params=["qwen3 with norms of heads", "mistral with a window", "qwen2 with biases"])
def dropping(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    """A family with dropout."""
    return build(wider(FAMILIES[request.param]), tmp_path_factory.mktemp("base"), DEVICE, dropout=0.1)


def seeded(runner: Runner, batch: dict[str, Any], seed: int = 7) -> Result:
    """A microbatch whose masks are those of ``seed``."""
    torch.manual_seed(seed)
    return gradients.fused(runner, batch)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_graphs_and_every_rung_give_the_same_bits_under_dropout(dropping: Case, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block, "MLP_TILE", 200)  # 768 or 512 tokens: tiles of which the last is shorter
    batch, decoder = on(LAYOUTS[layout](LENGTHS["small"]), DEVICE), decoder_of(dropping)
    runners = {name: runner_on(rungs, decoder, dropping.flat) for name, rungs in RUNGS.items()}
    expected = seeded(runners["none"], batch)
    for name, runner in runners.items():
        for call in range(3):
            assert same_bits(seeded(runner, batch), expected), (name, call)
        assert not torch.equal(seeded(runner, batch, seed=8).gradient, expected.gradient)


def turns() -> list[list[dict[str, Any]]]:
    """Microbatches of six steps: rows of 64 to 600 tokens and packed ones, each shape new, coming again to be captured, or captured."""
    widths = [(600, 64), (320, 600), (64, 0), (600, 64), (0, 600), (320, 0)]
    return [[_turn(width, 10 * step + place) for place, width in enumerate(pair)] for step, pair in enumerate(widths)]


def _turn(width: int, seed: int) -> dict[str, Any]:
    """Four rows of ``width`` tokens at most; 0 is packed sequences."""
    batch = packed([300, 64, 129, 33], seed) if width == 0 else rows([width, width * 3 // 4, width // 2, width // 3], width, seed)
    return on(batch, DEVICE)


def trained(case: Case, runner: Runner) -> tuple[Tensor, Tensor]:
    """Six optimizer steps from where the adapter stands, which is put back: the losses, and the adapter behind them."""
    start = case.flat.parameter.detach().clone()
    optimizer = build_optimizer(case.flat.pieces, OptimizerSpec(learning_rate=1e-3), MemoryPolicy(), DEVICE)
    torch.manual_seed(3)
    losses = []
    case.flat.zero_grad()
    for microbatches in turns():
        for batch in microbatches:
            loss = runner.cross_entropy_sum(batch) / 1000
            loss.backward()
            losses.append(loss.detach())
        torch.nn.utils.clip_grads_with_norm_([case.flat.parameter], 0.3, case.flat.gradient_norm())
        optimizer.step()
        case.flat.zero_grad()
    end = case.flat.parameter.detach().clone()
    case.flat.parameter.data.copy_(start)
    return torch.stack(losses), end


def test_runs_are_equal_to_the_bit_with_graphs_and_without(dropping: Case) -> None:
    decoder = decoder_of(dropping)
    first, second, eager = (trained(dropping, runner_on(RUNGS["mixed"], decoder, dropping.flat, graphs)) for graphs in (True, True, False))
    assert len(first[0]) == 12 and not torch.equal(first[1], dropping.flat.parameter)
    for other in (second, eager):
        assert torch.equal(first[0], other[0])
        assert torch.equal(first[1], other[1])


@pytest.mark.parametrize("rungs", [RUNGS["full"], [Rung.INPUT, Rung.INPUT, Rung.ATTENTION, Rung.ALL]], ids=["full", "some"])
def test_inputs_on_the_host_change_no_bit(dropping: Case, rungs: Sequence[Rung]) -> None:
    """Several shapes in turn, so that host memory is asked for anew and copies of one microbatch meet the next one's."""
    decoder = decoder_of(dropping)
    kept, offloaded = (trained(dropping, runner_on(rungs, decoder, dropping.flat, offload=offload)) for offload in (False, True))
    assert torch.equal(kept[0], offloaded[0])
    assert torch.equal(kept[1], offloaded[1])


# ---- memory ----


@pytest.fixture
def large(tmp_path: Path) -> Case:
    """0.5 billion random weights, of whose activations 8,192 tokens keep 0.3 to 2.8 GiB."""
    config = LlamaConfig(hidden_size=2048, intermediate_size=5632, num_hidden_layers=8, num_attention_heads=16, vocab_size=32000)
    return build(config, tmp_path, DEVICE)


@pytest.mark.parametrize("budget_gib", [3.0, 3.5])
@pytest.mark.parametrize("widths", [(512,) * 4, (512, 512, 256, 256, 384, 448, 384, 512)], ids=["one shape", "several"])
def test_auto_stays_within_its_budget(large: Case, budget_gib: float, widths: tuple[int, ...], capsys: pytest.CaptureFixture[str]) -> None:
    """What torch reserves for graphs and for eager steps together, on budgets that do not hold every activation."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    policy = MemoryPolicy(gradient_checkpointing="auto", memory_budget_gib=budget_gib)
    runner = fused_runner(large.model, large.flat, policy, DEVICE, torch.bfloat16)
    assert runner is not None
    optimizer = build_optimizer(large.flat.pieces, OptimizerSpec(), policy, DEVICE)
    for step, width in enumerate(widths):
        runner.cross_entropy_sum(on(rows([width] * 16, width, step), DEVICE)).backward()
        optimizer.step()
        large.flat.zero_grad()
    planned = [line for line in capsys.readouterr().err.splitlines() if line.startswith("8,192 tokens a microbatch")]
    assert planned and not any("8 keep everything" in line for line in planned)
    peak = torch.cuda.max_memory_reserved() / GIB
    assert peak <= budget_gib, f"{peak:.2f} GiB reserved; {planned}"


# ---- whole runs by the command line ----


def stream(root: Path) -> list[tuple[str, str, str]]:
    """Step, loss and gradient norm as written, to the last digit."""
    return [(row["step"], row["train/loss"], row["train/grad_norm"]) for row in read_metrics(root) if row["train/loss"]]


def losses(root: Path) -> list[float]:
    return [float(loss) for _, loss, _ in stream(root)]


def adapter(root: Path) -> dict[str, Tensor]:
    return load_file(root / "checkpoints" / "last" / "adapter_model.safetensors")


@pytest.mark.parametrize(
    "options", [(), ("data.packing=true",), ("trainer.accumulate_grad_batches=2", "trainer.gradient_clip_val=0.1")], ids=str
)
def test_a_fit_has_the_losses_of_the_unfused_one(
    fit: Callable[..., Path], options: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    """In bf16, which both round in their own places."""
    fused = losses(fit(*GPU_FIT, *options, folder="fused"))
    said = capsys.readouterr().err
    assert "Fused path: LLaMA blocks by hand" in said and "as CUDA graphs in" in said
    unfused = losses(fit(*GPU_FIT, *options, "model.fused=false", folder="unfused"))
    assert "Fused path" not in capsys.readouterr().err
    assert len(fused) == 18
    assert fused == pytest.approx(unfused, rel=1e-2)


def test_an_interrupted_fit_goes_on_to_the_bit(fit: Callable[..., Path]) -> None:
    """With dropout; what the whole run launches as graphs, the resumed one runs eagerly first."""
    options = (*GPU_FIT, "model.lora.dropout=0.1")
    whole, again = (fit(*options, folder=name) for name in ("whole", "again"))
    fit(*options, "trainer.max_steps=7", folder="cut")
    cut = fit(*options, "ckpt_path=last", folder="cut")
    for other in (again, cut):
        assert stream(other) == stream(whole)
        first, second = adapter(whole), adapter(other)
        assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("began, goes_on", [("true", "false"), ("false", "true")], ids=["fused first", "unfused first"])
def test_adapters_are_interchangeable(fit: Callable[..., Path], began: str, goes_on: str) -> None:
    """An adapter of one path goes on learning on the other as it would have on its own. (A checkpoint is for its own path alone.)"""
    first = fit(*GPU_FIT, f"model.fused={began}", folder="first") / "checkpoints" / "last"
    other, own = (fit(*GPU_FIT, f"model.fused={path}", f"ckpt_path={first}", folder=f"fused-{path}") for path in (goes_on, began))
    assert losses(own)[0] < losses(first.parents[1])[0]
    assert losses(other) == pytest.approx(losses(own), rel=1e-2)


def test_validation_and_samples_between_steps_change_no_bit(fit: Callable[..., Path], rows_file: Path) -> None:
    """They run transformers' own blocks on the same weights, beside the graphs' memory."""
    options = (*GPU_FIT, "model.lora.dropout=0.1", f"data.dataset.validation_path={rows_file}")
    between = ("validation.every_n_steps=4", "samples.count=2", "samples.every_n_steps=5", "samples.max_new_tokens=8")
    plain, busy = fit(*options, folder="plain"), fit(*options, *between, folder="busy")
    assert stream(busy) == stream(plain)


@needs_fp8
def test_a_fit_in_fp8_learns_the_same(fit: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    exact, rounded = (losses(fit(*GPU_FIT, f"model.compute={compute}", folder=compute)) for compute in ("bf16", "fp8"))
    assert "not paper-exact" in capsys.readouterr().err
    assert rounded != exact
    assert rounded == pytest.approx(exact, rel=0.03)


@pytest.mark.parametrize(
    "capability, compute, line",
    [
        ((7, 5), "auto", " has no bf16 (Ampere or newer has); set model.compute: fp32, which is slow"),
        ((8, 0), "fp8", "model.compute: fp8 needs a GPU of compute capability 8.9 or more, which "),
    ],
)
def test_a_gpu_that_is_too_old_is_told_in_one_line(
    tiny_base: Path,
    rows_file: Path,
    tmp_path: Path,
    capability: tuple[int, int],
    compute: str,
    line: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    options = base_options(tiny_base, rows_file, tmp_path / "run")
    assert line in line_of(capsys, "fit", *options, "--trainer.accelerator", "gpu", "--model.compute", compute)
