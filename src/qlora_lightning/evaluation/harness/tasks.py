"""The tasks of lm-evaluation-harness: found by name, pattern, file or folder, and read with their data before any model is loaded."""

import difflib
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import filter as matching
from pathlib import Path

import numpy as np
import torch
from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml
from lm_eval.tasks.manager import TaskDict

from qlora_lightning.console import say
from qlora_lightning.errors import UserError
from qlora_lightning.evaluation.harness.log import quiet_harness
from qlora_lightning.modeling.sources import first_line


def find_tasks(wanted: list[str], include_path: Path | None = None) -> TaskDict:
    """The tasks that ``wanted`` names, with their data, and the groups they are averaged in.

    Args:
        wanted: Names of tasks, groups or tags, patterns such as ``mmlu_*``, task files (.yaml), or folders of them (written with a slash).
        include_path: Folder of task files whose names may be used too.

    Raises:
        UserError: there is no such task or file, or a task lacks its data or a package.
    """
    folders = [Path(one) for one in wanted if _is_path(one) and not _is_file(one)]
    included = [*([include_path] if include_path else []), *folders]
    for folder in included:
        if not folder.is_dir():
            raise UserError(f"there is no task file or folder {folder}; give a .yaml file, a folder of them, or the name of a task")
    found: TaskDict = {"tasks": {}, "groups": {}, "group_map": {}}
    with quiet_harness():
        manager = _manager(wanted, included)
        for name in _resolved(wanted, manager):
            with _task_errors(name):
                loaded = manager.load([name])
            found["tasks"] |= loaded["tasks"]
            found["groups"] |= loaded["groups"]
            found["group_map"] |= loaded["group_map"]
    if not found["tasks"]:
        raise UserError(f"--tasks {','.join(wanted)} gives no task; name one, or a folder with task files (.yaml)")
    return found


def prepare_tasks(found: TaskDict, shots: int | None, seed: int | None) -> None:
    """Set how many examples go before each question, and the seed that they are drawn with; by default the harness' own.

    A task that its file fixes at no example keeps none, as in the harness.
    """
    for name, task in found["tasks"].items():
        own = task.get_config("num_fewshot")
        if shots and own == 0:
            say(f"warning: {name} is made for no example before its questions and keeps none")
        elif shots is not None or own is None:
            task.set_config("num_fewshot", shots or 0)
        task.set_fewshot_seed(DEFAULT_OTHER_SEED if seed is None else seed)


def seed_everything(seed: int | None) -> None:
    """Seed what tasks and sampling draw from; by default as the harness does."""
    random.seed(DEFAULT_RANDOM_SEED if seed is None else seed)
    np.random.seed(DEFAULT_OTHER_SEED if seed is None else seed)
    torch.manual_seed(DEFAULT_OTHER_SEED if seed is None else seed)


def _is_path(name: str) -> bool:
    return os.sep in name or name.endswith((".yaml", ".yml"))


def _is_file(name: str) -> bool:
    return Path(name).is_file()


def _manager(wanted: list[str], included: list[Path]) -> TaskManager:
    """The harness' index of tasks; its own 14,000 take seconds to read and are left out where nothing but files is asked for."""
    named = any(not _is_path(name) or (_is_file(name) and "group" in _read_file(name)) for name in wanted)
    if named:
        say("Reading the task list of lm-evaluation-harness")
    return TaskManager(include_path=[str(folder) for folder in included], include_defaults=named)


def _read_file(name: str) -> dict[str, object]:
    with _task_errors(name):
        return load_yaml(name, resolve_func=False)


def _resolved(wanted: list[str], manager: TaskManager) -> Iterator[str]:
    """What ``wanted`` stands for, a name or a file at a time."""
    for name in wanted:
        if _is_file(name) and _is_path(name):
            yield name
        elif _is_path(name):
            yield from TaskManager(include_path=name, include_defaults=False).all_subtasks
        else:
            yield from _named(name, manager.all_tasks)


def _named(name: str, known: list[str]) -> list[str]:
    if found := matching(known, name):
        return found
    near = ", ".join(difflib.get_close_matches(name, known, n=4))
    advice = f"did you mean {near}?" if near else "give --include_path FOLDER for tasks of your own"
    raise UserError(f"lm-evaluation-harness has no task {name!r}; {advice}")


@contextmanager
def _task_errors(name: str) -> Iterator[None]:
    """One line for what keeps a task from being read. Every other exception counts as a broken file: tasks run code of their own."""
    try:
        yield
    except ImportError as error:
        raise UserError(f"task {name} needs packages that are not installed ({first_line(error)}); install them and try again") from error
    except (ConnectionError, FileNotFoundError) as error:
        raise UserError(
            f"task {name} needs data that is not on this machine ({first_line(error)}); go online (unset HF_HUB_OFFLINE) or correct a path"
        ) from error
    except Exception as error:
        raise UserError(f"task {name} cannot be read ({type(error).__name__}: {first_line(error)}); correct it or leave it out") from error
