"""HoME: numbers worked out by hand, and the properties that the method promises. In float64."""

import json
import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from conftest import ROOT, check_claims, report
from test_behavior import write_census, write_kuairand
from torch import nn

import common
import home
from data import behavior

F64 = torch.float64
GROUPS = {"watch": ["view", "finish"], "inter": ["like", "comment", "follow"]}


def numbers(*rows, **options):
    return torch.tensor(rows, dtype=F64, **options)


def near(found, expected):
    torch.testing.assert_close(found, torch.as_tensor(expected, dtype=F64), atol=1e-9, rtol=0)


def core(arm="home", d_in=6, seed=0, **options):
    arm = home.ARMS[arm]
    levels = home.masks(arm.model, GROUPS, num_experts=3)
    switches = {"norm": arm.norm, "self_gates": arm.self_gates, "feature_gates": arm.feature_gates}
    sizes = {"widths": ((5, 4), (4,)), "tower": 3, "seed": seed}
    return home.MaskedExperts(levels, d_in, **sizes | switches | options).double()


# --- experts ------------------------------------------------------------------------------------


def test_expert_norm_swish_worked_example():
    norm, z = nn.BatchNorm1d(2).double(), numbers([1, -2], [3, 0], [5, 8])
    rows = [[-0.2781426181, -0.2627231813], [0, -0.1788201305], [0.9465999569, 1.1115245685]]
    near(home.expert_norm_swish(z, norm), rows)
    near(norm.running_mean, [0.3, 0.2])
    near(norm.running_var, [1.3, 3.7])  # unbiased
    norm.eval()
    rows = [
        [0.3983468645, -0.2763663635],
        [2.1652434356, -0.0492871911],
        [4.0564044852, 3.9859249880],
    ]
    near(home.expert_norm_swish(z, norm), rows)


def test_one_norm_over_all_experts_is_a_norm_for_each():
    z, together = torch.randn(20, 3, 4, dtype=F64), nn.BatchNorm1d(12).double()
    apart = [home.expert_norm_swish(z[:, e], nn.BatchNorm1d(4).double()) for e in range(3)]
    torch.testing.assert_close(home.expert_norm_swish(z, together), torch.stack(apart, dim=1))


# --- gates --------------------------------------------------------------------------------------


def test_feature_gate_worked_example():
    gate, x = home.FeatureGate(2, 1, 2).double(), torch.randn(5, 3, 2, dtype=F64)
    torch.testing.assert_close(gate(x), x, atol=0, rtol=1e-15)  # it starts at 1
    with torch.no_grad():
        gate.a.copy_(numbers([[[1], [0.5]], [[0], [1]]]))
        gate.b.copy_(numbers([[[1, -1]], [[2, 0.5]]]))
        gate.mix.copy_(numbers([[0, 1], [1, 0]]))
    near(gate(numbers([1, -2])), [[0.0816922697, -1.1195983048]])


def test_each_family_of_experts_reads_through_its_own_feature_gate():
    layer, x = core().layers[1].eval(), torch.randn(3, 8, 4, dtype=F64)
    gate = layer.feature_gate
    with torch.no_grad():
        gate.b.normal_()
        before = layer.experts(x)
        for family in range(8):
            for parameter in (gate.a, gate.b, gate.mix):
                parameter[family] += torch.randn_like(parameter[family])
                after = layer.experts(x)
                assert [e for e in range(8) if not torch.equal(before[:, e], after[:, e])] == [
                    family
                ]
                before = after


def test_masked_softmax_is_exactly_zero_and_passes_no_gradient_outside():
    logits = numbers([1, 2, 3], requires_grad=True)
    probs = home.masked_softmax(logits, torch.tensor([[True, False, True]]))
    near(probs, [[0.1192029220, 0, 0.8807970780]])
    assert probs[0, 1] == 0
    probs.square().sum().backward()
    assert logits.grad[0, 1] == 0 and logits.grad[0, 0] != 0
    nobody = torch.zeros(1, 3, dtype=torch.bool)
    assert not home.masked_softmax(logits, nobody).any()  # no NaN
    assert home.masked_softmax(logits.bfloat16(), ~nobody).dtype == torch.float32


