"""HoME: a hierarchy of multi-gate experts for multi-task ranking.

Wang, Cao, Fu, Gai, Zhou, "HoME: Hierarchy of Multi-Gate Experts for Multi-Task Learning at Kuaishou" (KDD 2025, arXiv
2408.05430).

A feed predicts many things about every (user, video): watched to the end? liked? followed? MMoE, CGC and PLE share
experts among these tasks through gates. The authors see three anomalies in production: **collapse** (ReLU experts give
mostly zeros, at very different scales, so that a gate cannot weigh them fairly), **degradation** (a shared expert is
taken over by a single task) and **underfitting** (rare tasks ignore their own experts, since the shared ones get all
the gradient). The remedies:

    expert    E(x) = Swish(BatchNorm(MLP(x)))                          one scale for all experts, no dead units
    gate      g_r  = softmax(W_r v) over the experts that row r may use   a mask, structural
    self gate s_r  = softmax or sigmoid(W'_r v) over row r's own experts  they get a gradient whatever g_r says
    features  x~   = x * sum_l a_l(x) 2 sigmoid(x A_l B_l)             each family of experts reads its own view of x
    output    z_r  = sum_e (g_re + s_re) E_e(x~)

    v --> meta experts: watch, inter, shared --> z_watch, z_inter, z_shared     (z_shared mixes all of them)
          z_shared --> experts of everybody           \\
          z_group  --> experts of the group, of the task --> o_task --> tower --> logit

One layer with a mask, `MaskedExpertLayer`, is all of it: MMoE, CGC, PLE, AdaTT and HoME differ in a table of who may
use whom (`masks`), in the norm, and in the two extra gates. That is what to read here.

Run      python home.py                   half a minute on two cores, no download
         python home.py --ablate          AdaTT, every starred model, the ladder of HoME without its parts
         python home.py --full            KuaiRand-1K; --data kuairand-pure or census for the others
         python home.py --models cgc,home --inspect     some models, every gate matrix
You see  AUC and GAUC of each model and of the true probabilities, the gate matrices of CGC beside HoME's, who uses its
         own experts, what the paper's claims became. A star is a baseline with HoME's experts (`mmoe-star`).
Found    (seeds 0-2) collapse and underfitting show clearly. HoME has no zeros by construction (Swish is 0 at 0 alone),
         and scales nearer each other; rare tasks use their own experts, but through the self gate: by the softmax gates
         alone the gap is smaller than CGC's on two seeds of three. With every arm at its own best rate HoME leads the
         plain models by 0.003 ± 0.005 AUC: +0.009, -0.001, +0.002. What it tolerates is a low rate: on seeds 100-101
         the lead is 0.024 at 5e-3 and 0.001 at 2e-2. The starred baselines come within 0.001: most of the gain is
         BatchNorm and Swish; cgc-star, the best of them, runs only with --ablate. The self gates' step fails.

Differences from the paper. Its data and code are not public, and its body was not at hand when this was written: the
method follows what is published about it. Not checked against the paper: (a) rank and number of the low-rank gates,
sigmoid inside or outside their mixture; (b) whether gates read gated inputs, and the concatenation at level 2; (c) the
input of the level-2 self gate; (d) depth, activation and number of experts; (e) whether the starred baselines are the
paper's; (f) all of its tables; (g) the weights of GAUC. Here:
1. The log is generated, so the true probability of each label is known: AUC is the expected one, free of label noise.
2. Feature gates start at 1 (B = 0); gates and self gates read the ungated input.
3. All arms of a seed share batches and the initial weights of their common parts: without this pairing the noise of
   the initial weights hides, even reverses, the steps of the ladder.
4. Every arm has the same learning-rate grid (LR_GRID) and its own best rate on seeds 100-101; --grid shows it.
5. --full: KuaiRand has no "collect"; is_click is mostly "watched for some seconds" there, so it is a watch task.

Break it yourself: --heavy-tail 6 (raw log-normal inputs: on seed 100 the scales of PLE's experts differ 70 times, and
HoME leads by 0.013 AUC at the default rates); norm=False in `HOME` (zeros are back: 96 % of its worst expert);
--lr 5e-3 (too low for the plain models: HoME leads by 0.024).
"""

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bridge as common
from bridge import Claim, Run
from data import behavior

# ---------------------------------------------------------------------------------------------------------------
# Config
# ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    data: str = "synthetic"  # synthetic, kuairand-1k, kuairand-pure or census
    rows: int = 240_000  # exposures to generate; the last fifth is the test
    users: int = 1000  # to generate
    items: int = 2000  # to generate
    heavy_tail: int = 0  # raw log-normal columns to generate
    hash_bits: int = 20  # KuaiRand's video table has 2^hash_bits rows, author and music a quarter
    embedding: int = 8  # width of a field's embedding
    hidden: int = 64  # hidden width of a level-1 expert
    width: int = 32  # output width of every expert
    tower: int = 16  # hidden width of a task's tower
    experts: int = 8  # of MMoE; the Shared-Bottom has one, that many times wider
    shared: int = 2  # shared experts of CGC and PLE
    own: int = 1  # experts of a task (CGC, PLE, AdaTT), of a level-2 family (HoME)
    meta: int = 2  # experts of a level-1 family (HoME)
    num_gates: int = 2  # low-rank feature gates that are mixed
    rank: int = 0  # of a feature gate; 0: an eighth of its input
    batch_size: int = 512  # exposures a step
    epochs: int = 1  # id embeddings over-fit from the second on
    steps: int | None = None  # stop earlier: steps of every arm, schedule included
    lr: float | None = None  # of every arm; none: each arm's best of LR_GRID on seeds 100-101
    loss_weights: tuple[float, ...] = ()  # one a task; empty: all 1, the paper's plain sum
    models: tuple[str, ...] = ()  # only these arms, comma-separated; mmoe* and mmoe-star are the same
    grid: bool = False  # train every arm at every rate of LR_GRID
    inspect: bool = False  # print the gate matrices of every arm and level


SMALL = Config()
FULL = replace(
    SMALL, data="kuairand-1k", embedding=16, hidden=256, width=128, tower=64, batch_size=4096, lr=1e-3
)  # the paper's sizes are not public; these are ours

