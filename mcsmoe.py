"""M-SMoE and MC-SMoE: merge the experts of a mixture by hints from its router, then compress them.

Li, Zhang, Yadav, Sung, Cheng, Bansal, Chen, "Merge, Then Compress: Demystify Efficient SMoE with
Hints from Its Routing Policy" (ICLR 2024, arXiv 2310.01334).

A sparse mixture keeps all its experts in memory, though for one downstream task few of them matter.
M-SMoE makes them fewer, from what the router does on a few hundred sequences of the task:

  A  align      permute an expert's neurons to match another's: free, it computes the same
  B  count      how often each expert is picked; keep the raw logits of the router
  C  select     the most used experts of ALL layers together stay, at least one a layer (dominant);
                every other one joins the dominant expert of its layer with the most similar logits
  D  merge      a group becomes its mean, weighted by use
  E  redirect   the router is not touched: a token that picks expert e is served by remap[e] and
                scaled by the score of e itself
  F  recover    brief fine-tuning: cross-entropy + alpha KL(unmerged teacher || student)
  G  compress   each merged W = U V + S, low rank plus sparse; the output neurons of S with least
                |s ds| go while it is trained: MC-SMoE. Without merging first it is called C-SMoE

Two experts of three neurons, a neuron written (what it reads | what it adds), d_model 2, ReLU:

     A, used for 3/4 of their tokens      B, used for 1/4       B in A's order      3/4 A + 1/4 B
     a1  ( 1  0 |  1  0 )                 ( 3  1 |  2  1 )      ( 1  0 |  1  4 )    ( 1  0 |  1  1 )
     a2  ( 0  2 |  0  1 )                 ( 1  0 |  1  4 )      ( 0  2 |  0  1 )    ( 0  2 |  0  1 )
     a3  ( 3  1 |  2  1 )                 ( 0  2 |  0  1 )      ( 3  1 |  2  1 )    ( 3  1 |  2  1 )

     gain (products of neurons)  5 2 0      largest sum, a neuron of B for each of A: 2 + 5 + 15
     rows A, columns B           3 4 5      = 22: perm = [2nd, 3rd, 1st]
                                15 9 3

For x = (1, 0) A says (7, 3), B (7, 7); merged in A's order (7, 4), their mean; else (5.3, 3.1).

Run      python mcsmoe.py                four minutes on two cores, no download
         python mcsmoe.py --ablate       every arm; --seeds 8 for verdicts
         python mcsmoe.py --full         switch-base-32 on SST-2 (40 GB of GPU and activations), or
             --model mistralai/Mixtral-8x7B-v0.1 --text FILE: merged as it is, any causal mixture
You see  a byte model of 16 experts a layer, pre-trained on three kinds of text, fine-tuned on one,
         merged to 4 in seven ways, recovered, compressed and exported; what the claims became.
Found    (seeds 0-7) Merged to a quarter it has 56.4 of 63.4 % at once, 63.1 after 60 steps more (as
         many take the full model to 64.5). Averaging random groups is 0.36 nats worse, recovered
         0.08; pruning 0.28, 0.03. Lining up is worth 0.05, 0.010; weights by use 0.15, 0.027. The
         title's hint is not: groups by the router's logits beat random members by 0.015 at once
         and, recovered, not at all (-0.001 ± 0.004), nor do they beat the kept experts alone (0.001
         ± 0.006). MC-SMoE beats C-SMoE of equal size (0.10), not of equal rank (-0.05). Merging
         lowers the stable rank of w2 by 5 % and raises that of w1 by 2 %.
Differences from the paper and its code
1. Experts are aligned to the most used one of their group; the paper's reference is expert 0.
2. Padding and dropped tokens count nowhere; exactly as many experts stay as the budget says.
3. Every arm has frozen routers and equal steps, C-SMoE too; in the released code baselines differ.
4. Importance of a neuron is a mean, not a sum, of |s ds| (as in the code), without its delay.
5. Small: 4 layers, pre-trained here. Full: Adam in fp32 under bf16, prompts of our own, answers in
   words are generated, where the released evaluation feeds the right answer in.
6. Ours: experts with a gate (SwiGLU), top-k, causal models. Gone since the first edition: ZipIt,
   REPAIR, Git Re-basin, Fisher weights, task-specific pruning, other similarities. Left out:
   fairseq's 15B decoder. Without recovery later work (REAP) finds pruning better; not so here.

Break it yourself (seeds 0-2, as it is: 1.688 nats at once, 1.415 recovered):
--arms msmoe@calibration=1 (statistics of one sequence: 1.723 and 1.421, little is lost);
--arms msmoe@kept=1 (one expert a layer for all: 2.057 and 1.533);
--arms msmoe@recover_steps=5 (five steps at this rate are worse than none: 1.708).
"""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import common
import kernels
from common import (
    Check,
    Count,
    Job,
    Margin,
    NonNegative,
    Only,
    Positive,
    Results,
    Run,
    Share,
    Whole,
    check,
    claim,
    show,
)
from data import mixtures, pretrained, targets, tasks
from data import text as text_data

# --------------------------------------------------------------------------------------------------
# The method, step A: line the neurons up
# --------------------------------------------------------------------------------------------------


class Expert(NamedTuple):
    """act(x w1 + b1) w2 + b2, or with w_gate (act(x w_gate) * (x w1 + b1)) w2 + b2.

    Of a stack of experts every tensor has one dimension more: [num_experts, ...].
    """

    w1: Tensor  # [d_model, d_ff]
    w2: Tensor  # [d_ff, d_model]
    b1: Tensor | None = None  # [d_ff]
    b2: Tensor | None = None  # [d_model]
    w_gate: Tensor | None = None  # [d_model, d_ff], of SwiGLU experts, as Mixtral's

    def each(self, function: Callable[[Tensor], Tensor]) -> "Expert":
        """function applied to every tensor that is there."""
        return Expert(*(None if tensor is None else function(tensor) for tensor in self))

    def at(self, index: Any) -> "Expert":
        """Of a stack: one expert, or a stack of some."""
        return self.each(lambda tensor: tensor[index])

    def forward(self, x: Tensor, act: str = "relu") -> Tensor:
        """One expert on x [tokens, d_model] -> the same shape."""
        up = x @ self.w1  # [tokens, d_ff]
        if self.b1 is not None:
            up = up + self.b1
        activation = kernels.ACTIVATIONS[act]
        hidden = activation(up) if self.w_gate is None else activation(x @ self.w_gate) * up
        y = hidden @ self.w2
        return y if self.b2 is None else y + self.b2


def stack(experts: Sequence[Expert]) -> Expert:
    """Experts of one kind, one behind the other."""
    return Expert(*(None if parts[0] is None else torch.stack(parts) for parts in zip(*experts)))


def linear_assignment(gain: Tensor | np.ndarray) -> np.ndarray:
    """perm [n] int64 with the largest sum_i gain[i, perm[i]]; exact.

    SciPy's solver where it is installed, else the one below. Raises ValueError unless gain is a
    square matrix of finite numbers.
    """
    gain = np.asarray(gain, dtype=np.float64)
    is_square = gain.ndim == 2 and gain.shape[0] == gain.shape[1] and gain.size > 0
    if not is_square or not np.isfinite(gain).all():
        needed = "a square matrix of finite numbers is needed"
        raise ValueError(f"gain has shape {gain.shape}; {needed}")
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError:
        return shortest_augmenting_paths(-gain)
    return linear_sum_assignment(gain, maximize=True)[1].astype(np.int64)


def shortest_augmenting_paths(cost: np.ndarray) -> np.ndarray:
    """The Hungarian method: perm [n] with the least sum_i cost[i, perm[i]], one row at a time.

    Rows and columns have prices u and v, such that cost - u - v is never below 0 and is 0 where a
    row has its column. A new row looks for a free column along the cheapest path (Dijkstra), which
    may take a column from another row, that then looks on. Column 0 is where every search starts.
    """
    n = len(cost)
    u, v = np.zeros(n + 1), np.zeros(n + 1)
    row_of = np.zeros(n + 1, dtype=np.int64)  # of each column, from 1 on; 0: it is free
    for row in range(1, n + 1):
        column = 0
        row_of[column] = row
        distance = np.full(n + 1, np.inf)  # to each column, beyond what is paid
        came_from = np.zeros(n + 1, dtype=np.int64)
        seen = np.zeros(n + 1, dtype=bool)
        while row_of[column]:
            seen[column] = True
            here = row_of[column]
            reduced = cost[here - 1] - u[here] - v[1:]
            closer = np.flatnonzero(~seen[1:] & (reduced < distance[1:])) + 1
            distance[closer] = reduced[closer - 1]
            came_from[closer] = column
            column = int(np.where(seen, np.inf, distance).argmin())
            step = distance[column]
            u[row_of[seen]] += step
            v[seen] -= step
            distance[~seen] -= step
        while column:  # every row on the path gives its column to the one before
            before = came_from[column]
            row_of[column] = row_of[before]
            column = before
    perm = np.empty(n, dtype=np.int64)
    perm[row_of[1:] - 1] = np.arange(n)
    return perm


def neurons(expert: Expert) -> Tensor:
    """[d_ff, weights of a neuron] float64: all that moves when two neurons change places."""
    parts = [expert.w1.T, expert.w2]
    if expert.b1 is not None:
        parts.append(expert.b1[:, None])
    if expert.w_gate is not None:
        parts.append(expert.w_gate.T)
    return torch.cat(parts, dim=1).double()


def neuron_gain(reference: Expert, target: Expert) -> Tensor:
    """[d_ff, d_ff] float64: inner products of neurons, the reference's in rows.

    Permuting neurons changes no norm, so the largest sum of products is the smallest distance.
    """
    return neurons(reference) @ neurons(target).T


