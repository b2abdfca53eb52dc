"""M-SMoE and MC-SMoE: merge the experts of a sparse mixture by hints from its router, then compress them.

Li, Zhang, Yadav, Sung, Cheng, Bansal, Chen, "Merge, Then Compress: Demystify Efficient SMoE with Hints from Its Routing
Policy" (ICLR 2024, arXiv 2310.01334).

A top-1 mixture keeps every expert in memory, though for one downstream task few of them matter. After fine-tuning on
the task, on a few hundred of its sequences:

  A  align      permute each expert's hidden neurons to match a reference: max_P <P, W1_r' W1_t + W2_r W2_t'>. Free:
                an expert computes the same whatever the order of its neurons
  B  count      how often each expert is picked; keep the raw router logits
  C  select     the most used experts of ALL layers together stay, at least one a layer: layers keep what they need
  D  merge      every other expert joins the kept one with the most similar logits; a group becomes its mean, weighted
                by use
  E  redirect   the router is not touched: a token that picks expert e goes to group remap[e], scaled by e's own score
  F  recover    a brief fine-tuning: cross-entropy + 0.2 KL(teacher || student), the teacher is the unmerged model
  G  compress   W = U V + S for each merged matrix; prune output neurons of S, all ranked together by |s ds|, while
                training; store only what is left

       picks of 8 experts      .41 .02 .22 .01 .05 .19 .03 .07
       kept                     *       *           *
       served by                0   0   2   5   2   5   0   2      3 experts stored, 8 router outputs as before

Run      python mcsmoe.py            one to two minutes on two cores, no download
         python mcsmoe.py --ablate   every arm of the paper's tables; --tune: the learning-rate grid; --arms NAME,...
         python mcsmoe.py --full     switch-base-32 on SST-2; --task mrpc, squad, ... (needs transformers, 80 GB of GPU)
You see  a byte model with 16 experts a layer, pre-trained on three kinds of text, fine-tuned on one, merged in a dozen
         ways at equal memory, recovered, compressed and exported; who was merged with whom; what the claims became.
Found    (seeds 0-2) M-SMoE loses far less than averaging or pruning right after merging, and recovers to the full
         model's accuracy in 60 steps; but the full model gains a point from as many steps. Alignment, weights by use
         and the choice of whom to keep matter; with WHOM the others are merged does not (random members do as well),
         nor does the adaptive budget, and after recovery the kept experts alone, nothing merged into them, are as good
         as M-SMoE. Fisher weights beat weights by use. C-SMoE of equal rank is larger and better, of equal size worse.
         Task-specific pruning, which cuts by use while it is distilled, is as weak as averaging.

Differences from the paper and its code
1. Experts are aligned to the most used one of their group, not to expert 0 of the layer (--align-to first).
2. Padding and dropped tokens count nowhere; exact top-k budget (a strict threshold in the released code loses ties).
3. Every arm has frozen routers and the same steps; in the released code the merging baselines train theirs. C-SMoE too
   starts from a model with as many steps as MC-SMoE's.
4. Importance of a pruned neuron is a mean, not a sum, of |s ds| (as in the code), without its delay of one step.
5. Git Re-basin, REPAIR and ZipIt as released: random groups, plain means. --ablate also gives them M-SMoE's groups.
   Task-specific pruning (Chen et al. 2022) cuts while it is distilled, in the same steps as everybody's recovery; dead
   experts are masked by addition (the released code multiplies their logits by the mask, which revives some).
6. Small scale: 4 layers, all with a mixture, pre-trained here for 500 steps. Full scale: 12 of 24 layers, Adam in fp32
   under bf16 autocast, short prompts of our own instead of promptsource's; answers in words (SQuAD, HotpotQA) are
   generated greedily, where the released evaluation feeds the right answer in. Metrics as the tasks' own scripts.
7. Left out: fairseq's 15B decoder.
For generation without retraining, later work (REAP) finds that pruning beats merging: this is for one task, recovered.

Break it yourself: --calibration 1 (statistics of one sequence); --target docs (do the groups still matter?);
--recover-steps 5 (is it recovery, or was nothing lost?).
"""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bridge as common
import kernels
from bridge import Claim, Run
from data import pretrained, tasks
from data import text as text_data

# ---------------------------------------------------------------------------------------------------------------
# Config
# ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    num_experts: int = 16  # experts a layer; switch-base-32 has 32 (full scale: read from the checkpoint)
    kept: int = 4  # experts a layer after merging, on average; paper: 8
    skip: int = 1  # mixture layers at the input that are left alone; paper: 1
    align_to: str = "dominant"  # dominant (of the group) or first (of the layer, the paper's); measured better
    similarity: str = "logits"  # logits (the paper), weight or output: by what experts are grouped
    calibration: int = 256  # training sequences for the routing statistics; paper: 256
    alpha: float = 0.2  # weight of distillation; paper: 0.2
    temperature: float = 2.0  # of distillation; paper: 2
    rank: int = 4  # of U V; paper: 32
    density: float = 0.1  # share of S that is kept; paper: 0.1
    c_rank: int = 2  # of C-SMoE at MC-SMoE's size; half of it runs too, and the better one counts
    warmup_share: float = 0.04  # of the compression steps, before pruning starts; paper: 400 of 10,000
    cooldown_share: float = 0.16  # of the compression steps, after it ends; paper: 1,600 of 10,000
    finetune_steps: int = 40  # of the full model on the target; 0: the task's
    recover_steps: int = 60  # of every merged model; 0: the task's
    compress_steps: int = 80  # paper: 10,000
    lr: float = 2e-3  # peak, of fine-tuning, linear to 0; best of LR_GRID on seeds 100-101; 0: the task's
    recover_lr: float = 4e-3  # peak, of recovery; best of LR_GRID for every merged arm on seeds 100-101; 0: the task's
    compress_lr: float = 4e-3  # peak, of compression; best of LR_GRID for MC-SMoE on seeds 100-101; 0: the task's
    batch_size: int = 30  # sequences a step; 0: the task's
    eval_sequences: int = 1024  # of the validation data; 0: all
    tune: bool = False  # only the learning-rate grid of the main arms, no claims
    context: int = 64  # bytes; full scale: most tokens of a prompt
    num_layers: int = 4  # transformer layers, each with a mixture
    d_model: int = 64  # width
    d_ff: int = 128  # hidden width of one expert
    num_heads: int = 4  # attention heads
    init: float = 0.1  # standard deviation of initial weights outside the experts
    pretrain_steps: int = 500  # on all domains, routers trained
    pretrain_lr: float = 3e-3  # peak, linear to 0
    balance: float = 0.003  # weight of the balance loss while pre-training
    target: str = "headers"  # domain to fine-tune on: python, docs or headers; chosen on seeds 100-102
    arms: tuple[str, ...] = ()  # only these, comma-separated, and what they start from; no claims then
    task: str = ""  # full scale: sst2, mrpc, copa, multirc, winogrande, wikiqa, squad or hotpotqa
    model: str = ""  # full scale: folder of a Switch checkpoint, or its name on the Hugging Face hub


SMALL = Config()
FULL = replace(
    SMALL, num_experts=32, kept=8, rank=32, c_rank=16, context=512, task="sst2", model="google/switch-base-32",
    finetune_steps=0, recover_steps=0, compress_steps=10_000, lr=0.0, recover_lr=0.0, compress_lr=0.0,
    batch_size=0, eval_sequences=0,
)  # fmt: skip
TASK_SETTINGS = {  # batch size, learning rate (README of the released code); epochs (ours, from the paper's grid)
    "sst2": (64, 1e-4, 3),
    "mrpc": (32, 5e-5, 10),
    "multirc": (32, 3e-5, 3),
    "copa": (8, 3e-5, 20),
    "winogrande": (32, 1e-5, 10),
    "wikiqa": (32, 5e-5, 3),
    "squad": (16, 5e-5, 3),
    "hotpotqa": (32, 1e-4, 3),
}

# ---------------------------------------------------------------------------------------------------------------
# The method, step A: line the neurons up
# ---------------------------------------------------------------------------------------------------------------


class Expert(NamedTuple):
    """act(x w1 + b1) w2 + b2, or with w_gate (act(x w_gate) * (x w1 + b1)) w2 + b2. Stacked: [experts, ...] each."""

    w1: Tensor  # [d_model, d_ff]
    w2: Tensor  # [d_ff, d_model]
    b1: Tensor | None = None  # [d_ff]
    b2: Tensor | None = None  # [d_model]
    w_gate: Tensor | None = None  # [d_model, d_ff]

    def each(self, function: Callable[[Tensor], Tensor]) -> "Expert":
        """function applied to every tensor that is there."""
        return Expert(*(None if tensor is None else function(tensor) for tensor in self))

    def at(self, index: Any) -> "Expert":
        """Of a stack: one expert, or a stack of some."""
        return self.each(lambda tensor: tensor[index])

    def hidden(self, x: Tensor, act: str = "relu") -> Tensor:
        """Hidden units of one expert. x [tokens, d_model] -> [tokens, d_ff]."""
        up = x @ self.w1 if self.b1 is None else x @ self.w1 + self.b1
        activation = kernels.ACTIVATIONS[act]
        return activation(up) if self.w_gate is None else activation(x @ self.w_gate) * up

    def forward(self, x: Tensor, act: str = "relu") -> Tensor:
        """One expert on x [tokens, d_model] -> the same shape."""
        y = self.hidden(x, act) @ self.w2
        return y if self.b2 is None else y + self.b2


def linear_assignment(gain: Tensor | np.ndarray) -> np.ndarray:
    """perm [n] int64 with the largest sum_i gain[i, perm[i]]. Exact; SciPy's solver if installed, else the one below.

    Raises ValueError unless gain is a square matrix of finite numbers.
    """
    gain = np.asarray(gain, dtype=np.float64)
    if gain.ndim != 2 or gain.shape[0] != gain.shape[1] or not gain.size or not np.isfinite(gain).all():
        raise ValueError(f"gain has shape {gain.shape}; a square matrix of finite numbers is needed")
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError:
        return shortest_augmenting_paths(-gain)
    return linear_sum_assignment(gain, maximize=True)[1].astype(np.int64)


