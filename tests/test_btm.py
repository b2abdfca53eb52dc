"""btm.py: the arithmetic, averages, the forest on disk, equal costs, and what others can add."""

import inspect
import itertools
import json
import math
import os
import pickle
import shlex
import shutil
import signal
import subprocess
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import imports_of_the_page, same_handlers
from forked import ended, finished
from tiny import BTM
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

import btm
import common
from data import arrays
from data import text as text_data

F64 = torch.float64
TINY = replace(
    btm.SMALL,
    domains=("python", "docs", "unicode"),
    novel=("cmake", "sums"),
    num_layers=1,
    d_model=16,
    num_heads=2,
    context=16,
    steps=4,
    branch_steps=2,
    test_blocks=4,
    dev_blocks=3,
)
P = torch.tensor([[0.5, 0.25, 0.5], [0.25, 0.5, 0.125]], dtype=F64).log()[:, None]  # [2, 1, 3]
EVEN = torch.tensor([0.5, 0.5], dtype=F64).log()
SKEWED = torch.tensor([0.8, 0.2], dtype=F64).log()


def near(found, expected, tolerance=1e-12):
    found, expected = torch.as_tensor(found, dtype=F64), torch.as_tensor(expected, dtype=F64)
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=0)


def random_logprobs(*shape, seed=0):
    return -torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64).exp()


# --- the posterior


def test_the_worked_example_of_the_docstring():
    nll, weights = btm.ensemble_nll(P, EVEN)
    near(weights[0, 0], [1 / 2, 2 / 3, 1 / 2])
    near(nll.neg().exp()[0], [0.375, 1 / 3, 0.3125])
    near(nll.sum().neg().exp(), (0.0625 + 0.015625) / 2)  # the mean of both texts' probabilities
    for line in ("1/2     2/3     1/2", "0.375   0.333   0.3125", "(0.0625 + 0.015625) / 2"):
        assert line in btm.__doc__
    after_the_last, found = 4 / 5, btm.log_posterior(P, EVEN)[0, 0].exp()
    near(found, [1 / 2, 2 / 3, 1 / 2, after_the_last])
    nll, weights = btm.ensemble_nll(P, SKEWED)
    near(weights[0, 0], [0.8, 8 / 9, 0.8])
    near(nll.neg().exp()[0], [0.45, 5 / 18, 0.425])


def test_the_ensemble_is_bayesian_and_never_much_worse_than_its_best_expert():
    """prod_t p_t = sum_j prior_j prod_t p_j: at most log(1 / prior_j) more than expert j."""
    for seed in range(20):
        logprobs, prior = random_logprobs(5, 7, 30, seed=seed), torch.rand(5, dtype=F64) + 0.01
        log_prior = (prior / prior.sum()).log()
        text = btm.ensemble_nll(logprobs, log_prior)[0].sum(-1)
        near(text, -(log_prior[:, None] + logprobs.sum(-1)).logsumexp(0), 1e-10)
        assert (text <= (-logprobs.sum(-1) - log_prior[:, None]).min(0).values + 1e-10).all()


@pytest.mark.parametrize("window", [None, 0, 1, 4, 99])
def test_evidence_is_the_window_before_a_token_and_never_the_token(window):
    logprobs = random_logprobs(3, 2, 9)
    _, weights = btm.ensemble_nll(logprobs, torch.zeros(3), window)
    for t in range(9):
        first = 0 if window is None else max(0, t - window)
        near(weights[:, :, t], logprobs[:, :, first:t].sum(-1).softmax(0))


def test_extreme_evidence_stays_finite_and_an_excluded_expert_gets_exactly_nothing():
    logprobs = torch.full((3, 1, 1024), -1e4)
    logprobs[1] = -0.1
    nll, weights = btm.ensemble_nll(logprobs, torch.tensor([0.0, -1.0, -math.inf]))
    assert torch.isfinite(nll).all() and (weights[2] == 0).all()
    near(weights.sum(0), torch.ones(1, 1024))
    by_block = btm.ensemble_nll(P.expand(2, 4, 3), SKEWED[:, None].expand(2, 4))  # a prior a block
    near(by_block[0], btm.ensemble_nll(P, SKEWED)[0].expand(4, 3))


@pytest.mark.parametrize(
    "logprobs, prior, window, message",
    [
        (P, torch.full((2,), -math.inf), None, "no mass"),
        (P, torch.tensor([math.nan, 0.0]), None, "NaN or above 0"),
        (P, torch.tensor([0.3, 0.7]), None, "give prior.log"),
        (-P, SKEWED, None, "log_softmax"),
        (P, torch.zeros(3), None, r"\[E, N, T\]"),
        (P[:, 0], torch.zeros(2), None, r"\[E, N, T\]"),
        (P, EVEN, -1, "window is -1"),
        (P * math.nan, EVEN, None, "NaN or infinity"),
    ],
)
def test_impossible_ensembles_are_refused(logprobs, prior, window, message):
    with pytest.raises(ValueError, match=message):
        btm.ensemble_nll(logprobs, prior, window)


