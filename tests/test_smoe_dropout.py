"""SMoE-Dropout: the numbers of the hand-worked examples, and what the method promises."""

import json
import math
import re
from collections import Counter
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from conftest import ROOT, check_claims, judged, report
from tiny import SMOE_DROPOUT

import common
import smoe_dropout as smoe

F64 = torch.float64
TINY = replace(
    smoe.SMALL, num_layers=1, d_model=16, d_ff=16, num_experts=4, k_min=2, num_heads=2, context=16,
    batch_size=4, steps=4, eval_bytes=512,
)  # fmt: skip


def tensor(*rows):
    return torch.tensor(rows, dtype=F64)


def layer(num_experts=4, d_model=6, d_ff=8, seed=0, router_init=1.0, init=0.5, **options):
    """In float64, with biases that are not 0."""
    generator = torch.Generator().manual_seed(seed)
    sizes = {"init": init, "router_init": router_init, "generator": generator}
    module = smoe.SMoEDropout(d_model, d_ff, num_experts, **sizes, **options).double()
    with torch.no_grad():
        for bias in (module.b1, module.b2):
            bias.copy_(torch.randn(bias.shape, generator=generator))
    return module


def by_hand(module, x):
    """One token, one expert at a time."""
    logits, out = x @ module.router.weight.T, []
    for token, scores in zip(x, logits):
        chosen = scores.topk(module.k).indices
        gates = scores[chosen].exp() / scores[chosen].exp().sum()
        y = 0
        for gate, expert in zip(gates, chosen):
            hidden = torch.relu(token @ module.w1[expert] + module.b1[expert])
            y = y + gate * (hidden @ module.w2[expert] + module.b2[expert])
        out.append(module.scale * y)
    return torch.stack(out)


# --- the gate -------------------------------------------------------------------------------------


def test_the_example_of_the_docstring():
    example = smoe.__doc__.split("In numbers:")[1].split("What does")[0]
    numbers = [list(map(float, part.split(","))) for part in re.findall(r"\[(.*?)\]", example)]
    logits, experts = tensor(*numbers)
    rows = re.findall(r"w at k = (\d) +\|(.*)", example)
    assert [k for k, _ in rows] == ["1", "2", "4"]
    for k, line in rows:
        index, gates = smoe.topk_gate(logits[None], int(k))
        weight = torch.zeros(4, dtype=F64).scatter(0, index[0], gates[0])
        shown = [float(cell or 0) for cell in map(str.strip, line.split("|"))]
        assert shown == pytest.approx([*weight.tolist(), float(weight @ experts)], abs=0.005)


def test_gates_are_a_mean_and_the_choice_only_grows_with_k():
    logits, previous = torch.randn(50, 8, dtype=F64), set()
    for k in range(1, 9):
        index, gates = smoe.topk_gate(logits, k)
        assert (gates > 0).all() and torch.allclose(gates.sum(-1), torch.ones(50, dtype=F64))
        chosen = {(t, e) for t, row in enumerate(index.tolist()) for e in row}
        assert len(chosen) == 50 * k and previous < chosen
        previous = chosen
    index, gates = smoe.topk_gate(torch.zeros(5, 8, dtype=F64), 3)  # ties: some three, alike
    assert all(len(set(row)) == 3 for row in index.tolist()) and gates.allclose(tensor(1 / 3))


# --- the layer ------------------------------------------------------------------------------------


def dense_of(d_model=6, d_ff=8):
    generator = torch.Generator().manual_seed(0)
    shapes = ((d_model, d_ff), (d_ff,), (d_ff, d_model), (d_model,))
    return [torch.randn(shape, generator=generator, dtype=F64) for shape in shapes]


@pytest.mark.parametrize("num_experts", [1, 2, 4, 8])
@pytest.mark.parametrize("has_bias", [True, False])
def test_a_cut_dense_layer_is_the_dense_layer(num_experts, has_bias):
    w1, b1, w2, b2 = dense_of()
    x = torch.randn(30, 6, dtype=F64)
    if not has_bias:
        b1 = b2 = None
    dense = torch.relu(x @ w1 + (b1 if has_bias else 0)) @ w2 + (b2 if has_bias else 0)
    first, bias, second, out = smoe.split_dense(w1, b1, w2, b2, num_experts)
    summed = ((x @ first + bias[:, None]).relu() @ second + out[:, None]).sum(0)
    torch.testing.assert_close(summed, dense, atol=1e-12, rtol=0)
    for scale, share in ((num_experts, 1.0), (1.0, 1 / num_experts)):
        module = layer(num_experts, router_init=0.0, scale=scale)  # equal gates
        module.load_dense(w1, b1, w2, b2)
        torch.testing.assert_close(module(x), share * dense, atol=1e-12, rtol=0)