def permute_neurons(expert: Expert, perm: Tensor | np.ndarray) -> Expert:
    """Neuron i becomes the old neuron perm[i]; what the expert computes stays the same."""
    perm = torch.as_tensor(perm, device=expert.w1.device)
    return Expert(
        w1=expert.w1[:, perm],
        w2=expert.w2[perm],
        b1=None if expert.b1 is None else expert.b1[perm],
        b2=expert.b2,  # belongs to no neuron
        w_gate=None if expert.w_gate is None else expert.w_gate[:, perm],
    )


def align_expert(reference: Expert, target: Expert) -> Expert:
    """target with its neurons in the order that is nearest to the reference. Algorithm 1."""
    return permute_neurons(target, linear_assignment(neuron_gain(reference, target).cpu()))


# --------------------------------------------------------------------------------------------------
# Steps B and C: count who is used, select who stays, group the others by their logits
# --------------------------------------------------------------------------------------------------


def check_finite(router_logits: Tensor) -> None:
    """An infinite logit would decide every similarity, a NaN every count. Raises ValueError."""
    odd = int((~torch.isfinite(router_logits)).sum())
    if odd:
        raise ValueError(f"{odd} of {router_logits.numel()} router logits are NaN or infinite")


def usage_frequency(
    router_logits: Tensor, top_k: int = 1, token_mask: Tensor | None = None
) -> Tensor:
    """[num_experts] float64: the share of all picks that each expert gets; sums to 1.

    router_logits [tokens, num_experts], raw; token_mask [tokens] bool, False marks padding (which
    the released code counts, as it counts tokens dropped by capacity for expert 0).
    Raises ValueError for NaN or infinity.
    """
    logits = router_logits if token_mask is None else router_logits[token_mask]
    check_finite(logits)
    picks = logits.topk(top_k, dim=-1).indices  # [tokens, top_k]
    counts = torch.bincount(picks.flatten(), minlength=logits.shape[-1]).double()
    return counts / counts.sum().clamp(min=1)


def select_dominant(frequency: Tensor, num_kept: int) -> Tensor:
    """[layers, num_experts] bool: the num_kept experts of all layers together that stay.

    frequency [layers, num_experts], of each layer summing to 1. The most used expert of every layer
    is in; the other places go by frequency over all layers: a layer with even routing keeps many, a
    skewed one few. Ties by layer and index; a num_kept beyond all keeps all.
    Raises ValueError when num_kept is below the number of layers.
    """
    layers, num_experts = frequency.shape
    if num_kept < layers:
        too_few = f"num_kept is {num_kept}, fewer than one expert in each of {layers} layers"
        raise ValueError(too_few)
    first = F.one_hot(frequency.argmax(dim=1), num_experts).bool()
    rank = torch.where(first, math.inf, frequency).flatten()
    order = rank.sort(descending=True, stable=True).indices
    dominant = torch.zeros_like(rank, dtype=torch.bool)
    dominant[order[:num_kept]] = True
    return dominant.view(layers, num_experts)


def group_experts(router_logits: Tensor, dominant: Tensor) -> Tensor:
    """groups [num_experts] int64: each joins the dominant expert of most similar logits (eq. 1).

    router_logits [tokens, num_experts], raw: similarity is the cosine of two columns; dominant
    [num_experts] bool. Group g is that of the g-th dominant expert; dominant ones never merge with
    each other. Raises ValueError: none is dominant, NaN or infinity.
    """
    if not dominant.any():
        raise ValueError(f"none of the {len(dominant)} experts is dominant")
    check_finite(router_logits)
    unit = F.normalize(router_logits.T.double(), dim=1)  # [num_experts, tokens]
    similarity = unit @ unit[dominant].T  # [num_experts, num_groups]
    groups = similarity.argmax(dim=1)
    groups[dominant] = torch.arange(int(dominant.sum()), device=groups.device)
    return groups


# --------------------------------------------------------------------------------------------------
# Steps D and E: merge, and redirect the router
# --------------------------------------------------------------------------------------------------


def merge_experts(weights: Tensor, frequency: Tensor, groups: Tensor) -> Tensor:
    """[num_groups, ...]: the mean of every group, weighted by frequency (eq. 2).

    weights [num_experts, ...], aligned; frequency [num_experts]; groups [num_experts] with every
    number from 0 to num_groups - 1. A group of one stays as it is, bit for bit; one that is never
    used becomes its plain mean. Raises ValueError for a group without a member.
    """
    merged = []
    for group in range(int(groups.max()) + 1):
        members = (groups == group).nonzero()[:, 0]
        if len(members) == 0:
            raise ValueError(f"group {group} of {groups.tolist()} has no member")
        share = frequency[members].double()
        if share.sum() == 0:
            share = torch.ones_like(share)
        share = share / share.sum()
        mean = torch.tensordot(share, weights[members].double(), dims=1)
        merged.append(mean.to(weights.dtype))
    return torch.stack(merged)


class DenseExperts(nn.Module):
    """Stacked experts: tokens [tokens, d_model] -> the same shape.

    expert_index, gates [tokens, top_k]: whom each token picks, and with which weight.
    Raises ValueError for gated experts with a bias b1.
    """

    def __init__(self, experts: Expert, act: str = "relu"):
        if experts.w_gate is not None and experts.b1 is not None:
            raise ValueError("an expert has w_gate and b1; biased gated experts are not supported")
        super().__init__()
        self.act = act
        self.glu = experts.w_gate is not None
        self.backend = "auto"
        w1 = experts.w1
        if self.glu:
            w1 = torch.cat([experts.w_gate, experts.w1], dim=-1)  # columns gate | up
        self.w1, self.w2 = as_parameter(w1), as_parameter(experts.w2)
        self.b1, self.b2 = as_parameter(experts.b1), as_parameter(experts.b2)

    @classmethod
    def of_gated(cls, w1: Tensor, w2: Tensor, act: str) -> "DenseExperts":
        """On the same memory: w1 [num_experts, d_model, 2 d_ff] has columns gate | up."""
        one = w1[:1, :1, :1]
        layer = cls(Expert(one, one, w_gate=one), act)
        layer.w1, layer.w2 = nn.Parameter(w1.detach()), nn.Parameter(w2.detach())
        return layer

    def stacked(self) -> Expert:
        """The weights, without a gradient."""
        gate, w1 = self.w1.chunk(2, dim=-1) if self.glu else (None, self.w1)
        return Expert(w1, self.w2, self.b1, self.b2, gate).each(Tensor.detach)

    def forward(self, tokens: Tensor, expert_index: Tensor, gates: Tensor) -> Tensor:
        weights = (self.w1, self.w2, self.b1, self.b2)
        return kernels.moe_mlp(
            tokens, expert_index, gates, *weights, self.act, self.glu, self.backend
        )


def as_parameter(tensor: Tensor | None) -> nn.Parameter | None:
    return None if tensor is None else nn.Parameter(tensor.detach().clone())


class SparseMoE(nn.Module):
    """A mixture whose router knows num_experts experts, though fewer may be stored.

    x [..., time, d_model] -> the same shape. The router and its scores stay as they were trained: a
    token that picks expert e is served by experts[remap[e]] and scaled by the probability of e
    itself (sections A1.2, A3). So merging saves memory, not work.

    router_weight  [num_experts, d_model]
    experts        DenseExperts or LowRankExperts
    remap          [num_experts] int64: who serves whose tokens; default: everybody its own
    alive          [num_experts] bool: the others get no token, their logits are masked (pruning)
    normalize      the top_k scores of a token are made to sum to 1 (Mixtral)
    capacity       tokens of a sequence beyond it get a zero output (Switch)
    balance        above 0 the router is trained, and a training forward leaves balance *
                   num_experts * sum_e f_e P_e in `aux_loss`; under activation checkpointing it
                   has a gradient with use_reentrant=False only
    shared         a module that every token meets, too, added to the output (Qwen2-MoE)
    """

    def __init__(
        self,
        router_weight: Tensor,
        experts: nn.Module,
        remap: Tensor | None = None,
        alive: Tensor | None = None,
        top_k: int = 1,
        normalize: bool = False,
        capacity: int | None = None,
        balance: float = 0.0,
        shared: nn.Module | None = None,
    ):
        super().__init__()
        num_experts, d_model = router_weight.shape
        if not 1 <= top_k <= num_experts:
            raise ValueError(f"top_k is {top_k}; 1 to {num_experts} are allowed")
        self.top_k = top_k
        self.normalize = normalize
        self.capacity = capacity
        self.balance = balance
        self.aux_loss: Tensor | None = None
        self.router = nn.Linear(d_model, num_experts, bias=False, device="meta")
        self.router.weight = nn.Parameter(router_weight.detach().clone(), requires_grad=balance > 0)
        self.experts, self.shared = experts, shared
        everyone = torch.ones(num_experts, dtype=torch.bool, device=router_weight.device)
        self.register_buffer("alive", everyone if alive is None else alive)
        self.register_buffer("remap", everyone.long().cumsum(0) - 1 if remap is None else remap)

    def __getstate__(self) -> dict:
        """For copy.deepcopy and pickle: an auxiliary loss belongs to a forward pass."""
        return {**super().__getstate__(), "aux_loss": None}

    def with_experts(
        self, experts: nn.Module, remap: Tensor, alive: Tensor | None = None
    ) -> "SparseMoE":
        """The same router over other experts."""
        return SparseMoE(
            self.router.weight,
            experts,
            remap,
            self.alive if alive is None else alive,
            top_k=self.top_k,
            normalize=self.normalize,
            capacity=self.capacity,
            shared=self.shared,
        )

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, x.shape[-1])  # [tokens, d_model]
        with torch.autocast(x.device.type, enabled=False):  # routing stays in full precision
            router_logits = self.router(tokens.to(self.router.weight.dtype))
            router_logits = router_logits.to(torch.promote_types(x.dtype, torch.float32))
            router_probs = router_logits.masked_fill(~self.alive, -1e6).softmax(dim=-1)
        gates, expert_index = router_probs.topk(self.top_k, dim=-1)  # [tokens, top_k]
        if self.normalize:
            gates = gates / gates.sum(dim=-1, keepdim=True)
        if self.balance > 0 and self.training:
            aux_loss = self.balance * balance_loss(router_probs, expert_index)
            if not is_backward_running():  # where a forward is a repetition: nobody takes its loss
                self.aux_loss = aux_loss
        if self.capacity is not None:
            by_sequence = expert_index.view(*x.shape[:-1], self.top_k)
            expert_index = drop_overflow(by_sequence, len(self.remap), self.capacity)
        served_by = self.remap[expert_index.clamp(min=0)]
        served_by = torch.where(expert_index < 0, expert_index, served_by)
        y = self.experts(tokens, served_by, gates).view_as(x).to(x.dtype)
        return y if self.shared is None else y + self.shared(x)


