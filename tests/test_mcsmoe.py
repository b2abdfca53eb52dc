"""M-SMoE and MC-SMoE: the numbers of the hand-worked examples, and what the method promises."""

import itertools
import json
import math
import re
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import check_claims

import common
import kernels
import mcsmoe
from mcsmoe import DenseExperts, Expert, LowRankExperts, LowRankSparseLinear, SparseMoE

F64 = torch.float64
TINY = replace(
    mcsmoe.SMALL, num_layers=2, d_model=16, d_ff=16, num_heads=2, context=16, batch_size=6,
    num_experts=4, kept=2, calibration=16, rank=2, c_rank=1, finetune_steps=2, recover_steps=2,
    compress_steps=8, pretrain_steps=2, eval_sequences=40,
)  # fmt: skip


def matrix(*rows):
    return torch.tensor(rows, dtype=F64)


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def an_expert(d_model=5, d_ff=7, seed=0, bias=False, gate=False):
    def make(*shape, at):
        return random(*shape, seed=10 * seed + at)

    b1, b2 = (make(d_ff, at=2), make(d_model, at=3)) if bias else (None, None)
    w_gate = make(d_model, d_ff, at=4) if gate else None
    return Expert(make(d_model, d_ff, at=0), make(d_ff, d_model, at=1), b1, b2, w_gate)


def a_layer(n=4, d_model=5, d_ff=7, seed=0, top_k=1, act="relu", **options):
    made = [an_expert(d_model, d_ff, seed=100 * seed + i, **options) for i in range(n)]
    router, experts = random(n, d_model, seed=seed), DenseExperts(mcsmoe.stack(made), act)
    return SparseMoE(router, experts, top_k=top_k)


def close(found, expected, tolerance=1e-10):
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=0)


KINDS = pytest.mark.parametrize("kind", [{}, {"bias": True}, {"gate": True}], ids=str)


def test_the_worked_example_of_the_docstring():
    columns = [[], [], [], []]  # A, B, B in A's order, merged: of each neuron what it reads, adds
    for line in re.findall(r"a\d  (.*)", mcsmoe.__doc__):
        numbers = [float(number) for number in re.findall(r"-?\d+", line)]
        for index, column in enumerate(columns):
            column.append(numbers[4 * index : 4 * index + 4])
    a, b, ordered, merged = (Expert(matrix(*c).T[:2], matrix(*c)[:, 2:]) for c in columns)
    gain = mcsmoe.neuron_gain(a, b)
    shown = mcsmoe.__doc__[mcsmoe.__doc__.index("gain (") :]
    rows = re.findall(r"(\d+) +(\d+) +(\d+)(?: |$)", shown, re.M)
    assert gain.tolist() == [[float(x) for x in row] for row in rows[:3]]
    perm = mcsmoe.linear_assignment(gain)
    assert perm.tolist() == [1, 2, 0] and float(gain[range(3), perm].sum()) == 22
    assert all(map(torch.equal, mcsmoe.align_expert(a, b)[:2], ordered[:2]))
    router, x = matrix([2, 0], [1, 0]), matrix([1, 0])
    layer = SparseMoE(router, DenseExperts(mcsmoe.stack([a, b])))
    use, one_group = torch.tensor([0.75, 0.25]), torch.tensor([0, 0])
    found = mcsmoe.merge_layer(layer, use, one_group).experts.stacked().at(0)
    assert torch.equal(found.w1, merged.w1) and torch.equal(found.w2, merged.w2)
    apart = mcsmoe.merge_layer(layer, use, one_group, align=False).experts.stacked().at(0)
    says = [expert.forward(x)[0].tolist() for expert in (a, b, found, apart)]
    assert says[:3] == [[7, 3], [7, 7], [7, 4]] and says[3] == pytest.approx([5.3, 3.1], abs=0.05)


