"""Several processes under torchrun train one model as one process does.

torchrun itself starts once, to be interrupted; elsewhere two forked processes are told what it
would tell them.
"""

import json
import os
import re
import signal
import subprocess
import sys

import pytest
import tiny
import torch
import toy
from conftest import ROOT, report
from forked import PATIENCE, ended, finished, wait_until

import common
import home

if not torch.distributed.is_available():
    pytest.skip("this torch has no torch.distributed", allow_module_level=True)

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
TOY = "tests/toy.py"


def losses(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {(line["arm"], line["step"]): line["loss"] for line in lines}


@pytest.mark.parametrize("name", tiny.DATA_PARALLEL)
def test_two_processes_follow_the_loss_curve_of_one(tmp_path, fork, name):
    flags = [*tiny.SCRIPTS[name], "--out"]
    two = fork.two(name, *flags, tmp_path / "two", folder=tmp_path)
    one = finished(fork(name, *flags, tmp_path / "one", "--workers", 1, folder=tmp_path))
    first, second = map(finished, two)
    for done in (one, first, second):
        assert done.returncode == 0, done.stderr
    alone, together = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert alone.keys() == together.keys() and len(alone) > 10
    assert max(abs(alone[key] - together[key]) for key in alone) < 1e-4  # fp32, in another order
    assert first.stdout.count("claims of the paper") == 1  # only the first process prints
    assert not second.stdout
    reports = [report(tmp_path / folder)["claims"] for folder in ("one", "two")]
    assert [claim["id"] for claim in reports[0]] == [claim["id"] for claim in reports[1]]


def interrupted(fork, folder):
    """Two processes that torchrun started and interrupted, resumed; and two that ran through."""
    hold = folder / "hold"
    hold.touch()
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    flags = ["--steps", "400", "--hold", str(hold), "--out"]
    arms = folder / "cut" / "arms"
    command = [*TORCHRUN, str(ROOT / TOY), *flags, "cut"]
    cut = subprocess.Popen(command, cwd=folder, env=ENVIRONMENT, **pipes)
    wait_until((arms / "one-seed0.jsonl").exists)
    cut.send_signal(signal.SIGTERM)  # torchrun hands it on
    _, err = cut.communicate(timeout=PATIENCE)
    was_saved = (arms / "one-seed0.ckpt").exists()
    hold.unlink()
    again = fork.two(TOY, *flags, folder / "cut", "--resume", folder=folder / "b")
    whole = fork.two(TOY, "--steps", 400, "--out", folder / "whole", folder=folder / "a")
    codes = [ended(process) for process in (*again, *whole)]
    return cut.returncode, was_saved, err, codes, folder


@pytest.mark.beside(run=interrupted)
def test_an_interrupted_run_of_two_processes_resumes_to_the_same_numbers(beside):
    code, was_saved, err, codes, folder = beside
    assert code != 0 and was_saved, err
    assert codes == [0, 0, 0, 0]
    assert losses(folder / "cut") == losses(folder / "whole")


def test_where_one_process_dies_the_other_says_so_in_a_line(tmp_path, fork):
    hold = tmp_path / "hold"
    hold.touch()
    out = tmp_path / "out"
    flags = ["--steps", "400", "--hold", hold, "--out", out]
    first, second = fork.two(TOY, *flags, folder=tmp_path)
    wait_until((out / "arms" / "one-seed0.jsonl").exists, first)
    second.kill()
    done = finished(first)
    assert done.returncode == 1
    assert "another process of this run seems to have ended" in done.stderr
    assert "--resume" in done.stderr and "Traceback" not in done.stderr


APART = {toy: ["--steps", 3], home: [*tiny.HOME, "--arms", "cgc"]}  # home: data of each seed


@pytest.mark.parametrize("module", APART)
def test_seeds_trained_apart_become_one_run(tmp_path, command_line, module):
    """What docs/running.md tells a job array: a folder a seed, copied into one, --resume."""
    runs = tmp_path / "runs"

    def train(*flags):
        done = command_line(module, "--workers", 1, *APART[module], *flags)
        assert done.returncode == 0, done.stderr

    def trained():
        arms = (runs / "all" / "arms").glob("*.json")
        return {path.name: path.stat().st_mtime_ns for path in arms}

    train("--seeds", 3, "--out", "runs/whole")
    for seed in range(3):
        train("--seed", seed, "--out", f"runs/seed-{seed}")
    page = (ROOT / "docs" / "running.md").read_text()
    copy = re.search(r"^mkdir runs/all .*$", page, re.M)[0]
    subprocess.run(copy, shell=True, cwd=tmp_path, check=True)
    before = trained()
    assert len(before) == 6
    train("--seeds", 3, "--resume", "--out", "runs/all")
    whole, joined = report(runs / "whole"), report(runs / "all")
    assert all(whole[key] == joined[key] for key in ("results", "claims", "seeds"))
    assert losses(runs / "whole") == losses(runs / "all")
    assert trained() == before


def test_a_batch_smaller_than_the_number_of_processes_is_refused():
    told = "a batch of 3 cannot be cut into 4 parts; raise --batch-size"
    with pytest.raises(common.UsageError, match=told):
        common.parts_of(torch.zeros(3, 2), 4)
    parts = common.parts_of((torch.arange(5), torch.arange(5)), 2)
    assert [(part[0].tolist(), share) for part, share in parts] == [([0, 1, 2], 0.6), ([3, 4], 0.4)]
