"""The one exception for what a user can get wrong, and the mistake that most options share.

The command line prints its text as one line and exits with code 2.
"""

from collections.abc import Mapping


class UserError(Exception):
    """A mistake in what the user gave: the text states the rule, then the value, then the way out, in one line."""


_NO_MEMORY = ("can't allocate memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
"""How torch says so where it raises no ``torch.OutOfMemoryError``: the CPU's allocator, the CUDA runtime, cuBLAS."""


def memory_error(error: BaseException) -> BaseException | None:
    """The error of torch's or Python's that says that memory is out: this one, or one that it followed. Without importing torch."""
    one: BaseException | None = error
    while one is not None:
        if isinstance(one, MemoryError) or type(one).__name__ == "OutOfMemoryError":
            return one
        if isinstance(one, RuntimeError) and any(words in str(one) for words in _NO_MEMORY):
            return one
        one = one.__cause__ or one.__context__  # cleaning up without memory may fail too
    return None


def check_least(group: str, values: Mapping[str, tuple[float | None, float]]) -> None:
    """Raise UserError for the first option that is too small.

    Args:
        group: What stands before the options' names, as in data.
        values: Name -> the value, None where it is left out, and the least that it may be.
    """
    for name, (value, least) in values.items():
        if value is not None and value < least:
            raise UserError(f"{group}.{name} must be at least {least}, got {value}; correct it or leave it out")
