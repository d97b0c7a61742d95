"""When a kernel counts as right."""

import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def assert_near(fused: Tensor, plain: Tensor, exact: Tensor) -> None:
    """A kernel's error against float64 is at most twice that of plain torch in the same dtype, on the whole and at the worst entry.

    Args:
        fused: the kernel's result.
        plain: the reference's from the same inputs.
        exact: the reference's from these inputs in float64.
    """
    assert fused.dtype == plain.dtype and fused.shape == plain.shape == exact.shape
    error, allowed = (tensor.double() - exact for tensor in (fused, plain))
    last_place = torch.finfo(plain.dtype).eps * exact.abs().max()
    assert error.abs().max() <= 2 * allowed.abs().max() + last_place
    assert error.norm() <= 2 * allowed.norm() + last_place


def wide(*tensors: Tensor | None) -> list[Tensor | None]:
    """The tensors in float64."""
    return [None if tensor is None else tensor.double() for tensor in tensors]


def apart(rows: int, columns: int, padding: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A tensor of random rows that lie ``padding`` further apart than its columns, and what lies between them (all ones)."""
    buffer = torch.randn(rows, columns + padding).to(dtype).to(DEVICE)
    buffer[:, columns:] = 1
    return buffer[:, :columns], buffer[:, columns:]
