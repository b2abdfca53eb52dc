"""btm.py: its arithmetic, the forest on disk, equal costs. Claims: see test_house.py."""

import inspect
import json
import math
import os
import shlex
import shutil
import signal
from dataclasses import replace
from functools import partial

import pytest
import torch
from conftest import imports_of_the_page, train_on_next_to_nothing
from tiny import BTM
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

import btm
import common
from data import text as text_data

F64 = torch.float64
SIZES = {"num_layers": 1, "d_model": 16, "num_heads": 2, "context": 16}
SIZES |= {"steps": 4, "branch_steps": 2, "test_blocks": 4, "dev_blocks": 3}
TEXTS = {"domains": ("python", "docs", "unicode"), "novel": ("cmake", "sums")}
TINY = replace(btm.SMALL, **SIZES, **TEXTS)
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


def test_the_ensemble_is_bayesian():
    """prod_t p_t = sum_j prior_j prod_t p_j."""
    for seed in range(20):
        logprobs, prior = random_logprobs(5, 7, 30, seed=seed), torch.rand(5, dtype=F64) + 0.01
        log_prior = (prior / prior.sum()).log()
        text = btm.ensemble_nll(logprobs, log_prior)[0].sum(-1)
        near(text, -(log_prior[:, None] + logprobs.sum(-1)).logsumexp(0), 1e-10)


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


def test_impossible_ensembles_are_refused():
    for logprobs, prior, message in [
        (P, torch.tensor([0.3, 0.7]), "give prior.log"),
        (-P, SKEWED, "log_softmax"),
        (P * torch.nan, EVEN, "NaN or infinity"),
    ]:
        with pytest.raises(ValueError, match=message):
            btm.ensemble_nll(logprobs, prior)


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


def test_the_cached_prior_is_a_plain_mean_in_which_every_block_counts():
    logprobs = random_logprobs(3, 100, 10)
    _, weights = btm.ensemble_nll(logprobs, torch.zeros(3))
    near(btm.cached_prior(logprobs), weights.mean(dim=(1, 2)))
    near(btm.cached_prior(logprobs, blocks=20), btm.cached_prior(logprobs[:, :20]))
    moving = btm.cached_prior(logprobs, rate=0.3)  # the last twenty of the hundred say it all
    near(moving, btm.cached_prior(logprobs[:, 80:], rate=0.3), 1e-3)


def test_moving_average_by_hand():
    posteriors = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8]], dtype=F64)
    near(btm.moving_average(posteriors, 0.3), [0.627, 0.373])


def test_parameter_average_by_hand():
    a = {"w": torch.tensor([1.0, 2.0, 3.0]), "n": torch.tensor(7)}
    b = {"w": torch.tensor([3.0, -2.0, 5.0]), "n": torch.tensor(9)}
    average = btm.average_parameters([a, b], [0.25, 0.75])
    assert average["w"].tolist() == [2.5, -1.0, 4.5] and average["n"] == 7
    average["n"] += 1
    assert a["n"] == 7 and a["w"].tolist() == [1.0, 2.0, 3.0]  # inputs stay
    assert torch.equal(btm.average_parameters([a, b], torch.tensor([0.0, 1.0]))["w"], b["w"])


def test_impossible_averages_name_the_parameter():
    for other, weights, message in [
        ({"v": torch.ones(2)}, [0.5, 0.5], "model 2: the parameter 'w' is not in all"),
        ({"w": torch.ones(3)}, [0.5, 0.5], r"model 2: the parameter 'w' is \[3\], not \[2\]"),
        ({"w": torch.tensor([1, torch.nan])}, [1.0, 0.0], "model 2: the parameter 'w' holds NaN"),
        ({"w": torch.ones(2)}, [0.5, 0.6], "at least 0 and sum to 1"),
    ]:
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
    given = torch.stack([model(tokens[:, :-1]).log_softmax(-1) for model in models])
    true = tokens[None, :, 1:, None].expand(3, -1, -1, -1)
    nll, weights = btm.ensemble_nll(given.gather(-1, true)[..., 0], prior.log())
    near(-found[:, :-1].gather(-1, tokens[:, 1:, None])[..., 0], nll, 1e-6)
    near(ensemble.weights[..., :-1], weights, 1e-6)
    other = btm.Ensemble([somebodys() for _ in range(3)])
    other.load_state_dict(ensemble.state_dict())
    near(other(tokens), found, 1e-12)  # the prior is part of it


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


# --- the forest


@pytest.fixture
def forest(tmp_path):
    forest = btm.Forest.create(tmp_path / "F", TINY, 0)
    for name in ("seed", "a", "b"):
        forest.save(forest.file(name), btm.make_model(TINY, name), {"parents": {"seed": 1.0}})
    return forest


