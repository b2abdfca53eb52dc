"""The expert kernels against float64, then against the clock, on this machine's GPU or on one thread of its CPU.

What is timed is one mixture layer with silu(gate) * up: forward and backward, or forward alone for the shapes named
"decode". All contenders of a shape get the same numbers and take turns, in alternating order, so that whatever slows
the machine slows all of them; a ratio is taken within each turn, and its median is printed. "dense" is one MLP of
equal FLOPs, without routing: what the sorting, gathering and scattering of a mixture can at best hide behind.

    total_vs_dense   speed as a share of the dense layer's      of_best    as a share of the fastest contender's
    of_floor         as a share of what arithmetic and memory of this machine allow: every launch takes the longer of
                     FLOPs / (FLOP/s of a large product) and bytes / (bytes/s of a large copy), every tensor moved once
    peak_mib         memory beyond the inputs, beside what the tensors should take (GPU)
    spread           quartile distance over median of the turns; "ours again" times ours twice: what differs is noise

Run      python results/benchmark_kernels.py [--shape NAME ...] [--json PATH] [--plot PATH]
Draw     python results/benchmark_kernels.py --from JSON [JSON ...] --plot PATH       times nothing
Peers    transformers' experts, ScatterMoE and Liger join where they can be imported; Liger only with --liger, since
         its autotuner tries 240 candidates a shape, which takes half an hour.
"""

import argparse
import concurrent.futures
import contextlib
import ctypes
import importlib.util
import json
import multiprocessing
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import kernels  # noqa: E402

# -------------------------------------------------------------------------------------------------
# Shapes and inputs
# -------------------------------------------------------------------------------------------------


class Shape(NamedTuple):
    tokens: int
    top_k: int
    num_experts: int
    d_model: int
    d_ff: int
    train: bool = True  # False: forward alone, without gradients, as in decoding

    def __str__(self) -> str:
        picks = f"{self.top_k} of {self.num_experts} experts"
        return f"{self.tokens:,} tokens, {picks}, {self.d_model} x {self.d_ff}"


# The kernels have three columns of tiles: from 128 rows an expert, from 48, and below. Of each family of models one
# shape a column, the most telling first.
GPU_SHAPES = {
    "qwen3-8k": Shape(8192, 8, 128, 2048, 768),
    "qwen3-1k": Shape(1024, 8, 128, 2048, 768),  # 64 rows an expert
    "qwen3-decode": Shape(64, 8, 128, 2048, 768, train=False),  # 4
    "mixtral-8k": Shape(8192, 2, 8, 4096, 14336),
    "mixtral-256": Shape(256, 2, 8, 4096, 14336),  # 64
    "mixtral-decode": Shape(16, 2, 8, 4096, 14336, train=False),  # 4
    "olmoe-8k": Shape(8192, 8, 64, 2048, 1024),
    "deepseek-4k": Shape(4096, 8, 256, 7168, 2048),  # 128
    "deepseek-decode": Shape(128, 8, 256, 7168, 2048, train=False),  # 4
    "teaching": Shape(8192, 2, 8, 512, 2048),
    "tiny": Shape(4096, 2, 16, 128, 256),
    "qwen3-32k": Shape(32768, 8, 128, 2048, 768),
    "olmoe-32k": Shape(32768, 8, 64, 2048, 1024),
    "deepseek-16k": Shape(16384, 8, 256, 7168, 2048),
}
CPU_SHAPES = {
    "512-8of64-64x64": Shape(512, 8, 64, 64, 64),
    "512-2of64-256x256": Shape(512, 2, 64, 256, 256),
    "512-2of8-1024x512": Shape(512, 2, 8, 1024, 512),
    "2k-2of8-64x128": Shape(2048, 2, 8, 64, 128),
    "2k-2of8-256x512": Shape(2048, 2, 8, 256, 512),
    "2k-8of64-64x64": Shape(2048, 8, 64, 64, 64),
    "2k-8of64-256x128": Shape(2048, 8, 64, 256, 128),
    "8k-2of8-64x128": Shape(8192, 2, 8, 64, 128),
    "8k-8of64-64x64": Shape(8192, 8, 64, 64, 64),
    "decode-1-8of64-256x256": Shape(1, 8, 64, 256, 256, train=False),
    "decode-16-8of64-64x64": Shape(16, 8, 64, 64, 64, train=False),
}
CHECKED = Shape(1024, 2, 8, 192, 320)  # where all are compared with float64
DTYPE = {"cuda": torch.bfloat16, "cpu": torch.float32}
BOUND = {"cuda": 2e-2, "cpu": 1e-5}  # relative error beyond which a result is wrong


