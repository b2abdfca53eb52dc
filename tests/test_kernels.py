"""kernels.py: the torch path against loops over tokens in float64, its errors, and both paths' contract.

The Triton kernels are tested in kernels_triton.py, which runs here twice: under Triton's interpreter, in a process of
its own because TRITON_INTERPRET has to be set before the import, and on a GPU (`-m gpu`).
"""

import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import torch

import kernels

ROOT = Path(kernels.__file__).resolve().parent


def why_not_interpreted() -> str:
    if sys.platform == "darwin":
        return "there is no triton for macOS"
    if kernels.triton is None:
        return "triton is not installed"
    version, numbers = (tuple(map(int, m.__version__.split(".")[:2])) for m in (kernels.triton, numpy))
    if version < (3, 7) and numbers >= (2, 4):
        return f"the interpreter of triton {kernels.triton.__version__} fails with numpy {numpy.__version__}"
    return ""


def start(*command, folder=ROOT, **environment) -> subprocess.Popen:
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, *command], cwd=folder, env=os.environ | environment, **options)


def start_triton_tests(**environment) -> subprocess.Popen:
    return start("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/kernels_triton.py", **environment)


def start_alone(folder, *command) -> subprocess.Popen:
    shutil.copy(ROOT / "kernels.py", folder)
    return start(*command, folder=folder, PYTHONPATH="", TRITON_INTERPRET="0", OMP_NUM_THREADS="1")


@pytest.fixture(scope="module", autouse=True)
def beside(request, tmp_path_factory):
    """{test: process, folder}: what the last tests of this file wait for runs beside the others, if it was chosen."""
    chosen = {getattr(item, "originalname", item.name) for item in request.session.items}
    processes = {}
    if "test_triton_kernels_in_the_interpreter" in chosen and not why_not_interpreted():
        interpreted = start_triton_tests(TRITON_INTERPRET="1", OMP_NUM_THREADS="1")
        processes["test_triton_kernels_in_the_interpreter"] = interpreted, ROOT
    for name in chosen & set(ALONE):
        folder = tmp_path_factory.mktemp("alone")
        processes[name] = start_alone(folder, *ALONE[name]), folder
    yield processes
    for process, _ in processes.values():
        if process.poll() is None:  # an interrupted session leaves nothing behind
            process.kill()
            process.communicate()


@pytest.fixture
def ended(beside, request):
    """The process of this test, when it has ended: returncode, stdout, stderr, folder."""
    process, folder = beside[request.node.originalname]
    out, err = process.communicate()
    return SimpleNamespace(returncode=process.returncode, stdout=out, stderr=err, folder=folder)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_triton_kernels_on_the_gpu():
    process = start_triton_tests(TRITON_INTERPRET="0")
    out, err = process.communicate()
    assert process.returncode == 0, out + err
    print(out.strip().splitlines()[-1])


# ---------------------------------------------------------------------------------------------------------------
# The torch path
# ---------------------------------------------------------------------------------------------------------------


def naive(x, expert_index, gates, w1, w2, b1, b2, act, glu):
    """One token and one pick at a time, as the definition reads."""
    rows = []
    for t in range(x.shape[0]):
        row = torch.zeros_like(x[t])
        for j in range(expert_index.shape[1]):
            e = int(expert_index[t, j])
            if 0 <= e < w1.shape[0]:
                z = x[t] @ w1[e] + (0 if b1 is None else b1[e])
                function = {"relu": torch.relu, "gelu": torch.nn.functional.gelu, "none": lambda z: z}
                function["silu"] = lambda z: z * torch.sigmoid(z)
                half = z.shape[0] // 2
                a = function[act](z[:half]) * z[half:] if glu else function[act](z)
                row = row + gates[t, j] * (a @ w2[e] + (0 if b2 is None else b2[e]))
        rows.append(row)
    return torch.stack(rows) if rows else torch.zeros_like(x)


