"""btm.py: the posterior's arithmetic, averages, the forest on disk, costs that match, and the script in its stages."""

import copy
import json
import math
import os
import pickle
import shutil
import signal
import subprocess
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import same_handlers
from forked import ended, finished, wait_until
from tiny import BTM

import btm
import bridge as common
from data import text as text_data

F64 = torch.float64
TINY = replace(
    btm.SMALL,
    num_layers=1,
    d_model=16,
    num_heads=2,
    context=16,
    steps=4,
    seed_share=0.5,
    branch_steps=2,
    test_blocks=4,
    dev_blocks=3,
)
P = torch.tensor([[0.5, 0.25, 0.5], [0.25, 0.5, 0.125]], dtype=F64).log()[:, None]  # [2 experts, 1 block, 3 tokens]
UNIFORM, SKEWED = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.8, 0.2], dtype=F64).log()


def close(found, expected, atol=1e-12):
    torch.testing.assert_close(
        torch.as_tensor(found, dtype=F64), torch.as_tensor(expected, dtype=F64), atol=atol, rtol=0
    )


def random_logprobs(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64).exp().neg()


# --- the posterior -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prior, first", [(UNIFORM, [1 / 2, 2 / 3, 1 / 2]), (SKEWED, [0.8, 8 / 9, 0.8])])
def test_posterior_of_the_whole_prefix_by_hand(prior, first):
    """The weight at a token knows the tokens before it only: eq. 2, an exclusive sum."""
    nll, weights = btm.ensemble_nll(P, prior)
    close(weights[0, 0], first, 1e-7), close(weights.sum(0), torch.ones(1, 3))
    after = {0.5: 4 / 5, 0.8: 16 / 17}[float(prior.exp()[0].round(decimals=1))]
    longer = torch.cat([P, torch.zeros(2, 1, 1, dtype=F64)], dim=-1)
    close(btm.ensemble_nll(longer, prior)[1][0, 0, 3], after, 1e-7)
    assert nll.dtype == weights.dtype == F64 and weights.shape == (2, 1, 3)


def test_mixture_and_chain_rule_by_hand():
    nll, _ = btm.ensemble_nll(P, UNIFORM.double())
    close(nll.neg().exp()[0], [0.375, 1 / 3, 0.3125])
    close(nll.sum().neg().exp(), 0.0390625)  # = the prior-weighted sum of the sequences' probabilities
    nll, _ = btm.ensemble_nll(P, SKEWED)
    close(nll.neg().exp()[0], [0.45, 5 / 18, 0.425]), close(nll.sum().neg().exp(), 0.053125)


def test_bayesian_identity_and_bound_on_random_experts():
    """prod_t p_t = sum_j prior_j prod_t p_j: never worse than the best expert by more than log(k) in all."""
    for seed in range(20):
        logprobs, prior = random_logprobs(5, 7, 30, seed=seed), torch.rand(5, dtype=F64) + 0.01
        log_prior = (prior / prior.sum()).log()
        nll, _ = btm.ensemble_nll(logprobs, log_prior)
        close(nll.sum(-1), -(log_prior[:, None] + logprobs.sum(-1)).logsumexp(0), 1e-10)
        assert (nll.sum(-1) <= (-logprobs.sum(-1) - log_prior[:, None]).min(0).values + 1e-10).all()


def test_a_token_never_moves_the_weight_it_is_predicted_with():
    logprobs = random_logprobs(4, 3, 12)
    for window in (None, 1, 5):
        _, before = btm.ensemble_nll(logprobs, torch.zeros(4), window)
        changed = logprobs.clone()
        changed[0, :, 6] -= 3.0
        _, after = btm.ensemble_nll(changed, torch.zeros(4), window)
        assert torch.equal(before[..., :7], after[..., :7]) and not torch.allclose(before[..., 7], after[..., 7])
        close(before[..., 0], torch.full((4, 3), 0.25))


def test_windows_by_hand():
    """1 is the released code, 0 a fixed mixture, and T or more the whole prefix."""
    close(btm.ensemble_nll(P, UNIFORM, 1)[1][0, 0], [1 / 2, 2 / 3, 1 / 3], 1e-7)
    close(btm.ensemble_nll(P, SKEWED, 0)[1][0, 0], [0.8] * 3)
    for window in (3, 99):
        close(btm.ensemble_nll(P, SKEWED, window)[1], btm.ensemble_nll(P, SKEWED)[1])
    logprobs, total = random_logprobs(3, 1, 9), torch.zeros(3, dtype=F64)
    _, weights = btm.ensemble_nll(logprobs, torch.zeros(3), 4)
    for t in range(9):
        total = logprobs[:, 0, max(0, t - 4) : t].sum(-1)
        close(weights[:, 0, t], total.softmax(0))


def test_invariances_of_the_posterior():
    logprobs, prior = random_logprobs(3, 2, 8), torch.tensor([0.2, 0.5, 0.3], dtype=F64)
    nll, weights = btm.ensemble_nll(logprobs, prior.log())
    same, at_prior = btm.ensemble_nll(logprobs[:1].expand(3, -1, -1), prior.log())
    close(same, -logprobs[0]), close(at_prior, prior[:, None, None].expand(3, 2, 8))
    close(btm.ensemble_nll(logprobs + 0.7, prior.log())[1], weights)
    order = torch.tensor([2, 0, 1])
    permuted = btm.ensemble_nll(logprobs[order], prior[order].log())
    close(permuted[0], nll), close(permuted[1], weights[order])
    by_block = btm.ensemble_nll(logprobs, prior.log()[:, None].expand(3, 2))  # a prior a block
    close(by_block[0], nll)
    assert torch.equal(
        btm.ensemble_nll(logprobs.float(), prior.log())[0], btm.ensemble_nll(logprobs.float().double(), prior.log())[0]
    )


def test_extreme_evidence_stays_finite_and_excluded_experts_get_exactly_nothing():
    logprobs = torch.full((3, 1, 1024), -1e4)
    logprobs[1] = -0.1
    nll, weights = btm.ensemble_nll(logprobs, torch.tensor([0.0, -1.0, -math.inf]))
    assert torch.isfinite(nll).all() and torch.isfinite(weights).all() and (weights[2] == 0).all()
    close(weights.sum(0), torch.ones(1, 1024)), close(nll[0, -1], 0.1, 1e-6)


def test_impossible_ensembles_are_refused():
    nothing = torch.tensor([-math.inf, -math.inf])
    for prior, text in (
        (nothing, "no mass"),
        (torch.tensor([math.nan, 0.0]), "no mass"),
        (torch.zeros(3), "not .E, N, T."),
    ):
        with pytest.raises(ValueError, match=text):
            btm.ensemble_nll(P, prior)
    with pytest.raises(ValueError, match="window is -1"):
        btm.ensemble_nll(P, UNIFORM, -1)
    with pytest.raises(ValueError, match="NaN or infinity"):
        btm.ensemble_nll(P * math.nan, UNIFORM)


# --- priors --------------------------------------------------------------------------------------------------


def test_smoothing_by_hand():
    posteriors = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8]], dtype=F64)
    for count, expected in ((1, [0.9, 0.1]), (2, [0.81, 0.19]), (3, [0.627, 0.373])):
        close(btm.smoothed(posteriors[:count]), expected)
    with pytest.raises(ValueError, match="no blocks"):
        btm.smoothed(posteriors[:0])


def test_cached_prior_averages_weights_over_positions_and_stops_at_its_blocks():
    logprobs = random_logprobs(3, 6, 10)
    _, weights = btm.ensemble_nll(logprobs, torch.zeros(3))
    close(btm.cached_prior(logprobs), btm.smoothed(weights.mean(-1).T)), close(btm.cached_prior(logprobs).sum(), 1.0)
    close(btm.cached_prior(logprobs, blocks=2), btm.cached_prior(logprobs[:, :2]))
    assert not torch.allclose(btm.cached_prior(logprobs, window=1), btm.cached_prior(logprobs))
    with pytest.raises(ValueError, match="no blocks"):
        btm.cached_prior(logprobs[:, :0])


