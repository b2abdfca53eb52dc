"""The Triton kernels against float64, under the interpreter or on a GPU.

test_kernels.py runs this file in both ways. Every test here but that of torch.compile runs with
poisoned memory: whatever the kernels leave unwritten is NaN. No test needs another, so that they
run in parallel where pytest-xdist is installed. On a GPU that is new to the kernels, once also:
compute-sanitizer python -m pytest -q tests/kernels_triton.py, which sees reads out of bounds.
"""

import pytest
import torch

import kernels

DEVICE = "cpu" if kernels.INTERPRETED else "cuda"
gpu_only = pytest.mark.skipif(kernels.INTERPRETED, reason="needs a GPU")
# Relative Frobenius error of each result. Rounding exactly where the kernels round gives 4e-7, 5e-4
# and 4e-3; the interpreter truncates to bfloat16, which doubles the error of every store.
BOUND = {
    torch.float32: 2e-6,
    torch.float16: 1.5e-3,
    torch.bfloat16: 2.5e-2 if kernels.INTERPRETED else 8e-3,
}
RESULTS = ("out", "dx", "dgates", "dw1", "dw2", "db1", "db2")


@pytest.fixture(autouse=True)
def poison(monkeypatch, request):
    """Fill every buffer with NaN (integers: -2**30) and keep it for inspection."""
    torch.manual_seed(0)
    buffers = []
    if "not_poisoned" in request.keywords:
        return buffers
    empty = kernels._empty

    def poisoned(like, *shape, dtype=None):
        buffer = empty(like, *shape, dtype=dtype)
        buffer.fill_(float("nan") if buffer.is_floating_point() else -(2**30))
        buffers.append(buffer)
        return buffer

    monkeypatch.setattr(kernels, "_empty", poisoned)
    return buffers


def problem(
    tokens, top_k, experts, d_model, d_ff, dtype=torch.float32, glu=False, bias=False, nulls=0.0
):
    """x, expert_index, gates, w1, w2, b1, b2, d_out with weights scaled by 1 / sqrt(fan in)."""

    def new(*shape, scale=1.0):
        return (torch.randn(*shape, device=DEVICE) * scale).to(dtype).requires_grad_()

    expert_index = torch.randint(0, experts, (tokens, top_k), device=DEVICE)
    expert_index[torch.rand(tokens, top_k, device=DEVICE) < nulls] = -1
    hidden = d_ff * (2 if glu else 1)
    gates = torch.rand(tokens, top_k, device=DEVICE).requires_grad_()
    w1 = new(experts, d_model, hidden, scale=d_model**-0.5)
    w2 = new(experts, d_ff, d_model, scale=d_ff**-0.5)
    b1, b2 = (new(experts, hidden), new(experts, d_model)) if bias else (None, None)
    x, d_out = new(tokens, d_model), new(tokens, d_model).detach()
    return [x, expert_index, gates, w1, w2, b1, b2, d_out]


def run(inputs, act="gelu", glu=False, backend="triton"):
    """The output and all gradients, by name."""
    *inputs, d_out = inputs
    out = kernels.moe_mlp(*inputs, act=act, glu=glu, backend=backend)
    named = zip(RESULTS[1:], [inputs[0], *inputs[2:]])
    leaves = {name: t for name, t in named if t is not None and t.requires_grad}
    grads = torch.autograd.grad(out, list(leaves.values()), d_out.to(out.dtype))
    return {"out": out.detach()} | dict(zip(leaves, grads))


def leaf(t, dtype=None):
    if t is None or not t.is_floating_point():
        return t
    return t.detach().to(dtype or t.dtype).requires_grad_()


def double(inputs):
    return [leaf(t, torch.float64) for t in inputs]


def assert_close(given, wanted, dtype):
    for name in wanted:
        error = (given[name].double() - wanted[name]).norm() / wanted[name].norm().clamp(min=1e-30)
        short = 2.5 if name == "dgates" else 1  # a short dot product, whose terms may cancel
        bound = BOUND[dtype] * short
        assert error <= bound, f"{name}: relative error {error:.1e} > {bound:.1e}"  # NaN fails, too