class Problem(NamedTuple):
    x: Tensor  # [tokens, d_model]
    expert_index: Tensor  # [tokens, top_k]
    gates: Tensor  # [tokens, top_k], fp32
    w1: Tensor  # [num_experts, d_model, 2 * d_ff], columns gate | up
    w2: Tensor  # [num_experts, d_ff, d_model]
    d_out: Tensor  # [tokens, d_model], the gradient of the output

    def leaves(self) -> list[Tensor]:
        return [self.x, self.gates, self.w1, self.w2]


def make_problem(shape: Shape, device: str) -> Problem:
    """Random numbers, never zeros: those draw less power, and time too well."""
    new = partial(torch.randn, device=device, dtype=DTYPE[device])
    x = new(shape.tokens, shape.d_model)
    d_out = new(shape.tokens, shape.d_model)
    gates = torch.rand(shape.tokens, shape.top_k, device=device).softmax(dim=-1)
    # On a GPU stored as nn.Linear does, [out, in]: peers take nothing else, ours takes either.
    w1 = new(shape.num_experts, 2 * shape.d_ff, shape.d_model).mul_(shape.d_model**-0.5).mT
    w2 = new(shape.num_experts, shape.d_model, shape.d_ff).mul_(shape.d_ff**-0.5).mT
    if device == "cpu":  # there all but transformers like [in, out] more
        w1 = w1.contiguous()
        w2 = w2.contiguous()
    problem = Problem(x, route(shape, device), gates, w1, w2, d_out)
    for leaf in problem.leaves():
        leaf.requires_grad_(shape.train)
    return problem


