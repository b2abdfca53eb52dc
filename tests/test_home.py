"""HoME: the numbers of the hand-worked examples, and the properties the method promises. float64 throughout."""

import copy
import json
import math
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_behavior import write_census, write_kuairand
from tiny import HOME
from torch import nn

import bridge as common
import home
import kernels
from data import behavior

F64 = torch.float64
GROUPS = {"watch": ["view", "finish"], "inter": ["like", "share", "follow"]}
TASKS = ["view", "finish", "like", "share", "follow"]


def numbers(*rows, **options):
    return torch.tensor(rows, dtype=F64, **options)


def near(found, expected):
    torch.testing.assert_close(found, torch.as_tensor(expected, dtype=F64), atol=1e-9, rtol=0)


def core(arm=home.HOME, d_in=6, seed=0, **options):
    levels = home.masks(arm.wiring, GROUPS, num_experts=3, hierarchy=arm.hierarchy)
    sizes = {"widths": ((5, 4), (4,)), "tower": 3, "norm": arm.norm, "self_gates": arm.self_gates, "seed": seed}
    return home.MaskedExperts(levels, d_in, feature_gates=arm.feature_gates, **sizes | options).double()


# --- experts -------------------------------------------------------------------------------------------------


def test_expert_norm_swish_worked_example():
    norm, z = nn.BatchNorm1d(2).double(), numbers([1, -2], [3, 0], [5, 8])
    rows = [[-0.2781426181, -0.2627231813], [0, -0.1788201305], [0.9465999569, 1.1115245685]]
    near(home.expert_norm_swish(z, norm), rows)
    near(norm.running_mean, [0.3, 0.2])
    near(norm.running_var, [1.3, 3.7])  # unbiased
    norm.eval()
    rows = [[0.3983468645, -0.2763663635], [2.1652434356, -0.0492871911], [4.0564044852, 3.9859249880]]
    near(home.expert_norm_swish(z, norm), rows)


def test_one_norm_over_all_experts_is_a_norm_for_each():
    z, together = torch.randn(20, 3, 4, dtype=F64), nn.BatchNorm1d(12).double()
    apart = [home.expert_norm_swish(z[:, e], nn.BatchNorm1d(4).double()) for e in range(3)]
    torch.testing.assert_close(home.expert_norm_swish(z, together), torch.stack(apart, dim=1))


def test_in_evaluation_rows_do_not_see_each_other_and_one_row_is_enough():
    model, v = core(), torch.randn(12, 6, dtype=F64)
    for _ in range(3):
        model(torch.randn(30, 6, dtype=F64))
    model.eval()
    torch.testing.assert_close(torch.cat([model(row[None]) for row in v]), model(v))
    model.train()
    assert not torch.allclose(model(v)[:6], model(v[:6]))
    with pytest.raises(ValueError, match="batch of 1 row"):
        model(v[:1])


# --- gates ---------------------------------------------------------------------------------------------------


def test_feature_gate_starts_at_one_and_stays_inside_0_and_2():
    gate, x = home.FeatureGate(6, 2, 3).double(), torch.randn(50, 6, dtype=F64)
    torch.testing.assert_close(gate(x), x, atol=0, rtol=1e-15)
    with torch.no_grad():
        gate.b.normal_(std=3)
    factor = gate(x) / x
    assert factor.min() > 0 and factor.max() < 2 and not torch.allclose(factor, torch.ones(()).double())
    assert gate(x.view(5, 10, 6)).shape == (5, 10, 6)


def test_feature_gate_worked_example():
    gate = home.FeatureGate(2, 1, 2).double()
    with torch.no_grad():
        gate.a.copy_(numbers([[[1], [0.5]], [[0], [1]]]))
        gate.b.copy_(numbers([[[1, -1]], [[2, 0.5]]]))
        gate.mix.copy_(numbers([[0, 1], [1, 0]]))
    near(gate(numbers([1, -2])), [[0.0816922697, -1.1195983048]])


def test_families_have_feature_gates_of_their_own():
    several, x = home.FeatureGate(4, 2, 2, num_families=3).double(), torch.randn(3, 7, 4, dtype=F64)
    with torch.no_grad():
        several.b.normal_()
    for i in range(3):
        one = home.FeatureGate(4, 2, 2).double()
        one.load_state_dict({name: value[i : i + 1] for name, value in several.state_dict().items()})
        torch.testing.assert_close(several(x)[i], one(x[i]))


def test_each_family_of_experts_reads_through_its_own_feature_gate():
    model = core()
    layer, x = model.layers[1].eval(), torch.randn(3, 8, 4, dtype=F64)
    with torch.no_grad():
        layer.feature_gate.b.normal_()
    before = layer.experts(x)
    for family in range(8):
        with torch.no_grad():
            layer.feature_gate.b[family] += 1
        after = layer.experts(x)
        moved = [e for e in range(8) if not torch.equal(before[:, e], after[:, e])]
        assert moved == [family]
        before = after