def test_assignment_against_brute_force():
    """Our own solver, which serves where there is no SciPy."""
    draw = np.random.default_rng(0)
    for n in [1, 2, 3, 4, 5, 6] * 6:
        gain = draw.normal(size=(n, n)).round(1) * 10 - 3  # with ties, many of them negative
        rows = np.arange(n)
        best = max(gain[rows, list(perm)].sum() for perm in itertools.permutations(rows))
        perm = mcsmoe.shortest_augmenting_paths(-gain)
        assert sorted(perm) == rows.tolist() and gain[rows, perm].sum() == pytest.approx(best)


@KINDS
def test_alignment_undoes_any_order(kind):
    expert, x = an_expert(**kind), random(9, 5, seed=5)
    order = torch.randperm(7, generator=torch.Generator().manual_seed(0))
    shuffled = mcsmoe.permute_neurons(expert, order)
    close(shuffled.forward(x, "silu"), expert.forward(x, "silu"), 1e-12)
    everything = sum(part.square().sum() for part in expert._replace(b2=None) if part is not None)
    close(mcsmoe.neuron_gain(expert, expert).trace(), everything)
    for restored, own in zip(mcsmoe.align_expert(expert, shuffled), expert):
        assert (restored is None and own is None) or torch.equal(restored, own)


def logits_for(picks, n=4):
    return F.one_hot(torch.tensor(picks), n).double()


def test_usage_frequency():
    mask, logits = torch.tensor([True, False, True, False]), logits_for([0, 0, 1, 3])
    assert mcsmoe.usage_frequency(logits, token_mask=mask).tolist() == [0.5, 0.5, 0, 0]
    two = mcsmoe.usage_frequency(matrix([3, 2, 1, 0], [0, 3, 0, 2]), top_k=2)
    assert two.tolist() == [0.25, 0.5, 0, 0.25]


def test_grouping_by_cosine_of_logit_columns():
    logits = matrix([1, 2, -1], [2, 4, -2], [-1, 0, 3], [0, 1, 2]).T  # [tokens, experts]
    two, three = torch.tensor([True, False, True, False]), torch.tensor([True, True, True, False])
    assert mcsmoe.group_experts(logits, two).tolist() == [0, 0, 1, 1]
    # 0 and 1 have cosine 1; both dominant, they still stay apart
    assert mcsmoe.group_experts(logits, three).tolist() == [0, 1, 2, 2]
    lengths = matrix([10, 0], [1, 1], [1, 0.9]).T  # the angle counts, not the length
    assert mcsmoe.group_experts(lengths, torch.tensor([True, True, False])).tolist() == [0, 1, 1]


def test_dominant_experts_of_all_layers_together():
    def chosen(frequency, num_kept):
        found = mcsmoe.select_dominant(matrix(*frequency), num_kept)
        return [row.nonzero()[:, 0].tolist() for row in found]

    frequency = [[0.50, 0.30, 0.15, 0.05], [0.26, 0.25, 0.25, 0.24]]
    assert chosen(frequency, 5) == [[0, 1], [0, 1, 2]]
    assert chosen(frequency, 2) == [[0], [0]]
    assert chosen([[0.97, 0.01, 0.01, 0.01], [0.25] * 4], 5) == [[0], [0, 1, 2, 3]]


def test_members_are_lined_up_with_the_most_used_of_their_group():
    layer, use = a_layer(3, gate=True), torch.tensor([0, 0.25, 0.75])
    experts = layer.experts.stacked()
    moved = mcsmoe.align_expert(experts.at(2), experts.at(1))
    merged = mcsmoe.merge_layer(layer, use, torch.tensor([0, 1, 1])).experts.stacked()
    for name in ("w1", "w2", "w_gate"):
        old, other = getattr(experts, name), getattr(moved, name)
        assert torch.equal(getattr(merged, name)[0], old[0])
        torch.testing.assert_close(getattr(merged, name)[1], 0.25 * other + 0.75 * old[2])