def route(shape: Shape, device: str, routing: str = "balanced") -> Tensor:
    """expert_index [tokens, top_k], random. skewed: every second token goes to expert 0."""
    score = torch.rand(shape.tokens, shape.num_experts, device=device)
    if routing == "skewed":
        score[::2, 0] += 1
    if routing == "half empty":
        score[:, shape.num_experts // 2 :] -= 1
    expert_index = score.topk(shape.top_k).indices
    if routing == "half null":
        null = torch.rand(shape.tokens, shape.top_k, device=device) < 0.5
        expert_index = expert_index.masked_fill(null, -1)
    return expert_index


def stored_out_in(problem: Problem) -> Problem:
    """The same numbers, with weights that lie in memory as [out, in]; a copy only where they do not yet."""
    stored = []
    for w in (problem.w1, problem.w2):
        copy = w.detach().mT.contiguous().mT
        stored.append(copy.requires_grad_(w.requires_grad))
    return problem._replace(w1=stored[0], w2=stored[1])


# -------------------------------------------------------------------------------------------------
# Contenders: problem -> the layer as a function without arguments. What a user prepares once is not timed.
# -------------------------------------------------------------------------------------------------


def activate(z: Tensor) -> Tensor:
    gate, up = z.chunk(2, dim=-1)
    return F.silu(gate) * up


def ours(p: Problem) -> Callable:
    return partial(kernels.moe_mlp, *p[:5], act="silu", glu=True)


def dense(p: Problem) -> Callable:
    """One expert, nothing to sort."""
    w1, w2 = p.w1.squeeze(0), p.w2.squeeze(0)
    return lambda: activate(p.x @ w1) @ w2


def where_loop(p: Problem) -> Callable:
    """What one would write first: every expert looks for its tokens. Also the reference, in float64."""

    def forward() -> Tensor:
        out = torch.zeros_like(p.x)
        for expert in range(len(p.w1)):
            token, pick = torch.where(p.expert_index == expert)
            y = activate(p.x[token] @ p.w1[expert]) @ p.w2[expert]
            out = out.index_add(0, token, (y * p.gates[token, pick, None]).to(out.dtype))
        return out

    return forward


def torch_grouped_mm(p: Problem) -> Callable:
    """Sort and copy the rows, torch's grouped product twice, sum in fp32."""
    multiply = getattr(F, "grouped_mm", None) or torch._grouped_mm
    top_k = p.gates.shape[1]

    def forward() -> Tensor:
        dispatch = kernels.make_dispatch(p.expert_index, len(p.w1))
        slot, ends = dispatch.slot.long(), dispatch.offsets[1:]
        token = slot // top_k
        rows = p.x.index_select(0, token)
        y = multiply(activate(multiply(rows, p.w1, offs=ends)), p.w2, offs=ends)
        y = y.float() * p.gates.reshape(-1, 1).index_select(0, slot)
        return y.new_zeros(p.x.shape).index_add(0, token, y).to(p.x.dtype)

    return forward


def transformers_experts(implementation: str, p: Problem) -> Callable:
    """The experts of transformers' Mixtral, which all its mixtures share, with one of its formulations."""
    from transformers.models.mixtral.modeling_mixtral import MixtralConfig, MixtralExperts

    num_experts, d_ff, d_model = p.w2.shape
    config = MixtralConfig(hidden_size=d_model, intermediate_size=d_ff, num_local_experts=num_experts)
    config._experts_implementation = implementation
    with torch.device("meta"):  # no memory for weights that are replaced at once
        experts = MixtralExperts(config)
    del experts.gate_up_proj, experts.down_proj
    experts.gate_up_proj = p.w1.mT
    experts.down_proj = p.w2.mT
    return partial(experts, p.x, p.expert_index, p.gates)


def scatter_moe(p: Problem) -> Callable:
    from scattermoe.parallel_experts import flatten_sort_count, parallel_linear

    gates = p.gates.to(p.x.dtype)

    def forward() -> Tensor:
        order = flatten_sort_count(p.expert_index, num_experts=len(p.w1))
        z = parallel_linear(p.x, p.w1, p.gates.shape[1], *order, grouped_out=True)
        return parallel_linear(activate(z), p.w2, 1, *order, gates=gates, grouped_in=True)

    return forward


def liger(p: Problem) -> Callable:
    from liger_kernel.ops.fused_moe import LigerFusedMoEFunction

    gates = p.gates.to(p.x.dtype)
    index = p.expert_index.int()
    return partial(LigerFusedMoEFunction.apply, p.x, p.w1.mT, p.w2.mT, index, gates)


CONTENDERS = {
    "ours": ours,
    "F.grouped_mm": torch_grouped_mm,
    "ScatterMoE": scatter_moe,
    "Liger": liger,
    "transformers grouped": partial(transformers_experts, "grouped_mm"),
    "transformers eager": partial(transformers_experts, "eager"),
    "where loop": where_loop,
    "dense": dense,
}
GPU_ONLY = ("ScatterMoE", "Liger")
STORED_OUT_IN = ("transformers grouped", "transformers eager")
# Both index w[expert], and autograd makes a gradient of the size of ALL experts for each of them.
LOOPS = ("transformers eager", "where loop")
LOOP_BYTES = {"cuda": 1e12, "cpu": 3e10}  # what such gradients may move in a step; one second or so


def loop_bytes(shape: Shape, device: str) -> int:
    """An expert's gradient is written once as zeros, then added to the sum: two reads and a write."""
    weights = 3 * shape.num_experts * shape.d_model * shape.d_ff * DTYPE[device].itemsize
    return 4 * shape.num_experts * weights if shape.train else 0


class Job(NamedTuple):
    forward: Callable[[], Tensor]
    backward: Callable[[Tensor], object] | None = None


def make_job(contender: str, problem: Problem) -> Job:
    if contender in STORED_OUT_IN:
        problem = stored_out_in(problem)
    forward = CONTENDERS[contender](problem)
    if not problem.x.requires_grad:
        return Job(forward)
    leaves = problem.leaves()
    if contender == "dense":
        del leaves[1]  # it has no gates
    return Job(forward, lambda out: torch.autograd.grad(out, leaves, problem.d_out))


def attempt(name: str, function: Callable, *args):
    """function(*args), or None and one line: who is missing or crashes does not stop the others."""
    try:
        return function(*args)
    except Exception as error:
        print(f"{name}: left out, {first_line(error)}", flush=True)


def first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:150]}"


