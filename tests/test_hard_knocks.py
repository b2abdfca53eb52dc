"""What a run has to live through: NaN, a full disk, kill -9, Ctrl-C, a second run beside it,
damaged and hostile files, and settings that cannot be.

Every script of tests/tiny.py goes through the same mishaps one after the other and must end with
the numbers of a run that was left in peace. A script runs in a process of its own, as a person
starts it, but forked (tests/forked.py); as many at a time as there are cores.
"""

import contextlib
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
import toy
from conftest import ROOT
from forked import PATIENCE, ended, wait_until
from test_images import write_cifar100
from torch.optim.optimizer import register_optimizer_step_post_hook

import common
from data import download

resource = pytest.importorskip("resource", reason="needs fork, signals and limits of POSIX")
TOY = "tests/toy.py"
FLAGS = {**tiny.SCRIPTS, TOY: ("--steps", "60", "--pause", "0.02")}


# --- processes ------------------------------------------------------------------------------------


def frequent_checkpoints():
    """There is always one to go on from."""
    train = common.train
    common.train = lambda *args, **options: train(*args, **{**options, "checkpoint_seconds": 0.0})


def limit_files(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))  # as `ulimit -f` does


def poison(after):
    """A weight becomes NaN after so many optimizer steps of this process."""
    seen = iter(range(1, 1 << 30))

    def hook(optimizer, *_):
        if next(seen) == after:
            optimizer.param_groups[0]["params"][0].data.fill_(float("nan"))

    register_optimizer_step_post_hook(hook)


def numbers(folder):
    """What a run found, and its metrics, without anything measured in seconds."""

    def timeless(thing):
        if isinstance(thing, dict):
            kept = [key for key in thing if not key.startswith("seconds")]
            return {key: timeless(thing[key]) for key in kept}
        return [timeless(item) for item in thing] if isinstance(thing, list) else thing

    results = json.loads((folder / "results.json").read_text())["results"]
    del results["tables"]  # for people; they show seconds, too
    return json.dumps(timeless(results)), (folder / "metrics.jsonl").read_text()


