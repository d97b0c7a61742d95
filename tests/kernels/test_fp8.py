"""e4m3 by the kernels and by their specification; the specification by torch's own cast."""

from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import bitsandbytes.functional as bnb
import numpy as np
import pytest
import torch
from torch import Tensor

from qlora_lightning.kernels import fp8, fp8_reference
from qlora_lightning.kernels.quantized import QuantizedWeight

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BOTH = pytest.mark.parametrize("kernels", [fp8_reference, fp8], ids=["reference", "triton"])
GROUPS: list[tuple[tuple[int, int], ...]] = [((48, 64),), ((144, 576), (16, 576), (64, 576)), ((48, 1536), (32, 1536))]
if DEVICE == "cuda":
    GROUPS += [((4096, 11008),), ((11008, 4096), (11008, 4096)), ((4096, 4096), (1024, 4096), (1024, 4096))]


@pytest.fixture(autouse=True)
def casts_as_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Triton's interpreter loses a bit where rounding to e4m3 carries into the exponent."""
    if DEVICE == "cpu":
        import triton.language as tl
        from triton.runtime import interpreter

        convert = interpreter._convert_float

        def rounded(data: Any, source: Any, target: Any, rounding: Any) -> Any:
            if (source, target) != (tl.float32, tl.float8e4nv):
                return convert(data, source, target, rounding)
            return torch.from_numpy(np.array(data, np.float32)).to(torch.float8_e4m3fn).view(torch.uint8).numpy()

        monkeypatch.setattr(interpreter, "_convert_float", rounded)
    yield


def bits(tensor: Tensor) -> Tensor:
    return tensor.view(torch.uint8)


def quantized(shape: tuple[int, int], nested: bool) -> tuple[QuantizedWeight, Tensor]:
    """A weight in NF4, and its values in fp32 as bitsandbytes has them."""
    weight = torch.randn(shape) * torch.logspace(-3, 1, shape[0])[:, None]
    weight[0] = 0
    packed, state = bnb.quantize_4bit(weight.to(DEVICE), blocksize=64, compress_statistics=nested, quant_type="nf4")
    return QuantizedWeight.of(SimpleNamespace(data=packed, quant_state=state)), bnb.dequantize_4bit(packed, state)


def group(shapes: tuple[tuple[int, int], ...], nested: bool) -> tuple[list[QuantizedWeight], Tensor]:
    torch.manual_seed(0)
    weights, values = zip(*(quantized(shape, nested) for shape in shapes), strict=True)
    return list(weights), torch.cat(values)


@BOTH
@pytest.mark.parametrize("tokens, features", [(5, 64), (3, 576), (7, 1536), (2, 11008), (2, 33024)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rows_by_their_own_largest_magnitude(tokens: int, features: int, dtype: torch.dtype, kernels: ModuleType) -> None:
    torch.manual_seed(0)
    buffer = (torch.randn(tokens, features + 64) * torch.logspace(-9, 3, tokens)[:, None]).to(DEVICE, dtype)
    x = buffer[:, :features]
    x[1] = 0
    x8, scale = kernels.quantize_rows(x)
    assert (x8.dtype, scale.dtype, scale.shape) == (torch.float8_e4m3fn, torch.float32, (tokens,))
    assert x8.is_contiguous()
    # Rounded once, from float64: in fp32 torch would multiply a GPU's tensor by the inverse of 448.
    wanted = (x.double().abs().amax(1).clamp(min=2.0**-100) / 448).float()
    inverse = (1 / wanted.double()).float()
    assert torch.equal(scale, wanted)
    assert torch.equal(bits(x8), bits((x.float() * inverse[:, None]).to(torch.float8_e4m3fn)))
    back = x8.float() * scale[:, None]
    assert (back[1] == 0).all()
    # Half a unit of four binary places, or of the smallest numbers' spacing.
    assert ((back - x.float()).abs() <= torch.maximum(x.float().abs() / 16, scale[:, None] * 2**-10) * 1.0001).all()


@BOTH
def test_what_is_not_a_number_stays_none(kernels: ModuleType) -> None:
    x = torch.ones(2, 128, device=DEVICE)
    x[0, 3] = float("nan")
    x8, _ = kernels.quantize_rows(x)
    assert x8[0, 3].float().isnan()
    assert (x8[1].float() == 448).all()


@BOTH
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("shapes", GROUPS, ids=str)
def test_weights_by_their_rows(shapes: tuple[tuple[int, int], ...], nested: bool, kernels: ModuleType) -> None:
    weights, values = group(shapes, nested)
    inverse = 1 / fp8_reference.scale_of(values.abs().amax(1))
    out = torch.zeros(values.shape, dtype=torch.float8_e4m3fn, device=DEVICE)
    kernels.dequantize_fp8(weights, inverse, out)
    assert torch.equal(bits(out), bits((values * inverse[:, None]).to(torch.float8_e4m3fn)))
    assert float(out.float().abs().max()) == 448


@BOTH
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("shapes", GROUPS, ids=str)
def test_transposed_weights_by_their_columns(shapes: tuple[tuple[int, int], ...], nested: bool, kernels: ModuleType) -> None:
    weights, values = group(shapes, nested)
    inverse = 1 / fp8_reference.scale_of(values.abs().amax(0))
    out = torch.zeros(values.t().shape, dtype=torch.float8_e4m3fn, device=DEVICE)
    kernels.dequantize_fp8_transposed(weights, inverse, out)
    assert torch.equal(bits(out), bits((values * inverse).to(torch.float8_e4m3fn).t().contiguous()))
    assert (out.float().abs().amax(1) == 448).all()
