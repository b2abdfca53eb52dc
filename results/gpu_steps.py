"""Steps of gpu.py that are no program of their own: python results/gpu_steps.py STEP [SHAPE ...]

Figures go into STEP.json of the current folder. --rehearse puts a pretended GPU beneath.
"""

import concurrent.futures
import json
import multiprocessing
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

if "--rehearse" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # decides when kernels is imported
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "results"), str(ROOT / "tests")]
import benchmark_kernels as benchmark  # noqa: E402, I001
import contenders as field  # noqa: E402
import kernels  # noqa: E402


def write(name: str, content) -> None:
    Path(f"{name}.json").write_text(json.dumps(content, indent=1))


def machine() -> None:
    name, (major, minor) = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
    memory = torch.cuda.mem_get_info()[1] / 2**30
    python = sys.version.split()[0]
    versions = f"Python {python}, torch {torch.__version__}, triton {kernels.triton.__version__}"
    print(f"{versions}, CUDA {torch.version.cuda}; {name}, sm_{major}{minor}, {memory:.0f} GiB")
    query = "--query-gpu=driver_version,clocks.sm,clocks.max.sm,power.limit,temperature.gpu"
    try:
        command = ["nvidia-smi", query, "--format=csv,noheader"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
        print(f"driver, clock, highest clock, power limit, temperature: {done.stdout.strip()}")
    except (OSError, subprocess.TimeoutExpired) as error:
        print(f"driver unknown: {error}")
    flop_rate, byte_rate = benchmark.measure_ceilings("cuda")
    print(f"ceilings: {flop_rate / 1e12:.4g} TFLOP/s bf16 product, {byte_rate / 1e9:.4g} GB/s copy")
    figures = {"name": name, "versions": versions}
    write("machine", figures | {"flop_rate": flop_rate, "byte_rate": byte_rate})


# -------------------------------------------------------------------------------------------------
# Against float64
# -------------------------------------------------------------------------------------------------

# Relative error of every result: two to five times that of an emulation that rounds where they
# do. The interpreter truncates to bf16 instead of rounding.
PRECISIONS = {  # name: (dtype, torch's switch, bound)
    "bf16": (torch.bfloat16, "ieee", 2.5e-2 if kernels.INTERPRETED else 8e-3),
    "fp16": (torch.float16, "ieee", 1.5e-3),
    "tf32": (torch.float32, "tf32", 2e-3),
    "fp32": (torch.float32, "ieee", 2e-6),
}
COLUMNS = (256, 64, 8)  # rows an expert: one number for each column of the table of tiles
SIZES = (8, 2, 320, 384)  # num_experts, top_k, d_model, d_ff: several tiles, and tails
CASES = [(precision, rows) for precision in PRECISIONS for rows in COLUMNS]
RESULTS = ("out", "dx", "dgates", "dw1", "dw2", "db1", "db2")


def correct() -> None:
    """A process a case: they compile side by side, and a CUDA error spoils no other case."""
    options = {"mp_context": multiprocessing.get_context("spawn"), "max_tasks_per_child": 1}
    workers = min(12, os.cpu_count() or 1)
    found, wrong = [], []
    with concurrent.futures.ProcessPoolExecutor(workers, **options) as pool:
        jobs = {case: pool.submit(check_case, *case) for case in CASES}
        for (precision, rows), job in jobs.items():
            name = f"{precision} with {rows} rows an expert"
            result = benchmark.attempt(name, job.result)
            if result is None:
                wrong.append(name)
                continue
            found.append({"precision": precision, "rows": rows, **result})
            write("correct", found)
            print(f"{name}: {result['share']:.2f} of the bound, {result['where']}", flush=True)
            if not result["share"] <= 1:
                wrong.append(f"{name}, {result['where']} {result['share']:.2g} times its bound")
            elif not result["repeats"]:
                wrong.append(f"{name} gives other bits each time")
    if wrong:
        sys.exit(f"{len(wrong)} of {len(CASES)} cases are wrong: {'; '.join(wrong)}")
    worst = max(result["share"] for result in found)
    print(
        f"all {len(CASES)} cases are right and repeat; the worst error is {worst:.2f} of its bound"
    )


def check_case(precision: str, rows: int) -> dict:
    """The largest error as a share of its bound, without and with everything that can be added."""
    dtype, switch, bound = PRECISIONS[precision]
    torch.backends.cuda.matmul.fp32_precision = switch
    torch.manual_seed(0)
    found = {"share": 0.0, "where": "", "repeats": True}
    for plain in (False, True):
        expert_index, inputs, d_out = make_inputs(dtype, rows, plain)
        ours = partial(kernels.moe_mlp, act="silu", glu=not plain, backend="triton")
        loop = partial(field.loop_over_experts, glu=not plain)
        exact = [t.detach().double().requires_grad_() for t in inputs]
        wanted = all_results(loop, expert_index, exact, d_out)
        given = all_results(ours, expert_index, inputs, d_out)
        again = all_results(ours, expert_index, inputs, d_out)
        found["repeats"] &= all(torch.equal(one, two) for one, two in zip(given, again))
        for name, one, two in zip(RESULTS, given, wanted):
            allowed = 2.5 * bound if name == "dgates" else bound  # short sums, which may cancel
            share = benchmark.relative_error(one, two) / allowed
            if share > found["share"]:
                found["share"] = share
                found["where"] = name if plain else f"{name} with GLU, biases, nulls, skew"
    return found


def make_inputs(dtype: torch.dtype, rows: int, plain: bool) -> tuple[Tensor, list[Tensor], Tensor]:
    """expert_index; x, gates, w1, w2 and unless plain b1, b2; the gradient of the output."""
    num_experts, top_k, d_model, d_ff = SIZES
    tokens = rows * num_experts // top_k
    hidden = d_ff if plain else 2 * d_ff

    def new(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(*shape, device="cuda")).to(dtype).requires_grad_()

    expert_index = torch.rand(tokens, num_experts, device="cuda").topk(top_k).indices
    gates = torch.rand(tokens, top_k, device="cuda").requires_grad_()
    w1 = new(num_experts, d_model, hidden, scale=d_model**-0.5)
    w2 = new(num_experts, d_ff, d_model, scale=d_ff**-0.5)
    inputs = [new(tokens, d_model), gates, w1, w2]
    if not plain:
        expert_index[::2, 0] = 0  # half of the tokens go to one expert
        expert_index[torch.rand(tokens, top_k, device="cuda") < 0.2] = -1
        inputs += [new(num_experts, hidden), new(num_experts, d_model)]
    return expert_index, inputs, new(tokens, d_model).detach()


def all_results(layer, expert_index: Tensor, inputs: list[Tensor], d_out: Tensor) -> list[Tensor]:
    x, *others = inputs
    out = layer(x, expert_index, *others)
    return [out.detach(), *torch.autograd.grad(out, inputs, d_out.to(out.dtype))]


# -------------------------------------------------------------------------------------------------
# Graphs
# -------------------------------------------------------------------------------------------------

GRAPH_SHAPE = field.GPU_SHAPES["teaching"]
COMPILE = {"fullgraph": True}


def graph() -> None:
    """What is captured serves other routing, too; and the compiler sees the layer as one graph."""
    problem = field.make_problem(GRAPH_SHAPE, "cuda")
    eager = benchmark.make_job("ours", problem)
    jobs = {"eager": eager, "CUDA graph": benchmark.as_cuda_graph(eager)}
    replay, out, _ = benchmark.capture(eager.forward)
    problem.expert_index.copy_(field.route(GRAPH_SHAPE, "cuda", "skewed"))
    replay()
    torch.cuda.synchronize()
    if not torch.equal(out, eager.forward()):
        sys.exit("CUDA graph: replayed on new routing, it differs from the layer itself")
    print("CUDA graph: right on new routing", flush=True)

    def layer(x, expert_index, gates, w1, w2):
        return kernels.moe_mlp(x, expert_index, gates, w1, w2, act="silu", glu=True)

    compiled = partial(torch.compile(layer, **COMPILE), *problem[:5])
    if not torch.equal(compiled(), eager.forward()):
        sys.exit("torch.compile: the compiled layer differs from the layer itself")
    jobs["compiled"] = benchmark.Job(compiled, eager.backward)
    medians = {}
    for name, timings in benchmark.take_turns(jobs, "cuda").items():
        medians[name] = sorted(t.total_ms for t in timings)[len(timings) // 2]
    write("graph", medians)
    words = ", ".join(f"{name} {value:.3g} ms" for name, value in medians.items())
    how = "one graph" if "fullgraph" in COMPILE else "not traced in the interpreter"
    print(f"torch.compile: right, {how}; {words}")


def perform(step: str, *shapes: str) -> None:
    if shapes:
        benchmark.main(["--json", f"{step}.json", "--shape", *shapes])
    else:
        {"machine": machine, "correct": correct, "graph": graph}[step]()


def rehearse(step: str, *shapes: str) -> None:
    """The same lines on next to nothing."""
    global CASES, COMPILE, GRAPH_SHAPE, SIZES
    from pretended_gpu import pretended_gpu

    for name, shape in field.GPU_SHAPES.items():
        field.GPU_SHAPES[name] = field.Shape(4, 2, 2, 16, 24, shape.train)
    benchmark.CHECKED = GRAPH_SHAPE = field.Shape(4, 2, 2, 16, 24)
    benchmark.TURNS["cuda"] = 1
    benchmark.WARM_UP_TURNS = benchmark.WARM_UP_SECONDS = 0
    benchmark.CEILING_SIZE["cuda"] = 64
    CASES = [("bf16", 130), ("fp16", 50), ("tf32", 8), ("fp32", 8)]
    SIZES = (2, 2, 24, 40)
    COMPILE = {"disable": True}  # interpreted kernels cannot be traced
    with pretended_gpu():
        perform(step, *shapes[:1])


if __name__ == "__main__":
    words = [word for word in sys.argv[1:] if word != "--rehearse"]
    if words == sys.argv[1:]:
        perform(*words)
    else:
        rehearse(*words)