# tokens, top_k, experts, d_model, d_ff, act, glu, bias, share of nulls
CASES = [
    (13, 2, 3, 24, 40, "gelu", True, True, 0.3),
    (13, 3, 3, 33, 20, "silu", True, False, 0.3),  # nothing is a multiple of anything
    (36, 1, 1, 48, 24, "relu", False, True, 0.0),  # one expert, several row tiles
    (9, 8, 4, 16, 40, "none", False, True, 0.2),  # top_k > num_experts: an expert several times
    (1, 1, 9, 8, 8, "silu", True, True, 0.0),  # nearly all experts empty
    (12, 2, 3, 40, 40, "gelu", False, False, 0.0),
]


DTYPES = [torch.float32, torch.float16, torch.bfloat16]
EACH = [(case, dtype) for case in CASES for dtype in DTYPES]
if kernels.INTERPRETED:  # each case in one dtype, each dtype twice
    EACH = [(case, DTYPES[number % 3]) for number, case in enumerate(CASES)]


@pytest.mark.parametrize("case, dtype", EACH)
def test_matches_float64(case, dtype):
    *sizes, act, glu, bias, nulls = case
    inputs = problem(*sizes, dtype, glu, bias, nulls)
    assert_close(run(inputs, act, glu), run(double(inputs), act, glu, "torch"), dtype)


def test_all_null_gives_exact_zeros():
    inputs = problem(9, 2, 4, 16, 24, glu=True, bias=True, nulls=1.1)
    for name, value in run(inputs, glu=True).items():
        assert (value == 0).all(), name


def test_any_strides():
    """Transposed weight views, sliced x, gates of stride > 1, the expanded gradient of a sum."""
    x, index, gates, w1, w2, b1, b2, _ = problem(9, 2, 2, 24, 40, glu=True, bias=True, nulls=0.2)
    x = torch.cat([x, x], 1).detach()[:, 24:].requires_grad_()
    w1, w2 = (w.detach().mT.contiguous().mT.requires_grad_() for w in (w1, w2))
    gates = gates.detach().t().contiguous().t().requires_grad_()
    inputs = [x, index, gates, w1, w2, b1, b2, torch.ones((), device=DEVICE).expand(9, 24)]
    given = run(inputs, glu=True)
    assert_close(given, run(double(inputs), glu=True, backend="torch"), torch.float32)
    assert given["dw1"].stride() == w1.stride()  # so that autograd adds it to .grad without a copy


def test_nan_stays_where_it_is_and_null_rows_are_never_written(poison):
    """In null gates, in tokens whose picks are all null, in weights of expert 2, which is empty."""
    inputs = problem(12, 2, 3, 16, 24, glu=True, bias=True, nulls=0.3)
    x, index, gates, w1, w2, b1, b2, _ = inputs
    index[index == 2] = 0
    index[4] = -1
    wanted = run(inputs, glu=True)
    # z, a, y, dz, s * a, parts of ds, rows of dx
    by_row = [buffer for buffer in poison if buffer.dim() == 2 and buffer.shape[0] == 24]
    live = int((index >= 0).sum())
    assert len(by_row) == 7
    for buffer in by_row:
        assert buffer[:live].isfinite().all() and buffer[live:].isnan().all()
    with torch.no_grad():
        gates[index < 0] = float("nan")
        x[4] = float("nan")
        for weight in (w1, w2, b1, b2):
            weight[2] = float("nan")
    given = run(inputs, glu=True)
    for name in RESULTS:
        assert torch.equal(given[name], wanted[name]), name
    for name in ("dw1", "dw2", "db1", "db2"):
        assert (given[name][2] == 0).all()
    assert (given["out"][4] == 0).all() and (given["dx"][4] == 0).all()
    assert (given["dgates"][index < 0] == 0).all()