def is_backward_running() -> bool:
    """Whether backward is running: a forward in it is activation checkpointing computing again."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def balance_loss(router_probs: Tensor, expert_index: Tensor) -> Tensor:
    """num_experts * sum_e f_e P_e: 1 when all experts are used alike. Switch, eq. 4."""
    if len(router_probs) == 0:  # a mean over no token is NaN
        return router_probs.sum()
    num_experts, top_k = router_probs.shape[1], expert_index.shape[1]
    picks = F.one_hot(expert_index, num_experts).sum(dim=1).to(router_probs)
    share = picks.mean(dim=0) / top_k  # [num_experts]
    return num_experts * (share * router_probs.mean(dim=0)).sum()


def drop_overflow(expert_index: Tensor, num_experts: int, capacity: int) -> Tensor:
    """[tokens, top_k]: -1 for picks of a sequence beyond the capacity of their expert.

    expert_index [..., time, top_k]; first come, first served. Experts are the original ones:
    capacity is part of how the model was trained.
    """
    picks = F.one_hot(expert_index, num_experts).sum(dim=-2)  # [..., time, num_experts]
    place = picks.cumsum(dim=-2).gather(-1, expert_index)  # 1, 2, ...: the how-many-eth
    return torch.where(place <= capacity, expert_index, -1).flatten(0, -2)


def merge_layer(
    layer: SparseMoE,
    frequency: Tensor,
    groups: Tensor,
    align: bool = True,
    weights: Tensor | None = None,
) -> SparseMoE:
    """Steps A, D and E of one layer: its members lined up, averaged, the router redirected.

    frequency, groups [num_experts]; every member is aligned to the most used one of its group.
    weights [num_experts]: of the average; default: the frequency.
    Raises ValueError for other lengths (a layer is merged once), or a group without a member.
    """
    stacked = layer.experts.stacked()
    num_experts = len(layer.remap)
    if not num_experts == len(stacked.w1) == len(frequency) == len(groups):
        lengths = f"{len(stacked.w1)} experts, {len(frequency)} frequencies, {len(groups)} groups"
        raise ValueError(f"{lengths}; the router knows {num_experts}, and each needs one of all")
    if (groups.bincount() == 0).any():
        raise ValueError(f"groups {groups.tolist()}: one of them has no member")
    experts = [stacked.at(index) for index in range(len(groups))]
    for group in range(int(groups.max()) + 1) if align else ():
        members = (groups == group).nonzero()[:, 0].tolist()
        leader = max(members, key=frequency.tolist().__getitem__)
        for member in members:
            if member != leader:
                experts[member] = align_expert(experts[leader], experts[member])
    weights = frequency if weights is None else weights
    merged = stack(experts).each(lambda tensor: merge_experts(tensor, weights, groups))
    return layer.with_experts(DenseExperts(merged, layer.experts.act), groups)


# --------------------------------------------------------------------------------------------------
# Step F: recover by distillation
# --------------------------------------------------------------------------------------------------


def distillation_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """KL(softmax(teacher / T) || softmax(student / T)), a mean over positions; no factor T^2.

    Both [positions, classes]; no gradient goes to the teacher. The released code sums over
    positions and divides by sequences.
    """
    ours = (student.float() / temperature).log_softmax(dim=-1)
    wanted = (teacher.detach().float() / temperature).log_softmax(dim=-1)
    return F.kl_div(ours, wanted, reduction="batchmean", log_target=True)


# --------------------------------------------------------------------------------------------------
# Step G: W = U V + S, prune S neuron by neuron, store what is left
# --------------------------------------------------------------------------------------------------


def cubic_density(step: int, total: int, warmup: int, cooldown: int, final: float) -> float:
    """Share of S that is kept at a step: 1 while warming up, `final` at the end, a cubic between.

    The formula printed in the appendix subtracts the cool-down once too often; this is the released
    code's. Raises ValueError unless warmup + cooldown < total and final lies between 0 and 1.
    """
    if warmup < 0 or cooldown < 0 or warmup + cooldown >= total or not 0 <= final <= 1:
        given = f"total is {total}, warmup {warmup}, cooldown {cooldown}, final {final:g}"
        raise ValueError(f"{given}; needed: warmup + cooldown < total and 0 <= final <= 1")
    progress = (step - warmup) / (total - warmup - cooldown)
    progress = min(max(progress, 0.0), 1.0)
    return final + (1 - final) * (1 - progress) ** 3


def neuron_importance(s: Tensor, gradient: Tensor) -> Tensor:
    """[..., out]: mean of |s * ds| over the inputs of each output neuron; s [..., in, out].

    The paper adds up instead; the sum would favour neurons with more inputs, those of w2.
    """
    return (s * gradient).abs().mean(dim=-2)


def neurons_to_keep(
    scores: Sequence[Tensor], lengths: Sequence[int], density: float
) -> list[Tensor]:
    """Which neurons stay when the lowest of all matrices go until `density` of S is left.

    scores [..., out] of each matrix; lengths: the elements of one of its neurons. Returns a bool
    mask for each matrix. At least `density` of all elements stays, less than one neuron more.
    """
    flat = torch.cat([score.flatten() for score in scores])
    length = torch.cat([torch.full((score.numel(),), n) for score, n in zip(scores, lengths)])
    budget = math.floor((1 - density) * int(length.sum()) + 1e-6)  # elements that go
    order = flat.sort(stable=True).indices
    gone = length.to(flat.device)[order].cumsum(0) <= budget
    keep = torch.ones_like(flat, dtype=torch.bool)
    keep[order[gone]] = False
    masks = keep.split([score.numel() for score in scores])
    return [mask.view_as(score) for mask, score in zip(masks, scores)]


class LowRankSparseLinear(nn.Module):
    """y = x (U V + S) + bias, for one matrix or a stack of experts.

    weight [in, out] or [experts, in, out]: U, V are made of its largest singular vectors, S is the
    rest, so that it starts as the same function; all three are trained. `prune` zeroes output
    neurons of S; `compact` then stores only the others and skips the rest of the work.
    Raises ValueError for a rank outside 1 .. min(in, out).
    """

    def __init__(self, weight: Tensor, rank: int, bias: Tensor | None = None):
        if not 1 <= rank <= min(weight.shape[-2:]):
            allowed = f"1 to {min(weight.shape[-2:])} are allowed for {list(weight.shape)}"
            raise ValueError(f"rank is {rank}; {allowed}")
        super().__init__()
        weight = weight.detach() if weight.dim() == 3 else weight.detach()[None]
        precise = weight.float() if weight.dtype.itemsize < 4 else weight
        y, sigma, z = torch.linalg.svd(precise, full_matrices=False)
        root = sigma[:, :rank].sqrt()  # [experts, rank]
        self.u = nn.Parameter((y[:, :, :rank] * root[:, None]).to(weight.dtype))
        self.v = nn.Parameter((root[:, :, None] * z[:, :rank]).to(weight.dtype))
        self.s = nn.Parameter((weight - self.u @ self.v).detach())  # [experts, in, out]
        self.bias = None if bias is None else as_parameter(bias.view(len(weight), -1))
        score = torch.zeros(len(weight), weight.shape[2], device=weight.device)
        self.register_buffer("score", score)

    def observe(self, decay: float = 0.85) -> None:
        """Fold the gradient that S has now into the running importance of its neurons.

        Without the delay of one step in the released code; no gradient counts as 0.
        """
        gradient = torch.zeros_like(self.s) if self.s.grad is None else self.s.grad
        self.score.lerp_(neuron_importance(self.s.detach(), gradient).to(self.score), 1 - decay)

    @torch.no_grad()
    def prune(self, keep: Tensor) -> None:
        """Zero the neurons of S outside keep [experts, out]. Momentum revives them: do it again."""
        self.s.mul_(keep[:, None])

    @torch.no_grad()
    def compact(self) -> None:
        """Keep the non-zero neurons of S, one after the other, with their numbers."""
        kept = self.s.abs().sum(dim=1) > 0  # [experts, out]
        rows = self.s.transpose(1, 2)[kept]  # [kept neurons, in]
        self.store(rows.contiguous(), kept.nonzero()[:, 1].int(), kept.sum(dim=1).int())

    def store(self, rows: Tensor, neuron: Tensor, kept: Tensor) -> None:
        """rows [kept neurons, in], their numbers neuron [kept neurons], how many kept [experts]."""
        self.rows = nn.Parameter(rows)
        self.register_buffer("neuron", neuron)
        self.register_buffer("kept", kept)
        self.s, self.score = None, None

    def _load_from_state_dict(self, state: dict, prefix: str, *rest: Any) -> None:
        """torch calls this before it compares names: a compacted state fits a fresh layer, too."""
        names = [f"{prefix}{name}" for name in ("rows", "neuron", "kept")]
        if self.s is not None and all(name in state for name in names):
            rows, neuron, kept = (state[name] for name in names)
            fits = rows.shape == (len(neuron), self.u.shape[1]) and kept.sum() == len(neuron)
            if not fits or (neuron < 0).any() or (neuron >= self.v.shape[2]).any():
                raise ValueError(f"{prefix}rows, neuron and kept do not belong together")
            rows = torch.empty_like(rows, device=self.u.device, dtype=self.u.dtype)
            neuron = torch.empty_like(neuron, device=self.u.device)
            kept = torch.empty_like(kept, device=self.u.device)
            self.store(rows, neuron, kept)  # of this layer's kind; torch copies the values
        super()._load_from_state_dict(state, prefix, *rest)

    def dense(self) -> Tensor:
        """[experts, in, out]: U V + S as one matrix again, whatever is stored of S."""
        weight = (self.u @ self.v).detach()
        if self.s is not None:
            return weight + self.s.detach()
        expert = torch.arange(len(self.kept), device=weight.device).repeat_interleave(self.kept)
        weight[expert, :, self.neuron] += self.rows.detach()
        return weight

    def forward(self, x: Tensor, dispatch: kernels.Dispatch | None = None) -> Tensor:
        """x [..., in] of a single matrix, or rows grouped by expert with their dispatch."""
        if dispatch is None:
            if len(self.u) != 1:
                raise ValueError(f"{len(self.u)} experts need a dispatch")
            rows = x.reshape(-1, x.shape[-1])
            first = rows.new_zeros(len(rows), 1, dtype=torch.int32)
            y = self(rows, kernels.make_dispatch(first, 1))
            return y.view(*x.shape[:-1], self.v.shape[-1])
        low = kernels.grouped_mm(x, self.u, dispatch)  # [rows, rank]
        y = kernels.grouped_mm(low, self.v, dispatch, self.bias)
        if self.s is not None:
            return y + kernels.grouped_mm(x, self.s, dispatch)
        unused = len(x) - int(dispatch.offsets[-1])
        counts = [*dispatch.offsets.diff().tolist(), unused]
        stored = [*self.kept.tolist(), 0]
        parts = []
        for y_e, x_e, rows_e, neuron_e in zip(
            y.split(counts), x.split(counts), self.rows.split(stored), self.neuron.split(stored)
        ):  # of one expert each
            parts.append(y_e.index_add(1, neuron_e, x_e.to(y.dtype) @ rows_e.T.to(y.dtype)))
        return torch.cat(parts)


class LowRankExperts(nn.Module):
    """DenseExperts with both matrices as U V + S; w_gate counts as part of the first."""

    def __init__(self, dense: DenseExperts, rank: int):
        super().__init__()
        self.act, self.glu = dense.act, dense.glu
        self.up = LowRankSparseLinear(dense.w1, rank, dense.b1)
        self.down = LowRankSparseLinear(dense.w2, rank, dense.b2)

    def stacked(self) -> Expert:
        gate, w1 = self.up.dense().chunk(2, dim=-1) if self.glu else (None, self.up.dense())
        return Expert(w1, self.down.dense(), self.up.bias, self.down.bias, gate).each(Tensor.detach)

    def forward(self, tokens: Tensor, expert_index: Tensor, gates: Tensor) -> Tensor:
        dispatch = kernels.make_dispatch(expert_index, len(self.up.u))
        z = self.up(kernels.gather(tokens, dispatch), dispatch)
        gate, up = z.chunk(2, dim=-1) if self.glu else (z, 1.0)
        y = self.down(kernels.ACTIVATIONS[self.act](gate) * up, dispatch)
        return kernels.scatter(y, dispatch, gates)


def prune_step(linears: Sequence[LowRankSparseLinear], density: float) -> None:
    """After each optimizer step: the best `density` of S stays, ranked over all matrices."""
    for linear in linears:
        linear.observe()
    scores = [linear.score for linear in linears]
    lengths = [linear.s.shape[1] for linear in linears]
    for linear, keep in zip(linears, neurons_to_keep(scores, lengths, density)):
        linear.prune(keep)


def stable_rank(w: Tensor) -> Tensor:
    """[...]: squared Frobenius norm over squared spectral norm of w [..., rows, columns].

    0 for a zero matrix.
    """
    squared = torch.linalg.svdvals(w.double()).square()
    return squared.sum(dim=-1) / squared[..., 0].clamp(min=torch.finfo(torch.float64).tiny)


# --------------------------------------------------------------------------------------------------
# Baselines: other groups, and pruning
# --------------------------------------------------------------------------------------------------


def random_groups(num_experts: int, num_groups: int, generator: torch.Generator) -> Tensor:
    """groups [num_experts]: none empty, else random. What the paper's averaging starts from."""
    groups = torch.randint(num_groups, (num_experts,), generator=generator)
    first = torch.randperm(num_experts, generator=generator)[:num_groups]
    groups[first] = torch.arange(num_groups)
    return groups


