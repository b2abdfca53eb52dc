"""SMoE-Dropout: the numbers of the hand-worked examples, and the properties the method promises."""

import copy
import json
import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny import SMOE_DROPOUT

import bridge as common
import smoe_dropout as smoe

F64 = torch.float64
TINY = replace(
    smoe.SMALL, num_layers=1, d_model=16, d_ff=16, num_experts=4, k_min=2, num_heads=2, context=16, batch_size=4,
    steps=4, eval_bytes=512,
)  # fmt: skip


def tensor(*rows):
    return torch.tensor(rows, dtype=F64)


def layer(num_experts=4, d_model=6, d_ff=8, seed=0, router_init=1.0, init=0.5, **options):
    generator = torch.Generator().manual_seed(seed)
    sizes = {"init": init, "router_init": router_init, "generator": generator}
    module = smoe.SMoEDropout(d_model, d_ff, num_experts, **sizes, **options).double()
    with torch.no_grad():
        for bias in (module.b1, module.b2):
            bias.copy_(torch.randn(bias.shape, generator=generator))
    return module


def loop_reference(module, x):
    """One token, one expert at a time."""
    logits, out = x @ module.router.weight.T, []
    for t in range(len(x)):
        chosen = logits[t].topk(module.k).indices
        gates = logits[t, chosen].exp() / logits[t, chosen].exp().sum()
        hidden = [torch.relu(x[t] @ module.w1[e] + module.b1[e]) @ module.w2[e] + module.b2[e] for e in chosen]
        out.append(module.scale * sum(gate * h for gate, h in zip(gates, hidden)))
    return torch.stack(out)


# --- the gate ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "k, expected",
    [
        (1, {1: 1.0}),
        (2, {1: 0.7310585786, 2: 0.2689414214}),
        (3, {1: 0.6652409558, 2: 0.2447284711, 0: 0.0900305732}),
        (4, {0: 0.0871443187, 1: 0.6439142599, 2: 0.2368828181, 3: 0.0320586033}),
    ],
)
def test_gate_worked_example(k, expected):
    index, gates = smoe.topk_gate(tensor([1, 3, 2, 0]), k)
    assert dict(zip(index[0].tolist(), gates[0].tolist())) == pytest.approx(expected, abs=1e-10)
    assert float(gates.sum()) == pytest.approx(1)


def test_gates_are_a_mean_whatever_k_and_nest():
    logits = torch.randn(50, 8, dtype=F64)
    previous = set()
    for k in range(1, 9):
        index, gates = smoe.topk_gate(logits, k)
        assert (gates > 0).all() and torch.allclose(gates.sum(-1), torch.ones(50, dtype=F64))
        assert all(len(set(row)) == k for row in index.tolist())
        chosen = {(t, e) for t, row in enumerate(index.tolist()) for e in row}
        assert previous < chosen
        previous = chosen


def test_ties_choose_exactly_k_with_equal_weight():
    index, gates = smoe.topk_gate(torch.zeros(5, 8, dtype=F64), 3)
    assert all(len(set(row)) == 3 for row in index.tolist()) and torch.allclose(gates, torch.tensor(1 / 3, dtype=F64))


def test_nan_is_refused():
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match=r"router_logits \[1, 3\] hold NaN or infinity"):
            smoe.topk_gate(tensor([bad, 0, 0]), 2)
    with pytest.raises(ValueError, match="NaN"):
        layer()(torch.full((2, 6), math.nan, dtype=F64))


# --- the layer -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["masked", "torch"])
def test_layer_worked_example(backend):
    module = smoe.SMoEDropout(2, 2, 2, k=1, backend=backend).double()
    with torch.no_grad():
        module.router.weight.copy_(tensor([0.2, -0.1], [0.1, 0.3]).T)
        module.w1.copy_(tensor([1, -1], [0.5, 1]).T[:, :, None])
        module.b1.copy_(tensor([0.1], [-0.2]))
        module.w2.copy_(tensor([2, 0], [-1, 1])[:, None])
        module.b2.copy_(tensor([0.3, 0], [0, -0.4]))
    x = tensor([1, -1], [0.5, 2])
    torch.testing.assert_close(module.router(x), tensor([0.1, -0.4], [0.3, 0.55]))
    torch.testing.assert_close(module(x), tensor([1.5, 0], [-1.3, 0.9]))
    module.set_k(2)
    expected = tensor([0.9336889968, -0.1510162676], [0.8015527957, 0.5059588508])
    torch.testing.assert_close(module(x), expected, atol=1e-9, rtol=0)
    dense = module.expert_outputs(x).sum(0) + module.b2.sum(0)
    torch.testing.assert_close(dense, tensor([1.5, -0.4], [2.2, 0.9]))


