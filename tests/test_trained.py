"""What a run leaves: each script's load_trained gives the model back, with the numbers that
were reported.
"""

import importlib
import json

import pytest
import tiny
import torch
from conftest import train_on_next_to_nothing
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


def again(module, done, arm, suffix=".pt", **options):
    model = module.load_trained(done.run.path(arm, 0, suffix), **options)
    assert not any(part.training for part in model.modules())
    return model


def test_adamoe(tiny_run):
    done = tiny_run(adamoe)
    config = done.run.config
    task = adamoe.ByteText(adamoe.manual(config), config, "cpu", 0)
    for arm in ("original", "top1", "top2", "adamoe"):
        found = adamoe.evaluate(again(adamoe, done, arm), task)
        for key in ("loss", "load", "histogram"):
            assert found[key] == done.arms[arm][key], (arm, key)
    with pytest.raises(
        common.UsageError, match="no such weights; there are adamoe-seed0.pt, all_picks"
    ):
        adamoe.load_trained(done.run.path("shuffled", 0, ".pt"))


def test_btm(tiny_run):
    done = tiny_run(btm)
    run, config = done.run, done.run.config
    names = btm.scored("btm", config)
    for arm, result in done.arms.items():
        if "bits" in result and btm.sister(arm, "") == "":  # not of a curve
            path = run.path(arm, 0, ".pt")
            if arm.startswith(("seed", "expert")):
                inside = "seed" if arm == "seed" else f"experts/{arm.partition('=')[2]}"
                path = run.out / "forest-seed0" / f"{inside}.npz"
            model = btm.load_trained(path)
            assert not model.training
            found = [btm.bits(-btm.score(model, "test", name, config, run)) for name in names[:2]]
            assert found == result["bits"][:2], arm
    assert {"seed", "dense", "expert@domain=docs", "shard@domain=docs"} <= set(done.arms)


def test_dual_head_kd(tiny_run):
    done = tiny_run(dual_head_kd)
    data = dual_head_kd.load_images(done.run.config, 0, done.run)
    for arm, result in done.arms.items():
        model = again(dual_head_kd, done, arm)
        right = dual_head_kd.accuracy(model, data.test_x, data.test_y, data, done.run)
        assert right == result["accuracy"], arm


def test_home(tiny_run, tmp_path):
    flags = ("--arms", "home@meta=1,ple-star", "--lr", 0.01)
    other = train_on_next_to_nothing(home, tmp_path, *flags)
    for done in (tiny_run(home), other):
        data = home.load_data(done.run.config, 0, done.run)
        for arm in set(done.arms) - {"oracle"}:
            model = again(home, done, arm)
            found = home.evaluate(model, data, data.test)
            for key in ("auc", "mean_gauc", "weight"):
                assert found[key] == done.arms[arm][key], (arm, key)
            with pytest.raises(ValueError, match="field 0 has id 60 in row 0; its table has 60"):
                model(torch.tensor([[60, 0, 0, 0, 0, 0, 0, 0, 0]]))  # the next field's first row
    assert len(other.arms) == 3


def test_mcsmoe(tiny_run):
    done = tiny_run(mcsmoe)
    for arm in ("pretrained", "full", "msmoe", "pruning", "full+steps", "mc", "c_equal_size"):
        task = mcsmoe.make_task(common.Job(done.run, arm, 0), 1)
        found = mcsmoe.evaluate(again(mcsmoe, done, arm), task, done.run)
        assert found["loss"] == pytest.approx(done.arms[arm]["loss"], rel=1e-6), arm


def test_mowst(tiny_run):
    done = tiny_run(mowst)
    graph = mowst.load_graph(done.run.config, 0, done.run)
    task = mowst.make_task(graph, done.run.config, 0, "cpu")
    for arm in ("mlp", "gnn", "mowst", "mowst_star", "mowst@backbone=gin-skip"):
        model = again(mowst, done, arm)
        with torch.no_grad():
            found = model(task.x) if arm == "mlp" else model(task.x, task.adjacency)
        if isinstance(found, tuple):
            found = mowst.mixture_log_probs(*found)
        right = 100 * (found.argmax(-1) == task.y)[task.test].double().mean().item()
        assert right == pytest.approx(done.arms[arm]["accuracy"], abs=1e-9), arm


def test_smoe_dropout(tiny_run):
    done = tiny_run(smoe_dropout)
    config = done.run.config
    _, windows = smoe_dropout.held_out(smoe_dropout.load_corpus(config, done.run), config)
    for arm, result in done.arms.items():
        model = again(smoe_dropout, done, arm)
        for k in smoe_dropout.swept(arm, config):
            assert smoe_dropout.evaluate(model, windows, k) == result[f"bits_{k}"], arm
    assert {"dense", "smoe_dropout", "learned_half"} <= set(done.arms)


