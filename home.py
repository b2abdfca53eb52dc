"""HoME: a hierarchy of multi-gate experts, for ranking by many behaviours at once.

Wang, Cao, Fu, Gai, Zhou, "HoME: Hierarchy of Multi-Gate Experts for Multi-Task Learning at
Kuaishou" (KDD 2025, arXiv 2408.05430).

A feed predicts many *tasks* for a user and a video: watched to the end? liked? followed? MMoE, CGC
and PLE share small networks, the experts, among tasks; gates mix them. Three things go wrong in
production: experts **collapse** (ReLU leaves mostly zeros), they **degrade** (one task takes over a
shared expert), they **underfit** (rare tasks ignore their own experts). HoME answers with

    expert        E_e(x) = Swish(BatchNorm(MLP_e(x)))                 no dead units, one scale
    gate          g_r = softmax(x W_r), over the experts that row r may use    for every r its own
    self gate     s_r = sigmoid(x W'_r) of row r's own expert, of several own ones a softmax
    feature gate  x * sum_l a_l(x) 2 sigmoid(x A_l B_l), a = softmax  a family's own view of x
    output        z_r = sum_e (g_re + s_re) E_e(x)                    r mixes, e is mixed

The self gate gives own experts a gradient whatever g_r says. Experts read what the feature gate
lets through, gates the plain x; a small MLP, the tower, makes a task's logit of its last z. A layer
is a table, the *mask*: a row r is an answer to mix, a column e an expert, experts of one name are a
*family*. The first level reads v, the embeddings of user and video; the rows z_r of a level are the
inputs of the next. With groups watch = view, finish and inter = like, comment, follow:

    level 1   watch  inter  shared           "own": by gate and self gate; ".": not at all
    watch       own      .    gate           all experts and gates read v;
    inter         .    own    gate           two experts a family here, not written twice
    shared     gate   gate     own

    level 2   shared  watch  inter  view  finish  like  comment  follow
    view        gate   gate      .   own       .     .        .       .
    finish      gate   gate      .     .     own     .        .       .
    like        gate      .   gate     .       .   own        .       .
    comment     gate      .   gate     .       .     .      own       .
    follow      gate      .   gate     .       .     .        .     own

On level 2 shared experts read z_shared, all others the z of their group; a task's gate reads z of
its group and z_shared, concatenated, its self gate z of the group. MMoE, CGC, PLE and AdaTT are
other tables in the same code (`masks`), with ReLU, without feature gates; AdaTT adds a task's own
experts with a constant weight. In numbers: a row mixes shared [1, 2] and own [3, -1]; gate logits
0.1, 0.5 give g = 0.401, 0.599, the self logit 0.3 gives s = 0.574, the output is
0.401 [1, 2] + (0.599 + 0.574) [3, -1] = [3.92, -0.37].

Run      python home.py             a minute on two cores, no download
         python home.py --ablate    HoME without its parts, too; --seeds 8 for verdicts
         python home.py --full      KuaiRand-1K; --data kuairand-pure or census for the others
You see  AUC, and GAUC (AUC within each user, averaged), of each model on a log whose true
         probabilities are known, who listens to whom in CGC and HoME, and what became of the
         claims. A star: a baseline with HoME's experts.
Found    (seeds 0-7, every arm at its own best rate) HoME beats the best plain model, CGC, by 0.0054
         ± 0.0032 AUC, and PLE by 0.0095 ± 0.0024: BatchNorm and Swish in PLE already give 85 % of
         that, feature gates 45 %, the hierarchy -21 % and self gates -9 %, both undecided. It is
         level with the best star: -0.0003 ± 0.0043. The worst ReLU experts are 85 to 93 % zeros;
         to cure that helps MMoE, PLE and AdaTT, CGC perhaps. Frequent tasks lean more on their own
         experts than rare ones do: that is 0.56 of the weight in CGC, 0.12 in HoME, 0.23 by its
         gates alone.
Differences from the paper, whose data and code are not public and whose body was not at hand
1. Not checked: rank, number and mixture of the low-rank gates; what gates and level-2 self gates
   read; sizes; whether the stars are the paper's; all of its tables; the weights of GAUC.
2. The log is generated, and AUC is the expected one under its true probabilities.
3. Feature gates start at 1 (B = 0).
4. AdaTT: with several own experts of a task their added weights are learnt, a lone one's is 1.
5. KuaiRand has no "collect", and its is_click mostly means "watched for seconds": a watch task.

Break it yourself (seeds 100-102): --arms ple,home --lr 0.005 (too low for ReLU: HoME leads PLE by
0.041 AUC, at their own rates by 0.016); norm=False in ARMS["home"] (zeros are back, 83 % of the
worst expert, and AUC falls by 0.009); in `hierarchy`, may_use[task] = ["shared", *groups, task]
(every task hears every group: AUC 0.8456 instead of 0.8447, no harm).
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import common
from common import Check, Count, Job, Margin, Positive, Results, Run, Whole, check, claim, show
from data import behavior

# --------------------------------------------------------------------------------------------------
# The method
# --------------------------------------------------------------------------------------------------


class Level(NamedTuple):
    """One layer's wiring. A row is an answer to mix, a column is an expert."""

    rows: list[str]
    experts: list[str]  # the family of each expert
    mask: Tensor  # [rows, experts] bool: the row may use the expert
    own: Tensor  # [rows, experts] bool: the expert is the row's own; a self gate adds it once more
    expert_input: Tensor  # [experts] int64: number of the input that the expert reads
    gate_input: Tensor  # [rows, k] int64: inputs whose concatenation the gate reads
    family: Tensor  # [experts] int64: experts of a family share a feature gate