def random_members(dominant: Tensor, generator: torch.Generator) -> Tensor:
    """groups [num_experts]: the method's dominant experts, the others at random."""
    num_groups = int(dominant.sum())
    groups = torch.randint(num_groups, dominant.shape, generator=generator)
    groups[dominant] = torch.arange(num_groups)
    return groups


def prune_layer(layer: SparseMoE, dominant: Tensor) -> SparseMoE:
    """The others are removed, their logits masked: their tokens go to the best survivor."""
    experts = DenseExperts(layer.experts.stacked().at(dominant), layer.experts.act)
    remap = (dominant.long().cumsum(0) - 1).clamp(min=0)
    return layer.with_experts(experts, remap, dominant)


# --------------------------------------------------------------------------------------------------
# Config
# --------------------------------------------------------------------------------------------------

Small, Full = Only(scale="small"), Only(scale="full")
Part = Annotated[float, common.Range(0, 1)]
Task = Literal[
    "sst2", "mrpc", "copa", "multirc", "wikiqa", "squad", "hotpotqa",  # Switch
    "winogrande",  # both
    "arc-c", "arc-e", "obqa", "siqa", "piqa", "hellaswag", "csqa",  # causal models
]  # fmt: skip


@dataclass(frozen=True)
class Config(common.Settings):
    num_experts: Annotated[Count, Small] = 16  # experts a layer; switch-base-32 has 32
    kept: Count | None = 4  # experts a layer after merging, on average; none: a quarter, as there
    skip: Whole = 1  # mixture layers at the input that are left alone; paper: 1
    calibration: Count = 256  # training sequences for the routing statistics; paper: 256
    alpha: NonNegative = 0.2  # weight of distillation; paper: 0.2
    temperature: Positive = 2.0  # of distillation; paper: 2
    rank: Count = 4  # of U V; paper: 32
    density: Share = 0.1  # share of S that is kept; paper: 0.1
    c_rank: Count = 2  # of C-SMoE at MC-SMoE's size; half of it runs too, and the better one counts
    warmup_share: Part = 0.04  # of the compression steps, before pruning; paper: 400 of 10,000
    cooldown_share: Part = 0.16  # of the compression steps, after it; paper: 1,600 of 10,000
    finetune_steps: Whole | None = 40  # of the full model on the target; none: the task's
    recover_steps: Whole | None = 60  # of every merged model; none: the task's
    compress_steps: Count = 80  # paper: 10,000
    lr: Positive | None = 2e-3  # peak, of fine-tuning, linear to 0; none: the task's
    recover_lr: Positive | None = 4e-3  # peak, of recovery; none: the task's
    compress_lr: Positive | None = 4e-3  # peak, of compression; none: the task's
    batch_size: Annotated[int, common.Range(3)] | None = 30  # sequences a step; none: the task's
    eval_sequences: Whole = 1024  # of the validation data; 0: all
    context: Count = 64  # bytes; full scale: most tokens of a sequence
    num_layers: Annotated[Count, Small] = 4  # transformer layers, each with a mixture
    d_model: Annotated[Count, Small] = 64  # width
    d_ff: Annotated[Count, Small] = 128  # hidden width of one expert
    num_heads: Annotated[Count, Small] = 4  # attention heads
    init: Annotated[Positive, Small] = 0.1  # deviation of initial weights outside the experts
    pretrain_steps: Annotated[Count, Small] = 500  # on all domains, routers trained
    pretrain_lr: Annotated[Positive, Small] = 3e-3  # peak, linear to 0
    balance: Annotated[Positive, Small] = 0.003  # weight of the balance loss while pre-training
    target: Annotated[Literal["python", "docs", "headers"], Small] = "headers"  # chosen on 100-102
    model: Annotated[str, Full] = ""  # folder of a checkpoint, or its name on the hub
    task: Annotated[Task | None, Full] = None  # what the checkpoint is for
    text: Annotated[str, Full] = ""  # causal models: your own text, a file or folder; no task then
    top_k: Annotated[Count | None, Full] = None  # experts a token picks; none: as it was trained


SMALL = Config()
FULL = replace(
    SMALL,
    kept=None,
    rank=32,
    c_rank=16,
    finetune_steps=None,
    recover_steps=None,
    compress_steps=10_000,
    lr=None,
    recover_lr=None,
    compress_lr=None,
    batch_size=None,
    eval_sequences=0,
    context=512,
    model="google/switch-base-32",
    task="sst2",
)
SWITCH_TASKS = {  # batch size, learning rate (README of the released code), epochs (ours)
    "sst2": (64, 1e-4, 3),
    "mrpc": (32, 5e-5, 10),
    "multirc": (32, 3e-5, 3),
    "copa": (8, 3e-5, 20),
    "winogrande": (32, 1e-5, 10),
    "wikiqa": (32, 5e-5, 3),
    "squad": (16, 5e-5, 3),
    "hotpotqa": (32, 1e-4, 3),
}
CAUSAL = {  # of causal models, ours: merged as they are
    "batch_size": 8,
    "finetune_steps": 0,
    "recover_steps": 200,
    **dict.fromkeys(("lr", "recover_lr", "compress_lr"), 1e-5),
}

