"""Mixture-of-experts feed-forward without padding: sort once, gather, grouped GEMM, scatter.

Each token picks top_k of num_experts small MLPs and sums their outputs, weighted by its gates. A
(token, pick) pair is an *assignment*; an id outside 0..num_experts-1, usually -1, is a *null*
assignment (a dropped or padding token, a null expert): it is never loaded, multiplied or stored.

What a grouped GEMM is. One matrix product per expert, with as many rows as that expert has tokens:
one launch, whose programs look up which expert their rows belong to.

Why sort. A GEMM is fast because a tile of rows shares the weights it loads. Sorting the assignments
by expert puts rows that share weights next to each other. Only row numbers are sorted; tokens stay
where they are and are gathered by the first GEMM as it loads them:

    expert_index [tokens=4, top_k=2]     slot: row -> assignment t * top_k + j
      token 0     2   0                  row    0  1  2 | 3 | 4  5 | .  .
      token 1     0  -1  null            slot   1  2  7 | 6 | 0  4 | 3  5
      token 2     2  -1  null            token  0  1  3 | 3 | 0  2 | null
      token 3     1   0                  expert    0      1     2    never touched

    offsets: first row of an expert      pos: assignment -> row
      0  3  4  6                           4  0  /  1 -1  /  5 -1  /  3  2

Why no padding. Batched products want equal row counts, so the busiest expert sets the size of all,
or tokens are dropped. Tiles that end where an expert ends cost at most one partly filled tile each.

Why the gate gradient is free. out = sum_j s_j y_j, so ds = <d_out, y> = <d_out, a @ w2>
= <d_out @ w2^T, a>: the backward pass computes d_out @ w2^T anyway and recomputes a = act(z) from
the saved z. y is never kept.

In memory: forward keeps x and z only. No atomics, so results repeat bit by bit. No value is read
back to the host, so the Triton path can be captured in a CUDA graph; the torch path, for CPUs and
float64, reads the row counts. Torch's FLOP counter sees the torch path; it does not see into the
Triton kernels, whose work depends on the routing: count with backend="torch".

Use      out = moe_mlp(x, expert_index, gates, w1, w2, act="silu", glu=True)
Read     Dispatch, moe_mlp_by_hand, moe_mlp; then the torch path; then the kernels, one at a time.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

try:
    import triton
    import triton.language as tl
except ImportError:  # the torch path needs neither
    triton = None


def _identity(z: Tensor) -> Tensor:
    return z


ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu, "none": _identity}
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)

# ----------------------------------------------------------------------------------------------
# Dispatch: sort the assignments by expert, once
# ----------------------------------------------------------------------------------------------


class Dispatch(NamedTuple):
    """Who goes where, in int32. `offsets.diff()` is the rows of every expert, on the device."""

    slot: Tensor  # [assignments]  row -> assignment; the row's token is slot // top_k
    pos: Tensor  # [tokens, top_k]  assignment -> row, -1 for a null assignment
    offsets: Tensor  # [num_experts + 1]  expert e owns rows offsets[e] .. offsets[e + 1] - 1
    num_experts: int


def make_dispatch(expert_index: Tensor, num_experts: int) -> Dispatch:
    """Sort the assignments of expert_index [tokens, top_k]; an id outside the range is null."""
    _check("expert_index", expert_index, ("tokens", "top_k"))
    dtype = expert_index.dtype
    device = expert_index.device
    total = expert_index.numel()
    if dtype.is_floating_point or dtype.is_complex or dtype == torch.bool:
        raise ValueError(f"expert_index has dtype {dtype}; an integer dtype is needed")
    if not 1 <= num_experts <= 32766:
        raise ValueError(f"num_experts is {num_experts}; 1 to 32766 are allowed")
    if total >= 2**31 - 256:
        shape = list(expert_index.shape)
        raise ValueError(f"expert_index {shape} has {total} entries; 2**31 - 257 are allowed")
    flat = expert_index.reshape(-1).long()  # [assignments]
    is_live = (flat >= 0) & (flat < num_experts)
    key = torch.where(is_live, flat, num_experts)  # null assignments sort last
    # A narrow key means fewer passes of a radix sort.
    key = key.to(torch.uint8 if num_experts < 255 else torch.int16)
    # Stable: inside an expert, rows keep the order of the tokens.
    key, slot = torch.sort(key, stable=True)
    experts = torch.arange(num_experts + 1, dtype=torch.int32, device=device)
    offsets = torch.searchsorted(key.int(), experts, out_int32=True)
    row = torch.arange(total, dtype=torch.int32, device=device)
    pos = torch.empty_like(row)
    pos[slot] = torch.where(key < num_experts, row, -1)
    return Dispatch(slot.int(), pos.view(expert_index.shape), offsets, num_experts)


def _check(name: str, tensor, shape: tuple, like: Tensor | None = None, dtypes: tuple = ()) -> None:
    """ValueError unless the tensor has this shape, a string standing for any size, the device of
    `like`, and one of the dtypes (by default that of `like`)."""
    if not isinstance(tensor, Tensor):
        needed = f"a tensor of shape [{', '.join(map(str, shape))}] is needed"
        raise ValueError(f"{name} has type {type(tensor).__name__}; {needed}")
    ranked = tensor.dim() == len(shape)
    fits = [isinstance(want, str) or want == size for want, size in zip(shape, tensor.shape)]
    if not ranked or not all(fits):
        needed = f"{'' if ranked else 'a tensor of '}shape [{', '.join(map(str, shape))}]"
        raise ValueError(f"{name} has shape {list(tensor.shape)}; {needed} is needed")
    if like is None:
        return
    if tensor.device != like.device:
        needed = f"all tensors must be on one device, here {like.device}"
        raise ValueError(f"{name} is on {tensor.device}; {needed}")
    dtypes = dtypes or (like.dtype,)
    if tensor.dtype not in dtypes:
        allowed = ", ".join(map(str, dtypes))
        raise ValueError(f"{name} has dtype {tensor.dtype}; allowed here: {allowed}")


# ----------------------------------------------------------------------------------------------
# The layer: by hand, then fast
# ----------------------------------------------------------------------------------------------


def moe_mlp_by_hand(
    x: Tensor, expert_index: Tensor, gates: Tensor, w1: Tensor, w2: Tensor, act: str = "gelu"
) -> Tensor:
    """The definition, one token and one pick at a time. Read this first: moe_mlp gives the same."""
    out = torch.zeros_like(x)  # [tokens, d_model]
    for token in range(expert_index.shape[0]):
        for pick in range(expert_index.shape[1]):
            expert = int(expert_index[token, pick])
            if 0 <= expert < len(w1):  # else a null assignment
                hidden = ACTIVATIONS[act](x[token] @ w1[expert])  # [d_ff]
                out[token] += gates[token, pick] * (hidden @ w2[expert])
    return out


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
    """out[t] = sum_j gates[t, j] * (act(x[t] @ w1[e] + b1[e]) @ w2[e] + b2[e]), the expert e being
    expert_index[t, j].

    x             [tokens, d_model]
    expert_index  [tokens, top_k], any integer dtype, ids outside 0..num_experts-1 are null; or a
                  ready Dispatch
    gates         [tokens, top_k], float32 or the dtype of x
    w1, b1        [num_experts, d_model, d_ff], [num_experts, d_ff]. With glu the last is 2 * d_ff,
                  columns gate | up, and the hidden layer is act(gate) * up. A transposed view of an
                  [out, in] parameter is not copied.
    w2, b2        [num_experts, d_ff, d_model], [num_experts, d_model]
    act           "gelu" (exact), "relu", "silu" or "none"
    backend       "triton", "torch", or "auto": triton on a CUDA GPU for fp32, fp16 and bf16; torch
                  otherwise. In fp32 the kernels use tf32 if
                  torch.backends.cuda.matmul.fp32_precision says so, else full precision.
    """
    if act not in ACTIVATIONS:
        raise ValueError(f"act is {act!r}; allowed: {', '.join(ACTIVATIONS)}")
    _check("x", x, ("tokens", "d_model"))
    if not x.is_floating_point():
        raise ValueError(f"x has dtype {x.dtype}; a floating-point dtype is needed")
    x, w1, w2, b1, b2 = _autocast(x, w1, w2, b1, b2)
    num_tokens, d_model = x.shape
    dispatch = expert_index if isinstance(expert_index, Dispatch) else None
    _check("w1", w1, (dispatch.num_experts if dispatch else "num_experts", d_model, "d_ff"), x)
    num_experts, _, hidden = w1.shape
    if dispatch is None:
        dispatch = make_dispatch(expert_index, num_experts)
    _check("expert_index", dispatch.pos, (num_tokens, "top_k"), x, dtypes=(torch.int32,))
    _check("gates", gates, tuple(dispatch.pos.shape), x, dtypes=(torch.float32, x.dtype))
    if glu and hidden % 2:
        needed = "with glu the last size must be even, gate | up"
        raise ValueError(f"w1 has shape {list(w1.shape)}; {needed}")
    _check("w2", w2, (num_experts, hidden // 2 if glu else hidden, d_model), x)
    if b1 is not None:
        _check("b1", b1, (num_experts, hidden), x)
    if b2 is not None:
        _check("b2", b2, (num_experts, d_model), x)

    if _use_triton(backend, num_experts, x, gates, w1):
        leaves = [t for t in (x, gates, w1, w2, b1, b2) if t is not None]
        train = torch.is_grad_enabled() and any(t.requires_grad for t in leaves)
        row_numbers = (dispatch.slot, dispatch.pos, dispatch.offsets)
        return _MoEMLP.apply(x, gates, w1, w2, b1, b2, *row_numbers, act, glu, train)[0]
    counts, slot, token = _live(dispatch)
    rows = x.index_select(0, token)  # [live rows, d_model], expert by expert
    if _many_small_groups(counts, rows, w1, w2) and b1 is None and b2 is None:
        hidden_rows = _activate(_library_mm(rows, w1, dispatch), act, glu)  # [live rows, d_ff]
        y = _library_mm(hidden_rows, w2, dispatch)  # [live rows, d_model]
        return _torch_scatter(y, slot, token, num_tokens, gates)
    parts = []
    for rows_e, w1_e, b1_e, w2_e, b2_e in _by_expert(counts, rows, w1, b1, w2, b2):
        hidden_rows = _activate(_affine(rows_e, w1_e, b1_e), act, glu)
        parts.append(_affine(hidden_rows, w2_e, b2_e))
    return _torch_scatter(torch.cat(parts), slot, token, num_tokens, gates)


# ----------------------------------------------------------------------------------------------
# Its three steps, for layers that need something in between
# ----------------------------------------------------------------------------------------------


def gather(x: Tensor, dispatch: Dispatch, backend: str = "auto") -> Tensor:
    """x [tokens, d_model] -> rows grouped by expert [assignments, d_model]; null rows are zero.

    To have the live rows only, at the price of asking the device how many there are, shorten the
    dispatch first: dispatch._replace(slot=dispatch.slot[: int(dispatch.offsets[-1])]).
    backend as in moe_mlp.
    """
    _check("x", x, (dispatch.pos.shape[0], "d_model"), dispatch.pos, dtypes=(x.dtype,))
    (x,) = _autocast(x)
    if _use_triton(backend, dispatch.num_experts, x, dispatch.slot):
        token = _token_of_row(dispatch)
        return _Combine.apply(x, None, token, dispatch.pos, dispatch.slot)
    _, _, token = _live(dispatch)
    return _with_null_rows(x.index_select(0, token), dispatch)


def grouped_mm(
    h: Tensor, w: Tensor, dispatch: Dispatch, bias: Tensor | None = None, backend: str = "auto"
) -> Tensor:
    """h [assignments, in] times each row's w [num_experts, in, out] + bias [num_experts, out].

    Null rows are zero. What needs no gradient gets none computed, so LoRA on frozen experts is
    grouped_mm(h, w, d) + grouped_mm(grouped_mm(h, lora_a, d), lora_b, d).
    """
    _check("h", h, (dispatch.slot.numel(), "in"), dispatch.pos, dtypes=(h.dtype,))
    h, w, bias = _autocast(h, w, bias)
    _check("w", w, (dispatch.num_experts, h.shape[1], "out"), h)
    if bias is not None:
        _check("bias", bias, (dispatch.num_experts, w.shape[2]), h)
    if _use_triton(backend, dispatch.num_experts, h, w):
        return _GroupedMM.apply(h, w, bias, dispatch.slot, dispatch.offsets)[0]
    counts, slot, _ = _live(dispatch)
    rows = h[: len(slot)]
    if _many_small_groups(counts, rows, w) and bias is None:
        return _with_null_rows(_library_mm(rows, w, dispatch), dispatch)
    parts = [_affine(*expert) for expert in _by_expert(counts, rows, w, bias)]
    return _with_null_rows(torch.cat(parts), dispatch)


def scatter(
    y: Tensor, dispatch: Dispatch, gates: Tensor | None = None, backend: str = "auto"
) -> Tensor:
    """y [assignments, d_model] -> [tokens, d_model], summed with weights gates [tokens, top_k]."""
    _check("y", y, (dispatch.slot.numel(), "d_model"), dispatch.pos, dtypes=(y.dtype,))
    (y,) = _autocast(y)
    if gates is not None:
        _check("gates", gates, tuple(dispatch.pos.shape), y, dtypes=(torch.float32, y.dtype))
    if _use_triton(backend, dispatch.num_experts, y, dispatch.slot):
        token = _token_of_row(dispatch)
        return _Combine.apply(y, gates, dispatch.pos, token, dispatch.slot)
    _, slot, token = _live(dispatch)
    return _torch_scatter(y[: len(slot)], slot, token, dispatch.pos.shape[0], gates)


def _use_triton(backend: str, num_experts: int, *tensors: Tensor) -> bool:
    """Whether the kernels take these. Nothing to do (no token, pick, width) is left to torch."""
    if backend not in ("auto", "torch", "triton"):
        raise ValueError(f"backend is {backend!r}; allowed: 'auto', 'torch', 'triton'")
    x, device = tensors[0], tensors[0].device
    why = ""
    if triton is None:
        why = "triton cannot be imported"
    elif x.dtype not in _FLOATS:
        why = f"it takes float32, float16 and bfloat16, not {x.dtype}"
    elif not (INTERPRETED and x.is_cpu or _is_new_enough(device)):
        needed = "a CUDA GPU of capability 8.0 or newer (or TRITON_INTERPRET=1)"
        why = f"it needs {needed}; x is on {device}"
    elif any(t.numel() >= len(t) * 2**31 > 0 for t in tensors):
        why = "offsets inside a matrix are int32, and one expert's has 2**31 elements or more"
    elif num_experts > 8192:  # tile_map holds the counts of all experts in registers
        why = f"its list of tiles is made for 8192 experts at most, not {num_experts}"
    elif _is_transformed():
        why = "torch.func and forward-mode derivatives do not see into the kernels"
    if why and backend == "triton":
        raise RuntimeError(f"backend 'triton' cannot be used: {why}")
    return not why and backend != "torch" and all(t.numel() for t in tensors)


def _is_transformed() -> bool:
    """Inside torch.func.grad, vmap, jvp and the like, or forward_ad.dual_level."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def _is_new_enough(device: torch.device) -> bool:
    if device.type != "cuda" or not torch.version.cuda:
        return False
    return torch.cuda.get_device_capability(device)[0] >= 8


