"""AdaMoE: the numbers of the hand-worked examples, and the properties the method promises. float64 throughout."""

import copy
import json
import math
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from forked import ended
from tiny import ADAMOE

import adamoe
import bridge as common
import kernels

F64 = torch.float64
NORMALIZE = ("true_experts", "all_picks", "none")


def logits_of(*rows, **options):
    return torch.tensor(rows, dtype=F64, **options)


def layer(num_experts=4, num_null=4, top_k=3, d_model=6, d_ff=5, seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    return adamoe.AdaMoE(d_model, d_ff, num_experts, num_null, top_k, generator=generator, **options).double()


def dense_reference(module, x):
    """Every expert on every token, weighted by a gate worked out one token at a time."""
    logits = (x @ module.router.weight.T).detach()
    out = torch.zeros_like(x)
    for t in range(len(x)):
        picks = [i for i in logits[t].topk(module.top_k).indices.tolist() if i < module.num_experts]
        total = sum(math.exp(logits[t, i]) for i in picks)
        for i in picks:
            out[t] += math.exp(logits[t, i]) / total * (F.gelu(x[t] @ module.w1[i]) @ module.w2[i])
    return out


# --- routing -------------------------------------------------------------------------------------------------


def test_route_worked_example():
    logits = logits_of([2, 1, 0, 1.5, -1])
    index, gates = adamoe.route(logits, num_experts=3, top_k=3)
    assert index.tolist() == [[0, -1, 1]]
    torch.testing.assert_close(gates, logits_of([0.7310585786, 0.0, 0.2689414214]))
    torch.testing.assert_close(
        adamoe.route(logits, 3, 3, "all_picks")[1], logits_of([0.50648039, 0.0, 0.18632372]), atol=1e-7, rtol=0
    )
    x, scale = logits_of([1, 2]), torch.tensor([1.0, 10.0, 100.0], dtype=F64)
    eye = torch.eye(2, dtype=F64)
    y = kernels.moe_mlp(x, index, gates, scale[:, None, None] * eye, eye.expand(3, 2, 2), act="none")
    torch.testing.assert_close(y, logits_of([3.42047279, 6.84094558]), atol=1e-8, rtol=0)


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
    x, scale, eye = logits_of([1, 2]), torch.tensor([1.0, 10.0, 100.0], dtype=F64), torch.eye(2, dtype=F64)
    expected = {"true_experts": [-5.3085, 5.3085, 0, 0, 0], "all_picks": [-2.0812, 4.2651, 0, -2.1839, 0]}
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


def test_without_nulls_it_is_vanilla_top_k():
    logits = torch.randn(20, 5, dtype=F64)
    index, gates = adamoe.route(logits, num_experts=5, top_k=2)
    picked = logits.softmax(-1).topk(2)
    assert torch.equal(index, picked.indices)
    torch.testing.assert_close(gates, picked.values / picked.values.sum(-1, keepdim=True))
    f = F.one_hot(index, 5).sum(1).double().mean(0)
    torch.testing.assert_close(
        adamoe.load_balancing_loss(logits, 5, 2, 0.3), 0.3 * 5 * (f * logits.softmax(-1).mean(0)).sum()
    )


def test_counts_stay_within_their_bounds():
    for num_experts, num_null, top_k in [(4, 5, 4), (8, 8, 3), (3, 1, 4), (2, 6, 5)]:
        index, _ = adamoe.route(torch.randn(500, num_experts + num_null), num_experts, top_k)
        counts = (index >= 0).sum(-1)
        assert counts.min() >= max(0, top_k - num_null) and counts.max() <= min(top_k, num_experts)


# --- balance loss --------------------------------------------------------------------------------------------

EXAMPLE = [[2, 0, 1.5, -1], [0, 1, 2, -0.5], [1, 0.5, 3, 0]]


def test_balance_loss_worked_example():
    logits = logits_of(*EXAMPLE)
    loss = lambda **options: float(adamoe.load_balancing_loss(logits, 2, 2, 1.0, **options))
    assert loss() == pytest.approx(2.0839869297, abs=1e-9)
    assert loss(average_nulls=False) == pytest.approx(3.1770587275, abs=1e-9)
    mask = torch.tensor([True, True, False])
    assert loss(token_mask=mask) == pytest.approx(2.0, abs=1e-9)
    assert loss(token_mask=mask, average_nulls=False) == pytest.approx(2.8897596694, abs=1e-9)
    assert (adamoe.route(logits, 2, 2)[0] >= 0).double().sum(-1).mean() == 1.0


def test_balance_loss_gradient_equals_the_formula_and_f_carries_none():
    logits = logits_of(*EXAMPLE, requires_grad=True)
    adamoe.load_balancing_loss(logits, 2, 2, 1.0).backward()
    expected = logits_of([0.0641732344, -0.0248868961, -0.0363061481, -0.0029801902])
    torch.testing.assert_close(logits.grad[:1], expected, atol=1e-9, rtol=0)
    f, p = torch.tensor([2 / 3, 1 / 3, 0.5, 0.5], dtype=F64), logits.detach().softmax(-1)
    formula = 4 / 3 * p * (f - (p * f).sum(-1, keepdim=True))
    torch.testing.assert_close(logits.grad, formula)


def test_loss_is_per_layer_then_averaged():
    """Two layers that collapse in opposite ways look balanced when pooled: 1.8267313421 instead of 3.4801940262."""
    rows = ([3.0, 0, 0, 0], [0, 3.0, 0, 0])
    losses = [adamoe.load_balancing_loss(logits_of(row, row), 2, 1, 1.0) for row in rows]
    assert float(torch.stack(losses).mean()) == pytest.approx(3.4801940262, abs=1e-9)

    model = common.TransformerLM(4, 2, 4, 1, 2, lambda i: adamoe.AdaMoE(4, 2, 2, 2, 1, alpha=1.0)).double()
    model(torch.zeros(1, 2, dtype=torch.long))
    left = [ffn.aux_loss for ffn in model.ffns()]
    torch.testing.assert_close(model.aux_loss(), (left[0] + left[1]) / 2)
    assert model.ffns()[0].aux_loss is None


def test_which_null_is_picked_does_not_matter():
    logits = torch.randn(50, 7, dtype=F64)
    swapped = logits[:, [0, 1, 2, 4, 3, 6, 5]]
    torch.testing.assert_close(
        adamoe.load_balancing_loss(logits, 3, 3, 1.0), adamoe.load_balancing_loss(swapped, 3, 3, 1.0)
    )
    # The same mean probabilities, but the second token's pick moves from null 3 to null 2.
    one = logits_of([0.1, 0.1, 0.55, 0.25], [0.1, 0.1, 0.35, 0.45]).log()
    other = logits_of([0.1, 0.1, 0.45, 0.35], [0.1, 0.1, 0.45, 0.35]).log()
    null, plain = (
        [float(adamoe.load_balancing_loss(z, 2, 1, 1.0, average_nulls=average)) for z in (one, other)]
        for average in (True, False)
    )
    assert null == pytest.approx([1.6, 1.6]) and plain == pytest.approx([1.6, 1.8])


def half_of_a_batch(rank, store, logits, results):
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    mine = torch.tensor(logits, dtype=F64).chunk(2)[rank].clone().requires_grad_()
    loss = adamoe.load_balancing_loss(mine, 3, 2, 1.0)
    loss.backward()
    results.put((rank, loss.item(), mine.grad.tolist()))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_two_processes_with_half_a_batch_each_have_the_loss_and_gradient_of_the_whole(fork, tmp_path):
    logits, results = torch.randn(40, 5, dtype=F64), fork.context.Queue()
    two = [fork.call(half_of_a_batch, rank, tmp_path / "store", logits.tolist(), results) for rank in (0, 1)]
    found = sorted(results.get(timeout=60) for _ in range(2))
    assert [ended(process) for process in two] == [0, 0]
    whole = logits.clone().requires_grad_()
    loss = adamoe.load_balancing_loss(whole, 3, 2, 1.0)
    loss.backward()
    assert (found[0][1] + found[1][1]) / 2 == pytest.approx(loss.item())
    gradient = torch.tensor(found[0][2] + found[1][2], dtype=F64) / 2  # data parallelism averages gradients
    torch.testing.assert_close(gradient, whole.grad)


def test_alpha_schedule_and_flops_formula():
    alphas = [adamoe.alpha_at(step, 10, 0.02, 1e-4) for step in range(10)]
    assert alphas == [0.02] * 5 + [1e-4] * 5
    assert 100 * adamoe.flops_saved(1.66, 2, 0.8815) == pytest.approx(14.99, abs=0.01)
    assert adamoe.flops_saved(2, 2, 0.8815) == 0 and adamoe.flops_saved(2.1, 2, 0.8815) < 0


# --- the layer -----------------------------------------------------------------------------------------------


def test_layer_equals_the_dense_reference():
    module = layer()
    x = torch.randn(40, 6, dtype=F64)
    torch.testing.assert_close(module(x), dense_reference(module, x), atol=1e-12, rtol=1e-12)
    assert module(x.view(2, 20, 6)).shape == (2, 20, 6)


def test_dropless_every_true_pick_is_computed_and_nothing_else():
    module = layer()
    x = torch.randn(100, 6, dtype=F64)
    index, _ = adamoe.route(module.router(x), 4, 3)
    rows_by_expert = kernels.make_dispatch(index, 4).offsets.diff()
    module(x)
    assert int(rows_by_expert.sum()) == int(module.true_counts.sum())
    flops = common.count_flops(lambda: module(x))
    expert_flops = flops["AdaMoE"] - flops["AdaMoE.router"]
    assert expert_flops == int(module.true_counts.sum()) * 2 * 2 * 6 * 5


@pytest.mark.parametrize("favoured", ["one expert idle", "all null"])
def test_idle_experts_and_batches_without_true_picks(favoured):
    module = layer()
    with torch.no_grad():
        weight = torch.full((8, 6), -1.0 if favoured == "one expert idle" else 0.0, dtype=F64)
        weight[[0] if favoured == "one expert idle" else [4, 5, 6]] = -5.0 if favoured == "one expert idle" else 5.0
        weight += 0.01 * torch.randn(8, 6, dtype=F64)
        module.router.weight.copy_(weight)
    x = torch.rand(30, 6, dtype=F64) + 0.1
    y = module(x)
    torch.testing.assert_close(y, dense_reference(module, x), atol=1e-12, rtol=1e-12)
    (y.sum() + module.aux_loss).backward()
    assert all(torch.isfinite(p.grad).all() for p in module.parameters())
    if favoured == "all null":
        assert not y.any() and not module.true_counts.any()
    else:
        assert not module.w1.grad[0].any()


@pytest.mark.parametrize("expert", [0, 3])  # a null index of -1 that wraps around would hit the last expert
def test_nan_weights_of_an_expert_nobody_picks_stay_out(expert):
    module, x = layer(), torch.randn(400, 6, dtype=F64)
    unpicked = x[~(module.router(x).topk(3).indices == expert).any(-1)]
    with torch.no_grad():
        module.w1[expert] = math.nan
    y = module(unpicked)
    assert (module.true_counts < 3).any() and torch.isfinite(y).all()


def test_padding_counts_neither_in_the_loss_nor_in_the_gradient():
    module, x = layer(), torch.randn(2, 5, 6, dtype=F64)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]], dtype=torch.bool)
    module(x, token_mask=mask)
    padded = module.aux_loss
    module(x[mask])
    torch.testing.assert_close(padded, module.aux_loss)