def test_an_expert_is_a_file_that_comes_back_bit_for_bit(forest):
    state, meta = forest.load(forest.file("a"))
    assert all(map(torch.equal, state.values(), btm.make_model(TINY, "a").state_dict().values()))
    assert meta == {"parents": {"seed": 1.0}, "name": "a", "forest": forest.digest}
    model = btm.load_trained(forest.file("a"))
    assert model.head.weight is model.embedding.weight and not model.training  # tied


def flip_a_bit(forest, path):
    content = bytearray(path.read_bytes())
    content[5000] ^= 1
    path.write_bytes(content)


def of_another_forest(forest, path):
    other = btm.Forest.create(forest.path.parent / "other", replace(TINY, lr=0.5), 0)
    other.save(path, btm.make_model(TINY, "a"), {"parents": {"seed": 1.0}})


DAMAGE = {  # what the refusal says: how the file of expert "a" came to it
    "damaged": flip_a_bit,
    "made for another forest": of_another_forest,
    "another name": lambda forest, path: shutil.copy(forest.file("b"), path),
}


@pytest.mark.parametrize("message", DAMAGE)
def test_a_damaged_or_foreign_expert_is_one_line_and_the_rest_goes_on(forest, message, capsys):
    """What arrays refuse by themselves, hostile files above all: test_arrays.py."""
    DAMAGE[message](forest, forest.file("a"))
    with pytest.raises(ValueError, match=f"^'a' refused: .*{message}"):
        forest.load(forest.file("a"))
    capsys.readouterr()
    assert list(forest.sound()) == ["b"] and capsys.readouterr().out.count("\n") == 1


def test_a_name_that_leads_out_of_the_forest_is_refused(forest):
    with pytest.raises(ValueError, match="a domain cannot be called"):
        forest.file("../a")


# --- commands


@pytest.fixture
def act(command_line):
    """act("--stage", "eval", ...): a command of the script, in an empty folder."""
    btm.find_text.cache_clear()  # --data-dir D is another folder in every test
    return partial(command_line, btm)


