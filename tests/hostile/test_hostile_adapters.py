"""Adapter folders and checkpoints from elsewhere: what they say is checked, and what they carry is never run."""

import json
import os
import pickle
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from canary import Canary
from running import base_options, line_of
from safetensors.torch import load_file, save_file

from qlora_lightning.modeling.adapters import ADAPTER_FILE, METADATA_FILE

PROMPTS = '{"prompt": "Hello"}\n'


@pytest.fixture(scope="module")
def trained(tiny_base: Path, rows_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of one step."""
    from qlora_lightning.cli import main

    root = tmp_path_factory.mktemp("trained")
    assert main(["fit", *base_options(tiny_base, rows_file, root), "--trainer.max_steps", "1"]) == 0
    return root


@pytest.fixture
def adapter(trained: Path, tmp_path: Path) -> Path:
    """A copy of its adapter, to be made hostile."""
    return Path(shutil.copytree(trained / "checkpoints" / "last", tmp_path / "adapter"))


@pytest.fixture
def answer(adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[[], str]:
    """The line that ``generate`` ends with, with that adapter."""
    (tmp_path / "prompts.jsonl").write_text(PROMPTS)

    def run() -> str:
        command = ["generate", "--prompts", str(tmp_path / "prompts.jsonl"), "--output", str(tmp_path / "answers.jsonl")]
        return line_of(capsys, *command, "--adapter", str(adapter))

    return run


def change(file: Path, **values: object) -> None:
    """Set fields of a JSON file."""
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"r": 1_000_000_000}, "says rank 1000000000 in its configuration, but its weights have [4]"),
        ({"r": -1}, ""),
        ({"r": "4"}, ""),
        ({"r": None}, ""),
        ({"r": [4]}, ""),
        ({"peft_type": "IA3"}, "must hold a LoRA adapter, got peft_type IA3"),
        ({"peft_type": "../evil"}, "must hold a LoRA adapter"),
        ({"target_modules": {"a": 1}}, ""),
        ({"target_modules": 7}, ""),
        ({"target_modules": "(a+)+$"}, ""),
        ({"lora_alpha": "16"}, ""),
    ],
)
def test_a_configuration_that_lies_is_one_line(values: dict[str, object], line: str, adapter: Path, answer: Callable[[], str]) -> None:
    change(adapter / "adapter_config.json", **values)
    assert line in answer()


def test_fields_that_would_import_code_are_not_followed(adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT imports what ``megatron_core`` and ``auto_mapping`` name; only rank, alpha and layers are taken from a folder."""
    from qlora_lightning.cli import main

    (tmp_path / "evil.py").write_text(f"from pathlib import Path\nPath({str(tmp_path / 'canary')!r}).touch()\n")
    monkeypatch.syspath_prepend(tmp_path)
    mapping = {"base_model_class": "X", "parent_library": "evil"}
    elsewhere = {"base_model_name_or_path": "../../elsewhere", "revision": "../../x", "auto_mapping": mapping}
    change(adapter / "adapter_config.json", megatron_config={}, megatron_core="evil", **elsewhere)
    (tmp_path / "prompts.jsonl").write_text(PROMPTS)
    command = ["generate", "--prompts", str(tmp_path / "prompts.jsonl"), "--output", str(tmp_path / "answers.jsonl")]
    assert main([*command, "--adapter", str(adapter), "--max_new_tokens", "1"]) == 0
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize(
    "values",
    [
        {"base_model": 7},
        {"base_model": ["/etc"]},
        {"base_model": "../../elsewhere"},
        {"base_model": "\x1b[2Jevil/\x07base"},
        {"revision": "../../x"},
        {"revision": "a b"},
        {"compute": "fp1"},
        {"compute": {}},
        {"quantization": {"evil": 1}, "template": 3},
        {"quantization": {"quant_type": "evil"}},
        {"quantization": [1]},
        {"system_prompt": ["x"]},
    ],
    ids=repr,
)
def test_metadata_that_lie_are_one_line(values: dict[str, object], adapter: Path, answer: Callable[[], str]) -> None:
    change(adapter / METADATA_FILE, **values)
    assert "\x1b" not in answer()


@pytest.mark.parametrize("content", [b"", b"[]", b"{" * 100_000, b"[" * 100_000, b"\xff\xfe", b'{"a": ' + b"9" * 5000 + b"}"], ids=range(6))
@pytest.mark.parametrize("name", [METADATA_FILE, "adapter_config.json"])
def test_json_that_is_none_is_one_line(name: str, content: bytes, adapter: Path, answer: Callable[[], str]) -> None:
    (adapter / name).write_bytes(content)
    assert name in answer()


def test_a_pickled_adapter_is_none(adapter: Path, answer: Callable[[], str], tmp_path: Path) -> None:
    (adapter / ADAPTER_FILE).unlink()
    torch.save({"weight": Canary(tmp_path / "canary")}, adapter / "adapter_model.bin")
    assert f"it needs adapter_config.json and {ADAPTER_FILE}" in answer()
    assert not (tmp_path / "canary").exists()


def test_weights_that_are_no_numbers_are_refused(adapter: Path, answer: Callable[[], str]) -> None:
    weights = load_file(adapter / ADAPTER_FILE)
    name = sorted(weights)[0]
    weights[name][0, 0] = float("nan")
    save_file(weights, adapter / ADAPTER_FILE)
    change(adapter / METADATA_FILE, adapter_sha256=None)  # a stranger writes what they like
    assert f"holds NaN or infinity in {name}" in answer()


@pytest.mark.parametrize("damage", ["cut", "lengths", "header", "empty"])
def test_broken_safetensors_are_one_line(damage: str, adapter: Path, answer: Callable[[], str]) -> None:
    content = (adapter / ADAPTER_FILE).read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + size])
    header[next(name for name in header if name != "__metadata__")]["data_offsets"][1] = 1 << 60
    written = json.dumps(header).encode()
    damaged = {
        "cut": content[: len(content) // 2],
        "lengths": struct.pack("<Q", len(written)) + written + content[8 + size :],
        "header": struct.pack("<Q", 1 << 60) + content[8:],
        "empty": b"",
    }
    (adapter / ADAPTER_FILE).write_bytes(damaged[damage])
    assert "cannot be read" in answer()


def as_zip(path: Path, payload: bytes) -> None:
    """A file as torch writes it, with that pickle."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", payload)
        file.writestr("archive/version", "3\n")


@pytest.mark.parametrize("form", ["torch", "plain", "zip", "system"])
@pytest.mark.parametrize("named", ["last", "best", "file"])
def test_a_checkpoint_never_runs_what_it_carries(
    form: str, named: str, trained: Path, tiny_base: Path, rows_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = Path(shutil.copytree(trained, tmp_path / "run"))
    file = root / "checkpoints" / ("evil.ckpt" if named == "file" else f"{named}.ckpt")
    file.unlink(missing_ok=True)
    canary = Canary(tmp_path / "canary")
    if form == "torch":
        torch.save({"qlora_lightning": True, "global_step": 1, "state_dict": canary}, file)
    elif form == "plain":
        file.write_bytes(pickle.dumps(canary))
    elif form == "zip":
        as_zip(file, pickle.dumps(canary))
    else:
        as_zip(file, b"cos\nsystem\n(S'touch " + os.fsencode(tmp_path / "canary") + b"'\ntR.")
    given = str(file) if named == "file" else named
    told = line_of(capsys, "fit", *base_options(tiny_base, rows_file, root), "--trainer.max_steps", "2", "--ckpt_path", given)
    assert "ckpt" in told
    assert not (tmp_path / "canary").exists()
