"""What every kernel computes, in plain torch: the specification that the Triton kernels are tested against, and the path of a CPU.

The functions here and those of ``kernels/triton_ops.py`` have the same names, arguments and results, so that a block is written once.
Sums are taken in fp32 (fp64 of fp64 inputs) and rounded once, to the dtype of what is written.

Shapes: N tokens; I, O a linear layer's in- and output features; r the rank; R = n * r the ranks of the n linear layers that read the same
input, side by side; P >= R the columns that stand behind an input for them (padding is zero); d hidden, f intermediate size;
H query heads, G key/value heads, D their size; V vocabulary. A tensor [N, I + P] is written ``cat``: an input and, behind it, its
product with LoRA's A, so that one matrix product with [W | scale * B] gives the layer's whole output.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from qlora_lightning.kernels.dropout import Dropout, dropped
from qlora_lightning.kernels.heads import HeadNorms, Heads
from qlora_lightning.kernels.quantized import BLOCK, NESTED_BLOCK, QuantizedWeight

IGNORED = -100


# ---- 4-bit weights ----


def dequantize(weights: Sequence[QuantizedWeight], out_OI: Tensor) -> None:
    """Write 4-bit weights below one another, bit for bit what bitsandbytes gives in ``out_OI``'s dtype.

    Args:
        weights: of one or more linear layers with the same input.
        out_OI: their rows in order; rows may be further apart than I.
    """
    row = 0
    for weight in weights:
        rows, columns = weight.shape
        nibbles = torch.stack([weight.packed >> 4, weight.packed & 15], 1).view(-1).long()
        values = weight.code[nibbles].view(-1, BLOCK) * _absmax(weight)[:, None]
        out_OI[row : row + rows].copy_(values.view(rows, columns))
        row += rows


def _absmax(weight: QuantizedWeight) -> Tensor:
    if weight.nested_code is None:
        return weight.absmax
    assert weight.nested_absmax is not None and weight.nested_offset is not None
    scales = weight.nested_absmax.repeat_interleave(NESTED_BLOCK)[: weight.absmax.numel()]
    return weight.nested_code[weight.absmax.long()] * scales + weight.nested_offset


def place_lora_b(b_Or: Tensor, sizes: Sequence[int], scale: float, out_OP: Tensor) -> None:
    """Write scale * B of several layers as one block-diagonal matrix: the rows of layer j fill columns j * r to (j + 1) * r.

    Args:
        b_Or: B of the layers below one another, fp32.
        sizes: output features of each; their sum is O.
        scale: alpha / r.
        out_OP: every entry is written; rows may be further apart than P.
    """
    rank = b_Or.shape[1]
    out_OP.zero_()
    row = 0
    for number, size in enumerate(sizes):
        out_OP[row : row + size, number * rank : (number + 1) * rank].copy_(b_Or[row : row + size] * scale)
        row += size


# ---- LoRA ----


def lora_project(x_NI: Tensor, a_RI: Tensor, rank: int, dropout: Dropout | None, out_NP: Tensor, copy_NI: Tensor | None = None) -> Tensor:
    """LoRA's first product of the n layers that read ``x_NI``: dropout of each layer's own, times its A.

    Args:
        x_NI: rows may be further apart than I.
        a_RI: A of the layers below one another, in x's dtype.
        rank: r.
        dropout: None is no dropout.
        out_NP: columns behind x in its ``cat``; those from R on become zero.
        copy_NI: where a copy of x is wanted (the first columns of another ``cat``).

    Returns:
        The product once more, by itself [N, R].
    """
    for number, a_rI in enumerate(a_RI.split(rank)):
        out_NP[:, number * rank : (number + 1) * rank] = _rounded_mm(dropped(x_NI, dropout, number), a_rI.t(), out_NP.dtype)
    out_NP[:, len(a_RI) :] = 0
    if copy_NI is not None:
        copy_NI.copy_(x_NI)
    return out_NP[:, : len(a_RI)].clone()


def lora_backward(
    dcat: Tensor,
    x_NI: Tensor,
    a_RI: Tensor,
    rank: int,
    dropout: Dropout | None,
    grad_a_RI: Tensor,
    norm: tuple[Tensor, Tensor] | None = None,
    input_needed: bool = True,
) -> None:
    """Finish a group's gradient: add what reaches its input through LoRA, and A's gradient.

    Args:
        dcat: [N, I + P], the output's gradient times [W | scale * B]: its first I columns become the gradient of the input; the R behind
            them are that of ``lora_project``'s result.
        x_NI: the group's input; where ``norm`` is given, what the norm before it read.
        a_RI: as in ``lora_project``.
        rank: r.
        dropout: as in ``lora_project``.
        grad_a_RI: fp32, added to.
        norm: (rstd_N, weight_d) of the RMSNorm whose result is the group's input, which is computed again from ``x_NI``.
        input_needed: False leaves the first I columns alone (the first block's gradient goes nowhere).
    """
    inputs_NI = x_NI if norm is None else _normed(x_NI, *norm)
    features = x_NI.shape[1]
    dxa_NR = dcat[:, features : features + len(a_RI)]
    through_NI = torch.zeros_like(inputs_NI, dtype=_wide(inputs_NI))
    for number, a_rI in enumerate(a_RI.split(rank)):
        part_Nr = dxa_NR[:, number * rank : (number + 1) * rank]
        grad_a_RI[number * rank : (number + 1) * rank] += _wide_mm(part_Nr.t(), dropped(inputs_NI, dropout, number))
        through_NI += dropped(_wide_mm(part_Nr, a_rI), dropout, number)
    if input_needed:
        dcat[:, :features] += through_NI


def lora_backward_swiglu(dcat: Tensor, gate_up_N2f: Tensor, a_rf: Tensor, dropout: Dropout | None, grad_a_rf: Tensor) -> None:
    """As ``lora_backward`` for down_proj, on through SwiGLU: ``gate_up_N2f`` becomes its own gradient; ``dcat`` is used up.

    Args:
        dcat: [N, f + P].
        gate_up_N2f: gate's output and, behind it, up's.
        a_rf: down_proj's A.
        dropout: down_proj's.
        grad_a_rf: fp32, added to.
    """
    features = a_rf.shape[1]
    gate, up = gate_up_N2f.to(_wide(gate_up_N2f)).chunk(2, 1)
    hidden = (F.silu(gate) * up).to(gate_up_N2f.dtype)
    lora_backward(dcat, hidden, a_rf, len(a_rf), dropout, grad_a_rf)
    dhidden = dcat[:, :features].to(gate.dtype)
    sigmoid = gate.sigmoid()
    dgate = dhidden * up * sigmoid * (1 + gate * (1 - sigmoid))
    dup = dhidden * F.silu(gate)
    gate_up_N2f.copy_(torch.cat([dgate, dup], 1))


def lora_grad_b(dy_NO: Tensor, xa_NR: Tensor, rank: int, sizes: Sequence[int], scale: float, grad_b_Or: Tensor) -> None:
    """Add the gradient of B of several layers that stand below one another: scale * dY_j^T (x A_j^T).

    Args:
        dy_NO: gradient of the layers' outputs, side by side.
        xa_NR: ``lora_project``'s first R columns; rows may be further apart.
        rank: r.
        sizes: output features of each layer.
        scale: alpha / r.
        grad_b_Or: fp32, added to.
    """
    for number, (dy, grad) in enumerate(zip(dy_NO.split(list(sizes), 1), grad_b_Or.split(list(sizes)), strict=True)):
        grad += _wide_mm(dy.t(), xa_NR[:, number * rank : (number + 1) * rank]) * scale


# ---- norms, RoPE, SwiGLU ----


def add_rms_norm(x_Nd: Tensor, delta_Nd: Tensor | None, weight_d: Tensor, eps: float, out_Nd: Tensor) -> tuple[Tensor, Tensor]:
    """Residual sum, and its RMSNorm as transformers computes it: normalised, rounded, then times the weight.

    Args:
        x_Nd: the residual stream.
        delta_Nd: what is added to it, which becomes the sum; None is nothing.
        weight_d: of the norm, fp32.
        eps: added to the mean square.
        out_Nd: the norm's result; rows may be further apart than d.

    Returns:
        The sum [N, d] (``delta_Nd``, or ``x_Nd`` itself where there is nothing to add), and 1 / root mean square [N] fp32.
    """
    total_Nd = x_Nd if delta_Nd is None else delta_Nd.add_(x_Nd)
    rstd_N = (total_Nd.to(_wide(x_Nd)).square().mean(1) + eps).rsqrt()
    out_Nd.copy_(_normed(total_Nd, rstd_N, weight_d))
    return total_Nd, rstd_N


def rms_norm_backward(dy_Nd: Tensor, x_Nd: Tensor, rstd_N: Tensor, weight_d: Tensor, dx_Nd: Tensor) -> None:
    """Add to ``dx_Nd`` (the gradient that goes past the norm) what comes through it. Rows of ``dy_Nd`` may be further apart than d."""
    wide = _wide(x_Nd)
    normalised = x_Nd.to(wide) * rstd_N[:, None]
    weighted = dy_Nd.to(wide) * weight_d
    through = (weighted - normalised * (weighted * normalised).mean(1, keepdim=True)) * rstd_N[:, None]
    dx_Nd += through


def _normed(x_Nd: Tensor, rstd_N: Tensor, weight_d: Tensor) -> Tensor:
    normalised = (x_Nd.to(_wide(x_Nd)) * rstd_N[:, None]).to(x_Nd.dtype)
    return (normalised * weight_d).to(x_Nd.dtype)


def rope(qkv: Tensor, heads: Heads, cos: Tensor, sin: Tensor, positions_N: Tensor, norms: HeadNorms | None, out: Tensor) -> None:
    """Rotate q and k by their positions (half-split pairs: column i with i + D / 2), after their norms if there are any; v is copied.

    Args:
        qkv: [N, (H + 2 G) D].
        heads: H, G, D.
        cos: [positions, D / 2] fp32, with the model's scaling.
        sin: likewise.
        positions_N: int32.
        norms: None is none.
        out: as ``qkv``, which it may be.
    """
    q, k, v = (part.unflatten(1, (-1, heads.size)) for part in qkv.split(heads.sizes, 1))
    if norms is not None:
        q, k = _head_norm(q, norms.query_D, norms.eps), _head_norm(k, norms.key_D, norms.eps)
    cos_N1D, sin_N1D = (table[positions_N.long()][:, None] for table in (cos, sin))
    rotated = [_rotated(part, cos_N1D, sin_N1D) for part in (q, k)]
    out.copy_(torch.cat([*(part.to(qkv.dtype) for part in rotated), v], 1).flatten(1))


def rope_backward(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    qkv: Tensor | None,
    heads: Heads,
    cos: Tensor,
    sin: Tensor,
    positions_N: Tensor,
    norms: HeadNorms | None,
    out: Tensor,
) -> None:
    """The gradient of ``rope``'s input.

    Args:
        dq: [N, H, D]; tokens and heads may be apart by any stride.
        dk: [N, G, D], likewise.
        dv: likewise.
        qkv: ``rope``'s input, needed where there are norms.
        heads: as there; cos, sin, positions_N, norms too.
        out: [N, (H + 2 G) D].
    """
    cos_N1D, sin_N1D = (table[positions_N.long()][:, None] for table in (cos, sin))
    dq_D, dk_D = (_rotated(part, cos_N1D, -sin_N1D) for part in (dq, dk))
    if norms is not None:
        assert qkv is not None
        q, k, _ = (part.unflatten(1, (-1, heads.size)) for part in qkv.split(heads.sizes, 1))
        dq_D = _head_norm_backward(dq_D, q, norms.query_D, norms.eps)
        dk_D = _head_norm_backward(dk_D, k, norms.key_D, norms.eps)
    out.copy_(torch.cat([dq_D.to(out.dtype), dk_D.to(out.dtype), dv], 1).flatten(1))


def _rotated(x_NHD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x_NHD.to(_wide(x_NHD)).chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def _head_norm(x_NHD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    rstd = (x_NHD.to(_wide(x_NHD)).square().mean(-1, keepdim=True) + eps).rsqrt()
    return ((x_NHD * rstd).to(x_NHD.dtype) * weight_D).to(x_NHD.dtype)


def _head_norm_backward(dy: Tensor, x_NHD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    wide = x_NHD.to(_wide(x_NHD))
    rstd = (wide.square().mean(-1, keepdim=True) + eps).rsqrt()
    normalised, weighted = wide * rstd, dy * weight_D
    return (weighted - normalised * (weighted * normalised).mean(-1, keepdim=True)) * rstd


def swiglu(gate_up_N2f: Tensor, out_Nf: Tensor) -> None:
    """silu(gate) * up. Rows of ``out_Nf`` may be further apart than f."""
    gate, up = gate_up_N2f.to(_wide(gate_up_N2f)).chunk(2, 1)
    out_Nf.copy_(F.silu(gate) * up)


# ---- loss ----


def cross_entropy(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    """Each row's cross-entropy; ``logits_NV`` becomes its gradient (softmax minus the target's one), for the next product.

    Args:
        logits_NV: in the compute dtype.
        targets_N: int64; a row whose target is -100 has loss 0 and gradient 0.

    Returns:
        [N] fp32.
    """
    wide = logits_NV.to(_wide(logits_NV))
    losses_N = F.cross_entropy(wide, targets_N, ignore_index=IGNORED, reduction="none")
    gradient = wide.softmax(1).scatter_add_(1, targets_N.clamp(min=0)[:, None], -torch.ones_like(wide[:, :1]))
    logits_NV.copy_(gradient.masked_fill_((targets_N == IGNORED)[:, None], 0))
    return losses_N


def _wide(tensor: Tensor) -> torch.dtype:
    """The dtype in which sums over ``tensor`` are taken."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _wide_mm(left: Tensor, right: Tensor) -> Tensor:
    wide = _wide(left)
    return left.to(wide) @ right.to(wide)


def _rounded_mm(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    return _wide_mm(left, right).to(dtype)
