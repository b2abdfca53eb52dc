"""M-SMoE and MC-SMoE: the numbers of the hand-worked examples, and the properties the method promises. float64."""

import copy
import itertools
import json
import math
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from tiny import MCSMOE

import bridge as common
import kernels
import mcsmoe
from mcsmoe import DenseExperts, Expert, LowRankExperts, LowRankSparseLinear, SparseMoE

F64 = torch.float64
TINY = replace(
    mcsmoe.SMALL, num_layers=2, d_model=16, d_ff=16, num_heads=2, context=16, batch_size=6, num_experts=4, kept=2,
    calibration=16, rank=2, c_rank=1, finetune_steps=2, recover_steps=2, compress_steps=8, pretrain_steps=2,
)  # fmt: skip


def matrix(*rows):
    return torch.tensor(rows, dtype=F64)


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def an_expert(d_model=5, d_ff=7, seed=0, bias=False, gate=False):
    make = lambda *shape, at: random(*shape, seed=10 * seed + at)
    b1, b2 = (make(d_ff, at=2), make(d_model, at=3)) if bias else (None, None)
    w_gate = make(d_model, d_ff, at=4) if gate else None
    return Expert(make(d_model, d_ff, at=0), make(d_ff, d_model, at=1), b1, b2, w_gate)


KINDS = pytest.mark.parametrize(
    "kind", [{}, {"bias": True}, {"gate": True}, {"gate": True, "bias": True}], ids=["plain", "biased", "gated", "both"]
)


def stack(*experts):
    return Expert(*(None if tensors[0] is None else torch.stack(tensors) for tensors in zip(*experts)))


def a_layer(n=4, d_model=5, d_ff=7, seed=0, top_k=1, act="relu", **options):
    experts = stack(*[an_expert(d_model, d_ff, seed=100 * seed + i, **options) for i in range(n)])
    return SparseMoE(random(n, d_model, seed=seed), DenseExperts(experts, act), top_k=top_k)


# --- A: assignment and alignment -------------------------------------------------------------------------------

SOLVERS = {"public": mcsmoe.linear_assignment, "own": lambda gain: mcsmoe.shortest_augmenting_paths(-np.array(gain))}


@pytest.mark.parametrize("solve", SOLVERS.values(), ids=SOLVERS)
def test_assignment_worked_example_and_brute_force(solve):
    gain = np.array([[5.0, 2, 0], [3, 0, 5], [15, 5, 3]])
    assert solve(gain).tolist() == [1, 2, 0]
    assert solve(np.array([[3.0]])).tolist() == [0]
    assert sorted(solve(np.ones((5, 5)))) == [0, 1, 2, 3, 4]
    draw = np.random.default_rng(0)
    for n in [2, 3, 4, 5, 6] * 6:
        gain = draw.normal(size=(n, n)).round(1) * 10 - 3  # rounded: with ties, many of them negative
        rows = np.arange(n)
        best = max(gain[rows, list(perm)].sum() for perm in itertools.permutations(rows))
        perm = solve(gain)
        assert sorted(perm) == rows.tolist() and gain[rows, perm].sum() == pytest.approx(best)


def test_own_solver_equals_scipy():
    pytest.importorskip("scipy", reason="SciPy is optional")
    draw, rows = np.random.default_rng(1), np.arange(60)
    for scale in (1.0, np.exp(draw.normal(size=(60, 1)))):
        gain = draw.normal(size=(60, 60)) * scale
        ours, theirs = mcsmoe.shortest_augmenting_paths(-gain), mcsmoe.linear_assignment(gain)
        assert gain[rows, ours].sum() == pytest.approx(gain[rows, theirs].sum(), rel=1e-12)