def test_permuting_null_rows_changes_neither_output_nor_loss():
    module, x = layer(), torch.randn(30, 6, dtype=F64)
    before, loss = module(x), module.aux_loss
    with torch.no_grad():
        module.router.weight[4:] = module.router.weight[[6, 7, 5, 4]]
    torch.testing.assert_close(module(x), before)
    torch.testing.assert_close(module.aux_loss, loss)


def test_causal_and_independent_of_the_order_of_tokens():
    model = common.TransformerLM(
        256, 2, 16, 2, 24, lambda i: layer(d_model=16, d_ff=8, seed=i), norm="rms", conv=4,
        generator=torch.Generator().manual_seed(0), init=0.3,
    ).double()  # fmt: skip
    tokens = torch.randint(256, (24,))
    with torch.no_grad():
        torch.testing.assert_close(model(tokens[None, :10]), model(tokens[None])[:, :10], atol=1e-12, rtol=0)
    assert adamoe.future_leak(model, tokens) < 1e-12
    model.causal = False  # the convolution looks ahead now, and the measure sees it
    assert adamoe.future_leak(model, tokens) > 1e-6
    module, x = layer(), torch.randn(30, 6, dtype=F64)
    order = torch.randperm(30)
    torch.testing.assert_close(module(x)[order], module(x[order]))


