"""Where the tool keeps what it can make again: converted models, prepared data."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """``QLORA_LIGHTNING_CACHE``, else ``~/.cache/qlora-lightning``. Whatever lies in it may be deleted at any time."""
    return Path(os.environ.get("QLORA_LIGHTNING_CACHE") or Path.home() / ".cache" / "qlora-lightning")
