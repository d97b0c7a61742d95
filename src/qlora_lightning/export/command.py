"""``merge``: an adapter into a 16-bit model, and the evidence that it says what the live one says."""

import json as json_module
import math
import shlex
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from qlora_lightning.card import merged_card
from qlora_lightning.console import console, say
from qlora_lightning.data.templates import find_template
from qlora_lightning.disk import sync, sync_tree
from qlora_lightning.errors import UserError
from qlora_lightning.export.candidates import Base, Candidates, announce, free_memory, record_live
from qlora_lightning.export.evidence import LiveRecord, Measured, scored_tokens
from qlora_lightning.export.folder import base_config, base_folder, set_chat_template, write_settings
from qlora_lightning.export.gguf import find_converter, write_gguf
from qlora_lightning.export.heldout import Heldout, heldout_of_file, heldout_of_run
from qlora_lightning.export.verdict import HEADINGS, MAX_KL, Verdict, as_json, cells, check, judge, table
from qlora_lightning.export.weights import AdapterFactors, Merger, TensorFiles, say_sizes
from qlora_lightning.modeling.adapters import adapter_config, adapter_metadata
from qlora_lightning.modeling.foreign import check_base_files
from qlora_lightning.modeling.loading import QuantizationSpec, Storage
from qlora_lightning.modeling.sources import hub_errors
from qlora_lightning.modeling.tokenizer import load_tokenizer
from qlora_lightning.modeling.trained import load_trained

MERGE_FILE = "merge.json"
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def merge(
    adapter: str,
    output: str,
    base: Literal["auto", "original", "dequantized"] = "auto",
    base_model: str | None = None,
    storage: Storage | None = None,
    rows: str | None = None,
    template: str | None = None,
    tokens: int = 4096,
    max_kl: float = MAX_KL,
    force: bool = False,
    dtype: Literal["bf16", "fp16"] = "bf16",
    gguf: str | None = None,
    json: bool = False,
) -> None:
    """Merge an adapter into a 16-bit model that plain transformers loads, and measure what that costs.

    Two models are made: the base's original weights + adapter, and the weights as 4-bit storage has them + adapter, on which it was
    trained. Each is loaded from the files that were written and compared with the live model (4-bit base, adapter beside it) on held-out
    rows: KL divergence and top-1 agreement a token, and perplexities. The nearer one is kept; the figures go into its card and merge.json.

    Args:
        adapter: Adapter folder, as in RUN/checkpoints/last; or a plain PEFT one.
        output: Folder of the merged model; it must not exist, and appears when all is done.
        base: auto takes the nearer one to the live model; original or dequantized takes that one. Both are measured.
        base_model: The base; by default the one that the adapter was trained on.
        storage: How the live model holds the base; by default as the adapter was trained, for a plain PEFT adapter nf4-dq.
        rows: Instruction rows (.jsonl, .json, .csv, .tsv, .parquet, .arrow, .zip) or a text to measure on; by default the rows that the run
            held out. They must not have been trained on.
        template: How instruction rows of a plain PEFT adapter are written out; an adapter of this tool knows.
        tokens: Measure on so many scored tokens. While measuring, each takes 4 bytes x the vocabulary on the disk of the output.
        max_kl: Refuse a model whose mean KL is above this, in nats a token. At 0.02, text of the live model's is 2 % more perplexing to it.
        force: Write it all the same.
        dtype: Of the merged weights.
        gguf: Also write GGUF of this type (f16, bf16, q8_0, ...) by llama.cpp's converter, where that is installed.
        json: Print one JSON document on standard output and nothing else there.
    """
    began, command = time.perf_counter(), _command(locals())
    if tokens < 1 or not max_kl >= 0:
        raise UserError(f"need tokens >= 1 and max_kl >= 0, got {tokens} and {max_kl:g}; leave them out for the defaults")
    converter = find_converter(gguf) if gguf else None
    target = Path(output)
    _check_target(target)
    job = _prepare(Path(adapter), base_model, storage, template, _DTYPES[dtype])
    if base == "dequantized" and _quantization(job.storage) is None:
        raise UserError(f"--base dequantized needs a live base in 4 bits, but its storage is {job.storage}; use --base original")
    heldout = _heldout(job, rows, tokens)
    _check_room(target, job, scored_tokens(heldout.rows))
    beside = target.with_name(f"{target.name}.partial")
    shutil.rmtree(beside, ignore_errors=True)  # of a merge that was killed
    beside.mkdir()
    try:
        verdict, said = _measure(job, heldout, beside, None if base == "auto" else base, max_kl)
        console.print(table(verdict))
        if not force:
            check(verdict)
        account = _account(job, heldout, verdict, said) | {"seconds": time.perf_counter() - began, "command": command}
        _write_account(beside / verdict.chosen, target, job, account, verdict)
        sync_tree(beside / verdict.chosen)
        (beside / verdict.chosen).rename(target)
        sync(target.parent)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    say(f"Merged model ({verdict.chosen} weights, {verdict.reason}): {target}")
    if converter and gguf:
        file = write_gguf(converter, target, gguf)
        account["gguf"] = file.name
        say(f"GGUF: {file}")
    if json:
        print(json_module.dumps({"folder": str(target), **account}, indent=2))


@dataclass
class _Job:
    """What is merged, checked as far as that needs no model."""

    adapter: Path
    metadata: dict[str, Any]
    base_model: str
    folder: Path
    """Of the base."""
    storage: Storage
    style: dict[str, Any]
    """Template and system prompt of the training."""
    vocabulary: int
    dtype: torch.dtype
    factors: AdapterFactors
    merger: Merger