def test_masked_softmax_is_exactly_zero_and_passes_no_gradient_outside():
    logits = numbers([1, 2, 3], requires_grad=True)
    probs = home.masked_softmax(logits, torch.tensor([[True, False, True]]))
    near(probs, [[0.1192029220, 0, 0.8807970780]])
    assert probs[0, 1] == 0
    probs.square().sum().backward()
    assert logits.grad[0, 1] == 0 and logits.grad[0, 0] != 0
    assert not home.masked_softmax(logits, torch.zeros(1, 3, dtype=torch.bool)).any()  # nobody allowed: no NaN
    assert home.masked_softmax(torch.randn(2, 3).bfloat16(), torch.ones(2, 3, dtype=torch.bool)).dtype == torch.float32


def fixed_layer(outputs, gate, own, self_logits):
    """A layer whose experts say `outputs` and whose gates have these logits, whatever the input."""
    layer = home.MaskedExpertLayer(
        torch.ones(1, len(outputs), dtype=torch.bool), torch.tensor([own]), d_in=2, widths=(2,), norm=False
    ).double()
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
    level = home.masks("cgc", {"g": ["t"]}, num_shared=1)[0]
    found = home.diagnose(level, home.statistics(level, *trace[0]))
    assert found["own_share"] == pytest.approx([0.7451082935], abs=1e-6)
    # Two own experts: a softmax over them, here alone.
    layer = fixed_layer([[1, 2], [3, -1]], [0.0, 0.0], [True, True], [0.2, -0.4])
    g, s = layer.gates(x)
    near(s, [[[0.6456563062, 0.3543436938]]])
    near(layer(x) - (g @ numbers([1, 2], [3, -1])), [[[1.7086873875, 0.9369689187]]])


def test_the_second_self_gate_reads_the_group_and_the_gate_reads_group_and_shared():
    layer, x = core().layers[1], torch.randn(3, 8, 4, dtype=F64)  # inputs: watch, inter, shared
    g, s = layer.gates(x)
    for changed, gate_moves, self_moves in ((0, [0, 1], [0, 1]), (1, [2, 3, 4], [2, 3, 4]), (2, [0, 1, 2, 3, 4], [])):
        other = x.clone()
        other[changed] += 1
        moved = [[r for r in range(5) if not torch.equal(a[r], b[r])] for a, b in zip((g, s), layer.gates(other))]
        assert moved == [gate_moves, self_moves]


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


def test_constant_self_weights_start_at_one_over_the_number_of_own_experts():
    level = home.masks("adatt", GROUPS, num_own=2)[0]
    layer = home.MaskedExpertLayer(level.mask, level.own, d_in=3, widths=(4,), norm=False, constant_self=True)
    _, s = layer.gates(torch.randn(1, 7, 3))
    assert s.shape == (5, 7, 10) and s.sum(dim=-1).eq(1).all() and s[1, 0].tolist() == [0, 0, 0.5, 0.5] + [0] * 6
    layer(torch.randn(1, 7, 3)).sum().backward()
    assert not layer.constant_self.grad[~level.own].any()


# --- masks ---------------------------------------------------------------------------------------------------


def test_mask_tables():
    (mmoe,), (cgc,) = home.masks("mmoe", GROUPS, num_experts=3), home.masks("cgc", GROUPS, num_shared=1)
    assert mmoe.mask.shape == (5, 3) and mmoe.mask.all() and not mmoe.own.any()
    assert cgc.mask.int().tolist() == [[1, *(int(i == t) for i in range(5))] for t in range(5)]
    assert torch.equal(cgc.own[:, 1:], torch.eye(5, dtype=torch.bool)) and not cgc.own[:, 0].any()
    first, second = home.masks("ple", GROUPS, num_shared=1)
    assert first.rows == (*TASKS, "shared") and first.mask[5].all() and torch.equal(first.mask[:5], cgc.mask)
    assert second.expert_input.tolist() == [5, 0, 1, 2, 3, 4] and second.gate_input[:, 0].tolist() == [0, 1, 2, 3, 4]
    first, second = home.masks("adatt", GROUPS)
    assert first.mask.all() and second.mask.all() and torch.equal(first.own, torch.eye(5, dtype=torch.bool))
    assert not first.expert_input.any() and second.expert_input.tolist() == [0, 1, 2, 3, 4]
    (bottom,) = home.masks("shared-bottom", GROUPS)
    assert bottom.mask.shape == (5, 1)


def test_home_hierarchy():
    first, second = home.masks("home", GROUPS, num_meta=2)
    assert (
        first.rows == ("watch", "inter", "shared")
        and first.experts == ("watch",) * 2 + ("inter",) * 2 + ("shared",) * 2
    )
    assert first.mask.int().tolist() == [[1, 1, 0, 0, 1, 1], [0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]]
    assert first.family.tolist() == [0, 0, 1, 1, 2, 2] and first.own.sum(dim=1).tolist() == [2, 2, 2]
    assert second.experts[:3] == ("shared", "watch", "inter") and second.expert_input.tolist() == [
        2,
        0,
        1,
        0,
        0,
        1,
        1,
        1,
    ]
    assert second.gate_input.tolist() == [[0, 2], [0, 2], [1, 2], [1, 2], [1, 2]]
    assert second.mask[:, :3].int().tolist() == [[1, 1, 0]] * 2 + [[1, 0, 1]] * 3
    assert torch.equal(second.mask[:, 3:], torch.eye(5, dtype=torch.bool)) and torch.equal(
        second.own[:, 3:], second.mask[:, 3:]
    )
    first, second = home.masks("home", GROUPS, hierarchy=False)
    assert first.mask.all() and second.mask[:, :3].all()
    assert torch.equal(second.mask[:, 3:], torch.eye(5, dtype=torch.bool))