def wire(
    rows: Sequence[str],
    experts: Sequence[str],
    may_use: dict[str, Sequence[str]] | None = None,
    before: Level | None = None,
    reads: dict[str, str] | None = None,
    gate_reads: dict[str, Sequence[str]] | None = None,
) -> Level:
    """A Level from names. A row's own experts are those of its name.

    experts  the family of each expert
    may_use  {row: families that its gate mixes}; None: every row mixes all
    before   the level whose rows are the inputs of this one; None: all read the only input, v
    reads    {name: the row before that it reads}, for families and rows; default: that of its name
    gate_reads  {row: the rows before that its gate reads}; default: the one it reads itself
    """
    reads, gate_reads = reads or {}, gate_reads or {}
    families = list(dict.fromkeys(experts))

    def number_of(name: str) -> int:
        return before.rows.index(reads.get(name, name)) if before else 0

    allowed = may_use or {row: families for row in rows}
    gate_input = [[number_of(name) for name in gate_reads.get(row, [row])] for row in rows]
    return Level(
        rows=list(rows),
        experts=list(experts),
        mask=torch.tensor([[family in allowed[row] for family in experts] for row in rows]),
        own=torch.tensor([[family == row for family in experts] for row in rows]),
        expert_input=torch.tensor([number_of(family) for family in experts]),
        gate_input=torch.tensor(gate_input),
        family=torch.tensor([families.index(family) for family in experts]),
    )


def repeat(families: Sequence[str], count: int) -> list[str]:
    """Every family `count` times."""
    return [family for family in families for _ in range(count)]


def masks(
    name: str,
    groups: dict[str, Sequence[str]],
    num_experts: int = 8,
    num_shared: int = 2,
    num_own: int = 1,
    num_meta: int = 2,
) -> list[Level]:
    """The tables that make five models of one layer: the levels of a model, input first.

    name    mmoe | cgc | ple | adatt | home
    groups  {group: its tasks}; tasks keep this order
    Raises ValueError for an unknown name, an empty group, a task in two groups.
    """
    tasks = check_groups(groups)
    if name == "mmoe":  # every task mixes every expert
        return [wire(tasks, ["shared"] * num_experts)]
    if name == "adatt":  # the same with experts of the tasks, twice
        first = wire(tasks, repeat(tasks, num_own))
        return [first, wire(tasks, repeat(tasks, num_own), before=first)]
    if name == "home":
        return hierarchy(groups, num_meta, num_own)

    experts = ["shared"] * num_shared + repeat(tasks, num_own)
    may_use = {task: ["shared", task] for task in tasks}
    if name == "cgc":  # a task mixes the shared experts and its own
        return [wire(tasks, experts, may_use)]
    if name == "ple":  # twice; a row more mixes all, the next level's shared experts read it
        first = wire([*tasks, "shared"], experts, may_use | {"shared": experts})
        return [first, wire(tasks, experts, may_use, before=first)]
    raise ValueError(f"no model {name!r}; there are mmoe, cgc, ple, adatt, home")


def hierarchy(groups: dict[str, Sequence[str]], num_meta: int, num_own: int) -> list[Level]:
    """HoME: first a row for each group and one for all of them, then a row for each task."""
    rows = [*groups, "shared"]
    may_use = {group: [group, "shared"] for group in groups}
    first = wire(rows, repeat(rows, num_meta), may_use | {"shared": rows})

    group_of = {task: group for group in groups for task in groups[group]}
    may_use, gate_reads = {}, {}
    for task, group in group_of.items():
        may_use[task] = ["shared", group, task]
        gate_reads[task] = [group, "shared"]
    experts = repeat(["shared", *groups, *group_of], num_own)
    return [first, wire(list(group_of), experts, may_use, first, group_of, gate_reads)]


def check_groups(groups: dict[str, Sequence[str]]) -> list[str]:
    """All tasks, in order. Raises ValueError."""
    tasks = [task for members in groups.values() for task in members]
    for group, members in groups.items():
        if not members:
            raise ValueError(f"group {group!r} has no task")
        if group == "shared":
            raise ValueError("group 'shared' has the name of the experts of all groups; rename it")
    for task in tasks:
        if tasks.count(task) > 1:
            raise ValueError(f"task {task!r} is in {tasks.count(task)} groups; one is needed")
        if task in ("shared", *groups):
            raise ValueError(f"task {task!r} has the name of a group of experts; rename it")
    return tasks


def mix_seed(seed: int, *parts: int) -> int:
    """Another seed for each part of a model: leaving one part out does not change the others."""
    for part in parts:
        seed = (1_000_003 * seed + part + 1) % 2**62
    return seed


def stream(seed: int, *parts: int) -> torch.Generator:
    return torch.Generator().manual_seed(mix_seed(seed, *parts))


def next_seed() -> int:
    """From torch's own stream, which torch.manual_seed sets."""
    return int(torch.randint(2**31, (), device="cpu"))


def uniform(generator: torch.Generator, *shape: int, fan_in: int) -> nn.Parameter:
    return nn.Parameter((2 * torch.rand(shape, generator=generator) - 1) * fan_in**-0.5)


def expert_norm_swish(z: Tensor, norm: nn.BatchNorm1d) -> Tensor:
    """Swish(BatchNorm(z)), each channel of each expert by itself. z [batch, ...] -> same shape.

    After the norm a unit is about N(0, 1): ReLU would zero half of it, Swish passes a little, and a
    gradient. In training the statistics are the batch's, in evaluation running ones: rows do not
    see each other then. Raises ValueError for a training batch of one row.
    """
    if norm.training and len(z) < 2:
        raise ValueError("batch normalisation cannot train on a batch of 1 row; call eval()")
    normal = norm(z.flatten(1).to(norm.weight.dtype))  # in its own precision, also under autocast
    return F.silu(normal.view_as(z))


