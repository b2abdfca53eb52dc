"""Mowst: numbers worked out by hand, and promises of the method. Claims: see test_house.py."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import imports_of_the_page, report
from tiny import MOWST

import common
import mowst
from data import graphs
from mowst import Adjacency

F64 = torch.float64


def numbers(*rows, **options):
    return torch.tensor(rows, dtype=F64, **options)


def logits_of(*probs):
    return numbers(*probs).clamp(min=1e-300).log()


def near(found, expected, atol=1e-9):
    torch.testing.assert_close(found, torch.as_tensor(expected, dtype=F64), atol=atol, rtol=0)


# --- confidence -----------------------------------------------------------------------------------


def test_dispersion_worked_examples():
    for probs, var, ent in [
        ((0.7, 0.2, 0.1), 0.31, 0.2701533008),
        ((0.5, 0.5, 0.0), 0.25, 0.3690702464),
        ((0.25,) * 4, 0.0, 0.0),
        ((0.0, 1.0, 0.0), 1.0, 1.0),
    ]:
        near(mowst.dispersion(logits_of(probs)[0], "var"), var)
        near(mowst.dispersion(logits_of(probs)[0], "ent"), ent)


def test_the_monotone_gate_never_falls_also_after_training_against_it():
    gate = mowst.MonotoneGate(8, num_features=3).double()
    optimizer = torch.optim.AdamW(gate.parameters(), lr=0.3)
    for _ in range(20):
        d, x = torch.rand(500, 2, dtype=F64), torch.randn(500, 3, dtype=F64)
        before = gate(d, x)
        for column in (0, 1):
            higher = d.clone()
            higher[:, column] += torch.rand(500, dtype=F64) * (1 - higher[:, column])
            assert (gate(higher, x) >= before).all()
        optimizer.zero_grad()
        (before * d.sum(-1)).mean().backward()  # pulls C down where the dispersion is high
        optimizer.step()


@pytest.mark.parametrize("kind", ["var", "ent", "monotone", "free", "features"])
def test_a_gate_sees_the_dispersion_the_features_or_both(kind):
    confidence = mowst.Confidence(kind, num_features=4, hidden=8).double()
    logits, x = torch.randn(30, 3, dtype=F64), torch.randn(30, 4, dtype=F64)
    confidence(logits, x)
    found = confidence.eval()(logits, x)
    assert found.shape == (30,)
    assert torch.allclose(found, confidence(logits, x + 1)) is (kind in ("var", "ent"))
    assert torch.allclose(found, confidence(3 * logits, x)) is (kind == "features")


# --- losses and answers ---------------------------------------------------------------------------


def test_the_node_of_the_docstring():
    weak, strong, y = logits_of((0.7, 0.2, 0.1)), logits_of((0.3, 0.6, 0.1)), torch.tensor([0])
    confidence = mowst.Confidence("var")(weak)
    near(confidence, [0.31])
    losses = [F.cross_entropy(z, y).item() for z in (weak, strong)]
    losses += [mowst.mowst_loss(confidence, weak, strong, y).item()]
    losses += [mowst.mowst_star_loss(confidence, weak, strong, y).item()]
    assert losses == pytest.approx([0.357, 1.204, 0.941, 0.858], abs=5e-4)
    for number in ("0.357", "1.204", "0.941", "0.858", ".424 .476 .1"):
        assert number in mowst.__doc__
    near(mowst.mixture_log_probs(confidence, weak, strong).exp(), [(0.424, 0.476, 0.1)])
    near(mowst.expected_accuracy(confidence, weak, strong, y), [0.31])
    assert mowst.answer(confidence, weak, strong, "mixture").item() == 1


@pytest.mark.parametrize("loss", [mowst.mowst_loss, mowst.mowst_star_loss])
def test_a_class_of_weight_two_counts_as_if_its_nodes_came_twice(loss):
    weak, strong = torch.randn(2, 4, 2, dtype=F64)
    labels, confidence = torch.tensor([0, 0, 0, 1]), torch.rand(4, dtype=F64)
    twice = [0, 1, 2, 3, 3]
    expected = loss(confidence[twice], weak[twice], strong[twice], labels[twice])
    weights = numbers(1, 2) * 4 / 5  # mean 1 over the nodes
    near(loss(confidence, weak, strong, labels, weights), expected)


def test_gradient_through_the_confidence_cut_and_at_a_cold_start():
    def gradient(z, detach):
        z = numbers(z, requires_grad=True)
        gate = mowst.Confidence("var")
        model = mowst.Mowst(torch.nn.Identity(), torch.nn.Identity(), gate, detach)
        strong = numbers([0.0, math.log(math.e - 1)])  # a GNN whose loss is 1
        loss = mowst.mowst_loss(*model.look(z, None), strong, torch.tensor([0]))
        loss.backward()
        return loss.item(), z.grad[0].tolist()

    loss, slope = gradient([1.0, 0.0], detach=False)
    assert loss == pytest.approx(0.8533454765, abs=1e-9)
    assert slope == pytest.approx([-0.3070150355, 0.3070150355], abs=1e-9)
    slope = gradient([1.0, 0.0], detach=True)[1]
    assert slope == pytest.approx([-0.0574330503, 0.0574330503], abs=1e-9)
    assert gradient([0.0, 0.0], detach=False)[1] == [0, 0]  # uniform: nothing moves it


def test_the_best_answer_to_nodes_that_the_mlp_cannot_tell_apart():
    """mowst_loss over ten nodes, eight of them of class 0, minimised over the MLP's p."""
    labels = torch.tensor([0] * 8 + [1] * 2)
    for gnn_loss, best in ((0.3, 0.5), (0.8, 0.9053)):
        strong = torch.zeros(10, 2, dtype=F64)
        strong[torch.arange(10), labels] = -math.log(math.expm1(gnn_loss))  # its loss on each
        losses = {}
        for p in np.linspace(0.5, 0.999, 2000):
            weak = logits_of((p, 1 - p)).expand(10, 2)
            losses[p] = mowst.mowst_loss(mowst.dispersion(weak), weak, strong, labels).item()
        assert min(losses, key=losses.get) == pytest.approx(best, abs=1e-3)