# ---------------------------------------------------------------------------------------------------------------
# The method
# ---------------------------------------------------------------------------------------------------------------


class Level(NamedTuple):
    """The wiring of one layer. Rows are mixtures (a task's, a group's), columns are experts."""

    rows: tuple[str, ...]
    experts: tuple[str, ...]
    mask: Tensor  # [rows, experts] bool: the row may use the expert
    own: Tensor  # [rows, experts] bool: the row's own experts, which a self gate adds once more
    expert_input: Tensor  # [experts] int64: the input that the expert reads
    gate_input: Tensor  # [rows, k] int64: inputs whose concatenation the gate reads; a self gate reads the first
    family: Tensor  # [experts] int64: experts of a family share a feature gate


def wire(
    rows: Sequence[str],
    experts: Sequence[str],
    may_use: dict[str, set[str]],
    own: dict[str, str] | None = None,
    reads: dict[str, int] | None = None,
    gate_reads: dict[str, Sequence[int]] | None = None,
) -> Level:
    """A Level in words. `experts` names the family of each expert; the dicts map rows to families, and families (rows
    for gate_reads) to numbers of inputs, 0 where nothing is said. Raises ValueError for a row without experts."""
    own, reads, gate_reads, families = own or {}, reads or {}, gate_reads or {}, list(dict.fromkeys(experts))
    for row in rows:
        if not may_use[row] & set(experts):
            raise ValueError(f"row {row!r} may use no expert; each needs one")
    return Level(
        tuple(rows),
        tuple(experts),
        torch.tensor([[family in may_use[row] for family in experts] for row in rows]),
        torch.tensor([[own.get(row) == family for family in experts] for row in rows]),
        torch.tensor([reads.get(family, 0) for family in experts]),
        torch.tensor([list(gate_reads.get(row, [0])) for row in rows]),
        torch.tensor([families.index(family) for family in experts]),
    )


def check_groups(groups: dict[str, Sequence[str]], tasks: Sequence[str] | None = None) -> list[str]:
    """The tasks in order. Raises ValueError naming an empty group, a task in no group or two, or a name used twice."""
    grouped = list(itertools.chain(*groups.values()))
    for group, members in groups.items():
        if not members:
            raise ValueError(f"group {group!r} has no task")
    for task in itertools.chain(grouped, tasks or ()):
        if grouped.count(task) != 1:
            raise ValueError(f"task {task!r} is in {grouped.count(task)} groups; it must be in exactly one")
        if task in {"shared", *groups}:
            raise ValueError(f"task {task!r} has the name of a group of experts; rename it")
    if tasks is not None and (unknown := set(grouped) - set(tasks)):
        raise ValueError(f"task {min(unknown)!r} is in a group but is no task; the tasks are {', '.join(tasks)}")
    return list(tasks or grouped)


def masks(
    name: str,
    groups: dict[str, Sequence[str]],
    tasks: Sequence[str] | None = None,
    num_experts: int = 8,
    num_shared: int = 2,
    num_own: int = 1,
    num_meta: int = 2,
    hierarchy: bool = True,
) -> list[Level]:
    """The table that makes five models of one layer: name -> its levels, input first.

    name       shared-bottom | mmoe | cgc | ple | adatt | home
    groups     {group: tasks}; `tasks` is their order, by default that of the groups
    hierarchy  False (home only): every row may use every expert but other tasks' own ones
    Raises ValueError for an unknown name, a task in no group or in two, an empty group, a row without experts.
    """
    tasks = check_groups(groups, tasks)
    times = lambda families, count: [family for family in families for _ in range(count)]
    own = {task: task for task in tasks}
    if name in ("shared-bottom", "mmoe"):
        experts = times(["shared"], 1 if name == "shared-bottom" else num_experts)
        return [wire(tasks, experts, {task: {"shared"} for task in tasks})]
    if name in ("cgc", "ple", "adatt"):
        experts = times(["shared"], 0 if name == "adatt" else num_shared) + times(tasks, num_own)
        may_use = {task: set(experts) if name == "adatt" else {"shared", task} for task in tasks}
        if name == "cgc":
            return [wire(tasks, experts, may_use, own)]
        # PLE's first level has one more row, which sees all experts; the shared experts of the second level read it.
        rows = tasks if name == "adatt" else [*tasks, "shared"]
        reads = {row: i for i, row in enumerate(rows)}
        first = wire(
            rows, experts, may_use | {"shared": set(experts)}, own if name == "adatt" else own | {"shared": ""}
        )
        return [first, wire(tasks, experts, may_use, own, reads, {task: [reads[task]] for task in tasks})]
    if name == "home":
        rows, group_of = [*groups, "shared"], {task: group for group in groups for task in groups[group]}
        may_use = {row: {row, "shared"} if hierarchy and row != "shared" else set(rows) for row in rows}
        first = wire(rows, times(rows, num_meta), may_use, {row: row for row in rows})
        reads = {row: i for i, row in enumerate(rows)}
        reads |= {task: reads[group_of[task]] for task in tasks}
        may_use = {task: {task, "shared", *([group_of[task]] if hierarchy else groups)} for task in tasks}
        gate_reads = {task: [reads[task], reads["shared"]] for task in tasks}
        return [first, wire(tasks, times(["shared", *groups, *tasks], num_own), may_use, own, reads, gate_reads)]
    raise ValueError(f"no model {name!r}; there are shared-bottom, mmoe, cgc, ple, adatt, home")


def stream(seed: int, *part: int) -> torch.Generator:
    """Random numbers of one part of a model: leaving another part out does not change them."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence([seed, *part]).generate_state(1)[0]))


def uniform(generator: torch.Generator, *shape: int, fan_in: int) -> nn.Parameter:
    return nn.Parameter((2 * torch.rand(shape, generator=generator) - 1) * fan_in**-0.5)


def expert_norm_swish(z: Tensor, norm: nn.BatchNorm1d) -> Tensor:
    """Swish(BatchNorm(z)), each channel of each expert by itself. z [batch, ...] -> the same shape. Remedy 1.

    After the norm a unit is about N(0, 1): ReLU would zero half of it, Swish passes a little, and a gradient.
    Statistics are the batch's in training and running ones in evaluation, where rows do not see each other. The norm is
    computed in its own precision, also under autocast. Raises ValueError for a training batch of one row.
    """
    if norm.training and len(z) < 2:
        raise ValueError("batch normalisation cannot train on a batch of 1 row; give 2 or more, or call eval()")
    return F.silu(norm(z.flatten(1).to(norm.weight.dtype)).view_as(z))


def masked_softmax(logits: Tensor, mask: Tensor) -> Tensor:
    """Softmax over the last dimension where mask is True; exactly 0, with zero gradient, elsewhere; 0 if nowhere."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits.masked_fill(~mask, torch.finfo(logits.dtype).min).softmax(dim=-1).masked_fill(~mask, 0.0)


