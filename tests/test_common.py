"""The house: files never half-written, runs that survive interruption, one rule for a claim."""

import importlib
import math
import os
import pickle
import signal
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
import toy
from conftest import report, run_script, same_handlers
from forked import ended, finished, wait_until
from torch import nn

import common

TOY = "tests/toy.py"


# --- files ----------------------------------------------------------------------------------------


class Bomb:
    def __reduce__(self):
        return os.system, ("touch exploded",)


def test_a_failed_write_leaves_the_old_file_and_no_rubbish(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    common.write_json(path, {"x": 1})
    with pytest.raises(TypeError):
        common.write_json(path, {"x": object()})
    monkeypatch.setattr(os, "replace", lambda *paths: (_ for _ in ()).throw(OSError("no rename")))
    with pytest.raises(OSError, match="no rename"):
        common.write_json(path, {"x": 2})
    assert common.read_json(path) == {"x": 1} and [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_file_is_on_the_disk_before_it_takes_the_place_of_the_old_one(tmp_path, monkeypatch):
    calls, replace = [], os.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: calls.append("fsync"))
    monkeypatch.setattr(os, "replace", lambda *paths: calls.append("replace") or replace(*paths))
    common.write_json(tmp_path / "a.json", {"x": 1})
    assert calls == ["fsync", "replace"] and common.read_json(tmp_path / "a.json") == {"x": 1}


def test_hostile_checkpoints_are_refused_without_executing(tmp_path, monkeypatch):
    """Damaged ones: test_hard_knocks.py."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pickle").write_bytes(pickle.dumps(Bomb()))
    torch.save(Bomb(), tmp_path / "archive")
    for name in ("pickle", "archive"):
        with pytest.raises(common.UsageError, match=f"{name} is not a readable file of tensors"):
            common.load(tmp_path / name)
    assert not (tmp_path / "exploded").exists()


# --- settings -------------------------------------------------------------------------------------

WRONG_SETTINGS = [
    ("steps", 3.0, "a whole number is needed"),
    ("lr", math.nan, "a finite number is needed"),
    ("widths", (4, 0), "it must be at least 1"),
    ("kind", "odd", "allowed: plain, fancy"),
]


@pytest.mark.parametrize("name, value, reason", WRONG_SETTINGS)
def test_the_type_of_a_field_says_what_it_allows(name, value, reason):
    with pytest.raises(ValueError, match=f"{name} is .*; {reason}"):
        toy.Config(**{name: value})


def test_the_name_of_an_arm_carries_its_settings():
    config = common.arm_config(toy.SMALL, "one@lr=0.5,steps=3,kind=fancy")
    assert (config.lr, config.steps, config.kind) == (0.5, 3, "fancy")
    assert common.arm_config(toy.SMALL, "one") == toy.SMALL
    arms = common.split_arms("ce,dhkd@lr=0.5,alpha=0.1,kd,kd@lr=1")
    assert arms == ["ce", "dhkd@lr=0.5,alpha=0.1", "kd", "kd@lr=1"]


# --- the transformer ------------------------------------------------------------------------------


class MLP(nn.Module):
    def __init__(self, d_model, aux=None):
        super().__init__()
        self.up, self.down = nn.Linear(d_model, 2 * d_model), nn.Linear(2 * d_model, d_model)
        self.aux = aux

    def forward(self, x):
        if self.aux is not None:
            self.aux_loss = self.aux * x.square().mean()
        return self.down(F.gelu(self.up(x)))


def make_model(**options):
    options = {"norm": "rms", "conv": 4, "init": 0.2} | options
    generator = torch.Generator().manual_seed(0)
    make_ffn = lambda layer: MLP(8)
    return common.TransformerLM(11, 2, 8, 2, 12, make_ffn, generator=generator, **options).double()


@pytest.mark.parametrize("positions", ["learned", "rope"])
@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_causal_model_does_not_see_the_future_and_the_other_one_does(norm, positions):
    tokens = torch.randint(11, (1, 12), generator=torch.Generator().manual_seed(1))
    changed = tokens.clone()
    changed[:, 8:] = (changed[:, 8:] + 1) % 11
    for causal in (True, False):
        model = make_model(norm=norm, positions=positions, causal=causal)
        moved = (model(tokens) - model(changed))[:, :8].abs().max()
        assert (moved < 1e-12) if causal else (moved > 1e-6)


def test_rope_depends_on_distance_only():
    x = torch.randn(1, 1, 8, dtype=torch.float64).expand(1, 6, 8)
    y = common.rotate(x)[0]
    near = (y[1:] * y[:-1]).sum(-1)
    torch.testing.assert_close(near, near[:1].expand(5), atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(y.norm(dim=-1), x[0].norm(dim=-1), atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(common.rotate(x.float())[0], y.float(), atol=1e-6, rtol=1e-5)


def test_aux_loss_is_the_mean_over_layers_and_is_forgotten():
    model = common.TransformerLM(11, 2, 8, 2, 12, lambda i: MLP(8, aux=float(i)))
    model(torch.zeros(1, 5, dtype=torch.long))
    left = [ffn.aux_loss for ffn in model.ffns()]
    torch.testing.assert_close(model.aux_loss(), sum(left) / 2)
    assert model.aux_loss() == 0  # nothing left to keep a graph alive


# --- training -------------------------------------------------------------------------------------


def regression(steps=12, **options):
    """Train a linear model with dropout; returns its weights and what it logged."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.3), nn.Linear(4, 1))
    batches = lambda step: torch.randn(8, 3, generator=torch.Generator().manual_seed(step))
    error = lambda x: (model(x) - x.sum(1, keepdim=True)).square().mean()
    loss_fn = lambda x, step: (error(x), {"step_seen": step})
    last = common.train(model, loss_fn, steps, batches=batches, lr=0.05, **options)
    return torch.cat([p.detach().flatten() for p in model.parameters()]), last


@pytest.mark.parametrize("stop", [0, 4, 11])  # first, some, last step
def test_interrupted_and_resumed_training_equals_the_uninterrupted_one_bit_for_bit(tmp_path, stop):
    whole, _ = regression(metrics=tmp_path / "whole.jsonl")
    files = {"checkpoint": tmp_path / "a.ckpt", "metrics": tmp_path / "a.jsonl"}
    interrupt = lambda step: os.kill(os.getpid(), signal.SIGTERM) if step == stop else None
    with same_handlers(), pytest.raises(common.Terminated):
        signal.signal(signal.SIGTERM, common.stop)
        regression(on_step=interrupt, **files)
    with open(tmp_path / "a.jsonl", "a") as file:
        file.write('{"arm": "train", "step": 1')  # a line that a full disk cut short
    resumed, last = regression(**files)
    assert torch.equal(whole, resumed) and last["step"] == 11
    assert (tmp_path / "a.jsonl").read_text() == (tmp_path / "whole.jsonl").read_text()


def test_two_halves_with_a_handed_on_optimizer_equal_one_run():
    def weights(*spans):
        torch.manual_seed(0)
        model = nn.Linear(3, 1)
        optimizer = common.adamw(model, 0.1)
        loss_fn = lambda x, step: (model(x).square().mean(), {})
        batches = lambda step: torch.randn(4, 3, generator=torch.Generator().manual_seed(step))
        for start, stop in spans:
            part = {"optimizer": optimizer, "start_step": start, "stop_step": stop}
            common.train(model, loss_fn, 10, batches=batches, **part)
        return model.weight.detach().clone()

    assert torch.equal(weights((0, 10)), weights((0, 4), (4, 10)))


def test_accumulated_gradients_equal_those_of_the_whole_batch():
    def weights(accumulate):
        model = nn.Linear(3, 1, bias=False).double()
        nn.init.ones_(model.weight)
        seeded = lambda step: torch.Generator().manual_seed(step)
        batches = lambda step: torch.randn(7, 3, generator=seeded(step)).double()
        loss_fn = lambda x, step: ((model(x) - 1).square().mean(), {})
        common.train(model, loss_fn, 5, batches=batches, lr=0.1, accumulate=accumulate)
        return model.weight.detach()

    torch.testing.assert_close(weights(1), weights(3), atol=1e-12, rtol=1e-12)


def test_a_loss_that_becomes_nan_stops_at_once_and_keeps_the_last_good_checkpoint(tmp_path):
    model = nn.Linear(1, 1)
    batches = lambda step: torch.full((1, 1), math.nan if step == 6 else 1.0)
    loss_fn = lambda x, step: (model(x).square().mean(), {})
    path = tmp_path / "a.ckpt"
    with pytest.raises(common.NonFiniteLoss, match="nan at step 6; last good checkpoint: .*a.ckpt"):
        common.train(model, loss_fn, 20, batches=batches, checkpoint=path, checkpoint_seconds=0.0)
    state = common.load(path)
    assert state["step"] == 6 and state["model"]["weight"].isfinite().all()


def test_weights_that_became_nan_are_never_saved(tmp_path):
    model, path = nn.Linear(1, 1), tmp_path / "a.ckpt"
    slope_at_0_is_nan = lambda step: (model.weight * (step < 3)).square().sum().sqrt()
    loss_fn = lambda x, step: (slope_at_0_is_nan(step), {})
    options = {"batches": lambda step: None, "checkpoint": path, "checkpoint_seconds": 0.0}
    told = "a weight is not finite after step 3; last good checkpoint: .*a.ckpt"
    with pytest.raises(common.NonFiniteLoss, match=told):
        common.train(model, loss_fn, 9, **options)
    assert common.load(path)["step"] == 3


def test_decay_leaves_biases_and_norms_alone():
    module = nn.Module()
    module.weight, module.bias = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2))
    module.w1, module.b1 = nn.Parameter(torch.ones(3, 2, 2)), nn.Parameter(torch.ones(3, 2))
    module.frozen = nn.Parameter(torch.ones(2, 2), requires_grad=False)
    decayed, kept = common.adamw(module, 0.1).param_groups
    assert [p.shape for p in decayed["params"]] == [(2, 2), (3, 2, 2)]
    assert decayed["weight_decay"] > 0
    assert [p.shape for p in kept["params"]] == [(2,), (3, 2)] and kept["weight_decay"] == 0