def check_contenders(contenders: list[str], device: str) -> dict[str, float]:
    """The largest relative error of output and gradients against the plain loop in float64."""
    torch.manual_seed(0)
    problem = make_problem(CHECKED, device)

    def results(contender: str, problem: Problem) -> list[Tensor]:
        job = make_job(contender, problem)
        out = job.forward()
        return [out.detach(), *job.backward(out)]

    exact = [t.detach().double() if t.is_floating_point() else t for t in problem]
    exact = Problem(*exact)
    for leaf in exact.leaves():
        leaf.requires_grad_()
    wanted = results("where loop", exact)
    errors = {}
    for contender in contenders:
        given = attempt(contender, results, contender, problem)
        if given is not None:
            errors[contender] = max(relative_error(*pair) for pair in zip(given, wanted))
    return errors


def relative_error(given: Tensor, wanted: Tensor) -> float:
    """In the Frobenius norm. NaN is infinitely wrong."""
    error = (given.double() - wanted).norm() / wanted.norm()
    return error.nan_to_num(nan=float("inf")).item()


# -------------------------------------------------------------------------------------------------
# Time
# -------------------------------------------------------------------------------------------------


class Timing(NamedTuple):
    forward_ms: float
    total_ms: float
    peak_bytes: int  # beyond what was there before; 0 on a CPU


TURNS = {"cuda": 20, "cpu": 9}
WARM_UP_TURNS = 2
JOB_SECONDS = 1.5  # a job that has used them up gets no further turn
CPU_TURN_SECONDS = 0.02  # a short job is repeated that long in a turn, and averaged
WARM_UP_SECONDS = 1.0  # for clocks to settle before ceilings are measured


def time_on_cpu(job: Job) -> Timing:
    """Time of the processor, not of the clock: what it gives to other programs does not count."""
    forward_seconds = total_seconds = 0.0
    repeats = 0
    while total_seconds < CPU_TURN_SECONDS:
        start = time.process_time()
        out = job.forward()
        middle = time.process_time()
        if job.backward:
            job.backward(out)
        end = time.process_time()
        forward_seconds += middle - start
        total_seconds += end - start
        repeats += 1
    return Timing(1e3 * forward_seconds / repeats, 1e3 * total_seconds / repeats, 0)


def time_on_gpu(job: Job) -> Timing:
    torch.empty(2**28, dtype=torch.uint8, device="cuda").zero_()  # drives the inputs from the L2 cache
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    start, middle, end = (torch.cuda.Event(enable_timing=True) for _ in range(3))
    start.record()
    out = job.forward()
    middle.record()
    if job.backward:
        job.backward(out)
    end.record()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    return Timing(start.elapsed_time(middle), start.elapsed_time(end), peak)


def take_turns(jobs: dict[str, Job], device: str) -> dict[str, list[Timing]]:
    """The timings of every job, turn by turn. A job that fails is left out with a line."""
    time_job = time_on_gpu if device == "cuda" else time_on_cpu
    timings = {name: [] for name in jobs}
    spent = dict.fromkeys(jobs, 0.0)
    for turn in range(WARM_UP_TURNS + TURNS[device]):
        order = list(timings) if turn % 2 else list(reversed(timings))
        for name in order:
            if timings[name] and spent[name] > JOB_SECONDS:
                continue
            start = time.perf_counter()
            timing = attempt(name, time_job, jobs[name])
            if timing is None:
                del timings[name]
            elif turn >= WARM_UP_TURNS:
                timings[name].append(timing)
                spent[name] += time.perf_counter() - start
    return timings


