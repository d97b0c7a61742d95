"""The command line: LightningCLI's fit, validate, test and predict, and one table of plain commands. Nothing imports this file."""

import importlib
import inspect
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable
from typing import Any

from qlora_lightning import __version__
from qlora_lightning.errors import UserError, memory_error
from qlora_lightning.redaction import redacted

TRAINER_COMMANDS = {
    "fit": "train an adapter: fit --config RECIPE",
    "validate": "held-out loss, and MMLU: validate --config RECIPE --ckpt_path last --mmlu.path FOLDER",
    "test": "the same under the name test/",
    "predict": "answers to the held-out prompts, as JSON Lines in the run folder",
}
# command -> (module:function that parses the arguments itself, as it takes every option of fit, and gives the exit code), what it does
PARSING_COMMANDS = {
    "data": ("qlora_lightning.inspection:data", "see what is trained on, and audit the rows: data inspect --config RECIPE"),
    "plan": ("qlora_lightning.planning:plan", "what a fit will do, and whether it fits: plan --config RECIPE"),
    "verify": ("qlora_lightning.verification:verify", "is training exact on this model, data and machine: verify --config RECIPE"),
}
# command -> (module:function, or sub-commands of the same kind), what it does
PLAIN_COMMANDS: dict[str, tuple[str | dict[str, str], str]] = {
    "chat": ("qlora_lightning.chat:chat", "talk to a base model with an adapter"),
    "generate": ("qlora_lightning.answering:generate", "answer a file of prompts, as JSON Lines"),
    "perplexity": ("qlora_lightning.evaluation.perplexity:perplexity", "perplexity on any text, by strided windows"),
    "crows-pairs": ("qlora_lightning.evaluation.crows_pairs:crows_pairs", "bias in nine categories, by likelihood (CrowS-Pairs)"),
    "evaluate": ("qlora_lightning.evaluation.harness.command:evaluate", "any task of lm-evaluation-harness, on a base with its adapter"),
    "judge": ("qlora_lightning.evaluation.judge.command:judge", "let a model judge answers against each other, as JSON Lines"),
    "elo": ("qlora_lightning.evaluation.tournament.command:elo", "ratings of models from verdicts, with intervals, a picture and a report"),
    "agreement": ("qlora_lightning.evaluation.tournament.agreement:agreement", "how far judges agree: Kendall, Spearman, Fleiss"),
    "merge": ("qlora_lightning.export.command:merge", "an adapter into a 16-bit model, with evidence of what that costs"),
    "push": ("qlora_lightning.export.hub:push", "an adapter or a merged model to the hub; without --yes it only says what it would do"),
    "report": ("qlora_lightning.report.command:report", "one HTML page of one or several runs"),
    "recipes": (
        {
            "list": "qlora_lightning.recipes:recipes_list",
            "show": "qlora_lightning.recipes:recipes_show",
            "copy": "qlora_lightning.recipes:recipes_copy",
        },
        "list, show or copy the recipes that come with the tool",
    ),
    "doctor": ("qlora_lightning.doctor:doctor", "what this machine can do, and what will be slow"),
}


WAYS_ON = {
    "fit": "resume with the same command and --ckpt_path last",
    "generate": "the answers so far are kept, and the same command (without --overwrite) goes on",
    "judge": "the verdicts so far are kept, and the same command (without --overwrite) goes on",
}
"""What a user can do after an interruption; commands that are not here begin anew."""
SWITCHES = ("--json", "--overwrite", "--strict", "--orders", "--dry_run", "--force", "--measure", "--yes", "--private")
EVAL_PACKAGES = ("lm_eval", "matplotlib", "openai", "scipy", "statsmodels")
"""What the extra ``eval`` installs."""


_DIED = re.compile(r"DataLoader worker \(pid.*\d\) (is killed by signal: [\w ]+|exited unexpectedly)")
"""What torch says when a loader's process is gone."""