def test_the_schedule_warms_up_and_ends_at_a_tenth():
    cosine = common.cosine(11, warmup=2, final=0.1)
    assert list(map(cosine, [0, 1, 2, 10])) == pytest.approx([0.5, 1, 1, 0.1])


# --- accounting and claims ------------------------------------------------------------------------


def test_flops_are_counted_from_what_ran_forward_and_backward():
    model, x = nn.Linear(4, 6), torch.randn(10, 4, requires_grad=True)
    assert common.count_flops(lambda: model(x))["Linear"] == 2 * 10 * 4 * 6
    assert common.count_flops(lambda: model(x).sum().backward())["Global"] == 3 * 2 * 10 * 4 * 6


def test_active_parameters_count_only_the_experts_a_token_meets():
    module = nn.Module()
    module.num_experts, module.w1 = 4, nn.Parameter(torch.zeros(4, 3, 5))
    module.router = nn.Linear(3, 4, bias=False)
    assert common.count_parameters(module) == 60 + 12
    assert common.count_parameters(module, experts_per_token=1.6) == 24 + 12
    assert common.count_parameters(module, experts_per_token=1) == 15 + 12


def test_a_verdict_is_the_interval_of_three_seeds_or_more():
    # mean 2, deviation 1, t = 2.920 at 2 degrees of freedom: 2 -+ 1.686
    assert common.half_width([1.0, 2.0, 3.0]) == pytest.approx(2.920 / math.sqrt(3), abs=1e-9)
    assert common.verdict([1.0, 2.0, 3.0]) == "holds"
    assert common.verdict([-1.0, -2.0, -3.0]) == "contradicted"
    assert common.verdict([0.2, 2.0, 3.8]) == "undecided"  # 2 -+ 3.03
    assert common.verdict([0.0, 0.0, 0.0]) == "undecided"
    assert common.verdict([math.nan, 1.0, 1.0]) == "undecided"
    # one standard error above 0 is not enough: mean 1, standard error 0.577
    assert common.verdict([0.0, 1.0, 2.0]) == "undecided"
    for one_or_two, word in [([0.1], "seen"), ([0.0], "not seen"), ([3.0, -1.0], "seen")]:
        assert common.verdict(one_or_two) == word


