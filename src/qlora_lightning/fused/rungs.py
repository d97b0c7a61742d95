"""What a block keeps for backward: the rungs of the ladder between keeping everything and computing everything again."""

from dataclasses import dataclass
from enum import IntEnum


class Rung(IntEnum):
    """What a block keeps of its activations; whatever is missing is computed again in backward."""

    ALL = 0
    """Everything a gradient needs."""
    NO_MLP = 1
    """All but the outputs of gate_proj and up_proj."""
    ATTENTION = 2
    """The inputs of both halves, and attention's result; q, k and v are computed again, attention is not."""
    INPUT = 3
    """The block's input alone. down_proj's product is not computed again: no gradient needs it."""


@dataclass(frozen=True)
class BlockShape:
    """Sizes of one block, in columns."""

    hidden: int
    intermediate: int
    query: int
    """Columns of q, which are those of attention's result."""
    key_value: int
    """Columns of k and v together."""
    heads: int
    """Query heads."""
    rank: int
    head_norms: bool = False
    """Whether q and k are normalised before RoPE: what comes before is kept too."""
    input_on_host: bool = False
    """Whether an input that is all that a block keeps waits in host memory."""
    dq_copies: int = 1
    """fp32 copies of q's gradient that attention's backward sums up in the end."""

    def kept_bytes(self, rung: Rung, width: int = 2) -> int:
        """Bytes a token that a block keeps on a rung.

        Args:
            rung: what is kept.
            width: bytes of a value in the compute dtype.
        """
        qkv = (self.query + self.key_value) * width
        kept = self.rank * width  # LoRA's first product of down_proj
        if rung != Rung.INPUT or not self.input_on_host:
            kept += self.hidden * width
        if rung <= Rung.ATTENTION:
            kept += (self.query + self.hidden + self.rank) * width + 4 * self.heads + 4  # attention's result and what it was made for
        if rung <= Rung.NO_MLP:
            kept += qkv * (2 if self.head_norms else 1) + 3 * self.rank * width + 4
        if rung == Rung.ALL:
            kept += 2 * self.intermediate * width + 2 * self.rank * width
        return kept

    def recomputed_flops(self, rung: Rung, length: int) -> float:
        """Floating-point operations a token that backward repeats on a rung, in sequences of ``length`` tokens."""
        qkv = 2.0 * self.hidden * (self.query + self.key_value)
        attention = 2.0 * self.query * length  # causal: half of the pairs
        out = 2.0 * self.query * self.hidden
        gate_up = 4.0 * self.hidden * self.intermediate
        return {
            Rung.ALL: 0.0,
            Rung.NO_MLP: gate_up,
            Rung.ATTENTION: gate_up + qkv,
            Rung.INPUT: gate_up + qkv + 2 * attention + out,  # attention runs at about half of a product's rate
        }[rung]
