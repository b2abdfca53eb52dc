"""HoME: numbers worked out by hand, and promises of the method. Claims: see test_house.py."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import ROOT, report
from test_behavior import write_kuairand
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


# --- experts and gates -------------------------------------------------------------------------


def test_expert_norm_swish_worked_example():
    norm, z = nn.BatchNorm1d(2).double(), numbers([1, -2], [3, 0], [5, 8])
    rows = [[-0.2781426181, -0.2627231813], [0, -0.1788201305], [0.9465999569, 1.1115245685]]
    near(home.expert_norm_swish(z, norm), rows)
    near(norm.running_mean, [0.3, 0.2])
    near(norm.running_var, [1.3, 3.7])  # unbiased
    norm.eval()
    first, last = [0.3983468645, -0.2763663635], [4.0564044852, 3.9859249880]
    near(home.expert_norm_swish(z, norm), [first, [2.1652434356, -0.0492871911], last])


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
    with torch.no_grad():
        layer.feature_gate.b.normal_()
        for parameter in (layer.feature_gate.a, layer.feature_gate.b, layer.feature_gate.mix):
            for family in range(8):
                before = layer.experts(x)
                parameter[family] += torch.randn_like(parameter[family])
                moved = (layer.experts(x) != before).any(dim=2).any(dim=0)
                assert moved.tolist() == [expert == family for expert in range(8)]


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


def test_home_hierarchy():
    """And AdaTT's; those of MMoE, CGC and PLE follow from what torch-rechub says, below."""
    first, second = home.masks("home", GROUPS, num_meta=2)
    assert first.family.tolist() == [0, 0, 1, 1, 2, 2] and not first.expert_input.any()
    assert second.expert_input.tolist() == [2, 0, 1, 0, 0, 1, 1, 1]
    assert second.gate_input.tolist() == [[0, 2], [0, 2], [1, 2], [1, 2], [1, 2]]
    second = home.masks("adatt", GROUPS)[1]
    assert second.mask.all() and second.expert_input.tolist() == [0, 1, 2, 3, 4]


# What torch-rechub 0.9.0 says (MMOE; PLE with n_level 1, which is CGC; PLE with n_level 2) on the
# same weights, its BatchNorms set to the identity. It has no AdaTT and no HoME.
KNOWN = {
    "mmoe": [(0.3844237107, 0.5486294877, 0.3477469077), (0.4077759175, 0.5832869641, 0.3158430370), (0.4412429547, 0.5425558430, 0.2529372949)],
    "cgc": [(0.4557072409, 0.5031376126, 0.2258124844), (0.5853160296, 0.6117926244, 0.3796827824), (0.3374518579, 0.4905482340, 0.3396667810)],
    "ple": [(0.3492934669, 0.6637278144, 0.4548940402), (0.3152727411, 0.6474634410, 0.4485502791), (0.4336252075, 0.6671013352, 0.4450973478)],
}  # fmt: skip


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
    drawn = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        layer = home.MaskedExpertLayer(torch.ones(2, 3, dtype=torch.bool), d_in=2, widths=(4,))
        drawn.append([home.HoME(6, GROUPS).w1, home.HoME(6, GROUPS).w1, layer.weights[0]])
    for first, again, other in zip(*drawn):
        assert torch.equal(first, again) and not torch.equal(first, other)
    assert not torch.equal(drawn[0][0], drawn[0][1])


def test_loss_worked_example():
    logits, labels = numbers([0, 2], [1, -1]), numbers([1, 0], [0, 1])
    total, each = home.multitask_loss(logits, labels)
    near(each, [1.0032044340, 1.7200948493])
    near(total, 2.7232992837)
    weighted, _ = home.multitask_loss(logits, labels, numbers([2, 0.5])[0])
    near(weighted, 2 * 1.0032044340 + 0.5 * 1.7200948493)


