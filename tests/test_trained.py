"""Weights that a run leaves: each script's load_trained gives the model back, with the numbers that
were reported.
"""

import importlib
import json
import pickle

import pytest
import tiny
import torch
from conftest import ROOT
from torch.nn import functional as F

import adamoe
import btm
import common
import dual_head_kd
import home
import mcsmoe
import mowst
import smoe_dropout

METHODS = [name.removesuffix(".py") for name in tiny.SCRIPTS]


@pytest.fixture
def left(command_line, tmp_path):
    """left(module, *flags) -> (the Run as its arms saw it, its config, {arm: its result}) of a run
    of a second.
    """

    def run(module, *flags):
        method = module.__name__
        done = command_line(
            module, *tiny.SCRIPTS[f"{method}.py"], "--workers", 1, *flags, "--threads", 1
        )
        assert done.returncode == 0, done.stderr
        out = tmp_path / "runs" / f"{method}-small"
        config = common.read_json(out / "run.json", config=dict)["config"]
        config = module.Config(
            **{key: tuple(v) if isinstance(v, list) else v for key, v in config.items()}
        )
        found = [json.loads(path.read_text()) for path in (out / "arms").glob("*-seed0.json")]
        trained = common.Run(method, "small", "cpu", torch.float32, [0], out, config=config)
        return trained, config, {one["arm"]: one["result"] for one in found}

    return run


def again(module, run, arm, suffix=".pt", **options):
    model = module.load_trained(run.path(arm, 0, suffix), **options)
    assert not any(part.training for part in model.modules())
    return model


def test_adamoe(left):
    few = [
        "--text",
        ROOT / "README.md",
        "--pretrain-steps",
        2,
        "--steps",
        2,
    ]  # little text to evaluate on
    run, config, results = left(adamoe, *few)
    task = adamoe.ByteText(adamoe.manual(config), config, "cpu", 0)
    for arm in ("original", "top1", "top2", "adamoe"):
        found = adamoe.evaluate(again(adamoe, run, arm), task)
        assert all(found[key] == results[arm][key] for key in ("loss", "load", "histogram")), arm
    with pytest.raises(common.UsageError, match="no such weights, but adamoe-seed0.pt, original"):
        adamoe.load_trained(run.path("shuffled", 0, ".pt"))


def test_btm(left):
    run, config, results = left(btm, "--arms", *btm.SYSTEMS)
    names = btm.scored("btm", config)
    for arm, result in results.items():
        if "bits" in result:
            path = run.path(arm, 0, ".pt")
            if arm.startswith(("seed", "expert")):
                inside = "seed" if arm == "seed" else f"experts/{arm.partition('=')[2]}"
                path = run.out / "forest-seed0" / f"{inside}.npz"
            model = btm.load_trained(path)
            assert not model.training
            found = [btm.bits(-btm.score(model, "test", name, config, run)) for name in names[:2]]
            assert found == result["bits"][:2], arm
    assert {"seed", "dense", "expert@domain=docs", "shard@domain=docs"} <= set(results)


def test_dual_head_kd(left):
    run, config, results = left(dual_head_kd)
    data = dual_head_kd.load_images(config, 0, run)
    for arm, result in results.items():
        model = again(dual_head_kd, run, arm)
        right = dual_head_kd.accuracy(model, data.test_x, data.test_y, data, run)
        assert right == result["accuracy"], arm
    assert {"teacher", "dhkd"} <= set(results)


@pytest.mark.parametrize("flags", [(), ("--arms", "home@meta=1,ple-star", "--lr", 0.01)])
def test_home(left, flags):
    run, config, results = left(home, *flags)
    data = home.load_data(config, 0, run)
    for arm in set(results) - {"oracle"}:
        model = again(home, run, arm)
        found = home.evaluate(model, data, data.test)
        assert all(found[key] == results[arm][key] for key in ("auc", "mean_gauc", "weight")), arm
        with pytest.raises(ValueError, match="field 0 has id 60 in row 0; its table has 60 rows"):
            model(torch.tensor([[60, 0, 0, 0, 0, 0, 0, 0, 0]]))  # the next field's first row
    assert "oracle" in results and len(results) > 2


def test_mcsmoe(left):
    run, config, results = left(mcsmoe)
    for arm in ("pretrained", "full", "msmoe", "pruning", "full+steps", "mc", "c_equal_size"):
        task = mcsmoe.make_task(common.Job(run, arm, 0), 1)
        found = mcsmoe.evaluate(again(mcsmoe, run, arm), task, run)
        assert found["loss"] == pytest.approx(results[arm]["loss"], rel=1e-6), arm


def test_mowst(left):
    run, config, results = left(mowst)
    task = mowst.make_task(mowst.load_graph(config, 0, run), config, 0, "cpu")
    for arm in ("mlp", "gnn", "skip", "moe", "mowst", "mowst_star", "mowst@backbone=gin-skip"):
        model = again(mowst, run, arm)
        with torch.no_grad():
            found = model(task.x) if arm == "mlp" else model(task.x, task.adjacency)
        if isinstance(found, tuple):
            found = mowst.mixture_log_probs(*found)
        right = (found.argmax(-1) == task.y)[task.test].double()
        assert 100 * right.mean().item() == pytest.approx(results[arm]["accuracy"], abs=1e-9), arm