def test_what_cannot_be_cut_built_or_routed_is_refused():
    w1, b1, w2, b2 = dense_of()
    transposed = r"w1 is \[8, 6\], w2 \[6, 8\]; \[6, 8\] .* transposed"
    not_finite = r"router_logits \[1, 3\] hold NaN or infinity"
    for function, *arguments, told in [
        (smoe.split_dense, w1, b1, w2, b2, 3, "d_ff is 8, num_experts 3"),
        (layer, 3, "d_ff is 8, num_experts 3"),
        (smoe.DenseFFN, 6, 8, 3, "d_ff is 8, num_experts 3"),
        (layer().load_dense, w1.T, b1, w2.T, b2, transposed),
        (partial(layer, act="mish"), "act is 'mish'; allowed: relu, .*gelu_new"),
        (partial(layer, router="random"), "router is 'random'"),
        (layer(), torch.zeros(2, 5, dtype=F64), "width 5.*d_model = 6"),
        (layer(), torch.full((2, 6), math.nan, dtype=F64), "NaN"),
        (smoe.topk_gate, tensor([math.nan, 0, 0]), 2, not_finite),
        (smoe.topk_gate, tensor([math.inf, 0, 0]), 2, not_finite),
        (smoe.k_at, 0, 10, 9, 8, "k_min is"),
        (smoe.k_at, 0, 10, 0, 8, "k_min is"),
        (smoe.k_at, 0, 0, 4, 8, "k_min is"),
        (smoe.k_at, 0, 10, 4, 8, "stairs", "schedule is 'stairs'"),
    ]:
        with pytest.raises(ValueError, match=told):
            function(*arguments)


@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("case", ["even", "idle expert"])
def test_both_forms_equal_a_loop_forward_and_backward(k, case):
    x, found = torch.randn(37, 6, dtype=F64), []
    for backend in ("masked", "torch", None):
        module = layer(k=k, router="learned", scale=3.0, backend=backend)
        if case == "idle expert":
            with torch.no_grad():
                module.router.weight.copy_(torch.ones(4, 6) * tensor([3.0], [2.0], [1.0], [-50.0]))
            x = x.abs()
        inputs = x.clone().requires_grad_()
        y = by_hand(module, inputs) if backend is None else module(inputs)
        gradients = torch.autograd.grad(
            y.square().sum(), [inputs, *module.parameters()], materialize_grads=True
        )
        found.append([y, *gradients])
    for masked, dispatched, reference in zip(*found):
        torch.testing.assert_close(masked, reference, atol=1e-10, rtol=1e-10)
        torch.testing.assert_close(dispatched, reference, atol=1e-10, rtol=1e-10)


def test_the_gradient_passes_the_frozen_router():
    """The two sums of the docstring: through the experts, and through the gate into x."""
    x = torch.randn(1, 6, dtype=F64, requires_grad=True)
    for k in (1, 3):
        module = layer(k=k)
        (wanted,) = torch.autograd.grad(module(x)[0, 0], x)
        outputs = module.expert_outputs(x) + module.b2[:, None]  # [experts, 1, d_model]
        index, gates = smoe.topk_gate(module.router(x), k)
        y, first, second = module(x)[0, 0], 0, 0
        for gate, expert in zip(gates[0], index[0]):
            (slope,) = torch.autograd.grad(outputs[expert, 0, 0], x, retain_graph=True)
            first = first + gate * slope
            second = second + gate * (outputs[expert, 0, 0] - y) * module.router.weight[expert]
        torch.testing.assert_close(wanted, first + second)
        assert bool(second.abs().max() > 1e-6) is (k > 1)


