"""Processes that are forked from one that has imported everything: a start costs a tenth of a second and not ten.

Not where there are GPUs, which a process cannot use that is forked from one that has looked for them; there they are fresh ones.
"""

from collections.abc import Callable
from multiprocessing import get_context
from typing import Any

import torch

START = "spawn" if torch.cuda.is_available() else "forkserver"
FORKED = get_context(START)
FORKED.set_forkserver_preload(["qlora_lightning.lightning_cli", "pandas", "pytest", "byte_tokenizer", "running"])


def ended(function: Callable[..., Any], *arguments: Any, seconds: float = 300.0) -> int | None:
    """Run ``function(*arguments)``, of a test's module, in a process of its own; its exit code, None if it was not done in time."""
    process = FORKED.Process(target=function, args=arguments)
    process.start()
    process.join(seconds)
    process.kill()
    return process.exitcode