def test_expected_accuracy_is_the_mean_of_sampled_answers():
    weak, strong = logits_of(*[(0.9, 0.1)] * 10_000), logits_of(*[(0.2, 0.8)] * 10_000)
    confidence, ones = torch.full((10_000,), 0.3), torch.ones(10_000, dtype=torch.long)
    near(mowst.expected_accuracy(confidence.double(), weak, strong, ones).mean(), 0.7, 1e-6)
    generator = torch.Generator().manual_seed(0)
    sampled = mowst.answer(confidence, weak, strong, generator=generator)
    assert sampled.double().mean().item() == pytest.approx(0.7, abs=0.02)  # four deviations
    for share, expected in ((0.49, ones), (0.51, 0 * ones)):
        answers = mowst.answer(0 * confidence + share, weak, strong, "threshold")
        assert torch.equal(answers, expected)


# --- message passing ------------------------------------------------------------------------------


def ramp(*shape):
    return torch.sin(torch.arange(1, math.prod(shape) + 1, dtype=F64)).view(shape)


# Five edges, each both ways; at the end one of them again and a loop, which do not count.
EDGES = torch.tensor([[0, 1, 1, 2, 2, 3, 0, 3, 4, 0, 0, 2], [1, 0, 2, 1, 3, 2, 3, 0, 0, 4, 1, 2]])
PYG = {  # what layers of torch_geometric 2.8.1 give for nodes 0, 2 and 5, which has no neighbours
    "gcn": [(0.8007900725, 0.8767934411), (0.7443665635, 0.9963543473), (1.1836761765, 1.5849331783)],
    "sage": [(-1.2550381140, 3.0112127143), (-2.2151067984, 3.9653701633), (2.1911018015, -0.3131404525)],
    "gin": [(3.7580457090, -0.9155882600), (3.9406931128, -0.2558562546), (3.9743368325, -0.4182051019)],
    "gat": [
        (0.8545408624, 0.9231807227, 0.1020412563, -0.8003999769),
        (0.9325242076, 0.8867415711, -0.0043658134, -0.8755969234),
        (1.2116203634, 1.3246899572, 0.2198457135, -1.0871236653),
    ],
}  # fmt: skip


