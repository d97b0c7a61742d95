"""``strategy: qlora_fsdp2`` on two ranks: the numbers of one device, half of its packed weights, and its checkpoints.

The functions above the tests run in the ranks.
"""

import gc
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from peft import PeftModel
from running import base_options, read_metrics
from safetensors.torch import load_file
from starting import Ended, Ranks, fit
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from qlora_lightning.modeling.sharding import bytes_per_rank

BLOCKS = 6


def packed_bytes() -> int:
    """Of all packed weights that are alive in this process, whoever holds them.

    Bytes are a random generator's state too, of which checkpointing keeps one a block until its backward; those are not counted.
    """
    tensors = [one for one in gc.get_objects() if issubclass(type(one), Tensor) and one.device.type == "cpu"]
    plain = [one for one in tensors if type(one).__name__ != "DTensor" and one.dtype == torch.uint8]
    storages = {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in plain}
    return sum(size for size in storages.values() if size != torch.get_rng_state().nbytes)


def measure(arguments: list[str]) -> dict[str, list[int]]:
    """A fit; packed bytes alive after each weight that is loaded, in each block's forward, and after each step."""
    from transformers.models.llama.modeling_llama import LlamaAttention

    from qlora_lightning.modeling.sharded_loading import _PackAndCut
    from qlora_lightning.strategies import QLoRAFSDP2Strategy

    found: dict[str, list[int]] = {"loading": [], "computing": [], "after a step": []}
    gc.collect()
    gc.freeze()  # what is there already is not looked through each time
    with (
        after(_PackAndCut, "convert", lambda: found["loading"].append(packed_bytes())),
        after(LlamaAttention, "forward", lambda: found["computing"].append(packed_bytes())),
        after(QLoRAFSDP2Strategy, "optimizer_step", lambda: found["after a step"].append(packed_bytes())),
    ):
        assert fit(arguments).code == 0
    gc.unfreeze()
    return found


@contextmanager
def after(kind: type, method: str, do: Callable[[], None]) -> Iterator[None]:
    """Do something whenever a method of ``kind`` has run."""
    plain = getattr(kind, method)

    def then(*args: Any, **kwargs: Any) -> Any:
        output = plain(*args, **kwargs)
        do()
        return output

    with patch.object(kind, method, then):
        yield


def count_served(arguments: list[str]) -> int:
    """A fit; how many forwards of the other rank this one helped with."""
    from qlora_lightning.modeling.sharding import ShardedBase

    plain, served = ShardedBase._tell, []

    def tell(base: Any, mine: int) -> Tensor:
        working = plain(base, mine)
        served.append(int(working) if mine == 0 else 0)
        return working

    with patch.object(ShardedBase, "_tell", tell):
        ended = fit(arguments)
    assert ended.code == 0, ended.err
    return sum(served)


def with_fault(arguments: list[str], fault: str) -> Ended:
    """A fit in which one bit of rank 1's shares is wrong from some moment on."""
    import torch.distributed as dist

    from qlora_lightning.modeling import sharded_loading
    from qlora_lightning.module import QLoRAModule

    def flip(module: Any) -> None:
        if dist.get_rank() == 1:
            linear = module.model.get_submodule("base_model.model.model.layers.1.mlp.up_proj.base_layer")
            linear.weight.to_local()[7] ^= 16

    def other_base(codes: Tensor, state: Any) -> int:
        return plain_checksum(codes, state) + dist.get_rank()

    plain_checksum, plain_share = sharded_loading.checksum_of_packed, sharded_loading.share_of

    def wrong_share(codes: Tensor, rank: int, ranks: int) -> Tensor:
        share = plain_share(codes, rank, ranks).clone()
        share[0] ^= rank
        return share

    def flip_in_step(module: Any, optimizer: Any) -> None:
        plain_step(module, optimizer)
        flip(module)

    plain_step = QLoRAModule.on_before_optimizer_step
    planted = {
        "another base": patch.object(sharded_loading, "checksum_of_packed", other_base),
        "a wrong share": patch.object(sharded_loading, "share_of", wrong_share),
        "a flipped bit": patch.object(QLoRAModule, "on_before_optimizer_step", flip_in_step),
    }
    with planted[fault]:
        return fit(arguments)