@pytest.mark.parametrize("top_k", [1, 2])
def test_a_token_goes_to_the_group_of_its_expert_with_the_score_of_its_expert(top_k):
    layer, x = a_layer(5, top_k=top_k), random(40, 5, seed=3)
    remap = torch.tensor([1, 0, 1, 2, 2])
    kept = layer.experts.stacked().at(slice(3))
    shared = torch.nn.Linear(5, 5, dtype=F64)
    merged = SparseMoE(layer.router.weight, DenseExperts(kept), remap, top_k=top_k, shared=shared)
    probs = (x @ layer.router.weight.T).softmax(-1).detach()
    y = shared(x).detach()
    for t in range(len(x)):
        for e in probs[t].topk(top_k).indices.tolist():
            y[t] += probs[t, e] * kept.at(int(remap[e])).forward(x[t : t + 1])[0]
    torch.testing.assert_close(merged(x), y, atol=1e-12, rtol=0)
    normal = SparseMoE(layer.router.weight, layer.experts, top_k=top_k, normalize=True)
    torch.testing.assert_close(normal(x) * probs.topk(top_k).values.sum(-1)[:, None], layer(x))


def test_capacity_is_per_sequence_first_come_first_served():
    layer = a_layer(2)
    layer.capacity = 3
    y = layer(torch.ones(2, 4, 5, dtype=F64))
    assert y[:, :3].abs().sum() > 0 and not y[:, 3].any()
    kept = mcsmoe.drop_overflow(torch.tensor([[[0], [1], [0], [0]]]), 2, 2)
    assert kept.tolist() == [[0], [1], [0], [-1]]


def test_pruned_experts_get_no_token():
    layer, x = a_layer(4), random(60, 5, seed=3)
    dominant = torch.tensor([False, True, False, True])
    probs = (x @ layer.router.weight.T)[:, dominant].softmax(-1).detach()
    experts = [layer.experts.stacked().at(e) for e in (1, 3)]
    picks = probs.argmax(-1).tolist()
    y = [probs[t, g] * experts[g].forward(x[t : t + 1])[0] for t, g in enumerate(picks)]
    close(mcsmoe.prune_layer(layer, dominant)(x), torch.stack(y))


def test_distillation_loss_worked_example():
    student, teacher = matrix([2, 0, -1]).requires_grad_(), matrix([1, 1, 0]).requires_grad_()
    loss = mcsmoe.distillation_loss(student.expand(4, 3), teacher.expand(4, 3), 2.0)
    assert loss.item() == pytest.approx(0.122696965, abs=1e-7)  # a mean over positions
    loss.backward()
    assert teacher.grad is None and student.grad.abs().sum() > 0


@KINDS
def test_a_decomposed_layer_starts_as_the_same_function(kind):
    linear = LowRankSparseLinear(matrix([3, 0], [0, 1]), rank=1)
    close(linear.s[0].detach(), matrix([0, 0], [0, 1]))
    close(linear(matrix([2, 1])), matrix([6, 1]))  # one matrix needs no dispatch
    layer, x = a_layer(3, act="silu", **kind), random(20, 5, seed=3)
    before = layer(x)
    layer.experts = LowRankExperts(layer.experts, rank=2)
    close(layer(x), before)


def test_cubic_schedule():
    expected = {400: 1, 401: 0.999663, 2400: 0.479688, 4400: 0.2125, 8400: 0.1, 9999: 0.1}
    for step, density in expected.items():
        found = mcsmoe.cubic_density(step, 10_000, 400, 1_600, 0.1)
        assert found == pytest.approx(density, abs=1e-6)
    config = replace(TINY, compress_steps=10_000)  # warming up 4 % of them, cooling down 16 %
    assert mcsmoe.density_at(config, 401, 0.1) == pytest.approx(expected[401], abs=1e-6)


def test_importance_and_pruning_worked_example():
    s = matrix([1, -2], [0.5, 0.5], [3, 0]).T  # [in, out]
    gradient = matrix([0.1, 0.2], [1, -1], [0, 5]).T
    assert mcsmoe.neuron_importance(s, gradient).tolist() == pytest.approx([0.25, 0.5, 0])
    linear = LowRankSparseLinear(torch.ones(2, 3, dtype=F64), rank=1)
    with torch.no_grad():
        linear.s.copy_(s[None])
    linear.s.grad = gradient[None].clone()
    mcsmoe.prune_step([linear], density=2 / 3)
    assert linear.score[0].tolist() == pytest.approx([0.0375, 0.075, 0])
    assert not linear.s[0, :, 2].any()  # the large weight without a gradient goes
    assert linear.s[0, :, :2].abs().min() > 0


