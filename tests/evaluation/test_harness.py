"""`evaluate`: lm-evaluation-harness on a base with its adapter gives what plain transformers and PEFT compute; how it is reported."""

import json
import shutil
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora_lightning.cli import main, user_line
from qlora_lightning.errors import UserError
from qlora_lightning.evaluation.harness import command, tasks
from qlora_lightning.evaluation.harness.model import language_model, run_tasks
from qlora_lightning.evaluation.harness.tasks import find_tasks, prepare_tasks
from qlora_lightning.loggers import RunWandbLogger
from qlora_lightning.modeling.trained import load_trained

TASKS = Path(__file__).with_name("harness_task")
QUESTIONS = [json.loads(line) for line in (TASKS / "colours.jsonl").read_text().splitlines()]
SHOTS = [json.loads(line) for line in (TASKS / "colours_shots.jsonl").read_text().splitlines()]


@pytest.fixture(autouse=True)
def among_the_tasks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The harness looks for a task's data files from the working folder; what it prepares stays out of the user's cache."""
    monkeypatch.chdir(TASKS)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))


@pytest.fixture(scope="module")
def adapter(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of PEFT's own making whose B is not zero: without it the answers are others."""
    folder = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(1)
    config = LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "down_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32), config).save_pretrained(folder)
    return folder


def run(*options: str) -> int:
    return main(["evaluate", *options])


def computed_directly(model: Any, tokenizer: Any, shots: int) -> list[list[float]]:
    """Log-likelihood of each choice behind its question, one at a time and without the harness."""
    opening = "One word is right.\n\n" + "".join(f"{row['question']}\nAnswer: {row['choices'][row['answer']]}\n\n" for row in SHOTS[:shots])
    found = []
    for row in QUESTIONS:
        prompt = tokenizer(f"{opening}{row['question']}\nAnswer:")["input_ids"]
        found.append([_log_likelihood(model, prompt, tokenizer(f" {choice}")["input_ids"]) for choice in row["choices"]])
    return found


def _log_likelihood(model: Any, prompt: list[int], answer: list[int]) -> float:
    with torch.no_grad():
        logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
    return float(logits.log_softmax(dim=-1).gather(1, torch.tensor(answer)[:, None]).sum())


@pytest.mark.parametrize("shots", [0, 2])
def test_equals_plain_transformers_and_peft(
    tiny_base: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, shots: int
) -> None:
    monkeypatch.setattr("qlora_lightning.modeling.trained.compute_dtype", lambda compute, device: torch.float32)
    options = ["--adapter", str(adapter), "--base_model", str(tiny_base), "--storage", "16bit", "--shots", str(shots)]
    assert run("--tasks", "colours.yaml", *options, "--samples", str(tmp_path / "samples.jsonl"), "--json") == 0
    result = json.loads(capsys.readouterr().out)["results"]["colours"]
    samples = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]

    base = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    expected = computed_directly(PeftModel.from_pretrained(base, adapter).eval(), AutoTokenizer.from_pretrained(tiny_base), shots)
    found = [[float(likelihood) for likelihood, _ in sample["filtered_resps"]] for sample in samples]
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-5, atol=1e-4)
    right = sum(row["answer"] == max(range(3), key=values.__getitem__) for row, values in zip(QUESTIONS, expected, strict=True))
    assert result["metrics"]["acc"]["value"] == pytest.approx(right / 6)
    assert (result["shots"], result["questions"], result["version"]) == (shots, 6, 3)


def test_a_4_bit_model_is_measured_as_it_is(tiny_base: Path) -> None:
    trained = load_trained(None, str(tiny_base), "nf4-dq")
    places = {name: (weight.data_ptr(), weight.dtype) for name, weight in trained.model.named_parameters()}
    values = {name: value.clone() for name, value in trained.model.state_dict().items()}
    found = find_tasks(["colours.yaml"])
    prepare_tasks(found, None, None)
    raw = run_tasks(trained, found)
    assert trained.model.model.layers[0].self_attn.q_proj.weight.dtype == torch.uint8
    assert {name: (weight.data_ptr(), weight.dtype) for name, weight in trained.model.named_parameters()} == places
    assert all(torch.equal(value, values[name]) for name, value in trained.model.state_dict().items())
    assert not raw["bos"]  # this tokenizer puts none
    assert trained.tokenizer.pad_token == "<pad>"


