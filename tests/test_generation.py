"""Answers of a model: padding, stops, and sampling that batches do not touch."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

from qlora_lightning.answer_file import Answer
from qlora_lightning.data.encoder import Encoder
from qlora_lightning.data.formats import Message
from qlora_lightning.errors import UserError
from qlora_lightning.generation import Assistant, GenerationSpec, left_pad, load_assistant
from qlora_lightning.sampling import DrawByRow, samplers, uniforms


def ask(text: str) -> list[Message]:
    return [Message("user", text)]


@pytest.fixture
def assistant(tiny_base: Path) -> Assistant:
    """The tiny base in fp32, so that a batch's rounding turns no token."""
    loaded, _ = load_assistant(None, str(tiny_base), "chatml", "16bit")
    loaded.model.float()
    loaded.dtype = torch.float32
    return loaded


def test_left_padding_ends_rows_together() -> None:
    ids, mask = left_pad([[5, 6, 7], [8]], filler=3)
    assert ids.tolist() == [[5, 6, 7], [3, 3, 8]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]


def test_a_batch_answers_like_its_rows_alone(tiny_base: Path) -> None:
    """Padding must not reach the answer: greedy answers of a batch equal those of single prompts."""
    assistant, _ = load_assistant(None, str(tiny_base), "chatml")
    assistant.dtype = torch.float32
    prompts = [ask("Hi"), ask("A much longer question than the other one, is it not?")]
    spec = GenerationSpec(max_new_tokens=8)
    assert assistant.answer(prompts, spec) == [assistant.answer([prompt], spec)[0] for prompt in prompts]


def test_sampling_is_seeded_and_leaves_the_global_state_alone(tiny_base: Path) -> None:
    assistant, _ = load_assistant(None, str(tiny_base), "chatml")
    before = torch.get_rng_state()
    answers = [assistant.answer([ask("Hi")], GenerationSpec(12, temperature=2.0, top_p=1.0, seed=seed))[0] for seed in (1, 1, 2)]
    assert answers[0] == answers[1] != answers[2]
    assert torch.equal(before, torch.get_rng_state())


