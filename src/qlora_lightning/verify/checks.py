"""The checks by name, and what each makes sure of."""

import difflib

from qlora_lightning.errors import UserError

CHECKS = {
    "labels": "the supervised tokens are the answers of the conversations in the files, and nothing else",
    "resume": "a run that is resumed goes the way of one that is not: losses, adapter, optimizer",
    "accumulation": "a step's gradient and loss are the same however it is divided into microbatches",
    "packing": "examples laid end to end give the gradient of examples in rows of their own",
    "checkpointing": "what is computed again in backward is what was computed forward, dropout included",
    "fused": "the fused path gives the gradient of transformers' blocks, and its graphs that of its eager steps",
    "reload": "the adapter that is saved, loaded by plain PEFT, answers as the live one",
    "ranks": "a step divided over two ranks gives the gradient of one",
}
"""In the order in which they are made."""


def chosen_checks(given: str | None) -> list[str]:
    """The checks named in ``--checks``, separated by commas, in the order in which they are made; all for None.

    Raises:
        UserError: there is no such check.
    """
    names = list(CHECKS) if given is None else [name.strip() for name in given.split(",")]
    for name in names:
        if name not in CHECKS:
            near = difflib.get_close_matches(name, CHECKS, n=1, cutoff=0.0)[0]
            raise UserError(f"--checks must name some of {', '.join(CHECKS)}; got {name!r}, nearest is {near}")
    return [name for name in CHECKS if name in names]
