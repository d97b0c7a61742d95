"""What doctor gathers on this machine, what it advises on planted facts, and how it ends when something is broken."""

import json
import socket
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_lightning import doctor as doctor_module
from qlora_lightning.doctor import advise, doctor, examine
from qlora_lightning.kernels import attention
from qlora_lightning.modeling import loading
from qlora_lightning.modeling.loading import check_bitsandbytes

GPU: dict[str, Any] = {
    "versions": dict.fromkeys(("torch", "lightning", "transformers", "peft", "bitsandbytes", "triton", "cuda", "driver"), "1.0"),
    "device": {
        "kind": "cuda",
        "name": "A GPU",
        "count": 1,
        "memory_free_gib": 79.0,
        "memory_total_gib": 80.0,
        "compute_capability": "9.0",
        "bf16": True,
    },
    "host": {"cpu_cores": 16, "memory_free_gib": 100.0, "memory_total_gib": 128.0},
    "bitsandbytes": {"works": True, "device": "cuda", "error": None},
    "fused_path": {
        "works": True,
        "reason": None,
        "attention": "FlashAttention 4, on dense or packed rows",
        "flash_attention_4": True,
        "fp8": True,
    },
    "disk": {"working_folder": {"path": "/here", "free_gib": 500.0}, "hugging_face_cache": {"path": "/cache", "free_gib": 500.0}},
    "network": {"online": True, "reason": "the hub answers"},
    "wandb": {"logged_in": True, "mode": "online", "reason": "key found"},
}


def planted(path: str, value: Any) -> dict[str, Any]:
    """The facts of a good machine but for one, named by its dotted path."""
    facts = deepcopy(GPU)
    *sections, key = path.split(".")
    place = facts
    for section in sections:
        place = place[section]
    place[key] = value
    return facts


def test_a_good_machine_needs_no_advice() -> None:
    assert advise(GPU) == []


@pytest.mark.parametrize(
    "path, value, expected",
    [
        ("versions.peft", None, "peft is not installed"),
        ("bitsandbytes", {"works": False, "device": "cuda", "error": "no kernel"}, "bitsandbytes does not work on cuda (no kernel)"),
        ("device.bf16", False, "set model.compute: fp32"),
        ("fused_path.reason", "Triton is not installed", "pip install triton, or set model.fused: false"),
        ("fused_path.flash_attention_4", False, "pip install 'qlora-lightning[fa4]'"),
        ("device.memory_free_gib", 30.0, "other processes hold 50.0 GiB"),
        ("device.memory_free_gib", 4.0, "too little for a 7B model"),
        ("disk.working_folder.free_gib", 1.0, "1.0 GiB of disk free at /here"),
        ("disk.hugging_face_cache.free_gib", 10.0, "set HF_HOME"),
        ("host.cpu_cores", 2, "2 CPU cores"),
        ("network", {"online": False, "reason": "HF_HUB_OFFLINE is set"}, "offline (HF_HUB_OFFLINE is set)"),
        ("wandb.mode", "offline", "W&B will record to a local folder"),
    ],
)
def test_advice_for_one_planted_fact(path: str, value: Any, expected: str) -> None:
    assert any(expected in line for line in advise(planted(path, value)))


def test_advice_names_only_what_there_is() -> None:
    """Neither a command that does not exist yet, nor an attention that the GPU cannot run."""
    facts = planted("device.memory_free_gib", 4.0)
    facts["device"]["memory_total_gib"] = 4.0
    assert advise(facts) == ["4.0 GiB of memory free: too little for a 7B model; free some, or take a smaller base model"]
    older = planted("fused_path.flash_attention_4", False)
    older["device"]["compute_capability"] = "8.9"
    assert advise(older) == []


def test_a_missing_library_is_reported_not_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "qlora_lightning.modeling.loading", None)
    facts = examine()
    assert facts["can_train"] is False and "qlora_lightning.modeling.loading" in facts["bitsandbytes"]["error"]


def test_advice_without_a_gpu() -> None:
    facts = planted("device", {**GPU["device"], "kind": "cpu", "bf16": False, "compute_capability": None})
    facts["versions"].update(cuda=None, driver="580.1")
    lines = advise(facts)
    assert lines[0].startswith("no GPU")
    assert "NVIDIA driver 580.1, but this torch is built for the CPU only" in lines[1]
    assert "no bf16" in lines[2]


