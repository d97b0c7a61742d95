"""MMLU scored: against one prompt at a time through plain transformers, with and without sharing, on several ranks."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from exams import SUBJECTS, write_exam
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

from qlora_lightning.errors import UserError
from qlora_lightning.evaluation.mmlu.prompts import prompt_text
from qlora_lightning.evaluation.mmlu.questions import Exam, Question
from qlora_lightning.evaluation.mmlu.scores import score
from qlora_lightning.evaluation.mmlu.scoring import MMLUTest, context_length
from qlora_lightning.evaluation.prefix import Reader
from qlora_lightning.modeling.loading import load_stored
from qlora_lightning.modeling.positions import positions_of

SMALL = {"vocab_size": 512, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: AutoModelForCausalLM.from_config(LlamaConfig(**SMALL, num_key_value_heads=2)),
    "mistral, window shorter than the examples": lambda: AutoModelForCausalLM.from_config(
        MistralConfig(**SMALL, num_key_value_heads=2, sliding_window=64)
    ),
    "qwen3": lambda: AutoModelForCausalLM.from_config(Qwen3Config(**SMALL, num_key_value_heads=2, head_dim=8)),
    "gpt2": lambda: AutoModelForCausalLM.from_config(GPT2Config(vocab_size=512, n_embd=32, n_layer=2, n_head=4, n_positions=2048)),
}


def model_of(family: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return FAMILIES[family]().eval()


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> list[Question]:
    return Exam(str(write_exam(tmp_path_factory.mktemp("exam"), questions=7)), subjects=SUBJECTS).read()


def reference(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, questions: list[Question], style: str) -> torch.Tensor:
    """The four letters' log-likelihoods as continuations, one prompt at a time [Q, 4]: what the letter's logit must rank like."""
    rows = []
    for question in questions:
        context = tokenizer(prompt_text(question, style))["input_ids"]
        scores = []
        for letter in "ABCD":
            whole = tokenizer(f"{prompt_text(question, style)} {letter}")["input_ids"]
            assert whole[: len(context)] == context
            with torch.no_grad():
                logs = model(input_ids=torch.tensor([whole])).logits[0].log_softmax(-1)
            scores.append(sum(float(logs[place - 1, whole[place]]) for place in range(len(context), len(whole))))
        rows.append(scores)
    return torch.tensor(rows)


@pytest.mark.parametrize("share", [True, False], ids=["shared", "whole"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_likeliest_letter_is_chosen(
    family: str, share: bool, questions: list[Question], tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    model = model_of(family)
    test = MMLUTest(questions, tiny_tokenizer, "paper", 2048)
    answers = test.answers(model, batch_tokens=300, share=share)
    expected = reference(model, tiny_tokenizer, questions, "paper")
    assert answers.shared == share
    assert answers.choices.tolist() == expected.argmax(1).tolist()
    # up to what normalises them, which is the same for all four letters, the logits are those of a model that reads each prompt whole
    centred = [values - values.mean(1, keepdim=True) for values in (answers.logits, expected)]
    torch.testing.assert_close(*centred, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("batch_tokens", [1, 64, 100_000])
def test_the_batch_changes_nothing(batch_tokens: int, questions: list[Question], tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    model = model_of("llama")
    test = MMLUTest(questions, tiny_tokenizer, "lm_eval", 2048)
    one, other = (test.answers(model, batch_tokens=size) for size in (1000, batch_tokens))
    torch.testing.assert_close(one.logits, other.logits, atol=1e-5, rtol=1e-5)


def test_a_model_that_carries_more_than_keys_is_asked_prompt_by_prompt(
    questions: list[Question], tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(MambaConfig(vocab_size=512, hidden_size=32, state_size=4, num_hidden_layers=2)).eval()
    some = questions[::4]
    answers = MMLUTest(some, tiny_tokenizer, "paper", 2048).answers(model)
    assert not answers.shared
    assert answers.choices.tolist() == reference(model, tiny_tokenizer, some, "paper").argmax(1).tolist()


def test_a_cache_that_changes_the_result_is_noticed(questions: list[Question], tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    """Positions that begin anew behind the shared part: the trial before the first batch must see it."""
    model = model_of("llama")
    forward = model.forward

    def without_positions(input_ids: torch.Tensor, past_key_values: object = None, use_cache: bool = False, **rest: object) -> object:
        positions = torch.arange(input_ids.shape[1])[None]
        return forward(input_ids=input_ids, past_key_values=past_key_values, use_cache=use_cache, position_ids=positions, **rest)

    prompts = [prompt.ids for prompt in MMLUTest(questions[:7], tiny_tokenizer, "paper", 2048).prompts]
    reader = Reader(model, [1, 2, 3, 4], 0)
    assert reader.can_share(prompts)
    model.forward = without_positions
    assert not reader.can_share(prompts)


def test_every_question_is_answered_once_whatever_the_ranks(questions: list[Question], tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    model = model_of("llama")
    test = MMLUTest(questions, tiny_tokenizer, "paper", 2048)
    alone = test.answers(model)
    for ranks in (2, 3, 5):  # the last have nothing to do
        parts = [test.answers(model, rank=rank, ranks=ranks) for rank in range(ranks)]
        answered = torch.stack([(part.logits != 0).any(1) for part in parts])
        assert answered.sum(0).tolist() == [1] * len(questions)
        merged = test.merged(sum(part.logits for part in parts), True)
        assert torch.equal(merged.choices, alone.choices)
        torch.testing.assert_close(merged.logits, alone.logits, atol=1e-5, rtol=1e-5)


def test_nothing_of_the_model_changes(questions: list[Question], tiny_base: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    """Weights, mode and the random state are as before; so is what the 4-bit layers hold."""
    model = load_stored(str(tiny_base), "nf4-dq", torch.float32, torch.device("cpu")).train()
    before, state = {name: value.clone() for name, value in model.state_dict().items()}, torch.get_rng_state()
    MMLUTest(questions[:7], tiny_tokenizer, "paper", 2048).answers(model)
    assert all(module.training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not model.get_output_embeddings()._forward_pre_hooks


def test_progress_ends_at_all(questions: list[Question], tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    seen: list[tuple[int, int]] = []
    test = MMLUTest(questions, tiny_tokenizer, "paper", 2048)
    test.answers(model_of("llama"), batch_tokens=200, tick=lambda done, of: seen.append((done, of)))
    assert seen[0] == (0, 21) and seen[-1] == (21, 21) and seen == sorted(seen)


def test_a_question_that_does_not_fit_counts_as_wrong(questions: list[Question], tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    test = MMLUTest(questions, tiny_tokenizer, "paper", 120)
    scores = test.scores(test.answers(model_of("llama")))
    lost = [not prompt.fits for prompt in test.prompts]
    assert 0 < scores.unanswered == sum(lost)
    assert scores.shortened == 21
    assert scores.micro.accuracy <= 1 - sum(lost) / 21


def test_the_context_is_the_models() -> None:
    assert positions_of(LlamaConfig(max_position_embeddings=77)) == 77
    assert positions_of(GPT2Config(n_positions=78)) == 78
    assert positions_of(MambaConfig()) is None
    assert [context_length(77, None), context_length(77, 50), context_length(None, 50), context_length(None, None)] == [77, 50, 50, 2048]
    with pytest.raises(UserError, match=r"mmlu\.max_length must be at most 77, the base model's positions, got 78"):
        context_length(77, 78)


def test_means_over_subjects_and_over_questions() -> None:
    subjects = ["anatomy"] * 4 + ["virology"] * 2 + ["formal_logic"] * 2
    scores = score(subjects, [True, True, True, False, False, False, True, False], [False] * 7 + [True])
    assert scores.micro.accuracy == 4 / 8
    assert scores.macro.accuracy == pytest.approx((3 / 4 + 0 + 1 / 2) / 3)
    assert {name: one.accuracy for name, one in scores.categories.items()} == {"humanities": 0.5, "other": 0.375}
    assert scores.subjects["formal_logic"].shortened == scores.shortened == 1
    assert scores.metrics()["mmlu/accuracy"] == scores.macro.accuracy
    assert scores.metrics()["mmlu/accuracy_micro"] == 0.5
    assert scores.metrics()["mmlu/virology"] == 0.0
    assert scores.document()["categories"]["other"]["subjects"] == 2


def test_intervals_agree_with_statsmodels() -> None:
    proportion = pytest.importorskip("statsmodels.stats.proportion")
    for right, total in ((0, 10), (3, 10), (57, 100), (10, 10)):
        one = score(["anatomy"] * total, [number < right for number in range(total)], [False] * total)
        assert one.micro.interval == pytest.approx(proportion.proportion_confint(right, total, method="wilson"), abs=1e-12)


def test_one_question_a_subject_is_no_certainty() -> None:
    """Its variance is 0: the interval of the mean must not be."""
    scores = score(["anatomy", "virology"], [True, True], [False, False])
    assert scores.macro.accuracy == 1.0 and scores.macro.interval[0] < 0.7
    assert score(["anatomy"], [True], [False]).macro.interval == scores.subjects["anatomy"].interval


def test_the_interval_of_a_mean_over_subjects_covers_it_as_often_as_it_says() -> None:
    torch.manual_seed(0)
    truth, names = torch.tensor([0.3, 0.5, 0.8]), ["anatomy", "virology", "formal_logic"]
    covered = 0
    for _ in range(1000):
        right = (torch.rand(3, 60) < truth[:, None]).flatten().tolist()
        low, high = score([name for name in names for _ in range(60)], right, [False] * 180).macro.interval
        covered += low <= float(truth.mean()) <= high
    assert math.isclose(covered / 1000, 0.95, abs_tol=0.025)
