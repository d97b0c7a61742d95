"""Secrets taken out of text before it is printed or written: credentials in addresses, tokens of known shape, keys of the environment."""

import os
import re
from typing import Any

MARK = "***"
NAMES = re.compile(r"(?i)(?:^|_)(?:key|token|secret|password|passwd|credentials?)$")
"""Environment variables whose values are secrets: HF_TOKEN, WANDB_API_KEY, OPENAI_API_KEY and their like."""
SHORTEST = 12
"""Characters of a secret in the environment; shorter values would also be found in harmless words."""
ADDRESS = re.compile(r"(?P<scheme>\b[a-zA-Z][a-zA-Z0-9+.-]*://)[^/\s'\"]+@")
QUERY = re.compile(r"(?i)(?P<name>[?&](?:[\w-]*[-_])?(?:api_?key|key|token|secret|password|sig|signature|auth)=)[^&#\s'\"]+")
HEADER = re.compile(r"(?i)(?P<name>\bauthorization['\"]?\s*[:=]\s*['\"]?(?:bearer\s+|basic\s+)?|\bbearer\s+)[\w.~+/=-]{8,}")
TOKEN = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9_-]{20,}|gh[pousr]_[A-Za-z0-9]{20,}|wandb_v\d_[A-Za-z0-9_]{20,}|glpat-[\w-]{20,})"
)


def redacted(text: str) -> str:
    """``text`` with ``***`` in place of each secret that is known by its shape or stands in the environment."""
    for secret in _of_environment():
        text = text.replace(secret, MARK)
    text = ADDRESS.sub(rf"\g<scheme>{MARK}@", text)
    text = QUERY.sub(rf"\g<name>{MARK}", text)
    text = HEADER.sub(rf"\g<name>{MARK}", text)
    return TOKEN.sub(MARK, text)


def redacted_values(value: Any) -> Any:
    """``value`` with every text in it redacted, in mappings and lists of any depth; what holds no secret stays as it is."""
    if isinstance(value, str):
        return redacted(value)
    if isinstance(value, dict):
        return {key: redacted_values(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(redacted_values(one) for one in value)
    return value


def _of_environment() -> list[str]:
    """Secrets that the environment holds, the longest first, so that one within another leaves nothing behind."""
    found = {value for name, value in os.environ.items() if NAMES.search(name) and len(value) >= SHORTEST}
    return sorted(found, key=len, reverse=True)