def test_predicted_load_and_budget():
    for sizes, load in {(4, 5, 4): 16 / 9, (4, 9, 4): 16 / 13, (8, 8, 3): 1.5, (8, 16, 4): 4 / 3}.items():
        assert adamoe.predicted_load(*sizes) == pytest.approx(load)
    assert adamoe.num_null_for_load(8, 3, 1.5) == 8 and adamoe.num_null_for_load(8, 3, 3) == 0
    for load in (0, -1, 3.1, math.nan):
        with pytest.raises(ValueError, match="load is"):
            adamoe.num_null_for_load(8, 3, load)


def test_copied_null_rows():
    weight = torch.arange(8.0)[:, None] * torch.ones(8, 3)
    twice = adamoe.copy_null_rows(weight, 16, noise=0.0)
    assert torch.equal(twice, weight.repeat(3, 1))
    part = adamoe.copy_null_rows(torch.arange(8.0)[:, None], 5, noise=0.0)
    assert part[:, 0].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3, 4]
    generator = lambda: torch.Generator().manual_seed(1)
    noisy = [adamoe.copy_null_rows(torch.randn(8, 64), 8, generator=generator()) for _ in range(2)]
    assert not torch.equal(noisy[0][:8], noisy[0][8:])
    assert torch.allclose(noisy[0][:8], noisy[0][8:], rtol=0.1, atol=0.01)


