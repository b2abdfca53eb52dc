"""What a run has to live through: NaN, a full disk, kill -9, Ctrl-C, a second run beside it, damaged and hostile files.

Every script of tests/tiny.py goes through the same mishaps one after the other and must end with the numbers of a run
that was left in peace. A script runs in a process of its own, as a person starts it, but forked from one that has
imported torch already (tests/forked.py); as many at a time as there are cores.
"""

import contextlib
import ctypes
import io
import json
import multiprocessing
import os
import runpy
import shutil
import signal
import struct
import sys
import tarfile
import threading
import time
import types
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
import toy
from conftest import ROOT
from torch.optim.optimizer import register_optimizer_step_post_hook

import common
from data import behavior, download, graphs, images, tasks, text

resource = pytest.importorskip("resource", reason="needs fork, signals and limits of POSIX")
TOY = "tests/toy.py"
FLAGS = {**tiny.SCRIPTS, TOY: ("--steps", "30")}
MULTIPROCESSING = threading.Lock()  # multiprocessing keeps its lists of children for one thread


# --- processes -----------------------------------------------------------------------------------------------


def play(script, flags, folder, prepare):
    """In the forked process: what `python script flags` would do in this folder."""
    os.chdir(folder)
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(name, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o644), number)
    torch.set_num_threads(1)
    train = common.train  # checkpoints come so often that there is always one to go on from
    common.train = lambda *args, **options: train(*args, **{**options, "checkpoint_seconds": 0.05})
    for action in prepare:
        action()
    sys.argv = [str(ROOT / script), *map(str, flags)]
    runpy.run_path(sys.argv[0], run_name="__main__")


def limit_files(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))  # as `ulimit -f` does


def give_up_rights():
    """Root passes by permission bits; without its capabilities it is a user like any other."""
    if os.geteuid() == 0:
        ctypes.CDLL(None).capset(struct.pack("=Ii", 0x20080522, 0), bytes(24))


def poison(after):
    """A weight becomes NaN after so many optimizer steps of this process."""
    seen = iter(range(1, 1 << 30))

    def hook(optimizer, *_):
        if next(seen) == after:
            optimizer.param_groups[0]["params"][0].data.fill_(float("nan"))

    register_optimizer_step_post_hook(hook)