def test_layers_equal_those_of_torch_geometric():
    layers = {
        "gcn": mowst.GCNLayer(3, 2),
        "sage": mowst.SAGELayer(3, 2),
        "gin": mowst.GINLayer(3, 2, hidden=4, layers=2, dropout=0.0),
        "gat": mowst.GATLayer(3, 4, heads=2),
    }
    for kind, layer in layers.items():
        layer.double().eval()
        for parameter in layer.parameters():
            parameter.data = ramp(*parameter.shape)
        if kind == "sage":
            layer.own.weight.data = ramp(2, 3).flip(0)
        if kind == "gat":
            layer.target.data = ramp(2, 2).flip(0)
        near(layer(ramp(6, 3), Adjacency(EDGES, 6, F64))[[0, 2, 5]], PYG[kind])


def test_sparse_products_equal_dense_ones_and_pass_gradcheck_one_way_edges_too():
    edges = torch.randint(12, (2, 30), generator=torch.Generator().manual_seed(0))
    adjacency = Adjacency(edges, 12, F64)
    dense = torch.zeros(12, 12, dtype=F64)
    dense[edges[1], edges[0]] = 1
    dense.fill_diagonal_(0)
    x = torch.randn(12, 4, dtype=F64, requires_grad=True)
    near(adjacency.sum @ x, dense @ x)
    near(adjacency.mean @ x, dense / dense.sum(1, keepdim=True).clamp(min=1) @ x)
    for operator in (adjacency.sum, adjacency.mean, adjacency.gcn):
        assert torch.autograd.gradcheck(lambda x, operator=operator: operator @ x, x)


def test_narrow_and_wide_layers_are_the_same_formula():
    """Whichever side has fewer columns is propagated."""
    graph, x = Adjacency(EDGES, 5, F64), torch.randn(5, 2, dtype=F64)
    for out in (1, 5):
        gcn, sage = mowst.GCNLayer(2, out).double(), mowst.SAGELayer(2, out).double()
        near(gcn(x, graph), (graph.gcn @ x) @ gcn.weight + gcn.bias)
        near(sage(x, graph), sage.neighbours(graph.mean @ x) + sage.own(x))
        gin = mowst.GINLayer(2, 1, hidden=out, layers=2, dropout=0.0).double().eval()
        near(gin(x, graph), gin.mlp(x + graph.sum @ x))


def test_edges_seen_on_a_path_of_five():
    path = Adjacency(graphs.clean_edges(torch.tensor([[0, 1, 2, 3], [1, 2, 3, 4]]), 5), 5)
    first = torch.arange(5) == 0
    assert [path.edges_seen(first, hops) for hops in (0, 1, 2, 9)] == [0, 2, 4, 8]


# --- training -------------------------------------------------------------------------------------


def small(**changes):
    few = {"num_nodes": 400, "dropout": 0.0}
    return mowst.settle(replace(mowst.SMALL, **{**few, **changes}))


def make(config, seed=0):
    """(task, graph, sizes) of a seed, on the CPU."""
    run = common.Run("mowst", "small", "cpu", torch.float32, [seed], None)
    graph = mowst.load_graph(config, seed, run)
    task = mowst.make_task(graph, config, seed, "cpu")
    return task, graph, [task.x.shape[1], graph.num_classes]


def test_each_turn_leaves_the_frozen_side_untouched_bit_for_bit():
    """Parameters and BatchNorm buffers alike; the frozen expert drops nothing."""
    torch.manual_seed(0)
    config = small()
    task, _, sizes = make(config)
    model, turns = mowst.build("mowst", config, sizes), []

    def watched(stage, module, loss_fn, *rest, **options):
        before, modes = mowst.copy_state(model), set()

        def loss():
            modes.add((model.weak.training, model.strong.training))
            return loss_fn()

        score = mowst.fit(stage, module, loss, *rest, **options)
        after = mowst.copy_state(model)
        changed = {name.split(".")[0] for name in after if (after[name] != before[name]).any()}
        turns.append((stage, changed, modes))
        return score

    mowst.train_by_turns(model, task, 20, 20, 1, fit=watched, lr=0.01)
    assert turns == [
        ("round 0 weak", {"weak", "confidence"}, {(True, False)}),
        ("round 0 strong", {"strong"}, {(False, True)}),
    ]


