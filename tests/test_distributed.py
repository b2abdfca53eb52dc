"""Several processes under torchrun train one model as one process does.

torchrun itself starts once, to be interrupted; elsewhere two forked processes are told what it would tell them.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import tiny
import torch
import toy
from conftest import ROOT
from forked import ended, finished

import common

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
    flags = tiny.SCRIPTS[name]
    two = fork.two(name, *flags, "--out", tmp_path / "two", folder=tmp_path)
    one = finished(fork(name, *flags, "--out", tmp_path / "one", "--workers", 1, folder=tmp_path))
    first, second = map(finished, two)
    assert [one.returncode, first.returncode, second.returncode] == [0, 0, 0], one.stderr + first.stderr + second.stderr
    alone, together = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert alone.keys() == together.keys() and len(alone) > 10
    assert max(abs(alone[key] - together[key]) for key in alone) < 1e-4  # sums in another order, in fp32
    assert first.stdout.count("claims of the paper") == 1 and not second.stdout  # only the first process prints
    reports = [json.loads((tmp_path / folder / "results.json").read_text()) for folder in ("one", "two")]
    assert [c["id"] for c in reports[0]["claims"]] == [c["id"] for c in reports[1]["claims"]]


def do_not_sleep():
    time.sleep = lambda seconds: None


def test_an_interrupted_run_of_two_processes_resumes_to_the_same_numbers(tmp_path, fork):
    """Interrupted under torchrun, which hands the signal on."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    command = [*TORCHRUN, str(ROOT / TOY), "--out", "cut", "--pause", "0.1"]
    cut = subprocess.Popen(command, cwd=tmp_path, env=ENVIRONMENT, **pipes)
    whole = fork.two(TOY, "--out", tmp_path / "whole", "--seeds", 1, folder=tmp_path / "a")
    assert [ended(process) for process in whole] == [0, 0]
    first = tmp_path / "cut" / "arms" / "one-seed0.jsonl"
    deadline = time.monotonic() + 60
    while not first.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    cut.send_signal(signal.SIGTERM)
    _, err = cut.communicate(timeout=60)
    assert cut.returncode != 0 and (tmp_path / "cut" / "arms" / "one-seed0.ckpt").exists(), err
    flags = ("--out", tmp_path / "cut", "--pause", 0.1, "--resume")
    again = fork.two(TOY, *flags, folder=tmp_path / "b", prepare=(do_not_sleep,))
    done = [finished(process) for process in again]
    assert [process.returncode for process in done] == [0, 0], done
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")


def test_seeds_trained_apart_become_one_run(tmp_path, command_line):
    """What the README tells a job array to do: a folder a seed, all arms copied into one, --resume."""
    assert command_line(toy, "--workers", 1, "--seeds", 3, "--out", "whole").returncode == 0
    for seed in range(3):
        assert command_line(toy, "--workers", 1, "--seed", seed, "--out", f"seed-{seed}").returncode == 0
        shutil.copytree(tmp_path / f"seed-{seed}", tmp_path / "all", dirs_exist_ok=True)
    trained = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "all" / "arms").glob("*.json")}
    assert len(trained) == 6
    assert command_line(toy, "--workers", 1, "--seeds", 3, "--resume", "--out", "all").returncode == 0
    reports = [json.loads((tmp_path / folder / "results.json").read_text()) for folder in ("whole", "all")]
    assert all(reports[0][key] == reports[1][key] for key in ("results", "claims", "seeds"))
    assert losses(tmp_path / "whole") == losses(tmp_path / "all")
    assert trained == {path.name: path.stat().st_mtime_ns for path in (tmp_path / "all" / "arms").glob("*.json")}


def test_a_batch_smaller_than_the_number_of_processes_is_refused():
    with pytest.raises(common.UsageError, match="a batch of 3 cannot be cut into 4 parts; raise --batch-size"):
        common.parts_of(torch.zeros(3, 2), 4)
    parts = common.parts_of((torch.arange(5), torch.arange(5)), 2)
    assert [(part[0].tolist(), share) for part, share in parts] == [([0, 1, 2], 0.6), ([3, 4], 0.4)]
