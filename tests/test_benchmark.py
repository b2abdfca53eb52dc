"""The benchmark of the kernels and the program for a new GPU: what they count, draw and survive."""

import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from test_kernels import why_not_interpreted
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(ROOT / "results"))
import benchmark_kernels as benchmark  # noqa: E402, I001
import contenders as field  # noqa: E402
import gpu  # noqa: E402

SHAPE = field.Shape(tokens=6, top_k=2, num_experts=4, d_model=8, d_ff=16)
# -------------------------------------------------------------------------------------------------
# What is counted
# -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("train", [True, False])
def test_flops_are_those_that_torch_counts_for_the_dense_layer(train):
    shape = SHAPE._replace(train=train)
    job = benchmark.make_job("dense", field.make_dense_problem(shape, "cpu"))
    with FlopCounterMode(display=False) as counter:
        out = job.forward()
        if train:
            job.backward(out)
    counted = sum(flops for flops, _ in field.launches(shape, 4))
    assert counted == counter.get_total_flops() > 0


def test_bytes_are_those_of_the_tensors():
    problem = field.make_problem(SHAPE, "cpu")
    rows = problem.x.repeat_interleave(2, dim=0)  # [assignments, d_model]
    z = rows @ problem.w1[0]
    a = field.activate(z)
    x, y, z, a, w1, w2 = (t.nbytes for t in (problem.x, rows, z, a, problem.w1, problem.w2))
    forward = [x + w1 + z + a, a + w2 + y, y + x]
    backward = [x + w2 + 2 * z + a, z + w1 + y, y + x, a + x + w2, x + z + w1]
    assert [moved for _, moved in field.launches(SHAPE, 4)] == forward + backward
    assert field.peak_bytes(SHAPE, 4) == 2 * x + 2 * z + a + y + w1 + w2
    decode = SHAPE._replace(train=False)
    assert [moved for _, moved in field.launches(decode, 4)] == [x + w1 + a, a + w2 + y, y + x]
    assert field.peak_bytes(decode, 4) == x + a + y
    one = decode._replace(tokens=1)  # its two picks read two of the four experts
    assert field.launches(one, 4)[0][1] == x // 6 + w1 // 2 + a // 6


def test_shapes_for_a_gpu_reach_every_column_of_tiles(capsys):
    columns = {"128": set(), "64": set(), "fewer": set()}
    for shape in field.GPU_SHAPES.values():
        rows = shape.tokens * shape.top_k / shape.num_experts
        column = "128" if rows >= 128 else "64" if rows >= 48 else "fewer"
        columns[column].add(shape.train)
    assert columns == {"128": {True}, "64": {True}, "fewer": {False}}
    assert {*gpu.LARGE, *gpu.SMALL, *gpu.REST} == set(field.GPU_SHAPES)
    # A loop whose gradients move too much is left out with a word.
    names = ["ours", "where loop", "transformers eager"]
    deepseek = field.GPU_SHAPES["deepseek-4k"]
    assert field.loop_bytes(deepseek, "cuda") == 4 * 256 * (256 * 3 * 7168 * 2048 * 2)  # 23 TB
    assert field.choose(deepseek, names, "cuda") == ["ours"]
    assert "where loop: left out, its gradients would move 2.3e+13" in capsys.readouterr().out
    others = [deepseek._replace(train=False), field.GPU_SHAPES["qwen3-8k"]]
    assert all(field.choose(shape, names, "cuda") == names for shape in others)
    assert all(field.choose(shape, names, "cpu") == names for shape in field.CPU_SHAPES.values())


def test_routings():
    shape = field.Shape(400, 2, 8, 4, 4)
    share = {}
    for routing in ("balanced", *benchmark.ROUTINGS):
        index = field.route(shape, "cpu", routing)
        live = index[index.max(dim=1).values >= 0]
        assert index.shape == (400, 2) and (live[:, 0] != live[:, 1]).all()
        share[routing] = [(index == expert).float().sum().item() / 400 for expert in range(-1, 8)]
    assert share["balanced"][0] == 0 and max(share["balanced"]) < 0.4
    assert share["skewed"][1] > 0.5
    assert share["half empty"][5:] == [0] * 4 and share["half empty"][0] == 0
    assert 0.8 < share["half null"][0] < 1.2