@pytest.mark.parametrize("method", ["mlp", "gnn", "mowst", "mowst_star"])
def test_training_labels_are_learnt_and_validation_labels_only_looked_at(method):
    """And an MLP sees, in training, no other nodes than those it learns from."""
    config = small()
    task, _, sizes = make(config)

    def trained_on(**changes):
        """[goals, turns]: loss and score at the start."""
        seen, given = [], task._replace(**changes)

        def look(stage, module, loss_fn, score_fn, *_, **__):
            loss = loss_fn().item()
            module.eval()
            seen.append((loss, score_fn().item()))
            return 0.0

        torch.manual_seed(0)
        model = mowst.build(method, config, sizes)
        train = {"mowst": mowst.train_by_turns, "mowst_star": mowst.train_jointly}
        train.get(method, mowst.train_alone)(model, given, 6, 6, fit=look)
        return np.array(seen).T

    own = trained_on()
    by_train = trained_on(y=task.y.index_fill(0, task.train, 0))
    by_val = trained_on(y=task.y.index_fill(0, task.val, 0))
    assert (own[0] == by_val[0]).all() and (own[1] == by_train[1]).all()
    assert (own[0] != by_train[0]).all() and (own[1] != by_val[1]).all()
    if method == "mlp":
        elsewhere = torch.cat([task.val, task.test])
        assert (trained_on(x=task.x.index_fill(0, elsewhere, 7.0))[0] == own[0]).all()


def test_fit_restores_the_best_state_with_the_gate_and_undoes_a_turn_without_one():
    module = torch.nn.ModuleList([torch.nn.Linear(2, 2), mowst.Confidence("monotone")])
    x, states = torch.randn(30, 2), []

    def loss():
        return module[1](module[0](x)).mean() + module[0](x).square().mean()

    def left_by(scores, epochs, patience):
        states.clear()

        def score():
            states.append(mowst.copy_state(module))
            return scores[len(states) - 1]

        assert mowst.fit("a", module, loss, score, epochs, patience, lr=0.1) == min(scores)
        now = mowst.copy_state(module)
        same = [all(torch.equal(now[k], state[k]) for k in now) for state in states]
        return same.index(True), len(states)

    assert left_by([5.0, 4.0, 3.0, 6.0, 7.0, 8.0], 100, 3) == (2, 6)  # the third state, of six
    assert left_by([1.0, 2.0, 3.0], 2, 9) == (0, 3)


def test_the_method_runs_pasted_under_import_torch():
    """The whole recipe on a generated graph: ahead of both experts."""
    source = Path(mowst.__file__).read_text()
    method = source.split("# The method\n")[1].split("# Baselines\n")[0]
    pasted = {"__name__": "pasted"}
    exec(imports_of_the_page("mowst") + method, pasted)
    graph = graphs.contextual_sbm(100_000).split(0)
    parts = [mask.nonzero()[:, 0] for mask in (graph.train_mask, graph.val_mask, graph.test_mask)]
    adjacency = pasted["Adjacency"](graph.edge_index, len(graph.x))
    task = pasted["Task"](graph.x, adjacency, graph.y, *parts)
    torch.manual_seed(0)
    weak, strong = pasted["MLP"](16, 32, 5, 2, 0.5), pasted["GNN"]("gcn", 16, 32, 5, 2, 0.5)
    adamw, alone = {"lr": 0.01, "weight_decay": 5e-4}, []
    for expert in (weak, strong):
        pasted["train_alone"](expert, task, epochs=200, patience=40, **adamw)
        logits = pasted["ask"](expert, graph.x, adjacency, task.test)
        alone.append((logits.argmax(dim=1) == task.y[task.test]).double().mean().item())
    model = pasted["Mowst"](weak, strong, pasted["Confidence"]("monotone"))
    pasted["train_by_turns"](model, task, **adamw)
    with torch.no_grad():
        found = model(task.x, adjacency)
    right = pasted["expected_accuracy"](*found, task.y)[task.test]
    assert right.mean().item() > max(alone) + 0.04