@pytest.mark.parametrize("num_null, top_k, predicted, within", [(8, 3, 1.5, 0.1), (16, 4, 4 / 3, 0.15)])
def test_copied_rows_start_near_the_predicted_load(num_null, top_k, predicted, within):
    """A row and its copies are picked together, so the start lies a little below the prediction."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(8, 64, generator=generator)
    logits = torch.randn(4000, 64, generator=generator) @ adamoe.copy_null_rows(weight, num_null, generator=generator).T
    load = (adamoe.route(logits, 8, top_k)[0] >= 0).double().sum(-1).mean()
    assert load == pytest.approx(predicted, abs=within)


def test_with_unreachable_nulls_and_plain_gates_it_equals_the_layer_before_patching():
    plain = layer(num_null=0, top_k=2, normalize="none")
    patched = layer(num_null=4, top_k=2, normalize="none")
    patched.load_state_dict({**plain.state_dict(), "router.weight": patched.router.weight.detach()})
    x = torch.rand(20, 6, dtype=F64)
    with torch.no_grad():
        patched.router.weight[:4] = plain.router.weight
        patched.router.weight[4:] = -1e4
    assert torch.equal(plain(x), patched(x))


def test_bad_input_is_refused_with_its_numbers():
    for sizes in [(0, 4, 1), (4, -1, 1), (4, 4, 0), (4, 4, 9)]:
        with pytest.raises(ValueError, match=f"num_experts is {sizes[0]}, num_null {sizes[1]}, top_k {sizes[2]}"):
            adamoe.AdaMoE(8, 8, *sizes)
    with pytest.raises(ValueError, match="width 5.*d_model = 6"):
        layer()(torch.zeros(3, 5, dtype=F64))
    with pytest.raises(ValueError, match="NaN or infinity"):
        adamoe.route(logits_of([math.nan, 0, 0]), 2, 1)
    with pytest.raises(ValueError, match="normalize is 'softly'"):
        adamoe.route(logits_of([1, 0, 0]), 2, 1, "softly")


def test_layer_survives_deepcopy_autocast_and_zero_tokens():
    module, x = adamoe.AdaMoE(8, 8, 4, 4, 3), torch.randn(2, 10, 8)
    module(x)
    in_fp32 = module.aux_loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert module(x).dtype == torch.bfloat16
    assert torch.equal(module.aux_loss, in_fp32)  # routing stays in full precision
    module.aux_loss = None
    copy.deepcopy(module)
    assert module(torch.zeros(0, 8)).shape == (0, 8) and module.aux_loss.item() == 0


SAME_LOSSES = """
import torch, common, adamoe
from dataclasses import replace
config = replace(adamoe.SMALL, num_layers=1, d_model=16, d_ff=24, num_heads=2, context=16, batch_size=2)
data, losses = torch.arange(4096).mul(7).remainder(251).to(torch.uint8), {}
for backend in ("torch", "triton"):
    generator = torch.Generator().manual_seed(0)
    model = adamoe.build(config, adamoe.Arm(8, 3), generator)
    for ffn in model.ffns():
        ffn.backend = backend
    losses[backend] = []
    for step in range(3):
        adamoe.train_text(model, data, config, 1, 1e-2, (0.02, 1e-4), step, {})
        window = data[None, :17].long()
        losses[backend].append(common.lm_loss(model, window).mean().item())