def problem(tokens, top_k, experts, d_model, d_ff, glu=False, bias=True, nulls=0.3, dtype=torch.float64, seed=0):
    torch.manual_seed(seed)

    def new(*shape):
        return torch.randn(*shape, dtype=dtype, requires_grad=True)

    expert_index = torch.randint(0, experts, (tokens, top_k))
    null = torch.rand(tokens, top_k) < nulls
    expert_index[null] = torch.tensor([-1, experts, experts + 5, -7])[torch.randint(0, 4, (int(null.sum()),))]
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


@pytest.mark.parametrize("glu", [False, True])
@pytest.mark.parametrize("act", ["relu", "gelu", "silu", "none"])
@pytest.mark.parametrize(
    "tokens, top_k, experts, d_model, d_ff, nulls",
    [
        (17, 3, 5, 6, 4, 0.3),
        (1, 1, 1, 8, 8, 0.0),
        (11, 8, 4, 7, 5, 0.3),  # top_k > num_experts
        (9, 2, 64, 6, 4, 0.0),  # most experts empty
        (6, 2, 4, 3, 5, 1.1),  # everything null
        (0, 2, 4, 8, 8, 0.3),
        (5, 0, 4, 8, 8, 0.3),
    ],
)
def test_torch_path_matches_loops(tokens, top_k, experts, d_model, d_ff, nulls, act, glu):
    inputs = problem(tokens, top_k, experts, d_model, d_ff, glu, bias=act != "silu", nulls=nulls)
    out, wanted = kernels.moe_mlp(*inputs, act=act, glu=glu), naive(*inputs, act, glu)
    torch.testing.assert_close(out, wanted, rtol=1e-10, atol=1e-12)
    for given, want in zip(gradients(out, inputs), gradients(wanted, inputs)):
        torch.testing.assert_close(given, want, rtol=1e-10, atol=1e-12)


def test_gradcheck_and_gradgradcheck():
    index = torch.tensor([[0, 2], [-1, 2], [2, 2], [-1, -1], [0, 7]])  # nulls, a duplicate, experts 1 and 3 empty
    x, _, gates, w1, w2, b1, b2 = problem(5, 2, 4, 3, 2, glu=True)

    def layer(x, gates, *weights):
        return kernels.moe_mlp(x, index, gates, *weights, act="gelu", glu=True)

    def composed(x, gates, w1, b1):
        dispatch = kernels.make_dispatch(index, 4)
        return kernels.scatter(kernels.grouped_mm(kernels.gather(x, dispatch), w1, dispatch, b1), dispatch, gates)

    for function, inputs in ((layer, (x, gates, w1, w2, b1, b2)), (composed, (x, gates, w1, b1))):
        assert torch.autograd.gradcheck(function, inputs)
        assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 2e-6), (torch.float16, 3e-3), (torch.bfloat16, 2e-2)])
def test_low_precision(dtype, bound):
    inputs = [t if t is None or not t.is_floating_point() else t.detach().to(dtype) for t in problem(40, 3, 5, 24, 20)]
    wanted = kernels.moe_mlp(*(t.double() if t.is_floating_point() else t for t in inputs))
    out = kernels.moe_mlp(*inputs)
    assert out.dtype == dtype and (out.double() - wanted).norm() < bound * wanted.norm()
    assert kernels.moe_mlp(inputs[0], inputs[1], inputs[2].float(), *inputs[3:]).dtype == dtype