# ---- tests ----


@pytest.fixture(scope="module")
def deep_base(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As ``tiny_base``, with more and larger blocks."""
    folder = tmp_path_factory.mktemp("deep-llama")
    settings = json.loads((tiny_base / "config.json").read_text()) | {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
    settings["num_hidden_layers"] = BLOCKS
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**settings)).to(torch.bfloat16).save_pretrained(folder)
    for file in tiny_base.glob("tokenizer*"):
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def command(strategy: str, base: Path, rows: Path, root: Path, *options: str) -> list[str]:
    """A fit under a strategy, on two ranks unless it is ``qlora``. The recipe says both; options are ``name=value`` strings."""
    recipe = root.with_suffix(".yaml")
    recipe.write_text(f"trainer: {{strategy: {strategy}, devices: {1 if strategy == 'qlora' else 2}}}\n")
    given = [part for option in options for part in (f"--{option.partition('=')[0]}", option.partition("=")[2])]
    return ["fit", "--config", str(recipe), *base_options(base, rows, root), *given]


def losses(root: Path) -> list[float]:
    return [float(row["train/loss"]) for row in read_metrics(root) if row["train/loss"]]


def adapter(root: Path) -> dict[str, Tensor]:
    return load_file(root / "checkpoints" / "last" / "adapter_model.safetensors")


def assert_same_run(root: Path, other: Path, rounding: float = 1e-4) -> None:
    """Losses and adapters of two runs are equal but for rounding in fp32, which AdamW's first steps carry on."""
    assert losses(root) == pytest.approx(losses(other), rel=1e-5)
    mine, theirs = adapter(root), adapter(other)
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        assert float((value - theirs[name]).norm() / theirs[name].norm()) < rounding, name


SHAPES = {
    "recomputed": [],
    "kept": ["trainer.strategy.init_args.gradient_checkpointing=none", "data.global_batch_size=6"],
    "kept, accumulated": ["trainer.strategy.init_args.gradient_checkpointing=none", "trainer.accumulate_grad_batches=2"],
    "packed, accumulated": ["data.packing=true", "trainer.accumulate_grad_batches=2", "data.global_batch_size=8"],
}


@pytest.fixture(scope="module")
def fit_under(two_ranks: Ranks, tiny_base: Path, rows_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A fit under a strategy; gives its run folder. Each is made once, so that nobody may write there."""

    @cache
    def run(strategy: str, *options: str) -> Path:
        root = tmp_path_factory.mktemp(strategy) / "run"
        arguments = command(strategy, tiny_base, rows_file, root, *options)
        ended = [fit(arguments)] if strategy == "qlora" else two_ranks.run(fit, arguments)
        assert all(one.code == 0 for one in ended), [one.err for one in ended]
        return root

    return run


@pytest.mark.parametrize("shape", SHAPES)
def test_two_ranks_make_the_run_of_one_device(shape: str, fit_under: Callable[..., Path]) -> None:
    """22 rows of uneven length, so that the last step is short."""
    assert_same_run(fit_under("qlora_fsdp2", *SHAPES[shape]), fit_under("qlora", *SHAPES[shape]))


def test_each_rank_holds_its_share_of_the_packed_bytes(two_ranks: Ranks, deep_base: Path, rows_file: Path, tmp_path: Path) -> None:
    """Constants of quantisation are bytes as well: less than a twentieth of the weights, here."""
    model = LlamaForCausalLM(LlamaConfig.from_pretrained(deep_base)).model
    linear = [weight.numel() for name, weight in model.layers.named_parameters() if weight.dim() == 2]
    packed = sum(linear) // 2
    share, gathered = bytes_per_rank(packed, BLOCKS, 2)
    for mode in ("none", "full"):
        options = ["trainer.max_steps=2", f"trainer.strategy.init_args.gradient_checkpointing={mode}"]
        for found in two_ranks.run(measure, command("qlora_fsdp2", deep_base, rows_file, tmp_path / mode, *options)):
            assert len(found["loading"]) == len(linear)
            assert max(found["loading"]) < share + packed / 20
            assert all(share <= held < share + packed / 20 for held in found["after a step"])
            assert max(found["computing"]) < share + gathered + packed / 20
            assert max(found["computing"]) >= share + packed / BLOCKS  # it was seen where it is gathered


@pytest.mark.parametrize(
    ("fault", "line"),
    {
        "another base": "model.layers.0.self_attn.q_proj (and 13 more) is not the same on every rank",
        "a wrong share": "model.layers.0.self_attn.q_proj (and 13 more) changed while it was divided over ranks",
        "a flipped bit": "model.layers.1.mlp.up_proj changed in the first optimizer step",
    }.items(),
)
def test_a_changed_weight_ends_the_run(fault: str, line: str, two_ranks: Ranks, tiny_base: Path, rows_file: Path, tmp_path: Path) -> None:
    ended = two_ranks.run(with_fault, command("qlora_fsdp2", tiny_base, rows_file, tmp_path / "run"), fault)
    assert [one.code for one in ended] == [2, 2]
    assert any(line in one.last_line for one in ended), [one.err for one in ended]


@pytest.mark.parametrize(
    ("first", "second"), [("qlora_fsdp2", "qlora"), ("qlora_fsdp2", "qlora_ddp"), ("qlora", "qlora_fsdp2"), ("qlora_ddp", "qlora_fsdp2")]
)
def test_a_checkpoint_goes_on_under_another_strategy(
    first: str, second: str, two_ranks: Ranks, fit_under: Callable[..., Path], tiny_base: Path, rows_file: Path, tmp_path: Path
) -> None:
    """What is between ``qlora`` and ``qlora_ddp`` is in test_ranks_resume.py."""
    root = Path(shutil.copytree(fit_under(first, "trainer.max_steps=3"), tmp_path / "run"))
    arguments = command(second, tiny_base, rows_file, root, "ckpt_path=last")
    ended = [fit(arguments)] if second == "qlora" else two_ranks.run(fit, arguments)
    assert all(one.code == 0 for one in ended), ended[0].err
    assert_same_run(root, fit_under("qlora"))
    base = AutoModelForCausalLM.from_pretrained(tiny_base)
    plain = PeftModel.from_pretrained(base, root / "checkpoints" / "last")
    assert any(bool(value.any()) for name, value in plain.named_parameters() if "lora_B" in name)


def test_evaluation_between_steps(
    two_ranks: Ranks, fit_under: Callable[..., Path], tiny_base: Path, rows_file: Path, tmp_path: Path
) -> None:
    """Validation of 7 rows, and of samples: ranks have different numbers of rows, answers and tokens to go through."""
    options = ["data.dataset.validation_size=7", "trainer.val_check_interval=2", "samples.count=3", "samples.every_n_steps=2"]
    alone = fit_under("qlora", *options)
    served = two_ranks.run(count_served, command("qlora_fsdp2", tiny_base, rows_file, tmp_path / "both", *options))
    assert sum(served) > 0
    assert_same_run(tmp_path / "both", alone)
    mine, theirs = ([float(row["val/loss"]) for row in read_metrics(root) if row["val/loss"]] for root in (tmp_path / "both", alone))
    assert len(mine) > 2 and mine == pytest.approx(theirs, rel=1e-5)
    assert (tmp_path / "both" / "samples.jsonl").read_text() == (alone / "samples.jsonl").read_text()


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_make_the_run_of_one(fit_under: Callable[..., Path]) -> None:
    """Through NCCL, with blocks gathered ahead on a stream of their own; products in fp32, on one GPU of other shapes."""
    options = ["trainer.accelerator=gpu", "model.fused=false", "data.dataset.validation_size=7", "trainer.val_check_interval=2"]
    assert losses(fit_under("qlora_fsdp2", *options)) == pytest.approx(losses(fit_under("qlora", *options)), rel=1e-3)