def fixed_layer(outputs, gate, own, self_logits):
    """A layer whose experts say `outputs` and whose gates have these logits, whatever the input."""
    mask, own = torch.ones(1, len(outputs), dtype=torch.bool), torch.tensor([own])
    layer = home.MaskedExpertLayer(mask, own, d_in=2, widths=(2,), norm=False).double()
    layer.experts = lambda x: numbers(*outputs)[None]
    with torch.no_grad():
        layer.gate_weight.zero_(), layer.self_weight.zero_()
        layer.gate_bias.copy_(numbers(gate)), layer.self_bias.copy_(numbers(self_logits))
    return layer


def test_self_gate_worked_examples():
    x, trace = torch.zeros(1, 1, 2, dtype=F64), []
    layer = fixed_layer([[1, 2], [3, -1]], [0.1, 0.5], [False, True], [9.0, 0.3])
    near(layer(x, trace), [[[3.9207028707, -0.3705054971]]])
    near(trace[0][1], [[[0.4013123399, 0.5986876601]]])
    near(trace[0][2], [[[0, 0.5744425168]]])
    for shown in ("g = 0.401, 0.599", "s = 0.574", "= [3.92, -0.37]"):
        assert shown in home.__doc__
    # Two own experts: a softmax over them, here alone.
    layer = fixed_layer([[1, 2], [3, -1]], [0.0, 0.0], [True, True], [0.2, -0.4])
    g, s = layer.gates(x)
    near(s, [[[0.6456563062, 0.3543436938]]])
    near(layer(x) - (g @ numbers([1, 2], [3, -1])), [[[1.7086873875, 0.9369689187]]])


def test_the_second_self_gate_reads_the_group_and_the_gate_reads_group_and_shared():
    layer, x = core().layers[1], torch.randn(3, 8, 4, dtype=F64)  # inputs: watch, inter, shared
    g, s = layer.gates(x)
    expected = [([0, 1], [0, 1]), ([2, 3, 4], [2, 3, 4]), ([0, 1, 2, 3, 4], [])]
    for changed, moves in enumerate(expected):
        other = x.clone()
        other[changed] += 1
        for before, after, rows in zip((g, s), layer.gates(other), moves):
            assert [r for r in range(5) if not torch.equal(before[r], after[r])] == rows


def test_self_gate_keeps_own_experts_alive():
    grads = {}
    for self_gates in ("none", "gate"):
        model = core(self_gates=self_gates)
        layer = model.layers[1]
        with torch.no_grad():
            layer.gate_bias.masked_fill_(model.wiring[1].own[:, None], -30.0)
        model(torch.randn(40, 6, dtype=F64)).square().sum().backward()
        own = model.wiring[1].own.any(dim=0)
        grads[self_gates] = layer.weights[0].grad[own].abs().sum()
    assert grads["none"] < 1e-6 < 1e-2 < grads["gate"]


def test_a_lone_own_expert_is_added_once_more_by_adatt_several_by_learnt_weights():
    x = torch.randn(1, 7, 3)
    for num_own, start in ((1, [0, 1, 0]), (2, [0, 0, 0.5, 0.5, 0, 0])):
        level = home.masks("adatt", {"g": ["a", "b", "c"]}, num_own=num_own)[0]
        options = {"d_in": 3, "widths": (4,), "norm": False, "constant_self": True}
        layer = home.MaskedExpertLayer(level.mask, level.own, **options)
        _, s = layer.gates(x)
        assert s.shape == (3, 7, 3 * num_own) and s[1, 0].tolist() == start
        layer(x).sum().backward()
        grad = layer.constant_self.grad
        if num_own == 1:
            assert grad is None
        else:
            assert not grad[~level.own].any() and grad[level.own].all()


# --- masks --------------------------------------------------------------------------------------


def test_the_docstring_prints_the_masks():
    lines = [line.split() for line in home.__doc__.splitlines()]
    first, second = home.masks("home", GROUPS, num_meta=1)
    for level, title, columns in ((first, "1", 3), (second, "2", 8)):
        header, rows = home.mask_table(level)
        printed = [" ".join(map(str, row)).split() for row in (header, *rows)]
        at = next(i for i, line in enumerate(lines) if line[:2] == ["level", title])
        found = [lines[at][2 : 2 + columns]]
        found += [line[: 1 + columns] for line in lines[at + 1 : at + len(printed)]]
        assert found == printed