@pytest.mark.parametrize("backend", ["masked", "torch"])
def test_dropout_acts_in_training_only(backend):
    module, x = layer(dropout=0.5, backend=backend), torch.ones(400, 6, dtype=F64)
    zeros = (module(x) == 0).double().mean()
    assert 0.4 < zeros < 0.6 and not torch.equal(module(x), module(x))
    module.eval()
    torch.testing.assert_close(module(x), layer()(x))


@pytest.mark.parametrize("router", ["frozen", "learned"])
def test_only_a_learned_router_is_trained(router):
    module, x = layer(router=router, k=2).float(), torch.randn(20, 6)
    before = module.router.weight.clone()
    optimizer = smoe.adam(module, 0.1, TINY)
    for _ in range(3):
        module(x).square().sum().backward()
        optimizer.step()
    assert torch.equal(module.router.weight, before) is (router == "frozen")
    assert (module.router.weight.grad is None) is (router == "frozen")
    fresh = layer(router=router, k=2, seed=9).float()
    fresh.load_state_dict(module.state_dict())  # the router is part of it
    assert torch.equal(fresh(x), module(x)) and torch.equal(fresh.expert_index, module.expert_index)


# --- k --------------------------------------------------------------------------------------------


def test_linear_schedule_numbers():
    steps = (0, 25_000, 25_001, 74_999, 75_000, 200_000, 374_999, 375_000)
    assert [smoe.k_at(step, 400_000, 8, 16) for step in steps] == [8, 8, 9, 9, 10, 12, 15, 16]
    short = "".join(str(smoe.k_at(step, 16, 4, 8)) for step in range(16))
    assert short == "4445556666677788"
    drawn = Counter(smoe.k_at(step, 1, 4, 8, "random") for step in range(5000))
    assert set(drawn) == {4, 5, 6, 7, 8} and min(drawn.values()) > 850


