"""kernels.py: the torch path against loops over tokens in float64, its errors, its contract.

The Triton kernels are tested in kernels_triton.py, which runs here under Triton's interpreter, in
a process of its own because TRITON_INTERPRET has to be set before the import, and on a GPU
(`-m gpu`), in parallel where pytest-xdist is installed.
"""

import importlib.util
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.utils.flop_counter
from conftest import ROOT

import kernels


def run_triton_tests(*flags, **environment):
    command = "-m pytest -q -p no:cacheprovider tests/kernels_triton.py".split()
    options = {"capture_output": True, "text": True, "cwd": ROOT, "env": os.environ | environment}
    return subprocess.run([sys.executable, *command, *flags], **options)


def in_the_interpreter(fork, folder):
    environment = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return run_triton_tests(**environment)


@pytest.mark.beside(run=in_the_interpreter)
@pytest.mark.skipif(kernels.triton is None, reason="triton is not installed")
def test_triton_kernels_in_the_interpreter(beside):
    assert beside.returncode == 0, beside.stdout + beside.stderr
    print(beside.stdout.strip().splitlines()[-1])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_triton_kernels_on_the_gpu():
    """Compiling takes most of the time: eight processes, and the largest test afterwards, alone."""
    side_by_side = ["-n", "8"] if importlib.util.find_spec("xdist") else []
    large = "more_elements_than_int32"
    for flags in ([*side_by_side, "-k", f"not {large}"], ["-k", large]):
        done = run_triton_tests(*flags, TRITON_INTERPRET="0")
        assert done.returncode == 0, done.stdout + done.stderr
        print(done.stdout.strip().splitlines()[-1])


# ----------------------------------------------------------------------------------------------
# The torch path
# ----------------------------------------------------------------------------------------------


FUNCTIONS = {
    "relu": torch.relu,
    "gelu": torch.nn.functional.gelu,
    "silu": lambda z: z * torch.sigmoid(z),
    "none": lambda z: z,
}


def naive(x, expert_index, gates, w1, w2, b1, b2, act, glu):
    """One token and one pick at a time, as the definition reads."""
    rows = []
    for t in range(x.shape[0]):
        row = torch.zeros_like(x[t])
        for j in range(expert_index.shape[1]):
            e = int(expert_index[t, j])
            if 0 <= e < w1.shape[0]:
                z = x[t] @ w1[e] + (0 if b1 is None else b1[e])
                half = z.shape[0] // 2
                a = FUNCTIONS[act](z[:half]) * z[half:] if glu else FUNCTIONS[act](z)
                row = row + gates[t, j] * (a @ w2[e] + (0 if b2 is None else b2[e]))
        rows.append(row)
    return torch.stack(rows) if rows else torch.zeros_like(x)


def in_three_steps(x, expert_index, gates, w1, w2, b1, b2, act, glu):
    dispatch = kernels.make_dispatch(expert_index, w1.shape[0])
    z = kernels.grouped_mm(kernels.gather(x, dispatch), w1, dispatch, b1)
    half = z.shape[1] // 2
    a = FUNCTIONS[act](z[:, :half]) * z[:, half:] if glu else FUNCTIONS[act](z)
    return kernels.scatter(kernels.grouped_mm(a, w2, dispatch, b2), dispatch, gates)


def problem(
    tokens, top_k, experts, d_model, d_ff, glu=False, bias=True, nulls=0.3, dtype=torch.float64
):
    torch.manual_seed(0)

    def new(*shape):
        return torch.randn(*shape, dtype=dtype, requires_grad=True)

    expert_index = torch.randint(0, experts, (tokens, top_k))
    null = torch.rand(tokens, top_k) < nulls
    strangers = torch.tensor([-1, experts, experts + 5, -7])
    expert_index[null] = strangers[torch.randint(0, 4, (int(null.sum()),))]
    hidden = d_ff * (2 if glu else 1)
    b1, b2 = (new(experts, hidden), new(experts, d_model)) if bias else (None, None)
    w1, w2 = new(experts, d_model, hidden), new(experts, d_ff, d_model)
    return [new(tokens, d_model), expert_index, new(tokens, top_k), w1, w2, b1, b2]


def gradients(out, inputs):
    leaves = [t for t in inputs if t is not None and t.is_floating_point()]
    if not out.requires_grad:
        return [torch.zeros_like(t) for t in leaves]
    torch.manual_seed(1)
    grads = torch.autograd.grad(out, leaves, torch.randn_like(out), allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for t, g in zip(leaves, grads)]