def masked_softmax(logits: Tensor, mask: Tensor) -> Tensor:
    """Softmax over the last dimension where mask is True; elsewhere exactly 0, with no gradient."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    lowest = torch.finfo(logits.dtype).min
    return logits.masked_fill(~mask, lowest).softmax(dim=-1).masked_fill(~mask, 0.0)


def pick(x: Tensor, index: Tensor) -> Tensor:
    """x [inputs, batch, d] -> [len(index), batch, d]; a single input is expanded, not copied."""
    return x[index] if len(x) > 1 else x.expand(len(index), -1, -1)


class FeatureGate(nn.Module):
    """x * sum_l a_l(x) 2 sigmoid(x A_l B_l): for each family of experts its own view of the input.

    x [..., d] -> the same shape; with num_families > 1: x [num_families, batch, d]. Every factor
    lies in (0, 2), and is 1 at the start (B = 0). A full d x d gate would be too large, so several
    of low rank are mixed by a = softmax(x W_a). Raises ValueError for rank or num_gates below 1.
    """

    def __init__(
        self,
        d: int,
        rank: int,
        num_gates: int,
        num_families: int = 1,
        generator: torch.Generator | None = None,
    ):
        if rank < 1 or num_gates < 1:
            raise ValueError(f"rank is {rank}, num_gates {num_gates}; both must be at least 1")
        super().__init__()
        a = torch.randn(num_families, num_gates, d, rank, generator=generator)
        mix = torch.randn(num_families, d, num_gates, generator=generator)
        self.a = nn.Parameter(a * d**-0.5)
        self.b = nn.Parameter(torch.zeros(num_families, num_gates, rank, d))
        self.mix = nn.Parameter(mix * d**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(len(self.mix), -1, x.shape[-1])  # [families, batch, d]
        gates = 2 * torch.sigmoid(rows[:, None] @ self.a @ self.b)  # [families, gates, batch, d]
        share = (rows @ self.mix).softmax(dim=-1)  # [families, batch, gates]
        share = share.transpose(1, 2)[..., None]  # [families, gates, batch, 1]
        return (rows * (share * gates).sum(dim=1)).view_as(x)


class MaskedExpertLayer(nn.Module):
    """Many mixtures of many experts; who may use whom is a table.

    x [inputs, batch, d_in] -> [rows, batch, d_out]. A row's output is sum_e (g_e + s_e) Expert_e.

    mask           [rows, experts] bool: where the gate g, a softmax, may be above 0
    self_mask      [rows, experts] bool: where the self gate s may be: a sigmoid for a row with one
                   own expert, else a softmax over them. None: no self gates
    d_in, widths   an expert is linear layers of these widths; d_out = widths[-1]
    expert_input   [experts]: the input each reads. None: input 0
    gate_input     [rows, k]: inputs whose concatenation a gate reads; a self gate reads the first
    family, rank   [experts], number: a family shares a feature gate of that rank; 0: no such gates
    norm           BatchNorm and Swish at the end of an expert (HoME); else ReLU
    constant_self  s is not computed: 1 for one own expert, else learnt from 1/count on (AdaTT)
    seed           of the initial weights. None: torch.manual_seed decides
    Gates are stored for all experts and masked in use: a mask changes neither sizes nor weights.
    Raises ValueError for a row without experts, or masks of different shapes.
    """

    def __init__(
        self,
        mask: Tensor,
        self_mask: Tensor | None = None,
        *,
        d_in: int,
        widths: Sequence[int],
        expert_input: Tensor | None = None,
        gate_input: Tensor | None = None,
        family: Tensor | None = None,
        rank: int = 0,
        num_gates: int = 2,
        norm: bool = True,
        constant_self: bool = False,
        seed: int | None = None,
    ):
        super().__init__()
        num_rows, self.num_experts = mask.shape
        if not mask.any(dim=1).all():
            row = int(mask.any(dim=1).long().argmin())
            raise ValueError(f"row {row} of the mask allows no expert; each needs one")
        if self_mask is not None and self_mask.shape != mask.shape:
            shapes = f"mask is {list(mask.shape)}, self_mask {list(self_mask.shape)}"
            raise ValueError(f"{shapes}; they must agree")
        if expert_input is None:
            expert_input = torch.zeros(self.num_experts, dtype=torch.int64)
        if gate_input is None:
            gate_input = torch.zeros(num_rows, 1, dtype=torch.int64)
        if family is None:
            family = torch.zeros(self.num_experts, dtype=torch.int64)
        buffers = {"mask": mask, "self_mask": self_mask, "expert_input": expert_input}
        buffers |= {"gate_input": gate_input, "family": family}
        for name, given in buffers.items():
            self.register_buffer(name, given, persistent=False)

        seed = next_seed() if seed is None else seed
        generator = stream(seed, 0)
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for fan_in, fan_out in zip([d_in, *widths], widths):
            weight = uniform(generator, self.num_experts, fan_in, fan_out, fan_in=fan_in)
            self.weights.append(weight)
            self.biases.append(uniform(generator, self.num_experts, 1, fan_out, fan_in=fan_in))
        self.norm = nn.BatchNorm1d(self.num_experts * widths[-1]) if norm else None

        shape = (num_rows, gate_input.shape[1] * d_in, self.num_experts)
        self.gate_weight = uniform(stream(seed, 1), *shape, fan_in=shape[1])
        self.gate_bias = nn.Parameter(torch.zeros(num_rows, 1, self.num_experts))

        self.constant_self = None
        if self_mask is not None:
            count = self_mask.sum(dim=1, keepdim=True)
            self.register_buffer("alone", (count == 1)[..., None], persistent=False)
            if constant_self:
                self.constant_self = nn.Parameter(self_mask / count.clamp(min=1))
                self.constant_self.requires_grad_(bool((count > 1).any()))
            else:
                shape = (num_rows, d_in, self.num_experts)
                self.self_weight = uniform(stream(seed, 2), *shape, fan_in=d_in)
                self.self_bias = nn.Parameter(torch.zeros(num_rows, 1, self.num_experts))

        self.feature_gate = None
        if rank:
            first = [int((family == number).nonzero()[0]) for number in family.unique()]
            self.register_buffer("family_input", expert_input[first], persistent=False)
            self.feature_gate = FeatureGate(d_in, rank, num_gates, len(first), stream(seed, 3))

    def forward(self, x: Tensor, trace: list | None = None) -> Tensor:
        """trace, a list, gets (what the experts say, g, s)."""
        h = self.experts(x)  # [batch, experts, d_out]
        g, s = self.gates(x)  # [rows, batch, experts]
        if trace is not None:
            trace.append((h, g, s))
        weight = g if s is None else g + s  # not normalised again: own experts count on top
        return torch.einsum("rbe,bed->rbd", weight.to(h.dtype), h)

    def experts(self, x: Tensor) -> Tensor:
        """What every expert says. x [inputs, batch, d_in] -> [batch, experts, d_out]."""
        if self.feature_gate is None:
            h = pick(x, self.expert_input)  # [experts, batch, d_in]
        else:
            h = self.feature_gate(pick(x, self.family_input))[self.family]
        for layer, (weight, bias) in enumerate(zip(self.weights, self.biases)):
            if layer > 0:
                h = F.relu(h) if self.norm is None else F.silu(h)
            h = torch.baddbmm(bias, h, weight)
        h = h.transpose(0, 1)  # [batch, experts, d_out]
        return F.relu(h) if self.norm is None else expert_norm_swish(h, self.norm)

    def gates(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """(g, s), each [rows, batch, experts]; rows of g sum to 1. s None: no self gates."""
        joined = torch.cat([pick(x, column) for column in self.gate_input.T], dim=-1)
        logits = torch.baddbmm(self.gate_bias, joined, self.gate_weight)
        g = masked_softmax(logits, self.mask[:, None])
        if self.self_mask is None:
            return g, None
        own = self.self_mask[:, None]  # [rows, 1, experts]
        if self.constant_self is not None:
            return g, (self.constant_self[:, None] * own).expand_as(g)
        read = pick(x, self.gate_input[:, 0])
        logits = torch.baddbmm(self.self_bias, read, self.self_weight).to(g.dtype)
        one = logits.sigmoid() * own  # for a row with one own expert: its softmax would always be 1
        return g, torch.where(self.alone, one, masked_softmax(logits, own))


class MaskedExperts(nn.Module):
    """Levels of masked experts, a tower for each task. v [batch, d_in] -> logits [batch, tasks].

    widths         of the experts of each level; entries beyond the last level are not used
    norm           BatchNorm and Swish (HoME), else ReLU
    self_gates     "none" | "gate" (HoME) | "constant" (AdaTT)
    feature_gates  of the first so many levels; rank 0: an eighth of a level's input, at least 2
    seed           of the initial weights; None: torch.manual_seed decides
    Raises ValueError for fewer widths than levels.
    """

    def __init__(
        self,
        levels: Sequence[Level],
        d_in: int,
        widths: Sequence[Sequence[int]] = ((64, 32), (32,)),
        tower: int = 16,
        norm: bool = True,
        self_gates: str = "none",
        feature_gates: int = 0,
        rank: int = 0,
        num_gates: int = 2,
        seed: int | None = None,
    ):
        if len(widths) < len(levels):
            raise ValueError(f"widths has {len(widths)} entries for {len(levels)} levels")
        super().__init__()
        seed = next_seed() if seed is None else seed
        self.wiring, self.layers = list(levels), nn.ModuleList()
        for number, (level, width) in enumerate(zip(levels, widths)):
            gate_rank = rank or max(2, d_in // 8)
            layer = MaskedExpertLayer(
                level.mask,
                None if self_gates == "none" else level.own,
                d_in=d_in,
                widths=width,
                expert_input=level.expert_input,
                gate_input=level.gate_input,
                family=level.family,
                rank=gate_rank if number < feature_gates else 0,
                num_gates=num_gates,
                norm=norm,
                constant_self=self_gates == "constant",
                seed=mix_seed(seed, number),
            )
            self.layers.append(layer)
            d_in = width[-1]
        generator, num_tasks = stream(seed, 100), len(levels[-1].rows)
        self.w1 = uniform(generator, num_tasks, d_in, tower, fan_in=d_in)
        self.b1 = uniform(generator, num_tasks, 1, tower, fan_in=d_in)
        self.w2 = uniform(generator, num_tasks, tower, 1, fan_in=tower)
        self.b2 = uniform(generator, num_tasks, 1, 1, fan_in=tower)

    def forward(self, v: Tensor, trace: list | None = None) -> Tensor:
        x = v[None]  # [inputs, batch, d]: the rows of a level are the inputs of the next
        for layer in self.layers:
            x = layer(x, trace)
        hidden = F.relu(torch.baddbmm(self.b1, x, self.w1))  # [tasks, batch, tower]
        return torch.baddbmm(self.b2, hidden, self.w2)[..., 0].T


class HoME(MaskedExperts):
    """The paper's model: v [batch, d_in] -> logits [batch, tasks], tasks in the order of groups.

    groups   {"watch": ["finish", ...], "inter": ["like", ...]}: which tasks belong together
    options  of MaskedExperts
    """

    def __init__(
        self,
        d_in: int,
        groups: dict[str, Sequence[str]],
        num_meta: int = 2,
        num_own: int = 1,
        **options: Any,
    ):
        levels = masks("home", groups, num_meta=num_meta, num_own=num_own)
        options = {"self_gates": "gate", "feature_gates": 2, **options}
        super().__init__(levels, d_in, **options)


def multitask_loss(
    logits: Tensor, labels: Tensor, weights: Tensor | None = None, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(sum over tasks, per task [tasks]) of the mean cross-entropy over rows whose label is known.

    logits, labels [batch, tasks]: labels 0 to 1. weights [tasks]. mask [batch, tasks] bool: the
    label is known; what stands elsewhere (-1, NaN) is not looked at. None: all are known. A task of
    which the batch knows nothing adds 0. Computed in fp32 or better.
    Raises ValueError for a label outside 0 to 1 or NaN; on a GPU the loss is NaN: no waiting.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    known = torch.ones_like(labels, dtype=torch.bool) if mask is None else mask
    if not logits.shape == labels.shape == known.shape:
        raise ValueError("logits, labels and mask must be [batch, tasks], all alike")
    labels = labels.to(logits.dtype).masked_fill(~known, 0)
    allowed = (labels >= 0) & (labels <= 1)  # not NaN
    if labels.device.type == "cpu" and not allowed.all():
        row, task = (~allowed).nonzero()[0].tolist()
        wrong = f"the label of task {task} in row {row} is {labels[row, task]:g}"
        raise ValueError(f"{wrong}; 0 to 1 is needed, or a mask that leaves it out")
    losses = F.binary_cross_entropy_with_logits(logits, labels, reduction="none")
    losses = losses.masked_fill(~known, 0).masked_fill(~allowed, float("nan"))
    each = losses.sum(dim=0) / known.sum(dim=0).clamp(min=1)
    return (each if weights is None else weights * each).sum(), each


# --------------------------------------------------------------------------------------------------
# Config
# --------------------------------------------------------------------------------------------------

Generated = Annotated[Count, common.Only(data="synthetic")]


@dataclass(frozen=True)
class Config(common.Settings):
    data: Literal["synthetic", "kuairand-1k", "kuairand-pure", "census"] = "synthetic"  # the log
    rows: Generated = 200_000  # exposures to generate; the last fifth is the test
    users: Generated = 300  # to generate
    items: Generated = 500  # to generate
    hash_bits: Count = 20  # KuaiRand's video table has 2^hash_bits rows, author and music a quarter
    embedding: Count = 8  # width of a field's embedding; full: ours, the paper's is not public
    hidden: Count = 32  # hidden width of a level-1 expert; full: ours
    width: Count = 16  # output width of every expert; full: ours
    tower: Count = 16  # hidden width of a task's tower; full: ours
    experts: Count = 8  # of MMoE
    shared: Count = 2  # shared experts of CGC and PLE
    own: Count = 1  # experts of a task (CGC, PLE, AdaTT), of a level-2 family (HoME)
    meta: Count = 2  # experts of a level-1 family (HoME)
    num_gates: Count = 2  # low-rank feature gates that are mixed
    rank: Whole = 0  # of a feature gate; 0: an eighth of its input
    batch_size: Annotated[int, common.Range(2)] = 512  # exposures a step
    epochs: Count = 1  # id embeddings over-fit from the second on
    steps: Count | None = None  # stop earlier: steps of every arm, schedule included
    lr: Positive | None = None  # of every arm; none: each arm's own best


SMALL = Config()
FULL = replace(
    SMALL,
    data="kuairand-1k",
    embedding=16,
    hidden=256,
    width=128,
    tower=64,
    batch_size=4096,
    lr=1e-3,
)

# --------------------------------------------------------------------------------------------------
# The experiment: one pass over the log, the same batches for every arm
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Arm:
    model: str  # of `masks`
    lr: float  # the best of one grid on seeds 100-103
    norm: bool = True  # HoME's experts: a star
    self_gates: str = "none"
    feature_gates: int = 0


ARMS = {
    "mmoe": Arm("mmoe", 0.04, norm=False),
    "cgc": Arm("cgc", 0.04, norm=False),
    "ple": Arm("ple", 0.04, norm=False),
    "adatt": Arm("adatt", 0.02, norm=False, self_gates="constant"),
    "mmoe-star": Arm("mmoe", 0.04),
    "cgc-star": Arm("cgc", 0.04),
    "ple-star": Arm("ple", 0.02),
    "adatt-star": Arm("adatt", 0.04, self_gates="constant"),
    "home": Arm("home", 0.02, self_gates="gate", feature_gates=2),
    "home-no-fg": Arm("home", 0.02, self_gates="gate"),
    "home-no-fg-sg": Arm("home", 0.02),
}
PLAIN = ["mmoe", "cgc", "ple", "adatt"]
STARRED = [f"{arm}-star" for arm in PLAIN]
DEFAULT = [*PLAIN, *STARRED, "home"]
PARTS = {  # from PLE to HoME, one part at a time
    "ple": "PLE",
    "ple-star": "+ BatchNorm and Swish",
    "home-no-fg-sg": "+ hierarchy of groups",
    "home-no-fg": "+ self gates",
    "home": "+ feature gates = HoME",
}


def masks_of(arm: str, groups: dict[str, Sequence[str]], config: Config) -> list[Level]:
    counts = (config.experts, config.shared, config.own, config.meta)
    return masks(ARMS[arm].model, groups, *counts)


class Ranker(nn.Module):
    """One embedding table for all fields, then experts: ids [batch, fields] -> [batch, tasks].

    sizes, groups  how many ids each field has; {group: tasks}
    Raises ValueError for an id outside its field: it would read another field's row.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        groups: dict[str, Sequence[str]],
        arm: str = "home",
        config: Config = SMALL,
        seed: int | None = None,
    ):
        super().__init__()
        seed = next_seed() if seed is None else seed
        self.register_buffer("sizes", torch.tensor(list(sizes)))
        self.embedding = nn.Embedding(sum(sizes), config.embedding)
        nn.init.normal_(self.embedding.weight, std=0.05, generator=stream(seed, 200))
        self.core = MaskedExperts(
            masks_of(arm, groups, config),
            d_in=len(sizes) * config.embedding,
            widths=((config.hidden, config.width), (config.width,)),
            tower=config.tower,
            norm=ARMS[arm].norm,
            self_gates=ARMS[arm].self_gates,
            feature_gates=ARMS[arm].feature_gates,
            rank=config.rank,
            num_gates=config.num_gates,
            seed=seed,
        )

    def forward(self, ids: Tensor, trace: list | None = None) -> Tensor:
        if not self.training or ids.device.type == "cpu":  # a GPU would wait at every step
            wrong = (ids < 0) | (ids >= self.sizes)
            if wrong.any():
                row, field = wrong.nonzero()[0].tolist()
                found = f"field {field} has id {ids[row, field]} in row {row}"
                raise ValueError(f"{found}; its table has {self.sizes[field]} rows")
        offsets = self.sizes.cumsum(0) - self.sizes
        v = self.embedding(ids + offsets).flatten(1)  # [batch, fields * embedding]
        return self.core(v, trace)


