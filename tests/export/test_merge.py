"""``merge`` from a run to a folder that plain transformers loads, with its figures, and everything that it refuses."""

import json
import os
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from forked import ended
from running import base_options, line_of
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora_lightning.cli import main
from qlora_lightning.export import candidates, command
from qlora_lightning.modeling.trained import load_trained


@pytest.fixture(scope="module")
def run(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of six steps with four held-out rows, whose adapter is large enough to be seen; its data lies in its folder."""
    root = tmp_path_factory.mktemp("merge")
    rows = root / "rows.jsonl"
    lines = [{"instruction": f"Say {'very ' * (n % 5)}{n}.", "output": f"{'so ' * (n * 7 % 11)}{n}"} for n in range(26)]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = ["--data.dataset.validation_size", "4", "--data.dataset.system_prompt", "Be brief."]
    assert main(["fit", *base_options(tiny_base, rows, root / "run"), *options]) == 0
    return root / "run"


@pytest.fixture
def adapter(run: Path, tmp_path: Path) -> Path:
    """A copy of its adapter."""
    return Path(shutil.copytree(run / "checkpoints" / "last", tmp_path / "adapter"))


def merged(adapter: Path, folder: Path, *options: str) -> dict[str, object]:
    """What merge.json holds after a merge."""
    assert main(["merge", str(adapter), "--output", str(folder), *options]) == 0
    found: dict[str, object] = json.loads((folder / "merge.json").read_text())
    return found


def test_merged_model_speaks_like_the_live_one(adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["merge", str(adapter), "--output", str(tmp_path / "out"), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == {"folder": str(tmp_path / "out"), **json.loads((tmp_path / "out" / "merge.json").read_text())}
    assert printed["chosen"] == "dequantized" and printed["rows"] == 4
    near, far = printed["merged"]["dequantized"]["kl"], printed["merged"]["original"]["kl"]
    assert 0 <= near["low"] <= near["value"] <= near["high"] < far["value"]
    live = load_trained(adapter, None)
    model, loading = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32, output_loading_info=True)
    assert not any(loading.values())
    ids = torch.arange(10, 50)[None]
    with torch.no_grad():
        p, q = live.model(ids).logits, model(ids).logits
    assert torch.allclose(p, q, atol=0.02) and torch.equal(p.argmax(-1), q.argmax(-1))
    assert not [path for path in tmp_path.iterdir() if ".partial" in path.name]
    modes = {path.stat().st_mode for path in (tmp_path / "out").iterdir()}
    assert len(modes) == 1, "whoever may read the configuration may read the weights"


def test_figures_stand_in_the_card(adapter: Path, tmp_path: Path) -> None:
    found = merged(adapter, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    for name in ("original", "dequantized"):
        kl = found["merged"][name]["kl"]  # type: ignore[index]
        assert f"| {name} | {kl['value']:.2g} ({kl['low']:.2g}-{kl['high']:.2g}) |" in card
    assert f"{found['tokens']:,} tokens of 4 rows" in card and str(found["command"]) in card and "called dequantized" in card
    compile("\n".join(text[4:] for text in card.splitlines() if text.startswith("    ") and "qlora-lightning" not in text), "card", "exec")
    assert "base_model:" not in card.split("---")[1], "the hub takes no card whose base is a local folder"


def test_settings_are_those_of_the_training(adapter: Path, tmp_path: Path, tiny_base: Path) -> None:
    """The chat template with its system prompt, the end of a turn, the base's configuration in another dtype."""
    merged(adapter, tmp_path / "out", "--dtype", "fp16")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    text = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True)
    assert text == "<s><|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in generation["eos_token_id"]
    config, base = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "out", tiny_base))
    assert config["dtype"] == "float16" and config["hidden_size"] == base["hidden_size"] and "quantization_config" not in config
    assert {value.dtype for value in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.float16}


def test_the_users_choice_is_written_and_both_are_measured(adapter: Path, tmp_path: Path) -> None:
    found = merged(adapter, tmp_path / "out", "--base", "original", "--max_kl", "100")
    assert found["chosen"] == "original" and found["reason"] == "asked for" and set(found["merged"]) == {"original", "dequantized"}  # type: ignore[call-overload]
    name = "model.norm.weight"
    assert "--base original --max_kl 100" in str(found["command"])
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")[name].float(), _base_tensor(adapter, name))


def _base_tensor(adapter: Path, name: str) -> torch.Tensor:
    base = json.loads((adapter / "qlora_lightning.json").read_text())["base_model"]
    return load_file(Path(base) / "model.safetensors")[name].float()


def test_a_plain_peft_adapter_is_measured_on_a_text(adapter: Path, tmp_path: Path, tiny_base: Path) -> None:
    for name in ("qlora_lightning.json", "recipe.yaml"):
        (adapter / name).unlink()
    text = tmp_path / "text.txt"
    text.write_text("The cat sat on the mat, and so on. " * 40)
    found = merged(adapter, tmp_path / "out", "--base_model", str(tiny_base), "--rows", str(text), "--tokens", "700")
    assert (found["tokens"], found["rows"], found["measured_on"]) == (700, 2, "the text text.txt")


def test_rows_of_the_users_are_written_out_as_in_training(adapter: Path, tmp_path: Path, rows_file: Path) -> None:
    found = merged(adapter, tmp_path / "out", "--rows", str(rows_file), "--tokens", "50")
    assert found["measured_on"] == "the rows of rows.jsonl" and 50 <= int(str(found["tokens"])) < 120


def test_one_without_4_bits_has_one_candidate(adapter: Path, tmp_path: Path) -> None:
    found = merged(adapter, tmp_path / "out", "--storage", "16bit")
    assert found["reason"] == "the only candidate" and set(found["merged"]) == {"original"}  # type: ignore[call-overload]