def test_assignment_without_scipy(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    assert mcsmoe.linear_assignment(matrix([5, 2, 0], [3, 0, 5], [15, 5, 3])).tolist() == [1, 2, 0]


@pytest.mark.parametrize(
    "gain", [np.ones((2, 3)), np.ones(3), np.array([[math.nan]]), np.array([[math.inf]]), np.ones((0, 0))]
)
def test_assignment_refuses(gain):
    with pytest.raises(ValueError, match="square matrix of finite numbers"):
        mcsmoe.linear_assignment(gain)


def test_alignment_restores_the_worked_example():
    reference = Expert(matrix([1, 0], [0, 2], [3, 1]).T, matrix([1, 0, 2], [0, 1, 1]).T)
    target = mcsmoe.permute_neurons(reference, [2, 0, 1])
    gain = mcsmoe.neuron_gain(reference, target)
    perm = mcsmoe.linear_assignment(gain)
    assert perm.tolist() == [1, 2, 0] and float(gain[range(3), perm].sum()) == 22
    restored = mcsmoe.align_expert(reference, target)
    assert torch.equal(restored.w1, reference.w1) and torch.equal(restored.w2, reference.w2)
    wrong = mcsmoe.permute_neurons(target, np.argsort(perm))  # the inverse direction
    assert not torch.equal(wrong.w1, reference.w1)


@KINDS
def test_the_order_of_neurons_does_not_matter_and_alignment_finds_it(kind):
    expert, x = an_expert(**kind), random(9, 5, seed=5)
    shuffled = mcsmoe.permute_neurons(expert, torch.randperm(7, generator=torch.Generator().manual_seed(0)))
    for act in ("relu", "silu"):
        torch.testing.assert_close(shuffled.forward(x, act), expert.forward(x, act), atol=1e-12, rtol=0)
    assert not torch.allclose(Expert(shuffled.w1, expert.w2).forward(x), Expert(expert.w1, expert.w2).forward(x))
    for restored, own in zip(mcsmoe.align_expert(expert, shuffled), expert):
        assert (restored is None and own is None) or torch.equal(restored, own)
    assert torch.equal(mcsmoe.align_expert(expert, expert).w1, expert.w1)


@KINDS
def test_gain_is_the_inner_product_of_all_that_belongs_to_a_neuron(kind):
    one, other = an_expert(**kind), an_expert(seed=1, **kind)
    both = []
    for w1, w2, b1, _, gate in (one, other):
        parts = [w1.T, w2, *([] if b1 is None else [b1[:, None]]), *([] if gate is None else [gate.T])]
        both.append(torch.cat(parts, dim=1))  # [d_ff, weights of a neuron]
    torch.testing.assert_close(mcsmoe.neuron_gain(one, other), both[0] @ both[1].T)


@KINDS
def test_alignment_never_moves_experts_apart(kind):
    def distance(one, other):
        return sum(float((a - b).square().sum()) for a, b in zip(one, other) if a is not None)

    for seed in range(1, 9):
        reference, target = an_expert(**kind), an_expert(seed=seed, **kind)
        assert distance(reference, mcsmoe.align_expert(reference, target)) <= distance(reference, target) + 1e-9


# --- B and C: statistics, dominant experts, groups --------------------------------------------------------------


def logits_for(picks, n=4):
    return F.one_hot(torch.tensor(picks), n).double()


def test_usage_frequency():
    assert mcsmoe.usage_frequency(logits_for([0, 0, 1, 3])).tolist() == [0.5, 0.25, 0, 0.25]
    mask = torch.tensor([True, False, True, False])
    assert mcsmoe.usage_frequency(logits_for([0, 0, 1, 3]), token_mask=mask).tolist() == [0.5, 0.5, 0, 0]
    logits = random(30, 4)
    whole, halves = mcsmoe.usage_frequency(logits, 2), [mcsmoe.usage_frequency(part, 2) for part in logits.split(15)]
    torch.testing.assert_close(whole, (halves[0] + halves[1]) / 2)
    assert float(whole.sum()) == pytest.approx(1)


def test_grouping_by_cosine_of_logit_columns():
    logits = matrix([1, 2, -1], [2, 4, -2], [-1, 0, 3], [0, 1, 2]).T  # [tokens, experts]
    unit = F.normalize(logits, dim=0)
    cosine = unit.T @ unit
    expected = {(0, 1): 1.0, (0, 2): -0.516398, (0, 3): 0.0, (2, 3): 0.848528}
    assert all(float(cosine[pair]) == pytest.approx(value, abs=1e-6) for pair, value in expected.items())
    dominant = torch.tensor([True, False, True, False])
    assert mcsmoe.group_experts(logits, dominant).tolist() == [0, 0, 1, 1]
    twins = torch.tensor([True, True, True, False])  # 0 and 1 have cosine 1, and still stay apart
    assert mcsmoe.group_experts(logits, twins).tolist() == [0, 1, 2, 2]
    lengths = matrix([10, 0], [1, 1], [1, 0.9]).T  # the angle counts, not the length
    assert mcsmoe.group_experts(lengths, torch.tensor([True, True, False])).tolist() == [0, 1, 1]
    with pytest.raises(ValueError, match="none of the 4"):
        mcsmoe.group_experts(logits, torch.zeros(4, dtype=torch.bool))


def chosen(frequency, num_kept):
    return [row.nonzero()[:, 0].tolist() for row in mcsmoe.select_dominant(matrix(*frequency), num_kept)]


def test_dominant_experts_of_all_layers_together():
    frequency = [[0.50, 0.30, 0.15, 0.05], [0.26, 0.25, 0.25, 0.24]]
    assert chosen(frequency, 4) == [[0, 1], [0, 1]]
    assert chosen(frequency, 5) == [[0, 1], [0, 1, 2]]
    assert chosen(frequency, 2) == [[0], [0]]
    assert chosen(frequency, 8) == chosen(frequency, 99) == [[0, 1, 2, 3]] * 2
    assert chosen([[0.97, 0.01, 0.01, 0.01], [0.25] * 4], 5) == [[0], [0, 1, 2, 3]]
    with pytest.raises(ValueError, match="num_kept is 1, fewer than one expert in each of 2"):
        chosen(frequency, 1)


# --- D and E: merging and redirecting ---------------------------------------------------------------------------


def test_merge_worked_example():
    weights, frequency = matrix([1, 2], [4, 0], [-2, 10]), torch.tensor([0.6, 0.3, 0.1], dtype=F64)
    merge = lambda *groups, by=frequency: mcsmoe.merge_experts(weights, by, torch.tensor(groups))
    torch.testing.assert_close(merge(0, 0, 0), matrix([1.6, 2.2]))
    torch.testing.assert_close(merge(0, 1, 1), matrix([1, 2], [2.5, 2.5]))
    assert torch.equal(merge(0, 1, 1)[0], weights[0])
    torch.testing.assert_close(merge(0, 0, 0, by=torch.zeros(3)), weights.mean(0, keepdim=True))
    element = matrix([1, 0], [1, 0], [2, 0])  # Fisher: by element, the plain mean where all are 0
    torch.testing.assert_close(merge(0, 0, 0, by=element), matrix([0.25, 4]))
    with pytest.raises(ValueError, match="group 1 of"):
        merge(0, 2, 2)


def seen_with(picks, n, d_model=5):
    logits = logits_for(picks, n)
    return mcsmoe.Seen(random(len(picks), d_model), logits, logits.topk(1).indices, mcsmoe.usage_frequency(logits))


@pytest.mark.parametrize(
    "merge, shares", [("frequency", [0.3, 0.6, 0.1]), ("uniform", [1 / 3, 1 / 3, 1 / 3]), ("redirect", [0.0, 1.0, 0.0])]
)
def test_whose_share_counts_in_a_merge(merge, shares):
    """By use: its own, though selection treats each layer's first expert as used always."""
    layer, seen = a_layer(3), seen_with([1] * 6 + [0] * 3 + [2], 3)
    merged = mcsmoe.merge_layer(layer, torch.zeros(3, dtype=torch.long), seen, "none", merge)
    expected = torch.einsum("e,eio->io", torch.tensor(shares, dtype=F64), layer.experts.w1)
    torch.testing.assert_close(merged.experts.w1[0], expected)


@pytest.mark.parametrize("align", ["dominant", "first", "activation"])
@pytest.mark.parametrize("merge", ["frequency", "fisher"])
def test_each_member_is_lined_up_with_its_reference_and_so_are_its_weights(align, merge):
    layer, seen, groups = a_layer(3), seen_with([2] * 9 + [1] * 3, 3), torch.tensor([0, 1, 1])
    experts, fisher = layer.experts.stacked(), stack(*[an_expert(seed=50 + i).each(torch.square) for i in range(3)])
    merged = mcsmoe.merge_layer(layer, groups, seen, align, merge, fisher if merge == "fisher" else None)
    one, other = experts.at(2), experts.at(1)
    if align == "activation":
        perms = {1: mcsmoe.linear_assignment(mcsmoe.activation_gain(one, other, seen.inputs)), 2: range(7)}
    elif align == "dominant":
        perms = {1: mcsmoe.linear_assignment(mcsmoe.neuron_gain(one, other)), 2: range(7)}
    else:  # with expert 0 of the layer, which is in another group
        perms = {i: mcsmoe.linear_assignment(mcsmoe.neuron_gain(experts.at(0), experts.at(i))) for i in (1, 2)}
    assert align == "first" or list(perms[1]) != list(range(7))
    w1, f1 = ({i: t.w1[i][:, list(perms[i])] for i in (1, 2)} for t in (experts, fisher))
    share = {1: f1[1], 2: f1[2]} if merge == "fisher" else {1: 0.25, 2: 0.75}
    expected = (share[1] * w1[1] + share[2] * w1[2]) / (share[1] + share[2])
    torch.testing.assert_close(merged.experts.w1[1], expected)
    assert torch.equal(merged.experts.w1[0], experts.w1[0])


def test_tokens_routed_to_any_of_the_experts():
    seen = seen_with([0, 1, 2, 3], 4)
    seen = seen._replace(picks=torch.tensor([[0, 1], [1, 2], [2, 3], [3, 1]]))
    assert torch.equal(seen.routed_to(0, 2), seen.inputs[:3]) and torch.equal(seen.routed_to(3), seen.inputs[2:])


def test_by_what_experts_are_compared():
    layer, seen = a_layer(3, bias=True), seen_with([0, 1, 2, 2], 3)
    assert torch.equal(mcsmoe.expert_features(layer, seen, "logits"), seen.logits.T)
    weights, experts = mcsmoe.expert_features(layer, seen, "weight"), layer.experts.stacked()
    assert torch.equal(weights[1], torch.cat([w[1].flatten() for w in experts if w is not None]))
    outputs = mcsmoe.expert_features(layer, seen, "output")
    torch.testing.assert_close(outputs[2], experts.at(2).forward(seen.inputs).mean(0))


def test_stable_ranks_are_of_groups_that_merged():
    before, after = a_layer(4), a_layer(2, seed=3)
    kept, groups = torch.tensor([True, False, True, False]), torch.tensor([0, 0, 1, 0])
    ranks = mcsmoe.stable_ranks(before, after, kept, groups)
    expected = [float(mcsmoe.stable_rank(layer.experts.w2[0].detach())) for layer in (before, after)]
    assert ranks["stable_rank_w2"] == pytest.approx(expected) and set(ranks) == {"stable_rank_w1", "stable_rank_w2"}
    assert mcsmoe.stable_ranks(before, before, kept | True, torch.arange(4)) == {}


def permuted_copies(n=4, **kind):
    expert = an_expert(**kind)
    perms = [torch.randperm(7, generator=torch.Generator().manual_seed(i)) for i in range(n)]
    return stack(*[mcsmoe.permute_neurons(expert, perm) for perm in perms])


@pytest.mark.parametrize("kind", [{}, {"bias": True}, {"gate": True}], ids=["plain", "biased", "gated"])
@pytest.mark.parametrize("top_k", [1, 2])
def test_experts_that_differ_in_order_only_merge_without_loss(kind, top_k):
    layer, x = SparseMoE(random(4, 5), DenseExperts(permuted_copies(**kind)), top_k=top_k), random(50, 5, seed=3)
    logits = layer.router(x)
    seen = mcsmoe.Seen(x, logits, logits.topk(top_k).indices, mcsmoe.usage_frequency(logits, top_k))
    merge = lambda align: mcsmoe.merge_layer(layer, torch.zeros(4, dtype=torch.long), seen, align, "frequency")
    for align in ("dominant", "first", "activation"):
        torch.testing.assert_close(merge(align)(x), layer(x), atol=1e-10, rtol=0)
    assert not torch.allclose(merge("none")(x), layer(x), atol=1e-3)


@pytest.mark.parametrize("top_k", [1, 2])
def test_a_token_goes_to_the_group_of_its_expert_with_the_score_of_its_expert(top_k):
    layer, x = a_layer(5, top_k=top_k), random(40, 5, seed=3)
    remap = torch.tensor([1, 0, 1, 2, 2])
    kept = layer.experts.stacked().each(lambda w: w[:3])
    merged = SparseMoE(layer.router.weight, DenseExperts(kept), remap, top_k=top_k)
    probs = (x @ layer.router.weight.T).softmax(-1).detach()
    y = torch.zeros_like(x)
    for t in range(len(x)):
        for e in probs[t].topk(top_k).indices.tolist():
            y[t] += probs[t, e] * kept.each(lambda w, g=int(remap[e]): w[g]).forward(x[t : t + 1])[0]
    torch.testing.assert_close(merged(x), y, atol=1e-12, rtol=0)
    assert torch.equal(merged.router.weight, layer.router.weight) and not merged.router.weight.requires_grad
    before, after = common.count_parameters(layer), common.count_parameters(merged)
    assert before - after == (5 - 3) * 2 * 5 * 7


def test_scores_can_be_normalised_over_the_picks():
    plain, x = a_layer(4, top_k=2), random(9, 5)
    normal = SparseMoE(plain.router.weight, plain.experts, top_k=2, normalize=True)
    total = plain.router(x).softmax(-1).topk(2).values.sum(-1, keepdim=True)
    torch.testing.assert_close(normal(x) * total, plain(x))
    assert normal.with_experts(plain.experts, plain.remap).normalize
    with pytest.raises(ValueError, match="top_k is 5; 1 to 4"):
        a_layer(4, top_k=5)


def test_balance_loss_by_hand():
    router = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]], dtype=F64)
    layer = SparseMoE(router, a_layer(3, d_model=2).experts, balance=0.5)
    x = torch.tensor([[2.0, 0.0], [3.0, 1.0], [0.0, 2.0], [1.0, 0.0]], dtype=F64)
    layer.eval()(x)
    assert layer.aux_loss is None
    layer.train()(x)
    share, probs = torch.tensor([0.75, 0.25, 0.0], dtype=F64), (x @ router.T).softmax(-1).mean(0)
    torch.testing.assert_close(layer.aux_loss, 0.5 * 3 * (share * probs).sum())
    assert layer.router.weight.requires_grad
    even = SparseMoE(torch.zeros(3, 2, dtype=F64), layer.experts, top_k=2, balance=0.5)
    even.train()(x)
    torch.testing.assert_close(even.aux_loss, torch.tensor(0.5, dtype=F64))  # balance itself when use is even