@pytest.mark.parametrize("density", [1.0, 0.31, 0.0])
def test_the_budget_is_of_elements_and_met_within_one_neuron(density):
    scores, lengths = [random(3, 8).abs(), random(3, 5, seed=1).abs()], [5, 8]
    keep = mcsmoe.neurons_to_keep(scores, lengths, density)
    kept = sum(int(mask.sum()) * length for mask, length in zip(keep, lengths))
    total = 3 * 8 * 5 + 3 * 5 * 8
    assert density * total - 1e-6 <= kept < density * total + 8


def test_compact_equals_masked_stores_only_what_is_kept_and_loads():
    experts, d_in, d_out, rank = 3, 5, 7, 2
    bias = random(experts, d_out, seed=9)
    linear = LowRankSparseLinear(random(experts, d_in, d_out), rank, bias)
    keep = random(experts, d_out, seed=4) > 0
    keep[1] = False  # an expert without any
    linear.prune(keep)
    index = torch.tensor([[0], [2], [-1], [1], [2], [0], [-1], [1]])
    dispatch = kernels.make_dispatch(index, experts)
    rows = kernels.gather(random(8, d_in, seed=5), dispatch)
    live = int(dispatch.offsets[-1])
    before, dense = linear(rows, dispatch)[:live].detach(), linear.dense()
    linear.compact()
    close(linear(rows, dispatch)[:live], before)
    close(linear.dense(), dense)
    count = experts * rank * (d_in + d_out) + int(keep.sum()) * d_in + experts * d_out
    assert sum(p.numel() for p in linear.parameters()) == count
    fresh = LowRankSparseLinear(torch.zeros(experts, d_in, d_out, dtype=F64), rank, bias)
    fresh.load_state_dict(linear.state_dict())
    close(fresh(rows, dispatch)[:live], before)
    other = LowRankSparseLinear(torch.zeros(experts, d_in, d_out), rank, bias.float())
    other.load_state_dict(linear.state_dict())
    assert {parameter.dtype for parameter in other.parameters()} == {torch.float32}


def test_stable_rank():
    assert float(mcsmoe.stable_rank(torch.eye(3))) == pytest.approx(3)
    assert float(mcsmoe.stable_rank(torch.diag(torch.tensor([3.0, 4, 0])))) == 1.5625
    assert mcsmoe.stable_rank(torch.zeros(2, 3, 3)).tolist() == [0, 0]


def test_what_cannot_be_is_refused_with_its_numbers():
    odd, merge = matrix([1, math.inf], [0, math.nan]), partial(mcsmoe.merge_layer, a_layer())
    for function, *arguments, told in [
        (mcsmoe.usage_frequency, odd, "2 of 4 router logits are NaN or infinite"),
        (merge, torch.ones(4), torch.tensor([0, 0, 0]), "4 experts, 4 frequencies, 3 groups"),
    ]:
        with pytest.raises(ValueError, match=told):
            function(*arguments)


def tiny_model(seed=0):
    model = mcsmoe.byte_lm(TINY, seed)
    for layer in mcsmoe.moe_layers(model).values():  # uneven use
        generator = torch.Generator().manual_seed(seed)
        layer.router.weight.data = 0.5 * torch.randn(4, 16, generator=generator)
    return model


def merged(tmp_path, recipe, config=TINY, seen=None):
    run = common.Run("mcsmoe", "small", "cpu", torch.float32, [0], tmp_path, config)
    task, model = mcsmoe.make_task(common.Job(run, "msmoe", 0), 1), tiny_model()
    seen = seen or mcsmoe.calibrate(model, task)
    report = mcsmoe.merge_model(model, recipe, config, seen, torch.Generator().manual_seed(0))
    return mcsmoe.moe_layers(model), report


