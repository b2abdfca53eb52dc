"""The expert kernels against float64, then against the clock: a GPU, or one thread of a CPU.

Timed is one mixture layer with silu(gate) * up: forward and backward, or forward alone where the
shape is named "decode". All contenders get the same numbers and take turns, so that whatever slows
the machine slows all of them; a ratio is taken within each turn, and its median is printed.

    total_vs_dense   speed as a share of "dense", one MLP of equal FLOPs without any routing
    of_best          speed as a share of the fastest contender's
    of_floor         speed as a share of what this machine's arithmetic and memory allow: a launch
                     takes the longer of FLOPs / (FLOP/s of a large product) and bytes / (bytes/s
                     of a large copy), every tensor moved once
    spread           quartile distance over median; "ours again" is noise as well
    peak_mib         memory beyond the inputs, beside what the tensors should take

Run      python results/benchmark_kernels.py [--shape NAME ...] [--json PATH] [--plot PATH]
Draw     python results/benchmark_kernels.py --from JSON [JSON ...] --plot PATH
Peers    transformers, ScatterMoE and Liger join where they can be imported; Liger only with
         --liger, since its autotuner tries 240 candidates a shape, which takes half an hour.
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
from torch import Tensor

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]
import contenders as field  # noqa: E402, I001
import kernels  # noqa: E402
from contenders import CPU_SHAPES, DTYPE, GPU_SHAPES, Problem, Shape  # noqa: E402

CHECKED = Shape(1024, 2, 8, 192, 320)  # where all are compared with float64
BOUND = {"cuda": 2e-2, "cpu": 1e-5}  # relative error beyond which a result is wrong

# -------------------------------------------------------------------------------------------------
# Jobs: what is timed
# -------------------------------------------------------------------------------------------------


class Job(NamedTuple):
    forward: Callable[[], Tensor]
    backward: Callable[[Tensor], object] | None = None


def make_job(contender: str, problem: Problem) -> Job:
    if contender in field.STORED_OUT_IN:
        problem = field.stored_out_in(problem)
    forward = field.CONTENDERS[contender](problem)
    if not problem.x.requires_grad:
        return Job(forward)
    leaves = problem.leaves()
    if contender == "dense":
        leaves = [problem.x, problem.w1, problem.w2]
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


def check_contenders(names: list[str], device: str) -> dict[str, float]:
    """The largest relative error of output and gradients against the plain loop in float64."""
    torch.manual_seed(0)
    problem = field.make_problem(CHECKED, device)
    exact = Problem(*[t.detach().double() if t.is_floating_point() else t for t in problem])
    for leaf in exact.leaves():
        leaf.requires_grad_()

    def results(contender: str, problem: Problem) -> list[Tensor]:
        job = make_job(contender, problem)
        out = job.forward()
        return [out.detach(), *job.backward(out)]

    wanted = results("where loop", exact)
    errors = {}
    for name in names:
        given = attempt(name, results, name, problem)
        if given is not None:
            errors[name] = max(relative_error(*pair) for pair in zip(given, wanted))
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
CEILING_SIZE = {"cuda": 8192, "cpu": 1024}
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
    # Drives the inputs from the L2 cache.
    torch.empty(2**28, dtype=torch.uint8, device="cuda").zero_()
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
    """Into Triton's cache on disk. Fewer experts with as many rows each need the same kernels."""
    num_experts = min(16, shape.num_experts)
    tokens = max(1, shape.tokens * num_experts // shape.num_experts)
    few = shape._replace(tokens=tokens, num_experts=num_experts)
    job = make_job("ours", field.make_problem(few, "cuda"))
    out = job.forward()
    if job.backward:
        job.backward(out)
    torch.cuda.synchronize()


def compile_side_by_side(shapes: list[Shape]) -> None:
    """One process a shape: a kernel takes seconds, and a process compiles one after the other."""
    workers = min(8, len(shapes), os.cpu_count() or 1)
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=spawn) as pool:
        list(pool.map(compile_kernels, shapes))


def measure_ceilings(device: str) -> tuple[float, float]:
    """FLOP/s of a large matrix product and bytes/s of a large copy, on random data."""
    size = CEILING_SIZE[device]
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
    """Have glibc keep what is freed.

    Every step frees tens of megabytes of gradients and asks for them again; returned to the system,
    they would come back page by page, in time we measure.
    """
    M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
    with contextlib.suppress(OSError, AttributeError):  # other systems have no such switch
        for parameter in (M_TRIM_THRESHOLD, M_MMAP_THRESHOLD):
            ctypes.CDLL(None).mallopt(parameter, 2**30)


# -------------------------------------------------------------------------------------------------
# A shape: its jobs, its table
# -------------------------------------------------------------------------------------------------

COLUMNS = "forward_ms total_ms spread tflops of_floor fwd_vs_dense total_vs_dense of_best".split()
COLUMNS += ["peak_mib", "peak_formula_mib"]
ROUTINGS = ("skewed", "half empty", "half null")
LESS_WORK = ("make_dispatch", "ours, half null")  # no FLOPs to compare
GRAPHED = ("ours", "dense")
GRAPH_ELEMENTS = 2**24  # rows * d_model up to which launching matters