print(losses)
assert torch.allclose(*map(torch.tensor, losses.values()), atol=1e-5, rtol=0)
assert losses["torch"][0] != losses["torch"][2]
"""


def test_training_gives_the_same_losses_through_the_triton_kernels():
    """The kernels run in triton's interpreter, on the CPU."""
    pytest.importorskip("triton", minversion="3.7", reason="older interpreters do not run with NumPy 2.4")
    command = [sys.executable, "-c", SAME_LOSSES]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


# --- controls ------------------------------------------------------------------------------------------------


def test_route_counts_gives_each_token_its_best_experts():
    logits = logits_of([3, 1, 2, 9], [3, 1, 2, 9], [3, 1, 2, 9])
    index, gates = adamoe.route_counts(logits, num_experts=3, counts=torch.tensor([0, 1, 2]))
    assert index.tolist() == [[-1, -1], [0, -1], [0, 2]]
    torch.testing.assert_close(gates.double()[2], logits[2, [0, 2]].softmax(-1), atol=1e-6, rtol=0)
    assert gates[0].tolist() == [0, 0]


def test_counts_of_the_controls():
    generator = torch.Generator().manual_seed(0)
    counts = torch.tensor([0, 1, 2, 3] * 50)
    one, other = (adamoe.shuffle_counts(counts, generator) for _ in range(2))
    assert torch.equal(one.sort().values, counts.sort().values) and not torch.equal(one, other)
    drawn = adamoe.random_counts(counts, 1.25, generator)
    assert set(drawn.tolist()) == {1, 2} and drawn.double().mean() == pytest.approx(1.25, abs=0.1)
    logits = torch.tensor([[0.5, 0.3, 0.2]]).log()
    assert [int(adamoe.top_p_counts(logits, 3, p)) for p in (0.4, 0.6, 0.9, 1.5)] == [1, 2, 3, 3]