def test_nan_of_live_rows_is_not_hidden():
    x, index, gates, w1, w2, *_ = problem(6, 1, 2, 16, 16)
    x = x.detach()
    x[2] = float("nan")
    with torch.no_grad():
        out = kernels.moe_mlp(x, index, gates, w1, w2, act="relu", backend="triton")
    assert out[2].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gather_grouped_mm_scatter_match_float64(dtype):
    x, index, gates, w, _, b, _, d_out = problem(11, 2, 2, 24, 40, dtype, bias=True, nulls=0.3)
    d_out = torch.randn(11, 40, device=DEVICE).to(dtype)
    dispatch, results = kernels.make_dispatch(index, 2), []
    for inputs in ([x, w, b, gates], double([x, w, b, gates])):
        h = kernels.gather(inputs[0], dispatch)
        y = kernels.grouped_mm(h, inputs[1], dispatch, inputs[2])
        out = kernels.scatter(y, dispatch, inputs[3])
        grads = torch.autograd.grad(out, inputs, d_out.to(out.dtype))
        live = int(dispatch.offsets[-1])
        assert (h[live:] == 0).all() and (y[live:] == 0).all()
        results.append(dict(zip(("out", "dx", "dw", "db", "dgates"), (out.detach(), *grads))))
    assert_close(*results, dtype)
    count = (index >= 0).sum(1, keepdim=True)
    whole = torch.randint(-8, 9, x.shape, device=DEVICE).to(dtype)  # small integers: sums are exact
    assert torch.equal(kernels.scatter(kernels.gather(whole, dispatch), dispatch), whole * count)


def test_what_is_frozen_changes_no_other_gradient():
    """As in adapters on a frozen model; what needs no gradient is None."""
    inputs = problem(9, 2, 2, 16, 24, glu=True, bias=True, nulls=0.2)
    everything = run(inputs, glu=True)
    leaves = dict(zip(RESULTS[1:], [inputs[0], *inputs[2:]]))
    for trained in ({"dx", "dgates"}, {"dw1"}, {"dw2", "db1"}, {"dgates", "db2"}):
        for name, tensor in leaves.items():
            tensor.requires_grad_(name in trained)
        given = run(inputs, glu=True)
        assert given.keys() == {"out", *trained}
        assert all(torch.equal(given[name], everything[name]) for name in given)


def test_autocast_gives_gradients_in_the_parameters_dtype():
    inputs = problem(7, 2, 2, 16, 24, glu=True, bias=True)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        out = kernels.moe_mlp(*inputs[:7], glu=True, backend="triton")
    assert out.dtype == torch.bfloat16
    grads = torch.autograd.grad(out, [inputs[0], *inputs[2:7]], inputs[7].bfloat16())
    assert all(grad.dtype == torch.float32 for grad in grads)
    wanted = run(double(inputs), glu=True, backend="torch")
    assert_close(dict(zip(RESULTS, (out.detach(), *grads))), wanted, torch.bfloat16)


def test_torch_func_is_left_to_torch_or_refused_in_one_line():
    """The kernels would take part of a derivative for all of it."""
    x, index, *others = problem(9, 2, 3, 16, 16)
    gates, w1, w2 = (t.detach() for t in others[:3])
    dispatch = kernels.make_dispatch(index, 3)

    def slope(backend):
        layer = lambda x: kernels.moe_mlp(x, dispatch, gates, w1, w2, backend=backend).sum()
        return torch.func.grad(layer)(x.detach())

    assert torch.equal(slope("auto"), slope("torch"))
    with pytest.raises(RuntimeError, match="^backend 'triton' cannot be used: torch.func and .*$"):
        slope("triton")


@gpu_only
def test_cuda_graph_replays_on_new_routing():
    inputs = problem(256, 2, 8, 64, 128, torch.bfloat16, glu=True, nulls=0.2)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            run(inputs, glu=True)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = kernels.moe_mlp(*inputs[:7], glu=True, backend="triton")
    inputs[1].copy_(torch.randint(-1, 8, (256, 2), device=DEVICE))
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, run(inputs, glu=True)["out"])


