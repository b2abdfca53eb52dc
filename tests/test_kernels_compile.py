"""What the GPU compiler makes of the kernels, read without a GPU.

Every launch of a forward and backward pass is recorded on meta tensors, with the constants and tile sizes that a real
run would use, compiled ahead of time for sm_80 and sm_90, and disassembled with the tools that come with triton.
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.utils._triton

import kernels

pytestmark = pytest.mark.skipif(
    kernels.triton is None or kernels.INTERPRETED or not sys.platform.startswith("linux"),
    reason="compiling needs triton, on Linux, without TRITON_INTERPRET",
)
# Bytes a block may ask for. sm_80 has 163 KB, but its rows and those of fp32 serve sm_86, too.
SHARED_LIMIT = {80: 99 * 1024, 90: 227 * 1024}
TENSOR_CORE = {80: "HMMA", 90: "HGMMA"}
TYPES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.int32: "*i32"}
WIDTHS = {True: (600, 200), False: (512, 1024)}  # glu -> d_model, d_ff; 600 and 200 are multiples of 8, not of 16


class Recorder:
    """Stands in for a kernel and keeps what it is launched with."""

    def __init__(self, function, launches):
        self.function, self.launches = function, launches

    def __getitem__(self, grid):
        return lambda *args, **constants: self.launches.append((self.function, args, constants))


def record(monkeypatch, arch: int, dtype: torch.dtype, rows: int, glu: bool, bias=False, transposed=False) -> list:
    """The launches of one forward and backward pass, with `rows` rows per expert."""
    top_k, num_experts, (d_model, d_ff), launches = 2, 8, WIDTHS[glu], []
    tokens = rows * num_experts // top_k
    for name in ("tile_map", "expert_mm", "down_bwd", "expert_dw", "combine"):
        monkeypatch.setattr(kernels, name, Recorder(getattr(kernels, name), launches))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: divmod(arch, 10))

    def new(*size, dtype=dtype):
        return torch.empty(*size, dtype=dtype, device="meta", requires_grad=dtype.is_floating_point)

    x, gates = new(tokens, d_model), new(tokens, top_k, dtype=torch.float32)
    hidden = d_ff * (2 if glu else 1)
    w1, w2 = new(num_experts, d_model, hidden), new(num_experts, d_ff, d_model)
    if transposed:
        w1, w2 = (new(num_experts, hidden, d_model).transpose(1, 2), new(num_experts, d_model, d_ff).transpose(1, 2))
    b1, b2 = (new(num_experts, hidden), new(num_experts, d_model)) if bias else (None, None)
    slot, pos = new(tokens * top_k, dtype=torch.int32), new(tokens, top_k, dtype=torch.int32)
    offsets = new(num_experts + 1, dtype=torch.int32)
    out = kernels._MoEMLP.apply(x, gates, w1, w2, b1, b2, slot, pos, offsets, "silu" if glu else "gelu", glu, True)
    out.backward(torch.empty_like(out))
    return launches


def compile_launch(function, args, constants, arch: int, folder: Path) -> dict:
    """Registers, spills, shared memory and instruction counts of one launch."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    options = {key: constants[key] for key in ("num_warps", "num_stages") if key in constants}
    values = dict(zip(function.arg_names, args)) | {k: v for k, v in constants.items() if k not in options}
    signature, constexprs, attributes = {}, {}, {}
    for i, name in enumerate(function.arg_names):
        if isinstance(values[name], torch.Tensor):
            signature[name] = TYPES[values[name].dtype]
            attributes[(i,)] = [["tt.divisibility", 16]]
        elif function.params[i].is_constexpr or values[name] is None:
            signature[name], constexprs[(i,)] = "constexpr", values[name]
        else:
            signature[name] = "i32"
    source = ASTSource(function, signature, constexprs, attributes)
    compiled = kernels.triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])

    def ask(tool, *flags):
        path = Path(kernels.triton.__file__).parent / "backends" / "nvidia" / "bin" / tool
        return subprocess.run([path, *flags, cubin], capture_output=True, text=True, check=True).stdout

    resources = {k: int(v) for k, v in re.findall(r"(REG|STACK):(\d+)", ask("cuobjdump", "--dump-resource-usage"))}
    code = ask("nvdisasm", "-c")
    opcodes = re.findall(r"^\s+(?:/\*\w+\*/\s+)?(?:@!?\w+\s+)?([A-Z][A-Z0-9_]*)", code, flags=re.MULTILINE)
    asked = ("HGMMA", "HMMA", "LDGSTS", "LDL", "STL", "ATOM", "ATOMG", "RED", "REDG", "FFMA")
    counts = {op: opcodes.count(op) for op in asked}
    warps = options.get("num_warps", 4)
    return resources | counts | {"shared": compiled.metadata.shared, "threads": 32 * warps, "opcodes": len(opcodes)}