def dense_of(d_model=6, d_ff=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((d_model, d_ff), (d_ff,), (d_ff, d_model), (d_model,))
    return [torch.randn(shape, generator=generator, dtype=F64) for shape in shapes]


@pytest.mark.parametrize("num_experts", [1, 2, 4, 8])
def test_split_dense_is_exact(num_experts):
    w1, b1, w2, b2 = dense_of()
    x = torch.randn(30, 6, dtype=F64)
    dense = torch.relu(x @ w1 + b1) @ w2 + b2
    first, bias, second, out = smoe.split_dense(w1, b1, w2, b2, num_experts)
    summed = ((x @ first + bias[:, None]).relu() @ second + out[:, None]).sum(0)
    torch.testing.assert_close(summed, dense, atol=1e-12, rtol=0)
    for scale, share in ((num_experts, 1.0), (1.0, 1 / num_experts)):
        module = layer(num_experts, router_init=0.0, scale=scale)  # equal gates
        module.load_dense(w1, b1, w2, b2)
        torch.testing.assert_close(module(x), share * dense, atol=1e-12, rtol=0)


def test_split_dense_refuses_what_does_not_divide():
    for make in (lambda: smoe.split_dense(*dense_of(), 3), lambda: layer(3), lambda: smoe.DenseFFN(6, 8, 3)):
        with pytest.raises(ValueError, match="d_ff is 8, num_experts 3"):
            make()


@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("case", ["even", "idle expert", "one token", "strided"])
def test_masked_and_dispatched_forms_equal_a_loop_forward_and_backward(k, case):
    x = torch.randn(37, 6, dtype=F64)
    if case == "one token":
        x = x[:1]
    if case == "strided":
        x = torch.randn(6, 37, dtype=F64).T
    found = []
    for backend in ("masked", "torch", None):
        module = layer(k=k, router="learned", scale=3.0, backend=backend)
        if case == "idle expert":
            with torch.no_grad():
                module.router.weight.copy_(torch.ones(4, 6) * tensor([3.0], [2.0], [1.0], [-50.0]))
            x = x.abs()
        inputs = x.clone().requires_grad_()
        y = loop_reference(module, inputs) if backend is None else module(inputs)
        y.square().sum().backward()
        grads = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
        found.append([y, inputs.grad, *(grads.get(n, torch.zeros_like(p)) for n, p in module.named_parameters())])
    for other in found[:2]:
        for mine, reference in zip(other, found[2]):
            torch.testing.assert_close(mine, reference, atol=1e-10, rtol=1e-10)


def test_low_precision_stays_near():
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        module, x = layer(k=2), torch.randn(40, 6, dtype=F64)
        reference = loop_reference(module, x).detach()
        module = module.float()
        for backend in ("masked", "torch"):
            module.backend = backend
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
                y = module(x.float())
            assert y.dtype == dtype
            assert (y.double() - reference).abs().max() < tolerance * reference.abs().max()


def test_gradient_through_the_frozen_gate():
    """The router is frozen, the path through its logits into x is not."""
    for k, same in ((1, True), (3, False)):
        grads = []
        for cut in (False, True):
            module, x = layer(k=k), torch.randn(9, 6, dtype=F64, generator=torch.Generator().manual_seed(0))
            x.requires_grad_()
            if cut:
                module.router.register_forward_hook(lambda _, __, logits: logits.detach())
            module(x).sum().backward()
            grads.append(x.grad)
        assert torch.allclose(*grads) is same
    module = layer(k=2)
    assert torch.autograd.gradcheck(module, torch.randn(5, 6, dtype=F64).requires_grad_())


@pytest.mark.parametrize("router", ["frozen", "learned"])
def test_only_a_learned_router_is_trained(router):
    module, x = layer(router=router, k=2).float(), torch.randn(20, 6)
    before = module.router.weight.clone()
    optimizer = common.adamw(module, lr=0.1)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for _ in range(3):
        module(x).square().sum().backward()
        optimizer.step()
    assert torch.equal(module.router.weight, before) is (router == "frozen")
    assert (module.router.weight.grad is None) is (router == "frozen")
    assert (id(module.router.weight) in held) is (router == "learned")
    fresh = layer(router=router, k=2, seed=9).float()
    fresh.load_state_dict(module.state_dict())
    assert torch.equal(fresh(x), module(x)) and torch.equal(fresh.expert_index, module.expert_index)


def test_routers_differ_between_layers_and_repeat_with_the_seed():
    weights = lambda seed: [ffn.router.weight for ffn in build("smoe_dropout", seed, num_layers=2).ffns()]
    one, again, other = weights(0), weights(0), weights(1)
    assert torch.equal(one[0], again[0]) and torch.equal(one[1], again[1])
    assert not torch.equal(one[0], one[1]) and not torch.equal(one[0], other[0])


def test_dropout_acts_in_training_only_and_on_both_forms():
    x = torch.ones(400, 6, dtype=F64)
    for backend in ("masked", "torch"):
        module = layer(dropout=0.5, backend=backend)
        torch.manual_seed(0)
        noisy, again = module(x), module(x)
        assert not torch.equal(noisy, again) and 0.4 < (noisy == 0).double().mean() < 0.6
        module.eval()
        assert torch.equal(module(x), module(x))
        torch.testing.assert_close(noisy.mean(0), module(x)[0], atol=1.5, rtol=0.3)


def test_empty_batches_and_wrong_widths():
    for backend in ("masked", "torch"):
        module = layer(backend=backend, balance=0.1)
        y = module(torch.zeros(0, 6, dtype=F64, requires_grad=True))
        assert y.shape == (0, 6)
        y.sum().backward()
    with pytest.raises(ValueError, match="width 5.*d_model = 6"):
        layer()(torch.zeros(2, 5, dtype=F64))
    with pytest.raises(ValueError, match="router is 'random'"):
        layer(router="random")


def test_noise_routing_differs_between_calls_even_in_evaluation():
    module, x = layer(router="noise", k=2).eval(), torch.randn(50, 6, dtype=F64)
    torch.manual_seed(0)
    assert not torch.equal(module(x), module(x))
    assert layer(k=2).eval()(x).equal(layer(k=2).eval()(x))
    model = build("thor")
    assert smoe.evaluate(model, windows(), TINY, 2) == smoe.evaluate(model, windows(), TINY, 2)  # a seed of its own


# --- k -------------------------------------------------------------------------------------------------------


def test_linear_schedule_numbers():
    k = lambda step: smoe.k_at(step, 400_000, 8, 16)
    steps = {0: 8, 25_000: 8, 25_001: 9, 74_999: 9, 75_000: 10, 200_000: 12, 374_999: 15, 375_000: 16, 399_999: 16}
    assert {step: k(step) for step in steps} == steps
    counts = Counter(k(step) for step in range(400_000))
    assert counts[8] == 25_001 and counts[16] == 25_000
    assert sum(n * c for n, c in counts.items()) / 400_000 == pytest.approx(12.0, abs=1e-4)
    assert [smoe.k_at(s, 16, 4, 8) for s in range(16)] == [4, 4, 4, 5, 5, 5, 6, 6, 6, 6, 6, 7, 7, 7, 8, 8]


def test_other_schedules():
    assert smoe.k_at(200_000, 400_000, 8, 16, "cosine") == 10
    assert smoe.k_at(200_000, 400_000, 8, 16, "exponential") == 14 and smoe.k_at(0, 400_000, 8, 16, "exponential") == 8
    means = {"cosine": 10.9, "exponential": 13.4}
    for schedule, mean in means.items():
        assert np.mean([smoe.k_at(s, 400_000, 8, 16, schedule) for s in range(0, 400_000, 50)]) == pytest.approx(
            mean, abs=0.05
        )
    for schedule in ("linear", "cosine", "exponential", "random"):
        for total in (1, 7, 299, 1000):
            ks = [smoe.k_at(s, total, 3, 8, schedule) for s in range(total + 1)]
            assert set(ks) <= set(range(3, 9)) and (schedule == "random" or ks == sorted(ks))
            assert {smoe.k_at(s, total, 5, 5, schedule) for s in range(total)} == {5}
            assert schedule == "random" or smoe.k_at(2 * total, total, 3, 8, schedule) == 8  # trained on
    drawn = Counter(smoe.k_at(s, 1, 4, 8, "random") for s in range(5000))
    assert set(drawn) == {4, 5, 6, 7, 8} and min(drawn.values()) > 850


def test_impossible_schedules_and_k_are_refused():
    for arguments in [(0, 10, 9, 8), (0, 10, 0, 8), (0, 0, 4, 8), (0, 10, 4, 8, "stairs")]:
        with pytest.raises(ValueError, match="k_min is|schedule is 'stairs'"):
            smoe.k_at(*arguments)
    for k in (0, 5, 2.5, -1, True, "2"):
        with pytest.raises(ValueError, match="whole number from 1 to num_experts = 4"):
            layer().set_k(k)
        with pytest.raises(ValueError, match="whole number"):
            smoe.topk_gate(torch.zeros(1, 4), k)


def test_set_k_reaches_every_layer_changes_no_weight_and_is_restored():
    model = build("smoe_dropout", num_layers=2)
    before = copy.deepcopy(model.state_dict())
    smoe.set_k(model, 3)
    assert [ffn.k for ffn in model.ffns()] == [3, 3]
    with pytest.raises(KeyError), smoe.at_k(model, 1):
        assert [ffn.k for ffn in model.ffns()] == [1, 1]
        raise KeyError
    assert [ffn.k for ffn in model.ffns()] == [3, 3]
    smoe.evaluate(model, windows(), TINY, 2)
    assert [ffn.k for ffn in model.ffns()] == [3, 3]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert smoe.evaluate(model, windows(), TINY, 2) == smoe.evaluate(model, windows(), TINY, 2)
    assert smoe.evaluate(model, windows(), TINY, 2) != smoe.evaluate(model, windows(), TINY, 4)


def test_parameter_counts():
    dense, sparse = build("dense"), build("smoe_dropout")
    trained = lambda model: sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained(sparse) - trained(dense) == (TINY.num_experts - 1) * TINY.d_model
    assert sum(p.numel() for p in sparse.parameters()) - trained(sparse) == TINY.num_experts * TINY.d_model
    expert = 2 * TINY.d_model * TINY.d_ff // TINY.num_experts
    assert common.count_parameters(sparse, 4) - common.count_parameters(sparse, 2) == 2 * expert
    official = {"num_layers": 1, "context": 512, "d_model": 256, "d_ff": 8192, "num_experts": 16}
    ffn = build("smoe_dropout", **official).ffns()[0]
    assert sum(p.numel() for p in ffn.parameters() if p.requires_grad) == 16 * 262_912
    assert sum(p.numel() for p in build("dense", **official).ffns()[0].parameters()) == 4_202_752


# --- measures and baselines ----------------------------------------------------------------------------------


def test_effective_rank_and_cosine():
    eye = torch.eye(4, dtype=F64)
    assert smoe.effective_rank(eye) == pytest.approx(4) and smoe.effective_rank(eye.repeat(2, 1)) == pytest.approx(4)
    assert smoe.effective_rank(torch.ones(5, 3, 2)) == pytest.approx(1)
    singular = tensor([3.0, 0], [0, 1.0])
    share = np.array([0.9, 0.1])
    assert smoe.effective_rank(singular) == pytest.approx(np.exp(-(share * np.log(share)).sum()))
    outputs = torch.randn(5, 30, 4, dtype=F64)
    pairs = [F.cosine_similarity(outputs[i], outputs[j], dim=-1).mean() for i in range(5) for j in range(5) if i != j]
    assert smoe.mean_cosine(outputs) == pytest.approx(float(torch.stack(pairs).mean()))


def test_expert_statistics_read_the_inputs_of_every_layer():
    model, batch = build("smoe_dropout", num_layers=2), windows()
    found = smoe.expert_statistics(model, batch, TINY, 2)
    inputs = []
    model.ffns()[1].register_forward_pre_hook(lambda _, given: inputs.append(given[0].flatten(0, -2)))
    with smoe.at_k(model, 4), torch.no_grad():
        model(batch[:, :-1])
        outputs = model.ffns()[1].expert_outputs(inputs[0])
    assert found["rank"][1] == pytest.approx(smoe.effective_rank(outputs)) and len(found["rank"]) == 2
    assert found["cosine"][1] == pytest.approx(smoe.mean_cosine(outputs))
    assert all(sum(load) == pytest.approx(1) and len(load) == 4 for load in found["load"])
    assert smoe.expert_statistics(build("dense"), batch, TINY, 2)["load"] == []


def test_balance_loss_worked_example():
    logits = tensor([2, 1, 0, -1], [0, 2, 1, -1])
    loss = smoe.load_balancing_loss(logits, smoe.topk_gate(logits, 2)[0])
    assert float(loss) == pytest.approx(1.4083399357, abs=1e-9)
    assert float(smoe.load_balancing_loss(torch.zeros(6, 4, dtype=F64), torch.arange(24).view(6, 4) % 4)) == 1
    module = layer(router="learned", balance=0.5, k=2)
    module(torch.randn(9, 6, dtype=F64))
    module.aux_loss.backward()
    assert module.router.weight.grad.abs().sum() > 0 and layer().aux_loss is None
    arm, model = smoe.trained_arms(TINY, True)["learned_balance"], build("learned_balance", num_layers=2)
    loss, values = smoe.training_loss(model, arm, TINY, windows(4), 0)
    assert 0.9 * TINY.balance < values["aux_loss"] < TINY.num_experts * TINY.balance
    assert loss.item() == pytest.approx((values["lm_loss"] + values["aux_loss"]).item())


def test_balance_loss_averages_the_load_over_processes(monkeypatch):
    """Two processes, played in turn: the mean of their losses is the loss of the whole batch."""
    logits = torch.randn(10, 4, dtype=F64)
    index = smoe.topk_gate(logits, 2)[0]
    halves, found = list(zip(logits.split(5), index.split(5))), []
    whole = smoe.load_balancing_loss(logits, index)
    monkeypatch.setattr(smoe.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(smoe.dist, "get_world_size", lambda: 2)
    for mine, (_, other) in (halves, halves[::-1]):
        share = other.flatten().bincount(minlength=4) / other.numel()
        monkeypatch.setattr(smoe.dist, "all_reduce", lambda f, share=share: f.add_(share))
        found.append(smoe.load_balancing_loss(*mine))
    assert float(sum(found) / 2) == pytest.approx(float(whole), abs=1e-6)


def test_symmetric_kl():
    a, b = torch.randn(2, 7, 5, dtype=torch.float32)
    expected = F.kl_div(b.log_softmax(-1), a.softmax(-1), reduction="none").sum(-1)
    expected = expected + F.kl_div(a.log_softmax(-1), b.softmax(-1), reduction="none").sum(-1)
    torch.testing.assert_close(smoe.symmetric_kl(a, b), expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(smoe.symmetric_kl(a, b), smoe.symmetric_kl(b, a))
    assert (smoe.symmetric_kl(a, b) > 0).all() and not smoe.symmetric_kl(a, a).any()


def test_expert_drop_leaves_out_whole_slices_and_keeps_the_mean():
    module, x = smoe.DenseFFN(6, 8, 4, expert_drop=0.5, init=0.5).double(), torch.randn(1, 6, dtype=F64)
    with torch.no_grad():
        module.b1.fill_(5.0)  # every slice says something
    whole = module.eval()(x)
    slices = (x @ module.w1 + module.b1).relu().view(4, 2)[:, None] @ module.w2.view(4, 2, 6)
    module.train()
    torch.manual_seed(0)
    seen = torch.cat([module(x) for _ in range(3000)])
    subsets = {tuple((2 * sum(slices[e, 0] for e in range(4) if mask >> e & 1)).tolist()) if mask else (0.0,) * 6
               for mask in range(16)}  # fmt: skip
    table = torch.tensor(sorted(subsets), dtype=F64)
    assert torch.cdist(seen, table).min(1).values.max() < 1e-6 and len(table) == 16
    assert ((seen.mean(0) - whole[0]).abs() < 4 * seen.std(0) / 3000**0.5).all()


# --- the experiment ------------------------------------------------------------------------------------------


def build(arm, seed=0, **changes):
    config = replace(TINY, **changes)
    return smoe.build(config, smoe.trained_arms(config, True)[arm], seed)


def windows(num=32, vocabulary=256):
    return torch.randint(vocabulary, (num, TINY.context + 1), generator=torch.Generator().manual_seed(5))


def test_bits_of_a_uniform_model_are_eight_and_blocks_weigh_bytes():
    model = build("dense")
    with torch.no_grad():
        model.head.weight.zero_()
    assert smoe.evaluate(model, windows(), TINY) == pytest.approx([8.0] * smoe.NUM_BLOCKS)
    model, batch = build("smoe_dropout"), windows(35)  # blocks of two and three windows
    blocks = smoe.evaluate(model, batch, TINY, 4)
    whole = common.lm_loss(model, batch).mean(1).double() / math.log(2)
    assert blocks == pytest.approx([part.mean().item() for part in whole.tensor_split(16)], rel=1e-6)


def test_masked_objective_hides_what_it_asks_for(tmp_path):
    batch = windows(200)
    tokens, targets, counted = smoe.pose(batch, "mlm", 3)
    assert torch.equal(targets, batch[:, 1:]) and counted.float().mean() == pytest.approx(0.15, abs=0.02)
    assert (tokens[counted] == smoe.MASK).all() and torch.equal(tokens[~counted], targets[~counted])
    assert torch.equal(counted, smoe.pose(batch, "mlm", 3)[2]) and not torch.equal(
        counted, smoe.pose(batch, "mlm", 4)[2]
    )
    model, read = build("smoe_dropout", objective="mlm", conv=0), batch[:1, 1:]
    later = read.clone()
    later[0, -1] = (later[0, -1] + 1) % 256
    assert not torch.equal(model(read)[0, 0], model(later)[0, 0])  # it reads both ways
    causal = build("smoe_dropout")
    assert torch.equal(causal(read)[0, 0], causal(later)[0, 0])
    assert model.embedding.num_embeddings == 257 and causal.embedding.num_embeddings == 256
    loss, _ = smoe.training_loss(
        model, smoe.trained_arms(TINY, False)["smoe_dropout"], replace(TINY, objective="mlm"), batch, 3
    )
    logits = model(tokens)
    assert loss.item() == pytest.approx(F.cross_entropy(logits[counted], targets[counted]).item(), rel=1e-5)
    found = smoe.train_arm(replace(TINY, objective="mlm"), "smoe_dropout", 0, run_in(tmp_path))
    assert all(0 < bits < 9 for bits in found["bits"].values())


def test_thor_trains_on_the_mean_of_two_passes_and_their_divergence():
    arm, model, batch = smoe.trained_arms(TINY, True)["thor"], build("thor"), windows(4)
    torch.manual_seed(0)
    loss, values = smoe.training_loss(model, arm, replace(TINY, thor_alpha=0.5), batch, 0)
    torch.manual_seed(0)
    one, two = model(batch[:, :-1]), model(batch[:, :-1])
    ce = lambda logits: F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
    expected = (ce(one) + ce(two)) / 2 + 0.5 * smoe.symmetric_kl(one, two).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5) and values["aux_loss"] > 0


def test_arms_are_what_their_names_say():
    arms, config = smoe.trained_arms(smoe.SMALL, True), smoe.SMALL
    n, half = config.num_experts, config.num_experts // 2
    assert list(smoe.trained_arms(config, False)) == ["dense", "smoe_dropout", "learned_k2", "frozen_half"]
    spans = {name: (arm.router, arm.k_min, arm.k_max) for name, arm in arms.items() if "@" not in name}
    assert spans["smoe_dropout"] == ("frozen", config.k_min, n) == spans["cosine"]
    assert spans["learned_k2"] == ("learned", 2, 2) == spans["learned_balance"] and spans["thor"] == ("noise", 2, 2)
    assert spans["frozen_half"] == ("frozen", half, half) and spans["frozen_full"] == ("frozen", n, n)
    assert spans["learned_half"] == ("learned", half, half) and spans["learned_full"] == ("learned", n, n)
    assert spans["learned_ramp"] == ("learned", config.k_min, n)
    assert {arms[name].schedule for name in ("cosine", "exponential", "random")} == {"cosine", "exponential", "random"}
    other = smoe.trained_arms(replace(config, schedule="cosine"), True)
    assert other["linear"].schedule == "linear" and "cosine" not in other and other["smoe_dropout"].schedule == "cosine"
    assert arms["dense_dropout"].dropout == 0.1 and smoe.trained_arms(smoe.FULL, True)["dense_dropout"].dropout == 0.0
    assert arms["dense_expert_drop"].expert_drop == 0.5
    assert arms["scale_1"] == replace(arms["smoe_dropout"], scale=1.0)
    around = {config.lr / 2, config.lr, 2 * config.lr}
    tried = {(label.split("@")[0], arm.lr) for label, arm in arms.items() if "@" in label}
    assert tried == {(name, lr) for name in ("dense", "smoe_dropout") for lr in around - {config.lr}}
    for ablate in (False, True):
        names = [name for name in smoe.trained_arms(config, ablate) if "@" not in name and "flops" not in name]
        tune = smoe.trained_arms(replace(config, tune=True), ablate)
        assert [(label.split("@")[0], arm.lr) for label, arm in tune.items()] == [
            (name, lr) for name in names for lr in sorted(around)
        ]
    official = smoe.FULL
    assert (official.num_experts, official.d_ff, official.k_min, official.scale) == (16, 8192, 8, 1.0)
    assert "scale_1" not in smoe.trained_arms(official, True)  # smoe_dropout itself


def test_what_an_arm_changes_reaches_its_layers():
    of = lambda arm: build(arm, scale=3.0, dropout=0.2).ffns()[0]
    assert (of("smoe_dropout").scale, of("scale_1").scale) == (3.0, 1.0)
    assert (of("dense").dropout, of("dense_dropout").dropout, of("smoe_dropout").dropout) == (0.2, 0.0, 0.2)
    assert of("dense_expert_drop").expert_drop == 0.5 and of("dense").expert_drop == 0
    assert of("learned_balance").balance == TINY.balance and of("learned_k2").balance == 0
    kinds = [of(arm).router_kind for arm in ("smoe_dropout", "learned_ramp", "thor")]
    assert kinds == ["frozen", "learned", "noise"]


def test_arms_train_on_the_same_batches_at_their_own_rate(tmp_path, monkeypatch):
    config, seen = replace(TINY, lr_final=0.25, steps=5), {}

    class Caught(Exception):
        """The arguments of common.train are seen; nothing needs to be trained."""

    def caught(model, loss_fn, steps, *, batches, optimizer, schedule, label, **_):
        seen[label] = (optimizer.param_groups[0]["lr"], schedule(steps - 1), batches(3))
        raise Caught

    monkeypatch.setattr(common, "train", caught)
    for arm, seed in (("dense", 0), ("smoe_dropout", 0), ("smoe_dropout@0.003", 0), ("smoe_dropout", 1)):
        with pytest.raises(Caught):
            smoe.train_arm(config, arm, seed, run_in(tmp_path, config))
    assert [rate for rate, _, _ in seen.values()] == [6e-3, 6e-3, 3e-3, 6e-3]
    assert all(last == pytest.approx(0.25) for _, last, _ in seen.values())
    first, *others, other_seed = [drawn for _, _, drawn in seen.values()]
    assert all(torch.equal(first, drawn) for drawn in others) and not torch.equal(first, other_seed)


def test_quality_rises_with_k_after_a_short_training(tmp_path):
    config = replace(TINY, steps=200, d_ff=64, router_init=0.1, eval_bytes=4096)
    bits = smoe.train_arm(config, "smoe_dropout", 0, run_in(tmp_path, config))["bits"]
    assert bits["4"] < bits["2"] < bits["1"] < 8


def test_both_scales_use_the_same_objects():
    small, full = (
        smoe.build(c, smoe.trained_arms(c, False)["smoe_dropout"], 0)
        for c in (smoe.SMALL, replace(smoe.FULL, num_layers=1))
    )
    assert {type(m) for m in small.modules()} - {torch.nn.Conv1d} == {type(m) for m in full.modules()}


def test_flops_are_those_of_the_experts_that_ran():
    arm, batch = smoe.trained_arms(TINY, True)["smoe_dropout"], windows(2)
    found = {k: smoe.training_flops(TINY, arm, batch, k) for k in (1, 2, 4)}
    router, expert = 2 * TINY.d_model * TINY.num_experts, 2 * 2 * TINY.d_model * TINY.d_ff // TINY.num_experts
    assert {k: work["ffn"] for k, work in found.items()} == {k: router + k * expert for k in found}
    assert found[4]["train"] - found[2]["train"] == 2 * 3 * expert
    total = smoe.schedule_flops(TINY, arm, batch, {2: 3, 4: 5})
    assert total == (3 * found[2]["train"] + 5 * found[4]["train"]) * TINY.batch_size * TINY.context


def run_in(folder, config=TINY, **options):
    (folder / "arms").mkdir(exist_ok=True)
    return common.Run("smoe_dropout", "small", "cpu", torch.float32, [0], folder, config=config, **options)


def test_training_follows_the_schedule_and_freezes_the_router(tmp_path, monkeypatch):
    run, config, seen, used = run_in(tmp_path), replace(TINY, steps=8), [], []
    sample, loss = smoe.text_data.sample_windows, smoe.training_loss
    monkeypatch.setattr(
        smoe, "training_loss", lambda model, *rest: (used.append(model.ffns()[0].k), loss(model, *rest))[1]
    )
    monkeypatch.setattr(
        smoe.text_data, "sample_windows", lambda data, *rest: (seen.append(data), sample(data, *rest))[1]
    )
    result = smoe.train_arm(config, "smoe_dropout", 0, run)
    lines = [json.loads(line) for line in run.path("smoe_dropout", 0, ".jsonl").read_text().splitlines()]
    assert [line["k"] for line in lines] == [smoe.k_at(s, 8, 2, 4) for s in range(8)] == used[:8]
    assert result["steps"] == 8
    corpus = smoe.text_data.load_domain("python")
    assert all(torch.equal(data, corpus.train) for data in seen)
    start, end = (
        smoe.build(config, smoe.trained_arms(config, False)["smoe_dropout"], 0),
        common.load(run.path("smoe_dropout", 0, ".pt")),
    )
    for name, value in start.state_dict().items():
        assert torch.equal(value, end[name]) is name.endswith("router.weight"), name
    arm = smoe.trained_arms(config, False)["smoe_dropout"]
    work = {k: smoe.training_flops(config, arm, windows(2), k) for k in (1, 2, 3, 4)}
    counted = Counter(int(line["k"]) for line in lines)
    total = sum(work[k]["train"] * n for k, n in counted.items())
    assert result["train_flops"] == total * config.batch_size * config.context
    assert result["ffn_flops"] == {str(k): flops["ffn"] for k, flops in work.items()}
    assert result["active"] == {str(k): common.count_parameters(build("smoe_dropout"), k) for k in work}


def test_every_k_may_have_a_compiled_graph_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: None)
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 8)
    smoe.train_arm(TINY, "smoe_dropout", 0, run_in(tmp_path, compile=True))
    assert torch._dynamo.config.recompile_limit == 16


