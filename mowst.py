"""Mowst: mixture of weak and strong experts on graphs.

Zeng, Lyu, Hu, Xia, Luo, "Mixture of Weak & Strong Experts on Graphs" (ICLR 2024, arXiv 2311.05185).

Some nodes of a graph are told by their own features, others only by their neighbours; a graph
neural network spends the same work on both, and blurs the first. Mowst mixes two whole models, node
by node: a *weak* expert, an MLP that sees the node alone, and a *strong* one, any GNN. No router
chooses between them: what decides is how sure the weak expert is of itself.

    p = softmax(MLP(x)),  p' = softmax(GNN(x, graph))        [nodes, classes]
    D = dispersion of p: 0 for uniform, 1 for one-hot        its variance, or negative entropy
    C = G(D) in [0, 1], where G never falls                  the confidence
    Mowst    L  = mean of C CE(p, y) + (1 - C) CE(p', y)     by turns
    Mowst*   L* = mean of CE(C p + (1 - C) p', y)            jointly; never above L
    answers  sampled: the MLP's with probability C, else the GNN's          as Mowst does
             mixed: the likeliest class of C p + (1 - C) p'                 as Mowst* does

Turn A trains MLP and G, the GNN frozen; turn B trains the GNN, C frozen: a node counts 1 - C for
it; then A again. A node of class 0, with D the variance and G the identity:

    p  = .7 .2 .1    CE(p, y)  = 0.357    C = D = .31    L  = 0.941    sampled: right in .31
    p' = .3 .6 .1    CE(p', y) = 1.204    1 - C = .69    L* = 0.858    mixed: .424 .476 .1, wrong

Through C the MLP learns which nodes to leave. Take nodes that it cannot tell apart, 80 % of them of
one of two classes, and a GNN with mean loss m on them. At m = 0.3, less than any answer of the MLP
costs, the best p is 1/2, C = 0: it gives them up. At m = 0.8 it is .905, more than the .8 it knows.

Run      python mowst.py                    a minute on two cores, no download
         python mowst.py --ablate           other gates, two GNNs, other homophily; --seeds 8
         python mowst.py --dataset tolokers or another public graph, or your own .npz
         python mowst.py --full             ogbn-arxiv; --dataset flickr, ogbn-products, penn94,
                                            pokec or twitch-gamer: the six graphs of the paper
You see  a generated graph, half of whose nodes are told by features, half by neighbours: accuracy
         of each method on either half, and what became of the claims.
Found    (seeds 0-7) Sampled as in its code, Mowst beats the MLP by 25.1 ± 1.1 points, GCN by 11.2 ±
         0.8, GIN by 12.7 ± 1.2, the mean of MLP and GCN by 0.7 ± 0.5, an ordinary gate by 2.2 ±
         0.6; mixed 1.5 more each. But SAGE, which keeps a node apart from its neighbours, loses by
         it (-0.5 ± 0.3), and GIN with an MLP beside it gains nothing. C tells the kinds of nodes
         apart. Most is the gate: C = D on the experts as they are, mixed, is level with it (-0.3 ±
         0.6); training makes C sharp, so that sampling is safe (5.3 ± 0.6 over that gate, sampled).
         Nothing is saved on a whole graph: 2.31 ± 0.05 times the time of one GNN. On four public
         graphs it is nowhere above the better of its experts (results/README.md).
Differences from the paper, whose text could not be read in full, and from its code
1. G is monotone by construction; the official one is a free MLP (gate=free) or comes from a
   hyper-network on x, which is left out. So is H2GCN, which its code lacks.
2. The MLP learns through C; the official code cuts that gradient (detach_confidence=true).
3. A frozen expert is in evaluation mode, asked once a turn. The official code leaves its dropout
   and batch statistics running, and forgets G when it restores the best state.
4. The best state is chosen by the mixture's validation loss, there by the accuracy of 50 draws.
5. An expert alone stops by the validation loss; the official code reads the training mask there.
6. Mowst* mixes probabilities in training as in answers; the official code mixes logits in training.
7. lr_gate holds in turns, too. Its two strong experts are our arm strong_strong.
8. Graphs are symmetric, in fp32; the MLP's batch statistics are those of training nodes.
9. Small budgets: 200 epochs for an expert alone, 60 a turn. --full has its: 20,000 for either.

Break it yourself (sampled, seeds 100-102): --pretrain gnn --gate var (C stays at 0.01, as p is
nearly uniform, where C sends no gradient: 75.3, the GCN alone 75.6); --mu-poor 4 (features tell
every node, C is 0.99: 98.2, the MLP alone 98.5); --homophily-poor 0.2 (neighbours tell nothing: on
seeds 0-7 58.5, below the MLP's 61.8).
"""

import functools
import json
import math
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import common
from common import (
    Count,
    Job,
    Margin,
    Missing,
    NonNegative,
    Only,
    Positive,
    Range,
    Results,
    Run,
    Share,
    claim,
    show,
)
from data import graphs

# --------------------------------------------------------------------------------------------------
# The method
# --------------------------------------------------------------------------------------------------


def dispersion(logits: Tensor, kind: str = "var") -> Tensor:
    """How far softmax(logits) is from uniform: 0 uniform, 1 one-hot. [..., classes] -> [...].

    "var" is the variance over classes, "ent" the negative entropy, both normalised.
    Raises ValueError for fewer than two classes or another kind.
    """
    num_classes = logits.shape[-1]
    if num_classes < 2 or kind not in ("var", "ent"):
        needed = "needed: at least 2 classes, kind 'var' or 'ent'"
        raise ValueError(f"{num_classes} classes, kind {kind!r}; {needed}")
    log_probs = logits.log_softmax(dim=-1)
    probs = log_probs.exp()
    if kind == "var":
        found = (num_classes * probs.square().sum(dim=-1) - 1) / (num_classes - 1)
    else:
        found = 1 + (probs * log_probs).sum(dim=-1) / math.log(num_classes)
    return found.clamp(0, 1)  # rounding


class MonotoneGate(nn.Module):
    """G that never falls when a dispersion rises. d [..., 2], x [..., features] -> (0, 1) [...].

    sigmoid(softplus(W2) tanh(softplus(W1) d + V x + b1) + b2): no weight on the path from d can
    become negative. x is looked at if num_features is above 0.
    """

    def __init__(self, hidden: int = 16, num_features: int = 0):
        super().__init__()
        self.w1 = nn.Parameter(torch.randn(2, hidden))
        slopes = F.softplus(self.w1.detach()).sum(dim=0)
        # Units bend at dispersions between 0 and 1, and at first C goes from .1 to .9.
        self.b1 = nn.Parameter(-slopes * torch.rand(hidden))
        self.w2 = nn.Parameter(torch.full((hidden,), math.log(math.expm1(4 / hidden))))
        self.b2 = nn.Parameter(torch.zeros(()))
        self.features = nn.Linear(num_features, hidden, bias=False) if num_features else None

    def forward(self, d: Tensor, x: Tensor | None = None) -> Tensor:
        h = d @ F.softplus(self.w1) + self.b1  # [..., hidden]
        if self.features is not None:
            h = h + self.features(x)
        return torch.sigmoid(h.tanh() @ F.softplus(self.w2) + self.b2)


class MLP(nn.Module):
    """Linear layers with batch norm, ReLU and dropout between. [nodes, width] -> [nodes, out]."""

    def __init__(self, width: int, hidden: int, out_width: int, layers: int, dropout: float):
        super().__init__()
        widths = [width, *[hidden] * (layers - 1), out_width]
        pairs = zip(widths, widths[1:])
        self.layers = nn.ModuleList(nn.Linear(before, after) for before, after in pairs)
        self.norms = nn.ModuleList(nn.BatchNorm1d(hidden) for _ in range(layers - 1))
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        return self.after_first(self.layers[0](x))

    def after_first(self, h: Tensor) -> Tensor:
        for norm, layer in zip(self.norms, self.layers[1:]):
            h = layer(F.dropout(F.relu(norm(h)), self.dropout, self.training))
        return h


