"""Processes for tests, each forked from one that has imported torch already (preloaded.py): a
script then starts in
milliseconds instead of seconds, as a process of its own, with its own signals, files, exit code and workers.

The fixture `fork` of conftest.py starts them. What only an executed python can show (an import that is interrupted,
torchrun, workers that read OMP_NUM_THREADS) goes through the fixture `script`.
"""

import multiprocessing
import os
import runpy
import sys
import threading
import time
from functools import partial
from pathlib import Path
from subprocess import CompletedProcess

import torch

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = dict(os.environ)  # as the tests found it
PATIENCE = 600.0  # seconds: however busy the machine is, only what hangs takes as long
MULTIPROCESSING = threading.Lock()  # multiprocessing keeps its lists of children for one thread


def play(script, flags, folder, prepare):
    """In the forked process: what `python script flags` would do in this folder."""
    os.chdir(folder)
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(name, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o644), number)
    torch.set_num_threads(1)
    # Python would start another server here; the script's jobs come from the same one.
    multiprocessing.forkserver._forkserver.ensure_running = lambda: None
    multiprocessing.forkserver.ensure_running = lambda: None
    for action in prepare:
        action()
    sys.argv = [str(ROOT / script), *map(str, flags)]
    runpy.run_path(sys.argv[0], run_name="__main__")


def set_environment(**names):
    os.environ.update(names)


class ForkServer:
    """fork(script, *flags, folder=...) -> a running process, whose output goes to folder/out and
    folder/err.

    prepare: functions that the process calls before it becomes the script. `call` runs a function instead.
    """

    def __init__(self):
        self.context, self.started = multiprocessing.get_context("forkserver"), []
        self.context.set_forkserver_preload(["pytest", "preloaded"])
        paths = [str(ROOT), str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
        before = dict(os.environ)
        os.environ.clear()
        os.environ.update(ENVIRONMENT, PYTHONPATH=os.pathsep.join(paths), OMP_NUM_THREADS="1")
        multiprocessing.forkserver.ensure_running()
        os.environ.clear()
        os.environ.update(before)

    def __call__(self, script, *flags, folder, prepare=()):
        folder.mkdir(parents=True, exist_ok=True)
        process = self.call(play, script, flags, folder, prepare)
        process.args, process.folder = (script, *map(str, flags)), folder
        return process

    def call(self, function, *arguments):
        process = self.context.Process(target=function, args=arguments)
        with MULTIPROCESSING:
            process.start()
        self.started.append(process)
        return process

    def two(self, script, *flags, folder, prepare=()):
        """What torchrun starts: two processes that are told where they meet, with folder/0 and
        folder/1 of their own.

        A relative path in `flags` is another one in each; the first process alone prints and writes.
        """
        store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        told = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
        told |= {
            "TORCHELASTIC_USE_AGENT_STORE": "True"
        }  # the store is there already, on a port that was free
        found = []
        for rank in "01":
            ranked = partial(set_environment, RANK=rank, LOCAL_RANK=rank, **told)
            found.append(self(script, *flags, folder=folder / rank, prepare=(ranked, *prepare)))
            found[-1].store = store  # lives as long as they do
        return found

    def end(self):
        """A test that failed may have left some; a worker ends with its parent."""
        for process in self.started:
            if ended(process, 0) is None:
                process.kill()


def ended(process, within=PATIENCE):
    """Wait for the process, at most so many seconds: its exit code, None if it still runs."""
    deadline = time.monotonic() + within
    while True:
        with MULTIPROCESSING:
            code = process.exitcode
        if code is not None or time.monotonic() > deadline:
            return code
        time.sleep(0.005)


def finished(process):
    """A script that ran to its end, as subprocess.run would report it."""
    code, texts = ended(process), [(process.folder / name).read_text() for name in ("out", "err")]
    return CompletedProcess(process.args, code, *texts)


def wait_until(condition, process=None):
    """Wait until condition() is true, or fail: when the process has ended, or hangs."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        code = None if process is None else ended(process, 0)
        assert code is None, f"it has ended with {code}: {(process.folder / 'err').read_text()}"
        assert time.monotonic() < deadline, f"not within {PATIENCE} s"
        time.sleep(0.005)