def test_tuning_sees_another_half_of_the_held_out_text():
    whole = smoe.text_data.load_domain("python").val
    halves = [smoe.load_corpus(replace(TINY, tune=tune), None, False).val for tune in (True, False)]
    assert torch.equal(torch.cat(halves), whole)
    data = smoe.load_corpus(replace(TINY, drop_newlines=True), None, False)
    assert not (data.train == 10).any() and not (data.val == 10).any()


def test_dense_at_equal_flops_stops_earlier(tmp_path):
    run, config = run_in(tmp_path), replace(TINY, steps=40, d_ff=64)
    ours, dense = (smoe.train_arm(config, arm, 0, run) for arm in ("smoe_dropout", "dense_equal_flops"))
    assert dense["steps"] < 40 and dense["train_flops"] == pytest.approx(ours["train_flops"], rel=0.02)


def test_sliced_dense_with_all_experts_and_equal_gates_is_the_dense_model(tmp_path):
    run, config = run_in(tmp_path), replace(TINY, router_init=0.0)
    dense = smoe.train_arm(config, "dense", 0, run)
    sliced = smoe.slice_dense(config, "dense_sliced", 0, run)
    assert sliced["blocks"]["4"] == pytest.approx(dense["blocks"]["4"], abs=1e-5)
    assert sliced["rank"] == pytest.approx(dense["rank"], abs=1e-4) and set(sliced["bits"]) == {"1", "2", "3", "4"}