@pytest.mark.parametrize("arm", mcsmoe.RECIPES)
def test_every_recipe_has_equal_memory_keeps_the_router_and_the_first_layer(arm, tmp_path):
    layers, (told,) = merged(tmp_path, mcsmoe.RECIPES[arm])
    before = mcsmoe.moe_layers(tiny_model())
    assert [len(layer.experts.w1) for layer in layers.values()] == [4, 2]
    for name, layer in layers.items():
        assert torch.equal(layer.router.weight, before[name].router.weight)
    assert torch.equal(layers["blocks.0.ffn"].experts.w1, before["blocks.0.ffn"].experts.w1)
    second, w1 = before[told["layer"]], layers["blocks.1.ffn"].experts.w1
    if arm == "redirect":
        assert torch.equal(w1, second.experts.w1[told["dominant"]])
    if arm == "uniform_weights":
        use, groups = torch.tensor(told["frequency"]), torch.tensor(told["groups"])
        uniform = mcsmoe.merge_layer(second, use, groups, weights=torch.ones(4))
        assert torch.equal(w1, uniform.experts.w1)


def test_one_budget_for_all_layers_or_the_same_for_each(tmp_path):
    config, even = replace(TINY, skip=0), logits_for([0, 1, 2, 3] * 25)
    skewed = {"blocks.0.ffn": logits_for([0] * 97 + [1, 2, 3]), "blocks.1.ffn": even}
    for adaptive, kept in ((True, [[0], [0, 1, 2]]), (False, [[0, 1], [0, 1]])):
        _, told = merged(tmp_path, mcsmoe.Recipe(adaptive=adaptive), config, skewed)
        assert [layer["dominant"] for layer in told] == kept


def compacted():
    model, draw = tiny_model(), torch.Generator().manual_seed(0)
    layer = mcsmoe.moe_layers(model)["blocks.1.ffn"]
    layer = mcsmoe.merge_layer(layer, torch.ones(4), torch.tensor([0, 1, 1, 0]))
    model.set_submodule("blocks.1.ffn", layer)
    layer.experts = LowRankExperts(layer.experts, 2)
    for linear in (layer.experts.up, layer.experts.down):
        linear.prune(torch.rand(linear.score.shape, generator=draw) < 0.4)
        linear.compact()
    return model.eval()


def test_an_export_reloads_to_the_same_logits(tmp_path):
    model, path = compacted(), tmp_path / "model.pt"
    mcsmoe.export_model(model, path)
    again = mcsmoe.fill(mcsmoe.byte_lm(TINY, seed=5), common.load(path)).eval()
    tokens = torch.arange(32).view(2, 16)
    assert torch.equal(again(tokens), model(tokens))


def test_a_damaged_or_foreign_export_is_refused(tmp_path):
    path, no_such = tmp_path / "model.pt", torch.tensor([3, 1, 2, -1])
    mcsmoe.export_model(compacted(), path)
    for part, name, value, told in [
        ("weights", "blocks.0.ffn.remap", no_such, "its remap begins at -1"),
        ("weights", "head.weight", torch.ones(256, 16, dtype=F64), "head.weight is torch.float64"),
        ("acts", "blocks.0.ffn", "silu", "has the activation silu"),
    ]:
        state = common.load(path)
        state[part][name] = value
        with pytest.raises(ValueError, match=told):
            mcsmoe.fill(mcsmoe.byte_lm(TINY, 0), state)


@pytest.mark.parametrize("arm, owner", [
    ("msmoe@pretrain_steps=1", "pretrained"), ("full@balance=5", "pretrained"),
    ("mc@d_model=32", "pretrained"), ("msmoe@context=8", "pretrained"), ("mc@top_k=1", "full"),
])  # fmt: skip
def test_an_arm_has_no_setting_of_the_model_it_goes_on_from(arm, owner):
    layers = list(mcsmoe.moe_layers(tiny_model()).values())
    first = "full" if owner == "full" else "pretrained"
    with pytest.raises(ValueError, match=f"belongs to {owner}, .* for all: --"):
        mcsmoe.check_arm(arm, first, TINY, layers)
    mcsmoe.check_arm("mc@top_k=1", "full", replace(TINY, finetune_steps=0), layers)