def capture(function: Callable, pool=None):
    """(replay, result, pool of memory): the launches of function() as one CUDA graph."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        result = function()
    return graph.replay, result, graph.pool()


def as_cuda_graph(job: Job) -> Job:
    """What remains of a job when launching costs nothing. Forward and backward are a graph each."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # libraries allocate on their first calls, which a graph cannot
        for _ in range(3):
            out = job.forward()
            if job.backward:
                job.backward(out)
    torch.cuda.current_stream().wait_stream(stream)
    del out
    replay_forward, out, pool = capture(job.forward)
    if not job.backward:
        return Job(replay_forward)
    replay_backward, _, _ = capture(lambda: job.backward(out), pool)
    return Job(replay_forward, lambda _: replay_backward())


def compile_kernels(shape: Shape) -> None:
    """Leaves the shape's kernels in Triton's cache on disk. Fewer experts with as many rows each need the same."""
    num_experts = min(16, shape.num_experts)
    tokens = max(1, shape.tokens * num_experts // shape.num_experts)
    job = make_job("ours", make_problem(shape._replace(tokens=tokens, num_experts=num_experts), "cuda"))
    out = job.forward()
    if job.backward:
        job.backward(out)
    torch.cuda.synchronize()


def compile_side_by_side(shapes: list[Shape]) -> None:
    """One process a shape: a kernel takes seconds to compile, and one process compiles them one by one."""
    workers = min(8, len(shapes), os.cpu_count() or 1)
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=spawn) as pool:
        list(pool.map(compile_kernels, shapes))


def measure_ceilings(device: str) -> tuple[float, float]:
    """FLOP/s of a large matrix product and bytes/s of a large copy, on random data."""
    size = 8192 if device == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device, dtype=DTYPE[device]) for _ in range(2))
    source, target = (torch.randn(4 * size * size, device=device) for _ in range(2))
    time_job = time_on_gpu if device == "cuda" else time_on_cpu

    def median_seconds(function: Callable) -> float:
        stop = time.perf_counter() + WARM_UP_SECONDS
        while time.perf_counter() < stop:
            time_job(Job(function))
        return statistics.median(time_job(Job(function)).total_ms for _ in range(9)) / 1e3

    flop_rate = 2 * size**3 / median_seconds(lambda: a @ b)
    byte_rate = 2 * source.nbytes / median_seconds(lambda: target.copy_(source))
    return flop_rate, byte_rate


def keep_freed_memory() -> None:
    """Have glibc keep what is freed. A step frees and asks again for tens of megabytes of gradients; returned to the
    system, they would come back page by page, and those page faults would be timed with the arithmetic."""
    M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
    with contextlib.suppress(OSError, AttributeError):  # other systems have no such switch
        for parameter in (M_TRIM_THRESHOLD, M_MMAP_THRESHOLD):
            ctypes.CDLL(None).mallopt(parameter, 2**30)


# -------------------------------------------------------------------------------------------------
# What a shape has to do
# -------------------------------------------------------------------------------------------------


def launches(shape: Shape, itemsize: int) -> list[tuple[int, int]]:
    """(FLOPs, bytes) of every launch, every tensor moved once."""
    rows = shape.tokens * shape.top_k
    x = shape.tokens * shape.d_model  # also out, d_out and dx
    y = rows * shape.d_model  # also the rows of dx
    a = rows * shape.d_ff  # act(gate) * up; also its gradient, times the gates
    z = 2 * a  # gate | up; also its gradient
    w2 = shape.num_experts * shape.d_ff * shape.d_model
    w1 = 2 * w2
    up_flops = 2 * rows * shape.d_model * 2 * shape.d_ff
    down_flops = up_flops // 2
    combine = (0, y + x)
    done = [(up_flops, x + w1 + (z if shape.train else 0) + a), (down_flops, a + w2 + y), combine]
    if shape.train:
        done += [(down_flops, x + w2 + z + z + a)]  # d_out and z in, dz and gated a out
        done += [(up_flops, z + w1 + y), combine]  # dx
        done += [(down_flops, a + x + w2), (up_flops, x + z + w1)]  # dw2, dw1
    return [(flops, itemsize * elements) for flops, elements in done]