# --- fine-tuning ---------------------------------------------------------------------------------------------

MATH = "Question,Numbers,Equation,Answer\n" + "".join(
    f"ann has number0 pens and {'buys' if i % 2 else 'loses'} number1 . how many ?,{i + 5} {i % 4 + 1},"
    f"{'+' if i % 2 else '-'} number0 number1,{i + 5 + (i % 4 + 1) * (1 if i % 2 else -1)}.0\n"
    for i in range(40)
)
SST2 = "sentence\tlabel\n" + "a fine film \t1\na dull mess \t0\n" * 20
CSQA = "".join(
    json.dumps({"answerKey": "ABCDE"[i % 5], "question": {"stem": f"where {i}?", "choices": [
        {"label": label, "text": text} for label, text in zip("ABCDE", ("tree", "sky", "sea", "car", "hat"))
    ]}}) + "\n" for i in range(20)
)  # fmt: skip


@pytest.fixture
def task_folder(tmp_path):
    def put(name, content):
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)

    for split in ("train", "dev"):
        put(f"sst2/SST-2/{split}.tsv", SST2)
        put(f"csqa/{split}_rand_split.jsonl", CSQA)
        for folder in ("cv_asdiv-a/fold0", "cv_mawps/fold0", "mawps-asdiv-a_svamp"):
            put(f"svamp/{folder}/{split}.csv", MATH)
        put(f"svamp/cv_mawps/fold1/{split}.csv", "".join(MATH.splitlines(True)[:21]))
    return tmp_path / "data"


