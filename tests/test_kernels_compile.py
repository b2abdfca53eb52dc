"""What the GPU compiler makes of the kernels, read without a GPU.

The launches of a forward and backward pass are recorded on meta tensors, with the constants and
tile sizes that a real run would use, and compiled ahead of time for sm_80 and sm_90: each distinct
one once, in a process of its own that goes on beside the other tests. Triton keeps what it has
compiled, under a key of kernel, constants, options and versions.
"""

import ast
import functools
import json
import os
import re
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from forked import ended

import kernels

pytestmark = pytest.mark.skipif(
    kernels.triton is None or kernels.INTERPRETED or not sys.platform.startswith("linux"),
    reason="compiling needs triton, on Linux, without TRITON_INTERPRET",
)
# Bytes a block may ask for. sm_80 has 163 KB, but its rows and those of fp32 serve sm_86, too.
SHARED_LIMIT = {80: 99 * 1024, 90: 227 * 1024}
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
    """A forward and backward pass; `table`: whose launches reach the rows of the tile table."""

    arch: int
    dtype: torch.dtype
    rows: int  # per expert
    glu: bool
    table: bool = True

    def __str__(self) -> str:
        return f"sm_{self.arch} {str(self.dtype)[6:]} {self.rows}{' glu' * self.glu}"

    def looks_at(self, name: str, constants: dict) -> bool:
        """Up projection and down_bwd, and with GLU the gradient of w1. Of down_bwd without GLU,
        which is part of that with it, the largest tiles. Without `table`, all but these."""
        if not self.table:
            return name not in ("down_bwd", "expert_mm") or not constants["TOP_K"]
        if self.glu:
            return bool(constants.get("TOP_K") or constants.get("A_TOP_K"))
        return bool(constants.get("TOP_K")) and (name == "expert_mm" or self.rows == 512)


# The columns of the tile table. The rows of fp32 serve all GPUs: sm_80 has the narrowest limits.
COLUMNS = [(arch, torch.bfloat16, rows) for arch in (90, 80) for rows in (512, 64, 32)]
COLUMNS += [(80, torch.float32, rows) for rows in (512, 64)]  # the last two are equal
TABLE = [Case(*column, glu) for column in COLUMNS for glu in (True, False)]
OTHERS = Case(80, torch.float16, 16, False, table=False)


def record(case: Case) -> list:
    """All launches: kernel, arguments, constants. With biases and transposed weights in OTHERS."""
    top_k, num_experts, (d_model, d_ff), launches = 2, 8, WIDTHS[case.glu], []
    tokens = case.rows * num_experts // top_k

    def new(*size, dtype=case.dtype):
        return torch.empty(*size, dtype=dtype, device="meta", requires_grad=dtype.is_floating_point)

    x, gates = new(tokens, d_model), new(tokens, top_k, dtype=torch.float32)
    hidden = d_ff * (2 if case.glu else 1)
    w1, w2 = new(num_experts, d_model, hidden), new(num_experts, d_ff, d_model)
    b1 = b2 = None
    if not case.table:
        w1 = new(num_experts, hidden, d_model).transpose(1, 2)
        w2 = new(num_experts, d_model, d_ff).transpose(1, 2)
        b1, b2 = new(num_experts, hidden), new(num_experts, d_model)
    slot, pos = new(tokens * top_k, dtype=torch.int32), new(tokens, top_k, dtype=torch.int32)
    offsets = new(num_experts + 1, dtype=torch.int32)
    # gelu, whose erf takes the compiler seconds, where the tiles are largest
    act = "gelu" if case.rows == 512 and not case.glu else "silu"
    with pytest.MonkeyPatch.context() as patch:
        for name in ("tile_map", "expert_mm", "down_bwd", "expert_dw", "combine"):
            patch.setattr(kernels, name, Recorder(getattr(kernels, name), launches))
        capability = divmod(case.arch, 10)
        patch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        tensors = (x, gates, w1, w2, b1, b2, slot, pos, offsets)
        out, *_ = kernels._MoEMLP.apply(*tensors, act, case.glu, True)
        out.backward(torch.empty_like(out))
    return launches


@functools.cache
def looked_at(case: Case) -> dict:
    """{identity: launch}; launches of one identity are compiled to the same code."""
    found = {}
    for launch in record(case):
        function, args, constants = launch
        if case.looks_at(function.__name__, constants):
            types = [str(arg.dtype if isinstance(arg, torch.Tensor) else arg) for arg in args]
            identity = f"{case.arch} {function.__name__} {types} {sorted(constants.items())}"
            found[identity] = launch
    return found


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