def test_parity_with_the_released_scorer():
    """Known answers: DEMix's SequenceScorer and moving average, run on these very tensors."""
    x = torch.arange(60).view(3, 4, 5)
    logprobs = -(1 + ((x * x * 7) % 11).double() / 4)
    prior = btm.released_prior(logprobs)
    near(prior, [0.26285867, 0.25904691, 0.47809442], 1e-8)
    near(btm.released_prior(logprobs, batches=1), [0.22225835, 0.22974556, 0.54799610], 1e-8)
    nll = btm.released_nll(logprobs, prior)
    near(nll[0], [1.49448165, 2.86097921, 1.80257073, 2.78104832, 1.35551963], 1e-7)
    near(nll[1], [3.03716336, 2.21216242, 2.95444226, 2.36665321, 3.05021690], 1e-7)
    # Not ours: at the first token it forgets the prior, and its prior looks at last positions.
    ours = btm.ensemble_nll(logprobs, prior.log(), window=1)[0]
    near(ours[:, 1:], nll[:, 1:])
    near(ours[0, 0], 1.49324970, 1e-8)
    near(btm.cached_prior(logprobs), [0.35367193, 0.28273179, 0.36359629], 1e-8)


# --- priors


def test_the_cached_prior_is_a_plain_mean_in_which_every_block_counts():
    logprobs = random_logprobs(3, 100, 10)
    _, weights = btm.ensemble_nll(logprobs, torch.zeros(3))
    near(btm.cached_prior(logprobs), weights.mean(dim=(1, 2)))
    near(btm.cached_prior(logprobs.flip(1)), btm.cached_prior(logprobs))
    near(btm.cached_prior(logprobs, blocks=20), btm.cached_prior(logprobs[:, :20]))
    moving = btm.cached_prior(logprobs, rate=0.3)  # the last twenty of the hundred say it all
    near(moving, btm.cached_prior(logprobs[:, 80:], rate=0.3), 1e-3)
    assert (btm.cached_prior(logprobs) - btm.cached_prior(logprobs[:, 80:])).abs().max() > 1e-2
    with pytest.raises(ValueError, match="no blocks"):
        btm.cached_prior(logprobs[:, :0])


def test_moving_average_by_hand():
    posteriors = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8]], dtype=F64)
    near(btm.moving_average(posteriors, 0.3), [0.627, 0.373])


# --- averages


def test_parameter_average_by_hand():
    a = {"w": torch.tensor([1.0, 2.0, 3.0]), "n": torch.tensor(7)}
    b = {"w": torch.tensor([3.0, -2.0, 5.0]), "n": torch.tensor(9)}
    average = btm.average_parameters([a, b], [0.25, 0.75])
    assert average["w"].tolist() == [2.5, -1.0, 4.5] and average["n"] == 7
    average["n"] += 1
    assert a["n"] == 7 and a["w"].tolist() == [1.0, 2.0, 3.0]  # inputs stay
    assert torch.equal(btm.average_parameters([a, b], torch.tensor([0.0, 1.0]))["w"], b["w"])


def test_an_average_holds_one_state_at_a_time():
    alive = weakref.WeakSet()
    most = 0

    class Weights(torch.Tensor):
        pass

    def states():
        nonlocal most
        for number in range(6):
            weights = torch.full((4,), float(number)).as_subclass(Weights)
            alive.add(weights)
            most = max(most, len(alive))
            yield {"w": weights}
            del weights

    average = btm.average_parameters(states(), [1 / 6] * 6)
    assert average["w"].tolist() == [2.5] * 4
    assert most <= 3  # the copy of the first, the last one and the next


@pytest.mark.parametrize(
    "other, weights, message",
    [
        ({"v": torch.ones(2)}, [0.5, 0.5], "model 2: the parameter 'w' is not in all"),
        ({"w": torch.ones(3)}, [0.5, 0.5], r"model 2: the parameter 'w' is \[3\], not \[2\]"),
        ({"w": torch.tensor([1, math.nan])}, [1.0, 0.0], "model 2: the parameter 'w' holds NaN"),
        ({"w": torch.ones(2)}, [0.5, 0.6], "at least 0 and sum to 1"),
        ({"w": torch.ones(2)}, [1.5, -0.5], "at least 0 and sum to 1"),
        ({"w": torch.ones(2)}, [math.nan, 1.0], "at least 0 and sum to 1"),
        ({"w": torch.ones(2)}, [1.0], "1 weights for 2 models"),
        ({"w": torch.ones(2)}, [0.5, 0.25, 0.25], "3 weights for 2 models"),
    ],
)
def test_impossible_averages_name_the_parameter(other, weights, message):
    with pytest.raises(ValueError, match=message):
        btm.average_parameters([{"w": torch.ones(2)}, other], weights)


def somebodys():
    """A language model: tokens [batch, time] -> logits [batch, time, 50]."""
    return nn.Sequential(nn.Embedding(50, 16), nn.Linear(16, 50))