SIZES = [  # tokens, top_k, experts, d_model, d_ff, share of nulls
    (17, 3, 5, 6, 4, 0.3),
    (11, 8, 4, 7, 5, 0.3),  # top_k > num_experts
    (1, 1, 1, 8, 8, 0.0),
    (9, 2, 64, 6, 4, 0.0),  # most experts empty
    (6, 2, 4, 3, 5, 1.1),  # everything null
    (0, 2, 4, 8, 8, 0.3),
    (5, 0, 4, 8, 8, 0.3),
]
LOOPS = [(sizes, act, glu) for sizes in SIZES[:2] for act in FUNCTIONS for glu in (False, True)]
LOOPS += [(sizes, "gelu", True) for sizes in SIZES[2:]]


@pytest.mark.parametrize("sizes, act, glu", LOOPS)
def test_torch_path_matches_loops(sizes, act, glu):
    *sizes, nulls = sizes
    inputs = problem(*sizes, glu, bias=act in ("relu", "gelu"), nulls=nulls)
    out, wanted = kernels.moe_mlp(*inputs, act=act, glu=glu), naive(*inputs, act, glu)
    if not glu and inputs[5] is None:
        by_hand = kernels.moe_mlp_by_hand(*inputs[:5], act)
        torch.testing.assert_close(by_hand, wanted, rtol=1e-10, atol=1e-12)
    wanted_gradients = gradients(wanted, inputs)
    for result in (out, in_three_steps(*inputs, act, glu)):
        torch.testing.assert_close(result, wanted, rtol=1e-10, atol=1e-12)
        for given, want in zip(gradients(result, inputs), wanted_gradients):
            torch.testing.assert_close(given, want, rtol=1e-10, atol=1e-12)


def test_dispatch_is_the_docstrings_example():
    d = kernels.make_dispatch(torch.tensor([[2, 0], [0, -1], [2, -1], [1, 0]], dtype=torch.int8), 3)
    assert d.slot.tolist() == [1, 2, 7, 6, 0, 4, 3, 5]
    assert d.pos.tolist() == [[4, 0], [1, -1], [5, -1], [3, 2]]
    assert d.offsets.tolist() == [0, 3, 4, 6] and d.offsets.diff().tolist() == [3, 1, 2]
    assert {t.dtype for t in d[:3]} == {torch.int32}


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
@pytest.mark.parametrize("num_experts", [1, 100, 255, 256, 300])  # 255: null, in one byte
def test_dispatch_inverts_itself(num_experts, dtype):
    torch.manual_seed(0)
    info = torch.iinfo(dtype)
    index = torch.randint(max(info.min, -3), min(info.max, num_experts + 3) + 1, (50, 3)).to(dtype)
    d = kernels.make_dispatch(index, num_experts)
    flat, pos = index.flatten().long(), d.pos.flatten().long()
    live = (flat >= 0) & (flat < num_experts)
    assert torch.equal(pos < 0, ~live)
    assert torch.equal(d.slot.sort().values.long(), torch.arange(150))
    assert torch.equal(d.slot[pos[live]].long(), live.nonzero()[:, 0])
    assert torch.equal(d.offsets.diff().long(), flat[live].bincount(minlength=num_experts))
    for expert in range(num_experts):
        slots = d.slot[d.offsets[expert] : d.offsets[expert + 1]].long()
        assert (flat[slots] == expert).all() and (slots.diff() > 0).all()  # stable


def test_nan_stays_where_it_is():
    inputs = problem(12, 2, 5, 6, 4, glu=True, nulls=0.3)
    x, index, gates, w1, w2, b1, b2 = inputs
    index[index == 3], index[4] = 0, -1
    wanted = [kernels.moe_mlp(*inputs, glu=True)]
    wanted += gradients(wanted[0], inputs)
    null = (index < 0) | (index >= 5)
    with torch.no_grad():
        gates[null], x[4] = float("nan"), float("nan")
        for weight in (w1, w2, b1, b2):
            weight[3] = float("nan")
    given = [kernels.moe_mlp(*inputs, glu=True)]
    given += gradients(given[0], inputs)
    assert all(torch.equal(a, b) for a, b in zip(given, wanted))
    assert (given[0][4] == 0).all() and (given[1][4] == 0).all() and (given[2][null] == 0).all()