def make_jobs(shape: Shape, names: list[str], device: str) -> dict[str, Job]:
    problem = field.make_problem(shape, device)
    jobs = {}
    for name in field.choose(shape, names, device):
        jobs[name] = attempt(name, make_job, name, problem)
    jobs["dense"] = attempt("dense", make_job, "dense", field.make_dense_problem(shape, device))
    jobs["ours again"] = make_job("ours", problem)
    for routing in ROUTINGS if shape.train else ():
        rerouted = problem._replace(expert_index=field.route(shape, device, routing))
        jobs[f"ours, {routing}"] = make_job("ours", rerouted)
    sort = partial(kernels.make_dispatch, problem.expert_index, shape.num_experts)
    jobs["make_dispatch"] = Job(sort)
    if device == "cuda" and shape.tokens * shape.top_k * shape.d_model <= GRAPH_ELEMENTS:
        for name in filter(jobs.get, GRAPHED):
            label = f"{name}, CUDA graph"
            jobs[label] = attempt(label, as_cuda_graph, jobs[name])
    return {name: job for name, job in jobs.items() if job}


def speed_share(reference: list[Timing], own: list[Timing], column: str) -> float:
    """Median over the turns of the reference's time over the own."""
    pairs = zip(reference, own)
    return statistics.median(getattr(one, column) / getattr(two, column) for one, two in pairs)


def time_shape(name: str, shape: Shape, names: list[str], device: str, rates: tuple) -> list[dict]:
    """One row a job."""
    what = "forward + backward" if shape.train else "forward alone"
    print(f"\n{name}: {shape}; {what}", flush=True)
    timings = take_turns(make_jobs(shape, names, device), device)
    itemsize = DTYPE[device].itemsize
    work = field.launches(shape, itemsize)
    flops = sum(flops for flops, _ in work)
    floor_ms = 1e3 * sum(max(flops / rates[0], moved / rates[1]) for flops, moved in work)
    medians = {job: statistics.median(t.total_ms for t in own) for job, own in timings.items()}
    peers = [peer for peer in names if peer in timings]
    best = min(peers, key=medians.get, default=None)
    rows = []
    print(" " * 20, *COLUMNS)
    for job, own in timings.items():
        row = {"shape": name, "contender": job, "total_ms": medians[job]}
        row["forward_ms"] = statistics.median(t.forward_ms for t in own)
        low, _, high = statistics.quantiles([t.total_ms for t in own] * 2, n=4)
        row["spread"] = (high - low) / medians[job]
        graph = ", CUDA graph" if "CUDA graph" in job else ""
        reference = timings.get("dense" + graph)  # like is compared with like
        if job not in LESS_WORK:
            row["tflops"] = flops / medians[job] / 1e9
            row["of_floor"] = floor_ms / medians[job]
            if reference:
                row["fwd_vs_dense"] = speed_share(reference, own, "forward_ms")
                row["total_vs_dense"] = speed_share(reference, own, "total_ms")
        if job in peers:
            row["of_best"] = speed_share(timings[best], own, "total_ms")
        if device == "cuda" and not graph:
            row["peak_mib"] = statistics.median(t.peak_bytes for t in own) / 2**20
        if device == "cuda" and job == "ours":
            row["peak_formula_mib"] = field.peak_bytes(shape, itemsize) / 2**20
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
    """A line a shape, a mark a contender: speed as a share of dense's. Failures stand in words."""
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
        if Path(path).is_dir() or not os.access(Path(path).absolute().parent, os.W_OK):
            parser.error(f"cannot write {path}: it must lie in an existing, writable folder")
    if args.sources and not args.plot:
        parser.error("--from draws, and needs --plot PATH")
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot needs matplotlib, which is not installed")
    return args


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
    versions = (
        f"torch {torch.__version__}, triton {getattr(kernels.triton, '__version__', 'absent')}"
    )
    print(f"{machine}, {versions}", flush=True)
    chosen = {name: shapes[name] for name in args.shape or shapes}
    if device == "cuda":
        attempt("compiling side by side", compile_side_by_side, [CHECKED, *chosen.values()])

    left_out = [
        "dense",
        *([] if args.liger else ["Liger"]),
        *(field.GPU_ONLY if device == "cpu" else ()),
    ]
    names = [name for name in field.CONTENDERS if name not in left_out]
    errors = check_contenders(names, device)
    wrong = {name for name, error in errors.items() if error > BOUND[device]}
    words = [f"{name} {error:.0e}{' WRONG' * (name in wrong)}" for name, error in errors.items()]
    print("relative error against float64: " + ", ".join(words), flush=True)
    if "ours" not in errors or "ours" in wrong:
        sys.exit("benchmark_kernels.py: ours fails this check; nothing is timed")

    rates = measure_ceilings(device)
    words = f"{rates[0] / 1e12:.3g} TFLOP/s large product, {rates[1] / 1e9:.3g} GB/s large copy"
    print(f"ceilings: {words}", flush=True)
    figures = {"machine": machine, "versions": versions, "errors": errors}
    figures |= {
        "flop_rate": rates[0],
        "byte_rate": rates[1],
        "shapes": {},
        "failed": {},
        "rows": [],
    }
    for name, shape in chosen.items():
        figures["shapes"][name] = list(shape)
        try:
            rows = time_shape(name, shape, list(errors), device, rates)
            figures["rows"] += rows
            if not any(row["contender"] == "ours" for row in rows):
                figures["failed"][name] = "ours was not timed"
        except Exception as error:  # the next shape needs other memory and may do better
            figures["failed"][name] = first_line(error)
            print(f"{name}: failed, {first_line(error)}", flush=True)
        if device == "cuda":
            torch.cuda.empty_cache()  # another shape asks for blocks of other sizes
        if args.json:  # after every shape, so that a crash loses no more than one
            write_figures(args.json, figures)
    if args.plot:
        draw(args.plot, figures)
    if figures["failed"]:
        sys.exit(f"benchmark_kernels.py: not timed: {', '.join(figures['failed'])}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("benchmark_kernels.py: interrupted; --json has the shapes that were finished")
