"""What the GPU compiler makes of the kernels, read without a GPU.

Every launch of a forward and backward pass is recorded on meta tensors, with the constants and tile
sizes that a real run would use, compiled ahead of time for sm_80 and sm_90, and disassembled with
the tools that come with triton. All launches of the tests that were chosen are compiled before the
first of them: each distinct one once, on all cores. Triton keeps what it has compiled in pytest's
cache (`--cache-clear` empties it), under a key of kernel, constants, options and versions.
"""

import ast
import functools
import os
import re
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

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
TYPES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
TYPES[torch.int32] = "*i32"
# glu -> d_model, d_ff; 600 and 200 are multiples of 8, not of 16
WIDTHS = {True: (600, 200), False: (512, 1024)}


class Recorder:
    """Stands in for a kernel and keeps what it is launched with."""

    def __init__(self, function, launches):
        self.function, self.launches = function, launches

    def __getitem__(self, grid):
        return lambda *args, **constants: self.launches.append((self.function, args, constants))


class Case(NamedTuple):
    """A forward and backward pass, and which of its launches a test looks at."""

    arch: int
    dtype: torch.dtype
    rows: int  # per expert
    glu: bool
    looked_at: Callable  # (case, name of the kernel, constants of the launch) -> bool
    bias: bool = False
    transposed: bool = False
    precision: str = "ieee"

    @property
    def act(self) -> str:
        """gelu, whose erf takes the compiler seconds, where the tiles are largest."""
        return "gelu" if self.rows == 512 and not self.glu else "silu"

    def __str__(self) -> str:
        return f"sm_{self.arch} {str(self.dtype)[6:]} {self.rows}{' glu' * self.glu}"


def record(case: Case) -> list:
    """All launches: kernel, arguments, constants."""
    dtype, glu = case.dtype, case.glu
    top_k, num_experts, (d_model, d_ff), launches = 2, 8, WIDTHS[glu], []
    tokens = case.rows * num_experts // top_k

    def new(*size, dtype=dtype):
        return torch.empty(*size, dtype=dtype, device="meta", requires_grad=dtype.is_floating_point)

    x, gates = new(tokens, d_model), new(tokens, top_k, dtype=torch.float32)
    hidden = d_ff * (2 if glu else 1)
    w1, w2 = new(num_experts, d_model, hidden), new(num_experts, d_ff, d_model)
    if case.transposed:
        w1 = new(num_experts, hidden, d_model).transpose(1, 2)
        w2 = new(num_experts, d_model, d_ff).transpose(1, 2)
    b1, b2 = (new(num_experts, hidden), new(num_experts, d_model)) if case.bias else (None, None)
    slot, pos = new(tokens * top_k, dtype=torch.int32), new(tokens, top_k, dtype=torch.int32)
    offsets = new(num_experts + 1, dtype=torch.int32)
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = case.precision
    try:
        with pytest.MonkeyPatch.context() as patch:
            for name in ("tile_map", "expert_mm", "down_bwd", "expert_dw", "combine"):
                patch.setattr(kernels, name, Recorder(getattr(kernels, name), launches))
            capability = divmod(case.arch, 10)
            patch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
            tensors = (x, gates, w1, w2, b1, b2, slot, pos, offsets)
            out, *_ = kernels._MoEMLP.apply(*tensors, case.act, glu, True)
            out.backward(torch.empty_like(out))
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    return launches


@functools.cache
def looked_at(case: Case) -> list:
    launches = record(case)
    return [launch for launch in launches if case.looked_at(case, launch[0].__name__, launch[2])]


@functools.cache
def combine_of_many_picks() -> tuple:
    launches = []
    y = torch.empty(64, 2048, device="meta", dtype=torch.bfloat16)
    index = torch.empty(64, 64, device="meta", dtype=torch.int32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "combine", Recorder(kernels.combine, launches))
        kernels._combine(y, index)
    return launches[0]


def identity(launch: tuple, arch: int) -> tuple:
    """Launches that are equal in this are compiled to the same code."""
    function, args, constants = launch
    types = (arg.dtype if isinstance(arg, torch.Tensor) else arg for arg in args)
    return function.__name__, *types, *sorted(constants.items()), arch


