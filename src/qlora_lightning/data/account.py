"""What a run's data is, in numbers, for its ``audit.json``: made from what is known anyway, so that a fit does not wait for it.

``data inspect`` counts more (duplicates, rows in both parts), for which every example has to be read.
"""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from qlora_lightning.data.audit import summarize
from qlora_lightning.data.heldout import set_names
from qlora_lightning.data.sets import Part, RowSet
from qlora_lightning.data.stream import StreamedSet

TRAINING, HELDOUT = "training", "held-out"


def account(sets: Sequence[RowSet]) -> list[dict[str, Any]]:
    """One entry for each part of each set; none for the training part of a stream, which nobody has read.

    Returns:
        Plain values: name; part ("training" or "held-out"); weight (how often an epoch goes through the part; null where it is held out);
        every field of ``DataReport``; supervised_share (of the part's tokens, those that count in the loss); epoch_share (of the
        supervised tokens that an epoch goes through, those of this set; null where it is held out); lengths (of examples in tokens, as
        ``summarize`` gives them).
    """
    named = list(zip(set_names(sets), sets, strict=True))
    trained = [(name, one.training, one.weight) for name, one in named if not isinstance(one, StreamedSet)]
    held = [(name, part) for name, one in named if (part := one.validation) is not None]
    epoch = sum(report.supervised_tokens * weight for _, (_, report), weight in trained)
    return [
        *(
            _entry(name, TRAINING, part, {"weight": weight, "epoch_share": round(part[1].supervised_tokens * weight / epoch, 4)})
            for name, part, weight in trained
        ),
        *(_entry(name, HELDOUT, part, {"weight": None, "epoch_share": None}) for name, part in held),
    ]


def _entry(name: str, kind: str, part: Part, place: dict[str, Any]) -> dict[str, Any]:
    examples, report = part
    share = round(report.supervised_tokens / report.tokens, 4)
    lengths = asdict(summarize(examples.lengths))
    return {"name": name, "part": kind, **place, **asdict(report), "supervised_share": share, "lengths": lengths}