def test_the_ensemble_module_is_eqs_1_and_2_as_a_language_model():
    models, tokens = [somebodys() for _ in range(3)], torch.randint(50, (4, 9))
    prior = torch.tensor([0.2, 0.5, 0.3], dtype=F64)
    ensemble = btm.Ensemble(models, prior)
    found = ensemble(tokens)
    near(found.exp().sum(-1), torch.ones(4, 9), 1e-6)
    given = torch.stack([model(tokens[:, :-1]).log_softmax(-1) for model in models])
    true = tokens[None, :, 1:, None].expand(3, -1, -1, -1)
    nll, weights = btm.ensemble_nll(given.gather(-1, true)[..., 0], prior.log())
    near(-found[:, :-1].gather(-1, tokens[:, 1:, None])[..., 0], nll, 1e-6)
    near(ensemble.weights[..., :-1], weights, 1e-6)
    other = btm.Ensemble([somebodys() for _ in range(3)])
    other.load_state_dict(ensemble.state_dict())
    near(other(tokens), found, 1e-12)  # the prior is part of it
    for odd in (prior[:2], -prior, prior * math.nan):
        with pytest.raises(ValueError, match="of 3 models; a share each"):
            btm.Ensemble(models, odd)
    text = common.generate(ensemble, tokens[0, :2], 5, context=8)  # a prompt of two tokens
    assert text.shape == (7,)


def test_the_method_runs_pasted_under_import_torch():
    source = inspect.getsource(btm)
    method = source[source.index("def log_posterior") : source.index("class MLP")]
    pasted = {}
    exec(imports_of_the_page("btm") + method, pasted)
    models = [somebodys() for _ in range(3)]
    near(pasted["Ensemble"](models)(torch.zeros(1, 2, dtype=torch.long)).exp().sum(), 2.0, 1e-5)
    pasted["average_parameters"]([model.state_dict() for model in models], [0.2, 0.3, 0.5])


def test_learning_rate_by_hand():
    factors = [btm.learning_rate_factor(s, 100, 0.08) for s in (1, 8, 50, 75, 100)]
    assert factors == pytest.approx([0.125, 1, 0.543478, 0.271739, 0], abs=1e-6)


# --- training: the same data, one schedule, isolation


def make_run(tmp_path, config=TINY, **options):
    (tmp_path / "arms").mkdir(exist_ok=True, parents=True)
    return common.Run("btm", "small", "cpu", torch.float32, [0], tmp_path, config, **options)


def job_of(tmp_path, arm, config=TINY):
    return common.Job(make_run(tmp_path, config), arm, 0)


def test_experts_read_what_the_dense_model_reads_of_their_domain(tmp_path):
    mixed = btm.mixed_batches(job_of(tmp_path, "dense"))
    for step in (0, 3):
        for i, name in enumerate(TINY.domains):
            own = btm.domain_batches(job_of(tmp_path, f"expert@domain={name}"), name)(step)
            assert torch.equal(mixed(step)[i :: len(TINY.domains)], own) and own.shape == (4, 17)
    assert not torch.equal(mixed(0), mixed(1))
    batch = btm.stream(torch.arange(1000), 2, 3, "0 python")(5)  # unlike hash() in any process
    assert batch.tolist() == [[570, 571, 572, 573], [849, 850, 851, 852]]


def test_a_job_reads_the_very_text_that_main_has_read(tmp_path):
    run, part = make_run(tmp_path), torch.zeros(99, dtype=torch.uint8)
    kept = text_data.Split("docs", part, part, part, digest="abc")
    common.save(tmp_path / "texts" / "docs-abc.pt", kept._asdict())
    run.data = {"docs": "abc"}
    assert torch.equal(btm.read_domain("docs", run).train, part)
    run.data = {"docs": "def"}  # that of another run: the sources are read
    assert len(btm.read_domain("docs", run).train) > 99


