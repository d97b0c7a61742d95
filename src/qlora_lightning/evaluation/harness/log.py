"""What lm-evaluation-harness says while it works: nothing on standard output, little in its log, bars on terminals only."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from functools import partialmethod
from typing import Any

from tqdm import tqdm

from qlora_lightning.console import is_live, say


class HarnessLog(logging.Handler):
    """Keeps of the harness' log what a user needs: its errors, and how often it cut a prompt."""

    cut_prompts = 0

    def emit(self, record: logging.LogRecord) -> None:
        """Count or say ``record``, or drop it."""
        text = record.getMessage()
        if "exceeds model's maximum length" in text or "Left truncation applied" in text:
            self.cut_prompts += 1
        elif record.levelno >= logging.ERROR:
            say(f"lm-evaluation-harness: {text}")


@contextmanager
def quiet_harness() -> Iterator[HarnessLog]:
    """Inside, the harness prints to standard error, its log goes to the one that is given, and its bars appear on a terminal alone."""
    log, logger = HarnessLog(logging.WARNING), logging.getLogger("lm_eval")
    propagate, logger.propagate = logger.propagate, False
    logger.addHandler(log)
    original = tqdm.__init__
    tqdm.__init__ = partialmethod(_bar, original)  # the harness and datasets ask for bars whatever the output is
    try:
        with redirect_stdout(sys.stderr):
            yield log
    finally:
        tqdm.__init__ = original
        logger.removeHandler(log)
        logger.propagate = propagate


def _bar(self: Any, original: Any, *args: Any, **kwargs: Any) -> None:
    original(self, *args, **{**kwargs, "disable": kwargs.get("disable") or not is_live()})
