"""Held-out loss and perplexity: of all rows, of each set of a mix and of each length, all from one pass, as a loop over rows gives them."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from running import base_options, read_metrics
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerFast

from qlora_lightning.cli import main
from qlora_lightning.data.collate import Collator
from qlora_lightning.data.datamodule import InstructionDataModule
from qlora_lightning.data.dataset import TokenizedExample
from qlora_lightning.data.heldout import BUCKETS, HeldoutExample, HeldoutSums, heldout_metrics, set_names
from qlora_lightning.data.spec import DataPath, DatasetSpec, MixPart
from qlora_lightning.modeling.loading import QuantizationSpec, load_base_model

CPU = torch.device("cpu")
WORDS = (1, 4, 12, 30, 45, 70, 110, 180)
"""Words of an answer; a letter is a token, so that these rows lie in four of the five buckets."""


def write_rows(file: Path, name: str, words: tuple[int, ...] = WORDS) -> Path:
    """Rows that say in their text which set they are of."""
    rows = [{"instruction": f"{name} {n}", "output": f"{name} " * count} for n, count in enumerate(words)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture(scope="module")
def mix(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Options of a run on two sets, all rows of which are held out (and trained on: this is about the sums)."""
    folder = tmp_path_factory.mktemp("mix")
    alpha, beta = write_rows(folder / "alpha.jsonl", "alpha"), write_rows(folder / "beta.jsonl", "beta", WORDS[:6])
    part = {"dataset": {"path": str(beta), "validation_path": str(beta)}}
    return {
        "data.dataset.path": str(alpha),
        "data.dataset.validation_path": str(alpha),
        "data.dataset.template": "chatml",
        "data.mix": json.dumps([part]),
    }


def reference(base: Path, mix: dict[str, str], tokenizer: PreTrainedTokenizerFast) -> dict[str, float]:
    """What `validate` should print, by a loop over rows: one forward pass each, with a mask, all logits, and sums in float64."""
    part = json.loads(mix["data.mix"])[0]["dataset"]
    spec = DatasetSpec(path=DataPath(mix["data.dataset.path"]), validation_path=DataPath(mix["data.dataset.path"]), template="chatml")
    other = DatasetSpec(path=DataPath(part["path"]), validation_path=DataPath(part["path"]))
    data = InstructionDataModule(spec, str(base), mix=[MixPart(other)])
    data.setup("validate")
    assert data.val_set is not None
    model = load_base_model(str(base), QuantizationSpec(), torch.float32, CPU).eval()
    sums: dict[str, list[float]] = {}
    for index in range(len(data.val_set)):
        example = data.val_set[index]
        ids, labels = torch.from_numpy(example.input_ids.copy()).long()[None], torch.from_numpy(example.labels).long()
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, :-1]
        loss, tokens = cross_entropy(logits, labels[1:], ignore_index=-100, reduction="sum"), int((labels[1:] != -100).sum())
        name = "alpha" if "alpha" in tokenizer.decode(ids[0]) else "beta"
        length = next(bucket for bucket in BUCKETS if ids.shape[1] <= int(bucket.split("-")[-1].rstrip("+")) or bucket == BUCKETS[-1])
        for key in ("val/loss", f"val/loss/{name}", f"val/loss_by_length/{length}"):
            found = sums.setdefault(key, [0.0, 0])
            found[0] += float(loss)
            found[1] += tokens
    losses = {key: loss / tokens for key, (loss, tokens) in sums.items()}
    perplexities = {key.replace("loss", "perplexity"): float(np.exp(loss)) for key, loss in losses.items() if "length" not in key}
    return losses | perplexities


@pytest.mark.parametrize("batch_size", [1, 5])
def test_validate_gives_what_a_loop_over_rows_gives(
    tiny_base: Path,
    rows_file: Path,
    tmp_path: Path,
    mix: dict[str, str],
    tiny_tokenizer: PreTrainedTokenizerFast,
    capsys: pytest.CaptureFixture[str],
    batch_size: int,
) -> None:
    options = {**mix, "data.eval_batch_size": batch_size, "json": "true"}
    command = ["validate", *base_options(tiny_base, rows_file, tmp_path / "run")]
    assert main([*command, *(part for name, value in options.items() for part in (f"--{name}", str(value)))]) == 0
    found, expected = json.loads(capsys.readouterr().out), reference(tiny_base, mix, tiny_tokenizer)
    assert set(found) == set(expected)
    assert {"val/loss/alpha", "val/perplexity/beta", "val/loss_by_length/0-127", "val/loss_by_length/1024+"} < set(found)
    assert found == pytest.approx(expected, rel=1e-5)


