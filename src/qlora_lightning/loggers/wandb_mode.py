"""How W&B records, decided before it starts from what is found: Lightning's logger needs a key, a network and an answer to a prompt."""

import os
import socket
import threading
import urllib.request
from typing import NamedTuple
from urllib.parse import urlsplit

import wandb

from qlora_lightning.errors import UserError

WANDB_MODES = ("online", "offline", "disabled", "shared", "dryrun")
HOST_SECONDS = 3.0
"""How long to look for the W&B server before recording offline."""


class WandbMode(NamedTuple):
    """How W&B records, and why: ``mode`` is online, offline, disabled or what WANDB_MODE says."""

    mode: str
    reason: str


def wandb_mode(seconds: float = HOST_SECONDS) -> WandbMode:
    """Decide how to record, before W&B starts: a wish of the user wins, then no key or no server mean offline. Never prompts.

    Raises:
        UserError: WANDB_MODE holds a word that W&B does not know.
    """
    if (word := os.environ.get("WANDB_MODE", "online")) not in WANDB_MODES:
        raise UserError(f"WANDB_MODE must be one of {', '.join(WANDB_MODES)}, got {word!r}; unset it to let the run decide")
    settings = wandb.setup(settings=wandb.Settings(silent=True)).settings
    stored = None if settings.mode == "online" else settings.mode  # `wandb offline` stores one; online is only the default, no wish
    if wish := os.environ.get("WANDB_MODE") or stored:
        return WandbMode("offline" if wish == "dryrun" else wish, "WANDB_MODE or W&B settings")
    if not wandb_logged_in():
        return WandbMode("offline", "no API key; `wandb login` stores one")
    if not reachable(settings.base_url, seconds):
        return WandbMode("offline", f"{settings.base_url} not reachable within {seconds:g} s")
    return WandbMode("online", "API key found and server reachable")


def wandb_logged_in() -> bool:
    """Whether W&B finds a key (environment, settings, netrc), without a prompt and without asking the server."""
    try:
        return wandb.login(prompt=False, verify=False)
    except wandb.Error:  # a malformed key is as good as none
        return False


def reachable(url: str, seconds: float) -> bool:
    """Whether the host of ``url``, or the proxy set for it, accepts a connection within ``seconds``."""
    parts = urlsplit(url)
    if (proxy := urllib.request.getproxies().get(parts.scheme)) and not urllib.request.proxy_bypass(parts.netloc):
        parts = urlsplit(proxy if "//" in proxy else f"//{proxy}")
    address = (parts.hostname or "", parts.port or (80 if parts.scheme == "http" else 443))
    answers: list[bool] = []
    # A thread, because the timeout of a socket does not bound the name look-up before it.
    attempt = threading.Thread(target=lambda: answers.append(_connects(address, seconds)), daemon=True)
    attempt.start()
    attempt.join(seconds)
    return bool(answers and answers[0])


def _connects(address: tuple[str, int], seconds: float) -> bool:
    try:
        socket.create_connection(address, timeout=seconds).close()
    except OSError:
        return False
    return True