def _prepare(adapter: Path, base_model: str | None, storage: Storage | None, template: str | None, dtype: torch.dtype) -> _Job:
    if (adapter / "checkpoints" / "last").is_dir():
        raise UserError(f"{adapter} is a run, merge takes one of its adapters; give {adapter / 'checkpoints' / 'last'}")
    metadata = adapter_metadata(adapter)
    source = base_model or metadata.get("base_model") or adapter_config(adapter).base_model_name_or_path
    if not source:
        raise UserError(f"{adapter} does not say which base model it is for; add --base_model NAME")
    if template:
        find_template(template)
    factors = AdapterFactors(adapter)
    folder = base_folder(source, metadata.get("revision"))
    config = base_config(folder)
    with hub_errors(source):
        check_base_files(str(folder), None, source)
    files = TensorFiles.of_model(folder)
    empty = files.empty()
    factors.check(empty, bool(config.get("tie_word_embeddings")))
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    merger = Merger(files, factors, dtype, device)
    style = {"template": template or metadata.get("template"), "system_prompt": metadata.get("system_prompt")}
    held = storage or QuantizationSpec(**metadata.get("quantization", {})).storage
    return _Job(adapter, metadata, source, folder, held, style, _vocabulary(config), dtype, factors, merger)


def _vocabulary(config: dict[str, Any]) -> int:
    """The width of the model's logits."""
    return int(config.get("text_config", config)["vocab_size"])


def _heldout(job: _Job, rows: str | None, tokens: int) -> Heldout:
    """What is measured on, before any weight is loaded."""
    if rows is None:
        return heldout_of_run(job.adapter, job.metadata, tokens)
    return heldout_of_file(Path(rows), load_tokenizer(job.base_model, job.metadata.get("revision")), job.style, tokens)


def _measure(job: _Job, heldout: Heldout, beside: Path, base: Base | None, max_kl: float) -> tuple[Verdict, str]:
    """Make the candidates in ``beside``, all but the chosen one of which are deleted there; also says which chat template they carry."""
    announce(scored_tokens(heldout.rows), len(heldout.rows), heldout.source)
    record = LiveRecord(beside / "live.f32", heldout.rows, job.vocabulary)
    trained = load_trained(job.adapter, job.base_model, job.storage)
    live, tokenizer = record_live(trained, heldout.rows, record), trained.tokenizer
    said = set_chat_template(tokenizer, job.adapter, job.style)
    del trained  # before a merged model is loaded
    free_memory()
    say_sizes(job.merger)
    candidates = Candidates(job.merger, live, _quantization(job.storage), record, heldout.rows)
    measured: dict[Base, Measured] = {}
    for name in candidates.bases:
        measured[name] = candidates.make(
            name, beside / name, lambda folder: write_settings(folder, job.folder, job.dtype, tokenizer, job.style["template"])
        )
    verdict = judge(live.measured, measured, base, max_kl)
    for name in set(measured) - {verdict.chosen}:
        shutil.rmtree(beside / name)
    return verdict, said


def _quantization(storage: Storage) -> QuantizationSpec | None:
    if storage in ("16bit", "int8"):
        return None
    kind: Any = storage.removesuffix("-dq")
    return QuantizationSpec(kind, storage.endswith("-dq"))


# ---- the account ----


def _command(given: dict[str, Any]) -> str:
    """The command line that makes the same again."""
    defaults = {"base": "auto", "tokens": 4096, "max_kl": MAX_KL, "force": False, "dtype": "bf16"}
    names = ("base", "base_model", "storage", "rows", "template", "tokens", "max_kl", "force", "dtype", "gguf")
    words = ["qlora-lightning", "merge", given["adapter"], "--output", given["output"]]
    for name in names:
        if given[name] != defaults.get(name):
            words += [f"--{name}"] if given[name] is True else [f"--{name}", str(given[name])]
    return shlex.join(words)


def _account(job: _Job, heldout: Heldout, verdict: Verdict, chat_template: str) -> dict[str, Any]:
    return {
        **as_json(verdict),
        "rows": len(heldout.rows),
        "tokens": scored_tokens(heldout.rows),
        "measured_on": heldout.source,
        "base_model": job.base_model,
        "adapter": str(job.adapter),
        "lora": {"r": job.factors.r, "alpha": job.factors.alpha},
        "chat_template": chat_template,
        "live_storage": job.storage,
        "dtype": str(job.dtype).removeprefix("torch."),
        "bytes": job.merger.num_bytes,
    }


def _write_account(folder: Path, target: Path, job: _Job, account: dict[str, Any], verdict: Verdict) -> None:
    (folder / MERGE_FILE).write_text(json_module.dumps(account, indent=2) + "\n", encoding="utf-8")
    card = merged_card(account, job.metadata, target, HEADINGS, cells(verdict))
    (folder / "README.md").write_text(card, encoding="utf-8")


# ---- the disk ----


def _check_target(target: Path) -> None:
    if target.exists():
        raise UserError(f"output {target} exists, and a merged model replaces nothing; give another name or delete it first")
    if not target.parent.is_dir():
        raise UserError(f"the folder of output {target} does not exist; make it first")


def _check_room(target: Path, job: _Job, tokens: int) -> None:
    needed, free = 2 * job.merger.num_bytes + 4 * tokens * job.vocabulary, shutil.disk_usage(target.parent).free
    if needed > free:
        raise UserError(
            f"merging needs {math.ceil(needed / 1e9)} GB beside {target} (two models and the live one's words), got {free / 1e9:.0f} free; "
            "free some, give an output elsewhere, or lower --tokens"
        )
