"""What only a GPU can show; run by hand: pytest -m gpu tests/test_gpu.py."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from byte_tokenizer import build_tokenizer
from exams import SUBJECTS, write_exam
from running import base_options, line_of, read_metrics
from transformers import LlamaConfig, LlamaForCausalLM

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, found none"),
]


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Options of a base wide enough for an adapter whose optimizer state is more than 0.00 GiB, and more than the 100,000 values from
    which on bitsandbytes pages."""
    folder = tmp_path_factory.mktemp("wide-llama")
    torch.manual_seed(0)
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 4}
    config = LlamaConfig(**sizes, vocab_size=512, bos_token_id=0, eos_token_id=1, pad_token_id=3, tie_word_embeddings=False)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    build_tokenizer(folder)
    options = ("trainer.accelerator=gpu", "model.lora.r=256", "model.compute=bf16", "model.lora.dropout=0.1")
    return (f"model.base_model={folder}", *options)


@pytest.mark.parametrize("bits", [32, 8])
def test_paged_state_is_paged_after_a_resume_and_the_losses_are_the_same(
    fit: Callable[..., Path], wide: tuple[str, ...], capsys: pytest.CaptureFixture[str], bits: int
) -> None:
    options = (*wide, f"trainer.strategy.optimizer_bits={bits}", "checkpoint.every_n_steps=2")
    whole = fit(*options, folder="whole")
    fresh = re.findall(r"Optimizer state: .*", capsys.readouterr().err)
    resumed = fit(*options, f"ckpt_path={whole}/checkpoints/step-00000004.ckpt", folder="resumed")
    again = re.findall(r"Optimizer state: .*", capsys.readouterr().err)
    assert fresh == again and not fresh[0].endswith(" 0.00 GiB of it in unified memory")
    streams = [[(row["step"], row["train/loss"]) for row in read_metrics(root) if row["train/loss"]] for root in (whole, resumed)]
    assert streams[1] == streams[0][4:]


def test_plain_optimizer_is_fused(fit: Callable[..., Path]) -> None:
    root = fit("trainer.accelerator=gpu", "trainer.strategy.paged_optimizer=false", "model.compute=bf16")
    assert len([row for row in read_metrics(root) if row["train/loss"]]) == 6


def test_full_checkpointing_changes_no_loss(fit: Callable[..., Path], wide: tuple[str, ...]) -> None:
    """Recomputed activations are the kept ones: dropout's random state included."""
    runs = [read_metrics(fit(*wide, f"trainer.strategy.gradient_checkpointing={mode}", folder=mode)) for mode in ("none", "full")]
    first, second = ([float(row["train/grad_norm"]) for row in run if row["train/loss"]] for run in runs)
    assert first == pytest.approx(second, rel=1e-2)


def test_four_bit_weights_stay_on_the_device_after_a_fit(fit: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    from qlora_lightning.module import QLoRAModule

    seen = []
    monkeypatch.setattr(QLoRAModule, "cpu", lambda self: seen.append("moved") or self)
    fit("trainer.accelerator=gpu", "trainer.max_steps=1", "model.compute=bf16")
    assert seen == []


def test_a_packed_run_has_the_losses_of_the_padded_one(fit: Callable[..., Path]) -> None:
    """In bf16, where other shapes round otherwise."""
    options = ("trainer.accelerator=gpu", "model.compute=bf16", "model.optimizer.learning_rate=0.001")
    runs = [read_metrics(fit(*options, f"data.packing={packing}", folder=packing)) for packing in ("false", "true")]
    first, second = ([float(row["train/loss"]) for row in run if row["train/loss"]] for run in runs)
    assert len(first) == 6
    assert first == pytest.approx(second, rel=1e-2)


def test_mmlu_with_shared_examples_reads_what_whole_prompts_read(fit: Callable[..., Path], wide: tuple[str, ...], tmp_path: Path) -> None:
    """In 4 bits and bf16, during a fit; the losses are those of a fit without it."""
    exam = write_exam(tmp_path / "exam", questions=20)
    asked = (f"mmlu.path={exam}", f"mmlu.subjects={','.join(SUBJECTS)}", "mmlu.shots=0", "mmlu.every_n_steps=3")
    plain, shared, whole = (
        fit(*wide, *options, folder=name)
        for name, options in (("plain", ()), ("shared", asked), ("whole", (*asked, "mmlu.share_examples=false")))
    )
    streams = [[loss for row in read_metrics(root) if (loss := row["train/loss"])] for root in (plain, shared, whole)]
    assert streams[0] == streams[1] == streams[2]
    documents = [[json.loads(file.read_text()) for file in sorted((root / "mmlu").iterdir())] for root in (shared, whole)]
    for one, other in zip(*documents, strict=True):
        assert (one["examples_shared"], other["examples_shared"]) == (True, False)
        assert one["accuracy"] == pytest.approx(other["accuracy"], abs=0.1)  # of 60 answers some are near ties


@pytest.mark.parametrize("options", [("32", "true"), ("8", "true"), ("8", "false"), ("32", "false")], ids=str)
@pytest.mark.parametrize("fused", ["true", "false"])
def test_a_step_that_is_no_number_leaves_weights_and_state_on_a_gpu(
    fit: Callable[..., Path], wide: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, options: tuple[str, str], fused: str
) -> None:
    """Whatever optimizer holds the state, through either path: an infinite gradient in the third step."""
    from qlora_lightning.module import QLoRAModule

    before = QLoRAModule.on_before_optimizer_step

    def poisoned(self: QLoRAModule, optimizer: torch.optim.Optimizer) -> None:
        if self.trainer.global_step == 2:
            self.flat.gradient[5] = torch.inf
        before(self, optimizer)

    monkeypatch.setattr(QLoRAModule, "on_before_optimizer_step", poisoned)
    bits, paged = options
    strategy = (f"trainer.strategy.optimizer_bits={bits}", f"trainer.strategy.paged_optimizer={paged}")
    root = fit(*wide, *strategy, f"model.fused={fused}", "nonfinite.policy=skip", "checkpoint.every_n_steps=1", "checkpoint.keep=9")
    two, three, four = (torch.load(root / f"checkpoints/step-{n:08d}.ckpt", weights_only=True) for n in (2, 3, 4))
    assert all(torch.equal(three["state_dict"][name], value) for name, value in two["state_dict"].items())
    assert any(not torch.equal(four["state_dict"][name], value) for name, value in two["state_dict"].items())
    for number, state in two["optimizer_states"][0]["state"].items():
        torch.testing.assert_close(three["optimizer_states"][0]["state"][number], state, rtol=0, atol=0)  # nested, with bitsandbytes
    assert [row["train/grad_norm"] for row in read_metrics(root) if row["train/loss"]].index("inf") == 2


def test_memory_that_is_out_on_a_gpu_is_said_in_numbers(
    tiny_base: Path, rows_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from qlora_lightning.module import QLoRAModule

    def greedy(self: QLoRAModule, batch: object, number: int) -> torch.Tensor:
        return torch.empty(2**46, dtype=torch.uint8, device="cuda")

    monkeypatch.setattr(QLoRAModule, "training_step", greedy)
    options = base_options(tiny_base, rows_file, tmp_path / "run")
    options[options.index("--trainer.accelerator") + 1] = "gpu"
    line = line_of(capsys, "fit", *options)
    assert re.search(
        r"in step 1: a microbatch of 4 rows x \d+ tokens asked for 65536.00 GiB, with [\d.]+ GiB in use, [\d.]+ GiB free of", line
    )
