"""Padding is told by lengths, so that a row may contain any token, the filler among them."""

import numpy as np
import torch

from qlora_lightning.data.collate import Collator
from qlora_lightning.data.dataset import IGNORED, TokenizedExample
from qlora_lightning.data.heldout import HeldoutPrompt
from qlora_lightning.data.steps import Microbatch

PAD = 3
COLLATOR = Collator(filler_id=PAD, pad_to_multiple_of=4)


def example(ids: list[int], labels: list[int]) -> TokenizedExample:
    return TokenizedExample(np.array(ids, dtype=np.int32), np.array(labels, dtype=np.int32))


ROWS = [example([0, 10, PAD, 12, 1], [IGNORED, IGNORED, PAD, 12, 1]), example([0, 20, 1], [IGNORED, IGNORED, 1])]


def test_a_batch_is_padded_on_the_right_to_a_multiple() -> None:
    batch = COLLATOR.evaluation(ROWS)
    assert batch["input_ids"].tolist() == [[0, 10, PAD, 12, 1, PAD, PAD, PAD], [0, 20, 1] + [PAD] * 5]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1, 0, 0, 0], [1, 1, 1] + [0] * 5]
    assert batch["labels"].tolist() == [[-100, -100, PAD, 12, 1, -100, -100, -100], [-100, -100, 1] + [-100] * 5]
    assert {batch[name].dtype for name in ("input_ids", "attention_mask", "labels", "logit_positions")} == {torch.int64}


def test_logits_are_needed_where_any_row_predicts() -> None:
    batch = COLLATOR.evaluation(ROWS)
    assert batch["logit_positions"].tolist() == [1, 2, 3]
    shifted = batch["labels"][:, batch["logit_positions"] + 1]
    assert int((shifted != IGNORED).sum()) == batch["num_supervised"] == 4


def test_a_first_token_is_no_target() -> None:
    batch = COLLATOR.evaluation([example([5, 6], [5, 6])])
    assert batch["logit_positions"].tolist() == [0]
    assert batch["num_supervised"] == batch["tokens_in_step"] == 1


def test_counts_are_plain_numbers_without_padding() -> None:
    batch = COLLATOR.evaluation(ROWS)
    assert [type(batch[name]) for name in ("num_tokens", "num_supervised", "tokens_in_step")] == [int] * 3
    assert (batch["num_tokens"], batch["num_supervised"], batch["tokens_in_step"]) == (8, 4, 4)


def test_a_training_batch_carries_the_count_of_its_step() -> None:
    batch = COLLATOR.train((Microbatch(((0,), (1,)), tokens_in_step=99), [ROWS[:1], ROWS[1:]]))
    assert (batch["tokens_in_step"], batch["num_supervised"]) == (99, 4)
    assert "position_ids" not in batch


def test_a_filler_counts_for_nothing() -> None:
    batch = COLLATOR.train((Microbatch(((1,),), tokens_in_step=99, filler=True), [ROWS[1:]]))
    assert set(batch["labels"].flatten().tolist()) == {IGNORED}
    assert (batch["num_tokens"], batch["num_supervised"], batch["tokens_in_step"]) == (0, 0, 99)
    assert len(batch["logit_positions"]) == 0
    assert batch["input_ids"].shape == (1, 4)


def test_a_packed_row_holds_its_examples_end_to_end() -> None:
    batch = COLLATOR.train((Microbatch(((0, 1), (1,)), tokens_in_step=99), [ROWS, ROWS[1:]]))
    assert batch["input_ids"].tolist() == [[0, 10, PAD, 12, 1, 0, 20, 1], [0, 20, 1] + [PAD] * 5]
    assert batch["labels"].tolist() == [[-100, -100, PAD, 12, 1, -100, -100, 1], [-100, -100, 1] + [-100] * 5]
    assert batch["attention_mask"].sum(1).tolist() == [8, 3]
    assert (batch["num_tokens"], batch["num_supervised"]) == (11, 5)


def test_positions_begin_anew_in_each_example_and_in_the_padding() -> None:
    batch = COLLATOR.train((Microbatch(((0, 1), (1,)), tokens_in_step=99), [ROWS, ROWS[1:]]))
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 0, 1, 2], [0, 1, 2, 0, 1, 2, 3, 4]]
    assert batch["position_ids"].dtype == torch.int64


def test_no_example_is_a_target_of_the_one_before_it() -> None:
    """Where first tokens are supervised, a packed row has the targets of its examples and no more; the examples stay as they were."""
    whole = [example([5, 6], [5, 6]), example([7, 8, 9], [7, 8, 9])]
    packed = COLLATOR.train((Microbatch(((0, 1),), tokens_in_step=3), [whole]))
    assert packed["labels"].tolist() == [[-100, 6, -100, 8, 9, -100, -100, -100]]
    assert packed["num_supervised"] == COLLATOR.evaluation(whole)["num_supervised"] == 3
    assert packed["logit_positions"].tolist() == [0, 2, 3]
    assert whole[1].labels.tolist() == [7, 8, 9]


def test_prompts_end_at_the_right() -> None:
    long, short = np.array([0, 10, 11, 12, 13], dtype=np.int32), np.array([0, PAD], dtype=np.int32)
    batch = COLLATOR.prompts([HeldoutPrompt(long, 4), HeldoutPrompt(short, 5)])
    assert batch["numbers"] == [4, 5]
    assert batch["input_ids"].tolist() == [[PAD] * 3 + [0, 10, 11, 12, 13], [PAD] * 6 + [0, PAD]]
    assert batch["attention_mask"].tolist() == [[0] * 3 + [1] * 5, [0] * 6 + [1] * 2]