def test_masks_of_adatt():
    """Those of MMoE, CGC and PLE follow from what torch-rechub says, below."""
    first, second = home.masks("adatt", GROUPS)
    assert first.mask.all() and second.mask.all()
    assert torch.equal(first.own, torch.eye(5, dtype=torch.bool))
    assert not first.expert_input.any() and second.expert_input.tolist() == [0, 1, 2, 3, 4]


def test_home_hierarchy():
    first, second = home.masks("home", GROUPS, num_meta=2)
    assert first.mask.int().tolist() == [[1, 1, 0, 0, 1, 1], [0, 0, 1, 1, 1, 1], [1] * 6]
    assert first.family.tolist() == [0, 0, 1, 1, 2, 2] and first.own.sum(dim=1).tolist() == [2] * 3
    assert second.expert_input.tolist() == [2, 0, 1, 0, 0, 1, 1, 1]
    assert second.gate_input.tolist() == [[0, 2], [0, 2], [1, 2], [1, 2], [1, 2]]
    assert torch.equal(second.own[:, 3:], second.mask[:, 3:]) and not second.own[:, :3].any()


def test_a_watch_task_has_no_path_from_inter_experts_but_the_meta_ones():
    model = core()
    model(torch.randn(30, 6, dtype=F64))[:, 0].square().sum().backward()  # task "view"
    level, grad = model.wiring[1], model.layers[1].weights[0].grad
    reached = [name for e, name in enumerate(level.experts) if grad[e].any()]
    assert reached == ["shared", "watch", "view"]
    meta = model.layers[0].weights[0].grad
    assert all(meta[e].any() for e in range(6))  # inter meta experts too, through the shared row
    assert model.w1.grad[0].any() and not model.w1.grad[1:].any()


# What torch-rechub 0.9.0 says (MMOE; PLE with n_level 1, which is CGC; PLE with n_level 2) on the
# same weights, its BatchNorms set to the identity. It has no AdaTT and no HoME.
KNOWN = {
    "mmoe": [
        [0.3844237107, 0.5486294877, 0.3477469077],
        [0.4077759175, 0.5832869641, 0.3158430370],
        [0.4412429547, 0.5425558430, 0.2529372949],
    ],
    "cgc": [
        [0.4557072409, 0.5031376126, 0.2258124844],
        [0.5853160296, 0.6117926244, 0.3796827824],
        [0.3374518579, 0.4905482340, 0.3396667810],
    ],
    "ple": [
        [0.3492934669, 0.6637278144, 0.4548940402],
        [0.3152727411, 0.6474634410, 0.4485502791],
        [0.4336252075, 0.6671013352, 0.4450973478],
    ],
}


@pytest.mark.parametrize("name", KNOWN)
def test_baselines_say_what_torch_rechub_says(name):
    groups = {"watch": ["view", "finish"], "inter": ["like"]}
    levels = home.masks(name, groups, num_experts=3, num_shared=2, num_own=2)
    sizes = {"widths": ((5, 3),) * len(levels), "tower": 4, "norm": False}
    model = home.MaskedExperts(levels, 4, **sizes).double()
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            angle = 1.3 * torch.arange(parameter.numel(), dtype=F64) + 2 * number
            parameter.copy_(angle.sin().view(parameter.shape))
    v = (0.7 * torch.arange(12, dtype=F64)).sin().view(3, 4)
    near(model(v).sigmoid(), KNOWN[name])


def test_parameter_count_of_the_default_core():
    model = home.HoME(72, behavior.GROUPS)
    assert [common.count_parameters(layer) for layer in model.layers] == [51_732, 27_280]


