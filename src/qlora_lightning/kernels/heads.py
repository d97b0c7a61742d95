"""How attention's columns are divided among heads, and the norms of single heads."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Heads:
    """How the columns of a stacked q, k, v are divided: H query heads, then G key and G value heads, of D columns each."""

    query: int
    key: int
    size: int

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Columns of q, k and v."""
        return self.query * self.size, self.key * self.size, self.key * self.size


@dataclass(frozen=True)
class HeadNorms:
    """RMSNorm of each query and key head before RoPE (Qwen3)."""

    query_D: Tensor
    """fp32."""
    key_D: Tensor
    eps: float