def test_answers_stop_at_the_end_of_turn(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the model writes after the end token is not part of the answer."""
    assistant, _ = load_assistant(None, str(tiny_base), "chatml")
    end = assistant.tokenizer.convert_tokens_to_ids("<|im_end|>")
    letters = assistant.tokenizer.encode("ab", add_special_tokens=False)
    tail = torch.tensor([[*letters, end, *letters]])
    monkeypatch.setattr(assistant.model, "generate", lambda input_ids, **options: torch.cat([input_ids, tail], 1))
    assert assistant.answer([ask("Hi")], GenerationSpec()) == ["ab"]


def test_a_model_can_answer_in_its_tokenizers_own_chat_template(tiny_base: Path, tmp_path: Path) -> None:
    """The prompt is the one that transformers makes, and a token that a question spells ends nothing."""
    base = tmp_path / "base"
    shutil.copytree(tiny_base, base)
    (base / "chat_template.jinja").write_text(
        r"{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
        r"{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    assistant, _ = load_assistant(None, str(base), "tokenizer")
    asked = [{"role": "user", "content": "Hi"}]
    expected = assistant.tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
    assert assistant.encode([ask("Hi")])[0].tolist() == [expected]
    end = assistant.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert assistant.encode([ask("Hi<|im_end|>")])[0][0].tolist().count(end) == 1
    assert len(assistant.answer([ask("Hi")], GenerationSpec(4))) == 1


def test_encoder_is_made_once(tiny_base: Path) -> None:
    """It copies the tokenizer's backend."""
    assistant, _ = load_assistant(None, str(tiny_base), "chatml")
    with pytest.MonkeyPatch.context() as patch:
        made: list[Encoder] = []
        of = Encoder.of
        patch.setattr(Encoder, "of", lambda *args: made.append(of(*args)) or made[-1])
        assert torch.equal(assistant.encode([ask("Hi")])[0], assistant.encode([ask("Hi")])[0])
    assert len(made) == 1


def test_why_an_answer_ended_is_recorded(assistant: Assistant, monkeypatch: pytest.MonkeyPatch) -> None:
    end = assistant.tokenizer.convert_tokens_to_ids("<|im_end|>")
    letters = assistant.tokenizer.encode("ab", add_special_tokens=False)
    tails = torch.tensor([[*letters, end, 3], [*letters, *letters]])
    monkeypatch.setattr(assistant.model, "generate", lambda input_ids, **options: torch.cat([input_ids, tails], 1))
    ids, mask = assistant.encode([ask("Hi"), ask("Ho")])
    assert assistant.complete(ids, mask, GenerationSpec()) == [Answer("ab", 3, "stop"), Answer("abab", 4, "length")]


# Sampling


@pytest.mark.parametrize("batch_size", [3, 8])
def test_a_sampled_answer_depends_on_no_other(assistant: Assistant, batch_size: int) -> None:
    """Seven prompts of many lengths, one at a time and in batches, in another order and with only some of them asked."""
    prompts = {number: ask("word " * (number * 5 % 7 + 1) + str(number)) for number in range(7)}
    spec = GenerationSpec(16, temperature=1.5, top_p=0.9, seed=3)
    alone = {number: answer for batch in assistant.answer_all(prompts, spec, 1) for number, answer in batch}
    turned = dict(reversed(prompts.items()))
    assert {number: answer for batch in assistant.answer_all(turned, spec, batch_size) for number, answer in batch} == alone
    some = {number: prompts[number] for number in (5, 2)}
    assert {number: answer for batch in assistant.answer_all(some, spec, batch_size) for number, answer in batch} == {
        n: alone[n] for n in some
    }


def test_equal_prompts_are_answered_apart(assistant: Assistant) -> None:
    spec = GenerationSpec(16, temperature=2.0)
    ((first, second),) = assistant.answer_all({0: ask("Hi"), 1: ask("Hi")}, spec, 2)
    assert first[1] != second[1]


def test_batches_hold_prompts_of_like_length_the_longest_first(assistant: Assistant) -> None:
    prompts = {number: ask("a" * length) for number, length in enumerate((3, 90, 5, 80, 4))}
    spec = GenerationSpec(1)
    assert [[number for number, _ in batch] for batch in assistant.answer_all(prompts, spec, 2)] == [[1, 3], [2, 4], [0]]


def test_draws_have_the_distribution_of_the_warped_scores() -> None:
    """20,000 draws against what transformers' own warpers leave, by chi-square; the seed is fixed, so that the test cannot flicker."""
    scores = torch.tensor([[2.0, 1.0, 0.5, 0.0, -1.0, -4.0]])
    warped = LogitsProcessorList([TemperatureLogitsWarper(0.7), TopPLogitsWarper(0.9)])(torch.zeros(1, 3), scores)  # type: ignore[arg-type]
    expected = warped.softmax(-1)[0].double().numpy()
    rows = 20_000
    drawn = samplers(0.7, 0.9, 0, range(rows), prompt_width=3, steps=1)(torch.zeros(rows, 3, dtype=torch.long), scores.expand(rows, -1))
    counts = np.bincount(drawn.argmax(-1).numpy(), minlength=6)
    assert counts[expected == 0].sum() == 0
    kept = expected > 0
    assert 1 < kept.sum() < 6
    assert chisquare(counts[kept], expected[kept] / expected[kept].sum() * rows).pvalue > 0.01


def test_random_numbers_of_steps_and_rows_are_independent() -> None:
    """Consecutive seeds and numbers give unrelated streams, which holds the same numbers however many rows or steps are asked for."""
    many = uniforms(0, range(1000), 8)
    assert torch.equal(uniforms(0, [7, 3], 4), many[[7, 3], :4])
    assert not torch.equal(uniforms(1, [0], 8), many[:1])
    correlation = np.corrcoef(many.numpy().T)
    assert abs(correlation - np.eye(8)).max() < 0.12  # 3.8 standard errors of 1/sqrt(1000)
    assert abs(np.corrcoef(many[:-1, 0], many[1:, 0])[0, 1]) < 0.12


@pytest.mark.parametrize("uniform, token", [(0.0, 1), (np.nextafter(np.float32(1), np.float32(0)), 3)])
def test_the_ends_of_the_unit_interval_draw_tokens_that_may_be_drawn(uniform: float, token: int) -> None:
    scores = torch.tensor([[-torch.inf, 0.0, 0.0, 0.0, -torch.inf]])
    drawn = DrawByRow(torch.tensor([[uniform]]), 2)(torch.zeros(1, 2), scores)
    assert drawn.argmax(-1).item() == token


def test_prompts_beyond_the_models_positions_are_said(assistant: Assistant, capsys: pytest.CaptureFixture[str]) -> None:
    list(assistant.answer_all({0: ask("a" * 500), 1: ask("b")}, GenerationSpec(2), 2))
    assert "warning: 1 of 2 prompts + 2 new tokens pass the model's 512 positions" in capsys.readouterr().err


@pytest.mark.parametrize(
    "wrong", [{"top_p": 0.0}, {"temperature": -1.0}, {"temperature": float("nan")}, {"max_new_tokens": 0}, {"seed": -1}]
)
def test_settings_out_of_range(wrong: dict[str, float]) -> None:
    with pytest.raises(UserError, match="need max_new_tokens >= 1, temperature >= 0, 0 < top_p <= 1 and seed >= 0"):
        GenerationSpec(**wrong)  # type: ignore[arg-type]


def test_no_step_computes_logits_that_are_not_used(assistant: Assistant) -> None:
    """The head sees one position of each row a step, also of the prompt, and each later step one token."""
    seen: list[tuple[int, ...]] = []
    assistant.model.lm_head.register_forward_pre_hook(lambda _, inputs: seen.append(tuple(inputs[0].shape)))
    embedded: list[tuple[int, ...]] = []
    assistant.model.model.embed_tokens.register_forward_pre_hook(lambda _, inputs: embedded.append(tuple(inputs[0].shape)))
    ids, mask = assistant.encode([ask("A longer question"), ask("Hi")])
    assistant.complete(ids, mask, GenerationSpec(4))
    assert set(seen) == {(2, 1, 64)}
    assert embedded[0] == tuple(ids.shape)
    assert set(embedded[1:]) == {(2, 1)}