class FeatureGate(nn.Module):
    """x * sum_l a_l(x) 2 sigmoid(x A_l B_l): an own, re-weighted view of the input for each family. Remedy 3.

    x [..., d] -> the same shape; with num_families > 1: x [num_families, batch, d]. Every factor lies in (0, 2), and is
    1 at the start. A full d x d gate would be too large, so several of low rank are mixed by a = softmax(x W_a).
    Raises ValueError for rank < 1 or num_gates < 1.
    """

    def __init__(
        self, d: int, rank: int, num_gates: int, num_families: int = 1, generator: torch.Generator | None = None
    ):
        if rank < 1 or num_gates < 1:
            raise ValueError(f"rank is {rank}, num_gates {num_gates}; both must be at least 1")
        super().__init__()
        normal = lambda *shape: nn.Parameter(torch.randn(shape, generator=generator) * d**-0.5)
        self.a = normal(num_families, num_gates, d, rank)
        self.b = nn.Parameter(torch.zeros(num_families, num_gates, rank, d))
        self.mix = normal(num_families, d, num_gates)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(len(self.mix), -1, x.shape[-1])  # [families, batch, d]
        gates = 2 * torch.sigmoid(rows[:, None] @ self.a @ self.b)  # [families, gates, batch, d]
        share = (self.mix.transpose(1, 2) @ rows.transpose(1, 2)).softmax(dim=1)  # [families, gates, batch]
        return (rows * (share[..., None] * gates).sum(dim=1)).view_as(x)