def main(argv: list[str] | None = None) -> int:
    """Run a command and give its exit code: 0, 2 for a user's mistake (one line on standard error), 1 for a defect of ours."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    arguments = _complete_flags([argument for argument in arguments if argument != "--debug"])
    _quieten()
    try:
        return _run(arguments)
    except Exception as error:
        line = user_line(error)
        if debug or line is None:
            raise
        from qlora_lightning.console import harmless  # only now: rich takes a while to import

        sys.stderr.write(f"qlora-lightning: {harmless(redacted(line))}\n")
        return 2
    except KeyboardInterrupt:
        if (way_on := WAYS_ON.get("".join(arguments[:1]))) is not None:
            sys.stderr.write(f"qlora-lightning: interrupted; {way_on}\n")
        return 130


def _run(arguments: list[str]) -> int:
    command = arguments[0] if arguments else "--help"
    if command in ("--help", "-h", "help"):
        print(overview())
        return 0
    if command == "--version":
        print(__version__)
        return 0
    if command in TRAINER_COMMANDS:
        from qlora_lightning.interruption import interruptible

        interruptible(arguments, lambda: _train(arguments))
        return 0
    if command in PARSING_COMMANDS:
        parse_and_run = _load(PARSING_COMMANDS[command][0])
        _quieten()  # again, as above
        return int(parse_and_run(arguments[1:]))
    if command in PLAIN_COMMANDS:
        return _run_plain(command, arguments[1:])
    raise UserError(f"there is no command {command!r}{_nearest(command)}; see qlora-lightning --help")


def _train(arguments: list[str]) -> None:
    from qlora_lightning.lightning_cli import run

    _quieten()  # again: Lightning sets its log level when it is imported
    run(arguments)


def _run_plain(command: str, arguments: list[str]) -> int:
    from jsonargparse import auto_cli, set_parsing_settings

    from qlora_lightning.parser import CommandParser, gather_lists

    set_parsing_settings(docstring_parse_attribute_docstrings=True, parse_optionals_as_positionals=True)
    target, summary = PLAIN_COMMANDS[command]
    component: Any = _load(target) if isinstance(target, str) else {name: _load(path) for name, path in target.items()}
    if isinstance(target, str):
        arguments, summary = gather_lists(component, arguments), inspect.getdoc(component) or summary
    summary = summary.partition("\n\nArgs:")[0].partition("\n\nRaises:")[0]
    result = auto_cli(
        component, args=arguments, as_positional=False, parser_class=CommandParser, prog=f"qlora-lightning {command}", description=summary
    )
    return result if isinstance(result, int) else 0


def _load(path: str) -> Callable[..., Any]:
    module, _, name = path.partition(":")
    function: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return function


def user_line(error: BaseException) -> str | None:
    """One line for an error that a user can mend, None for a defect of ours."""
    if isinstance(error, UserError):
        # from a loader's process an error comes with that process's traceback, the error's own line at its end
        return " ".join(str(error).rpartition("qlora_lightning.errors.UserError: ")[2].split())
    if (memory := memory_error(error)) is not None:  # in a step of a fit, a note says more: callbacks/out_of_memory.py
        return getattr(memory, "__notes__", [None])[-1] or (
            f"out of memory ({' '.join(str(memory).split())[:160]}); free some, use a smaller base or batch, or a device that has more"
        )
    if isinstance(error, RuntimeError) and (died := _DIED.match(str(error))):
        return (
            f"a process that makes batches {died[1]}, most often because the kernel ended it for lack of memory; checkpoints stay: "
            "free some memory or set --data.num_workers 0, and go on with the same command and --ckpt_path last"
        )
    if isinstance(error, ModuleNotFoundError) and (package := (error.name or "").partition(".")[0]) in EVAL_PACKAGES:
        return f"this command needs the package {package}; install what evaluations need: pip install 'qlora-lightning[eval]'"
    if isinstance(error, OSError) and error.errno == 28:
        return f"no space left on the disk that holds {error.filename or 'the run folder'}; free some, then go on (fit: --ckpt_path last)"
    if type(error).__name__ == "MisconfigurationException":  # Lightning's word for a setting that cannot work
        return " ".join(str(error).split())
    return None


def overview() -> str:
    """The commands, a line each."""
    rows = TRAINER_COMMANDS | {name: summary for name, (_, summary) in (*PARSING_COMMANDS.items(), *PLAIN_COMMANDS.items())}
    lines = [f"  {name:12} {summary}" for name, summary in rows.items()]
    return "\n".join(
        [
            f"qlora-lightning {__version__}: QLoRA finetuning on PyTorch Lightning",
            "",
            "usage: qlora-lightning COMMAND [options] [--debug]",
            "",
            *lines,
            "",
            "Start with: qlora-lightning fit --config quickstart",
            "Every command explains its options with --help; --debug shows the traceback of an error.",
        ]
    )


def _complete_flags(arguments: list[str]) -> list[str]:
    """Let a switch stand alone: jsonargparse wants a value after every option."""
    followers = [*arguments[1:], "--"]
    return [
        f"{argument}=true" if argument in SWITCHES and follower.startswith("-") else argument
        for argument, follower in zip(arguments, followers, strict=False)
    ]


def _nearest(command: str) -> str:
    import difflib

    near = difflib.get_close_matches(command, [*TRAINER_COMMANDS, *PARSING_COMMANDS, *PLAIN_COMMANDS], n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def _quieten() -> None:
    """Turn off what libraries say at every start and no user can act on."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # free memory in one piece: 8.4 GiB reserved instead of 9.8 at 7B, 16 x 512
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    for name in ("lightning.pytorch", "lightning.fabric", "bitsandbytes", "torchao"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for message in (
        ".*does not have many workers.*",
        ".*LightningCLI's args parameter.*",
        ".*Checkpoint directory .* exists and is not empty.*",
        ".*gradient_checkpointing.* is deprecated.*",
        ".*treespec.*",
        ".*cannot be converted to a JitArgument.*",
        ".*Total length of `list` across ranks is zero.*",
        ".*Trying to infer the `batch_size`.*",
        ".*modules in eval mode.*",
    ):
        warnings.filterwarnings("ignore", message=message)


if __name__ == "__main__":
    sys.exit(main())
