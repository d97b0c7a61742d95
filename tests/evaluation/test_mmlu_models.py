"""MMLU of models as training holds them, of tokenizers that write blanks in their own way, and on two processes."""

import multiprocessing
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from exams import SUBJECTS, write_exam
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from qlora_lightning.evaluation.mmlu.prompts import Prompter, prompt_text
from qlora_lightning.evaluation.mmlu.questions import Exam, Question
from qlora_lightning.evaluation.mmlu.scoring import MMLUTest
from qlora_lightning.evaluation.prefix import Reader
from qlora_lightning.modeling.adapters import LoRASpec, attach_lora, norms_to_fp32
from qlora_lightning.modeling.checkpointing import apply_gradient_checkpointing
from qlora_lightning.modeling.loading import load_stored

sys.path.insert(0, str(Path(__file__).parents[1] / "data"))
from making import SPECIAL, fast_tokenizer, llama_backend, merging_backend, unigram_backend

SMALL = {"vocab_size": 512, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
GEMMA = {**SMALL, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 64, "attn_implementation": "eager"}
FAMILIES: dict[str, Callable[[], Any]] = {
    "qwen2 with biases and windows in some layers": lambda: Qwen2Config(
        **SMALL, num_key_value_heads=2, use_sliding_window=True, sliding_window=64, max_window_layers=2
    ),
    "mistral": lambda: MistralConfig(**SMALL, num_key_value_heads=2, sliding_window=64),
    "gemma2 with soft caps": lambda: Gemma2Config(**GEMMA, final_logit_softcapping=3.0, attn_logit_softcapping=5.0),
    "gemma3": lambda: Gemma3TextConfig(**GEMMA),
    "llama, rope by length": lambda: LlamaConfig(
        **SMALL, num_key_value_heads=2, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    ),
}


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> list[Question]:
    return Exam(str(write_exam(tmp_path_factory.mktemp("exam"), questions=5)), subjects=SUBJECTS).read()


def one_by_one(model: Any, test: MMLUTest) -> torch.Tensor:
    """The letters' logits by plain transformers, a prompt at a time [Q, 4]."""
    with torch.no_grad():
        rows = [model(input_ids=torch.tensor([prompt.ids])).logits[0, -1, test.letters.ids] for prompt in test.prompts]
    return torch.stack(rows).float()


@pytest.mark.parametrize("family", FAMILIES)
def test_shared_examples_give_what_whole_prompts_give(
    family: str, questions: list[Question], tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FAMILIES[family]())
    for parameter in model.parameters():  # biases and norms begin at values that would hide a mistake
        parameter.data.add_(torch.randn_like(parameter) * 0.05)
    test = MMLUTest(questions, tiny_tokenizer, "paper", 2048)
    answers = test.answers(model.train(), batch_tokens=900)
    assert answers.shared and model.training
    torch.testing.assert_close(answers.logits, one_by_one(model.eval(), test), atol=2e-5, rtol=0)


def trained(tiny_base: Path, dtype: torch.dtype) -> Any:
    """A 4-bit base as ``fit`` holds it: LoRA with dropout, norms in fp32, gradient checkpointing, train mode."""
    torch.manual_seed(0)
    model = attach_lora(load_stored(str(tiny_base), "nf4-dq", dtype, torch.device("cpu")), LoRASpec(r=4, dropout=0.5))
    norms_to_fp32(model, dtype)
    apply_gradient_checkpointing(model, "full")
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)
    return model.train()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_a_model_in_training_answers_as_in_eval_mode(
    dtype: torch.dtype, tolerance: float, tiny_base: Path, questions: list[Question], tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    model, test = trained(tiny_base, dtype), MMLUTest(questions, tiny_tokenizer, "paper", 2048)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype != torch.float32):
        answers = test.answers(model, batch_tokens=700)
        assert answers.shared and all(module.training for module in model.modules())
        torch.testing.assert_close(answers.logits, one_by_one(model.eval(), test), atol=tolerance, rtol=0)


def test_prompts_of_which_one_token_is_left_and_groups_of_one(tiny_base: Path) -> None:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32).eval()
    shared = list(range(10, 60))
    for prompts in ([[*shared, 7], [*shared, 8], [*shared, 9, 9, 9]], [[*shared, 7]], [[7]], [[7], [8]], [shared, shared]):
        reader = Reader(model, [1, 2, 3, 4], 0, batch_tokens=4)
        assert reader.can_share(prompts)
        found = torch.zeros(len(prompts), 4)
        for numbers, logits in reader.logits(prompts, share=True):
            found[numbers] = logits
        with torch.no_grad():
            expected = torch.stack([model(input_ids=torch.tensor([prompt])).logits[0, -1, 1:5] for prompt in prompts])
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("backend", [llama_backend, unigram_backend, merging_backend], ids=["llama", "unigram", "merges"])
def test_letters_stand_where_the_tokenizer_puts_them(backend: Callable[..., Any], questions: list[Question]) -> None:
    """Before + letter are exactly the tokens of the answered prompt: no doubled blank, no other form of the letter."""
    tokenizer = fast_tokenizer(backend(SPECIAL))
    prompter = Prompter(tokenizer, "paper", 100_000)
    for question, prompt in zip(questions, prompter.prompts(questions), strict=True):
        for number, letter in enumerate("ABCD"):
            whole = tokenizer(f"{prompt_text(question, 'paper')} {letter}")["input_ids"]
            assert [*prompt.ids, prompter.letters.ids[number]] == whole


def _rank(rank: int, port: int, exam: str, base: str, queue: Any) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    test = MMLUTest(Exam(exam, subjects=SUBJECTS).read(), PreTrainedTokenizerFast.from_pretrained(base), "paper", 2048)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    answers = test.answers(model, rank=rank, ranks=2)
    torch.distributed.all_reduce(answers.logits)
    merged = test.merged(answers.logits, answers.shared)
    queue.put((rank, merged.choices.tolist(), test.scores(merged).document()))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_two_processes_find_what_one_finds(tiny_base: Path, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    exam = str(write_exam(tmp_path, questions=5))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    ranks = [context.Process(target=_rank, args=(rank, port, exam, str(tiny_base), queue)) for rank in range(2)]
    for process in ranks:
        process.start()
    found = sorted(queue.get(timeout=120) for _ in ranks)
    for process in ranks:
        process.join(timeout=60)
    test = MMLUTest(Exam(exam, subjects=SUBJECTS).read(), tiny_tokenizer, "paper", 2048)
    alone = test.answers(AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32))
    expected = (alone.choices.tolist(), test.scores(alone).document())
    assert [one[1:] for one in found] == [expected, expected]