# --- the experiment -------------------------------------------------------------------------------


def test_the_experts_of_a_mixture_have_its_settings_as_far_as_they_concern_them():
    assert mowst.experts_of("mowst@backbone=sage,gate=var", mowst.SMALL) == [
        "mlp",
        "gnn@backbone=sage",
    ]
    expected = ["gnn_again@hidden=8", "gnn@hidden=8"]
    assert mowst.experts_of("strong_strong@hidden=8,rounds=2", mowst.SMALL) == expected


def test_the_official_rows_fill_what_is_not_given():
    full = mowst.settle(mowst.FULL)
    assert (full.hidden, full.layers, full.lr, full.lr_gate) == (256, 3, 0.001, 0.001)
    assert (full.dropout, full.dropout_gate, full.weight_decay) == (0.2, 0.5, 0.0)
    assert (full.gate, full.gate_input, full.pretrain) == ("free", "dx", "gnn")
    penn = replace(mowst.FULL, dataset="penn94", backbone="sage", hidden=7, lr=0.5)
    penn = mowst.settle(penn)
    assert (penn.hidden, penn.layers, penn.lr, penn.lr_gate) == (7, 2, 0.5, 0.5)


def own_graph(path, **changes):
    graph = graphs.contextual_sbm(0, num_nodes=300)
    arrays = {"node_features": graph.x.numpy(), "node_labels": graph.y.numpy()}
    arrays["edges"] = graph.edge_index.T.numpy()
    for part in ("train", "val", "test"):
        arrays[f"{part}_masks"] = getattr(graph, f"{part}_mask").repeat(2, 1).numpy()
    np.savez(path, **{**arrays, **changes})
    return str(path)


def test_each_seed_takes_the_next_published_split(tmp_path):
    members = np.eye(4, 300, dtype=bool) | np.eye(4, 300, 4, dtype=bool)  # four splits
    masks = {}
    for i, part in enumerate(("train", "val", "test")):
        masks[f"{part}_masks"] = np.roll(members, 20 * i, axis=1)
    config = small(dataset=own_graph(tmp_path / "own.npz", **masks))
    tasks = [make(config, seed)[0] for seed in range(6)]
    assert [task.train.tolist() for task in tasks] == [[i, i + 4] for i in (0, 1, 2, 3, 0, 1)]
    assert tasks[1].val.tolist() == [21, 25] and tasks[1].test.tolist() == [41, 45]


def test_columns_and_classes_are_weighed_on_training_nodes_alone():
    task, _, _ = make(small(standardize=True, class_weights=True))
    known = task.x[task.train]
    torch.testing.assert_close(known.mean(0), torch.zeros(16), atol=1e-5, rtol=0)
    torch.testing.assert_close(known.std(0, correction=0), torch.ones(16))
    counts = torch.bincount(task.y[task.train], minlength=5)
    torch.testing.assert_close(task.class_weights * counts, torch.full((5,), len(known) / 5))


def test_area_under_curve_is_the_share_of_pairs_in_order_ties_half():
    score, positive = numbers(0.1, 0.4, 0.4, 0.8), torch.tensor([False, False, True, True])
    assert mowst.area_under_curve(score, positive) == pytest.approx((1 + 0.5 + 1 + 1) / 4)


def test_sampled_answers_and_kinds_on_a_graph_whose_experts_know_one_kind_each():
    task, graph, _ = make(small())
    rich, right = graph.kind, F.one_hot(task.y, 5).float()
    wrong = right.roll(1, dims=1)
    weak, strong = (torch.where(kind[:, None], right, wrong) for kind in (rich, ~rich))
    confidence = torch.where(rich, 0.9, 0.2)
    found = mowst.evaluate_sampled(confidence, weak, strong, task, graph.kind)
    assert found["sampled, rich"] == pytest.approx(90)
    assert found["sampled, poor"] == pytest.approx(80)
    share = rich[task.test].double().mean().item()
    assert found["weak_better"] == pytest.approx(100 * share)
    assert found["weak_answers"] == pytest.approx(90 * share + 20 * (1 - share))
    assert found["kind_auc"] == 1 and found["c, rich"] == pytest.approx(0.9)


