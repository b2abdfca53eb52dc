"""The house: files never half-written, runs that survive interruption, one rule for a claim."""

import importlib
import json
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
from conftest import report, same_handlers
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


def test_what_is_no_regular_file_is_refused_and_not_waited_for(tmp_path):
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    for read in (common.read_json, common.load, common.sha256):
        with pytest.raises(ValueError, match="fifo is (not a|no) regular file"):
            read(fifo)


def test_a_state_that_does_not_fit_is_refused_by_the_name_of_the_weight():
    model = nn.Linear(2, 3)
    state = model.state_dict()
    parallel = {"module." + name: value for name, value in state.items()}
    cases = [
        (parallel, "'module.weight'.*is it 'weight'"),
        ({"model": state}, "no weight 'model' here"),
        ({"weight": state["weight"]}, "the weight 'bias' is missing"),
        ({**state, "weight": torch.ones(3, 3)}, r"weight is \[3, 3\]; \[3, 2\] is needed"),
        ({**state, "bias": 1.0}, r"bias is \[\]"),
        ([1], "holds a list"),
    ]
    for wrong, message in cases:
        with pytest.raises(common.UsageError, match="a.pt.*" + message):
            common.load_state(model, wrong, "a.pt")
    common.load_state(model, state, "a.pt")


# --- settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, value, reason",
    [
        ("steps", 0, "it must be at least 1"),
        ("steps", 3.0, "a whole number is needed"),
        ("steps", True, "a whole number is needed"),
        ("steps", "3", "a whole number is needed"),
        ("lr", 0.0, "it must be above 0"),
        ("lr", math.nan, "a finite number is needed"),
        ("lr", None, "a finite number is needed"),
        ("budget", -1.0, "it must be above 0"),
        ("widths", (4, 0), "it must be at least 1"),
        ("widths", [4], "a tuple is needed"),
        ("kind", "odd", "allowed: plain, fancy"),
        ("bias", 1, "a bool is needed"),
    ],
)
def test_the_type_of_a_field_says_what_it_allows(name, value, reason):
    with pytest.raises(ValueError, match=f"{name} is .*; {reason}"):
        toy.Config(**{name: value})


@pytest.mark.parametrize("value", [3, 0.25, "plain", None, (1, 2), (), True])
def test_a_value_as_typed_reads_back(value):
    kinds = {int: int, float: float, str: str, bool: bool}
    kind = kinds.get(type(value), int | None if value is None else tuple[int, ...])
    assert common.read_value(kind, common.as_typed(value).lower()) == value


def test_the_name_of_an_arm_carries_its_settings():
    config = common.arm_config(toy.SMALL, "one@lr=0.5,steps=3,kind=fancy")
    assert (config.lr, config.steps, config.kind) == (0.5, 3, "fancy")
    assert common.arm_config(toy.SMALL, "one") == toy.SMALL
    arms = common.split_arms("ce,dhkd@lr=0.5,alpha=0.1,kd,kd@lr=1")
    assert arms == ["ce", "dhkd@lr=0.5,alpha=0.1", "kd", "kd@lr=1"]
    for arm, message in [
        ("one@rl=1", "no setting 'rl'; the nearest is 'lr'"),
        ("one@lr=0", "it must be above 0"),
        ("one@steps=x", "steps is 'x'; a whole number is needed"),
        ("one@kind=odd", "allowed: plain, fancy"),
    ]:
        with pytest.raises(common.UsageError, match=message):
            common.arm_config(toy.SMALL, arm)


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


def test_impossible_models_are_refused():
    for options, message in [({"norm": "batch"}, "norm"), ({"positions": "none"}, "positions")]:
        with pytest.raises(ValueError, match=message):
            make_model(**options)
    with pytest.raises(ValueError, match="d_model is 8, num_heads 3"):
        common.TransformerLM(11, 1, 8, 3, 12, lambda i: MLP(8))
    with pytest.raises(ValueError, match="13 tokens; context is 12"):
        make_model()(torch.zeros(1, 13, dtype=torch.long))


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


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("stop", [0, 4, 11])  # first, some, last step
def test_interrupted_and_resumed_training_equals_the_uninterrupted_one_bit_for_bit(
    tmp_path, stop, number
):
    whole, _ = regression(metrics=tmp_path / "whole.jsonl")
    files = {"checkpoint": tmp_path / "a.ckpt", "metrics": tmp_path / "a.jsonl"}
    interrupt = lambda step: os.kill(os.getpid(), number) if step == stop else None
    with same_handlers(), pytest.raises(KeyboardInterrupt):
        signal.signal(number, common.stop)
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