def test_a_slow_contender_gets_fewer_turns_and_a_failing_one_none(monkeypatch, capsys):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(benchmark, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    monkeypatch.setattr(benchmark, "time_on_cpu", lambda job: job.forward())

    def lasts(seconds: float) -> str:
        clock.now += seconds
        return "a timing"

    jobs = {"slow": benchmark.Job(lambda: lasts(1.0)), "fast": benchmark.Job(lambda: lasts(0.01))}
    jobs["broken"] = benchmark.Job(lambda: 1 / 0)
    timings = benchmark.take_turns(jobs, "cpu")
    assert len(timings["slow"]) == 2 and len(timings["fast"]) == 9 and "broken" not in timings
    assert capsys.readouterr().out.count("left out, ZeroDivisionError: division by zero") == 1


def test_shares_are_taken_within_turns():
    dense = [benchmark.Timing(1, 2, 0), benchmark.Timing(10, 20, 0), benchmark.Timing(1, 2, 0)]
    own = [benchmark.Timing(2, 8, 0), benchmark.Timing(20, 80, 0)]  # the second turn was slow
    assert benchmark.speed_share(dense, own, "forward_ms") == 0.5
    assert benchmark.speed_share(dense, own, "total_ms") == 0.25


# -------------------------------------------------------------------------------------------------
# The benchmark from end to end
# -------------------------------------------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch):
    """Two shapes that take no time."""
    monkeypatch.setattr(benchmark, "CHECKED", SHAPE)
    monkeypatch.setattr(benchmark, "TURNS", {"cpu": 2})
    monkeypatch.setattr(benchmark, "CEILING_SIZE", {"cpu": 32})
    for name in ("CPU_TURN_SECONDS", "WARM_UP_SECONDS"):
        monkeypatch.setattr(benchmark, name, 0.001)
    shapes = {"one": SHAPE, "two": SHAPE._replace(d_model=16, train=False)}
    monkeypatch.setattr(benchmark, "CPU_SHAPES", shapes)


def figures_of(folder, *flags) -> tuple:
    path = folder / "figures.json"
    try:
        code = benchmark.main(["--json", str(path), *flags])
    except SystemExit as stop:
        code = stop.code
    return code, json.loads(path.read_text()) if path.exists() else None


def test_every_contender_computes_the_same_layer_and_is_timed(quick, tmp_path, capsys):
    code, figures = figures_of(tmp_path)
    printed = capsys.readouterr().out
    assert code is None and "WRONG" not in printed and not list(tmp_path.glob("*.part"))
    here = {"ours", "F.grouped_mm", "where loop"}
    if importlib.util.find_spec("transformers"):
        here |= {"transformers grouped", "transformers eager"}
    assert set(figures["errors"]) == here and max(figures["errors"].values()) < 1e-5
    both = {*here, "dense", "ours again", "make_dispatch"}
    routed = {f"ours, {routing}" for routing in benchmark.ROUTINGS}
    for shape, names in (("one", both | routed), ("two", both)):
        rows = {row["contender"]: row for row in figures["rows"] if row["shape"] == shape}
        assert set(rows) == names
        assert all(row["total_ms"] >= row["forward_ms"] > 0 for row in rows.values())
        assert rows["dense"]["total_vs_dense"] == 1
        best = min(here, key=lambda name: rows[name]["total_ms"])
        assert rows[best]["of_best"] == 1 and "of_best" not in rows["dense"]


def test_wrong_numbers_are_not_timed(quick, tmp_path, monkeypatch, capsys):
    right = field.ours

    def half_of_dx(p):  # the output is right, one gradient is not
        forward = right(p)
        return lambda: forward() + 0.5 * (p.x - p.x.detach())

    def nan(p):
        forward = right(p)
        return lambda: forward() * float("nan")

    for wrong in (half_of_dx, nan):
        monkeypatch.setitem(field.CONTENDERS, "ours", wrong)
        code, figures = figures_of(tmp_path)
        assert code == "benchmark_kernels.py: ours fails this check; nothing is timed"
        assert figures is None and " WRONG" in capsys.readouterr().out


def test_a_shape_that_fails_costs_its_own_figures_alone(quick, tmp_path, monkeypatch):
    right = field.ours

    def failing(p):
        if p.x.shape[1] == 16:
            raise torch.OutOfMemoryError("no memory\nand a long story")
        return right(p)

    monkeypatch.setitem(field.CONTENDERS, "ours", failing)
    has_matplotlib = importlib.util.find_spec("matplotlib") is not None
    plot = ["--plot", str(tmp_path / "first.svg")] if has_matplotlib else []
    code, figures = figures_of(tmp_path, *plot)
    assert code == "benchmark_kernels.py: not timed: two"
    assert figures["failed"] == {"two": "OutOfMemoryError: no memory"}
    assert {row["shape"] for row in figures["rows"]} == {"one"}
    if has_matplotlib:
        import matplotlib

        assert (tmp_path / "first.svg").exists()
        with matplotlib.rc_context({"svg.fonttype": "none"}):
            flags = ["--from", str(tmp_path / "figures.json"), "--plot"]
            benchmark.main([*flags, str(tmp_path / "second.svg")])
        picture = (tmp_path / "second.svg").read_text()
        assert "failed: OutOfMemoryError: no memory" in picture and ">F.grouped_mm<" in picture


# -------------------------------------------------------------------------------------------------
# gpu.py: its steps may do what they like
# -------------------------------------------------------------------------------------------------

LEAVES_A_CHILD = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print("child", child.pid, flush=True)
time.sleep(60)
"""
KILLS_ITSELF = "import os, signal; print('good'); os.kill(os.getpid(), signal.SIGSEGV)"
GARBAGE = "import sys; sys.stdout.buffer.write(bytes(range(256)) * 9); print(); print('good')"
FAILED_TEST = "print('FAILED test_a.py::test_b - assert 1 == 2\\n1 failed'); raise SystemExit(1)"


def step(code: str) -> gpu.Step:
    return gpu.Step("a-step", 1.0, ["-c", code], "^good")


WHAT_STEPS_DO = [
    ("print('good'); print('good as well')", True, "good"),
    ("print('good'); 1 / 0", False, "ZeroDivisionError: division by zero"),
    ("", False, "it printed nothing"),
    (FAILED_TEST, False, "FAILED test_a.py::test_b - assert 1 == 2"),
    (KILLS_ITSELF, False, "killed by SIGSEGV"),
    (GARBAGE, True, "good"),
]


@pytest.mark.parametrize("code, passed, line", WHAT_STEPS_DO)
def test_whatever_a_step_does_is_told_in_a_line(tmp_path, code, passed, line):
    result = gpu.run_step(step(code), 60, tmp_path)
    assert result["passed"] is passed and result["lines"][0] == line
    assert (tmp_path / "a-step.log").exists()


def test_a_step_that_hangs_is_ended_with_all_that_it_started(tmp_path):
    result = gpu.run_step(step(LEAVES_A_CHILD), 2, tmp_path)
    assert not result["passed"] and re.fullmatch(r"ended after \d+ s", result["lines"][0])
    started = re.search(r"child (\d+)", (tmp_path / "a-step.log").read_text())
    if started:  # on a busy machine two seconds may not be enough to start one
        assert has_ended(int(started[1]))


def has_ended(pid: int) -> bool:
    for _ in range(200):
        try:
            os.kill(pid, 0)
            state = open(f"/proc/{pid}/stat").read().split()[2] if os.path.exists("/proc") else "?"
        except (ProcessLookupError, FileNotFoundError):
            return True
        if state == "Z":  # ended; nobody has asked for its exit code
            return True
        time.sleep(0.05)
    return False


def test_the_table_has_40_lines_at_most_whatever_the_files_hold(tmp_path):
    result = {"seconds": 1.0, "lines": ["line"] * 4}
    found = [{"step": f"step-{name}", "passed": name > 0, **result} for name in range(9)]
    shapes = {f"shape-{number}": list(SHAPE) for number in range(9)}
    row = {"shape": "shape-0", "contender": "ours", "total_ms": 2.0, "forward_ms": 1.0}
    shares = {"fwd_vs_dense": 0.7, "total_vs_dense": 0.5}
    failed = {name: "OutOfMemoryError: no memory" for name in list(shapes)[1:]}
    figures = {"shapes": shapes, "failed": failed, "rows": [row | shares]}
    (tmp_path / "large.json").write_text(json.dumps(figures))
    (tmp_path / "small.json").write_text("\x00 garbage")
    lines = gpu.table(found, tmp_path)
    assert len(lines) == 40 and lines[0].startswith("step-0   FAILED")
    text = "\n".join(lines)
    assert "small: no figures, JSONDecodeError" in text
    assert "rest: no figures, FileNotFoundError" in text
    assert re.search(r"shape-0 +1\.00 +2\.00 +0\.70 +0\.50 .* TARGET MISSED", text)
    assert "shape-1         OutOfMemoryError: no memory" in text
    figures["rows"] = [row | {"fwd_vs_dense": 0.62, "total_vs_dense": 0.52}]
    (tmp_path / "large.json").write_text(json.dumps(figures))
    assert gpu.speed_lines(tmp_path / "large.json", judged=True)[0].endswith(" reached")


def test_without_a_gpu_it_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stop:
        gpu.main([])
    assert stop.value.code.startswith("gpu.py: there is no CUDA GPU here; --rehearse")


def test_every_step_of_the_plan_names_what_exists():
    for rehearse in (False, True):
        for planned in gpu.plan(rehearse):
            files = [word for word in planned.command if word.endswith((".py", ".toml"))]
            assert files and all(os.path.exists(file) for file in files)


@pytest.mark.skipif(bool(why_not_interpreted()), reason=why_not_interpreted())
def test_a_step_on_a_pretended_gpu(tmp_path):
    """Not all of them: python results/gpu.py --rehearse takes minutes."""
    command = [sys.executable, gpu.STEPS, "--rehearse", "graph"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "CUDA graph: right" in done.stdout and "torch.compile: right" in done.stdout
    medians = json.loads((tmp_path / "graph.json").read_text())
    assert medians.keys() == {"eager", "CUDA graph", "compiled"}