read_once = functools.lru_cache(maxsize=8)(behavior.load)


def load_data(config: Config, seed: int, run: Run) -> behavior.Behavior:
    seed = seed if config.data == "synthetic" else 0  # the others are the same for all seeds
    return read_once(
        config.data,
        run.data_dir,
        seed,
        config.hash_bits,
        rows=config.rows,
        users=config.users,
        items=config.items,
    )


def make_ranker(arm: str, data: behavior.Behavior, config: Config, seed: int) -> Ranker:
    return Ranker(list(data.fields.values()), data.groups, arm, config, seed)


def num_steps(config: Config, data: behavior.Behavior) -> int:
    """What fills no batch at the end of an epoch is left out. Raises ValueError: not one batch."""
    rows = len(data.train.labels)
    if rows < config.batch_size:
        raise ValueError(f"batch_size is {config.batch_size}; there are {rows} rows to train on")
    return config.steps or config.epochs * (rows // config.batch_size)


def fit(
    model: Ranker,
    data: behavior.Behavior,
    config: Config = SMALL,
    lr: float = 0.02,
    seed: int = 0,
    train: Callable = common.train,
) -> None:
    """Train a ranker in place on data.train; seed: of the order of its rows."""
    steps = num_steps(config, data)

    def loss_fn(batch: behavior.Part, step: int) -> tuple[Tensor, dict]:
        loss, each = multitask_loss(model(batch.ids), batch.labels)
        return loss, dict(zip(data.tasks, each.detach()))

    rows = data.train.each(lambda tensor: tensor.to(model.sizes.device))
    train(
        model,
        loss_fn,
        steps,
        batches=behavior.batch_maker(rows, config.batch_size, seed),
        optimizer=torch.optim.Adam(model.parameters(), lr=lr, fused=True),
        schedule=common.cosine(steps, final=0.0),
        clip=None,
    )


def train_arm(job: Job) -> dict:
    config, data = job.config, load_data(job.config, job.seed, job.run)
    lr = config.lr or ARMS[job.method].lr
    model = job.prepare(make_ranker(job.method, data, config, job.seed))
    fit(model, data, config, lr, job.seed, job.train)
    common.save(job.path(".pt"), model.state_dict())
    result = {"lr": lr, **evaluate(model, data, data.test)}
    if data.val is not None:
        result["val_auc"] = evaluate(model, data, data.val)["mean_auc"]
    some = data.test.ids[:64].to(job.run.device)
    flops = common.count_flops(lambda: model(some))["Global"]
    result["parameters"] = common.count_parameters(model.core)  # without embeddings
    result["FLOPs a row"] = flops // len(some)
    return result


def train_oracle(job: Job) -> dict:
    """The true probabilities as scores: what no model can beat."""
    data = load_data(job.config, job.seed, job.run)
    return ranking(data.test.truth, data.test, data)


def ranking(scores: Tensor, part: behavior.Part, data: behavior.Behavior) -> dict:
    """AUC and GAUC, means over the tasks, and the AUC of each task. scores [rows, tasks]."""
    rare, _ = behavior.rare_and_frequent(data)
    found = behavior.ranking(scores.numpy(), part, rare)
    for task, auc in zip(data.tasks, found["auc"]):
        found[f"auc of {task}"] = auc
    return found


def rebuild(job: Job, state: dict) -> Ranker:
    """The ranker of a job from its weights; no data is read."""
    groups = behavior.CENSUS_GROUPS if job.config.data == "census" else behavior.GROUPS
    model = Ranker(state["sizes"].tolist(), groups, job.method, job.config, job.seed)
    common.load_state(model, state, f"{job.label}.pt")
    return model


def load_trained(path: str | Path) -> Ranker:
    """The ranker of an arm, in eval mode, on the CPU: runs/home-small/arms/home-seed0.pt.

    ids [batch, fields] -> logits [batch, tasks], in the order of its data (data/behavior.py).
    Raises UsageError, see common.load_trained.
    """
    return common.load_trained(path, Config, rebuild)


@torch.no_grad()
def evaluate(model: Ranker, data: behavior.Behavior, part: behavior.Part) -> dict:
    """`ranking`, and how the experts are used, as means over the rows of the part."""
    model.eval()
    scores, count = [], len(part.labels)
    zero = [0.0 for _ in model.core.layers]  # of each level; [experts]
    gate = self_gate = 0.0  # of the last level: g and s; [tasks, experts]
    for first in range(0, count, 8192):
        ids, trace = part.ids[first : first + 8192], []
        scores.append(model(ids.to(model.sizes.device), trace).float().cpu())
        for number, (h, _, _) in enumerate(trace):
            zero[number] += (h == 0).double().mean(dim=2).sum(dim=0).cpu() / count
        _, g, s = trace[-1]
        gate += g.double().sum(dim=1).cpu() / count
        self_gate += 0.0 if s is None else s.double().sum(dim=1).cpu() / count
    found = ranking(torch.cat(scores), part, data)
    found["zero"] = max(float(level.max()) for level in zero)
    level = model.core.wiring[-1]
    found["users"] = fewest_users(gate, level.mask)
    rare, frequent = behavior.rare_and_frequent(data)
    for name, weight in (("gate", gate), ("weight", gate + self_gate)):
        share = (weight * level.own).sum(dim=1) / weight.sum(dim=1)  # [tasks]: of own experts
        found[f"own {name}, rare"] = float(share[rare].mean())
        found[f"own {name}, frequent"] = float(share[frequent].mean())
        found[name] = weight.round(decimals=4).tolist()
    return found


def fewest_users(gate: Tensor, mask: Tensor) -> float:
    """Of the expert that is shared worst: exp(entropy of its users' weights) / number of users.

    gate, mask [rows, experts]. 1: all rows that may use it do so alike; 1 / number: one row alone.
    """
    fewest = 1.0
    for weights, allowed in zip(gate.T, mask.T):
        if allowed.sum() > 1:
            share = weights[allowed] / weights[allowed].sum()
            entropy = -torch.xlogy(share, share).sum()
            fewest = min(fewest, float(entropy.exp() / len(share)))
    return fewest


# --------------------------------------------------------------------------------------------------
# Claims. The paper's tables could not be read, so there is no number of it but the abstract's.
# --------------------------------------------------------------------------------------------------

METRICS = {"AUC": "mean_auc", "GAUC": "mean_gauc"}


def lead(results: Results, arms: Sequence[str]) -> Margin:
    """HoME against the best of the arms, in AUC and in GAUC; the smaller lead counts."""
    leads, parts = [], []
    for name, key in METRICS.items():
        best = max(arms, key=lambda arm: results.of(arm, key).mean())
        leads.append(results.ahead("home", best, key))
        parts.append(f"{name} {show(leads[-1])} above {best}")
    return Margin(min(leads, key=np.mean), "; ".join(parts), dict(zip(METRICS, leads)))


def listed(values: dict[str, np.ndarray], digits: int = 4) -> str:
    return ", ".join(f"{name} {show(by_seed, digits)}" for name, by_seed in values.items())


def gains_by_part(results: Results) -> dict[str, np.ndarray]:
    """{part of HoME: AUC gained by it}, from PLE on."""
    gains = {}
    for before, after in itertools.pairwise(PARTS):
        gains[PARTS[after]] = results.ahead(after, before, "mean_auc")
    return gains


@claim("BatchNorm and Swish help MMoE, CGC, PLE and AdaTT, whose ReLU experts are full of zeros",
       paper="some experts over 90 % zeros (abstract)", required=True)  # fmt: skip
def collapse(results: Results, config: Config) -> Margin:
    """The baseline that gains least."""
    gains = {arm: results.ahead(f"{arm}-star", arm, "mean_auc") for arm in PLAIN}
    zeros = {arm: results.of(arm, "zero") for arm in PLAIN}
    text = f"AUC gained: {listed(gains)}; zeros of the worst expert before: {listed(zeros, 2)}"
    return Margin(min(gains.values(), key=np.mean), text, gains)


@claim("the worst-shared expert serves more of its tasks in HoME than in CGC and PLE",
       paper="some shared experts are occupied by one task (abstract)", required=True)  # fmt: skip
def degradation(results: Results, config: Config) -> Margin:
    users = {arm: results.of(arm, "users") for arm in ("home", "cgc", "ple")}
    other = max(users["cgc"], users["ple"], key=np.mean)
    return Margin(users["home"] - other, f"effective users / tasks: {listed(users, 2)}", users)


@claim("rare tasks weigh their own experts less than frequent ones do; in HoME the gap is smaller "
       "than in CGC and PLE", paper="rare tasks ignore their own experts (abstract)",
       required=True)  # fmt: skip
def underfitting(results: Results, config: Config) -> Margin:
    """A gap the other way round is a gap, too. The baseline with the smaller gap counts."""
    gaps = {}
    for arm in ("home", "cgc", "ple"):
        gaps[arm] = results.difference(arm, "own weight, frequent", "own weight, rare")
    alone = results.difference("home", "own gate, frequent", "own gate, rare")
    other = min(gaps["cgc"], gaps["ple"], key=np.mean)
    text = f"gap: {listed(gaps, 2)}; HoME's gates alone, without self gates, {show(alone, 2)}"
    return Margin(other - abs(gaps["home"]), text, {**gaps, "home, gates alone": alone})


@claim("HoME beats the best of MMoE, CGC, PLE and AdaTT in AUC and GAUC", required=True)
def beats_plain(results: Results, config: Config) -> Margin:
    return lead(results, PLAIN)


@claim("HoME beats the best of them also when all have its experts (BatchNorm, Swish)")
def beats_starred(results: Results, config: Config) -> Margin:
    return lead(results, STARRED)


@claim("from PLE to HoME every part raises AUC: experts, hierarchy, self gates, feature gates")
def parts(results: Results, config: Config) -> Margin:
    """The weakest part."""
    gains = gains_by_part(results)
    return Margin(min(gains.values(), key=np.mean), f"AUC gained: {listed(gains)}", gains)


@check("HoME's experts give no zeros: Swish is 0 at 0 alone")
def zeros(results: Results, config: Config) -> Check:
    zero = results.of("home", "zero").max()
    return Check(zero < 0.001, f"share of zeros of the worst expert: {zero:.4f}")


@check(
    "HoME costs about what PLE does: at most a fourth more parameters or FLOPs, embeddings aside"
)
def cost(results: Results, config: Config) -> Check:
    home, ple = results["home"][0], results["ple"][0]
    passed, parts = True, []
    for name in ("parameters", "FLOPs a row"):
        parts.append(f"{home[name]:,} {name}, PLE {ple[name]:,}")
        passed = passed and home[name] <= 1.25 * ple[name]
    return Check(passed, "; ".join(parts))


# --------------------------------------------------------------------------------------------------
# Tables, picture, main
# --------------------------------------------------------------------------------------------------


def print_tables(results: Results, data: behavior.Behavior, config: Config, run: Run) -> None:
    kind = "AUC" if data.test.truth is None else "expected AUC"
    columns = {kind: ("mean_auc", 4), "GAUC": ("mean_gauc", 4)}
    columns |= {"GAUC, rare": ("rare_gauc", 4), "zeros": ("zero", 2), "validation": ("val_auc", 4)}
    title = f"test, mean over {len(data.tasks)} tasks, {len(run.seeds)} seed(s)"
    run.table(f"{title}; zeros: of the worst expert", *results.table(results, columns))

    columns = {task: (f"auc of {task}", 3) for task in data.tasks}
    run.table(f"{kind} by task", *results.table(results, columns))
    for arm in ("cgc", "home"):
        if arm in results:
            level = masks_of(arm, data.groups, config)[-1]
            title = f"{arm}: mean weight (gate + self gate) of each expert of its last level"
            run.table(title, *mask_table(level, mean_weight(results, arm)))
    if results.keys() >= PARTS.keys():
        run.table("where HoME's lead over PLE comes from", *lead_table(results))


def mean_weight(results: Results, arm: str) -> np.ndarray:
    return np.mean([result["weight"] for result in results[arm]], axis=0)  # [tasks, experts]


def mask_table(level: Level, weight: np.ndarray | None = None) -> tuple[list, list]:
    """(header, rows): who may use whom, by gate or, as its own, by gate and self gate; weights."""
    rows = []
    for number, name in enumerate(level.rows):
        row = [name]
        for expert, allowed in enumerate(level.mask[number]):
            word = "own" if level.own[number, expert] else "gate"
            if weight is not None:
                word = f"{weight[number, expert]:.2f}"
            row.append(word if allowed else ".")
        rows.append(row)
    return ["", *level.experts], rows


def lead_table(results: Results) -> tuple[list, list]:
    """The sceptic's question, a part of HoME a row."""
    rows, gains = [], gains_by_part(results)
    lead = results.ahead("home", "ple", "mean_auc")
    for part, gain in [*gains.items(), ("HoME over PLE", lead)]:
        percent = f"{100 * gain.mean() / lead.mean():.0f} %"
        rows.append([part, show(gain), percent, common.verdict(gain)])
    return ["", "AUC gained", "of the lead", "it is above 0"], rows


def draw(results: Results, data: behavior.Behavior, config: Config, run: Run) -> None:
    def gates(arm: str, ax: Any) -> None:
        level, weight = masks_of(arm, data.groups, config)[-1], mean_weight(results, arm)
        blank = np.where(level.mask, weight, np.nan)  # who may not use an expert has no cell
        ax.imshow(blank, cmap="Blues", vmin=0, vmax=1.5, aspect="auto")
        ax.set_facecolor("0.9")
        for row, expert in level.mask.nonzero().tolist():
            value = weight[row, expert]
            color = "white" if value > 0.9 else "black"
            ax.text(expert, row, f"{value:.2f}", ha="center", va="center", color=color, fontsize=7)
        ax.set_xticks(range(len(level.experts)), level.experts, rotation=45, ha="right", fontsize=7)
        ax.set_yticks(range(len(level.rows)), level.rows, fontsize=7)
        ax.set(xlabel="experts", title=f"{arm}: weight of each expert, by task")

    def collapse(ax: Any) -> None:
        plain = [arm for arm in PLAIN if arm in results]
        common.dots(ax, {arm: results.of(arm, "zero") for arm in plain})
        ax.set(xlabel="share of zeros, worst expert", title="ReLU experts collapse", xlim=(0, 1))

    def accuracy(ax: Any) -> None:
        trained = [arm for arm in results if arm != "oracle"]
        common.dots(ax, {arm: results.of(arm, "mean_auc") for arm in trained})
        ax.set(xlabel="AUC, mean over tasks", title="each arm at its own best rate")

    panels = [partial(gates, arm) for arm in ("cgc", "home") if arm in results]
    run.plot([*panels, collapse, accuracy])


def main(config: Config, run: Run) -> Results:
    arms = run.choose(ARMS, default=DEFAULT, more=list(ARMS))
    if run.dry_run and not behavior.is_here(config.data, run.data_dir):
        data = behavior.nominal(config.data, config.hash_bits)
    else:
        data = load_data(config, run.seed, run)
    run.data = {data.name: data.digest}
    model = make_ranker("home", data, config, run.seed).to(run.device)
    some = data.train.each(lambda tensor: tensor[: config.batch_size].to(run.device))

    def step() -> None:
        multitask_loss(model(some.ids), some.labels)[0].backward()

    if data.note:
        common.say(data.note)
    steps = num_steps(config, data) * len(arms) * len(run.seeds)
    text = f"{data.name} {data.digest}, {len(data.train.labels):,} rows"
    run.plan(text, model, step, steps, behavior.download_size(config.data, run.data_dir))
    results = Results()
    if data.test.truth is not None:
        results |= run.train_arms(train_oracle, ["oracle"])
    results |= run.train_arms(train_arm, arms)
    print_tables(results, data, config, run)
    draw(results, data, config, run)
    return results


if __name__ == "__main__":
    common.run(main, SMALL, FULL)
