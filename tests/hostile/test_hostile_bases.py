"""Base models from elsewhere: weights are data, and nothing in a folder makes the loaders run code or leave it."""

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from canary import Canary
from running import line_of
from test_gguf import write_gguf

from qlora_lightning.errors import UserError
from qlora_lightning.modeling.loading import load_stored
from qlora_lightning.modeling.positions import base_positions
from qlora_lightning.modeling.sources import resolve_base
from qlora_lightning.modeling.tokenizer import load_tokenizer


@pytest.fixture
def base(tiny_base: Path, tmp_path: Path) -> Path:
    """A copy of the tiny base, to be made hostile."""
    return Path(shutil.copytree(tiny_base, tmp_path / "base"))


def change(file: Path, **values: object) -> None:
    """Set fields of a JSON file."""
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def line(act: Callable[[], object]) -> str:
    """What a user is told."""
    with pytest.raises(UserError) as refused:
        act()
    assert "\n" not in str(refused.value)
    return str(refused.value)


def load(base: Path) -> object:
    return load_stored(str(base), "16bit", torch.float32, torch.device("cpu"))


def test_weights_that_are_a_pickle_are_refused_with_the_way_to_convert_them(base: Path, tmp_path: Path) -> None:
    (base / "model.safetensors").unlink()
    torch.save({"weight": Canary(tmp_path / "canary")}, base / "pytorch_model.bin")
    told = line(lambda: load(base))
    assert "got pytorch_model.bin, a pickle, which can run code" in told and "save_pretrained" in told
    assert not (tmp_path / "canary").exists()


def test_a_pickle_beside_safetensors_is_not_looked_at(base: Path, tmp_path: Path) -> None:
    torch.save({"weight": Canary(tmp_path / "canary")}, base / "pytorch_model.bin")
    load(base)
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("named", ["evil.bin", "../evil.safetensors", "/tmp/evil.safetensors", 7])
def test_an_index_names_only_safetensors_beside_it(named: object, base: Path, tmp_path: Path) -> None:
    torch.save({"weight": Canary(tmp_path / "canary")}, base / "evil.bin")
    (base / "model.safetensors").rename(base / "model-00001-of-00001.safetensors")
    (base / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": {"lm_head.weight": named}}))
    assert "may name only .safetensors files beside it" in line(lambda: load(base))
    assert not (tmp_path / "canary").exists()


def test_a_configuration_cannot_name_a_pickle(base: Path, tmp_path: Path) -> None:
    """The one name that transformers lets pass."""
    torch.save({"weight": Canary(tmp_path / "canary")}, base / "adapter_model.bin")
    change(base / "config.json", transformers_weights="adapter_model.bin")
    assert "its config.json names 'adapter_model.bin'" in line(lambda: load(base))
    assert not (tmp_path / "canary").exists()


def test_an_adapter_inside_a_base_is_refused(base: Path) -> None:
    """transformers would load it, and the result would pass for the base."""
    (base / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "someone/else"}))
    assert "holds an adapter (adapter_config.json)" in line(lambda: load(base))


@pytest.mark.parametrize("where", ["attn_implementation", "_attn_implementation"])
def test_attention_from_the_hub_is_refused(where: str, base: Path) -> None:
    change(base / "config.json", **{where: "someone/kernel"})
    assert "attention code from the hub (someone/kernel)" in line(lambda: load(base))


@pytest.fixture
def coded(base: Path, tmp_path: Path) -> Path:
    """A base whose configuration, model and tokenizer are code of its own, which sings when it is imported."""
    for name in ("configuration_evil", "modeling_evil", "tokenization_evil"):
        (base / f"{name}.py").write_text(f"from pathlib import Path\nPath({str(tmp_path / 'canary')!r}).touch()\n")
    names = {
        "AutoConfig": "configuration_evil.C",
        "AutoModelForCausalLM": "modeling_evil.M",
        "AutoTokenizer": [None, "tokenization_evil.T"],
    }
    change(base / "config.json", model_type="evil", architectures=["M"], auto_map=names)
    change(base / "tokenizer_config.json", tokenizer_class="T", auto_map={"AutoTokenizer": [None, "tokenization_evil.T"]})
    return base