def test_capacity_is_per_sequence_first_come_first_served():
    layer, x = a_layer(2), torch.ones(2, 4, 5, dtype=F64)
    layer.capacity = 3
    y = layer(x)
    assert y[:, :3].abs().sum() > 0 and not y[:, 3].any()
    assert mcsmoe.drop_overflow(torch.tensor([[[0], [1], [0], [0]]]), 2, 2).tolist() == [[0], [1], [0], [-1]]


def test_pruned_experts_get_no_token():
    layer, x = a_layer(4), random(60, 5, seed=3)
    dominant = torch.tensor([False, True, False, True])
    pruned = mcsmoe.prune_layer(layer, dominant)
    logits = x @ layer.router.weight.T
    probs = logits[:, dominant].softmax(-1).detach()
    picked = probs.argmax(-1)
    experts = [layer.experts.stacked().each(lambda w, e=e: w[e]) for e in (1, 3)]
    y = torch.stack([probs[t, g] * experts[g].forward(x[t : t + 1])[0] for t, g in enumerate(picked.tolist())])
    torch.testing.assert_close(pruned(x), y, atol=1e-10, rtol=0)


def test_gated_experts_with_bias_are_refused_by_the_layer():
    with pytest.raises(ValueError, match="w_gate and b1"):
        DenseExperts(stack(an_expert(gate=True, bias=True)))