# --------------------------------------------------------------------------------------------------
# The experiment: one fine-tuned mixture, merged in many ways at equal memory, in equal steps
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """How an arm merges; the defaults are M-SMoE."""

    groups: Literal["routed", "random members", "random"] = "routed"
    adaptive: bool = True  # one budget for all layers together; else the same for each
    align: bool = True
    weights: Literal["frequency", "uniform", "dominant alone"] = "frequency"
    prune: bool = False  # remove the others
    draws: int = 1  # of random groups; the loss is their mean


RECIPES = {  # each recovered by distillation, measured before and after
    "msmoe": Recipe(),
    "pruning": Recipe(prune=True),
    "averaging": Recipe("random", adaptive=False, align=False, weights="uniform", draws=3),
    "random_members": Recipe("random members", draws=3),
    "no_alignment": Recipe(align=False),
    "uniform_weights": Recipe(weights="uniform"),
    "redirect": Recipe(weights="dominant alone"),
    "uniform_budget": Recipe(adaptive=False),
}
SOURCES = {  # what an arm goes on from; the others from "full"
    "full": "pretrained",
    "mc": "msmoe",
    "c_equal_size": "full+steps",  # as many steps as MC-SMoE's
    "c_equal_rank": "full+steps",
}
METHODS = ["pretrained", "full", *RECIPES, "full+steps", "mc", "c_equal_size", "c_equal_rank"]
MERGED = [arm for arm in RECIPES if arm != "uniform_budget"]
DEFAULT = ["full", *MERGED, "msmoe@skip=0", "full+steps", "mc", "mc@skip=0"]
DEFAULT += ["c_equal_size", "c_equal_size@c_rank=1"]
MORE = ["uniform_budget", "c_equal_rank"]


def chain_of(arm: str, first: str) -> list[str]:
    """From `first` ("pretrained", or "full" of a checkpoint) to the arm: what goes on from what.

    Only MC-SMoE hands its settings on, to the merged model that it compresses.
    """
    method, at, settings = arm.partition("@")
    if method == first:
        return [arm]
    source = SOURCES.get(method, "full")
    return [*chain_of(f"{source}{at}{settings}" if source == "msmoe" else source, first), arm]


def moe_layers(model: nn.Module) -> dict[str, SparseMoE]:
    return {name: part for name, part in model.named_modules() if isinstance(part, SparseMoE)}


def make_task(job: Job, stage: int) -> Any:
    """The target task, see data/targets.py; `stage` numbers the streams, the same for every arm."""
    config = job.config
    run = job.run
    stream = 10 * job.seed + stage
    if run.scale == "small":
        corpus = text_data.load_domain(config.target)
        return targets.Windows(corpus.train, corpus.val, config, run.device, stream)
    folder = pretrained.locate(config.model, run.data_dir)
    if config.text:
        tokens = pretrained.text_tokens(folder, config.text)
        return targets.Windows(*tokens, config, run.device, stream)
    kind = targets.Prompts if pretrained.is_switch(folder) else targets.Letters
    return kind(folder, config, run.data_dir, run.device, stream)


@torch.no_grad()
def calibrate(model: nn.Module, task: Any) -> dict[str, Tensor]:
    """{layer: its router logits [tokens, num_experts] on the calibration data, without padding}."""
    layers = moe_layers(model.eval())
    met: dict[nn.Module, Tensor] = {}

    def keep(router: nn.Module, inputs: tuple, logits: Tensor) -> None:
        met[router] = logits

    hooks = [layer.router.register_forward_hook(keep) for layer in layers.values()]
    found: dict[str, list[Tensor]] = {name: [] for name in layers}
    for batch in task.calibration:
        task.outputs(model, batch)
        for name, layer in layers.items():
            mask, logits = task.token_mask(batch, name), met[layer.router].float()
            found[name].append(logits if mask is None else logits[mask.flatten()])
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(parts) for name, parts in found.items()}


def merge_model(
    model: nn.Module,
    recipe: Recipe,
    config: Config,
    logits: dict[str, Tensor],
    generator: torch.Generator,
) -> list[dict]:
    """Steps A to E in place, a layer after the other; what was done to each.

    So never more than one layer is there twice, however large the model is.
    """
    layers = dict(list(moe_layers(model).items())[config.skip :])
    use = {name: usage_frequency(logits[name], layer.top_k) for name, layer in layers.items()}
    frequency = torch.stack(list(use.values()))  # [layers, num_experts]
    dominant = select_dominant(frequency, config.kept * len(layers))
    if not recipe.adaptive:
        dominant = torch.cat([select_dominant(row[None], config.kept) for row in frequency])
    report = []
    for name, used, chosen in zip(list(layers), frequency, dominant):
        layer, device = layers.pop(name), frequency.device
        if recipe.groups == "random":
            groups = random_groups(len(chosen), config.kept, generator).to(device)
        elif recipe.groups == "random members":
            groups = random_members(chosen.cpu(), generator).to(device)
        else:
            groups = group_experts(logits[name], chosen)
        shares = {"uniform": torch.ones_like(used), "dominant alone": used * chosen}
        if recipe.prune:
            merged = prune_layer(layer, chosen)
        else:
            weights = shares.get(recipe.weights, used)
            merged = merge_layer(layer, used, groups, recipe.align, weights)
        model.set_submodule(name, merged)
        about = {"layer": name, "frequency": used.tolist(), "groups": groups.tolist()}
        about["dominant"] = chosen.nonzero()[:, 0].tolist()
        if recipe == Recipe():
            about["rank_falls"] = rank_falls(layer, merged, chosen, groups.bincount() > 1)
        report.append(about)
    return report


def rank_falls(
    before: SparseMoE, after: SparseMoE, dominant: Tensor, grown: Tensor
) -> dict[str, float]:
    """{matrix: by how many percent merging lowers its stable rank}, mean over groups that grew."""
    old, new = before.experts.stacked().at(dominant), after.experts.stacked()
    falls = {}
    for matrix in ("w1", "w2") if grown.any() else ():
        kept = stable_rank(getattr(old, matrix)[grown]).mean()
        merged = stable_rank(getattr(new, matrix)[grown]).mean()
        falls[matrix] = 100 * float(1 - merged / kept)
    return falls


