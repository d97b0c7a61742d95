"""``evaluate``: any task of lm-evaluation-harness on a base with its adapter or a merged model, without conversion."""

import importlib.metadata
import json as json_module
import math
from pathlib import Path
from typing import Any, Literal

import yaml
from rich.table import Table

from qlora_lightning import __version__
from qlora_lightning.console import console, say
from qlora_lightning.errors import UserError
from qlora_lightning.evaluation.output import check_output, write_output
from qlora_lightning.loggers import RunWandbLogger
from qlora_lightning.modeling.loading import Storage
from qlora_lightning.modeling.trained import TrainedModel, load_trained

PACKAGES = ("lm_eval", "torch", "transformers", "peft", "bitsandbytes")
Document = dict[str, Any]


def evaluate(
    tasks: str,
    adapter: str | None = None,
    base_model: str | None = None,
    storage: Storage | None = None,
    shots: int | None = None,
    limit: int | None = None,
    batch_size: int | Literal["auto"] = "auto",
    include_path: str | None = None,
    output: str | None = None,
    samples: str | None = None,
    wandb_project: str | None = None,
    run: str | None = None,
    seed: int | None = None,
    overwrite: bool = False,
    json: bool = False,
) -> None:
    """Measure a model on tasks of lm-evaluation-harness: a base with its adapter as trained, or a merged model, without conversion.

    Text is tokenized as the base's tokenizer does by itself (BOS where it puts one); no chat template is applied.

    Args:
        tasks: With commas between: names of tasks or groups, patterns as in mmlu_*, task files (.yaml), folders of them (./mytasks).
        adapter: Adapter folder, as in runs/quickstart/checkpoints/last; without one the base model is measured.
        base_model: Base (or merged) model; by default the one that the adapter was trained on.
        storage: How to hold the base; by default as the adapter was trained, without one nf4-dq. A merged model is meant for 16bit.
        shots: Examples before each question; by default each task's own number. A task made for none keeps none.
        limit: Only the first so many questions of each task, to try it out.
        batch_size: Prompts computed at once; auto takes as many as the GPU holds, 8 on a CPU.
        include_path: Folder of task files whose names may be used. Data files that a task names are found from the working folder.
        output: JSON file to write the results to.
        samples: JSON Lines file to write every question to, with what the model gave.
        wandb_project: Record the results as a new W&B run of this project (offline without a login or network).
        run: Run folder; the results go into the W&B run of that training.
        seed: Seed of the choice of examples and of sampling; by default the harness' own, so that numbers compare.
        overwrite: Replace the output files where they exist.
        json: Print the results as one JSON document on standard output.
    """
    _check(shots, limit, batch_size)
    for file in (output, samples):
        check_output(file, overwrite)
    logger = _wandb_logger(wandb_project, Path(run) if run else None)
    say("Loading lm-evaluation-harness")
    # not before: that takes seconds, and what is wrong above need not wait for it
    from qlora_lightning.evaluation.harness.model import run_tasks
    from qlora_lightning.evaluation.harness.tasks import find_tasks, prepare_tasks, seed_everything

    seed_everything(seed)
    found = find_tasks([name.strip() for name in tasks.split(",") if name.strip()], Path(include_path) if include_path else None)
    prepare_tasks(found, shots, seed)
    trained = load_trained(Path(adapter) if adapter else None, base_model, storage)
    say(f"Measuring {trained.name} on {len(found['tasks'])} {'task' if len(found['tasks']) == 1 else 'tasks'}")
    seed_everything(seed)
    raw = run_tasks(trained, found, batch_size, limit)
    settings = {"tasks": tasks, "shots": shots, "limit": limit, "batch_size": batch_size, "seed": seed, "include_path": include_path}
    document = summarise(raw, trained, settings)
    if samples:
        write_output(samples, _sample_lines(raw))
    if output:
        write_output(output, json_module.dumps(document, indent=2) + "\n")
    if json:
        print(json_module.dumps(document, indent=2))
    console.print(_table(document))
    if logger:
        logger.log_metrics(wandb_names(document))
        logger.finalize("success")