@pytest.fixture(scope="module")
def fork():
    """fork(script, *flags, folder=...) -> a running process. Its exit code: ended(process)."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        pytest.skip("this system cannot fork")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pytest", "forked"])
    paths = [str(ROOT), str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(paths))
        patch.setenv("OMP_NUM_THREADS", "1")
        multiprocessing.forkserver.ensure_running()

    def start(script, *flags, folder, prepare=()):
        folder.mkdir(parents=True, exist_ok=True)
        process = context.Process(target=play, args=(script, flags, folder, prepare))
        with MULTIPROCESSING:
            process.start()
        return process

    return start


def ended(process, within=120.0):
    """Wait for the process, at most so many seconds: its exit code, None if it still runs."""
    deadline = time.monotonic() + within
    while True:
        with MULTIPROCESSING:
            code = process.exitcode
        if code is not None or time.monotonic() > deadline:
            return code
        time.sleep(0.005)


@pytest.fixture(scope="module")
def pool():
    with ThreadPoolExecutor(common._cores()) as executor:
        yield executor


def numbers(folder):
    """What a run found, and its metrics, without anything measured in seconds."""

    def timeless(thing):
        if isinstance(thing, dict):
            return {key: timeless(value) for key, value in thing.items() if not key.startswith("seconds")}
        return [timeless(item) for item in thing] if isinstance(thing, list) else thing

    results = json.loads((folder / "results.json").read_text())["results"]
    del results["tables"]  # for people; they show seconds, too
    return json.dumps(timeless(results)), (folder / "metrics.jsonl").read_text()


def mishaps(fork, name, folder, whole):
    """The same run through NaN, full disk, kill -9 and Ctrl-C at random moments: [(mishap, exit code, stderr)]."""
    random = np.random.default_rng(zlib.crc32(name.encode()))
    flags, told = [*FLAGS[name], "--workers", "1", "--out", "cut"], []

    def go_on(mishap, *prepare, stop=None):
        again = ["--resume"] if (folder / "cut" / "run.json").exists() else []
        process = fork(name, *flags, *again, folder=folder, prepare=prepare)
        if stop == signal.SIGINT:
            while not (folder / "out").exists() or not (folder / "out").stat().st_size:  # common.run has taken over
                time.sleep(0.002)
                if ended(process, 0) is not None:
                    break
        if stop is not None and ended(process, random.uniform(0, 0.6 * whole.seconds)) is None:
            os.kill(process.pid, stop)
        told.append((mishap, ended(process), (folder / "err").read_text()))

    largest = max(path.stat().st_size for path in whole.folder.rglob("*") if path.is_file())
    go_on("NaN", partial(poison, int(random.integers(1, whole.steps))))
    go_on("full disk", partial(limit_files, int(random.uniform(0.1, 0.9) * largest)))
    go_on("kill", stop=signal.SIGKILL)
    go_on("interrupt", stop=signal.SIGINT)
    go_on("end")
    return told


def names_of(request, test):
    """The scripts for which this test is going to run."""
    chosen = [item for item in request.session.items if getattr(item, "originalname", "") == test]
    return [item.callspec.params["name"] for item in chosen]


@pytest.fixture(scope="module")
def whole(fork, pool, tmp_path_factory):
    """name -> a run that nothing happened to, made when first asked for."""
    found, lock = {}, threading.Lock()

    def run(name, folder):
        began = time.monotonic()
        code = ended(fork(name, *FLAGS[name], "--workers", "1", "--out", "whole", folder=folder))
        seconds = time.monotonic() - began
        assert code == 0, (folder / "err").read_text()
        steps = (folder / "whole" / "metrics.jsonl").read_text().count("\n")
        return types.SimpleNamespace(folder=folder / "whole", seconds=seconds, steps=steps)

    def ask(name):
        with lock:
            if name not in found:
                found[name] = pool.submit(run, name, tmp_path_factory.mktemp("whole"))
        return found[name]

    return ask


@pytest.fixture(scope="module")
def cut(request, fork, pool, whole, tmp_path_factory):
    names = names_of(request, "test_after_any_mishap_a_run_goes_on_to_the_same_numbers")
    runs = {name: whole(name) for name in names}
    later = lambda name, folder: mishaps(fork, name, folder, runs[name].result())
    folders = {name: tmp_path_factory.mktemp("cut") for name in names}
    return {name: (folders[name], pool.submit(later, name, folders[name])) for name in names}


@pytest.mark.parametrize("name", FLAGS)
def test_after_any_mishap_a_run_goes_on_to_the_same_numbers(name, cut, whole):
    folder, told = cut[name][0], cut[name][1].result()
    left = whole(name).result().folder
    print(*told, sep="\n")
    for mishap, code, err in told:
        assert "Traceback" not in err, f"{mishap}: {err}"
        last = (err.strip().splitlines() or [""])[-1]
        match mishap:
            case "NaN":
                assert code == 1 and " at step " in last or " after step " in last or " at epoch " in last, last
                assert "last good checkpoint: " in last
            case "full disk":
                assert code == 1 and "File too large: 'cut" in last and "--resume" in last, last
            case "kill":
                assert code in (-signal.SIGKILL, 0), err
            case "interrupt":
                assert code == 0 or (code == 130 and ("--resume" in last or "before the first step" in last)), err
            case "end":
                assert code == 0, err
    assert [mishap for mishap, *_ in told] == ["NaN", "full disk", "kill", "interrupt", "end"]
    assert numbers(folder / "cut") == numbers(left)
    files = lambda run: {path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file()}
    assert files(folder / "cut") == files(left)  # nothing half-written, no checkpoint is left over