# ---- a merge that is too far away ----


def test_a_merge_worse_than_the_bound_is_refused_and_leaves_nothing(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = str(tmp_path / "out")
    line = line_of(capsys, "merge", str(adapter), "--output", output, "--max_kl", "0")
    assert line.startswith("a merged model must stay within --max_kl 0 nats a token of the live one, got ")
    assert line.endswith(" with dequantized weights; nothing is written; raise the bound, or --force writes it as it is")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]
    assert main(["merge", str(adapter), "--output", output, "--max_kl", "0", "--force"]) == 0
    assert json.loads((tmp_path / "out" / "merge.json").read_text())["max_kl"] == 0


def test_a_wrong_product_is_caught(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The fault that others ship: the adapter added with the wrong scale."""
    product = candidates.Merger.write

    def doubled(self: candidates.Merger, *arguments: object, **options: object) -> None:
        self._adapter.alpha *= 8
        product(self, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(candidates.Merger, "write", doubled)
    assert "must stay within --max_kl" in line_of(capsys, "merge", str(adapter), "--output", str(tmp_path / "out"))


# ---- what is refused before anything is loaded ----


@pytest.fixture
def nothing_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*arguments: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(command, "load_trained", load)


@pytest.mark.usefixtures("nothing_loads")
@pytest.mark.parametrize(
    "options, line",
    [
        (["--tokens", "0"], "need tokens >= 1 and max_kl >= 0, got 0 and 0.02"),
        (["--output", "missing/out"], "the folder of output missing/out does not exist; make it first"),
        (["--gguf", "q4_k_m"], "--gguf must be one of f32, f16, bf16, q8_0"),
        (["--base", "dequantized", "--storage", "16bit"], "--base dequantized needs a live base in 4 bits, but its storage is 16bit"),
        (["--template", "chatmll"], "got 'chatmll', nearest is chatml"),
        (["--rows", "nowhere.jsonl"], "nowhere.jsonl"),
    ],
)
def test_mistakes_are_one_line(adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], line: str) -> None:
    assert line in line_of(capsys, "merge", str(adapter), "--output", str(tmp_path / "out"), *options)


@pytest.mark.usefixtures("nothing_loads")
def test_an_output_is_never_replaced(adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "exists, and a merged model replaces nothing" in line_of(capsys, "merge", str(adapter), "--output", str(tmp_path))


@pytest.mark.usefixtures("nothing_loads")
def test_a_run_is_not_its_adapter(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = line_of(capsys, "merge", str(run), "--output", str(tmp_path / "out"))
    assert line == f"{run} is a run, merge takes one of its adapters; give {run / 'checkpoints' / 'last'}"


@pytest.mark.usefixtures("nothing_loads")
def test_rows_that_are_not_there_or_not_held_out_any_more(
    run: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ("merge", str(adapter), "--output", str(tmp_path / "out"))
    rows = run.parent / "rows.jsonl"
    kept = rows.read_text()
    try:
        rows.write_text(kept.replace("Say", "Tell"))
        assert "have changed since (fingerprint" in line_of(capsys, *asked)
        rows.unlink()
        line = line_of(capsys, *asked)
    finally:
        rows.write_text(kept)
    assert f"the rows that {adapter} was trained on cannot be read (" in line and line.endswith(
        "give held-out rows or a text with --rows FILE"
    )
    (adapter / "recipe.yaml").unlink()
    assert "a merge is measured on held-out rows, but " in line_of(capsys, *asked)


@pytest.mark.usefixtures("nothing_loads")
def test_a_base_that_is_stored_quantised_has_no_weights_to_merge_into(
    adapter: Path, tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = shutil.copytree(tiny_base, tmp_path / "base")
    config = json.loads((base / "config.json").read_text()) | {"quantization_config": {"quant_method": "gptq"}}
    (base / "config.json").write_text(json.dumps(config))
    line = line_of(capsys, "merge", str(adapter), "--output", str(tmp_path / "out"), "--base_model", str(base))
    assert line.endswith("is stored quantised (gptq); give the original one with --base_model")


@pytest.mark.usefixtures("nothing_loads")
def test_a_disk_that_is_too_small_is_known_before(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    assert "merging needs 1 GB beside" in line_of(capsys, "merge", str(adapter), "--output", str(tmp_path / "out"))


# ---- kills ----


def killed_merge(adapter: str, output: str) -> None:
    """In a process of its own."""
    candidates.load_merged = lambda *arguments: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment]
    main(["merge", adapter, "--output", output])


@pytest.mark.slow
def test_a_kill_leaves_no_half_folder_and_the_next_merge_is_whole(adapter: Path, tmp_path: Path) -> None:
    """Killed while it measures what it has written: the name is free, and what is left over goes with the next merge."""
    output = tmp_path / "out"
    assert ended(killed_merge, str(adapter), str(output)) == -signal.SIGKILL
    assert not output.exists() and (tmp_path / "out.partial" / "original" / "model.safetensors").is_file()
    began = time.time()
    merged(adapter, output)
    assert (output / "model.safetensors").stat().st_mtime >= began - 1 and not (tmp_path / "out.partial").exists()


def test_a_model_that_does_not_load_whole_is_not_kept(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    empty = candidates.Merger.__init__

    def forgetful(self: candidates.Merger, *arguments: object) -> None:
        empty(self, *arguments)  # type: ignore[arg-type]
        del self._empty["model.norm.weight"]

    monkeypatch.setattr(candidates.Merger, "__init__", forgetful)
    line = line_of(capsys, "merge", str(adapter), "--output", str(tmp_path / "out"))
    assert line.startswith("the merged model would load without model.norm.weight (1 tensors missing)")
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()