def peak_formula(shape: Shape, itemsize: int) -> int:
    """Bytes beyond the inputs: output and rows; to train, also z, dz, gated a, dx, and the weights' gradients."""
    rows = shape.tokens * shape.top_k
    if not shape.train:
        return itemsize * (shape.tokens * shape.d_model + rows * (shape.d_ff + shape.d_model))
    activations = 2 * shape.tokens * shape.d_model + rows * (5 * shape.d_ff + shape.d_model)
    return itemsize * (activations + 3 * shape.num_experts * shape.d_model * shape.d_ff)


COLUMNS = (
    "forward_ms total_ms spread tflops of_floor fwd_vs_dense total_vs_dense of_best peak_mib peak_formula_mib"
).split()
ROUTINGS = ("skewed", "half empty", "half null")
LESS_WORK = ("make_dispatch", "ours, half null")  # no FLOPs to compare
GRAPHED = ("ours", "dense")
GRAPH_ELEMENTS = 2**24  # rows * d_model up to which launching matters


def make_jobs(shape: Shape, contenders: list[str], device: str) -> dict[str, Job]:
    problem = make_problem(shape, device)
    of_equal_flops = shape._replace(tokens=shape.tokens * shape.top_k, top_k=1, num_experts=1)
    jobs = {}
    for contender in contenders:
        moved = loop_bytes(shape, device)
        if contender in LOOPS and moved > LOOP_BYTES[device]:
            reason = f"its gradients would move {moved / 1e12:.2g} TB"
            print(f"{contender}: left out, {reason}, {LOOP_BYTES[device] / 1e12:.2g} allowed")
            continue
        given = make_problem(of_equal_flops, device) if contender == "dense" else problem
        job = attempt(contender, make_job, contender, given)
        if job:
            jobs[contender] = job
    jobs["ours again"] = make_job("ours", problem)
    for routing in ROUTINGS if shape.train else ():
        rerouted = problem._replace(expert_index=route(shape, device, routing))
        jobs[f"ours, {routing}"] = make_job("ours", rerouted)
    arguments = (problem.expert_index, shape.num_experts)
    jobs["make_dispatch"] = Job(partial(kernels.make_dispatch, *arguments))
    if device == "cuda" and shape.tokens * shape.top_k * shape.d_model <= GRAPH_ELEMENTS:
        for contender in [name for name in GRAPHED if name in jobs]:
            graph = attempt(f"{contender}, CUDA graph", as_cuda_graph, jobs[contender])
            if graph:
                jobs[f"{contender}, CUDA graph"] = graph
    return jobs


def speed_share(reference: list[Timing], own: list[Timing], column: str) -> float:
    """Median over the turns of the reference's time over the own."""
    pairs = zip(reference, own)
    return statistics.median(getattr(one, column) / getattr(two, column) for one, two in pairs)


def time_shape(
    name: str, shape: Shape, contenders: list[str], device: str, rates: tuple[float, float]
) -> list[dict]:
    """One row a job."""
    what = "forward + backward" if shape.train else "forward alone"
    print(f"\n{name}: {shape}; {what}", flush=True)
    timings = take_turns(make_jobs(shape, contenders, device), device)
    itemsize = DTYPE[device].itemsize
    work = launches(shape, itemsize)
    flops = sum(flops for flops, _ in work)
    floor_ms = 1e3 * sum(max(flops / rates[0], moved / rates[1]) for flops, moved in work)
    medians = {job: statistics.median(t.total_ms for t in own) for job, own in timings.items()}
    peers = [contender for contender in contenders if contender in timings and contender != "dense"]
    best = min(peers, key=medians.get, default=None)
    rows = []
    print(" " * 20, *COLUMNS)
    for job, own in timings.items():
        row = {"shape": name, "contender": job, "total_ms": medians[job]}
        row["forward_ms"] = statistics.median(t.forward_ms for t in own)
        low, _, high = statistics.quantiles([t.total_ms for t in own] * 2, n=4)
        row["spread"] = (high - low) / medians[job]
        if job not in LESS_WORK:
            row["tflops"] = flops / medians[job] / 1e9
            row["of_floor"] = floor_ms / medians[job]
            graph = ", CUDA graph" if "CUDA graph" in job else ""
            if "dense" + graph in timings:  # like is compared with like
                reference = timings["dense" + graph]
                row["fwd_vs_dense"] = speed_share(reference, own, "forward_ms")
                row["total_vs_dense"] = speed_share(reference, own, "total_ms")
        if job in peers:
            row["of_best"] = speed_share(timings[best], own, "total_ms")
        if device == "cuda" and "CUDA graph" not in job:
            row["peak_mib"] = statistics.median(t.peak_bytes for t in own) / 2**20
            if job == "ours":
                row["peak_formula_mib"] = peak_formula(shape, itemsize) / 2**20
        print_row(row)
        rows.append(row)
    return rows