def test_missing_labels_are_refused_or_masked():
    logits = numbers([0, 2], [1, -1], requires_grad=True)
    labels = numbers([1, math.nan], [0, 1])
    with pytest.raises(ValueError, match="label of task 1 in row 0 is nan; 0 to 1 is"):
        home.multitask_loss(logits, labels)
    known = torch.tensor([[True, False], [True, True]])
    total, each = home.multitask_loss(logits, labels, mask=known)
    near(each, [1.0032044340, 1.3132616875])  # of task 1: row 1 alone, log(1 + e)
    total.backward()
    assert logits.grad[0, 1] == 0 and logits.grad.isfinite().all()
    total, each = home.multitask_loss(logits, labels, mask=known & torch.tensor([True, False]))
    near(each, [1.0032044340, 0])  # nothing known of task 1


def test_bad_groups_and_sizes_name_the_culprit():
    model = home.Ranker([3, 5], GROUPS).eval()
    for function, *arguments, told in [
        (home.masks, "home", {"a": ["view"], "b": ["view"]}, "task 'view' is in 2 groups"),
        (core(), torch.zeros(1, 6, dtype=F64), "batch of 1 row"),  # in training
        (model, torch.tensor([[2, 4], [0, 5]]), "field 1 has id 5 in row 1; its table has 5 rows"),
    ]:
        with pytest.raises(ValueError, match=told):
            function(*arguments)
    model(torch.tensor([[2, 4], [0, 1]])).sum().backward()  # a row of the table for every id
    rows = model.embedding.weight.grad.any(dim=1).nonzero()[:, 0].tolist()
    assert rows == [0, 2, 3 + 1, 3 + 4]


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


def test_evaluation_measures_all_rows():
    data = tiny_data(50_000)  # more test rows than a chunk
    model = home.make_ranker("home", data, TINY, 0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    found, trace = home.evaluate(model, data, data.test), []
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


def test_zeros_are_those_of_the_worst_expert_of_any_level():
    data = tiny_data()
    model = home.make_ranker("cgc", data, TINY, 0)
    with torch.no_grad():
        model.core.layers[0].biases[-1][3] = -100.0  # its ReLUs let nothing through
    assert home.evaluate(model, data, data.test)["zero"] == 1.0
    assert home.evaluate(home.make_ranker("home", data, TINY, 0), data, data.test)["zero"] == 0.0


def test_fewest_users_worked_examples():
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


def test_script_end_to_end_with_every_arm(tiny_run):
    done = tiny_run(home)
    assert all(claim["verdict"] != "not measured" for claim in done.report["claims"])
    for arm in home.ARMS:
        assert done.arms[arm]["mean_auc"] <= done.arms["oracle"]["mean_auc"]
        assert done.arms[arm]["lr"] == home.ARMS[arm].lr


def test_full_scale_epoch_on_files_in_the_published_format(command_line, tmp_path):
    write_kuairand(tmp_path / "data", "1k", rows=900)
    flags = "--full --data kuairand-1k --data-dir data --workers 1 --threads 1 --hash-bits 8 "
    flags += "--embedding 4 --hidden 8 --width 8 --tower 4 --batch-size 64 --arms cgc,home"
    done = command_line(home, *flags.split())
    assert done.returncode == 0, done.stderr
    told = report(tmp_path / "runs" / "home-full")
    found = told["results"]["arms"]["home"][0]
    assert told["config"]["lr"] == 1e-3 and 0 < found["val_auc"] < 1 and len(found["auc"]) == 8


def test_whole_numbers_of_the_docstring_are_those_of_the_committed_result():
    """Figures with a point: test_readme.py."""
    told = json.loads((ROOT / "results" / "cpu-2-cores" / "home.json").read_text())
    results, found = common.Results(told["results"]["arms"]), " ".join(home.__doc__.split())
    shares = [row[2] for row in home.lead_table(results)[1]]
    assert f"already give {shares[0]} of that, feature gates {shares[3]}, the hierarchy" in found
    assert f"the hierarchy {shares[1]} and self gates {shares[2]}, both undecided" in found


def test_a_group_may_not_be_called_as_the_experts_of_all_groups():
    with pytest.raises(ValueError, match="group 'shared' has the name of"):
        home.HoME(8, {"shared": ["a", "b"], "inter": ["c"]})