DOMAINS = ["--domains", "python,docs,unicode"]
NAMES = [*DOMAINS, "--novel", "cmake,sums"]
WHOLE = [*BTM, *NAMES, "--workers", 1]
SEED = [*BTM[: BTM.index("--branch-steps")], *DOMAINS]  # the rest does nothing with --stage seed


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The forest of a plain run."""
    done = train_on_next_to_nothing(btm, tmp_path_factory.mktemp("plain"), *NAMES)
    return done.folder / "forest-seed0"


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


def test_a_stopped_part_goes_on_by_the_command_it_printed_to_the_same_weights(act, tmp_path):
    expert = ["--stage", "expert", "--forest"]
    assert act(*SEED, "--steps", 16, "--stage", "seed", "--forest", "F").returncode == 0
    shutil.copytree(tmp_path / "F", tmp_path / "whole")
    updates = []

    def stop(*_):
        updates.append(1)
        if len(updates) == 2:  # of four
            os.kill(os.getpid(), signal.SIGTERM)

    hook = register_optimizer_step_post_hook(stop)
    stopped = act(*expert, "F", "--domain-index", 1)
    hook.remove()
    assert stopped.returncode == 143
    command = shlex.split(stopped.stderr.split("Go on with: ")[1])
    assert "4 updates" in act(*command[2:]).stdout and len(updates) == 2  # each of them once
    assert act(*expert, "F").stdout.count("is there already; delete it") == 1
    assert act(*expert, "whole").returncode == 0
    assert same(contents("F"), contents("whole"), ["seed", "python", "docs", "unicode"])


def test_a_domain_of_ones_own_joins_the_forest_and_another_leaves_it(act, plain, tmp_path):
    """Evaluated, averaged, sampled."""
    shutil.copytree(plain, tmp_path / "F")
    (tmp_path / "notes").mkdir()
    for i in range(120):
        lines = "\n\n".join(f"note {i}: {i * j} apples, {i + j * j} pears" for j in range(30))
        (tmp_path / "notes" / f"{i}.txt").write_text(lines)
    data = ["--forest", "F", "--data-dir", "D"]
    assert act("--prepare", "notes", "--domain", "notes", "--data-dir", "D").returncode == 0
    grow = ["--stage", "expert", "--domain", "notes", "--branch-steps", 120, "--branch-lr", 1e-3]
    assert "120 updates" in act(*grow, *data).stdout
    forest = btm.Forest(tmp_path / "F")
    before = {"python", "docs", "unicode", "cmake", "sums"}
    assert set(forest.load(forest.file("notes"))[1]["parents"]) == before
    forest.file("docs").unlink()  # removed
    few = ["--dev-blocks", 3, "--test-blocks", 4, "--novel", "sums"]
    believed = table(act("--stage", "eval", *few, *data).stdout, "whom eq. 2 believes")
    assert set(believed) == {*before, "notes"}  # rows: every domain
    assert float(believed["notes"][3]) > 0.9  # python, unicode, cmake, notes, sums

    for kind, flags in (("uniform", []), ("posterior", ["--domain", "notes", "--dev-blocks", 3])):
        assert act("--average", kind, *flags, *data).stdout.startswith("F/averages/")
    test = text_data.load_split(tmp_path / "D" / "btm" / "notes").test
    losses = []
    for name in ("notes", "uniform"):
        average = btm.load_trained(tmp_path / "F" / "averages" / f"{name}.npz")
        losses.append(common.lm_loss(average, text_data.spread_windows(test, 16, 8)).mean())
    assert losses[0] < losses[1]
    told = act("--sample", "note 7", "--forest", "F").stdout
    assert told.startswith("note 7") and "believed at the end" in told


def test_a_plain_run_and_separate_commands_make_one_forest(act, plain, tmp_path):
    assert act(*SEED, "--stage", "seed", "--forest", "F").returncode == 0
    assert act("--stage", "expert", "--forest", "F").returncode == 0
    few = ["--dev-blocks", 3]
    added = ["--domain", "cmake", "--branch-steps", 2, *few]
    assert act("--stage", "expert", "--forest", "F", *added).returncode == 0
    names = ["seed", "python", "docs", "unicode", "cmake"]
    assert same(contents("F"), contents(plain), names)
    told = json.loads((plain.parent / "results.json").read_text())["results"]["arms"]
    result, grown = told["btm"][0], told["grow"][0]
    for without, expected in [
        ("cmake,sums", [result[rule] for rule in btm.RULES if rule != "uniform"]),
        ("docs,cmake,sums", [result["without"][1]]),
        ("sums", [grown["eq2"][0]]),
    ]:
        flags = ["--without", without, "--novel", "cmake,sums", "--test-blocks", 4, *few]
        told = act("--stage", "eval", "--forest", plain, *flags).stdout
        rows = table(told, "bits/byte on test text")
        for number, name in enumerate(("python", "docs", "unicode", "cmake", "sums")):
            bits = [f"{by_domain[number]:.3f}" for by_domain in expected]
            assert rows[name][1 : 1 + len(bits)] == bits


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


def test_mistakes_are_one_line_and_leave_nothing(act, plain, tmp_path):
    """Flags of a command are used or refused."""
    for flags, message in [
        (f"--stage expert --steps 6 --forest {plain}", "was made with steps = 4, not 6"),
        (f"--stage expert --seed 3 --forest {plain}", "was made with seed = 0, not 3"),
        (f"--stage eval --branch-steps 3 --forest {plain}", "does nothing with --stage eval"),
        (f"--stage eval --without poems --forest {plain}", "there is no expert 'poems'"),
        (f"--average posterior --forest {plain}", "goes with the --domain it is for"),
        ("--seed-share 0.01 --steps 4", "leaves nothing to the seed"),
        ("--domains python,poems", "btm/poems: no such folder"),
        ("--domain docs", "--domain goes with one of --stage"),
        ("--stage expert", "is no forest"),
    ]:
        done = act(*flags.split(), "--data-dir", "D")
        assert done.returncode == 2 and message in done.stderr, done
        assert done.stderr.count("\n") == 1 and list(tmp_path.iterdir()) == []


def test_full_scale_on_token_ids(act, tmp_path):
    for i, name in enumerate(("a", "b", "c")):
        folder = tmp_path / "D" / "btm" / name
        folder.mkdir(parents=True)
        for part in ("train", "valid", "test"):
            generator = torch.Generator().manual_seed(i)
            ids = torch.randint(300 * i, 300 * i + 300, (2000,), generator=generator)
            (folder / f"{part}.bin").write_bytes(ids.numpy().astype("<u2").tobytes())
        (folder / "meta.json").write_text('{"vocab_size": 900}')
    few = [*BTM, "--blocks-per-domain", 4, "--micro-batch", 3, "--workers", 1, "--data-dir", "D"]
    arms = ["--domains", "a,b", "--novel", "c", "--arms", "btm", "grow"]
    assert act("--full", *few, *arms).returncode == 0
    forest = ["--forest", "runs/btm-full/forest-seed0", "--full", "--data-dir", "D"]
    refused = act("--sample", "x", *forest)
    assert refused.returncode == 2 and "trained on token ids" in refused.stderr