def test_tasks_are_posed_with_one_row_a_choice_and_every_right_class(task_folder):
    rows, classes, dev, right = smoe.tasks.pose(*smoe.tasks.load_task("svamp", task_folder), TINY.task_bytes)
    assert rows.shape == dev.shape == (40, 1, TINY.task_bytes) and right.shape == (40, 2)
    assert right.double().argmax(1).equal(classes) and bytes(rows[0, 0].tolist()).endswith(b"how many ?")
    rows, classes, dev, right = smoe.tasks.pose(*smoe.tasks.load_task("csqa", task_folder), TINY.task_bytes)
    assert rows.shape == (20, 5, TINY.task_bytes) and bytes(rows[7, 2].tolist()).endswith(b"\nwhere 7? sea")
    assert classes[7] == 2 and right[7].tolist() == [False, False, True, False, False]
    rows, classes, dev, right = smoe.tasks.pose(*smoe.tasks.load_task("sst2", task_folder), TINY.task_bytes)
    assert (
        rows.shape == (40, 1, TINY.task_bytes) and classes[:2].tolist() == [1, 0] and right[0].tolist() == [False, True]
    )


def test_fine_tuning_learns_starts_from_the_arm_and_keeps_k_and_the_frozen_router(tmp_path, task_folder, monkeypatch):
    config = replace(TINY, task_steps=150, task_lr=1e-2, task_bytes=48, tasks=("svamp", "mawps"), folds=2)
    run, seen = run_in(tmp_path, config, data_dir=task_folder), []
    for arm in ("dense", "smoe_dropout"):
        smoe.train_arm(config, arm, 0, run)
    names = smoe.task_arms(config, ["dense", "smoe_dropout"])
    assert names[:3] == ["svamp.fold0.dense.k4", "svamp.fold0.smoe_dropout.k2", "svamp.fold0.smoe_dropout.k4"]
    assert "mawps.fold1.smoe_dropout.k2" in names and len(names) == 9
    train, base = common.train, common.load(run.path("smoe_dropout", 0, ".pt"))

    def watched(model, *rest, **options):
        body = model.body.state_dict()
        assert all(torch.equal(body[name], base[name]) for name in body)
        done = train(model, *rest, **options)
        assert torch.equal(model.body.state_dict()["blocks.0.ffn.router.weight"], base["blocks.0.ffn.router.weight"])
        assert not torch.equal(model.body.state_dict()["blocks.0.ffn.w1"], base["blocks.0.ffn.w1"])
        seen.append(model.body.ffns()[0].k)
        return done

    monkeypatch.setattr(common, "train", watched)
    found = [smoe.finetune_arm(config, f"svamp.fold0.smoe_dropout.k{k}", 0, run) for k in (2, 4)]
    assert seen == [2, 4] and [result["examples"] for result in found] == [40, 40]
    assert found[1]["accuracy"] > 0.9
    assert smoe.finetune_arm(replace(config, task_steps=1), "mawps.fold1.smoe_dropout.k4", 0, run)["examples"] == 20