def byte_lm(config: Config, seed: int, balance: float = 0.0) -> common.TransformerLM:
    """The small model; balance > 0 also makes its routers trainable."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, std: float) -> Tensor:
        return std * torch.randn(shape, generator=generator)

    def make_ffn(layer: int) -> SparseMoE:
        n = config.num_experts
        d = config.d_model
        f = config.d_ff
        w1 = normal(n, d, f, std=d**-0.5)
        w2 = normal(n, f, d, std=f**-0.5)
        experts = DenseExperts(Expert(w1, w2))
        return SparseMoE(normal(n, d, std=0.02), experts, balance=balance)

    return common.TransformerLM(
        256,
        config.num_layers,
        config.d_model,
        config.num_heads,
        config.context,
        make_ffn,
        norm="rms",
        conv=4,
        init=config.init,
        generator=generator,
    )


# --------------------------------------------------------------------------------------------------
# Checkpoints of transformers, files, and the way back
# --------------------------------------------------------------------------------------------------


def from_block(block: nn.Module) -> SparseMoE:
    """A mixture of a causal model of transformers, on the same memory. Raises ValueError."""
    read = mixtures.read_block(block)
    name = type(block).__name__
    if read.scoring != "softmax" or read.selection_bias is not None or read.scale != 1:
        raise ValueError(f"{name} does not route by the softmax alone; it cannot be merged here")
    if read.act not in kernels.ACTIVATIONS:
        raise ValueError(f"{name} has the activation {read.act}; the kernels do not")
    experts = DenseExperts.of_gated(read.gate_up_proj.transpose(1, 2), read.w2, read.act)
    shared = pretrained.shared_expert(read)
    rule = {"top_k": read.top_k, "normalize": read.normalize}
    return SparseMoE(read.router, experts, **rule, shared=shared)


def switch_layer(router_weight: Tensor, w1: Tensor, w2: Tensor, act: str, capacity: int):
    return SparseMoE(router_weight, DenseExperts(Expert(w1, w2), act), capacity=capacity)


def unmerged(config: Config, run: Run, seed: int, empty: bool = False) -> nn.Module:
    """The full model: the small one untrained, or the checkpoint; `empty`: on "meta"."""
    if run.scale == "small":
        return byte_lm(config, seed)
    folder = pretrained.locate(config.model, run.data_dir)
    model = pretrained.load_mixtures(folder, run.dtype, switch_layer, from_block, empty)
    for layer in moe_layers(model).values() if config.top_k else ():
        layer.top_k = config.top_k
    return model


def export_model(model: nn.Module, path: Path) -> int:
    """Every stored number once, and the activations. Returns the bytes on disk."""
    acts = {name: layer.experts.act for name, layer in moe_layers(model).items()}
    common.save(path, {"acts": acts, "weights": model.state_dict()})
    return path.stat().st_size


def fill(model: nn.Module, state: dict) -> nn.Module:
    """An unmerged model of the same shape, on "meta" or not, with what `export_model` wrote.

    Raises ValueError, or as torch does, for other names, shapes, dtypes or activations.
    """
    weights, dtype = state["weights"], next(model.parameters()).dtype
    for name, layer in moe_layers(model).items():
        act, remap = state["acts"][name], weights[f"{name}.remap"]
        if act != layer.experts.act or remap.min() < 0:
            raise ValueError(f"{name} has the activation {act}, its remap begins at {remap.min()}")
        stored = torch.zeros(int(remap.max()) + 1, dtype=torch.int64, device="meta")
        shapes = layer.experts.stacked().each(lambda tensor: tensor.to("meta"))
        layer.experts = DenseExperts(shapes.at(stored), act)
        if f"{name}.experts.up.u" in weights:
            rank = weights[f"{name}.experts.up.u"].shape[-1]
            layer.experts = LowRankExperts(layer.experts, rank)
    model.load_state_dict(weights, assign=True)  # refuses other names and shapes
    for name, parameter in model.named_parameters():
        if parameter.dtype != dtype:
            raise ValueError(f"{name} is {parameter.dtype}; {dtype} is needed")
    if hasattr(model, "tie_weights"):
        model.tie_weights()
    return model


def rebuild(job: Job, state: dict) -> nn.Module:
    return fill(unmerged(job.config, job.run, job.seed, empty=True), state)


def load_trained(path: str | Path) -> nn.Module:
    """The model of an arm, in eval mode, on the CPU: runs/mcsmoe-small/arms/msmoe-seed0.pt.

    One of --full is built by the configuration of its checkpoint, which must be where the run found
    it. Raises UsageError: see common.load_trained.
    """
    return common.load_trained(path, Config, rebuild)


@torch.no_grad()
def to_transformers(path: str | Path, folder: str | Path) -> None:
    """Write the model of an arm of --full as a checkpoint for plain transformers, at full size.

    Every member of a group gets the weights of its group, so that the logits are the same and other
    people's tools can judge them. This saves no memory. Raises ValueError for a pruned router, and
    for a Switch model with --top-k above 1.
    """
    model = load_trained(path)
    layers = moe_layers(model)
    if not all(layer.alive.all() for layer in layers.values()):
        raise ValueError(f"{path}: a pruned router masks logits, which no weights can say")

    def weights_of(name: str) -> tuple:
        layer = layers[name]
        full = layer.experts.stacked().at(layer.remap)  # every member with its group's weights
        return layer.router.weight, full.w1, full.w2, full.w_gate, layer.shared

    top_k = next(iter(layers.values())).top_k
    if hasattr(model.config, "num_experts_per_tok"):
        model.config.num_experts_per_tok = top_k
    elif top_k > 1:
        raise ValueError(f"{path}: a Switch model picks one expert a token, not {top_k}")
    pretrained.save_plain(model, list(layers), weights_of, folder)


# --------------------------------------------------------------------------------------------------
# Training and measuring the arms
# --------------------------------------------------------------------------------------------------


def straight(steps: int) -> Callable[[int], float]:
    """Section A1: 16 steps of warm-up, then a straight line to 0."""
    warmup = min(16, steps // 5)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 1 - min(1.0, (step - warmup) / max(1, steps - 1 - warmup))

    return factor


def fit(job: Job, model: nn.Module, loss_fn: Callable, steps: int, lr: float, **options) -> None:
    optimizer = common.adamw(model, lr, betas=(0.9, 0.98))
    for group in optimizer.param_groups:
        group["eps"] = 1e-6
    seconds = 60.0 if job.run.scale == "small" else 1800.0  # a checkpoint may have 24 GB
    options |= {"optimizer": optimizer, "schedule": straight(steps), "checkpoint_seconds": seconds}
    job.train(model, loss_fn, steps, **options)


def tune(
    job: Job,
    model: nn.Module,
    task: Any,
    steps: int,
    lr: float,
    teacher: nn.Module | None = None,
    on_step: Callable | None = None,
) -> None:
    """Step F: cross-entropy, plus distillation when there is a teacher. Routers are frozen."""
    config, dtype = job.config, next(model.parameters()).dtype
    model.float()  # AdamW's small steps would be lost in bf16

    def loss_fn(batch: Any, step: int) -> tuple[Tensor, dict]:
        logits, labels = task.outputs(model, batch)
        loss = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())
        if teacher is None:
            return loss, {}
        with torch.no_grad():
            wanted, _ = task.outputs(teacher, batch)
        known = labels >= 0
        distilled = distillation_loss(logits[known], wanted[known], config.temperature)
        values = {"cross_entropy": loss.detach(), "distillation": distilled.detach()}
        return loss + config.alpha * distilled, values

    fit(job, model, loss_fn, steps, lr, batches=task.train_batch, on_step=on_step)
    for parameter in model.parameters():  # not model.to(dtype): buffers, as the frequencies of
        parameter.data = parameter.data.to(dtype)  # rotary positions, stay as precise as they are


@torch.no_grad()
def evaluate(model: nn.Module, task: Any, run: Run) -> dict:
    """Loss in nats a token, means over tokens, then sequences; the task's metrics in percent."""
    model.eval()
    losses, answers = [], []
    with torch.autocast(run.device, dtype=run.dtype, enabled=run.dtype != torch.float32):
        for batch in task.validation:
            logits, labels = task.outputs(model, batch)
            flat = logits.float().flatten(0, 1)
            loss = F.cross_entropy(flat, labels.flatten(), reduction="none").view(labels.shape)
            losses.append(loss.sum(dim=1) / (labels >= 0).sum(dim=1))  # [batch]
            answers += task.answers(model, batch, logits)
    return {"loss": float(torch.cat(losses).double().mean()), **task.scores(answers)}


LARGE = 3_000_000_000  # parameters of a model of which no copy in float64 is made


@torch.no_grad()
def store(job: Job, model: nn.Module, task: Any) -> dict:
    """Export a model; how good it is, and what it costs."""
    found = evaluate(model, task, job.run) | {"parameters": common.count_parameters(model)}
    if not is_checkpoint(job):
        found["bytes"] = export_model(model, job.path(".pt"))
    if found["parameters"] < LARGE:
        counted, batch = copy.deepcopy(model).double(), task.validation[0]  # the counter sees all
        flops = common.count_flops(lambda: task.outputs(counted, batch))["Global"]
        found["flops"] = flops / len(task.outputs(model, batch)[1])  # a sequence
    return found


def load_model(job: Job, arm: str) -> nn.Module:
    """What another arm of the run left."""
    other = job.other(arm)
    if is_checkpoint(other):
        return job.prepare(unmerged(job.config, job.run, job.seed))
    return job.prepare(rebuild(other, common.load(other.path(".pt"))))


def is_checkpoint(job: Job) -> bool:
    """Nothing was tuned: the checkpoint itself is the full model."""
    is_full = job.run.scale == "full" and job.method == "full"
    return is_full and job.config.finetune_steps == 0


def source_of(job: Job) -> str:
    first = "pretrained" if job.run.scale == "small" else "full"
    return chain_of(job.arm, first)[-2]


def train_arm(job: Job) -> dict:
    """Every arm goes on from the files of another one."""
    stages = {"pretrained": pretrain, "full": finetune, "full+steps": train_on}
    return stages.get(job.method, merge if job.method in RECIPES else compress)(job)


def pretrain(job: Job) -> dict:
    """The small model on all domains at once, routers trained with the balance loss."""
    config, run = job.config, job.run
    corpora = [text_data.load_domain(name) for name in text_data.DOMAINS]
    model = job.prepare(byte_lm(config, job.seed, config.balance))

    def batches(step: int) -> Tensor:
        generator = torch.Generator().manual_seed(1_000_003 * (10 * job.seed) + step)
        share, length = config.batch_size // len(corpora), config.context + 1
        parts = []
        for corpus in corpora:
            parts.append(text_data.sample_windows(corpus.train, share, length, generator))
        return torch.cat(parts).to(run.device)

    def loss_fn(windows: Tensor, step: int) -> tuple[Tensor, dict]:
        loss = common.lm_loss(model, windows).mean()
        aux_loss = model.aux_loss()
        return loss + aux_loss, {"lm_loss": loss.detach(), "aux_loss": aux_loss.detach()}

    fit(job, model, loss_fn, config.pretrain_steps, config.pretrain_lr, batches=batches)
    return store(job, model, make_task(job, 1))


def finetune(job: Job) -> dict:
    """The full model on the target: the teacher, and what every other arm starts from."""
    config, task = job.config, make_task(job, 1)
    if job.run.scale == "full":
        model = job.prepare(unmerged(config, job.run, job.seed))
    else:
        model = load_model(job, "pretrained")
    if not is_checkpoint(job):
        tune(job, model, task, config.finetune_steps, config.lr)
    return store(job, model, task)


def train_on(job: Job) -> dict:
    """The full model for as many steps more as a merged one is recovered."""
    model, task = load_model(job, "full"), make_task(job, 3)
    tune(job, model, task, job.config.recover_steps, job.config.recover_lr)
    return store(job, model, task)


def merge(job: Job) -> dict:
    """Steps A to F: one recipe, measured at once and, where that is wanted, recovered."""
    config = job.config
    recipe = RECIPES[job.method]
    task = make_task(job, 2)
    model = load_model(job, "full")
    logits, at_once = calibrate(model, task), []
    for draw in reversed(range(recipe.draws)):  # the first one's model goes on
        if at_once:  # merging is in place
            model = load_model(job, "full")
        generator = torch.Generator().manual_seed(1000 * job.seed + draw)
        report = merge_model(model, recipe, config, logits, generator)
        at_once.append(evaluate(model, task, job.run))
    found = {"layers": report}
    for name in at_once[0]:
        found[f"{name} at once"] = float(np.mean([result[name] for result in at_once]))
    if config.recover_steps:
        teacher, task = load_model(job, "full").eval(), make_task(job, 3)
        tune(job, model, task, config.recover_steps, config.recover_lr, teacher)
    return found | store(job, model, task)


def sizes_of(layer: SparseMoE) -> tuple[int, int]:
    """Of one expert, both matrices: parameters of U and V per rank, and of W (or a full S)."""
    low_rank = dense = 0
    for matrix in (layer.experts.w1, layer.experts.w2):
        rows, columns = matrix.shape[1:]
        low_rank += rows + columns
        dense += rows * columns
    return low_rank, dense


def equal_density(config: Config, layer: SparseMoE) -> float:
    """The density at which all experts, of rank c_rank, are as large as MC-SMoE's `kept` ones."""
    low_rank, dense = sizes_of(layer)
    budget = config.kept * (config.rank * low_rank + config.density * dense) / len(layer.remap)
    density = (budget - config.c_rank * low_rank) / dense
    if density < 0:
        larger = "C-SMoE is larger than MC-SMoE even without S"
        raise ValueError(f"c_rank is {config.c_rank}: {larger}; lower it")
    return density