def test_a_mean_shows_its_interval_from_three_seeds_on():
    assert common.show([1.0], 1) == "1.0" and common.show([1.0, 2.0], 1) == "1.5"
    assert common.show([1.0, 2.0, 3.0], 1) == "2.0 ± 1.7"
    assert common.show([0.5, 0.5, 0.5], 1) == "0.5"


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
    assert list(claims) == ["toy.learns", "toy.fails", "toy.other", "toy.numbers"]
    results = common.Results(one=[{"loss": loss} for loss in (1.0, 2.0, 3.0)])
    for claim in claims.values():
        claim.judge(results, toy.SMALL)
    found = {name: claim.verdict for name, claim in claims.items()}
    assert list(found.values()) == ["holds", "contradicted", "not measured", "passed"]
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


def test_a_comparison_that_would_mean_nothing_is_refused(command_line):
    import home  # here: test_importing_has_no_side_effects imports this file in a fresh process

    for module, flags, reason in (
        (toy, ["--steps", 3], "no committed result of toy.py"),
        (home, ["--full"], "no committed result of home.py at this scale"),
        (home, ["--lr", 0.1], "leave out --lr"),
    ):
        done = command_line(module, "--compare", *flags)
        assert done.returncode == 2 and reason in done.stderr and done.stderr.count("\n") == 1


def test_text_is_sampled_from_what_the_model_says():
    def model(tokens):  # the likeliest next token is the last one plus 1
        return F.one_hot((tokens + 1) % 5, 5).float() * 100

    model.training, model.eval, model.train = False, lambda: None, lambda mode: None
    for temperature in (0, 1.0):
        text = common.generate(model, torch.tensor([3]), 4, context=2, temperature=temperature)
        assert text.tolist() == [3, 4, 0, 1, 2]
    with pytest.raises(ValueError, match="one sequence"):
        common.generate(model, torch.zeros(0, dtype=torch.long), 4, context=2)


# --- the command line -----------------------------------------------------------------------------


def test_results_json_has_the_agreed_shape(command_line, tmp_path):
    done = command_line(toy, "--workers", 1, "--seeds", 2, "--seed", 5, "--strict")
    assert done.returncode == 1  # as a required claim does not hold
    assert "toy.fails" in done.stderr and "toy.other" not in done.stderr
    found = report(tmp_path / "runs" / "toy-small")
    keys = "method scale seeds device machine cpu_capability threads versions git config data"
    assert set(f"{keys} wall_seconds results claims".split()) <= set(found)
    assert found["seeds"] == [5, 6] and found["scale"] == "small" and found["threads"] == 1
    assert found["cpu_capability"] == torch.backends.cpu.get_cpu_capability()
    verdicts = [claim["verdict"] for claim in found["claims"]]
    assert verdicts == ["seen", "not seen", "not measured", "passed"]
    keys = "id text paper required is_check verdict measured margins numbers"
    assert set(keys.split()) == set(found["claims"][0])
    assert len(found["claims"][0]["margins"]) == 2 == len(found["results"]["arms"]["one"])


def test_a_stranger_reads_what_came_out(command_line):
    done = command_line(toy, "--workers", 1)
    assert "seen          learns (required): the loss falls\n" in done.stdout
    assert "true by construction, checked\npassed        numbers: a loss is a number" in done.stdout
    assert "not measured: other; --ablate trains what they need" in done.stdout
    last = done.stdout.strip().splitlines()[-3]
    assert last.startswith("In short: of 2 required claims 1 seen, 1 not seen (fails).")
    assert "decides nothing: --seeds 8" in last
    more = command_line(toy, "--workers", 1, "--ablate", "--seeds", 3, "--overwrite")
    assert "In short: of 2 required claims 1 holds, 1 contradicted (fails).\n" in more.stdout
    assert "one    " in more.stdout and " ± " in more.stdout and "How to read: ±" in more.stdout


ASCII_ONLY = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def test_neither_workers_nor_the_terminal_change_a_number(script, command_line, tmp_path):
    """Processes as a person has them, from a fork server that imports torch; a terminal of 1980."""
    many = ("--seeds", 2, "--ablate", "--out")
    done = script(TOY, "--workers", 2, *many, tmp_path / "two", env=ASCII_ONLY)
    assert done.returncode == 0 and "toy ? small scale" in done.stdout, done.stderr
    done = command_line(toy, "--workers", 1, *many, tmp_path / "one")
    assert done.returncode == 0 and "toy · small scale" in done.stdout, done.stderr
    assert report(tmp_path / "one")["results"] == report(tmp_path / "two")["results"]
    pids = [path.read_text() for path in tmp_path.glob("two/arms/*.pid")]
    assert len(set(pids)) == len(pids) == 6  # a job, a process
    assert len({path.read_text() for path in tmp_path.glob("one/arms/*.pid")}) == 1


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
    help_text = command_line(toy, "--help").stdout
    assert "optimizer steps (30 / 60)" in help_text and "--no-bias" in help_text
    assert "peak (0.1)" in help_text and "of the layer (4)" in help_text
    assert "optional number (none)" in help_text