def test_autocast_zero_tokens_and_deepcopy():
    layer = a_layer(4).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(torch.randn(2, 3, 5)).shape == (2, 3, 5)
    assert copy.deepcopy(layer)(torch.zeros(0, 5)).shape == (0, 5)
    layer.experts = LowRankExperts(layer.experts, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        full = layer(torch.randn(2, 3, 5))
        layer.experts.up.compact()
        layer.experts.down.compact()
        assert layer(torch.randn(2, 3, 5)).shape == full.shape and layer(torch.zeros(0, 5)).shape == (0, 5)


# --- F: distillation --------------------------------------------------------------------------------------------


def test_distillation_loss_worked_example():
    student, teacher = matrix([2, 0, -1]).requires_grad_(), matrix([1, 1, 0]).requires_grad_()
    loss = mcsmoe.distillation_loss(student, teacher, 2.0)
    assert loss.item() == pytest.approx(0.122696965, abs=1e-7)
    assert mcsmoe.distillation_loss(teacher, student, 2.0).item() == pytest.approx(0.122183023, abs=1e-7)
    assert mcsmoe.distillation_loss(student, student.detach(), 2.0).item() == pytest.approx(0, abs=1e-9)
    twice = mcsmoe.distillation_loss(student.expand(4, 3), teacher.expand(4, 3), 2.0)
    assert twice.item() == pytest.approx(loss.item())  # a mean over positions
    loss.backward()
    assert teacher.grad is None and student.grad.abs().sum() > 0


# --- G: low rank plus sparse ------------------------------------------------------------------------------------


def test_decomposition_worked_example():
    linear = LowRankSparseLinear(matrix([3, 0], [0, 1]), rank=1)
    torch.testing.assert_close((linear.u @ linear.v)[0], matrix([3, 0], [0, 0]), atol=1e-12, rtol=0)
    torch.testing.assert_close(linear.s[0].detach(), matrix([0, 0], [0, 1]), atol=1e-12, rtol=0)
    assert abs(linear.u[0, 0, 0].item()) == pytest.approx(math.sqrt(3))
    for rank in (0, 3):
        with pytest.raises(ValueError, match=f"rank is {rank}; 1 to 2"):
            LowRankSparseLinear(matrix([3, 0], [0, 1]), rank)


@pytest.mark.parametrize("kind", [{}, {"bias": True}, {"gate": True}], ids=["plain", "biased", "gated"])
def test_a_decomposed_layer_starts_as_the_same_function(kind):
    layer, x = a_layer(3, act="silu", **kind), random(20, 5, seed=3)
    before = layer(x)
    layer.experts = LowRankExperts(layer.experts, rank=2)
    torch.testing.assert_close(layer(x), before, atol=1e-10, rtol=0)


def test_cubic_schedule():
    at = lambda step: mcsmoe.cubic_density(step, 10_000, 400, 1_600, 0.1)
    assert at(0) == at(399) == at(400) == 1
    expected = {401: 0.999663, 2400: 0.479688, 4400: 0.2125, 6400: 0.114063}
    assert all(at(step) == pytest.approx(value, abs=1e-6) for step, value in expected.items())
    assert at(8400) == at(9999) == pytest.approx(0.1)
    steps = [at(step) for step in range(0, 10_000, 50)]
    assert steps == sorted(steps, reverse=True)
    for bad in [(0, 100, 50, 50, 0.1), (0, 100, -1, 5, 0.1), (0, 100, 5, 5, 1.1)]:
        with pytest.raises(ValueError, match="warmup"):
            mcsmoe.cubic_density(*bad)


def test_importance_and_pruning_worked_example():
    s, gradient = matrix([1, -2], [0.5, 0.5], [3, 0]).T, matrix([0.1, 0.2], [1, -1], [0, 5]).T  # [in, out]
    assert mcsmoe.neuron_importance(s, gradient).tolist() == pytest.approx([0.25, 0.5, 0])
    linear = LowRankSparseLinear(torch.ones(2, 3, dtype=F64), rank=1)
    with torch.no_grad():
        linear.s.copy_(s[None])
    linear.s.grad = gradient[None].clone()
    linear.observe(decay=0.85)
    assert linear.score[0].tolist() == pytest.approx([0.0375, 0.075, 0])
    keep = mcsmoe.neurons_to_keep([linear.score], [2], 2 / 3)
    assert keep[0][0].tolist() == [True, True, False]  # the large weight without a gradient goes
    linear.prune(keep[0])
    assert not linear.s[0, :, 2].any() and linear.s[0, :, :2].abs().min() > 0
    linear.s.grad = None
    linear.observe(decay=0.85)
    assert linear.score[0].tolist() == pytest.approx([0.0375 * 0.85, 0.075 * 0.85, 0])


@pytest.mark.parametrize("density", [1.0, 0.7, 0.31, 0.1, 0.0])
def test_the_budget_is_of_elements_and_met_within_one_neuron(density):
    scores, lengths = [random(3, 8).abs(), random(3, 5, seed=1).abs()], [5, 8]
    keep = mcsmoe.neurons_to_keep(scores, lengths, density)
    kept = sum(int(mask.sum()) * length for mask, length in zip(keep, lengths))
    total = 3 * 8 * 5 + 3 * 5 * 8
    assert density * total - 1e-6 <= kept < density * total + 8
    if 0 < density < 1:
        assert max(s[~k].max() for s, k in zip(scores, keep)) <= min(
            s[k].min() for s, k in zip(scores, keep) if k.any()
        )


@pytest.mark.parametrize("kept", ["some", "none", "all"])
@pytest.mark.parametrize("bias", [False, True])
def test_compact_equals_masked_and_stores_only_what_is_kept(kept, bias):
    experts, d_in, d_out, rank = 3, 5, 7, 2
    b = random(experts, d_out, seed=9) if bias else None
    linear = LowRankSparseLinear(random(experts, d_in, d_out), rank, b)
    keep = {"some": random(experts, d_out, seed=4) > 0, "none": torch.zeros(3, 7), "all": torch.ones(3, 7)}[kept].bool()
    keep[1] &= kept == "all"  # an expert without any
    linear.prune(keep)
    index = torch.tensor([[0], [2], [-1], [1], [2], [0], [-1], [1]])
    dispatch = kernels.make_dispatch(index, experts)
    rows = kernels.gather(random(8, d_in, seed=5), dispatch)
    live = int(dispatch.offsets[-1])
    before = linear(rows, dispatch)[:live].detach()
    linear.compact()
    after = linear(rows, dispatch)[:live]
    torch.testing.assert_close(after, before, atol=1e-10, rtol=0)
    count = sum(p.numel() for p in linear.parameters())
    assert count == experts * rank * (d_in + d_out) + int(keep.sum()) * d_in + (experts * d_out if bias else 0)
    after.sum().backward()
    assert linear.u.grad is not None and (kept == "none" or linear.rows.grad.abs().sum() > 0)


def test_one_matrix_needs_no_dispatch():
    weight, x = random(5, 7), random(2, 3, 5, seed=1)
    linear = LowRankSparseLinear(weight, 2, bias=random(7, seed=2))
    torch.testing.assert_close(linear(x), x @ weight + random(7, seed=2), atol=1e-10, rtol=0)
    with pytest.raises(ValueError, match="3 experts need a dispatch"):
        LowRankSparseLinear(random(3, 5, 7), 2)(x)


def test_compaction_saves_the_flops_it_should():
    layer, x = a_layer(3, d_model=8, d_ff=12), random(30, 8)
    full = common.count_flops(lambda: layer(x))["Global"] - 30 * 2 * 8 * 3  # without the router
    assert full == 30 * 2 * 2 * 8 * 12
    layer.experts = LowRankExperts(layer.experts, 1)
    for linear in (layer.experts.up, layer.experts.down):
        linear.prune(torch.arange(linear.s.shape[2]).expand(3, -1) < 2)  # two neurons of every expert stay
        linear.compact()
    compact = common.count_flops(lambda: layer(x))["Global"] - 30 * 2 * 8 * 3
    assert compact == 30 * 2 * (2 * (8 + 12) + 2 * 8 + 2 * 12)


def test_stable_rank():
    assert float(mcsmoe.stable_rank(torch.eye(3))) == pytest.approx(3)
    assert float(mcsmoe.stable_rank(torch.diag(torch.tensor([3.0, 4, 0])))) == 1.5625
    assert float(mcsmoe.stable_rank(torch.ones(2, 5))) == pytest.approx(1)
    w = random(2, 4, 6)
    torch.testing.assert_close(mcsmoe.stable_rank(w), mcsmoe.stable_rank(7 * w))
    assert mcsmoe.stable_rank(torch.zeros(2, 3, 3)).tolist() == [0, 0]


THROUGH_THE_KERNELS = """
import copy, torch, kernels, mcsmoe
from mcsmoe import DenseExperts, Expert, LowRankExperts, SparseMoE
assert kernels.INTERPRETED
torch.manual_seed(0)
experts = Expert(torch.randn(3, 16, 24) / 4, torch.randn(3, 24, 16) / 5)
layer, x = SparseMoE(torch.randn(5, 16), DenseExperts(experts), torch.tensor([0, 1, 2, 1, 0])), torch.randn(2, 9, 16)
layer.capacity = 4
def check():  # float32 through triton's interpreter, float64 on the torch path, gradients too
    found = []
    for module, inputs in ((layer, x), (copy.deepcopy(layer).double(), x.double())):
        module.zero_grad()
        y = module(inputs)
        y.square().sum().backward()
        found.append([y, *(p.grad for p in module.parameters() if p.grad is not None)])
    assert len(found[0]) == len(found[1]) > 2
    for ours, exact in zip(*found):
        torch.testing.assert_close(ours.double(), exact, atol=1e-5, rtol=1e-4)
check()
layer.experts = LowRankExperts(layer.experts, 4)
check()
for linear in (layer.experts.up, layer.experts.down):
    linear.prune(torch.rand(linear.score.shape) < 0.4)
    linear.compact()
check()
"""


@pytest.fixture(scope="module", autouse=True)
def through_the_kernels(request):
    """A process that runs beside the tests before the one that waits for it; None if that was not chosen."""
    process, environment = None, {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    if any(item.name == "test_the_layers_give_the_same_through_the_triton_kernels" for item in request.session.items):
        command = [sys.executable, "-c", THROUGH_THE_KERNELS]
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
    yield process
    if process and process.poll() is None:  # an interrupted session leaves nothing behind
        process.kill()
        process.communicate()


def test_the_layers_give_the_same_through_the_triton_kernels(through_the_kernels):
    pytest.importorskip("triton", minversion="3.7", reason="older interpreters do not run with NumPy 2.4")
    errors = through_the_kernels.communicate(timeout=120)[1]
    assert through_the_kernels.returncode == 0, errors


# --- baselines --------------------------------------------------------------------------------------------------


def test_random_groups_are_never_empty_and_random_members_keep_the_dominant():
    draw = torch.Generator().manual_seed(0)
    for _ in range(50):
        groups = mcsmoe.random_groups(8, 5, draw)
        assert sorted(set(groups.tolist())) == [0, 1, 2, 3, 4]
    dominant = torch.tensor([False, True, False, True, True])
    members = [mcsmoe.random_members(dominant, draw) for _ in range(20)]
    assert all(m[dominant].tolist() == [0, 1, 2] for m in members) and len({int(m[0]) for m in members}) == 3


def test_a_cut_of_task_specific_pruning():
    usage, alive = torch.tensor([0.5, 0.02, 0.3, 0.1, 0.02, 0.06]), torch.ones(6, dtype=torch.bool)
    cut = lambda usage, alive, kept, last=False: (
        mcsmoe.surviving_experts(usage, alive, kept, last).nonzero()[:, 0].tolist()
    )
    assert cut(usage, alive, 2) == [0, 1, 2, 3, 4, 5]  # 0.1 / 6 = 0.0167 lies below all shares
    assert cut(usage, alive, 2, last=True) == [0, 2]
    fewer = torch.tensor([True, False, True, True, True, False])
    assert cut(usage, fewer, 2) == [0, 2, 3]  # the shares of those alive: .54, .33, .11 and .0217 < 0.1 / 4 = .025
    half = torch.tensor([0.3, 0.5, 0.1, 0.08, 0.02, 0.0])  # .02 of the .5 of those alive: a share of .04
    assert cut(half, fewer, 2) == [0, 2, 3, 4]
    assert cut(usage, fewer, 4) == [0, 2, 3, 4]  # never fewer than are to be kept
    assert cut(torch.tensor([0.9, 0.0, 0.0, 0.0, 0.1, 0.0]), fewer, 3) == [0, 2, 4]  # of the unused, those alive


def test_task_specific_pruning_cuts_in_the_first_half_of_its_steps(tmp_path):
    config = replace(TINY, recover_steps=20)
    task, model = mcsmoe.make_task(config, a_run(tmp_path), 0, 3), tiny_model()
    on_step = mcsmoe.prune_by_usage(model, task, config)
    layers, usage, alive = list(mcsmoe.moe_layers(model).values()), torch.zeros(4, dtype=F64), []
    for step in range(12):
        before = layers[1].alive.clone()
        x = []
        hook = layers[1].register_forward_pre_hook(lambda _, args, x=x: x.append(args[0]))
        task.outputs(model, task.train_batch(step))
        hook.remove()
        logits = layers[1].router(x[0].flatten(0, 1)).masked_fill(~before, -math.inf)
        usage = 0.6 * usage + 0.4 * torch.bincount(logits.argmax(-1), minlength=4) / len(logits)
        on_step(step)
        torch.testing.assert_close(layers[1].usage, usage)
        expected = mcsmoe.surviving_experts(usage, before, 2, step == 9) if step in (1, 3, 5, 7, 9) else before
        assert torch.equal(layers[1].alive, expected)
        alive.append(int(layers[1].alive.sum()))
    assert layers[0].alive.all() and alive[0] == 4 and alive[9:] == [2, 2, 2]


def test_activation_gain_is_the_correlation():
    one, other, x = an_expert(d_ff=3), an_expert(d_ff=3, seed=1), random(200, 5)
    hidden = torch.cat([one.hidden(x), other.hidden(x)], dim=1)
    expected = torch.corrcoef(hidden.T)[:3, 3:]
    torch.testing.assert_close(mcsmoe.activation_gain(one, other, x), expected)
    assert torch.equal(mcsmoe.activation_gain(one, other, x[:1]), torch.eye(3, dtype=F64))


def zip_slowly(corr, num_kept):
    """The procedure as it is told: search the whole matrix every time."""
    corr, clusters = corr.copy(), [[i] for i in range(len(corr))]
    np.fill_diagonal(corr, -1)
    while len(clusters) > num_kept:
        i, j = divmod(int(corr.argmax()), len(corr))
        i, j = min(i, j), max(i, j)
        row = 0.1 * np.minimum(corr[i], corr[j])
        clusters[i] += clusters.pop(j)
        corr[i], corr[:, i], corr[i, i] = row, row, -1
        corr = np.delete(np.delete(corr, j, axis=0), j, axis=1)
    return clusters


def test_zip_joins_the_best_pair_again_and_again():
    for seed in range(5):
        corr = np.corrcoef(np.random.default_rng(seed).normal(size=(12, 6)))
        labels = mcsmoe.zip_neurons(corr, 5)
        ours = sorted(sorted(np.flatnonzero(labels == i).tolist()) for i in range(5))
        assert ours == sorted(sorted(cluster) for cluster in zip_slowly(corr, 5))


@pytest.mark.parametrize("kind", [{}, {"bias": True}, {"gate": True}], ids=["plain", "biased", "gated"])
def test_zipping_two_copies_gives_the_expert_back(kind):  # not three: a joined pair attracts a tenth as much
    expert, x = an_expert(**kind), random(300, 5)
    copies = [mcsmoe.permute_neurons(expert, torch.randperm(7)) for _ in range(2)]
    torch.testing.assert_close(mcsmoe.zip_experts(copies, x).forward(x), expert.forward(x), atol=1e-9, rtol=0)


# --- the experiment ---------------------------------------------------------------------------------------------


def a_run(tmp_path, config=TINY, **options):
    (tmp_path / "arms").mkdir(exist_ok=True)
    return common.Run("mcsmoe", "small", "cpu", torch.float32, [0], tmp_path, config=config, **options)


def tiny_model(seed=0):
    model = mcsmoe.byte_lm(TINY, seed)
    for layer in mcsmoe.moe_layers(model).values():  # uneven use
        layer.router.weight.data = 0.5 * torch.randn(4, 16, generator=torch.Generator().manual_seed(seed))
    return model


def test_statistics_of_the_calibration_data(tmp_path):
    task, model = mcsmoe.make_task(TINY, a_run(tmp_path), 0, 1), tiny_model()
    seen = mcsmoe.calibrate(model, task)
    assert list(seen) == ["blocks.0.ffn", "blocks.1.ffn"]
    tokens = 16 * TINY.context
    for name, (inputs, logits, picks, frequency) in seen.items():
        assert inputs.shape == (tokens, 16) and logits.shape == (tokens, 4)
        assert torch.equal(picks[:, 0], logits.argmax(-1))
        assert frequency.tolist() == (torch.bincount(logits.argmax(-1), minlength=4) / tokens).tolist()
        torch.testing.assert_close(logits, inputs @ model.get_submodule(name).router.weight.T)
    # Padding is left out by the task's mask.
    half = task._replace(token_mask=lambda windows, layer: torch.arange(TINY.context).expand(len(windows), -1) < 8)
    torch.testing.assert_close(
        mcsmoe.calibrate(model, half)["blocks.0.ffn"].inputs,
        seen["blocks.0.ffn"].inputs.view(16, TINY.context, -1)[:, :8].flatten(0, 1),
    )


def test_evaluation_by_blocks_of_the_validation_data(tmp_path):
    run, model = a_run(tmp_path, config := replace(TINY, eval_sequences=40)), tiny_model()
    task = mcsmoe.make_task(config, run, 0, 1)
    found = mcsmoe.evaluate(model, task, run)
    with torch.no_grad():
        windows = torch.cat(task.validation)
        hits = (model(windows[:, :-1]).argmax(-1) == windows[:, 1:]).double().mean(1)
        losses = common.lm_loss(model, windows).mean(1)
    for name, values in (("loss", losses), ("accuracy", hits)):
        assert found[name] == pytest.approx(float(values.mean()))
        assert found[f"{name}_blocks"] == pytest.approx([float(part.mean()) for part in values.tensor_split(16)])
    assert len(set(found["loss_blocks"])) == 16 and len(set(found["accuracy_blocks"])) > 1


@pytest.mark.parametrize("arm", mcsmoe.RECIPES | mcsmoe.RECIPES_ABLATE)
def test_every_recipe_has_equal_memory_keeps_the_router_and_leaves_the_first_layer_alone(arm, tmp_path):
    task, model = mcsmoe.make_task(TINY, a_run(tmp_path), 0, 1), tiny_model()
    recipe = (mcsmoe.RECIPES | mcsmoe.RECIPES_ABLATE)[arm]
    draw = torch.Generator().manual_seed(0)
    merged, report = mcsmoe.merge_model(model, recipe, TINY, mcsmoe.calibrate(model, task), task, draw)
    layers, before = mcsmoe.moe_layers(merged), mcsmoe.moe_layers(model)
    assert [len(layer.experts.w1) for layer in layers.values()] == ([2, 2] if arm == "msmoe_all" else [4, 2]) or (
        arm == "msmoe_all" and sum(len(layer.experts.w1) for layer in layers.values()) == 4
    )
    for name, layer in layers.items():
        assert torch.equal(layer.router.weight, before[name].router.weight) and not layer.router.weight.requires_grad
        assert sorted(set(layer.remap.tolist())) == list(range(len(layer.experts.w1)))
    if arm != "msmoe_all":
        assert torch.equal(layers["blocks.0.ffn"].experts.w1, before["blocks.0.ffn"].experts.w1)
        assert [layer["layer"] for layer in report] == ["blocks.1.ffn"]
    if arm == "redirect":
        kept = report[0]["dominant"]
        assert torch.equal(layers["blocks.1.ffn"].experts.w1, before["blocks.1.ffn"].experts.w1[kept])


def test_one_budget_for_all_layers_or_the_same_for_each(tmp_path):
    config = replace(TINY, skip=0)
    task, model = mcsmoe.make_task(config, a_run(tmp_path, config), 0, 1), tiny_model()
    seen = mcsmoe.calibrate(model, task)
    for name, frequency in (("blocks.0.ffn", [0.97, 0.01, 0.01, 0.01]), ("blocks.1.ffn", [0.25] * 4)):
        seen[name] = seen[name]._replace(frequency=torch.tensor(frequency, dtype=F64))
    for budget, kept in (("adaptive", [[0], [0, 1, 2]]), ("uniform", [[0, 1], [0, 1]])):
        _, report = mcsmoe.merge_model(model, mcsmoe.Recipe(budget=budget), config, seen, task, None)
        assert [layer["dominant"] for layer in report] == kept


def test_merging_into_all_experts_changes_nothing(tmp_path):
    config = replace(TINY, kept=4, skip=0)
    task, model = mcsmoe.make_task(config, a_run(tmp_path, config), 0, 1), tiny_model()
    draw = torch.Generator().manual_seed(0)
    merged, _ = mcsmoe.merge_model(model, mcsmoe.Recipe(), config, mcsmoe.calibrate(model, task), task, draw)
    windows = task.validation[0]
    assert torch.equal(task.outputs(model, windows)[0], task.outputs(merged, windows)[0])


def test_fisher_weights_are_summed_squared_gradients(tmp_path):
    task, model = mcsmoe.make_task(TINY, a_run(tmp_path), 0, 1), tiny_model()
    task = task._replace(calibration=task.calibration[:1])
    fisher = mcsmoe.fisher_information(model, task)["blocks.1.ffn"]
    common.lm_loss(model, task.calibration[0]).mean().backward()
    torch.testing.assert_close(fisher.w1, model.blocks[1].ffn.experts.w1.grad.square())


def compressed(model):
    for layer in list(mcsmoe.moe_layers(model).values())[1:]:
        layer.experts = LowRankExperts(layer.experts, 2)
        for linear in (layer.experts.up, layer.experts.down):
            linear.prune(torch.rand(linear.score.shape, generator=torch.Generator().manual_seed(0)) < 0.4)
            linear.compact()
    return model


def test_an_export_reloads_to_the_same_outputs_and_its_size_is_the_ledgers(tmp_path):
    task = mcsmoe.make_task(TINY, a_run(tmp_path), 0, 1)
    model = compressed(mcsmoe.merge_model(
        tiny_model(), mcsmoe.Recipe(), TINY, mcsmoe.calibrate(tiny_model(), task), task, None
    )[0])  # fmt: skip
    size = mcsmoe.export_model(model, tmp_path / "model.npz")
    assert size == (tmp_path / "model.npz").stat().st_size
    again = mcsmoe.import_model(tmp_path / "model.npz", mcsmoe.byte_lm(TINY, seed=5))
    windows = task.validation[0]
    torch.testing.assert_close(task.outputs(again, windows)[0], task.outputs(model, windows)[0], atol=1e-6, rtol=0)
    assert common.count_parameters(again) == common.count_parameters(model)
    assert not any(layer.router.weight.requires_grad for layer in mcsmoe.moe_layers(again).values())
    arrays = len(list(model.parameters())) + len(list(model.buffers()))
    stored = 4 * common.count_parameters(model) + sum(b.numel() * b.element_size() for b in model.buffers())
    assert stored < size < stored + 512 * (arrays + 2)  # an .npz member has 128 bytes of header and its name twice
    full = mcsmoe.export_model(tiny_model(), tmp_path / "full.npz")
    assert full - size == pytest.approx(
        4 * (common.count_parameters(tiny_model()) - common.count_parameters(model)), abs=4000
    )


@pytest.mark.parametrize("damage", ["missing", "extra", "remap", "kind", "other", "name"])
def test_a_damaged_or_foreign_export_is_refused(damage, tmp_path):
    path = tmp_path / "model.npz"
    mcsmoe.export_model(tiny_model(), path)
    arrays, meta = common.load_arrays(path)
    if damage == "missing":
        del arrays["blocks.0.ffn.router.weight"], arrays["blocks.0.ffn.experts.w2"]
        arrays["x"] = torch.ones(1)
    elif damage == "extra":
        arrays["blocks.0.ffn.experts.up.u"] = torch.ones(1)
    elif damage == "remap":
        arrays["blocks.0.ffn.remap"][0] = 9
    elif damage == "kind":
        meta["layers"]["blocks.0.ffn"].pop("experts")
    elif damage == "other":
        meta["layers"]["nowhere"] = meta["layers"]["blocks.0.ffn"]
    else:
        arrays["weights.0"] = torch.ones(1)
    common.save_arrays(path, arrays, meta)
    with pytest.raises(ValueError, match="is not an export of this model"):
        mcsmoe.import_model(path, mcsmoe.byte_lm(TINY, 0))


def test_the_ledger_of_switch_base_32():
    sizes = {row[0]: int(row[1].replace(",", "")) for row in mcsmoe.switch_ledger(mcsmoe.FULL)}
    millions = {name: size / 1e6 for name, size in sizes.items()}
    expected = {"full": 1979, "M-SMoE": 733, "MC-SMoE": 381, "C-SMoE": 571}
    assert millions == pytest.approx(expected, abs=1.0)
    assert sizes["full"] - sizes["M-SMoE"] == 11 * 24 * 4_718_592


def test_training_is_as_in_the_appendix(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "train", lambda *args, **options: given.update(options))
    given, model = {}, tiny_model()
    mcsmoe.fit(model, None, 100, 1e-3, batches=None)
    for group in given["optimizer"].param_groups:
        assert group["lr"] == 1e-3 and group["betas"] == (0.9, 0.98) and group["eps"] == 1e-6
    assert {group["weight_decay"] for group in given["optimizer"].param_groups} == {0.01, 0.0}
    assert [given["schedule"](step) for step in (0, 15, 16, 99)] == [1 / 16, 1, 1, 0]


def test_what_each_arm_starts_from_who_teaches_it_and_how_it_is_pruned(tmp_path, monkeypatch):
    run, loaded, scheduled = a_run(tmp_path), [], []
    mcsmoe.pretrain_arm(TINY, "pretrained", 0, run)
    load, density = mcsmoe.load_model, mcsmoe.cubic_density
    monkeypatch.setattr(mcsmoe, "load_model", lambda *a: loaded.append(a[2]) or load(*a))
    monkeypatch.setattr(mcsmoe, "cubic_density", lambda *a: scheduled.append(a) or density(*a))
    observe, observed = LowRankSparseLinear.observe, []
    monkeypatch.setattr(LowRankSparseLinear, "observe", lambda linear: observed.append(linear) or observe(linear))

    def loads(train_arm, arm):
        loaded.clear(), train_arm(TINY, arm, 0, run)
        return list(loaded)

    assert loads(mcsmoe.finetune_arm, "full") == ["pretrained"]
    for arm in ("msmoe", "msmoe_all"):
        assert loads(mcsmoe.merge_arm, arm) == ["full"]
        assert loads(mcsmoe.recover_arm, f"{arm}+kd") == [arm, "full"]
    assert loads(mcsmoe.recover_arm, "msmoe+steps") == ["msmoe"]
    assert loads(mcsmoe.recover_arm, "full+steps@0.1") == loads(mcsmoe.recover_arm, "full+steps") == ["full"]
    assert loads(mcsmoe.recover_arm, "task_specific+kd") == ["full", "full"]
    for arm in ("c_equal_rank", "c_equal_size", "c_equal_size_low"):
        assert loads(mcsmoe.compress_arm, arm) == ["full+steps", "full", arm]
    assert loads(mcsmoe.compress_arm, "mc_all@0.1") == ["msmoe_all+kd", "full", "mc_all@0.1"]
    kinds = common.load_arrays(run.path("mc_all@0.1", 0, ".npz"))[1]["layers"]
    assert [layer["experts"] for layer in kinds.values()] == ["low_rank", "low_rank"]
    scheduled.clear(), observed.clear()
    assert loads(mcsmoe.compress_arm, "mc") == ["msmoe+kd", "full", "mc"]
    assert scheduled == [(step, 8, 0, 1, 0.1) for step in range(8)]  # 4 and 16 % of 8 steps
    assert len(observed) == 2 * 8  # both matrices of the one merged layer
    lines = [json.loads(line) for line in run.path("msmoe+kd", 0, ".jsonl").read_text().splitlines()]
    assert len(lines) == 2
    for line in lines:
        assert line["loss"] == pytest.approx(line["cross_entropy"] + 0.2 * line["distillation"])


def test_routers_stay_frozen_and_the_teacher_untouched(tmp_path):
    run = a_run(tmp_path)
    mcsmoe.pretrain_arm(TINY, "pretrained", 0, run)
    mcsmoe.finetune_arm(TINY, "full", 0, run)
    mcsmoe.merge_arm(TINY, "msmoe", 0, run)
    mcsmoe.recover_arm(TINY, "msmoe+kd", 0, run)
    mcsmoe.recover_arm(TINY, "full+steps", 0, run)
    pruned = mcsmoe.recover_arm(TINY, "task_specific+kd", 0, run)
    assert pruned["parameters"] == mcsmoe.recover_arm(TINY, "msmoe+kd", 0, run)["parameters"]
    teacher_file = run.path("full", 0, ".npz").read_bytes()
    mc = mcsmoe.compress_arm(TINY, "mc", 0, run)
    routers = [
        [layer.router.weight for layer in mcsmoe.moe_layers(mcsmoe.load_model(TINY, run, arm, 0)).values()]
        for arm in ("pretrained", "full", "msmoe", "msmoe+kd", "task_specific+kd", "mc")
    ]
    assert all(torch.equal(a, b) for other in routers[1:] for a, b in zip(routers[0], other))
    assert run.path("full", 0, ".npz").read_bytes() == teacher_file
    assert mc["reload_change"] < 1e-5 and mc["bytes"] == run.path("mc", 0, ".npz").stat().st_size
    # The stored size is what the budget allows, within one neuron; C-SMoE at equal size is as large.
    c = mcsmoe.compress_arm(TINY, "c_equal_size", 0, run)
    assert c["parameters"] == pytest.approx(mc["parameters"], abs=3 * 16)
    equal = mcsmoe.equal_density(TINY, 1, 16, 16)
    assert 4 * (1 * 32 + equal * 256) == pytest.approx(2 * (2 * 32 + 0.1 * 256))


def test_the_same_data_for_every_arm_and_another_for_every_stage_and_seed(tmp_path):
    run = a_run(tmp_path)
    batch = lambda seed, stage, step: mcsmoe.make_task(TINY, run, seed, stage).train_batch(step)
    assert torch.equal(batch(0, 3, 1), batch(0, 3, 1))
    others = [batch(0, 3, 2), batch(0, 4, 1), batch(1, 3, 1)]
    assert not any(torch.equal(batch(0, 3, 1), other) for other in others)


# --- claims -----------------------------------------------------------------------------------------------------


def measured(loss, accuracy=0.6, **more):
    values = {"loss": loss, "accuracy": accuracy, "parameters": 100, "bytes": 400, "flops": 1000.0}
    blocks = {f"{key}_blocks": [values[key] - 0.001, values[key] + 0.001] for key in ("loss", "accuracy")}
    return values | blocks | more


def layers_of(w1, w2):
    return [{"layer": "l", "stable_rank_w1": [10.0, w1], "stable_rank_w2": [10.0, w2]}, {"layer": "alone"}]


GOOD = {
    "full": measured(1.0),
    "full+steps": measured(0.95, 0.62),
    "msmoe": measured(1.2, layers=layers_of(9.0, 9.0)),
    "msmoe+kd": measured(1.05, 0.595),
    "msmoe_all+kd": measured(1.1, flops=1000.0),
    "mc": measured(1.1, parameters=40, bytes=160, flops=850.0),
    "mc_all": measured(1.2, parameters=15, bytes=70, flops=800.0),
    "c_equal_size": measured(1.3, parameters=40, rank=2),
    "c_equal_size_low": measured(1.4, parameters=40, rank=1),
    "c_equal_rank": measured(1.3, parameters=60),
    "averaging+kd": measured(1.2),
    "uniform_budget+kd": measured(1.2),
} | {
    arm: measured(1.5)
    for arm in (
        "averaging", "no_alignment", "uniform_weights", "random_members", "random_groups", "redirect", "uniform_budget",
    )
}  # fmt: skip
WORSE = {  # claim -> changes, each of which alone makes it fail
    "naive_merging_fails": [{"averaging": measured(1.1)}, {"averaging+kd": measured(1.0)}],
    "alignment": [{"no_alignment": measured(1.1)}],
    "frequency_weights": [{"uniform_weights": measured(1.1)}],
    "routing_groups": [{"random_members": measured(1.1)}, {"random_groups": measured(1.1)}],
    "beats_redirect": [{"redirect": measured(1.1)}],
    "recovers": [{"msmoe+kd": measured(1.05, 0.58)}],
    "memory": [{"mc_all": measured(1.2, parameters=25)}, {"mc_all": measured(1.2, parameters=15, bytes=90)}],
    "flops": [{"mc_all": measured(1.2, flops=900.0)}, {"msmoe_all+kd": measured(1.1, flops=999.0)}],
    "beats_c_smoe": [{"c_equal_size": measured(1.0, rank=2)}, {"c_equal_size_low": measured(1.0, rank=1)}],
    "beats_c_smoe_equal_rank": [{"c_equal_rank": measured(1.0)}],
    "adaptive_budget": [{"uniform_budget": measured(1.1)}, {"uniform_budget+kd": measured(1.0)}],
    "low_rank": [{"msmoe": measured(1.2, layers=layers_of(9.0, 12.0))}],
}


@pytest.mark.parametrize("num_seeds", [1, 3])
def test_every_claim_can_hold_and_can_fail(num_seeds, tmp_path):
    def judged(changes):
        claims = [replace(claim) for claim in mcsmoe.CLAIMS]
        run = a_run(tmp_path, ablate=True, claims=claims)
        run.seeds = [0] * num_seeds
        mcsmoe.judge(TINY, run, {arm: [result] * num_seeds for arm, result in (GOOD | changes).items()})
        return {claim.id.removeprefix("mcsmoe."): claim for claim in claims}

    good = judged({})
    assert set(good) == set(WORSE) and all(claim.holds for claim in good.values())
    assert good["alignment"].measured.startswith("0.3000")
    assert all(any(c.isdigit() for c in claim.measured) and claim.values for claim in good.values())
    for id, alternatives in WORSE.items():
        for changes in alternatives:
            assert judged(changes)[id].holds is False, (id, changes)


# --- the script -------------------------------------------------------------------------------------------------


def results_of(folder):
    return json.loads((folder / "results.json").read_text())


def test_script_end_to_end_with_every_arm_and_resume(command_line, tmp_path):
    flags = [*MCSMOE, "--workers", 1, "--out", tmp_path / "out"]
    done = command_line(mcsmoe, *flags, "--ablate")
    assert done.returncode == 0, done.stderr
    report = results_of(tmp_path / "out")
    assert [claim["id"] for claim in report["claims"]] == [claim.id for claim in mcsmoe.CLAIMS]
    assert all(claim["verdict"] != "not measured" for claim in report["claims"])
    arms = report["results"]["arms"]
    assert {*mcsmoe.RECIPES, *mcsmoe.RECIPES_ABLATE, "mc", "mc_all", "c_equal_size", "c_equal_rank"} <= set(arms)
    assert {f"{arm}+kd" for arm in [*mcsmoe.RECIPES, *mcsmoe.RECIPES_ABLATE, "task_specific"]} <= set(arms)
    assert arms["averaging"][0]["loss"] == pytest.approx(np.mean(arms["averaging"][0]["loss_by_draw"]))
    assert arms["msmoe"][0]["flops"] == arms["full"][0]["flops"] > arms["mc"][0]["flops"]
    assert "2<-" in done.stdout or "<-" in done.stdout
    for suffix in (".npz", ".json"):
        (tmp_path / "out" / "arms" / f"mc-seed0{suffix}").unlink()
    again = command_line(mcsmoe, *flags, "--ablate", "--resume")
    assert again.returncode == 0 and results_of(tmp_path / "out")["results"]["arms"]["mc"] == arms["mc"]


@pytest.mark.parametrize("arm", ["c_equal_rank", "task_specific+kd"])
def test_an_interrupted_pruning_goes_on_to_the_same_numbers(arm, tmp_path, monkeypatch):
    """Importance, use, and what was pruned travel in the checkpoint."""
    run, config = a_run(tmp_path), replace(TINY, recover_steps=8)
    train_arm = mcsmoe.compress_arm if arm == "c_equal_rank" else mcsmoe.recover_arm
    mcsmoe.pretrain_arm(config, "pretrained", 0, run)
    mcsmoe.finetune_arm(config, "full", 0, run)
    mcsmoe.recover_arm(config, "full+steps", 0, run)
    whole = train_arm(config, arm, 0, run)
    run.path(arm, 0, ".ckpt").unlink(missing_ok=True)
    run.path(arm, 0, ".npz").unlink()
    train = common.train
    monkeypatch.setattr(common, "train", lambda *a, **k: train(*a, **{**k, "stop_step": 3, "checkpoint_seconds": 0.0}))
    with pytest.MonkeyPatch.context() as inner:
        inner.setattr(mcsmoe, "export_model", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            train_arm(config, arm, 0, run)
    monkeypatch.setattr(common, "train", train)
    assert train_arm(config, arm, 0, run) == whole


def test_the_learning_rate_grid(command_line, tmp_path):
    done = command_line(mcsmoe, *MCSMOE, "--tune", "--workers", 1)
    assert done.returncode == 0, done.stderr
    report = results_of(tmp_path / "runs" / "mcsmoe-small")
    arms = report["results"]["arms"]
    assert {
        "full@0.001",
        "msmoe+kd@0.008",
        "averaging+kd@0.002",
        "full+steps@0.001",
        "mc@0.008",
        "c_equal_size@0.001",
    } <= set(arms)
    assert all(claim["verdict"] == "not measured" for claim in report["claims"])
    grid = report["results"]["tables"][-1]
    recovered = [f"{arm}+kd" for arm in ("msmoe", "averaging", "pruning")] + ["full+steps"]
    assert [row[0] for row in grid["rows"]] == ["full", *recovered, "mc", "c_equal_size"]
    assert all(all(cell for cell in row) for row in grid["rows"])


@pytest.mark.parametrize(
    "flags, expected",
    [
        (["--kep", "4"], "--kept"),
        (["--kept", "17"], "kept is 17; the model has 16"),
        (["--kept", "0"], "kept is 0"),
        (["--skip", "4"], "skip is 4; the model has 4"),
        (["--rank", "65"], "rank is 65"),
        (["--c-rank", "9"], "c_rank is 9"),
        (["--align-to", "last"], "align_to is 'last'"),
        (["--similarity", "looks"], "similarity is 'looks'"),
        (["--density", "0"], "density is 0"),
        (["--compress-steps", "1", "--warmup-share", "1"], "warmup 1"),
        (["--target", "novels"], "target is 'novels'"),
        (["--batch-size", "2"], "batch_size is 2"),
        (["--recover-steps", "0"], "recover_steps is 0"),
        (["--task", "squad"], "task is 'squad', which needs a checkpoint: add --full"),
        (["--full", "--task", "mnli"], "task is 'mnli'; allowed: sst2, mrpc, multirc, copa"),
        (["--arms", "mc,best"], "arms: there is no best; allowed: full, msmoe, pruning"),
    ],
)
def test_mistakes_are_one_line_exit_code_2_and_leave_nothing(command_line, tmp_path, flags, expected):
    done = command_line(mcsmoe, *flags)
    assert done.returncode == 2 and expected in done.stderr and done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("flags", [["--tune"], ["--arms", "full+steps"]])
def test_a_plot_that_would_be_empty_is_refused(command_line, tmp_path, flags):
    pytest.importorskip("matplotlib", reason="only --plot needs it")
    done = command_line(mcsmoe, *flags, "--plot")
    assert done.returncode == 2 and "--plot draws M-SMoE beside the others" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_model_names_what_to_delete(command_line, tmp_path):
    flags = [*MCSMOE, "--workers", 1, "--arms", "msmoe"]
    done = command_line(mcsmoe, *flags)
    assert done.returncode == 0, done.stderr
    arms = tmp_path / "runs" / "mcsmoe-small" / "arms"
    (arms / "full-seed0.npz").write_bytes((arms / "full-seed0.npz").read_bytes()[:3000])
    (arms / "msmoe-seed0.json").unlink()
    done = command_line(mcsmoe, *flags, "--resume")
    assert done.returncode == 2 and "full-seed0.* and go on with --resume" in done.stderr
    assert done.stderr.count("\n") == 1
    for path in arms.glob("full-seed0.*"):
        path.unlink()
    assert command_line(mcsmoe, *flags, "--resume").returncode == 0


def test_dry_runs(command_line, tmp_path):
    done = command_line(mcsmoe, *MCSMOE, "--dry-run")
    assert done.returncode == 0 and "parameters" in done.stdout and list(tmp_path.iterdir()) == []
    done = command_line(mcsmoe, "--full", "--dry-run", "--threads", 1)
    assert done.returncode == 0 and "733 M" in done.stdout and "381 M" in done.stdout


@pytest.mark.gpu
def test_the_pipeline_on_a_gpu(command_line, tmp_path):
    done = command_line(mcsmoe, *MCSMOE, "--device", "cuda", "--workers", 1)
    assert done.returncode == 0, done.stderr
    arms = results_of(tmp_path / "runs" / "mcsmoe-small")["results"]["arms"]
    assert arms["mc"][0]["reload_change"] < 1e-4 and arms["mc"][0]["flops"] < arms["full"][0]["flops"]