def to_cubin(launch: tuple, arch: int):
    """The launch, compiled."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function, args, constants = launch
    options = {key: constants[key] for key in ("num_warps", "num_stages") if key in constants}
    values = dict(zip(function.arg_names, args)) | constants
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
    return kernels.triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def instructions(cubin: bytes) -> bytes:
    """The one section of code of an ELF file of 64 bits."""
    (start,) = struct.unpack_from("<Q", cubin, 40)
    size, count, names = struct.unpack_from("<3H", cubin, 58)
    # name, .., offset, size
    sections = [struct.unpack_from("<2I4Q", cubin, start + i * size) for i in range(count)]
    names = cubin[sections[names][4] :]
    (code,) = (s for s in sections if names[s[0] :].startswith(b".text."))
    return cubin[code[4] : code[4] + code[5]]


def one_at_a_time(function):
    lock = threading.Lock()

    def locked(*args, **options):
        with lock:
            return function(*args, **options)

    return locked  # Python 3.11's parser counts its depth for all threads together


OPCODE = r"^\s+/\*\w+\*/\s+(?:@!?\w+\s+)?([A-Z][A-Z0-9_]*)"
COUNTED = ("HGMMA", "HMMA", "LDGSTS", "LDL", "STL", "ATOM", "ATOMG", "RED", "REDG", "FFMA")


def ask(tool: str, file: Path, content: bytes, *flags: str) -> str:
    """What one of the tools beside triton prints of this content."""
    path = Path(kernels.triton.__file__).parent / "backends" / "nvidia" / "bin" / tool
    file.write_bytes(content)
    return subprocess.run([path, *flags, file], capture_output=True, text=True, check=True).stdout


def compile_all(launches: list, cache: Path, folder: Path) -> list[dict]:
    """Registers, spills, shared memory and instruction counts of every (launch, arch)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(cache))
        patch.setattr(ast, "parse", one_at_a_time(ast.parse))
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            kept = list(pool.map(to_cubin, *zip(*launches)))
    codes, found = [instructions(compiled.asm["cubin"]) for compiled in kept], [None] * len(kept)
    file = folder / "content"
    for arch in {arch for _, arch in launches}:  # the disassembler takes long to start: once each
        chosen = [i for i, launch in enumerate(launches) if launch[1] == arch]
        code = b"".join(codes[i] for i in chosen)
        printed = ask("nvdisasm", file, code, "--binary", f"SM{arch}{'a' * (arch >= 90)}")
        opcodes = re.findall(OPCODE, printed, flags=re.MULTILINE)
        assert len(opcodes) * 16 == len(code)  # an instruction takes 16 bytes
        for i in chosen:
            own, opcodes = opcodes[: len(codes[i]) // 16], opcodes[len(codes[i]) // 16 :]
            usage = ask("cuobjdump", file, kept[i].asm["cubin"], "--dump-resource-usage")
            found[i] = {name: int(n) for name, n in re.findall(r"(REG|STACK):(\d+)", usage)}
            found[i] |= {name: own.count(name) for name in COUNTED}
            found[i]["shared"] = kept[i].metadata.shared
            found[i]["threads"] = 32 * kept[i].metadata.num_warps
    return found


@pytest.fixture(scope="module")
def compiled(request, tmp_path_factory) -> dict:
    """What has become of every launch that the tests chosen look at."""
    chosen = {identity(combine_of_many_picks(), 90): (combine_of_many_picks(), 90)}
    for item in request.session.items:
        if item.module is request.module and "case" in item.fixturenames:
            case = item.callspec.params["case"]
            for launch in looked_at(case):
                chosen[identity(launch, case.arch)] = (launch, case.arch)
    folder = tmp_path_factory.mktemp("cubins")
    kept = getattr(request.config, "cache", None)  # -p no:cacheprovider: none
    cache = kept.mkdir("triton") if kept else folder
    return dict(zip(chosen, compile_all(list(chosen.values()), cache, folder)))


def check(launch: tuple, arch: int, found: dict) -> None:
    """No spill, no atomics, within limits; tensor cores and asynchronous copies in use."""
    function, args, constants = launch
    where = f"{function.__name__} {constants}: {found}"
    assert found["STACK"] == found["LDL"] == found["STL"] == 0, f"spills registers: {where}"
    atomics = [found[name] for name in ("ATOM", "ATOMG", "RED", "REDG")]
    assert not any(atomics), f"uses atomics: {where}"
    assert found["REG"] * found["threads"] <= 65536, f"too many registers: {where}"
    fp32 = args[0].dtype == torch.float32
    assert found["shared"] <= SHARED_LIMIT[80 if fp32 else arch], f"too much shared memory: {where}"
    if function.__name__ not in ("combine", "tile_map"):
        assert found["LDGSTS"] > 0, f"no asynchronous copies: {where}"
        # the wide instruction needs 64 rows
        wide = min(constants.get("BM", 128), constants.get("BA", 128)) >= 64
        core = TENSOR_CORE[arch] if wide else "HMMA"
        if fp32 and constants["PRECISION"] == "ieee":
            core = "FFMA"
        assert found[core] > 0, f"no {core}: {where}"


def check_all(case: Case, compiled: dict) -> list:
    """The launches that were checked."""
    launches = looked_at(case)
    assert launches
    for launch in launches:
        check(launch, case.arch, compiled[identity(launch, case.arch)])
    return launches


def with_tiles(case: Case, name: str, constants: dict) -> bool:
    return name not in ("combine", "tile_map")


def gathers(case: Case, name: str, constants: dict) -> bool:
    """Up projection and down_bwd, and with GLU the gradient of w1. Of down_bwd without GLU, which
    is part of that with it, the largest tiles."""
    if case.glu:
        return bool(constants.get("TOP_K") or constants.get("A_TOP_K"))
    return bool(constants.get("TOP_K")) and (name == "expert_mm" or case.rows == 512)


def not_in_the_table(case: Case, name: str, constants: dict) -> bool:
    return name not in ("down_bwd", "expert_mm") or not constants["TOP_K"]


def multiplies_tokens(case: Case, name: str, constants: dict) -> bool:
    return bool(constants.get("TOP_K"))


# The columns of the tile table. The rows of fp32 serve all GPUs: sm_80 has the narrowest limits.
COLUMNS = [(arch, torch.bfloat16, rows) for arch in (90, 80) for rows in (512, 64, 32)]
COLUMNS += [(80, torch.float32, rows) for rows in (512, 64)]  # the last two are equal
TABLE = [Case(*column, glu, gathers) for column in COLUMNS for glu in (True, False)]
VIEWS = {"bias": True, "transposed": True}
LINEAR = [Case(90, torch.bfloat16, 512, True, with_tiles, **VIEWS)]
OTHERS = [Case(80, torch.float16, 16, False, not_in_the_table, **VIEWS)]
TF32 = [Case(80, torch.float32, 512, True, multiplies_tokens, precision="tf32")]


@pytest.mark.parametrize("case", TABLE, ids=str)
def test_every_row_of_the_tile_table(case, compiled):
    assert len(check_all(case, compiled)) == (3 if case.glu else 1 + (case.rows == 512))
    # The columns above reach every row because:
    assert all(row[1] == row[2] for (family, _), row in kernels._TILES.items() if family == "fp32")


@pytest.mark.parametrize("case", LINEAR, ids=str)
def test_weights_as_linear_layers_keep_them(case, compiled):
    """[out, in], as in checkpoints and in the benchmark, are views: the largest tiles of all."""
    assert len(check_all(case, compiled)) == 8


@pytest.mark.parametrize("case", OTHERS, ids=str)
def test_the_other_launches(case, compiled):
    """Tiles of 16 rows, fp16, biases, weights that are transposed views; combine and tile_map."""
    forward = "tile_map expert_mm expert_mm combine"
    backward = "down_bwd expert_dw expert_dw expert_mm combine expert_dw expert_dw"
    names = [function.__name__ for function, _, _ in record(case)]
    assert names == f"{forward} {backward}".split()
    assert len(check_all(case, compiled)) == len(names) - 2


@pytest.mark.parametrize("case", TF32, ids=str)
def test_tf32_uses_tensor_cores(case, compiled):
    launches = check_all(case, compiled)
    assert [constants["PRECISION"] for _, _, constants in launches] == ["tf32"] * 2


def test_combine_holds_many_picks_in_registers(compiled):
    launch = combine_of_many_picks()
    check(launch, 90, compiled[identity(launch, 90)])


def test_widths_and_strides_are_constants():
    """As runtime integers they would cost the asynchronous copies at widths like 600."""
    for function in (kernels.expert_mm, kernels.down_bwd, kernels.expert_dw, kernels.combine):
        runtime = [p.name for p in function.params if not p.is_constexpr]
        assert all(name.endswith("_ptr") for name in runtime), runtime


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype, interpreted", [(torch.float32, False), (torch.bfloat16, True)])
def test_torch_compile_traces_one_graph(monkeypatch, dtype, interpreted):
    """Forward and backward without a graph break, every launch a Triton kernel; nothing is run."""

    class Traced(Exception):
        """The graph is there; nothing needs to run."""

    def backend(module, inputs):
        for part in module.modules():
            if isinstance(part, torch.fx.GraphModule):
                targets = [str(node.target) for node in part.graph.nodes]
                launches.append(sum("triton_kernel" in target for target in targets))
        raise Traced

    launches = []
    monkeypatch.setattr(torch.utils._triton, "has_triton", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    # interpreted, _use_triton itself accepts what is on the CPU
    monkeypatch.setattr(kernels, "INTERPRETED", interpreted)
    if not interpreted:
        monkeypatch.setattr(kernels, "_use_triton", lambda *arguments: True)
    shapes = ((32, 16), (32, 2), (4, 16, 32), (4, 16, 16), (4, 32), (4, 16))
    x, gates, w1, w2, b1, b2 = (torch.randn(shape).to(dtype).requires_grad_() for shape in shapes)
    layer = torch.compile(kernels.moe_mlp, fullgraph=True, backend=backend)
    with pytest.raises(Exception, match="Traced"):
        layer(x, torch.randint(-1, 4, (32, 2)), gates, w1, w2, b1, b2, act="silu", glu=True)
    # Forward: tiles, up, down, combine.
    # Backward: down_bwd, two weights, two biases, rows of x, combine.
    assert sorted(launches)[-2:] == [4, 7]