def test_a_dispatch_serves_as_well_and_null_rows_are_zero():
    x, index, gates, w1, w2, b1, b2 = problem(20, 2, 5, 6, 4, nulls=0.4)
    dispatch = kernels.make_dispatch(index, 5)
    out = kernels.moe_mlp(x, dispatch, gates, w1, w2, b1, b2)
    assert torch.equal(out, kernels.moe_mlp(x, index, gates, w1, w2, b1, b2))
    h = kernels.gather(x, dispatch)
    y = kernels.grouped_mm(h, w1, dispatch, b1)
    live = int(dispatch.offsets[-1])
    assert h.shape == (40, 6) and (h[live:] == 0).all()
    assert y.shape == (40, 4) and (y[live:] == 0).all()
    picks = ((index >= 0) & (index < 5)).sum(1, keepdim=True)
    torch.testing.assert_close(kernels.scatter(h, dispatch), x * picks)


def test_gates_multiply_in_float32():
    dispatch = kernels.make_dispatch(torch.zeros(1, 2, dtype=torch.long), 1)
    gates = torch.tensor([[1 + 2**-9, -1.0]])
    ones = torch.ones(2, 1, dtype=torch.bfloat16)
    assert kernels.scatter(ones, dispatch, gates).item() == 2**-9  # in bfloat16, that gate is 1


SHAPES = {"x": (5, 3), "gates": (5, 2), "w1": (4, 3, 8), "w2": (4, 8, 3), "b1": (4, 8)}
INDEX = torch.zeros(5, 2, dtype=torch.long)
DISPATCH = kernels.make_dispatch(INDEX, 4)
zeros = torch.zeros
REFUSED_BY_MOE_MLP = [  # argument, its value, what is said
    ("x", zeros(5, 4), r"w1 has shape \[4, 3, 8\]; shape \[num_experts, 4, d_ff\]"),
    ("x", zeros(6, 3), r"expert_index has shape \[5, 2\]; shape \[6, top_k\]"),
    ("gates", zeros(5, 2).double(), "gates has dtype torch.float64; allowed here: .*32"),
    ("w2", zeros(4, 8, 3).to("meta"), "w2 is on meta; all tensors must be on one device, here cpu"),
    ("b1", zeros(8), r"b1 has shape \[8\]; a tensor of shape \[4, 8\]"),
    ("expert_index", INDEX.float(), "expert_index has dtype torch.float32; an integer"),
    ("expert_index", kernels.make_dispatch(INDEX, 3), r"w1 has .*; shape \[3, 3, d_ff\]"),
    ("glu", True, r"w2 has shape \[4, 8, 3\]; shape \[4, 4, 3\]"),
    ("act", "tanh", "act is 'tanh'; allowed: relu, gelu, silu, none"),
    ("backend", "cuda", "backend is 'cuda'; allowed: 'auto', 'torch', 'triton'"),
]
REFUSED_BY_OTHERS = [  # function, arguments, what is said
    ("grouped_mm", (zeros(9, 3), zeros(4, 3, 8), DISPATCH), r"h has shape \[9, 3\]; .* \[10, in\]"),
    ("gather", (zeros(4, 3), DISPATCH), r"x has shape \[4, 3\]; shape \[5, d_model\]"),
    ("scatter", (zeros(10, 3), DISPATCH, zeros(2, 5)), r"gates has .* \[2, 5\]; shape \[5, 2\]"),
    ("make_dispatch", (INDEX, 32767), "num_experts is 32767; 1 to 32766"),  # keys are int16
]


@pytest.mark.parametrize("name, value, says", REFUSED_BY_MOE_MLP)
def test_errors_name_the_argument_and_what_is_allowed(name, value, says):
    arguments = {key: zeros(shape) for key, shape in SHAPES.items()}
    with pytest.raises(ValueError, match=says):
        kernels.moe_mlp(**arguments | {"expert_index": INDEX, name: value})


@pytest.mark.parametrize("name, arguments, says", REFUSED_BY_OTHERS)
def test_errors_of_the_other_calls(name, arguments, says):
    with pytest.raises(ValueError, match=says):
        getattr(kernels, name)(*arguments)


def test_what_is_not_for_the_kernels(monkeypatch):
    """Their offsets inside a matrix are int32, and a program of tile_map holds all counts."""
    monkeypatch.setattr(kernels, "INTERPRETED", True)  # as if the device were right
    monkeypatch.setattr(kernels, "triton", kernels.triton or SimpleNamespace())
    x = torch.empty(1).expand(4, 2**15)  # no memory behind these shapes
    fits = torch.empty(1).expand(2, 2**15, 2**16 - 1)
    large = torch.empty(1).expand(2, 2**15, 2**16)
    assert kernels._use_triton("auto", 8192, x, fits)
    for num_experts, tensors in ((2, (x, large)), (8193, (x, fits)), (2, (x.double(),))):
        assert not kernels._use_triton("auto", num_experts, *tensors)
        with pytest.raises(RuntimeError, match="backend 'triton' cannot be used: "):
            kernels._use_triton("triton", num_experts, *tensors)


