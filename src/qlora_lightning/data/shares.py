"""Which rows of an evaluation are a rank's: whole batches in turn, so that each row is computed beside the same rows as on one rank."""

from dataclasses import dataclass

from lightning.pytorch import Trainer


@dataclass(frozen=True)
class Share:
    """A rank's rows, in the order in which its loader gives them."""

    rows: tuple[int, ...]
    """Places in the whole evaluation."""
    counted: int
    """So many of them, the first, count. The others are another rank's, and only keep this one in time."""

    def counts(self, index: int) -> bool:
        """Whether the row that the loader gives as number ``index`` counts."""
        return index < self.counted


def share_of(rows: int, batch_size: int, rank: int = 0, ranks: int = 1, limit: int | float = 1.0) -> Share:
    """Deal batches to ranks, to each as many, as the trainer wants it: where the last round lacks some, the last batch comes again.

    Args:
        rows: of the evaluation, in order.
        batch_size: rows of a batch; the last has what is left.
        rank: whose share.
        ranks: how many there are.
        limit: the trainer's limit of batches, a number or a fraction. It holds for the batches of all ranks, so that metrics do not depend
            on their number; and the trainer, which applies it to a rank's loader, then stops at the right place.
    """
    batches = [range(start, min(start + batch_size, rows)) for start in range(0, rows, batch_size)]
    if ranks == 1 or not batches:
        return Share(tuple(range(rows)), rows)
    wanted = int(len(batches) * limit) if isinstance(limit, float) else min(limit, len(batches))
    batches = batches[:wanted] or batches  # too small a fraction: the trainer's to refuse
    mine = batches[rank::ranks]
    counted = sum(map(len, mine))
    each = -(-len(batches) // ranks)
    while isinstance(limit, float) and wanted and int(each * limit) < -(-len(batches) // ranks):
        each += 1  # a fraction of which the trainer reads as many as there are to read
    mine += [batches[-1]] * (each - len(mine))
    return Share(tuple(row for batch in mine for row in batch), counted)


def share_here(trainer: Trainer | None, stage: str, rows: int, batch_size: int) -> Share:
    """This rank's share; without a trainer all rows.

    Args:
        trainer: says which rank of how many this is.
        stage: val, test or predict, whose limit of batches holds.
        rows: of the evaluation, in order.
        batch_size: rows of a batch.
    """
    if trainer is None:
        return share_of(rows, batch_size)
    return share_of(rows, batch_size, trainer.global_rank, trainer.world_size, getattr(trainer, f"limit_{stage}_batches"))
