"""Rotary position embedding of stacked q, k, v, after the norms of single heads where a model has them; forward and backward.

A program takes one token and a tile of its query heads, or of its key heads, or of its value heads. A tile is held as two halves,
[heads, D / 2] each: column i of the first turns with column i of the second, so a rotation needs no exchange between threads, and cos
and sin are read once for all heads of the tile. The backward turns the other way round, hence one kernel does both.
Shapes as in ``kernels/reference.py``: N tokens, H query and G key heads of D columns.
"""

import triton
import triton.language as tl
from torch import Tensor

from qlora_lightning.kernels.heads import HeadNorms, Heads

# Pairs (of columns that turn together) of a thread: a load of 16 B from each half in bf16, or two, in a program of up to four warps.
_PER_THREAD = 8
_MOST_WARPS = 4
_MOST_PAIRS = 2 * _PER_THREAD * 32 * _MOST_WARPS


def rope(qkv: Tensor, heads: Heads, cos: Tensor, sin: Tensor, positions_N: Tensor, norms: HeadNorms | None, out: Tensor) -> None:
    """See ``reference.rope``."""
    # In place v is already there.
    copies = out.data_ptr() != qkv.data_ptr()
    strides = (qkv.stride(0), heads.size)
    _turn((qkv, qkv, qkv), strides * 3, None, heads, cos, sin, positions_N, norms, out, values=copies, backward=False)


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
    """See ``reference.rope_backward``."""
    strides = (*dq.stride()[:2], *dk.stride()[:2], *dv.stride()[:2])
    _turn((dq, dk, dv), strides, qkv, heads, cos, sin, positions_N, norms, out, values=True, backward=True)


