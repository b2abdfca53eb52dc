"""Mixture-of-experts feed-forward without padding: dispatch -> gather -> grouped GEMM -> scatter.

Each of `num_tokens` tokens picks `top_k` of `num_experts` small MLPs and sums their outputs, weighted by its gates.
Every (token, pick) pair is one *assignment*; id -1 (or any id outside 0..num_experts-1) is a *null* assignment,
which costs nothing: it is never loaded, multiplied or stored. Sorting the assignments by expert makes each expert's
rows consecutive:

    expert_index [tokens=4, top_k=2]       slot: grouped row -> assignment      offsets: expert -> first row
       token a:   2   0                    row    0   1   2 | 3 | 4   5 | .      expert 0 owns rows 0..2
       token b:   0  -1  (null)            slot   1   2   7   6   0   4   3      expert 1 owns row  3
       token c:   2  -1  (null)            token  a   b   d   d   a   c          expert 2 owns rows 4..5
       token d:   1   0                    \\_ expert 0 _/ \\1/ \\_ 2 _/           row 6, 7: null, never touched

Run      python kernels.py      correctness, then timings
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu, "none": lambda z: z}

# ---------------------------------------------------------------------------------------------------------------
# Dispatch: sort the assignments by expert, once
# ---------------------------------------------------------------------------------------------------------------


class Dispatch(NamedTuple):
    """Who goes where. All tensors are int32. `offsets.diff()` is the number of rows of every expert, without a sync."""

    slot: Tensor  # [assignments]      grouped row -> assignment t * top_k + j, so the row's token is slot // top_k
    pos: Tensor  # [tokens, top_k]     assignment -> grouped row, -1 for a null assignment
    offsets: Tensor  # [num_experts + 1]  expert e owns rows offsets[e] .. offsets[e + 1] - 1; offsets[-1] = live rows
    num_experts: int


def make_dispatch(expert_index: Tensor, num_experts: int) -> Dispatch:
    """Sort the assignments of expert_index [tokens, top_k] by expert; ids outside 0..num_experts-1 are null."""
    if not isinstance(expert_index, Tensor) or expert_index.dim() != 2:
        shape = list(expert_index.shape) if isinstance(expert_index, Tensor) else type(expert_index).__name__
        raise ValueError(f"expert_index is {shape}; a tensor of shape [tokens, top_k] is needed")
    if (
        expert_index.dtype.is_floating_point
        or expert_index.dtype.is_complex
        or expert_index.dtype == torch.bool
    ):
        raise ValueError(f"expert_index has dtype {expert_index.dtype}; an integer dtype is needed")
    if not 1 <= num_experts <= 32766:
        raise ValueError(f"num_experts is {num_experts}; 1 to 32766 are allowed")
    total = expert_index.numel()
    if total >= 2**31 - 256:
        raise ValueError(
            f"expert_index {list(expert_index.shape)} has {total} entries; fewer than 2**31 - 256 allowed"
        )
    flat = expert_index.reshape(-1).long()  # [assignments]
    key = torch.where((flat >= 0) & (flat < num_experts), flat, num_experts)  # null assignments sort last
    # A narrow key means fewer passes of a radix sort. Stable: inside an expert, rows keep the order of the tokens.
    key, slot = torch.sort(key.to(torch.uint8 if num_experts < 255 else torch.int16), stable=True)
    experts = torch.arange(num_experts + 1, dtype=torch.int32, device=flat.device)
    offsets = torch.searchsorted(key.int(), experts, out_int32=True)  # [num_experts + 1]
    row = torch.arange(total, dtype=torch.int32, device=flat.device)
    pos = torch.empty_like(row)
    pos[slot] = torch.where(key < num_experts, row, -1)
    return Dispatch(slot.int(), pos.view(expert_index.shape), offsets, num_experts)


def _check(name: str, tensor: Tensor, shape: tuple, like: Tensor, dtypes: tuple = ()) -> None:
    """`tensor` must have `shape` (None: any size), the device of `like`, and one of `dtypes` or the dtype of `like`."""
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name} is a {type(tensor).__name__}; a tensor is needed")
    if tensor.dim() != len(shape) or any(want not in (None, have) for want, have in zip(shape, tensor.shape)):
        needed = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{name} has shape {list(tensor.shape)}; [{needed}] is needed")
    if tensor.device != like.device:
        raise ValueError(f"{name} is on {tensor.device}; everything must be on {like.device}")
    allowed = dtypes or (like.dtype,)
    if tensor.dtype not in allowed:
        raise ValueError(
            f"{name} has dtype {tensor.dtype}; allowed: {', '.join(str(dtype) for dtype in allowed)}"
        )


# ---------------------------------------------------------------------------------------------------------------
# The plain torch path: any device, any float dtype, differentiable twice
# ---------------------------------------------------------------------------------------------------------------


def _live(dispatch: Dispatch) -> tuple[list[int], Tensor, Tensor]:
    """Rows of every expert, and the assignment and token of every live row. Reads the counts on the host."""
    counts = dispatch.offsets.diff().tolist()
    slot = dispatch.slot[: sum(counts)].long()  # [rows]
    return counts, slot, slot // max(dispatch.pos.shape[1], 1)


def _rows(weights: Tensor | None, num_experts: int) -> tuple:
    """One matrix per expert. Never w[e]: its gradient is a full-size zero tensor per expert; unbind's is one stack."""
    return (None,) * num_experts if weights is None else weights.unbind(0)