def official_k(step, steps, low, high, schedule):
    """As the official code has it."""
    if schedule == "linear":
        k = round((high - low) * step / steps) + low
    elif schedule == "cosine":
        k = round((low - high) * math.cos(math.pi * step / (2 * steps))) + high
    else:
        k = round((low - high) * 0.99 ** (step // (steps // 300))) + high
    return min(max(k, low), high)


@pytest.mark.parametrize("schedule, differ", [("linear", 0), ("cosine", 0), ("exponential", 258)])
def test_schedules_beside_the_official_ones(schedule, differ):
    different = 0
    for step in range(1000):
        official = official_k(step, 1000, 8, 16, schedule)
        different += smoe.k_at(step, 1000, 8, 16, schedule) != official
    assert different == differ and (not differ or f"{differ} of 1000 differ" in smoe.__doc__)
    for total in (1, 7, 299, 1000):
        ks = [smoe.k_at(step, total, 3, 8, schedule) for step in range(total + 1)]
        assert ks == sorted(ks) and set(ks) <= set(range(3, 9))
    middle = {"linear": 12, "cosine": 10, "exponential": 14}
    assert smoe.k_at(200_000, 400_000, 8, 16, schedule) == middle[schedule]


def test_k_is_any_whole_number_in_range():
    module = layer()
    for k in (np.int64(3), np.int32(3), torch.tensor(3), 3):
        module.set_k(k)
        assert type(module.k) is int and module.k == 3
    for k in (0, 5, 2.5, -1, True, "2", np.float64(2), torch.tensor(2.5), None):
        with pytest.raises(ValueError, match="whole number from 1 to num_experts = 4"):
            module.set_k(k)
        with pytest.raises(ValueError, match="whole number"):
            smoe.topk_gate(torch.zeros(1, 4), k)


def test_set_k_reaches_every_layer_and_changes_no_weight():
    model = build("smoe_dropout", num_layers=2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    bits = {}
    for k in (2, 4, 2):
        found = smoe.evaluate(model, windows(), k)
        assert [ffn.k for ffn in model.ffns()] == [k, k] and bits.setdefault(k, found) == found
    assert bits[2] != bits[4]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# --- measures and baselines -----------------------------------------------------------------------


def test_effective_rank():
    assert smoe.effective_rank(torch.eye(4, dtype=F64)) == pytest.approx(4)
    assert smoe.effective_rank(torch.ones(5, 3, 2)) == pytest.approx(1)
    # singular values 3 and 1: shares 0.9 and 0.1 of the energy, exp(their entropy)
    assert smoe.effective_rank(tensor([3.0, 0], [0, 1.0])) == pytest.approx(0.9**-0.9 * 0.1**-0.1)
    model, batch, inputs = build("smoe_dropout", num_layers=2), windows(16), []
    ranks, second = smoe.expert_ranks(model, batch, TINY), model.ffns()[1]
    second.register_forward_pre_hook(lambda _, given: inputs.append(given[0].flatten(0, -2)))
    model(batch[:, :-1])
    expected = smoe.effective_rank(second.expert_outputs(inputs[0]))
    assert len(ranks) == 2 and ranks[1] == pytest.approx(expected)


def test_balance_loss_worked_example():
    logits = tensor([2, 1, 0, -1], [0, 2, 1, -1])
    loss = smoe.load_balancing_loss(logits, smoe.topk_gate(logits, 2)[0])
    assert float(loss) == pytest.approx(1.4083399357, abs=1e-9)
    uniform = torch.arange(24).view(6, 4) % 4
    assert float(smoe.load_balancing_loss(torch.zeros(6, 4, dtype=F64), uniform)) == 1
    model = build("learned_k2", balance=0.5, num_layers=2)
    loss, values = smoe.text_loss(model, windows(4))
    assert 0.45 < values["aux_loss"] < 2
    assert loss.item() == pytest.approx(values["lm_loss"].item() + values["aux_loss"].item())
    assert layer().aux_loss is None


def test_expert_drop_leaves_out_whole_slices_and_keeps_the_mean():
    module = smoe.DenseFFN(6, 8, 4, expert_drop=0.5, init=0.5).double()
    x = torch.randn(1, 6, dtype=F64)
    with torch.no_grad():
        module.b1.fill_(5.0)  # every slice says something
    whole, slices = module.eval()(x), module.expert_outputs(x)[:, 0]  # [blocks, d_model]
    subsets = []
    for mask in range(16):
        kept = tensor(*[float(mask >> block & 1) for block in range(4)])
        subsets.append(2 * kept @ slices)
    module.train()
    torch.manual_seed(0)
    seen = torch.cat([module(x) for _ in range(3000)])
    assert torch.cdist(seen, torch.stack(subsets)).min(1).values.max() < 1e-6
    assert ((seen.mean(0) - whole[0]).abs() < 4 * seen.std(0) / 3000**0.5).all()


# --- the experiment -------------------------------------------------------------------------------


def build(method, seed=0, **changes):
    return smoe.build(replace(TINY, **changes), method, seed)


def windows(num=32):
    return torch.randint(256, (num, TINY.context + 1), generator=torch.Generator().manual_seed(5))


def job_in(folder, arm, config=TINY, seed=0, **options):
    (folder / "arms").mkdir(exist_ok=True)
    where = ("smoe_dropout", "small", "cpu", torch.float32)
    return common.Job(common.Run(*where, [seed], folder, config, **options), arm, seed)


def test_sizes_of_dense_and_sparse_models():
    def trained(model):
        return sum(p.numel() for p in model.parameters() if p.requires_grad)

    dense, sparse = build("dense"), build("smoe_dropout")
    assert trained(sparse) - trained(dense) == (TINY.num_experts - 1) * TINY.d_model  # biases
    assert common.count_parameters(sparse) - trained(sparse) == TINY.num_experts * TINY.d_model
    expert = 2 * TINY.d_model * TINY.d_ff // TINY.num_experts
    assert common.count_parameters(sparse, 4) - common.count_parameters(sparse, 2) == 2 * expert
    official = replace(smoe.FULL, num_layers=1)
    assert trained(smoe.build(official, "smoe_dropout", 0).ffns()[0]) == 16 * 262_912
    assert trained(smoe.build(official, "dense", 0).ffns()[0]) == 4_202_752
    one, again, other = (build("smoe_dropout", seed, num_layers=2).ffns() for seed in (0, 0, 1))
    assert torch.equal(one[0].router.weight, again[0].router.weight)
    assert not torch.equal(one[0].router.weight, one[1].router.weight)
    assert not torch.equal(one[0].router.weight, other[0].router.weight)


def test_bits_of_a_uniform_model_are_eight_whatever_the_batches():
    model = build("dense")
    with torch.no_grad():
        model.head.weight.zero_()
    assert smoe.evaluate(model, windows(), 4) == pytest.approx(8.0)
    model, batch = build("smoe_dropout"), windows(70)  # batches of 64 and 6
    whole = common.lm_loss(model, batch).double().mean() / math.log(2)
    assert smoe.evaluate(model, batch, 4) == pytest.approx(whole.item(), rel=1e-6)


def test_arms_are_what_their_names_say():
    spans = {"dense": (8, 8), "smoe_dropout": (4, 8), "learned_ramp": (4, 8)}
    spans |= {"learned_k2": (2, 2), "learned_half": (4, 4), "learned_full": (8, 8)}
    spans |= {"frozen_half": (4, 4), "frozen_full": (8, 8)}
    assert {arm: smoe.trained_k(arm, smoe.SMALL) for arm in smoe.ARMS} == spans
    for arm in spans:
        ffn = build(arm, scale=3.0, dropout=0.2, expert_drop=0.5).ffns()[0]
        assert ffn.dropout == 0.2
        if arm == "dense":
            assert ffn.expert_drop == 0.5
        else:
            assert ffn.scale == 3.0 and ffn.router.weight.requires_grad is arm.startswith("learned")
    official = (smoe.FULL.num_experts, smoe.FULL.d_ff, smoe.FULL.k_min, smoe.FULL.scale)
    assert official == (16, 8192, 8, 1.0)


def test_training_follows_the_schedule_and_counts_what_ran(tmp_path, monkeypatch):
    config, used, loss = replace(TINY, steps=8), [], smoe.text_loss

    def watched(model, batch):
        used.append(getattr(model.ffns()[0], "k", None))
        return loss(model, batch)

    monkeypatch.setattr(smoe, "text_loss", watched)
    job = job_in(tmp_path, "smoe_dropout", config)
    result = smoe.train_arm(job)
    planned = [smoe.k_at(step, 8, 2, 4) for step in range(8)]
    assert [line["k"] for line in job.log()] == planned == used[:8]
    start, end = smoe.build(config, "smoe_dropout", 0).state_dict(), common.load(job.path(".pt"))
    for name, value in start.items():
        assert torch.equal(value, end[name]) is name.endswith("router.weight"), name
    expert = 2 * 2 * config.d_model * config.d_ff // config.num_experts  # FLOPs a byte, forward
    num_bytes = config.batch_size * config.context
    assert result["flops_4"] - result["flops_2"] == num_bytes * 3 * 2 * expert
    for unit in ("flops", "seconds"):
        mean = np.mean([result[f"{unit}_{k}"] for k in planned])
        assert result[f"{unit}_growing"] == pytest.approx(mean)
    router = 2 * config.d_model * config.num_experts
    assert result["flops_4"] - result["flops_dense"] == num_bytes * 2 * router  # and into x
    assert result["active_3"] == common.count_parameters(build("smoe_dropout"), 3)
    assert all(0 < result[f"bits_{k}"] < 9 for k in (1, 2, 3, 4))


def test_arms_train_on_the_same_batches_at_their_own_rate(tmp_path, monkeypatch):
    seen = {}

    class Caught(Exception):
        """The arguments of common.train are seen; nothing needs to be trained."""

    def caught(model, loss_fn, steps, *, batches, optimizer, schedule, label, **_):
        seen[label] = (optimizer.param_groups[0]["lr"], schedule(steps - 1), batches(3))
        raise Caught

    monkeypatch.setattr(common, "train", caught)
    for arm, seed in (("dense", 0), ("smoe_dropout@lr=0.003", 0), ("smoe_dropout", 1)):
        with pytest.raises(Caught):
            smoe.train_arm(job_in(tmp_path, arm, replace(TINY, lr_final=0.25), seed))
    rates, ends, batches = zip(*seen.values())
    assert rates == (6e-3, 3e-3, 6e-3) and ends == pytest.approx([0.25] * 3)
    assert torch.equal(batches[0], batches[1]) and not torch.equal(batches[0], batches[2])


def test_settings_are_chosen_on_other_text_than_results_are_reported_on():
    text = torch.arange(250, dtype=torch.uint8)
    corpus = smoe.text_data.Corpus("counted", text[:50], text[50:], "", 1)
    to_choose, to_report = smoe.held_out(corpus, replace(TINY, eval_bytes=10_000))
    assert to_choose.max() < 150 <= to_report.min()
    assert to_choose.shape == to_report.shape == (6, 17)


def test_enwik8_is_split_as_published(tmp_path, monkeypatch):
    """A sparse file stands in: 90 million bytes train, the last 5 are reported."""
    monkeypatch.setattr(smoe.download, "fetch", lambda name, root: tmp_path)
    with open(tmp_path / "enwik8", "wb") as file:
        file.seek(95_000_000)
        file.write(b"test")
        file.truncate(100_000_000)
    run = common.Run("smoe_dropout", "full", "cpu", torch.float32, [0], tmp_path)
    corpus = smoe.load_corpus(smoe.FULL, run)
    assert len(corpus.train) == 90_000_000 and "a1fa5ffddb56" in corpus.digest
    _, to_report = smoe.held_out(corpus, smoe.FULL)
    assert bytes(to_report[0, :4].tolist()) == b"test" and len(to_report) == 9765


# --- fine-tuning ----------------------------------------------------------------------------------

PROBLEM = "ann has number0 pens and {} number1 . how many ?,{} {},{} number0 number1,{}.0\n"
THINGS = dict(zip("ABCDE", ("tree", "sky", "sea", "car", "hat")))
CHOICES = [{"label": label, "text": text} for label, text in THINGS.items()]


@pytest.fixture
def task_folder(tmp_path):
    math_rows = ["Question,Numbers,Equation,Answer\n"]
    for i in range(40):
        first, second = i + 5, i % 4 + 1
        row = ("loses", first, second, "-", first - second)
        if i % 2:
            row = ("buys", first, second, "+", first + second)
        math_rows.append(PROBLEM.format(*row))
    questions = []
    for i in range(20):
        question = {"stem": f"where {i}?", "choices": CHOICES}
        questions.append(json.dumps({"answerKey": "ABCDE"[i % 5], "question": question}) + "\n")
    for split in ("train", "dev"):
        files = {f"csqa/{split}_rand_split.jsonl": questions}
        files[f"svamp/mawps-asdiv-a_svamp/{split}.csv"] = math_rows
        files[f"svamp/cv_mawps/fold1/{split}.csv"] = math_rows[:21]
        for name, lines in files.items():
            path = tmp_path / "data" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(lines))
    return tmp_path / "data"


def test_fine_tuning_starts_from_the_arm_keeps_k_and_the_router_and_learns(tmp_path, task_folder):
    config = replace(TINY, task_steps=150, task_lr=1e-2, task_bytes=48)
    source = job_in(tmp_path, "smoe_dropout@d_ff=32", config, data_dir=task_folder)
    smoe.train_arm(source)
    base = common.load(source.path(".pt"))
    job = source.other("smoe_dropout@d_ff=32,task=svamp,task_k=3")
    started = smoe.finetuning_task(job)
    body = started.model.body.state_dict()
    assert all(torch.equal(value, base[name]) for name, value in body.items())
    found = smoe.train_arm(job)
    assert found == {"accuracy": pytest.approx(100, abs=10), "examples": 40}
    (ffn,) = smoe.rebuild(job, common.load(job.path(".pt"))).body.ffns()
    assert torch.equal(ffn.router.weight, base["blocks.0.ffn.router.weight"])
    assert not torch.equal(ffn.w1, base["blocks.0.ffn.w1"])
    assert {line["k"] for line in job.log()} == {3} == {ffn.k} and started.k == (3, 3)


def test_a_seed_sees_a_fold_of_its_own(tmp_path, task_folder):
    run = job_in(tmp_path, "dense", data_dir=task_folder).run
    config = replace(TINY, task="mawps", task_bytes=48)
    rows, classes, _, right = smoe.load_examples(config, 6, run)  # fold 1
    assert rows.shape == (20, 1, 48) and right.shape == (20, 2)
    assert right.double().argmax(1).equal(classes)
    rows, classes, _, right = smoe.load_examples(replace(config, task="csqa"), 6, run)
    assert rows.shape == (20, 5, 48) and bytes(rows[7, 2].tolist()).endswith(b"\nwhere 7? sea")
    assert classes[7] == 2 and right[7].tolist() == [False, False, True, False, False]


# --- claims ---------------------------------------------------------------------------------------


def trained(*bits, rank=3.0, **more):
    """bits: at k = 1, 2, 3, 4, or one number for a dense model."""
    ks = range(5 - len(bits), 5)
    return {**{f"bits_{k}": at_k for k, at_k in zip(ks, bits)}, "rank": rank, **more}


WORK = {"flops_growing": 8.0, "flops_4": 11.0, "flops_dense": 10.0}
WORK |= {"seconds_growing": 0.9, "seconds_dense": 1.0}


def method(*bits, **more):
    return trained(*bits, **{"rank": 3.5, **WORK, **more})


GOOD = {
    "dense": trained(2.3),
    "smoe_dropout": method(2.6, 2.4, 2.3, 2.2),
    "learned_k2": trained(2.5, 2.3, 2.35, 2.4),
    "learned_half": trained(2.5, 2.3, 2.35, 2.32, rank=3.2),
    "learned_ramp": trained(2.6, 2.43, 2.3, 2.25),
    "frozen_full": trained(2.6, 2.45, 2.3, 2.24),
}


for name in ("asdiv-a", "mawps", "svamp"):
    GOOD[f"dense@task={name}"] = {"accuracy": 50.0}
    GOOD[f"smoe_dropout@task={name}"] = {"accuracy": 52.0}
WORSE = {  # claim: what has to change for it to fail
    "slimmable": [{"smoe_dropout": {"bits_4": 2.41}}],
    "learned_overfits": [{"learned_half": {"bits_4": 2.29}}],
    "learned_overfits_two": [{"learned_k2": {"bits_4": 2.29}}],
    "beats_dense": [{"dense": {"bits_4": 2.1}}],
    "step_time": [{"smoe_dropout": {"seconds_growing": 1.1}}],
    "less_collapse": [{"learned_half": {"rank": 3.6}}],
    "router_matters": [{"learned_ramp": {"bits_2": 2.39, "bits_4": 2.3}}],
    "growth_matters": [{"frozen_full": {"bits_2": 2.5, "bits_4": 2.1}}],
    "transfer": [{"smoe_dropout@task=mawps": {"accuracy": 49.0}}],
    "compute": [{"smoe_dropout": {"flops_growing": 12.0}}],
}


def test_every_claim_can_hold_and_can_fail():
    holding = check_claims(smoe, TINY, GOOD, WORSE)
    gained = "line 0.2000, start to end 0.2000; by step 2-3 0.1000, 3-4 0.1000"
    assert gained in holding["slimmable"].measured
    assert holding["compute"].measured.startswith("20.0 % of training FLOPs saved")
    assert "+10.0 %" in holding["compute"].measured
    bent = GOOD | {"smoe_dropout": method(2.6, 2.4, 2.1, 2.39)}  # its last step is bad
    claim = judged(smoe, TINY, bent)["slimmable"]
    assert claim.verdict == "holds" and claim.margins == pytest.approx([0.01] * 3)
    assert "3-4 -0.2900" in claim.measured


def test_a_control_of_fewer_seeds_is_compared_on_those(command_line, tmp_path, monkeypatch):
    monkeypatch.setattr(smoe, "CONTROL_SEEDS", 1)
    flags = "--arms dense,frozen_full --seeds 2 --workers 1 --out out".split()
    assert command_line(smoe, *SMOE_DROPOUT, *flags).returncode == 0
    arms = report(tmp_path / "out")["results"]["arms"]
    assert {arm: len(found) for arm, found in arms.items()} == {"dense": 2, "frozen_full": 1}
    results = common.Results({arm: [found] * 3 for arm, found in GOOD.items()})
    results["smoe_dropout"] = [trained(2.6, 2.4 + i, 2.3, 2.2 + i) for i in range(3)]
    results["learned_ramp"] = [trained(2.6, 2.43 + i, 2.3, 2.25 + i) for i in range(2)]
    margin = smoe.router_matters(results, TINY)
    assert list(margin.values) == pytest.approx([0.03, 0.03]) and "(2 seeds)" in margin.text


# --- the script -----------------------------------------------------------------------------------


def test_the_script_with_every_arm(tiny_run, command_line):
    done = tiny_run(smoe)
    words = {claim["id"].partition(".")[2]: claim["verdict"] for claim in done.report["claims"]}
    assert [name for name, word in words.items() if word == "not measured"] == ["transfer"]
    assert set(done.arms) == {*smoe.DEFAULT, *smoe.CONTROLS}
    tables = {table["title"].split(";")[0]: table for table in done.report["results"]["tables"]}
    costs = [row[0] for row in tables["what a training step costs"]["rows"]]
    assert costs == ["dense", "k = 2", "k = 3", "k = 4"]
    sample = tables["the trained model goes on with 'def '"]
    assert [title.strip() for title in sample["header"]] == ["", "k = 1", "k = 2", "k = 4"]
    assert all(cell.startswith("def ") for cell in sample["rows"][0][1:])
    # asked again, the finished run writes on, always the same
    flags = [*SMOE_DROPOUT, "--out", done.folder, "--sample", "class Ä"]
    once, again = command_line(smoe, *flags), command_line(smoe, *flags)
    assert once.returncode == 0 and "class ?" in once.stdout and once.stdout == again.stdout
    other = command_line(smoe, *flags, "--seed", 7)
    told = "smoe_dropout-seed7.pt: no such weights; there are dense-seed0.pt"
    assert other.returncode == 2 and told in other.stderr


def test_full_scale_runs_on_a_file_and_is_fine_tuned_on_tasks(command_line, tmp_path, task_folder):
    """The official configuration but for sizes, dropout included; its last arm is resumed."""
    lines = [f"<page> {i} the quick brown fox [[{i * i}]] </page>\n" for i in range(4000)]
    (tmp_path / "slice").write_text("".join(lines))
    flags = ["--full", *SMOE_DROPOUT, "--dropout", 0.1, "--text", "slice", "--out", "out"]
    flags += ["--tasks", "svamp,csqa", "--data-dir", task_folder, "--task-steps", 2]
    flags += ["--task-bytes", 32, "--workers", 1, "--threads", 1]
    assert command_line(smoe, *flags).returncode == 0
    before = report(tmp_path / "out")
    assert before["config"]["scale"] == 1.0 and "slice" in before["data"]
    arms = before["results"]["arms"]
    assert "dense@task=csqa" in arms and "frozen_full@task=csqa" not in arms
    tables = {table["title"].split(";")[0]: table for table in before["results"]["tables"]}
    right = tables["% right"]
    assert right["header"] == ["", "k = 2", "k = 3", "k = 4"] and len(right["rows"]) == 6
    assert right["rows"][0][:3] == ["dense@task=svamp", "", ""] and all(right["rows"][1])
    for path in (tmp_path / "out" / "arms").glob("learned_half*"):
        path.unlink()
    assert command_line(smoe, *flags, "--resume").returncode == 0
    assert report(tmp_path / "out")["results"]["arms"]["learned_half"] == arms["learned_half"]


# --- in other people's code -----------------------------------------------------------------------


def test_the_page_cuts_a_gpt2():
    transformers = pytest.importorskip("transformers")
    page = (ROOT / "docs" / "smoe_dropout.md").read_text()
    (snippet,) = re.findall(r"```py\n(import transformers.*?)```", page, flags=re.DOTALL)
    torch.manual_seed(0)
    tokens = torch.randint(100, (2, 9))
    config = transformers.GPT2Config(n_layer=2, n_embd=64, n_head=4, vocab_size=100)
    gpt2 = transformers.GPT2LMHeadModel(config).eval()
    before = gpt2(tokens).logits
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformers.GPT2LMHeadModel, "from_pretrained", lambda name: gpt2)
        exec(snippet, {"torch": torch})
    assert len(smoe.moe_layers(gpt2)) == 2 and smoe.moe_layers(gpt2)[0].act == "gelu_new"
    smoe.set_k(gpt2, 8)
    torch.testing.assert_close(gpt2(tokens).logits, before, atol=2e-3, rtol=0)
    smoe.set_k(gpt2, 4)
    assert (gpt2(tokens).logits - before).abs().max() > 1e-2