def summarise(raw: dict[str, Any], trained: TrainedModel, settings: dict[str, Any]) -> Document:
    """The results as they are kept: per task its metrics, shots, number of questions and version; and all that they depend on."""
    tasks = {
        name: {
            "metrics": _metrics(values, raw["higher_is_better"].get(name, {})),
            "shots": raw["n-shot"].get(name),
            "questions": values["sample_len"],
            "version": raw["versions"].get(name),
        }
        for name, values in raw["results"].items()
    }
    return {
        "model": trained.name,
        "storage": trained.storage,
        "compute": str(trained.dtype).removeprefix("torch."),
        "results": tasks,
        "settings": settings | {"max_length": raw["max_length"], "bos": raw["bos"], "cut_prompts": raw["cut_prompts"]},
        "versions": {"qlora-lightning": __version__, **{name: importlib.metadata.version(name) for name in PACKAGES}},
    }


def wandb_names(document: Document) -> dict[str, float]:
    """The results under the names that they have in W&B: ``eval/<task>/<metric>``, standard errors as ``<metric>_stderr``."""
    named: dict[str, float | None] = {}
    for task, result in document["results"].items():
        for metric, found in result["metrics"].items():
            named |= {f"eval/{task}/{metric}": found["value"], f"eval/{task}/{metric}_stderr": found["stderr"]}
    return {name: value for name, value in named.items() if value is not None}


def _metrics(values: dict[str, Any], higher_is_better: dict[str, bool | None]) -> dict[str, dict[str, Any]]:
    """``acc,none`` and ``acc_stderr,none`` of the harness as one entry ``acc``; a filter other than none stays in the name."""
    metrics = {}
    for key, value in values.items():
        name, comma, kind = key.partition(",")
        if comma and not name.endswith("_stderr"):
            stderr = _number(values.get(f"{name}_stderr,{kind}"))
            shown = name if kind == "none" else key
            metrics[shown] = {"value": _number(value), "stderr": stderr, "higher_is_better": higher_is_better.get(name)}
    return metrics


def _number(value: Any) -> float | None:
    """A finite number, else None: the harness writes N/A where it has no standard error, and JSON knows no NaN."""
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


def _table(document: Document) -> Table:
    table = Table(title=f"{document['model']} ({document['storage']}, {document['compute']})")
    for column in ("task", "metric", "value", "shots", "questions"):
        table.add_column(column, justify="left" if column in ("task", "metric") else "right")
    for task, result in document["results"].items():
        for metric, found in result["metrics"].items():
            value = "none" if found["value"] is None else f"{found['value']:.4f}"
            error = f" ± {found['stderr']:.4f}" if found["stderr"] is not None else ""
            table.add_row(task, metric, value + error, str(result["shots"]), str(result["questions"]))
    return table


def _sample_lines(raw: dict[str, Any]) -> str:
    rows = [{"task": task, **sample} for task, samples in raw["samples"].items() for sample in samples]
    return "".join(json_module.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)


def _check(shots: int | None, limit: int | None, batch_size: int | Literal["auto"]) -> None:
    if shots is not None and shots < 0:
        raise UserError(f"shots must be 0 or more, got {shots}; leave it out for each task's own number")
    if limit is not None and limit < 1:
        raise UserError(f"limit must be 1 or more, got {limit}; leave it out for all questions")
    if batch_size != "auto" and batch_size < 1:
        raise UserError(f"batch_size must be auto or 1 or more, got {batch_size}; leave it out for auto")


def _wandb_logger(project: str | None, run: Path | None) -> RunWandbLogger | None:
    """A logger for a new W&B run, or for the one that a run folder recorded, under its own project; None where nothing is asked for.

    Raises:
        UserError: the run folder recorded none.
    """
    if run is None:
        return RunWandbLogger(project=project) if project else None
    if not (run / "wandb" / "run-id.txt").is_file():
        raise UserError(f"{run} holds no W&B run (no wandb/run-id.txt); give --wandb_project NAME for a new one")
    recorded = _recorded_logger(run / "config.yaml")
    logger = RunWandbLogger(
        project=project or recorded.get("project") or "qlora-lightning", entity=recorded.get("entity"), save_dir=str(run)
    )
    logger.resume = True
    return logger


def _recorded_logger(config: Path) -> dict[str, Any]:
    """What a training's configuration says about its W&B logger; {} where it had none or the file is not there."""
    if not config.is_file():
        return {}
    loggers = yaml.safe_load(config.read_text(encoding="utf-8")).get("trainer", {}).get("logger")
    own = [one for one in loggers if "RunWandbLogger" in one["class_path"]] if isinstance(loggers, list) else []
    return own[0].get("init_args", {}) if own else {}