def shortest_augmenting_paths(cost: np.ndarray) -> np.ndarray:
    """The Hungarian method with potentials, one row at a time: perm [n] with the least sum_i cost[i, perm[i]].

    Column 0 is a fiction where every search starts; u and v stay feasible: cost - u - v >= 0, and 0 where matched.
    """
    n = len(cost)
    u, v, row_of = np.zeros(n + 1), np.zeros(n + 1), np.zeros(n + 1, dtype=np.int64)
    for row in range(1, n + 1):
        row_of[0], column = row, 0
        slack, came_from, seen = np.full(n + 1, np.inf), np.zeros(n + 1, dtype=np.int64), np.zeros(n + 1, dtype=bool)
        while row_of[column]:  # Dijkstra until a free column
            seen[column] = True
            reduced = cost[row_of[column] - 1] - u[row_of[column]] - v[1:]
            closer = np.flatnonzero(~seen[1:] & (reduced < slack[1:])) + 1
            slack[closer], came_from[closer] = reduced[closer - 1], column
            column = int(np.where(seen, np.inf, slack).argmin())
            step = slack[column]
            u[row_of[seen]] += step
            v[seen] -= step
            slack[~seen] -= step
        while column:  # turn the path round
            row_of[column], column = row_of[came_from[column]], came_from[column]
    perm = np.empty(n, dtype=np.int64)
    perm[row_of[1:] - 1] = np.arange(n)
    return perm


def neuron_gain(reference: Expert, target: Expert) -> Tensor:
    """[d_ff, d_ff] float64: inner products of all that belongs to a neuron, reference's in rows, target's in columns.

    Permuting neurons changes no norm, so the largest total gain is the smallest distance between the two experts.
    """
    (w1, w2, b1, _, gate), (w1_t, w2_t, b1_t, _, gate_t) = (e.each(Tensor.double) for e in (reference, target))
    gain = w1.T @ w1_t + w2 @ w2_t.T
    gain = gain if b1 is None else gain + torch.outer(b1, b1_t)
    return gain if gate is None else gain + gate.T @ gate_t


def permute_neurons(expert: Expert, perm: Tensor | np.ndarray) -> Expert:
    """Neuron i becomes the old neuron perm[i]. The function of the expert stays what it was; b2 has no neurons."""
    w1, w2, b1, b2, gate = expert
    perm = torch.as_tensor(perm, device=w1.device)
    columns = lambda w: None if w is None else w[..., perm]
    return Expert(columns(w1), w2[perm], columns(b1), b2, columns(gate))


def align_expert(reference: Expert, target: Expert) -> Expert:
    """target with its hidden neurons in the order that is nearest to reference. Algorithm 1, weight matching."""
    return permute_neurons(target, linear_assignment(neuron_gain(reference, target).cpu()))


# ---------------------------------------------------------------------------------------------------------------
# Steps B and C: who is used, who is like whom, who stays
# ---------------------------------------------------------------------------------------------------------------


def usage_frequency(router_logits: Tensor, top_k: int = 1, token_mask: Tensor | None = None) -> Tensor:
    """[num_experts] float64: share of the selections each expert gets; sums to 1.

    router_logits [tokens, num_experts], raw; token_mask [tokens] bool, False marks padding (which the released code
    counts, as it counts tokens dropped by capacity for expert 0).
    """
    logits = router_logits if token_mask is None else router_logits[token_mask]
    counts = torch.bincount(logits.topk(top_k, dim=-1).indices.flatten(), minlength=logits.shape[-1]).double()
    return counts / counts.sum().clamp(min=1)


def select_dominant(frequency: Tensor, num_kept: int) -> Tensor:
    """[layers, num_experts] bool: num_kept dominant experts in all layers together, at least one in each.

    frequency [layers, num_experts], normalised in each layer. The most used expert of every layer is in; the other
    places go by frequency over all layers, so that a layer with even routing keeps many and a skewed one few; ties by
    layer and index. More than there are keeps all. Raises ValueError when num_kept is below the number of layers.
    """
    layers, num_experts = frequency.shape
    if num_kept < layers:
        raise ValueError(f"num_kept is {num_kept}, fewer than one expert in each of {layers} layers")
    first = F.one_hot(frequency.argmax(dim=1), num_experts).bool()
    order = torch.where(first, math.inf, frequency).flatten().sort(descending=True, stable=True).indices
    dominant = torch.zeros_like(first).flatten()
    dominant[order[:num_kept]] = True
    return dominant.view(layers, num_experts)


def group_experts(router_logits: Tensor, dominant: Tensor) -> Tensor:
    """groups [num_experts] int64: every expert joins the dominant one with the most similar router logits (eq. 1).

    router_logits [tokens, num_experts], raw; dominant [num_experts] bool. Group g is that of the g-th dominant expert.
    """
    return group_by_similarity(router_logits.T, dominant)


def group_by_similarity(features: Tensor, dominant: Tensor) -> Tensor:
    """The same by the cosine of any features [num_experts, anything]. Raises ValueError without a dominant expert."""
    if not dominant.any():
        raise ValueError(f"none of the {len(dominant)} experts is dominant")
    unit = F.normalize(features.double(), dim=1)
    groups = (unit @ unit[dominant].T).argmax(dim=1)
    groups[dominant] = torch.arange(int(dominant.sum()), device=groups.device)  # never merged with each other
    return groups


# ---------------------------------------------------------------------------------------------------------------
# Steps D and E: merge, and redirect the router
# ---------------------------------------------------------------------------------------------------------------


def merge_experts(weights: Tensor, frequency: Tensor, groups: Tensor) -> Tensor:
    """[num_groups, ...]: the mean of every group, weighted by frequency (eq. 2). A group of one stays, bit for bit.

    weights [num_experts, ...], aligned; frequency [num_experts], or element by element like weights (Fisher);
    groups [num_experts] with every number from 0 to num_groups - 1. Where a group's frequencies are all 0 its plain
    mean is taken. Raises ValueError for a group without a member.
    """
    merged = []
    for group in range(int(groups.max()) + 1):
        members = (groups == group).nonzero()[:, 0]
        if len(members) == 0:
            raise ValueError(f"group {group} of {groups.tolist()} has no member")
        share = frequency[members].double()
        share = share.view(*share.shape, *[1] * (weights.dim() - share.dim()))
        total = share.sum(dim=0)
        share = torch.where(total > 0, share / torch.where(total > 0, total, 1.0), 1 / len(members))
        merged.append((share * weights[members].double()).sum(dim=0).to(weights.dtype))
    return torch.stack(merged)


class DenseExperts(nn.Module):
    """Stacked experts. (tokens [tokens, d_model], expert_index, gates [tokens, top_k]) -> [tokens, d_model]."""

    def __init__(self, experts: Expert, act: str = "relu"):
        if experts.w_gate is not None and experts.b1 is not None:
            raise ValueError("an expert has w_gate and b1; biased gated experts are not supported")
        super().__init__()
        self.act, self.glu, self.backend = act, experts.w_gate is not None, "auto"
        w1 = torch.cat([experts.w_gate, experts.w1], dim=-1) if self.glu else experts.w1  # columns gate | up
        for name, tensor in {"w1": w1, "w2": experts.w2, "b1": experts.b1, "b2": experts.b2}.items():
            self.register_parameter(name, None if tensor is None else nn.Parameter(tensor.detach().clone()))

    def stacked(self, read: Callable[[Tensor], Tensor] = Tensor.detach) -> Expert:
        """What `read` makes of the parameters, as views where it can be."""
        w1, w2, b1, b2 = (None if p is None else read(p) for p in (self.w1, self.w2, self.b1, self.b2))
        gate, w1 = w1.chunk(2, dim=-1) if self.glu else (None, w1)
        return Expert(w1, w2, b1, b2, gate)

    def forward(self, tokens: Tensor, expert_index: Tensor, gates: Tensor) -> Tensor:
        options = {"b1": self.b1, "b2": self.b2, "act": self.act, "glu": self.glu, "backend": self.backend}
        return kernels.moe_mlp(tokens, expert_index, gates, self.w1, self.w2, **options)