class MaskedExpertLayer(nn.Module):
    """Many mixtures of many experts; who may use whom is a table. x [inputs, batch, d_in] -> [rows, batch, d_out].

    mask, self_mask  [rows, experts] bool. The output of a row is sum_e (g_e + s_e) Expert_e: g a softmax over mask, s
                     over self_mask (a sigmoid where a row has one own expert). self_mask None: no s
    d_in, widths     an expert is linear layers of these widths; d_out = widths[-1]
    expert_input     [experts]: the input each reads; gate_input [rows, k]: those whose concatenation a gate reads; the
                     self gate reads the first of them. None: input 0
    family, rank     [experts] and number: experts of a family share a feature gate of that rank; 0: no feature gates
    norm             BatchNorm and Swish at the end of an expert (HoME); else ReLU
    constant_self    s is learnt numbers instead of a gate (AdaTT)
    Gates are stored for all experts and masked in use, so that a mask changes neither sizes nor initial weights.
    Raises ValueError for a row without experts, or masks of another shape.
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
        seed: Sequence[int] = (0,),
    ):
        super().__init__()
        num_rows, self.num_experts = mask.shape
        if not mask.any(dim=1).all():
            raise ValueError(f"row {int(mask.any(dim=1).long().argmin())} of the mask allows no expert; each needs one")
        if self_mask is not None and self_mask.shape != mask.shape:
            raise ValueError(f"mask is {list(mask.shape)}, self_mask {list(self_mask.shape)}; they must agree")
        or_zeros = lambda given, *shape: torch.zeros(shape, dtype=torch.int64) if given is None else given
        wiring = {"mask": mask, "self_mask": self_mask, "expert_input": or_zeros(expert_input, self.num_experts)}
        wiring |= {"gate_input": or_zeros(gate_input, num_rows, 1), "family": or_zeros(family, self.num_experts)}
        if self_mask is not None:
            wiring["alone"] = (self_mask.sum(dim=1) == 1)[:, None, None]  # [rows, 1, 1]
            self.all_alone = bool(wiring["alone"].all())
        for name, given in wiring.items():
            self.register_buffer(name, given, persistent=False)
        generator, sizes = stream(*seed, 0), [d_in, *widths]
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for fan_in, fan_out in itertools.pairwise(sizes):
            self.weights.append(uniform(generator, self.num_experts, fan_in, fan_out, fan_in=fan_in))
            self.biases.append(uniform(generator, self.num_experts, 1, fan_out, fan_in=fan_in))
        self.norm = nn.BatchNorm1d(self.num_experts * widths[-1]) if norm else None
        d_gate = self.gate_input.shape[1] * d_in
        self.gate_weight = uniform(stream(*seed, 1), num_rows, d_gate, self.num_experts, fan_in=d_gate)
        self.gate_bias = nn.Parameter(torch.zeros(num_rows, 1, self.num_experts))
        self.constant_self, self.feature_gate = None, None
        if self_mask is not None and constant_self:
            self.constant_self = nn.Parameter(self_mask.float() / self_mask.sum(dim=1, keepdim=True).clamp(min=1))
        elif self_mask is not None:
            self.self_weight = uniform(stream(*seed, 2), num_rows, d_in, self.num_experts, fan_in=d_in)
            self.self_bias = nn.Parameter(torch.zeros(num_rows, 1, self.num_experts))
        if rank:
            families = self.family.unique()
            first = [int((self.family == i).nonzero()[0]) for i in families]
            self.register_buffer("family_input", self.expert_input[first], persistent=False)
            self.feature_gate = FeatureGate(d_in, rank, num_gates, len(families), stream(*seed, 3))

    def experts(self, x: Tensor) -> Tensor:
        """What every expert says. x [inputs, batch, d_in] -> [batch, experts, d_out]."""
        if self.feature_gate is None:
            h = pick(x, self.expert_input)  # [experts, batch, d_in]
        else:
            h = self.feature_gate(pick(x, self.family_input))[self.family]
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases)):
            if i:
                h = F.silu(h) if self.norm is not None else F.relu(h)
            h = torch.baddbmm(bias, h, weight)
        h = h.transpose(0, 1)  # [batch, experts, d_out]
        return F.relu(h) if self.norm is None else expert_norm_swish(h, self.norm)

    def gates(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """(g, s), each [rows, batch, experts]; rows of g sum to 1. s None: no self gates."""
        joined = torch.cat([pick(x, column) for column in self.gate_input.T], dim=-1)  # [rows, batch, k * d_in]
        g = masked_softmax(torch.baddbmm(self.gate_bias, joined, self.gate_weight), self.mask[:, None])
        if self.self_mask is None:
            return g, None
        own = self.self_mask[:, None]  # [rows, 1, experts]
        if self.constant_self is not None:
            return g, (self.constant_self[:, None] * own).expand_as(g)
        logits = torch.baddbmm(self.self_bias, pick(x, self.gate_input[:, 0]), self.self_weight)
        s = logits.sigmoid().to(g.dtype) * own  # of a row with one own expert
        return g, s if self.all_alone else torch.where(self.alone, s, masked_softmax(logits, own))

    def forward(self, x: Tensor, trace: list | None = None) -> Tensor:
        h, (g, s) = self.experts(x), self.gates(x)
        if trace is not None:
            trace.append((h, g, s))
        weight = g if s is None else g + s  # not normalised again: own experts count on top
        return torch.einsum("rbe,bed->rbd", weight.to(h.dtype), h)


def pick(x: Tensor, index: Tensor) -> Tensor:
    """x [inputs, batch, d] -> [len(index), batch, d]; a single input is expanded, not copied."""
    return x[index] if len(x) > 1 else x.expand(len(index), -1, -1)


class MaskedExperts(nn.Module):
    """Levels of masked experts with a tower for each task. v [batch, d_in] -> logits [batch, tasks].

    self_gates      "none" | "gate" (HoME) | "constant" (AdaTT)
    feature_gates   of the first so many levels; rank 0: an eighth of a level's input width, at least 2
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
        seed: int = 0,
    ):
        super().__init__()
        self.wiring, self.layers = list(levels), nn.ModuleList()
        for i, (level, width) in enumerate(zip(levels, widths)):
            reads = {key: getattr(level, key) for key in ("expert_input", "gate_input", "family")}
            gates = {"rank": (rank or max(2, d_in // 8)) if i < feature_gates else 0, "num_gates": num_gates}
            gates |= {"constant_self": self_gates == "constant"}
            masked = (level.mask, None if self_gates == "none" else level.own)
            layer = MaskedExpertLayer(*masked, d_in=d_in, widths=width, **reads, **gates, norm=norm, seed=(seed, i))
            self.layers.append(layer)
            d_in = width[-1]
        generator, num_tasks = stream(seed, 100), len(levels[-1].rows)
        self.w1 = uniform(generator, num_tasks, d_in, tower, fan_in=d_in)
        self.b1 = uniform(generator, num_tasks, 1, tower, fan_in=d_in)
        self.w2 = uniform(generator, num_tasks, tower, 1, fan_in=tower)
        self.b2 = uniform(generator, num_tasks, 1, 1, fan_in=tower)

    def forward(self, v: Tensor, trace: list | None = None) -> Tensor:
        x = v[None]  # [inputs, batch, d]
        for layer in self.layers:
            x = layer(x, trace)
        hidden = F.relu(torch.baddbmm(self.b1, x, self.w1))  # [tasks, batch, tower]
        return torch.baddbmm(self.b2, hidden, self.w2)[..., 0].T


class HoME(MaskedExperts):
    """The paper's model: v [batch, d_in] -> logits [batch, tasks], in the order of the groups' tasks.

    groups = {"watch": ["finish", ...], "inter": ["like", ...]}: prior knowledge of which tasks belong together.
    """

    def __init__(self, d_in: int, groups: dict[str, Sequence[str]], num_meta: int = 2, num_own: int = 1, **options):
        levels = masks("home", groups, num_meta=num_meta, num_own=num_own)
        super().__init__(levels, d_in, **{"self_gates": "gate", "feature_gates": 2, **options})


def multitask_loss(logits: Tensor, labels: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(sum over tasks, per task [tasks]) of the mean cross-entropy. logits, labels [batch, tasks]; computed in fp32."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    each = F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype), reduction="none").mean(dim=0)
    return (each if weights is None else weights * each).sum(), each


# ---------------------------------------------------------------------------------------------------------------
# Baselines and ablations: the same layer, other switches
# ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Arm:
    wiring: str
    norm: bool = True
    self_gates: str = "none"
    feature_gates: int = 0
    hierarchy: bool = True


HOME = Arm("home", self_gates="gate", feature_gates=2)
LADDER = {
    "home": HOME,
    "home-no-fg2": replace(HOME, feature_gates=1),
    "home-no-fg": replace(HOME, feature_gates=0),
    "home-no-fg-sg": replace(HOME, feature_gates=0, self_gates="none"),
    "home-no-fg-sg-mask": replace(HOME, feature_gates=0, self_gates="none", hierarchy=False),
}
PLAIN = {name: Arm(name, False, "constant" if name == "adatt" else "none") for name in ("mmoe", "cgc", "ple", "adatt")}
STARRED = {f"{name}-star": replace(arm, norm=True) for name, arm in PLAIN.items()}
ARMS = {"shared-bottom": Arm("shared-bottom", norm=False), **PLAIN, **STARRED, **LADDER}
DEFAULT = ("mmoe", "cgc", "ple", "mmoe-star", "ple-star", "home")

LR_GRID = (5e-3, 1e-2, 2e-2, 4e-2, 8e-2)  # the same for every arm
LR = dict.fromkeys(ARMS, 2e-2) | {"cgc-star": 4e-2, "ple-star": 4e-2}  # each arm's best on seeds 100 and 101

# ---------------------------------------------------------------------------------------------------------------
# The experiment: one pass over the log, the same batches for every arm
# ---------------------------------------------------------------------------------------------------------------

NUM_BLOCKS = 8  # of test users: what a run of one seed takes its standard error over


def masks_of(config: Config, arm: Arm, data: behavior.Behavior) -> list[Level]:
    numbers = {"num_experts": config.experts, "num_shared": config.shared, "num_own": config.own}
    return masks(arm.wiring, data.groups, num_meta=config.meta, hierarchy=arm.hierarchy, **numbers)


class Ranker(nn.Module):
    """One embedding table for all fields, then experts. ids [batch, fields] int -> logits [batch, tasks]."""

    def __init__(self, config: Config, arm: Arm, data: behavior.Behavior, seed: int):
        super().__init__()
        sizes = list(data.fields.values())
        offsets = torch.tensor([0, *itertools.accumulate(sizes)][:-1])
        self.register_buffer("offsets", offsets)
        self.embedding = nn.Embedding(sum(sizes), config.embedding)
        nn.init.normal_(self.embedding.weight, std=0.05, generator=stream(seed, 200))
        hidden = config.hidden * (config.experts if arm.wiring == "shared-bottom" else 1)
        d_in = len(sizes) * config.embedding + (0 if data.train.dense is None else data.train.dense.shape[1])
        widths, switches = ((hidden, config.width), (config.width,)), (arm.norm, arm.self_gates, arm.feature_gates)
        shape = (d_in, widths, config.tower, *switches, config.rank, config.num_gates, seed)
        self.core = MaskedExperts(masks_of(config, arm, data), *shape)

    def forward(self, ids: Tensor, dense: Tensor | None = None, trace: list | None = None) -> Tensor:
        v = self.embedding(ids + self.offsets).flatten(1)  # [batch, fields * embedding]
        return self.core(v if dense is None else torch.cat([v, dense], dim=1), trace)


read_once = functools.lru_cache(maxsize=4)(behavior.load)


def load_data(config: Config, seed: int, run: Run) -> behavior.Behavior:
    generated = {"rows": config.rows, "users": config.users, "items": config.items, "heavy_tail": config.heavy_tail}
    seed = seed if config.data == "synthetic" else 0  # the others are the same for all seeds
    return read_once(config.data, run.data_dir, seed, config.hash_bits, **generated)


def num_steps(config: Config, data: behavior.Behavior) -> int:
    """What fills no batch at the end of an epoch is left out."""
    return config.steps or config.epochs * (len(data.train.labels) // config.batch_size)


def train_arm(config: Config, arm: str, seed: int, run: Run) -> dict:
    """Train one arm for its epochs and measure it; arm@rate trains at another learning rate."""
    name, _, rate = arm.partition("@")
    data = load_data(config, seed, run)
    model = run.prepare(Ranker(config, ARMS[name], data, seed))
    weights = torch.tensor(config.loss_weights, device=run.device) if config.loss_weights else None
    batches = behavior.batch_maker(data.train.each(lambda t: t.to(run.device)), config.batch_size, seed)
    steps = num_steps(config, data)

    def loss_fn(batch: behavior.Part, step: int) -> tuple[Tensor, dict]:
        loss, each = multitask_loss(model(batch.ids, batch.dense), batch.labels, weights)
        return loss, dict(zip(data.tasks, each.detach()))

    optimizer = torch.optim.Adam(model.parameters(), lr=float(rate) if rate else config.lr or LR[name])
    options, schedule = run.train_options(arm, seed), common.cosine(steps, final=0.1)
    common.train(model, loss_fn, steps, batches=batches, optimizer=optimizer, schedule=schedule, clip=None, **options)
    common.save(run.path(arm, seed, ".pt"), model.state_dict())
    result = evaluate(model, data, data.test, run.device)
    if rate:
        del result["levels"]  # a file of the grid would be all gate matrices
    if data.val is not None:
        val = evaluate(model, data, data.val, run.device)
        result["val"] = {key: val[key] for key in ("mean_auc", "mean_gauc")}
    return result | cost(model, data, run.device)


def load_trained(path: str | Path) -> Ranker:
    """The model of an arm, in eval mode, from what a run left: runs/home-small/arms/home-seed0.pt. No data is read.

    ids [batch, fields] -> logits [batch, tasks], in the order of its data (data/behavior.py). Raises UsageError: see
    common.load_trained.
    """

    def make(trained: common.Trained) -> Ranker:
        config, state = trained.config, common.load(path)
        edges = [*state["offsets"].tolist(), len(state["embedding.weight"])]
        fields = {str(i): end - start for i, (start, end) in enumerate(itertools.pairwise(edges))}
        num_dense = state["core.layers.0.weights.0"].shape[1] - len(fields) * config.embedding
        part = behavior.Part(*[torch.empty(0)] * 3, dense=torch.empty(0, num_dense) if num_dense else None)
        groups = behavior.CENSUS_GROUPS if config.data == "census" else behavior.GROUPS
        data = behavior.Behavior(config.data, fields, groups, part, None, part, "")
        model = Ranker(config, ARMS[trained.arm.partition("@")[0]], data, trained.seed)
        model.load_state_dict(state)
        return model

    return common.load_trained(path, Config, make)


def oracle_arm(config: Config, arm: str, seed: int, run: Run) -> dict:
    """The true probabilities as scores: what no model can beat."""
    data = load_data(config, seed, run)
    return behavior.ranking(data.test.truth.numpy(), data.test, behavior.rare_and_frequent(data)[0])


def cost(model: Ranker, data: behavior.Behavior, device: str) -> dict:
    """Parameters, and forward FLOPs of a row, of everything but the embeddings."""
    batch = data.test.each(lambda t: t[:64].to(device))
    flops = common.count_flops(lambda: model(batch.ids, batch.dense))["Global"] / len(batch.ids)
    return {"parameters": common.count_parameters(model.core), "flops": flops}


def statistics(level: Level, h: Tensor, g: Tensor, s: Tensor | None) -> dict[str, Tensor]:
    """Sums over rows of a level's trace, to add up and hand to `diagnose`. h [batch, experts, d]; g, s as in gates."""
    h, g, s = h.float(), g.float(), torch.zeros_like(g, dtype=torch.float32) if s is None else s.float()
    own, total = level.own.to(g.device)[:, None], g + s
    sums = {
        "count": torch.tensor(float(len(h))),
        "zeros": (h == 0).sum(dim=0),  # [experts, d]
        "sum": h.sum(dim=(0, 2)),
        "square": h.square().sum(dim=(0, 2)),  # [experts]
        "gate": g.sum(dim=1),
        "self": s.sum(dim=1),  # [rows, experts]
        "share": ((total * own).sum(dim=-1) / total.sum(dim=-1)).sum(dim=1),  # [rows]
    }
    return {name: value.double().cpu() for name, value in sums.items()}


def occupancy(weights: Tensor) -> tuple[float, float]:
    """How several tasks share an expert: (largest share, effective users / tasks: 1 = all alike). weights [tasks]."""
    share = weights / weights.sum()
    return float(share.max()), float(torch.exp(-torch.xlogy(share, share).sum()) / len(share))


def diagnose(level: Level, sums: dict[str, Tensor]) -> dict:
    """The anomalies in numbers, for one level: lists over experts or rows."""
    count, d = float(sums["count"]), sums["zeros"].shape[1]
    mean = sums["sum"] / (count * d)
    gate, shared = sums["gate"] / count, level.mask.sum(dim=0) > 1  # [rows, experts], [experts]
    users = [occupancy(gate[level.mask[:, e], e]) if shared[e] else (1.0, 1.0) for e in range(len(shared))]
    found = {
        "zero": sums["zeros"].sum(dim=1) / (count * d),
        "dead": (sums["zeros"] == count).double().mean(dim=1),
        "mean": mean,
        "std": (sums["square"] / (count * d) - mean.square()).clamp(min=0).sqrt(),
        "gate": gate,
        "self": sums["self"] / count,
        "own_gate": (gate * level.own).sum(dim=1),
        "own_share": sums["share"] / count,
        "occupancy": torch.tensor([largest for largest, _ in users], dtype=torch.float64),
        "effective_users": torch.tensor([effective for _, effective in users], dtype=torch.float64),
    }
    return {"shared": shared.tolist(), **{key: value.round(decimals=6).tolist() for key, value in found.items()}}


def summary(levels: list[dict], rare: list[int], frequent: list[int]) -> dict:
    """The numbers that claims are about: the worst expert, the gap between frequent and rare tasks."""
    last = levels[-1]
    mean = lambda key, tasks: float(np.mean([last[key][t] for t in tasks]))
    shared = [users for users, is_shared in zip(last["effective_users"], last["shared"]) if is_shared]
    return {
        "zero": max(max(level["zero"]) for level in levels),
        "dead": max(max(level["dead"]) for level in levels),
        "evenness": min(min(level["std"]) / max(max(level["std"]), 1e-12) for level in levels),
        "effective_users": min(shared, default=1.0),
        **{f"{key}_rare": mean(key, rare) for key in ("own_gate", "own_share")},
        **{f"{key}_frequent": mean(key, frequent) for key in ("own_gate", "own_share")},
    }


@torch.no_grad()
def evaluate(model: Ranker, data: behavior.Behavior, part: behavior.Part, device: str) -> dict:
    """Ranking metrics and diagnostics of every row, and of every block of users by itself."""
    model.eval()
    wiring, (rare, frequent) = model.core.wiring, behavior.rare_and_frequent(data)

    def numbers(scores: np.ndarray, part: behavior.Part, sums: list[dict]) -> dict:
        levels = [diagnose(level, of_level) for level, of_level in zip(wiring, sums)]
        return behavior.ranking(scores, part, rare) | summary(levels, rare, frequent) | {"levels": levels}

    one_user = bool((part.users == part.users[0]).all())
    block_of = (torch.arange(len(part.users)) if one_user else part.users.long()) % NUM_BLOCKS
    scores, sums, blocks = np.zeros(part.labels.shape, np.float32), [], []
    for block in block_of.unique():
        rows, of_chunks = (block_of == block).nonzero()[:, 0], []
        for chunk in rows.split(8192):
            batch, trace = part.each(lambda t, chunk=chunk: t[chunk].to(device)), []
            scores[chunk.numpy()] = model(batch.ids, batch.dense, trace).float().cpu().numpy()
            of_chunks.append([statistics(level, *of_level) for level, of_level in zip(wiring, trace)])
        sums.append(functools.reduce(add, of_chunks))
        blocks.append(numbers(scores[rows.numpy()], part.each(lambda t, rows=rows: t[rows]), sums[-1]))
    over_blocks = {key: [block[key] for block in blocks] for key, value in blocks[0].items() if np.isscalar(value)}
    return numbers(scores, part, functools.reduce(add, sums)) | {"blocks": over_blocks}


def add(some: list[dict], more: list[dict]) -> list[dict]:
    """Sums of two batches, level by level."""
    return [{name: a[name] + b[name] for name in a} for a, b in zip(some, more)]


# ---------------------------------------------------------------------------------------------------------------
# Claims
# ---------------------------------------------------------------------------------------------------------------

COLLAPSE = "ReLU experts: over half zeros somewhere in every plain model; HoME: under 1 %, and scales nearer each other"
DEGRADATION = "the worst-shared expert serves more of its tasks in HoME than in CGC and PLE"
UNDERFITTING = "in CGC rare tasks give their own experts less weight than frequent tasks do; in HoME the gap is smaller"
PLAIN_TEXT = "better than the plain models in mean AUC and mean GAUC"
LADDER_TEXT = "each part earns its place: without fg2, fg, self gates, mask, AUC falls at every step"
CLAIMS = [
    Claim("home.collapse", COLLAPSE, "some experts over 90 % zeros under ReLU (abstract)", required=True),
    Claim("home.degradation", DEGRADATION, "some shared experts are occupied by one task (abstract)"),
    Claim("home.underfitting", UNDERFITTING, "rare tasks ignore their specific experts (abstract)", required=True),
    Claim("home.beats_plain", PLAIN_TEXT, "not verified", required=True),
    Claim("home.beats_starred", "better than the baselines with HoME's own experts, in AUC and GAUC", "not verified"),
    Claim("home.ladder", LADDER_TEXT, "not verified"),
    Claim("home.cost", "no more parameters and FLOPs than PLE (embeddings aside)", "not verified"),
]

Results = dict[str, list[dict]]  # {arm: [one result a seed]}


def values(results: Results, arm: str, key: str) -> np.ndarray:
    """[seeds]; of a run with a single seed [blocks of users], what margins are then taken over."""
    found = results[arm]
    return np.array(found[0]["blocks"][key] if len(found) == 1 else [result[key] for result in found])


def shown(numbers: np.ndarray, num_seeds: int) -> str:
    return common.show(numbers if num_seeds > 1 else [numbers.mean()])


def lead(results: Results, arms: Sequence[str]) -> dict[str, np.ndarray]:
    """HoME's margin over the best of the arms, the best on average, in AUC and in GAUC."""
    best = {key: max(arms, key=lambda arm: values(results, arm, key).mean()) for key in ("mean_auc", "mean_gauc")}
    return {key: values(results, "home", key) - values(results, arm, key) for key, arm in best.items()}


def judge(run: Run, results: Results) -> None:
    """From measurements to claim rows."""
    of, show = (lambda arm, key: values(results, arm, key)), (lambda numbers: shown(numbers, len(run.seeds)))
    plain, starred = ([arm for arm in some if arm in results] for some in (PLAIN, STARRED))

    def report(id: str, margin: np.ndarray, text: str, **numbers: np.ndarray) -> None:
        numbers = {name: by_seed.tolist() for name, by_seed in numbers.items()}
        run.claim(f"home.{id}", text, {"margin": margin.tolist(), **numbers}, margin)

    def has(id: str, *arms: str) -> bool:
        absent = [arm for arm in arms if arm not in results]
        if absent:
            run.claim(f"home.{id}", f"not measured; it needs {', '.join(absent)}", {})
        return not absent

    basic = ("mmoe", "cgc", "ple", "home")
    if has("collapse", *basic):
        zero, even = np.min([of(arm, "zero") for arm in plain], 0), np.max([of(arm, "evenness") for arm in plain], 0)
        home_zero, home_even = of("home", "zero"), of("home", "evenness")
        margin = np.minimum(np.minimum(zero - 0.5, 0.01 - home_zero), home_even - even)
        text = f"zeros of the worst expert: {show(zero)} or more, HoME {show(home_zero)}; smallest over largest scale: "
        text += f"{show(even)} or less, HoME {show(home_even)}"
        report("collapse", margin, text, zero=zero, home_zero=home_zero, evenness=even, home_evenness=home_even)
    if has("degradation", "cgc", "ple", "home"):
        users = {arm: of(arm, "effective_users") for arm in ("cgc", "ple", "home")}
        text = ", ".join(f"{arm} {show(number)}" for arm, number in users.items())
        margin = users["home"] - np.maximum(users["cgc"], users["ple"])
        report("degradation", margin, f"effective users / tasks of the worst-shared expert: {text}", **users)
    if has("underfitting", "cgc", "home"):
        gap = lambda arm, key: of(arm, f"{key}_frequent") - of(arm, f"{key}_rare")
        cgc, home, gate = gap("cgc", "own_share"), gap("home", "own_share"), gap("home", "own_gate")
        own = [show(of(arm, f"own_share_{tasks}")) for arm in ("cgc", "home") for tasks in ("frequent", "rare")]
        text = "own experts' weight, frequent against rare: CGC {} and {}, HoME {} and {}".format(*own)
        text += f"; HoME's gates alone: gap {show(gate)}"
        report("underfitting", cgc - abs(home), text, cgc_gap=cgc, home_gap=home, home_gate_gap=gate)
    stars = ("mmoe-star", "ple-star", "home")
    for id, arms, needed in (("beats_plain", plain, basic), ("beats_starred", starred, stars)):
        if has(id, *needed):
            auc, gauc = (margins := lead(results, arms)).values()
            text = f"AUC {show(auc)}, GAUC {show(gauc)} above the best of {', '.join(arms)}"
            report(id, np.minimum(auc, gauc), text, **margins)
    if has("ladder", *LADDER):
        steps = {f"to {b}": of(a, "mean_auc") - of(b, "mean_auc") for a, b in itertools.pairwise(LADDER)}
        text = "AUC lost at each step: " + ", ".join(f"{show(lost)} ({name})" for name, lost in steps.items())
        report("ladder", min(steps.values(), key=lambda lost: lost.mean()), text, **steps)
    if has("cost", "ple", "home"):
        spent = {arm: (results[arm][0]["parameters"], results[arm][0]["flops"]) for arm in [*plain, "home"]}
        words = "{} {:,} parameters, {:.0f} kFLOP a row".format
        text = "; ".join(words(arm, number, flops / 1e3) for arm, (number, flops) in spent.items())
        holds = all(mine <= ple for mine, ple in zip(spent["home"], spent["ple"]))
        run.claim("home.cost", text, {arm: list(numbers) for arm, numbers in spent.items()}, holds=holds)


def print_tables(config: Config, run: Run, results: Results, data: behavior.Behavior) -> None:
    num_seeds, rows = len(run.seeds), []
    mean = lambda arm, key: shown(np.array([result[key] for result in results[arm]]), num_seeds)
    for arm in (arm for arm in results if "@" not in arm):
        ranks = [mean(arm, key) for key in ("mean_auc", "mean_gauc", "rare_gauc")]
        result = results[arm][0]
        work = [f"{result['parameters']:,}", f"{result['flops'] / 1e3:.0f}"] if "flops" in result else ["", ""]
        experts = [mean(arm, key) for key in ("zero", "dead", "evenness")] if "zero" in result else [""] * 3
        rows.append([arm, *ranks, *experts, *work])
    kind = "expected AUC" if data.test.truth is not None else "AUC"
    header = ["arm", kind, "GAUC", "of rare tasks", "zeros", "dead", "scale min/max", "parameters", "kFLOP/row"]
    run.table(f"test, {num_seeds} seed(s); zeros, dead units and scales: the worst expert", header, rows)

    rates, first = data.train.labels.float().mean(dim=0).tolist(), {arm: found[0] for arm, found in results.items()}
    arms = [arm for arm in ("oracle", "mmoe", "cgc", "ple", "home") if arm in first]
    cell = lambda value: "one class only" if value is None else f"{value:.4f}"
    rows = [[t, f"{rates[i]:.4f}", *(cell(first[arm]["auc"][i]) for arm in arms)] for i, t in enumerate(data.tasks)]
    run.table("AUC by task, first seed", ["task", "label rate", *arms], rows)

    chosen = [arm for arm in (first if config.inspect else ("cgc", "home")) if "levels" in first.get(arm, ())]
    for arm in chosen:
        levels = list(zip(masks_of(config, ARMS[arm], data), first[arm]["levels"]))
        for i, level_and_found in enumerate(levels if config.inspect else levels[-1:]):
            name = f"{arm}, level {i + 1}" if config.inspect else f"{arm}, its last level"
            title = f"{name}: mean weight (gate + self gate) of each expert, first seed"
            run.table(title, *gate_table(*level_and_found))
    if config.grid:
        score, rows = (lambda found: found.get("val", found)["mean_auc"]), []
        for arm in (arm for arm in results if arm in ARMS):
            tried = [arm if rate == (config.lr or LR[arm]) else f"{arm}@{rate:g}" for rate in LR_GRID]
            scores = [np.array([score(found) for found in results[name]]) for name in tried]
            rows.append([arm, *(shown(by_seed, num_seeds) for by_seed in scores)])
        run.table("the learning-rate grid: mean AUC", ["arm", *(f"{rate:g}" for rate in LR_GRID)], rows)


def gate_table(level: Level, found: dict) -> tuple[list[str], list[list[str]]]:
    """Who listens to whom (rows) and the state of every expert (columns), of what `diagnose` found: (header, rows)."""
    header, two = ["weight of", *level.experts], "{:.2f}".format
    weight = np.array(found["gate"]) + np.array(found["self"])
    rows = [[name, *(two(w) if m else "." for w, m in zip(*row))] for name, *row in zip(level.rows, weight, level.mask)]
    for key in ("occupancy", "effective_users"):
        rows.append([key, *(two(value) if shared else "" for value, shared in zip(found[key], found["shared"]))])
    rows += [[key, *map(two, found[key])] for key in ("zero", "dead", "mean", "std")]
    if level.own.any():
        header += ["own: gate", "self", "share"]
        own = [map(two, three) for three in zip(found["own_gate"], map(sum, found["self"]), found["own_share"])]
        rows = [[*row, *(own[i] if i < len(own) else [""] * 3)] for i, row in enumerate(rows)]
    return header, rows


def draw(config: Config, run: Run, results: Results, data: behavior.Behavior) -> None:
    def gates(arm: str, ax) -> None:
        level, found = masks_of(config, ARMS[arm], data)[-1], results[arm][0]["levels"][-1]
        weight = np.array(found["gate"]) + np.array(found["self"])
        common.heatmap(ax, weight, title=f"{arm}: who listens to whom")
        ax.set_xticks(range(len(level.experts)), level.experts, rotation=45, ha="right", fontsize=7)
        ax.set_yticks(range(len(level.rows)), level.rows, fontsize=7)

    def zeros(ax) -> None:
        worst = {arm: np.mean([found["zero"] for found in results[arm]]) for arm in results if arm in ARMS}
        common.bars(ax, worst, ylabel="share of zeros, worst expert", title="collapse")
        ax.tick_params(axis="x", rotation=60, labelsize=7)

    panels = [functools.partial(gates, arm) for arm in ("cgc", "home") if arm in results]
    run.plot("home", [*panels, zeros], width=6, height=4.2)


# ---------------------------------------------------------------------------------------------------------------
# main
# ---------------------------------------------------------------------------------------------------------------


def check(config: Config) -> Config:
    """Refuse impossible settings before anything is read or written."""
    for name, value in vars(config).items():
        least = 0 if name in ("heavy_tail", "rank") else 2 if name == "batch_size" else 1
        if type(value) is int and value < least:
            raise ValueError(f"{name} is {value}; at least {least} is needed")
    if any(weight < 0 for weight in config.loss_weights):
        raise ValueError(f"loss_weights are {config.loss_weights}; none may be negative")
    if config.data not in behavior.DATASETS:
        raise ValueError(f"data is {config.data!r}; allowed: {', '.join(behavior.DATASETS)}")
    models = tuple(dict.fromkeys(name.strip().replace("*", "-star") for name in config.models))
    for name in models:
        if name not in ARMS:
            raise ValueError(f"no model {name!r}; there are {', '.join(ARMS)}")
    return replace(config, models=models)


def main(config: Config, run: Run) -> dict:
    run.config = config = check(config)
    arms = list(config.models or (ARMS if run.ablate else DEFAULT))
    if run.dry_run and not behavior.is_here(config.data, run.data_dir):
        data = behavior.nominal(config.data, config.hash_bits)
    else:
        data = load_data(config, run.seed, run)
    run.data = {data.name: data.digest}
    if config.loss_weights and len(config.loss_weights) != len(data.tasks):
        number, tasks = len(config.loss_weights), ", ".join(data.tasks)
        raise ValueError(f"{number} loss_weights; the {len(data.tasks)} tasks are {tasks}")
    steps = num_steps(config, data)
    if len(data.train.labels) < config.batch_size:
        raise ValueError(f"batch_size is {config.batch_size}; there are {len(data.train.labels)} rows to train on")
    if config.grid:
        arms += [f"{arm}@{rate:g}" for arm in arms for rate in LR_GRID if rate != (config.lr or LR[arm])]
    costly = "home" if "home" in arms else arms[0]
    model = Ranker(config, ARMS[costly], data, run.seed).to(run.device)
    some = data.train.each(lambda t: t[: config.batch_size].to(run.device))
    step = lambda: multitask_loss(model(some.ids, some.dense), some.labels)[0].backward()
    if run.dry_run:
        print(data.note) if data.note else None
        run.estimate(model, step, len(arms) * len(run.seeds) * steps, behavior.download_size(config.data, run.data_dir))
        return {}
    rounds = math.ceil(len(arms) * len(run.seeds) / run.workers)
    seconds = 0.8 * rounds * steps * common.median_seconds(step, run.device)  # the other arms are cheaper
    run.header(f"{data.name} {data.digest}: {len(data.train.labels):,} + {len(data.test.labels):,} rows", seconds)
    print(data.note) if data.note else None

    results = run.measure(oracle_arm, config, ["oracle"]) if data.test.truth is not None else {}
    results |= run.measure(train_arm, config, arms)
    print_tables(config, run, results, data)
    judge(run, results)
    draw(config, run, results, data)
    return {"arms": results}


if __name__ == "__main__":
    common.run(main, SMALL, FULL, CLAIMS)
