"""What this machine can do: facts gathered without side effects, one real 4-bit product, and advice that follows from the facts alone."""

import importlib.metadata
import importlib.util
import json as json_module
import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants as hub
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from qlora_lightning import __version__
from qlora_lightning.kernels.attention import Layout, choose_backend, describe, fa4_installed
from qlora_lightning.kernels.heads import Heads
from qlora_lightning.loggers.wandb_mode import reachable, wandb_logged_in, wandb_mode
from qlora_lightning.machine import usable_cores

GIB = 2**30
PACKAGES = ("torch", "lightning", "transformers", "peft", "bitsandbytes", "triton", "wandb")
NEEDED = ("torch", "lightning", "transformers", "peft", "bitsandbytes")

Facts = dict[str, Any]


def doctor(json: bool = False) -> int:
    """Say what this machine can do: versions, device, memory, disk, network, and what will be slow and what to do about it.

    Ends with exit code 0 when training can run here and 2 when something that it needs is broken.

    Args:
        json: Print one JSON document on standard output and nothing else there.
    """
    facts = examine()
    if json:
        print(json_module.dumps(facts, indent=2))
    else:
        _print(facts)
    return 0 if facts["can_train"] else 2


def examine() -> Facts:
    """Gather the facts; every size is in GiB of 2^30 bytes."""
    device = _gpu() if torch.cuda.is_available() else _cpu()
    facts: Facts = {
        "versions": _versions(),
        "device": device,
        "host": {"cpu_cores": usable_cores(), **_host_memory()},
        "bitsandbytes": _bitsandbytes(device),
        "fused_path": _fused_path(device),
        "disk": {"working_folder": _disk(Path.cwd()), "hugging_face_cache": _disk(Path(hub.HF_HUB_CACHE))},
        "network": _network(),
        "wandb": _wandb(),
    }
    facts["advice"] = advise(facts)
    facts["can_train"] = facts["bitsandbytes"]["works"] and all(facts["versions"][name] for name in NEEDED)
    return facts


def _versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {"python": platform.python_version()}
    versions |= {"qlora-lightning": __version__, **{name: _version(name) for name in PACKAGES}}
    return {**versions, "cuda": torch.version.cuda, "driver": _driver()}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _driver() -> str | None:
    """Version of the NVIDIA driver; None without one. Found too when this torch cannot use it, which is worth an advice."""
    if not shutil.which("nvidia-smi"):
        return None
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20)
    except subprocess.TimeoutExpired:
        return None
    return next(iter(answer.stdout.split()), None) if answer.returncode == 0 else None


def _gpu() -> Facts:
    free_bytes, total_bytes = torch.cuda.mem_get_info()
    major, minor = torch.cuda.get_device_capability()
    return {
        "kind": "cuda",
        "name": torch.cuda.get_device_name(),
        "count": torch.cuda.device_count(),
        "memory_free_gib": round(free_bytes / GIB, 2),
        "memory_total_gib": round(total_bytes / GIB, 2),
        "compute_capability": f"{major}.{minor}",
        "bf16": torch.cuda.is_bf16_supported(including_emulation=False),
    }


def _cpu() -> Facts:
    memory = _host_memory()
    return {
        "kind": "cpu",
        "name": _cpu_name(),
        "count": 1,
        "memory_free_gib": memory["memory_free_gib"],
        "memory_total_gib": memory["memory_total_gib"],
        "compute_capability": None,
        "bf16": torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported(),
    }