def test_parts_are_paired_and_experts_differ():
    """A variant shares every initial weight in common with HoME; no two experts are alike."""
    whole = core().state_dict()
    for arm in ("home-no-fg", "home-no-fg-sg"):
        part = core(arm).state_dict()
        assert all(torch.equal(whole[name], value) for name, value in part.items())
        removed = set(whole) - set(part)
        assert removed and all("feature_gate" in name or "self_" in name for name in removed)
    assert not torch.equal(whole["layers.0.weights.0"][0], whole["layers.0.weights.0"][1])
    assert not torch.equal(core(seed=1).state_dict()["w1"], whole["w1"])


def test_pasted_layers_follow_torch_manual_seed():
    """Another one each time, the same after the same seed; the first edition always drew from 0."""

    def drawn(seed):
        torch.manual_seed(seed)
        layer = home.MaskedExpertLayer(torch.ones(2, 3, dtype=torch.bool), d_in=2, widths=(4,))
        return [home.HoME(6, GROUPS), home.HoME(6, GROUPS), layer]

    def same(a, b):
        return [torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()) if p.std() > 0]

    first, again, other = drawn(3), drawn(3), drawn(4)
    for a, b, c in zip(first, again, other):
        assert all(same(a, b)) and not any(same(a, c))
    assert not any(same(first[0], first[1]))


def test_loss_worked_example():
    logits, labels = numbers([0, 2], [1, -1]), numbers([1, 0], [0, 1])
    total, each = home.multitask_loss(logits, labels)
    near(each, [1.0032044340, 1.7200948493])
    near(total, 2.7232992837)
    weighted, _ = home.multitask_loss(logits, labels, numbers([2, 0.5])[0])
    near(weighted, 2 * 1.0032044340 + 0.5 * 1.7200948493)


@pytest.mark.parametrize("missing", [-1.0, math.nan])
def test_missing_labels_are_refused_or_masked(missing):
    logits = numbers([0, 2], [1, -1], requires_grad=True)
    labels = numbers([1, missing], [0, 1])
    with pytest.raises(ValueError, match=f"label of task 1 in row 0 is {missing:g}; 0 to 1 is"):
        home.multitask_loss(logits, labels)
    known = torch.tensor([[True, False], [True, True]])
    total, each = home.multitask_loss(logits, labels, mask=known)
    near(each, [1.0032044340, 1.3132616875])  # of task 1: row 1 alone, log(1 + e)
    total.backward()
    assert logits.grad[0, 1] == 0 and logits.grad.isfinite().all()
    total, each = home.multitask_loss(logits, labels, mask=known & torch.tensor([True, False]))
    near(each, [1.0032044340, 0])  # nothing known of task 1
    with pytest.raises(ValueError, match="must be .batch, tasks., all alike"):
        home.multitask_loss(logits, labels, mask=known[:, :1])
    home.multitask_loss(logits, numbers([0.3, 1], [0, 1]))  # soft labels are labels


@pytest.mark.parametrize("arm", home.ARMS)
def test_every_arm_learns_and_all_of_it_gets_gradients(arm):
    model = core(arm).float()
    v, labels = torch.randn(64, 6), (torch.rand(64, 5) < 0.3).float()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer, losses = torch.optim.Adam(trained, lr=1e-2), []
    for _ in range(12):
        optimizer.zero_grad()
        loss, _ = home.multitask_loss(model(v), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] and all(p.grad is not None for p in trained)


def test_bad_groups_and_sizes_name_the_culprit():
    ones, model = torch.ones(1, 2, dtype=torch.bool), home.Ranker([3, 5], GROUPS).eval()
    layer = partial(home.MaskedExpertLayer, d_in=2, widths=(2,))
    for function, *arguments, told in [
        (home.masks, "home", {"watch": ["view"], "inter": []}, "'inter' has no task"),
        (home.masks, "home", {"a": ["view"], "b": ["view"]}, "task 'view' is in 2 groups"),
        (home.masks, "home", {"a": ["shared"]}, "task 'shared' has the name of a group"),
        (home.masks, "home", {"a": ["b"], "b": ["c"]}, "task 'b' has the name of a group"),
        (home.masks, "mmoe2", GROUPS, "no model 'mmoe2'; there are mmoe, cgc"),
        (core(), torch.zeros(1, 6, dtype=F64), "batch of 1 row"),  # in training
        (partial(home.HoME, widths=((8, 4),)), 7, GROUPS, "widths has 1 entries for 2 levels"),
        (home.FeatureGate, 4, 0, 2, "rank is 0, num_gates 2"),
        (home.FeatureGate, 4, 2, 0, "rank is 2, num_gates 0"),
        (layer, torch.cat([ones, ~ones]), "row 1 of the mask allows no expert"),
        (layer, ones, ones.T, r"mask is \[1, 2\], self_mask \[2, 1\]"),
        (model, torch.tensor([[3, 4]]), "field 0 has id 3 in row 0; its table has 3 rows"),
        (model, torch.tensor([[2, 4], [0, 5]]), "field 1 has id 5 in row 1"),
        (model, torch.tensor([[2, -1]]), "field 1 has id -1 in row 0"),
    ]:
        with pytest.raises(ValueError, match=told):
            function(*arguments)
    assert model(torch.tensor([[2, 4], [0, 1]])).shape == (2, 5)