@pytest.mark.parametrize(
    "flags, expected",
    [
        (["--stepz", "3"], "did you mean --steps?"),
        (["--epochs", "3"], "did you mean --steps?"),
        (["--batches", "3"], "did you mean --batch-size?"),
        (["--steps", "three"], "--steps is 'three'; a whole number is needed"),
        (["--steps", "0"], "--steps is 0; it must be at least 1"),
        (["--seed", "-1"], "--seed is -1; at least 0 is needed"),
        (["--widths", "1,x"], "--widths is '1,x'; a whole number is needed"),
        (["--pages", "3"], "--pages does nothing here; it belongs to --full"),
        (["--device", "tpu"], "--device"),
        (["--workers", "0"], "--workers is 0"),
        (["--overwrite", "--resume"], "exclude each other"),
        (["--arms", "four"], "there is no arm 'four'; the nearest is"),
        (["--arms", "one@stepz=3"], "no setting 'stepz'; the nearest is 'steps'"),
        (["something"], "unknown argument 'something'"),
    ],
)
def test_wrong_flags_are_one_line_and_exit_code_2(command_line, tmp_path, flags, expected):
    done = command_line(toy, *flags)
    assert done.returncode == 2 and expected in done.stderr and done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_finished_run_is_not_overwritten_by_accident(command_line, tmp_path):
    assert command_line(toy, "--workers", 1, "--steps", 3).returncode == 0
    results = tmp_path / "runs" / "toy-small" / "results.json"
    before = results.read_text()
    again = command_line(toy, "--workers", 1, "--steps", 3)
    assert again.returncode == 2 and "--resume" in again.stderr and "--overwrite" in again.stderr
    for change, told in [
        (("--steps", 4), "steps = 3, not 4"),
        (("--steps", 3, "--threads", 2), "threads = 1, not 2"),
        (("--steps", 3, "--dtype", "bf16"), "dtype = float32, not bfloat16"),
    ]:
        other = command_line(toy, "--workers", 1, *change, "--resume")
        assert other.returncode == 2 and told in other.stderr
    assert command_line(toy, "--overwrite", "--batch-size", 0).returncode == 2  # mistyped
    assert results.read_text() == before
    weights = results.parent / "arms" / "one-seed0.pt"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:100])
    cut = command_line(toy, "--workers", 1, "--steps", 3, "--resume")
    assert cut.returncode == 2 and "one-seed0.pt is damaged: it had" in cut.stderr
    weights.write_bytes(whole)
    mark = results.parent / "run.json"
    mark.write_text(mark.read_text().replace('"toy"', '"home"'))
    foreign = command_line(toy, "--workers", 1, "--steps", 3, "--resume")
    assert foreign.returncode == 2 and "was left by home.py; choose another" in foreign.stderr
    assert command_line(toy, "--workers", 1, "--steps", 4, "--overwrite").returncode == 0
    assert report(results.parent)["config"]["steps"] == 4
    (results.parent / "run.json").unlink()  # whose folder is it? never mixed with a new run
    unknown = command_line(toy, "--workers", 1, "--steps", 9)
    assert unknown.returncode == 2 and "holds a run" in unknown.stderr
    assert command_line(toy, "--workers", 1, "--steps", 9, "--overwrite").returncode == 0
    last = (results.parent / "arms" / "one-seed0.jsonl").read_text().splitlines()[-1]
    assert json.loads(last)["step"] == 8


def test_a_scripts_own_actions_take_the_place_of_a_run(command_line, tmp_path, monkeypatch):
    """They are flags like the others, see a folder that holds a run, and write no results."""
    folder, seen = tmp_path / "runs" / "toy-small", []
    (folder / "arms").mkdir(parents=True)  # as of a run before

    def main(config, run):
        seen.append(run.actions)

    main.__module__ = "toy"
    actions = {"say": ("", "WORD", "a word"), "twice": (False, None, "again")}
    monkeypatch.setattr(toy, "main", main)
    monkeypatch.setattr(toy, "ACTIONS", actions, raising=False)
    for more in ((), ("--resume",)):
        assert command_line(toy, "--say", "hello", "--twice", *more).returncode == 0
    assert seen == [{"say": "hello", "twice": True}] * 2
    assert not (folder / "run.json").exists()
    done = command_line(toy)
    assert done.returncode == 2 and "holds a run" in done.stderr
    assert "did you mean --say?" in command_line(toy, "--sya", "hello").stderr


