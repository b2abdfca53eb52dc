"""What a run leaves: load_trained gives each model back, with the numbers that were reported."""

import json
import shutil

import pytest
import torch

import adamoe
import btm
import common
import dual_head_kd
import home
import mcsmoe
import mowst
import smoe_dropout


def again(module, done, arm):
    model = module.load_trained(done.run.path(arm, 0, ".pt"))
    assert not any(part.training for part in model.modules())
    return model


def test_adamoe(tiny_run):
    done = tiny_run(adamoe)
    task = adamoe.ByteText(adamoe.manual(done.run.config), done.run.config, "cpu", 0)
    for arm in ("original", "top1", "top2", "adamoe"):
        found = adamoe.evaluate(again(adamoe, done, arm), task)
        for key in ("loss", "load", "histogram"):
            assert found[key] == done.arms[arm][key], (arm, key)


def test_btm(tiny_run):
    done = tiny_run(btm)
    forest, names = done.folder / "forest-seed0", btm.scored("btm", done.run.config)[:2]
    for arm, path in {
        "seed": forest / "seed.npz",
        "expert@domain=docs": forest / "experts" / "docs.npz",
        "dense": done.run.path("dense", 0, ".pt"),
        "shard@domain=docs": done.run.path("shard@domain=docs", 0, ".pt"),
    }.items():
        model = btm.load_trained(path)
        said = [btm.score(model, "test", name, done.run.config, done.run) for name in names]
        assert [btm.bits(-logprobs) for logprobs in said] == done.arms[arm]["bits"][:2], arm


def test_dual_head_kd(tiny_run):
    done = tiny_run(dual_head_kd)
    data = dual_head_kd.load_images(done.run.config, 0, done.run)
    for arm, result in done.arms.items():
        model = again(dual_head_kd, done, arm)
        found = dual_head_kd.accuracy(model, data.test_x, data.test_y, data, done.run)
        assert found == result["accuracy"], arm


def test_home(tiny_run):
    done = tiny_run(home)
    data = home.load_data(done.run.config, 0, done.run)
    for arm in home.ARMS:
        found = home.evaluate(again(home, done, arm), data, data.test)
        for key in ("auc", "mean_gauc", "weight"):
            assert found[key] == done.arms[arm][key], (arm, key)


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
    for arm in ("gnn", "mowst", "mowst_star", "mowst@backbone=gin-skip"):
        found = again(mowst, done, arm)(task.x, task.adjacency)
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


def test_smoe_dropout_fine_tuned_on_a_task(tmp_path, monkeypatch):
    sizes = {"num_layers": 1, "d_model": 16, "d_ff": 16, "num_experts": 4, "num_heads": 2}
    config = smoe_dropout.Config(**sizes, k_min=2, task_steps=2)
    run = common.Run("smoe_dropout", "small", "cpu", torch.float32, [0], tmp_path, config=config)
    common.write_json(tmp_path / "run.json", run.record())
    started = smoe_dropout.build(config, "smoe_dropout", 0).state_dict()
    common.save(run.path("smoe_dropout", 0, ".pt"), started)
    rows, classes = torch.randint(256, (6, 2, 9)), torch.arange(6) % 2  # [examples, choices, bytes]
    right = classes[:, None] == torch.arange(2)
    monkeypatch.setattr(smoe_dropout, "load_examples", lambda *_: (rows, classes, rows, right))
    job = common.Job(run, "smoe_dropout@task=csqa,task_k=2", 0)
    result, model = smoe_dropout.train_arm(job), smoe_dropout.load_trained(job.path(".pt"))
    assert [layer.k for layer in smoe_dropout.moe_layers(model)] == [2]
    predicted = model(rows).argmax(dim=1)
    assert result["accuracy"] == 100 * float(right[torch.arange(6), predicted].double().mean())


@pytest.fixture
def saved(tiny_run, tmp_path):
    """A copy of a run: the weights of one of its models."""
    folder = shutil.copytree(tiny_run(smoe_dropout).folder, tmp_path / "out")
    return folder / "arms" / "dense-seed0.pt"


def refused(path, wanted, module=smoe_dropout):
    with pytest.raises(ValueError) as caught:
        module.load_trained(path)
    text = str(caught.value)
    assert all(word in text for word in wanted) and "\n" not in text and len(text) < 500, text


def test_weights_of_another_shape_arm_or_script(saved):
    refused(saved, ["was left by smoe_dropout.py, not by home.py"], home)
    mark = saved.parent.parent / "run.json"
    content = json.loads(mark.read_text())
    common.write_json(mark, content | {"config": content["config"] | {"d_model": 8}})
    refused(saved, ["do not fit together", "--overwrite"])
    common.write_json(mark, content | {"config": content["config"] | {"new_field": 1}})
    refused(saved, ["another version of smoe_dropout.py", "differs in the settings"])
    mark.write_text("{")
    refused(saved, ["run.json is damaged", "--overwrite"])
    common.write_json(mark, content)
    refused(saved.with_name("thor-seed0.pt"), ["no such weights; there are dense-seed0.pt"])
    moved = saved.rename(saved.with_name("smoe_dropout-seed0.pt"))
    refused(moved, ["do not fit together"])  # the name says which arm it is
