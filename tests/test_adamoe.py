"""AdaMoE: the numbers of the worked examples, what the method promises, the experiment."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, check_claims, judged
from torch._subclasses.fake_tensor import FakeTensorMode

import adamoe
import common
import kernels

F64 = torch.float64
NORMALIZE = ("true_experts", "all_picks", "none")


def logits_of(*rows, **options):
    return torch.tensor(rows, dtype=F64, **options)


def layer(num_experts=4, num_null=4, top_k=3, d_model=6, d_ff=5, seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    sizes = (d_model, d_ff, num_experts, num_null, top_k)
    return adamoe.AdaMoE(*sizes, generator=generator, **options).double()


def dense_reference(module, x):
    """Every expert on every token, weighted by a gate worked out one token at a time."""
    logits = module.router(x).detach()
    out = torch.zeros_like(x)
    for t in range(len(x)):
        picks = logits[t].topk(module.top_k).indices.tolist()
        picks = [i for i in picks if i < module.num_experts]
        total = sum(math.exp(logits[t, i]) for i in picks)
        for i in picks:
            y = F.gelu(x[t] @ module.w1[i]) @ module.w2[i]
            out[t] += math.exp(logits[t, i]) / total * y
    return out


def test_the_worked_token_of_the_docstring():
    """Its rows are read from the text and worked out again."""
    rows = {}
    for line in adamoe.__doc__.splitlines():
        words = line.split()
        if words and words[0] in ("router_logits", "gates", "f~", "P") and words[1:2] != ["="]:
            numbers = [0.0 if word == "." else float(word) for word in words[1:6]]
            rows[words[0]] = torch.tensor(numbers, dtype=F64)
    logits = rows["router_logits"][None]
    index, gates = adamoe.route(logits, num_experts=3, top_k=3)
    assert index.tolist() == [[0, -1, 1]]
    found = torch.zeros(5, dtype=F64).index_put_((index[0].clamp(min=3),), gates[0])
    found[index[0]] = gates[0]
    torch.testing.assert_close(found[:3], rows["gates"][:3], atol=5e-3, rtol=0)
    torch.testing.assert_close(logits[0].softmax(-1), rows["P"], atol=5e-3, rtol=0)
    torch.testing.assert_close(rows["f~"], logits_of(1, 1, 0, 0.5, 0.5))
    loss = adamoe.load_balancing_loss(logits, 3, 3, alpha=1.0)
    exact = 5 * (rows["f~"] * logits[0].softmax(-1)).sum()
    assert float(loss) == pytest.approx(float(exact)) == pytest.approx(3.93, abs=5e-3)
    assert "aux_loss = 3.93 alpha" in adamoe.__doc__


# --- routing --------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalize", NORMALIZE)
def test_all_picks_null_gives_zero_output_and_zero_finite_gradient(normalize):
    logits = logits_of([0, 0.1, 0.2, 5, 4, 3], requires_grad=True)
    index, gates = adamoe.route(logits, num_experts=3, top_k=3, normalize=normalize)
    assert index.tolist() == [[-1, -1, -1]] and gates.tolist() == [[0, 0, 0]]
    weights = torch.randn(3, 2, 2, dtype=F64, requires_grad=True)
    y = kernels.moe_mlp(torch.ones(1, 2, dtype=F64), index, gates, weights, weights)
    y.sum().backward()
    assert y.tolist() == [[0, 0]] and not logits.grad.any() and not weights.grad.any()


def test_language_model_loss_has_no_gradient_on_null_logits_only_when_true_picks_are_normalised():
    x, scale = logits_of([1, 2]), torch.tensor([1.0, 10.0, 100.0], dtype=F64)
    eye = torch.eye(2, dtype=F64)
    expected = {
        "true_experts": [-5.3085, 5.3085, 0, 0, 0],
        "all_picks": [-2.0812, 4.2651, 0, -2.1839, 0],
    }
    for normalize, gradient in expected.items():
        logits = logits_of([2, 1, 0, 1.5, -1], requires_grad=True)
        index, gates = adamoe.route(logits, 3, 3, normalize)
        w1, w2 = scale[:, None, None] * eye, eye.expand(3, 2, 2)
        kernels.moe_mlp(x, index, gates, w1, w2, act="none").sum().backward()
        torch.testing.assert_close(logits.grad, logits_of(gradient), atol=1e-4, rtol=0)


def test_no_normalisation_gives_probabilities_over_true_experts():
    logits = logits_of([2, 1, 0, 0.5, 0.9])
    index, gates = adamoe.route(logits, num_experts=3, top_k=2, normalize="none")
    assert index.tolist() == [[0, 1]]
    torch.testing.assert_close(gates, logits[:, :3].softmax(-1)[:, :2])


EXAMPLE = [[2, 0, 1.5, -1], [0, 1, 2, -0.5], [1, 0.5, 3, 0]]


def test_balance_loss_worked_example():
    logits = logits_of(*EXAMPLE)
    loss = lambda **options: float(adamoe.load_balancing_loss(logits, 2, 2, 1.0, **options))
    assert loss() == pytest.approx(2.0839869297, abs=1e-9)
    assert loss(average_nulls=False) == pytest.approx(3.1770587275, abs=1e-9)
    mask = torch.tensor([True, True, False])
    assert loss(token_mask=mask) == pytest.approx(2.0, abs=1e-9)
    assert loss(token_mask=mask, average_nulls=False) == pytest.approx(2.8897596694, abs=1e-9)


def test_balance_loss_gradient_equals_the_formula_and_f_carries_none():
    logits = logits_of(*EXAMPLE, requires_grad=True)
    adamoe.load_balancing_loss(logits, 2, 2, 1.0).backward()
    f, p = torch.tensor([2 / 3, 1 / 3, 0.5, 0.5], dtype=F64), logits.detach().softmax(-1)
    formula = 4 / 3 * p * (f - (p * f).sum(-1, keepdim=True))
    torch.testing.assert_close(logits.grad, formula)


def test_loss_is_per_layer_then_averaged():
    make_ffn = lambda layer: adamoe.AdaMoE(4, 2, 2, 2, 1, alpha=1.0)
    model = common.TransformerLM(4, 2, 4, 1, 2, make_ffn).double()
    model(torch.zeros(1, 2, dtype=torch.long))
    left = [ffn.aux_loss for ffn in model.ffns()]
    torch.testing.assert_close(model.aux_loss(), (left[0] + left[1]) / 2)
    assert model.ffns()[0].aux_loss is None


def test_alpha_schedule_and_flops_formula():
    alphas = [adamoe.alpha_at(step, 10, 0.02, 1e-4) for step in range(10)]
    assert alphas == [0.02] * 5 + [1e-4] * 5
    assert 100 * adamoe.flops_saved(1.66, 2, 0.8815) == pytest.approx(14.99, abs=0.01)


# --- the layer ------------------------------------------------------------------------------------


def test_layer_equals_the_dense_reference():
    module = layer()
    x = torch.randn(100, 6, dtype=F64)
    torch.testing.assert_close(module(x), dense_reference(module, x), atol=1e-12, rtol=1e-12)
    index, _ = adamoe.route(module.router(x), 4, 3)
    assert int(module.true_counts.sum()) == int((index >= 0).sum())


def test_padding_counts_neither_in_the_loss_nor_in_the_gradient():
    module, x = layer(), torch.randn(2, 5, 6, dtype=F64)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]], dtype=torch.bool)
    module(x, token_mask=mask)
    padded = module.aux_loss
    module(x[mask])
    torch.testing.assert_close(padded, module.aux_loss)
    module.token_mask = mask  # as add_null_experts hands it on
    module(x)
    torch.testing.assert_close(padded, module.aux_loss)


def test_a_copy_of_a_compiled_layer_computes_with_its_own_weights():
    module = layer()
    module.compile(backend="eager")
    copied = copy.deepcopy(module)
    copied.w2.data.zero_()
    assert not copied(torch.ones(3, 6, dtype=F64)).any()


def test_layers_may_lie_on_several_devices():
    layers = [layer(), layer()]
    with FakeTensorMode(), torch.no_grad():
        for number, module in enumerate(layers):
            module.aux_loss = torch.zeros((), device=f"cuda:{number}")
        assert str(adamoe.take_aux_loss(layers).device) == "cuda:0"
    logits = torch.zeros(6, 8, device="meta")
    assert adamoe.load_balancing_loss(logits, 4, 3, 0.02, torch.ones(6)).is_meta


def test_a_look_ahead_shows_in_the_leak():
    sizes = (256, 2, 16, 2, 24)
    options = {"norm": "rms", "conv": 4, "init": 0.3}
    model = common.TransformerLM(*sizes, lambda i: layer(d_model=16, d_ff=8, seed=i), **options)
    model = model.double()
    tokens = torch.randint(256, (24,))
    assert adamoe.future_leak(model, tokens) < 1e-12
    model.causal = False  # the convolution looks ahead now
    assert adamoe.future_leak(model, tokens) > 1e-6


def test_predicted_load_and_budget():
    assert adamoe.predicted_load(4, 5, 4) == pytest.approx(16 / 9)
    assert adamoe.num_null_for_load(8, 3, 1.5) == 8 and adamoe.num_null_for_load(8, 3, 3) == 0


def test_null_rows_are_copies_of_all_true_rows_in_turn_with_a_little_noise():
    part = adamoe.copy_null_rows(torch.arange(8.0)[:, None], 5, noise=0.0)
    assert part[:, 0].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3, 4]
    noisy = adamoe.copy_null_rows(torch.randn(8, 64), num_null=8)
    assert (noisy[:8] != noisy[8:]).any(dim=1).all()


def test_bad_input_is_refused_with_its_numbers():
    with pytest.raises(ValueError, match="num_experts is 4, num_null 4, top_k 9"):
        adamoe.AdaMoE(8, 8, 4, 4, 9)
    with pytest.raises(ValueError, match="width 5.*d_model = 6"):
        layer()(torch.zeros(3, 5, dtype=F64))
    with pytest.raises(ValueError, match="NaN or infinity"):
        adamoe.route(logits_of([math.nan, 0, 0]), 2, 1)


def test_counts_of_the_controls():
    logits = torch.tensor([[0.5, 0.3, 0.2]]).log()
    thresholds = {0.4: 1, 0.6: 2, 0.9: 3, 1.5: 3}
    for threshold, count in thresholds.items():
        assert int(adamoe.top_p_counts(logits, 3, threshold)) == count


def measured(loss, load, **more):
    exact = {"rows": 5.0, "true_picks": 5, "leak": 0.0, "expert_flops": load, "flops": 3 + load}
    histogram = {"histogram": [0.5, 0.5], "predicted": 1.5}
    return {"loss": loss, "load": load, **exact, **histogram, **more}


GOOD = {"top1": measured(2.0, 1.0), "top2": measured(1.0, 2.0), "adamoe": measured(0.9, 1.5)}
GOOD |= {arm: measured(1.2, 1.5) for arm in ("shuffled", "top_p")}
GOOD |= {arm: measured(1.0, 1.5) for arm in ("all_picks", "l_bal", "random_nulls")}
WORSE = {  # claim: changes, each of which alone makes it fail
    "load": [{"adamoe": {"load": 1.7}}],
    "quality": [{"adamoe": {"loss": 1.6}}],
    "adaptive": [{"shuffled": {"loss": 0.8}}],
    "beats_top_k": [{"top2": {"loss": 0.8}}],
    "beats_top_p": [{"top_p": {"loss": 0.8}}],
    "true_norm": [{"all_picks": {"loss": 0.8}}],
    "copy_init": [{"random_nulls": {"loss": 0.8}}],
    "null_loss": [{"l_bal": {"loss": 0.8}}],
    "null_free": [{"adamoe": {"rows": 6.0}}],
    "flops": [{"adamoe": {"expert_flops": 2.1}}],
    "causal": [{"adamoe": {"leak": 1e-3}}],
}


def test_every_claim_can_hold_and_can_fail():
    holding = check_claims(adamoe, adamoe.SMALL, GOOD, WORSE)
    assert holding["quality"].measured.startswith("0.6000")  # 2 + 0.5 * (1 - 2) - 0.9
    alike = GOOD | {"adamoe": measured(0.9, 1.5, histogram=[0.0, 1.0])}  # for every token
    assert judged(adamoe, adamoe.SMALL, alike)["adaptive"].verdict == "undecided"


def test_the_full_scale_is_judged_by_right_answers():
    """The same claims: there more points are better, not less loss."""
    vanilla = [{"accuracy": 40.0, "load": 2.0, "count": 9}] * 3
    ours = [{"accuracy": 60.0, "load": 1.5, "count": 9}] * 3
    results = common.Results(vanilla=vanilla, adamoe=ours)
    margin = adamoe.beats_top_k(results, adamoe.FULL)
    assert margin.values.tolist() == [20.0] * 3


# --- the experiment -------------------------------------------------------------------------------


def tiny_job(folder, arm="adamoe"):
    sizes = {"num_layers": 1, "d_model": 16, "d_ff": 16, "num_heads": 2, "context": 16}
    config = adamoe.Config(**sizes, pretrain_steps=2, steps=2, text=str(ROOT / "README.md"))
    run = common.Run("adamoe", "small", "cpu", torch.float32, [0], folder, config)
    (folder / "arms").mkdir(exist_ok=True)
    return common.Job(run, arm, 0)


def test_training_follows_alpha_and_starts_from_the_original(tmp_path, monkeypatch):
    alphas, starts, train = [], {}, common.train
    balance = adamoe.load_balancing_loss

    def record(logits, num_experts, top_k, alpha, *rest):
        alphas.append(alpha)
        return balance(logits, num_experts, top_k, alpha, *rest)

    def remember(model, *rest, **options):
        state = {name: value.clone() for name, value in model.state_dict().items()}
        starts[options["label"].removesuffix("-seed0")] = state
        return train(model, *rest, **options)

    monkeypatch.setattr(adamoe, "load_balancing_loss", record)
    monkeypatch.setattr(common, "train", remember)
    for arm in ("original", "adamoe", "random_nulls", "top1"):
        alphas.clear()
        adamoe.train_arm(tiny_job(tmp_path, arm))
        assert alphas[:2] == ([0.01, 0.01] if arm == "original" else [0.02, 1e-4])
    before = common.load(tmp_path / "arms" / "original-seed0.pt")
    key = "blocks.0.ffn.router.weight"
    for arm in ("adamoe", "random_nulls", "top1"):
        start = starts[arm]
        assert all(torch.equal(start[name], before[name]) for name in before if name != key)
        assert torch.equal(start[key][:8], before[key])
    assert torch.allclose(starts["adamoe"][key][8:], before[key], rtol=0.1, atol=0.01)
    assert not torch.allclose(starts["random_nulls"][key][8:], before[key], rtol=0.1, atol=0.01)


def test_the_controls_keep_the_load_and_the_weights(tmp_path):
    """Own counts dictated change nothing: what shuffling costs is the placement alone."""
    for arm in ("original", "top2", "adamoe"):
        job = tiny_job(tmp_path, arm)
        job.do(adamoe.train_arm)
    task, model = adamoe.task_of(job), adamoe.rebuild(job, common.load(job.path(".pt")))
    own = adamoe.evaluate(model, task)
    assert adamoe.evaluate(model, task, lambda counts: counts)["loss"] == own["loss"]
    shuffled = adamoe.control_arm(tiny_job(tmp_path, "shuffled"))
    assert shuffled["load_by_layer"] == own["load_by_layer"] and shuffled["loss"] != own["loss"]
    assert adamoe.evaluate(model, task, torch.ones_like)["loss"] != own["loss"]
    assert adamoe.evaluate(model, task) == own  # nothing dictated stays behind
    top_p = adamoe.control_arm(tiny_job(tmp_path, "top_p"))
    assert top_p["load"] == pytest.approx(own["load"], abs=0.15)


@pytest.mark.parametrize("scale", ["small", "full"])
def test_an_arm_that_would_ignore_a_setting_is_refused(scale, tmp_path):
    run = tiny_job(tmp_path).run
    run.scale = scale
    for arm in ("adamoe@lr=1,num_null=2", "top1@alpha=0", "original@batch_size=2"):
        adamoe.check_arm(arm, run.config, run)
    idle = "adamoe@pretrain_steps=1 adamoe@d_model=8 top2@top_k=3 original@lr=1 shuffled@num_null=2"
    more = {"small": "adamoe@lora_rank=2 adamoe@context=8", "full": "original@d_ff=8"}
    for arm in f"{idle} {more[scale]}".split():
        with pytest.raises(common.UsageError, match="own to change|does nothing"):
            adamoe.check_arm(arm, run.config, run)


def test_script_end_to_end_with_every_arm(tiny_run):
    done = tiny_run(adamoe)
    verdicts = {claim["id"].partition(".")[2]: claim["verdict"] for claim in done.report["claims"]}
    assert "not measured" not in verdicts.values()
    assert verdicts["null_free"] == verdicts["causal"] == "passed"
    assert set(done.arms) == {*adamoe.DEFAULT["small"], *adamoe.MORE["small"]}
    assert done.arms["top2"]["expert_flops"] == 2 * done.arms["top1"]["expert_flops"]