def test_smoe_dropout_fine_tuned_on_a_task(tmp_path, monkeypatch):
    config = smoe_dropout.Config(
        num_layers=1, d_model=16, d_ff=16, num_experts=4, k_min=2, num_heads=2, task_steps=2
    )
    run = common.Run("smoe_dropout", "small", "cpu", torch.float32, [0], tmp_path, config=config)
    common.write_json(tmp_path / "run.json", run.record())
    started = smoe_dropout.build(config, "smoe_dropout", 0).state_dict()
    common.save(run.path("smoe_dropout", 0, ".pt"), started)
    rows, classes = torch.randint(256, (6, 2, 9)), torch.arange(6) % 2  # [examples, choices, bytes]
    right = F.one_hot(classes, 2).bool()
    monkeypatch.setattr(smoe_dropout, "load_examples", lambda *_: (rows, classes, rows, right))
    arm = "smoe_dropout@task=csqa,task_k=2"
    result = smoe_dropout.train_arm(common.Job(run, arm, 0))
    model = smoe_dropout.load_trained(run.path(arm, 0, ".pt"))
    assert [layer.k for layer in smoe_dropout.moe_layers(model)] == [2]
    predicted = model(rows).argmax(dim=1)
    assert result["accuracy"] == 100 * float(right[torch.arange(6), predicted].double().mean())


# --- what cannot be loaded is one line ------------------------------------------------------------


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


def refused(path, wanted, module=smoe_dropout):
    with pytest.raises(ValueError) as caught:
        module.load_trained(path)
    text = str(caught.value)
    assert all(word in text for word in wanted) and "\n" not in text and len(text) < 500, text


def test_damaged_or_foreign_weights(saved):
    for content in (b"", saved.read_bytes()[:1000]):
        saved.write_bytes(content)
        refused(saved, ["dense-seed0.pt is not a readable file of tensors"])
    for content in ([1, 2], {"embedding.weight": 3}, {"a": torch.zeros(2)}, torch.zeros(2)):
        common.save(saved, content)
        refused(saved, ["dense-seed0.pt and", "do not fit together", "--overwrite"])


def test_weights_of_another_shape_arm_or_script_or_in_another_place(saved, tmp_path):
    for method in METHODS:
        if method != "smoe_dropout":
            told = f"was left by smoe_dropout.py, not by {method}.py"
            refused(saved, [told], importlib.import_module(method))
    mark = saved.parent.parent / "run.json"
    content = json.loads(mark.read_text())
    common.write_json(mark, content | {"config": content["config"] | {"d_model": 16}})
    refused(saved, ["do not fit together", "--overwrite"])
    common.write_json(mark, content)
    absent = saved.with_name("thor-seed0.pt")
    refused(absent, ["thor-seed0.pt", "no such weights; there are dense-seed0.pt"])
    refused(tmp_path / "nowhere" / "a-seed0.pt", ["none like it in"])
    refused(saved.parent, ["no such weights"])
    refused(saved.rename(saved.with_name("smoe_dropout-seed0.pt")), ["do not fit together"])
    unknown = saved.with_name("smoe_dropout-seed0.pt").rename(saved.with_name("nobody-seed0.pt"))
    refused(unknown, ["'nobody'"])
    (tmp_path / "elsewhere").mkdir()
    refused(unknown.rename(tmp_path / "elsewhere" / saved.name), ["run.json", "keep both"])


def test_a_run_json_that_is_damaged_or_of_another_version(saved):
    mark = saved.parent.parent / "run.json"
    content = json.loads(mark.read_text())
    for text in ("{", "[]", '"text"', "{}"):
        mark.write_text(text)
        refused(saved, ["run.json is damaged", "--overwrite"])
    common.write_json(mark, {"identity": content["identity"]})
    refused(saved, ["run.json is damaged", "no method", "--overwrite"])
    for config in (content["config"] | {"new_field": 1}, {"steps": 3}):
        common.write_json(mark, content | {"config": config})
        refused(saved, ["another version of smoe_dropout.py", "differs in the settings"])
    common.write_json(mark, content | {"config": content["config"] | {"steps": 3.5}})
    refused(saved, ["steps is 3.5; a whole number is needed"])
    common.write_json(mark, content | {"identity": {"dtype": "no such"}})
    refused(saved, ["do not fit together"])