def print_row(row: dict) -> None:
    cells = []
    for column in COLUMNS:
        text = f"{row[column]:.3g}" if column in row else ""
        cells.append(text.rjust(len(column)))
    print(f"{row['contender']:20}", *cells, flush=True)


# -------------------------------------------------------------------------------------------------
# The picture, from the figures alone
# -------------------------------------------------------------------------------------------------

# Okabe and Ito's colours, told apart with any colour vision; the shapes help in print.
LOOKS = {
    "ours": ("#D55E00", "o"),
    "F.grouped_mm": ("#0072B2", "s"),
    "ScatterMoE": ("#009E73", "D"),
    "Liger": ("#CC79A7", "v"),
    "transformers grouped": ("#56B4E9", "^"),
    "transformers eager": ("#E69F00", "<"),
    "where loop": ("#000000", "x"),
}


def draw(path: str, figures: dict) -> None:
    """A line a shape, a mark a contender: its speed as a share of the dense layer's. A failure is said in words."""
    from matplotlib.figure import Figure

    names = list(figures["shapes"])
    figure = Figure(figsize=(8, 1.6 + 0.42 * len(names)), layout="constrained")
    axes = figure.subplots()
    for contender, (colour, marker) in LOOKS.items():
        shares, places = [], []
        for row in figures["rows"]:
            if row["contender"] == contender and "total_vs_dense" in row:
                shares.append(row["total_vs_dense"])
                places.append(names.index(row["shape"]))
        if shares:
            above = 3 if contender == "ours" else 2
            axes.scatter(shares, places, 45, colour, marker=marker, label=contender, zorder=above)
    for name, reason in figures["failed"].items():
        axes.text(0.02, names.index(name), f"failed: {reason[:60]}", va="center", fontsize=8)
    axes.axvline(1, color="0.4", linewidth=1, linestyle="--")
    labels = [f"{name}\n{Shape(*sizes)}" for name, sizes in figures["shapes"].items()]
    axes.set_yticks(range(len(names)), labels, fontsize=7)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlim(left=0)
    axes.grid(axis="y", color="0.9")
    axes.set_axisbelow(True)
    axes.set_xlabel("speed as a share of one dense layer of equal FLOPs (dashed)")
    axes.set_title(f"{figures['machine']}, {figures['versions']}", fontsize=9)
    if axes.get_legend_handles_labels()[0]:
        figure.legend(loc="outside upper center", ncols=4, fontsize=8, frameon=False)
    figure.savefig(path, dpi=150)


def read_figures(paths: list[str]) -> dict:
    """The figures of several runs on one machine as those of one."""
    figures, *others = [json.loads(Path(path).read_text()) for path in paths]
    for other in others:
        figures["shapes"] |= other["shapes"]
        figures["failed"] |= other["failed"]
        figures["rows"] += other["rows"]
    return figures


def write_figures(path: str, figures: dict) -> None:
    """All or nothing: a run that is ended while it writes leaves the file before."""
    part = Path(path + ".part")
    part.write_text(json.dumps(figures, indent=1))
    part.replace(path)


# -------------------------------------------------------------------------------------------------
# Command line
# -------------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        print(f"benchmark_kernels.py: {message}", file=sys.stderr)
        sys.exit(2)