def test_a_watch_task_has_no_path_from_inter_experts_but_the_meta_ones():
    model = core()
    model(torch.randn(30, 6, dtype=F64))[:, 0].square().sum().backward()  # task "view"
    level, grad = model.wiring[1], model.layers[1].weights[0].grad
    reached = {name: bool(grad[e].any()) for e, name in enumerate(level.experts)}
    assert reached == {"shared": True, "watch": True, "inter": False, "view": True,
                       **{task: False for task in TASKS[1:]}}  # fmt: skip
    meta = model.layers[0].weights[0].grad
    assert all(meta[e].any() for e in range(6))  # inter meta experts too, through the shared row
    assert model.w1.grad[0].any() and not model.w1.grad[1:].any()


def test_mmoe_and_one_level_ple_from_the_same_layer():
    """All gates off, a mask of ones: MMoE worked out by hand. CGC's layer is the first level of PLE."""
    model, v = core(home.PLAIN["mmoe"]), torch.randn(9, 6, dtype=F64)
    layer, expected = model.layers[0], torch.zeros(5, 9, 4, dtype=F64)
    for task in range(5):
        gate = (v @ layer.gate_weight[task] + layer.gate_bias[task]).softmax(dim=-1)  # [9, 3]
        for e in range(3):
            h = F.relu(v @ layer.weights[0][e] + layer.biases[0][e])
            expected[task] += gate[:, e : e + 1] * F.relu(h @ layer.weights[1][e] + layer.biases[1][e])
    torch.testing.assert_close(layer(v[None]), expected)
    cgc, ple = core(home.PLAIN["cgc"]), core(home.PLAIN["ple"])
    torch.testing.assert_close(cgc.layers[0](v[None]), ple.layers[0](v[None])[:5])


def test_home_layer_without_its_parts_is_mmoe():
    ones = torch.ones(5, 3, dtype=torch.bool)
    plain = home.MaskedExpertLayer(ones, d_in=6, widths=(5, 4), norm=False).double()
    gated = home.MaskedExpertLayer(
        ones, torch.zeros_like(ones), d_in=6, widths=(5, 4), norm=False, rank=2, family=torch.arange(3)
    ).double()
    x = torch.randn(1, 9, 6, dtype=F64)
    torch.testing.assert_close(plain(x), gated(x))  # feature gates start at 1, no own experts


def test_the_layer_equals_the_grouped_kernels():
    """Dense gating is a dispatch in which every row picks every expert."""
    layer, x = (
        home.MaskedExpertLayer(torch.ones(1, 3, dtype=torch.bool), d_in=4, widths=(5,), norm=False),
        torch.randn(7, 4),
    )
    index = torch.arange(3).expand(7, 3)
    dispatch = kernels.make_dispatch(index, 3)
    h = kernels.grouped_mm(kernels.gather(x, dispatch), layer.weights[0], dispatch, layer.biases[0][:, 0])
    g, _ = layer.gates(x[None])
    torch.testing.assert_close(kernels.scatter(F.relu(h), dispatch, g[0]), layer(x[None])[0], atol=1e-6, rtol=1e-5)


def test_parameter_count_of_the_default_core():
    model = home.HoME(72, behavior.GROUPS)
    assert [sum(p.numel() for p in layer.parameters()) for layer in model.layers] == [51_732, 27_280]
    assert sum(p.numel() for p in model.layers.parameters()) == 79_012


def test_parts_are_paired_and_experts_differ():
    """A variant shares every initial weight it has in common with HoME; no two experts start alike."""
    whole = core().state_dict()
    for arm in home.LADDER.values():
        part = core(arm).state_dict()
        assert all(torch.equal(whole[name], value) for name, value in part.items())
    assert not torch.equal(whole["layers.0.weights.0"][0], whole["layers.0.weights.0"][1])
    assert not torch.equal(core(seed=1).state_dict()["w1"], whole["w1"])
    removed = set(whole) - set(core(home.LADDER["home-no-fg-sg"]).state_dict())
    assert all("feature_gate" in name or "self_" in name for name in removed) and removed


def test_gradients():
    """Of everything at once, against finite differences."""
    model = core()
    with torch.no_grad():
        for layer in model.layers:
            layer.feature_gate.b.normal_(std=0.5)
    v = torch.randn(4, 6, dtype=F64, requires_grad=True)
    chosen = [model.layers[0].feature_gate.a, model.layers[1].self_weight, model.layers[0].gate_weight]
    weights = [parameter.detach().clone().requires_grad_() for parameter in chosen]
    names = ["layers.0.feature_gate.a", "layers.1.self_weight", "layers.0.gate_weight"]

    def run(v, *weights):
        return torch.func.functional_call(model, dict(zip(names, weights)), (v,))

    assert torch.autograd.gradcheck(run, (v, *weights), fast_mode=True)