def density_at(config: Config, step: int, final: float) -> float:
    """The schedule at these settings."""
    steps = config.compress_steps
    warmup, cooldown = round(config.warmup_share * steps), round(config.cooldown_share * steps)
    return cubic_density(step, steps, warmup, cooldown, final)


def compress(job: Job) -> dict:
    """Step G: MC-SMoE from the recovered merge, C-SMoE from the unmerged model, its equal steps."""
    config, task = job.config, make_task(job, 4)
    model, teacher = load_model(job, source_of(job)), load_model(job, "full").eval()
    layers = list(moe_layers(model).values())[config.skip :]
    rank, density = config.rank, config.density
    if job.method == "c_equal_size":
        rank, density = config.c_rank, equal_density(config, layers[0])
    linears = []
    for layer in layers:
        layer.experts = LowRankExperts(layer.experts, rank)
        linears += [layer.experts.up, layer.experts.down]

    def on_step(step: int) -> None:
        prune_step(linears, density_at(config, step, density))

    tune(job, model, task, config.compress_steps, config.compress_lr, teacher, on_step)
    with torch.no_grad():
        for linear in linears:
            linear.compact()
        before, _ = task.outputs(model.eval(), task.validation[0])
        found = store(job, model, task) | {"rank": rank, "density": density}
        after, _ = task.outputs(load_model(job, job.arm).eval(), task.validation[0])
    return found | {"reload_change": float((after - before).abs().max())}


# --------------------------------------------------------------------------------------------------
# Claims: margins in nats of loss; with the task of a checkpoint in points of its first metric
# --------------------------------------------------------------------------------------------------

WORST_TASK = 94.50 / 95.75  # SST-2, table 2: what M-SMoE keeps of the full model's accuracy
PAPER_FLOPS = 0.176  # saved: (4.65 - 3.83) / 4.65 TFLOPs in table 2


def quality_of(config: Config) -> str:
    """The metric of the task that papers quote."""
    return tasks.PROMPTS[config.task].metrics[0] if config.task in tasks.PROMPTS else "accuracy"


def ahead(
    results: Results, config: Config, worse: str, better: str = "msmoe", when: str = ""
) -> np.ndarray:
    """[seeds]: how far one arm is ahead of another; when: "" after recovery, or " at once"."""
    if config.task is None or config.text:
        return results.ahead(worse, better, f"loss{when}")
    return results.ahead(better, worse, f"{quality_of(config)}{when}")


def told(config: Config, margins: dict[str, np.ndarray]) -> str:
    unit = "nats" if config.task is None or config.text else "points"
    return ", ".join(f"{show(margin)} {unit} {name}" for name, margin in margins.items())


def against(results: Results, config: Config, worse: str) -> Margin:
    """M-SMoE against another way to merge, right after it and, as in the paper, recovered.

    The smaller of the two leads is judged.
    """
    margins = {"at once": ahead(results, config, worse, when=" at once")}
    margins["after recovery"] = ahead(results, config, worse)
    text = f"better than {worse}: {told(config, margins)}"
    return Margin(min(margins.values(), key=np.mean), text, margins)


@claim("M-SMoE beats averaging experts of random groups, at once and after recovery",
       paper="MRPC 90.69 against 88.73, COPA 68 against 62", required=True)  # fmt: skip
def naive_merging_fails(results: Results, config: Config) -> Margin:
    return against(results, config, "averaging")


@claim("lining neurons up before merging helps, at once and after recovery",
       paper="MRPC 90.69 against 89.95", required=True)  # fmt: skip
def alignment(results: Results, config: Config) -> Margin:
    return against(results, config, "no_alignment")


@claim("weights by usage beat equal weights, at once and after recovery",
       paper="MRPC 90.69 against 89.95", required=True)  # fmt: skip
def frequency_weights(results: Results, config: Config) -> Margin:
    return against(results, config, "uniform_weights")


@claim("hints from the router: groups by its logits beat random members of the same kept experts, "
       "at once and after recovery", paper="MRPC 90.69 against 89.95", required=True)  # fmt: skip
def routing_groups(results: Results, config: Config) -> Margin:
    return against(results, config, "random_members")


@claim("merging adds to re-routing: it beats the kept experts with nothing merged into them, "
       "at once and after recovery", required=True)  # fmt: skip
def beats_redirect(results: Results, config: Config) -> Margin:
    return against(results, config, "redirect")


@claim("after a brief distillation the smaller model keeps 98.7 % of the full model's accuracy",
       paper="94.50 of 95.75, the worst of eight tasks (SST-2)", required=True)  # fmt: skip
def recovers(results: Results, config: Config) -> Margin:
    quality = quality_of(config)
    full, merged = results.of("full", quality), results.of("msmoe", quality)
    more = results.ahead("full+steps", "full", quality)
    text = f"{show(merged, 2)} % of {show(full, 2)} %; the full model gains {show(more, 2)} points "
    text += "from as many more steps"
    return Margin(merged - WORST_TASK * full, text, {"full": full, "merged": merged})


@claim("MC-SMoE beats C-SMoE (compression without merging) of equal size, by the better of two "
       "ranks", required=True)  # fmt: skip
def beats_c_smoe(results: Results, config: Config) -> Margin:
    ranks = ("c_equal_size", "c_equal_size@c_rank=1")
    best = min(ranks, key=lambda arm: results.of(arm, "loss").mean())
    margin = ahead(results, config, best, "mc")
    better = told(config, {"better": margin})
    return Margin(margin, f"{better} than rank {results[best][0]['rank']}")


@claim("merging beats pruning the same experts, at once and after recovery",
       paper="MRPC 90.69 against 88.97, COPA 68 against 63")  # fmt: skip
def beats_pruning(results: Results, config: Config) -> Margin:
    return against(results, config, "pruning")


@claim("MC-SMoE beats C-SMoE of equal rank, which is larger",
       paper="MRPC 89.22 against 88.97, SQuAD F1 85.30 against 84.93")  # fmt: skip
def beats_c_smoe_equal_rank(results: Results, config: Config) -> Margin:
    sizes = results.of("c_equal_rank", "parameters") / results.of("mc", "parameters")
    margin = ahead(results, config, "c_equal_rank", "mc")
    more = f"C-SMoE has {100 * (sizes.mean() - 1):.0f} % more parameters"
    return Margin(margin, f"{told(config, {'better': margin})}; {more}")


@claim("one budget for all layers beats the same in each, at once and after recovery",
       paper="MRPC 90.69 against 90.44")  # fmt: skip
def adaptive_budget(results: Results, config: Config) -> Margin:
    return against(results, config, "uniform_budget")


@claim("merged experts have a lower stable rank than the kept ones",
       paper="it falls in most layers (figure)")  # fmt: skip
def low_rank(results: Results, config: Config) -> Margin:
    """The matrix where it falls less, means over layers."""
    falls = {}
    for matrix in ("w1", "w2"):
        by_seed = []
        for result in results["msmoe"]:
            layers = [layer["rank_falls"] for layer in result["layers"] if layer["rank_falls"]]
            by_seed.append(np.mean([fall[matrix] for fall in layers]))
        falls[f"lower in {matrix}"] = np.array(by_seed)
    text = ", ".join(f"{show(fall, 1)} % {name}" for name, fall in falls.items())
    return Margin(min(falls.values(), key=np.mean), text, falls)


def saved(results: Results, arm: str, what: str) -> float:
    """Share of what the full model has; of the seed where it is least."""
    return float((1 - results.of(arm, what) / results.of("full", what)).min())


@check("all layers merged and compressed: 80 % less memory, counted and on disk (paper: 81 %)")
def memory(results: Results, config: Config) -> Check:
    shares = [saved(results, "mc@skip=0", what) for what in ("parameters", "bytes")]
    text = f"{100 * shares[0]:.1f} % of parameters, {100 * shares[1]:.1f} % of bytes on disk; "
    text += f"without the first layer {100 * saved(results, 'mc', 'parameters'):.1f} %"
    return Check(min(shares) >= 0.8, text)


@check("compression saves FLOPs (paper: 17.6 %), merging alone none")
def flops(results: Results, config: Config) -> Check:
    merged = saved(results, "msmoe@skip=0", "flops")
    compressed = saved(results, "mc@skip=0", "flops")
    text = f"{100 * compressed:.1f} % of all FLOPs, without the first layer "
    text += f"{100 * saved(results, 'mc', 'flops'):.1f} %; merging alone {100 * merged:.1f} %"
    return Check(abs(merged) < 0.01 and compressed >= PAPER_FLOPS, text)  # capacity drops a few


@check("a compacted export, loaded again, gives the same logits")
def export(results: Results, config: Config) -> Check:
    change = results.of("mc", "reload_change").max()
    return Check(change < 1e-4, f"they differ by {change:.1e} at most")


# --------------------------------------------------------------------------------------------------
# Tables, picture, main
# --------------------------------------------------------------------------------------------------