def test_shuffled_counts_keep_the_load_of_every_layer():
    generator = torch.Generator().manual_seed(0)
    model, windows = tiny_model()
    own = adamoe.evaluate(model, windows)
    shuffled = adamoe.evaluate(model, windows, lambda counts: adamoe.shuffle_counts(counts, generator))
    assert own["load_by_layer"] == shuffled["load_by_layer"] and own["loss"] != shuffled["loss"]
    assert adamoe.evaluate(model, windows) == own  # nothing dictated stays behind


def test_own_counts_dictated_change_nothing():
    """So what shuffling costs is the placement alone."""
    model, windows = tiny_model()
    assert adamoe.evaluate(model, windows, lambda counts: counts)["loss"] == adamoe.evaluate(model, windows)["loss"]


# --- the experiment ------------------------------------------------------------------------------------------


def tiny_model(arm=None):
    generator = torch.Generator().manual_seed(0)
    return adamoe.build(TINY, arm or adamoe.Arm(8, 3), generator), torch.randint(256, (32, 17), generator=generator)


TINY = replace(adamoe.SMALL, num_layers=1, d_model=16, d_ff=16, num_heads=2, context=16, pretrain_steps=2, steps=2)


def test_arms_are_what_their_names_say():
    arms = adamoe.trained_arms(adamoe.SMALL, ablate=True)
    assert list(adamoe.trained_arms(adamoe.SMALL, ablate=False)) == ["top1", "top2", "adamoe"]
    assert arms["top1"] == adamoe.Arm(0, 1) and arms["top2"] == adamoe.Arm(0, 2)
    own = adamoe.Arm(8, 3)
    assert arms["adamoe"] == own and arms["k+1"] == replace(own, top_k=4) and arms["k-1"] == replace(own, top_k=2)
    assert arms["all_picks"] == replace(own, normalize="all_picks")
    assert arms["l_bal"] == replace(own, average_nulls=False)
    assert arms["random_nulls"] == replace(own, copy_rows=False)
    grid = {name: arm for name, arm in arms.items() if "@" in name}
    assert len(grid) == 3 * (len(adamoe.LR_GRID) - 1) and adamoe.SMALL.lr in adamoe.LR_GRID
    assert grid["top2@0.004"] == replace(arms["top2"], lr=0.004)
    ffn = tiny_model(arms["l_bal"])[0].ffns()[0]
    assert (ffn.num_null, ffn.top_k, ffn.average_nulls) == (8, 3, False)


def test_training_reads_training_text_only_follows_alpha_and_starts_from_the_base(tmp_path, monkeypatch):
    run = common.Run("adamoe", "small", "cpu", torch.float32, [0], tmp_path, config=TINY)
    (tmp_path / "arms").mkdir()
    seen, alphas, starts, sample = [], [], {}, adamoe.text_data.sample_windows
    monkeypatch.setattr(
        adamoe.text_data, "sample_windows", lambda data, *rest: (seen.append(data), sample(data, *rest))[1]
    )
    balance = adamoe.load_balancing_loss
    monkeypatch.setattr(
        adamoe,
        "load_balancing_loss",
        lambda z, n, k, alpha, *rest: (alphas.append(alpha), balance(z, n, k, alpha, *rest))[1],
    )
    adamoe.pretrain_base(TINY, "base", 0, run)
    assert set(alphas[:2]) == {TINY.alpha_pretrain}
    train = common.train

    def remember(model, *rest, **options):
        starts[options["label"]] = {name: value.clone() for name, value in model.state_dict().items()}
        return train(model, *rest, **options)

    monkeypatch.setattr(common, "train", remember)
    for arm in ("adamoe", "random_nulls", "top1"):
        alphas.clear()
        adamoe.finetune_arm(TINY, arm, 0, run)
        assert alphas[:2] == [TINY.alpha, TINY.alpha_late]
    texts = [adamoe.text_data.load_domain(name).train for name in ("python", "docs")]
    assert all(any(data.equal(text) for text in texts) for data in seen)
    base, key = common.load(tmp_path / "arms" / "base-seed0.pt"), "blocks.0.ffn.router.weight"
    for label, start in starts.items():
        assert all(torch.equal(start[name], base[name]) for name in base if name != key)
        assert torch.equal(start[key][:8], base[key])
        near = label.startswith("adamoe")
        if not label.startswith("top1"):
            assert torch.allclose(start[key][8:], base[key], rtol=0.1, atol=0.01) is near


