"""kernels.py: the torch path against loops over tokens in float64, its errors, its contract.

The Triton kernels are tested in kernels_triton.py, which runs here under Triton's interpreter, in
processes of its own because TRITON_INTERPRET has to be set before the import, and on a GPU
(`-m gpu`), in parallel where pytest-xdist is installed.
"""

import functools
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import torch
import torch.utils.flop_counter

import kernels

ROOT = Path(kernels.__file__).resolve().parent


def why_not_interpreted() -> str:
    if sys.platform == "darwin":
        return "there is no triton for macOS"
    if kernels.triton is None:
        return "triton is not installed"
    version = tuple(map(int, kernels.triton.__version__.split(".")[:2]))
    numbers = tuple(map(int, numpy.__version__.split(".")[:2]))
    if version < (3, 7) and numbers >= (2, 4):
        versions = f"triton {kernels.triton.__version__} with numpy {numpy.__version__}"
        return f"{versions} does not interpret"
    return ""


def start(*command, folder=ROOT, **environment) -> subprocess.Popen:
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    options |= {"cwd": folder, "env": os.environ | environment}
    return subprocess.Popen([sys.executable, *command], **options)


def start_triton_tests(*flags, **environment) -> subprocess.Popen:
    command = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/kernels_triton.py", *flags)
    return start(*command, **environment)


@pytest.fixture(scope="session")
def beside():
    """beside(test) -> its process, begun when first asked for, beside the other tests."""
    processes = {}

    def process_of(name):
        if name not in processes:
            flags, environment = INTERPRETED[name]
            environment = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"} | environment
            processes[name] = start_triton_tests(*flags, **environment)
        return processes[name]

    yield process_of
    for process in processes.values():
        if process.poll() is None:  # an interrupted session leaves nothing behind
            process.kill()
            process.communicate()


def test_the_interpreter_begins(request, beside):
    """conftest.py puts this one first, and those that look at what has become of it last."""
    if why_not_interpreted() or hasattr(request.config, "workerinput"):  # of pytest-xdist
        return
    for item in request.session.items:
        if getattr(item, "originalname", "") in INTERPRETED:
            beside(item.originalname)


@pytest.fixture
def ended(beside, request):
    """The process of this test, when it has ended: returncode, stdout, stderr."""
    process = beside(request.node.originalname)
    out, err = process.communicate()
    return SimpleNamespace(returncode=process.returncode, stdout=out, stderr=err)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_triton_kernels_on_the_gpu():
    """Compiling takes most of the time: eight processes, and the largest test afterwards, alone."""
    side_by_side = ["-n", "8"] if importlib.util.find_spec("xdist") else []
    large = "more_elements_than_int32"
    for flags in ([*side_by_side, "-k", f"not {large}"], ["-k", large]):
        process = start_triton_tests(*flags, TRITON_INTERPRET="0")
        out, err = process.communicate()
        assert process.returncode == 0, out + err
        print(out.strip().splitlines()[-1])


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
    torch.testing.assert_close(out, wanted, rtol=1e-10, atol=1e-12)
    if not glu and inputs[5] is None:
        by_hand = kernels.moe_mlp_by_hand(*inputs[:5], act)
        torch.testing.assert_close(by_hand, wanted, rtol=1e-10, atol=1e-12)
    for given, want in zip(gradients(out, inputs), gradients(wanted, inputs)):
        torch.testing.assert_close(given, want, rtol=1e-10, atol=1e-12)


def test_gradcheck_and_gradgradcheck():
    # nulls, a duplicate, experts 1 and 3 empty
    index = torch.tensor([[0, 2], [-1, 2], [2, 2], [-1, -1], [0, 7]])
    x, _, gates, w1, w2, b1, b2 = problem(5, 2, 4, 3, 2, glu=True)

    def layer(x, gates, *weights):
        return kernels.moe_mlp(x, index, gates, *weights, act="gelu", glu=True)

    def composed(x, gates, w1, b1):
        dispatch = kernels.make_dispatch(index, 4)
        y = kernels.grouped_mm(kernels.gather(x, dispatch), w1, dispatch, b1)
        return kernels.scatter(y, dispatch, gates)

    for function, inputs in ((layer, (x, gates, w1, w2, b1, b2)), (composed, (x, gates, w1, b1))):
        assert torch.autograd.gradcheck(function, inputs)
        assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


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