def test_the_quantiles_are_those_of_student():
    for count, known in [(2, 6.314), (8, 1.895), (31, 1.697)]:  # any table of the t-distribution
        values = np.arange(count) / np.std(np.arange(count), ddof=1)  # deviation 1
        assert common.half_width(values) * math.sqrt(count) == pytest.approx(known)


def test_results_are_compared_seed_by_seed_and_what_is_absent_is_missing():
    a = [{"x": 3.0, "y": 1.0}, {"x": 5.0, "y": 1.0}]
    results = common.Results(a=a, b=[{"x": 1.0}, {"x": 2.0}])
    assert results.ahead("a", "b", "x").tolist() == [2, 3]
    assert results.difference("a", "x", "y").tolist() == [2, 4]
    with pytest.raises(common.Missing, match="c"):
        results.ahead("a", "c", "x")
    header, rows = results.table("ab", {"X": ("x", 1), "Y": ("y", 0), "Z": ("z", 0)})
    assert header == ["arm", "X", "Y"] and rows == [["a", "4.0", "1"], ["b", "1.5", ""]]


def test_claims_are_declared_where_they_are_measured():
    claims = {claim.id: claim for claim in common.claims_of(toy.main)}
    assert list(claims) == ["toy.learns", "toy.fails", "toy.other"]
    results = common.Results(one=[{"loss": loss} for loss in (1.0, 2.0, 3.0)])
    for claim in claims.values():
        claim.judge(results, toy.SMALL)
    found = {name: claim.verdict for name, claim in claims.items()}
    assert list(found.values()) == ["holds", "contradicted", "not measured"]
    assert claims["toy.learns"].margins == [9.0, 8.0, 7.0]
    assert "three" in claims["toy.other"].measured
    assert claims["toy.learns"].record()["numbers"] == {"loss": [1.0, 2.0, 3.0]}


