"""Mowst: mixture of weak and strong experts on graphs.

Zeng, Lyu, Hu, Xia, Luo, "Mixture of Weak & Strong Experts on Graphs" (ICLR 2024, arXiv 2311.05185).

Some nodes of a graph are told by their own features, others only by their neighbours, and a graph neural network
spends the same work on both and blurs the first. Mowst mixes two whole models, node by node: a *weak* expert, an MLP
that sees the node alone, and a *strong* one, any GNN. There is no router. What decides is how sure the weak expert is:

    p = softmax(MLP(x)),  p' = softmax(GNN(x, graph))              [nodes, classes]
    D = dispersion of p: 0 for uniform, 1 for one-hot              variance, or negative entropy
    C = G(D) in [0, 1], G non-decreasing                           the confidence
    Mowst    L  = mean of C * CE(p, y) + (1 - C) * CE(p', y)       by turns: MLP and G, then the GNN, and again
    Mowst*   L* = mean of CE(C p + (1 - C) p', y)                  jointly
    answer   the MLP with probability C, else the GNN;  or argmax of C p + (1 - C) p'  (mixture)

        node   p               C    answers   turn B: the GNN learns from it with weight
        a      .97 .01 .02    .9    MLP       1 - C = .1
        b      .40 .35 .25    .1    GNN       1 - C = .9

Give a group of look-alike nodes the label distribution alpha and the GNN loss mu. If mu <= H(alpha), the MLP's best
move is p uniform, C = 0: it hands them over. Otherwise it overstates its confidence (`--theory` prints the table).
L >= L* always. One edge between two nodes makes every GCN answer both alike; Mowst with that GCN need not.

Run      python mowst.py                        under a minute on two cores, no download
         python mowst.py --ablate               other gates, backbones, pretraining; a heterophilous graph
         python mowst.py --theory               the closed-form table by direct minimisation
         python mowst.py --dataset tolokers     a public graph, or the path of your own .npz
         python mowst.py --full                 ogbn-arxiv with the official settings; --dataset penn94, flickr, ...
You see  generated graphs, half of whose nodes are told by features, half by neighbours: accuracy of each method on
         both kinds, a histogram of C by kind, how much of the GNN's work remains, and what the claims became; in
         nodes-*.csv every node with C and the answers of both experts.
Found    (seeds 0-2, nine graphs) Mowst beats the MLP by 26 points, the GCN by 12, their mean by 1.7, GCN + MLP as one
         model by 2.3; C knows the kind of node with AUC 0.97. Most of that is the gate: put on the pretrained experts
         without any training, it mixes answers only 1.0 worse than Mowst. Sampled answers are what training is for:
         4.8 better than that gate's, 1.6 worse than mixed ones. With SAGE, whose layers keep the node apart from its
         neighbours, 1.7 are gained; with GIN plus an MLP inside, 0.1.

Differences from the paper and its code
1. The paper's text could not be read in full; equations follow the official code, public reviews, own derivations.
2. G is monotone by construction (default). The official G is a free MLP, here `--gate free`.
3. The MLP is trained through C, as the theory has it; the official code cuts that gradient: --detach-confidence.
4. A frozen expert is in evaluation mode and computed once a turn. The official code leaves dropout and batch
   statistics running in it, and forgets G when it restores the best state.
5. States are kept by the mixture's validation loss, not by the accuracy of 50 random draws. Whoever mixes two experts
   falls back on the GNN alone (C = 0) where that has the better validation accuracy.
6. Mowst* mixes probabilities in training as at inference; the official code mixes logits in training.
7. lr_gate and dropout_gate hold for everything that is trained after pretraining, with Mowst and Mowst* alike.
8. Graphs are made symmetric. The MLP trains on training nodes only. Full batch, fp32.
Small scale: graphs of 3,000 nodes. An expert alone has 200 epochs, a mixture of trained ones 480 more, and so has the
skip control; all stop by validation loss, the GCN alone before its 200. Every arm has the same grid, if one is given.

Break it yourself: --pretrain gnn --gate var (C = 0 for ever: at uniform p the gradient is zero); --homophily-poor 0.2
(a GNN that knows nothing); --mu-poor 4 (an MLP that knows everything).
"""

import csv
import itertools
import json
import math
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import bridge as common
from bridge import Claim, Run
from data import graphs
from data.graphs import Adjacency, Graph

# ---------------------------------------------------------------------------------------------------------------
# Config
# ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    dataset: str = ""  # name or path of a graph, see data/graphs.py; empty: generated graphs
    graphs: int = 3  # generated graphs, or published splits, a seed
    backbone: str = "gcn"  # strong expert: gcn, sage, gin, gat, gcn-skip, gin-skip
    hidden: int | None = 32  # width of both experts; none, here and below: the official row, see PRESETS
    layers: int | None = 2  # of both experts
    heads: int = 4  # of gat; they share the width
    lr: tuple[float, ...] | None = (0.01,)  # AdamW; several values: each arm takes its best on validation
    dropout: tuple[float, ...] | None = (0.5,)  # after hidden layers; several values as with lr
    lr_gate: tuple[float, ...] | None = None  # the same once two experts are mixed; none at small scale: as lr
    dropout_gate: tuple[float, ...] | None = None  # none at small scale: as dropout
    weight_decay: float | None = 5e-4  # AdamW; official 5e-4, 0 or 1e-3 by data set
    epochs: int = 200  # at most, of an expert alone; official 500 of pretraining
    patience: int = 40  # epochs without a better validation loss; official 100
    turn_epochs: int = 60  # at most in a turn; official 20,000
    turn_patience: int = 20  # official 100
    rounds: int = 4  # at most, of two turns each; Mowst* has the epochs of all turns
    round_patience: int = 1  # rounds without a better validation loss; official 10
    gate: str = "monotone"  # G: monotone, free (official), or identity on one dispersion: var, ent
    gate_input: str | None = "d"  # what monotone and free see: d (the dispersions), dx (and the features)
    detach_confidence: bool = False  # cut the gradient from C into the MLP, as the official code does
    pretrain: str | None = "both"  # which expert starts trained: neither, mlp, gnn, both
    infer: str = "mixture"  # what is reported: mixture, threshold, sample, expected (exact mean of sample)
    num_nodes: int = 3000  # generated: nodes of a graph
    mu_rich: float = 4.0  # generated: class signal in the features of feature-rich nodes
    mu_poor: float = 0.3  # generated: in those of the others
    homophily_poor: float = 0.85  # generated: share of the others' neighbours that are of one class
    shift: int = 0  # generated: that class is the own one plus shift; 1: heterophilous
    cross: float = 0.05  # generated: share of edges to the other kind
    labels: float = 0.1  # generated: share of training nodes


SMALL = Config()
FULL = replace(
    SMALL, dataset="ogbn-arxiv", graphs=1, hidden=None, layers=None, lr=None, dropout=None, lr_gate=None,
    dropout_gate=None, weight_decay=None, gate_input=None, pretrain=None, gate="free", epochs=500, patience=100,
    turn_epochs=500, turn_patience=100, rounds=20, round_patience=10,
)  # fmt: skip