def test_smoe_dropout(left):
    run, config, results = left(smoe_dropout)
    _, windows = smoe_dropout.held_out(smoe_dropout.load_corpus(config, run), config)
    for arm, result in results.items():
        model = again(smoe_dropout, run, arm)
        for k in smoe_dropout.swept(arm, config):
            assert smoe_dropout.evaluate(model, windows, k) == result[f"bits_{k}"], arm
    assert {"dense", "smoe_dropout", "learned_half"} == set(results)


def test_smoe_dropout_fine_tuned_on_a_task(tmp_path, monkeypatch):
    config = smoe_dropout.Config(
        num_layers=1, d_model=16, d_ff=16, num_experts=4, k_min=2, num_heads=2, task_steps=2
    )
    run = common.Run("smoe_dropout", "small", "cpu", torch.float32, [0], tmp_path, config=config)
    common.write_json(tmp_path / "run.json", run.record())
    common.save(
        run.path("smoe_dropout", 0, ".pt"),
        smoe_dropout.build(config, "smoe_dropout", 0).state_dict(),
    )
    rows, right = (
        torch.randint(256, (6, 2, 9)),
        F.one_hot(torch.arange(6) % 2, 2).bool(),
    )  # [examples, choices, bytes]
    monkeypatch.setattr(
        smoe_dropout, "load_examples", lambda *_: (rows, torch.arange(6) % 2, rows, right)
    )
    arm = "smoe_dropout@task=csqa,task_k=2"
    result = smoe_dropout.train_arm(common.Job(run, arm, 0))
    model = again(smoe_dropout, run, arm)
    assert [layer.k for layer in smoe_dropout.moe_layers(model)] == [2]
    predicted = model(rows).argmax(dim=1)
    assert result["accuracy"] == 100 * float(right[torch.arange(6), predicted].double().mean())


# --- what cannot be loaded is one line
# -------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    """A run's folder with the weights of one small model, as if trained: its path."""
    config = smoe_dropout.Config(num_layers=1, d_model=8, d_ff=8, num_experts=4, num_heads=2)
    run = common.Run(
        "smoe_dropout", "small", "cpu", torch.float32, [0], tmp_path / "out", config=config
    )
    common.write_json(run.out / "run.json", run.record())
    path = run.path("dense", 0, ".pt")
    common.save(path, smoe_dropout.build(config, "dense", 0).state_dict())
    assert isinstance(smoe_dropout.load_trained(str(path)), common.TransformerLM)
    return path


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was executed",))


def refused(path, wanted, module=smoe_dropout):
    with pytest.raises(ValueError) as caught:
        module.load_trained(path)
    text = str(caught.value)
    assert all(word in text for word in wanted) and "\n" not in text and len(text) < 500, text


def test_damaged_or_hostile_weights(saved):
    whole = saved.read_bytes()
    for content in (b"", whole[:1000], b"x" * 1000, pickle.dumps(Bomb())):
        saved.write_bytes(content)
        refused(saved, ["dense-seed0.pt is not a readable file of tensors"])
    for content in ([1, 2], {"embedding.weight": 3}, {"a": torch.zeros(2)}, torch.zeros(2)):
        common.save(saved, content)
        refused(saved, ["dense-seed0.pt and", "do not fit together", "--overwrite"])


def test_weights_of_another_shape_or_arm(saved):
    mark = saved.parent.parent / "run.json"
    content = json.loads(mark.read_text())
    common.write_json(mark, content | {"config": content["config"] | {"d_model": 16}})
    refused(saved, ["do not fit together", "--overwrite"])
    common.write_json(mark, content)
    refused(saved.rename(saved.with_name("smoe_dropout-seed0.pt")), ["do not fit together"])
    refused(
        saved.with_name("smoe_dropout-seed0.pt").rename(saved.with_name("nobody-seed0.pt")),
        ["'nobody'"],
    )


def test_weights_that_are_not_there_or_stand_alone(saved, tmp_path):
    refused(
        saved.with_name("thor-seed0.pt"), ["thor-seed0.pt", "no such weights, but dense-seed0.pt"]
    )
    refused(tmp_path / "nowhere" / "a-seed0.pt", ["none like it in"])
    refused(saved.parent, ["no such weights"])
    (tmp_path / "elsewhere").mkdir()
    refused(saved.rename(tmp_path / "elsewhere" / saved.name), ["run.json", "keep both"])


@pytest.mark.parametrize("content", ["{", "[]", '"text"', "{}"])
def test_a_damaged_run_json(saved, content):
    (saved.parent.parent / "run.json").write_text(content)
    refused(saved, ["run.json is damaged", "--overwrite"])


def test_an_earlier_or_later_version(saved):
    mark = saved.parent.parent / "run.json"
    content = json.loads(mark.read_text())
    common.write_json(mark, {"identity": content["identity"]})
    refused(saved, ["run.json is damaged", "no method", "--overwrite"])
    for config in (content["config"] | {"new_field": 1}, {"steps": 3}):
        common.write_json(mark, content | {"config": config})
        refused(saved, ["another version of smoe_dropout.py", "differs in the settings"])
    common.write_json(mark, content | {"identity": {"dtype": "no such"}})
    refused(saved, ["do not fit together"])


@pytest.mark.parametrize("method", [name for name in METHODS if name != "smoe_dropout"])
def test_another_script(saved, method):
    refused(
        saved, [f"was left by smoe_dropout.py, not by {method}.py"], importlib.import_module(method)
    )
