"""The data module under the real Trainer: what is seen, in which order, and that a resumed run sees the rest."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from recording import Recorder, trainer

from qlora_lightning.data.datamodule import InstructionDataModule
from qlora_lightning.data.spec import DataPath, DatasetSpec, MixPart
from qlora_lightning.errors import UserError

Writer = Callable[..., DataPath]


ROWS = [{"prompt": "q" * (n % 7 + 1), "response": f"answer {n}"} for n in range(45)]


@pytest.fixture
def make_data(tiny_base: Path, write_rows: Writer) -> Callable[..., InstructionDataModule]:
    """A data module on 45 rows (40 after carving) and a global batch of 4; fields of the set with ``spec=``."""

    def make(spec: dict[str, Any] | None = None, rows: list[Any] = ROWS, **options: Any) -> InstructionDataModule:
        fields = {"path": write_rows(rows), "template": "guanaco", "validation_size": 5, **(spec or {})}
        return InstructionDataModule(DatasetSpec(**fields), str(tiny_base), **{"global_batch_size": 4, "seed": 1, **options})

    return make


DataMaker = Callable[..., InstructionDataModule]


def test_rows_are_read_once_and_validation_rows_are_taken_out(make_data: DataMaker) -> None:
    data = make_data()
    data.setup("fit")
    train, held = data.train_set, data.val_set
    data.setup("validate")
    assert data.train_set is train
    assert held is not None and data.val_report is not None
    assert (len(train), len(held), data.train_report.rows, data.val_report.rows) == (40, 5, 40, 5)
    answers = {conversation[-1].content for conversation in data.heldout_conversations()}
    decoded = [str(data.tokenizer.decode(train[n].input_ids.tolist())) for n in range(40)]
    assert len(answers) == 5
    assert not any(text.removesuffix("</s>").endswith(f": {answer}") for text in decoded for answer in answers)
    assert data.heldout_conversations(2) == data.heldout_conversations()[:2]


@pytest.mark.parametrize(("size", "held"), [(0.1, 5), (0.001, 1), (3, 3)])
def test_validation_size_is_rows_or_a_fraction(make_data: DataMaker, size: float, held: int) -> None:
    data = make_data({"validation_size": size})
    data.setup()
    assert data.val_report is not None
    assert data.val_report.rows == held


def test_a_fraction_leaves_something_to_train_on(make_data: DataMaker) -> None:
    one = make_data({"validation_size": 0.5}, rows=ROWS[:1])
    one.setup("fit")
    assert (len(one.train_set), one.val_set, one.heldout_conversations()) == (1, None, [])


def test_held_out_rows_that_cannot_be_used_are_no_validation(make_data: DataMaker) -> None:
    """Of ten rows one is drawn; where that one has no answer, the rest can be trained on all the same."""
    found = []
    for empty in range(10):
        rows = [{**row, "response": ""} if n == empty else row for n, row in enumerate(ROWS[:10])]
        data = make_data({"validation_size": 1}, rows=rows)
        data.setup("fit")
        found.append((len(data.train_set), data.val_set and len(data.val_set)))
    assert sorted(found, key=str) == [(8, 1)] * 9 + [(9, None)]


def test_a_validation_file_comes_before_carving(make_data: DataMaker, write_rows: Writer) -> None:
    data = make_data({"validation_path": write_rows([{"prompt": "held", "response": "out"}], "held.jsonl")})
    data.setup()
    assert (len(data.train_set), [c[0].content for c in data.heldout_conversations()]) == (45, ["held"])


def test_carving_depends_on_the_seed(make_data: DataMaker) -> None:
    def held(seed: int) -> list[str]:
        data = make_data(seed=seed)
        data.setup()
        return [conversation[1].content for conversation in data.heldout_conversations()]

    assert held(1) == held(1) != held(2)


@pytest.mark.parametrize(
    ("fields", "options", "message"),
    [
        ({"validation_size": 45}, {}, "validation_size must leave rows to train on, got 45 of 45 rows"),
        ({"template": "chatml", "format": "instruction"}, {}, "rows.jsonl:.* the row needs a field 'instruction', found prompt, response"),
        ({}, {"base_model": "./nowhere"}, "base model ./nowhere"),
    ],
)
def test_mistakes_end_in_one_line(make_data: DataMaker, fields: dict[str, Any], options: dict[str, Any], message: str) -> None:
    data = make_data(fields)
    data.base_model = options.get("base_model", data.base_model)
    with pytest.raises(UserError, match=message):
        data.setup("fit")


@pytest.mark.parametrize("name", ["global_batch_size", "eval_batch_size", "pad_to_multiple_of", "pack_length", "num_proc"])
def test_sizes_must_be_positive(make_data: DataMaker, name: str) -> None:
    with pytest.raises(UserError, match=f"data.{name} must be at least 1, got 0"):
        make_data(**{name: 0})


def test_the_global_batch_must_divide(make_data: DataMaker) -> None:
    data = make_data(global_batch_size=12)
    data.check(4, ranks=3)
    with pytest.raises(UserError, match=r"must divide the 12 examples .* got 5; use one of 1, 2, 3, 4, 6, 12$"):
        data.check(5)
    with pytest.raises(UserError, match=r"must divide the 6 examples that each GPU has .* 12, got 4; use one of 1, 2, 3, 6$"):
        data.check(4, ranks=2)
    with pytest.raises(UserError, match=r"must be a multiple of the number of GPUs, got 12 for 5 GPUs; use 15, say"):
        data.check(1, ranks=5)


def test_the_trainer_runs_whole_steps_and_the_microbatches_do_not_matter(make_data: DataMaker, tmp_path: Path) -> None:
    """42 rows in steps of 4: ten and a short one of two, which is one microbatch of two or two of one."""

    def steps(accumulate: int) -> list[tuple[list[str], int]]:
        model, data = Recorder(), make_data({"validation_size": 3})
        run = trainer(tmp_path, max_epochs=2, accumulate_grad_batches=accumulate)
        run.fit(model, data)
        assert run.global_step == 22 == 2 * data.steps_per_epoch
        found: dict[int, tuple[set[str], int]] = {}
        for step, rows, tokens in model.seen:
            texts, known = found.setdefault(step, (set(), tokens))
            texts.update(str(data.tokenizer.decode(row)).split("</s>")[0] for row in rows)
            assert known == tokens
        return [(sorted(texts), tokens) for texts, tokens in found.values()]

    whole = steps(1)
    assert len(whole) == 22
    assert whole == steps(2) == steps(4)
    assert len({text for texts, _ in whole for text in texts}) == 42


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stop", [1, 7, 10, 13, 20])
def test_a_resumed_run_sees_exactly_the_rest(make_data: DataMaker, tmp_path: Path, stop: int, workers: int) -> None:
    """Steps 10 and 20 end an epoch. Workers fetch ahead of training, which must not count."""

    def run(**options: Any) -> tuple[Recorder, Trainer]:
        checkpoints = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
        return Recorder(), trainer(
            tmp_path, max_epochs=3, accumulate_grad_batches=2, enable_checkpointing=True, **options, callbacks=[checkpoints]
        )

    whole, uninterrupted = run()
    uninterrupted.fit(whole, make_data(num_workers=workers))
    resumed, again = run()
    again.fit(resumed, make_data(num_workers=workers), ckpt_path=tmp_path / f"step={stop}.ckpt", weights_only=False)
    assert again.global_step == 30
    assert resumed.seen == [record for record in whole.seen if record[0] >= stop]


def test_a_resumed_run_keeps_to_the_trainers_limit(make_data: DataMaker, tmp_path: Path) -> None:
    """An epoch of 5 microbatches is two whole steps and a half one, which counts its own tokens only."""

    def run(path: Path | None) -> list[tuple[int, list[list[int]], int]]:
        checkpoints = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
        model, data = Recorder(), make_data()
        limited = trainer(
            tmp_path, max_epochs=3, accumulate_grad_batches=2, limit_train_batches=5, enable_checkpointing=True, callbacks=[checkpoints]
        )
        limited.fit(model, data, ckpt_path=path, weights_only=False)
        assert (limited.global_step, data.steps_per_epoch) == (9, 3)
        return model.seen

    whole = run(None)
    assert len(whole) == 15
    assert whole[4][2] < min(tokens for _, _, tokens in whole[:4])
    assert run(tmp_path / "step=4.ckpt") == [record for record in whole if record[0] >= 4]


def test_the_global_generator_is_never_drawn_from(make_data: DataMaker, tmp_path: Path) -> None:
    model, data = Recorder(), make_data()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    trainer(tmp_path, max_epochs=2).fit(model, data)
    assert torch.equal(before, torch.get_rng_state())


def test_a_checkpoint_knows_its_data_and_place(make_data: DataMaker, tmp_path: Path) -> None:
    run, data = trainer(tmp_path, max_steps=13, max_epochs=-1), make_data()
    run.fit(Recorder(), data)
    state = data.state_dict()
    assert state["cursor"] == {"epoch": 1, "step": 3}
    assert (state["seed"], state["global_batch_size"], state["examples"], len(state["fingerprint"])) == (1, 4, 40, 64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 2}, "seed was 1 in the checkpoint and is 2 now"),
        ({"global_batch_size": 8}, "global_batch_size was 4 in the checkpoint and is 8 now"),
        ({"group_by_length": False}, "group_by_length was True in the checkpoint and is False now"),
        ({"rows": ROWS[:-1]}, "examples was 40 in the checkpoint and is 39 now"),
        ({"spec": {"template": "alpaca"}}, "fingerprint was [0-9a-f]{64} in the checkpoint"),
    ],
)
def test_resuming_on_other_data_is_refused_but_validating_is_not(
    make_data: DataMaker, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    run = trainer(tmp_path, max_steps=2)
    run.fit(Recorder(), make_data())
    run.save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(UserError, match=f"a resumed run must see the same data: {message}"):
        trainer(tmp_path).fit(Recorder(), make_data(**change), ckpt_path=tmp_path / "a.ckpt", weights_only=False)
    model = Recorder()
    trainer(tmp_path).validate(model, make_data(**change), ckpt_path=tmp_path / "a.ckpt", weights_only=False)
    assert model.validated


def test_validation_goes_from_long_to_short(make_data: DataMaker, tmp_path: Path) -> None:
    model = Recorder()
    trainer(tmp_path).validate(model, make_data(eval_batch_size=2))
    assert model.validated == sorted(model.validated, reverse=True)
    assert len(model.validated) == 3
    tested = Recorder()
    trainer(tmp_path).test(tested, make_data(eval_batch_size=2))
    assert tested.validated == model.validated


def test_prediction_gives_the_held_out_prompts(make_data: DataMaker, tmp_path: Path) -> None:
    model, data = Recorder(), make_data(eval_batch_size=2)
    trainer(tmp_path).predict(model, data)
    prompts = [str(data.tokenizer.decode(ids)).replace("<pad>", "") for ids in model.prompts]
    assert prompts == [f"<s>### Human: {conversation[0].content}### Assistant:" for conversation in data.heldout_conversations()]


def test_a_run_without_validation_rows_trains_but_does_not_validate(make_data: DataMaker, tmp_path: Path) -> None:
    run = trainer(tmp_path)
    run.fit(Recorder(), make_data({"validation_size": 0}))
    assert run.global_step == 12
    with pytest.raises(UserError, match="validate, test and predict need validation rows, but the data set has none; set --data"):
        trainer(tmp_path).validate(Recorder(), make_data({"validation_size": 0}))


def test_a_batch_that_does_not_divide_stops_the_run_before_it_begins(make_data: DataMaker, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="accumulate_grad_batches must divide the 4 examples"):
        trainer(tmp_path, accumulate_grad_batches=3).fit(Recorder(), make_data())


# Several sets


@pytest.fixture
def other_set(write_rows: Writer) -> DatasetSpec:
    """Ten rows with a template and limits of their own."""
    rows = [{"instruction": f"other {n}", "output": f"reply {n}"} for n in range(10)]
    return DatasetSpec(path=write_rows(rows, "other.jsonl"), template="alpaca", max_length=5, validation_size=2)


def test_a_mix_is_written_out_in_one_style_and_validates_on_all_sets(make_data: DataMaker, other_set: DatasetSpec) -> None:
    data = make_data(mix=[MixPart(other_set, 0.5)])
    data.setup("fit")
    assert (data.train_set.parts, len(data.train_set)) == ([(40, 1.0), (8, 0.5)], 48)
    assert (data.train_report.rows, data.train_report.kept) == (48, 48)
    assert data.val_set is not None
    assert len(data.val_set) == len(data.heldout_conversations()) == 7
    every = data.heldout_conversations()  # five rows, then two of the other set
    assert data.heldout_conversations(3) == [every[0], every[5], every[1]]
    assert data.heldout_conversations(9) == [every[n] for n in (0, 5, 1, 6, 2, 3, 4)]
    text = str(data.tokenizer.decode(data.train_set[47].input_ids.tolist()))
    assert text.startswith("<s>### Human: other ")
    assert data.metadata()["data"]["data set"] == "rows + other"


def test_an_epoch_goes_through_each_set_as_often_as_its_weight_says(make_data: DataMaker, other_set: DatasetSpec, tmp_path: Path) -> None:
    model, data = Recorder(), make_data(mix=[MixPart(other_set, 0.5)])
    run = trainer(tmp_path, max_epochs=2)
    run.fit(model, data)
    assert run.global_step == 2 * data.steps_per_epoch == 22

    def others(epoch: int) -> list[str]:
        rows = [str(data.tokenizer.decode(row)) for step, batch, _ in model.seen if step // 11 == epoch for row in batch]
        assert len(rows) == 44
        return sorted(text for text in rows if "other" in text)

    assert len(set(others(0))) == len(others(0)) == len(others(1)) == 4
    assert others(0) != others(1)  # a fresh half of the eight


def test_another_weight_is_other_data_for_a_resumed_run(make_data: DataMaker, other_set: DatasetSpec) -> None:
    def fingerprint(weight: float) -> str:
        data = make_data(mix=[MixPart(other_set, weight)])
        data.setup("fit")
        return data.train_set.fingerprint()

    assert fingerprint(1.0) == fingerprint(1.0) != fingerprint(2.0)


def test_a_weight_must_be_positive(other_set: DatasetSpec) -> None:
    with pytest.raises(UserError, match=r"data\.mix\.weight must be above 0 and below 1000, got 0"):
        MixPart(other_set, 0)


# Packing


@pytest.mark.parametrize("accumulate", [1, 2, 4])
def test_packing_changes_the_rows_and_not_the_steps(make_data: DataMaker, tmp_path: Path, accumulate: int) -> None:
    def steps(packing: bool) -> tuple[list[set[str]], int]:
        model, data = Recorder(), make_data(packing=packing)
        trainer(tmp_path, accumulate_grad_batches=accumulate).fit(model, data)
        seen: dict[int, set[str]] = {}
        for step, rows, _ in model.seen:
            texts = "".join(str(data.tokenizer.decode(row)) for row in rows).replace("<pad>", "").split("</s>")
            seen.setdefault(step, set()).update(text for text in texts if text)
        return list(seen.values()), sum(len(rows) for _, rows, _ in model.seen)

    (packed, packed_rows), (padded, padded_rows) = steps(True), steps(False)
    assert packed == padded
    assert (packed_rows, padded_rows) == (10 * accumulate, 40)


def test_a_packed_row_must_hold_the_longest_example(make_data: DataMaker) -> None:
    with pytest.raises(UserError, match=r"data.pack_length must hold the longest example, got 20 for one of \d+ tokens; raise it"):
        make_data(packing=True, pack_length=20).setup("fit")
    data = make_data({"validation_size": 0}, rows=[*ROWS, {"prompt": "q" * 3000, "response": "a"}], packing=True)
    data.setup("fit")
    assert data.pack_length == int(data.train_set.lengths.max()) > 3000
    short = make_data(packing=True)
    short.setup("fit")
    assert short.pack_length == 2048