def test_a_picture_needs_matplotlib_or_says_what_to_install(command_line, monkeypatch):
    """With it, test_house.py looks for the picture of every script."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    done = command_line(toy, "--plot", "--workers", 1, "--steps", 3)
    assert done.returncode == 2 and "requirements-full.txt" in done.stderr


def test_dry_run_and_list_claims_write_nothing(command_line, tmp_path):
    done = command_line(toy, "--dry-run")
    assert done.returncode == 0 and "parameters" in done.stdout and "FLOPs" in done.stdout
    assert "60 training steps in all arms and seeds" in done.stdout
    done = command_line(toy, "--list-claims")
    assert done.returncode == 0 and "toy.learns (required): the loss falls" in done.stdout
    assert "toy.numbers (by construction)" in done.stdout
    assert "measured" not in done.stdout and done.stdout.count("paper") == 3
    assert list(tmp_path.iterdir()) == []


# --- jobs in processes of their own ---------------------------------------------------------------


def test_nan_in_a_job_is_one_line_and_the_others_are_trained(fork, tmp_path):
    flags = ("--arms", "one@nan_at=5", "two", "--seeds", 2, "--workers", 2)
    done = finished(fork(TOY, *flags, folder=tmp_path))
    assert done.returncode == 1 and "the loss is nan at step 5" in done.stderr
    assert "Traceback" not in done.stderr
    folder = tmp_path / "runs" / "toy-small"
    assert not (folder / "results.json").exists()
    assert {path.stem for path in folder.glob("arms/*.json")} == {"two-seed0", "two-seed1"}


def test_a_mistake_in_the_program_shows_where_it_is(fork, tmp_path):
    done = finished(fork(TOY, "--crash-at", 3, "--workers", 2, folder=tmp_path))
    assert done.returncode == 1 and 'raise KeyError("a mistake")' in done.stderr
    assert "-seed0 failed, see above; go on with --resume" in done.stderr.splitlines()[-1]  # of two


def both_log(folder):
    return len(list(folder.glob("arms/*.jsonl"))) == 2


def test_a_killed_job_is_one_line_and_nobody_waits_for_it(fork, command_line, tmp_path):
    """The others are trained to their end, also those that had not begun; the rest resumes."""
    folder, hold = tmp_path / "cut", tmp_path / "hold"
    hold.touch()
    flags = ("--steps", 400, "--seeds", 2, "--out", "cut", "--workers", 2, "--hold", hold)
    process = fork(TOY, *flags, folder=tmp_path)
    wait_until(lambda: both_log(folder), process)
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


def test_an_interrupt_starts_no_further_job_and_a_killed_run_leaves_none(fork, tmp_path):
    (tmp_path / "hold").touch()
    flags = ("--ablate", "--seeds", 3, "--workers", 2, "--out", ".")
    flags += ("--steps", 400, "--hold", tmp_path / "hold")
    folders = {number: tmp_path / str(number) for number in (signal.SIGINT, signal.SIGKILL)}
    processes = {number: fork(TOY, *flags, folder=folder) for number, folder in folders.items()}
    for number, folder in folders.items():
        wait_until(partial(both_log, folder), processes[number])
        os.kill(processes[number].pid, number)
        assert ended(processes[number]) in (130, -signal.SIGKILL)
        workers = [int(path.read_text()) for path in folder.glob("arms/*.pid")]
        wait_until(lambda workers=workers: not any(map(is_running, workers)))
        assert len(workers) == 2 and not list(folder.glob("arms/*-seed*.json"))


def is_running(pid):
    has_proc = os.path.exists("/proc/self/stat")  # not everywhere
    try:
        os.kill(pid, 0)
        stat = Path(f"/proc/{pid}/stat").read_text() if has_proc else "(python) R"
    except (ProcessLookupError, FileNotFoundError):  # it may end at any moment
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"  # a zombie


def lose_the_reader():
    reader, writer = os.pipe()
    os.close(reader)
    os.dup2(writer, 1)


def test_a_reader_that_leaves_early_loses_no_result(fork, tmp_path):
    """As in `python toy.py | head`."""
    flags = ("--workers", 1, "--out", "run")
    done = finished(fork(TOY, *flags, folder=tmp_path, prepare=(lose_the_reader,)))
    assert done.returncode == 0 and "Broken" not in done.stderr, done
    assert (tmp_path / "run" / "results.json").exists()


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