class SparseMoE(nn.Module):
    """A mixture whose router knows num_experts experts, though fewer may be stored. x [..., time, d_model] -> same.

    The router and its scores stay as they were trained: a token that picks expert e is served by experts[remap[e]] and
    scaled by the probability of e itself (sections A1.2, A3). So merging saves memory, not work.

    router_weight [num_experts, d_model]; experts: DenseExperts or LowRankExperts; remap [num_experts] int64, default
    identity; alive [num_experts] bool: the rest get no token, their logits are masked before the softmax (pruning);
    normalize: the top_k scores of a token are made to sum to 1 (Mixtral); capacity: tokens of one sequence beyond it
    get a zero output (Switch). With balance > 0 a training forward leaves balance * num_experts * sum_e f_e P_e in
    `aux_loss`, and the router is trained.
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
    ):
        super().__init__()
        num_experts, d_model = router_weight.shape
        if not 1 <= top_k <= num_experts:
            raise ValueError(f"top_k is {top_k}; 1 to {num_experts} are allowed")
        self.top_k, self.normalize, self.capacity, self.balance = top_k, normalize, capacity, balance
        self.aux_loss: Tensor | None = None
        self.router = nn.Linear(d_model, num_experts, bias=False, device="meta")
        self.router.weight = nn.Parameter(router_weight.detach().clone(), requires_grad=balance > 0)
        self.experts = experts
        everyone = torch.ones(num_experts, dtype=torch.bool, device=router_weight.device)
        self.register_buffer("alive", everyone if alive is None else alive)
        self.register_buffer("remap", everyone.long().cumsum(0) - 1 if remap is None else remap)

    def __getstate__(self) -> dict:
        """For copy.deepcopy and pickle: an auxiliary loss belongs to a forward pass, and cannot be copied."""
        return {**self.__dict__, "aux_loss": None}

    def with_experts(self, experts: nn.Module, remap: Tensor, alive: Tensor | None = None) -> "SparseMoE":
        """The same router over other experts."""
        return SparseMoE(self.router.weight, experts, remap, alive, self.top_k, self.normalize, self.capacity)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, x.shape[-1])  # [tokens, d_model]
        with torch.autocast(x.device.type, enabled=False):  # routing stays in full precision under bf16
            router_logits = self.router(tokens.to(self.router.weight.dtype))  # [tokens, num_experts]
            router_probs = router_logits.masked_fill(~self.alive, -1e6).softmax(dim=-1)
        gates, expert_index = router_probs.topk(self.top_k, dim=-1)  # [tokens, top_k]
        gates = gates / gates.sum(dim=-1, keepdim=True) if self.normalize else gates
        if self.balance > 0 and self.training:
            num_experts = len(self.remap)
            share = F.one_hot(expert_index, num_experts).sum(1).to(router_probs).mean(0)  # [num_experts]
            self.aux_loss = self.balance * num_experts * (share * router_probs.mean(0)).sum() / self.top_k
            if not len(tokens):  # a mean over none is NaN
                self.aux_loss = router_probs.sum()
        if self.capacity is not None:
            expert_index = drop_overflow(expert_index.view(*x.shape[:-1], self.top_k), len(self.remap), self.capacity)
        index = torch.where(expert_index < 0, expert_index, self.remap[expert_index.clamp(min=0)])
        return self.experts(tokens, index, gates).view_as(x).to(x.dtype)


def drop_overflow(expert_index: Tensor, num_experts: int, capacity: int) -> Tensor:
    """[tokens, top_k]: -1 for the picks of a sequence beyond the capacity of their expert, first come first served.

    expert_index [..., time, top_k]; experts are the original ones: capacity is part of how the model was trained.
    """
    place = F.one_hot(expert_index, num_experts).sum(dim=-2).cumsum(dim=-2).gather(-1, expert_index)  # 1, 2, ...
    return torch.where(place <= capacity, expert_index, -1).flatten(0, -2)


# ---------------------------------------------------------------------------------------------------------------
# Step F: recover by distillation
# ---------------------------------------------------------------------------------------------------------------


def distillation_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """KL(softmax(teacher / T) || softmax(student / T)), mean over positions; no factor T^2, no gradient to the teacher.

    Both [positions, classes]. The released code sums over positions and divides by sequences.
    """
    log_probs = [(logits.float() / temperature).log_softmax(dim=-1) for logits in (student, teacher.detach())]
    return F.kl_div(*log_probs, reduction="batchmean", log_target=True)


# ---------------------------------------------------------------------------------------------------------------
# Step G: W = U V + S, prune S neuron by neuron, store what is left
# ---------------------------------------------------------------------------------------------------------------


def cubic_density(step: int, total: int, warmup: int, cooldown: int, final: float) -> float:
    """Share of S that is kept at a step: 1 for `warmup` steps, `final` in the last `cooldown`, a cubic in between.

    The formula printed in the appendix subtracts the cool-down once too often; this is the released code's.
    Raises ValueError unless warmup + cooldown < total and final lies between 0 and 1.
    """
    if warmup < 0 or cooldown < 0 or warmup + cooldown >= total or not 0 <= final <= 1:
        raise ValueError(
            f"total is {total}, warmup {warmup}, cooldown {cooldown}, final {final:g}; "
            f"needed: warmup + cooldown < total and 0 <= final <= 1"
        )
    progress = min(max((step - warmup) / (total - warmup - cooldown), 0.0), 1.0)
    return final + (1 - final) * (1 - progress) ** 3


def neuron_importance(s: Tensor, gradient: Tensor) -> Tensor:
    """[..., out]: mean of |s * ds| over the inputs of each output neuron; s [..., in, out].

    The paper adds up instead; the sum would favour the neurons with more inputs, those of w2.
    """
    return (s * gradient).abs().mean(dim=-2)


def neurons_to_keep(scores: Sequence[Tensor], lengths: Sequence[int], density: float) -> list[Tensor]:
    """Which neurons stay when the lowest of all matrices go until only `density` of all elements is left.

    scores: [..., out] of each matrix; lengths: elements of one of its neurons. Returns a bool mask for each matrix. At
    least `density` is kept, and less than one neuron more.
    """
    flat = torch.cat([score.flatten() for score in scores])
    length = torch.cat([torch.full((score.numel(),), n) for score, n in zip(scores, lengths)])
    budget = math.floor((1 - density) * int(length.sum()) + 1e-6)  # elements that go; whole numbers stay exact
    order = flat.sort(stable=True).indices
    gone = length.to(flat.device)[order].cumsum(0) <= budget
    keep = torch.ones_like(flat, dtype=torch.bool)
    keep[order[gone]] = False
    return [mask.view_as(score) for mask, score in zip(keep.split([s.numel() for s in scores]), scores)]


class LowRankSparseLinear(nn.Module):
    """y = x (U V + S) + bias, for one matrix or a stack of experts. Starts equal to `weight`, all of it trained.

    weight [in, out] or [experts, in, out]; U, V from the singular vectors, S the rest. `prune` zeroes output neurons
    of S; `compact` then stores only the others, end to end, and skips the rest of the work.
    Raises ValueError for a rank outside 1 .. min(in, out).
    """

    def __init__(self, weight: Tensor, rank: int, bias: Tensor | None = None):
        if not 1 <= rank <= min(weight.shape[-2:]):
            raise ValueError(f"rank is {rank}; 1 to {min(weight.shape[-2:])} are allowed for {list(weight.shape)}")
        super().__init__()
        weight = weight.detach() if weight.dim() == 3 else weight.detach()[None]
        y, sigma, z = torch.linalg.svd(weight.float() if weight.dtype.itemsize < 4 else weight, full_matrices=False)
        root = sigma[:, :rank].sqrt()
        self.u = nn.Parameter((y[:, :, :rank] * root[:, None]).to(weight.dtype))  # [experts, in, rank]
        self.v = nn.Parameter((root[:, :, None] * z[:, :rank]).to(weight.dtype))  # [experts, rank, out]
        self.s = nn.Parameter((weight - self.u @ self.v).detach())  # [experts, in, out]
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone().view(len(weight), -1))
        self.register_buffer("score", torch.zeros(len(weight), weight.shape[2], device=weight.device))

    def observe(self, decay: float = 0.85) -> None:
        """Fold the gradient that S has now into the running importance of its neurons. Not delayed by one step, as in
        the released code. A neuron that gets no gradient counts as 0."""
        gradient = torch.zeros_like(self.s) if self.s.grad is None else self.s.grad
        self.score.lerp_(neuron_importance(self.s.detach(), gradient).to(self.score), 1 - decay)

    @torch.no_grad()
    def prune(self, keep: Tensor) -> None:
        """Zero the neurons of S outside keep [experts, out]; again after every step, since momentum revives them."""
        self.s.mul_(keep[:, None])

    @torch.no_grad()
    def compact(self) -> None:
        """Keep the non-zero neurons of S, one after the other, with their numbers."""
        kept = self.s.abs().sum(dim=1) > 0  # [experts, out]
        self.rows = nn.Parameter(self.s.transpose(1, 2)[kept].contiguous())  # [kept neurons, in]
        self.register_buffer("neuron", kept.nonzero()[:, 1].int())  # [kept neurons]
        self.register_buffer("kept", kept.sum(dim=1).int())  # [experts]
        self.s, self.score = None, None

    def forward(self, x: Tensor, dispatch: kernels.Dispatch | None = None) -> Tensor:
        """x [..., in] for a single matrix, or rows grouped by expert with their dispatch -> [..., out]."""
        if dispatch is None:
            if len(self.u) != 1:
                raise ValueError(f"{len(self.u)} experts need a dispatch")
            rows = x.reshape(-1, x.shape[-1])
            dispatch = kernels.make_dispatch(rows.new_zeros(len(rows), 1, dtype=torch.int32), 1)
            return self(rows, dispatch).view(*x.shape[:-1], self.v.shape[-1])
        y = kernels.grouped_mm(kernels.grouped_mm(x, self.u, dispatch), self.v, dispatch, self.bias)
        if self.s is not None:
            return y + kernels.grouped_mm(x, self.s, dispatch)
        counts = [*dispatch.offsets.diff().tolist(), len(x) - int(dispatch.offsets[-1])]  # the last: unused rows
        stored = [*self.kept.tolist(), 0]
        parts = zip(y.split(counts), x.split(counts), self.rows.split(stored), self.neuron.split(stored))
        return torch.cat([low.index_add(1, at, x.to(y.dtype) @ rows.T.to(y.dtype)) for low, x, rows, at in parts])


class LowRankExperts(nn.Module):
    """DenseExperts with both matrices as U V + S; w_gate counts as part of the first."""

    def __init__(self, dense: DenseExperts, rank: int):
        super().__init__()
        self.act, self.glu = dense.act, dense.glu
        self.up = LowRankSparseLinear(dense.w1, rank, dense.b1)
        self.down = LowRankSparseLinear(dense.w2, rank, dense.b2)

    def forward(self, tokens: Tensor, expert_index: Tensor, gates: Tensor) -> Tensor:
        dispatch = kernels.make_dispatch(expert_index, len(self.up.u))
        z = self.up(kernels.gather(tokens, dispatch), dispatch)
        gate, up = z.chunk(2, dim=-1) if self.glu else (z, 1.0)
        y = self.down(kernels.ACTIVATIONS[self.act](gate) * up, dispatch)
        return kernels.scatter(y, dispatch, gates)


def stable_rank(w: Tensor) -> Tensor:
    """[...]: squared Frobenius norm over squared spectral norm of w [..., rows, columns]; 0 for a zero matrix."""
    squared = torch.linalg.svdvals(w.double()).square()
    return squared.sum(dim=-1) / squared[..., 0].clamp(min=torch.finfo(torch.float64).tiny)


# ---------------------------------------------------------------------------------------------------------------
# Baselines and controls: other groups, other ways to line up, other ways to merge
# ---------------------------------------------------------------------------------------------------------------


def surviving_experts(usage: Tensor, alive: Tensor, num_kept: int, last: bool, threshold: float = 0.1) -> Tensor:
    """[num_experts] bool: one cut of task-specific pruning (Chen et al. 2022), made several times while fine-tuning.

    usage [num_experts], smoothed over steps; alive [num_experts] bool. Of those alive, the ones stay whose share is at
    least threshold / number alive; at the last cut, and where too few would be left, the num_kept most used.
    """
    share = torch.where(alive, usage, 0.0)
    keep = alive & (share / share.sum() >= threshold / alive.sum())
    if last or keep.sum() < num_kept:
        order = torch.where(alive, usage, -1.0).sort(descending=True, stable=True).indices
        keep = torch.zeros_like(alive)
        keep[order[:num_kept]] = True
    return keep


def random_groups(num_experts: int, num_groups: int, generator: torch.Generator) -> Tensor:
    """groups [num_experts]: none empty, otherwise at random. What the paper's merging baselines start from."""
    groups = torch.randint(num_groups, (num_experts,), generator=generator)
    groups[torch.randperm(num_experts, generator=generator)[:num_groups]] = torch.arange(num_groups)
    return groups


def random_members(dominant: Tensor, generator: torch.Generator) -> Tensor:
    """groups [num_experts]: the dominant experts of the method, every other expert with one of them at random."""
    groups = torch.randint(int(dominant.sum()), dominant.shape, generator=generator)
    groups[dominant] = torch.arange(int(dominant.sum()))
    return groups


def activation_gain(reference: Expert, target: Expert, x: Tensor, act: str = "relu") -> Tensor:
    """[d_ff, d_ff]: correlation of hidden units on x [tokens, d_model] (REPAIR as released); identity below two tokens.

    REPAIR proper also corrects the statistics after merging; neither the released code nor this does.
    """
    if len(x) < 2:
        return torch.eye(reference.w1.shape[1], dtype=torch.float64)
    a, b = (F.normalize(h - h.mean(dim=0), dim=0) for h in (e.hidden(x, act).double() for e in (reference, target)))
    return a.T @ b