def test_top_p_threshold_meets_the_load(tmp_path):
    run = common.Run("adamoe", "small", "cpu", torch.float32, [0], tmp_path, config=TINY)
    (tmp_path / "arms").mkdir()
    model, _ = tiny_model(adamoe.Arm(0, 2))
    common.save(run.path("top2", 0, ".pt"), model.state_dict())
    for load in (1.4, 2.6):
        common.write_json(run.path("adamoe", 0, ".json"), {"result": {"load": load}})
        assert adamoe.control_arm(TINY, "top_p", 0, run)["load"] == pytest.approx(load, abs=0.15)
        assert adamoe.control_arm(TINY, "random_k", 0, run)["load"] == pytest.approx(load, abs=0.05)


def measured(loss, load, **more):
    blocks = [loss - 0.001, loss + 0.001]
    exact = {"rows": 5.0, "true_picks": 5, "leak": 0.0, "expert_flops": load, "model_flops": 3 + load}
    return {"loss": loss, "load": load, "loss_blocks": blocks, "histogram": [0.5, 0.5], **exact, **more}


GOOD = {
    "top1": measured(2.0, 1.0),
    "top2": measured(1.0, 2.0),
    "adamoe": measured(0.9, 1.5),
    "shuffled": measured(1.2, 1.5),
    "all_picks": measured(1.0, 1.5),
    "l_bal": measured(1.0, 1.5),
    "random_nulls": measured(1.0, 1.5),
}
WORSE = {  # claim -> what has to change for it to fail
    "load": {"adamoe": measured(0.9, 1.7)},
    "flops": {"adamoe": measured(0.9, 1.5, expert_flops=2.1)},
    "quality": {"adamoe": measured(1.6, 1.5)},
    "adaptive": {"shuffled": measured(0.8, 1.5)},
    "null_free": {"adamoe": measured(0.9, 1.5, rows=6.0)},
    "causal": {"adamoe": measured(0.9, 1.5, leak=1e-3)},
    "beats_top2": {"top2": measured(0.8, 2.0)},
    "true_norm": {"all_picks": measured(0.8, 1.5)},
    "copy_init": {"random_nulls": measured(0.8, 1.5)},
    "null_loss": {"l_bal": measured(0.8, 1.5)},
}


@pytest.mark.parametrize("num_seeds", [1, 3])
def test_every_claim_can_hold_and_can_fail(num_seeds, tmp_path):
    def judged(changes):
        claims = [replace(claim) for claim in adamoe.CLAIMS]
        run = common.Run("adamoe", "small", "cpu", torch.float32, [0] * num_seeds, tmp_path, ablate=True, claims=claims)
        adamoe.judge(adamoe.SMALL, run, {arm: [result] * num_seeds for arm, result in (GOOD | changes).items()})
        return {claim.id.removeprefix("adamoe."): claim for claim in claims if ".full_" not in claim.id}

    good = judged({})
    assert set(good) == set(WORSE) and all(claim.holds for claim in good.values())
    assert good["quality"].measured.startswith("0.6000")  # 2 + 0.5 * (1 - 2) - 0.9
    for id, changes in WORSE.items():
        assert judged(changes)[id].holds is False, id
    assert judged({"adamoe": measured(0.9, 1.5, histogram=[0.0, 1.0])})["adaptive"].holds is False


# --- the script ----------------------------------------------------------------------------------------------


def results_of(folder):
    return json.loads((folder / "results.json").read_text())