def test_dispatch_is_the_docstrings_example():
    d = kernels.make_dispatch(torch.tensor([[2, 0], [0, -1], [2, -1], [1, 0]], dtype=torch.int8), 3)
    assert d.slot.tolist() == [1, 2, 7, 6, 0, 4, 3, 5]
    assert d.pos.tolist() == [[4, 0], [1, -1], [5, -1], [3, 2]]
    assert d.offsets.tolist() == [0, 3, 4, 6] and d.offsets.diff().tolist() == [3, 1, 2]
    assert {t.dtype for t in d[:3]} == {torch.int32}


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
@pytest.mark.parametrize("num_experts", [1, 100, 254, 255, 300])
def test_dispatch_inverts_itself(num_experts, dtype):
    torch.manual_seed(0)
    info = torch.iinfo(dtype)
    index = torch.randint(max(info.min, -3), min(info.max, num_experts + 3) + 1, (50, 3)).to(dtype)
    d = kernels.make_dispatch(index, num_experts)
    flat, pos = index.flatten().long(), d.pos.flatten().long()
    live = (flat >= 0) & (flat < num_experts)
    assert torch.equal(pos < 0, ~live) and torch.equal(d.slot.sort().values.long(), torch.arange(150))
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


def test_properties():
    x, index, gates, w1, w2, b1, b2 = inputs = problem(20, 2, 5, 6, 4, nulls=0.2)
    out = kernels.moe_mlp(*inputs)
    order, label = torch.randperm(20), torch.randperm(5)
    old = label.argsort()
    close = torch.testing.assert_close
    close(kernels.moe_mlp(x[order], index[order], gates[order], w1, w2, b1, b2), out[order])
    null = (index < 0) | (index >= 5)
    renamed = torch.where(null, index, label[index.masked_fill(null, 0)])
    close(kernels.moe_mlp(x, renamed, gates, w1[old], w2[old], b1[old], b2[old]), out)
    wider = torch.cat([index, torch.full((20, 1), -1)], 1), torch.cat([gates, gates[:, :1]], 1)
    assert torch.equal(kernels.moe_mlp(x, *wider, w1, w2, b1, b2), out)
    dispatch = kernels.make_dispatch(index, 5)
    assert torch.equal(kernels.moe_mlp(x, dispatch, gates, w1, w2, b1, b2), out)
    close(kernels.scatter(kernels.gather(x, dispatch), dispatch), x * (~null).sum(1, keepdim=True))
    dense = torch.nn.functional.gelu(x @ w1[0] + b1[0]) @ w2[0] + b2[0]
    index, gates = torch.zeros(20, 1, dtype=torch.long), torch.ones(20, 1).double()
    close(kernels.moe_mlp(x, index, gates, w1[:1], w2[:1], b1[:1], b2[:1]), dense)


def test_grouped_rows_beyond_the_live_ones_are_zero():
    x, index, _, w1, _, b1, _ = problem(12, 2, 5, 6, 4, nulls=0.5)
    dispatch = kernels.make_dispatch(index, 5)
    live = int(dispatch.offsets[-1])
    h = kernels.gather(x, dispatch)
    y = kernels.grouped_mm(h, w1, dispatch, b1)
    assert h.shape == (24, 6) and y.shape == (24, 4) and (h[live:] == 0).all() and (y[live:] == 0).all()


def test_only_live_rows_are_multiplied(monkeypatch):
    rows, affine = [], kernels._affine
    monkeypatch.setattr(kernels, "_affine", lambda h, w, b: (rows.append(len(h)), affine(h, w, b))[1])
    inputs = problem(30, 2, 4, 6, 4, nulls=0.5)
    kernels.moe_mlp(*inputs, backend="torch")
    assert sum(rows) == 2 * int(((inputs[1] >= 0) & (inputs[1] < 4)).sum()) < 2 * 60


def test_frozen_weights_get_no_gradient():
    x, index, _, w, _, _, _ = problem(12, 2, 5, 6, 4)
    dispatch = kernels.make_dispatch(index, 5)
    lora_a, lora_b = (torch.randn(5, *s, dtype=torch.float64, requires_grad=True) for s in ((6, 2), (2, 4)))
    h, w = kernels.gather(x, dispatch), w.detach()
    low = kernels.grouped_mm(kernels.grouped_mm(h, lora_a, dispatch), lora_b, dispatch)
    (kernels.grouped_mm(h, w, dispatch) + low).sum().backward()
    assert w.grad is None and lora_a.grad.norm() > 0 and lora_b.grad.norm() > 0 and x.grad.norm() > 0


