"""Training on a stream: whole steps without an epoch, the same for every division, and exact after a resume."""

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from recording import Recorder, trainer

from qlora_lightning.data import stream
from qlora_lightning.data.datamodule import InstructionDataModule
from qlora_lightning.data.spec import DataPath, DatasetSpec, MixPart
from qlora_lightning.errors import UserError

DataMaker = Callable[..., InstructionDataModule]
ROWS = [{"prompt": "q" * (n % 7 + 1), "response": f"answer {n}."} for n in range(45)]


@pytest.fixture
def make_data(tiny_base: Path, write_rows: Callable[..., DataPath], monkeypatch: pytest.MonkeyPatch) -> DataMaker:
    """A stream of 45 rows, of which the first 5 are held out, shuffled in a buffer of 16; steps of 4."""
    monkeypatch.setattr(stream, "BUFFER", 16)

    def make(spec: dict[str, Any] | None = None, rows: list[Any] = ROWS, **options: Any) -> InstructionDataModule:
        fields = {"path": write_rows(rows), "template": "guanaco", "validation_size": 5, **(spec or {})}
        chosen = {"global_batch_size": 4, "seed": 1, "streaming": True, **options}
        return InstructionDataModule(DatasetSpec(**fields), str(tiny_base), **chosen)

    return make


def run(tmp_path: Path, data: InstructionDataModule, **options: Any) -> tuple[Recorder, Trainer]:
    model, used = Recorder(), trainer(tmp_path, **{"max_steps": 25, "max_epochs": -1, **options})
    used.fit(model, data)
    return model, used


def answers(data: InstructionDataModule, model: Recorder) -> list[list[str]]:
    """What each step trains on, sorted."""
    steps: dict[int, list[str]] = {}
    for step, rows, _ in model.seen:
        texts = "".join(str(data.tokenizer.decode(row)) for row in rows).replace("<pad>", "").split("</s>")
        steps.setdefault(step, []).extend(text.partition("### Assistant: ")[2] for text in texts if text)
    return [sorted(texts) for texts in steps.values()]


def test_steps_are_full_and_the_stream_begins_again(make_data: DataMaker, tmp_path: Path) -> None:
    data = make_data()
    model, used = run(tmp_path, data)
    seen = answers(data, model)
    assert (used.global_step, [len(step) for step in seen]) == (25, [4] * 25)
    counts = {text: sum(step.count(text) for step in seen) for step in seen for text in step}
    assert set(counts) == {f"answer {n}." for n in range(5, 45)}  # the first five are held out
    assert set(counts.values()) == {2, 3}  # two and a half passes of 40, in each of which every example comes once
    passes = [[text for step in seen[first : first + 10] for text in step] for first in (0, 10)]
    assert sorted(passes[0]) == sorted(passes[1])
    assert passes[0] != passes[1]