def _affine(h: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    return h @ w if bias is None else torch.addmm(bias, h, w)


def _activate(z: Tensor, act: str, glu: bool) -> Tensor:
    if not glu:
        return ACTIVATIONS[act](z)
    gate, up = z.chunk(2, dim=-1)
    return ACTIVATIONS[act](gate) * up


def _torch_gather(x: Tensor, dispatch: Dispatch) -> Tensor:
    _, slot, token = _live(dispatch)
    return F.pad(x.index_select(0, token), (0, 0, 0, dispatch.slot.numel() - slot.numel()))


def _torch_grouped_mm(h: Tensor, w: Tensor, dispatch: Dispatch, bias: Tensor | None) -> Tensor:
    counts, slot, _ = _live(dispatch)
    experts = zip(h[: slot.numel()].split(counts), w.unbind(0), _rows(bias, w.shape[0]))
    y = torch.cat([_affine(rows, matrix, vector) for rows, matrix, vector in experts])
    return F.pad(y, (0, 0, 0, h.shape[0] - slot.numel()))


def _torch_scatter(y: Tensor, slot: Tensor, token: Tensor, num_tokens: int, gates: Tensor | None) -> Tensor:
    """Sum the live rows y [rows, d_model] into their tokens, at least in fp32."""
    total = y.to(torch.promote_types(y.dtype, torch.float32))
    if gates is not None:
        total = total * gates.reshape(-1, 1).index_select(0, slot).to(total.dtype)
    return total.new_zeros(num_tokens, y.shape[1]).index_add(0, token, total).to(y.dtype)


def _torch_mlp(x: Tensor, dispatch: Dispatch, gates: Tensor, w1, w2, b1, b2, act: str, glu: bool) -> Tensor:
    counts, slot, token = _live(dispatch)
    weights = [_rows(weight, dispatch.num_experts) for weight in (w1, b1, w2, b2)]
    outputs = []
    for rows, up, up_bias, down, down_bias in zip(x.index_select(0, token).split(counts), *weights):
        outputs.append(_affine(_activate(_affine(rows, up, up_bias), act, glu), down, down_bias))
    return _torch_scatter(torch.cat(outputs), slot, token, x.shape[0], gates)


# ---------------------------------------------------------------------------------------------------------------
# Public functions
# ---------------------------------------------------------------------------------------------------------------


def _use_triton(x: Tensor, backend: str = "auto") -> bool:
    if backend not in ("auto", "torch", "triton"):
        raise ValueError(f"backend is {backend!r}; allowed: 'auto', 'torch', 'triton'")
    if backend == "triton":
        raise RuntimeError(
            "backend 'triton' needs a CUDA tensor on a GPU of capability 8.0 or newer, and triton"
        )
    return False


def _autocast(x: Tensor, *tensors: Tensor | None) -> list[Tensor | None]:
    """Under autocast, cast outside the autograd function, so that autograd casts the gradients back."""
    kind = x.device.type
    if not torch.is_autocast_enabled(kind) or x.dtype == torch.float64:
        return [x, *tensors]
    dtype = torch.get_autocast_dtype(kind)
    return [t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() else t for t in (x, *tensors)]


def gather(x: Tensor, dispatch: Dispatch) -> Tensor:
    """x [tokens, d_model] -> grouped rows [assignments, d_model]; rows beyond the live ones are zero."""
    _check("x", x, (dispatch.pos.shape[0], None), dispatch.pos, dtypes=(x.dtype,))
    return _torch_gather(x, dispatch)


def grouped_mm(h: Tensor, w: Tensor, dispatch: Dispatch, bias: Tensor | None = None) -> Tensor:
    """h [assignments, in] times each row's expert w [num_experts, in, out] (+ bias [num_experts, out]).

    Rows beyond the live ones are zero. No gradient is computed for what does not require one, so LoRA on frozen
    experts is `grouped_mm(h, w, d) + grouped_mm(grouped_mm(h, lora_a, d), lora_b, d)`.
    """
    h, w, bias = _autocast(h, w, bias)
    _check("h", h, (dispatch.slot.numel(), None), dispatch.pos, dtypes=(h.dtype,))
    _check("w", w, (dispatch.num_experts, h.shape[1], None), h)
    if bias is not None:
        _check("bias", bias, (dispatch.num_experts, w.shape[2]), h)
    return _torch_grouped_mm(h, w, dispatch, bias)


def scatter(y: Tensor, dispatch: Dispatch, gates: Tensor | None = None) -> Tensor:
    """y [assignments, d_model] -> [tokens, d_model]: each token sums its rows, weighted by gates [tokens, top_k]."""
    _check("y", y, (dispatch.slot.numel(), None), dispatch.pos, dtypes=(y.dtype,))
    if gates is not None:
        _check("gates", gates, tuple(dispatch.pos.shape), y, dtypes=(torch.float32, y.dtype))
    _, slot, token = _live(dispatch)
    return _torch_scatter(y[: slot.numel()], slot, token, dispatch.pos.shape[0], gates)


def moe_mlp(
    x: Tensor,
    expert_index: Tensor | Dispatch,
    gates: Tensor,
    w1: Tensor,
    w2: Tensor,
    b1: Tensor | None = None,
    b2: Tensor | None = None,
    act: str = "gelu",
    glu: bool = False,
    backend: str = "auto",
) -> Tensor:
    """out[t] = sum_j gates[t, j] * expert_{expert_index[t, j]}(x[t]), expert_e(x) = act(x @ w1[e] + b1[e]) @ w2[e] + b2[e].

    x             [tokens, d_model]
    expert_index  [tokens, top_k], any integer dtype; ids outside 0..num_experts-1 are null. Or a ready `Dispatch`.
    gates         [tokens, top_k], float32 or x.dtype
    w1            [num_experts, d_model, d_ff]; with glu [num_experts, d_model, 2 * d_ff], columns gate | up, and the
                  hidden layer is act(gate) * up. A transposed view of an [out, in] parameter needs no copy.
    w2            [num_experts, d_ff, d_model]; b1 and b2 hold one bias per output column of w1 and w2
    act           "gelu" (exact), "relu", "silu" or "none"
    """
    if act not in ACTIVATIONS:
        raise ValueError(f"act is {act!r}; allowed: {', '.join(ACTIVATIONS)}")
    for name, tensor, rank in (("x", x, 2), ("gates", gates, 2), ("w1", w1, 3), ("w2", w2, 3)):
        if not isinstance(tensor, Tensor) or tensor.dim() != rank:
            given = f"shape {list(tensor.shape)}" if isinstance(tensor, Tensor) else type(tensor).__name__
            raise ValueError(f"{name} has {given}; a tensor of {rank} dimensions is needed")
    x, w1, w2, b1, b2 = _autocast(x, w1, w2, b1, b2)
    if not x.dtype.is_floating_point:
        raise ValueError(f"x has dtype {x.dtype}; a floating-point dtype is needed")
    dispatch = (
        expert_index if isinstance(expert_index, Dispatch) else make_dispatch(expert_index, w1.shape[0])
    )
    num_experts, (num_tokens, d_model) = dispatch.num_experts, x.shape
    if dispatch.pos.shape[0] != num_tokens:
        raise ValueError(
            f"expert_index has shape {list(dispatch.pos.shape)}; x {list(x.shape)} has {num_tokens} tokens"
        )
    _check("expert_index", dispatch.pos, tuple(dispatch.pos.shape), x, dtypes=(torch.int32,))
    _check("gates", gates, tuple(dispatch.pos.shape), x, dtypes=(torch.float32, x.dtype))
    _check("w1", w1, (num_experts, d_model, None), x)
    if glu and w1.shape[2] % 2:
        raise ValueError(
            f"w1 has shape {list(w1.shape)}; with glu its last dimension must be even (gate | up)"
        )
    _check("w2", w2, (num_experts, w1.shape[2] // (2 if glu else 1), d_model), x)
    for name, bias, weight in (("b1", b1, w1), ("b2", b2, w2)):
        if bias is not None:
            _check(name, bias, (num_experts, weight.shape[2]), x)
    _use_triton(x, backend)
    return _torch_mlp(x, dispatch, gates, w1, w2, b1, b2, act, glu)