def test_batches_of_evaluation_hold_as_many_tokens_whatever_the_context():
    for context, sizes in ((128, [32, 32, 16]), (32, [80]), (1000, [4] * 20), (9000, [1] * 80)):
        windows = torch.arange(80)[:, None].expand(80, context + 1)
        parts = adamoe.in_batches(windows)
        assert [len(part) for part in parts] == sizes and torch.equal(torch.cat(parts), windows)


def test_script_end_to_end_with_every_arm(command_line, tmp_path):
    done = command_line(adamoe, *ADAMOE, "--ablate", "--workers", 1, "--out", "out")
    assert done.returncode == 0, done.stderr
    report = results_of(tmp_path / "out")
    assert [claim["id"] for claim in report["claims"]] == [claim.id for claim in adamoe.CLAIMS]
    full = [claim for claim in report["claims"] if ".full_" in claim["id"]]
    assert len(full) == 3 and all("run --full" in claim["measured"] for claim in full)
    assert all(claim["verdict"] != "not measured" for claim in report["claims"] if claim not in full)
    exact = {claim["id"]: claim["verdict"] for claim in report["claims"]}
    assert exact["adamoe.null_free"] == exact["adamoe.causal"] == "passed"
    assert {"top1", "top2", "adamoe", "shuffled", "random_k", "top_p", "l_bal"} <= set(report["results"]["arms"])
    metrics = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert {"arm", "step", "loss", "load"} <= set(metrics[0])


@pytest.mark.parametrize(
    "flags, expected",
    [
        (["--num-nul", "4"], "--num-null"),
        (["--top-k", "many"], "--top-k"),
        (["--top-k", "17"], "top_k 17"),
        (["--load", "1", "--num-null", "3"], "not both"),
        (["--load", "1e-9"], "at most 4096"),
        (["--num-experts", "1"], "at least 2"),
        (["--init", "-1"], "init -1"),
        (["--load", "9"], "load is 9"),
        (["--steps", "0"], "steps is 0"),
        (["--text", "no/such/file"], "no such file"),
        (["--text", "EMPTY"], "no text"),
        (["--text", "SHORT"], "too short"),
        (["--out", "EMPTY/out"], "cannot be written"),
        (["--seeds", "0"], "--seeds is 0"),
        (["--resume"], "no run in"),
        (["--d-model", "30", "--num-heads", "4"], "num_heads 4"),
    ],
)
def test_mistakes_are_one_line_exit_code_2_and_leave_nothing(command_line, tmp_path, flags, expected):
    (tmp_path / "EMPTY").write_bytes(b"")
    (tmp_path / "SHORT").write_bytes(b"hello world\n" * 9)
    done = command_line(adamoe, *flags)
    assert done.returncode == 2 and expected in done.stderr and done.stderr.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["EMPTY", "SHORT"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_gpu_is_one_line(command_line):
    done = command_line(adamoe, "--device", "cuda")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "--device cpu" in done.stderr


def test_diverging_training_is_one_line_and_exit_code_1(command_line):
    done = command_line(adamoe, *ADAMOE, "--pretrain-lr", "1e30", "--workers", "1")
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "at step" in done.stderr and "lower --lr" in done.stderr


def test_own_text_and_load_budget(command_line, tmp_path):
    (tmp_path / "mine").mkdir()
    for i in range(30):
        (tmp_path / "mine" / f"{i}.txt").write_text(f"chapter {i}. " + "to be or not to be " * 60)
    done = command_line(adamoe, *ADAMOE, "--text", "mine", "--load", "1.2", "--workers", 1)
    assert done.returncode == 0, done.stderr
    assert "load 1.2: 12 nulls, predicted load 1.200" in done.stdout
    report = results_of(tmp_path / "runs" / "adamoe-small")
    assert "mine" in report["data"] and report["config"]["num_null"] == 12
    (tmp_path / "mine" / "0.txt").write_text("another chapter. " + "all the world is a stage " * 60)
    again = command_line(adamoe, *ADAMOE, "--text", "mine", "--load", "1.2", "--workers", 1, "--resume")
    assert again.returncode == 2 and "was run with data" in again.stderr