def _autocast(x: Tensor, *others: Tensor | None) -> list[Tensor | None]:
    """Under autocast, cast outside the autograd functions: autograd casts the gradients back."""
    kind = x.device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):  # "meta" is unknown to autocast
        return [x, *others]
    dtype = torch.get_autocast_dtype(kind)
    is_float = [isinstance(t, Tensor) and t.dtype in _FLOATS for t in (x, *others)]
    return [t.to(dtype) if cast else t for t, cast in zip((x, *others), is_float)]


# ----------------------------------------------------------------------------------------------
# The plain torch path: any device, any float dtype, differentiable twice
# ----------------------------------------------------------------------------------------------


def _live(dispatch: Dispatch) -> tuple[list[int], Tensor, Tensor]:
    """Rows of every expert, and the assignment and the token of every live row."""
    if dispatch.offsets.is_meta:  # nothing to count: shapes come out as if the first had all rows
        counts = [dispatch.slot.numel()] + [0] * (dispatch.num_experts - 1)
    else:
        counts = dispatch.offsets.diff().tolist()
    slot = dispatch.slot[: sum(counts)].long()
    top_k = dispatch.pos.shape[1]
    return counts, slot, slot // max(top_k, 1)


def _by_expert(counts: list[int], rows: Tensor, *weights: Tensor | None) -> list[tuple]:
    """(its rows, *its weights) of every expert that has rows; of the first, if none has.

    Not w[e], whose gradient is a zero tensor of full size per expert: unbind stacks once.
    """
    nothing = [None] * len(counts)
    parts = [nothing if w is None else w.unbind(0) for w in weights]
    experts = list(zip(rows.split(counts), *parts))
    if torch.compiler.is_compiling():  # the row counts are not known yet
        return experts
    return [expert for expert in experts if len(expert[0])] or experts[:1]