class Confidence(nn.Module):
    """C = G(D(softmax(weak_logits))). weak_logits [nodes, classes], x [nodes, features] -> [nodes].

    kind  "var", "ent": G is the identity on that dispersion; "monotone": MonotoneGate; "free": a
          plain MLP, as in the official code; "features": sigmoid(MLP(x)), which looks at the
          features alone: an ordinary learned gate, no part of Mowst
    num_features > 0 shows G the features, too. Raises ValueError for another kind.
    """

    def __init__(
        self,
        kind: str,
        num_features: int = 0,
        hidden: int = 16,
        layers: int = 2,
        dropout: float = 0.5,
    ):
        super().__init__()
        self.kind, self.num_features = kind, num_features
        if kind == "monotone":
            self.gate = MonotoneGate(hidden, num_features)
        elif kind == "free":
            self.gate = MLP(2 + num_features, hidden, 1, layers, dropout)
        elif kind == "features":
            self.gate = MLP(num_features, hidden, 1, layers, dropout)
        elif kind not in ("var", "ent"):
            raise ValueError(f"gate is {kind!r}; allowed: var, ent, monotone, free, features")

    def forward(self, weak_logits: Tensor, x: Tensor | None = None) -> Tensor:
        if self.kind in ("var", "ent"):
            return dispersion(weak_logits, self.kind)
        if self.kind == "features":
            return torch.sigmoid(self.gate(x)[:, 0])
        both = [dispersion(weak_logits, "var"), dispersion(weak_logits, "ent")]
        d = torch.stack(both, dim=-1)  # [nodes, 2]
        if self.kind == "monotone":
            return self.gate(d, x)
        seen = torch.cat([d, x], dim=-1) if self.num_features else d
        return torch.sigmoid(self.gate(seen)[:, 0])


def mowst_loss(
    confidence: Tensor,
    weak_logits: Tensor,
    strong_logits: Tensor,
    labels: Tensor,
    class_weights: Tensor | None = None,
) -> Tensor:
    """L: the losses of both experts, weighted node by node.

    confidence, labels [nodes], logits [nodes, classes] -> 0-dim. class_weights [classes] multiply
    the losses of nodes of rare classes, say.
    """
    weak = F.cross_entropy(weak_logits, labels, class_weights, reduction="none")  # [nodes]
    strong = F.cross_entropy(strong_logits, labels, class_weights, reduction="none")
    return (confidence * weak + (1 - confidence) * strong).mean()


def mowst_star_loss(
    confidence: Tensor,
    weak_logits: Tensor,
    strong_logits: Tensor,
    labels: Tensor,
    class_weights: Tensor | None = None,
) -> Tensor:
    """L*: the loss of the mixed prediction; never above L. As mowst_loss."""
    log_probs = mixture_log_probs(confidence, weak_logits, strong_logits)
    return F.nll_loss(log_probs, labels, class_weights, reduction="sum") / len(labels)


def mixture_log_probs(confidence: Tensor, weak_logits: Tensor, strong_logits: Tensor) -> Tensor:
    """ln(C p + (1 - C) p'). confidence [nodes], logits [nodes, classes] -> [nodes, classes]."""
    shares = torch.stack([confidence, 1 - confidence], dim=-1)  # [nodes, 2]
    log_shares = shares.clamp(min=torch.finfo(shares.dtype).tiny).log()
    both = [weak_logits.log_softmax(dim=-1), strong_logits.log_softmax(dim=-1)]
    log_probs = torch.stack(both, dim=-2)  # [nodes, 2, classes]
    return (log_shares.unsqueeze(-1) + log_probs).logsumexp(dim=-2)


def answer(
    confidence: Tensor,
    weak_logits: Tensor,
    strong_logits: Tensor,
    infer: str = "sample",
    generator: torch.Generator | None = None,
) -> Tensor:
    """The class of every node: [nodes] int64.

    infer  "sample": the weak expert's with probability C, as the official code does for Mowst, and
           our default since the second edition; "threshold": the weak expert's where C > 0.5;
           "mixture": that of C p + (1 - C) p', as the official code does for Mowst*
    """
    if infer == "mixture":
        return mixture_log_probs(confidence, weak_logits, strong_logits).argmax(dim=-1)
    if infer == "sample":
        bar = torch.rand(len(confidence), generator=generator).to(confidence)
    elif infer == "threshold":
        bar = torch.full_like(confidence, 0.5)
    else:
        raise ValueError(f"infer is {infer!r}; allowed: sample, threshold, mixture")
    return torch.where(bar < confidence, weak_logits.argmax(dim=-1), strong_logits.argmax(dim=-1))


def expected_accuracy(
    confidence: Tensor, weak_logits: Tensor, strong_logits: Tensor, labels: Tensor
) -> Tensor:
    """[nodes]: the exact probability that a sampled answer is right."""
    weak = (weak_logits.argmax(dim=-1) == labels).to(confidence)
    strong = (strong_logits.argmax(dim=-1) == labels).to(confidence)
    return confidence * weak + (1 - confidence) * strong


class Task(NamedTuple):
    """A graph whose nodes are to be classified."""

    x: Tensor  # [nodes, features]
    adjacency: "Adjacency"
    y: Tensor  # [nodes] int64
    train: Tensor  # [training nodes] int64
    val: Tensor
    test: Tensor
    class_weights: Tensor | None = None  # [classes]


def ask(
    expert: nn.Module, x: Tensor, adjacency: "Adjacency", nodes: Tensor | slice = slice(None)
) -> Tensor:
    """The logits of some nodes. A GNN has to see the whole graph; an MLP sees these nodes alone."""
    if getattr(expert, "sees_graph", False):
        return expert(x, adjacency)[nodes]
    return expert(x[nodes])


class Mowst(nn.Module):
    """weak(x), strong(x, adjacency), and the confidence C read off the weak one.

    x [nodes, features] -> confidence [nodes], weak and strong logits [nodes, classes].
    detach  C sends no gradient into the weak expert
    """

    def __init__(
        self, weak: nn.Module, strong: nn.Module, confidence: Confidence, detach: bool = False
    ):
        super().__init__()
        self.weak, self.strong, self.confidence, self.detach = weak, strong, confidence, detach

    def forward(self, x: Tensor, adjacency: "Adjacency") -> tuple[Tensor, Tensor, Tensor]:
        confidence, weak_logits = self.look(x, adjacency)
        return confidence, weak_logits, self.strong(x, adjacency)

    def look(
        self, x: Tensor, adjacency: "Adjacency", nodes: Tensor | slice = slice(None)
    ) -> tuple[Tensor, Tensor]:
        """The weak half, on some nodes: confidence [nodes], weak logits [nodes, classes]."""
        weak_logits = ask(self.weak, x, adjacency, nodes)
        judged = weak_logits.detach() if self.detach else weak_logits
        return self.confidence(judged, x[nodes]), weak_logits


def fit(
    stage: str,
    module: nn.Module,
    loss_fn: Callable[[], Tensor],
    score_fn: Callable[[], Tensor],
    epochs: int,
    patience: int,
    on_epoch: Callable[[int, float, float], object] | None = None,
    **adamw: float,
) -> float:
    """Full-batch AdamW on `module` until `patience` epochs bring no lower score_fn().

    Leaves the best state in it, gate included, and returns its score. The start counts, too: a turn
    that brings nothing is undone. on_epoch(epoch, loss, score) is told.
    Raises FloatingPointError when loss or score are no numbers.
    """
    optimizer = torch.optim.AdamW(module.parameters(), **adamw)

    def score() -> float:
        module.eval()
        with torch.no_grad():
            return float(score_fn())

    best = score()
    best_state = copy_state(module)
    waited = 0
    for epoch in range(epochs):
        if waited >= patience:
            break
        module.train()
        optimizer.zero_grad()
        loss = loss_fn()
        loss.backward()
        optimizer.step()
        lost = float(loss.detach())
        found = score()
        if not math.isfinite(lost + found):
            raise FloatingPointError(f"{stage}: loss {lost}, validation {found} at epoch {epoch}")
        waited += 1
        if found < best:
            best = found
            best_state = copy_state(module)
            waited = 0
        if on_epoch is not None:
            on_epoch(epoch, lost, found)
    module.load_state_dict(best_state)
    module.eval()
    return best