def test_a_run_is_compared_with_the_spread_of_the_committed_seeds():
    """The mean of 1 .. 8 is 4.5, half its interval 1.64; one seed more: sqrt(1 + 8) times that."""
    committed = {"toy.learns": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]}
    learns = common.claims_of(toy.main)[0]
    for margin, word in ((9.4, "within"), (9.5, "outside")):
        learns.margins = [margin]
        row = common.format_comparison(committed, [learns]).splitlines()[-1]
        assert row.split() == ["learns", f"{margin:.4f}", "-0.4234", "to", "9.4234", word]


def test_text_is_sampled_from_what_the_model_says():
    def model(tokens):  # the likeliest next token is the last one plus 1
        return F.one_hot((tokens + 1) % 5, 5).float() * 100

    model.training, model.eval, model.train = False, lambda: None, lambda mode: None
    for temperature in (0, 1.0):
        text = common.generate(model, torch.tensor([3]), 4, context=2, temperature=temperature)
        assert text.tolist() == [3, 4, 0, 1, 2]


# --- the command line -----------------------------------------------------------------------------


def test_results_json_has_the_agreed_shape(command_line, tmp_path):
    done = command_line(toy, "--workers", 1, "--seeds", 2, "--seed", 5, "--strict")
    assert done.returncode == 1  # as a required claim does not hold
    assert "toy.fails" in done.stderr and "toy.other" not in done.stderr
    assert "In short: of 2 required claims 1 seen, 1 not seen (fails)." in done.stdout
    found = report(tmp_path / "runs" / "toy-small")
    keys = "method scale seeds device machine cpu_capability threads versions git config data"
    assert set(f"{keys} wall_seconds results claims".split()) <= set(found)
    assert found["seeds"] == [5, 6] and found["scale"] == "small" and found["threads"] == 1
    verdicts = [claim["verdict"] for claim in found["claims"]]
    assert verdicts == ["seen", "not seen", "not measured"]
    assert len(found["claims"][0]["margins"]) == 2 == len(found["results"]["arms"]["one"])


MANY = ("--seeds", 2, "--ablate", "--out")


def two_workers(fork, folder):
    """Processes as a person has them, from a fork server that imports torch; a terminal of 1980."""
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    flags = ("--workers", 2, *MANY, folder / "two")
    return folder / "two", run_script(TOY, *flags, cwd=folder, env=ascii_only)