# --- the experiment -----------------------------------------------------------------------------

SIZES = {"users": 60, "items": 80, "hidden": 8, "width": 8, "tower": 4, "experts": 3}
TINY = replace(home.SMALL, rows=2000, batch_size=64, **SIZES)


def job(tmp_path, arm, config=TINY, seed=0):
    (tmp_path / "arms").mkdir(exist_ok=True)
    run = common.Run("home", "small", "cpu", torch.float32, [seed], tmp_path, config=config)
    return common.Job(run, arm, seed)


def tiny_data(rows=2000):
    return behavior.synthetic(0, rows, 60, 80)


def test_arms_share_batches_and_each_row_is_seen_once(tmp_path, monkeypatch):
    seen, forward = {"cgc": [], "home": []}, home.Ranker.forward

    def remember(model, ids, trace=None):
        if model.training:
            seen[arm].append(ids.clone())
        return forward(model, ids, trace)

    monkeypatch.setattr(home.Ranker, "forward", remember)
    for arm in seen:
        home.train_arm(job(tmp_path, arm))
    one, other = seen.values()
    assert len(one) == len(other) == 25 and all(torch.equal(a, b) for a, b in zip(one, other))
    as_rows = lambda ids: sorted(map(tuple, ids.tolist()))
    assert as_rows(torch.cat(one)) == as_rows(tiny_data().train.ids)  # 25 batches of 64, no test


def test_learning_rates_are_the_arms_own(tmp_path, monkeypatch):
    rates = []

    def train(self, *given, optimizer, **options):
        rates.append(optimizer.param_groups[0]["lr"])

    monkeypatch.setattr(common.Job, "train", train)
    for arm, lr in (("home", None), ("home@lr=0.04", None), ("mmoe-star", 0.25)):
        home.train_arm(job(tmp_path, arm, replace(TINY, lr=lr)))
    assert rates == [home.ARMS["home"].lr, 0.04, 0.25]


