"""Several processes under torchrun train one model as one process does."""

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

import common

if not torch.distributed.is_available():
    pytest.skip("this torch has no torch.distributed", allow_module_level=True)

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
TOY = str(ROOT / "tests" / "toy.py")


def losses(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {(line["arm"], line["step"]): line["loss"] for line in lines}


def start(tmp_path, *command):
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*TORCHRUN, *map(str, command)], cwd=tmp_path, env=ENVIRONMENT, **pipes)


@pytest.mark.parametrize("name", tiny.DATA_PARALLEL)
def test_two_processes_follow_the_loss_curve_of_one(tmp_path, script, name):
    flags = tiny.SCRIPTS[name]
    two = start(tmp_path, ROOT / name, *flags, "--out", "two")
    one = script(name, *flags, "--out", "one", "--workers", "1")
    out, err = two.communicate(timeout=120)
    assert two.returncode == 0 and one.returncode == 0, err + one.stderr
    alone, together = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert alone.keys() == together.keys() and len(alone) > 10
    assert max(abs(alone[key] - together[key]) for key in alone) < 1e-4  # sums in another order, in fp32
    assert out.count("claims of the paper") == 1  # only the first process prints
    reports = [json.loads((tmp_path / folder / "results.json").read_text()) for folder in ("one", "two")]
    assert [c["id"] for c in reports[0]["claims"]] == [c["id"] for c in reports[1]["claims"]]


def test_an_interrupted_run_of_two_processes_resumes_to_the_same_numbers(tmp_path):
    whole = start(tmp_path, TOY, "--out", "whole", "--seeds", 1)
    assert whole.wait(120) == 0, whole.stderr.read()
    cut = start(tmp_path, TOY, "--out", "cut", "--pause", 0.1)
    first = tmp_path / "cut" / "arms" / "one-seed0.jsonl"
    deadline = time.monotonic() + 60
    while not first.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    cut.send_signal(signal.SIGTERM)
    cut.communicate(timeout=60)
    assert cut.returncode != 0 and (tmp_path / "cut" / "arms" / "one-seed0.ckpt").exists()
    again = start(tmp_path, TOY, "--out", "cut", "--pause", 0.1, "--resume")
    _, err = again.communicate(timeout=120)
    assert again.returncode == 0, err
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
        common._parts(torch.zeros(3, 2), 4)
    parts = common._parts((torch.arange(5), torch.arange(5)), 2)
    assert [(part[0].tolist(), share) for part, share in parts] == [([0, 1, 2], 0.6), ([3, 4], 0.4)]