# Best settings in the official repository. Its row for GCN on Flickr has hidden 128, its preset 256.
PRESET_FIELDS = "hidden layers lr lr_gate weight_decay dropout dropout_gate gate_input pretrain".split()
PRESETS = {
    ("gcn", "flickr"): (128, 3, 0.1, 0.01, 5e-4, 0.3, 0.5, "d", "gnn"),
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
OTHERWISE = (64, 2, 0.01, 0.01, 1e-3, 0.5, 0.5, "d", "both")  # ours, where the official repository has no row

# ---------------------------------------------------------------------------------------------------------------
# The method
# ---------------------------------------------------------------------------------------------------------------


def dispersion(logits: Tensor, kind: str = "var") -> Tensor:
    """How far softmax(logits) is from uniform: 0 uniform, 1 one-hot. logits [..., classes] -> [...].

    "var" is the variance over classes, "ent" the negative entropy, both normalised.
    Raises ValueError for fewer than two classes or another kind.
    """
    num_classes = logits.shape[-1]
    if num_classes < 2 or kind not in ("var", "ent"):
        raise ValueError(f"{num_classes} classes, kind {kind!r}; needed: at least 2 classes, kind 'var' or 'ent'")
    log_probs = logits.log_softmax(dim=-1)
    probs = log_probs.exp()
    if kind == "var":
        found = (num_classes * probs.square().sum(dim=-1) - 1) / (num_classes - 1)
    else:
        found = 1 + (probs * log_probs).sum(dim=-1) / math.log(num_classes)
    return found.clamp(0, 1)  # rounding


class MonotoneGate(nn.Module):
    """G that never falls when a dispersion rises. d [..., 2], x [..., num_features] or None -> [...] in (0, 1).

    sigmoid(softplus(W2) tanh(softplus(W1) d + V x + b1) + b2): no weight on the path from d can become negative.
    """

    def __init__(self, hidden: int = 16, num_features: int = 0):
        super().__init__()
        self.w1 = nn.Parameter(torch.randn(2, hidden))
        slopes = F.softplus(self.w1.detach()).sum(dim=0)
        self.b1 = nn.Parameter(-slopes * torch.rand(hidden))  # units bend at dispersions between 0 and 1
        self.w2 = nn.Parameter(torch.full((hidden,), math.log(math.expm1(4 / hidden))))  # so C goes from .1 to .9
        self.b2 = nn.Parameter(torch.zeros(()))
        self.features = nn.Linear(num_features, hidden, bias=False) if num_features else None

    def forward(self, d: Tensor, x: Tensor | None = None) -> Tensor:
        h = d @ F.softplus(self.w1) + self.b1  # [..., hidden]
        if self.features is not None:
            h = h + self.features(x)
        return torch.sigmoid(h.tanh() @ F.softplus(self.w2) + self.b2)


class Confidence(nn.Module):
    """C = G(D(softmax(weak_logits))). weak_logits [nodes, classes], x [nodes, num_features] -> [nodes].

    kind  "var", "ent": G is the identity on that dispersion; "monotone": MonotoneGate; "free": a plain MLP, as in the
          official code; "features": sigmoid(MLP(x)), which looks at the features alone: an ordinary learned gate.
    num_features > 0 shows G the features too.  Raises ValueError for another kind.
    """

    def __init__(self, kind: str, num_features: int = 0, hidden: int = 16, layers: int = 2, dropout: float = 0.5):
        super().__init__()
        if kind not in ("var", "ent", "monotone", "free", "features"):
            raise ValueError(f"gate is {kind!r}; allowed: var, ent, monotone, free, features")
        self.kind, self.num_features = kind, num_features
        if kind == "monotone":
            self.gate = MonotoneGate(hidden, num_features)
        elif kind in ("free", "features"):
            self.gate = MLP(num_features + 2 * (kind == "free"), hidden, 1, layers, dropout)

    def forward(self, weak_logits: Tensor, x: Tensor | None = None) -> Tensor:
        if self.kind in ("var", "ent"):
            return dispersion(weak_logits, self.kind)
        if self.kind == "features":
            return torch.sigmoid(self.gate(x)[:, 0])
        d = torch.stack([dispersion(weak_logits, "var"), dispersion(weak_logits, "ent")], dim=-1)  # [nodes, 2]
        if self.kind == "monotone":
            return self.gate(d, x)
        return torch.sigmoid(self.gate(torch.cat([d, x], dim=-1) if self.num_features else d)[:, 0])


def chain_weights(confidence: Tensor) -> Tensor:
    """Experts from weak to strong, each but the last with its own confidence: who answers with which probability.

    confidence [..., experts - 1] -> [..., experts]; weight m is C_m times the product of 1 - C_j over j < m. For two
    experts (C, 1 - C). For more it is our reading of the paper's extension.
    """
    passed_on = torch.cat([torch.ones_like(confidence[..., :1]), (1 - confidence).cumprod(dim=-1)], dim=-1)
    return torch.cat([confidence, torch.ones_like(confidence[..., :1])], dim=-1) * passed_on


def mixture_log_probs(confidence: Tensor, *logits: Tensor) -> Tensor:
    """ln of the mixed probabilities. confidence [nodes] (or [nodes, experts - 1]), logits [nodes, classes] each."""
    weights = chain_weights(confidence if confidence.dim() == logits[0].dim() else confidence.unsqueeze(-1))
    log_weights = weights.clamp(min=torch.finfo(weights.dtype).tiny).log()  # [nodes, experts]
    log_probs = torch.stack([z.log_softmax(dim=-1) for z in logits], dim=-2)  # [nodes, experts, classes]
    return (log_weights.unsqueeze(-1) + log_probs).logsumexp(dim=-2)


def mowst_loss(confidence: Tensor, weak_logits: Tensor, strong_logits: Tensor, labels: Tensor) -> Tensor:
    """L: the losses of both experts, weighted node by node. confidence, labels [nodes], logits [nodes, classes]."""
    weak, strong = (F.cross_entropy(z, labels, reduction="none") for z in (weak_logits, strong_logits))
    return (confidence * weak + (1 - confidence) * strong).mean()


def mowst_star_loss(confidence: Tensor, weak_logits: Tensor, strong_logits: Tensor, labels: Tensor) -> Tensor:
    """L*: the loss of the mixed prediction; never above L."""
    return F.nll_loss(mixture_log_probs(confidence, weak_logits, strong_logits), labels)


def expected_accuracy(confidence: Tensor, weak_logits: Tensor, strong_logits: Tensor, labels: Tensor) -> Tensor:
    """[nodes]: the exact probability of a right answer when the weak expert answers with probability C."""
    weak, strong = ((z.argmax(dim=-1) == labels).to(confidence) for z in (weak_logits, strong_logits))
    return confidence * weak + (1 - confidence) * strong


def answer(
    confidence: Tensor,
    weak_logits: Tensor,
    strong_logits: Tensor,
    infer: str = "mixture",
    generator: torch.Generator | None = None,
) -> Tensor:
    """[nodes] int64: the class. infer: "mixture", "threshold" (the weak expert iff C > 0.5), "sample" (iff q < C)."""
    if infer == "mixture":
        return mixture_log_probs(confidence, weak_logits, strong_logits).argmax(dim=-1)
    if infer not in ("threshold", "sample"):
        raise ValueError(f"infer is {infer!r}; allowed: mixture, threshold, sample")
    bar = torch.rand(len(confidence), generator=generator).to(confidence) if infer == "sample" else 0.5
    return torch.where(bar < confidence, weak_logits.argmax(dim=-1), strong_logits.argmax(dim=-1))


class Mowst(nn.Module):
    """weak(x), strong(x, adjacency), and C read off the weak one.

    x [nodes, features] -> confidence [nodes], weak and strong logits [nodes, classes]. detach: C sends no gradient into
    the weak expert.
    """

    def __init__(self, weak: nn.Module, strong: nn.Module, confidence: Confidence, detach: bool = False):
        super().__init__()
        self.weak, self.strong, self.confidence, self.detach = weak, strong, confidence, detach

    def look(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The weak half, on any rows. x [rows, features] -> C [rows], weak logits [rows, classes]."""
        weak_logits = self.weak(x)
        return self.confidence(weak_logits.detach() if self.detach else weak_logits, x), weak_logits

    def forward(self, x: Tensor, adjacency: Adjacency) -> tuple[Tensor, Tensor, Tensor]:
        return *self.look(x), self.strong(x, adjacency)


def best_response(alpha: float, mu: float, points: int = 200_001) -> dict[str, float]:
    """Binary labels, C = the variance dispersion (2p - 1)^2: the p that minimises mu + C(p) (CE_alpha(p) - mu).

    alpha: share of class 1 among nodes the MLP cannot tell apart; mu: mean loss of the GNN on them, in nats.
    """
    p = torch.linspace(0, 1, points, dtype=torch.float64)[1:-1]
    cross_entropy = -alpha * p.log() - (1 - alpha) * (1 - p).log()
    confidence = (2 * p - 1).square()
    best = int((mu + confidence * (cross_entropy - mu)).argmin())
    found = {"p": p[best], "confidence": confidence[best], "cross_entropy": cross_entropy[best]}
    return {name: float(value) for name, value in found.items()}


# ---------------------------------------------------------------------------------------------------------------
# The experts: message passing in plain torch
# ---------------------------------------------------------------------------------------------------------------


class GCNLayer(nn.Module):
    """S x W + b. x [nodes, width] -> [nodes, out_width]. Kipf and Welling 2017."""

    def __init__(self, width: int, out_width: int):
        super().__init__()
        self.weight = nn.Parameter(nn.init.xavier_uniform_(torch.empty(width, out_width)))
        self.bias = nn.Parameter(torch.zeros(out_width))

    def forward(self, x: Tensor, adjacency: Adjacency) -> Tensor:
        if self.weight.shape[0] < self.weight.shape[1]:  # propagate the fewer columns
            return (adjacency.gcn @ x) @ self.weight + self.bias
        return adjacency.gcn @ (x @ self.weight) + self.bias


class SAGELayer(nn.Module):
    """W1 mean of the neighbours + b + W2 x. Hamilton et al. 2017."""

    def __init__(self, width: int, out_width: int):
        super().__init__()
        self.neighbours, self.own = nn.Linear(width, out_width), nn.Linear(width, out_width, bias=False)

    def forward(self, x: Tensor, adjacency: Adjacency) -> Tensor:
        if self.own.in_features < self.own.out_features:
            return self.neighbours(adjacency.mean @ x) + self.own(x)
        return adjacency.mean @ (x @ self.neighbours.weight.T) + self.neighbours.bias + self.own(x)


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

    By index operations: a CSR tensor would cut the gradient to its values. Memory is edges x out_width.
    """

    def __init__(self, width: int, out_width: int, heads: int):
        super().__init__()
        if out_width % heads:
            raise ValueError(f"width {out_width} does not divide into {heads} heads")
        xavier = lambda *shape: nn.Parameter(nn.init.xavier_uniform_(torch.empty(shape)))
        self.weight = xavier(width, out_width)
        self.source, self.target = (xavier(heads, out_width // heads) for _ in range(2))
        self.bias = nn.Parameter(torch.zeros(out_width))

    def forward(self, x: Tensor, adjacency: Adjacency) -> Tensor:
        source, target = adjacency.with_loops
        h = (x @ self.weight).unflatten(1, self.source.shape)  # [nodes, heads, head_width]
        by_source, by_target = (h * self.source).sum(dim=-1), (h * self.target).sum(dim=-1)  # [nodes, heads]
        score = F.leaky_relu(by_source[source] + by_target[target], 0.2)  # [edges, heads]
        # Softmax over incoming edges. The shift by the largest score cancels, so it needs no gradient.
        index = target[:, None].expand_as(score)
        largest = torch.zeros_like(by_source).scatter_reduce(0, index, score.detach(), "amax", include_self=False)
        weight = (score - largest[target]).exp()
        total = torch.zeros_like(largest).index_add(0, target, weight)
        message = h[source] * (weight / total[target]).unsqueeze(-1)  # [edges, heads, head_width]
        return message.new_zeros(h.shape).index_add(0, target, message).flatten(1) + self.bias


class MLP(nn.Module):
    """Linear layers with batch norm, ReLU and dropout between. x [nodes, width] -> [nodes, out_width]."""

    def __init__(self, width: int, hidden: int, out_width: int, layers: int, dropout: float):
        super().__init__()
        widths = [width] + [hidden] * (layers - 1) + [out_width]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip(widths, widths[1:]))
        self.norms, self.dropout = nn.ModuleList(nn.BatchNorm1d(hidden) for _ in self.layers[1:]), dropout

    def forward(self, x: Tensor) -> Tensor:
        return self.after_first(self.layers[0](x))

    def after_first(self, h: Tensor) -> Tensor:
        for norm, layer in zip(self.norms, self.layers[1:]):
            h = layer(F.dropout(F.relu(norm(h)), self.dropout, self.training))
        return h


class GNN(nn.Module):
    """Layers of one kind (gcn, sage, gin, gat) with batch norm, ReLU (gat: ELU) and dropout between.

    x [nodes, width], adjacency -> logits [nodes, out_width].  Raises ValueError for another backbone.
    """

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
        make = {
            "gcn": lambda a, b, last: GCNLayer(a, b),
            "sage": lambda a, b, last: SAGELayer(a, b),
            "gin": lambda a, b, last: GINLayer(a, b, hidden, layers, dropout),
            "gat": lambda a, b, last: GATLayer(a, b, 1 if last else heads),
        }
        if backbone not in make:
            raise ValueError(f"backbone is {backbone!r}; allowed: {', '.join(BACKBONES)}")
        widths = [width] + [hidden] * (layers - 1) + [out_width]
        self.layers = nn.ModuleList(make[backbone](*widths[i : i + 2], i == layers - 1) for i in range(layers))
        self.norms = nn.ModuleList(nn.BatchNorm1d(hidden) if norm else nn.Identity() for _ in range(layers - 1))
        self.act, self.dropout = F.elu if backbone == "gat" else F.relu, dropout

    def forward(self, x: Tensor, adjacency: Adjacency) -> Tensor:
        for layer, norm in zip(self.layers, self.norms):
            x = F.dropout(self.act(norm(layer(x, adjacency))), self.dropout, self.training)
        return self.layers[-1](x, adjacency)


class Skip(nn.Module):
    """The control with Mowst's parameters and no gate: logits of a GNN plus logits of an MLP, trained as one."""

    def __init__(self, gnn: nn.Module, mlp: nn.Module):
        super().__init__()
        self.gnn, self.mlp = gnn, mlp

    def forward(self, x: Tensor, adjacency: Adjacency) -> Tensor:
        return self.gnn(x, adjacency) + self.mlp(x)


BACKBONES = ("gcn", "sage", "gin", "gat", "gcn-skip", "sage-skip", "gin-skip", "gat-skip")

# ---------------------------------------------------------------------------------------------------------------
# The experiment: experts alone, then mixed; every arm with the same grid
# ---------------------------------------------------------------------------------------------------------------

INFER = ("mixture", "threshold", "sample", "expected")
NUM_BLOCKS = 16  # of the test nodes: what a run on one graph takes its standard error over


class Task(NamedTuple):
    """One graph and one split, on the run's device."""

    graph: Graph  # on the CPU
    x: Tensor  # [nodes, features]
    adjacency: Adjacency
    y: Tensor  # [nodes]
    train: Tensor  # [train_nodes] int64
    val: Tensor
    test: Tensor
    digest: str


class Arm(NamedTuple):
    method: str  # mlp, gnn; moe, mowst, mowst_star; ensemble, posthoc, oracle (known kinds), which train nothing
    config: Config
    weak: str = ""  # arms that trained the experts of a mixture
    strong: str = ""
    stream: int = 0  # another one draws other weights


def make_arms(config: Config, ablate: bool) -> dict[str, Arm]:
    """Name -> arm, experts before the mixtures made of them."""
    arms: dict[str, Arm] = {"mlp": Arm("mlp", config)}

    def add(methods: str, tag: str = "", weak: str = "mlp", strong: str = config.backbone, **changes) -> None:
        for method in methods.split():
            mean = {"infer": "mixture"} if method == "ensemble" else {}  # it is the mean, however Mowst answers
            arms[method + tag] = Arm(method, replace(config, **changes, **mean), weak, strong)

    for name in (config.backbone, config.backbone.removesuffix("-skip") + "-skip"):
        arms[name] = Arm("gnn", replace(config, backbone=name))
    add("ensemble posthoc moe mowst mowst_star" + ("" if config.dataset else " oracle"))
    if not ablate:
        return arms
    variants = {gate: {"gate": gate} for gate in ("monotone", "var", "ent", "free")}
    variants |= {f"pretrain-{start}": {"pretrain": start} for start in ("neither", "mlp", "gnn", "both")}
    variants |= {"d": {"gate_input": "d"}, "dx": {"gate_input": "dx"}}
    variants |= {"detached": {"detach_confidence": True}, "through": {"detach_confidence": False}}
    for tag, changes in variants.items():
        if replace(config, **changes) != config:
            add("mowst", f"@{tag}", **changes)
    arms["gnn@again"] = Arm("gnn", config, stream=1)
    add("ensemble", "@two-gnns", weak="gnn@again")
    for backbone in ("gcn", "sage", "gin", "gat", "gin-skip"):  # the paper's
        if backbone not in arms:
            arms[backbone] = Arm("gnn", replace(config, backbone=backbone))
            add("ensemble mowst mowst_star", f"@{backbone}", strong=backbone, backbone=backbone)
    if not config.dataset:
        other = replace(config, shift=1 - min(config.shift, 1))
        arms |= {"mlp@other": Arm("mlp", other), "gnn@other": Arm("gnn", other)}
        add("mowst mowst_star", "@other", weak="mlp@other", strong="gnn@other", shift=other.shift)
    return arms


@lru_cache(maxsize=1)
def load_public(dataset: str, data_dir: str, device: str, stand_in: bool) -> tuple[Graph, Tensor, Adjacency, str]:
    graph = graphs.stand_in(dataset) if stand_in else graphs.load(dataset, data_dir)
    return graph, graph.x.to(device), Adjacency(graph.edge_index.to(device), len(graph.x)), graph.digest


def make_task(config: Config, seed: int, index: int, run: Run) -> Task:
    """Graph number `index` of a seed: generated, or a published split."""
    if config.dataset:
        stand_in = run.dry_run and not graphs.is_here(config.dataset, run.data_dir)
        graph, x, adjacency, digest = load_public(config.dataset, str(run.data_dir), run.device, stand_in)
        graph = graph.split((seed * config.graphs + index) % graph.num_splits)
    else:
        names = ("num_nodes", "mu_rich", "mu_poor", "homophily_poor", "cross", "shift")
        knobs = {name: getattr(config, name) for name in names}
        graph, digest = graphs.contextual_sbm(1000 * seed + index, train_share=config.labels, **knobs).split(0), ""
        x, adjacency = graph.x.to(run.device), Adjacency(graph.edge_index.to(run.device), len(graph.x))
    parts = [mask.nonzero()[:, 0].to(run.device) for mask in (graph.train_mask, graph.val_mask, graph.test_mask)]
    if min(sizes := [len(part) for part in parts]) < 2:
        raise ValueError(f"{graph.name}: {sizes} train, val and test nodes; 2 of each are needed")
    return Task(graph, x, adjacency, graph.y.to(run.device), *parts, digest)


def build_expert(method: str, config: Config, task: Task, dropout: float) -> nn.Module:
    sizes = (task.x.shape[1], config.hidden, task.graph.num_classes, config.layers, dropout)
    if method == "mlp":
        return MLP(*sizes)
    backbone = config.backbone.removesuffix("-skip")
    norm = not (config.dataset == "ogbn-products" and backbone in ("gcn", "sage"))  # as in the official code
    gnn = GNN(backbone, *sizes, heads=config.heads, norm=norm)
    return Skip(gnn, MLP(*sizes)) if config.backbone.endswith("-skip") else gnn


def build_mixture(method: str, config: Config, task: Task, dropout: float) -> Mowst:
    weak, strong = (build_expert(name, config, task, dropout) for name in ("mlp", "gnn"))
    gate, wide = ("features", True) if method == "moe" else (config.gate, config.gate_input == "dx")
    hidden = 16 if gate == "monotone" else config.hidden
    confidence = Confidence(gate, task.x.shape[1] if wide else 0, hidden, config.layers, dropout)
    return Mowst(weak, strong, confidence, config.detach_confidence)


class Keeper:
    """Where an arm stands, in one file: finished stages, the epoch of the current one, its metrics, random numbers."""

    def __init__(self, path: Path | None = None, label: str = "", device: str = "cpu"):
        self.path, self.label, self.saved = path, label, time.monotonic()
        self.state = {"done": {}, "epoch": None, "log": []}
        if path is not None and path.exists():
            found = common.load(path, device)
            if not isinstance(found, dict) or set(found) != set(self.state):
                raise common.UsageError(f"{path} is a checkpoint of something else; delete it and go on with --resume")
            self.state = found

    def once(self, stage: str, work: Callable[[], dict]) -> dict:
        """work() the first time, afterwards its stored result. Only a stage cut short restores random numbers."""
        done = self.state["done"]
        if stage not in done:
            done[stage] = work()
        return done[stage]

    def keep(self, epoch: dict) -> None:
        """Save, in the middle of a stage, what `fit` needs to go on."""
        self.saved = time.monotonic()
        random = [torch.get_rng_state(), *([torch.cuda.get_rng_state()] if torch.cuda.is_initialized() else [])]
        if self.path is not None:
            common.save(self.path, {**self.state, "epoch": {**epoch, "random": random}})

    def take(self) -> dict | None:
        """What `keep` saved, the first time it is asked for."""
        epoch, self.state["epoch"] = self.state["epoch"], None
        if epoch is not None:
            for state, put_back in zip(epoch["random"], (torch.set_rng_state, torch.cuda.set_rng_state)):
                put_back(state.cpu())
        return epoch


def copy_state(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def fit(
    module: nn.Module,
    loss_fn: Callable[[], Tensor],
    score_fn: Callable[[], Tensor],
    epochs: int,
    patience: int,
    keeper: Keeper,
    stage: str,
    **adamw: float,
) -> float:
    """Full-batch AdamW on `module` until `patience` epochs bring no lower score_fn(); leaves the best state in it.

    The state at the start is a candidate too. Returns the best score. Raises common.NonFiniteLoss, and
    KeyboardInterrupt after saving.
    """
    optimizer = torch.optim.AdamW(module.parameters(), **adamw)

    def score() -> float:
        module.eval()
        with torch.no_grad():
            return float(score_fn())

    if (at := keeper.take()) is not None:
        module.load_state_dict(at["module"])
        optimizer.load_state_dict(at["optimizer"])
        first, since, best, best_state = at["next"], at["since"], at["best"], at["best_state"]
    else:
        first, since, best, best_state = 0, 0, score(), copy_state(module)
    label = f"{keeper.label}, {stage}"
    bar = tqdm(total=epochs, initial=first, desc=label, unit="epoch", leave=False, disable=None, mininterval=0.5)
    with bar, common.deferred_signals() as received:
        for epoch in range(first, epochs):
            if since >= patience:
                break
            module.train()
            optimizer.zero_grad(set_to_none=True)
            loss = loss_fn()
            loss.backward()
            optimizer.step()
            loss, found = float(loss.detach()), score()
            if not math.isfinite(loss) or not math.isfinite(found):
                kept = keeper.path if keeper.path and keeper.path.exists() else "none yet"
                what = f"loss {loss}, validation {found} at epoch {epoch}; last good checkpoint: {kept}"
                raise common.NonFiniteLoss(f"{label}: {what}; lower --lr")
            since += 1
            if found < best:
                since, best, best_state = 0, found, copy_state(module)
            keeper.state["log"].append({"arm": keeper.label, "stage": stage, "step": epoch, "loss": loss, "val": found})
            bar.set_postfix(loss=f"{loss:.3f}", val=f"{best:.3f}", refresh=False)
            bar.update()
            if received or time.monotonic() - keeper.saved > 60:
                state = {"module": module.state_dict(), "optimizer": optimizer.state_dict(), "best_state": best_state}
                keeper.keep({**state, "next": epoch + 1, "since": since, "best": best})
            if received:
                raise common.Terminated if signal.SIGTERM in received else KeyboardInterrupt
    module.load_state_dict(best_state)
    module.eval()
    return best


def train_by_turns(model: Mowst, task: Task, config: Config, keeper: Keeper, stage: str, **adamw: float) -> None:
    """Mowst. Turn A: MLP and gate against the frozen GNN. Turn B: the GNN, where the frozen MLP is not sure.

    The expert that does not train is in evaluation mode, and asked once a turn. A turn without a better validation
    loss of the mixture is undone; round_patience such rounds end the training.
    """
    x, y = task.x, task.y

    @torch.no_grad()
    def frozen(expert: Callable, *inputs: object) -> Tensor | tuple[Tensor, Tensor]:
        model.eval()
        return expert(*inputs)

    def train(name: str, module: nn.Module, parts: Callable[[Tensor], tuple[Tensor, ...]]) -> dict:
        """parts(rows): confidence, weak and strong logits of those nodes."""
        of = lambda criterion, rows: criterion(*parts(rows), y[rows])
        loss, score = partial(of, mowst_loss, task.train), partial(of, mowst_star_loss, task.val)
        best = fit(module, loss, score, config.turn_epochs, config.turn_patience, keeper, name, **adamw)
        return {"score": best, "model": copy_state(model)}

    def turn_a(name: str) -> dict:
        strong = frozen(model.strong, x, task.adjacency)
        module = nn.ModuleList([model.weak, model.confidence])
        return train(name, module, lambda rows: (*model.look(x[rows]), strong[rows]))

    def turn_b(name: str) -> dict:
        confidence, weak = frozen(model.look, x)
        strong = lambda rows: model.strong(x, task.adjacency)[rows]
        return train(name, model.strong, lambda rows: (confidence[rows], weak[rows], strong(rows)))

    best, waited = math.inf, 0
    for number in range(config.rounds):
        for turn, part in ((turn_a, "weak"), (turn_b, "strong")):
            name = f"{stage}, round {number} {part}"
            found = keeper.once(name, partial(turn, name))
            model.load_state_dict(found["model"])
        waited = 0 if found["score"] < best else waited + 1
        best = found["score"]
        if waited >= config.round_patience:
            break


def train_jointly(model: Mowst, task: Task, config: Config, keeper: Keeper, stage: str, **adamw: float) -> None:
    """Mowst*, and the learned-gate mixture: both experts and the gate at once, on the mixed prediction."""

    def loss(rows: Tensor) -> Tensor:
        strong = model.strong(task.x, task.adjacency)[rows]
        return mowst_star_loss(*model.look(task.x[rows]), strong, task.y[rows])

    epochs = 2 * config.rounds * config.turn_epochs
    fit(model, partial(loss, task.train), partial(loss, task.val), epochs, config.patience, keeper, stage, **adamw)


def epochs_alone(arm: Arm) -> int:
    """At most. The skip control stands against mixtures of trained experts, so it gets the mixtures' epochs, too."""
    config, is_skip = arm.config, arm.method == "gnn" and arm.config.backbone.endswith("-skip")
    return config.epochs + is_skip * 2 * config.rounds * config.turn_epochs


def train_alone(arm: Arm, task: Task, keeper: Keeper, lr: float, dropout: float, stage: str) -> dict:
    """One cell of the grid for one expert: cross-entropy on training nodes, kept by that on validation nodes."""
    config, start = arm.config, time.perf_counter()
    module = build_expert(arm.method, config, task, dropout).to(task.x.device)

    def answers(rows: Tensor | slice) -> Tensor:  # an MLP needs to see no other nodes
        return module(task.x[rows]) if arm.method == "mlp" else module(task.x, task.adjacency)[rows]

    loss = lambda rows: F.cross_entropy(answers(rows), task.y[rows])
    adamw, epochs = {"lr": lr, "weight_decay": config.weight_decay}, epochs_alone(arm)
    fit(module, partial(loss, task.train), partial(loss, task.val), epochs, config.patience, keeper, stage, **adamw)
    seconds = time.perf_counter() - start
    with torch.no_grad():
        logits = answers(slice(None))
    val = float((logits.argmax(dim=-1) == task.y)[task.val].double().mean())
    return {"val": val, "seconds": seconds, "state": module.state_dict(), "parts": [logits]}


def train_mixed(
    arm: Arm, task: Task, keeper: Keeper, experts: tuple[dict, dict], lr: float, dropout: float, stage: str
) -> dict:
    """One cell of the grid for a trained mixture. experts: what train_alone returned, weak and strong."""
    config, start = arm.config, time.perf_counter()
    model = build_mixture(arm.method, config, task, dropout).to(task.x.device)
    for part, name, expert in zip((model.weak, model.strong), ("mlp", "gnn"), experts):
        if config.pretrain in (name, "both"):
            part.load_state_dict(expert["state"])
    train = train_by_turns if arm.method == "mowst" else train_jointly
    train(model, task, config, keeper, stage, lr=lr, weight_decay=config.weight_decay)
    seconds = time.perf_counter() - start
    with torch.no_grad():
        parts = model.eval()(task.x, task.adjacency)
    val = float(right_of(config.infer, *parts, task.y)[task.val].mean())
    return {"val": val, "seconds": seconds, "state": model.state_dict(), "parts": list(parts)}


def put_together(arm: Arm, task: Task, experts: tuple[dict, dict]) -> dict:
    """A mixture of the experts as they are: equal shares, C = D_var, or the known kind of each node."""
    weak, strong = (expert["parts"][0].to(task.x.device) for expert in experts)
    shares = {"ensemble": lambda: torch.full_like(weak[:, 0], 0.5), "posthoc": lambda: dispersion(weak)}
    confidence = shares.get(arm.method, lambda: task.graph.kind.to(weak))()
    return {"seconds": 0.0, "grid": [], "parts": [confidence, weak, strong]}


def best_of_grid(lrs: tuple, dropouts: tuple, keeper: Keeper, stage: str, seed: int, work: Callable) -> dict:
    """Every cell from the same random numbers; the best validation accuracy wins, of equals the first."""
    found = {}
    for lr, dropout in itertools.product(lrs, dropouts):
        torch.manual_seed(seed)
        cell = f"{stage}, lr {lr:g}, dropout {dropout:g}"
        found[lr, dropout] = keeper.once(cell, partial(work, lr, dropout, cell))
    grid = [[*cell, result["val"]] for cell, result in found.items()]
    return max(found.values(), key=lambda result: result["val"]) | {"grid": grid}


def fall_back(confidence: Tensor, weak: Tensor, strong: Tensor, alone: Tensor, task: Task, config: Config) -> tuple:
    """The parts of a mixture, or, where the GNN alone has the better validation accuracy, that GNN with C = 0."""
    val = float(right_of(config.infer, confidence, weak, strong, task.y)[task.val].mean())
    val_gnn = float((alone.argmax(dim=-1) == task.y)[task.val].double().mean())
    if val < val_gnn:
        confidence, strong = torch.zeros_like(confidence), alone
    return (confidence, weak, strong), {"val": max(val, val_gnn), "val_gnn": val_gnn, "fell_back": val < val_gnn}


def trained_experts(path: Path, device: str) -> list[dict]:
    """What an expert's arm left behind: the result of train_alone for every graph."""
    try:
        return common.load(path, device)
    except FileNotFoundError:
        finished = path.with_suffix(".json")
        raise common.UsageError(f"{path} is missing; delete {finished} and go on with --resume") from None


def train_arm(config: Config, name: str, seed: int, run: Run) -> dict:
    """One arm on every graph of the seed. Experts leave weights and logits behind, from which mixtures start."""
    arm = make_arms(config, ablate=True)[name]
    config, keeper = arm.config, Keeper(run.path(name, seed, ".ckpt"), f"{name}-seed{seed}", run.device)
    starts = [trained_experts(run.path(expert, seed, ".pt"), run.device) for expert in (arm.weak, arm.strong) if expert]
    results, kept, nodes = [], [], []
    for index in range(config.graphs):
        task, stage = make_task(config, seed, index, run), f"graph {index}"
        experts, stream = tuple(start[index] for start in starts), 10_000 * seed + 10 * index + arm.stream
        if not experts:
            work = partial(train_alone, arm, task, keeper)
            best = best_of_grid(config.lr, config.dropout, keeper, stage, stream, work)
            right, more = (best["parts"][0].argmax(dim=-1) == task.y).double(), {"val": best["val"]}
        else:
            if arm.method in ("ensemble", "posthoc", "oracle"):
                best = put_together(arm, task, experts)
            else:
                work = partial(train_mixed, arm, task, keeper, experts)
                best = best_of_grid(config.lr_gate, config.dropout_gate, keeper, stage, stream, work)
            parts, more = fall_back(*best["parts"], experts[1]["parts"][0], task, config)
            right = right_of(config.infer, *parts, task.y)
            more |= {infer: summary(right_of(infer, *parts, task.y), task)["accuracy"] for infer in INFER}
            if arm.method.startswith("mowst"):
                more |= describe(*parts, task)
            if name in ("mowst", "mowst_star"):
                model = build_mixture(arm.method, config, task, 0.0).to(run.device)
                model.load_state_dict(best["state"])
                more |= cost(model.eval(), parts[0], task, config.layers)
                nodes.append((index, task, parts))
        kept += [best | {"num_features": task.x.shape[1]}] if "state" in best else []
        results.append(summary(right, task) | more | {"seconds": best["seconds"], "grid": best["grid"]})
    if kept:
        common.save(run.path(name, seed, ".pt"), kept)
    if nodes:
        write_nodes(run.out / f"nodes-{name}-seed{seed}.csv", nodes)
    with common.atomic_file(run.path(name, seed, ".jsonl"), "w") as file:
        file.writelines(json.dumps(line) + "\n" for line in keeper.state["log"])
    return {"graphs": results}


def load_trained(path: str | Path, index: int = 0) -> nn.Module:
    """The model of a trained arm, in eval mode, from what a run left: runs/mowst-small/arms/mowst-seed0.pt.

    index  which of the run's graphs, or splits, it was trained on
    An expert alone, or a Mowst as it was trained: where the run says that a mixture fell back, its numbers are those of
    the GNN alone. The answers of the run stand in the file, too: common.load(path)[index]["parts"]. "ensemble",
    "posthoc" and "oracle" train nothing and leave none. Raises UsageError: see common.load_trained.
    """

    def make(trained: common.Trained) -> nn.Module:
        arm, found = make_arms(trained.config, ablate=True)[trained.arm], common.load(path)[index]
        rows, logits = torch.empty(0, found["num_features"]), found["parts"][-1]
        nothing = torch.empty(0, dtype=torch.int64)
        graph = Graph("", rows, nothing, nothing, nothing, nothing, nothing, num_classes=logits.shape[1])
        task = Task(graph, rows, *[nothing] * 5, "")
        make_model = build_mixture if arm.weak else build_expert
        model = make_model(arm.method, arm.config, task, 0.0)
        model.load_state_dict(found["state"])
        return model

    return common.load_trained(path, Config, make)


# ---------------------------------------------------------------------------------------------------------------
# What is measured
# ---------------------------------------------------------------------------------------------------------------


def right_of(infer: str, confidence: Tensor, weak: Tensor, strong: Tensor, labels: Tensor) -> Tensor:
    """[nodes] float64: 1 for a right answer; "expected" and "sample": its probability, exact or over 50 draws."""
    if infer == "expected":
        return expected_accuracy(confidence.double(), weak, strong, labels)
    generator = torch.Generator().manual_seed(0)
    draws = [answer(confidence, weak, strong, infer, generator) for _ in range(50 if infer == "sample" else 1)]
    return torch.stack([drawn == labels for drawn in draws]).double().mean(dim=0)


def summary(right: Tensor, task: Task) -> dict:
    """Accuracy in percent on the test nodes: all, by kind where it is known, in blocks."""
    on_test, kind = 100 * right[task.test].cpu(), task.graph.kind
    blocks = on_test.tensor_split(min(NUM_BLOCKS, len(on_test)))
    found = {"accuracy": float(on_test.mean()), "blocks": [float(block.mean()) for block in blocks]}
    if kind is not None:
        rich = kind[task.test.cpu()]
        found |= {"rich": float(on_test[rich].mean()), "poor": float(on_test[~rich].mean())}
    return found


def describe(confidence: Tensor, weak: Tensor, strong: Tensor, task: Task) -> dict:
    """Who is sure of what, on the test nodes."""
    test, kind = task.test.cpu(), task.graph.kind
    y, c = task.y.cpu()[test], confidence.cpu()[test].double()
    log_probs = {"weak": weak.log_softmax(dim=-1), "strong": strong.log_softmax(dim=-1)}
    log_probs["mixture"] = mixture_log_probs(confidence, weak, strong)
    log_probs = {name: z.cpu()[test] for name, z in log_probs.items()}
    right = {name: (z.argmax(dim=-1) == y).double() for name, z in log_probs.items()}
    loss = {name: F.nll_loss(z, y, reduction="none") for name, z in log_probs.items()}
    sides = {"all": torch.ones_like(y, dtype=torch.bool)}
    if kind is not None:
        sides = {"feature-rich": kind[test], "structure-rich": ~kind[test]}
    deciles, bins = c.argsort(stable=True).tensor_split(10), (c * 10).long().clamp(max=9)
    filled = bins.unique().tolist()
    return {
        "auc": area_under_curve(c, kind[test]) if kind is not None else None,
        "confidence": {name: float(c[nodes].mean()) for name, nodes in sides.items()},
        "histogram": {name: torch.bincount(bins[nodes], minlength=10).tolist() for name, nodes in sides.items()},
        "deciles": {name: [float(found[part].mean()) for part in deciles] for name, found in right.items()},
        "bins": {name: {b: float(found[bins == b].mean()) for b in filled} for name, found in right.items()},
        "ece": {name: calibration_error(z, y) for name, z in log_probs.items()},
        "mean_confidence": float(c.mean()),
        "weak_better": float((loss["weak"] < loss["strong"]).double().mean()),
    }


def area_under_curve(score: Tensor, positive: Tensor) -> float:
    """Probability that a positive scores above a negative, ties half. score [n], positive [n] bool."""
    _, index, counts = score.unique(return_inverse=True, return_counts=True)
    rank = (counts.cumsum(0) - (counts - 1) / 2)[index].double()  # 1-based, ties averaged
    num = int(positive.sum())
    return float((rank[positive].sum() - num * (num + 1) / 2) / max(1, num * (len(score) - num)))


def calibration_error(log_probs: Tensor, labels: Tensor, bins: int = 15) -> float:
    """Expected calibration error: mean gap between the largest probability and accuracy, over equal-width bins."""
    top, predicted = log_probs.exp().max(dim=-1)
    gap = (top - (predicted == labels).to(top)).double()
    gaps = torch.zeros(bins, dtype=torch.float64).index_add(0, (top * bins).long().clamp(max=bins - 1), gap)
    return float(gaps.abs().sum() / len(labels))


@torch.no_grad()
def cost(model: Mowst, confidence: Tensor, task: Task, layers: int, num_queries: int = 32) -> dict:
    """What sampled routing takes: for all nodes at once, and for test nodes asked one at a time.

    Edges are counted in the subgraphs that the GNN runs on; seconds are medians of nine. Asked for all nodes, Mowst
    runs the GNN on the whole graph, since its active nodes see (nearly) all of it through `layers` layers.
    """
    draw = torch.rand(len(confidence), generator=torch.Generator().manual_seed(0)).to(confidence)
    active, queries = draw >= confidence, task.test[:num_queries].tolist()
    nodes, whole = torch.arange(len(confidence), device=confidence.device), task.adjacency.edge_index.shape[1]

    def ask_gnn(node: int) -> int:
        """Its answer for one node, from the subgraph it sees; the number of edges in that."""
        keep = task.adjacency.reach(nodes == node, layers)
        part = task.adjacency.restrict(keep)
        model.strong(task.x[keep], part)
        return part.edge_index.shape[1]

    def seconds(expert: nn.Module) -> float:
        return common.median_seconds(lambda: expert(task.x, task.adjacency), task.x.device.type, repeats=9)

    edges = np.array([ask_gnn(node) for node in queries])
    return {
        "active": float(active.double().mean()),
        "edges_seen": task.adjacency.restrict(task.adjacency.reach(active, layers)).edge_index.shape[1] / max(1, whole),
        "query_edges_gnn": float(edges.mean()),
        "query_edges_mowst": float((edges * active.cpu().numpy()[queries]).mean()),
        "seconds_gnn": seconds(model.strong),
        "seconds_mowst": seconds(model),
    }


def write_nodes(path: Path, nodes: list[tuple[int, Task, tuple[Tensor, Tensor, Tensor]]]) -> None:
    """Every node with what each expert says, for your own plots."""
    with common.atomic_file(path, "w") as file:
        table = csv.writer(file)
        table.writerow(["graph", "node", "part", "kind", "label", "confidence", "weak", "strong", "mixture"])
        for index, task, (confidence, weak, strong) in nodes:
            num, kind = len(task.x), task.graph.kind
            part = np.full(num, "", dtype=object)
            for name in ("train", "val", "test"):
                part[getattr(task, name).cpu().numpy()] = name
            kinds = [""] * num if kind is None else np.where(kind.numpy(), "feature-rich", "structure-rich")
            answers = (weak.argmax(dim=-1), strong.argmax(dim=-1), answer(confidence, weak, strong))
            shown = [f"{value:.6f}" for value in confidence.tolist()]
            label, *answers = (column.tolist() for column in (task.y, *answers))
            table.writerows(zip([index] * num, range(num), part, kinds, label, shown, *answers))


# ---------------------------------------------------------------------------------------------------------------
# Claims
# ---------------------------------------------------------------------------------------------------------------

ABSTRACT = "not verified (the abstract claims it for 4 GNNs on 6 graphs)"
CLAIMS = [
    Claim("mowst.beats_weak", "more accurate than the MLP alone", ABSTRACT, required=True),
    Claim("mowst.beats_strong", "more accurate than the GNN alone", ABSTRACT, required=True),
    Claim("mowst.beats_ensemble", "more accurate than the mean of MLP and GNN", "not verified (ours)", required=True),
    Claim("mowst.beats_learned_gate", "more accurate than a gate learned on the features", "not verified"),
    Claim("mowst.beats_skip", "more accurate than GNN + MLP trained as one model", "not verified"),
    Claim("mowst.beats_posthoc", "more accurate than C = D on the same experts, untrained", "not verified (ours)"),
    Claim(
        "mowst.split", "C tells the kinds of nodes apart: AUC above 0.9", "not verified (kinds unknown)", required=True
    ),
    Claim("mowst.strong_bias", "the MLP answers for fewer nodes than it has the lower loss on", "not verified"),
    Claim("mowst.cost", "inference costs about one GNN: at most 1.25 times its time", "comparable (abstract)"),
    Claim("mowst.homophily_and_heterophily", "beats both experts on either", "3 and 3 graphs (abstract)"),
]

WORK = {  # what cost() measures: text, unit, format
    "active": ("nodes the GNN answers for", 100, "{:.0f} %"),
    "edges_seen": ("edges it must see for that, all nodes at once", 100, "{:.0f} %"),
    "query_edges_gnn": ("edges seen for one node, GNN alone", 1, "{:,.0f}"),
    "query_edges_mowst": ("edges seen for one node, Mowst", 1, "{:,.0f}"),
    "seconds_gnn": ("time for all nodes, GNN alone", 1e3, "{:.2f} ms"),
    "seconds_mowst": ("time for all nodes, Mowst", 1e3, "{:.2f} ms"),
}
Results = dict[str, list[dict]]  # {arm: [one result a graph]}


def values(results: Results, arm: str, key: str = "accuracy") -> np.ndarray:
    return np.array([result[key] for result in results[arm]])  # [graphs]


def ahead(results: Results, arm: str, other: str, key: str = "accuracy") -> np.ndarray:
    """Paired margins in points, one a graph; with a single graph, one a block of its test nodes."""
    if len(results[arm]) == 1 and key == "accuracy":
        return np.subtract(results[arm][0]["blocks"], results[other][0]["blocks"])
    return values(results, arm, key) - values(results, other)


def shown(margin: np.ndarray) -> str:
    """Mean and standard error."""
    error = f" ± {margin.std(ddof=1) / math.sqrt(len(margin)):.1f}" if len(margin) > 1 else ""
    return f"{margin.mean():+.1f}{error}"


def judge(config: Config, run: Run, results: Results) -> None:
    """From measurements to claim rows: Mowst, answering as config.infer says; margins in points of test accuracy."""
    of = lambda key: values(results, "mowst", key)

    def report(id: str, margin: np.ndarray, text: str, **numbers: np.ndarray) -> None:
        listed = {name: np.asarray(found).tolist() for name, found in numbers.items()}
        run.claim(f"mowst.{id}", text, {"margin": margin.tolist(), **listed}, margin)

    def beats(id: str, other: str, **by_backbone: np.ndarray) -> None:
        margin, star = (ahead(results, arm, other) for arm in ("mowst", "mowst_star"))
        sampled = ahead(results, "mowst", other, "expected")
        unit = "graphs" if len(results["mowst"]) > 1 else "blocks of nodes"
        text = f"{shown(margin)} points, better on {(margin > 0).sum()} of {len(margin)} {unit}"
        text += f"; sampled {shown(sampled)}; Mowst* {shown(star)}"
        text += "".join(f"; {name} {shown(found)}" for name, found in by_backbone.items())
        report(id, margin, text, sampled=sampled, star=star, **by_backbone)

    others = [name for name in BACKBONES if f"mowst@{name}" in results]
    beats("beats_weak", "mlp")
    beats("beats_strong", config.backbone, **{name: ahead(results, f"mowst@{name}", name) for name in others})
    beats("beats_ensemble", "ensemble")
    beats("beats_learned_gate", "moe")
    beats("beats_skip", config.backbone.removesuffix("-skip") + "-skip")
    beats("beats_posthoc", "posthoc")
    better, given = 100 * of("weak_better"), 100 * of("mean_confidence")
    text = f"lower loss on {better.mean():.1f} % of nodes, answers for {given.mean():.1f} %"
    report("strong_bias", better - given, text, better=better, given=given)
    work, ratio = {key: of(key) for key in WORK}, of("seconds_mowst") / of("seconds_gnn")
    share = of("query_edges_mowst").sum() / max(1, of("query_edges_gnn").sum())
    saved = "nothing is saved" if of("edges_seen").mean() > 0.9 else "run on the whole graph"
    text = f"all nodes at once: {ratio.mean():.2f} times one GNN's seconds, {saved} (the GNN answers for "
    text += f"{100 * of('active').mean():.0f} % of nodes and must see {100 * of('edges_seen').mean():.0f} % of edges)"
    report("cost", 1.25 - ratio, f"{text}; node by node: {100 * share:.0f} % of one GNN's edges", **work)
    if config.dataset:
        for id in ("split", "homophily_and_heterophily"):
            run.claim(f"mowst.{id}", "not measured: kinds of nodes are known on generated graphs only", {})
        for claim in run.claims:  # what this graph cannot show is not required of it by --strict
            claim.required = claim.required and claim.id != "mowst.split"
        return
    sides = {kind: np.array([c[kind] for c in of("confidence")]) for kind in ("feature-rich", "structure-rich")}
    text = "; ".join(f"mean C {c.mean():.2f} on {kind} nodes" for kind, c in sides.items())
    report("split", of("auc") - 0.9, f"AUC {common.show(of('auc'), 3)}; {text}", auc=of("auc"), **sides)
    if run.ablate:
        trios = (("mowst", "mlp", config.backbone), ("mowst@other", "mlp@other", "gnn@other"))
        margins = [np.minimum(ahead(results, arm, weak), ahead(results, arm, strong)) for arm, weak, strong in trios]
        names = ("homophilous", "heterophilous")[:: -1 if config.shift else 1]
        text = ", ".join(f"{name} {shown(margin)}" for name, margin in zip(names, margins))
        report("homophily_and_heterophily", np.minimum(*margins), f"{text} points over the better expert of each graph")


def print_tables(config: Config, run: Run, results: Results) -> None:
    keys = {"accuracy": "all"} | ({} if config.dataset else {"rich": "feature-rich", "poor": "structure-rich"})
    rows, mowst, num_graphs = [], results["mowst"], len(results["mowst"])
    for arm, found in results.items():
        cells = [common.show(values(results, arm, key), 1) for key in keys]
        fell = f"{sum(result['fell_back'] for result in found)} of {num_graphs}" if "fell_back" in found[0] else ""
        rows.append([arm, *cells, f"{values(results, arm, 'seconds').mean():.1f}", fell])
    title = f"test accuracy in %, {num_graphs} graphs or splits, inference: {config.infer}"
    run.table(f"{title}; fell back: on the GNN alone", ["arm", *keys.values(), "own train s", "fell back"], rows)
    rows = [[arm, *(common.show(values(results, arm, key), 1) for key in INFER)] for arm in ("mowst", "mowst_star")]
    run.table("ways to answer", ["arm", *INFER], rows)
    counts = {side: np.sum([result["histogram"][side] for result in mowst], axis=0) for side in mowst[0]["histogram"]}
    bar = lambda share: f"{'#' * round(40 * share):<40s} {100 * share:4.1f} %"
    bars = [[bar(share) for share in count / max(1, count.sum())] for count in counts.values()]
    rows = [[f"{b / 10:.1f}-{(b + 1) / 10:.1f}", *row] for b, row in enumerate(zip(*bars))]
    run.table("Mowst: test nodes by C", ["C", *counts], rows)
    rows = [[text, shape.format(unit * values(results, "mowst", k).mean())] for k, (text, unit, shape) in WORK.items()]
    errors = {name: [result["ece"][name] for result in mowst] for name in mowst[0]["ece"]}
    rows += [[f"calibration error (ECE), {name}", common.show(error, 3)] for name, error in errors.items()]
    run.table("Mowst: work of sampled routing, and calibration", ["", ""], rows)
    grids = {arm: np.mean([result["grid"] for result in found], axis=0) for arm, found in results.items()}
    if any(len(grid) > 1 for grid in grids.values()):  # [cells, (lr, dropout, accuracy)]
        cell = lambda lr, dropout, accuracy: f"{lr:g}/{dropout:g} {100 * accuracy:.1f}"
        rows = [[arm, "   ".join(cell(*row) for row in grid)] for arm, grid in grids.items() if len(grid)]
        run.table("the grid: lr/dropout, mean validation accuracy in %", ["arm", "lr/dropout accuracy"], rows)


def draw(config: Config, run: Run, results: Results) -> None:
    mowst = results["mowst"]
    mean = lambda key, name: np.mean([result[key][name] for result in mowst], axis=0)

    def methods(ax) -> None:
        heights = {arm: values(results, arm).mean() for arm in make_arms(config, ablate=False)}
        common.bars(ax, heights, ylabel="test accuracy, %", title="methods")
        ax.tick_params(axis="x", rotation=60)
        ax.set_ylim(bottom=max(0.0, min(heights.values()) - 10))

    def histogram(ax) -> None:
        series = {name: (np.arange(10) / 10 + 0.05, mean("histogram", name)) for name in mowst[0]["histogram"]}
        common.lines(ax, series, xlabel="confidence C", ylabel="test nodes a graph", title="who is sent where")

    def by_confidence(ax) -> None:
        series = {}
        for name in ("weak", "strong", "mixture"):
            found = {b: [r["bins"][name][str(b)] for r in mowst if str(b) in r["bins"][name]] for b in range(10)}
            series[name] = zip(*((b / 10 + 0.05, np.mean(right)) for b, right in found.items() if right))
        common.lines(ax, series, xlabel="confidence C", ylabel="accuracy", title="each expert by C")

    def by_decile(ax) -> None:
        series = {name: (range(1, 11), mean("deciles", name)) for name in ("weak", "strong", "mixture")}
        common.lines(ax, series, xlabel="decile of C", ylabel="accuracy", title="accuracy by C decile")

    run.plot("mowst", [methods, histogram, by_confidence, by_decile])


# ---------------------------------------------------------------------------------------------------------------
# main
# ---------------------------------------------------------------------------------------------------------------


def settle(config: Config) -> Config:
    """Fill the fields that are none from the official row for this GNN and graph. Raises ValueError."""
    choices = {"backbone": BACKBONES, "gate": ("monotone", "free", "var", "ent"), "gate_input": ("d", "dx")}
    choices |= {"pretrain": ("neither", "mlp", "gnn", "both"), "infer": INFER}
    for name, allowed in choices.items():
        if (given := getattr(config, name)) not in (*allowed, None):
            raise ValueError(f"{name} is {given!r}; allowed: {', '.join(allowed)}")
    for name in ("lr", "dropout"):  # once experts are mixed, a value given for experts alone goes on to hold
        if getattr(config, f"{name}_gate") is None:
            config = replace(config, **{f"{name}_gate": getattr(config, name)})
    for name, value in zip(PRESET_FIELDS, PRESETS.get((config.backbone, config.dataset), OTHERWISE)):
        if getattr(config, name) is None:
            config = replace(config, **{name: (value,) if name.startswith(("lr", "dropout")) else value})
    for name, value in vars(config).items():
        if type(value) is int and name not in ("shift", "round_patience") and value < 1:
            raise ValueError(f"{name} is {value}; at least 1 is needed")
    rates, dropouts = config.lr + config.lr_gate, config.dropout + config.dropout_gate
    if min(rates) <= 0 or config.weight_decay < 0:
        raise ValueError(f"lr {rates}, weight_decay {config.weight_decay}; above 0, and at least 0")
    if not all(0 <= dropout < 1 for dropout in dropouts):
        raise ValueError(f"dropout {dropouts}; 0 <= dropout < 1 is needed")
    return config


def count_epochs(config: Config, arms: dict[str, Arm]) -> int:
    """Epochs that run a GNN, at most, of one seed: early stopping usually ends at half of them or earlier."""
    mixing = len(config.lr_gate) * len(config.dropout_gate) * config.rounds * config.turn_epochs
    mixed = sum({"mowst": 1, "mowst_star": 2, "moe": 2}.get(arm.method, 0) for arm in arms.values()) * mixing
    alone = sum(epochs_alone(arm) for arm in arms.values() if arm.method == "gnn")
    return config.graphs * (len(config.lr) * len(config.dropout) * alone + mixed)


def theory() -> None:
    """What the MLP does best with nodes it cannot tell apart, by direct minimisation over its answer p."""
    rows = []
    for alpha, mu in ((0.8, 0.3), (0.8, 0.8), (0.8, 1.2), (0.9, 0.5), (0.6, 0.8), (0.5, 1.2)):
        found, entropy = best_response(alpha, mu), -alpha * math.log(alpha) - (1 - alpha) * math.log(1 - alpha)
        cells = [alpha, entropy, mu, found["p"], found["confidence"], (2 * alpha - 1) ** 2, found["cross_entropy"]]
        rows.append([f"{cell:.4f}" for cell in cells])
    header = ["alpha", "H(alpha)", "GNN loss mu", "best p", "C(p)", "C(alpha)", "CE(p)"]
    text = "the MLP's best answer p to nodes it cannot tell apart, a share alpha of them of class 1; C = (2p - 1)^2"
    common.say(f"{text}\n\n{common.format_table(header, rows)}")


def main(config: Config, run: Run) -> dict:
    if run.actions.get("theory"):
        theory()
        return {}
    if run.compile:
        raise common.UsageError("--compile: products with CSR matrices are not traced; run without it")
    if run.dtype != torch.float32:
        common.say("note: this script computes in fp32")
        run.dtype = torch.float32
    run.config = config = settle(config)
    arms, task = make_arms(config, run.ablate), make_task(config, run.seed, 0, run)
    run.data = {config.dataset: task.digest} if config.dataset else {}
    expert = build_expert("gnn", config, task, config.dropout[0]).to(run.device)
    step = lambda: F.cross_entropy(expert(task.x, task.adjacency)[task.train], task.y[task.train]).backward()
    epochs = count_epochs(config, arms) * len(run.seeds)
    if run.dry_run:
        here = not config.dataset or graphs.is_here(config.dataset, run.data_dir)
        size = 0 if here else graphs.download_size(config.dataset)
        common.say(task.graph.name)
        run.estimate(build_mixture("mowst", config, task, 0.0), step, epochs, size)
        return {}
    seconds = common.median_seconds(step, run.device) * epochs / run.workers
    num_edges = task.adjacency.edge_index.shape[1]
    title = f"{config.dataset or f'{config.graphs} generated graphs'} {task.digest or task.graph.digest}"
    run.header(f"{title}: {len(task.x):,} nodes, {num_edges:,} edges, {task.graph.num_classes} classes", seconds)
    if task.graph.note:
        common.say(f"{task.graph.name}: {task.graph.note}")

    experts = [name for name, arm in arms.items() if not arm.weak]
    found = run.measure(train_arm, config, experts)
    found |= run.measure(train_arm, config, [name for name in arms if name not in experts])
    results = {name: [graph for by_seed in found[name] for graph in by_seed["graphs"]] for name in arms}
    print_tables(config, run, results)
    judge(config, run, results)
    draw(config, run, results)
    return {"arms": results}


if __name__ == "__main__":
    theory_flag = (False, None, "print the closed-form table of the theory by direct minimisation, and stop")
    common.run(main, SMALL, FULL, CLAIMS, actions={"theory": theory_flag})