def _turn(
    sources: tuple[Tensor, Tensor, Tensor],
    strides: tuple[int, ...],
    inputs: Tensor | None,
    heads: Heads,
    cos: Tensor,
    sin: Tensor,
    positions_N: Tensor,
    norms: HeadNorms | None,
    out: Tensor,
    *,
    values: bool,
    backward: bool,
) -> None:
    """Launch for q, k and v in ``sources``, each with its strides between tokens and heads; in the forward all three are the stack."""
    half_block = triton.next_power_of_2(heads.size // 2)
    query_block = _heads_of_tile(heads.query, half_block, 1)
    warps = min(_MOST_WARPS, query_block * half_block // (32 * _PER_THREAD))
    key_block = _heads_of_tile(heads.key, half_block, warps)
    query_programs, key_programs = triton.cdiv(heads.query, query_block), triton.cdiv(heads.key, key_block)
    programs = query_programs + (2 if values else 1) * key_programs
    query_weight, key_weight, eps = (None, None, 0.0) if norms is None else (norms.query_D, norms.key_D, norms.eps)
    _rope_kernel[(len(out) * programs,)](
        *sources,
        *strides,
        inputs if backward and norms is not None else None,
        0 if inputs is None else inputs.stride(0),
        out,
        out.stride(0),
        cos,
        sin,
        positions_N,
        query_weight,
        key_weight,
        eps,
        QUERIES=heads.query,
        KEYS=heads.key,
        SIZE=heads.size,
        BACKWARD=backward,
        PROGRAMS=programs,
        QUERY_PROGRAMS=query_programs,
        KEY_PROGRAMS=key_programs,
        QUERY_BLOCK=query_block,
        KEY_BLOCK=key_block,
        HALF_BLOCK=half_block,
        num_warps=warps,
    )


def _heads_of_tile(heads: int, half_block: int, warps: int) -> int:
    """A power of two: all heads if they fit, and enough that no two threads hold the same pair, which in place one might have turned."""
    fewest = 32 * warps * _PER_THREAD // half_block
    return max(min(triton.next_power_of_2(heads), _MOST_PAIRS // half_block), fewest)


@triton.jit
def _rope_kernel(
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    q_token: tl.tensor,
    q_head: tl.tensor,
    k_token: tl.tensor,
    k_head: tl.tensor,
    v_token: tl.tensor,
    v_head: tl.tensor,
    inputs: tl.tensor,
    inputs_token: tl.tensor,
    out: tl.tensor,
    out_token: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    positions: tl.tensor,
    query_weight: tl.tensor,
    key_weight: tl.tensor,
    eps: tl.tensor,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    SIZE: tl.constexpr,
    BACKWARD: tl.constexpr,
    PROGRAMS: tl.constexpr,
    QUERY_PROGRAMS: tl.constexpr,
    KEY_PROGRAMS: tl.constexpr,
    QUERY_BLOCK: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
) -> None:
    # One axis of programs: the others end at 65,535. A row's offset may pass 2^31 values.
    token = (tl.program_id(0) // PROGRAMS).to(tl.int64)
    part = tl.program_id(0) % PROGRAMS
    turn = tl.load(positions + token).to(tl.int64) * (SIZE // 2)
    cos += turn
    sin += turn
    out += token * out_token
    if inputs is not None:
        inputs += token * inputs_token
    # Where keys and values begin in a stacked row; what the backward reads begins anew for each.
    keys: tl.constexpr = QUERIES * SIZE
    values: tl.constexpr = (QUERIES + KEYS) * SIZE
    q += token * q_token
    k += token * k_token + (0 if BACKWARD else keys)
    v += token * v_token + (0 if BACKWARD else values)
    if part < QUERY_PROGRAMS:
        head = part * QUERY_BLOCK
        _turn_heads(q, q_head, inputs, out, 0, cos, sin, query_weight, eps, head, QUERIES, SIZE, BACKWARD, QUERY_BLOCK, HALF_BLOCK)
    elif part < QUERY_PROGRAMS + KEY_PROGRAMS:
        head = (part - QUERY_PROGRAMS) * KEY_BLOCK
        _turn_heads(k, k_head, inputs, out, keys, cos, sin, key_weight, eps, head, KEYS, SIZE, BACKWARD, KEY_BLOCK, HALF_BLOCK)
    else:
        head = (part - QUERY_PROGRAMS - KEY_PROGRAMS) * KEY_BLOCK
        heads, columns, inside = _tile(head, KEYS, SIZE, KEY_BLOCK, HALF_BLOCK)
        first, second = _load_halves(v + heads * v_head + columns, inside, SIZE)
        _store_halves(out + values + heads * SIZE + columns, first, second, inside, SIZE)


@triton.jit
def _turn_heads(
    source: tl.tensor,
    source_head: tl.tensor,
    inputs: tl.tensor,
    out: tl.tensor,
    start: tl.constexpr,
    cos: tl.tensor,
    sin: tl.tensor,
    weight: tl.tensor,
    eps: tl.tensor,
    head: tl.tensor,
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    BACKWARD: tl.constexpr,
    BLOCK: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
) -> None:
    """A tile of a token's query or key heads, which begin in column ``start`` of its stacked row."""
    heads, columns, inside = _tile(head, HEADS, SIZE, BLOCK, HALF_BLOCK)
    at = start + heads * SIZE + columns
    first, second = _load_halves(source + heads * source_head + columns, inside, SIZE)
    cosine = tl.load(cos + columns, mask=columns < SIZE // 2, other=0.0)
    sine = tl.load(sin + columns, mask=columns < SIZE // 2, other=0.0)
    if weight is not None:
        first_weight, second_weight = _load_halves(weight + columns, columns < SIZE // 2, SIZE)
    if BACKWARD:
        first, second = first * cosine + second * sine, second * cosine - first * sine
        if weight is not None:
            first_input, second_input = _load_halves(inputs + at, inside, SIZE)
            rstd = _rstd(first_input, second_input, eps, SIZE)
            first_input, second_input = first_input * rstd, second_input * rstd
            first, second = first * first_weight, second * second_weight
            mean = tl.sum(first * first_input + second * second_input, 1)[:, None] / SIZE
            first, second = (first - first_input * mean) * rstd, (second - second_input * mean) * rstd
    else:
        if weight is not None:
            rstd = _rstd(first, second, eps, SIZE)
            first = _rounded(_rounded(first * rstd, out) * first_weight, out)
            second = _rounded(_rounded(second * rstd, out) * second_weight, out)
        first, second = first * cosine - second * sine, second * cosine + first * sine
    _store_halves(out + at, first, second, inside, SIZE)


@triton.jit
def _tile(head: tl.tensor, HEADS: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr, HALF_BLOCK: tl.constexpr) -> tl.tensor:
    """Heads [BLOCK, 1], columns of a half [1, HALF_BLOCK], and which of the tile's entries there are."""
    heads = head + tl.arange(0, BLOCK)[:, None]
    columns = tl.arange(0, HALF_BLOCK)[None, :]
    return heads, columns, (heads < HEADS) & (columns < SIZE // 2)


@triton.jit
def _load_halves(pointers: tl.tensor, inside: tl.tensor, SIZE: tl.constexpr) -> tl.tensor:
    first = tl.load(pointers, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(pointers + SIZE // 2, mask=inside, other=0.0).to(tl.float32)
    return first, second


@triton.jit
def _store_halves(pointers: tl.tensor, first: tl.tensor, second: tl.tensor, inside: tl.tensor, SIZE: tl.constexpr) -> None:
    tl.store(pointers, first.to(pointers.dtype.element_ty), mask=inside)
    tl.store(pointers + SIZE // 2, second.to(pointers.dtype.element_ty), mask=inside)


@triton.jit
def _rstd(first: tl.tensor, second: tl.tensor, eps: tl.tensor, SIZE: tl.constexpr) -> tl.tensor:
    """1 / root mean square of each head, [BLOCK, 1]."""
    return tl.rsqrt(tl.sum(first * first + second * second, 1)[:, None] / SIZE + eps)


@triton.jit
def _rounded(values: tl.tensor, out: tl.tensor) -> tl.tensor:
    """``values`` (fp32) as they are in the dtype of ``out``."""
    return values.to(out.dtype.element_ty).to(tl.float32)