@pytest.mark.beside(run=two_workers)
def test_neither_workers_nor_the_terminal_change_a_number(beside, command_line, tmp_path):
    two, done = beside
    assert done.returncode == 0 and "toy ? small scale" in done.stdout, done.stderr
    done = command_line(toy, "--workers", 1, *MANY, tmp_path)
    assert done.returncode == 0 and "toy · small scale" in done.stdout, done.stderr
    assert report(tmp_path)["results"] == report(two)["results"]
    pids = [path.read_text() for path in two.glob("arms/*.pid")]
    assert len(set(pids)) == len(pids) == 6  # a job, a process
    assert len({path.read_text() for path in tmp_path.glob("arms/*.pid")}) == 1


def test_arms_and_their_settings_can_be_typed(command_line, tmp_path):
    flags = ["--arms", "one", "one@lr=0.5,steps=3", "two@lr=0.2,three", "--workers", 1]
    assert command_line(toy, *flags).returncode == 0
    folder = tmp_path / "runs" / "toy-small"
    arms = report(folder)["results"]["arms"]
    assert list(arms) == ["one", "one@lr=0.5,steps=3", "two@lr=0.2", "three"]
    assert len((folder / "arms" / "one@lr=0.5,steps=3-seed0.jsonl").read_text().splitlines()) == 3
    model = toy.load_trained(folder / "arms" / "two@lr=0.2-seed0.pt")
    assert not model.training and model.weight.tolist() == arms["two@lr=0.2"][0]["weight"]


def test_flags_come_from_the_config(command_line, tmp_path):
    flags = "--full --widths 1,2,3 --budget 1.5 --no-bias --lr 0.01 --workers 1 --steps 3 --pages 2"
    assert command_line(toy, *flags.split()).returncode == 0
    config = report(tmp_path / "runs" / "toy-full")["config"]
    expected = {"widths": [1, 2, 3], "budget": 1.5, "bias": False, "lr": 0.01, "steps": 3}
    expected["pages"] = 2
    assert {name: config[name] for name in expected} == expected
    assert "optimizer steps (30 / 60)" in command_line(toy, "--help").stdout


WRONG_FLAGS = [
    (["--epochs", "3"], "did you mean --steps?"),
    (["--steps", "0"], "--steps is 0; it must be at least 1"),
    (["--pages", "3"], "--pages does nothing here; it belongs to --full"),
    (["--compare", "--steps", "3"], "no committed result of toy.py"),
    (["--arms", "four"], "there is no arm 'four'; the nearest is"),
    (["--arms", "one@stepz=3"], "no setting 'stepz'; the nearest is 'steps'"),
    (["something"], "unknown argument 'something'"),
]


@pytest.mark.parametrize("flags, expected", WRONG_FLAGS)
def test_wrong_flags_are_one_line_and_exit_code_2(command_line, tmp_path, flags, expected):
    done = command_line(toy, *flags)
    assert done.returncode == 2 and expected in done.stderr and done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_finished_run_is_not_overwritten_by_accident(command_line, tmp_path):
    run = partial(command_line, toy, "--workers", 1)
    assert run("--steps", 3).returncode == 0
    results = tmp_path / "runs" / "toy-small" / "results.json"
    before = results.read_text()
    for flags, told in [
        (("--steps", 3), "--overwrite"),
        (("--steps", 4, "--resume"), "steps = 3, not 4"),
        (("--steps", 3, "--threads", 2, "--resume"), "threads = 1, not 2"),
        (("--overwrite", "--batch-size", 0), "--batch-size is 0"),  # mistyped
    ]:
        done = run(*flags)
        assert done.returncode == 2 and told in done.stderr
    assert results.read_text() == before
    weights = results.parent / "arms" / "one-seed0.pt"
    weights.write_bytes(weights.read_bytes()[:100])
    cut = run("--steps", 3, "--resume")
    assert cut.returncode == 2 and "one-seed0.pt is damaged: it had" in cut.stderr
    assert run("--steps", 4, "--overwrite").returncode == 0
    assert report(results.parent)["config"]["steps"] == 4
    mark = results.parent / "run.json"
    mark.write_text(mark.read_text().replace('"toy"', '"home"'))
    foreign = run("--steps", 4, "--resume")
    assert foreign.returncode == 2 and "was left by home.py; choose another" in foreign.stderr
    mark.unlink()  # whose folder is it? never mixed with a new run
    unknown = run("--steps", 9)
    assert unknown.returncode == 2 and "holds a run" in unknown.stderr