def parse(argv: list[str] | None, shapes: dict[str, Shape]) -> argparse.Namespace:
    parser = Parser(description="Check the expert kernels against float64, then time them.")
    parser.add_argument("--shape", nargs="+", metavar="NAME", help=f"of {', '.join(shapes)}")
    parser.add_argument("--json", metavar="PATH", help="write all figures, shape by shape")
    parser.add_argument("--plot", metavar="PATH", help="draw them (needs matplotlib)")
    parser.add_argument("--from", nargs="+", dest="sources", metavar="JSON", help="only draw these")
    parser.add_argument("--liger", action="store_true", help="time Liger, too: half an hour more")
    args = parser.parse_args(argv)
    for name in args.shape or ():
        if name not in shapes:
            parser.error(f"--shape {name} is not known here; allowed: {', '.join(shapes)}")
    for path in filter(None, (args.json, args.plot)):
        folder = Path(path).absolute().parent
        if Path(path).is_dir() or not os.access(folder, os.W_OK):
            parser.error(f"cannot write {path}: it must lie in an existing, writable folder")
    if args.sources and not args.plot:
        parser.error("--from draws, and needs --plot PATH")
    for path in args.sources or ():
        if not Path(path).is_file():
            parser.error(f"--from {path}: there is no such file")
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot needs matplotlib, which is not installed")
    return args


def choose_contenders(device: str, with_liger: bool) -> list[str]:
    names = []
    for name in CONTENDERS:
        if device == "cpu" and name in GPU_ONLY:
            continue
        if name == "Liger" and not with_liger:
            print("Liger: left out, its autotuner takes half an hour; --liger times it")
            continue
        names.append(name)
    return names


def main(argv: list[str] | None = None) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shapes = GPU_SHAPES if device == "cuda" else CPU_SHAPES
    args = parse(argv, shapes)
    if args.sources:
        return draw(args.plot, read_figures(args.sources))
    if device == "cuda":
        machine = torch.cuda.get_device_name()
    else:
        machine = f"{platform.machine()} CPU, one thread"
        torch.set_num_threads(1)  # small matrices gain nothing from a second core
        keep_freed_memory()
    versions = f"torch {torch.__version__}, triton {getattr(kernels.triton, '__version__', 'absent')}"
    print(f"{machine}, {versions}")

    contenders = choose_contenders(device, args.liger)
    errors = check_contenders([name for name in contenders if name != "dense"], device)
    wrong = {name for name, error in errors.items() if error > BOUND[device]}
    words = [f"{name} {error:.0e}{' WRONG' * (name in wrong)}" for name, error in errors.items()]
    print("relative error against float64: " + ", ".join(words), flush=True)
    if "ours" not in errors or "ours" in wrong:
        sys.exit("benchmark_kernels.py: ours fails this check; nothing is timed")
    contenders = [*errors, "dense"]

    chosen = {name: shapes[name] for name in args.shape or shapes}
    if device == "cuda":
        attempt("compiling side by side", compile_side_by_side, list(chosen.values()))
    rates = measure_ceilings(device)
    print(f"ceilings: {rates[0] / 1e12:.3g} TFLOP/s large product, {rates[1] / 1e9:.3g} GB/s large copy")
    figures = {"machine": machine, "versions": versions, "errors": errors}
    figures |= {"flop_rate": rates[0], "byte_rate": rates[1], "shapes": {}, "failed": {}, "rows": []}
    for name, shape in chosen.items():
        figures["shapes"][name] = shape
        try:
            rows = time_shape(name, shape, contenders, device, rates)
            figures["rows"] += rows
            if not any(row["contender"] == "ours" for row in rows):
                figures["failed"][name] = "ours was not timed"
        except Exception as error:  # the next shape has its own memory and may do better
            figures["failed"][name] = first_line(error)
            print(f"{name}: failed, {first_line(error)}", flush=True)
        if args.json:  # after every shape, so that a crash loses no more than one
            write_figures(args.json, figures)
    if args.plot:
        draw(args.plot, json.loads(json.dumps(figures)))
    if figures["failed"]:
        sys.exit(f"benchmark_kernels.py: not timed: {', '.join(figures['failed'])}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("benchmark_kernels.py: interrupted; --json has the shapes that were finished")
