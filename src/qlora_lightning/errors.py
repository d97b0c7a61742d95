"""The one exception for what a user can get wrong, and the mistake that most options share.

The command line prints its text as one line and exits with code 2.
"""

from collections.abc import Mapping


class UserError(Exception):
    """A mistake in what the user gave: the text states the rule, then the value, then the way out, in one line."""


def check_least(group: str, values: Mapping[str, tuple[float | None, float]]) -> None:
    """Raise UserError for the first option that is too small.

    Args:
        group: What stands before the options' names, as in data.
        values: Name -> the value, None where it is left out, and the least that it may be.
    """
    for name, (value, least) in values.items():
        if value is not None and value < least:
            raise UserError(f"{group}.{name} must be at least {least}, got {value}; correct it or leave it out")