def test_loss_worked_example():
    total, each = home.multitask_loss(numbers([0, 2], [1, -1]), numbers([1, 0], [0, 1]))
    near(each, [1.0032044340, 1.7200948493])
    near(total, 2.7232992837)
    weighted, _ = home.multitask_loss(numbers([0, 2], [1, -1]), numbers([1, 0], [0, 1]), numbers([2, 0.5])[0])
    near(weighted, 2 * 1.0032044340 + 0.5 * 1.7200948493)


@pytest.mark.parametrize("arm", home.ARMS.values(), ids=home.ARMS.keys())
def test_every_arm_learns_gets_gradients_everywhere_and_survives_deepcopy_and_autocast(arm):
    model = copy.deepcopy(core(arm).float())
    v, labels = torch.randn(64, 6), (torch.rand(64, 5) < 0.3).float()
    optimizer, losses = torch.optim.Adam(model.parameters(), lr=1e-2), []
    for _ in range(12):
        optimizer.zero_grad()
        loss, _ = home.multitask_loss(model(v), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    missing = [name for name, p in model.named_parameters() if p.grad is None]
    assert not missing and all(torch.isfinite(p).all() for p in model.parameters())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, _ = home.multitask_loss(model(v), labels)
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(losses[-1], rel=0.1)


# --- diagnostics ---------------------------------------------------------------------------------------------


def test_zero_and_dead_fractions_worked_example():
    h = torch.tensor([[[0.0, 0], [1, 0]], [[0, 2], [0, 0]]])  # [batch, experts, d]
    level, g = home.masks("mmoe", {"g": ["t"]}, num_experts=2)[0], torch.full((1, 2, 2), 0.5)
    found = home.diagnose(level, home.statistics(level, h, g, None))
    assert found["zero"] == [0.75, 0.75] and found["dead"] == [0.5, 0.5]
    assert found["mean"] == [0.5, 0.25] and found["std"] == pytest.approx([math.sqrt(0.75), math.sqrt(0.1875)])


def test_occupancy_worked_examples():
    for shares, largest, effective in (
        ([0.5, 0.5, 0, 0], 0.5, 0.5),
        ([0.97, 0.01, 0.01, 0.01], 0.97, 0.2956456044),
        ([3, 3, 3], 1 / 3, 1),
    ):
        assert home.occupancy(torch.tensor(shares, dtype=F64)) == pytest.approx((largest, effective), abs=1e-9)


def test_statistics_add_up_over_batches_and_respect_the_mask():
    model = core().eval()
    v, trace, parts = torch.randn(20, 6, dtype=F64), [], []
    model.requires_grad_(False)
    model(v, trace)
    for half in v.split(8):
        part = []
        model(half, part)
        parts.append([home.statistics(level, *of) for level, of in zip(model.wiring, part)])
    total = parts[0]
    for part in parts[1:]:
        total = home.add(total, part)
    for level, of, sums in zip(model.wiring, trace, total):
        whole, added = home.diagnose(level, home.statistics(level, *of)), home.diagnose(level, sums)
        for key in whole:
            assert np.allclose(whole[key], added[key], atol=1e-5), key
        assert np.allclose(np.array(whole["gate"]).sum(axis=1), 1, atol=1e-5)
        assert not np.array(whole["gate"])[~level.mask.numpy()].any()
        shared = [e for e, is_shared in enumerate(whole["shared"]) if is_shared]
        assert all(1 / level.mask[:, e].sum() - 1e-6 <= whole["occupancy"][e] <= 1 for e in shared)


def test_an_expert_of_a_group_counts_the_tasks_of_the_group_only():
    level, g = home.masks("home", GROUPS)[1], torch.zeros(5, 1, 8)
    g[:2, :, 1] = 0.5  # both watch tasks alike use the watch expert
    g[2, :, 2] = 0.5  # one of three interactions uses the inter expert
    found = home.diagnose(level, home.statistics(level, torch.ones(1, 8, 2), g + 1e-9, None))
    assert found["effective_users"][1:3] == pytest.approx([1, 1 / 3], abs=1e-4)
    assert found["occupancy"][1:3] == pytest.approx([0.5, 1], abs=1e-4)


def test_summary_takes_the_worst():
    level = {"zero": [0.1, 0.6], "dead": [0.0, 0.2], "std": [1.0, 4.0], "effective_users": [0.9, 0.4, 0.1]}
    level |= {"shared": [True, True, False], "own_gate": [0.1, 0.2, 0.9], "own_share": [0.3, 0.2, 0.8]}
    first = {"zero": [0.5, 0.0], "dead": [0.1, 0.0], "std": [1.0, 2.0]}
    found = home.summary([first, level], [0, 1], [2])
    assert home.summary([level | {"zero": [0.0], "std": [1.0]}, level], [0], [1])["evenness"] == 0.25
    assert found == {
        "zero": 0.6, "dead": 0.2, "evenness": 0.25, "effective_users": 0.4, "own_gate_rare": pytest.approx(0.15),
        "own_gate_frequent": 0.9, "own_share_rare": 0.25, "own_share_frequent": 0.8,
    }  # fmt: skip


def test_gate_table_by_hand():
    level = home.masks("cgc", {"g": ["t", "u"]}, num_shared=1)[0]  # experts: shared, t, u
    g = torch.tensor([[[0.75, 0.25, 0.0]], [[0.5, 0.0, 0.5]]])  # [rows, batch, experts]
    s = torch.tensor([[[0.0, 0.5, 0.0]], [[0.0, 0.0, 0.25]]])
    header, rows = home.gate_table(level, home.diagnose(level, home.statistics(level, torch.ones(1, 3, 2), g, s)))
    assert header == ["weight of", "shared", "t", "u", "own: gate", "self", "share"]
    assert rows[:2] == [["t", "0.75", "0.75", ".", "0.25", "0.50", "0.50"],
                        ["u", "0.50", ".", "0.75", "0.50", "0.25", "0.60"]]  # fmt: skip
    assert rows[2][:4] == ["occupancy", "0.60", "", ""] and rows[4] == ["zero", "0.00", "0.00", "0.00", "", "", ""]
    assert [row[0] for row in rows[3:]] == ["effective_users", "zero", "dead", "mean", "std"]
    mmoe = home.masks("mmoe", {"g": ["t"]}, num_experts=2)[0]
    found = home.diagnose(mmoe, home.statistics(mmoe, torch.ones(1, 2, 2), torch.full((1, 1, 2), 0.5), None))
    assert home.gate_table(mmoe, found)[0] == ["weight of", "shared", "shared"]  # nobody's own


# --- the experiment ------------------------------------------------------------------------------------------

TINY = replace(home.SMALL, rows=2000, users=60, items=80, hidden=8, width=8, tower=4, experts=3, batch_size=64)


def tiny_run(tmp_path, config=TINY, **options):
    (tmp_path / "arms").mkdir(exist_ok=True)
    return common.Run("home", "small", "cpu", torch.float32, [0], tmp_path, config=config, **options)


def test_arms_share_batches_and_each_row_is_seen_once(tmp_path, monkeypatch):
    seen, forward = {"cgc": [], "home": []}, home.Ranker.forward

    def remember(model, ids, dense=None, trace=None):
        if model.training:
            seen[arm].append(ids.clone())
        return forward(model, ids, dense, trace)

    monkeypatch.setattr(home.Ranker, "forward", remember)
    for arm in seen:
        home.train_arm(TINY, arm, 0, tiny_run(tmp_path))
    one, other = seen.values()
    assert len(one) == len(other) == 25 and all(torch.equal(a, b) for a, b in zip(one, other))
    data = behavior.synthetic(0, 2000, 60, 80)
    as_rows = lambda ids: sorted(map(tuple, ids.tolist()))
    assert as_rows(torch.cat(one)) == as_rows(data.train.ids)  # 1600 rows fill 25 batches of 64, none of the test


def test_learning_rates_are_the_arms_own(tmp_path, monkeypatch):
    rates = []
    monkeypatch.setattr(common, "train", lambda *_, optimizer, **options: rates.append(optimizer.param_groups[0]["lr"]))
    for arm, lr in (("home", None), ("home@0.04", None), ("mmoe-star", 0.25)):
        home.train_arm(replace(TINY, lr=lr), arm, 0, tiny_run(tmp_path))
    assert rates == [home.LR["home"], 0.04, 0.25]
    assert set(home.LR.values()) <= set(home.LR_GRID) and set(home.LR) == set(home.ARMS)


def test_an_arm_is_measured_on_the_test_part_with_the_weights_it_leaves(tmp_path):
    run, data = tiny_run(tmp_path), behavior.synthetic(0, 2000, 60, 80)
    result = home.train_arm(TINY, "cgc", 0, run)
    model = home.Ranker(TINY, home.ARMS["cgc"], data, 0)
    model.load_state_dict(common.load(run.path("cgc", 0, ".pt")))
    with torch.no_grad():
        scores = model.eval()(data.test.ids).numpy()
    assert result["auc"] == pytest.approx(behavior.ranking(scores, data.test, [7])["auc"], abs=1e-6)


def test_evaluation_does_not_train_and_blocks_make_up_the_whole(tmp_path):
    data = behavior.synthetic(0, 4000, 60, 80)
    model = home.Ranker(TINY, home.ARMS["home"], data, 0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = home.evaluate(model, data, data.test, "cpu")
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert found == home.evaluate(model, data, data.test, "cpu")
    assert len(found["blocks"]["mean_auc"]) == home.NUM_BLOCKS
    with torch.no_grad():
        scores = model(data.test.ids).numpy()
    expected = behavior.ranking(scores, data.test, [5, 6, 7])
    assert found["mean_gauc"] == pytest.approx(expected["mean_gauc"], abs=1e-6)
    assert found["blocks"]["zero"] == [0.0] * home.NUM_BLOCKS
    trace = []
    with torch.no_grad():
        model(data.test.ids, None, trace)
    for level, of_level, levels in zip(model.core.wiring, trace, found["levels"]):  # of all rows, not of a block
        assert np.allclose(home.diagnose(level, home.statistics(level, *of_level))["gate"], levels["gate"], atol=2e-6)


def test_cost_counts_experts_of_all_rows(tmp_path):
    data = behavior.synthetic(0, 2000, 60, 80)
    model = home.Ranker(TINY, home.ARMS["mmoe"], data, 0).eval()
    spent = home.cost(model, data, "cpu")
    experts, gates, mixing, towers = 3 * (72 * 8 + 8 * 8), 8 * 72 * 3, 8 * 3 * 8, 8 * (8 * 4 + 4)
    assert spent["flops"] == 2 * (experts + gates + mixing + towers)
    assert spent["parameters"] == sum(p.numel() for p in model.core.parameters())


def measured(auc=0.8, gauc=0.75, zero=0.0, even=0.9, users=0.9, rare=0.5, frequent=0.6, **more):
    means = {"mean_auc": auc, "mean_gauc": gauc, "zero": zero, "evenness": even, "effective_users": users}
    means |= {f"{key}_{name}": value for key in ("own_share", "own_gate")
              for name, value in (("rare", rare), ("frequent", frequent))}  # fmt: skip
    return {
        **means,
        "blocks": {k: [v - 1e-4, v + 1e-4] for k, v in means.items()},
        "parameters": 5,
        "flops": 5.0,
        **more,
    }


def good_results():
    plain = measured(0.77, 0.72, zero=0.7, even=0.2, users=0.5, rare=0.1, frequent=0.7, parameters=9, flops=9.0)
    results = {"mmoe": plain, "cgc": plain, "ple": plain, "adatt": plain, "mmoe-star": measured(0.78, 0.74)}
    results |= {"ple-star": measured(0.79, 0.74)}
    return results | {arm: measured(0.8 - 0.002 * i) for i, arm in enumerate(home.LADDER)}


WORSE = {  # claim -> what has to change for it to fail
    "collapse": {"mmoe": measured(0.77, 0.72, zero=0.3, even=0.2)},
    "degradation": {"ple": measured(0.77, 0.72, zero=0.7, even=0.2, users=0.95)},
    "underfitting": {"home": measured(rare=0.1, frequent=0.8)},
    "beats_plain": {"cgc": measured(0.77, 0.76, zero=0.7, even=0.2, rare=0.1, frequent=0.7)},
    "beats_starred": {"ple-star": measured(0.81, 0.74)},
    "ladder": {"home-no-fg-sg": measured(0.7999)},
    "cost": {"home": measured(parameters=10)},
}


@pytest.mark.parametrize("num_seeds", [1, 3])
def test_every_claim_can_hold_and_can_fail(num_seeds, tmp_path):
    def judged(changes):
        claims = [replace(claim) for claim in home.CLAIMS]
        run = common.Run("home", "small", "cpu", torch.float32, [0] * num_seeds, tmp_path, claims=claims)
        home.judge(run, {arm: [result] * num_seeds for arm, result in (good_results() | changes).items()})
        return {claim.id.removeprefix("home."): claim for claim in claims}

    good = judged({})
    assert set(good) == set(WORSE) and all(claim.holds for claim in good.values())
    for id, changes in WORSE.items():
        assert judged(changes)[id].holds is False, id
    for result in ({"zero": 0.1}, {"even": 0.1}):
        assert judged({"home": measured(**result)})["collapse"].holds is False
    for gap in ({"rare": 0.9, "frequent": 0.1}, {"rare": 0.1, "frequent": 0.9}):  # a gap turned round is a gap
        assert judged({"home": measured(**gap)})["underfitting"].holds is False
    alike = measured(0.77, 0.72, zero=0.7, even=0.2, users=0.5, rare=0.7, frequent=0.7)
    assert judged({"cgc": alike})["underfitting"].holds is False  # nothing to mend is no claim that holds


def test_claims_whose_arms_did_not_run_say_which(tmp_path):
    claims = [replace(claim) for claim in home.CLAIMS]
    run = common.Run("home", "small", "cpu", torch.float32, [0], tmp_path, claims=claims)
    home.judge(run, {arm: [result] for arm, result in good_results().items() if arm in ("mmoe", "home")})
    assert all(claim.holds is None for claim in claims)
    assert claims[0].measured == "not measured; it needs cgc, ple"


# --- bad input -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "groups, tasks, message",
    [
        ({"watch": ["view"], "inter": []}, None, "group 'inter' has no task"),
        ({"watch": ["view"], "inter": ["view", "like"]}, None, "task 'view' is in 2 groups"),
        ({"watch": ["view"]}, ["view", "like"], "task 'like' is in 0 groups"),
        ({"watch": ["view", "shared"]}, None, "task 'shared' has the name of a group"),
        ({"watch": ["view"], "like": ["watch"]}, None, "task 'watch' has the name of a group"),
        ({"watch": ["view", "lik"]}, ["view"], "task 'lik' is in a group but is no task"),
    ],
)
def test_bad_groups_name_the_culprit(groups, tasks, message):
    with pytest.raises(ValueError, match=message):
        home.masks("home", groups, tasks)


def test_bad_sizes_name_the_culprit():
    for rank, num_gates in ((0, 2), (2, 0)):
        with pytest.raises(ValueError, match=f"rank is {rank}, num_gates {num_gates}"):
            home.FeatureGate(4, rank, num_gates)
    with pytest.raises(ValueError, match="row 1 of the mask allows no expert"):
        home.MaskedExpertLayer(torch.tensor([[True, True], [False, False]]), d_in=2, widths=(2,))
    with pytest.raises(ValueError, match=r"mask is \[1, 2\], self_mask \[2, 1\]"):
        ones = torch.ones(1, 2, dtype=torch.bool)
        home.MaskedExpertLayer(ones, ones.T, d_in=2, widths=(2,))
    with pytest.raises(ValueError, match="row 'view' may use no expert"):
        home.masks("mmoe", GROUPS, num_experts=0)
    with pytest.raises(ValueError, match="no model 'mmoe2'; there are shared-bottom, mmoe"):
        home.masks("mmoe2", GROUPS)


# --- the script ----------------------------------------------------------------------------------------------


def results_of(folder):
    return json.loads((folder / "results.json").read_text())


def test_script_end_to_end_with_every_arm(command_line, tmp_path):
    done = command_line(home, *HOME, "--ablate", "--workers", 1, "--out", "out")
    assert done.returncode == 0, done.stderr
    report = results_of(tmp_path / "out")
    assert [claim["id"] for claim in report["claims"]] == [claim.id for claim in home.CLAIMS]
    assert all(claim["verdict"] != "not measured" for claim in report["claims"])
    assert set(report["results"]["arms"]) == {"oracle", *home.ARMS}
    oracle = report["results"]["arms"]["oracle"][0]["mean_auc"]
    assert all(arm[0]["mean_auc"] <= oracle for arm in report["results"]["arms"].values())
    metrics = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert {"arm", "step", "loss", "follow"} <= set(metrics[0])
    assert "home, its last level: mean weight" in done.stdout and "own: gate" in done.stdout


def test_models_stars_grid_inspect_and_weights(command_line, tmp_path):
    flags = ["--models", "cgc,mmoe*", "--grid", "--inspect", "--heavy-tail", "2", "--loss-weights", "1,1,1,2,2,2,2,0"]
    done = command_line(home, *HOME, *flags, "--workers", 1)
    assert done.returncode == 0, done.stderr
    arms = results_of(tmp_path / "runs" / "home-small")["results"]["arms"]
    others = [rate for rate in home.LR_GRID if rate != home.LR["cgc"]]
    assert set(arms) == {"oracle", "cgc", "mmoe-star", *(f"{a}@{r:g}" for a in ("cgc", "mmoe-star") for r in others)}
    assert "the learning-rate grid" in done.stdout and "mmoe-star, level 1" in done.stdout
    assert "not measured; it needs" in done.stdout


@pytest.mark.parametrize("version", ["1k", "pure"])
def test_full_scale_epoch_on_files_in_the_published_format(command_line, tmp_path, version):
    write_kuairand(tmp_path / "data", version, rows=900)
    sizes = "--hash-bits 8 --embedding 4 --hidden 8 --width 8 --tower 4 --batch-size 64 --models cgc,home"
    flags = [
        "--full",
        "--data",
        f"kuairand-{version}",
        "--data-dir",
        "data",
        "--workers",
        1,
        "--threads",
        1,
        *sizes.split(),
    ]
    done = command_line(home, *flags, *(["--dtype", "bf16"] if version == "pure" else []))
    assert done.returncode == 0, done.stderr
    report = results_of(tmp_path / "runs" / "home-full")
    found = report["results"]["arms"]["home"][0]
    assert report["config"]["lr"] == 1e-3 and 0 < found["val"]["mean_auc"] < 1 and len(found["auc"]) == 8
    assert report["data"].keys() == {f"kuairand-{version}"} and "valid play" in done.stdout
    loaded = home.load_trained(tmp_path / "runs" / "home-full" / "arms" / "home-seed0.pt")
    fields = behavior.load(f"kuairand-{version}", tmp_path / "data", hash_bits=8).fields
    assert len(loaded.offsets) == len(fields) and len(loaded.embedding.weight) == sum(fields.values())
    metrics = (tmp_path / "runs" / "home-full" / "metrics.jsonl").read_text().splitlines()
    train_rows = behavior.load(f"kuairand-{version}", tmp_path / "data", hash_bits=8).train.labels.shape[0]
    assert len(metrics) == 2 * (train_rows // 64)


def test_census_end_to_end_on_small_files(command_line, tmp_path):
    write_census(tmp_path)
    done = command_line(home, *HOME, "--data", "census", "--data-dir", ".", "--models", "mmoe,home", "--workers", 1)
    assert done.returncode == 0, done.stderr
    assert results_of(tmp_path / "runs" / "home-small")["results"]["arms"]["home"][0]["levels"]


@pytest.mark.skipif(
    not behavior.is_here("census", Path(os.environ.get("MOE_DATA", "data/cache"))), reason="no census in $MOE_DATA"
)
def test_census_end_to_end_on_the_real_file(command_line, tmp_path):
    flags = ["--data", "census", "--data-dir", os.environ["MOE_DATA"], "--models", "home", "--workers", 1]
    done = command_line(home, *flags)
    assert done.returncode == 0, done.stderr
    auc = results_of(tmp_path / "runs" / "home-small")["results"]["arms"]["home"][0]["auc"]
    assert auc[0] > 0.9 and auc[1] > 0.97


def test_resume_gives_the_same_numbers(command_line, tmp_path, monkeypatch):
    flags = [*HOME, "--models", "cgc,home", "--workers", 1]
    assert command_line(home, *flags, "--out", "whole").returncode == 0
    train, calls = common.train, []

    def interrupted(model, loss_fn, steps, **options):
        calls.append(options["label"])
        if len(calls) == 2:  # home: leave a checkpoint half-way, as Ctrl-C does
            optimizer = options["optimizer"]
            train(model, loss_fn, steps, **options | {"stop_step": steps // 2})
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": steps // 2, "last": {}}
            common.save(options["checkpoint"], state | {"rng": torch.get_rng_state()})
            raise KeyboardInterrupt
        return train(model, loss_fn, steps, **options)

    monkeypatch.setattr(common, "train", interrupted)
    assert command_line(home, *flags, "--out", "half").returncode == 130
    monkeypatch.setattr(common, "train", train)
    assert command_line(home, *flags, "--out", "half", "--resume").returncode == 0
    whole, half = results_of(tmp_path / "whole"), results_of(tmp_path / "half")
    assert whole["results"] == half["results"]
    assert (tmp_path / "whole" / "metrics.jsonl").read_bytes() == (tmp_path / "half" / "metrics.jsonl").read_bytes()


@pytest.mark.parametrize(
    "flags, expected",
    [
        (["--modles", "home"], "--models"),
        (["--models", "home*"], "no model 'home-star'; there are shared-bottom, mmoe"),
        (["--models", "mmoe,deepfm"], "no model 'deepfm'"),
        (["--batch-size", "1"], "batch_size is 1; at least 2"),
        (["--rows", "3000", "--batch-size", "2500"], "batch_size is 2500; there are 2400 rows"),
        (["--width", "0"], "width is 0"),
        (["--lr", "-1"], "lr is -1"),
        (["--lr", "nan"], "--lr is nan; a finite number is needed"),
        (["--loss-weights", "1,2", "--rows", "2000"], "2 loss_weights; the 8 tasks are effective_view"),
        (["--loss-weights", "1,-2"], "none may be negative"),
        (["--rows", "40", "--batch-size", "2"], "cannot be learnt"),
        (["--data", "kuairec"], "data is 'kuairec'; allowed: synthetic, kuairand-1k"),
        (["--full", "--hash-bits", "40"], "hash_bits is 40"),
        (["--data", "census", "--data-dir", "BROKEN"], "line 1: 2 columns, 42 are expected"),
        (["--resume"], "no run in"),
    ],
)
def test_mistakes_are_one_line_exit_code_2_and_leave_nothing(command_line, tmp_path, flags, expected):
    (tmp_path / "BROKEN" / "census").mkdir(parents=True)
    (tmp_path / "BROKEN" / "census" / "census-income.data").write_text("1, 2\n")
    done = command_line(home, *flags)
    assert done.returncode == 2 and expected in done.stderr and done.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["BROKEN"]


def test_wrong_archive_and_diverging_training_are_one_line(command_line, tmp_path):
    archive = tmp_path / "cache" / "kuairand-1k" / "KuaiRand-1K.tar.gz"
    archive.parent.mkdir(parents=True)
    archive.write_bytes(b"not the archive")
    done = command_line(home, "--full", "--data-dir", "cache")
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "md5" in done.stderr and archive.name in done.stderr and "--resume" not in done.stderr
    done = command_line(home, *HOME, "--models", "mmoe", "--lr", "1e30", "--workers", 1)
    assert done.returncode == 1 and "lower --lr" in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr


def test_dry_run_of_both_scales_needs_no_data_and_leaves_nothing(command_line, tmp_path):
    for flags in (
        [*HOME],
        ["--full", "--hash-bits", "6", "--batch-size", "32", "--data-dir", "nowhere", "--threads", "1"],
    ):
        done = command_line(home, *flags, "--dry-run")
        assert done.returncode == 0 and "parameters" in done.stdout, done.stderr
    assert "kuairand-1k is not here yet" in done.stdout and "not known" in done.stdout
    assert not list(tmp_path.iterdir())