def test_cost_counts_what_the_gnn_runs_on():
    config = small()
    task, _, sizes = make(config)
    model = mowst.build("mowst", config, sizes).eval()
    for confidence, percent in ((torch.ones(400), 0), (torch.zeros(400), 100)):
        found = mowst.measure_cost(model, confidence, task, 2)
        assert found["active"] == found["edges_seen"] == found["edges_one_by_one"] == percent


# --- the script -----------------------------------------------------------------------------------


def test_script_end_to_end_with_every_arm(tiny_run):
    done = tiny_run(mowst)
    assert all(claim["verdict"] != "not measured" for claim in done.report["claims"])
    for half, expert in (("rich", "mlp"), ("poor", "gnn")):  # mixtures start from trained experts
        key = f"accuracy, {half}"
        assert done.arms["oracle"][key] == done.arms[expert][key]


def test_full_scale_on_an_own_graph_with_the_official_gate(command_line, tmp_path):
    """How OGB's archives are read: test_graphs.py."""
    path = own_graph(tmp_path / "own.npz", node_labels=(np.arange(300) % 7 == 0).astype(int))
    arms = ["mowst", "mowst@backbone=gat,heads=2", "mowst@backbone=sage-skip"]
    flags = ["--epochs", 2, *MOWST[4:], "--standardize", "--class-weights", "--workers", 1]
    done = command_line(mowst, "--full", "--dataset", path, *flags, "--seeds", 2, "--arms", *arms)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "runs" / "mowst-full"
    left = report(folder)
    assert {*arms, "mlp", "gnn@backbone=gat,heads=2"} <= left["results"]["arms"].keys()
    assert list(left["data"]) == [path] and "rich" not in str(left["results"]["arms"])
    loaded = mowst.load_trained(folder / "arms" / "mowst-seed1.pt")
    assert loaded.confidence.kind == "free" and loaded.strong.layers[0].weight.shape == (16, 64)


def test_mistakes_are_one_clear_line(command_line, tmp_path):
    own_graph(tmp_path / "weighed.npz", edge_weights=np.ones(9))
    for flag, value, message in [
        ("--dataset", "tolokerz", "neither a file"),
        ("--dataset", "weighed.npz", "edge_weights"),  # would be ignored
        ("--arms", "mowst@gate=hard", "arm mowst@gate=hard: gate is 'hard'"),
    ]:
        done = command_line(mowst, flag, value)
        assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("backbone, dataset", mowst.PRESETS)
def test_at_full_scale_a_mixture_starts_from_experts_of_its_own_sizes(backbone, dataset):
    config = replace(mowst.FULL, dataset=dataset, backbone=backbone)

    def build(arm):
        settled = mowst.settle(common.arm_config(config, arm))
        return mowst.build(mowst.method_of(arm), settled, (10, 5))

    for arm in mowst.default_arms(config):
        if mowst.method_of(arm) in mowst.MIXTURES:
            model = build(arm)
            for half, expert in zip((model.weak, model.strong), mowst.experts_of(arm, config)):
                half.load_state_dict(build(expert).state_dict())


def test_class_weights_are_not_divided_out_again():
    weak, strong = torch.randn(2, 4, 2, dtype=F64)
    given = (torch.rand(4, dtype=F64), weak, strong, torch.tensor([0, 0, 0, 1]))
    for loss in (mowst.mowst_loss, mowst.mowst_star_loss):
        near(loss(*given, numbers(2, 2)), 2 * loss(*given))


def test_a_few_arms_are_planned_and_drawn(command_line, tmp_path):
    pytest.importorskip("matplotlib")
    arms = ["mowst@homophily_poor=0.2", "mowst@homophily_poor=0.5"]
    done = command_line(mowst, *MOWST, "--plot", "--workers", 1, "--arms", *arms)
    assert done.returncode == 0 and (tmp_path / "runs" / "mowst-small" / "mowst.png").exists()
    assert "0 GNN(s)" in command_line(mowst, "--arms", "mlp", "--dry-run").stdout
