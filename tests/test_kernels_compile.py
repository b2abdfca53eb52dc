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
SHARED_LIMIT = {
    80: 99 * 1024,
    90: 227 * 1024,
}  # bytes a block may ask for; sm_80 has 163 KB, but its rows serve sm_86, too
TENSOR_CORE = {80: "HMMA", 90: "HGMMA"}
TYPES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.int32: "*i32"}
# name: tokens, top_k, experts, d_model, d_ff, glu, act, bias, dtype
SHAPES = {
    "qwen3": (8192, 8, 128, 2048, 768, True, "silu", False, torch.bfloat16),  # 512 rows per expert, tiles of 128
    "few_rows": (1024, 8, 128, 2048, 768, True, "silu", False, torch.bfloat16),  # 64 rows per expert
    "decode": (64, 8, 128, 2048, 768, True, "silu", False, torch.bfloat16),  # 4 rows per expert, tiles of 16
    "bias": (8192, 2, 8, 512, 2048, False, "gelu", True, torch.float16),
    "odd": (8192, 2, 8, 600, 200, True, "gelu", True, torch.bfloat16),  # multiples of 8, not of 16
    "fp32": (8192, 2, 8, 512, 1024, False, "relu", True, torch.float32),
}


class Recorder:
    """Stands in for a kernel and keeps what it is launched with."""

    def __init__(self, function, launches):
        self.function, self.launches = function, launches

    def __getitem__(self, grid):
        return lambda *args, **constants: self.launches.append((self.function, args, constants))


def record(monkeypatch, shape: str, arch: int, transposed: bool = False) -> list:
    tokens, top_k, num_experts, d_model, d_ff, glu, act, bias, dtype = SHAPES[shape]
    launches = []
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
    out = kernels._MoEMLP.apply(x, gates, w1, w2, b1, b2, slot, pos, offsets, act, glu, True)
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
    tools = Path(kernels.triton.__file__).parent / "backends" / "nvidia" / "bin"
    usage = subprocess.run(
        [tools / "cuobjdump", "--dump-resource-usage", cubin], capture_output=True, text=True, check=True
    )
    code = subprocess.run([tools / "nvdisasm", "-c", cubin], capture_output=True, text=True, check=True)
    resources = {key: int(value) for key, value in re.findall(r"(REG|STACK):(\d+)", usage.stdout)}
    opcodes = re.findall(r"^\s+(?:/\*\w+\*/\s+)?(?:@!?\w+\s+)?([A-Z][A-Z0-9_]*)", code.stdout, flags=re.MULTILINE)
    counts = {
        op: opcodes.count(op)
        for op in ("HGMMA", "HMMA", "LDGSTS", "LDL", "STL", "ATOM", "ATOMG", "RED", "REDG", "FFMA")
    }
    warps = options.get("num_warps", 4)
    return resources | counts | {"shared": compiled.metadata.shared, "threads": 32 * warps, "opcodes": len(opcodes)}


# "all": every launch; "gemm": without the small kernels; "new": without those whose code the other shapes have.
@pytest.mark.parametrize(
    "shape, arch, which",
    [
        ("qwen3", 90, "all"),
        ("qwen3", 80, "all"),
        ("few_rows", 90, "gemm"),
        ("few_rows", 80, "new"),
        ("decode", 90, "new"),
    ]
    + [("decode", 80, "new"), ("bias", 90, "new"), ("bias", 80, "new"), ("odd", 90, "new"), ("fp32", 80, "new")],
)
def test_compiled_code(monkeypatch, tmp_path, shape, arch, which):
    """No spill, no atomics, registers and shared memory within limits; tensor cores and asynchronous copies in use."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    dtype, launches = SHAPES[shape][-1], record(monkeypatch, shape, arch, transposed=shape == "few_rows")
    names = [function.__name__ for function, _, _ in launches]
    assert names.count("expert_mm") == 3 and names.count("expert_dw") >= 2 and names.count("down_bwd") == 1
    assert names.count("tile_map") == 1 and names.count("combine") == 2
    for function, args, constants in launches:
        small = function.__name__ in ("combine", "tile_map")
        if (small and which != "all") or (which == "new" and constants.get("TOP_K") == 0):
            continue
        found = compile_launch(function, args, constants, arch, tmp_path)
        where = f"{function.__name__} {constants}: {found}"
        assert found["STACK"] == found["LDL"] == found["STL"] == 0, f"spills registers: {where}"
        assert found["ATOM"] == found["ATOMG"] == found["RED"] == found["REDG"] == 0, f"uses atomics: {where}"
        assert found["REG"] * found["threads"] <= 65536, f"too many registers: {where}"
        assert found["shared"] <= SHARED_LIMIT[arch], f"too much shared memory: {where}"
        if not small:
            assert found["LDGSTS"] > 0, f"no asynchronous copies: {where}"
            wide = min(constants.get("BM", 128), constants.get("BA", 128)) >= 64  # the wide instruction needs 64 rows
            core = "FFMA" if dtype == torch.float32 else TENSOR_CORE[arch] if wide else "HMMA"
            assert found[core] > 0, f"no {core}: {where}"


def test_tf32_uses_tensor_cores(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        launches = record(monkeypatch, "fp32", 80)
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    for function, args, constants in launches:
        if function.__name__ in ("expert_mm", "down_bwd"):
            assert constants["PRECISION"] == "tf32"
            found = compile_launch(function, args, constants, 80, tmp_path)
            assert found["HMMA"] > 0 and found["STACK"] == 0, found


def test_widths_and_strides_are_constants():
    """As runtime integers they would cost the asynchronous copies at widths like 600."""
    for function in (kernels.expert_mm, kernels.down_bwd, kernels.expert_dw, kernels.combine):
        runtime = [p.name for p in function.params if not p.is_constexpr]
        assert all(name.endswith("_ptr") for name in runtime), runtime


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_torch_compile_traces_one_graph(monkeypatch, dtype):
    """Forward and backward without a graph break, every launch recorded as a Triton kernel; nothing is run."""

    class Traced(Exception):
        pass

    def backend(module, inputs):
        for part in module.modules():
            if isinstance(part, torch.fx.GraphModule):
                launches.append(sum("triton_kernel" in str(node.target) for node in part.graph.nodes))
        raise Traced

    launches = []
    monkeypatch.setattr(torch.utils._triton, "has_triton", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(kernels, "_use_triton", lambda backend, *tensors: True)
    shapes = ((32, 16), (32, 2), (4, 16, 32), (4, 16, 16), (4, 32), (4, 16))
    x, gates, w1, w2, b1, b2 = (torch.randn(shape).to(dtype).requires_grad_() for shape in shapes)
    layer = torch.compile(kernels.moe_mlp, fullgraph=True, backend=backend)
    with pytest.raises(Exception, match="Traced"):
        layer(x, torch.randint(-1, 4, (32, 2)), gates, w1, w2, b1, b2, act="silu", glu=True)
    assert sorted(launches)[-2:] == [
        4,
        7,
    ]  # tiles, up, down, combine; down_bwd, two weights, two biases, rows of x, combine
