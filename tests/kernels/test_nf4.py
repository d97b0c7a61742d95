"""4-bit weights bit for bit as bitsandbytes decodes them, by the kernel and by its specification."""

from collections.abc import Callable, Sequence
from types import SimpleNamespace

import bitsandbytes.functional as bnb
import pytest
import torch
from torch import Tensor

from qlora_lightning.kernels import nf4, reference
from qlora_lightning.kernels.quantized import QuantizedWeight

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GROUPS: list[tuple[tuple[int, int], ...]] = [((5, 64),), ((130, 576), (7, 576), (64, 576)), ((33, 1536), (33, 1536)), ((700, 128),)]
if DEVICE == "cuda":
    GROUPS += [((4096, 11008),), ((11008, 4096), (11008, 4096)), ((4096, 4096), (1024, 4096), (1024, 4096))]


def quantized(shape: tuple[int, int], dtype: torch.dtype, kind: str, nested: bool) -> tuple[QuantizedWeight, Tensor]:
    """A weight, and what bitsandbytes makes of it. Rows of very different sizes, one of zeros: absmax takes many values."""
    weight = torch.randn(shape) * torch.logspace(-3, 1, shape[0])[:, None]
    weight[0] = 0
    packed, state = bnb.quantize_4bit(weight.to(DEVICE, dtype), blocksize=64, compress_statistics=nested, quant_type=kind)
    return QuantizedWeight.of(SimpleNamespace(data=packed, quant_state=state)), bnb.dequantize_4bit(packed, state)


@pytest.mark.parametrize("dequantize", [reference.dequantize, nf4.dequantize], ids=["reference", "triton"])
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shapes", GROUPS, ids=str)
def test_equals_bitsandbytes(
    shapes: Sequence[tuple[int, int]],
    dtype: torch.dtype,
    kind: str,
    nested: bool,
    dequantize: Callable[[Sequence[QuantizedWeight], Tensor], None],
) -> None:
    torch.manual_seed(0)
    weights, wanted = zip(*(quantized(shape, dtype, kind, nested) for shape in shapes), strict=True)
    rows, columns = sum(shape[0] for shape in shapes), shapes[0][1]
    buffer = torch.full((rows, columns + 64), 3.0, dtype=dtype, device=DEVICE)
    dequantize(weights, buffer[:, :columns])
    assert torch.equal(buffer[:, :columns], torch.cat(wanted))
    assert (buffer[:, columns:] == 3).all()


@pytest.mark.parametrize("place", [reference.place_lora_b, nf4.place_lora_b], ids=["reference", "triton"])
@pytest.mark.parametrize("sizes, rank, columns", [((100, 30, 31), 8, 64), ((64, 64, 64), 64, 192), ((37,), 16, 64), ((45, 45), 64, 128)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lora_b_is_placed(sizes: tuple[int, ...], rank: int, columns: int, dtype: torch.dtype, place: Callable[..., None]) -> None:
    torch.manual_seed(0)
    b_Or = torch.randn(sum(sizes), rank, device=DEVICE)
    buffer = torch.full((sum(sizes), 128 + columns), 3.0, dtype=dtype, device=DEVICE)
    place(b_Or, sizes, 0.3, buffer[:, 128:])
    wanted = torch.zeros_like(buffer[:, 128:], dtype=torch.float32)
    wanted[:, : len(sizes) * rank] = torch.block_diag(*(part * 0.3 for part in b_Or.split(list(sizes))))
    assert torch.equal(buffer[:, 128:], wanted.to(dtype))
    assert (buffer[:, :128] == 3).all()