def test_autocast():
    inputs = problem(12, 2, 5, 6, 4, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = kernels.moe_mlp(*inputs)
    out.float().sum().backward()
    assert out.dtype == torch.bfloat16 and all(t.grad.dtype == torch.float32 for t in inputs if t.is_floating_point())


GOOD = {"x": (5, 3), "gates": (5, 2), "w1": (4, 3, 8), "w2": (4, 8, 3), "b1": (4, 8), "b2": (4, 3)}


@pytest.mark.parametrize(
    "name, value, says",
    [
        ("x", (5, 4), r"w1 has shape \[4, 3, 8\]; shape \[num_experts, 4, d_ff\]"),
        ("x", (5, 3, 1), r"x has shape \[5, 3, 1\]; a tensor of shape \[tokens, d_model\]"),
        ("x", (6, 3), r"expert_index has shape \[5, 2\]; shape \[6, top_k\]"),
        ("x", torch.zeros(5, 3, dtype=torch.long), "x has dtype torch.int64"),
        ("gates", (5, 3), r"gates has shape \[5, 3\]; shape \[5, 2\]"),
        ("gates", torch.zeros(5, 2, dtype=torch.float64), "gates has dtype torch.float64; allowed here: torch.float32"),
        ("gates", None, "gates has type NoneType"),
        ("w1", (3, 8), r"w1 has shape \[3, 8\]; a tensor of shape"),
        ("w1", (4, 3, 7), r"w2 has shape \[4, 8, 3\]; shape \[4, 7, 3\]"),
        ("w2", (3, 8, 3), r"w2 has shape \[3, 8, 3\]; shape \[4, 8, 3\]"),
        ("w2", torch.zeros(4, 8, 3, dtype=torch.bfloat16), "w2 has dtype torch.bfloat16; allowed here: torch.float32"),
        ("w2", torch.zeros(4, 8, 3, device="meta"), "w2 is on meta; all tensors must be on one device, here cpu"),
        ("b1", (8,), r"b1 has shape \[8\]; a tensor of shape \[4, 8\]"),
        ("b2", (4, 8), r"b2 has shape \[4, 8\]; shape \[4, 3\]"),
        ("expert_index", torch.zeros(5, 2), "expert_index has dtype torch.float32; an integer"),
        ("expert_index", torch.zeros(5, 2, dtype=torch.bool), "expert_index has dtype torch.bool; an integer"),
        ("expert_index", torch.zeros(10, dtype=torch.long), r"expert_index has shape \[10\]; a tensor of shape"),
        ("act", "tanh", "act is 'tanh'; allowed: relu, gelu, silu, none"),
        ("backend", "cuda", "backend is 'cuda'; allowed: 'auto', 'torch', 'triton'"),
    ],
)
def test_errors_name_the_argument_and_what_is_allowed(name, value, says):
    arguments = {key: torch.zeros(shape) for key, shape in GOOD.items()}
    arguments["expert_index"] = torch.zeros(5, 2, dtype=torch.long)
    arguments[name] = torch.zeros(value) if isinstance(value, tuple) else value
    with pytest.raises(ValueError, match=says):
        kernels.moe_mlp(**arguments)


def test_more_errors():
    many = torch.zeros(1, 1, dtype=torch.int32).expand(2**20, 2**11)
    with pytest.raises(ValueError, match="2147483648 entries"):
        kernels.make_dispatch(many, 4)
    for number in (0, 32767):
        with pytest.raises(ValueError, match=f"num_experts is {number}; 1 to 32766"):
            kernels.make_dispatch(torch.zeros(1, 1, dtype=torch.long), number)
    x, index, gates, w1, w2 = (torch.zeros(shape) for shape in ((5, 3), (5, 2), (5, 2), (4, 3, 7), (4, 3, 3)))
    with pytest.raises(ValueError, match=r"w1 has shape \[4, 3, 7\]; with glu the last size must be even"):
        kernels.moe_mlp(x, index.long(), gates, w1, w2, glu=True)
    dispatch = kernels.make_dispatch(torch.zeros(5, 2, dtype=torch.long), 4)
    with pytest.raises(ValueError, match=r"w1 has shape \[3, 3, 8\]; shape \[4, 3, d_ff\]"):
        kernels.moe_mlp(x, dispatch, gates, torch.zeros(3, 3, 8), w2)
    with pytest.raises(ValueError, match=r"h has shape \[9, 3\]; shape \[10, in\]"):
        kernels.grouped_mm(torch.zeros(9, 3), torch.zeros(4, 3, 8), dispatch)
    with pytest.raises(ValueError, match=r"w has shape \[3, 3, 8\]; shape \[4, 3, out\]"):
        kernels.grouped_mm(torch.zeros(10, 3), torch.zeros(3, 3, 8), dispatch)
    with pytest.raises(ValueError, match=r"x has shape \[4, 3\]; shape \[5, d_model\]"):
        kernels.gather(torch.zeros(4, 3), dispatch)
    with pytest.raises(ValueError, match=r"y has shape \[5, 3\]; shape \[10, d_model\]"):
        kernels.scatter(torch.zeros(5, 3), dispatch)
    with pytest.raises(ValueError, match=r"gates has shape \[2, 5\]; shape \[5, 2\]"):
        kernels.scatter(torch.zeros(10, 3), dispatch, torch.zeros(2, 5))
    if not kernels.INTERPRETED:
        tensors = [torch.zeros(shape) for shape in GOOD.values()]
        with pytest.raises(RuntimeError, match="backend 'triton' cannot be used"):
            kernels.moe_mlp(tensors[0], dispatch, *tensors[1:4], backend="triton")


def test_matrices_beyond_int32_are_not_for_the_kernels(monkeypatch):
    monkeypatch.setattr(kernels, "INTERPRETED", True)  # as if the device were right
    monkeypatch.setattr(kernels, "triton", kernels.triton or SimpleNamespace())
    x, fits, large = (torch.empty(s, device="meta") for s in ((4, 2**15), (2, 2**15, 2**16 - 1), (2, 2**15, 2**16)))
    assert kernels._use_triton("auto", x, fits) and not kernels._use_triton("auto", x, large)
    with pytest.raises(RuntimeError, match=r"2\*\*31 elements"):
        kernels._use_triton("triton", x, large)


# ---------------------------------------------------------------------------------------------------------------
# The file by itself
# ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--shape", "huge"], "--shape huge is not known here"),
        (["--speed", "fast"], "unrecognized arguments"),
        (["--json", "missing/folder.json"], "cannot write missing/folder.json"),
    ],
)
def test_a_bad_flag_is_one_line_and_code_2(monkeypatch, capsys, arguments, says):
    monkeypatch.setattr(sys, "argv", ["kernels.py", *arguments])
    with pytest.raises(SystemExit) as stop:
        kernels.main()
    printed = capsys.readouterr().err
    assert stop.value.code == 2 and says in printed and len(printed.strip().splitlines()) == 1