# The ways of the torch path: F.grouped_mm for many small groups, a loop for the rest.


@pytest.fixture
def library_calls(monkeypatch):
    """How often F.grouped_mm was asked for."""
    calls = []
    library_mm = kernels._library_mm

    def counted(*args):
        calls.append(args)
        return library_mm(*args)

    monkeypatch.setattr(kernels, "_library_mm", counted)
    return calls


needs_library = pytest.mark.skipif(
    not hasattr(torch.nn.functional, "grouped_mm"), reason="this torch has no F.grouped_mm"
)


BOUND = {torch.float32: 2e-6, torch.float16: 3e-3, torch.bfloat16: 2e-2}  # of the relative error


@needs_library
@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("way", ["library", "library, transposed", "loop"])
@pytest.mark.parametrize("nulls", [0.0, 0.3, 1.1])
def test_both_ways_match_float64(library_calls, nulls, way, dtype):
    """Nulls, empty experts, weights as linear layers keep them, and the gradient of a plain sum. A
    bias is for the loop."""
    bias = way == "loop"
    x, index, *floats = problem(9, 2, 20, 16, 24, glu=True, bias=bias, nulls=nulls)
    results = []
    for kind in (dtype, torch.float64):
        tensors = [t.detach().to(dtype).to(kind) for t in (x, *floats) if t is not None]
        tensors = [t.requires_grad_() for t in tensors]
        x_of, gates, *weights = tensors
        if way == "library, transposed":
            weights = [w.mT.contiguous().mT for w in weights]
        out = kernels.moe_mlp(x_of, index, gates, *weights, glu=True)
        dispatch = kernels.make_dispatch(index, 20)
        rows = kernels.gather(x_of, dispatch)
        grouped = kernels.grouped_mm(rows, weights[0], dispatch, *weights[2:3])
        total = out.sum() + grouped.sum()
        results.append([out, grouped, *torch.autograd.grad(total, tensors)])
        assert (grouped[int(dispatch.offsets[-1]) :] == 0).all()
    # Twice by moe_mlp and once by grouped_mm, never in float64, nor when all picks are null.
    assert len(library_calls) == (3 if nulls < 1 and not bias else 0)
    for given, wanted in zip(*results):
        assert given.dtype == dtype
        assert (given.double() - wanted).norm() <= BOUND[dtype] * wanted.norm()


@needs_library
def test_the_loop_takes_what_the_library_does_not(library_calls):
    def calls_of(*inputs):
        library_calls.clear()
        kernels.moe_mlp(*inputs)
        return len(library_calls)

    def inputs(*sizes, dtype=torch.float32, bias=False, **options):
        return problem(*sizes, dtype=dtype, bias=bias, **options)[: 7 if bias else 5]

    good = inputs(6, 2, 4, 8, 8)
    assert calls_of(*good) == 2
    assert calls_of(*inputs(6, 2, 4, 8, 8, nulls=1.1)) == 0  # no live row
    assert calls_of(*inputs(6, 2, 4, 7, 8)) == 0  # rows of 28 bytes
    assert calls_of(*inputs(6, 2, 4, 8, 8, bias=True)) == 0
    assert calls_of(*inputs(6, 2, 4, 8, 8, dtype=torch.float64)) == 0
    assert calls_of(*inputs(2048, 1, 4, 8, 8, nulls=0.0)) == 0  # large groups
    sliced = [w[:, :8, :8] for w in inputs(6, 2, 4, 16, 16)[3:]]
    assert calls_of(*good[:3], *sliced) == 0


def test_flops_are_counted_in_both_ways():
    inputs = problem(6, 2, 4, 8, 16, bias=False, dtype=torch.float32)[:5]
    live = int(((inputs[1] >= 0) & (inputs[1] < 4)).sum())
    assert live < 12  # a null assignment is never multiplied
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        kernels.moe_mlp(*inputs).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 2 * live * 8 * 16  # 3 passes, 2 layers


def test_the_file_works_alone_without_triton(tmp_path, monkeypatch):
    for name in ("triton", "common", "data"):
        monkeypatch.setitem(sys.modules, name, None)  # importing it fails
    path = tmp_path / "alone.py"
    path.write_text((ROOT / "kernels.py").read_text())
    spec = importlib.util.spec_from_file_location("alone", path)
    alone = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(alone)
    inputs = problem(6, 2, 4, 8, 16, dtype=torch.float32)
    assert alone.triton is None
    assert torch.equal(alone.moe_mlp(*inputs), kernels.moe_mlp(*inputs, backend="torch"))