# --- claims --------------------------------------------------------------------------------------------------


def measured(bits, rank=3.0, cost=1.0, k=4):
    """bits: at k = 1, 2, 3, 4, or one number for a dense model."""
    by_k = {str(i + 1): b for i, b in enumerate(bits)} if isinstance(bits, list) else {str(k): bits}
    blocks = {key: [b - 0.001, b + 0.001] for key, b in by_k.items()}
    work = {key: 1.0 + int(key) for key in by_k}
    return {"bits": by_k, "blocks": blocks, "rank": [rank, rank], "cosine": [0.1, 0.1], "load": [[1, 1]], "frozen": 8,
            "train_flops": cost, "ffn_flops": work, "active": work}  # fmt: skip


GOOD = {
    "dense": measured(2.3),
    "smoe_dropout": measured([2.6, 2.4, 2.3, 2.2], rank=3.5, cost=0.8),
    "learned_k2": measured([2.5, 2.3, 2.35, 2.4]),
    "dense_equal_flops": measured(2.4),
    "learned_ramp": measured([2.6, 2.4, 2.3, 2.25]),
    **{name: measured([2.6, 2.4, 2.3, 2.25 + i / 100]) for i, name in enumerate(("cosine", "exponential", "random"))},
}
TRANSFER = {"svamp.fold0.dense.k4": {"accuracy": 0.5}, "svamp.fold0.smoe_dropout.k4": {"accuracy": 0.6}}
WORSE = {  # claim -> what has to change for it to fail
    "slimmable": {"smoe_dropout": measured([2.6, 2.4, 2.19, 2.2], rank=3.5, cost=0.8)},
    "learned_peaks": {"learned_k2": measured([2.5, 2.3, 2.35, 2.29])},
    "beats_dense": {"dense": measured(2.1)},
    "compute": {"dense": measured(2.3, cost=0.7)},
    "less_collapse": {"dense": measured(2.3, rank=3.6)},
    "schedule": {"random": measured([2.6, 2.4, 2.3, 2.1])},
    "router_matters": {"learned_ramp": measured([2.6, 2.4, 2.3, 2.1])},
}