def test_the_updating_prior_knows_earlier_blocks_only():
    logprobs = random_logprobs(3, 4, 10)
    priors = btm.updating_prior(logprobs)
    close(priors[:, 0], [1 / 3] * 3), close(priors.sum(0), torch.ones(5))
    first = btm.ensemble_nll(logprobs[:, :1], torch.zeros(3))[1].mean((1, 2))
    close(priors[:, 1], first)
    second = btm.ensemble_nll(logprobs[:, 1:2], first.log())[1].mean((1, 2))
    close(priors[:, 2], 0.3 * second + 0.7 * first)
    changed = logprobs.clone()
    changed[:, 2] = -1.0
    assert torch.equal(btm.updating_prior(changed)[:, :3], priors[:, :3])


def test_em_finds_the_mixture_that_made_the_text_and_never_gets_worse():
    generator = torch.Generator().manual_seed(0)
    experts = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.2, 0.7]], dtype=F64)
    truth = torch.tensor([0.8, 0.2], dtype=F64)
    tokens = torch.multinomial(truth @ experts, 20_000, replacement=True, generator=generator)
    logprobs = experts.log()[:, tokens][:, None]
    close(btm.em_prior(logprobs, 200), truth, 0.02)
    losses = [float(btm.ensemble_nll(logprobs, btm.em_prior(logprobs, n).log(), 0)[0].mean()) for n in range(6)]
    assert all(later <= earlier + 1e-12 for earlier, later in zip(losses, losses[1:])) and losses[5] < losses[0]


def test_top_k_by_hand():
    prior = torch.tensor([0.5, 0.1, 0.25, 0.15], dtype=F64)
    close(btm.top_k_prior(prior, 1), [1, 0, 0, 0]), close(btm.top_k_prior(prior, 2), [2 / 3, 0, 1 / 3, 0])
    close(btm.top_k_prior(prior, 3), [0.5 / 0.9, 0, 0.25 / 0.9, 0.15 / 0.9]), close(btm.top_k_prior(prior, 4), prior)
    close(btm.top_k_prior(torch.full((3,), 1 / 3, dtype=F64), 2), [0.5, 0.5, 0])  # ties: the first
    for k in (0, 5):
        with pytest.raises(ValueError, match=f"top_k is {k}; 1 to 4"):
            btm.top_k_prior(prior, k)


# --- averages ------------------------------------------------------------------------------------------------


def test_parameter_average_by_hand_and_its_invariants():
    a, b = (
        {"w": torch.tensor([1.0, 2.0, 3.0]), "n": torch.tensor(7)},
        {"w": torch.tensor([3.0, -2.0, 5.0]), "n": torch.tensor(9)},
    )
    kept = copy.deepcopy((a, b))
    average = btm.average_parameters([a, b], [0.25, 0.75])
    assert average["w"].tolist() == [2.5, -1.0, 4.5] and average["n"] == 7 and average["w"].dtype == torch.float32
    assert all(torch.equal(x[k], y[k]) for x, y in zip((a, b), kept) for k in x)
    messy = [{"w": torch.randn(50)} for _ in range(4)]
    assert torch.equal(btm.average_parameters(messy, [0, 0, 1, 0])["w"], messy[2]["w"])
    torch.testing.assert_close(
        btm.average_parameters([messy[0]] * 3, [0.2, 0.3, 0.5])["w"], messy[0]["w"], atol=1e-7, rtol=0
    )
    one, other = (
        btm.average_parameters(messy, [0.1, 0.2, 0.3, 0.4]),
        btm.average_parameters(messy[::-1], [0.4, 0.3, 0.2, 0.1]),
    )
    torch.testing.assert_close(one["w"], other["w"], atol=1e-7, rtol=0)
    average["n"] += 1
    assert a["n"] == 7  # a copy


def test_impossible_averages_are_refused():
    state = {"w": torch.ones(2)}
    for weights in ([0.5, 0.6], [1.5, -0.5], [math.nan, 1.0]):
        with pytest.raises(ValueError, match="at least 0 and sum to 1"):
            btm.average_parameters([state, state], weights)
    for states in ([], [state]):
        with pytest.raises(ValueError, match="equally many"):
            btm.average_parameters(states, [0.5, 0.5])
    for other in ({"v": torch.ones(2)}, {"w": torch.ones(3)}):
        with pytest.raises(ValueError, match="differ in names or shapes"):
            btm.average_parameters([state, other], [0.5, 0.5])


def test_tied_embeddings_stay_tied():
    models = [btm.build(TINY, str(i)) for i in range(2)]
    average = btm.average_parameters([btm.weights_of(model) for model in models], [0.5, 0.5])
    assert "head.weight" not in average
    model = btm.put_weights(btm.build(TINY, "2"), average)
    assert model.head.weight is model.embedding.weight and torch.equal(model.head.weight, average["embedding.weight"])


# --- schedule, data, DEMix -----------------------------------------------------------------------------------


def test_learning_rate_by_hand():
    factors = [btm.learning_rate_factor(s, 100, 0.08) for s in (1, 8, 50, 75, 100)]
    assert factors == pytest.approx([0.125, 1, 0.543478, 0.271739, 0], abs=1e-6)
    paper = [5e-4 * btm.learning_rate_factor(s, 80_000) for s in (6_400, 40_000, 60_000, 80_000)]
    assert paper == pytest.approx([5e-4, 2.7174e-4, 1.3587e-4, 0], abs=1e-8)


def make_run(tmp_path, config=TINY, **options):
    (tmp_path / "arms").mkdir(exist_ok=True, parents=True)
    claims = [replace(claim) for claim in btm.CLAIMS]
    return common.Run("btm", "small", "cpu", torch.float32, [0], tmp_path, config=config, claims=claims, **options)


def test_experts_read_what_the_dense_model_reads_of_their_domain(tmp_path):
    run = make_run(tmp_path)
    mixed = btm.mixed_batches(TINY, 0, run)
    for step in (0, 3):
        for i, name in enumerate(TINY.domains):
            own = btm.domain_batches(TINY, name, 0, run)(step)
            assert torch.equal(mixed(step)[i :: len(TINY.domains)], own) and own.shape == (4, 17)
    assert not torch.equal(mixed(0), mixed(1)) and not torch.equal(mixed(0), btm.mixed_batches(TINY, 1, run)(0))


def test_a_batch_is_the_same_in_every_process():
    """Python's own hash() of a string is not."""
    batch = btm.stream(torch.arange(1000), 2, 3, "0 python")(5)
    assert batch.tolist() == [[570, 571, 572, 573], [849, 850, 851, 852]]


