"""Mixture-of-experts feed-forward without padding: sort once, gather, grouped GEMM, scatter; Triton and plain torch.

Each token picks top_k of num_experts small MLPs and sums their outputs, weighted by its gates. A (token, pick) pair
is an *assignment*; an id outside 0..num_experts-1, usually -1, is a *null* assignment (a dropped or padding token, a
null expert): it is never loaded, multiplied or stored.

What a grouped GEMM is. One matrix product per expert, with as many rows as that expert has tokens: one launch, whose
programs look up which expert their rows belong to.

Why sort. A GEMM is fast because a tile of rows shares the weights it loads. Sorting the assignments by expert puts
rows that share weights next to each other. Only row numbers are sorted; tokens stay where they are and are gathered
by the first GEMM as it loads them:

    expert_index [tokens=4, top_k=2]     slot: row -> assignment t * top_k + j       offsets: first row of an expert
      token 0     2   0                  row    0  1  2 | 3 | 4  5 | .  .            0  3  4  6
      token 1     0  -1  null            slot   1  2  7 | 6 | 0  4 | 3  5            pos: assignment -> row
      token 2     2  -1  null            token  0  1  3 | 3 | 0  2 | null            4  0  /  1 -1  /  5 -1  /  3  2
      token 3     1   0                  expert    0      1     2    never touched

Why no padding. Batched products want equal row counts, so the busiest expert sets the size of all, or tokens are
dropped. Tiles that end where an expert ends cost at most one partly filled tile per expert.

Why the gate gradient is free. out = sum_j s_j y_j, so ds = <d_out, y> = <d_out, a @ w2> = <d_out @ w2^T, a>: the
backward pass computes d_out @ w2^T anyway and recomputes a = act(z) from the saved z. y is never kept.

In memory: forward keeps x and z only. No atomics, so results repeat bit by bit. No value is read back to the host,
so the Triton path can be captured in a CUDA graph; the torch path, for CPUs and float64, reads the row counts.

Run      python kernels.py [--shape NAME] [--json PATH] [--plot PATH]     correctness, then timings on this machine
Use      out = moe_mlp(x, expert_index, gates, w1, w2, act="silu", glu=True)
"""

import argparse
import contextlib
import ctypes
import importlib.util
import json
import os
import platform
import statistics
import sys
import time
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

try:
    import triton
    import triton.language as tl
except ImportError:  # the torch path needs neither
    triton = None

ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu, "none": lambda z: z}
# ---------------------------------------------------------------------------------------------------------------
# Dispatch: sort the assignments by expert, once
# ---------------------------------------------------------------------------------------------------------------


class Dispatch(NamedTuple):
    """Who goes where, in int32. `offsets.diff()` is the number of rows of every expert, on the device."""

    slot: Tensor  # [assignments]  row -> assignment; the row's token is slot // top_k
    pos: Tensor  # [tokens, top_k]  assignment -> row, -1 for a null assignment
    offsets: Tensor  # [num_experts + 1]  expert e owns rows offsets[e] .. offsets[e + 1] - 1; the last: live rows
    num_experts: int


def make_dispatch(expert_index: Tensor, num_experts: int) -> Dispatch:
    """Sort the assignments of expert_index [tokens, top_k] by expert; ids outside 0..num_experts-1 are null."""
    _check("expert_index", expert_index, ("tokens", "top_k"))
    if expert_index.is_floating_point() or expert_index.is_complex() or expert_index.dtype == torch.bool:
        raise ValueError(f"expert_index has dtype {expert_index.dtype}; an integer dtype is needed")
    if not 1 <= num_experts <= 32766:
        raise ValueError(f"num_experts is {num_experts}; 1 to 32766 are allowed")
    total, device = expert_index.numel(), expert_index.device
    if total >= 2**31 - 256:
        raise ValueError(f"expert_index {list(expert_index.shape)} has {total} entries; 2**31 - 257 are allowed")
    flat = expert_index.reshape(-1).long()  # [assignments]
    key = torch.where((flat >= 0) & (flat < num_experts), flat, num_experts)  # null assignments sort last
    # A narrow key means fewer passes of a radix sort. Stable: inside an expert, rows keep the order of the tokens.
    key, slot = torch.sort(key.to(torch.uint8 if num_experts < 255 else torch.int16), stable=True)
    experts = torch.arange(num_experts + 1, dtype=torch.int32, device=device)
    offsets = torch.searchsorted(key.int(), experts, out_int32=True)
    row = torch.arange(total, dtype=torch.int32, device=device)
    pos = torch.empty_like(row)
    pos[slot] = torch.where(key < num_experts, row, -1)
    return Dispatch(slot.int(), pos.view(expert_index.shape), offsets, num_experts)


def _check(name: str, tensor, shape: tuple, like: Tensor | None = None, dtypes: tuple = (), optional=False) -> None:
    """Shape (a string: any size), the device of `like`, and the dtype of `like` or one of `dtypes`; else ValueError."""
    if optional and tensor is None:
        return
    ranked = isinstance(tensor, Tensor) and tensor.dim() == len(shape)
    if not ranked or any(isinstance(want, int) and want != have for want, have in zip(shape, tensor.shape)):
        given = f"shape {list(tensor.shape)}" if isinstance(tensor, Tensor) else f"type {type(tensor).__name__}"
        needed = f"{'' if ranked else 'a tensor of '}shape [{', '.join(map(str, shape))}]"
        raise ValueError(f"{name} has {given}; {needed} is needed")
    if like is not None and tensor.device != like.device:
        raise ValueError(f"{name} is on {tensor.device}; all tensors must be on one device, here {like.device}")
    if like is not None and tensor.dtype not in (dtypes or (like.dtype,)):
        allowed = ", ".join(map(str, dtypes or (like.dtype,)))
        raise ValueError(f"{name} has dtype {tensor.dtype}; allowed here: {allowed}")


# ---------------------------------------------------------------------------------------------------------------
# The plain torch path: any device, any float dtype, differentiable twice
# ---------------------------------------------------------------------------------------------------------------


def _live(dispatch: Dispatch) -> tuple[list[int], Tensor, Tensor]:
    """Rows of every expert, and the assignment and the token of every live row."""
    counts = dispatch.offsets.diff().tolist()
    slot = dispatch.slot[: sum(counts)].long()
    return counts, slot, slot // max(dispatch.pos.shape[1], 1)


def _for_experts(function, counts: list[int], rows: Tensor, *weights: Tensor | None) -> Tensor:
    """function(its rows, *its weights) of every expert. Not w[e], whose gradient is a zero tensor of full size per
    expert: unbind stacks once."""
    weights = [[None] * len(counts) if w is None else w.unbind(0) for w in weights]
    return torch.cat([function(*expert) for expert in zip(rows.split(counts), *weights)])