def ledger(model: nn.Module, config: Config) -> dict[str, int]:
    """Parameters before a run, by arithmetic; the paper's 2.0B, 733M and 381M of switch-base-32."""
    layers = list(moe_layers(model).values())
    num_experts = len(layers[0].remap)
    kept = config.kept or max(1, num_experts // 4)
    low_rank, expert = sizes_of(layers[0])
    small = round(config.rank * low_rank + config.density * expert)
    full, merged = common.count_parameters(model), len(layers) - config.skip
    rest = full - merged * num_experts * expert
    return {
        "full": full,
        "M-SMoE": rest + merged * kept * expert,
        "MC-SMoE": rest + merged * kept * small,
        "C-SMoE of equal rank": rest + merged * num_experts * small,
    }


def print_tables(results: Results, run: Run) -> None:
    columns = {}
    for name in ("loss", "accuracy", "f1", "exact_match"):
        title = "nats" if name == "loss" else f"{name.replace('_', ' ')} %"
        digits = 4 if name == "loss" else 2
        columns |= {f"{title} at once": (f"{name} at once", digits), title: (name, digits)}
    columns |= {"parameters": ("parameters", 0), "bytes on disk": ("bytes", 0)}
    columns["FLOPs a sequence"] = ("flops", 0)
    title = f"validation, {len(run.seeds)} seed(s): right after merging, and after recovery"
    run.table(title, *results.table(results, columns))
    if "msmoe" not in results:
        return
    rows = []
    for layer in results["msmoe"][0]["layers"]:
        use, parts = layer["frequency"], []
        for group, kept in enumerate(layer["dominant"]):
            members = [e for e, g in enumerate(layer["groups"]) if g == group and e != kept]
            joined = f"<-{','.join(map(str, members))}" if members else ""
            parts.append(f"{kept} ({100 * use[kept]:.0f} %){joined}")
        share = sum(use[kept] for kept in layer["dominant"])
        rows.append([layer["layer"], len(parts), f"{100 * share:.0f} %", "  ".join(parts)])
    header = ["layer", "kept", "their use", "kept (use)<-merged into it"]
    run.table(f"M-SMoE, seed {run.seed}: who was kept, who joined whom", header, rows)


def draw(results: Results, run: Run) -> None:
    merged = [arm for arm in RECIPES if arm in results]
    methods = ["full", "msmoe", "averaging", "pruning", "mc", "c_equal_size"]

    def damage(ax: Any) -> None:
        colors = {arm: common.color_of(arm, methods) for arm in merged if arm in methods}
        losses = {arm: results.of(arm, "loss at once") for arm in merged}
        common.dots(ax, losses, {arm: colors.get(arm, common.COLORS[7]) for arm in merged})
        title = "equal memory, merged in several ways"
        ax.set(xlabel="nats a byte, right after merging", title=title)

    def trade_off(ax: Any) -> None:
        for arm in results:
            method = arm.partition("@")[0]
            if method in methods:
                loss, size = results.of(arm, "loss"), results.of(arm, "parameters").mean() / 1e6
                half = common.half_width(loss) if len(loss) >= 3 else 0.0
                color = common.color_of(method, methods)
                ax.errorbar(size, loss.mean(), yerr=half, fmt="o", color=color)
                side, points = ("left", 6) if arm == method else ("right", -6)
                ax.annotate(arm, (size, loss.mean()), (points, 0), textcoords="offset points",
                            ha=side, va="center", color=color, fontsize=8)  # fmt: skip
        ax.margins(x=0.25)
        title = "quality against memory, after recovery"
        ax.set(xlabel="million parameters", ylabel="nats a byte", title=title)

    run.plot([damage, trade_off] if merged else [trade_off], width=6.0)


def settle(config: Config, run: Run) -> Config:
    """Of --full: find and read everything before hours are spent; fill in what the task decides."""
    folder = pretrained.locate(config.model, run.data_dir)
    is_switch = pretrained.is_switch(folder)
    allowed = list(SWITCH_TASKS) if is_switch else list(tasks.LETTER_TASKS)
    if config.text and not is_switch:
        run.data = {config.text: text_data.load_text(config.text).digest}
    elif config.text or config.task not in allowed:
        given = f"text {config.text}" if config.text else f"task {config.task}"
        others = f"--task {', '.join(allowed)}" + ("" if is_switch else ", or --text FILE")
        raise ValueError(f"{given} does not go with {config.model}; allowed: {others}")
    else:
        files = tasks.task_files(config.task, run.data_dir)
        run.data = {path.name: common.sha256(path)[:12] for path in files}
    own = dict(CAUSAL)
    if is_switch:
        batch_size, lr, epochs = SWITCH_TASKS[config.task]
        train, _ = tasks.load_prompts(config.task, run.data_dir)
        steps = epochs * math.ceil(len(train) / (config.batch_size or batch_size))
        own = {"batch_size": batch_size, "finetune_steps": steps, "recover_steps": (steps + 1) // 2}
        own |= dict.fromkeys(("lr", "recover_lr", "compress_lr"), lr)
    unset = {name: value for name, value in own.items() if getattr(config, name) is None}
    return replace(config, **unset)


def owner_of(setting: str, chain: Sequence[str], config: Config) -> str:
    """The arm whose model a setting decides, "" if any: an arm goes on from a model as it is."""
    shapes = ["num_experts", "num_layers", "d_model", "d_ff", "num_heads", "init"]
    if chain[0] == "pretrained":
        shapes.append("context")  # the number of learned positions; of a checkpoint only a cut
    if setting in [*shapes, "pretrain_steps", "pretrain_lr", "balance"]:
        return "pretrained"
    is_new = config.finetune_steps == 0 and "full+steps" not in chain  # the checkpoint, loaded anew
    if setting in ("lr", "finetune_steps") or (setting == "top_k" and not is_new):
        return "full"
    return ""


def check_arm(arm: str, first: str, config: Config, layers: Sequence[SparseMoE]) -> None:
    """Raises ValueError: what the model cannot do, or settings of the model the arm goes on from.

    They would change nothing, or only what load_trained builds.
    """
    method = arm.partition("@")[0]
    for name, value in common.settings_of(arm):
        owner = owner_of(name, chain_of(arm, first), config)
        if owner not in ("", method):
            reason = f"{name}={value} belongs to {owner}, from which all others start"
            raise ValueError(f"arm {arm}: {reason}; for all: {common.flag(name)} {value}")
    num_experts, shape = len(layers[0].remap), layers[0].experts.w2.shape[1:]
    if not config.skip < len(layers):
        there = f"the model has {len(layers)} mixture layers, one must be merged"
        raise ValueError(f"skip is {config.skip}; {there}")
    if config.kept > num_experts:
        raise ValueError(f"kept is {config.kept}; the model has {num_experts} experts a layer")
    if max(config.rank, config.c_rank) > min(shape):
        allowed = f"at most {min(shape)} is allowed"
        raise ValueError(f"rank is {config.rank}, c_rank {config.c_rank}; {allowed}")
    if method == "c_equal_size":
        equal_density(config, layers[0])
    density_at(config, 0, config.density)


def print_plan(config: Config, run: Run) -> None:
    """--full --dry-run: sizes, before anything is downloaded."""
    model = pretrained.nominal_mixtures(
        config.model, run.data_dir, run.dtype, switch_layer, from_block
    )
    rows = [[name, f"{count:,}"] for name, count in ledger(model, config).items()]
    full = common.count_parameters(model)
    rows.append(["bytes of GPU to merge it, fp32", f"{4 * full:,}"])
    rows.append(["to tune it: gradients, Adam, teacher", f"{20 * full:,} and activations"])
    run.table(f"{config.model}, parameters at these settings", ["", "by arithmetic"], rows)


def choose_arms(config: Config, run: Run, layers: Sequence[SparseMoE]) -> list[list[str]]:
    """Each arm of the run, behind those it goes on from."""
    if config.finetune_steps:
        chosen = run.choose(METHODS, default=DEFAULT, more=MORE)
    else:  # merged as it is
        half = f"full@top_k={max(1, layers[0].top_k // 2)}"
        chosen = run.choose(METHODS, default=["full", half, *MERGED], more=DEFAULT)
    first = "pretrained" if run.scale == "small" else "full"
    for arm in chosen:
        check_arm(arm, first, common.arm_config(config, arm), layers)
    return [chain_of(arm, first) for arm in chosen]


def steps_of(arm: str, config: Config) -> float:
    """About how many training steps an arm takes as long as; a teacher and pruning take time."""
    method = arm.partition("@")[0]
    if method in RECIPES:
        return 20 + 1.4 * config.recover_steps
    known = {"pretrained": config.pretrain_steps, "full": config.finetune_steps}
    return {**known, "full+steps": config.recover_steps}.get(method, 2 * config.compress_steps)


def main(config: Config, run: Run) -> Results:
    if run.device == "mps":
        lacks = "experts are merged in float64, which mps lacks"
        raise common.UsageError(f"{lacks}; use --device cpu or cuda")
    if run.scale == "full" and run.dry_run:
        print_plan(config, run)
        raise common.Planned
    if run.scale == "full":
        config = settle(config, run)
    else:
        corpora = [text_data.load_domain(name) for name in text_data.DOMAINS]
        run.data = {text.name: text.digest for text in corpora}
        for note in sorted({text.note for text in corpora if text.note}):
            common.say(note)
    model = unmerged(config, run, run.seed).to(run.device)
    layers = list(moe_layers(model).values())
    config = run.config = replace(config, kept=config.kept or max(1, len(layers[0].remap) // 4))
    chains = choose_arms(config, run, layers)
    arms = list(dict.fromkeys(arm for chain in chains for arm in chain))

    task = make_task(Job(run, arms[0], run.seed), 1)
    steps = sum(steps_of(arm, config) for arm in arms) * len(run.seeds)

    def step() -> None:
        with torch.set_grad_enabled(config.finetune_steps > 0):
            logits, _ = task.outputs(model, task.train_batch(0))
        if config.finetune_steps:
            logits.float().square().mean().backward()

    text = ", ".join(f"{name} {digest}" for name, digest in run.data.items())
    run.plan(text, model, step, steps)
    del layers
    model = None  # the arms need its memory
    results = Results()
    for depth in range(4):  # an arm after the one it goes on from
        ready = dict.fromkeys(chain[depth] for chain in chains if len(chain) > depth)
        results |= run.train_arms(train_arm, list(ready))
    results = Results({arm: results[arm] for arm in arms})
    print_tables(results, run)
    draw(results, run)
    return results


if __name__ == "__main__":
    common.run(main, SMALL, FULL)