class Event:
    """torch.cuda.Event on the CPU's clock."""

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.seconds = time.perf_counter()

    def elapsed_time(self, later):
        return 1e3 * (later.seconds - self.seconds)


class OnTheCPU(torch.overrides.TorchFunctionMode):
    """Tensors asked for on a GPU are made here; the one that clears the GPU's cache is small."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if kwargs.get("device") == "cuda":
            kwargs["device"] = "cpu"
            args = (1,) if args == (2**28,) else args
        return function(*args, **kwargs)


def fake_liger(x, gate_up, down, index, gates):
    """As LigerFusedMoEFunction.apply documents it: gate_up [E, 2F, D], down [E, D, F], contiguous."""
    assert gate_up.is_contiguous() and down.is_contiguous() and index.dtype == torch.int32 and gates.dtype == x.dtype
    return kernels.moe_mlp(x, index, gates, gate_up.mT, down.mT, act="silu", glu=True, backend="torch")


def fake_sort(index, num_experts):
    order = index.flatten().sort()
    return order.values, order.indices, order.values.bincount(minlength=num_experts).cumsum(0)


def fake_linear(x, w, k, experts, scattered, offsets, gates=None, grouped_in=False, grouped_out=False):
    """As ScatterMoE's parallel_linear: rows in expert order or in token order, k copies of each; then gated sums."""
    rows = x if grouped_in else x[scattered // k]
    y = torch.cat([h @ m for h, m in zip(rows.split(offsets.diff(prepend=offsets.new_zeros(1)).tolist()), w)])
    if grouped_out:
        return y
    y = y[scattered.argsort()].view(*gates.shape, -1)
    return (gates.unsqueeze(1) @ y).squeeze(1)


@pytest.fixture
def pretended_gpu(monkeypatch):
    """The benchmark takes its path for GPUs, with kernels in plain torch: what is tested is that it runs to its end."""
    fakes = {
        "is_available": lambda: True, "get_device_name": lambda: "a GPU", "synchronize": lambda: None, "Event": Event,
        "reset_peak_memory_stats": lambda: None, "memory_allocated": lambda: 5 * 2**20,
        "max_memory_allocated": lambda: 7 * 2**20,
    }  # fmt: skip
    for name, value in fakes.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setitem(kernels.SHAPES, "cuda", {"one": (16, 2, 4, 16, 24), "two": (16, 2, 4, 24, 16)})
    monkeypatch.setattr(kernels, "_ceilings", lambda device: (1e11, 1e10))
    make = kernels._problem  # the correctness check, too, needs no more than a few tokens
    monkeypatch.setattr(kernels, "_problem", lambda shape, device: make((min(shape[0], 64), *shape[1:]), device))
    measure = kernels._measure
    monkeypatch.setattr(kernels, "_measure", lambda jobs, turns: measure(jobs, 2))
    replay = lambda step, return_mode: [len(step()) / 10, 0.5]
    testing = SimpleNamespace(do_bench_cudagraph=replay)
    monkeypatch.setattr(kernels, "triton", SimpleNamespace(testing=testing, __version__="3"))
    with OnTheCPU():
        yield


def benchmark(monkeypatch, folder, *flags):
    """Exit code, and the figures written."""
    monkeypatch.setattr(sys, "argv", ["kernels.py", "--json", str(folder / "figures.json"), *flags])
    try:
        code = kernels.main()
    except SystemExit as stop:
        code = stop.code
    file = folder / "figures.json"
    return code, json.loads(file.read_text())["rows"] if file.exists() else None


def test_benchmark_on_a_pretended_gpu(pretended_gpu, monkeypatch, tmp_path, capsys):
    """Every contender, the peers by what their documentation says they take, gives the same layer; every column."""
    liger = SimpleNamespace(LigerFusedMoEFunction=SimpleNamespace(apply=fake_liger))
    monkeypatch.setitem(sys.modules, "liger_kernel.ops.fused_moe", liger)
    scattermoe = SimpleNamespace(flatten_sort_count=fake_sort, parallel_linear=fake_linear)
    monkeypatch.setitem(sys.modules, "scattermoe.parallel_experts", scattermoe)
    for parent in ("liger_kernel", "liger_kernel.ops", "scattermoe"):
        monkeypatch.setitem(sys.modules, parent, SimpleNamespace(__path__=[]))
    flags = ["--plot", str(tmp_path / "roof.png")] if importlib.util.find_spec("matplotlib") else []
    code, rows = benchmark(monkeypatch, tmp_path, *flags)
    printed = capsys.readouterr().out
    assert not code and "left out" not in printed and "WRONG" not in printed
    assert bool(flags) == (tmp_path / "roof.png").exists()
    routings = {f"ours, {routing}" for routing in ("skewed", "half empty", "half null", "CUDA graph")}
    names = {*kernels.CONTENDERS, *routings, "ours again", "dense", "make_dispatch"}
    for shape in ("one", "two"):
        assert {row["contender"] for row in rows if row["shape"] == shape} == names
    own = next(row for row in rows if row["contender"] == "ours")
    assert set(own) == {"shape", "contender", *kernels.COLUMNS}
    assert own["peak_mib"] == 2
    assert own["peak_formula_mib"] == 2 * (2 * 16 * 16 + 32 * (5 * 24 + 16) + 3 * 4 * 16 * 24) / 2**20
    assert own["tflops"] == pytest.approx(18 * 32 * 16 * 24 / own["total_ms"] / 1e9)
    graph = next(row for row in rows if row["contender"] == "ours, CUDA graph")
    assert graph["total_ms"] == 0.45 and "forward_ms" not in graph and "peak_mib" not in graph


def test_a_contender_that_fails_does_not_stop_the_others(pretended_gpu, monkeypatch, tmp_path, capsys):
    forward, calls = kernels._forward, []

    def failing(contender, *inputs):
        calls.append(contender)
        if contender == "dense":
            assert inputs[0].shape[0] == 32  # as many rows as there are assignments
        if contender == "padded bmm":
            raise torch.OutOfMemoryError("no memory\nand a long story")
        if contender == "where loop" and calls.count(contender) == 5:
            raise RuntimeError("an illegal memory access")
        if contender == "dense" and inputs[0].shape[1] == 24:
            raise RuntimeError("")
        return forward(contender, *inputs)

    monkeypatch.setattr(kernels, "_forward", failing)
    code, rows = benchmark(monkeypatch, tmp_path)
    lines = capsys.readouterr().out.splitlines()
    left = [line for line in lines if "left out" in line]
    assert not code and len(left) == 5
    assert left[0] == "padded bmm: left out, OutOfMemoryError: no memory"
    assert left[1].startswith("Liger: left out, ModuleNotFoundError") and left[2].startswith("ScatterMoE: left out")
    assert left[3:] == [
        "where loop: left out, RuntimeError: an illegal memory access",
        "dense: left out, RuntimeError: ",
    ]
    shapes = {
        name: [row["shape"] for row in rows if row["contender"] == name] for name in (*kernels.CONTENDERS, "dense")
    }
    assert shapes["ours"] == ["one", "two"] and shapes["where loop"] == ["two"] and shapes["dense"] == ["one"]
    assert shapes["padded bmm"] == shapes["Liger"] == shapes["ScatterMoE"] == []
    assert ["total_vs_dense" in row for row in rows if row["contender"] == "ours"] == [True, False]


def test_a_failure_of_ours_is_an_exit_code(pretended_gpu, monkeypatch, tmp_path, capsys):
    """Wrong numbers, NaN among them, are not timed; a crash or Ctrl-C keeps the figures of the other shapes."""
    forward = kernels._forward
    half_of_dx = lambda out, x: out + 0.5 * (x - x.detach())  # the output is right, one gradient is not
    for wrong in (lambda out, x: 1.03 * out, lambda out, x: float("nan") * out, half_of_dx):

        def spoiled(name, x, *inputs, wrong=wrong):
            out = forward(name, x, *inputs)
            return wrong(out, x) if name == "ours" else out

        monkeypatch.setattr(kernels, "_forward", spoiled)
        code, rows = benchmark(monkeypatch, tmp_path)
        assert code == "kernels.py: ours fails this check; nothing is timed" and rows is None
        assert " WRONG, where loop" in capsys.readouterr().out

    def stopping(error, name, *inputs):
        if name == "ours" and inputs[0].shape[1] == 24:
            raise error
        return forward(name, *inputs)

    monkeypatch.setattr(kernels, "_forward", partial(stopping, RuntimeError("an illegal memory access")))
    code, rows = benchmark(monkeypatch, tmp_path)
    assert code == "kernels.py: ours was not timed on two" and {row["shape"] for row in rows} == {"one", "two"}
    (tmp_path / "figures.json").unlink()
    monkeypatch.setattr(kernels, "_forward", partial(stopping, KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        benchmark(monkeypatch, tmp_path)
    assert {row["shape"] for row in json.loads((tmp_path / "figures.json").read_text())["rows"]} == {"one"}


def test_routings_of_the_benchmark():
    shape = (400, 2, 8, 4, 4)
    share = {}
    for routing in ("balanced", "skewed", "half empty", "half null"):
        index = kernels._route(shape, "cpu", routing)
        assert index.shape == (400, 2) and (index[:, 0] != index[:, 1])[index.max(1).values >= 0].all()
        share[routing] = [(index == expert).float().sum().item() / 400 for expert in range(-1, 8)]
    assert share["balanced"][0] == 0 and max(share["balanced"]) < 0.4
    assert share["skewed"][1] > 0.5 and share["half empty"][5:] == [0] * 4 and share["half empty"][0] == 0
    assert 0.85 < share["half null"][0] < 1.15


def test_a_slow_contender_gets_fewer_turns(monkeypatch):
    monkeypatch.setattr(kernels, "_once", lambda total: (total / 3, total, 0))
    runs = kernels._measure({"slow": (900.0,), "fast": (1.0,)}, 20)
    assert len(runs["slow"]) == 3 and len(runs["fast"]) == 20


# ---------------------------------------------------------------------------------------------------------------
# Processes of their own, started before the first test of this file
# ---------------------------------------------------------------------------------------------------------------

WITHOUT_TRITON = """
import sys; sys.modules['triton'] = None
import torch, kernels
x, w = torch.randn(3, 4), torch.randn(2, 4, 4)
print(kernels.moe_mlp(x, torch.tensor([[0], [1], [-1]]), torch.ones(3, 1), w, w)[2].tolist())
"""
CHANGES_NOTHING = """
import os, random, numpy, torch
def state():
    numbers = torch.initial_seed(), random.getstate(), torch.get_num_threads(), torch.get_default_dtype()
    return os.environ.copy(), os.listdir(), numbers
before = state()
import kernels
print(state() == before)
"""
ALONE = {  # test -> what is run in a folder that has nothing but kernels.py
    "test_works_alone_and_without_triton": ("-c", WITHOUT_TRITON),
    "test_import_changes_nothing": ("-B", "-c", CHANGES_NOTHING),
    "test_benchmark_writes_its_figures": ("kernels.py", "--shape", "experts-8", "--json", "figures.json"),
}


def test_works_alone_and_without_triton(ended):
    assert ended.stdout.strip() == "[0.0, 0.0, 0.0, 0.0]", ended.stderr


def test_import_changes_nothing(ended):
    assert ended.stdout.strip() == "True", ended.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="the shape is one of the CPU's")
def test_benchmark_writes_its_figures(ended):
    assert ended.returncode == 0 and "relative error against float64: ours" in ended.stdout, ended.stderr
    assert "WRONG" not in ended.stdout and platform.machine() in ended.stdout
    figures = json.loads((ended.folder / "figures.json").read_text())
    names = {row["contender"] for row in figures["rows"]}
    assert {"ours", "where loop", "F.grouped_mm", "padded bmm", "dense", "ours, half null"} <= names
    assert all(row["total_ms"] >= row["forward_ms"] > 0 for row in figures["rows"])
    assert not list(ended.folder.glob("*.part"))


@pytest.mark.skipif(bool(why_not_interpreted()), reason=why_not_interpreted())
def test_triton_kernels_in_the_interpreter(ended):
    assert ended.returncode == 0, ended.stdout + ended.stderr
    print(ended.stdout.strip().splitlines()[-1])