def zip_neurons(correlation: np.ndarray, num_kept: int) -> np.ndarray:
    """ZipIt: labels [neurons] of num_kept clusters. Join the best correlated pair, again and again.

    correlation [neurons, neurons]. A joined pair counts, towards others, as 0.1 times the lower of its correlations.
    """
    corr, members = correlation.copy(), {i: [i] for i in range(len(correlation))}
    np.fill_diagonal(corr, -np.inf)
    best, where = corr.max(axis=1), corr.argmax(axis=1)
    for _ in range(len(corr) - num_kept):
        i = int(best.argmax())
        i, j = sorted((i, int(where[i])))
        members[i] += members.pop(j)
        row = 0.1 * np.minimum(corr[i], corr[j])
        corr[i], corr[:, i], corr[i, i] = row, row, -np.inf
        corr[j], corr[:, j] = -np.inf, -np.inf
        stale = np.isin(where, (i, j))
        stale[[i, j]] = True
        better = row > best
        best[better], where[better] = row[better], i
        best[stale], where[stale] = corr[stale].max(axis=1), corr[stale].argmax(axis=1)
    labels = np.empty(len(corr), dtype=np.int64)
    for label, group in enumerate(members.values()):
        labels[group] = label
    return labels


def zip_experts(experts: Sequence[Expert], x: Tensor, act: str = "relu") -> Expert:
    """ZipIt as released: the neurons of all experts clustered by their activations on x; clusters are averaged.

    Incoming and outgoing weights are both averaged (ZipIt proper adds up the outgoing ones).
    """
    d_ff, join = experts[0].w1.shape[1], lambda name, dim: torch.cat([getattr(e, name) for e in experts], dim=dim)
    hidden = torch.cat([expert.hidden(x, act) for expert in experts], dim=1).double()
    unit = F.normalize(hidden - hidden.mean(dim=0), dim=0)
    labels = torch.from_numpy(zip_neurons((unit.T @ unit).cpu().numpy(), d_ff)).to(x.device)
    average = F.one_hot(labels, d_ff).to(experts[0].w1)  # [neurons of all, d_ff]
    average = average / average.sum(dim=0)
    gated, biased = experts[0].w_gate is not None, experts[0].b1 is not None
    return Expert(
        join("w1", 1) @ average,
        average.T @ join("w2", 0),
        join("b1", 0) @ average if biased else None,
        torch.stack([e.b2 for e in experts]).mean(dim=0) if experts[0].b2 is not None else None,
        join("w_gate", 1) @ average if gated else None,
    )


# ---------------------------------------------------------------------------------------------------------------
# The experiment: one fine-tuned mixture, merged in many ways at equal memory, recovered in equal steps
# ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """How one arm merges; the defaults are M-SMoE."""

    groups: str = "routed"  # routed | random_members | random
    budget: str = "adaptive"  # adaptive: of all layers together | uniform: the same in every layer
    similarity: str = ""  # logits | weight | output; "": the config's
    align: str = ""  # dominant | first | activation | none; "": the config's
    merge: str = "frequency"  # frequency | uniform | fisher | redirect | zip | prune
    skip: int | None = None  # layers left alone; None: the config's
    draws: int = 1  # random groups drawn; the one-shot loss is their mean


RANDOM = Recipe(groups="random", budget="uniform", align="none", merge="uniform", draws=3)
RECIPES = {
    "msmoe": Recipe(),
    "pruning": Recipe(merge="prune"),
    "averaging": RANDOM,
    "random_groups": replace(RANDOM, align="", merge="frequency"),
    "random_members": Recipe(groups="random_members", draws=3),
    "no_alignment": Recipe(align="none"),
    "uniform_weights": Recipe(merge="uniform"),
    "redirect": Recipe(merge="redirect"),
    "msmoe_all": Recipe(skip=0),
}
RECIPES_ABLATE = {
    "uniform_budget": Recipe(budget="uniform"),
    "rebasin": replace(RANDOM, align="dominant"),
    "repair": replace(RANDOM, align="activation"),
    "zipit": replace(RANDOM, merge="zip", draws=1),
    "averaging_routed": Recipe(align="none", merge="uniform"),  # the same mergers on M-SMoE's groups;
    "repair_routed": Recipe(align="activation", merge="uniform"),  # Git Re-basin's twin is uniform_weights
    "zipit_routed": Recipe(merge="zip"),
    "fisher": Recipe(merge="fisher"),
    "align_first": Recipe(align="first"),
    "by_weight": Recipe(similarity="weight"),
    "by_output": Recipe(similarity="output"),
}
RECOVERED = ("msmoe", "averaging", "pruning", "msmoe_all")  # after distillation in a default run; --ablate: all
USAGE_DECAY, CUTS = 0.6, 5  # of task-specific pruning: smoothing of use, cuts in the first half; the released code's
TUNED = ("full", "msmoe+kd", "averaging+kd", "pruning+kd", "full+steps", "mc", "c_equal_size")  # by --tune
LR_GRID = (1e-3, 2e-3, 4e-3, 8e-3)  # of fine-tuning, recovery and compression, the same for every arm; see --tune
SOURCES = {"mc": "msmoe+kd", "mc_all": "msmoe_all+kd", "task_specific+kd": "full"}  # where the name does not say it
SOURCES |= dict.fromkeys(("c_equal_rank", "c_equal_size", "c_equal_size_low"), "full+steps")  # as many steps
NUM_BLOCKS = 16  # of the validation data: what a run of one seed takes its standard error over


class Task(NamedTuple):
    """Data of either scale behind one face; a batch is whatever `outputs` understands."""

    train_batch: Callable[[int], Any]  # of a step
    calibration: list
    validation: list
    outputs: Callable[[nn.Module, Any], tuple[Tensor, Tensor]]  # logits [batch, time, classes], labels; -100: no label
    token_mask: Callable[[Any, str], Tensor | None]  # of a layer, by name: False is padding
    answers: Callable[[nn.Module, Any, Tensor], list]  # model, batch, logits: one answer for every sequence
    scores: Callable[[list, slice], dict[str, float]]  # answers to these validation sequences: {metric: share}


class Seen(NamedTuple):
    """What one layer met on the calibration data."""

    inputs: Tensor  # [tokens, d_model]
    logits: Tensor  # [tokens, num_experts]
    picks: Tensor  # [tokens, top_k]
    frequency: Tensor  # [num_experts]

    def routed_to(self, *experts: int) -> Tensor:
        """[tokens, d_model]: the inputs that pick one of the experts."""
        return self.inputs[torch.isin(self.picks, torch.tensor(experts, device=self.picks.device)).any(dim=-1)]


def moe_layers(model: nn.Module) -> dict[str, SparseMoE]:
    return {name: module for name, module in model.named_modules() if isinstance(module, SparseMoE)}