def test_evaluation_does_not_train_and_measures_all_rows(monkeypatch):
    data = tiny_data(50_000)  # more test rows than a chunk
    model = home.make_ranker("home", data, TINY, 0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found, trace = home.evaluate(model, data, data.test), []
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    with torch.no_grad():
        scores = model(data.test.ids, trace).numpy()
    assert found["mean_gauc"] == behavior.ranking(scores, data.test, [5, 6, 7])["mean_gauc"]
    (_, gate, own), level = trace[-1], model.core.wiring[-1]
    gate, own = gate.mean(dim=1), own.mean(dim=1)
    assert np.allclose(found["gate"], gate, atol=1e-4)
    assert np.allclose(found["weight"], gate + own, atol=1e-4)
    share = ((gate + own) * level.own).sum(dim=1) / (gate + own).sum(dim=1)
    rare, frequent = behavior.rare_and_frequent(data)
    assert found["own weight, rare"] == pytest.approx(share[rare].mean().item(), abs=1e-4)
    assert found["own weight, frequent"] == pytest.approx(share[frequent].mean().item(), abs=1e-4)


def test_zeros_are_those_of_the_worst_expert_of_any_level(monkeypatch):
    data = tiny_data()
    model = home.make_ranker("cgc", data, TINY, 0)
    with torch.no_grad():
        model.core.layers[0].biases[-1][3] = -100.0  # its ReLUs let nothing through
    assert home.evaluate(model, data, data.test)["zero"] == 1.0
    assert home.evaluate(home.make_ranker("home", data, TINY, 0), data, data.test)["zero"] == 0.0


def test_fewest_users_worked_examples():
    shared = torch.ones(4, 1, dtype=torch.bool)
    examples = [([0.5, 0.5, 0, 0], 0.5), ([0.97, 0.01, 0.01, 0.01], 0.2956456044), ([3] * 4, 1)]
    for weights, users in examples:
        gate = torch.tensor([weights], dtype=F64).T
        assert home.fewest_users(gate, shared) == pytest.approx(users, abs=1e-9)
    # The worst of several counts; one that a task has for itself does not; nor do tasks outside.
    gate = numbers([0.5, 0.2, 1], [0.5, 0, 0], [0, 0.2, 0])
    mask = torch.tensor([[True, True, True], [True, True, False], [False, True, False]])
    assert home.fewest_users(gate, mask) == pytest.approx(2 / 3)


def test_parameters_and_flops_count_experts_of_all_rows(tmp_path):
    spent = home.train_arm(job(tmp_path, "mmoe", replace(TINY, steps=1)))
    experts, gates, mixing, towers = 3 * (72 * 8 + 8 * 8), 8 * 72 * 3, 8 * 3 * 8, 8 * (8 * 4 + 4)
    assert spent["FLOPs a row"] == 2 * (experts + gates + mixing + towers)
    biases = 3 * (8 + 8) + 8 * 3 + 8 * (4 + 1)
    assert spent["parameters"] == experts + gates + towers + biases


# --- claims -------------------------------------------------------------------------------------


def measured(auc, zero=0.0, users=0.9, rare=0.5, frequent=0.6):
    result = {"mean_auc": auc, "mean_gauc": auc, "zero": zero, "users": users}
    for kind in ("weight", "gate"):
        result |= {f"own {kind}, rare": rare, f"own {kind}, frequent": frequent}
    return result | {"parameters": 5, "FLOPs a row": 5}


GOOD = {arm: measured(0.77, zero=0.7, users=0.5, rare=0.1, frequent=0.7) for arm in home.PLAIN}
GOOD |= {arm: measured(0.78) for arm in home.STARRED}
GOOD |= {"home-no-fg-sg": measured(0.79), "home-no-fg": measured(0.795), "home": measured(0.8)}
GAP = {"own weight, rare": 0.1, "own weight, frequent": 0.8}
WORSE = {  # claim: changes, each of which alone makes it fail
    "collapse": [{"cgc-star": {"mean_auc": 0.76}}],
    "degradation": [{"ple": {"users": 0.95}}],
    "underfitting": [
        {"home": GAP},
        {"home": {"own weight, rare": 0.9, "own weight, frequent": 0.1}},  # turned round: a gap
        {"ple": {"own weight, rare": 0.7, "own weight, frequent": 0.7}},  # nothing to mend
    ],
    "beats_plain": [{"cgc": {"mean_gauc": 0.81}}],
    "beats_starred": [{"ple-star": {"mean_auc": 0.81, "mean_gauc": 0.81}}],
    "parts": [{"home-no-fg": {"mean_auc": 0.801}}],
    "zeros": [{"home": {"zero": 0.1}}],
    "cost": [{"home": {"parameters": 7, "FLOPs a row": 7}}],
}


def test_every_claim_can_hold_and_can_fail():
    check_claims(home, TINY, GOOD, WORSE)


# --- the script ---------------------------------------------------------------------------------


def test_script_end_to_end_with_every_arm(tiny_run):
    done = tiny_run(home)
    verdicts = {claim["id"]: claim["verdict"] for claim in done.report["claims"]}
    assert list(verdicts) == [f"home.{name}" for name in WORSE]
    assert set(verdicts.values()) <= {"seen", "not seen", "passed"}
    assert set(done.arms) == {"oracle", *home.ARMS}
    best = done.arms["oracle"]["mean_auc"]
    assert all(best >= found["mean_auc"] for found in done.arms.values())
    first = (done.folder / "metrics.jsonl").read_text().splitlines()[0]
    assert {"arm", "step", "loss", "follow"} <= set(json.loads(first))
    assert "home: mean weight (gate + self gate)" in done.stdout
    assert "where HoME's lead over PLE comes from" in done.stdout


@pytest.mark.parametrize("version", ["1k", "pure"])
def test_full_scale_epoch_on_files_in_the_published_format(command_line, tmp_path, version):
    write_kuairand(tmp_path / "data", version, rows=900)
    flags = f"--full --data kuairand-{version} --data-dir data --workers 1 --threads 1 "
    flags += "--hash-bits 8 --embedding 4 --hidden 8 --width 8 --tower 4 --batch-size 64 "
    flags += "--arms cgc,home" + (" --dtype bf16" if version == "pure" else "")
    done = command_line(home, *flags.split())
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "runs" / "home-full"
    told = report(folder)
    found = told["results"]["arms"]["home"][0]
    assert told["config"]["lr"] == 1e-3 and 0 < found["val_auc"] < 1 and len(found["auc"]) == 8
    assert told["data"].keys() == {f"kuairand-{version}"} and "valid play" in done.stdout
    loaded = home.load_trained(folder / "arms" / "home-seed0.pt")
    data = behavior.load(f"kuairand-{version}", tmp_path / "data", hash_bits=8)
    assert loaded.sizes.tolist() == list(data.fields.values())
    metrics = (folder / "metrics.jsonl").read_text().splitlines()
    assert len(metrics) == 2 * (len(data.train.labels) // 64)


def test_census_end_to_end_on_small_files(command_line, tmp_path):
    write_census(tmp_path)
    flags = "--hidden 8 --width 8 --tower 4 --embedding 4 --data census --data-dir . "
    flags += "--arms mmoe,home --batch-size 64 --workers 1"
    done = command_line(home, *flags.split())
    assert done.returncode == 0, done.stderr
    found = report(tmp_path / "runs" / "home-small")["results"]["arms"]["home"][0]
    assert len(found["auc"]) == 2 and len(found["weight"]) == 2


def test_figures_of_the_docstring_are_those_of_the_committed_result():
    told = json.loads((ROOT / "results" / "cpu-2-cores" / "home.json").read_text())
    results = common.Results(told["results"]["arms"])
    assert told["seeds"] == list(range(8)) and set(results) == {"oracle", *home.ARMS}
    for arm, settings in home.ARMS.items():
        assert {result["lr"] for result in results[arm]} == {settings.lr}
    lead = results.ahead("home", "ple", "mean_auc")
    gains = home.gains_by_part(results).values()
    percents = [f"{100 * gain.mean() / lead.mean():.0f} %" for gain in gains]
    zeros = [100 * results.of(arm, "zero").mean() for arm in home.PLAIN]
    gaps = []
    for arm, kind in (("cgc", "weight"), ("home", "weight"), ("home", "gate")):
        gap = results.difference(arm, f"own {kind}, frequent", f"own {kind}, rare")
        gaps.append(f"{gap.mean():.2f}")
    star = max(home.STARRED, key=lambda arm: results.of(arm, "mean_auc").mean())
    found = " ".join(home.__doc__.split())
    for part in (
        f"plain model, CGC, by {common.show(results.ahead('home', 'cgc', 'mean_auc'))} AUC",
        f"and PLE by {common.show(lead)}: BatchNorm and Swish in PLE already give {percents[0]}",
        f"feature gates {percents[3]}, the hierarchy {percents[1]} and self gates {percents[2]}",
        f"best star: {common.show(results.ahead('home', star, 'mean_auc'))}.",
        f"are {min(zeros):.0f} to {max(zeros):.0f} % zeros",
        f"is {gaps[0]} of the weight in CGC, {gaps[1]} in HoME, {gaps[2]} by its gates alone",
    ):
        assert part in found, part


def test_a_group_may_not_be_called_as_the_experts_of_all_groups():
    with pytest.raises(ValueError, match="group 'shared' has the name of"):
        home.HoME(8, {"shared": ["a", "b"], "inter": ["c"]})