@pytest.mark.parametrize("num_seeds", [1, 3])
def test_every_claim_can_hold_and_can_fail(num_seeds, tmp_path):
    config = replace(TINY, tasks=("svamp",))

    def judged(changes, transfer=TRANSFER):
        claims = [replace(claim) for claim in smoe.CLAIMS]
        run = common.Run("smoe_dropout", "small", "cpu", torch.float32, [0] * num_seeds, tmp_path, ablate=True,
                         claims=claims)  # fmt: skip
        repeat = lambda found: {arm: [result] * num_seeds for arm, result in found.items()}
        smoe.judge(config if transfer else TINY, run, repeat(GOOD | changes), repeat(transfer))
        return {claim.id.removeprefix("smoe_dropout."): claim for claim in claims}

    good = judged({})
    assert set(good) == {*WORSE, "transfer"} and all(claim.holds for claim in good.values()), good
    assert "3 to 4: 0.1000" in good["slimmable"].measured and good["beats_dense"].measured.startswith("0.1000")
    assert good["compute"].measured.startswith("20.0 %") and "+10.00" in good["transfer"].measured
    for id, changes in WORSE.items():
        assert judged(changes)[id].holds is False, id
    uneven = measured([2.6, 2.29, 2.3, 2.2], rank=3.5, cost=0.8)  # worse from half to half + 1
    assert judged({"smoe_dropout": uneven})["slimmable"].holds is False
    assert judged({"learned_k2": measured([2.5, 2.3, 2.2, 2.4])})["learned_peaks"].holds is False  # best beyond half
    assert judged({"learned_k2": measured([2.5, 2.3, 2.35, 2.4], rank=3.6)})["less_collapse"].holds is False
    swapped = dict(zip(TRANSFER, reversed(TRANSFER.values())))
    assert judged({}, swapped)["transfer"].holds is False
    assert judged({}, {})["transfer"].holds is None and "--tasks" in judged({}, {})["transfer"].measured


# --- the script ----------------------------------------------------------------------------------------------


def results_of(folder):
    return json.loads((folder / "results.json").read_text())


def test_script_end_to_end_with_every_arm_and_a_task(command_line, tmp_path, task_folder):
    flags = ["--ablate", "--workers", 1, "--out", "out", "--tasks", "svamp,csqa", "--data-dir", task_folder]
    done = command_line(smoe, *SMOE_DROPOUT, *flags, "--task-steps", 2, "--task-bytes", 32)
    assert done.returncode == 0, done.stderr
    report = results_of(tmp_path / "out")
    assert [claim["id"] for claim in report["claims"]] == [claim.id for claim in smoe.CLAIMS]
    assert all(claim["verdict"] != "not measured" for claim in report["claims"])
    assert {"dense", "thor", "dense_sliced", "dense_equal_flops"} <= set(report["results"]["arms"])
    assert "csqa.fold0.thor.k2" in report["results"]["tasks"]
    metrics = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert any({"arm", "step", "loss", "k"} <= set(line) for line in metrics)
    for title in (
        "bits/byte at k",
        "parameters",
        "how alike",
        "router by schedule",
        "learning-rate grid",
        "fine-tuned",
    ):
        assert any(title in table["title"] for table in report["results"]["tables"]), title


def test_tune_prints_the_grid_and_claims_nothing(command_line, tmp_path):
    done = command_line(smoe, *SMOE_DROPOUT, "--tune", "--workers", 1, "--steps", 1, "--lr", 0.01)
    assert done.returncode == 0, done.stderr
    table = results_of(tmp_path / "runs" / "smoe_dropout-small")["results"]["tables"][0]
    assert table["header"] == ["arm", "0.005", "0.01", "0.02"]
    assert [row[0] for row in table["rows"]] == ["dense", "smoe_dropout", "learned_k2", "frozen_half"]
    assert all(claim["verdict"] == "not measured" for claim in results_of(tmp_path / "runs" / "smoe_dropout-small")["claims"])