def test_a_fit_logs_them_from_before_the_first_step_on(fit: Callable[..., Path], mix: dict[str, str]) -> None:
    root = fit(*(f"{name}={value}" for name, value in mix.items()), "trainer.max_steps=2", "validation.every_n_steps=2")
    rows = [row for row in read_metrics(root) if row["val/loss"]]
    assert [row["step"] for row in rows] == ["0", "1"]
    for name in ("val/loss/alpha", "val/perplexity/alpha", "val/loss/beta", "val/loss_by_length/0-127", "val/loss_by_length/1024+"):
        before, after = (float(row[name]) for row in rows)
        assert after < before, name


def test_one_set_needs_no_name_and_empty_buckets_no_row(fit: Callable[..., Path]) -> None:
    root = fit("data.dataset.validation_size=4", "trainer.max_steps=1")
    names = {name for name in read_metrics(root)[0] if name.startswith("val/")}
    assert names == {"val/loss", "val/perplexity", "val/loss_by_length/0-127"}


def test_rows_are_told_apart_and_never_packed(tiny_base: Path, mix: dict[str, str]) -> None:
    path, beta = (DataPath(file) for file in (mix["data.dataset.path"], json.loads(mix["data.mix"])[0]["dataset"]["path"]))
    spec, other = DatasetSpec(path=path, validation_path=path, template="chatml"), DatasetSpec(path=beta, validation_path=beta)
    data = InstructionDataModule(spec, str(tiny_base), mix=[MixPart(other)], packing=True, eval_batch_size=4)
    data.setup("fit")
    batches = list(data.val_dataloader())
    assert [len(batch["input_ids"]) for batch in batches] == [4, 4, 4, 2]
    assert not any("position_ids" in batch for batch in batches)
    lengths = [length for batch in batches for length in batch["row_lengths"]]
    assert lengths == sorted(lengths, reverse=True)
    assert [length for batch in batches for length in batch["attention_mask"].sum(1).tolist()] == lengths
    assert sum(set_number for batch in batches for set_number in batch["row_sets"]) == 6
    assert all(sum(batch["row_targets"]) == batch["num_supervised"] for batch in batches)


def test_a_first_token_is_no_target_of_its_row() -> None:
    ids = np.array([5, 6, 7], dtype=np.int32)
    batch = Collator(filler_id=3, pad_to_multiple_of=4).heldout([HeldoutExample(TokenizedExample(ids, ids), 1)])
    assert (batch["row_targets"], batch["row_sets"], batch["row_lengths"]) == ([2], [1], [3])


# The sums


def test_the_division_into_batches_and_ranks_does_not_matter() -> None:
    """Of 40 rows: in one batch, in batches of seven, and in two ranks whose tables are added up."""
    generator = np.random.default_rng(0)
    sets, lengths, tokens = (generator.integers(0, high, 40).tolist() for high in (3, 2000, 100))
    losses = torch.from_numpy(generator.random(40))

    def table(rows: range, size: int) -> torch.Tensor:
        sums = HeldoutSums()
        for start in range(rows.start, rows.stop, size):
            part = slice(start, min(start + size, rows.stop))
            sums.add(losses[part], tokens[part], sets[part], lengths[part])
        return sums.table(3)

    whole = table(range(40), 40)
    assert whole.shape == (3, len(BUCKETS), 2)
    assert torch.equal(whole, table(range(40), 7))
    torch.testing.assert_close(whole, table(range(15), 4) + table(range(15, 40), 4))
    assert whole[..., 1].sum() == sum(tokens)
    assert whole[..., 0].sum() == pytest.approx(float(losses.sum()))
    assert whole[1, :, 1].sum() == sum(count for count, number in zip(tokens, sets, strict=True) if number == 1)


@pytest.mark.parametrize(
    ("length", "bucket"),
    [(1, "0-127"), (127, "0-127"), (128, "128-255"), (511, "256-511"), (1023, "512-1023"), (1024, "1024+"), (9999, "1024+")],
)
def test_both_ends_of_a_bucket_belong_to_it(length: int, bucket: str) -> None:
    sums = HeldoutSums()
    sums.add(torch.tensor([6.0], dtype=torch.float64), [3], [0], [length])
    assert heldout_metrics(sums.table(1), ["only"]) == {
        "loss": 2.0,
        "perplexity": pytest.approx(np.exp(2.0)),
        f"loss_by_length/{bucket}": 2.0,
    }


def test_a_set_that_was_not_reached_is_left_out() -> None:
    sums = HeldoutSums()
    sums.add(torch.tensor([6.0], dtype=torch.float64), [3], [1], [10])
    assert set(heldout_metrics(sums.table(2), ["a", "b"])) == {"loss", "perplexity", "loss/b", "perplexity/b", "loss_by_length/0-127"}


def test_sets_of_one_name_are_told_apart(tiny_base: Path, mix: dict[str, str]) -> None:
    spec = DatasetSpec(path=DataPath(mix["data.dataset.path"]), template="chatml")
    data = InstructionDataModule(spec, str(tiny_base), mix=[MixPart(spec)])
    data.setup("fit")
    assert set_names(data.sets) == ["alpha", "alpha (2)"]