def test_every_arm_end_to_end(tiny_run):
    done = tiny_run(mcsmoe)
    arms, folder = done.arms, done.folder / "arms"
    assert mcsmoe.chain_of("mc@skip=0", "full") == ["full", "msmoe@skip=0", "mc@skip=0"]
    assert mcsmoe.chain_of("c_equal_size", "full") == ["full", "full+steps", "c_equal_size"]
    assert all(claim["verdict"] != "not measured" for claim in done.report["claims"])
    assert arms["msmoe"]["flops"] == arms["full"]["flops"] > arms["mc"]["flops"]
    assert arms["mc"]["bytes"] == (folder / "mc-seed0.pt").stat().st_size
    assert arms["c_equal_size"]["parameters"] == pytest.approx(arms["mc"]["parameters"], abs=3 * 16)
    routers = set()
    for arm in ("pretrained", "full", "msmoe", "averaging", "mc"):
        weights = common.load(folder / f"{arm}-seed0.pt")["weights"]
        routers.add(str(weights["blocks.1.ffn.router.weight"].tolist()))
    assert len(routers) == 1  # frozen after pre-training
    for line in map(json.loads, (folder / "msmoe-seed0.jsonl").open()):
        assert line["loss"] == pytest.approx(line["cross_entropy"] + 0.2 * line["distillation"])


# A world in which every claim holds by 0.1 nats.
ONE = {"loss": 1.5, "loss at once": 1.7, "accuracy": 60.0}
ONE |= {"parameters": 100, "bytes": 400, "flops": 1000}
BETTER = {"loss": 1.4, "loss at once": 1.6}
FALLS = [{"rank_falls": {"w1": 1.0, "w2": 2.0}}, {"rank_falls": {}}]
GOOD = {arm: ONE for arm in [*mcsmoe.RECIPES, "full", "full+steps", "c_equal_rank"]}
GOOD |= {"c_equal_size": ONE | {"rank": 2}, "c_equal_size@c_rank=1": ONE | {"rank": 1}}
GOOD |= {arm: ONE | BETTER | {"layers": FALLS} for arm in ("msmoe", "msmoe@skip=0")}
GOOD["mc"] = ONE | {"loss": 1.4, "reload_change": 0.0}
GOOD["mc@skip=0"] = ONE | {"parameters": 15, "bytes": 70, "flops": 800}
WORSE = {  # claim: changes, each of which alone makes it fail
    "recovers": [{"msmoe": {"accuracy": 59.2}}, {"full": {"accuracy": 60.9}}],
    "beats_c_smoe": [{arm: {"loss": 1.3}} for arm in ("c_equal_size", "c_equal_size@c_rank=1")],
    "beats_c_smoe_equal_rank": [{"c_equal_rank": {"loss": 1.3}}],
    "low_rank": [{"msmoe": {"layers": [{"rank_falls": {"w1": -1.0, "w2": 4.0}}]}}],
    "memory": [{"mc@skip=0": {"parameters": 25}}, {"mc@skip=0": {"bytes": 90}}],
    "flops": [{"mc@skip=0": {"flops": 900}}, {"msmoe@skip=0": {"flops": 900}}],
    "export": [{"mc": {"reload_change": 0.1}}],
}
for claim, arm in {
    "naive_merging_fails": "averaging",
    "alignment": "no_alignment",
    "frequency_weights": "uniform_weights",
    "routing_groups": "random_members",
    "beats_redirect": "redirect",
    "beats_pruning": "pruning",
    "adaptive_budget": "uniform_budget",
}.items():  # worse at once and after recovery
    WORSE[claim] = [{arm: {"loss": 1.3}}, {arm: {"loss at once": 1.5}}]


def test_every_claim_can_hold_and_can_fail():
    check_claims(mcsmoe, TINY, GOOD, WORSE)