def test_random_shards_are_disjoint_cover_everything_and_are_stayed_in(tmp_path, monkeypatch):
    data = torch.arange(100)
    parts = [btm.shard(data, i, 7) for i in range(7)]
    assert torch.equal(torch.cat(parts), data)
    texts = {name: torch.full((700,), i, dtype=torch.uint8) for i, name in enumerate(TINY.domains)}
    for train in texts.values():  # byte = 16 * shard + domain
        train += 16 * (torch.arange(700) * 6 // 700).to(torch.uint8)
    fake = lambda name, root: text_data.Split(name, texts[name], texts[name], texts[name], "")
    monkeypatch.setattr(btm, "load_domain", fake)
    seen = torch.cat([btm.random_batches(TINY, 2, 0, make_run(tmp_path))(step) for step in range(60)])
    assert (seen // 16 == 2).float().mean() > 0.99 and (seen % 16).unique().tolist() == [0, 1, 2, 3, 4, 5]
    assert ((seen % 16) == (seen % 16)[:, :1]).all() and seen.shape == (240, 17)


def test_demix_sends_each_row_to_its_domain_and_can_be_asked_for_one():
    ffn = btm.DomainFFN(btm.MLP(8, 0.3, 1), 3)
    assert torch.equal(ffn.mlps[0].fc1.weight, ffn.mlps[2].fc1.weight)
    for mlp in ffn.mlps:
        torch.nn.init.normal_(mlp.fc1.weight)
    x = torch.randn(6, 5, 8)
    y = ffn(x)
    for row in range(6):
        torch.testing.assert_close(y[row], ffn.mlps[row % 3](x[row]), atol=1e-5, rtol=1e-5)
    ffn.domain = 1
    torch.testing.assert_close(ffn(x), ffn.mlps[1](x))


# --- training: equal cost, one schedule, isolation -----------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A whole tiny system: (run, {arm: cost})."""
    run = make_run(tmp_path_factory.mktemp("trained"))
    costs = {}
    for arm in ["seed", "dense", *btm.expert_arms(TINY), *btm.random_arms(TINY), "demix"]:
        costs[arm] = btm.train_arm(TINY, arm, 0, run)
    return run, costs


def test_seed_and_experts_cost_what_the_dense_model_costs(trained):
    _, costs = trained
    for key in ("tokens", "flops"):
        experts = sum(costs[arm][key] for arm in btm.expert_arms(TINY))
        assert experts == costs["dense"][key] == sum(costs[arm][key] for arm in btm.random_arms(TINY)) > 0
        assert costs["demix"][key] == costs["seed"][key] + costs["dense"][key]
    assert costs["seed"]["tokens"] == 2 * 6 * 4 * 16 and costs["expert-docs"]["updates"] == 2


@pytest.mark.parametrize("steps, share", [(7, 0.5), (5, 0.33), (3, 0.75)])
def test_costs_match_when_the_share_is_no_whole_number(tmp_path, steps, share):
    config, run = replace(TINY, steps=steps, seed_share=share, domains=TINY.domains[:2]), make_run(tmp_path)
    costs = {arm: btm.train_model(config, arm, 0, (), run)[1] for arm in ("seed", "dense", *btm.expert_arms(config))}
    assert sum(costs[arm]["tokens"] for arm in btm.expert_arms(config)) == costs["dense"]["tokens"]
    assert costs["seed"]["updates"] + costs["dense"]["updates"] == steps


def test_the_dense_model_is_the_seeds_own_run_continued(tmp_path):
    """Bit for bit the run without a branch point, learning rates included."""
    run, config = make_run(tmp_path), replace(TINY, domains=TINY.domains[:2])
    rates, train = [], common.train

    def spy(model, loss_fn, steps, **options):
        options["on_step"] = lambda step: rates.append(options["optimizer"].param_groups[0]["lr"])
        return train(model, loss_fn, steps, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "train", spy)
        btm.train_model(config, "seed", 0, (), run)
        dense, _ = btm.train_model(config, "dense", 0, (), run)
        halves, rates = rates, []
        btm.train_model(config, "expert-python", 0, (), run)
    assert halves == pytest.approx([config.lr * btm.learning_rate_factor(max(1, s), 4) for s in range(4)])
    assert rates == halves[2:]  # no new warm-up
    whole = btm.build(config, "0 seed")
    optimizer, files = common.adamw(whole, config.lr, config.weight_decay), {"metrics": tmp_path / "whole.jsonl"}
    btm.train(whole, btm.mixed_batches(config, 0, run), config, optimizer, 0, 4, 4, **files)
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), dense.state_dict().values()))


def test_adams_moments_are_carried_into_every_expert_and_not_shared(tmp_path):
    run, config = make_run(tmp_path), replace(TINY, domains=TINY.domains[:2])
    btm.train_model(config, "seed", 0, (), run)
    forest = btm.Forest(tmp_path / "forest-seed0")
    before = (forest.path / "seed" / "resume.pt").read_bytes()
    _, one, parents = btm.branch(config, forest, run)
    _, other, _ = btm.branch(config, forest, run)
    states = [next(iter(optimizer.state.values())) for optimizer in (one, other)]
    assert states[0]["exp_avg"].abs().sum() > 0 and float(states[0]["step"]) == 2
    states[0]["exp_avg"].zero_()
    assert states[1]["exp_avg"].abs().sum() > 0 and parents[0]["weight"] == 1.0
    btm.train_model(config, "expert-python", 0, (), run)
    assert (forest.path / "seed" / "resume.pt").read_bytes() == before


def test_experts_do_not_depend_on_order_or_company(trained, tmp_path):
    run, _ = trained
    alone = make_run(tmp_path)
    btm.train_model(TINY, "seed", 0, (), alone)
    hashes = {}
    for name in ("unicode", "python"):  # another order, and nobody else
        btm.train_model(TINY, f"expert-{name}", 0, (), alone)
        hashes[name] = common.sha256(tmp_path / "forest-seed0" / "experts" / name / "weights.npz")
        assert hashes[name] == common.sha256(run.out / "forest-seed0" / "experts" / name / "weights.npz")
    seed = tmp_path / "forest-seed0" / "seed"
    assert common.sha256(seed / "weights.npz") == common.sha256(run.out / "forest-seed0" / "seed" / "weights.npz")