def test_bitsandbytes_multiplies_correctly_here() -> None:
    assert check_bitsandbytes(torch.device("cpu")) is None
    assert check_bitsandbytes(torch.device("cpu"), torch.float32) is None


def test_wrong_product_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    import bitsandbytes

    right = bitsandbytes.matmul_4bit
    monkeypatch.setattr(bitsandbytes, "matmul_4bit", lambda *args, **options: right(*args, **options) * 1.1)
    answer = check_bitsandbytes(torch.device("cpu"))
    assert answer is not None and answer.startswith("the 4-bit product is off by 1")
    facts = examine()
    assert facts["bitsandbytes"]["works"] is False and facts["bitsandbytes"]["error"].startswith("the 4-bit product is off by 1")


def break_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(device: torch.device, dtype: torch.dtype) -> float:
        raise RuntimeError("libbitsandbytes: no such file")

    monkeypatch.setattr(loading, "_nf4_error", broken)


def test_json_is_one_document_with_every_key(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert doctor(json=True) == 0
    facts = json.loads(capsys.readouterr().out)
    assert set(facts) == {*GPU, "advice", "can_train"}
    for section in ("device", "host", "bitsandbytes", "fused_path", "disk", "network", "wandb"):
        assert set(facts[section]) == set(GPU[section])
    assert {"python", "qlora-lightning", *GPU["versions"]} <= set(facts["versions"])
    assert facts["network"] == {"online": False, "reason": "HF_HUB_OFFLINE is set"}
    assert facts["wandb"]["mode"] == "disabled"
    assert facts["device"]["memory_free_gib"] <= facts["device"]["memory_total_gib"]


def test_table_says_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor() == 0
    out = capsys.readouterr().out
    for text in (torch.__version__, "4-bit product", "fused path", "training can run here"):
        assert text in out


def test_broken_bitsandbytes_ends_with_2(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    break_bitsandbytes(monkeypatch)
    assert doctor() == 2
    assert "training cannot run here" in capsys.readouterr().out
    assert doctor(json=True) == 2
    facts = json.loads(capsys.readouterr().out)
    assert facts["bitsandbytes"]["error"] == "libbitsandbytes: no such file"
    assert facts["can_train"] is False


def test_network_is_tried_unless_told_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(doctor_module.hub, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        assert examine()["network"]["online"]
    assert not examine()["network"]["online"]


def test_disk_of_a_folder_not_made_yet(tmp_path: Path) -> None:
    assert doctor_module._disk(tmp_path / "not" / "yet")["free_gib"] > 0


def test_a_gpu_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    gib = doctor_module.GIB
    answers = {
        "mem_get_info": (79 * gib, 80 * gib),
        "get_device_capability": (9, 0),
        "get_device_name": "A GPU",
        "device_count": 1,
    }
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, lambda answer=answer: answer)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    assert doctor_module._gpu() == GPU["device"]


@pytest.mark.parametrize(
    "capability, triton, flash4, words",
    [
        ((9, 0), True, True, "yes; attention by FlashAttention 4, on dense or packed rows; FP8 too"),
        ((9, 0), True, False, "yes; attention by torch's FlashAttention 2 on dense rows; FP8 too"),
        ((8, 0), True, True, "yes; attention by torch's FlashAttention 2 on dense rows; FP8 not on this GPU"),
        ((7, 5), True, True, "no: it needs compute capability 8.0 or more, not 7.5"),
        ((9, 0), False, True, "no: Triton is not installed"),
    ],
)
def test_the_fused_path_follows_from_gpu_and_packages(
    capability: tuple[int, int], triton: bool, flash4: bool, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(doctor_module.importlib.util, "find_spec", lambda name: object() if triton else None)
    for module in (doctor_module, attention):
        monkeypatch.setattr(module, "fa4_installed", lambda: flash4)
    major, minor = capability
    facts = doctor_module._fused_path({**GPU["device"], "compute_capability": f"{major}.{minor}"})
    assert doctor_module._fused_words(facts) == words
    assert set(facts) == set(GPU["fused_path"])


def test_a_cpu_has_no_fused_path() -> None:
    facts = examine()
    assert facts["fused_path"]["reason"] == "it needs a GPU; a CPU trains through transformers' blocks"
    assert not any("Triton" in line or "FlashAttention" in line for line in facts["advice"])