# --- jobs in processes of their own ---------------------------------------------------------------


def test_a_killed_job_is_one_line_and_nobody_waits_for_it(fork, command_line, tmp_path):
    """The others are trained to their end, also those that had not begun; the rest resumes."""
    folder, hold = tmp_path / "cut", tmp_path / "hold"
    hold.touch()
    flags = ("--steps", 400, "--seeds", 2, "--out", "cut", "--workers", 2, "--hold", hold)
    process = fork(TOY, *flags, folder=tmp_path)
    wait_until(lambda: len(list(folder.glob("arms/*.jsonl"))) == 2, process)
    os.kill(int((folder / "arms" / "one-seed0.pid").read_text()), signal.SIGKILL)
    hold.unlink()
    done = finished(process)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "one-seed0 was killed (out of memory?); go on with --resume" in done.stderr
    left = {path.stem for path in folder.glob("arms/*-seed*.json")}
    assert left == {"one-seed1", "two-seed0", "two-seed1"}
    assert finished(fork(TOY, *flags, "--resume", folder=tmp_path)).returncode == 0
    flags = ("--steps", 400, "--seeds", 2, "--out", "whole", "--workers", 1)
    assert command_line(toy, *flags).returncode == 0
    assert report(folder)["results"] == report(tmp_path / "whole")["results"]
    logs = [tmp_path / name / "metrics.jsonl" for name in ("cut", "whole")]
    assert logs[0].read_text() == logs[1].read_text()


def import_scripts():
    import preloaded

    assert preloaded.BEFORE == preloaded.AFTER  # importing common, kernels and data
    before = preloaded.state()
    for name in tiny.SCRIPTS:
        assert name.removesuffix(".py") not in sys.modules
        importlib.import_module(name.removesuffix(".py"))
        assert preloaded.state() == before, name


def test_importing_has_no_side_effects(fork):
    assert ended(fork.call(import_scripts)) == 0


def test_a_log_that_is_gone_is_told_before_training_goes_on(tmp_path):
    log = common.MetricsLog(tmp_path / "a.jsonl", "a", {})
    log.forget(3, 3)  # nothing has been logged yet
    with pytest.raises(common.UsageError, match=r"a.jsonl is missing; delete .*a\.\*"):
        log.forget(3, 4)


def test_a_seed_is_not_compared_with_itself():
    import home

    def committed(*seeds):
        run = common.Run("home", "small", "cpu", torch.float32, list(seeds), Path("runs"))
        return common.committed_margins(Path(home.__file__), run, {})["home.collapse"]

    assert committed(0, 2) == [committed(8)[seed] for seed in (1, 3, 4, 5, 6, 7)]
    with pytest.raises(common.UsageError, match="take others, --seed 8"):
        committed(*range(6))


def test_idle_workers_shorten_no_estimate_and_a_path_is_no_name_of_an_arm(command_line):
    flags = ("--dry-run", "--workers", 4, "--seeds", 2, "--arms")
    assert "2 arms at a time" in command_line(toy, *flags, "one").stdout
    done = command_line(toy, *flags, "one@hold=runs/wait")
    assert done.returncode == 2 and "give a path as a flag" in done.stderr


def test_compiled_arms_are_not_mixed_with_others(command_line, tmp_path):
    assert command_line(toy, "--workers", 1).returncode == 0
    mixed = command_line(toy, "--workers", 1, "--resume", "--compile")
    assert mixed.returncode == 2 and "run with compile = False, not True" in mixed.stderr
    mark = tmp_path / "runs" / "toy-small" / "run.json"
    left = common.read_json(mark)
    del left["identity"]["compile"]  # as an earlier version left it
    common.write_json(mark, left)
    assert command_line(toy, "--workers", 1, "--resume").returncode == 0


def test_a_picture_that_cannot_be_drawn_loses_no_result(command_line, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(common, "dots", lambda ax, values: common.as_typed(1 / 0))
    with pytest.raises(ZeroDivisionError):
        command_line(toy, "--plot", "--workers", 1)
    assert report(tmp_path / "runs" / "toy-small")["results"]["arms"]