def _cpu_name() -> str:
    """What Linux calls the processor; what Python knows elsewhere."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _host_memory() -> dict[str, float]:
    page_bytes = os.sysconf("SC_PAGE_SIZE")
    free_bytes = os.sysconf("SC_AVPHYS_PAGES") * page_bytes
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():  # counts what the kernel's caches would give back
        fields = dict(line.split(":") for line in meminfo.read_text(encoding="utf-8").splitlines())
        free_bytes = int(fields["MemAvailable"].split()[0]) * 1024
    return {"memory_free_gib": round(free_bytes / GIB, 2), "memory_total_gib": round(os.sysconf("SC_PHYS_PAGES") * page_bytes / GIB, 2)}


def _disk(folder: Path) -> Facts:
    """Free space where ``folder`` is or will be made."""
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    return {"path": str(folder), "free_gib": round(shutil.disk_usage(existing).free / GIB, 1)}


def _network() -> Facts:
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}:
        return {"online": False, "reason": "HF_HUB_OFFLINE is set"}
    online = reachable(hub.ENDPOINT, seconds=2.0)
    return {"online": online, "reason": f"{hub.ENDPOINT} {'answers' if online else 'not reachable within 2 s'}"}


def _wandb() -> Facts:
    mode = wandb_mode(seconds=2.0)
    return {"logged_in": wandb_logged_in(), "mode": mode.mode, "reason": mode.reason}


def _bitsandbytes(device: Facts) -> Facts:
    """Whether 4-bit products are right on the device that ``_gpu`` or ``_cpu`` describes, in the dtype that a run computes in there."""
    try:
        from qlora_lightning.modeling.loading import check_bitsandbytes  # here: doctor runs, and says so, where transformers is missing
    except ImportError as failure:
        reason: str | None = str(failure)
    else:
        reason = check_bitsandbytes(torch.device(device["kind"]), torch.bfloat16 if device["bf16"] else torch.float32)
    return {"works": reason is None, "device": device["kind"], "error": reason}


def _fused_path(device: Facts) -> Facts:
    """Whether training can run through fused blocks on the device that ``_gpu`` or ``_cpu`` describes, and what it finds there."""
    reason = _why_not_fused(device)
    facts: Facts = {"works": reason is None, "reason": reason, "attention": None, "flash_attention_4": fa4_installed(), "fp8": False}
    if reason is None:
        heads_of_7b = Heads(32, 32, 128)
        facts["attention"] = describe(choose_backend(torch.device("cuda"), Layout(1, 512), heads_of_7b, window=None))
        facts["fp8"] = _capability(device) >= (8, 9)  # as modeling/loading.check_fp8, which needs transformers, has it
    return facts


def _why_not_fused(device: Facts) -> str | None:
    if device["kind"] != "cuda":
        return "it needs a GPU; a CPU trains through transformers' blocks"
    if _capability(device) < (8, 0):
        return f"it needs compute capability 8.0 or more, not {device['compute_capability']}"
    return None if importlib.util.find_spec("triton") else "Triton is not installed"


def _capability(device: Facts) -> tuple[int, ...]:
    return tuple(map(int, device["compute_capability"].split(".")))


def advise(facts: Facts) -> list[str]:
    """What will be slow or fail with these facts, and what to do: one line each."""
    return [*_advise_broken(facts), *_advise_device(facts), *_advise_room(facts), *_advise_network(facts)]


def _advise_broken(facts: Facts) -> list[str]:
    lines = [f"{name} is not installed: pip install qlora-lightning brings it" for name in NEEDED if not facts["versions"][name]]
    if not facts["bitsandbytes"]["works"]:
        lines.append(
            f"bitsandbytes does not work on {facts['bitsandbytes']['device']} ({facts['bitsandbytes']['error']}): "
            "nothing can be quantised; install the build for this CUDA version, then see `python -m bitsandbytes`"
        )
    return lines


def _advise_device(facts: Facts) -> list[str]:
    device, versions = facts["device"], facts["versions"]
    if device["kind"] == "cuda":
        return [*_advise_gpu(device), *_advise_fused(facts)]
    lines = ["no GPU: training runs on the CPU, which is enough for the quickstart and for models below about 1B parameters"]
    if versions["driver"]:
        build = f"CUDA {versions['cuda']}" if versions["cuda"] else "the CPU only"
        lines.append(
            f"there is an NVIDIA driver {versions['driver']}, but this torch is built for {build}: install one that fits the driver"
        )
    if not device["bf16"]:
        lines.append("this CPU has no bf16 arithmetic: leave model.compute at auto, which computes in fp32 here")
    return lines


def _advise_gpu(device: Facts) -> list[str]:
    lines = []
    if not device["bf16"]:
        lines.append(f"this GPU (compute capability {device['compute_capability']}) has no bf16: set model.compute: fp32, which is slow")
    if device["memory_free_gib"] < 0.8 * device["memory_total_gib"]:
        taken_gib = device["memory_total_gib"] - device["memory_free_gib"]
        lines.append(f"other processes hold {taken_gib:.1f} GiB of the GPU's memory: `nvidia-smi` names them")
    return lines


def _advise_fused(facts: Facts) -> list[str]:
    fused = facts["fused_path"]
    if fused["reason"] == "Triton is not installed":
        return ["Triton is not installed, which the fused path needs: pip install triton, or set model.fused: false, which is slower"]
    # as kernels/attention.choose_backend has it
    if fused["works"] and not fused["flash_attention_4"] and _capability(facts["device"])[0] in (9, 10):
        return ["FlashAttention 4 is not installed, the fastest attention on this GPU: pip install 'qlora-lightning[fa4]' (a pre-release)"]
    return []


def _advise_room(facts: Facts) -> list[str]:
    lines = []
    free_gib = facts["device"]["memory_free_gib"]
    if free_gib < 6:  # a 7B base takes 3.5 GiB in NF4, then come adapter, optimizer and activations
        lines.append(f"{free_gib:.1f} GiB of memory free: too little for a 7B model; free some, or take a smaller base model")
    for name, least_gib in (("working_folder", 5), ("hugging_face_cache", 20)):
        disk = facts["disk"][name]
        if disk["free_gib"] < least_gib:
            way_out = "set HF_HOME to a larger disk" if name == "hugging_face_cache" else "clear some, or run elsewhere"
            lines.append(f"{disk['free_gib']:.1f} GiB of disk free at {disk['path']}, less than {least_gib}: {way_out}")
    if facts["host"]["cpu_cores"] < 4:
        lines.append(f"{facts['host']['cpu_cores']} CPU cores: reading and tokenizing data will be slow")
    return lines


def _advise_network(facts: Facts) -> list[str]:
    lines = []
    if not facts["network"]["online"]:
        lines.append(f"offline ({facts['network']['reason']}): only cached or local models and data sets can be used")
    if facts["wandb"]["mode"] == "offline":
        lines.append(f"W&B will record to a local folder ({facts['wandb']['reason']}); every run says at its end how to upload it")
    return lines


def _print(facts: Facts) -> None:
    table = Table(show_header=False, box=None, pad_edge=False)
    for section, value in _rows(facts):
        table.add_row(section, escape(value))
    console = Console(highlight=False)
    console.print(table)
    for line in facts["advice"]:
        console.print(f"- {line}", markup=False)
    console.print("training can run here" if facts["can_train"] else "training cannot run here", style="bold")


def _rows(facts: Facts) -> list[tuple[str, str]]:
    device, host, disk = facts["device"], facts["host"], facts["disk"]
    more = f" x {device['count']}" if device["count"] > 1 else ""
    capability = f", compute capability {device['compute_capability']}" if device["compute_capability"] else ""
    return [
        *((name, version or "-") for name, version in facts["versions"].items()),
        ("device", f"{device['name']}{more}{capability}"),
        ("device memory", f"{device['memory_free_gib']:.1f} of {device['memory_total_gib']:.1f} GiB free"),
        ("bf16", "yes" if device["bf16"] else "no"),
        ("4-bit product", f"correct on {facts['bitsandbytes']['device']}" if facts["bitsandbytes"]["works"] else "broken"),
        ("fused path", _fused_words(facts["fused_path"])),
        ("host", f"{host['cpu_cores']} cores, {host['memory_free_gib']:.1f} of {host['memory_total_gib']:.1f} GiB free"),
        *((f"disk, {name.replace('_', ' ')}", f"{part['free_gib']:.1f} GiB free at {part['path']}") for name, part in disk.items()),
        ("network", facts["network"]["reason"]),
        ("W&B", f"{facts['wandb']['mode']} ({facts['wandb']['reason']})"),
    ]


def _fused_words(fused: Facts) -> str:
    if not fused["works"]:
        return f"no: {fused['reason']}"
    return f"yes; attention by {fused['attention']}; FP8 {'too' if fused['fp8'] else 'not on this GPU'}"