@gpu_only
@pytest.mark.not_poisoned  # the compiler does not trace a function that appends to a list outside
@pytest.mark.filterwarnings("ignore")
def test_torch_compile_without_graph_breaks():
    inputs = problem(256, 2, 8, 64, 128, torch.bfloat16, glu=True, bias=True, nulls=0.2)

    def layer(*args):
        return kernels.moe_mlp(*args, act="silu", glu=True, backend="triton") * 2

    out = torch.compile(layer, fullgraph=True)(*inputs[:7])
    leaves = [inputs[0], *inputs[2:7]]
    given = dict(zip(RESULTS, (out.detach(), *torch.autograd.grad(out, leaves, inputs[7]))))
    plain = run(double(inputs), "silu", True, "torch")
    wanted = {name: 2 * value.double() for name, value in plain.items()}
    assert_close(given, wanted, torch.bfloat16)


@gpu_only
def test_tf32_follows_the_switch_of_torch():
    inputs = problem(300, 2, 4, 128, 256)
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        given, wanted = run(inputs), run(double(inputs), backend="torch")
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    for name in wanted:
        error = (given[name].double() - wanted[name]).norm() / wanted[name].norm()
        assert 2e-5 < error < 2e-3, f"{name}: {error:.1e}"  # emulated: 4e-4 .. 5.4e-4


# Rows per expert that reach each size of tile, 16, 32, 64 and 128, at its edges.
ROWS = [4, 16, 17, 47, 48, 96, 127, 128, 150, 2048]


@gpu_only
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", ROWS)
def test_full_tiles_match_float64_and_repeat(rows, dtype):
    experts, top_k = 8, 4
    tokens = rows * experts // top_k
    inputs = problem(tokens, top_k, experts, 256, 384, dtype, True, True, nulls=0.2)
    dispatch = kernels.make_dispatch(inputs[1], experts)
    wanted_tile = 128 if rows >= 128 else 64 if rows >= 48 else 32 if rows > 16 else 16
    assert kernels._rows_per_tile(dispatch.slot, dispatch.offsets) == wanted_tile
    first = run(inputs, "silu", True)
    assert_close(first, run(double(inputs), "silu", True, "torch"), dtype)
    for _ in range(5):  # a result that moves between equal runs is a race
        again = run(inputs, "silu", True)
        assert all(torch.equal(first[name], again[name]) for name in first)


@gpu_only
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [16, 32, 96, 150])
def test_without_glu_each_tile_matches_float64(rows, dtype):
    inputs = problem(rows * 4, 2, 8, 200, 136, dtype, nulls=0.2)
    assert_close(run(inputs), run(double(inputs), backend="torch"), dtype)


@gpu_only
@pytest.mark.parametrize("sizes", [(140000, 8, 16, 512, 1024), (64, 2, 512, 4096, 1024)])
def test_more_elements_than_int32_counts(sizes):
    """rows * 2 d_ff > 2**31, experts * d_model * 2 d_ff > 2**31: the last rows are compared."""
    torch.cuda.empty_cache()  # what torch keeps for later counts as taken
    free, total = torch.cuda.mem_get_info()
    if total < 70 * 2**30:
        pytest.skip(f"needs a GPU of 80 GB; this one has {total / 2**30:.0f}")
    if free < 60 * 2**30:
        pytest.fail(f"only {free / 2**30:.0f} GB are free, 60 are needed: run it with -n 0, alone")
    inputs = problem(*sizes, torch.bfloat16, glu=True)
    inputs[1][-64:] = sizes[2] - 1  # the last expert serves the last tokens
    given = run(inputs, "silu", True)
    x, index, gates, w1, w2, *_, d_out = inputs
    last_index = torch.zeros_like(index[-64:])
    last = [x[-64:], last_index, gates[-64:], w1[-1:], w2[-1:], None, None, d_out[-64:]]
    wanted = run(double(last), "silu", True, "torch")
    for name in ("out", "dx", "dgates"):
        assert_close({name: given[name][-64:]}, {name: wanted[name]}, torch.bfloat16)