def test_only_live_rows_are_multiplied(monkeypatch):
    rows, affine = [], kernels._affine

    def counted(h, w, b):
        rows.append(len(h))
        return affine(h, w, b)

    monkeypatch.setattr(kernels, "_affine", counted)
    inputs = problem(30, 2, 4, 6, 4, nulls=0.5)
    kernels.moe_mlp(*inputs, backend="torch")
    assert sum(rows) == 2 * int(((inputs[1] >= 0) & (inputs[1] < 4)).sum()) < 2 * 60


def test_frozen_weights_get_no_gradient():
    x, index, _, w, _, _, _ = problem(12, 2, 5, 6, 4)
    dispatch = kernels.make_dispatch(index, 5)
    lora_a = torch.randn(5, 6, 2, dtype=torch.float64, requires_grad=True)
    lora_b = torch.randn(5, 2, 4, dtype=torch.float64, requires_grad=True)
    h, w = kernels.gather(x, dispatch), w.detach()
    low = kernels.grouped_mm(kernels.grouped_mm(h, lora_a, dispatch), lora_b, dispatch)
    (kernels.grouped_mm(h, w, dispatch) + low).sum().backward()
    assert w.grad is None
    assert all(t.grad.norm() > 0 for t in (lora_a, lora_b, x))


