"""Shared by all tests: one thread, ways to run a script as a person does, and one run of each
script that several tests look at.
"""

import contextlib
import functools
import importlib.util
import io
import json
import multiprocessing
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from forked import PATIENCE, ROOT, ForkServer

import common


def pytest_configure(config):
    if config.option.markexpr != "gpu" and os.environ.get("TRITON_INTERPRET") != "0":
        # all other tests are about the CPU, where numbers repeat bit for bit
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    # where pytest runs in the background it would be ignored
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.fsync = lambda descriptor: None  # milliseconds each; tests kill processes, never the machine


def pytest_runtest_setup():
    torch.manual_seed(0)  # a test draws the same numbers, whatever ran before it
    # scripts at full scale, run in this process, take all cores: small tensors get slower
    torch.set_num_threads(1)


def is_long(item):
    return item.get_closest_marker("beside") is not None


def pytest_collection_modifyitems(items):
    items.sort(key=is_long)  # they go on beside the others from the start, and are looked at last
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):  # keywords know folders, too
                item.add_marker(pytest.mark.skip(reason="needs CUDA, and -m gpu"))


def run_script(name, *flags, cwd, **options):
    """`python name flags` with one thread -> CompletedProcess."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **options.pop("env", {})}
    path = ROOT / name if not Path(name).is_absolute() else name
    command = [sys.executable, str(path), *map(str, flags)]
    given = {"cwd": cwd, "env": environment, "capture_output": True, "text": True}
    return subprocess.run(command, check=False, **{"timeout": PATIENCE, **given, **options})


@pytest.fixture
def script(tmp_path):
    """script("adamoe.py", "--steps", "3") -> CompletedProcess, run from an empty folder."""
    return functools.partial(run_script, cwd=tmp_path)


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


@pytest.fixture(scope="session", autouse=True)
def long_runs(request, tmp_path_factory):
    """All that the tests marked `beside` wait for begins before the first test.

    Of `@pytest.mark.beside(run=...)`, run(fork, folder, **parameters of the test) is called
    in a thread, once for all tests that want the same; it starts processes and waits for them.
    """
    chosen = list(filter(is_long, request.session.items))
    if not chosen or "forkserver" not in multiprocessing.get_all_start_methods():
        return lambda item: pytest.skip("this system cannot fork")
    fork, begun = request.getfixturevalue("fork"), {}
    pool = ThreadPoolExecutor(common.num_cores())
    request.addfinalizer(functools.partial(pool.shutdown, cancel_futures=True))

    def begin(item):
        function = item.get_closest_marker("beside").kwargs["run"]
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        key = (function, *parameters.values())
        if key not in begun:
            folder = tmp_path_factory.mktemp(function.__name__)
            begun[key] = pool.submit(function, fork, folder, **parameters)
        return begun[key]

    for item in chosen:
        skipped = any(mark.args[0] for mark in item.iter_markers("skipif"))
        if not skipped and not hasattr(request.config, "workerinput"):  # of pytest-xdist
            begin(item)
    return begin


@pytest.fixture
def beside(request, long_runs):
    """What `run` of this test's mark has returned."""
    return long_runs(request.node).result()


@contextlib.contextmanager
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
            actions = getattr(module, "ACTIONS", None)
            common.run(module.main, module.SMALL, module.FULL, argv, actions=actions)
        out, err = capsys.readouterr()
        return SimpleNamespace(returncode=stop.value.code, stdout=out, stderr=err)

    with same_handlers():
        yield run


def report(folder):
    """results.json of a run."""
    return json.loads((folder / "results.json").read_text())


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory):
    """tiny_run(module) -> what a run of this script with every arm left behind, on next to nothing.

    It is trained once for all tests: they read .folder, .stdout, .report and .arms, {arm: what it
    found with seed 0}, and .run, a common.Run with .config, as its arms saw it.
    """
    made = {}

    def run(module):
        name = module.__name__
        if name not in made:
            has_plots = importlib.util.find_spec("matplotlib") is not None
            more = [*tiny.EVERY_ARM[name], *(["--plot"] if has_plots else [])]
            made[name] = train_on_next_to_nothing(
                module, tmp_path_factory.mktemp(name) / "out", *more
            )
        return made[name]

    return run


def train_on_next_to_nothing(module, folder, *more):
    name = module.__name__
    flags = [*tiny.SCRIPTS[f"{name}.py"], *more, "--workers", 1, "--threads", 1, "--out", folder]
    argv = [str(flag) for flag in flags]
    printed, complained = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(complained):
        with same_handlers(), pytest.raises(SystemExit) as stop:
            common.run(module.main, module.SMALL, module.FULL, argv)
    assert stop.value.code == 0, complained.getvalue()
    found = report(folder)
    settings = {}
    for key, value in found["config"].items():
        settings[key] = tuple(value) if isinstance(value, list) else value
    config = module.Config(**settings)
    return SimpleNamespace(
        folder=folder,
        stdout=printed.getvalue(),
        report=found,
        arms={arm: seeds[0] for arm, seeds in found["results"]["arms"].items()},
        run=common.Run(name, "small", "cpu", torch.float32, [0], folder, config=config),
    )


def judged(module, config, arms, num_seeds=3):
    """{name: claim} of a script, where every seed found the same: {arm: its result}."""
    results = common.Results({arm: [found] * num_seeds for arm, found in arms.items()})
    claims = {}
    for claim in common.claims_of(module.main):
        claim.judge(results, config)
        claims[claim.id.partition(".")[2]] = claim
    return claims


def check_claims(module, config, good, worse, num_seeds=3):
    """Where every arm found what `good` says, all claims hold; a change of `worse` undoes its claim.

    worse: {claim: [{arm: what changes in its result}]}; each change alone has to do.
    Returns the claims that hold, to look at what they say.
    """
    holding = judged(module, config, good, num_seeds)
    assert set(holding) == set(worse)
    words = {claim.verdict for claim in holding.values()}
    assert words <= {"holds", "seen", "passed"}, {k: v.verdict for k, v in holding.items()}
    for name, changes in worse.items():
        for change in changes:
            arms = dict(good)
            for arm, changed in change.items():
                arms[arm] = good[arm] | changed
            verdict = judged(module, config, arms, num_seeds)[name].verdict
            assert verdict in ("contradicted", "not seen", "failed"), (name, change, verdict)
    return holding


def imports_of_the_page(method):
    """What docs/METHOD.md tells people to put above the pasted method."""
    page = (ROOT / "docs" / f"{method}.md").read_text()
    return page.split("these lines above it:\n\n```py\n")[1].split("```")[0]