def check(launch: tuple, arch: int, folder: Path) -> None:
    """No spill, no atomics, registers and shared memory within limits; tensor cores and asynchronous copies in use."""
    function, args, constants = launch
    found = compile_launch(*launch, arch, folder)
    where = f"{function.__name__} {constants}: {found}"
    assert found["STACK"] == found["LDL"] == found["STL"] == 0, f"spills registers: {where}"
    assert found["ATOM"] == found["ATOMG"] == found["RED"] == found["REDG"] == 0, f"uses atomics: {where}"
    assert found["REG"] * found["threads"] <= 65536, f"too many registers: {where}"
    fp32 = args[0].dtype == torch.float32
    assert found["shared"] <= SHARED_LIMIT[80 if fp32 else arch], f"too much shared memory: {where}"
    if function.__name__ not in ("combine", "tile_map"):
        assert found["LDGSTS"] > 0, f"no asynchronous copies: {where}"
        wide = min(constants.get("BM", 128), constants.get("BA", 128)) >= 64  # the wide instruction needs 64 rows
        core = "FFMA" if fp32 and constants["PRECISION"] == "ieee" else TENSOR_CORE[arch] if wide else "HMMA"
        assert found[core] > 0, f"no {core}: {where}"


@pytest.mark.parametrize("arch", [90, 80])
def test_weights_as_linear_layers_keep_them(monkeypatch, tmp_path, arch):
    """[out, in], as in checkpoints and in the benchmark, are views here: every launch with the largest tiles."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for launch in record(monkeypatch, arch, torch.bfloat16, 512, glu=True, transposed=True):
        if launch[0].__name__ not in ("combine", "tile_map"):
            check(launch, arch, tmp_path)


@pytest.mark.parametrize("glu", [True, False])
@pytest.mark.parametrize("arch", [90, 80])
@pytest.mark.parametrize(
    "dtype, rows",  # the columns of the tile table; for fp32, the last two are equal
    [(torch.bfloat16, 512), (torch.bfloat16, 64), (torch.bfloat16, 32), (torch.float32, 512), (torch.float32, 64)],
)
def test_every_row_of_the_tile_table(monkeypatch, tmp_path, arch, dtype, rows, glu):
    """The up projection and down_bwd with GLU and without, and the gradient of w1."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for launch in record(monkeypatch, arch, dtype, rows, glu):
        if launch[2].get("TOP_K") or (glu and launch[2].get("A_TOP_K")):
            check(launch, arch, tmp_path)


def test_fp32_has_two_columns():
    """So that the test above reaches every row."""
    assert all(row[1] == row[2] for (family, _), row in kernels._TILES.items() if family == "fp32")


@pytest.mark.parametrize("arch", [90, 80])
def test_the_other_launches(monkeypatch, tmp_path, arch):
    """Tiles of 16 rows, fp16, biases, weights that are transposed views; combine and tile_map."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    launches = record(monkeypatch, arch, torch.float16, 16, glu=False, bias=True, transposed=True)
    names = [function.__name__ for function, _, _ in launches]
    assert (
        names
        == [*"tile_map expert_mm expert_mm combine down_bwd expert_dw expert_dw expert_mm combine".split()]
        + ["expert_dw"] * 2
    )
    for launch in launches:
        if launch[0].__name__ not in ("down_bwd", "expert_mm") or not launch[2]["TOP_K"]:
            check(launch, arch, tmp_path)


def test_tf32_uses_tensor_cores(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        launches = record(monkeypatch, 80, torch.float32, 512, glu=True)
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    for launch in launches:
        if launch[2].get("TOP_K"):
            assert launch[2]["PRECISION"] == "tf32"
            check(launch, 80, tmp_path)


def test_combine_holds_many_picks_in_registers(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    launches = []
    monkeypatch.setattr(kernels, "combine", Recorder(kernels.combine, launches))
    y, index = (torch.empty(64, n, device="meta", dtype=d) for n, d in ((2048, torch.bfloat16), (64, torch.int32)))
    kernels._combine(y, index)
    check(launches[0], 90, tmp_path)


def test_widths_and_strides_are_constants():
    """As runtime integers they would cost the asynchronous copies at widths like 600."""
    for function in (kernels.expert_mm, kernels.down_bwd, kernels.expert_dw, kernels.combine):
        runtime = [p.name for p in function.params if not p.is_constexpr]
        assert all(name.endswith("_ptr") for name in runtime), runtime


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "dtype, interpreted", [(torch.bfloat16, False), (torch.float32, False), (torch.bfloat16, True)]
)
def test_torch_compile_traces_one_graph(monkeypatch, dtype, interpreted):
    """Forward and backward without a graph break, every launch recorded as a Triton kernel; nothing is run."""

    class Traced(Exception):
        """The graph is there; nothing needs to run."""

    def backend(module, inputs):
        for part in module.modules():
            if isinstance(part, torch.fx.GraphModule):
                launches.append(sum("triton_kernel" in str(node.target) for node in part.graph.nodes))
        raise Traced

    launches = []
    monkeypatch.setattr(torch.utils._triton, "has_triton", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(kernels, "INTERPRETED", interpreted)  # then _use_triton accepts what is on the CPU, itself
    if not interpreted:
        monkeypatch.setattr(kernels, "_use_triton", lambda backend, *tensors: True)
    shapes = ((32, 16), (32, 2), (4, 16, 32), (4, 16, 16), (4, 32), (4, 16))
    x, gates, w1, w2, b1, b2 = (torch.randn(shape).to(dtype).requires_grad_() for shape in shapes)
    layer = torch.compile(kernels.moe_mlp, fullgraph=True, backend=backend)
    with pytest.raises(Exception, match="Traced"):
        layer(x, torch.randint(-1, 4, (32, 2)), gates, w1, w2, b1, b2, act="silu", glu=True)
    # Forward: tiles, up, down, combine. Backward: down_bwd, two weights, two biases, rows of x, combine.
    assert sorted(launches)[-2:] == [4, 7]