def _affine(h: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    return h @ w if bias is None else torch.addmm(bias, h, w)


def _activate(z: Tensor, act: str, glu: bool) -> Tensor:
    if not glu:
        return ACTIVATIONS[act](z)
    gate, up = z.chunk(2, dim=-1)
    return ACTIVATIONS[act](gate) * up


def _many_small_groups(counts: list[int], rows: Tensor, *weights: Tensor) -> bool:
    """Whether F.grouped_mm, one loop over all experts in C++, takes these and is faster than a loop
    in Python over those that have rows. With 512 rows an expert or more it is not: there, what was
    computed last should still be in the cache."""
    # Whoever looks at the operators (the compiler, a FLOP counter, fake tensors, torch.func) knows
    # mm, but not this one.
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() or _is_transformed():
        return False
    if not hasattr(F, "grouped_mm") or not rows.is_cpu or rows.dtype not in _FLOATS:
        return False
    if len(rows) == 0 or len(rows) >= 512 * len(counts):
        return False
    for w in weights:
        aligned = all(width * w.element_size() % 16 == 0 for width in w.shape[1:])
        if not (aligned and w.numel() and (w.is_contiguous() or w.mT.is_contiguous())):
            return False
    return True


def _library_mm(rows: Tensor, w: Tensor, dispatch: Dispatch) -> Tensor:
    """Live rows [rows, in], times each one's w [num_experts, in, out]."""
    y = F.grouped_mm(rows.contiguous(), w, offs=dispatch.offsets[1:])
    if y.requires_grad:  # its backward does not take the expanded gradient of a plain sum
        y.register_hook(torch.Tensor.contiguous)
    return y


def _with_null_rows(rows: Tensor, dispatch: Dispatch) -> Tensor:
    """Live rows [rows, width] -> [assignments, width], zeros below."""
    return F.pad(rows, (0, 0, 0, dispatch.slot.numel() - len(rows)))


def _torch_scatter(
    y: Tensor, slot: Tensor, token: Tensor, num_tokens: int, gates: Tensor | None
) -> Tensor:
    """Sum the live rows y [rows, d_model] into their tokens, at least in fp32."""
    total = y.to(torch.promote_types(y.dtype, torch.float32))
    if gates is not None:
        gate_of_row = gates.reshape(-1, 1).index_select(0, slot)  # [rows, 1]
        total = total * gate_of_row.to(total.dtype)
    out = total.new_zeros(num_tokens, y.shape[1]).index_add(0, token, total)
    return out.to(y.dtype)


# ----------------------------------------------------------------------------------------------
# The Triton kernels. Widths and strides are constexpr: from runtime integers the compiler cannot
# prove that rows start at a multiple of 16 bytes, and drops the asynchronous copies. Widths that
# are a multiple of 8 (fp32: 4) keep them; others work, slower. Row and expert numbers become int64
# before they meet a stride. What a mask hides is never multiplied by zero: it may be NaN.
# ----------------------------------------------------------------------------------------------

if triton is not None:

    @triton.jit
    def _dot(a, b, acc, PRECISION: tl.constexpr):
        if PRECISION == "interpreter":  # it would multiply the raw bits of bfloat16
            return tl.dot(a.to(tl.float32), b.to(tl.float32), acc)
        return tl.dot(a, b, acc, input_precision=PRECISION)

    @triton.jit
    def _activation(z, ACT: tl.constexpr):
        # act(z) and its slope; the compiler drops the one that is not used.
        if ACT == "relu":  # unlike with maximum(z, 0), NaN stays NaN
            return tl.where(z <= 0, 0.0, z), tl.where(z <= 0, 0.0, 1.0)
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
        # An epilogue needs registers per column: on whole tiles it spills them to memory, on half
        # a tile it does not.
        HALF: tl.constexpr = tile.shape[1] // 2
        return tl.split(tl.permute(tl.reshape(tile, (tile.shape[0], 2, HALF)), (0, 2, 1)))

    @triton.jit
    def _walk(pid, row_tiles, COL_TILES: tl.constexpr, GROUP: tl.constexpr):
        # Programs with neighbouring numbers run together and share the L2 cache. Numbered row by
        # row, they would read all weights again for every row tile; in groups of row tiles, once
        # per group, mostly of one expert:
        #
        #     row by row   0 1 2 3         GROUP = 2   0 2 4 6
        #                  4 5 6 7                     1 3 5 7
        #                  8 9 ...                     8 ...
        first = pid // (GROUP * COL_TILES) * GROUP
        inside = pid % (GROUP * COL_TILES)
        rows = tl.minimum(row_tiles - first, GROUP)
        return first + inside % rows, inside // rows

    # tile_map: a tile is BM rows of ONE expert; an empty expert has none. Only the device knows how
    # many that makes. The host sizes grids by a bound that it knows, N // BM + min(E, N), and this
    # kernel lists the real tiles, so nothing waits for the host:
    #     tiles = [count, expert, first row, expert, first row, ...]
    # One program per expert.
    @triton.jit
    def tile_map(
        offsets_ptr, tiles_ptr, num_experts,
        EXPERTS_2: tl.constexpr,  # num_experts rounded up to a power of two
        BM: tl.constexpr,
    ):  # fmt: skip
        expert = tl.program_id(0)
        ids = tl.arange(0, EXPERTS_2)
        begin = tl.load(offsets_ptr + ids, mask=ids < num_experts, other=0)
        end = tl.load(offsets_ptr + ids + 1, mask=ids < num_experts, other=0)
        count = (end - begin + BM - 1) // BM  # tiles of every expert
        before = tl.sum(tl.where(ids < expert, count, 0), 0)
        mine = tl.sum(tl.where(ids == expert, count, 0), 0)
        first_row = tl.load(offsets_ptr + expert)
        for start in range(0, mine, 128):
            i = start + tl.arange(0, 128)
            pair_ptr = tiles_ptr + 1 + 2 * (before + i)
            tl.store(pair_ptr, tl.zeros_like(i) + expert, mask=i < mine)
            tl.store(pair_ptr + 1, first_row + i * BM, mask=i < mine)
        if expert == 0:
            tl.store(tiles_ptr, tl.sum(count, 0))

    # One tile of a grouped GEMM: a[rows] @ w[expert][:, cols]; with GLU also the same rows times
    # the up columns.
    @triton.jit
    def _gemm_tile(
        a_ptr, w_ptr, slot_ptr, offsets_ptr, tiles_ptr,
        K: tl.constexpr, WIDTH: tl.constexpr, A_ROW: tl.constexpr,
        W_E: tl.constexpr, W_K: tl.constexpr, W_N: tl.constexpr,
        TOP_K: tl.constexpr, GLU: tl.constexpr, PRECISION: tl.constexpr,
        BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    ):  # fmt: skip
        COL_TILES: tl.constexpr = (WIDTH + BN - 1) // BN
        tile, col_tile = _walk(tl.program_id(0), tl.load(tiles_ptr), COL_TILES, GROUP)
        expert = tl.load(tiles_ptr + 1 + 2 * tile).to(tl.int64)
        rows = tl.load(tiles_ptr + 2 + 2 * tile) + tl.arange(0, BM)
        live = rows < tl.load(offsets_ptr + expert + 1)
        cols = col_tile * BN + tl.arange(0, BN)
        a_rows = rows
        if TOP_K > 0:  # gather: the token numbers are loaded once, before the loop
            a_rows = tl.load(slot_ptr + rows, mask=live, other=0) // TOP_K
        a_row_ptr = a_ptr + a_rows.to(tl.int64) * A_ROW
        w_col_ptr = w_ptr + expert * W_E + cols * W_N
        acc = tl.zeros((BM, BN), tl.float32)
        acc_up = acc
        for k0 in range(0, K, BK):
            k = k0 + tl.arange(0, BK)
            a_mask = live[:, None] & (k < K)[None, :]
            a = tl.load(a_row_ptr[:, None] + k[None, :], mask=a_mask, other=0.0)
            w_at = w_col_ptr[None, :] + k[:, None] * W_K
            w_mask = (k < K)[:, None] & (cols < WIDTH)[None, :]
            acc = _dot(a, tl.load(w_at, mask=w_mask, other=0.0), acc, PRECISION)
            if GLU:
                w_up = tl.load(w_at + WIDTH * W_N, mask=w_mask, other=0.0)
                acc_up = _dot(a, w_up, acc_up, PRECISION)
        return expert, rows.to(tl.int64), live, col_tile, acc, acc_up

    # expert_mm: the grouped GEMM. One program makes one [BM, BN] tile of
    #     y = act(a @ w[expert] + bias[expert])
    # Used three times: up projection (rows gathered from the tokens, activation on the way out, z
    # kept for backward), down projection, and the gradient of x, where w is a view of w1.
    @triton.jit
    def expert_mm(
        a_ptr, w_ptr, bias_ptr, z_ptr, y_ptr, slot_ptr, offsets_ptr, tiles_ptr,
        K: tl.constexpr, WIDTH: tl.constexpr, A_ROW: tl.constexpr,
        W_E: tl.constexpr, W_K: tl.constexpr, W_N: tl.constexpr,
        TOP_K: tl.constexpr, ACT: tl.constexpr, GLU: tl.constexpr, PRECISION: tl.constexpr,
        BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    ):  # fmt: skip
        COL_TILES: tl.constexpr = (WIDTH + BN - 1) // BN
        Z_WIDTH: tl.constexpr = 2 * WIDTH if GLU else WIDTH
        if tl.program_id(0) >= tl.load(tiles_ptr) * COL_TILES:  # the grid is an upper bound
            return
        expert, rows, live, col_tile, acc, acc_up = _gemm_tile(
            a_ptr, w_ptr, slot_ptr, offsets_ptr, tiles_ptr,
            K=K, WIDTH=WIDTH, A_ROW=A_ROW, W_E=W_E, W_K=W_K, W_N=W_N, TOP_K=TOP_K, GLU=GLU,
            PRECISION=PRECISION, BM=BM, BN=BN, BK=BK, GROUP=GROUP,
        )  # fmt: skip
        z_halves = _halves(acc)
        up_halves = _halves(acc_up)
        for half in tl.static_range(2):
            z = z_halves[half]
            up = up_halves[half]
            cols = col_tile * BN + half * (BN // 2) + tl.arange(0, BN // 2)
            mask = live[:, None] & (cols < WIDTH)[None, :]
            if bias_ptr is not None:
                bias_at = bias_ptr + expert * Z_WIDTH + cols
                z += tl.load(bias_at, mask=cols < WIDTH, other=0.0).to(tl.float32)[None, :]
                if GLU:
                    up_bias = tl.load(bias_at + WIDTH, mask=cols < WIDTH, other=0.0)
                    up += up_bias.to(tl.float32)[None, :]
            if z_ptr is not None:
                z_at = z_ptr + rows[:, None] * Z_WIDTH + cols[None, :]
                tl.store(z_at, z.to(z_ptr.dtype.element_ty), mask=mask)
                if GLU:
                    tl.store(z_at + WIDTH, up.to(z_ptr.dtype.element_ty), mask=mask)
            y, _ = _activation(z, ACT)
            if GLU:
                y *= up
            y_at = y_ptr + rows[:, None] * WIDTH + cols[None, :]
            tl.store(y_at, y.to(y_ptr.dtype.element_ty), mask=mask)

    # down_bwd: back through gate, down projection and activation at once. For row r of token t
    # with gate s:
    #     g = d_out[t] @ w2[e]^T    one GEMM, whose result never leaves the registers
    #     dz = s * g * act'(z)      for the gradients of w1 and x
    #     sa = s * a, a = act(z)    for the gradient of w2
    #     ds = <g, a>               the gate's gradient
    # A program sees only its own columns of g and a, so it stores its part of ds; the parts are
    # added later, in order.
    @triton.jit
    def down_bwd(
        d_out_ptr, w_ptr, gates_ptr, z_ptr, dz_ptr, sa_ptr, ds_ptr,
        slot_ptr, offsets_ptr, tiles_ptr,
        K: tl.constexpr, WIDTH: tl.constexpr, A_ROW: tl.constexpr,
        W_E: tl.constexpr, W_K: tl.constexpr, W_N: tl.constexpr,
        TOP_K: tl.constexpr, ACT: tl.constexpr, GLU: tl.constexpr, PRECISION: tl.constexpr,
        BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    ):  # fmt: skip
        COL_TILES: tl.constexpr = (WIDTH + BN - 1) // BN
        Z_WIDTH: tl.constexpr = 2 * WIDTH if GLU else WIDTH
        if tl.program_id(0) >= tl.load(tiles_ptr) * COL_TILES:
            return
        _, rows, live, col_tile, acc, _ = _gemm_tile(
            d_out_ptr, w_ptr, slot_ptr, offsets_ptr, tiles_ptr,
            K=K, WIDTH=WIDTH, A_ROW=A_ROW, W_E=W_E, W_K=W_K, W_N=W_N, TOP_K=TOP_K, GLU=False,
            PRECISION=PRECISION, BM=BM, BN=BN, BK=BK, GROUP=GROUP,
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
            z = tl.load(z_ptr + z_at, mask=mask, other=0.0).to(tl.float32)
            a, slope = _activation(z, ACT)
            dz = s * g
            if GLU:
                up = tl.load(z_ptr + z_at + WIDTH, mask=mask, other=0.0).to(tl.float32)
                if dz_ptr is not None:
                    d_up = (dz * a).to(z_ptr.dtype.element_ty)
                    tl.store(dz_ptr + z_at + WIDTH, d_up, mask=mask)
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

    # expert_dw: the weight gradient dw[e] = sum over the rows of expert e of a[row]^T b[row]. One
    # program makes one tile of one expert's matrix and walks that expert's rows. An empty expert
    # walks none and stores zeros, so dw is not cleared first. A bias is a weight whose input is the
    # constant 1: a column of ones gives db1, the column of gates db2. A_TOP_K, B_TOP_K > 0: that
    # operand is found through slot.
    @triton.jit
    def expert_dw(
        a_ptr, b_ptr, dw_ptr, slot_ptr, offsets_ptr,
        A_WIDTH: tl.constexpr, B_WIDTH: tl.constexpr, A_ROW: tl.constexpr, B_ROW: tl.constexpr,
        DW_E: tl.constexpr, DW_A: tl.constexpr, DW_B: tl.constexpr,
        A_TOP_K: tl.constexpr, B_TOP_K: tl.constexpr, PRECISION: tl.constexpr,
        BA: tl.constexpr, BB: tl.constexpr, BT: tl.constexpr, GROUP: tl.constexpr,
    ):  # fmt: skip
        A_TILES: tl.constexpr = (A_WIDTH + BA - 1) // BA
        B_TILES: tl.constexpr = (B_WIDTH + BB - 1) // BB
        expert = tl.program_id(0) // (A_TILES * B_TILES)
        tile = tl.program_id(0) % (A_TILES * B_TILES)
        a_tile, b_tile = _walk(tile, A_TILES, B_TILES, GROUP)
        a_cols = a_tile * BA + tl.arange(0, BA)
        b_cols = b_tile * BB + tl.arange(0, BB)
        begin = tl.load(offsets_ptr + expert)
        end = tl.load(offsets_ptr + expert + 1)
        acc = tl.zeros((BA, BB), tl.float32)
        for start in range(begin, end, BT):
            rows = start + tl.arange(0, BT)
            live = rows < end
            a_rows = rows
            b_rows = rows
            if A_TOP_K > 0:
                a_rows = tl.load(slot_ptr + rows, mask=live, other=0) // A_TOP_K
            if B_TOP_K > 0:
                b_rows = tl.load(slot_ptr + rows, mask=live, other=0) // B_TOP_K
            a_at = a_ptr + a_rows.to(tl.int64)[:, None] * A_ROW + a_cols[None, :]
            b_at = b_ptr + b_rows.to(tl.int64)[:, None] * B_ROW + b_cols[None, :]
            a = tl.load(a_at, mask=live[:, None] & (a_cols < A_WIDTH)[None, :], other=0.0)
            b = tl.load(b_at, mask=live[:, None] & (b_cols < B_WIDTH)[None, :], other=0.0)
            acc = _dot(tl.trans(a), b, acc, PRECISION)
        dw_at = dw_ptr + expert.to(tl.int64) * DW_E
        dw_at = dw_at + a_cols[:, None] * DW_A + b_cols[None, :] * DW_B
        mask = (a_cols < A_WIDTH)[:, None] & (b_cols < B_WIDTH)[None, :]
        tl.store(dw_at, acc.to(dw_ptr.dtype.element_ty), mask=mask)

    # combine: out[i] = sum_j weights[i, j] * y[index[i, j]] over the picks with index >= 0. A token
    # fetches its rows; were the rows to add themselves to their token, that would take atomics, in
    # an order that changes from run to run. Makes the output, the gradient of x, and with one pick
    # per row the plain gather.
    @triton.jit
    def combine(
        y_ptr, index_ptr, weights_ptr, out_ptr,
        WIDTH: tl.constexpr, Y_ROW: tl.constexpr, PICKS: tl.constexpr,
        PICKS_2: tl.constexpr,  # PICKS rounded up to a power of two
        BD: tl.constexpr,
    ):  # fmt: skip
        i = tl.program_id(0).to(tl.int64)
        j = tl.arange(0, PICKS_2)
        row = tl.load(index_ptr + i * PICKS + j, mask=j < PICKS, other=-1).to(tl.int64)
        cols = tl.program_id(1) * BD + tl.arange(0, BD)
        mask = (row >= 0)[:, None] & (cols < WIDTH)[None, :]
        y_at = y_ptr + row[:, None] * Y_ROW + cols[None, :]
        y = tl.load(y_at, mask=mask, other=0.0).to(tl.float32)
        if weights_ptr is not None:
            weight = tl.load(weights_ptr + i * PICKS + j, mask=row >= 0, other=0.0)
            y *= weight.to(tl.float32)[:, None]
        out = tl.sum(y, 0).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + i * WIDTH + cols, out, mask=cols < WIDTH)


# ----------------------------------------------------------------------------------------------
# Tile sizes and launches
# ----------------------------------------------------------------------------------------------

# TRITON_INTERPRET=1, set before triton is imported, makes the kernels Python functions that take
# CPU tensors.
INTERPRETED = triton is not None and not isinstance(combine, triton.JITFunction)
# From the compiled code: no spilled registers, shared memory within limits. Loads behind an index
# load get fewer buffers than stages, hence 5 for dw. The sm_80 and fp32 rows need at most 99 KB,
# and so serve every other architecture, too.
_TILES = {
    # rows a tile:         128                     64                      32 or 16
    #                      BN   BK  warps stages   BN   BK  warps stages   BN   BK  warps stages
    ("sm_90", "mm"):       ((256, 64, 8, 4),       (256, 64, 8, 4),        (128, 64, 4, 4)),
    ("sm_90", "glu"):      ((128, 64, 8, 4),       (128, 64, 8, 4),        (64, 64, 4, 4)),
    ("sm_90", "down_bwd"): ((128, 64, 8, 4),       (128, 64, 4, 4),        (64, 64, 4, 3)),
    ("sm_80", "mm"):       ((128, 32, 8, 4),       (128, 32, 4, 4),        (64, 64, 4, 4)),
    ("sm_80", "glu"):      ((64, 32, 8, 4),        (64, 32, 4, 4),         (64, 32, 4, 3)),
    ("sm_80", "down_bwd"): ((64, 32, 8, 4),        (64, 32, 4, 4),         (64, 64, 4, 3)),
    ("fp32", "mm"):        ((128, 32, 8, 3),       (64, 32, 4, 3),         (64, 32, 4, 3)),
    ("fp32", "glu"):       ((64, 32, 8, 3),        (64, 32, 4, 3),         (64, 32, 4, 3)),
    ("fp32", "down_bwd"):  ((64, 16, 8, 3),        (64, 32, 4, 3),         (64, 32, 4, 3)),
    #                      BA   BB   BT  w  s      BA   BB   BT  w  s      BA   BB   BT  w  s
    ("sm_90", "dw"):       ((128, 256, 64, 8, 5),  (128, 256, 64, 8, 5),   (128, 128, 32, 8, 4)),
    ("sm_80", "dw"):       ((128, 128, 32, 8, 5),  (128, 128, 32, 8, 5),   (64, 64, 32, 4, 4)),
    ("fp32", "dw"):        ((128, 128, 32, 8, 3),  (64, 64, 32, 4, 3),     (64, 64, 32, 4, 3)),
}  # fmt: skip
_BIAS_TILE = (16, 128, 32, 4, 3)  # dw with one row of output


class _Rows(NamedTuple):
    """The row side of every launch."""

    slot: Tensor  # [assignments]
    offsets: Tensor  # [num_experts + 1]
    tiles: Tensor  # [1 + 2 * most tiles], see tile_map


def _rows_per_tile(slot: Tensor, offsets: Tensor) -> int:
    """From the expected rows per expert, which the host knows without asking the device."""
    per_expert = slot.numel() / (offsets.numel() - 1)
    if per_expert >= 128:
        return 128
    if per_expert >= 48:
        return 64
    return 32 if per_expert > 16 else 16


def _fp32_precision() -> str:
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


# torch.compile cannot trace this switch; it reads it once. This mark is that of
# torch.compiler.assume_constant_result, which would load the whole compiler: a second for everybody
# who imports this file.
_fp32_precision._dynamo_marked_constant = True


def _config(kernel: str, rows: _Rows, x: Tensor) -> dict:
    """Constants of one launch on operands like x: for "mm", "glu", "down_bwd", "dw" or "bias"."""
    names = ("BA", "BB", "BT") if kernel in ("dw", "bias") else ("BN", "BK")
    if INTERPRETED:  # small tiles, so that small tests have several, and tails
        return {"PRECISION": "interpreter", "GROUP": 2, **dict(zip(names, (32, 32, 16)))}
    fp32 = x.dtype == torch.float32
    family = "sm_90" if torch.cuda.get_device_capability(x.device)[0] == 9 else "sm_80"
    column = {128: 0, 64: 1, 32: 2, 16: 2}[_rows_per_tile(rows.slot, rows.offsets)]
    if kernel == "bias":
        values = _BIAS_TILE
    else:
        values = _TILES["fp32" if fp32 else family, kernel][column]
    constants = dict(zip((*names, "num_warps", "num_stages"), values))
    return {"PRECISION": _fp32_precision() if fp32 else "ieee", "GROUP": 8, **constants}


def _launch(kernel, grid: tuple, *tensors, **constants) -> None:
    """Triton launches on the current device, which need not be the tensors' (-1: not on a GPU)."""
    with torch.cuda.device(tensors[0].get_device()):
        kernel[grid](*tensors, **constants)


def _empty(like: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    """Uninitialised memory; without a shape, in the shape and strides of `like`.

    Tests fill it with NaN.
    """
    if not shape:
        return torch.empty_like(like)
    return torch.empty(shape, dtype=dtype or like.dtype, device=like.device)


def _dense_rows(t: Tensor) -> Tensor:
    """Kernels take any strides, but one of the last two (of the last one, for rows) has to be 1."""
    return t if 1 in t.stride()[1:] else t.contiguous()


def _map_tiles(slot: Tensor, offsets: Tensor) -> _Rows:
    num_experts = offsets.numel() - 1
    block = _rows_per_tile(slot, offsets)
    most_tiles = slot.numel() // block + min(num_experts, slot.numel())
    tiles = _empty(offsets, 1 + 2 * most_tiles)
    rounded = triton.next_power_of_2(num_experts)
    _launch(tile_map, (num_experts,), offsets, tiles, num_experts, EXPERTS_2=rounded, BM=block)
    return _Rows(slot, offsets, tiles)


def _gemm(kernel, config: dict, rows: _Rows, a: Tensor, w: Tensor, width: int, *rest, **flags):
    """What the launches of expert_mm and down_bwd share: rows, weights [num_experts, in, out]."""
    a = _dense_rows(a)
    w = _dense_rows(w)
    most_tiles = rows.tiles.numel() // 2
    grid = (most_tiles * triton.cdiv(width, config["BN"]),)
    strides = {"A_ROW": a.stride(0), "W_E": w.stride(0), "W_K": w.stride(1), "W_N": w.stride(2)}
    sizes = {"K": a.shape[1], "WIDTH": width, "BM": _rows_per_tile(rows.slot, rows.offsets)}
    _launch(kernel, grid, a, w, *rest, *rows, **sizes, **strides, **config, **flags)


def _expert_mm(
    rows: _Rows, a: Tensor, w: Tensor, bias: Tensor | None = None, top_k: int = 0,
    act: str = "none", glu: bool = False, z: Tensor | None = None, y: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """y [assignments, width] = act(a[row, or its token] @ w[expert] + bias[expert]); act's argument
    goes to z."""
    width = w.shape[2] // 2 if glu else w.shape[2]
    if y is None:
        y = _empty(a, rows.slot.numel(), width)
    if bias is not None:
        bias = bias.contiguous()
    config = _config("glu" if glu else "mm", rows, a)
    _gemm(expert_mm, config, rows, a, w, width, bias, z, y, TOP_K=top_k, ACT=act, GLU=glu)
    return y


def _expert_dw(
    rows: _Rows, a: Tensor, b: Tensor, w: Tensor, a_top_k: int = 0, b_top_k: int = 0,
    kernel: str = "dw",
) -> Tensor:  # fmt: skip
    """Like w [num_experts, a width, b width]: a^T @ b of every expert."""
    a = _dense_rows(a)
    b = _dense_rows(b)
    dw = _empty(w)
    config = _config(kernel, rows, b)
    a_tiles = triton.cdiv(w.shape[1], config["BA"])
    b_tiles = triton.cdiv(w.shape[2], config["BB"])
    sizes = {"A_WIDTH": w.shape[1], "B_WIDTH": w.shape[2], "A_TOP_K": a_top_k, "B_TOP_K": b_top_k}
    strides = {"A_ROW": a.stride(0), "B_ROW": b.stride(0)}
    strides |= {"DW_E": dw.stride(0), "DW_A": dw.stride(1), "DW_B": dw.stride(2)}
    grid = (w.shape[0] * a_tiles * b_tiles,)
    _launch(expert_dw, grid, a, b, dw, rows.slot, rows.offsets, **sizes, **strides, **config)
    return dw


def _bias_grad(rows: _Rows, column: Tensor, b: Tensor, bias: Tensor, **top_k: int) -> Tensor:
    """Like bias [num_experts, width]: a weight of one row, whose input is the column."""
    return _expert_dw(rows, column, b, bias.unsqueeze(1), kernel="bias", **top_k).squeeze(1)


def _ones(rows: _Rows, like: Tensor) -> Tensor:
    return like.new_ones(1, 1).expand(rows.slot.numel(), 1)


def _combine(y: Tensor, index: Tensor, weights: Tensor | None = None) -> Tensor:
    """out[i] = sum_j weights[i, j] * y[index[i, j]], where index < 0 is left out."""
    y = _dense_rows(y)
    count, picks = index.shape
    width = y.shape[1]
    out = _empty(y, count, width)
    if weights is not None:
        weights = weights.contiguous()
    block = min(1024, triton.next_power_of_2(width))
    sizes = {"WIDTH": width, "Y_ROW": y.stride(0), "BD": block}
    sizes |= {"PICKS": picks, "PICKS_2": triton.next_power_of_2(picks)}
    _launch(
        combine, (count, triton.cdiv(width, block)), y, index.contiguous(), weights, out, **sizes
    )
    return out


# ----------------------------------------------------------------------------------------------
# Autograd
# ----------------------------------------------------------------------------------------------


def _by_pos(values: Tensor, pos: Tensor) -> Tensor:
    """values [assignments], by row -> [tokens, top_k], 0 where null."""
    return torch.where(pos >= 0, values[pos.clamp(min=0).long()], 0)


def _token_of_row(dispatch: Dispatch) -> Tensor:
    """[assignments, 1]: the token of a live row, -1 for the others, as `combine` takes it."""
    row = torch.arange(dispatch.slot.numel(), dtype=torch.int32, device=dispatch.slot.device)
    token = dispatch.slot // dispatch.pos.shape[1]
    return torch.where(row < dispatch.offsets[-1], token, -1).unsqueeze(1)


class _MoEMLP(torch.autograd.Function):
    """Keeps x and z. The gathered rows, a and y are cheaper to make again, or not needed at all."""

    @staticmethod
    def forward(x, gates, w1, w2, b1, b2, slot, pos, offsets, act, glu, train):
        rows = _map_tiles(slot, offsets)
        z = _empty(x, slot.numel(), w1.shape[2]) if train else None
        a = _expert_mm(rows, x, w1, b1, pos.shape[1], act, glu, z)
        y = _expert_mm(rows, a, w2, b2)
        return _combine(y, pos, gates), z, rows.tiles

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, gates, w1, w2, b1, b2, slot, pos, offsets, act, glu, train = inputs
        _, z, tiles = output
        ctx.set_materialize_grads(False)
        if train:
            ctx.mark_non_differentiable(z, tiles)
            ctx.save_for_backward(x, gates, w1, w2, b1, b2, z, pos, slot, offsets, tiles)
            ctx.act = act
            ctx.glu = glu

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out, *_):
        x, gates, w1, w2, b1, b2, z, pos, *rows = ctx.saved_tensors
        rows = _Rows(*rows)
        need_x, need_gates, need_w1, need_w2, need_b1, need_b2 = ctx.needs_input_grad[:6]
        dx = d_gates = dw1 = dw2 = db1 = db2 = None
        d_ff = w2.shape[1]
        top_k = pos.shape[1]
        config = _config("down_bwd", rows, d_out)
        dz = _empty(z) if need_x or need_w1 or need_b1 else None
        sa = _empty(z, len(z), d_ff) if need_w2 else None
        ds = None
        if need_gates:
            ds = _empty(z, len(z), triton.cdiv(d_ff, config["BN"]), dtype=torch.float32)
        flags = {"TOP_K": top_k, "ACT": ctx.act, "GLU": ctx.glu}
        operands = (gates.contiguous(), z, dz, sa, ds)
        _gemm(down_bwd, config, rows, d_out, w2.transpose(1, 2), d_ff, *operands, **flags)
        del operands
        if need_w2:
            dw2 = _expert_dw(rows, sa, d_out, w2, b_top_k=top_k)
        if need_b2:
            column = gates.reshape(-1, 1).to(x.dtype)
            db2 = _bias_grad(rows, column, d_out, b2, a_top_k=1, b_top_k=top_k)
        if need_gates:
            d_gates = _by_pos(ds.sum(1), pos)
            if b2 is not None:  # y = a @ w2 + b2, and <g, a> lacks the second part of <d_out, y>
                expert = torch.searchsorted(rows.offsets[1:], pos, right=True)
                expert = expert.clamp(max=len(b2) - 1)
                from_bias = (d_out.float() @ b2.float().t()).gather(1, expert)
                d_gates = d_gates + torch.where(pos >= 0, from_bias, 0)
            d_gates = d_gates.to(gates.dtype)
        del sa  # before the next large buffer
        if need_x:
            dx = _combine(_expert_mm(rows, dz, w1.transpose(1, 2)), pos)
        if need_w1:
            dw1 = _expert_dw(rows, x, dz, w1, a_top_k=top_k)
        if need_b1:
            db1 = _bias_grad(rows, _ones(rows, dz), dz, b1)
        return dx, d_gates, dw1, dw2, db1, db2, None, None, None, None, None, None


class _GroupedMM(torch.autograd.Function):
    @staticmethod
    def forward(h, w, bias, slot, offsets):
        rows = _map_tiles(slot, offsets)
        zeros = h.new_zeros(h.shape[0], w.shape[2])
        return _expert_mm(rows, h, w, bias, y=zeros), rows.tiles

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, tiles = output
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(tiles)
        ctx.save_for_backward(*inputs, tiles)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, _):
        h, w, bias, *rows = ctx.saved_tensors
        rows = _Rows(*rows)
        need_h, need_w, need_bias = ctx.needs_input_grad[:3]
        dh = dw = dbias = None
        if need_h:
            dh = _expert_mm(rows, dy, w.transpose(1, 2), y=h.new_zeros(h.shape))
        if need_w:
            dw = _expert_dw(rows, h, dy, w)
        if need_bias:
            dbias = _bias_grad(rows, _ones(rows, dy), dy, bias)
        return dh, dw, dbias, None, None


class _Combine(torch.autograd.Function):
    """scatter: index = pos, back = token of each row. gather is its transpose: index and back
    change places."""

    @staticmethod
    def forward(y, gates, index, back, slot):
        return _combine(y, index, gates)

    @staticmethod
    def setup_context(ctx, inputs, output):
        y, gates, index, back, slot = inputs
        ctx.save_for_backward(None if gates is None else y, gates, index, back, slot)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out):
        y, gates, index, back, slot = ctx.saved_tensors
        dy = d_gates = None
        if ctx.needs_input_grad[0]:
            gate_of_row = None
            if gates is not None:
                gate_of_row = gates.reshape(-1, 1)[slot.long()]  # [assignments, 1]
            dy = _combine(d_out, back, gate_of_row)
        if ctx.needs_input_grad[1]:
            ds = (_combine(d_out, back).float() * y.float()).sum(1)  # [assignments]
            d_gates = _by_pos(ds, index).to(gates.dtype)
        return dy, d_gates, None, None, None
