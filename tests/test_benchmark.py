"""The benchmark of the kernels and the program for a new GPU: what they count, draw and survive."""

import json
import re
import subprocess
import sys

import pytest
from conftest import ROOT
from torch.utils.flop_counter import FlopCounterMode

import kernels

sys.path.insert(0, str(ROOT / "results"))
import benchmark_kernels as benchmark  # noqa: E402, I001
import contenders as field  # noqa: E402
import gpu  # noqa: E402

SHAPE = field.Shape(tokens=6, top_k=2, num_experts=4, d_model=8, d_ff=16)


def test_flops_are_those_that_torch_counts_for_the_dense_layer():
    job = benchmark.make_job("dense", field.make_dense_problem(SHAPE, "cpu"))
    with FlopCounterMode(display=False) as counter:
        job.backward(job.forward())
    counted = sum(flops for flops, _ in field.launches(SHAPE, 4))
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


def test_shares_are_taken_within_turns():
    dense = [benchmark.Timing(1, 2, 0), benchmark.Timing(10, 20, 0), benchmark.Timing(1, 2, 0)]
    own = [benchmark.Timing(2, 8, 0), benchmark.Timing(20, 80, 0)]  # the second turn was slow
    assert benchmark.speed_share(dense, own, "forward_ms") == 0.5
    assert benchmark.speed_share(dense, own, "total_ms") == 0.25


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


def figures_of(folder) -> tuple:
    path = folder / "figures.json"
    try:
        code = benchmark.main(["--json", str(path)])
    except SystemExit as stop:
        code = stop.code
    return code, json.loads(path.read_text()) if path.exists() else None


def test_every_contender_computes_the_same_layer_and_is_timed(quick, tmp_path, capsys):
    code, figures = figures_of(tmp_path)
    assert code is None and "WRONG" not in capsys.readouterr().out
    here = set(figures["errors"])
    assert here >= {"ours", "F.grouped_mm", "where loop"}
    assert max(figures["errors"].values()) < 1e-5
    for shape in ("one", "two"):
        rows = {row["contender"]: row for row in figures["rows"] if row["shape"] == shape}
        assert set(rows) >= {*here, "dense", "ours again", "make_dispatch"}
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


WHAT_STEPS_DO = [
    ("print('good')", True, "good"),
    ("print('good'); 1 / 0", False, "ZeroDivisionError: division by zero"),
    ("print('good', flush=True); import os; os.abort()", False, "killed by SIGABRT"),
    ("import time; time.sleep(60)", False, "ended after 1 s"),
]


@pytest.mark.parametrize("code, passed, line", WHAT_STEPS_DO)
def test_whatever_a_step_does_is_told_in_a_line(tmp_path, code, passed, line):
    step = gpu.Step("a-step", 1.0, ["-c", code], "^good")
    result = gpu.run_step(step, 1 if "sleep" in code else 60, tmp_path)
    assert result["passed"] is passed and result["lines"][0] == line


@pytest.mark.parametrize("forward, total, told", [(0.7, 0.5, "MISSED"), (0.62, 0.52, "reached")])
def test_the_table_judges_each_shape_by_its_shares_of_dense(tmp_path, forward, total, told):
    row = {"shape": "one", "contender": "ours", "total_ms": 2.0, "forward_ms": 1.0}
    row |= {"fwd_vs_dense": forward, "total_vs_dense": total}
    figures = {"shapes": {"one": list(SHAPE)}, "failed": {}, "rows": [row]}
    (tmp_path / "large.json").write_text(json.dumps(figures))
    text = "\n".join(gpu.table([], tmp_path))
    assert re.search(rf"one +1\.00 +2\.00 +{forward:.2f} +{total:.2f} .* {told}", text)


def rehearse(fork, folder):
    command = [sys.executable, gpu.STEPS, "--rehearse", "graph"]
    return folder, subprocess.run(command, cwd=folder, capture_output=True, text=True)


@pytest.mark.beside(run=rehearse)
@pytest.mark.skipif(kernels.triton is None, reason="triton is not installed")
def test_a_step_on_a_pretended_gpu(beside):
    """Not all of them: python results/gpu.py --rehearse takes minutes."""
    folder, done = beside
    assert done.returncode == 0, done.stdout + done.stderr
    assert "CUDA graph: right" in done.stdout and "torch.compile: right" in done.stdout
    medians = json.loads((folder / "graph.json").read_text())
    assert medians.keys() == {"eager", "CUDA graph", "compiled"}