@torch.no_grad()
def calibrate(model: nn.Module, task: Task) -> dict[str, Seen]:
    """Run the calibration data once and keep what every layer meets, padding aside."""
    inputs: dict[str, list[Tensor]] = {name: [] for name in moe_layers(model)}
    hooks = [
        layer.register_forward_pre_hook(lambda _, args, name=name: inputs[name].append(args[0]))
        for name, layer in moe_layers(model).items()
    ]
    for batch in task.calibration:
        task.outputs(model.eval(), batch)
        for name, parts in inputs.items():
            mask = task.token_mask(batch, name)
            parts[-1] = parts[-1].flatten(0, -2) if mask is None else parts[-1][mask]
    for hook in hooks:
        hook.remove()
    seen = {}
    for name, layer in moe_layers(model).items():
        x = torch.cat(inputs[name])
        logits = layer.router(x.to(layer.router.weight.dtype))
        picks = logits.topk(layer.top_k, dim=-1).indices
        seen[name] = Seen(x, logits, picks, usage_frequency(logits, layer.top_k))
    return seen


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over the positions that have a label. logits [batch, time, classes], labels [batch, time]."""
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())


def fisher_information(model: nn.Module, task: Task) -> dict[str, Expert]:
    """Squared gradients of the loss, summed over calibration batches: the diagonal Fisher weights of a merge."""
    layers = moe_layers(model)
    total = {name: layer.experts.stacked().each(torch.zeros_like) for name, layer in layers.items()}
    for batch in task.calibration:
        model.zero_grad()
        cross_entropy(*task.outputs(model.eval(), batch)).backward()
        for name, layer in layers.items():
            gradient = layer.experts.stacked(lambda parameter: parameter.grad)
            total[name] = Expert(*(t if t is None else t + g.square() for t, g in zip(total[name], gradient)))
    model.zero_grad()
    return total


def merge_layer(
    layer: SparseMoE, groups: Tensor, seen: Seen, align: str, merge: str, fisher: Expert | None = None
) -> SparseMoE:
    """One merged layer, by the steps of the method; `align` and `merge` as in Recipe."""
    act, everyone = layer.experts.act, range(len(groups))
    experts = [layer.experts.stacked().at(i) for i in everyone]
    fishers = [None if fisher is None else fisher.at(i) for i in everyone]
    dominant, zipped = torch.zeros_like(groups, dtype=torch.bool), []
    for group in range(int(groups.max()) + 1):
        members = (groups == group).nonzero()[:, 0].tolist()
        most_used = max(members, key=seen.frequency.tolist().__getitem__)
        dominant[most_used] = True
        reference = 0 if align == "first" else most_used
        if merge == "zip":
            x = seen.routed_to(*members)
            alone = len(members) == 1 or len(x) < 2
            zipped.append(experts[reference] if alone else zip_experts([experts[i] for i in members], x, act))
        if align == "none" or merge in ("zip", "redirect") or len(members) == 1:
            continue
        for i in (i for i in members if i != reference):
            gain = neuron_gain(experts[reference], experts[i])
            if align == "activation":
                gain = activation_gain(experts[reference], experts[i], seen.routed_to(reference, i), act)
            perm = linear_assignment(gain.cpu())
            experts[i] = permute_neurons(experts[i], perm)
            fishers[i] = None if fisher is None else permute_neurons(fishers[i], perm)
    stack = lambda experts: Expert(*(None if w[0] is None else torch.stack(w) for w in zip(*experts)))
    if merge == "zip":
        return layer.with_experts(DenseExperts(stack(zipped), act), groups)
    weight = {"uniform": torch.ones_like(seen.frequency), "redirect": dominant.double()}.get(merge, seen.frequency)
    weights = Expert(*[weight] * len(Expert._fields)) if fisher is None else stack(fishers)
    pairs = zip(stack(experts), weights)
    merged = Expert(*(None if w is None else merge_experts(w, weight, groups) for w, weight in pairs))
    return layer.with_experts(DenseExperts(merged, act), groups)


def expert_features(layer: SparseMoE, seen: Seen, similarity: str) -> Tensor:
    """[num_experts, anything]: by what experts are compared: router logits, weights, or their mean output."""
    stacked, x = layer.experts.stacked(), seen.inputs
    if similarity == "logits":
        return seen.logits.T
    if similarity == "weight":
        return torch.cat([w.flatten(1) for w in stacked if w is not None], dim=1)
    outputs = (stacked.at(i).forward(x, layer.experts.act) for i in range(len(layer.remap)))
    return torch.stack([y.mean(dim=0) for y in outputs])


def prune_layer(layer: SparseMoE, dominant: Tensor) -> SparseMoE:
    """The baseline that removes the others: their logits are masked, their tokens go to the next best survivor."""
    experts = DenseExperts(layer.experts.stacked().at(dominant), layer.experts.act)
    remap = (dominant.long().cumsum(0) - 1).clamp(min=0)
    return layer.with_experts(experts, remap, dominant)


def merge_model(
    model: nn.Module, recipe: Recipe, config: Config, seen: dict[str, Seen], task: Task, draw: torch.Generator
) -> tuple[nn.Module, list[dict]]:
    """A merged copy of the model, and what was done to each layer."""
    names = list(seen)[config.skip if recipe.skip is None else recipe.skip :]
    frequency = torch.stack([seen[name].frequency for name in names]).cpu()  # [layers, num_experts]
    dominant = select_dominant(frequency, config.kept * len(names))
    if recipe.budget == "uniform":
        dominant = torch.cat([select_dominant(row[None], config.kept) for row in frequency])
    merged, align, report = copy.deepcopy(model), recipe.align or config.align_to, []
    fisher = fisher_information(merged, task) if recipe.merge == "fisher" else {}
    for name, chosen in zip(names, dominant):
        layer = merged.get_submodule(name)
        device = layer.router.weight.device
        if recipe.groups == "random":
            groups = random_groups(len(chosen), config.kept, draw)
        elif recipe.groups == "random_members":
            groups = random_members(chosen, draw)
        else:
            features = expert_features(layer, seen[name], recipe.similarity or config.similarity)
            groups = group_by_similarity(features, chosen.to(device)).cpu()
        if recipe.merge == "prune":
            new = prune_layer(layer, chosen.to(device))
        else:
            new = merge_layer(layer, groups.to(device), seen[name], align, recipe.merge, fisher.get(name))
        ranks = stable_ranks(layer, new, chosen, groups) if recipe == Recipe() else {}
        kept, use = chosen.nonzero()[:, 0].tolist(), seen[name].frequency.tolist()
        report.append({"layer": name, "frequency": use, "dominant": kept, "groups": groups.tolist(), **ranks})
        merged.set_submodule(name, new)
    return merged, report


def stable_ranks(before: SparseMoE, after: SparseMoE, dominant: Tensor, groups: Tensor) -> dict[str, list[float]]:
    """{matrix: [of the kept experts before, after merging]}, means over the groups of more than one."""
    shared = (groups.bincount() > 1).to(before.remap.device)
    if not shared.any():
        return {}
    pair = before.experts.stacked().at(dominant.to(shared.device)).at(shared), after.experts.stacked().at(shared)
    return {f"stable_rank_{m}": [float(stable_rank(getattr(e, m)).mean()) for e in pair] for m in ("w1", "w2")}


def byte_lm(config: Config, seed: int, balance: float = 0.0) -> common.TransformerLM:
    """The small model; balance > 0 also makes its routers trainable."""
    generator = torch.Generator().manual_seed(seed)

    def make_ffn(layer: int) -> SparseMoE:
        normal = lambda *shape, std: std * torch.randn(shape, generator=generator)
        n, d, f = config.num_experts, config.d_model, config.d_ff
        experts = DenseExperts(Expert(normal(n, d, f, std=d**-0.5), normal(n, f, d, std=f**-0.5)))
        return SparseMoE(normal(n, d, std=0.02), experts, balance=balance)

    shape = (256, config.num_layers, config.d_model, config.num_heads, config.context, make_ffn)
    return common.TransformerLM(*shape, norm="rms", conv=4, init=config.init, generator=generator)


def switch_layer(router_weight: Tensor, w1: Tensor, w2: Tensor, act: str, capacity: int) -> SparseMoE:
    return SparseMoE(router_weight, DenseExperts(Expert(w1, w2), act), capacity=capacity)


def make_task(config: Config, run: Run, seed: int, stage: int) -> Task:
    """The target task; `stage` numbers the training streams, which do not depend on the arm."""
    return prompt_task(config, run, seed, stage) if config.task else byte_task(config, run, seed, stage)


def byte_task(config: Config, run: Run, seed: int, stage: int) -> Task:
    text = text_data.load_domain(config.target)
    stream = lambda step: torch.Generator().manual_seed(1_000_003 * (10 * seed + stage) + step)
    sample = lambda num, step: text_data.sample_windows(text.train, num, config.context + 1, stream(step))
    validation = text_data.all_windows(text.val, config.context)[: config.eval_sequences or None]
    return Task(
        train_batch=lambda step: sample(config.batch_size, step).to(run.device),
        calibration=sample(config.calibration, -1).to(run.device).split(32),
        validation=validation.to(run.device).split(64),
        outputs=lambda model, windows: (model(windows[:, :-1]), windows[:, 1:]),
        token_mask=lambda windows, layer: None,
        answers=lambda model, windows, logits: (logits.argmax(-1) == windows[:, 1:]).double().mean(dim=1).tolist(),
        scores=lambda hits, where: {"accuracy": float(torch.tensor(hits, dtype=torch.float64).mean())},
    )


def prompt_task(config: Config, run: Run, seed: int, stage: int) -> Task:
    """A task of data/tasks.py as text to text: the answer is one word, or is generated token by token, greedily."""
    folder, stream = pretrained.locate(config.model, run.data_dir), 10 * seed + stage
    data = pretrained.TextToText(config.task, run.data_dir, folder, config.context, run.device)
    return Task(
        train_batch=lambda step: data.train_batch(step, config.batch_size, stream),
        calibration=data.sample(config.calibration, 32, stream),
        validation=data.dev_batches(config.eval_sequences, 64),
        outputs=data.outputs,
        token_mask=data.token_mask,
        answers=data.answers,
        scores=data.scores,
    )


@torch.no_grad()
def evaluate(model: nn.Module, task: Task, run: Run) -> dict:
    """Loss and the task's metrics, each also by block of the validation data."""
    losses, answers = [], []
    with torch.autocast(run.device, dtype=run.dtype, enabled=run.dtype != torch.float32):
        for batch in task.validation:
            logits, labels = task.outputs(model.eval(), batch)
            loss = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="none")
            losses.append(loss.view(labels.shape).sum(dim=1) / (labels >= 0).sum(dim=1))  # [batch]
            answers += task.answers(model, batch, logits)
    loss, blocks = torch.cat(losses).double(), min(NUM_BLOCKS, len(answers))
    result = {"loss": float(loss.mean()), **task.scores(answers, slice(len(answers)))}
    result["loss_blocks"] = [float(part.mean()) for part in loss.tensor_split(blocks)]
    parts = [slice(int(part[0]), int(part[-1]) + 1) for part in torch.arange(len(answers)).tensor_split(blocks)]
    by_block = [task.scores(answers[part], part) for part in parts]
    return result | {f"{name}_blocks": [scores[name] for scores in by_block] for name in by_block[0]}


@torch.no_grad()
def store(model: nn.Module, task: Task, path) -> dict:
    """Export a model, and count: its parameters, the bytes on disk, the FLOPs of a sequence."""
    counted, batch = copy.deepcopy(model).double(), task.validation[0]  # float64: operators that the counter sees
    flops = common.count_flops(lambda: task.outputs(counted, batch))["Global"] / len(task.outputs(model, batch)[1])
    return {"parameters": common.count_parameters(model), "bytes": export_model(model, path), "flops": flops}


def tune(model: nn.Module, task: Task, config: Config, steps: int, lr: float, teacher=None, **options) -> None:
    """Cross-entropy, plus distillation when there is a teacher. Nothing here has dropout; routers are frozen."""

    def loss_fn(batch: Any, step: int) -> tuple[Tensor, dict]:
        logits, labels = task.outputs(model, batch)
        loss = cross_entropy(logits, labels)
        if teacher is None:
            return loss, {}
        with torch.no_grad():
            wanted = task.outputs(teacher, batch)[0]
        distilled = distillation_loss(logits[labels >= 0], wanted[labels >= 0], config.temperature)
        return loss + config.alpha * distilled, {"cross_entropy": loss.detach(), "distillation": distilled.detach()}

    seconds = 1800.0 if config.task else 60.0  # a checkpoint has 24 GB at full scale
    fit(model, loss_fn, steps, lr, batches=task.train_batch, checkpoint_seconds=seconds, **options)