@pytest.mark.parametrize("act", [load, lambda base: load_tokenizer(str(base)), lambda base: base_positions(str(base))])
def test_code_in_a_base_is_never_run_nor_asked_about(act: Callable[[Path], object], coded: Path, tmp_path: Path) -> None:
    assert "brings code of its own (auto_map), which is never run" in line(lambda: act(coded))
    assert not (tmp_path / "canary").exists()


def test_the_command_line_says_so_in_one_line(coded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "brings code of its own" in line_of(capsys, "chat", "--base_model", str(coded))
    assert not (tmp_path / "canary").exists()


def test_there_is_no_option_to_trust_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert "unknown option" in line_of(capsys, "fit", "--config", "quickstart", "--model.trust_remote_code", "true")


@pytest.mark.parametrize("damage", ["cut", "lengths", "overlap", "header"])
def test_broken_safetensors_are_one_line(damage: str, base: Path) -> None:
    file = base / "model.safetensors"
    content = file.read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + size])
    names = [name for name in header if name != "__metadata__"]
    if damage == "lengths":
        header[names[0]]["data_offsets"][1] = 1 << 60
    if damage == "overlap":
        header[names[0]]["data_offsets"] = header[names[1]]["data_offsets"]
    written = json.dumps(header).encode()
    start = struct.pack("<Q", (1 << 60) if damage == "header" else len(written))
    file.write_bytes(content[: len(content) // 2] if damage == "cut" else start + written + content[8 + size :])
    assert "cannot be loaded" in line(lambda: load(base))


def gguf(tensors: int = 0, values: int = 0, rest: bytes = b"") -> bytes:
    """A GGUF header that says so many tensors and values, and what follows."""
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, values) + rest


def text(words: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(words) if length is None else length) + words


STRING, ARRAY, UINT8 = 8, 9, 0
GGUFS = {
    "empty": b"",
    "magic": b"GGUF",
    "no gguf": b"\x80\x04\x95" + b"\0" * 100,
    "many values": gguf(values=1 << 62),
    "many tensors": gguf(tensors=1 << 62),
    "long key": gguf(values=1, rest=text(b"key", 1 << 62)),
    "long text": gguf(values=1, rest=text(b"key") + struct.pack("<I", STRING) + text(b"x", 1 << 62)),
    "long array": gguf(values=1, rest=text(b"key") + struct.pack("<IIQ", ARRAY, UINT8, 1 << 62)),
    "long array of texts": gguf(values=1, rest=text(b"key") + struct.pack("<IIQ", ARRAY, STRING, 1 << 62) + text(b"") * 100),
    "nested arrays": gguf(values=1, rest=text(b"key") + struct.pack("<I", ARRAY) + struct.pack("<IQ", ARRAY, 1) * 5000),
    "unknown type": gguf(values=1, rest=text(b"key") + struct.pack("<I", 99)),
    "many sides": gguf(tensors=1, rest=text(b"w") + struct.pack("<I", 1 << 31)),
    "large tensor": gguf(tensors=1, rest=text(b"w") + struct.pack("<IQQIQ", 2, 1 << 40, 1 << 40, 0, 0) + b"\0" * 64),
    "far tensor": gguf(tensors=1, rest=text(b"w") + struct.pack("<IQIQ", 1, 4, 0, 1 << 60) + b"\0" * 64),
    "same key": gguf(values=2, rest=(text(b"key") + struct.pack("<IB", UINT8, 1)) * 2),
    "no model": gguf(values=1, rest=text(b"key") + struct.pack("<IB", UINT8, 1)),
}


@pytest.mark.parametrize("name", GGUFS)
def test_a_hostile_gguf_file_is_one_line(name: str, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(GGUFS[name])
    assert "cannot be read as a GGUF model" in line(lambda: resolve_base(str(tmp_path / "model.gguf")))


def test_what_lies_beside_a_gguf_file_is_not_read(coded: Path, tmp_path: Path) -> None:
    write_gguf(coded / "model.gguf")
    assert load_tokenizer(str(coded / "model.gguf")).convert_tokens_to_ids("<|im_start|>") == 1
    assert not (tmp_path / "canary").exists()


def test_a_package_gives_only_its_own_files() -> None:
    outside = "package://pytest/../" + "../" * 20 + "etc/passwd"
    assert "package pytest holds no file" in line(lambda: resolve_base(outside))