def test_prompts_begin_as_the_tokenizer_begins_them(tiny_base: Path) -> None:
    from tokenizers.processors import TemplateProcessing

    trained = load_trained(None, str(tiny_base), "16bit")
    assert language_model(trained).tok_encode("ab") == trained.tokenizer("ab")["input_ids"]
    trained.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    model = language_model(trained)
    assert model.tok_encode("ab")[0] == 0 and len(model.tok_encode("ab")) == 3
    assert model.tok_encode("<s>ab") == model.tok_encode("ab"), "a BOS that is written in the prompt is not doubled"


def test_cut_prompts_are_counted(tiny_base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained = load_trained(None, str(tiny_base), "16bit")
    trained.model.config.max_position_embeddings = 45
    found = find_tasks(["colours.yaml"])
    prepare_tasks(found, 2, None)
    assert run_tasks(trained, found, limit=2)["cut_prompts"] > 0
    assert "longer than the model's 45 tokens and lost their beginning" in " ".join(capsys.readouterr().err.split())


def _copied(folder: Path) -> Path:
    shutil.copytree(TASKS, folder)
    return folder


def test_generation_and_a_folder(
    tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--base_model", str(tiny_base), "--storage", "16bit", "--limit", "2", "--output", str(tmp_path / "results.json")]
    monkeypatch.chdir(_copied(tmp_path / "mine"))
    assert run("--tasks", "./", *options, "--samples", "./samples.jsonl") == 0
    assert len(Path("samples.jsonl").read_text().splitlines()) == 4
    captured = capsys.readouterr()
    assert captured.out == "" and "\r" not in captured.err, "no JSON asked for, no bars in a file"
    for shown in ("colours_spoken", "exact_match", "±", "questions"):
        assert shown in captured.err
    document = json.loads((tmp_path / "results.json").read_text())
    assert {name: result["questions"] for name, result in document["results"].items()} == {"colours": 2, "colours_spoken": 2}
    assert document["storage"] == "16bit" and document["settings"]["limit"] == 2
    assert document["versions"]["lm_eval"]
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.slow
def test_a_group_by_name(tiny_base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Slow because the harness' own 14,000 tasks are read."""
    options = ["--base_model", str(tiny_base), "--storage", "16bit", "--include_path", "."]
    assert run("--tasks", "all_colours", *options, "--json") == 0
    results = json.loads(capsys.readouterr().out)["results"]
    assert results["all_colours"]["metrics"]["acc"]["value"] == results["colours"]["metrics"]["acc"]["value"]


def test_an_unknown_task_names_the_near_ones() -> None:
    known = ["mmlu", "mmlu_anatomy", "mmlu_astronomy", "arc_easy"]
    assert tasks._named("mmlu_a*", known) == ["mmlu_anatomy", "mmlu_astronomy"]
    with pytest.raises(UserError, match=r"has no task 'mmlu_anatomie'; did you mean mmlu_anatomy"):
        tasks._named("mmlu_anatomie", known)


def document(model: str = "runs/x") -> dict[str, Any]:
    metrics = {
        "acc": {"value": 0.5, "stderr": 0.25, "higher_is_better": True},
        "word_perplexity": {"value": 9.0, "stderr": None},
        "empty": {"value": None, "stderr": None},
    }
    return {"model": model, "results": {"colours": {"metrics": metrics}}}


def test_names_in_wandb() -> None:
    assert command.wandb_names(document()) == {
        "eval/colours/acc": 0.5,
        "eval/colours/acc_stderr": 0.25,
        "eval/colours/word_perplexity": 9.0,
    }


def test_results_go_into_wandb_where_asked(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorded: list[Any] = []

    class Recorder:
        def __init__(self, project: str) -> None:
            recorded.append(project)

        def log_metrics(self, metrics: dict[str, float]) -> None:
            recorded.append(sorted(metrics))

        def finalize(self, status: str) -> None:
            recorded.append(status)

    monkeypatch.setattr(command, "RunWandbLogger", Recorder)
    options = ["--tasks", "colours.yaml", "--base_model", str(tiny_base), "--storage", "16bit", "--limit", "2"]
    assert run(*options) == 0 and recorded == []
    assert run(*options, "--wandb_project", "llamas") == 0
    assert recorded == ["llamas", ["eval/colours/acc", "eval/colours/acc_stderr"], "success"]


def test_results_join_the_wandb_run_of_a_training(tmp_path: Path) -> None:
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb" / "run-id.txt").write_text("abc123\n")
    config = "trainer: {logger: [{class_path: qlora_lightning.loggers.RunWandbLogger, init_args: {project: llamas, entity: me}}]}"
    (tmp_path / "config.yaml").write_text(config)
    logger = command._wandb_logger(None, tmp_path)
    assert isinstance(logger, RunWandbLogger) and logger.resume
    assert (logger._wandb_init["project"], logger._wandb_init["entity"], logger._choose_id()) == ("llamas", "me", "abc123")


def test_metrics_keep_their_filter_and_json_no_nan() -> None:
    values = {"name": "x", "sample_len": 3, "exact_match,strict": 0.5, "exact_match_stderr,strict": "N/A", "acc,none": float("nan")}
    assert command._metrics(values, {"acc": True}) == {
        "exact_match,strict": {"value": 0.5, "stderr": None, "higher_is_better": None},
        "acc": {"value": None, "stderr": None, "higher_is_better": True},
    }


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--shots", "-1"], "shots must be 0 or more, got -1"),
        (["--limit", "0"], "limit must be 1 or more, got 0"),
        (["--batch_size", "0"], "batch_size must be auto or 1 or more, got 0"),
        (["--storage", "int3"], "storage"),
        (["--output", "no/such/file.json"], "the folder of output no/such/file.json does not exist"),
        (["--output", "colours.yaml"], "colours.yaml exists; give another name or --overwrite"),
        (["--run", "."], "holds no W&B run"),
        (["--tasks", ","], "gives no task; name one"),
        (["--tasks", "absent.yaml"], "there is no task file or folder absent.yaml"),
        (["--tasks", "colours.jsonl,./nothing"], "there is no task file or folder nothing"),
    ],
)
def test_a_mistake_is_one_line_before_anything_loads(options: list[str], line: str, capsys: pytest.CaptureFixture[str]) -> None:
    defaults = [] if "--tasks" in options else ["--tasks", "colours.yaml"]
    assert run(*defaults, "--base_model", "no/such/base", *options) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("qlora-lightning: ") and line in error


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"colours.jsonl": "gone.jsonl"}, "task broken.yaml needs data that is not on this machine"),
        ({"dataset_path: json": "dataset_path: some/set"}, "needs data that is not on this machine (Couldn't reach 'some/set' on the Hub"),
        ({"output_type": "output_tipe"}, "task broken.yaml cannot be read"),
        ({"task: colours": "task: [colours"}, "task broken.yaml cannot be read"),
        ({"doc_to_choice: choices": "doc_to_choice: !function nowhere.pick"}, "task broken.yaml needs packages that are not installed"),
    ],
)
def test_a_task_that_cannot_be_read(change: dict[str, str], line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (TASKS / "colours.yaml").read_text()
    for old, new in change.items():
        assert old in text
        text = text.replace(old, new)
    monkeypatch.chdir(_copied(tmp_path / "mine"))
    Path("broken.yaml").write_text(text)
    with pytest.raises(UserError) as error:
        find_tasks(["broken.yaml"])
    assert line in (user_line(error.value) or "")


def test_more_shots_than_there_are(tiny_base: Path) -> None:
    found = find_tasks(["colours.yaml"])
    prepare_tasks(found, 3, None)
    with pytest.raises(UserError, match="exceeds the 2 that are available"):
        run_tasks(load_trained(None, str(tiny_base), "16bit"), found)


def test_a_task_made_for_no_example_keeps_none(capsys: pytest.CaptureFixture[str]) -> None:
    found = find_tasks(["colours_spoken.yaml"])
    prepare_tasks(found, 2, None)
    assert found["tasks"]["colours_spoken"].get_config("num_fewshot") == 0
    assert "colours_spoken is made for no example" in capsys.readouterr().err