def hard_life(fork, folder, name):
    """A run in peace, then the same one through NaN, full disk, kill -9 and Ctrl-C at random
    moments: the two folders and [(mishap, exit code, stderr)].
    """
    random = np.random.default_rng(zlib.crc32(name.encode()))
    flags, told, began = [*FLAGS[name], "--workers", "1", "--out"], [], time.monotonic()
    peace, cut, printed = folder / "peace", folder / "cut", folder / "out"
    process = fork(name, *flags, "peace", folder=folder, prepare=(frequent_checkpoints,))
    assert ended(process) == 0, (folder / "err").read_text()
    latest = (0.12 if name == TOY else 0.4) * (time.monotonic() - began)
    steps = (peace / "metrics.jsonl").read_text().count("\n")
    largest = max(path.stat().st_size for path in peace.rglob("*") if path.is_file())

    def go_on(mishap, *prepare, stop=None):
        again = ["--resume"] if (cut / "run.json").exists() else []
        printed.unlink(missing_ok=True)  # that of the run before
        prepare = (frequent_checkpoints, *prepare)
        process = fork(name, *flags, "cut", *again, folder=folder, prepare=prepare)
        if stop in (signal.SIGINT, signal.SIGTERM):  # common.run has taken over when it prints
            while not (printed.exists() and printed.stat().st_size):
                if ended(process, 0.002) is not None:
                    break
        if stop is not None and ended(process, random.uniform(0, latest)) is None:
            os.kill(process.pid, stop)
        told.append((mishap, ended(process), (folder / "err").read_text()))

    go_on("NaN", partial(poison, int(random.integers(1, 1 + steps // 3))))
    go_on("full disk", partial(limit_files, int(random.uniform(0.1, 0.9) * largest)))
    go_on("kill", stop=signal.SIGKILL)
    go_on("interrupt", stop=signal.SIGINT)
    if name == TOY:  # to common.run one is as good as the other
        go_on("terminate", stop=signal.SIGTERM)
    go_on("end")
    return peace, cut, told


@pytest.mark.beside(run=hard_life)
@pytest.mark.parametrize("name", FLAGS)
def test_after_any_mishap_a_run_goes_on_to_the_same_numbers(name, beside):
    peace, cut, told = beside
    print(*told, sep="\n")
    for mishap, code, err in told:
        assert "Traceback" not in err, f"{mishap}: {err}"
        last = (err.strip().splitlines() or [""])[-1]
        match mishap:
            case "NaN":
                places = (" at step ", " after step ", " at epoch ")
                assert code == 1 and any(place in last for place in places), last
                assert "last good checkpoint: " in last
            case "full disk":
                assert code == 1 and "File too large: 'cut" in last and "--resume" in last, last
            case "kill":
                assert code in (-signal.SIGKILL, 0), err
            case "interrupt":
                kept = "--resume" in last or "before the first step" in last
                assert code == 0 or (code == 130 and kept), err
            case "terminate":
                assert code == 0 or (code == 143 and "--resume" in last), err
            case "end":
                assert code == 0, err
    assert numbers(cut) == numbers(peace)
    assert files(cut) == files(peace)  # nothing half-written, no checkpoint is left over


def files(folder):
    found = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return sorted(path.relative_to(folder).as_posix() for path in found)


# --- folders --------------------------------------------------------------------------------------


def hold(folder, held, release):
    """Another run in this folder: what common.Run does before it trains."""
    common.Run("toy", "small", "cpu", torch.float32, [0], folder, resume=True).keep_others_out()
    held.set()
    release.wait(PATIENCE)


def test_a_folder_that_is_held_or_none_is_refused_in_one_line(fork, tmp_path):
    flags = ("--workers", "1", "--steps", "3", "--out")

    def ask(said, *more):
        process = fork(TOY, *flags, *more, folder=tmp_path / "beside")
        code, err = ended(process), (tmp_path / "beside" / "err").read_text()
        assert code == 2 and said in err and err.count("\n") == 1, err

    assert ended(fork(TOY, *flags, tmp_path / "held", folder=tmp_path / "beside")) == 0
    before = {path: (tmp_path / "held" / path).read_bytes() for path in files(tmp_path / "held")}
    held, release = fork.context.Event(), fork.context.Event()
    holder = fork.call(hold, tmp_path / "held", held, release)
    assert held.wait(PATIENCE)
    for flag in ("--resume", "--overwrite"):
        ask("is in use by another run (process ", tmp_path / "held", flag)
    assert before == {path: (tmp_path / "held" / path).read_bytes() for path in before}
    os.kill(holder.pid, signal.SIGKILL)  # which releases the folder
    ended(holder)
    again = fork(TOY, *flags, tmp_path / "held", "--overwrite", folder=tmp_path / "beside")
    assert ended(again) == 0
    ask("cannot be written: Not a directory", tmp_path / "beside" / "err" / "out")


def test_of_runs_that_start_at_once_in_one_folder_one_runs(fork, tmp_path):
    flags = ("--workers", "1", "--pause", "0.02", "--out", tmp_path / "out")
    begun = [fork(TOY, *flags, folder=tmp_path / str(i)) for i in range(4)]
    codes = [ended(process) for process in begun]
    told = [(tmp_path / str(i) / "err").read_text() for i in range(4)]
    assert sorted(codes) == [0, 2, 2, 2], told
    for code, err in zip(codes, told):
        refused = "in use by another run" in err or "holds a run" in err
        assert code == 0 or (err.count("\n") == 1 and refused), err
    again = fork(TOY, *flags, "--resume", folder=tmp_path / "again")
    assert ended(again) == 0 and arms_of(tmp_path / "out")


def interrupt_the_start(fork, folder):
    """As a terminal does: Ctrl-C to every process of the run."""
    command = [sys.executable, ROOT / TOY, "--workers", "2", "--out", "out", "--pause", "0.05"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, cwd=folder, start_new_session=True, **pipes)
    wait_until((folder / "out" / "run.json").exists)
    time.sleep(0.1)  # the next thing that it does: start the fork server
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=PATIENCE)
    return process.returncode, err


@pytest.mark.beside(run=interrupt_the_start)
def test_ctrl_c_while_processes_start_is_one_line(beside):
    """The fork server ignores it from its first moment; the run itself ends in order."""
    code, err = beside
    assert code == 130 and "Traceback" not in err and "--resume" in err, err


VOLLEYS = [  # signal, workers, how many, seconds apart
    (signal.SIGTERM, 1, 2, 0.1),
    (signal.SIGTERM, 2, 40, 0.002),
    (signal.SIGINT, 1, 40, 0.002),
    (signal.SIGINT, 2, 2, 0.1),
]


@pytest.mark.parametrize("number, workers, times, apart", VOLLEYS)
def test_signals_in_a_volley_end_a_run_in_order(fork, tmp_path, number, workers, times, apart):
    """`timeout` sends two, impatient people more: one line, the first one's exit code, all kept."""
    (tmp_path / "hold").touch()
    flags = ("--steps", 400, "--hold", tmp_path / "hold", "--out", "cut", "--workers", workers)
    process = fork(TOY, *flags, folder=tmp_path)
    wait_until(lambda: len(list(tmp_path.glob("cut/arms/*.jsonl"))) == workers, process)
    for _ in range(times):
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, number)
        time.sleep(apart)
    assert ended(process) == 128 + number, (tmp_path / "err").read_text()
    said = (tmp_path / "err").read_text()
    assert "Traceback" not in said and said.count("--resume") == 1
    assert list(tmp_path.glob("cut/arms/*.ckpt"))


# --- damage ---------------------------------------------------------------------------------------


def mangled(content, random):
    """Bytes flipped, cut off, inserted or doubled."""
    raw, at = bytearray(content), int(random.integers(len(content)))
    length = int(random.integers(1, 40))
    match random.integers(4):
        case 0:
            for place in random.integers(0, len(raw), random.integers(1, 4)):
                raw[place] ^= int(random.integers(1, 256))
        case 1:
            del raw[at:]
        case 2:
            raw[at:at] = random.integers(0, 256, length, dtype=np.uint8).tobytes()
        case 3:
            raw[at:at] = raw[at : at + length]
    return bytes(raw)


FOUR_STEPS = ("--workers", 1, "--steps", 4, "--out", "out")


def arms_of(folder):
    return json.loads((folder / "results.json").read_text())["results"]["arms"]


def test_damaged_files_of_a_run_never_change_a_number(command_line, tmp_path, monkeypatch):
    flags, out, random = FOUR_STEPS, tmp_path / "out", np.random.default_rng(0)
    assert command_line(toy, *flags).returncode == 0
    whole = arms_of(out)

    def stop(step):
        if step == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(toy.time, "sleep", lambda pause: None)
    (out / "arms" / "two-seed0.json").unlink()
    train = common.train
    options = {"on_step": stop, "checkpoint_seconds": 0.0}
    monkeypatch.setattr(common, "train", lambda *given, **own: train(*given, **own | options))
    assert command_line(toy, *flags, "--resume").returncode == 130
    monkeypatch.setattr(common, "train", train)
    shutil.copytree(out, tmp_path / "kept")
    names = ["run.json", "arms/one-seed0.json", "arms/two-seed0.jsonl", "arms/two-seed0.ckpt"]
    codes = []
    for name in names * 8:
        shutil.rmtree(out)
        shutil.copytree(tmp_path / "kept", out)
        (out / name).write_bytes(mangled((out / name).read_bytes(), random))
        done = command_line(toy, *flags, "--resume")
        codes.append(done.returncode)
        if done.returncode == 0:
            assert arms_of(out) == whole
            lines = (out / "metrics.jsonl").read_text().splitlines()
            assert [json.loads(line)["step"] for line in lines] == [0, 1, 2, 3] * 2
        else:
            last = done.stderr.splitlines()[-1]
            assert done.returncode == 2 and last.startswith("toy.py: "), done.stderr
            assert "Traceback" not in done.stderr
            assert Path(name).name in last or "--resume: out was run with" in last, last
    assert 2 in codes  # some was noticed


MOMENTS = {"step": torch.tensor(2.0), "exp_avg": torch.ones(7, 7), "exp_avg_sq": torch.ones(7, 7)}
NAN = {"weight": torch.full((1, 4), torch.nan), "bias": torch.zeros(1)}
TWICE = '{"arm": "two-seed0", "step": 0}\n{"arm": "two-seed0", "step": 0}\n'


OTHERWISE = [
    ("run.json", '{"identity": {}}'),
    ("arms/one-seed0.json", '{"result": {"loss": 0.0}}'),
    ("arms/one-seed0.json", ('"loss": 3', '"loss": 4')),
    ("arms/two-seed0.jsonl", TWICE),
    ("arms/two-seed0.ckpt", {"model": None, "optimizer": None}),
    ("arms/two-seed0.ckpt", {"step": 99}),
    ("arms/two-seed0.ckpt", {"step": 2.5}),
    ("arms/two-seed0.ckpt", {"random": [torch.ones(3)]}),
    ("arms/two-seed0.ckpt", {"model": NAN}),
    ("arms/two-seed0.ckpt", {"optimizer": {"state": {0: MOMENTS}}}),
]


@pytest.mark.parametrize("name, content", OTHERWISE)
def test_files_of_a_run_that_say_something_else_are_refused(command_line, tmp_path, name, content):
    """Sound files, with a content that no run has written."""
    out, random = tmp_path / "out", torch.get_rng_state()
    assert command_line(toy, *FOUR_STEPS).returncode == 0
    (out / "arms" / "two-seed0.json").unlink()
    model = torch.nn.Linear(4, 1)
    good = {"model": model.state_dict(), "optimizer": common.adamw(model, 0.1).state_dict()}
    good |= {"step": 2, "last": {"loss": 1.0}, "random": [random]}
    common.save(out / "arms" / "two-seed0.ckpt", good)
    before = (out / name).read_bytes()
    if isinstance(content, dict):
        common.save(out / name, good | content)
    elif isinstance(content, tuple):
        (out / name).write_text(before.decode().replace(*content))
    else:
        (out / name).write_text(content)
    assert (out / name).read_bytes() != before
    done = command_line(toy, *FOUR_STEPS, "--resume")
    assert done.returncode == 2 and Path(name).name in done.stderr.splitlines()[-1], done.stderr
    assert "Traceback" not in done.stderr
    torch.set_rng_state(random)


def test_a_checkpoint_with_a_flipped_bit_is_refused(tmp_path):
    """torch compares no checksums."""
    path, weights = tmp_path / "a.ckpt", torch.arange(400.0)
    common.save(path, {"w": weights})
    content = bytearray(path.read_bytes())
    content[content.index(weights.numpy().tobytes()) + 100] ^= 1
    path.write_bytes(content)
    with pytest.raises(common.UsageError, match="a.ckpt is not a readable file of tensors"):
        common.load(path)


def test_what_a_killed_run_left_half_done_is_put_in_order(command_line, tmp_path):
    out = tmp_path / "out"
    assert command_line(toy, *FOUR_STEPS).returncode == 0
    whole = numbers(out)
    shutil.rmtree(out / "arms")  # killed between run.json and the folder of the arms
    (out / ".results.json.123.tmp").write_text("half")
    assert command_line(toy, *FOUR_STEPS, "--resume").returncode == 0
    assert numbers(out) == whole and not list(out.rglob("*.tmp"))


# --- settings that cannot be, and plans ----------------------------------------------------------

REFUSED = [  # what a script alone can know; what common.run refuses stands in test_common.py
    ("home", "--rows 3000 --batch-size 2500", "batch_size is 2500; there are 2400 rows"),
    ("home", "--data census --rows 9", "--rows does nothing here; it belongs to data synth"),
    ("home", "--data census --data-dir .", "line 1: 2 columns, 42 are expected"),
    ("dual_head_kd", "--batch-size 5000", "less than one batch"),
    ("dual_head_kd", "--full --data nowhere", "nowhere holds neither train.bin"),
    ("dual_head_kd", "--full --data photos --val-per-class 4", "smallest class has 4"),
    ("dual_head_kd", "--teacher-file nested.pt", "nested.pt: there is no weight 'model' here"),
    ("mcsmoe", "--kept 17", "kept is 17; the model has 16"),
    ("mcsmoe", "--arms msmoe@skip=9", "skip is 9"),
    ("smoe_dropout", "--num-experts 5", "d_ff is 1024, num_experts 5"),
    ("smoe_dropout", "--tasks sst2 --data-dir .", "line 2: label '7'"),
    ("adamoe", "--load 1 --num-null 3", "give --load or --num-null"),
    ("adamoe", "--text short", "too short"),
    ("adamoe", "--full --text x", "--text does nothing here; it belongs to scale small"),
]


@pytest.mark.parametrize("name, flags, expected", REFUSED)
def test_what_a_script_refuses_is_one_line(command_line, tmp_path, name, flags, expected):
    write_cifar100(tmp_path / "photos")
    for path, text in {
        "census/census-income.data": "1, 2\n",
        "sst2/SST-2/train.tsv": "good\t1\nbad\t7\n",
        "sst2/SST-2/dev.tsv": "good\t1\nbad\t7\n",
        "short": "hello world\n" * 9,
    }.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    torch.save({"model": {}}, tmp_path / "nested.pt")
    before = files(tmp_path)
    done = command_line(importlib.import_module(name), *flags.split(), "--workers", 1)
    assert done.returncode == 2 and expected in done.stderr, done.stderr
    assert done.stderr.count("\n") == 1
    if "--teacher-file" not in flags:  # read when the teacher's turn comes
        assert files(tmp_path) == before


def test_a_dry_run_of_the_full_scale_needs_no_data(command_line, tmp_path):
    home, flags = importlib.import_module("home"), "--full --hash-bits 6 --batch-size 32"
    done = command_line(home, *flags.split(), "--data-dir", "nowhere", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "parameters" in done.stdout and "kuairand-1k is not here yet" in done.stdout
    assert not list(tmp_path.iterdir())


# --- downloads ------------------------------------------------------------------------------------


def test_a_download_that_fails_is_one_line_of_the_script(command_line, tmp_path, monkeypatch):
    """Nobody listens there. What else may happen to a download stands in test_download.py."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    address = "http://127.0.0.1:9/file"
    table = download.Dataset("enwik8", (download.File(address, save_as="file"),), "", "")
    monkeypatch.setitem(download.DATASETS, "enwik8", table)
    module = importlib.import_module("smoe_dropout")
    done = command_line(module, "--full", "--data-dir", tmp_path / "here", "--out", "out")
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert "no connection" in done.stderr
    assert f"put {address} at {tmp_path / 'here' / 'enwik8' / 'file'} by hand" in done.stderr
    assert not (tmp_path / "out").exists()
