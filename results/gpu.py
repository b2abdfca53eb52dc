"""The first ten minutes on a Hopper card: python results/gpu.py [--minutes 9] [--out DIR]

Unattended, the most valuable first, so that whatever ends this early leaves the most behind:

    machine     versions, clocks, ceilings
    correct     ours against float64: three columns of tiles, four precisions, GLU, biases, nulls,
                skew; equal runs give equal bits
    large       timings of large batches beside dense, F.grouped_mm and whoever is installed; memory
    small       the same for small batches and decoding
    graph       a CUDA graph replays on new routing; torch.compile sees one graph
    tests       python -m pytest -m gpu, side by side where pytest-xdist is installed
    scripts     every script's tiny run, fp32 and bf16
    adamoe      a mixture of Mixtral's width with random weights: patched against unpatched
    rest        timings of the other shapes

Each step is a process with a time of its own, and inherits what the steps before it left over. A
step that fails, hangs or is killed costs its line. DIR has the output of each in STEP.log, figures
in STEP.json, the lines so far in summary.json, and at the end a table of at most 40 lines in
summary.txt.

Rehearse    python results/gpu.py --rehearse      every step without a GPU: tiny shapes, Triton's
            interpreter, a pretended device (tests/pretended_gpu.py); says nothing of speed
"""

import argparse
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch

ROOT = Path(__file__).resolve().parent.parent
STEPS = str(ROOT / "results" / "gpu_steps.py")
TARGETS = (
    0.62,
    0.52,
)  # shares of dense's speed, forward and total, that every large shape must reach

# -------------------------------------------------------------------------------------------------
# The plan
# -------------------------------------------------------------------------------------------------


class Step(NamedTuple):
    name: str
    minutes: float  # of nine
    command: list[str]  # after `python`
    shows: str  # lines with this are its result; a step without any has failed