def one_at_a_time(function):
    lock = threading.Lock()

    def locked(*args, **options):
        with lock:
            return function(*args, **options)

    return locked  # Python 3.11's parser counts its depth for all threads together


def compile_all(folder: Path) -> None:
    """Into folder/found.json: {identity: registers, stack, shared memory, instructions}."""
    launches, found = {}, {}
    for case in (*TABLE, OTHERS):
        launches |= {name: (launch, case.arch) for name, launch in looked_at(case).items()}
    ast.parse = one_at_a_time(ast.parse)
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        kept = list(pool.map(to_cubin, *zip(*launches.values())))
    tool = Path(kernels.triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    for name, compiled in zip(launches, kept):
        file = folder / "cubin"
        file.write_bytes(compiled.asm["cubin"])
        command = [tool, file, "--dump-resource-usage"]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        found[name] = {key: int(n) for key, n in re.findall(r"(REG|STACK):(\d+)", usage)}
        for instruction in ("cp.async", "wgmma.mma_async", "mma.sync", "fma.rn.f32", "atom", "red"):
            pattern = rf"^\s*(@!?%\w+ )?{re.escape(instruction)}\b"
            count = len(re.findall(pattern, compiled.asm["ptx"], flags=re.MULTILINE))
            found[name][instruction] = count
        found[name]["shared"] = compiled.metadata.shared
        found[name]["threads"] = 32 * compiled.metadata.num_warps
    (folder / "found.json").write_text(json.dumps(found))


def compile_beside(fork, folder: Path) -> dict:
    assert ended(fork.call(compile_all, folder)) == 0
    return json.loads((folder / "found.json").read_text())


def check(launch: tuple, arch: int, found: dict) -> None:
    """No spill, no atomics, within limits; tensor cores and asynchronous copies in use."""
    function, args, constants = launch
    where = f"{function.__name__} {constants}: {found}"
    assert found["STACK"] == 0, f"spills registers: {where}"
    assert found["atom"] == found["red"] == 0, f"uses atomics: {where}"
    assert found["REG"] * found["threads"] <= 65536, f"too many registers: {where}"
    fp32 = args[0].dtype == torch.float32
    assert found["shared"] <= SHARED_LIMIT[80 if fp32 else arch], f"too much shared memory: {where}"
    if function.__name__ not in ("combine", "tile_map"):
        assert found["cp.async"] > 0, f"no asynchronous copies: {where}"
        # the wide instruction needs 64 rows
        wide = min(constants.get("BM", 128), constants.get("BA", 128)) >= 64
        core = "wgmma.mma_async" if wide and arch == 90 else "mma.sync"
        if fp32:
            core = "fma.rn.f32"
        assert found[core] > 0, f"no {core}: {where}"


@pytest.mark.beside(run=compile_beside)
def test_every_row_of_the_tile_table(beside):
    for case in TABLE:
        launches = looked_at(case)
        assert len(launches) == (3 if case.glu else 1 + (case.rows == 512)), str(case)
        for identity, launch in launches.items():
            check(launch, case.arch, beside[identity])
    # The columns above reach every row because:
    assert all(row[1] == row[2] for (family, _), row in kernels._TILES.items() if family == "fp32")


@pytest.mark.beside(run=compile_beside)
def test_the_other_launches(beside):
    """Tiles of 16 rows, fp16, biases, weights that are transposed views; combine and tile_map."""
    names = [function.__name__ for function, _, _ in record(OTHERS)]
    forward = "tile_map expert_mm expert_mm combine"
    backward = "down_bwd expert_dw expert_dw expert_mm combine expert_dw expert_dw"
    assert names == f"{forward} {backward}".split()
    for identity, launch in looked_at(OTHERS).items():
        check(launch, OTHERS.arch, beside[identity])


def test_widths_and_strides_are_constants():
    """As runtime integers they would cost the asynchronous copies at widths like 600."""
    for function in (kernels.expert_mm, kernels.down_bwd, kernels.expert_dw, kernels.combine):
        runtime = [p.name for p in function.params if not p.is_constexpr]
        assert all(name.endswith("_ptr") for name in runtime), runtime