def copy_state(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def train_alone(
    expert: nn.Module, task: Task, epochs: int, patience: int, fit: Callable = fit, **adamw: float
) -> None:
    """Pretraining of one expert: cross-entropy on training nodes, stopped by validation nodes.

    Raises ValueError: features that are NaN or infinite, nobody to train on or to validate.
    """
    if not torch.isfinite(task.x).all():
        raise ValueError("x holds NaN or infinity")
    if len(task.train) == 0 or len(task.val) == 0:
        counts = f"{len(task.train)} training and {len(task.val)} validation nodes"
        raise ValueError(f"{counts}; both are needed")

    def loss(nodes: Tensor) -> Tensor:
        logits = ask(expert, task.x, task.adjacency, nodes)
        return F.cross_entropy(logits, task.y[nodes], task.class_weights)

    goals = (partial(loss, task.train), partial(loss, task.val))
    fit("alone", expert, *goals, epochs, patience, **adamw)


def goals_of(task: Task, train_loss: Callable, outputs: Callable) -> tuple[Callable, Callable]:
    """What training lowers, and the mixture's validation loss, which chooses the best state.

    outputs(nodes) -> confidence, weak and strong logits of these nodes
    """

    def loss(loss_fn: Callable, nodes: Tensor) -> Tensor:
        return loss_fn(*outputs(nodes), task.y[nodes], task.class_weights)

    return partial(loss, train_loss, task.train), partial(loss, mowst_star_loss, task.val)


def train_by_turns(
    model: Mowst,
    task: Task,
    turn_epochs: int = 60,
    turn_patience: int = 20,
    rounds: int = 4,
    round_patience: int = 1,
    fit: Callable = fit,
    **adamw: float,
) -> None:
    """Mowst. Turn A: the MLP and G, the GNN frozen. Turn B: the GNN, where the MLP is not sure.

    Whoever is frozen is in evaluation mode, and asked once a turn. round_patience rounds without a
    better validation loss end it all.
    """
    graph = (task.x, task.adjacency)

    def turn_a(stage: str) -> None:
        model.eval()
        with torch.no_grad():
            strong = model.strong(*graph)

        def outputs(nodes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return *model.look(*graph, nodes), strong[nodes]

        goals = goals_of(task, mowst_loss, outputs)
        module = nn.ModuleList([model.weak, model.confidence])
        fit(stage, module, *goals, turn_epochs, turn_patience, **adamw)

    def turn_b(stage: str) -> float:
        model.eval()
        with torch.no_grad():
            confidence, weak = model.look(*graph)

        def outputs(nodes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return confidence[nodes], weak[nodes], model.strong(*graph)[nodes]

        goals = goals_of(task, mowst_loss, outputs)
        return fit(stage, model.strong, *goals, turn_epochs, turn_patience, **adamw)

    best = math.inf
    waited = 0
    for number in range(rounds):
        turn_a(f"round {number} weak")
        found = turn_b(f"round {number} strong")
        waited = 0 if found < best else waited + 1
        best = found
        if waited >= round_patience:
            break


def train_jointly(
    model: Mowst, task: Task, epochs: int, patience: int, fit: Callable = fit, **adamw: float
) -> None:
    """Mowst*: both experts and the gate at once, on the mixed prediction."""

    def outputs(nodes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        strong = model.strong(task.x, task.adjacency)[nodes]
        return *model.look(task.x, task.adjacency, nodes), strong

    goals = goals_of(task, mowst_star_loss, outputs)
    fit("jointly", model, *goals, epochs, patience, **adamw)


# --------------------------------------------------------------------------------------------------
# The method's experts: GNNs in plain torch, as products with sparse matrices
# --------------------------------------------------------------------------------------------------


class SparseProduct(torch.autograd.Function):
    """a @ x for a constant CSR matrix.

    Its transpose is stored, too: autograd's own would build it at every step. In the precision of
    a, also under autocast.
    """

    @staticmethod
    def forward(ctx, x: Tensor, a: Tensor, a_transposed: Tensor) -> Tensor:
        ctx.a_transposed = a_transposed
        with torch.autocast(x.device.type, enabled=False):
            return a @ x.to(a.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        with torch.autocast(gradient.device.type, enabled=False):
            return ctx.a_transposed @ gradient, None, None


class Sparse:
    """A constant matrix, from entries sorted by row, then column. sparse @ x, x [size, width]."""

    def __init__(self, row: Tensor, column: Tensor, value: Tensor, size: int):
        self.csr = self.transposed = csr_matrix(row, column, value, size)
        order = (column * size + row).argsort()
        if not (torch.equal(row[order], column) and torch.equal(value[order], value)):
            self.transposed = csr_matrix(column[order], row[order], value[order], size)

    def __matmul__(self, x: Tensor) -> Tensor:
        return SparseProduct.apply(x, self.csr, self.transposed)


def csr_matrix(row: Tensor, column: Tensor, value: Tensor, size: int) -> Tensor:
    pointers = torch.zeros(size + 1, dtype=torch.int64, device=row.device)
    pointers[1:] = torch.bincount(row, minlength=size).cumsum(0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        return torch.sparse_csr_tensor(pointers, column, value, (size, size), check_invariants=True)


class Adjacency:
    """A graph, and the matrices that GNNs multiply with, each built when first used.

    edge_index [2, edges] integer: sources, targets. Give both directions of an edge; loops and
    duplicates are dropped. Raises ValueError for another shape or a node out of range.
    """

    def __init__(self, edge_index: Tensor, num_nodes: int, dtype: torch.dtype = torch.float32):
        if edge_index.dim() != 2 or len(edge_index) != 2:
            raise ValueError(f"edge_index is {list(edge_index.shape)}; needed: [2, edges]")
        if ((edge_index < 0) | (edge_index >= num_nodes)).any():
            low, high = int(edge_index.min()), int(edge_index.max())
            raise ValueError(f"edge_index holds nodes {low} .. {high} of {num_nodes}")
        edge_index = edge_index.long()
        self.num_nodes, self.dtype = num_nodes, dtype
        self.edge_index = self.in_order(edge_index[:, edge_index[0] != edge_index[1]])
        self.degree = torch.bincount(self.edge_index[1], minlength=num_nodes).to(dtype)  # incoming

    def in_order(self, edge_index: Tensor) -> Tensor:
        """Without duplicates, sorted by target, then source. [2, edges] -> [2, edges]."""
        source, target = edge_index
        key = (target * self.num_nodes + source).unique()
        return torch.stack([key % self.num_nodes, key // self.num_nodes])

    @cached_property
    def with_loops(self) -> Tensor:
        """edge_index with an edge from every node to itself."""
        nodes = torch.arange(self.num_nodes, device=self.edge_index.device)
        return self.in_order(torch.cat([self.edge_index, nodes.expand(2, -1)], dim=1))

    @cached_property
    def gcn(self) -> Sparse:
        """S = (D + I)^-1/2 (A + I) (D + I)^-1/2."""
        source, target = self.with_loops
        scale = (self.degree + 1).rsqrt()
        return Sparse(target, source, scale[source] * scale[target], self.num_nodes)

    @cached_property
    def mean(self) -> Sparse:
        """D^-1 A: the mean over neighbours, 0 without any."""
        source, target = self.edge_index
        return Sparse(target, source, 1 / self.degree[target], self.num_nodes)

    @cached_property
    def sum(self) -> Sparse:
        source, target = self.edge_index
        ones = torch.ones(len(source), dtype=self.dtype, device=source.device)
        return Sparse(target, source, ones, self.num_nodes)

    def edges_seen(self, active: Tensor, hops: int) -> int:
        """Edges among the nodes that `hops` layers see for the active ones. active [nodes] bool."""
        source, target = self.edge_index
        for _ in range(hops):
            seen = active.clone()
            seen[source[active[target]]] = True
            active = seen
        return int((active[source] & active[target]).sum())


class GCNLayer(nn.Module):
    """S x W + b. x [nodes, width] -> [nodes, out_width]. Kipf and Welling 2017."""

    def __init__(self, width: int, out_width: int):
        super().__init__()
        self.weight = xavier(width, out_width)
        self.bias = nn.Parameter(torch.zeros(out_width))

    def forward(self, x: Tensor, adjacency: Adjacency) -> Tensor:
        if self.weight.shape[0] < self.weight.shape[1]:  # propagate the fewer columns
            return (adjacency.gcn @ x) @ self.weight + self.bias
        return adjacency.gcn @ (x @ self.weight) + self.bias


def xavier(*shape: int) -> nn.Parameter:
    return nn.Parameter(nn.init.xavier_uniform_(torch.empty(shape)))


class SAGELayer(nn.Module):
    """W1 mean of the neighbours + b + W2 x. Hamilton et al. 2017."""

    def __init__(self, width: int, out_width: int):
        super().__init__()
        self.neighbours = nn.Linear(width, out_width)
        self.own = nn.Linear(width, out_width, bias=False)

    def forward(self, x: Tensor, adjacency: Adjacency) -> Tensor:
        if self.own.in_features < self.own.out_features:
            return self.neighbours(adjacency.mean @ x) + self.own(x)
        around = adjacency.mean @ (x @ self.neighbours.weight.T)
        return around + self.neighbours.bias + self.own(x)


class GINLayer(nn.Module):
    """MLP(x + sum of the neighbours). Xu et al. 2019, epsilon fixed at 0."""

    def __init__(self, width: int, out_width: int, hidden: int, layers: int, dropout: float):
        super().__init__()
        self.mlp = MLP(width, hidden, out_width, layers, dropout)

    def forward(self, x: Tensor, adjacency: Adjacency) -> Tensor:
        first = self.mlp.layers[0]
        if first.in_features > first.out_features:  # the first linear layer and the sum commute
            h = x @ first.weight.T
            return self.mlp.after_first(h + adjacency.sum @ h + first.bias)
        return self.mlp(x + adjacency.sum @ x)


class GATLayer(nn.Module):
    """Attention over neighbours and the node itself; heads side by side. Velickovic et al. 2018.

    By index operations, edge by edge: torch gives the values of a CSR matrix no gradient. Memory is
    edges x out_width. No faster than torch_geometric's; the others are 2.6 to 12 times as fast.
    """

    def __init__(self, width: int, out_width: int, heads: int):
        super().__init__()
        if out_width % heads:
            raise ValueError(f"width {out_width} does not divide into {heads} heads")
        self.weight = xavier(width, out_width)
        self.source = xavier(heads, out_width // heads)
        self.target = xavier(heads, out_width // heads)
        self.bias = nn.Parameter(torch.zeros(out_width))

    def forward(self, x: Tensor, adjacency: Adjacency) -> Tensor:
        source, target = adjacency.with_loops
        h = (x @ self.weight).unflatten(1, self.source.shape)  # [nodes, heads, head_width]
        by_source = (h * self.source).sum(dim=-1)  # [nodes, heads]
        by_target = (h * self.target).sum(dim=-1)
        score = F.leaky_relu(by_source[source] + by_target[target], 0.2)  # [edges, heads]
        # Softmax over incoming edges. The shift by the largest cancels: it needs no gradient.
        index = target[:, None].expand_as(score)
        largest = torch.zeros_like(by_source)
        largest = largest.scatter_reduce(0, index, score.detach(), "amax", include_self=False)
        weight = (score - largest[target]).exp()
        total = torch.zeros_like(largest).index_add(0, target, weight)
        message = h[source] * weight.unsqueeze(-1)  # [edges, heads, head_width]
        summed = message.new_zeros(h.shape).index_add(0, target, message)
        return (summed / total.unsqueeze(-1)).flatten(1) + self.bias


class GNN(nn.Module):
    """Layers of one kind (gcn, sage, gin, gat) with batch norm, ReLU (gat: ELU), dropout between.

    x [nodes, width], adjacency -> logits [nodes, out_width]. Raises ValueError: another backbone.
    """

    sees_graph = True

    def __init__(
        self,
        backbone: str,
        width: int,
        hidden: int,
        out_width: int,
        layers: int,
        dropout: float,
        heads: int = 4,
        norm: bool = True,
    ):
        super().__init__()
        widths = [width, *[hidden] * (layers - 1), out_width]
        self.layers, self.norms = nn.ModuleList(), nn.ModuleList()
        for number in range(layers):
            is_last = number == layers - 1
            before, after = widths[number : number + 2]
            if backbone == "gcn":
                layer = GCNLayer(before, after)
            elif backbone == "sage":
                layer = SAGELayer(before, after)
            elif backbone == "gin":
                layer = GINLayer(before, after, hidden, layers, dropout)
            elif backbone == "gat":
                layer = GATLayer(before, after, 1 if is_last else heads)
            else:
                raise ValueError(f"backbone is {backbone!r}; allowed: gcn, sage, gin, gat")
            self.layers.append(layer)
            if not is_last:
                self.norms.append(nn.BatchNorm1d(hidden) if norm else nn.Identity())
        self.act, self.dropout = F.elu if backbone == "gat" else F.relu, dropout

    def forward(self, x: Tensor, adjacency: Adjacency) -> Tensor:
        for layer, norm in zip(self.layers, self.norms):
            x = F.dropout(self.act(norm(layer(x, adjacency))), self.dropout, self.training)
        return self.layers[-1](x, adjacency)


# --------------------------------------------------------------------------------------------------
# Baselines
# --------------------------------------------------------------------------------------------------


class Skip(nn.Module):
    """A GNN with an MLP beside it, their logits added, trained as one: Mowst without a gate."""

    sees_graph = True

    def __init__(self, gnn: nn.Module, mlp: nn.Module):
        super().__init__()
        self.gnn, self.mlp = gnn, mlp

    def forward(self, x: Tensor, adjacency: Adjacency) -> Tensor:
        return self.gnn(x, adjacency) + self.mlp(x)


# --------------------------------------------------------------------------------------------------
# Config
# --------------------------------------------------------------------------------------------------

Dropout = Annotated[float, Range(0, 1)]
Backbone = Literal["gcn", "sage", "gin", "gat", "gcn-skip", "sage-skip", "gin-skip"]


@dataclass(frozen=True)
class Config(common.Settings):
    dataset: str = "generated"  # or the name of a public graph, or the path of your own
    standardize: bool = False  # each feature column by its mean and deviation on training nodes
    class_weights: bool = False  # weigh losses by the inverse frequency of a class
    backbone: Backbone = "gcn"  # strong expert; -skip: with an MLP beside it
    hidden: Count | None = 32  # width of both experts; none, here and below: see PRESETS
    layers: Count | None = 2  # of both experts
    heads: Annotated[Count, Only(backbone="gat")] = 4  # of gat; they share the width
    lr: Positive | None = 0.01  # AdamW, of an expert alone
    dropout: Dropout | None = 0.5  # after hidden layers, of an expert alone
    lr_gate: Positive | None = None  # when experts are mixed; none at small scale: as lr
    dropout_gate: Dropout | None = None  # when experts are mixed; none at small scale: as dropout
    weight_decay: NonNegative | None = 5e-4  # AdamW
    epochs: Count = 200  # at most, of an expert alone; official 20,000
    patience: Count = 40  # epochs without a better validation loss; official 100
    turn_epochs: Count = 60  # at most in a turn; official 20,000
    turn_patience: Count = 20  # official 100
    rounds: Count = 4  # at most, of two turns each; official 20,000
    round_patience: Count = 1  # rounds without a better validation loss; official 10
    star_epochs: Count = 480  # at most, of Mowst*: as many as all turns; official 20,000
    star_patience: Count = 40  # official: none, it runs them all
    gate: Literal["monotone", "free", "var", "ent", "features"] = "monotone"  # G; official free
    gate_input: Literal["d", "dx"] | None = "d"  # what G sees: dispersions; dx: features, too
    detach_confidence: bool = False  # cut the gradient from C into the MLP, as the official code
    pretrain: Literal["neither", "mlp", "gnn", "both"] | None = "both"  # who starts trained
    num_nodes: Annotated[Count, Only(dataset="generated")] = 3000  # of a graph
    mu_poor: Annotated[NonNegative, Only(dataset="generated")] = 0.3  # features' signal; others 4
    homophily_poor: Annotated[float, Range(0), Only(dataset="generated")] = 0.85  # of the others
    shift: Annotated[int, Only(dataset="generated")] = 0  # their neighbours' class is own + shift
    labels: Annotated[Share, Only(dataset="generated")] = 0.1  # share of training nodes


SMALL = Config()
FULL = replace(
    SMALL, dataset="ogbn-arxiv", hidden=None, layers=None, lr=None, dropout=None, weight_decay=None,
    gate="free", gate_input=None, pretrain=None, epochs=20_000, patience=100, turn_epochs=20_000,
    turn_patience=100, rounds=20_000, round_patience=10, star_epochs=20_000, star_patience=20_000,
)  # fmt: skip
# Best settings of the official repository: what a field that is none becomes.
PRESET_FIELDS = (
    "hidden", "layers", "lr", "lr_gate", "weight_decay", "dropout", "dropout_gate", "gate_input",
    "pretrain",
)  # fmt: skip
PRESETS = {
    ("gcn", "flickr"): (128, 3, 0.1, 0.01, 5e-4, 0.3, 0.5, "d", "gnn"),  # its preset: hidden 256
    ("gcn", "ogbn-arxiv"): (256, 3, 0.001, 0.001, 0.0, 0.2, 0.5, "dx", "gnn"),
    ("gcn", "ogbn-products"): (256, 3, 0.01, 0.01, 0.0, 0.5, 0.5, "dx", "gnn"),
    ("gcn", "penn94"): (64, 2, 0.1, 0.01, 1e-3, 0.1, 0.5, "d", "gnn"),
    ("gcn", "pokec"): (64, 2, 0.1, 0.001, 1e-3, 0.2, 0.3, "d", "mlp"),
    ("gcn", "twitch-gamer"): (64, 2, 0.1, 0.1, 1e-3, 0.2, 0.1, "d", "neither"),
    ("sage", "flickr"): (12, 3, 0.01, 0.01, 5e-4, 0.5, 0.5, "dx", "both"),
    ("sage", "ogbn-arxiv"): (512, 4, 0.01, 0.01, 0.0, 0.3, 0.5, "d", "gnn"),
    ("sage", "ogbn-products"): (256, 3, 0.01, 0.01, 0.0, 0.1, 0.5, "dx", "mlp"),
    ("sage", "penn94"): (32, 2, 0.01, 0.001, 1e-3, 0.5, 0.5, "dx", "gnn"),
    ("sage", "pokec"): (12, 2, 0.1, 0.1, 1e-3, 0.1, 0.1, "dx", "gnn"),
    ("sage", "twitch-gamer"): (32, 2, 0.01, 0.01, 1e-3, 0.3, 0.1, "d", "gnn"),
    ("gin", "flickr"): (256, 3, 0.001, 0.001, 5e-4, 0.1, 0.5, "d", "gnn"),
    ("gin", "ogbn-arxiv"): (256, 3, 0.001, 0.001, 0.0, 0.1, 0.5, "d", "gnn"),
    ("gin", "penn94"): (12, 2, 0.001, 0.001, 1e-3, 0.5, 0.1, "d", "gnn"),
    ("gin", "pokec"): (4, 2, 0.01, 0.001, 1e-3, 0.1, 0.1, "d", "gnn"),
    ("gin", "twitch-gamer"): (12, 2, 0.01, 0.01, 1e-3, 0.1, 0.5, "d", "gnn"),
    ("gin-skip", "pokec"): (64, 2, 0.01, 0.001, 1e-3, 0.1, 0.5, "d", "gnn"),
    ("gin-skip", "twitch-gamer"): (64, 2, 0.01, 0.001, 1e-3, 0.1, 0.1, "d", "gnn"),
}
OTHERWISE = (64, 2, 0.01, 0.01, 1e-3, 0.5, 0.5, "d", "both")  # ours, where it has no row


def settle(config: Config) -> Config:
    """Fill the fields that are none, from the official row for this GNN and graph."""
    official = PRESETS.get((config.backbone, config.dataset), OTHERWISE)
    values = dict(zip(PRESET_FIELDS, official))
    for name in ("lr", "dropout"):  # a value given for experts alone goes on to hold
        if getattr(config, name) is not None:
            values[f"{name}_gate"] = getattr(config, name)
    missing = [name for name in values if getattr(config, name) is None]
    return replace(config, **{name: values[name] for name in missing})


# --------------------------------------------------------------------------------------------------
# The experiment: experts alone, then mixed
# --------------------------------------------------------------------------------------------------

EXPERTS = ("mlp", "gnn", "gnn_again")  # gnn_again: from other initial weights
MIXTURES = {  # method: the experts that it starts from
    "ensemble": ("mlp", "gnn"),  # mean of their probabilities
    "posthoc": ("mlp", "gnn"),  # C = D of the MLP as it is: nothing is trained
    "oracle": ("mlp", "gnn"),  # the known kind of a node decides
    "mowst": ("mlp", "gnn"),
    "mowst_star": ("mlp", "gnn"),
    "strong_strong": ("gnn_again", "gnn"),  # Mowst whose weak expert is a GNN, too
}
TRAINED = ("mowst", "mowst_star", "strong_strong")
BACKBONES = ("gcn", "sage", "gin", "gin-skip")  # the paper's, but for H2GCN
HOMOPHILY = (0.2, 0.5, 0.85)  # 0.2: neighbours say nothing, as there are five classes
OTHER_CLASS = "@shift=1"  # neighbours are of the next class: a heterophilous graph
OF_MIXTURES = (  # settings that do not concern their experts
    "gate", "gate_input", "detach_confidence", "pretrain", "lr_gate", "dropout_gate", "rounds",
    "round_patience", "turn_epochs", "turn_patience", "star_epochs", "star_patience",
)  # fmt: skip


def at_each(field: str, values: Sequence, config: Config) -> dict:
    """{value: what to write after the name of an arm that has it}, nothing for the run's own."""
    own = getattr(config, field)
    return {value: "" if value == own else f"@{field}={value}" for value in values}


def at_backbones(config: Config) -> dict[str, str]:
    return at_each("backbone", (config.backbone, *BACKBONES), config)


def default_arms(config: Config) -> list[str]:
    arms = ["mlp", "gnn", "ensemble", "posthoc", "mowst", "mowst_star"]
    for at in at_backbones(config).values():
        arms += [f"gnn{at}", f"mowst{at}", f"mowst_star{at}"]
    if config.dataset == "generated":
        arms += ["oracle"]
        arms += [f"{method}{OTHER_CLASS}" for method in ("mlp", "gnn", "mowst", "mowst_star")]
    return arms


def more_arms(config: Config) -> list[str]:
    """Of --ablate: the official gate, no gate but D, an ordinary one; two GNNs; homophily."""
    arms = ["mowst@gate=free", "mowst@gate=var", "mowst@detach_confidence=true"]
    arms += ["mowst_star@gate=features", "strong_strong"]
    if config.dataset == "generated":
        for at in at_each("homophily_poor", HOMOPHILY, config).values():
            arms += [f"mlp{at}", f"gnn{at}", f"mowst{at}"]
    return arms


def method_of(arm: str) -> str:
    return arm.partition("@")[0]


def experts_of(arm: str, config: Config) -> list[str]:
    """The arms that train a mixture's experts: with its settings, as far as they concern them.

    mowst@backbone=sage,gate=var -> mlp, gnn@backbone=sage; but mlp@backbone=sage where the MLP's
    settings come from an official row, which belongs to a GNN. config: of the run
    """
    own = common.arm_config(config, arm)
    by_row = None in (own.hidden, own.layers, own.lr, own.weight_decay, own.dropout)
    of_gnns = ("heads",) if by_row else ("heads", "backbone")
    settings = arm.partition("@")[2].split(",")
    found = []
    for expert in MIXTURES[method_of(arm)]:
        other = (*OF_MIXTURES, *of_gnns) if expert == "mlp" else OF_MIXTURES
        kept = [setting for setting in settings if setting.partition("=")[0] not in other]
        found.append(f"{expert}@{','.join(kept)}".rstrip("@"))
    return found


read_once = functools.lru_cache(maxsize=1)(graphs.load)


def load_graph(config: Config, seed: int, run: Run) -> graphs.Graph:
    """A seed's graph: generated, or a public one, which is the same for all of them."""
    if config.dataset == "generated":
        knobs = ("num_nodes", "mu_poor", "homophily_poor", "shift")
        given = {name: getattr(config, name) for name in knobs}
        return graphs.contextual_sbm(1000 * seed, train_share=config.labels, **given)
    if run.dry_run and not graphs.is_here(config.dataset, run.data_dir):
        return graphs.stand_in(config.dataset)
    return read_once(config.dataset, str(run.data_dir))


def make_task(graph: graphs.Graph, config: Config, seed: int, device: str) -> Task:
    """With the split of a seed, on the device. Raises ValueError: a set of fewer than two nodes."""
    graph = graph.split(seed % graph.num_splits)
    parts = []
    for mask in (graph.train_mask, graph.val_mask, graph.test_mask):
        parts.append(mask.nonzero()[:, 0].to(device))
    sizes = [len(part) for part in parts]
    if min(sizes) < 2:
        raise ValueError(f"{graph.name}: {sizes} train, val and test nodes; 2 of each are needed")
    train = parts[0]
    x, y = graph.x.to(device), graph.y.to(device)
    if config.standardize:
        known = x[train].double()
        spread = known.std(dim=0, correction=0)
        spread[spread == 0] = 1.0  # a constant column
        x = ((x - known.mean(dim=0)) / spread).float()
    weights = None
    if config.class_weights:  # mean 1 over the training nodes
        counts = torch.bincount(y[train], minlength=graph.num_classes).clamp(min=1)
        weights = len(train) / (graph.num_classes * counts)
    adjacency = Adjacency(graph.edge_index.to(device), len(x))
    return Task(x, adjacency, y, *parts, class_weights=weights)


def build_expert(method: str, config: Config, sizes: Sequence[int], dropout: float) -> nn.Module:
    """From initial weights. sizes: numbers of features and of classes."""
    num_features, num_classes = sizes
    shape = (num_features, config.hidden, num_classes, config.layers, dropout)
    if method == "mlp":
        return MLP(*shape)
    backbone = config.backbone.removesuffix("-skip")
    norm = config.dataset != "ogbn-products" or backbone == "gin"  # as in the official code
    gnn = GNN(backbone, *shape, heads=config.heads, norm=norm)
    return Skip(gnn, MLP(*shape)) if config.backbone.endswith("-skip") else gnn


def build(method: str, config: Config, sizes: Sequence[int]) -> nn.Module:
    if method in EXPERTS:
        return build_expert(method, config, sizes, config.dropout)
    dropout = config.dropout_gate
    weak, strong = (build_expert(name, config, sizes, dropout) for name in MIXTURES[method])
    sees_features = config.gate == "features" or config.gate_input == "dx"
    num_features = sizes[0] if sees_features else 0
    hidden = 16 if config.gate == "monotone" else config.hidden
    confidence = Confidence(config.gate, num_features, hidden, config.layers, dropout)
    return Mowst(weak, strong, confidence, config.detach_confidence)


def train_arm(job: Job) -> dict:
    config = settle(job.config)
    graph = load_graph(config, job.seed, job.run)
    task = make_task(graph, config, job.seed, job.run.device)
    sizes = [graph.x.shape[1], graph.num_classes]
    torch.manual_seed(10_000 * job.seed + (job.method == "gnn_again"))
    model = build(job.method, config, sizes).to(job.run.device)
    if job.method in MIXTURES:
        start_from_experts(model, job, config)
    if job.method in (*EXPERTS, *TRAINED):
        train(model, job, config, task)
        common.save(job.path(".pt"), {"sizes": sizes, "model": model.state_dict()})
    with torch.no_grad():
        if job.method in EXPERTS:
            logits = ask(model.eval(), task.x, task.adjacency)
            return evaluate(logits.log_softmax(dim=-1), task, graph.kind)
        confidence, weak, strong = model.eval()(task.x, task.adjacency)
    if job.method == "ensemble":
        confidence = torch.full_like(confidence, 0.5)
    elif job.method == "posthoc":
        confidence = dispersion(weak)
    elif job.method == "oracle":
        confidence = graph.kind.to(confidence)
    found = evaluate(mixture_log_probs(confidence, weak, strong), task, graph.kind)
    if job.method in (*TRAINED, "posthoc"):
        found |= evaluate_sampled(confidence, weak, strong, task, graph.kind)
    if job.method == "mowst":
        found |= measure_cost(model, confidence, task, config.layers)
    return found


def start_from_experts(model: Mowst, job: Job, config: Config) -> None:
    """Those that were trained alone, as far as `pretrain` says so."""
    pretrain = config.pretrain if job.method in TRAINED else "both"
    weak, strong = experts_of(job.arm, job.run.config)
    for half, arm, name in ((model.weak, weak, "mlp"), (model.strong, strong, "gnn")):
        if pretrain in (name, "both"):
            half.load_state_dict(common.load(job.other(arm).path(".pt"))["model"])


def train(model: nn.Module, job: Job, config: Config, task: Task) -> None:
    """By `fit`, which tells a log. An interrupted arm begins again.

    Not by common.train: an epoch is one step on the whole graph, a validation loss ends a turn
    early, and its best state comes back.
    """
    log = []

    def logged_fit(stage: str, *goals: object, **adamw: float) -> float:
        bar = tqdm(desc=f"{job.label}, {stage}", unit="epoch", leave=False, disable=None)

        def on_epoch(epoch: int, loss: float, score: float) -> None:
            about = {"arm": job.label, "stage": stage}
            log.append({**about, "step": epoch, "loss": loss, "val": score})
            bar.update()

        with bar:
            return fit(stage, *goals, on_epoch=on_epoch, **adamw)

    adamw = {"lr": config.lr, "weight_decay": config.weight_decay}
    mixed = {**adamw, "lr": config.lr_gate}
    try:
        if job.method in EXPERTS:
            train_alone(model, task, config.epochs, config.patience, logged_fit, **adamw)
        elif job.method == "mowst_star":
            budget = (config.star_epochs, config.star_patience)
            train_jointly(model, task, *budget, logged_fit, **mixed)
        else:
            budget = (config.turn_epochs, config.turn_patience)
            budget += (config.rounds, config.round_patience)
            train_by_turns(model, task, *budget, logged_fit, **mixed)
    except FloatingPointError as error:
        message = f"{job.label}: {error}; last good checkpoint: none; lower --lr"
        raise common.NonFiniteLoss(message) from None
    with common.atomic_file(job.path(".jsonl"), "w") as file:
        file.writelines(json.dumps(line) + "\n" for line in log)


def rebuild(job: Job, left: dict) -> nn.Module:
    model = build(job.method, settle(job.config), left["sizes"])
    common.load_state(model, left["model"], f"{job.label}.pt")
    return model


def load_trained(path: str | Path) -> nn.Module:
    """The model of an arm, in eval mode, on the CPU: runs/mowst-small/arms/mowst-seed0.pt.

    An MLP of x, a GNN of (x, adjacency), or a Mowst: (x, adjacency) -> confidence, weak and strong
    logits, which `answer` takes. With --standardize x is that of make_task. What trains nothing
    (ensemble, posthoc, oracle) leaves no model. Raises UsageError, see common.load_trained.
    """
    return common.load_trained(path, Config, rebuild)


# --------------------------------------------------------------------------------------------------
# What is measured, on the test nodes
# --------------------------------------------------------------------------------------------------


def by_kind(name: str, right: Tensor, task: Task, kind: Tensor | None) -> dict:
    """Percent right, of all test nodes and of each kind. right [nodes]: probabilities."""
    right = 100 * right.double()
    found = {name: float(right[task.test].mean()), f"{name}, val": float(right[task.val].mean())}
    if kind is not None:
        on_test, rich = right[task.test].cpu(), kind[task.test.cpu()]
        found[f"{name}, rich"] = float(on_test[rich].mean())
        found[f"{name}, poor"] = float(on_test[~rich].mean())
    return found


def evaluate(log_probs: Tensor, task: Task, kind: Tensor | None) -> dict:
    """Of the likeliest class. log_probs [nodes, classes]. AUC: a class against the rest, mean."""
    found = by_kind("accuracy", log_probs.argmax(dim=-1) == task.y, task, kind)
    y = task.y[task.test]
    areas = []
    for number, score in enumerate(log_probs[task.test].T):
        if 0 < (y == number).sum() < len(y):
            areas.append(area_under_curve(score, y == number))
    return {**found, "auc": float(np.mean(areas))} if areas else found


def evaluate_sampled(
    confidence: Tensor, weak: Tensor, strong: Tensor, task: Task, kind: Tensor | None
) -> dict:
    """Of sampled answers, exactly; and who is sure of what."""
    right = expected_accuracy(confidence.double(), weak, strong, task.y)
    found = by_kind("sampled", right, task, kind)
    y, sure = task.y[task.test], confidence[task.test]  # [test nodes]
    losses = [F.cross_entropy(z[task.test], y, reduction="none") for z in (weak, strong)]
    found["weak_better"] = 100 * float((losses[0] < losses[1]).double().mean())
    found["weak_answers"] = 100 * float(sure.double().mean())
    if kind is not None:
        rich = kind.to(y.device)[task.test]
        found["kind_auc"] = area_under_curve(sure, rich)
        found["c, rich"] = float(sure[rich].mean())
        found["c, poor"] = float(sure[~rich].mean())
    return found


def area_under_curve(score: Tensor, positive: Tensor) -> float:
    """How often a positive scores above a negative, ties half. score [n], positive [n] bool."""
    _, index, counts = score.unique(return_inverse=True, return_counts=True)
    rank = (counts.cumsum(0) - (counts - 1) / 2)[index].double()  # from 1, ties averaged
    num = int(positive.sum())
    above = rank[positive].sum() - num * (num + 1) / 2
    return float(above / (num * (len(score) - num)))


@torch.no_grad()
def measure_cost(model: Mowst, confidence: Tensor, task: Task, layers: int) -> dict:
    """Of sampled answers beside one GNN: for all nodes at once, and for 32 nodes one by one.

    All at once, the GNN runs on the whole graph: the nodes left to it see nearly all of it. Time is
    that of this process (on a GPU: of the clock), and the two take turns, so that other work on the
    machine hardly counts.
    """
    draws = torch.rand(len(confidence), generator=torch.Generator().manual_seed(0))
    active = draws.to(confidence) >= confidence  # [nodes]: the GNN answers
    edges = 0
    edges_left = 0
    for node in task.test[:32]:
        alone = torch.arange(len(active), device=active.device) == node
        seen = task.adjacency.edges_seen(alone, layers)
        edges += seen
        edges_left += seen if active[node] else 0
    clock = time.perf_counter if task.x.is_cuda else time.process_time
    seconds = {"gnn": 0.0, "mowst": 0.0}
    for _ in range(30):
        for name, expert in (("gnn", model.strong), ("mowst", model)):
            began = clock()
            expert(task.x, task.adjacency)
            if task.x.is_cuda:
                torch.cuda.synchronize()
            seconds[name] += clock() - began
    seen = task.adjacency.edges_seen(active, layers)
    return {
        "active": 100 * float(active.double().mean()),
        "edges_seen": 100 * seen / max(1, task.adjacency.edge_index.shape[1]),
        "edges_one_by_one": 100 * edges_left / max(1, edges),
        "seconds_ratio": seconds["mowst"] / seconds["gnn"],
    }


# --------------------------------------------------------------------------------------------------
# Claims. The paper's tables could not be read, so there is no number of it but the abstract's.
# --------------------------------------------------------------------------------------------------

ABSTRACT = "not verified (the abstract: 4 GNNs, 6 graphs)"


def leads(results: Results, other: str, at: str = "") -> dict[str, np.ndarray]:
    """How far Mowst is above another arm, in points of test accuracy: by each way to answer.

    `at` follows the names of Mowst's arms. The other one answers with its likeliest class.
    """
    theirs = results.of(other, "accuracy")
    return {
        "sampled": results.of(f"mowst{at}", "sampled") - theirs,
        "mixed": results.of(f"mowst{at}", "accuracy") - theirs,
        "Mowst* mixed": results.of(f"mowst_star{at}", "accuracy") - theirs,
    }


def listed(values: dict[str, np.ndarray]) -> str:
    return ", ".join(f"{name} {show(by_seed, 1)}" for name, by_seed in values.items())


def lead(results: Results, other: str, at: str = "") -> Margin:
    """Sampled answers of Mowst decide, as in its code; mixed ones stand beside them."""
    found = leads(results, other, at)
    return Margin(found["sampled"], f"points: {listed(found)}", found)


@claim("Mowst is more accurate than the MLP alone", ABSTRACT, required=True)
def beats_weak(results: Results, config: Config) -> Margin:
    return lead(results, "mlp")


@claim("Mowst is more accurate than the GNN alone, whichever of GCN, SAGE, GIN and GIN-skip it is",
       ABSTRACT, required=True)  # fmt: skip
def beats_strong(results: Results, config: Config) -> Margin:
    """The backbone that gains least."""
    found = {"sampled": {}, "mixed": {}, "Mowst* mixed": {}}
    for backbone, at in at_backbones(config).items():
        for way, margin in leads(results, f"gnn{at}", at).items():
            found[way][backbone] = margin
    text = "; ".join(f"{way}: {listed(by_backbone)}" for way, by_backbone in found.items())
    weakest = min(found["sampled"].values(), key=np.mean)
    return Margin(weakest, f"points, {text}", found["sampled"])


@claim("Mowst is more accurate than the mean of MLP and GNN", "not verified (ours)", required=True)
def beats_ensemble(results: Results, config: Config) -> Margin:
    return lead(results, "ensemble")


@claim("Mowst helps on a heterophilous graph, too: more accurate than MLP and GNN",
       "not verified (the abstract: on both kinds of graphs)", required=True)  # fmt: skip
def heterophily(results: Results, config: Config) -> Margin:
    """The better of the two."""
    experts = (f"mlp{OTHER_CLASS}", f"gnn{OTHER_CLASS}")
    better = max(experts, key=lambda arm: results.of(arm, "accuracy").mean())
    return lead(results, better, OTHER_CLASS)


@claim("training splits the graph: C tells the kinds of nodes apart with an AUC above 0.9",
       "not verified (its graphs have no known kinds)", required=True)  # fmt: skip
def split(results: Results, config: Config) -> Margin:
    if config.dataset != "generated":
        raise Missing("a generated graph, whose kinds of nodes are known")
    auc = results.of("mowst", "kind_auc")
    rich, poor = (show(results.of("mowst", key), 2) for key in ("c, rich", "c, poor"))
    text = f"AUC {show(auc, 3)}; mean C {rich} on feature-rich nodes, {poor} on structure-rich ones"
    return Margin(auc - 0.9, text)


@claim("the confidence favours the GNN: the MLP answers for fewer nodes than it is better on",
       "not verified (the abstract: a desirable bias)", required=True)  # fmt: skip
def strong_bias(results: Results, config: Config) -> Margin:
    better, answers = (results.of("mowst", name) for name in ("weak_better", "weak_answers"))
    text = f"lower loss on {show(better, 1)} % of nodes, answers for {show(answers, 1)} %"
    return Margin(better - answers, text)


@claim("sampled answers cost about one GNN: at most 1.25 times its time",
       "comparable to one GNN (abstract)", required=True)  # fmt: skip
def cost(results: Results, config: Config) -> Margin:
    ratio = results.of("mowst", "seconds_ratio")
    keys = ("active", "edges_seen", "edges_one_by_one")
    active, seen, one_by_one = (show(results.of("mowst", key), 0) for key in keys)
    text = f"all nodes at once: {show(ratio, 2)} times the time of one GNN, which answers for "
    text += f"{active} % of nodes and must see {seen} % of edges for that; "
    text += f"node by node: {one_by_one} % of its edges"
    return Margin(1.25 - ratio, text)


@claim("it is the training that helps: Mowst beats C = D on the same experts, untrained",
       "not verified (ours)")  # fmt: skip
def beats_posthoc(results: Results, config: Config) -> Margin:
    """Against its mixed answers, which are its better ones."""
    found = lead(results, "posthoc")
    alike = results.of("mowst", "sampled") - results.of("posthoc", "sampled")
    return found._replace(text=f"{found.text}; both sampled {show(alike, 1)}")


@claim("Mowst is more accurate than an ordinary gate, which looks at the features alone")
def beats_learned_gate(results: Results, config: Config) -> Margin:
    return lead(results, "mowst_star@gate=features")


# --------------------------------------------------------------------------------------------------
# Table, picture, main
# --------------------------------------------------------------------------------------------------


def print_table(results: Results, run: Run) -> None:
    columns = {
        "sampled": ("sampled", 1),
        "feature-rich": ("sampled, rich", 1),
        "structure-rich": ("sampled, poor", 1),
        "mixed": ("accuracy", 1),
        "f-rich": ("accuracy, rich", 1),
        "s-rich": ("accuracy, poor", 1),
        "AUC": ("auc", 3),
    }
    title = f"test accuracy in percent, {len(run.seeds)} seed(s); mixed: the likeliest class of"
    run.table(f"{title} C p + (1 - C) p'", *results.table(results, columns))


ROWS = {  # of the picture: (arm, how it answers)
    "MLP": ("mlp", "accuracy"),
    "GNN": ("gnn", "accuracy"),
    "two GNNs by turns, sampled": ("strong_strong", "sampled"),
    "mean of MLP and GNN": ("ensemble", "accuracy"),
    "C = D untrained, sampled": ("posthoc", "sampled"),
    "C = D untrained, mixed": ("posthoc", "accuracy"),
    "Mowst, sampled": ("mowst", "sampled"),
    "Mowst, mixed": ("mowst", "accuracy"),
    "Mowst*, mixed": ("mowst_star", "accuracy"),
    "oracle": ("oracle", "accuracy"),
}
CURVES = ("MLP", "GNN", "Mowst, sampled")


def draw(results: Results, config: Config, run: Run) -> None:
    """All methods; then three of them by homophily, on all nodes and on either half."""
    rows, colors = {}, {}
    for label, (arm, key) in ROWS.items():
        if arm in results:
            rows[label] = results.of(arm, key)
            colors[label] = common.color_of(label, CURVES) if label in CURVES else "0.5"
    swept = {}  # homophily: what stands after the names of its arms
    for value, at in at_each("homophily_poor", HOMOPHILY, config).items():
        if f"mowst{at}" in results:
            swept[value] = at

    def methods(ax) -> None:
        common.dots(ax, rows, colors)
        ax.set(xlabel="test accuracy, %", title="every method, a dot a seed")

    def by_homophily(ax, nodes: str, title: str) -> None:
        for label in CURVES:
            arm, key = ROWS[label]
            y = [results.of(f"{arm}{at}", f"{key}{nodes}") for at in swept.values()]
            color = common.color_of(label, CURVES)
            common.curve(ax, list(swept), np.stack(y, axis=1), label, color)
        ax.set(xlabel="homophily of structure-rich nodes", ylabel="test accuracy, %", title=title)
        ax.set_ylim(0, 100)

    panels = [methods]
    if len(swept) > 1:
        halves = {"": "all nodes", ", rich": "feature-rich half", ", poor": "structure-rich half"}
        panels += [partial(by_homophily, nodes=nodes, title=halves[nodes]) for nodes in halves]
    run.plot(panels)


def count_epochs(config: Config, arms: Sequence[str]) -> int:
    """Epochs of GNNs that one seed may take: a guess.

    What may stop early is taken to do so after three times its patience, rounds after twice theirs.
    """
    config = settle(config)
    alone = min(config.epochs, 3 * config.patience)
    rounds = min(config.rounds, 2 * config.round_patience)
    turns = rounds * min(config.turn_epochs, 3 * config.turn_patience)
    jointly = min(config.star_epochs, 3 * config.star_patience)
    each = {"gnn": alone, "gnn_again": alone, "mowst": turns, "mowst_star": jointly}
    each["strong_strong"] = 2 * turns
    return sum(each.get(method_of(arm), 0) for arm in arms)


def plan(config: Config, run: Run, arms: Sequence[str]) -> None:
    """What the run works on, and its cost: an epoch of every GNN in it, times their epochs."""
    graph = load_graph(config, run.seed, run)
    task = make_task(graph, config, run.seed, run.device)
    run.data = {config.dataset: graph.digest}
    gnns = nn.ModuleList()
    for arm in arms:
        if method_of(arm) == "gnn":
            settled = settle(common.arm_config(config, arm))
            gnns.append(build("gnn", settled, [graph.x.shape[1], graph.num_classes]))
    gnns.to(run.device)

    def epoch_of_each() -> None:
        for gnn in gnns:
            logits = gnn(task.x, task.adjacency)
            F.cross_entropy(logits[task.train], task.y[task.train]).backward()
            with torch.no_grad():  # for the validation loss
                gnn(task.x, task.adjacency)

    if graph.note:
        common.say(f"{graph.name}: {graph.note}")
    if run.scale == "full" and run.device == "cpu":
        common.say("first an epoch of every GNN is measured: on a CPU that takes minutes")
    shape = f"{len(task.x):,} nodes, {task.adjacency.edge_index.shape[1]:,} edges"
    text = f"{graph.name} {graph.digest}: {shape}, {graph.num_classes} classes"
    text += f"; a step is an epoch of {len(gnns)} GNN(s)"
    steps = count_epochs(config, arms) * len(run.seeds) / max(1, len(gnns))
    is_here = config.dataset == "generated" or graphs.is_here(config.dataset, run.data_dir)
    download = 0 if is_here else graphs.download_size(config.dataset)
    run.plan(text, gnns, epoch_of_each, steps, download)


def main(config: Config, run: Run) -> Results:
    if run.compile:
        raise common.UsageError("--compile: sparse products are not traced; run without it")
    if run.dtype != torch.float32:
        common.say("note: this script computes in fp32")
        run.dtype = torch.float32
    arms = run.choose((*EXPERTS, *MIXTURES), default_arms(config), more_arms(config))
    mixtures = [arm for arm in arms if method_of(arm) in MIXTURES]
    experts = [arm for arm in arms if arm not in mixtures]
    for arm in mixtures:
        experts += [expert for expert in experts_of(arm, config) if expert not in experts]
    plan(config, run, [*experts, *mixtures])
    results = run.train_arms(train_arm, experts)
    results |= run.train_arms(train_arm, mixtures)
    print_table(results, run)
    draw(results, config, run)
    return results


if __name__ == "__main__":
    common.run(main, SMALL, FULL)