LARGE = "qwen3-8k mixtral-8k olmoe-8k deepseek-4k".split()
SMALL = "qwen3-1k qwen3-decode mixtral-256 mixtral-decode deepseek-decode".split()
REST = "teaching tiny qwen3-32k olmoe-32k deepseek-16k".split()
PYTEST = "-m pytest -q -m gpu -p no:cacheprovider".split()
PYTEST += ["-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT)]
SCRIPTS = [str(ROOT / "tests" / "test_house.py"), "-k", "every_script_runs"]
ALL_BUT_SCRIPTS = [str(ROOT / "tests"), "-k", "not every_script_runs"]
ADAMOE = [str(ROOT / "adamoe.py"), *"--full --model random --overwrite".split()]
ADAMOE_FLAGS = "--num-layers 4 --steps 20 --device cuda --dtype bf16".split()
ADAMOE_REHEARSED = (
    "--num-layers 1 --d-model 32 --d-ff 32 --num-heads 2 --context 16 --batch-size 2 --steps 2 "
    "--device cpu --dtype fp32"
).split()


def plan(rehearse: bool = False) -> list[Step]:
    workers = ["-n", "2" if rehearse else "8"]
    pytest = PYTEST + workers if importlib.util.find_spec("xdist") else PYTEST
    adamoe = ADAMOE + (ADAMOE_REHEARSED if rehearse else ADAMOE_FLAGS)
    # Without a GPU its tests skip themselves: of the two steps with tests, what is rehearsed is
    # that pytest starts and its last line is found.
    tests, summary = (SCRIPTS, "skipped") if rehearse else (ALL_BUT_SCRIPTS, "passed")
    own = [STEPS, "--rehearse"] if rehearse else [STEPS]
    return [
        Step("machine", 0.3, [*own, "machine"], "^(Python|driver|ceilings)"),
        Step("correct", 1.3, [*own, "correct"], "^all"),
        Step("large", 1.7, [*own, "large", *LARGE], "^relative error"),
        Step("small", 1.2, [*own, "small", *SMALL], "^relative error"),
        Step("graph", 0.6, [*own, "graph"], "^(CUDA graph|torch.compile)"),
        Step("tests", 1.7, [*pytest, *tests], f"[0-9] {summary}"),
        Step("scripts", 1.0, [*pytest, *SCRIPTS], f"[0-9] {summary}"),
        Step("adamoe", 0.7, adamoe, "^(arm|original|vanilla|adamoe)  "),
        Step("rest", 0.5, [*own, "rest", *REST], "^relative error"),
    ]


# -------------------------------------------------------------------------------------------------
# Running it
# -------------------------------------------------------------------------------------------------


def run_step(step: Step, seconds: float, folder: Path) -> dict:
    """Whether it passed, its seconds, and its lines: what it shows, or first why it failed."""
    log = folder / f"{step.name}.log"
    start = time.monotonic()
    with log.open("wb") as output:
        streams = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": subprocess.STDOUT}
        command = [sys.executable, *step.command]
        process = subprocess.Popen(command, cwd=folder, start_new_session=True, **streams)
        try:
            code = process.wait(timeout=max(1.0, seconds))
        except subprocess.TimeoutExpired:
            code = None
        finally:  # also at Ctrl-C; and whatever the step has started and left behind
            end_group(process)
    spent = time.monotonic() - start
    text = log.read_bytes()[-1_000_000:].decode(errors="replace")
    lines = [line.strip() for line in text.splitlines() if line.strip() and line.isprintable()]
    shown = [line[:120] for line in lines if re.search(step.shows, line)][:4]
    why = ""
    if code is None:
        why = f"ended after {spent:.0f} s"
    elif code < 0:
        why = f"killed by {signal.Signals(-code).name}"
    elif code > 0 or not shown:
        why = first_complaint(lines)[:120]
    lines = [why, *shown[:2]] if why else shown
    return {"step": step.name, "passed": not why, "seconds": spent, "lines": lines}


def end_group(process: subprocess.Popen) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:  # all of it has ended
        pass
    process.wait()


def first_complaint(lines: list[str]) -> str:
    """pytest's first failure, or else the last line, where Python names the error."""
    for line in lines:
        if line.startswith(("FAILED ", "ERROR ")):
            return line
    return lines[-1] if lines else "it printed nothing"


def run_all(steps: list[Step], minutes: float, folder: Path) -> list[dict]:
    """One after the other. A step may run until its place in the plan is over."""
    second = 60 * minutes / sum(step.minutes for step in steps)
    start = time.monotonic()
    planned = 0.0
    found = []
    for step in steps:
        planned += second * step.minutes
        left = planned - (time.monotonic() - start)
        print(f"{step.name}: at most {left:.0f} s", flush=True)
        found.append(run_step(step, left, folder))
        (folder / "summary.json").write_text(json.dumps(found, indent=1))
    return found


# -------------------------------------------------------------------------------------------------
# The table
# -------------------------------------------------------------------------------------------------

COLUMNS = {  # of a shape's line: (contender, figure, decimals)
    "fwd ms": ("ours", "forward_ms", 2),
    "total ms": ("ours", "total_ms", 2),
    "fwd/dense": ("ours", "fwd_vs_dense", 2),
    "total/dense": ("ours", "total_vs_dense", 2),
    "of graphs": ("ours, CUDA graph", "total_vs_dense", 2),
    "of floor": ("ours", "of_floor", 2),
    "of best": ("ours", "of_best", 2),
    "peak MiB": ("ours", "peak_mib", 0),
    "formula": ("ours", "peak_formula_mib", 0),
}


def table(found: list[dict], folder: Path) -> list[str]:
    """At most 40 lines: what passed, what failed and why, and the speeds shape by shape."""
    lines = []
    for result in found:
        verdict = "passed" if result["passed"] else "FAILED"
        first, *others = result["lines"]
        lines.append(f"{result['step']:9}{verdict:8}{result['seconds']:4.0f} s  {first}")
        lines += [" " * 24 + line for line in others]
    shapes = []
    for name in ("large", "small", "rest"):
        shapes += speed_lines(folder / f"{name}.json", judged=name == "large")
    header = " ".join([" " * 15, *COLUMNS])
    return [*lines[: 39 - len(shapes)], header, *shapes]


def speed_lines(path: Path, judged: bool) -> list[str]:
    """One line a shape, and with `judged` whether it reaches the targets."""
    try:
        figures = json.loads(path.read_text())
        lines = []
        for shape in figures["shapes"]:
            rows = {row["contender"]: row for row in figures["rows"] if row["shape"] == shape}
            line = shape_line(shape, rows)
            if "ours" not in rows:
                line = f"{shape:15} {figures['failed'][shape][:100]}"
            elif judged:
                forward = rows["ours"].get("fwd_vs_dense", 0) >= TARGETS[0]
                total = rows["ours"].get("total_vs_dense", 0) >= TARGETS[1]
                line += " reached" if forward and total else " TARGET MISSED"
            lines.append(line)
        return lines
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:  # none, or garbage
        return [f"{path.stem}: no figures, {type(error).__name__}"]


def shape_line(shape: str, rows: dict[str, dict]) -> str:
    cells = [f"{shape:15}"]
    for title, (contender, figure, decimals) in COLUMNS.items():
        value = rows.get(contender, {}).get(figure)
        text = "-" if value is None else f"{value:.{decimals}f}"
        cells.append(text.rjust(len(title)))
    return " ".join(cells)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Correctness, speed and a verdict on a new GPU.")
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: results/NAME OF THE GPU")
    parser.add_argument("--rehearse", action="store_true", help="without a GPU")
    args = parser.parse_args(argv)
    if args.rehearse:
        folder = args.out or Path(tempfile.mkdtemp(prefix="rehearsal-"))
    elif torch.cuda.is_available():
        name = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower())
        folder = args.out or ROOT / "results" / name
    else:
        sys.exit("gpu.py: there is no CUDA GPU here; --rehearse runs every step without one")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the running step is ended, too
    folder = folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    for step in plan():  # figures of an earlier run are not this run's
        (folder / f"{step.name}.json").unlink(missing_ok=True)
    minutes = 3 * args.minutes if args.rehearse else args.minutes  # interpreted kernels are slow
    found = run_all(plan(args.rehearse), minutes, folder)
    text = "\n".join(table(found, folder))
    (folder / "summary.txt").write_text(text + "\n")
    print(f"\n{text}\n\nall of it: {folder}")
    sys.exit(0 if all(result["passed"] for result in found) else 1)


if __name__ == "__main__":
    main()