def test_random_shards_are_disjoint_cover_everything_and_are_stayed_in(tmp_path, monkeypatch):
    data = torch.arange(100)
    assert torch.equal(torch.cat([btm.shard(data, i, 7) for i in range(7)]), data)
    texts = {}
    for i, name in enumerate(TINY.domains):  # byte = 16 * shard + domain
        texts[name] = (16 * (torch.arange(600) * 3 // 600) + i).to(torch.uint8)
    fake = lambda name, run: text_data.Split(name, texts[name], texts[name], texts[name], "")
    monkeypatch.setattr(btm, "read_domain", fake)
    batches = btm.random_batches(job_of(tmp_path, "shard@domain=unicode"))
    seen = torch.cat([batches(step) for step in range(60)])
    assert (seen // 16 == 2).all() and (seen % 16).unique().tolist() == [0, 1, 2]
    assert ((seen % 16) == (seen % 16)[:, :1]).all()  # a block is of one domain


def test_costs_match_and_the_dense_model_is_the_seeds_own_run_continued(tmp_path):
    config = replace(TINY, steps=7, seed_share=0.5)
    arms = ["seed", "dense", *btm.models_of("btm", config), *btm.models_of("random", config)]
    found = {arm: btm.train_model(job_of(tmp_path, arm, config)) for arm in arms}
    for system in ("btm", "random"):
        spent = sum(found[arm][1]["tokens"] for arm in btm.models_of(system, config))
        assert spent == found["dense"][1]["tokens"] == 3 * 3 * 4 * 16  # updates, domains, blocks
    assert found["seed"][1]["updates"] == 4
    # Bit for bit the run without a branch point: Adam's moments and the schedule are carried on.
    whole = btm.make_model(config, "0 seed")
    common.train(
        whole,
        lambda windows, step: (common.lm_loss(whole, windows).mean(), {}),
        7,
        batches=btm.mixed_batches(job_of(tmp_path, "dense", config)),
        optimizer=common.adamw(whole, config.lr, config.weight_decay),
        schedule=lambda step: btm.learning_rate_factor(max(1, step), 7),
        clip=config.clip,
    )
    for name, tensor in found["dense"][0].state_dict().items():
        assert torch.equal(whole.state_dict()[name], tensor), name


def test_a_later_round_branches_from_the_average_by_posterior(plain):
    job = common.Job(make_run(plain.parent), "expert@domain=cmake", 0)
    forest = btm.forest_of(job)
    states = [forest.load(forest.file(name))[0] for name in TINY.domains]
    found = btm.branch(job, forest)
    prior = btm.prior_of(forest, TINY.domains, "cmake", TINY, job.run)
    expected = btm.average_parameters(states, prior)
    assert all(torch.equal(found.model.state_dict()[name], expected[name]) for name in expected)
    assert found.updates == range(2) and found.lr == TINY.branch_lr  # Adam and warm-up: afresh
    assert found.parents == dict(zip(TINY.domains, prior.tolist()))


def test_experts_learn_their_domains_and_the_posterior_finds_them(tmp_path):
    """On generated text, end to end; averages by posterior beat equal weights."""
    sizes = {"d_model": 32, "context": 32, "steps": 150, "test_blocks": 16}
    config = replace(TINY, domains=("sums", "numerals"), novel=("dates",), **sizes)
    run = make_run(tmp_path, config)
    for arm in ("seed", "dense", *btm.models_of("btm", config)):
        common.Job(run, arm, 0).do(btm.train_arm)
    result, bits = btm.merge(common.Job(run, "btm", 0)), {}
    for arm in ("seed", *btm.models_of("btm", config)):
        bits[arm] = common.Job(run, arm, 0).result()["bits"]
    for own in (0, 1):
        at_home = bits[f"expert@domain={config.domains[own]}"][own]
        abroad = bits[f"expert@domain={config.domains[1 - own]}"][own]
        assert at_home < bits["seed"][own] < abroad and result["weights"][own][own] > 0.9
        assert result["posterior"][own] < result["uniform"][own]
        assert result["without"][own][own] > result["eq2"][own]  # it is missed where it was at home


# --- the forest


@pytest.fixture
def forest(tmp_path):
    forest = btm.Forest.create(tmp_path / "F", TINY, 0)
    for name in ("seed", "a", "b"):
        forest.save(forest.file(name), btm.make_model(TINY, name), {"parents": {"seed": 1.0}})
    return forest


def test_an_expert_is_a_file_that_comes_back_bit_for_bit(forest, tmp_path):
    state, meta = forest.load(forest.file("a"))
    assert all(map(torch.equal, state.values(), btm.make_model(TINY, "a").state_dict().values()))
    assert meta == {"parents": {"seed": 1.0}, "name": "a", "forest": forest.digest}
    model = btm.load_trained(forest.file("a"))
    assert model.head.weight is model.embedding.weight and not model.training  # tied
    os.rename(forest.file("b"), tmp_path / "b.npz")
    assert forest.names() == ["a"]
    os.rename(tmp_path / "b.npz", forest.file("c"))  # dropped in, under another name
    with pytest.raises(ValueError, match="'c' refused: it was saved under another name"):
        forest.load(forest.file("c"))
    for config, seed, message in (
        (replace(TINY, lr=0.5), 0, "lr = 0.01, not 0.5"),
        (TINY, 1, "seed = 0, not 1"),
    ):
        with pytest.raises(common.UsageError, match=message):
            btm.Forest.create(forest.path, config, seed)


class Bomb:
    def __reduce__(self):
        return os.system, ("touch exploded",)


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[5000] ^= 1
    path.write_bytes(content)


def save(path, state, meta, *without, **changes):
    kept = {key: value for key, value in (meta | changes).items() if key not in without}
    arrays.save_arrays(path, state, kept)


DAMAGE = {  # what the refusal says: how the file of expert "a" came to it
    "nothing is unpickled": lambda path, *_: np.savez(path, w=np.array([Bomb()], dtype=object)),
    "no zip archive of arrays": lambda path, *_: path.write_bytes(pickle.dumps(Bomb())),
    "damaged": lambda path, *_: flip_a_bit(path),
    "larger than this architecture needs": lambda path, *_: os.truncate(path, 50_000_000),
    "missing or unexpected arrays": lambda path, _, meta: save(path, {"w": torch.ones(1)}, meta),
    "made for another forest": lambda *file: save(*file, forest="0" * 12),
    "impossible parents": lambda *file: save(*file, parents={"../../x": 1.0}),
    "not supported": lambda *file: save(*file, parents={"seed": "1.0"}),
    "'parents'": lambda *file: save(*file, "parents"),
    "another name": lambda path, state, meta: save(path, state, meta, name="b"),
}


@pytest.mark.parametrize("message", DAMAGE)
def test_a_damaged_or_hostile_expert_is_one_line_and_the_rest_goes_on(
    forest, message, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    path = forest.file("a")
    DAMAGE[message](path, *forest.load(path))
    with pytest.raises(ValueError, match="^'a' refused: ") as refusal:
        forest.load(path)
    assert message in str(refusal.value) and "\n" not in str(refusal.value)
    capsys.readouterr()
    assert list(forest.sound()) == ["b"] and capsys.readouterr().out.count("\n") == 1
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("name", ["../a", "/etc", "", ".", "a/b", "x" * 65, "a\n", ".hidden"])
def test_a_name_that_leads_out_of_the_forest_is_refused(forest, name):
    with pytest.raises(ValueError, match="a domain cannot be called"):
        forest.file(name)


@pytest.mark.parametrize(
    "text",
    ["[]", "[" * 99_999, '"lr": "fast"', '"num_layers": 1000000000', '"domains": ["../x", "y"]',
     '"seed": "0"', '"more": 1'],
)  # fmt: skip
def test_a_damaged_forest_is_one_line(forest, text):
    mark = forest.path / "forest.json"
    if not text.startswith("["):
        text = mark.read_text().replace("\n}", f",{text}}}")  # the last of two equal keys counts
    mark.write_text(text)
    with pytest.raises(common.UsageError, match="forest.json is damaged"):
        btm.Forest(forest.path)


def killed_while_saving(path):
    """Die when the file is written, but not yet renamed."""
    forest = btm.Forest(path)
    os.replace = lambda *paths: os.kill(os.getpid(), signal.SIGKILL)
    forest.save(forest.file("b"), btm.make_model(TINY, "c"), {"parents": {}})


def test_killed_while_saving_the_old_expert_stays(fork, forest):
    before = forest.file("b").read_bytes()
    assert ended(fork.call(killed_while_saving, forest.path)) == -signal.SIGKILL
    assert forest.file("b").read_bytes() == before and list(forest.sound()) == ["a", "b"]


# --- claims

IN, NOVEL = len(btm.SMALL.domains), len(btm.SMALL.novel)


def results_of(**changes):
    """Eight seeds in which every claim holds: {arm: {key: (in domain, novel)}}, with changes."""
    levels = {
        "dense": {"bits": (3.0, 4.0)},
        "btm": {
            **{"eq2": (2.8, 3.9), "last": (2.8, 3.8), "released": (2.9, 3.9), "moving": (2.9, 4.0)},
            **{"posterior": (2.9, 3.9)},
        },
        "random": {"eq2": (3.1, 4.1), "last": (3.2, 4.1)},
        "btm@seed_share=0.25": {"eq2": (2.9,), "posterior": (2.9,)},
        "btm@seed_share=0.5": {"eq2": (2.9,), "posterior": (2.9,)},
        "dense@num_domains=2": {"bits": (3.0,)},
        "btm@num_domains=2": {"eq2": (2.95,)},
        "dense@num_domains=4": {"bits": (3.0,)},
        "btm@num_domains=4": {"eq2": (2.9,)},
    }
    for change, level in changes.items():
        arm, key = change.split("__")
        levels[arm.replace("_at_", "@").replace("_is_", "=")][key] = level
    results = common.Results()
    for arm, keys in levels.items():
        seeds = range(8)
        results[arm] = [{} for _ in seeds]
        for key, level in keys.items():
            row = [level[0]] * IN + [level[-1]] * NOVEL
            for seed in seeds:
                results[arm][seed][key] = [value + 0.001 * (seed % 2) for value in row]
    for seed in range(8):
        plain = np.array(results["btm"][seed]["eq2"])
        results["btm"][seed]["without"] = (plain + np.eye(IN, IN + NOVEL)).tolist()
        grown = plain - np.eye(NOVEL, IN + NOVEL, k=IN)
        results.setdefault("grow", []).append({"eq2": grown.tolist()})
    return results


def verdicts(results):
    found = {}
    for claim in common.claims_of(btm.main):
        if not claim.is_check:
            claim.judge(results, btm.SMALL)
            found[claim.id.partition(".")[2]] = claim.verdict
    return found


def test_every_claim_can_hold_and_can_fail():
    assert set(verdicts(results_of()).values()) == {"holds"}
    for name, change in {
        "in_domain": {"btm__eq2": (3.1, 3.9)},
        "out_of_domain": {"btm__eq2": (2.8, 4.1)},
        "random_split": {"random__last": (2.9, 4.1)},
        "posterior_average": {"btm__posterior": (3.1, 3.9)},
        "plain_prior": {"btm__moving": (2.9, 3.8)},
        "robust_to_seed": {"btm_at_seed_share_is_0.25__eq2": (3.1,)},
        "more_domains": {"btm_at_num_domains_is_4__eq2": (2.99,)},
    }.items():
        assert verdicts(results_of(**change))[name] == "contradicted", name


def test_the_worst_domain_and_the_worst_expert_decide():
    results = results_of()
    for result in results["btm"]:
        result["eq2"][2] += 0.25  # docs
    claim = next(claim for claim in common.claims_of(btm.main) if claim.id == "btm.in_domain")
    claim.judge(results, btm.SMALL)
    assert claim.verdict == "contradicted"
    assert "-0.0500 bits/byte on docs, the weakest" in claim.measured
    for table, where in (("btm", "without"), ("grow", "eq2")):
        for change in (0.3, -0.3):  # one expert, one other domain; for the better is a change, too
            results = results_of()
            for result in results[table]:
                result[where][1][4] += change
            assert verdicts(results)["add_remove"] == "contradicted"


# --- commands


@pytest.fixture
def act(tmp_path, monkeypatch, capsys):
    """act("--stage", "eval", ...): a command of the script, in this process and in an empty folder."""
    monkeypatch.chdir(tmp_path)
    btm.find_text.cache_clear()  # --data-dir D is another folder in every test

    def run(*flags):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            common.run(btm.main, btm.SMALL, btm.FULL, list(map(str, flags)), actions=btm.ACTIONS)
        out, err = capsys.readouterr()
        return subprocess.CompletedProcess(flags, stop.value.code, out, err)

    with same_handlers():
        yield run


FLAGS = [*BTM, "--workers", "1", "--domains", "python,docs,unicode"]
WHOLE = [*FLAGS, "--novel", "cmake,sums"]
SEED = shlex.split(" ".join(FLAGS).replace("--branch-steps 2 --test-blocks 4 --dev-blocks 3", ""))


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The forest of a plain run."""
    folder = tmp_path_factory.mktemp("plain")
    flags = [*WHOLE, "--out", str(folder)]
    with same_handlers(), pytest.raises(SystemExit) as stop:
        common.run(btm.main, btm.SMALL, btm.FULL, flags, actions=btm.ACTIONS)
    assert stop.value.code == 0
    return folder / "forest-seed0"


def contents(forest):
    """{name: weights} of a forest, without what depends on the run."""
    forest = btm.Forest(forest)
    return {name: forest.load(forest.file(name))[0] for name in ["seed", *forest.names()]}


def same(a, b, names):
    return all(torch.equal(a[name][key], b[name][key]) for name in names for key in a[name])


def table(text, title):
    """{first cell: other cells} of a printed table."""
    lines = text.split(title)[1].split("\n\n")[0].splitlines()[3:]
    return {line.split()[0]: line.split()[1:] for line in lines}


def stop_itself():
    """The process gets SIGTERM after 20 of its 60 updates."""
    updates = itertools.count(1)

    def hook(*_):
        if next(updates) == 20:
            os.kill(os.getpid(), signal.SIGTERM)

    register_optimizer_step_post_hook(hook)


def test_two_machines_and_a_day_grow_one_forest(act, fork, plain, tmp_path):
    """One is killed, another goes on; a domain is added with twice the steps, one removed;
    averaged; sampled.
    """
    assert act(*SEED, "--steps", 240, "--stage", "seed", "--forest", "F").returncode == 0
    shutil.copytree(tmp_path / "F", tmp_path / "whole")
    expert = ["--stage", "expert", "--forest"]
    stopped = finished(
        fork("btm.py", *expert, "F", "--domain-index", 1, folder=tmp_path, prepare=[stop_itself])
    )
    assert stopped.returncode == 143
    command = stopped.stderr.split("Go on with: ")[1]
    assert act(*expert, "F", "--domain", "python").returncode == 0  # beside it
    again = fork("btm.py", *shlex.split(command)[2:], folder=tmp_path)  # what it printed
    assert finished(again).returncode == 0
    assert "60 updates" in finished(again).stdout  # each of them once
    elsewhere = fork("btm.py", *expert, "F", folder=tmp_path / "elsewhere")
    assert finished(elsewhere).returncode == 2  # a relative folder is another one there
    assert act(*expert, "F").stdout.count("is there already; delete it") == 2
    assert act(*expert, "whole").returncode == 0
    assert same(contents("F"), contents("whole"), ["seed", "python", "docs", "unicode"])

    (tmp_path / "notes").mkdir()
    for i in range(120):
        lines = "\n\n".join(f"note {i}: {i * j} apples, {i + j * j} pears" for j in range(30))
        (tmp_path / "notes" / f"{i}.txt").write_text(lines)
    (tmp_path / "notes" / "old.txt.gz").write_bytes(b"packed")
    data = ["--data-dir", "D"]
    prepared = act("--prepare", "notes", "--domain", "notes", *data)
    assert prepared.returncode == 0 and "notes" in prepared.stdout
    grow = [*expert, "F", "--domain", "notes", "--branch-steps", 120, "--branch-lr", 1e-3]
    assert "120 updates" in act(*grow, *data).stdout
    forest = btm.Forest(tmp_path / "F")
    assert set(forest.load(forest.file("notes"))[1]["parents"]) == {"python", "docs", "unicode"}
    forest.file("docs").unlink()  # removed
    few = ["--dev-blocks", 3, "--test-blocks", 4, "--novel", "sums"]
    told = act("--stage", "eval", "--forest", "F", *few, *data)
    believed = table(told.stdout, "whom eq. 2 believes")
    assert list(believed) == ["python", "docs", "unicode", "sums", "notes"]  # rows: every domain
    assert all(len(row) == 3 for row in believed.values())  # columns: every expert that is there
    assert float(believed["notes"][2]) > 0.9  # python, unicode, notes

    for kind, flags in (("uniform", []), ("posterior", ["--domain", "notes", "--dev-blocks", 3])):
        saved = act("--average", kind, "--forest", "F", *flags, *data)
        assert saved.returncode == 0 and saved.stdout.startswith("F/averages/")
    average = btm.load_trained(tmp_path / "F" / "averages" / "notes.npz")
    test = text_data.load_split(tmp_path / "D" / "btm" / "notes").test
    windows = text_data.spread_windows(test, 16, 8)
    uniform = btm.load_trained(tmp_path / "F" / "averages" / "uniform.npz")
    losses = [common.lm_loss(model, windows).mean() for model in (average, uniform)]
    assert losses[0] < losses[1]
    for more in (["--forest", "F"], ["--model", "F/averages/notes.npz"]):
        told = act("--sample", "note 7", *more)
        assert told.returncode == 0 and told.stdout.startswith("note 7")
        assert told.stdout == act("--sample", "note 7", *more).stdout
        assert ("believed at the end" in told.stdout) == ("--forest" in more)


def test_a_plain_run_and_separate_commands_make_one_forest(act, plain, tmp_path):
    assert act(*SEED, "--stage", "seed", "--forest", "F").returncode == 0
    assert act("--stage", "expert", "--forest", "F").returncode == 0
    few = ["--dev-blocks", 3]
    added = act(
        "--stage", "expert", "--forest", "F", "--domain", "cmake", "--branch-steps", 2, *few
    )
    assert added.returncode == 0
    names = ["seed", "python", "docs", "unicode", "cmake"]
    assert same(contents("F"), contents(plain), names)
    told = act("--stage", "eval", "--forest", plain, "--without", "cmake,sums",
               "--novel", "cmake,sums", "--test-blocks", 4, *few)  # fmt: skip
    rows = table(told.stdout, "bits/byte on test text")
    result = json.loads((plain.parent / "results.json").read_text())["results"]["arms"]["btm"][0]
    for number, name in enumerate(("python", "docs", "unicode", "cmake", "sums")):
        rules = [rule for rule in btm.RULES if rule != "uniform"]
        assert rows[name][1:] == [f"{result[rule][number]:.3f}" for rule in rules]


def test_under_torchrun_the_run_is_that_of_one_process(fork, plain, tmp_path):
    two = fork.two("btm.py", *WHOLE, "--out", tmp_path / "out", folder=tmp_path)
    first, second = map(finished, two)
    assert [first.returncode, second.returncode] == [0, 0] and second.stdout == "", first.stderr
    assert first.stdout.count("claims of the paper") == 1
    forest = contents(tmp_path / "out" / "forest-seed0")
    assert same(forest, contents(plain), forest)


def test_a_run_that_lost_arms_trains_them_again_to_the_same_results(act, tmp_path):
    assert act(*WHOLE, "--ablate", "--out", "out").returncode == 0
    out = tmp_path / "out"
    report = json.loads((out / "results.json").read_text())
    assert all(claim["verdict"] != "not measured" for claim in report["claims"])
    before = contents(out / "forest-seed0")
    for arm in ("expert@domain=docs", "seed@num_domains=2"):
        (out / "arms" / f"{arm}-seed0.json").unlink()
    (out / "forest-seed0" / "experts" / "docs.npz").unlink()
    assert act(*WHOLE, "--ablate", "--out", "out", "--resume").returncode == 0
    assert json.loads((out / "results.json").read_text())["results"] == report["results"]
    assert same(before, contents(out / "forest-seed0"), before)
    assert act(*WHOLE, "--out", "out", "--overwrite", "--arms", "dense").returncode == 0
    assert btm.Forest(out / "forest-seed0").names() == []  # nobody of the run before is left


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--stage expert --steps 6", "was made with steps = 4, not 6"),
        ("--stage expert --seed 3", "was made with seed = 0, not 3"),
        ("--stage eval --domains python,docs", "was made with domains = python,docs,unicode"),
        ("--stage eval --lr 0.5", "was made with lr = 0.01, not 0.5"),
        ("--stage seed", "was made with"),
        ("--stage expert --domain python --branch-steps 150", "does nothing for python"),
        ("--stage expert --novel cmake", "--novel does nothing with --stage expert"),
        ("--stage expert --domain-index 3", "counts the 3 domains from 0"),
        ("--stage expert --domain-index 1 --domain docs", "--domain excludes it"),
        ("--stage expert --domain seed", "cannot be called 'seed'"),
        ("--stage expert --domain poems", "poems: no such folder; --prepare makes one"),
        ("--stage eval --branch-steps 3", "--branch-steps does nothing with --stage eval"),
        ("--stage eval --ablate", "--ablate does nothing with --stage eval"),
        ("--stage eval --seeds 3", "--seeds does nothing with --stage eval"),
        ("--stage eval --without poems", "there is no expert 'poems'"),
        ("--stage eval --without python,docs,unicode,cmake,sums", "no expert to use"),
        ("--stage eval --sample x", "goes with one of --stage"),
        ("--sample x --domain docs", "--domain does nothing with --sample"),
        ("--sample x --model F/averages/uniform.npz", "--forest does nothing with --model"),
        ("--average posterior", "goes with the --domain it is for"),
        ("--average uniform --domain docs", "uniform without"),
        ("--without docs", "goes with one of --stage"),
    ],
)
def test_with_a_forest_flags_are_used_or_refused(act, plain, flags, message):
    done = act(*flags.split(), "--forest", plain)
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1, done


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--seed-share 0.01 --steps 4", "leaves nothing to the seed"),
        ("--num-domains 7", "num_domains is 7 of 6 domains"),
        ("--domains python", "two or more are needed"),
        ("--domains python,numpy", "none of them twice"),
        ("--domains python,poems", "btm/poems: no such folder"),
        ("--domains python,../poems", "cannot be called '../poems'"),
        ("--context 20000", "too short for sequences of 20000"),
        ("--d-model 30", "multiple of num_heads"),
        ("--domain docs", "--domain goes with one of --stage"),
        ("--stage expert", "is no forest"),
        ("--sample x --model F/averages/poems.npz", "poems.npz: there is no such file"),
        ("--stage seed --dry-run", "--dry-run does nothing with --stage seed"),
        ("--prepare absent", "no such file or folder"),
        ("--full", "btm/web: no such folder; --prepare makes one"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(act, tmp_path, flags, message):
    done = act(*flags.split(), "--data-dir", "D")
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1, done
    assert list(tmp_path.iterdir()) == []


FULL = shlex.split(
    "--full --num-layers 1 --d-model 16 --num-heads 2 --context 32 --blocks-per-domain 4 "
    "--micro-batch 8 --dev-blocks 3 --branch-steps 2 --test-blocks 4 --workers 1 --threads 1 "
    "--data-dir D"
)


def test_full_scale_on_the_pile_by_its_labels(act, tmp_path):
    labels = list(text_data.PILE)
    (tmp_path / "pile").mkdir()
    with open(tmp_path / "pile" / "val.jsonl", "w") as file:
        for i in range(16 * 200):
            text = f"{labels[i % 16]} number {i}: {i * i} and {i * i * i}. " * 3
            file.write(json.dumps({"text": text, "meta": {"pile_set_name": labels[i % 16]}}) + "\n")
    (tmp_path / "pile" / "00.jsonl.zst").write_bytes(b"packed")  # is passed over
    done = act("--prepare", "pile", "--data-dir", "D")
    assert done.returncode == 0 and "too little" not in done.stdout, done
    done = act(*FULL, "--steps", 4, "--arms", "btm")
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "runs" / "btm-full" / "results.json").read_text())
    assert report["config"]["conv"] == 0 and len(report["results"]["arms"]) == 1 + 8 + 1


def test_full_scale_on_token_ids(act, tmp_path):
    for i, name in enumerate(("a", "b", "c")):
        folder = tmp_path / "D" / "btm" / name
        folder.mkdir(parents=True)
        for part in ("train", "valid", "test"):
            generator = torch.Generator().manual_seed(i)
            ids = torch.randint(300 * i, 300 * i + 300, (2000,), generator=generator)
            (folder / f"{part}.bin").write_bytes(ids.numpy().astype("<u2").tobytes())
        (folder / "meta.json").write_text('{"vocab_size": 900}')
    flags = [*FULL, "--domains", "a,b", "--steps", 4]
    assert act(*flags, "--novel", "c", "--arms", "btm", "grow").returncode == 0
    forest = ["--forest", "runs/btm-full/forest-seed0", "--full", "--data-dir", "D"]
    refused = act("--sample", "x", *forest)
    assert refused.returncode == 2 and "trained on token ids" in refused.stderr
    run = act(*flags, "--novel", "python", "--out", "o")
    stage = act("--stage", "expert", "--domain", "docs", *forest)
    assert run.returncode == 2 and "vocabularies differ" in run.stderr
    assert stage.returncode == 2 and "vocab_size = 900" in stage.stderr


def test_a_dry_run_of_full_scale_needs_no_text(act, tmp_path):
    few = ["--device", "cpu", "--num-layers", 1, "--d-model", 16, "--num-heads", 2]
    done = act("--full", "--dry-run", *few, "--data-dir", tmp_path)
    assert done.returncode == 0 and "web: no such folder; --prepare makes one" in done.stdout, done
    assert "training FLOPs" in done.stdout and list(tmp_path.iterdir()) == []