def test_an_example_waits_in_the_buffer_for_as_many_as_it_holds(make_data: DataMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not sorted, and not far from its place: 15 others come before it on average while the buffer is full."""
    data = make_data({"validation_size": 0}, rows=[{"prompt": "q" * 9, "response": f"{n:04}"} for n in range(1000)])
    data.setup("fit")
    streamed = data.sets[0]
    assert isinstance(streamed, stream.StreamedSet)
    steps = iter(stream.StreamedSteps(streamed.chunks, stream.StepShape(4, 1), seed=1))
    fetched = [example for _ in range(250) for row in next(steps)[1] for example in row]
    numbers = [int(str(data.tokenizer.decode(example.input_ids.tolist()))[-8:-4]) for example in fetched]
    assert sorted(numbers) == list(range(1000))
    late = [place - number for place, number in enumerate(numbers[:900])]
    assert min(late) >= -16
    assert abs(sum(late) / len(late)) < 3


@pytest.mark.parametrize("options", [{"accumulate_grad_batches": 2}, {"accumulate_grad_batches": 4}])
def test_microbatches_packing_and_workers_do_not_change_the_steps(make_data: DataMaker, tmp_path: Path, options: dict[str, Any]) -> None:
    plain = make_data()
    whole, _ = run(tmp_path, plain)
    packed = make_data(packing=True, num_workers=2)
    divided, _ = run(tmp_path, packed, **options)
    assert sum(len(rows) for _, rows, _ in divided.seen) == 25 * options["accumulate_grad_batches"]  # rows, of 100 examples
    assert answers(packed, divided) == answers(plain, whole)
    assert {(step, tokens) for step, _, tokens in divided.seen} == {(step, tokens) for step, _, tokens in whole.seen}


def test_a_worker_does_not_wait_for_threads_that_its_parent_has(
    make_data: DataMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fork leaves the threads of the parent's tokenizers behind: with them in use, a worker once waited for ever."""
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    data = make_data(num_workers=1)
    data.setup("fit")
    data.tokenizer(["text"] * 64)  # starts the threads

    def late(*_: object) -> None:
        raise TimeoutError("the worker gave nothing in a minute")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(60)
    try:
        _, used = run(tmp_path, data)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    assert used.global_step == 25


@pytest.mark.parametrize("workers", [0, 1])
def test_a_resumed_stream_goes_on_exactly(make_data: DataMaker, tmp_path: Path, workers: int) -> None:
    checkpoints = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    whole, _ = run(tmp_path, make_data(num_workers=workers), enable_checkpointing=True, callbacks=[checkpoints])
    resumed = Recorder()
    again = trainer(tmp_path, max_steps=25, max_epochs=-1)
    again.fit(resumed, make_data(num_workers=workers), ckpt_path=tmp_path / "step=13.ckpt", weights_only=False)
    assert again.global_step == 25
    assert resumed.seen == [record for record in whole.seen if record[0] >= 13]


def test_two_ranks_share_each_step(make_data: DataMaker) -> None:
    data = make_data()
    data.setup("fit")
    streamed = data.sets[0]
    assert isinstance(streamed, stream.StreamedSet)

    def first_steps(rank: int, ranks: int) -> list[tuple[list[list[int]], int]]:
        steps = iter(stream.StreamedSteps(streamed.chunks, stream.StepShape(4, 1, rank, ranks), seed=1))
        fetched = [next(steps) for _ in range(5)]
        return [([example.input_ids.tolist() for row in rows for example in row], part.tokens_in_step) for part, rows in fetched]

    for whole, first, second in zip(first_steps(0, 1), first_steps(0, 2), first_steps(1, 2), strict=True):
        assert sorted(whole[0]) == sorted(first[0] + second[0])
        assert whole[1] == first[1] == second[1]
        assert (len(first[0]), len(second[0])) == (2, 2)


def test_the_first_rows_are_held_out(make_data: DataMaker, tmp_path: Path) -> None:
    data = make_data()
    model = Recorder()
    trainer(tmp_path).validate(model, data)
    assert data.val_report is not None
    assert (data.val_report.rows, [c[-1].content for c in data.heldout_conversations()]) == (5, [f"answer {n}." for n in range(5)])


def test_a_validation_file_leaves_all_rows_to_train_on(make_data: DataMaker, write_rows: Callable[..., DataPath], tmp_path: Path) -> None:
    data = make_data({"validation_path": write_rows([{"prompt": "held", "response": "out"}], "held.jsonl")})
    model, _ = run(tmp_path, data, max_steps=40)
    assert "answer 0." in {text for step in answers(data, model) for text in step}
    assert [c[-1].content for c in data.heldout_conversations()] == ["out"]


def test_mistakes_end_in_one_line(make_data: DataMaker, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data.streaming has no epochs that could say when to end; set --trainer.max_steps N$"):
        run(tmp_path, make_data(), max_steps=-1, max_epochs=1)
    with pytest.raises(UserError, match=r"set --trainer.max_steps N and leave out trainer.limit_train_batches 3$"):
        run(tmp_path, make_data(), max_steps=5, limit_train_batches=3)
    with pytest.raises(UserError, match=r"validation_size must be a number of rows where data.streaming is true, got 0.1"):
        run(tmp_path, make_data({"validation_size": 0.1}))
    with pytest.raises(UserError, match=r"no row of the stream is left to use"):
        run(tmp_path, make_data({"validation_size": 0}, rows=[{"prompt": "q", "response": ""}]))
    with pytest.raises(UserError, match=r"data.pack_length must hold the longest example, got 8 for one of"):
        run(tmp_path, make_data(packing=True, pack_length=8))
    with pytest.raises(UserError, match=r"data.mix needs rows that are prepared first"):
        run(tmp_path, make_data(mix=[MixPart(DatasetSpec(path=DataPath("x.jsonl")))]))


def test_a_bad_row_in_a_stream_is_named(make_data: DataMaker, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"rows.jsonl:46: field 'response' must be text, got int"):
        run(tmp_path, make_data(rows=[*ROWS, {"prompt": "q", "response": 7}]))
