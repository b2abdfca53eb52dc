"""Shared by all tests: one thread, float64 where a test says so, and a way to run a script as a
person does.
"""

import multiprocessing
import os
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from forked import ROOT, ForkServer

import common


def pytest_configure(config):
    if config.option.markexpr != "gpu" and os.environ.get("TRITON_INTERPRET") != "0":
        # all other tests are about the CPU, where numbers repeat bit for bit
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # in the background it would be ignored
    os.fsync = lambda descriptor: None  # milliseconds each; tests kill processes, never the machine


def pytest_runtest_setup():
    torch.set_num_threads(
        1
    )  # scripts at full scale, run in this process, take all cores: small tensors get slower


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):  # keywords know folders, too
                item.add_marker(pytest.mark.skip(reason="needs CUDA, and -m gpu"))


@pytest.fixture
def script(tmp_path):
    """script("adamoe.py", "--steps", "3") -> CompletedProcess, run from an empty folder with one
    thread.
    """

    def run(name, *flags, cwd=tmp_path, **options):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **options.pop("env", {})}
        path = ROOT / name if not Path(name).is_absolute() else name
        command = [sys.executable, str(path), *map(str, flags)]
        given = {
            "cwd": cwd,
            "env": environment,
            "capture_output": True,
            "text": True,
            "timeout": 120,
            **options,
        }
        return subprocess.run(command, check=False, **given)

    return run


@pytest.fixture(scope="session")
def fork():
    """fork("adamoe.py", "--steps", 3, folder=...) -> a running process that need not import torch;
    see forked.py.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        pytest.skip("this system cannot fork")
    server = ForkServer()
    yield server
    server.end()


@contextmanager
def same_handlers():
    """common.run sets the handlers of Ctrl-C and SIGTERM, which are those of the tests afterwards."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.fixture
def command_line(tmp_path, monkeypatch, capsys):
    """command_line(module, "--steps", 3): the same in this process, which saves the seconds of
    importing torch.
    """
    monkeypatch.chdir(tmp_path)

    def run(module, *flags):
        argv = [str(flag) for flag in flags]
        with pytest.raises(SystemExit) as stop:
            common.run(module.main, module.SMALL, module.FULL, argv)
        out, err = capsys.readouterr()
        return SimpleNamespace(returncode=stop.value.code, stdout=out, stderr=err)

    with same_handlers():
        yield run
