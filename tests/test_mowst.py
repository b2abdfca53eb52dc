"""Mowst: numbers worked out by hand, and the properties that the method promises. In float64."""

import gzip
import json
import math
import zipfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import imports_of_the_page
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


@pytest.mark.parametrize(
    "probs, var, ent",
    [
        ((0.7, 0.2, 0.1), 0.31, 0.2701533008),
        ((0.5, 0.5, 0.0), 0.25, 0.3690702464),
        ((0.25,) * 4, 0.0, 0.0),
        ((0.0, 1.0, 0.0), 1.0, 1.0),
    ],
)
def test_dispersion_worked_examples(probs, var, ent):
    near(mowst.dispersion(logits_of(probs)[0], "var"), var)
    near(mowst.dispersion(logits_of(probs)[0], "ent"), ent)


@pytest.mark.parametrize("kind", ["var", "ent"])
def test_dispersion_of_any_logits(kind):
    """Finite, with a finite gradient."""
    logits = numbers([1e4, -1e4, 0], [-1e4, -1e4, -1e4], [1e4, 1e4, -1e4], requires_grad=True)
    found = mowst.dispersion(logits, kind)
    found.sum().backward()
    assert ((found >= 0) & (found <= 1)).all() and torch.isfinite(logits.grad).all()
    near(found[:2], [1.0, 0.0])