def _affine(h: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    return h @ w if bias is None else torch.addmm(bias, h, w)


def _activate(z: Tensor, act: str, glu: bool) -> Tensor:
    if not glu:
        return ACTIVATIONS[act](z)
    gate, up = z.chunk(2, dim=-1)
    return ACTIVATIONS[act](gate) * up


def _torch_scatter(y: Tensor, slot: Tensor, token: Tensor, num_tokens: int, gates: Tensor | None) -> Tensor:
    """Sum the live rows y [rows, d_model] into their tokens, at least in fp32."""
    total = y.to(torch.promote_types(y.dtype, torch.float32))
    if gates is not None:
        total = total * gates.reshape(-1, 1).index_select(0, slot).to(total.dtype)
    return total.new_zeros(num_tokens, y.shape[1]).index_add(0, token, total).to(y.dtype)


# ---------------------------------------------------------------------------------------------------------------
# The Triton kernels. Widths and strides are constexpr: from runtime integers the compiler cannot prove that rows
# start at a multiple of 16 bytes, and drops the asynchronous copies. Widths that are a multiple of 8 (fp32: 4)
# keep them; others work, slower. Row and expert numbers become int64 before they meet a stride. What a mask hides
# is never multiplied by zero: it may be NaN.
# ---------------------------------------------------------------------------------------------------------------

if triton is not None:

    @triton.jit
    def _dot(a, b, acc, PRECISION: tl.constexpr):
        if PRECISION == "interpreter":  # it would multiply the raw bits of bfloat16
            return tl.dot(a.to(tl.float32), b.to(tl.float32), acc)
        return tl.dot(a, b, acc, input_precision=PRECISION)

    @triton.jit
    def _activation(z, ACT: tl.constexpr):
        # act(z) and its slope; the compiler drops the one that is not used.
        if ACT == "relu":
            return tl.where(z <= 0, 0.0, z), tl.where(z <= 0, 0.0, 1.0)  # unlike maximum(z, 0), NaN stays NaN
        elif ACT == "gelu":
            cdf = 0.5 * (1 + tl.erf(z * 0.7071067811865476))
            return z * cdf, cdf + z * tl.exp(-0.5 * z * z) * 0.3989422804014327
        elif ACT == "silu":
            s = tl.sigmoid(z)
            return z * s, s * (1 + z * (1 - s))
        else:
            return z, tl.full(z.shape, 1.0, tl.float32)

    @triton.jit
    def _halves(tile):
        # An epilogue needs registers per column: on whole tiles it spills them to memory, on half a tile it does not.
        HALF: tl.constexpr = tile.shape[1] // 2
        return tl.split(tl.permute(tl.reshape(tile, (tile.shape[0], 2, HALF)), (0, 2, 1)))

    @triton.jit
    def _walk(pid, row_tiles, COL_TILES: tl.constexpr, GROUP: tl.constexpr):
        # Programs with neighbouring numbers run together and share the L2 cache. Numbered row by row, they would
        # read all weights again for every row tile; in groups of row tiles, once per group, mostly of one expert:
        #
        #     row by row   0 1 2 3         GROUP = 2   0 2 4 6
        #                  4 5 6 7                     1 3 5 7
        #                  8 9 ...                     8 ...
        first = pid // (GROUP * COL_TILES) * GROUP
        inside = pid % (GROUP * COL_TILES)
        rows = tl.minimum(row_tiles - first, GROUP)
        return first + inside % rows, inside // rows

    # tile_map: a tile is BM rows of ONE expert; an empty expert has none. Only the device knows how many that makes.
    # The host sizes grids by a bound that it knows, N // BM + min(E, N), and this kernel lists the real tiles, so
    # nothing waits for the host: tiles = [count, expert, first row, expert, first row, ...]. One program per expert.
    @triton.jit
    def tile_map(offsets_ptr, tiles_ptr, num_experts, EXPERTS_2: tl.constexpr, BM: tl.constexpr):
        expert, ids = tl.program_id(0), tl.arange(0, EXPERTS_2)  # num_experts rounded up to a power of two
        begin = tl.load(offsets_ptr + ids, mask=ids < num_experts, other=0)
        end = tl.load(offsets_ptr + ids + 1, mask=ids < num_experts, other=0)
        count = (end - begin + BM - 1) // BM
        before = tl.sum(tl.where(ids < expert, count, 0), 0)
        mine = tl.sum(tl.where(ids == expert, count, 0), 0)
        first_row = tl.load(offsets_ptr + expert)
        for start in range(0, mine, 128):
            i = start + tl.arange(0, 128)
            tl.store(tiles_ptr + 1 + 2 * (before + i), tl.zeros_like(i) + expert, mask=i < mine)
            tl.store(tiles_ptr + 2 + 2 * (before + i), first_row + i * BM, mask=i < mine)
        if expert == 0:
            tl.store(tiles_ptr, tl.sum(count, 0))

    # One tile of a grouped GEMM: a[rows] @ w[expert][:, cols]; with GLU also the same rows times the up columns.
    @triton.jit
    def _gemm_tile(
        a_ptr, w_ptr, slot_ptr, offsets_ptr, tiles_ptr, K: tl.constexpr, WIDTH: tl.constexpr, A_ROW: tl.constexpr,
        W_E: tl.constexpr, W_K: tl.constexpr, W_N: tl.constexpr, TOP_K: tl.constexpr, GLU: tl.constexpr,
        PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    ):  # fmt: skip
        tile, col_tile = _walk(tl.program_id(0), tl.load(tiles_ptr), (WIDTH + BN - 1) // BN, GROUP)
        expert = tl.load(tiles_ptr + 1 + 2 * tile).to(tl.int64)
        rows = tl.load(tiles_ptr + 2 + 2 * tile) + tl.arange(0, BM)
        live = rows < tl.load(offsets_ptr + expert + 1)
        a_rows, cols = rows, col_tile * BN + tl.arange(0, BN)
        if TOP_K > 0:  # gather: the token numbers are loaded once, before the loop
            a_rows = tl.load(slot_ptr + rows, mask=live, other=0) // TOP_K
        a_row, w_col = a_ptr + a_rows.to(tl.int64) * A_ROW, w_ptr + expert * W_E + cols * W_N
        acc = tl.zeros((BM, BN), tl.float32)
        acc_up = acc
        for k0 in range(0, K, BK):
            k = k0 + tl.arange(0, BK)
            a = tl.load(a_row[:, None] + k[None, :], mask=live[:, None] & (k < K)[None, :], other=0.0)
            w_at, w_mask = w_col[None, :] + k[:, None] * W_K, (k < K)[:, None] & (cols < WIDTH)[None, :]
            acc = _dot(a, tl.load(w_at, mask=w_mask, other=0.0), acc, PRECISION)
            if GLU:
                acc_up = _dot(a, tl.load(w_at + WIDTH * W_N, mask=w_mask, other=0.0), acc_up, PRECISION)
        return expert, rows.to(tl.int64), live, col_tile, acc, acc_up

    # expert_mm: the grouped GEMM. One program makes one [BM, BN] tile of y = act(a @ w[expert] + bias[expert]). Used
    # three times: up projection (rows gathered from the tokens, activation on the way out, z kept for backward),
    # down projection, and the gradient of x, where w is a transposed view of w1.
    @triton.jit
    def expert_mm(
        a_ptr, w_ptr, bias_ptr, z_ptr, y_ptr, slot_ptr, offsets_ptr, tiles_ptr,
        K: tl.constexpr, WIDTH: tl.constexpr, A_ROW: tl.constexpr, W_E: tl.constexpr, W_K: tl.constexpr,
        W_N: tl.constexpr, TOP_K: tl.constexpr, ACT: tl.constexpr, GLU: tl.constexpr, PRECISION: tl.constexpr,
        BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    ):  # fmt: skip
        Z_WIDTH: tl.constexpr = 2 * WIDTH if GLU else WIDTH
        if tl.program_id(0) >= tl.load(tiles_ptr) * ((WIDTH + BN - 1) // BN):  # the grid is an upper bound
            return
        expert, rows, live, col_tile, acc, acc_up = _gemm_tile(
            a_ptr, w_ptr, slot_ptr, offsets_ptr, tiles_ptr,
            K, WIDTH, A_ROW, W_E, W_K, W_N, TOP_K, GLU, PRECISION, BM, BN, BK, GROUP,
        )  # fmt: skip
        z_halves, up_halves = _halves(acc), _halves(acc_up)
        for half in tl.static_range(2):
            z, up = z_halves[half], up_halves[half]
            cols = col_tile * BN + half * (BN // 2) + tl.arange(0, BN // 2)
            mask = live[:, None] & (cols < WIDTH)[None, :]
            if bias_ptr is not None:
                bias_at = bias_ptr + expert * Z_WIDTH + cols
                z += tl.load(bias_at, mask=cols < WIDTH, other=0.0).to(tl.float32)[None, :]
                if GLU:
                    up += tl.load(bias_at + WIDTH, mask=cols < WIDTH, other=0.0).to(tl.float32)[None, :]
            if z_ptr is not None:
                z_at = z_ptr + rows[:, None] * Z_WIDTH + cols[None, :]
                tl.store(z_at, z.to(z_ptr.dtype.element_ty), mask=mask)
                if GLU:
                    tl.store(z_at + WIDTH, up.to(z_ptr.dtype.element_ty), mask=mask)
            y, _ = _activation(z, ACT)
            if GLU:
                y *= up
            tl.store(y_ptr + rows[:, None] * WIDTH + cols[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)

    # down_bwd: back through gate, down projection and activation at once. For row r of token t with gate s:
    #     g = d_out[t] @ w2[e]^T    one GEMM, whose result never leaves the registers
    #     dz = s * g * act'(z)      for the gradients of w1 and x
    #     sa = s * a, a = act(z)    for the gradient of w2
    #     ds = <g, a>               the gate's gradient
    # A program sees only its own columns of g and a, so it stores its part of ds; the parts are added later, in order.
    @triton.jit
    def down_bwd(
        d_out_ptr, w_ptr, gates_ptr, z_ptr, dz_ptr, sa_ptr, ds_ptr, slot_ptr, offsets_ptr, tiles_ptr,
        K: tl.constexpr, WIDTH: tl.constexpr, A_ROW: tl.constexpr, W_E: tl.constexpr, W_K: tl.constexpr,
        W_N: tl.constexpr, TOP_K: tl.constexpr, ACT: tl.constexpr, GLU: tl.constexpr, PRECISION: tl.constexpr,
        BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    ):  # fmt: skip
        COL_TILES: tl.constexpr = (WIDTH + BN - 1) // BN
        Z_WIDTH: tl.constexpr = 2 * WIDTH if GLU else WIDTH
        if tl.program_id(0) >= tl.load(tiles_ptr) * COL_TILES:
            return
        _, rows, live, col_tile, acc, _ = _gemm_tile(
            d_out_ptr, w_ptr, slot_ptr, offsets_ptr, tiles_ptr,
            K, WIDTH, A_ROW, W_E, W_K, W_N, TOP_K, False, PRECISION, BM, BN, BK, GROUP,
        )  # fmt: skip
        slot = tl.load(slot_ptr + rows, mask=live, other=0)
        s = tl.load(gates_ptr + slot, mask=live, other=0.0).to(tl.float32)[:, None]
        g_halves = _halves(acc)
        ds = tl.zeros((BM,), tl.float32)
        for half in tl.static_range(2):
            g = g_halves[half]
            cols = col_tile * BN + half * (BN // 2) + tl.arange(0, BN // 2)
            mask = live[:, None] & (cols < WIDTH)[None, :]
            z_at = rows[:, None] * Z_WIDTH + cols[None, :]
            a, slope = _activation(tl.load(z_ptr + z_at, mask=mask, other=0.0).to(tl.float32), ACT)
            dz = s * g
            if GLU:
                up = tl.load(z_ptr + z_at + WIDTH, mask=mask, other=0.0).to(tl.float32)
                if dz_ptr is not None:
                    tl.store(dz_ptr + z_at + WIDTH, (dz * a).to(z_ptr.dtype.element_ty), mask=mask)
                a *= up
                dz *= up
            if dz_ptr is not None:
                tl.store(dz_ptr + z_at, (dz * slope).to(z_ptr.dtype.element_ty), mask=mask)
            if sa_ptr is not None:
                sa_at = sa_ptr + rows[:, None] * WIDTH + cols[None, :]
                tl.store(sa_at, (s * a).to(z_ptr.dtype.element_ty), mask=mask)
            ds += tl.sum(g * a, 1)
        if ds_ptr is not None:
            tl.store(ds_ptr + rows * COL_TILES + col_tile, ds, mask=live)

    # expert_dw: the weight gradient dw[e] = sum over the rows of expert e of a[row]^T b[row]. One program makes one
    # tile of one expert's matrix and walks that expert's rows. An empty expert walks none and stores zeros, so dw is
    # not cleared first. A bias is a weight whose input is the constant 1: a column of ones gives db1, the column of
    # gates db2. A_TOP_K, B_TOP_K > 0: that operand is found through slot.
    @triton.jit
    def expert_dw(
        a_ptr, b_ptr, dw_ptr, slot_ptr, offsets_ptr,
        A_WIDTH: tl.constexpr, B_WIDTH: tl.constexpr, A_ROW: tl.constexpr, B_ROW: tl.constexpr, DW_E: tl.constexpr,
        DW_A: tl.constexpr, DW_B: tl.constexpr, A_TOP_K: tl.constexpr, B_TOP_K: tl.constexpr,
        PRECISION: tl.constexpr, BA: tl.constexpr, BB: tl.constexpr, BT: tl.constexpr, GROUP: tl.constexpr,
    ):  # fmt: skip
        A_TILES: tl.constexpr = (A_WIDTH + BA - 1) // BA
        B_TILES: tl.constexpr = (B_WIDTH + BB - 1) // BB
        expert, tile = tl.program_id(0) // (A_TILES * B_TILES), tl.program_id(0) % (A_TILES * B_TILES)
        a_tile, b_tile = _walk(tile, A_TILES, B_TILES, GROUP)
        a_cols, b_cols = a_tile * BA + tl.arange(0, BA), b_tile * BB + tl.arange(0, BB)
        begin, end = tl.load(offsets_ptr + expert), tl.load(offsets_ptr + expert + 1)
        acc = tl.zeros((BA, BB), tl.float32)
        for start in range(begin, end, BT):
            rows = start + tl.arange(0, BT)
            live = rows < end
            a_rows, b_rows = rows, rows
            if A_TOP_K > 0:
                a_rows = tl.load(slot_ptr + rows, mask=live, other=0) // A_TOP_K
            if B_TOP_K > 0:
                b_rows = tl.load(slot_ptr + rows, mask=live, other=0) // B_TOP_K
            a_at = a_ptr + a_rows.to(tl.int64)[:, None] * A_ROW + a_cols[None, :]
            b_at = b_ptr + b_rows.to(tl.int64)[:, None] * B_ROW + b_cols[None, :]
            a = tl.load(a_at, mask=live[:, None] & (a_cols < A_WIDTH)[None, :], other=0.0)
            b = tl.load(b_at, mask=live[:, None] & (b_cols < B_WIDTH)[None, :], other=0.0)
            acc = _dot(tl.trans(a), b, acc, PRECISION)
        dw_at = dw_ptr + expert.to(tl.int64) * DW_E + a_cols[:, None] * DW_A + b_cols[None, :] * DW_B
        mask = (a_cols < A_WIDTH)[:, None] & (b_cols < B_WIDTH)[None, :]
        tl.store(dw_at, acc.to(dw_ptr.dtype.element_ty), mask=mask)

    # combine: out[i] = sum_j weights[i, j] * y[index[i, j]] over the picks with index >= 0. A token fetches its rows;
    # were the rows to add themselves to their token, that would take atomics, in an order that changes from run to
    # run. Makes the output, the gradient of x, and with one pick per row the plain gather.
    @triton.jit
    def combine(
        y_ptr, index_ptr, weights_ptr, out_ptr,
        WIDTH: tl.constexpr, Y_ROW: tl.constexpr, PICKS: tl.constexpr, PICKS_2: tl.constexpr, BD: tl.constexpr,
    ):  # fmt: skip
        i, j = tl.program_id(0).to(tl.int64), tl.arange(0, PICKS_2)  # PICKS rounded up to a power of two
        row = tl.load(index_ptr + i * PICKS + j, mask=j < PICKS, other=-1).to(tl.int64)
        cols = tl.program_id(1) * BD + tl.arange(0, BD)
        mask = (row >= 0)[:, None] & (cols < WIDTH)[None, :]
        y = tl.load(y_ptr + row[:, None] * Y_ROW + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        if weights_ptr is not None:
            y *= tl.load(weights_ptr + i * PICKS + j, mask=row >= 0, other=0.0).to(tl.float32)[:, None]
        tl.store(out_ptr + i * WIDTH + cols, tl.sum(y, 0).to(out_ptr.dtype.element_ty), mask=cols < WIDTH)
# ---------------------------------------------------------------------------------------------------------------
# Tile sizes, launches, autograd
# ---------------------------------------------------------------------------------------------------------------

# TRITON_INTERPRET=1, set before triton is imported, makes the kernels Python functions that take CPU tensors.
INTERPRETED = triton is not None and not isinstance(combine, triton.JITFunction)
# (BN, BK, warps, stages), for dw (BA, BB, BT, warps, stages): at 128, at 64, and at 32 or 16 rows per tile. From the
# compiled code: no spilled registers, shared memory within limits. Loads behind an index load get fewer buffers than
# stages, hence 5 for dw. The sm_80 and fp32 rows need at most 99 KB, and so serve every other architecture, too.
_TILES = {
    ("sm_90", "mm"): ((256, 64, 8, 4), (256, 64, 8, 4), (128, 64, 4, 4)),
    ("sm_90", "glu"): ((128, 64, 8, 4), (128, 64, 8, 4), (64, 64, 4, 4)),
    ("sm_90", "down_bwd"): ((128, 64, 8, 4), (128, 64, 4, 4), (64, 64, 4, 3)),
    ("sm_90", "dw"): ((128, 256, 64, 8, 5), (128, 256, 64, 8, 5), (128, 128, 32, 8, 4)),
    ("sm_80", "mm"): ((128, 32, 8, 4), (128, 32, 4, 4), (64, 64, 4, 4)),
    ("sm_80", "glu"): ((64, 32, 8, 4), (64, 32, 4, 4), (64, 32, 4, 3)),
    ("sm_80", "down_bwd"): ((64, 32, 8, 4), (64, 32, 4, 4), (64, 64, 4, 3)),
    ("sm_80", "dw"): ((128, 128, 32, 8, 5), (128, 128, 32, 8, 5), (64, 64, 32, 4, 4)),
    ("fp32", "mm"): ((128, 32, 8, 3), (64, 32, 4, 3), (64, 32, 4, 3)),
    ("fp32", "glu"): ((64, 32, 8, 3), (64, 32, 4, 3), (64, 32, 4, 3)),
    ("fp32", "down_bwd"): ((64, 16, 8, 3), (64, 32, 4, 3), (64, 32, 4, 3)),
    ("fp32", "dw"): ((128, 128, 32, 8, 3), (64, 64, 32, 4, 3), (64, 64, 32, 4, 3)),
}
_BIAS_TILE = (16, 128, 32, 4, 3)  # dw with one row of output


def _block_rows(slot: Tensor, offsets: Tensor) -> int:
    """Rows per tile from the expected rows per expert, which the host knows without asking the device."""
    per_expert = slot.numel() / (offsets.numel() - 1)
    return 128 if per_expert >= 128 else 64 if per_expert >= 48 else 32 if per_expert > 16 else 16


def _fp32_precision() -> str:
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


# torch.compile cannot trace this switch; it reads it once. This is torch.compiler.assume_constant_result, which would
# load the whole compiler: a second for everybody who imports this file.
_fp32_precision._dynamo_marked_constant = True


def _config(kernel: str, rows: tuple, x: Tensor) -> dict:
    """Constants of one launch on operands like x: a row of the table for "mm", "glu", "down_bwd", "dw" or "bias"."""
    names = ("BA", "BB", "BT") if kernel in ("dw", "bias") else ("BN", "BK")
    if INTERPRETED:  # small tiles, so that small tests have several, and tails
        return {"PRECISION": "interpreter", "GROUP": 2} | dict(zip(names, (32, 32, 16)))
    sm_90, fp32 = torch.cuda.get_device_capability(x.device)[0] == 9, x.dtype == torch.float32
    family, column = "fp32" if fp32 else "sm_90" if sm_90 else "sm_80", {128: 0, 64: 1}.get(_block_rows(*rows[:2]), 2)
    values = _BIAS_TILE if kernel == "bias" else _TILES[family, kernel][column]
    constants = {"PRECISION": _fp32_precision() if fp32 else "ieee", "GROUP": 8}
    return constants | dict(zip((*names, "num_warps", "num_stages"), values))


def _launch(kernel, grid: tuple, *args, **constants) -> None:
    """Triton launches on the current device, which need not be the tensors' (-1: not on a GPU, nothing changes)."""
    with torch.cuda.device(args[0].get_device()):
        kernel[grid](*args, **constants)


def _empty(like: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    """Uninitialised memory; without a shape, in the shape and strides of `like`. Tests fill it with NaN."""
    return torch.empty(shape, dtype=dtype or like.dtype, device=like.device) if shape else torch.empty_like(like)


def _dense_rows(t: Tensor) -> Tensor:
    """Kernels take any strides, but one of the last two (of the last one, for rows) has to be 1."""
    return t if 1 in t.stride()[1:] else t.contiguous()


def _map_tiles(slot: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`rows`, the row side of every launch: slot, offsets and the tiles [1 + 2 * upper bound]."""
    total, num_experts, block = slot.numel(), offsets.numel() - 1, _block_rows(slot, offsets)
    tiles = _empty(offsets, 1 + 2 * (total // block + min(num_experts, total)))
    rounded = triton.next_power_of_2(num_experts)
    _launch(tile_map, (num_experts,), offsets, tiles, num_experts, EXPERTS_2=rounded, BM=block)
    return slot, offsets, tiles


def _gemm(kernel, config: dict, rows: tuple, a: Tensor, w: Tensor, width: int, *rest: Tensor | None, **flags) -> None:
    """What the launches of expert_mm and down_bwd share: row operand, weight [num_experts, in, out], tiles, sizes."""
    a, w, block = _dense_rows(a), _dense_rows(w), _block_rows(*rows[:2])
    grid, sizes = (rows[2].numel() // 2 * triton.cdiv(width, config["BN"]),), (a.shape[1], width, a.stride(0))
    _launch(kernel, grid, a, w, *rest, *rows, *sizes, *w.stride(), BM=block, **config, **flags)


def _expert_mm(rows: tuple, a: Tensor, w: Tensor, bias=None, top_k=0, act="none", glu=False, z=None, y=None) -> Tensor:
    """y [assignments, width] = act(a[row, or its token] @ w[expert] + bias[expert]); act's argument goes to z."""
    width, bias = w.shape[2] // 2 if glu else w.shape[2], None if bias is None else bias.contiguous()
    y, config = _empty(a, len(rows[0]), width) if y is None else y, _config("glu" if glu else "mm", rows, a)
    _gemm(expert_mm, config, rows, a, w, width, bias, z, y, TOP_K=top_k, ACT=act, GLU=glu)
    return y


def _expert_dw(rows: tuple, a: Tensor | None, b: Tensor, w: Tensor, a_top_k: int = 0, b_top_k: int = 0) -> Tensor:
    """Like w [num_experts, a width, b width]: a^T @ b of every expert. A bias [num_experts, width] is one row of it,
    and a is a column: the gates, or by default ones."""
    if w.dim() == 2:
        a = b.new_ones(1, 1).expand(rows[0].numel(), 1) if a is None else a
        return _expert_dw(rows, a, b, w.unsqueeze(1), a_top_k, b_top_k).squeeze(1)
    a, b, dw = _dense_rows(a), _dense_rows(b), _empty(w)
    config = _config("bias" if w.shape[1] == 1 else "dw", rows, b)
    grid = (w.shape[0] * triton.cdiv(w.shape[1], config["BA"]) * triton.cdiv(w.shape[2], config["BB"]),)
    sizes = (*w.shape[1:], a.stride(0), b.stride(0), *dw.stride())
    _launch(expert_dw, grid, a, b, dw, *rows[:2], *sizes, A_TOP_K=a_top_k, B_TOP_K=b_top_k, **config)
    return dw


def _combine(y: Tensor, index: Tensor, weights: Tensor | None = None) -> Tensor:
    """out[i] = sum_j weights[i, j] * y[index[i, j]], where index < 0 is left out."""
    y, (count, picks), width = _dense_rows(y), index.shape, y.shape[1]
    out, block = _empty(y, count, width), min(1024, triton.next_power_of_2(width))
    tensors = (y, index.contiguous(), None if weights is None else weights.contiguous(), out)
    sizes = (width, y.stride(0), picks, triton.next_power_of_2(picks), block)
    _launch(combine, (count, triton.cdiv(width, block)), *tensors, *sizes)
    return out


def _by_pos(values: Tensor, pos: Tensor) -> Tensor:
    """values [assignments], by row -> [tokens, top_k], 0 where null."""
    return torch.where(pos >= 0, values[pos.clamp(min=0).long()], 0)


class _MoEMLP(torch.autograd.Function):
    """Keeps x and z. The gathered rows, a and y are cheaper to make again, or not needed at all."""

    @staticmethod
    def forward(ctx, x, gates, w1, w2, b1, b2, slot, pos, offsets, act, glu, train):
        rows = _map_tiles(slot, offsets)
        z = _empty(x, slot.numel(), w1.shape[2]) if train else None
        a = _expert_mm(rows, x, w1, b1, pos.shape[1], act, glu, z)
        y = _expert_mm(rows, a, w2, b2)
        if train:
            ctx.save_for_backward(x, gates, w1, w2, b1, b2, z, pos, *rows)
            ctx.act, ctx.glu = act, glu
        return _combine(y, pos, gates)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out):
        x, gates, w1, w2, b1, b2, z, pos, *rows = ctx.saved_tensors
        need_x, need_gates, need_w1, need_w2, need_b1, need_b2 = ctx.needs_input_grad[:6]
        dx = d_gates = dw1 = dw2 = db1 = db2 = None
        (_, d_ff, _), (_, top_k), config = w2.shape, pos.shape, _config("down_bwd", rows, d_out)
        dz = _empty(z) if need_x or need_w1 or need_b1 else None
        sa = _empty(z, len(z), d_ff) if need_w2 else None
        ds = _empty(z, len(z), triton.cdiv(d_ff, config["BN"]), dtype=torch.float32) if need_gates else None
        flags = {"TOP_K": top_k, "ACT": ctx.act, "GLU": ctx.glu}
        _gemm(down_bwd, config, rows, d_out, w2.transpose(1, 2), d_ff, gates.contiguous(), z, dz, sa, ds, **flags)
        if need_w2:
            dw2 = _expert_dw(rows, sa, d_out, w2, b_top_k=top_k)
        if need_b2:
            db2 = _expert_dw(rows, gates.reshape(-1, 1).to(x.dtype), d_out, b2, a_top_k=1, b_top_k=top_k)
        if need_gates:
            d_gates = _by_pos(ds.sum(1), pos)
            if b2 is not None:  # y = a @ w2 + b2, and <g, a> lacks the second part of <d_out, y>
                expert = torch.searchsorted(rows[1][1:], pos, right=True).clamp(max=b2.shape[0] - 1)
                d_gates = d_gates + torch.where(pos >= 0, (d_out.float() @ b2.float().t()).gather(1, expert), 0)
            d_gates = d_gates.to(gates.dtype)
        del sa  # before the next large buffer
        if need_x:
            dx = _combine(_expert_mm(rows, dz, w1.transpose(1, 2)), pos)
        if need_w1:
            dw1 = _expert_dw(rows, x, dz, w1, a_top_k=top_k)
        if need_b1:
            db1 = _expert_dw(rows, None, dz, b1)
        return dx, d_gates, dw1, dw2, db1, db2, *[None] * 6


class _GroupedMM(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, w, bias, slot, offsets):
        rows = _map_tiles(slot, offsets)
        ctx.save_for_backward(h, w, bias, *rows)
        return _expert_mm(rows, h, w, bias, y=h.new_zeros(h.shape[0], w.shape[2]))

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        h, w, bias, *rows = ctx.saved_tensors
        need_h, need_w, need_bias = ctx.needs_input_grad[:3]
        dh = _expert_mm(rows, dy, w.transpose(1, 2), y=h.new_zeros(h.shape)) if need_h else None
        dw = _expert_dw(rows, h, dy, w) if need_w else None
        return dh, dw, _expert_dw(rows, None, dy, bias) if need_bias else None, None, None


class _Combine(torch.autograd.Function):
    """scatter: index = pos, back = token of each row. gather is its transpose: index and back change places."""

    @staticmethod
    def forward(ctx, y, gates, index, back, slot):
        ctx.save_for_backward(None if gates is None else y, gates, index, back, slot)
        return _combine(y, index, gates)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out):
        y, gates, index, back, slot = ctx.saved_tensors
        dy = d_gates = None
        if ctx.needs_input_grad[0]:
            gate_of_row = None if gates is None else gates.reshape(-1, 1)[slot.long()]  # [assignments, 1]
            dy = _combine(d_out, back, gate_of_row)
        if ctx.needs_input_grad[1]:
            d_gates = _by_pos((_combine(d_out, back).float() * y.float()).sum(1), index).to(gates.dtype)
        return dy, d_gates, None, None, None


def _token_of_row(dispatch: Dispatch) -> Tensor:
    """[assignments, 1]: the token of a live row, -1 for the others, as `combine` takes it."""
    row = torch.arange(dispatch.slot.numel(), dtype=torch.int32, device=dispatch.slot.device)
    return torch.where(row < dispatch.offsets[-1], dispatch.slot // dispatch.pos.shape[1], -1).unsqueeze(1)


# ---------------------------------------------------------------------------------------------------------------
# Public functions
# ---------------------------------------------------------------------------------------------------------------

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def _use_triton(backend: str, *tensors: Tensor) -> bool:
    """Whether the kernels take these tensors. Nothing to do (no token, no pick, no width) is left to torch."""
    if backend not in ("auto", "torch", "triton"):
        raise ValueError(f"backend is {backend!r}; allowed: 'auto', 'torch', 'triton'")
    x, why = tensors[0], ""
    if triton is None:
        why = "triton cannot be imported"
    elif x.dtype not in _FLOATS:
        why = f"it takes float32, float16 and bfloat16, not {x.dtype}"
    elif not (INTERPRETED or (x.is_cuda and torch.version.cuda and torch.cuda.get_device_capability(x.device)[0] >= 8)):
        why = f"it needs a CUDA GPU of capability 8.0 or newer (or TRITON_INTERPRET=1); x is on {x.device}"
    elif any(t.numel() >= len(t) * 2**31 > 0 for t in tensors):
        why = "offsets inside a matrix are int32, and one expert's has 2**31 elements or more"
    if why and backend == "triton":
        raise RuntimeError(f"backend 'triton' cannot be used: {why}")
    return not why and backend != "torch" and all(t.numel() for t in tensors)


def _autocast(x: Tensor, *others: Tensor | None) -> list[Tensor | None]:
    """Under autocast, cast outside the autograd functions, so that autograd casts the gradients back."""
    if not torch.is_autocast_enabled(x.device.type):
        return [x, *others]
    dtype = torch.get_autocast_dtype(x.device.type)
    return [t.to(dtype) if isinstance(t, Tensor) and t.dtype in _FLOATS else t for t in (x, *others)]


def gather(x: Tensor, dispatch: Dispatch, backend: str = "auto") -> Tensor:
    """x [tokens, d_model] -> rows grouped by expert [assignments, d_model]; rows beyond the live ones are zero.

    To have the live rows only, at the price of asking the device how many there are, shorten the dispatch first:
    dispatch._replace(slot=dispatch.slot[: int(dispatch.offsets[-1])]). backend as in moe_mlp.
    """
    _check("x", x, (dispatch.pos.shape[0], "d_model"), dispatch.pos, dtypes=(x.dtype,))
    if _use_triton(backend, x, dispatch.slot):
        return _Combine.apply(x, None, _token_of_row(dispatch), dispatch.pos, dispatch.slot)
    _, slot, token = _live(dispatch)
    return F.pad(x.index_select(0, token), (0, 0, 0, dispatch.slot.numel() - slot.numel()))


def grouped_mm(h: Tensor, w: Tensor, dispatch: Dispatch, bias: Tensor | None = None, backend: str = "auto") -> Tensor:
    """h [assignments, in] times each row's expert, w [num_experts, in, out] (+ bias [num_experts, out]).

    Rows beyond the live ones are zero. What needs no gradient gets none computed, so LoRA on frozen experts is
    grouped_mm(h, w, d) + grouped_mm(grouped_mm(h, lora_a, d), lora_b, d).
    """
    _check("h", h, (dispatch.slot.numel(), "in"), dispatch.pos, dtypes=(h.dtype,))
    h, w, bias = _autocast(h, w, bias)
    _check("w", w, (dispatch.num_experts, h.shape[1], "out"), h)
    _check("bias", bias, (dispatch.num_experts, w.shape[2]), h, optional=True)
    if _use_triton(backend, h, w):
        return _GroupedMM.apply(h, w, bias, dispatch.slot, dispatch.offsets)
    counts, slot, _ = _live(dispatch)
    y = _for_experts(_affine, counts, h[: slot.numel()], w, bias)
    return F.pad(y, (0, 0, 0, h.shape[0] - slot.numel()))


def scatter(y: Tensor, dispatch: Dispatch, gates: Tensor | None = None, backend: str = "auto") -> Tensor:
    """y [assignments, d_model] -> [tokens, d_model]: a token's sum of its rows, weighted by gates [tokens, top_k]."""
    _check("y", y, (dispatch.slot.numel(), "d_model"), dispatch.pos, dtypes=(y.dtype,))
    _check("gates", gates, tuple(dispatch.pos.shape), y, dtypes=(torch.float32, y.dtype), optional=True)
    if _use_triton(backend, y, dispatch.slot):
        return _Combine.apply(y, gates, dispatch.pos, _token_of_row(dispatch), dispatch.slot)
    _, slot, token = _live(dispatch)
    return _torch_scatter(y[: slot.numel()], slot, token, dispatch.pos.shape[0], gates)


def moe_mlp(
    x: Tensor, expert_index: Tensor | Dispatch, gates: Tensor, w1: Tensor, w2: Tensor,
    b1: Tensor | None = None, b2: Tensor | None = None, act: str = "gelu", glu: bool = False, backend: str = "auto",
) -> Tensor:  # fmt: skip
    """out[t] = sum_j gates[t, j] * expert(x[t]), expert e = expert_index[t, j]: act(x @ w1[e] + b1[e]) @ w2[e] + b2[e].

    x             [tokens, d_model]
    expert_index  [tokens, top_k], any integer dtype, ids outside 0..num_experts-1 are null; or a ready Dispatch
    gates         [tokens, top_k], float32 or the dtype of x
    w1, b1        [num_experts, d_model, d_ff], [num_experts, d_ff]. With glu the last is 2 * d_ff, columns gate | up,
                  and the hidden layer is act(gate) * up. A transposed view of an [out, in] parameter is not copied.
    w2, b2        [num_experts, d_ff, d_model], [num_experts, d_model]
    act           "gelu" (exact), "relu", "silu" or "none"
    backend       "triton", "torch", or "auto": triton on a CUDA GPU for fp32, fp16 and bf16; torch otherwise. In fp32
                  the kernels use tf32 if torch.backends.cuda.matmul.fp32_precision says so, else full precision.
    """
    if act not in ACTIVATIONS:
        raise ValueError(f"act is {act!r}; allowed: {', '.join(ACTIVATIONS)}")
    _check("x", x, ("tokens", "d_model"))
    if not x.is_floating_point():
        raise ValueError(f"x has dtype {x.dtype}; a floating-point dtype is needed")
    (x, w1, w2, b1, b2), (num_tokens, d_model) = _autocast(x, w1, w2, b1, b2), x.shape
    ready = expert_index if isinstance(expert_index, Dispatch) else None
    _check("w1", w1, (ready.num_experts if ready else "num_experts", d_model, "d_ff"), x)
    (num_experts, _, hidden), dispatch = w1.shape, ready or make_dispatch(expert_index, w1.shape[0])
    _check("expert_index", dispatch.pos, (num_tokens, "top_k"), x, dtypes=(torch.int32,))
    _check("gates", gates, tuple(dispatch.pos.shape), x, dtypes=(torch.float32, x.dtype))
    if glu and hidden % 2:
        raise ValueError(f"w1 has shape {list(w1.shape)}; with glu the last size must be even, gate | up")
    _check("w2", w2, (num_experts, hidden // 2 if glu else hidden, d_model), x)
    _check("b1", b1, (num_experts, hidden), x, optional=True)
    _check("b2", b2, (num_experts, d_model), x, optional=True)
    if _use_triton(backend, x, gates, w1):
        train = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, gates, w1, w2, b1, b2))
        return _MoEMLP.apply(x, gates, w1, w2, b1, b2, *dispatch[:3], act, glu, train)
    mlp = lambda rows, w1, b1, w2, b2: _affine(_activate(_affine(rows, w1, b1), act, glu), w2, b2)
    counts, slot, token = _live(dispatch)
    y = _for_experts(mlp, counts, x.index_select(0, token), w1, b1, w2, b2)
    return _torch_scatter(y, slot, token, num_tokens, gates)


# ---------------------------------------------------------------------------------------------------------------
# Benchmark: python kernels.py
# ---------------------------------------------------------------------------------------------------------------

# name: tokens, top_k, num_experts, d_model, d_ff. On a GPU in bf16 with silu(gate) * up, on a CPU in fp32 with relu.
SHAPES = {
    "cuda": {
        "qwen3-32k": (32768, 8, 128, 2048, 768), "qwen3-8k": (8192, 8, 128, 2048, 768),
        "olmoe-32k": (32768, 8, 64, 2048, 1024), "olmoe-8k": (8192, 8, 64, 2048, 1024),
        "mixtral-8k": (8192, 2, 8, 4096, 14336), "deepseek-16k": (16384, 8, 256, 7168, 2048),
        "deepseek-4k": (4096, 8, 256, 7168, 2048), "teaching": (8192, 2, 8, 512, 2048), "tiny": (4096, 2, 16, 128, 256),
    },
    "cpu": {
        "experts-8": (2048, 2, 8, 128, 256), "experts-16": (2048, 4, 16, 128, 128),
        "experts-32": (1024, 2, 32, 256, 512), "experts-64": (2048, 8, 64, 128, 64),
    },
}  # fmt: skip
CONTENDERS = ("ours", "where loop", "F.grouped_mm", "padded bmm", "sorted loop", "Liger", "ScatterMoE")  # CPU: four
COLUMNS = "forward_ms total_ms spread tflops of_floor fwd_vs_dense total_vs_dense peak_mib peak_formula_mib".split()


def _problem(shape: tuple, device: str) -> tuple[list[Tensor], Tensor]:
    """Random x, expert_index, gates, w1, w2; d_out. Never zeros: they draw less power, and time too well."""
    tokens, top_k, num_experts, d_model, d_ff = shape
    dtype, hidden = (torch.bfloat16, 2 * d_ff) if device == "cuda" else (torch.float32, d_ff)
    x, d_out = (torch.randn(tokens, d_model, device=device, dtype=dtype) for _ in range(2))
    gates = torch.rand(tokens, top_k, device=device).softmax(-1)
    # Stored as nn.Linear does, [out, in]: Liger takes nothing else, ours takes either. On CPUs all like [in, out] more.
    w1 = torch.randn(num_experts, hidden, d_model, device=device, dtype=dtype).mul_(d_model**-0.5).mT
    w2 = torch.randn(num_experts, d_model, d_ff, device=device, dtype=dtype).mul_(d_ff**-0.5).mT
    weights = [w1, w2] if device == "cuda" else [w1.contiguous(), w2.contiguous()]
    inputs = [x, _route(shape, device), gates, *weights]
    return [t.requires_grad_() if t.is_floating_point() else t for t in inputs], d_out


def _route(shape: tuple, device: str, routing: str = "balanced") -> Tensor:
    """expert_index [tokens, top_k], random; skewed: every second token goes to expert 0."""
    tokens, top_k, num_experts, _, _ = shape
    score = torch.rand(tokens, num_experts, device=device)
    score[::2, 0] += 1.0 * (routing == "skewed")
    score[:, num_experts // 2 :] -= 1.0 * (routing == "half empty")
    null = torch.rand(tokens, top_k, device=device) < 0.5 * (routing == "half null")
    return score.topk(top_k).indices.masked_fill(null, -1)


def _forward(contender: str, x: Tensor, expert_index: Tensor, gates: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    """The layer as each contender computes it."""
    num_experts, top_k, glu = len(w1), gates.shape[1], w1.shape[2] != w2.shape[1]
    act = "silu" if glu else "relu"
    if contender == "where loop":  # the usual one: every expert looks for its tokens
        out = torch.zeros_like(x)
        for expert in range(num_experts):
            token, pick = torch.where(expert_index == expert)
            y = _activate(x[token] @ w1[expert], act, glu) @ w2[expert]
            out = out.index_add(0, token, (y * gates[token, pick, None]).to(x.dtype))
        return out
    if contender == "F.grouped_mm":
        multiply = getattr(F, "grouped_mm", None) or torch._grouped_mm
        dispatch = make_dispatch(expert_index, num_experts)
        slot, ends = dispatch.slot.long(), dispatch.offsets[1:]
        y = multiply(_activate(multiply(x[slot // top_k], w1, offs=ends), act, glu), w2, offs=ends)
        return _torch_scatter(y, slot, slot // top_k, len(x), gates)
    if contender == "padded bmm":
        dispatch = make_dispatch(expert_index, num_experts)
        counts, slot, token = _live(dispatch)
        shift = torch.arange(num_experts, device=x.device) * max(counts) - dispatch.offsets[:-1]
        place = torch.arange(len(slot), device=x.device) + shift.repeat_interleave(dispatch.offsets.diff())
        rows = x.new_zeros(num_experts * max(counts), x.shape[1]).index_copy(0, place, x[token])
        y = _activate(rows.view(num_experts, max(counts), -1) @ w1, act, glu) @ w2
        return _torch_scatter(y.flatten(0, 1)[place], slot, token, len(x), gates)
    if contender == "Liger":
        from liger_kernel.ops.fused_moe import LigerFusedMoEFunction

        return LigerFusedMoEFunction.apply(x, w1.mT, w2.mT, expert_index.int(), gates.to(x.dtype))
    if contender == "ScatterMoE":
        from scattermoe.parallel_experts import flatten_sort_count, parallel_linear

        order = flatten_sort_count(expert_index, num_experts=num_experts)
        a = _activate(parallel_linear(x, w1, top_k, *order, grouped_out=True), act, glu)
        return parallel_linear(a, w2, 1, *order, gates=gates.to(x.dtype), grouped_in=True)
    if contender == "dense":  # one expert, nothing to sort
        return _activate(x @ w1.squeeze(0), act, glu) @ w2.squeeze(0)
    backend = "torch" if contender == "sorted loop" else "auto"
    return moe_mlp(x, expert_index, gates, w1, w2, act=act, glu=glu, backend=backend)


def _attempt(name: str, function, *args):
    """function(*args), or None and one line: who is missing, crashes or runs out of memory does not stop the others."""
    try:
        return function(*args)
    except Exception as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        print(f"{name}: left out, {type(error).__name__}: {reason[:150]}", flush=True)


def _correctness(contenders: tuple, device: str) -> dict[str, float]:
    """The largest relative error of output and gradients against the torch path in float64, where there are any."""
    torch.manual_seed(0)
    inputs, d_out = _problem((1024, 2, 8, 192, 320), device)

    def results(contender: str, dtype: torch.dtype | None = None) -> list[Tensor]:
        given = [t.detach().to(dtype or t.dtype).requires_grad_() if t.requires_grad else t for t in inputs]
        out = _forward(contender, *given)
        grads = torch.autograd.grad(out, [t for t in given if t.requires_grad], d_out.to(out.dtype))
        return [t.detach().double() for t in (out, *grads)]

    wanted, errors = results("sorted loop", torch.float64), {}
    for contender in contenders:
        if given := _attempt(contender, results, contender):
            errors[contender] = torch.stack([(g - w).norm() / w.norm() for g, w in zip(given, wanted)]).max().item()
    return errors


def _once(forward, leaves=(), d_out=None) -> tuple[float, float, int]:
    """Milliseconds of forward, of forward and backward together, and on a GPU the peak of bytes beyond the inputs."""
    cuda, peak = torch.cuda.is_available(), 0

    def now():
        if not cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    if cuda:
        torch.empty(2**28, dtype=torch.uint8, device="cuda").zero_()  # pushes the inputs out of the L2 cache
        torch.cuda.reset_peak_memory_stats()
        peak = -torch.cuda.memory_allocated()
    start, out, middle = now(), forward(), now()
    if leaves:
        torch.autograd.grad(out, leaves, d_out)
    end = now()
    if not cuda:
        return 1e3 * (middle - start), 1e3 * (end - start), 0
    torch.cuda.synchronize()
    return start.elapsed_time(middle), start.elapsed_time(end), peak + torch.cuda.max_memory_allocated()


def _measure(jobs: dict[str, tuple], turns: int) -> dict[str, list]:
    """The runs of every job. They take turns, so that whatever slows this machine down slows all of them."""
    runs = {name: [] for name in jobs}
    for turn in range(-2, turns):  # the first two warm up
        for name in list(runs):
            if sum(total for _, total, _ in runs[name]) < 2000:  # slow: fewer turns
                run = _attempt(name, _once, *jobs[name])
                if run is None:
                    del runs[name]
                elif turn >= 0:
                    runs[name].append(run)
    return runs


def _ceilings(device: str) -> tuple[float, float]:
    """FLOP/s of a large matrix product and bytes/s of a large copy, measured here, on random data."""
    n, dtype = (8192, torch.bfloat16) if device == "cuda" else (1024, torch.float32)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    source, target = (torch.randn(4 * n * n, device=device) for _ in range(2))
    jobs = (lambda: a @ b), (lambda: target.copy_(source))
    product, copy = (statistics.median(_once(job)[0] for _ in range(9)) for job in jobs)
    return 2e3 * n**3 / product, 2e3 * source.nbytes / copy


def _work(shape: tuple, device: str) -> list[tuple[float, float]]:
    """FLOPs and bytes of every launch, every tensor moved once."""
    tokens, top_k, num_experts, d_model, d_ff = shape
    n, z, size = tokens * top_k, d_ff * (2 if device == "cuda" else 1), 2 if device == "cuda" else 4
    td, nd, nf, nz = tokens * d_model, n * d_model, n * d_ff, n * z
    w1, w2 = num_experts * d_model * z, num_experts * d_ff * d_model
    up, down = 2 * nd * z, 2 * nd * d_ff
    forward = (up, td + w1 + nz + nf), (down, nf + w2 + nd), (0, nd + td)  # up, down, combine
    data = (down, td + w2 + 2 * nz + nf), (up, nz + w1 + nd), (0, nd + td)  # down_bwd, rows of dx, combine
    weights = (down, nf + td + w2), (up, td + nz + w1)  # dw2, dw1
    return [(flops, size * elements) for flops, elements in (*forward, *data, *weights)]


def _benchmark(name: str, contenders: tuple, device: str, flop_rate: float, byte_rate: float) -> list[dict]:
    """One row per contender; ratios to the dense layer are taken within a turn, under equal conditions."""
    shape, cuda = SHAPES[device][name], device == "cuda"
    tokens, top_k, num_experts, d_model, d_ff = shape
    print(f"\n{name}: tokens, top_k, experts, d_model, d_ff = {shape}, forward + backward")
    (x, balanced, *weights), d_out = _problem(shape, device)
    job = lambda contender, index: (partial(_forward, contender, x, index, *weights), [x, *weights], d_out)
    jobs = {contender: job(contender, balanced) for contender in contenders}
    jobs["ours again"] = job("ours", balanced)  # the difference is noise
    jobs |= {f"ours, {r}": job("ours", _route(shape, device, r)) for r in ("skewed", "half empty", "half null")}
    jobs["make_dispatch"] = (partial(make_dispatch, balanced, num_experts),)
    wide, wide_d_out = _problem((tokens * top_k, 1, 1, d_model, d_ff), device)
    jobs["dense"] = partial(_forward, "dense", *wide), [wide[0], *wide[3:]], wide_d_out  # equal FLOPs
    runs, rows = _measure(jobs, 20 if cuda else 9), []
    if cuda and tokens * top_k * d_model < 2**24:  # what remains when launching costs nothing
        step = lambda: torch.autograd.grad(_forward("ours", x, balanced, *weights), [x, *weights], d_out)
        replay = partial(triton.testing.do_bench_cudagraph, step, return_mode="all")
        if replays := _attempt("ours, CUDA graph", replay):
            runs["ours, CUDA graph"] = [(total, total, 0) for total in replays]
    work = _work(shape, device)
    flops, floor = sum(f for f, _ in work), 1e3 * sum(max(f / flop_rate, moved / byte_rate) for f, moved in work)  # ms
    print(" " * 18, *COLUMNS)
    for contender, measured in runs.items():
        forward, total, peak = map(statistics.median, zip(*measured))
        low, _, high = statistics.quantiles([run[1] for run in measured] * 2, n=4)
        row = {"shape": name, "contender": contender, "total_ms": total, "spread": (high - low) / total}
        if contender not in ("make_dispatch", "ours, half null"):  # those do less work
            row |= {"tflops": flops / total / 1e9, "of_floor": floor / total}
            for i, column in enumerate(("fwd_vs_dense", "total_vs_dense") if "dense" in runs else ()):
                row[column] = statistics.median(dense[i] / own[i] for dense, own in zip(runs["dense"], measured))
        if contender == "ours, CUDA graph":
            row.pop("fwd_vs_dense", None)
        else:
            row |= {"forward_ms": forward} | ({"peak_mib": peak / 2**20} if cuda else {})
        if cuda and contender == "ours":  # output, dx; z, dz, s * a, rows of dx; weight gradients
            elements = tokens * (2 * d_model + top_k * (5 * d_ff + d_model)) + 3 * num_experts * d_model * d_ff
            row["peak_formula_mib"] = 2 * elements / 2**20
        cells = (f"{row[column]:{len(column)}.3g}" if column in row else " " * len(column) for column in COLUMNS)
        print(f"{contender:18}", *cells, flush=True)
        rows.append(row)
    return rows


def _plot(path: str, rows: list[dict], device: str, flop_rate: float, byte_rate: float) -> None:
    """Roofline: what arithmetic and memory of this machine allow, and what each contender reaches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes, ridge, intensity = figure.subplots(), flop_rate / byte_rate, {}
    for shape in dict.fromkeys(row["shape"] for row in rows):
        flops, moved = map(sum, zip(*_work(SHAPES[device][shape], device)))
        intensity[shape] = flops / moved
        axes.axvline(flops / moved, color="0.9", zorder=0)
        axes.text(flops / moved, 0.02, shape, rotation=90, ha="right", fontsize=8, transform=axes.get_xaxis_transform())
    reach = [min(ridge, *intensity.values()) / 2, ridge, max(ridge, *intensity.values()) * 2]
    axes.loglog(reach, [min(flop_rate, byte_rate * x) / 1e12 for x in reach], "k", label="this machine's roof")
    for i, contender in enumerate((*CONTENDERS, "dense", "ours, CUDA graph")):
        points = [(intensity[row["shape"]], row["tflops"]) for row in rows if row["contender"] == contender]
        if points:
            axes.plot(*zip(*points), "o*sDv^<>P"[i], markersize=7 if i else 14, label=contender)
    bottom = min(row["tflops"] for row in rows if "tflops" in row) / 4
    axes.set(xlabel="FLOP per byte moved", ylabel="TFLOP/s, forward + backward", ylim=(bottom, None))
    axes.legend(fontsize=8, loc="lower right")
    figure.savefig(path, dpi=150)


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(description="Check the expert kernels against float64, then time them.")
    parser.error = lambda message: sys.exit(print(f"kernels.py: {message}", file=sys.stderr) or 2)
    parser.add_argument("--shape", metavar="NAME", help=f"only this one of {', '.join(SHAPES[device])}")
    parser.add_argument("--json", metavar="PATH", help="write all figures, with machine and versions")
    parser.add_argument("--plot", metavar="PATH", help="draw them under the roofline (needs matplotlib)")
    args = parser.parse_args()
    if args.shape not in (None, *SHAPES[device]):
        parser.error(f"--shape {args.shape} is not known here; allowed: {', '.join(SHAPES[device])}")
    for path in filter(None, (args.json, args.plot)):
        if os.path.isdir(path) or not os.access(os.path.dirname(os.path.abspath(path)), os.W_OK):
            parser.error(f"cannot write {path}: it must lie in an existing, writable folder")
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot needs matplotlib, which is not installed")
    machine, contenders, bound = f"{platform.machine()} CPU, one thread", CONTENDERS[:4], 1e-5
    if device == "cuda":
        machine, contenders, bound = torch.cuda.get_device_name(), CONTENDERS, 2e-2
    else:
        torch.set_num_threads(1)  # on small matrices a second core gains nothing, and a busy one costs much
        # experts-32 makes 33 MB of gradients a step. glibc returns freed memory to the system, and the 15,000 page
        # faults of getting it back would be timed with the arithmetic: raise M_TRIM_THRESHOLD and M_MMAP_THRESHOLD.
        with contextlib.suppress(OSError, AttributeError):
            for parameter in (-1, -3):
                ctypes.CDLL(None).mallopt(parameter, 2**30)
    versions = f"torch {torch.__version__}, triton {triton.__version__ if triton else 'absent'}"
    print(f"{machine}, {versions}")
    errors = _correctness(contenders, device)
    words = [f"{name} {error:.0e}{'' if error < bound else ' WRONG'}" for name, error in errors.items()]
    print("relative error against float64: " + ", ".join(words), flush=True)
    if not errors.get("ours", 1.0) < bound:
        sys.exit("kernels.py: ours fails this check; nothing is timed")
    rates = flop_rate, byte_rate = _ceilings(device)
    print(f"ceilings: {flop_rate / 1e12:.3g} TFLOP/s large product, {byte_rate / 1e9:.3g} GB/s large copy")
    names, rows = [args.shape] if args.shape else list(SHAPES[device]), []
    for name in names:
        rows += _attempt(name, _benchmark, name, tuple(errors), device, *rates) or []
        if args.json:  # after every shape, so that a crash loses no more than one
            content = {"machine": machine, "versions": versions, "errors": errors, "rows": rows}
            with open(args.json + ".part", "w") as file:
                json.dump(content | {"flop_rate": flop_rate, "byte_rate": byte_rate}, file, indent=1)
            os.replace(args.json + ".part", args.json)  # all or nothing
    if missing := set(names) - {row["shape"] for row in rows if row["contender"] == "ours"}:
        sys.exit(f"kernels.py: ours was not timed on {', '.join(sorted(missing))}")
    if args.plot:
        _plot(args.plot, rows, device, *rates)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("kernels.py: interrupted; --json has the shapes that were finished")