@pytest.mark.parametrize("gate_dtype", [torch.float32, torch.bfloat16])
def test_autocast_of_all_four(gate_dtype):
    inputs = problem(12, 2, 5, 6, 4, dtype=torch.float32)
    x, index, gates, w1, *_ = inputs
    gates = inputs[2] = gates.detach().to(gate_dtype).requires_grad_()
    dispatch = kernels.make_dispatch(index, 5)
    rows = torch.randn(24, 6, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = [kernels.moe_mlp(*inputs), kernels.gather(x, dispatch)]
        outputs += [kernels.grouped_mm(rows, w1, dispatch)]
        outputs += [kernels.scatter(rows, dispatch, gates), kernels.scatter(rows, dispatch)]
    assert all(out.dtype == torch.bfloat16 for out in outputs)
    sum(out.float().sum() for out in outputs).backward()
    assert gates.grad.dtype == gate_dtype
    for tensor in (x, w1, rows, *inputs[4:]):
        assert tensor.grad.dtype == torch.float32


SHAPES = {"x": (5, 3), "gates": (5, 2), "w1": (4, 3, 8), "w2": (4, 8, 3), "b1": (4, 8)}
SHAPES["b2"] = (4, 3)
INDEX = torch.zeros(5, 2, dtype=torch.long)
DISPATCH = kernels.make_dispatch(INDEX, 4)
MANY = torch.zeros(1, 1, dtype=torch.int32).expand(2**20, 2**11)
W2 = torch.zeros(4, 8, 3)
REFUSED_BY_MOE_MLP = [  # argument, its value or shape, what is said
    ("x", (5, 4), r"w1 has shape \[4, 3, 8\]; shape \[num_experts, 4, d_ff\]"),
    ("x", (5, 3, 1), r"x has shape \[5, 3, 1\]; a tensor of shape \[tokens, d_model\]"),
    ("x", (6, 3), r"expert_index has shape \[5, 2\]; shape \[6, top_k\]"),
    ("x", torch.zeros(5, 3).long(), "x has dtype torch.int64"),
    ("gates", (5, 3), r"gates has shape \[5, 3\]; shape \[5, 2\]"),
    ("gates", torch.zeros(5, 2).double(), "gates has dtype torch.float64; allowed here: .*32"),
    ("gates", None, "gates has type NoneType"),
    ("w1", (3, 8), r"w1 has shape \[3, 8\]; a tensor of shape"),
    ("w1", (4, 3, 7), r"w2 has shape \[4, 8, 3\]; shape \[4, 7, 3\]"),
    ("w2", (3, 8, 3), r"w2 has shape \[3, 8, 3\]; shape \[4, 8, 3\]"),
    ("w2", W2.bfloat16(), "w2 has dtype torch.bfloat16; allowed here: torch.float32"),
    ("w2", W2.to("meta"), "w2 is on meta; all tensors must be on one device, here cpu"),
    ("b1", (8,), r"b1 has shape \[8\]; a tensor of shape \[4, 8\]"),
    ("b2", (4, 8), r"b2 has shape \[4, 8\]; shape \[4, 3\]"),
    ("expert_index", INDEX.float(), "expert_index has dtype torch.float32; an integer"),
    ("expert_index", INDEX.bool(), "expert_index has dtype torch.bool; an integer"),
    ("expert_index", INDEX.flatten(), r"expert_index has shape \[10\]; a tensor of shape"),
    ("expert_index", kernels.make_dispatch(INDEX, 3), r"w1 has .*; shape \[3, 3, d_ff\]"),
    ("glu", True, r"w2 has shape \[4, 8, 3\]; shape \[4, 4, 3\]"),
    ("act", "tanh", "act is 'tanh'; allowed: relu, gelu, silu, none"),
    ("backend", "cuda", "backend is 'cuda'; allowed: 'auto', 'torch', 'triton'"),
]
zeros = torch.zeros
ODD_GLU = (zeros(5, 3), INDEX, zeros(5, 2), zeros(4, 3, 7), W2, None, None, "gelu", True)
REFUSED_BY_OTHERS = [  # function, arguments, what is said
    ("moe_mlp", ODD_GLU, r"\[4, 3, 7\]; with glu the last size must be even"),
    ("grouped_mm", (zeros(9, 3), zeros(4, 3, 8), DISPATCH), r"h has shape \[9, 3\]; .* \[10, in\]"),
    ("grouped_mm", (zeros(10, 3), zeros(3, 3, 8), DISPATCH), r"w has .*; shape \[4, 3, out\]"),
    ("gather", (zeros(4, 3), DISPATCH), r"x has shape \[4, 3\]; shape \[5, d_model\]"),
    ("scatter", (zeros(5, 3), DISPATCH), r"y has shape \[5, 3\]; shape \[10, d_model\]"),
    ("scatter", (zeros(10, 3), DISPATCH, zeros(2, 5)), r"gates has .* \[2, 5\]; shape \[5, 2\]"),
    # what the kernels could not count
    ("make_dispatch", (MANY, 4), "2147483648 entries"),
    ("make_dispatch", (INDEX, 0), "num_experts is 0; 1 to 32766"),
    ("make_dispatch", (INDEX, 32767), "num_experts is 32767; 1 to 32766"),
]


@pytest.mark.parametrize("name, value, says", REFUSED_BY_MOE_MLP)
def test_errors_name_the_argument_and_what_is_allowed(name, value, says):
    arguments = {key: zeros(shape) for key, shape in SHAPES.items()}
    arguments["expert_index"] = INDEX
    is_shape = isinstance(value, tuple) and not isinstance(value, kernels.Dispatch)
    arguments[name] = zeros(value) if is_shape else value
    with pytest.raises(ValueError, match=says):
        kernels.moe_mlp(**arguments)


@pytest.mark.parametrize("name, arguments, says", REFUSED_BY_OTHERS)
def test_errors_of_the_other_calls(name, arguments, says):
    with pytest.raises(ValueError, match=says):
        getattr(kernels, name)(*arguments)


def test_what_is_not_for_the_kernels(monkeypatch):
    monkeypatch.setattr(kernels, "INTERPRETED", True)  # as if the device were right
    monkeypatch.setattr(kernels, "triton", kernels.triton or SimpleNamespace())
    x = torch.empty(1).expand(4, 2**15)  # no memory behind these shapes
    fits = torch.empty(1).expand(2, 2**15, 2**16 - 1)
    large = torch.empty(1).expand(2, 2**15, 2**16)
    assert kernels._use_triton("auto", 2, x, fits)
    assert not kernels._use_triton("auto", 2, x, large)
    with pytest.raises(RuntimeError, match=r"2\*\*31 elements"):
        kernels._use_triton("triton", 2, x, large)
    assert kernels._use_triton("auto", 8192, x)
    with pytest.raises(RuntimeError, match="8192 experts at most, not 8193"):
        kernels._use_triton("triton", 8193, x)
    with torch.autograd.forward_ad.dual_level():
        assert not kernels._use_triton("auto", 2, x)
        with pytest.raises(RuntimeError, match="torch.func and forward-mode derivatives"):
            kernels._use_triton("triton", 2, x)
    monkeypatch.setattr(kernels, "INTERPRETED", False)
    with pytest.raises(RuntimeError, match="backend 'triton' cannot be used: it needs a CUDA GPU"):
        kernels._use_triton("triton", 2, x)


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


def test_torch_func_and_forward_mode_on_the_torch_path():
    """Where F.grouped_mm would take the shapes, but knows no such derivative."""
    x, index, gates, w1, w2, _, _ = problem(6, 2, 4, 8, 8, bias=False, dtype=torch.float32)
    dispatch = kernels.make_dispatch(index, 4)
    x, gates, w1, w2 = (t.detach() for t in (x, gates, w1, w2))
    t = torch.randn_like(x)

    def layer(x):
        return kernels.moe_mlp(x, dispatch, gates, w1, w2)

    close = functools.partial(torch.testing.assert_close, atol=1e-4, rtol=1e-4)
    _, tangent = torch.func.jvp(layer, (x,), (t,))
    jacobian = torch.func.jacrev(layer)(x)
    close(tangent, torch.einsum("tdse,se->td", jacobian, t))
    both = torch.func.vmap(layer)(torch.stack([x, t]))
    close(both, torch.stack([layer(x), layer(t)]))


def test_flops_are_counted_in_both_ways():
    inputs = problem(6, 2, 4, 8, 16, bias=False, dtype=torch.float32, nulls=0)[:5]
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        kernels.moe_mlp(*inputs).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 2 * (6 * 2) * 8 * 16  # 3 passes, 2 layers


def test_meta_tensors_give_shapes():
    inputs = problem(6, 2, 4, 8, 16, bias=True, dtype=torch.float32)
    inputs = [t.detach().to("meta").requires_grad_(t.is_floating_point()) for t in inputs]
    out = kernels.moe_mlp(*inputs)
    out.sum().backward()
    assert out.is_meta and out.shape == (6, 8) and inputs[3].grad.shape == (4, 8, 16)
    dispatch = kernels.make_dispatch(inputs[1], 4)
    rows = kernels.gather(inputs[0], dispatch)
    assert rows.shape == (12, 8)
    assert kernels.grouped_mm(rows, inputs[3], dispatch).shape == (12, 16)
    assert kernels.scatter(rows, dispatch, inputs[2]).shape == (6, 8)


# ----------------------------------------------------------------------------------------------
# Processes of their own, started before the first test of this file
# ----------------------------------------------------------------------------------------------

ALONE = """
import os, random, sys, numpy, torch
def state():
    numbers = torch.initial_seed(), random.getstate(), torch.get_num_threads()
    return os.environ.copy(), os.listdir(), numbers, torch.get_default_dtype()
before = state()
import kernels
print("changes nothing:", state() == before)
del sys.modules["kernels"]
sys.modules["triton"] = None
import kernels
x, w = torch.randn(3, 4), torch.randn(2, 4, 4)
out = kernels.moe_mlp(x, torch.tensor([[0], [1], [-1]]), torch.ones(3, 1), w, w)
print("without triton:", kernels.triton, out[2].tolist())
"""
OLDEST_CPU = {"OPENBLAS_CORETYPE": "Nehalem", "ATEN_CPU_CAPABILITY": "default"}
INTERPRETED = {  # test -> flags, environment
    "test_triton_kernels_in_the_interpreter": ([], {}),
    "test_as_on_the_oldest_cpu": (["-k", "exact or same_losses"], OLDEST_CPU),
}


def test_the_file_works_alone_without_triton_and_its_import_changes_nothing(tmp_path):
    shutil.copy(ROOT / "kernels.py", tmp_path)
    environment = {"PYTHONPATH": "", "TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"}
    out, err = start("-B", "-c", ALONE, folder=tmp_path, **environment).communicate()
    assert out == "changes nothing: True\nwithout triton: None [0.0, 0.0, 0.0, 0.0]\n", err


@pytest.mark.skipif(bool(why_not_interpreted()), reason=why_not_interpreted())
def test_triton_kernels_in_the_interpreter(ended):
    assert ended.returncode == 0, ended.stdout + ended.stderr
    print(ended.stdout.strip().splitlines()[-1])


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="settings of x86")
@pytest.mark.skipif(bool(why_not_interpreted()), reason=why_not_interpreted())
def test_as_on_the_oldest_cpu(ended):
    """What is most sensitive to rounding, with the libraries' code for CPUs without AVX."""
    assert ended.returncode == 0, ended.stdout + ended.stderr
