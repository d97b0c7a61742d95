"""The one exception for what a user can get wrong. The command line prints its text as one line and exits with code 2."""


class UserError(Exception):
    """A mistake in what the user gave: the text states the rule, then the value, then the way out, in one line."""
