"""What this machine gives this process."""

import os


def usable_cores() -> int:
    """Cores that this process may use, which a container or a batch system makes fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