def test_the_grid_compares_rates_on_the_same_seeds(tmp_path):
    """With --ablate only the first seed runs every rate."""
    run = common.Run("smoe_dropout", "small", "cpu", torch.float32, [7, 8], tmp_path)
    at = lambda *bits: [{"bits": {"4": b}, "k_max": 4} for b in bits]
    found = {"dense": at(2.0, 9.0), "learned_k2": at(1.0, 1.0), "dense@0.003": at(3.0), "dense@0.012": at(4.0)}
    smoe.print_grid(TINY, run, found)
    assert "1 seed(s) from 7" in run.tables[0]["title"] and run.tables[0]["rows"] == [
        ["dense", "3.000", "2.000", "4.000"]
    ]
    smoe.print_grid(TINY, run, {f"dense@{lr:g}": at(lr, 3 * lr) for lr in (3e-3, 6e-3, 1.2e-2)})
    assert run.tables[1]["rows"] == [["dense", "0.006", "0.012", "0.024"]]


def test_full_scale_runs_and_resumes_bit_for_bit(command_line, tmp_path):
    """The official configuration but for sizes, on a file; stopped in the middle of an arm and resumed."""
    (tmp_path / "slice").write_bytes(
        b"".join(b"<page> %d the quick brown fox [[%d]] </page>\n" % (i, i * i) for i in range(4000))
    )
    sizes = [*SMOE_DROPOUT, "--steps", 20, "--workers", 1, "--dropout", 0.1]
    flags = ["--full", *sizes, "--text", "slice", "--threads", 1, "--device", "cpu"]
    whole = command_line(smoe, *flags, "--out", "whole")
    assert whole.returncode == 0, whole.stderr
    before, train = results_of(tmp_path / "whole")["results"]["arms"], common.train

    def stops(model, *rest, **options):
        if options["label"] == "smoe_dropout-seed0":
            train(model, *rest, **{**options, "stop_step": 9, "checkpoint_seconds": 0.0})
            raise KeyboardInterrupt
        return train(model, *rest, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "train", stops)
        stopped = command_line(smoe, *flags, "--out", "cut")
    assert stopped.returncode == 130 and "--resume" in stopped.stderr
    done = command_line(smoe, *flags, "--out", "cut", "--resume")
    assert done.returncode == 0, done.stderr
    assert results_of(tmp_path / "cut")["results"]["arms"] == before
    assert results_of(tmp_path / "cut")["config"]["scale"] == 1.0


def test_enwik8_is_split_as_published(tmp_path, monkeypatch):
    """A sparse file of the right size stands in; 90 million bytes train, the last 5 million are measured."""
    monkeypatch.setattr(smoe.download, "fetch", lambda name, root: tmp_path)
    with open(tmp_path / "enwik8", "wb") as file:
        file.seek(95_000_000)
        file.write(b"test")
        file.truncate(100_000_000)
    corpus = smoe.load_corpus(smoe.FULL, tmp_path, True)
    assert len(corpus.train) == 90_000_000 and len(corpus.val) == 5_000_000
    assert bytes(corpus.val[:4].tolist()) == b"test" and "a1fa5ffddb56" in corpus.digest


@pytest.mark.parametrize(
    "flags, expected",
    [
        (["--num-expert", "4"], "--num-experts"),
        (["--num-experts", "3"], "d_ff is 1024, num_experts 3"),
        (["--num-experts", "2", "--k-min", "1"], "at least 4"),
        (["--k-min", "9"], "k_min is 9, k_max 8"),
        (["--schedule", "stairs"], "schedule is 'stairs'"),
        (["--objective", "bert"], "objective is 'bert'; allowed: lm, mlm"),
        (["--steps", "0"], "steps is 0"),
        (["--lr", "-1"], "lr is -1"),
        (["--dropout", "1"], "dropout is 1"),
        (["--tasks", "glue"], "task is 'glue'"),
        (["--tasks", "svamp", "--folds", "6"], "folds is 6"),
        (["--tasks", "sst2", "--data-dir", "DATA"], "line 2: label '7'"),
        (["--tune", "--tasks", "sst2"], "drop --tasks"),
        (["--text", "no/such/file"], "no such file"),
        (["--text", "SHORT"], "too short"),
        (["--backend", "cuda"], "backend"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line_exit_code_2_and_leave_nothing(command_line, tmp_path, flags, expected):
    (tmp_path / "SHORT").write_bytes(b"hello world\n" * 9)
    (tmp_path / "DATA" / "sst2" / "SST-2").mkdir(parents=True)
    for split in ("train", "dev"):
        (tmp_path / "DATA" / "sst2" / "SST-2" / f"{split}.tsv").write_text("good\t1\nbad\t7\n")
    done = command_line(smoe, *flags)
    assert done.returncode == 2 and expected in done.stderr and done.stderr.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["DATA", "SHORT"]


def test_dry_run_downloads_nothing(command_line, tmp_path, monkeypatch):
    monkeypatch.setattr(smoe.download, "fetch", lambda *_: pytest.fail("downloads"))
    done = command_line(smoe, "--full", "--dry-run", *SMOE_DROPOUT, "--threads", 1)
    assert done.returncode == 0 and "36,445,475" in done.stdout and not list(tmp_path.iterdir())
    assert "peak memory of 1/4 of a step" in done.stdout
    work = float(done.stdout.split("training FLOPs")[1].split()[0])
    sizes = dict(num_layers=1, d_model=16, d_ff=16, num_experts=4, k_min=2, num_heads=2, context=32, batch_size=4)
    config = replace(smoe.FULL, **sizes)
    batch = torch.zeros(4, 33, dtype=torch.long)
    arm = smoe.Arm("frozen", 1, 4)
    assert work == pytest.approx(4 * smoe.schedule_flops(config, arm, batch, {4: 6}), rel=0.01)  # four arms


def test_diverging_training_is_one_line_and_exit_code_1(command_line):
    done = command_line(smoe, *SMOE_DROPOUT, "--lr", "1e30", "--workers", "1")
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "lower --lr" in done.stderr