def fit(model: nn.Module, loss_fn: Callable, steps: int, lr: float, **options) -> None:
    """Section A1: AdamW with these betas, eps and weight decay; 16 steps of warm-up, then linear to 0."""
    optimizer = common.adamw(model, lr, betas=(0.9, 0.98))
    for group in optimizer.param_groups:
        group["eps"] = 1e-6
    schedule = common.linear(steps, warmup=min(16, steps // 5))
    common.train(model, loss_fn, steps, optimizer=optimizer, schedule=schedule, **options)


def export_model(model: nn.Module, path) -> int:
    """Every stored number once, as arrays without code (common.save_arrays). Returns the bytes on disk."""
    layers = {}
    for name, layer in moe_layers(model).items():
        kind = "low_rank" if isinstance(layer.experts, LowRankExperts) else "dense"
        layers[name] = {"experts": kind, "act": layer.experts.act, "glu": layer.experts.glu}
    common.save_arrays(path, {**dict(model.named_parameters()), **dict(model.named_buffers())}, {"layers": layers})
    return path.stat().st_size


def import_model(path, model: nn.Module) -> nn.Module:
    """Fill `model`, an unmerged one of the same shape, with what `export_model` wrote. Raises ValueError."""
    arrays, meta = common.load_arrays(path)
    try:
        for name, kind in meta["layers"].items():
            one = torch.ones(1, 1, 1)
            experts = DenseExperts(Expert(one, one, w_gate=one if kind["glu"] else None), kind["act"])
            if kind["experts"] == "low_rank":
                experts = LowRankExperts(experts, rank=1)
                experts.up.compact()
                experts.down.compact()
            model.get_submodule(name).experts = experts
        for name, tensor in arrays.items():
            owner, _, leaf = name.rpartition(".")
            owner = model.get_submodule(owner)
            if tensor.is_floating_point():
                setattr(owner, leaf, nn.Parameter(tensor, requires_grad=not name.endswith("router.weight")))
            else:
                owner.register_buffer(leaf, tensor)
        for layer in moe_layers(model).values():
            stored = layer.experts.up.u if hasattr(layer.experts, "up") else layer.experts.w1
            if layer.remap.min() < 0 or layer.remap.max() >= len(stored):
                raise ValueError(f"remap names an expert outside 0 .. {len(stored) - 1}")
        if hasattr(model, "tie_weights"):
            model.tie_weights()
        odd = set(arrays) ^ {name for name, _ in [*model.named_parameters(), *model.named_buffers()]}
        if odd:
            raise ValueError(f"missing or unexpected: {', '.join(sorted(odd)[:5])}")
    except (AttributeError, LookupError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path} is not an export of this model: {error}") from error
    return model


def load_model(config: Config, run: Run, arm: str, seed: int) -> nn.Module:
    path, find = run.path(arm, seed, ".npz"), lambda: pretrained.locate(config.model, run.data_dir)
    try:
        unmerged = pretrained.empty_switch(find(), switch_layer) if config.task else byte_lm(config, seed)
        return run.prepare(import_model(path, unmerged))
    except (ValueError, FileNotFoundError) as error:
        again = f"delete {path.with_suffix('.*')} and go on with --resume"
        raise common.UsageError(f"{arm} cannot be loaded ({error}); {again}") from error


def load_trained(path: str | Path) -> nn.Module:
    """The model of an arm, in eval mode, from what a run left: runs/mcsmoe-small/arms/msmoe+kd-seed0.npz.

    One of --full is built by the configuration of its Switch checkpoint, which must be where the run found it. Raises
    UsageError: see common.load_trained.
    """

    def make(trained: common.Trained) -> nn.Module:
        if not trained.config.task:
            return import_model(path, byte_lm(trained.config, trained.seed))
        folder = pretrained.locate(trained.config.model, trained.data_dir)
        return import_model(path, pretrained.empty_switch(folder, switch_layer))

    return common.load_trained(path, Config, make)


def pretrain_arm(config: Config, arm: str, seed: int, run: Run) -> dict:
    """The small model on all domains at once, routers trained with the balance loss."""
    corpora = [text_data.load_domain(name) for name in text_data.DOMAINS]
    model = run.prepare(byte_lm(config, seed, config.balance))

    def batches(step: int) -> Tensor:
        generator = torch.Generator().manual_seed(1_000_003 * (10 * seed) + step)
        share = config.batch_size // len(corpora)
        parts = [text_data.sample_windows(c.train, share, config.context + 1, generator) for c in corpora]
        return torch.cat(parts).to(run.device)

    def loss_fn(windows: Tensor, step: int) -> tuple[Tensor, dict]:
        loss = common.lm_loss(model, windows).mean()
        aux_loss = model.aux_loss()
        return loss + aux_loss, {"lm_loss": loss.detach(), "aux_loss": aux_loss.detach()}

    options = run.train_options(arm, seed)
    fit(model, loss_fn, config.pretrain_steps, config.pretrain_lr, batches=batches, **options)
    task = make_task(config, run, seed, 1)
    return evaluate(model, task, run) | store(model, task, run.path(arm, seed, ".npz"))


def finetune_arm(config: Config, arm: str, seed: int, run: Run) -> dict:
    """The full model on the target task: the teacher, and what every other arm starts from."""
    if config.task:
        model = run.prepare(pretrained.load_switch(pretrained.locate(config.model, run.data_dir), switch_layer))
        model.requires_grad_(True)
        for layer in moe_layers(model).values():
            layer.router.requires_grad_(False)
    else:
        model = load_model(config, run, "pretrained", seed)
    task = make_task(config, run, seed, 1)
    lr = float(arm.partition("@")[2] or config.lr)
    tune(model, task, config, config.finetune_steps, lr, **run.train_options(arm, seed))
    return evaluate(model, task, run) | store(model, task, run.path(arm, seed, ".npz"))


def merge_arm(config: Config, arm: str, seed: int, run: Run) -> dict:
    """One recipe, no training afterwards."""
    full, task = load_model(config, run, "full", seed), make_task(config, run, seed, 2)
    recipe, seen = (RECIPES | RECIPES_ABLATE)[arm], calibrate(full, task)
    found = []
    for draw in range(recipe.draws):  # random groups are the same for every merger
        generator = torch.Generator().manual_seed(1000 * seed + draw)
        model, report = merge_model(full, recipe, config, seen, task, generator)
        found.append(evaluate(model, task, run))
        if draw == 0:
            path = run.path(arm, seed, ".npz")
            counts = store(model, task, path) | {"layers": report}
            if config.task and arm not in map(source_of, arms_of(config, run)[2]):
                path.unlink()  # 3 GB that nobody reads again
    means = {name: np.mean([result[name] for result in found], axis=0).tolist() for name in found[0]}
    return means | counts | {"loss_by_draw": [result["loss"] for result in found]}


def recover_arm(config: Config, arm: str, seed: int, run: Run) -> dict:
    """A merged model after distillation ("msmoe+kd"), without it ("msmoe+steps"), or the full one trained on."""
    name, _, lr = arm.partition("@")
    model, task = load_model(config, run, source_of(arm), seed), make_task(config, run, seed, 3)
    teacher = load_model(config, run, "full", seed).eval() if name.endswith("+kd") else None
    lr, options = float(lr or config.recover_lr), run.train_options(arm, seed)
    prunes = name == "task_specific+kd"  # in the same steps
    on_step = prune_by_usage(model, task, config) if prunes else None
    tune(model, task, config, config.recover_steps, lr, teacher, on_step=on_step, **options)
    for name in list(moe_layers(model)) if prunes else ():
        layer = model.get_submodule(name)
        model.set_submodule(name, prune_layer(layer, layer.alive))
    return evaluate(model, task, run) | store(model, task, run.path(arm, seed, ".npz"))


def prune_by_usage(model: nn.Module, task: Task, config: Config) -> Callable[[int], None]:
    """Task-specific pruning, to be called after every step: CUTS cuts in the first half of the steps."""
    layers, half = dict(list(moe_layers(model).items())[config.skip :]), max(1, config.recover_steps // 2)
    cuts, inputs = {max(1, half * cut // CUTS) for cut in range(1, CUTS + 1)}, {}
    for name, layer in layers.items():
        layer.register_buffer("usage", torch.zeros(layer.alive.shape, dtype=torch.float64, device=layer.alive.device))
        layer.register_forward_pre_hook(lambda _, args, name=name: inputs.update({name: args[0].detach()}))

    @torch.no_grad()
    def on_step(step: int) -> None:
        batch = task.train_batch(step)
        for name, layer in layers.items():
            mask = task.token_mask(batch, name)
            x = inputs[name].flatten(0, -2) if mask is None else inputs[name][mask]
            logits = layer.router(x.to(layer.router.weight.dtype)).masked_fill(~layer.alive, -1e6)
            layer.usage.lerp_(usage_frequency(logits, layer.top_k), 1 - USAGE_DECAY)
            if step + 1 in cuts:
                layer.alive.copy_(surviving_experts(layer.usage, layer.alive, config.kept, step + 1 == half))

    return on_step


def equal_density(config: Config, rank: int, d_model: int, d_ff: int) -> float:
    """The density of S at which num_experts experts of this rank are as large as MC-SMoE's `kept` ones."""
    low_rank, dense = d_model + d_ff, d_model * d_ff  # parameters of U and V per rank, of S at density 1; one matrix
    budget = config.kept * (config.rank * low_rank + config.density * dense) / config.num_experts
    density = (budget - rank * low_rank) / dense
    if density < 0:
        raise ValueError(f"c_rank is {rank}: C-SMoE is larger than MC-SMoE even without S; lower it")
    return density


def compress_arm(config: Config, arm: str, seed: int, run: Run) -> dict:
    """Decompose, train and prune, compact, export: MC-SMoE the recovered merge, C-SMoE the unmerged model."""
    name, _, lr = arm.partition("@")
    model, task = load_model(config, run, source_of(arm), seed), make_task(config, run, seed, 4)
    teacher = load_model(config, run, "full", seed).eval()
    layers = list(moe_layers(model).values())[0 if name == "mc_all" else config.skip :]
    rank, density, steps = config.rank, config.density, config.compress_steps
    if name.startswith("c_equal_size"):
        rank = config.c_rank if name == "c_equal_size" else max(1, config.c_rank // 2)
        density = equal_density(config, rank, *layers[0].experts.w1.shape[1:])
    for layer in layers:
        layer.experts = LowRankExperts(layer.experts, rank)
    linears = [linear for layer in layers for linear in (layer.experts.up, layer.experts.down)]
    lengths = [linear.s.shape[1] for linear in linears]
    warmup, cooldown = round(config.warmup_share * steps), round(config.cooldown_share * steps)

    def on_step(step: int) -> None:
        for linear in linears:
            linear.observe()
        share = cubic_density(step, steps, warmup, cooldown, density)
        keep = neurons_to_keep([linear.score for linear in linears], lengths, share)
        for linear, mask in zip(linears, keep):
            linear.prune(mask)

    lr, options = float(lr or config.compress_lr), run.train_options(arm, seed)
    tune(model, task, config, steps, lr, teacher, on_step=on_step, **options)
    with torch.no_grad():
        before = task.outputs(model.eval(), task.validation[0])[0]
        for linear in linears:
            linear.compact()
        counts = store(model, task, run.path(arm, seed, ".npz"))
        again = load_model(config, run, arm, seed).eval()
        change = float((task.outputs(again, task.validation[0])[0] - before).abs().max())
    return evaluate(again, task, run) | counts | {"reload_change": change, "rank": rank, "density": density}


# ---------------------------------------------------------------------------------------------------------------
# Claims
# ---------------------------------------------------------------------------------------------------------------

LOSES = "averaging experts of random groups loses more than M-SMoE, at once and after recovery"
GROUPS = "groups from the router beat random members of the same kept experts, and random groups"
WORST_DROP = 1.25  # points of accuracy: the largest of the paper's eight tasks (SST-2, table 2)
RECOVERS = f"after a brief distillation accuracy is within {WORST_DROP:g} points of the full model"
MEMORY = "up to 80 % less memory, the whole model, counted and on disk (all layers merged)"
PAPER_FLOPS = 0.176  # share saved, (4.65 - 3.83) / 4.65 TFLOPs in table 2
FLOPS = "compression saves up to 20 % of FLOPs (all layers), merging alone none"
TABLE7 = "MRPC 89.22 against 88.97, SQuAD F1 85.30 against 84.93"
CLAIMS = [
    Claim("mcsmoe.naive_merging_fails", LOSES, "MRPC 90.69 against 88.73, COPA 68 against 62", required=True),
    Claim("mcsmoe.alignment", "lining neurons up before merging helps", "MRPC 90.69 against 89.95", required=True),
    Claim("mcsmoe.frequency_weights", "weights by usage beat equal weights", "MRPC 90.69 against 89.95", required=True),
    Claim("mcsmoe.routing_groups", GROUPS, "MRPC 90.69 against 89.95 (random members)", required=True),
    Claim("mcsmoe.beats_redirect", "merging adds to re-routing", "not verified (the control is ours)", required=True),
    Claim("mcsmoe.recovers", RECOVERS, "mean of eight tasks 82.2 against 82.4; at worst -1.25 (SST-2)", required=True),
    Claim("mcsmoe.memory", MEMORY, "2.0B to 381M parameters, 81 % (switch-base-32)", required=True),
    Claim("mcsmoe.flops", FLOPS, "4.65 to 3.83 TFLOPs, 17.6 % (switch-base-32)", required=True),
    Claim("mcsmoe.beats_c_smoe", "MC-SMoE beats C-SMoE of equal size", "not verified", required=True),
    Claim("mcsmoe.beats_c_smoe_equal_rank", "MC-SMoE beats C-SMoE of equal rank, which is larger", TABLE7),
    Claim("mcsmoe.adaptive_budget", "a budget over all layers beats the same in each", "MRPC 90.69 against 90.44"),
    Claim(
        "mcsmoe.low_rank", "merged experts have a lower stable rank than the kept ones", "falls in most layers (figure)"
    ),
]

AT_ONCE = {  # claims on the loss right after merging: {arm: its name}; every arm must lose
    "alignment": {"no_alignment": "without"},
    "frequency_weights": {"uniform_weights": "equal weights"},
    "routing_groups": {"random_members": "random members", "random_groups": "random groups"},
    "beats_redirect": {"redirect": "the kept experts unmerged"},
}

Results = dict[str, list[dict]]  # {arm: [one result a seed]}


def values(results: Results, arm: str, key: str) -> np.ndarray:
    return np.array([result[key] for result in results[arm]])  # [seeds, ...]


def per_seed(results: Results, arm: str, key: str) -> np.ndarray:
    """What margins are taken over: one number a seed; with a single seed, one a block of the validation data."""
    return np.array(results[arm][0][f"{key}_blocks"]) if len(results[arm]) == 1 else values(results, arm, key)


def metrics_of(config: Config) -> tuple[str, ...]:
    """What is reported beside the loss, shares; the first one is what claims are about."""
    return tasks.PROMPTS[config.task].metrics if config.task else ("accuracy",)


def rank_changes(results: Results, matrix: str) -> np.ndarray:
    """[seeds]: mean relative change of the stable rank, merged against kept expert, over layers with a merged group."""
    key, changes = f"stable_rank_{matrix}", []
    for result in results["msmoe"]:
        pairs = [layer[key] for layer in result["layers"] if key in layer]
        changes.append(np.mean([after / before - 1 for before, after in pairs]) if pairs else 0.0)
    return np.array(changes)


def judge(config: Config, run: Run, results: Results) -> None:
    """From measurements to claim rows. Margins are nats of loss; at full scale points of the task's first metric."""
    quality = metrics_of(config)[0]
    key, scale, unit = (quality, -100, "points") if config.task else ("loss", 1, "nats")
    ahead = lambda worse, better="msmoe": scale * (per_seed(results, worse, key) - per_seed(results, better, key))
    shown = lambda margin: common.show(margin if len(run.seeds) > 1 else [margin.mean()])

    def report(id: str, text: str, **margins: np.ndarray) -> None:
        """Holds if every margin does."""
        text = text.format(unit=unit, **{name: shown(margin) for name, margin in margins.items()})
        holds = all(common.verdict(margin) for margin in margins.values())
        run.claim(f"mcsmoe.{id}", text, {name: margin.tolist() for name, margin in margins.items()}, holds=holds)

    text = "averaging loses {at_once} {unit} more at once, {recovered} after recovery"
    margins = {"at_once": ahead("averaging"), "recovered": ahead("averaging+kd", "msmoe+kd")}
    report("naive_merging_fails", text, **margins)
    for id, arms in AT_ONCE.items():
        text = ", ".join(f"{{{arm}}} {{unit}} better than {name}" for arm, name in arms.items())
        if later := {arm: ahead(f"{arm}+kd", "msmoe+kd") for arm in arms if f"{arm}+kd" in results}:
            text += f" (after recovery {', '.join(shown(margin) for margin in later.values())})"
        report(id, text, **{arm: ahead(arm) for arm in arms})

    drop = 100 * (per_seed(results, "full", quality) - per_seed(results, "msmoe+kd", quality))
    more = 100 * (values(results, "full+steps", quality) - values(results, "full", quality))
    text = f"{shown(drop)} points below the full model, which gains {common.show(more)} from as many more steps"
    margin = (WORST_DROP - drop).tolist()
    run.claim("mcsmoe.recovers", text, {"drop": drop.tolist(), "margin": margin, "more": more.tolist()}, margin)

    saved = lambda arm, what: 1 - values(results, arm, what) / values(results, "full", what)
    percent = lambda arm, what: f"{100 * saved(arm, what).mean():.1f} %"
    counted, stored = saved("mc_all", "parameters"), saved("mc_all", "bytes")
    text = f"{percent('mc_all', 'parameters')} of parameters, {percent('mc_all', 'bytes')} of bytes on disk"
    text += f"; without the first layer {percent('mc', 'bytes')}"
    numbers = {"parameters": counted.tolist(), "bytes": stored.tolist()}
    run.claim("mcsmoe.memory", text, numbers, holds=bool(min(counted.min(), stored.min()) >= 0.8))
    flops, merged = saved("mc_all", "flops"), saved("msmoe_all+kd", "flops")
    text = f"{percent('mc_all', 'flops')} of all FLOPs, without the first layer {percent('mc', 'flops')}"
    text += f"; merging alone {percent('msmoe_all+kd', 'flops')}"
    holds = bool(flops.min() >= PAPER_FLOPS and (merged == 0).all())
    run.claim("mcsmoe.flops", text, {"saved": flops.tolist(), "merging_alone": merged.tolist()}, holds=holds)
    larger = lambda arm: 100 * (values(results, arm, "parameters") / values(results, "mc", "parameters") - 1).mean()
    best = min(("c_equal_size", "c_equal_size_low"), key=lambda arm: values(results, arm, "loss").mean())
    text = f"{{margin}} {{unit}} better; C-SMoE rank {results[best][0]['rank']}, {larger(best):+.1f} % parameters"
    report("beats_c_smoe", text, margin=ahead(best, "mc"))
    falls = {matrix: rank_changes(results, matrix) for matrix in ("w1", "w2")}
    change = (falls["w1"] + falls["w2"]) / 2
    text = ", ".join(f"{name} {100 * by_seed.mean():+.1f} %" for name, by_seed in falls.items())
    text = f"{100 * change.mean():+.1f} % on average: {text}"
    numbers = {name: by_seed.tolist() for name, by_seed in falls.items()}
    run.claim("mcsmoe.low_rank", text, numbers, margins=-change)
    if run.ablate:
        text = f"{{margin}} {{unit}} better (negative: worse); C-SMoE {larger('c_equal_rank'):+.1f} % parameters"
        report("beats_c_smoe_equal_rank", text, margin=ahead("c_equal_rank", "mc"))
        text = "{at_once} {unit} better at once, {recovered} after recovery (negative: worse)"
        margins = {"at_once": ahead("uniform_budget"), "recovered": ahead("uniform_budget+kd", "msmoe+kd")}
        report("adaptive_budget", text, **margins)


def print_tables(config: Config, run: Run, results: Results) -> None:
    columns = [("loss", 1.0), *((name, 100.0) for name in metrics_of(config))]
    show = lambda arm, key, scale=1.0: common.show(scale * values(results, arm, key)) if arm in results else ""
    rows = []
    for arm in dict.fromkeys(arm.removesuffix("+kd") for arm in results):
        stored = arm if arm in results else f"{arm}+kd"
        size = [f"{results[stored][0]['parameters']:,}", f"{values(results, stored, 'bytes').mean() / 1e6:.3f}"]
        quality = [show(name, *column) for name in (arm, f"{arm}+kd") for column in columns]
        rows.append([arm, *quality, *size, f"{values(results, stored, 'flops').mean() / 1e6:.2f}"])
    names = ["nats", *(f"{name.replace('_', ' ')} %" for name in metrics_of(config))]
    header = ["arm", *names, f"recovered: {names[0]}", *names[1:], "parameters", "MB on disk", "MFLOP/sequence"]
    run.table(f"validation, {len(run.seeds)} seed(s); recovered: after distillation from the full model", header, rows)
    if "msmoe" not in results:
        return

    rows = []
    for layer in results["msmoe"][0]["layers"]:
        joined: dict[int, list[str]] = {kept: [] for kept in layer["dominant"]}
        for expert, group in enumerate(layer["groups"]):
            kept = layer["dominant"][group]
            joined[kept] += [str(expert)] if expert != kept else []
        use = {kept: 100 * layer["frequency"][kept] for kept in joined}
        text = "  ".join(f"{k} ({use[k]:.0f} %)" + (f"<-{','.join(j)}" if j else "") for k, j in joined.items())
        ranks = [" to ".join(f"{r:.2f}" for r in layer.get(f"stable_rank_{w}", ())) for w in ("w1", "w2")]
        rows.append([layer["layer"], len(joined), f"{sum(use.values()):.0f} %", *ranks, text])
    header = ["layer", "kept", "their use", "stable rank w1", "stable rank w2", "kept (use)<-merged into it"]
    run.table(f"M-SMoE, seed {run.seed}: who was kept, who joined whom", header, rows)


def print_grid(config: Config, run: Run, results: Results) -> None:
    own = {"full": config.lr, "mc": config.compress_lr, "c": config.compress_lr}
    rows, arms = [], dict.fromkeys(arm.partition("@")[0] for arm in results if arm != "pretrained")
    for arm in (arm for arm in arms if arm not in RECIPES):
        default = config.recover_lr if "+" in arm else own[arm.partition("_")[0]]
        names = {lr: arm if lr == default else f"{arm}@{lr:g}" for lr in LR_GRID}
        losses = {lr: common.show(values(results, name, "loss")) for lr, name in names.items() if name in results}
        rows.append([arm, *(losses.get(lr, "") for lr in LR_GRID)])
    run.table(f"the learning-rate grid, nats, {len(run.seeds)} seed(s)", ["arm", *(f"{lr:g}" for lr in LR_GRID)], rows)


def draw(config: Config, run: Run, results: Results) -> None:
    layers = results["msmoe"][0]["layers"] if "msmoe" in results else []

    def frequencies(ax) -> None:
        table = np.array([layer["frequency"] for layer in layers])
        title = "use of each expert, and the kept expert it joins (* is kept)"
        ax.imshow(table, aspect="auto")
        for row, layer in enumerate(layers):
            for column, group in enumerate(layer["groups"]):
                kept = layer["dominant"][group]
                color = "white" if table[row, column] < table.max() / 2 else "black"
                text = "*" if kept == column else str(kept)
                ax.text(column, row, text, ha="center", va="center", fontsize=7, color=color)
        ax.set(xlabel="expert", ylabel="merged layer", yticks=range(len(layers)), title=title)

    def trade_off(ax) -> None:
        arms = ("full", "msmoe", "msmoe+kd", "averaging", "averaging+kd", "pruning", "pruning+kd", "mc")
        arms += ("c_equal_size", "c_equal_rank", "msmoe_all+kd", "mc_all")
        points = {a: [[values(results, a, k).mean()] for k in ("parameters", "loss")] for a in arms if a in results}
        points = {arm: ([x[0] / 1e6], y) for arm, (x, y) in points.items()}
        common.lines(ax, points, xlabel="million parameters", ylabel="nats", title="quality against memory")

    run.plot("mcsmoe", [frequencies, trade_off], width=6.0, height=4.2)


# ---------------------------------------------------------------------------------------------------------------
# main
# ---------------------------------------------------------------------------------------------------------------


def switch_ledger(config: Config) -> list[list[str]]:
    """Parameters of switch-base-32 and of what becomes of it, by arithmetic from its shape (table 2 and A6)."""
    d_model, d_ff, layers, experts = 768, 3072, 12, 32
    attention, norms = 3 * 12 * 4 * d_model**2, (5 * 12 + 2) * d_model
    rest = 32128 * d_model + attention + 12 * 2 * d_model * d_ff + norms + layers * experts * d_model + 2 * 32 * 12
    expert, merged = 2 * d_model * d_ff, layers - config.skip
    small = 2 * round(config.rank * (d_model + d_ff) + config.density * d_model * d_ff)
    alone = config.skip * experts * expert
    sizes = {
        "full": rest + layers * experts * expert,
        "M-SMoE": rest + alone + merged * config.kept * expert,
        "MC-SMoE": rest + alone + merged * config.kept * small,
        "C-SMoE": rest + alone + merged * experts * small,
    }
    return [[name, f"{size:,}", f"{size / 1e6:.0f} M"] for name, size in sizes.items()]


def check(config: Config, device: str) -> Config:
    """Refuse impossible settings before anything is written; fill in what a task settles."""
    if device == "mps":
        raise common.UsageError("experts are merged in float64, which mps lacks; use --device cpu or cuda")
    choices = {"align_to": ("dominant", "first"), "similarity": ("logits", "weight", "output")}
    for name, allowed in {**choices, "task": ("", *TASK_SETTINGS)}.items():
        if getattr(config, name) not in allowed:
            raise ValueError(f"{name} is {getattr(config, name)!r}; allowed: {', '.join(filter(None, allowed))}")
    if config.task:
        if not config.model:
            raise ValueError(f"task is {config.task!r}, which needs a checkpoint: add --full")
        batch_size, lr, _ = TASK_SETTINGS[config.task]
        rates = {name: getattr(config, name) or lr for name in ("lr", "recover_lr", "compress_lr")}
        config = replace(config, batch_size=config.batch_size or batch_size, **rates)
    may_be_zero = ("skip", "eval_sequences", *(("finetune_steps", "recover_steps") if config.task else ()))
    for name, value in vars(config).items():
        if type(value) is int and value < (0 if name in may_be_zero else 1):
            raise ValueError(f"{name} is {value}; at least {0 if name in may_be_zero else 1} is needed")
    if not 0 < config.density <= 1 or config.temperature <= 0 or config.alpha < 0 or config.balance <= 0:
        raise ValueError(
            f"density is {config.density:g}, temperature {config.temperature:g}, alpha {config.alpha:g}, balance "
            f"{config.balance:g}; needed: density in (0, 1], temperature and balance above 0, alpha at least 0"
        )
    return config


def check_shape(config: Config, layers: dict[str, SparseMoE]) -> Config:
    """The same for what depends on the model."""
    if not 0 <= config.skip < len(layers):
        raise ValueError(f"skip is {config.skip}; the model has {len(layers)} mixture layers, one must be merged")
    first = next(iter(layers.values()))
    config = replace(config, num_experts=len(first.remap))
    if config.kept > config.num_experts:
        raise ValueError(f"kept is {config.kept}; the model has {config.num_experts} experts a layer")
    d_model, d_ff = first.experts.w1.shape[1:]
    if not max(config.rank, config.c_rank) <= min(d_model, d_ff):
        raise ValueError(f"rank is {config.rank}, c_rank {config.c_rank}; at most {min(d_model, d_ff)} is allowed")
    equal_density(config, config.c_rank, d_model, d_ff)
    steps, shares = config.compress_steps, (config.warmup_share, config.cooldown_share)
    cubic_density(0, steps, *(round(share * steps) for share in shares), config.density)
    return config


def source_of(arm: str) -> str:
    """The arm that this one starts from."""
    arm = arm.partition("@")[0]
    return SOURCES.get(arm, arm.partition("+")[0] if "+" in arm else "full")


def arms_of(config: Config, run: Run) -> list[list[str]]:
    """Names of the arms: fine-tuned, merged, recovered, compressed. "arm@lr" has a learning rate of its own."""
    merged, compressed = [*RECIPES], ["mc", "mc_all", "c_equal_size", "c_equal_size_low"]
    recovered = [*(f"{arm}+kd" for arm in RECOVERED), "full+steps"]
    if run.ablate or config.arms:
        merged, compressed = [*merged, *RECIPES_ABLATE], [*compressed, "c_equal_rank"]
        recovered = [*(f"{arm}+kd" for arm in merged), "full+steps", "msmoe+steps", "task_specific+kd"]
    stages = [["full"], merged, recovered, compressed]
    every = [arm for stage in stages for arm in stage]
    wanted = set(config.arms or (TUNED if config.tune else every))
    if odd := wanted.difference(every):
        raise ValueError(f"arms: there is no {', '.join(sorted(odd))}; allowed: {', '.join(every)}")
    for arm in reversed(every):  # an arm starts from one of an earlier stage
        wanted |= {source_of(arm)} if arm in wanted else set()
    stages = [[arm for arm in stage if arm in wanted] for stage in stages]
    for stage, own in ((0, config.lr), (2, config.recover_lr), (3, config.compress_lr)) if config.tune else ():
        rates = sorted({own, *LR_GRID})
        stages[stage] = [arm if lr == own else f"{arm}@{lr:g}" for arm in stages[stage] for lr in rates]
    return stages


def prepare_small(config: Config, run: Run) -> tuple[Config, nn.Module]:
    corpora = [text_data.load_domain(name) for name in text_data.DOMAINS]
    if config.target not in text_data.DOMAINS:
        raise ValueError(f"target is {config.target!r}; allowed: {', '.join(text_data.DOMAINS)}")
    if config.batch_size < len(corpora):
        raise ValueError(f"batch_size is {config.batch_size}; at least one sequence of each of {len(corpora)} domains")
    run.data = {text.name: text.digest for text in corpora}
    for note in filter(None, {text.note for text in corpora}):
        print(note)
    return config, byte_lm(config, run.seed, config.balance).to(run.device)


def prepare_full(config: Config, run: Run) -> tuple[Config, nn.Module]:
    """Find and read everything before hours are spent on it."""
    paths = tasks.task_files(config.task, run.data_dir)
    run.data = {path.name: common.sha256(path)[:12] for path in paths}
    train, _ = tasks.load_prompts(config.task, run.data_dir)
    steps = TASK_SETTINGS[config.task][2] * math.ceil(len(train) / config.batch_size)
    own = {"finetune_steps": config.finetune_steps or steps, "recover_steps": config.recover_steps or (steps + 1) // 2}
    folder = pretrained.locate(config.model, run.data_dir)
    return replace(config, **own), pretrained.load_switch(folder, switch_layer).to(run.device)


def main(config: Config, run: Run) -> dict:
    run.config = config = check(config, run.device)
    if config.task:
        header = ["switch-base-32", "parameters", ""]
        run.table("from the real shape, by arithmetic, at these settings", header, switch_ledger(config))
        if run.dry_run:
            print("GPU: 32 GB for the full model with gradients and Adam's moments, 8 GB for its teacher, activations")
            print("disk: 60 GB for the models of all arms and a checkpoint; --ablate about 80 GB more")
            return {}
    config, model = (prepare_full if config.task else prepare_small)(config, run)
    run.config = config = check_shape(config, moe_layers(model))
    tuned, merged, recovered, compressed = arms_of(config, run)
    if run.draw and (config.tune or "msmoe" not in merged):
        raise common.UsageError("--plot draws M-SMoE beside the others: not with --tune, nor with --arms that lack it")
    work = config.finetune_steps * len(tuned) + len(merged) * 20 + 1.4 * config.recover_steps * len(recovered)
    work += (0 if config.task else config.pretrain_steps) + 2.0 * config.compress_steps * len(compressed)
    task = make_task(config, run, run.seed, 1)
    step = lambda model=model: cross_entropy(*task.outputs(model, task.train_batch(0))).backward()
    if run.dry_run:
        run.estimate(model, step, round(work * len(run.seeds)))
        return {}
    seconds = common.median_seconds(step, run.device) * work * len(run.seeds) / run.workers
    run.header(f"{'data' if config.task else 'text'} {', '.join(map(' '.join, run.data.items()))}", seconds)
    del model, step  # at full scale the arms need the memory

    results = {} if config.task else run.measure(pretrain_arm, config, ["pretrained"])
    results |= run.measure(finetune_arm, config, tuned)
    results |= run.measure(merge_arm, config, merged)
    results |= run.measure(recover_arm, config, recovered)
    results |= run.measure(compress_arm, config, compressed)
    if config.tune:
        print_grid(config, run, results)
        return {"arms": results}
    print_tables(config, run, results)
    if not config.arms:
        judge(config, run, results)
    draw(config, run, results)
    return {"arms": results}


if __name__ == "__main__":
    common.run(main, SMALL, FULL, CLAIMS)