def test_bad_kinds_are_refused():
    two = torch.zeros(1, 2)
    path = Adjacency(torch.tensor([[0, 1], [1, 0]]), 2)
    nobody, both, y = torch.zeros(0).long(), torch.arange(2), torch.arange(2)
    train = partial(mowst.train_alone, mowst.MLP(2, 2, 2, 2, 0.5), epochs=1, patience=1)
    blind = mowst.Task(torch.full((2, 2), math.nan), path, y, both, both, both)
    for call, message in [
        (lambda: train(blind), "x holds NaN or infinity"),
        (lambda: train(blind._replace(x=torch.eye(2), val=nobody)), "2 training and 0 validation"),
        (lambda: mowst.dispersion(torch.zeros(3, 1)), "1 classes"),
        (lambda: mowst.dispersion(two, "std"), "kind 'std'"),
        (lambda: mowst.Confidence("loose"), "gate is 'loose'"),
        (lambda: mowst.answer(torch.zeros(1), two, two, "guess"), "infer is 'guess'"),
        (lambda: mowst.GNN("gcnn", 2, 2, 2, 2, 0.5), "backbone is 'gcnn'; allowed: gcn"),
        (lambda: mowst.GATLayer(2, 3, 2)(two, path), "does not divide into 2 heads"),
        (lambda: Adjacency(torch.tensor([[0, 1], [1, 3]]), 3), "nodes 0 .. 3 of 3"),
        (lambda: Adjacency(torch.zeros(3, 2, dtype=torch.long), 3), "needed: .2, edges"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize("num_features", [0, 3])
def test_the_monotone_gate_never_falls_also_after_training_against_it(num_features):
    gate = mowst.MonotoneGate(8, num_features).double()
    low, high = gate(numbers([0, 0], [1, 1]), torch.zeros(2, num_features, dtype=F64)).tolist()
    assert low < 0.25 and high > 0.75  # as it starts
    optimizer = torch.optim.AdamW(gate.parameters(), lr=0.3)
    for _ in range(20):
        d, x = torch.rand(500, 2, dtype=F64), torch.randn(500, num_features, dtype=F64)
        before = gate(d, x)
        for column in (0, 1):
            higher = d.clone()
            higher[:, column] += torch.rand(500, dtype=F64) * (1 - higher[:, column])
            assert (gate(higher, x) >= before).all()
        optimizer.zero_grad()
        (before * d.sum(-1)).mean().backward()  # pulls C down where the dispersion is high
        optimizer.step()


@pytest.mark.parametrize("kind", ["var", "ent", "monotone", "free", "features"])
@pytest.mark.parametrize("num_features", [0, 4])
def test_a_gate_gives_one_number_a_node_and_sees_what_it_should(kind, num_features):
    if kind == "features" and not num_features:
        return
    confidence = mowst.Confidence(kind, num_features, hidden=8).double()
    logits, x = torch.randn(30, 3, dtype=F64), torch.randn(30, 4, dtype=F64)
    confidence(logits, x)
    found = confidence.eval()(logits, x)
    assert found.shape == (30,) and ((found >= 0) & (found <= 1)).all()
    sees_features = num_features > 0 and kind not in ("var", "ent")
    assert torch.allclose(found, confidence(logits, x + 1)) is not sees_features
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


def test_l_is_never_below_l_star_and_equal_for_hard_gates():
    for _ in range(100):
        weak, strong = 3 * torch.randn(2, 10, 4, dtype=F64)
        labels, confidence = torch.randint(4, (10,)), torch.rand(10, dtype=F64)
        both = (mowst.mowst_loss, mowst.mowst_star_loss)
        loss, star = (one(confidence, weak, strong, labels) for one in both)
        assert loss >= star - 1e-12
        near(*(one(confidence.round(), weak, strong, labels) for one in both))


@pytest.mark.parametrize("loss", [mowst.mowst_loss, mowst.mowst_star_loss])
def test_a_closed_gate_leaves_one_expert_its_own_loss_and_the_other_no_gradient(loss):
    for share in (0.0, 1.0):
        weak, strong = (torch.randn(6, 3, dtype=F64, requires_grad=True) for _ in range(2))
        labels = torch.randint(3, (6,))
        confidence = torch.full((6,), share, dtype=F64, requires_grad=True)
        found = loss(confidence, weak, strong, labels)
        found.backward()
        used, unused = (weak, strong) if share else (strong, weak)
        near(found, F.cross_entropy(used, labels))
        assert unused.grad.abs().max() < 1e-12 and torch.isfinite(confidence.grad).all()


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


@pytest.mark.parametrize(
    "alpha, gnn_loss, best, confidence",
    [
        (0.8, 0.3, 0.5, 0.0),  # the GNN is better than any answer: the MLP gives the nodes up
        (0.8, 0.8, 0.9053, 0.6571),  # it is not: the MLP is surer than its nodes warrant
        (0.6, 0.8, 0.7364, 0.2236),
    ],
)
def test_the_best_answer_to_nodes_that_the_mlp_cannot_tell_apart(alpha, gnn_loss, best, confidence):
    """mowst_loss over ten nodes, a share alpha of them of class 0, minimised over the MLP's p."""
    labels = torch.tensor([0] * round(10 * alpha) + [1] * round(10 - 10 * alpha))
    strong = torch.zeros(10, 2, dtype=F64)
    strong[torch.arange(10), labels] = -math.log(math.expm1(gnn_loss))  # its loss on each

    def loss(p):
        weak = logits_of((p, 1 - p)).expand(10, 2)
        return mowst.mowst_loss(mowst.dispersion(weak), weak, strong, labels).item()

    p = min(np.linspace(0.5, 0.999, 2000), key=loss)
    assert p == pytest.approx(best, abs=1e-3)
    assert mowst.dispersion(logits_of((p, 1 - p))).item() == pytest.approx(confidence, abs=2e-3)


def test_expected_accuracy_is_the_mean_of_sampled_answers():
    weak, strong = torch.randn(2, 40, 3)
    labels, confidence = torch.randint(3, (40,)), torch.rand(40)
    expected = mowst.expected_accuracy(confidence.double(), weak, strong, labels).mean().item()
    generator = torch.Generator().manual_seed(0)
    draws = []
    for _ in range(2000):
        draws.append(mowst.answer(confidence, weak, strong, generator=generator) == labels)
    means = torch.stack(draws).double().mean(1)
    assert abs(means.mean().item() - expected) < 4 * means.std().item() / math.sqrt(2000)
    for share, expert in ((0.0, strong), (0.49, strong), (0.51, weak), (1.0, weak)):
        closed = torch.full((40,), share)
        assert torch.equal(mowst.answer(closed, weak, strong, "threshold"), expert.argmax(-1))
        if share in (0.0, 1.0):
            for infer in ("mixture", "sample"):
                assert torch.equal(mowst.answer(closed, weak, strong, infer), expert.argmax(-1))


# --- message passing ------------------------------------------------------------------------------

PATH, X = torch.tensor([[0, 1, 1, 2], [1, 0, 2, 1]]), numbers((1, 0), (0, 2), (3, 1))


def ramp(*shape):
    return torch.sin(torch.arange(1, math.prod(shape) + 1, dtype=F64)).view(shape)


EDGES = torch.tensor([[0, 1, 1, 2, 2, 3, 0, 3, 4, 0], [1, 0, 2, 1, 3, 2, 3, 0, 0, 4]])
PYG = {  # what layers of torch_geometric 2.8.1 give for these weights; node 5 has no neighbours
    "gcn": [
        (0.8007900725, 0.8767934411), (0.9748693323, 0.8698480357), (0.7443665635, 0.9963543473),
        (1.1148188752, 0.9686527469), (1.0242247340, 0.6479071798), (1.1836761765, 1.5849331783),
    ],
    "sage": [
        (-1.2550381140, 3.0112127143), (3.9445419456, -2.1935518381), (-2.2151067984, 3.9653701633),
        (3.8947413504, -2.0881336803), (0.9466796674, 0.7071753080), (2.1911018015, -0.3131404525),
    ],
    "gin": [
        (3.7580457090, -0.9155882600), (2.8649141147, -0.7136835771), (3.9406931128, -0.2558562546),
        (2.9344959555, -0.8341139831), (2.6973748805, -0.4578837398), (3.9743368325, -0.4182051019),
    ],
    "gat": [
        (0.8545408624, 0.9231807227, 0.1020412563, -0.8003999769),
        (0.7793595346, 1.0468619643, 0.2826276034, -0.6874435670),
        (0.9325242076, 0.8867415711, -0.0043658134, -0.8755969234),
        (0.8446136570, 1.1222646151, 0.3693303481, -0.7112419338),
        (0.6527297396, 1.0889812509, 0.4801506148, -0.5119756316),
        (1.2116203634, 1.3246899572, 0.2198457135, -1.0871236653),
    ],
}  # fmt: skip


@pytest.mark.parametrize("kind", PYG)
def test_layers_equal_those_of_torch_geometric(kind):
    if kind == "gcn":
        layer = mowst.GCNLayer(3, 2)
    elif kind == "sage":
        layer = mowst.SAGELayer(3, 2)
    elif kind == "gin":
        layer = mowst.GINLayer(3, 2, hidden=4, layers=2, dropout=0.0)
    else:
        layer = mowst.GATLayer(3, 4, heads=2)
    layer = layer.double().eval()
    for parameter in layer.parameters():
        parameter.data = ramp(*parameter.shape)
    if kind == "sage":
        layer.own.weight.data = ramp(2, 3).flip(0)
    if kind == "gat":
        layer.target.data = ramp(2, 2).flip(0)
    near(layer(ramp(6, 3), Adjacency(EDGES, 6, F64)), PYG[kind])


def random_edges(num_nodes=12, num_edges=30):
    return torch.randint(num_nodes, (2, num_edges), generator=torch.Generator().manual_seed(0))


def test_sparse_products_equal_dense_ones_and_pass_gradcheck_one_way_edges_too():
    edges = random_edges()
    loops_and_duplicates = torch.cat([edges[:, :5], torch.arange(12).expand(2, -1)], dim=1)
    adjacency = Adjacency(torch.cat([edges, loops_and_duplicates], dim=1), 12, F64)
    dense = torch.zeros(12, 12, dtype=F64)
    dense[edges[1], edges[0]] = 1
    dense.fill_diagonal_(0)
    assert not torch.equal(dense, dense.T)
    scale = (dense.sum(1) + 1).rsqrt()
    expected = {
        "sum": dense,
        "mean": dense / dense.sum(1, keepdim=True).clamp(min=1),
        "gcn": scale[:, None] * (dense + torch.eye(12, dtype=F64)) * scale,
    }
    for name, matrix in expected.items():
        operator = getattr(adjacency, name)
        x = torch.randn(12, 4, dtype=F64, requires_grad=True)
        near(operator @ x, matrix @ x)
        assert torch.autograd.gradcheck(lambda x, operator=operator: operator @ x, x)
    many = torch.tensor([[70_000, 1], [1, 70_000]], dtype=torch.int32)  # no product overflows
    assert Adjacency(many, 100_000).edge_index.tolist() == [[70_000, 1], [1, 70_000]]
    symmetric = Adjacency(PATH, 3, F64).gcn
    assert symmetric.transposed is symmetric.csr  # stored once


def test_flops_of_a_sparse_product_are_counted_from_its_entries():
    adjacency, x = Adjacency(random_edges(), 12), torch.randn(12, 4, requires_grad=True)
    sparse, dense = 2 * adjacency.mean.csr._nnz() * 4, 2 * 12 * 4 * 3

    def step():
        (adjacency.mean @ x @ torch.ones(4, 3)).sum().backward()

    assert common.count_flops(step)["Global"] == 2 * sparse + 2 * dense


@pytest.mark.parametrize("kind", PYG)
def test_a_gnn_follows_its_nodes_and_bears_a_graph_without_edges(kind):
    model = mowst.GNN(kind, 3, 4, 2, 2, 0.0, heads=2).double().eval()
    adjacency = Adjacency(random_edges(6, 8), 6, F64)
    x, order = torch.randn(6, 3, dtype=F64), torch.randperm(6)
    moved = Adjacency(order.argsort()[adjacency.edge_index], 6, F64)
    near(model(x[order], moved), model(x, adjacency)[order])
    nothing = Adjacency(torch.zeros(2, 0, dtype=torch.long), 6, F64)
    assert torch.isfinite(model(x, nothing)).all()


def test_narrow_and_wide_layers_are_the_same_formula():
    """Whichever side has fewer columns is propagated."""
    path = Adjacency(PATH, 3, F64)
    for out in (1, 5):
        gcn, sage = mowst.GCNLayer(2, out).double(), mowst.SAGELayer(2, out).double()
        near(gcn(X, path), (path.gcn @ X) @ gcn.weight + gcn.bias)
        near(sage(X, path), sage.neighbours(path.mean @ X) + sage.own(X))
    for hidden, layers in ((4, 2), (1, 2), (1, 1), (4, 3)):
        gin = mowst.GINLayer(2, 1, hidden, layers, 0.0).double().eval()
        near(gin(X, path), gin.mlp(X + path.sum @ X))


def test_edges_seen_on_a_path_of_five():
    path = Adjacency(graphs.clean_edges(torch.tensor([[0, 1, 2, 3], [1, 2, 3, 4]]), 5), 5)
    first, ends = torch.arange(5) == 0, torch.arange(5) % 4 == 0
    assert [path.edges_seen(first, hops) for hops in (0, 1, 2, 9)] == [0, 2, 4, 8]
    assert [path.edges_seen(ends, hops) for hops in (0, 1, 2)] == [0, 4, 8]


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
    """Parameters and BatchNorm buffers alike; the frozen expert drops nothing, and answers once."""
    config = small()
    task, _, sizes = make(config)
    model, turns, asked = mowst.build("mowst", config, sizes), [], []
    model.weak.register_forward_hook(lambda *_: asked.append("weak"))
    model.strong.register_forward_hook(lambda *_: asked.append("strong"))

    def watched(stage, module, loss_fn, *rest, **options):
        before, modes = mowst.copy_state(model), set()

        def loss():
            modes.add((model.weak.training, model.strong.training))
            return loss_fn()

        asked.clear()
        score = mowst.fit(stage, module, loss, *rest, **options)
        after = mowst.copy_state(model)
        changed = {name.split(".")[0] for name in after if (after[name] != before[name]).any()}
        turns.append((stage, changed, modes, set(asked)))
        return score

    mowst.train_by_turns(model, task, 20, 20, 1, fit=watched, lr=0.01)
    assert turns == [
        ("round 0 weak", {"weak", "confidence"}, {(True, False)}, {"weak"}),
        ("round 0 strong", {"strong"}, {(False, True)}, {"strong"}),
    ]


def test_rounds_end_when_one_brings_nothing():
    config = small()
    task, _, sizes = make(config)
    model, scores = mowst.build("mowst", config, sizes), iter([5, 4, 4, 3, 3, 3, 3, 3])
    stages = []

    def scripted(stage, *_, **__):
        stages.append(stage)
        return next(scores)

    mowst.train_by_turns(model, task, 6, 6, rounds=9, round_patience=2, fit=scripted)
    assert stages[-1] == "round 3 strong"  # the second in a row that ended at 3


@pytest.mark.parametrize("method", ["mlp", "gnn", "mowst", "mowst_star", "strong_strong"])
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
        if method in ("mowst", "strong_strong"):
            mowst.train_by_turns(model, given, 6, 6, 1, fit=look)
        else:
            train = mowst.train_jointly if method == "mowst_star" else mowst.train_alone
            train(model, given, 6, 6, fit=look)
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
    torch.manual_seed(0)
    module = torch.nn.ModuleList([torch.nn.Linear(2, 2), mowst.Confidence("monotone")])
    x, states, told = torch.randn(30, 2), [], []
    scores = iter([5.0, 4.0, 3.0, 6.0, 7.0, 8.0, 2.0])

    def loss():
        return module[1](module[0](x)).mean() + module[0](x).square().mean()

    def score():
        states.append(mowst.copy_state(module))
        return next(scores)

    def is_state(number):
        now = module.state_dict()
        return all(torch.equal(now[name], value) for name, value in states[number].items())

    best = mowst.fit("a", module, loss, score, 100, 3, lambda *line: told.append(line), lr=0.1)
    assert best == 3.0 and [line[::2] for line in told] == [(0, 4), (1, 3), (2, 6), (3, 7), (4, 8)]
    assert is_state(2) and not is_state(5)  # the start, two better epochs, three worse ones
    states.clear()
    scores = iter([1.0, 2.0, 3.0])
    assert mowst.fit("b", module, loss, score, 2, 9, lr=0.1) == 1.0 and is_state(0)
    with pytest.raises(FloatingPointError, match="c: loss nan, validation 1.0 at epoch 0"):
        mowst.fit("c", module, lambda: loss() * math.nan, lambda: 1.0, 5, 5)


def test_the_method_runs_pasted_under_import_torch():
    """The whole recipe on a generated graph: ahead of both experts, sure of the right nodes."""
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
    rich = graph.kind[task.test]
    assert found[0][task.test][rich].mean() - found[0][task.test][~rich].mean() > 0.5


# --- the experiment -------------------------------------------------------------------------------


def test_the_experts_of_a_mixture_have_its_settings_as_far_as_they_concern_them():
    for arm, expected in [
        ("mowst@backbone=sage,gate=var", ["mlp", "gnn@backbone=sage"]),
        ("mowst_star@gate=features,shift=1", ["mlp@shift=1", "gnn@shift=1"]),
        ("strong_strong@hidden=8,rounds=2", ["gnn_again@hidden=8", "gnn@hidden=8"]),
        ("mowst@pretrain=neither,lr_gate=0.1,dropout=0", ["mlp@dropout=0", "gnn@dropout=0"]),
    ]:
        assert mowst.experts_of(arm) == expected
    public = replace(mowst.SMALL, dataset="tolokers", backbone="gat")
    arms = {*mowst.default_arms(public), *mowst.more_arms(public)}
    assert "gnn@backbone=gcn" in arms and "oracle" not in arms and "mlp@shift=1" not in arms


def test_the_official_rows_fill_what_is_not_given():
    full = mowst.settle(mowst.FULL)
    assert (full.hidden, full.layers, full.lr, full.lr_gate) == (256, 3, 0.001, 0.001)
    assert (full.dropout, full.dropout_gate, full.weight_decay) == (0.2, 0.5, 0.0)
    assert (full.gate, full.gate_input, full.pretrain) == ("free", "dx", "gnn")
    penn = replace(mowst.FULL, dataset="penn94", backbone="sage", hidden=7, lr=0.5)
    penn = mowst.settle(penn)
    assert (penn.hidden, penn.layers, penn.lr, penn.lr_gate) == (7, 2, 0.5, 0.5)
    other = mowst.settle(replace(mowst.FULL, dataset="tolokers"))
    assert other.hidden == mowst.OTHERWISE[0] and other.pretrain == "both"
    assert mowst.settle(mowst.SMALL).lr_gate == mowst.SMALL.lr
    assert all(name in graphs.SIZES for _, name in mowst.PRESETS)


def test_epochs_are_guessed_for_all_that_runs_a_gnn():
    config = replace(mowst.SMALL, epochs=5, rounds=3, turn_epochs=7, star_epochs=11)
    arms = ["mlp", "gnn@shift=1", "gnn_again", "ensemble", "posthoc", "oracle"]
    assert mowst.count_epochs(config, arms) == 5 + 5
    assert mowst.count_epochs(config, ["mowst@gate=var"]) == 2 * 7  # two rounds: twice its patience
    assert mowst.count_epochs(config, ["mowst_star", "strong_strong"]) == 11 + 2 * 2 * 7


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


def test_columns_and_classes_are_weighed_on_training_nodes_alone(tmp_path):
    plain, _, _ = make(small())
    task, _, _ = make(small(standardize=True, class_weights=True))
    known = task.x[task.train]
    torch.testing.assert_close(known.mean(0), torch.zeros(16), atol=1e-5, rtol=0)
    torch.testing.assert_close(known.std(0, correction=0), torch.ones(16))
    x = plain.x.numpy()[:, [0]] * [1e4, 0] + [5, 3]  # a wide column, and a constant one
    wide, _, _ = make(small(dataset=own_graph(tmp_path / "w.npz", node_features=x[:300]),
                            standardize=True))  # fmt: skip
    assert wide.x[wide.train].std(0, correction=0).tolist() == pytest.approx([1, 0], abs=1e-4)
    counts = torch.bincount(task.y[task.train], minlength=5)
    torch.testing.assert_close(task.class_weights * counts, torch.full((5,), len(known) / 5))
    assert plain.class_weights is None


# --- what is measured -----------------------------------------------------------------------------


def test_accuracy_flatters_the_larger_class_and_auc_does_not():
    score, positive = numbers(0.1, 0.4, 0.4, 0.8), torch.tensor([False, False, True, True])
    assert mowst.area_under_curve(score, positive) == pytest.approx((1 + 0.5 + 1 + 1) / 4)
    task, graph, _ = make(small())
    y = (torch.arange(len(task.y)) % 10 == 0).long()
    task = task._replace(y=y)
    constant = torch.tensor([[0.9, 0.1]]).log().expand(len(y), 2)
    found = mowst.evaluate(constant, task, graph.kind)
    assert found["accuracy"] > 80 and found["auc"] == 0.5
    assert mowst.evaluate(F.one_hot(y).float(), task, graph.kind)["auc"] == 1


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
    nobody = mowst.measure_cost(model, torch.ones(400), task, 2)
    assert nobody["active"] == nobody["edges_seen"] == nobody["edges_one_by_one"] == 0
    everybody = mowst.measure_cost(model, torch.zeros(400), task, 2)
    assert everybody["active"] == everybody["edges_seen"] == everybody["edges_one_by_one"] == 100
    assert everybody["seconds_ratio"] > 0


# --- claims ---------------------------------------------------------------------------------------

GOOD = {  # arm: (likeliest class, sampled)
    "mlp": (60, 0), "gnn": (74, 0), "ensemble": (85, 0), "posthoc": (85.5, 82),
    "mowst": (88, 86), "mowst_star": (87, 85), "mowst_star@gate=features": (83, 80),
    "mlp@shift=1": (61, 0), "gnn@shift=1": (50, 0), "mowst@shift=1": (66, 64),
    "mowst_star@shift=1": (66, 64),
}  # fmt: skip
for backbone in ("sage", "gin", "gin-skip"):
    GOOD |= {f"gnn@backbone={backbone}": (78, 0), f"mowst@backbone={backbone}": (81, 80)}
    GOOD |= {f"mowst_star@backbone={backbone}": (81, 79)}
SURE = {
    "kind_auc": 0.97, "c, rich": 0.9, "c, poor": 0.1, "weak_better": 50, "weak_answers": 40,
    "active": 60, "edges_seen": 100, "edges_one_by_one": 40, "seconds_ratio": 1.2,
}  # fmt: skip


def verdicts(**changes):
    results = common.Results()
    for arm, (mixed, sampled) in {**GOOD, **changes.pop("arms", {})}.items():
        more = {**SURE, **changes} if arm == "mowst" else {}
        one = {"accuracy": mixed, "sampled": sampled, **more}
        results[arm] = [{**one, "accuracy": mixed + seed / 10} for seed in range(3)]
    claims = common.claims_of(mowst.main)
    for claim in claims:
        claim.judge(results, mowst.SMALL)
    return {claim.id.removeprefix("mowst."): claim for claim in claims}


def test_every_claim_can_hold_and_each_can_fail():
    """By the sampled answers of Mowst, by the weakest backbone."""
    assert {claim.verdict for claim in verdicts().values()} == {"holds"}
    for changes, failing in [
        ({"arms": {"mlp": (86.5, 0)}}, {"beats_weak"}),
        ({"arms": {"gnn@backbone=sage": (80.5, 0)}}, {"beats_strong"}),
        ({"arms": {"ensemble": (86.5, 0)}}, {"beats_ensemble"}),
        ({"arms": {"gnn@shift=1": (65, 0)}}, {"heterophily"}),
        ({"arms": {"mowst_star@gate=features": (86.5, 0)}}, {"beats_learned_gate"}),
        ({"arms": {"posthoc": (86.5, 80)}}, {"beats_posthoc"}),
        ({"kind_auc": 0.85}, {"split"}),
        ({"weak_answers": 60}, {"strong_bias"}),
        ({"seconds_ratio": 1.3}, {"cost"}),
    ]:
        found = verdicts(**changes)
        assert {id for id, claim in found.items() if claim.verdict != "holds"} == failing
    assert "sage 1.9" in verdicts()["beats_strong"].measured
    assert "40 % of its edges" in verdicts()["cost"].measured


# --- the script -----------------------------------------------------------------------------------


def results_of(tmp_path, scale="small"):
    return json.loads((tmp_path / "runs" / f"mowst-{scale}" / "results.json").read_text())


def test_script_end_to_end_with_every_arm_and_picture(command_line, tmp_path):
    pytest.importorskip("matplotlib")
    done = command_line(mowst, *MOWST, "--ablate", "--plot", "--workers", 1)
    assert done.returncode == 0, done.stderr
    report, out = results_of(tmp_path), tmp_path / "runs" / "mowst-small"
    assert all(claim["verdict"] != "not measured" for claim in report["claims"])
    assert (out / "mowst.png").stat().st_size > 10_000
    arms = report["results"]["arms"]
    for arm in (*mowst.TRAINED, "posthoc", "mowst_star@gate=features"):
        assert 0 < arms[arm][0]["sampled"] <= 100
    assert "sampled" not in arms["ensemble"][0] and "gnn@homophily_poor=0.2" in arms
    for half, expert in (("rich", "mlp"), ("poor", "gnn")):  # mixtures start from trained experts
        key = f"accuracy, {half}"
        assert arms["oracle"][0][key] == arms[expert][0][key]
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert {"alone", "jointly", "round 0 weak", "round 0 strong"} == {x["stage"] for x in lines}


def test_an_own_graph_with_two_unequal_classes(command_line, tmp_path):
    y = (np.arange(300) % 7 == 0).astype(int)
    path = own_graph(tmp_path / "own.npz", node_labels=y)
    arms = ["mlp", "mowst", "mowst@backbone=gat,heads=2", "mowst@backbone=sage-skip", "posthoc"]
    flags = [*MOWST[2:], "--standardize", "--class-weights", "--workers", 1, "--seeds", 2]
    done = command_line(mowst, "--dataset", path, *flags, "--arms", *arms)
    assert done.returncode == 0, done.stderr
    report = results_of(tmp_path)
    assert {*arms, "gnn", "gnn@backbone=gat,heads=2"} <= report["results"]["arms"].keys()
    judged = {claim["id"]: claim["measured"] for claim in report["claims"]}
    assert judged["mowst.split"] == "it needs a generated graph, whose kinds of nodes are known"
    assert list(report["data"]) == [path] and "rich" not in str(report["results"]["arms"])


def arxiv_archive(path):
    """A small graph packed the way OGB packs ogbn-arxiv."""
    graph = graphs.contextual_sbm(0, num_nodes=300).split(0)
    parts = {"raw/node-feat": graph.x, "raw/edge": graph.edge_index.T}
    parts["raw/node-label"] = graph.y[:, None]
    for name, part in (("train", "train"), ("valid", "val"), ("test", "test")):
        parts[f"split/time/{name}"] = getattr(graph, f"{part}_mask").nonzero()
    path.parent.mkdir(parents=True)
    with zipfile.ZipFile(path, "w") as archive:
        for name, rows in parts.items():
            text = "".join(",".join(map(str, row)) + "\n" for row in rows.tolist())
            archive.writestr(f"arxiv/{name}.csv.gz", gzip.compress(text.encode()))


def test_full_scale_runs_from_the_archive_with_the_official_settings(
    command_line, tmp_path, monkeypatch
):
    monkeypatch.setattr(mowst.graphs.download, "_receive", None)  # no network
    arxiv_archive(tmp_path / "cache" / "ogbn-arxiv" / "arxiv.zip")
    few = ["--epochs", 2, "--turn-epochs", 1, "--rounds", 1, "--star-epochs", 2, "--workers", 1]
    arms = ["mowst", "mowst_star", "mowst@backbone=sage"]
    flags = ["--data-dir", tmp_path / "cache", *few, "--arms", *arms]
    done = command_line(mowst, "--full", *flags)
    assert done.returncode == 0, done.stderr
    report, left = results_of(tmp_path, "full"), tmp_path / "runs" / "mowst-full" / "arms"
    assert report["scale"] == "full" and list(report["data"]) == ["ogbn-arxiv"]
    loaded = mowst.load_trained(left / "mowst-seed0.pt")
    assert loaded.confidence.kind == "free" and loaded.confidence.num_features == 16
    assert loaded.strong.layers[0].weight.shape == (16, 256)
    sage = mowst.load_trained(left / "mowst@backbone=sage-seed0.pt")  # a row of its own
    assert sage.strong.layers[0].own.weight.shape == (512, 16) and len(sage.strong.layers) == 4


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--dataset", "tolokerz"], "neither a file"),
        (["--dataset", "cut.npz"], "cut.npz"),
        (["--dataset", "weighed.npz"], "edge_weights"),
        (["--labels", "0.9"], "leave a set smaller"),
        (["--compile"], "not traced"),
        (["--arms", "mowst@gate=hard"], "arm mowst@gate=hard: gate is 'hard'"),
        (["--full", "--dataset", "flickr", "--data-dir", "nowhere"], "put into nowhere"),
    ],
)
def test_mistakes_are_one_clear_line(command_line, tmp_path, flags, message):
    content = Path(own_graph(tmp_path / "weighed.npz", edge_weights=np.ones(9))).read_bytes()
    (tmp_path / "cut.npz").write_bytes(content[:5000])
    done = command_line(mowst, *flags)
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_a_dry_run_counts_every_gnn_and_needs_no_data(command_line, tmp_path):
    flags = ["--full", "--dataset", "chameleon_filtered", "--dry-run", "--data-dir", tmp_path,
             "--threads", 1]  # fmt: skip
    done = command_line(mowst, *flags)
    assert done.returncode == 0 and "58,924" in done.stdout, done.stderr  # bytes to download
    assert "random graph of the size of chameleon_filtered" in done.stdout
    assert "a step is an epoch of 4 GNN(s)" in done.stdout
    # A GNN alone: 3 x 100 epochs. Mowst: 20 rounds of two turns, one of them a GNN's. Mowst*: all.
    assert f"dry run: {300 + 20 * 300 + 20_000:,} training steps" in done.stdout
    assert not list(tmp_path.iterdir())


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