def test_accumulated_parts_see_the_same_tokens_and_give_the_same_model(tmp_path):
    found = {}
    for size in (1024, 4):
        run, config = make_run(tmp_path / str(size)), replace(TINY, domains=TINY.domains[:2], micro_batch=size)
        model, cost = btm.train_model(config, "seed", 0, (), run)
        found[size] = (btm.weights_of(model), cost["tokens"], cost["flops"])
    assert found[4][1:] == found[1024][1:]
    for name, tensor in found[4][0].items():
        torch.testing.assert_close(tensor, found[1024][0][name], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("init", btm.INITS)
def test_later_rounds_branch_from_where_they_say(trained, init):
    run, _ = trained
    forest, names = btm.Forest(run.out / "forest-seed0"), TINY.domains
    model, parents = btm.branch_later(TINY, "cmake", init, 0, names, forest, run)
    state, states = btm.weights_of(model), [forest.load(name)[0] for name in names]
    dev = torch.stack([btm.score(btm.filled(TINY, s, run), "dev", "cmake", TINY, run) for s in states])
    prior = btm.cached_prior(dev, blocks=TINY.dev_blocks)
    expected = {
        "posterior": lambda: btm.average_parameters(states, prior),
        "nearest": lambda: states[int(prior.argmax())],
        "uniform": lambda: btm.average_parameters(states, [1 / 6] * 6),
        "seed": lambda: forest.load("seed")[0],
        "scratch": lambda: btm.weights_of(btm.build(TINY, "0 scratch cmake")),
    }[init]()
    assert all(torch.equal(state[name], expected[name]) for name in state)
    assert [p["name"] for p in parents] == {"scratch": [], "seed": ["seed"]}.get(init, list(names))
    assert sum(p["weight"] for p in parents) == pytest.approx(0 if init == "scratch" else 1)


def test_ensembles_learn_their_domains_end_to_end(tmp_path):
    """On generated text: experts know their own domain, the posterior finds it, equal averages are worse."""
    config = replace(
        TINY,
        domains=("sums", "numerals"),
        novel=("dates",),
        grow="dates",
        d_model=32,
        context=32,
        steps=150,
        test_blocks=16,
        conv=4,
    )
    run = make_run(tmp_path, config)
    for arm in ("seed", *btm.expert_arms(config)):
        btm.train_arm(config, arm, 0, run)
    btm.train_arm(config, "average", 0, run)
    said = btm.reader(run, 0)
    loss = lambda arm, name: float(-said("test", name, [arm]).mean())
    for name, other in (("sums", "numerals"), ("numerals", "sums")):
        assert loss(f"expert-{name}", name) < loss("seed", name) < loss(f"expert-{other}", name)
        assert loss("average:posterior", name) < loss("average:uniform", name)
        test = said("test", name, btm.expert_arms(config))
        _, weights = btm.ensemble_nll(test, torch.zeros(2))
        assert weights[config.domains.index(name), :, -1].mean() > 0.99


# --- reading and writing text --------------------------------------------------------------------------------


def test_text_log_probs_use_at_most_a_context_of_text():
    model = btm.build(TINY, "x").eval()
    tokens = torch.randint(256, (41,), generator=torch.Generator().manual_seed(0))
    found = btm.text_log_probs(model, tokens, TINY.context)
    for t in (1, 5, 16, 17, 40):
        logits = model(tokens[None, max(0, t - TINY.context) : t])[0, -1]
        close(found[t - 1], logits.detach().log_softmax(-1)[tokens[t]].item(), 1e-5)
    assert len(found) == 40 and len(btm.text_log_probs(model, tokens[:3], TINY.context)) == 2


def test_generation_follows_the_ensembles_own_weights():
    class Says(torch.nn.Module):
        def __init__(self, token):
            super().__init__()
            self.token = token

        def forward(self, tokens):
            logits = torch.zeros(*tokens.shape, 256)
            logits[..., self.token] = 9.0
            return logits

    tokens, prior = torch.tensor([0, 65, 65]), torch.tensor([0.5, 0.5]).log()
    written, weights = btm.generate([Says(65), Says(66)], tokens, prior, 20, 16, torch.Generator().manual_seed(0))
    assert written[:3].tolist() == [0, 65, 65] and (written[3:] == 65).float().mean() > 0.9  # two A's: believe expert A
    close(weights[:, 0], [0.5, 0.5]), close(weights[:, 1], [0.5, 0.5])
    evidence = math.exp(9) / (1 + math.exp(9))
    close(weights[0, 2], evidence, 1e-6), close(weights.sum(0), torch.ones(23))


# --- the forest ----------------------------------------------------------------------------------------------


def names(forest):
    return [name for name, wrong in forest.verify().items() if wrong is None]


@pytest.fixture
def forest(tmp_path):
    forest = btm.Forest.create(tmp_path / "F", btm.forest_config(TINY, 0))
    for name in ("a", "b"):
        forest.add(
            name, btm.weights_of(btm.build(TINY, name)), {"parents": [{"name": "seed", "sha256": "0", "weight": 1.0}]}
        )
    return forest


def test_experts_come_back_bit_for_bit_and_are_never_overwritten_by_accident(forest):
    weights, meta = btm.Forest(forest.path).load("a")
    assert all(torch.equal(weights[name], tensor) for name, tensor in btm.weights_of(btm.build(TINY, "a")).items())
    assert (
        meta["sha256"] == common.sha256(forest.path / "experts" / "a" / "weights.npz")
        and meta["config"] == forest.digest
    )
    assert names(forest) == ["a", "b"] and forest.verify() == {"a": None, "b": None}
    with pytest.raises(ValueError, match="'a' is in .* already; --force replaces it"):
        forest.add("a", weights)
    forest.add("a", btm.weights_of(btm.build(TINY, "b")), force=True)
    assert torch.equal(forest.load("a")[0]["embedding.weight"], forest.load("b")[0]["embedding.weight"])


def test_remove_and_drop_in(forest, tmp_path):
    os.rename(forest.path / "experts" / "b", tmp_path / "b")
    assert names(forest) == ["a"]
    os.rename(tmp_path / "b", forest.path / "experts" / "b")
    forest.remove("a")
    assert forest.verify() == {"b": None} and [path.name for path in (forest.path / "experts").iterdir()] == ["b"]
    for name in ("a", "../experts/b"):
        with pytest.raises(ValueError, match="no expert 'a'|expert name '../experts/b'"):
            forest.remove(name)


def test_a_link_among_the_experts_leads_nowhere(forest, tmp_path):
    outside, link = tmp_path / "outside", forest.path / "experts" / "c"
    shutil.copytree(forest.folder("a"), outside)
    link.symlink_to(outside)
    before = {path.name: path.read_bytes() for path in outside.iterdir()}
    with pytest.raises(ValueError, match="is a link"):
        forest.add("c", forest.load("b")[0], force=True)
    forest.remove("c")
    assert not link.is_symlink() and forest.folders() == ["a", "b"]
    assert {path.name: path.read_bytes() for path in outside.iterdir()} == before


def test_a_removal_that_is_cut_short_leaves_no_half_expert(forest, monkeypatch):
    def stopped(path, ignore_errors=False):
        if not ignore_errors:
            raise OSError("stopped")

    monkeypatch.setattr(shutil, "rmtree", stopped)
    with pytest.raises(OSError, match="stopped"):
        forest.remove("a")
    assert names(forest) == ["b"] and forest.verify() == {"b": None}


def test_an_expert_that_does_not_fit_is_not_added(forest):
    weights = btm.weights_of(btm.build(TINY, "c"))
    for wrong in (
        {name: tensor for name, tensor in weights.items() if "norm" not in name},
        weights | {"extra": torch.ones(1)},
        weights | {"embedding.weight": weights["embedding.weight"].double()},
        btm.weights_of(btm.build(replace(TINY, d_model=8), "c")),
    ):
        with pytest.raises(ValueError, match="'c' does not fit"):
            forest.add("c", wrong)
    with pytest.raises(ValueError, match="NaN"):
        forest.add("c", weights | {"embedding.weight": weights["embedding.weight"] * math.nan})
    assert names(forest) == ["a", "b"]


class Bomb:
    def __reduce__(self):
        return os.system, ("touch exploded",)


def hostile(forest, how):
    """Damage expert "a" in one way; what the refusal must say."""
    folder = forest.path / "experts" / "a"
    weights, meta = forest.load("a")
    arrays = {name: tensor.numpy() for name, tensor in weights.items()}
    header = json.dumps({"dtypes": {name: "float32" for name in arrays}, "meta": {}}).encode()

    def rewrite(arrays):
        np.savez(folder / "weights.npz", **arrays, __meta__=np.frombuffer(header, dtype=np.uint8))
        common.write_json(folder / "meta.json", meta | {"sha256": common.sha256(folder / "weights.npz")})

    first = next(iter(arrays))
    match how:
        case "planted pickle":
            rewrite(arrays | {first: np.array([Bomb()], dtype=object)})
            return "nothing is unpickled"
        case "pickle for npz":
            (folder / "weights.npz").write_bytes(pickle.dumps(Bomb()))
            common.write_json(folder / "meta.json", meta | {"sha256": common.sha256(folder / "weights.npz")})
            return "no zip archive of arrays"
        case "wrong hash":
            common.write_json(folder / "meta.json", meta | {"sha256": "0" * 64})
            return "SHA-256"
        case "flipped byte":
            content = bytearray((folder / "weights.npz").read_bytes())
            content[5000] ^= 1
            (folder / "weights.npz").write_bytes(content)
            return "SHA-256"
        case "truncated":
            content = (folder / "weights.npz").read_bytes()[:5000]
            (folder / "weights.npz").write_bytes(content)
            common.write_json(folder / "meta.json", meta | {"sha256": common.sha256(folder / "weights.npz")})
            return "no zip archive of arrays"
        case "missing array":
            rewrite({name: array for name, array in arrays.items() if name != first})
            return "weights.npz"
        case "other shape":
            rewrite(arrays | {first: arrays[first][:-1]})
            return "is needed"
        case "NaN":
            rewrite(arrays | {first: arrays[first] * np.float32("nan")})
            return "NaN or infinity"
        case "huge":
            with open(folder / "weights.npz", "ab") as file:
                file.truncate(50_000_000)
            return "more than this architecture needs"
        case "other architecture":
            common.write_json(folder / "meta.json", meta | {"config": "0" * 64})
            return "another configuration"
        case "other name":
            common.write_json(folder / "meta.json", meta | {"name": "b"})
            return "does not describe this expert"
        case "traversing parent":
            common.write_json(folder / "meta.json", meta | {"parents": [{"name": "../../x", "weight": 1.0}]})
            return "impossible parents"
        case "text as weight":
            common.write_json(folder / "meta.json", meta | {"parents": [{"name": "seed", "weight": "1.0"}]})
            return "not supported between"
        case "no parents":
            common.write_json(folder / "meta.json", {key: meta[key] for key in meta if key != "parents"})
            return "parents"
        case "odd parents":
            common.write_json(folder / "meta.json", meta | {"parents": 7})
            return "refused"
        case "meta is no json":
            (folder / "meta.json").write_bytes(b"\x80{")
            return "refused"
        case "meta is a list":
            (folder / "meta.json").write_text("[1]")
            return "does not describe"
        case "deep meta":
            (folder / "meta.json").write_text("[" * 100_000)
            return "refused"
        case "huge meta":
            (folder / "meta.json").write_text(" " * 2_000_000)
            return "too large"
        case "no weights":
            (folder / "weights.npz").unlink()
            return "refused"
        case "link":
            (folder / "weights.npz").rename(forest.path / "elsewhere.npz")
            (folder / "weights.npz").symlink_to(forest.path / "elsewhere.npz")
            return "links are refused"
        case "unfinished":
            (folder / "meta.json").unlink()
            return "still being made"


HOSTILE = (
    "planted pickle|pickle for npz|wrong hash|flipped byte|truncated|missing array|other shape|NaN|huge|"
    "other architecture|other name|traversing parent|odd parents|meta is no json|meta is a list|deep meta|huge meta|"
    "text as weight|no parents|"
    "no weights|link|unfinished"
).split("|")


@pytest.mark.parametrize("how", HOSTILE)
def test_hostile_or_damaged_experts_are_refused_in_one_line_and_the_rest_goes_on(
    forest, how, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    expected = hostile(forest, how)
    with pytest.raises(ValueError, match="expert 'a'") as refusal:
        forest.load("a")
    assert expected in str(refusal.value) and "\n" not in str(refusal.value)
    capsys.readouterr()
    assert list(btm.sound(forest, make_run(tmp_path))) == ["b"]
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "expert 'a'" in said and not (tmp_path / "exploded").exists()


def test_names_that_leave_the_forest_are_refused(forest):
    for name in ("../a", "/etc", "", ".", "..", "a/b", "x" * 65, "a\n", "é", ".hidden"):
        for method in (forest.load, forest.remove, lambda n: forest.add(n, forest.load("a")[0])):
            with pytest.raises(ValueError, match="expert name"):
                method(name)
    (forest.path / "experts" / "bad name").mkdir()
    assert "letters, digits" in forest.verify()["bad name"] and names(forest) == ["a", "b"]


def test_a_damaged_or_missing_config_is_one_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="is no forest"):
        btm.Forest(tmp_path)
    for content in (
        "{",
        "[]",
        "{}",
        '{"format": 2}',
        json.dumps({"format": 1, **btm.forest_config(TINY, 0), "num_layers": 10**9}),
    ):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(ValueError, match="config.json is damaged"):
            btm.Forest(tmp_path)


def killed_at(path, after):
    """Commit an expert, and die before it has renamed one file more than `after`."""
    forest, left, rename = btm.Forest(path), iter(range(after)), os.replace

    def stop(*paths):
        if next(left, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)
        rename(*paths)

    os.replace = stop
    forest.add("a", forest.load("b")[0], force=True)


@pytest.mark.parametrize("after", [0, 1])
def test_killed_during_a_commit_the_forest_is_valid(fork, forest, after):
    """Before weights.npz is there, or between weights.npz and meta.json."""
    assert ended(fork.call(killed_at, forest.path, after)) == -signal.SIGKILL
    assert names(forest) == ["b"] and "still being made" in forest.verify()["a"] and forest.verify()["b"] is None
    forest.add("a", forest.load("b")[0])
    assert forest.verify() == {"a": None, "b": None}


# --- claims --------------------------------------------------------------------------------------------------

IN, NOVEL = btm.SMALL.domains, btm.SMALL.novel
LEVELS = {  # method: bits in domain, bits on novel domains
    "dense": (3.0, 4.0),
    btm.EQ2: (2.8, 3.9),
    btm.LAST_TOKEN: (2.9, 3.8),
    "random split, eq. 2": (3.1, 4.1),
    "average, uniform": (3.4, 4.2),
    "average, posterior": (2.9, 3.9),
    "average, uniform@unseeded": (8.0, 8.0),
    "BTM, top-2": (2.81, 3.91),
    "added": (2.8, 3.9),
    "removed": (2.8, 3.9),
    "dense@first2": (3.0, 4.0),
    f"{btm.EQ2}@first2": (2.95, 3.9),
    "dense@first4": (3.0, 4.0),
    f"{btm.EQ2}@first4": (2.9, 3.9),
    "dense@x1.25": (2.9, 4.0),
    "dense@x1.5": (2.8, 4.0),
    "dense@x2": (2.6, 4.0),
} | {f"grown-licences@{init}": (0.0, 3.0 + i / 10) for i, init in enumerate(btm.INITS)}
WORSE = {  # claim -> what has to change for it to fail
    "in_domain": {btm.EQ2: (3.1, 3.9)},
    "out_of_domain": {btm.EQ2: (2.8, 4.1)},
    "random_split": {"random split, eq. 2": (2.95, 4.0)},
    "posterior_average": {"average, posterior": (3.1, 3.9)},
    "uniform_average": {"average, uniform": (2.9, 3.9)},
    "seed_needed_for_averaging": {"average, uniform@unseeded": (3.3, 4.2)},
    "branch_init": {"grown-licences@uniform": (0.0, 2.9)},
    "add_remove": {"added": (2.9, 3.9)},
    "topk": {"BTM, top-2": (2.9, 4.0)},
    "more_domains": {f"{btm.EQ2}@first2": (2.5, 3.9)},
    "compute_saving": {"dense": (2.7, 4.0)},
}


def rows_of(levels):
    rows = {}
    for method, (inside, outside) in levels.items():
        groups = [-0.001, 0.001]
        rows[method] = {name: np.add(inside if name in IN else outside, groups) for name in (*IN, *NOVEL)}
    rows["added"]["licences"] = rows["added"]["licences"] - 1.0
    rows["removed"]["unicode"] = rows["removed"]["unicode"] + 1.0
    return rows


@pytest.mark.parametrize("num_seeds", [1, 3])
def test_every_claim_can_hold_and_can_fail(num_seeds, tmp_path):
    cost = {"tokens": 60, "flops": 600}
    costs = {"seed": [cost] * num_seeds, "dense": [{"tokens": 60, "flops": 600}] * num_seeds}
    costs |= {arm: [{"tokens": 10, "flops": 100}] * num_seeds for arm in btm.expert_arms(btm.SMALL)}

    def judged(changes, costs=costs):
        run = make_run(tmp_path, btm.SMALL, ablate=True)
        run.seeds = [0] * num_seeds
        btm.judge(btm.SMALL, run, costs, [rows_of(LEVELS | changes)] * num_seeds)
        return {claim.id.removeprefix("btm."): claim for claim in run.claims}

    good = judged({})
    assert set(good) == {*WORSE, "cost_matched"} and all(claim.holds for claim in good.values())
    assert good["in_domain"].measured.startswith("0.2000") and "1.50" in good["compute_saving"].measured
    assert good["more_domains"].measured.startswith("bits/byte gained on python and headers: 0.0500")
    for id, changes in WORSE.items():
        assert judged(changes)[id].holds is False, id
    for method in ("added", "removed"):  # a change for the better elsewhere is a change, too, on novel domains as well
        for elsewhere in ((2.6, 3.9), (2.8, 3.7)):
            assert judged({method: elsewhere})["add_remove"].holds is False
    assert judged({f"{btm.EQ2}@first4": (2.97, 3.9)})["more_domains"].holds is False  # less than with two
    for key in cost:
        dearer = costs | {"dense": [{"tokens": 60, "flops": 600} | {key: 61}] * num_seeds}
        assert judged({}, dearer)["cost_matched"].holds is False


def test_changes_elsewhere_do_not_cancel_and_a_gain_grows_on_the_same_domains(tmp_path):
    """One domain better and one worse by as much are two changes; domains that are easier to gain on do not count."""
    run, cost = make_run(tmp_path, btm.SMALL, ablate=True), {"tokens": 1, "flops": 1}
    run.seeds, rows = [0, 1, 2], rows_of(LEVELS)
    rows["added"]["python"], rows["added"]["docs"] = rows["added"]["python"] + 0.2, rows["added"]["docs"] - 0.2
    for name in ("python", "headers"):  # 0.05 is gained with two, four and six domains; 0.2 on the others
        rows["dense"][name], rows["dense@first4"][name] = np.full(2, 2.85), np.full(2, 2.95)
    btm.judge(btm.SMALL, run, {arm: [cost] * 3 for arm in ("seed", "dense", *btm.expert_arms(btm.SMALL))}, [rows] * 3)
    found = {claim.id.removeprefix("btm."): claim for claim in run.claims}
    assert found["add_remove"].values["others_added"] == pytest.approx([0.2] * 3)
    assert found["add_remove"].holds is False and found["more_domains"].holds is False


def test_compute_factor_by_hand():
    times, losses = (1.0, 2.0, 4.0), (3.0, 2.0, 1.0)
    found = [btm.compute_factor(times, losses, target) for target in (3.0, 2.5, 2.0, 1.5, 0.5)]
    assert found == pytest.approx([1.0, 2**0.5, 2.0, 2**1.5, 4.0])


def test_systems_change_one_thing_each():
    assert list(btm.systems(btm.SMALL, ablate=False)) == [""]
    plan = btm.systems(btm.SMALL, ablate=True)
    inside = replace(btm.SMALL, novel=())
    assert plan[""] == (btm.SMALL, ["dense", *btm.expert_arms(btm.SMALL), *btm.random_arms(btm.SMALL), "demix"])
    assert plan["@lr0.02"][0] == replace(inside, lr=0.02) and btm.SMALL.lr in btm.LR_GRID
    assert plan["@first4"][0] == replace(inside, domains=btm.SMALL.domains[:4]) and len(plan["@first4"][1]) == 5
    assert plan["@unseeded"] == (replace(inside, seed_share=0.0), btm.expert_arms(btm.SMALL))
    assert plan["@x1.5"] == (replace(inside, steps=900, seed_share=0.0), ["dense"])
    assert len(btm.grown_arms(btm.SMALL, True)) == 15 and btm.SMALL.branch_lr in btm.BRANCH_LR_GRID


# --- the script, whole and in stages -------------------------------------------------------------------------


def hashes(forest):
    return {path.parent.name: common.sha256(path) for path in sorted(forest.rglob("weights.npz"))}


def report_of(folder):
    return json.loads((folder / "results.json").read_text())


def test_script_end_to_end_with_every_arm(act, tmp_path):
    done = act(*BTM, "--ablate", "--workers", 1, "--out", "out")
    assert done.returncode == 0, done.stderr
    report = report_of(tmp_path / "out")
    assert [claim["id"] for claim in report["claims"]] == [claim.id for claim in btm.CLAIMS]
    assert all(claim["verdict"] != "not measured" for claim in report["claims"])
    assert {claim["id"]: claim["verdict"] for claim in report["claims"]}["btm.cost_matched"] == "passed"
    rows = report["results"]["bits"][0]
    assert {"seed", "dense", btm.EQ2, "DEMix, eq. 2", "dense@lr0.02", "average, uniform@unseeded"} <= set(rows)
    assert len(rows["dense"]) == 10 and len(rows["dense@first2"]) == 2
    assert np.shape(report["results"]["posterior"]) == (10, 6)
    assert names(btm.Forest(tmp_path / "out" / "forest-seed0")) == sorted([*btm.SMALL.domains, "licences"])
    metrics = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert {"arm", "step", "loss", "tokens"} <= set(metrics[0])
    # An arm that is lost is trained again, to the same results; a new run replaces the forest.
    before = hashes(tmp_path / "out")
    for name in ("expert-docs", "seed@first2"):
        (tmp_path / "out" / "arms" / f"{name}-seed0.json").unlink()
    assert act(*BTM, "--ablate", "--workers", 1, "--out", "out", "--resume").returncode == 0
    again = report_of(tmp_path / "out")
    assert again["results"]["bits"] == report["results"]["bits"] and hashes(tmp_path / "out") == before
    (tmp_path / "out" / "forest-seed0" / "experts" / "planted").mkdir()
    few = ["--domains", "python,docs", "--novel", "cmake", "--grow", "cmake"]
    assert act(*BTM, *few, "--workers", 1, "--out", "out", "--overwrite").returncode == 0
    assert not (tmp_path / "out" / "forest-seed0" / "experts" / "planted").exists()


@pytest.fixture(scope="module")
def plain_forest(tmp_path_factory):
    """The forest of a plain run, and the flags that made it."""
    folder = tmp_path_factory.mktemp("plain")
    flags = [*BTM, "--workers", "1", "--out", str(folder)]
    with same_handlers(), pytest.raises(SystemExit) as stop:
        common.run(btm.main, btm.SMALL, btm.FULL, btm.CLAIMS, flags, actions=btm.ACTIONS)
    assert stop.value.code == 0
    return folder / "forest-seed0"


def test_two_processes_of_torchrun_make_the_forest_of_a_plain_run(act, fork, plain_forest, tmp_path):
    """Bit for bit, with nothing exchanged but files: each process trains its own experts."""
    assert act(*BTM, "--stage", "seed", "--forest", "F").returncode == 0
    two = fork.two("btm.py", "--stage", "expert", "--forest", tmp_path / "F", folder=tmp_path)
    for done in map(finished, two):
        assert done.returncode == 0 and done.stdout.count("from 1.00 seed") == 3, done
    assert act("--stage", "expert", "--domain", "licences", "--forest", "F").returncode == 0
    assert hashes(tmp_path / "F") == hashes(plain_forest)
    for name in ("python", "licences"):
        metas = [
            json.loads((forest / "experts" / name / "meta.json").read_text())
            for forest in (tmp_path / "F", plain_forest)
        ]
        assert metas[0]["parents"] == metas[1]["parents"] and metas[0]["tokens"] == metas[1]["tokens"]


def test_ranks_share_the_domains_out_and_indices_name_them(act, tmp_path, monkeypatch):
    flags = [*BTM, "--forest", "F", "--domains", "python,docs,unicode"]
    assert act(*flags, "--stage", "seed").returncode == 0
    monkeypatch.setenv("RANK", "1"), monkeypatch.setenv("WORLD_SIZE", "2")
    assert act("--stage", "expert", "--forest", "F").returncode == 0
    assert names(btm.Forest(tmp_path / "F")) == ["docs"]
    monkeypatch.delenv("RANK"), monkeypatch.delenv("WORLD_SIZE")
    assert act("--stage", "expert", "--forest", "F", "--domain-index", 2).returncode == 0
    assert names(btm.Forest(tmp_path / "F")) == ["docs", "unicode"]
    done = act("--stage", "expert", "--forest", "F")
    assert done.stdout.count("is in F already; --force") == 2 and len(names(btm.Forest(tmp_path / "F"))) == 3
    done = act("--stage", "expert", "--forest", "F", "--domain-index", 3)
    assert done.returncode == 2 and "counts the 3 domains from 0" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_stopped_process_loses_its_own_unfinished_expert_only(act, fork, tmp_path, number):
    flags = [*BTM, "--domains", "python,docs", "--steps", "240", "--stage"]
    assert act(*flags, "seed", "--forest", "F").returncode == 0
    shutil.copytree(tmp_path / "F", tmp_path / "whole")
    assert act("--stage", "expert", "--forest", "F", "--domain", "python").returncode == 0
    kept = (tmp_path / "F" / "experts" / "python" / "meta.json").stat().st_mtime_ns
    process = fork("btm.py", "--stage", "expert", "--forest", "F", "--domain-index", 1, folder=tmp_path)
    log = tmp_path / "F" / "work" / "arms" / "expert-docs-seed0.jsonl"
    wait_until(lambda: log.exists() and log.read_text().count("\n") >= 10, process)
    os.kill(process.pid, number)
    assert ended(process) == (143 if number == signal.SIGTERM else -9)
    if number == signal.SIGTERM:
        assert "--stage expert --forest F --domain-index 1 --resume" in finished(process).stderr
        assert (tmp_path / "F" / "work" / "arms" / "expert-docs-seed0.ckpt").exists()
    assert names(btm.Forest(tmp_path / "F")) == ["python"]
    assert act("--stage", "expert", "--forest", "F").returncode == 0  # the rerun
    assert act("--stage", "expert", "--forest", "whole").returncode == 0
    assert hashes(tmp_path / "F") == hashes(tmp_path / "whole")
    assert (tmp_path / "F" / "experts" / "python" / "meta.json").stat().st_mtime_ns == kept
    meta = json.loads((tmp_path / "F" / "experts" / "docs" / "meta.json").read_text())
    assert meta["updates"] == 60 and meta["tokens"] == 60 * 4 * 16  # every update once, also after the interrupt


@pytest.fixture
def act(tmp_path, monkeypatch, capsys):
    """act("--stage", "eval", ...): a command of the script, in this process and in an empty folder."""
    monkeypatch.chdir(tmp_path)
    btm.load_domain.cache_clear()  # --data-dir D is another folder in every test

    def run(*flags):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            common.run(btm.main, btm.SMALL, btm.FULL, btm.CLAIMS, [str(flag) for flag in flags], actions=btm.ACTIONS)
        out, err = capsys.readouterr()
        return subprocess.CompletedProcess(flags, stop.value.code, out, err)

    with same_handlers():
        yield run


def test_evaluation_of_a_forest_leaves_out_refuses_and_goes_on(act, plain_forest, tmp_path):
    shutil.copytree(plain_forest, tmp_path / "F")
    whole = act("--stage", "eval", "--forest", "F")
    assert whole.returncode == 0 and "lineage of F" in whole.stdout
    lineage = next(line for line in whole.stdout.splitlines() if line.startswith("licences "))
    assert " python + " in lineage and "seed" not in lineage
    assert next(line for line in whole.stdout.splitlines() if line.startswith("docs ")).split()[1:3] == ["1.00", "seed"]
    without = act("--stage", "eval", "--forest", "F", "--without", "unicode,licences")
    assert "unicode  " not in without.stdout.split("bits/byte on test text")[0] and without.returncode == 0
    (tmp_path / "F" / "experts" / "docs" / "weights.npz").write_bytes(b"damaged")
    damaged = act("--stage", "eval", "--forest", "F")
    assert damaged.returncode == 0 and damaged.stdout.count("expert 'docs' refused") == 1
    unknown = act("--stage", "eval", "--forest", "F", "--without", "poems")
    assert unknown.returncode == 2 and "no expert 'poems'" in unknown.stderr
    shutil.rmtree(tmp_path / "F" / "experts")
    empty = act("--stage", "eval", "--forest", "F")
    assert empty.returncode == 2 and "no expert to use; --stage expert trains one" in empty.stderr
    assert not (tmp_path / "runs").exists()


def test_evaluation_finds_the_numbers_of_the_run_that_made_the_forest(act, plain_forest):
    done = act("--stage", "eval", "--forest", plain_forest, "--without", "licences", "--test-blocks", 4)
    table = done.stdout.split("bits/byte on test text")[1].split("whom eq. 2 believes")[0]
    found = {line.split()[0]: line.split()[1:] for line in table.splitlines() if line}
    bits = report_of(plain_forest.parent)["results"]["bits"][0]
    for name in (*btm.SMALL.domains, *btm.SMALL.novel):
        methods = (btm.EQ2, btm.LAST_TOKEN, "average, posterior", "average, argmax")
        assert found[name] == [*(f"{bits[method][name]:.3f}" for method in methods), "6"]


def test_top_k_drops_experts_before_they_are_run(act, plain_forest, monkeypatch):
    calls, score = [], btm.score
    monkeypatch.setattr(btm, "score", lambda model, part, *rest: (calls.append(part), score(model, part, *rest))[1])
    done = act("--stage", "eval", "--forest", plain_forest, "--top-k", 2, "--novel", "cmake", "--grow", "cmake")
    assert done.returncode == 0
    assert calls.count("dev") == 7 * 7 and calls.count("test") == 7 * (2 + 1)  # 7 experts, 7 domains; and the average
    monkeypatch.undo()
    assert "there are 7 experts" in act("--stage", "eval", "--forest", plain_forest, "--top-k", 8).stderr


def test_a_forest_of_one_is_that_expert(act, plain_forest, tmp_path):
    shutil.copytree(plain_forest, tmp_path / "F")
    others = [name for name in names(btm.Forest(tmp_path / "F")) if name != "docs"]
    done = act("--stage", "eval", "--forest", "F", "--without", ",".join(others))
    row = next(line for line in done.stdout.split("bits/byte on test text")[1].splitlines() if line.startswith("docs"))
    assert done.returncode == 0 and len(set(row.split()[1:5])) == 1 and row.split()[5] == "1"


def test_sample_writes_and_shows_the_posterior(act, plain_forest):
    done = act("--sample", "def ", "--forest", plain_forest, "--sample-bytes", 40)
    assert done.returncode == 0 and done.stdout.startswith("def ") and "whom eq. 2 believes" in done.stdout
    assert done.stdout == act("--sample", "def ", "--forest", plain_forest, "--sample-bytes", 40).stdout
    other = act("--sample", "", "--forest", plain_forest, "--sample-bytes", 40)
    assert other.returncode == 0


def test_settings_come_from_the_forest_and_others_are_refused(act, plain_forest, tmp_path):
    shutil.copytree(plain_forest, tmp_path / "F")
    for flags, expected in (
        (["--steps", "6"], "was made with steps = 4, not 6"),
        (["--seed", "3"], "was made with seed = 0, not 3"),
        (["--domains", "python,docs"], "was made with domains"),
    ):
        done = act("--stage", "eval", "--forest", "F", *flags)
        assert done.returncode == 2 and expected in done.stderr and done.stderr.count("\n") == 1
    config = json.loads((tmp_path / "F" / "config.json").read_text())
    for name, value in (("domains", 5), ("lr", "fast"), ("domains", ["../x", "python"])):
        (tmp_path / "G").mkdir(exist_ok=True)
        (tmp_path / "G" / "config.json").write_text(json.dumps(config | {name: value}))
        (tmp_path / "G" / "seed").mkdir(exist_ok=True), (tmp_path / "G" / "seed" / "meta.json").touch()
        done = act("--stage", "expert", "--forest", "G")
        assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert act("--stage", "expert", "--forest", "F", "--domain", "seed", "--force").returncode == 2
    done = act("--stage", "seed", "--forest", "F", *BTM, "--steps", "8")
    assert done.returncode == 2 and "was made with steps = 4, not 8" in done.stderr


def test_a_domain_of_ones_own_is_prepared_added_and_believed(act, plain_forest, tmp_path):
    shutil.copytree(plain_forest, tmp_path / "F")
    for i in range(120):
        (tmp_path / "notes").mkdir(exist_ok=True)
        (tmp_path / "notes" / f"{i}.txt").write_text(
            "\n\n".join(f"note {i}: {i * j} apples, {i + j * j} pears" for j in range(30))
        )
    done = act("--prepare", "notes", "--domain", "notes", "--data-dir", "D")
    assert done.returncode == 0 and "notes" in done.stdout
    flags = ["--forest", "F", "--domain", "notes", "--data-dir", "D"]
    done = act("--stage", "expert", *flags)
    assert done.returncode == 0 and "notes: from 0." in done.stdout
    done = act("--stage", "eval", *flags)
    assert done.returncode == 0 and done.stdout.count("\nnotes ") == 3
    assert act("--stage", "expert", "--forest", "F", "--domain", "absent").stderr.count("--prepare makes one") == 1


FULL = (
    "--full --num-layers 1 --d-model 16 --num-heads 2 --context 32 --blocks-per-domain 4 --micro-batch 8 "
    "--dev-blocks 3 --branch-steps 2 --test-blocks 4 --workers 1 --threads 1 --data-dir D"
).split()


def test_full_scale_code_on_prepared_text_and_a_token_budget(act, tmp_path):
    labels = list(text_data.PILE)
    with open(tmp_path / "val.jsonl", "w") as file:
        for i in range(16 * 200):
            content = f"{labels[i % 16]} number {i}: {i * i} and {i * i * i}. " * 3
            file.write(json.dumps({"text": content, "meta": {"pile_set_name": labels[i % 16]}}) + "\n")
    done = act("--prepare", "val.jsonl", "--data-dir", "D")
    assert done.returncode == 0 and "too little" not in done.stdout
    done = act(*FULL, "--tokens", "5e3")
    assert done.returncode == 0, done.stderr
    report = report_of(tmp_path / "runs" / "btm-full")
    assert (
        report["config"]["steps"] == 4
        and report["config"]["conv"] == 0
        and len(report["results"]["costs"]) == 2 + 8 + 8 + 2
    )
    assert "--tokens chooses" in done.stdout
    lacking = act(*FULL, "--out", "other", "--data-dir", "E")
    assert lacking.returncode == 2 and "btm/web: no such folder; --prepare makes one" in lacking.stderr


def test_full_scale_code_on_token_ids(act, tmp_path):
    for i, name in enumerate(("a", "b", "c")):
        folder = tmp_path / "D" / "btm" / name
        folder.mkdir(parents=True)
        for part in ("train", "valid", "test"):
            ids = torch.randint(300 * i, 300 * i + 300, (2000,), generator=torch.Generator().manual_seed(i))
            (folder / f"{part}.bin").write_bytes(ids.numpy().astype("<u2").tobytes())
        (folder / "meta.json").write_text('{"vocab_size": 900, "eot": 0}')
    flags = [*FULL, "--domains", "a,b", "--novel", "c", "--grow", "c", "--steps", 4]
    done = act(*flags)
    assert done.returncode == 0, done.stderr
    assert report_of(tmp_path / "runs" / "btm-full")["config"]["vocab_size"] == 900
    refused = act("--sample", "x", "--forest", "runs/btm-full/forest-seed0", "--data-dir", "D")
    assert refused.returncode == 2 and "trained on token ids" in refused.stderr
    done = act(*flags, "--out", "mixed", "--novel", "python", "--grow", "python")
    assert done.returncode == 2 and "vocabularies differ" in done.stderr


@pytest.mark.parametrize(
    "flags, expected",
    [
        (["--seed-shar", "0.5"], "--seed-share"),
        (["--seed-share", "1"], "between 0 and 1"),
        (["--seed-share", "0.01", "--steps", "4"], "leave nothing to the seed"),
        (["--tokens", "1000"], "0 updates of 1,536 tokens leave nothing"),
        (["--domains", "python"], "two domains or more"),
        (["--domains", "python,python"], "none twice"),
        (["--domains", "python,poems"], "btm/poems: no such folder"),
        (["--domains", "python,../poems"], "cannot be called '../poems'"),
        (["--domains", "python,seed"], "cannot be called 'seed'"),
        (["--grow", "python"], "grow one of novel"),
        (["--test-blocks", "0"], "test_blocks is 0"),
        (["--conv", "-1"], "conv is -1"),
        (["--context", "20000"], "too short for sequences of 20000"),
        (["--d-model", "30"], "num_heads 4"),
        (["--stage", "expert"], "is no forest"),
        (["--stage", "poem"], "invalid choice"),
        (["--stage", "seed", "--sample", "x"], "goes with one of --stage"),
        (["--without", "python"], "goes with one of --stage"),
        (["--stage", "seed", "--dry-run"], "without --dry-run"),
        (["--top-k", "2"], "--top-k goes with --stage eval"),
        (["--sample-bytes", "20"], "--sample-bytes goes with --sample"),
        (["--stage", "seed", "--d-model", "30"], "num_heads 4"),
        (["--prepare", "absent"], "no such file or folder"),
        (["--resume"], "no run in"),
        (["--full"], "btm/web: no such folder; --prepare makes one"),
    ],
)
def test_mistakes_are_one_line_exit_code_2_and_leave_nothing(act, tmp_path, flags, expected):
    done = act(*flags, "--data-dir", "D")
    assert done.returncode == 2 and expected in done.stderr and done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("flags", [("--sample", "x", "--top-k", 1), ("--domain", "a", "--domain-index", 0)])
def test_flags_that_would_do_nothing_are_refused(act, tmp_path, flags):
    btm.Forest.create(tmp_path / "F", btm.forest_config(TINY, 0))
    stage = () if "--sample" in flags else ("--stage", "expert")
    done = act(*BTM, *stage, "--forest", "F", *flags)
    assert done.returncode == 2 and ("goes with --stage eval" in done.stderr or "exclude each other" in done.stderr)


def test_a_forest_without_a_seed_says_what_comes_first(act, tmp_path):
    btm.Forest.create(tmp_path / "F", btm.forest_config(TINY, 0))
    done = act("--stage", "expert", "--forest", "F")
    assert done.returncode == 2 and "no seed yet; --stage seed comes first" in done.stderr


def test_dry_run_writes_nothing_and_diverging_training_is_one_line(act, tmp_path):
    done = act(*BTM, "--dry-run")
    assert done.returncode == 0 and "training FLOPs" in done.stdout and list(tmp_path.iterdir()) == []
    tiny = ("--num-layers", 1, "--d-model", 16, "--num-heads", 2, "--context", 64)
    done = act("--full", "--device", "cpu", *tiny, "--dry-run", "--data-dir", tmp_path)  # before --prepare
    assert done.returncode == 0 and "web: no such folder; --prepare makes one" in done.stdout
    assert "1/32 of a step" in done.stdout and list(tmp_path.iterdir()) == []
    done = act(*BTM, "--lr", "1e30", "--workers", 1)
    assert done.returncode == 1 and done.stderr.splitlines()[-1].count("lower --lr") == 1
