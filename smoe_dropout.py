"""SMoE-Dropout: a frozen random router, a growing k, and a transformer that can be slimmed at will.

Chen, Zhang, Jaiswal, Liu, Wang, "Sparse MoE as the New Dropout: Scaling Dense and Self-Slimmable Transformers"
(ICLR 2023, arXiv 2303.01610). For this script its abstract, captions, quotations and official code could be read.

A mixture of experts with a learned router is best at the k it was trained with and gets worse when more experts are
switched on; experts grow alike. SMoE-Dropout cuts a feed-forward of width d_ff into num_experts slices, routes with a
linear router that is random and NEVER TRAINED, and raises k from num_experts / 2 to num_experts during training:

    router_logits r = x W_r                 W_r ~ N(0, 0.02^2), frozen; but the gradient passes through r into x
    S               = the k largest of r
    w_e             = exp(r_e) / sum_{j in S} exp(r_j)  for e in S, else 0                    (sums to 1 for every k)
    y               = scale * sum_e w_e E_e(x),   E_e(x) = relu(x W1_e + b1_e) W2_e + b2_e
    k(step)         = k_min + round((k_max - k_min) * step / steps)

                 hidden units of the dense layer   |####|####|####|####|####|####|####|####|
                 token "(" at k = 4                | .33|    | .25|    |    | .22| .20|    |
                 token "(" at k = 8                | .19| .11| .15| .11| .10| .13| .12| .09|

Why "dropout": y is the dense layer under a block mask on its hidden units, chosen by the token and a random matrix,
less and less of it as training goes on; nothing is drawn at inference. The gate is a mean, so the scale of y does not
depend on k: that is what makes k a knob of the finished model.

Run      python smoe_dropout.py                under two minutes on two cores, no download
         python smoe_dropout.py --ablate       every arm below
         python smoe_dropout.py --full         4 layers of 8192 hidden units on enwik8, 400,000 steps (needs a GPU)
         torchrun --nproc-per-node 4 smoe_dropout.py --full               each arm on four GPUs together
         python smoe_dropout.py --tasks sst2,asdiv-a,mawps,svamp,csqa     fine-tune the trained models as well
         python smoe_dropout.py --objective mlm                           bidirectional, 15 % of bytes masked
You see  byte models trained dense, as SMoE-Dropout, with a learned router at k = 2 and with a frozen router at constant
         k: bits/byte at every k, active parameters, FLOPs, how alike the experts are, and what the claims became.
Found    (seeds 0-2) quality rises with every expert switched on from 4 to 8; a learned router at k = 2 is best at 2 and
         loses 0.013 bits/byte with all experts on. With all experts on SMoE-Dropout is 0.018 ahead of the dense model
         after equal steps, at 80 % of its training FLOPs, and 0.086 at equal FLOPs; its experts are less alike. Being
         slim has a price: at k = 4 a frozen router trained at that k is better (2.43 against 2.55). Two controls temper
         it: a frozen router at constant k = 8 can be slimmed as well and is 0.009 worse (growing k costs less), and
         a learned router under the same growing k is better at every k.

Differences from the paper and its code
1. The backbone is a pre-norm transformer with rotary positions and windows of 512 bytes, not Transformer-XL with
   memory: bits/byte of --full are NOT comparable with the paper's 1.1486 (k = 16) and 1.1776 (k = 8).
2. enwik8 as raw bytes; the official loader loses newlines (about 0.02 bits/byte): --drop-newlines. Windows are drawn
   at random, not from 22 parallel streams. Dropout acts inside the feed-forward only.
3. Small scale: scale = num_experts, so that k = num_experts and equal gates give the dense layer; with the initial
   weights used here the paper's scale = 1 does as well (arm scale_1). router_init = 0.04 spreads the router's logits as
   the official 0.02 does at d_model 256.
4. Every arm has the same steps and batches, and the best learning rate of 3e-3, 6e-3, 1.2e-2 on a text that is not
   reported (--tune --seed 100): 6e-3 for each arm of the default run; the others take it. Steps, router_init and rate
   were chosen on seeds 100-101. Small scale: 2 layers, d_model 64, the Python library, larger initial weights.
5. The official "expert drop" baseline trains without rescaling; ours divides by the share kept. THOR's wrapper there
   does not run; ours is two noisy passes and a symmetric KL term.
6. The paper cuts a dense layer into experts but released no code for it: `split_dense`, exact, and tested as such.
7. Not known: which layers of BERT are mixtures (here: all), BERT's settings, how math problems are answered. Here a
   head on the last byte picks one of the training set's equations, which is executed.

Break it yourself: --k-min 8 (no growing k: dearer, no better); --k-min 1 (slimmer, at a price); in
`SMoEDropout.forward` detach router_logits (the gradient through the gate is lost).
"""

import json
import random
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import cos, log, pi
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import bridge as common
import kernels
from bridge import Claim, Run
from data import download, tasks
from data import text as text_data

# ---------------------------------------------------------------------------------------------------------------
# Config
# ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    num_experts: int = 8  # slices of the feed-forward; official script: 16
    d_ff: int = 1024  # hidden width of all experts together; official script: 16 x 512
    k_min: int = 4  # experts a token at the first step; official script: half of num_experts
    schedule: str = "linear"  # how k grows: linear, cosine, exponential or random; the paper's is linear
    scale: float = 8.0  # factor on the output; the paper has 1
    num_layers: int = 2  # transformer layers; official script: 4
    d_model: int = 64  # width; official script: 256
    num_heads: int = 4  # attention heads; official script: 8
    context: int = 64  # bytes; official script: 512
    conv: int = 4  # width of the causal convolution after the embedding; 0: none
    dropout: float = 0.0  # inside the experts and on their output; official script: 0.1
    init: float = 0.1  # standard deviation of all initial weights but the router's; official code: 0.02
    router_init: float = 0.04  # that of the router's; official code: 0.02, which spreads logits as much at d_model 256
    objective: str = "lm"  # lm: next byte; mlm: bidirectional, 15 % of bytes masked
    steps: int = 1000  # training steps of every arm; official script: 400,000
    batch_size: int = 8  # windows a step; official script: 22
    lr: float = 6e-3  # peak, cosine to lr_final; small: every arm's best (--tune); official script: 2.5e-4
    beta2: float = 0.98  # of Adam; official script: torch's default
    lr_final: float = 0.1  # share of the peak at the last step; official script: 0
    warmup: int = 20  # steps; official script: none
    clip: float = 1.0  # largest norm of the gradient; official script: 0.25
    balance: float = 0.01  # weight of the balance loss in the arm learned_balance
    thor_alpha: float = 1.0  # weight of THOR's consistency term; our choice
    eval_bytes: int = 32768  # of held-out text, evenly spread; official script: all
    backend: str = "auto"  # of kernels.moe_mlp; masked: the dense layer under a mask, all experts computed
    text: str = ""  # file or folder to train on instead of the Python library or enwik8
    drop_newlines: bool = False  # as the official enwik8 loader does
    tune: bool = False  # every arm at lr / 2, lr and 2 lr, measured on the other half of the held-out text
    tasks: tuple[str, ...] = ()  # fine-tune on sst2, csqa, asdiv-a, mawps, svamp
    folds: int = 1  # of the cross-validated tasks asdiv-a and mawps; published: 5
    task_steps: int = 300  # fine-tuning steps; official script: 5000
    task_batch: int = 16  # examples a step; official script
    task_lr: float = 1e-3  # peak, cosine to 0; official script: 1e-4
    task_bytes: int = 256  # the last bytes of a text that are read


SMALL = Config()
MODEL = dict(num_experts=16, d_ff=8192, k_min=8, scale=1.0, num_layers=4, d_model=256, num_heads=8, context=512)
MODEL |= dict(conv=0, dropout=0.1, init=0.02, router_init=0.02)
TRAINING = dict(steps=400_000, batch_size=22, lr=2.5e-4, beta2=0.999, lr_final=0.0, warmup=0, clip=0.25)
TRANSFER = dict(folds=5, task_steps=5000, task_lr=1e-4, task_bytes=512)
FULL = replace(SMALL, **MODEL, **TRAINING, **TRANSFER, eval_bytes=5_000_000)

# ---------------------------------------------------------------------------------------------------------------
# The method
# ---------------------------------------------------------------------------------------------------------------


def topk_gate(router_logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest logits, and a softmax over these alone: a mean over experts for every k.

    router_logits [tokens, num_experts] -> expert_index [tokens, k] int64, gates [tokens, k] fp32 (float64 for float64)
    Raises ValueError for k outside 1 .. num_experts or non-finite logits (a GPU is not asked: that would wait for it;
    there NaN goes on into the gates).
    """
    check_k(k, router_logits.shape[-1])
    if router_logits.device.type == "cpu" and not torch.isfinite(router_logits).all():
        raise ValueError(f"router_logits {list(router_logits.shape)} hold NaN or infinity")
    logits = router_logits.to(torch.promote_types(router_logits.dtype, torch.float32))
    chosen, expert_index = logits.topk(k, dim=-1)  # [tokens, k]
    return expert_index, chosen.softmax(dim=-1)


def check_k(k: int, num_experts: int) -> int:
    if not isinstance(k, int) or isinstance(k, bool) or not 1 <= k <= num_experts:
        raise ValueError(f"k is {k!r}; a whole number from 1 to num_experts = {num_experts} is needed")
    return k


SCHEDULES = ("linear", "cosine", "exponential", "random")


def k_at(step: int, total_steps: int, k_min: int, k_max: int, schedule: str = "linear") -> int:
    """Experts a token at a step (from 0). The paper's schedule is linear; "random" is uniform, from the step alone.

    Raises ValueError for k_min < 1, k_min > k_max, total_steps < 1 or an unknown schedule.
    """
    if not 1 <= k_min <= k_max or total_steps < 1:
        raise ValueError(f"k_min is {k_min}, k_max {k_max}, total_steps {total_steps}; needed: 1 <= k_min <= k_max")
    grown = k_max - k_min
    if schedule == "linear":
        k = k_min + round(grown * step / total_steps)
    elif schedule == "cosine":
        k = k_max - round(grown * cos(pi * step / (2 * total_steps)))
    elif schedule == "exponential":
        k = k_max - round(grown * 0.99 ** (300 * step // total_steps))
    elif schedule == "random":
        k = random.Random(step).randint(k_min, k_max)
    else:
        raise ValueError(f"schedule is {schedule!r}; allowed: {', '.join(SCHEDULES)}")
    return min(max(k, k_min), k_max)


def split_dense(w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, num_experts: int) -> tuple[Tensor, ...]:
    """Cut a dense feed-forward into experts whose SUM is exactly the dense layer.

    w1 [d_model, d_ff], b1 [d_ff], w2 [d_ff, d_model], b2 [d_model] -> with h = d_ff / num_experts:
    w1 [num_experts, d_model, h], b1 [num_experts, h], w2 [num_experts, h, d_model], b2 [num_experts, d_model].
    SMoEDropout averages: with k = scale = num_experts and equal gates it gives this sum.
    Raises ValueError when num_experts does not divide d_ff.
    """
    width = check_width(w1.shape[1], num_experts)
    first = w1.view(-1, num_experts, width).transpose(0, 1).contiguous()
    return first, b1.view(num_experts, -1), w2.view(num_experts, width, -1), (b2 / num_experts).repeat(num_experts, 1)


def check_width(d_ff: int, num_experts: int) -> int:
    if num_experts < 1 or d_ff % num_experts:
        raise ValueError(f"d_ff is {d_ff}, num_experts {num_experts}; num_experts must be at least 1 and divide d_ff")
    return d_ff // num_experts


def masked_experts(
    x: Tensor, expert_index: Tensor, gates: Tensor, w1: Tensor, w2: Tensor, b1: Tensor, b2: Tensor,
    act: str = "relu", dropout: float = 0.0,
) -> Tensor:  # fmt: skip
    """The reference, and why it is called dropout: the dense layer with its hidden units masked in blocks.

    x [tokens, d_model], expert_index and gates [tokens, k] -> [tokens, d_model]. Computes all experts whatever k is.
    """
    num_experts, d_model, width = w1.shape
    weight = gates.new_zeros(len(x), num_experts).scatter(1, expert_index, gates)  # [tokens, num_experts]
    hidden = kernels.ACTIVATIONS[act](x @ w1.transpose(0, 1).reshape(d_model, -1) + b1.flatten())  # [tokens, d_ff]
    hidden = F.dropout(hidden, dropout) * weight.repeat_interleave(width, dim=1)
    return hidden @ w2.reshape(-1, d_model) + weight.to(b2.dtype) @ b2


def dispatched_experts(
    x: Tensor, expert_index: Tensor, gates: Tensor, w1: Tensor, w2: Tensor, b1: Tensor, b2: Tensor,
    act: str = "relu", dropout: float = 0.0, backend: str = "auto",
) -> Tensor:  # fmt: skip
    """The same numbers, computing only the chosen experts: sort by expert, grouped products, weighted sum."""
    if not dropout:
        return kernels.moe_mlp(x, expert_index, gates, w1, w2, b1, b2, act=act, backend=backend)
    dispatch = kernels.make_dispatch(expert_index, len(w1))
    hidden = kernels.ACTIVATIONS[act](kernels.grouped_mm(kernels.gather(x, dispatch), w1, dispatch, b1))
    return kernels.scatter(kernels.grouped_mm(F.dropout(hidden, dropout), w2, dispatch, b2), dispatch, gates)


def load_balancing_loss(router_logits: Tensor, expert_index: Tensor) -> Tensor:
    """num_experts * sum_e f_e P_e: f the share of assignments, P the mean probability. 0-dim; 1 when uniform.
    0 without tokens, whose mean would be NaN.

    The baseline's; SMoE-Dropout has none. (The official gate divides P by k once more.) Under data parallelism f is
    averaged over the processes, so that the mean of their losses is the loss of the batch.
    """
    num_experts = router_logits.shape[-1]
    if not len(router_logits):
        return router_logits.sum()
    f = torch.bincount(expert_index.flatten(), minlength=num_experts) / max(1, expert_index.numel())
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(f)
        f /= dist.get_world_size()
    return num_experts * (f * router_logits.softmax(dim=-1).mean(dim=0)).sum()


class SMoEDropout(nn.Module):
    """A drop-in feed-forward that can be slimmed. x [..., d_model] -> the same shape.

    d_ff      hidden width of all experts together; num_experts must divide it
    k         experts a token (default: all); `set_k` changes it, in training and after
    router    "frozen": random, never trained (the method); "learned"; "noise": fresh random scores at every call (THOR)
    scale     factor on the output: 1 as in the paper, num_experts to match the dense layer that was cut
    balance   weight of the balance loss, which a forward leaves in `aux_loss`
    backend   "masked", or a backend of kernels.moe_mlp: "auto", "torch", "triton"
    Every forward leaves `expert_index` [tokens, k]. Raises ValueError for impossible sizes or a wrong width.
    """

    def __init__(
        self, d_model: int, d_ff: int, num_experts: int, k: int | None = None, router: str = "frozen",
        scale: float = 1.0, dropout: float = 0.0, act: str = "relu", balance: float = 0.0, init: float = 0.02,
        router_init: float = 0.02, backend: str = "auto", generator: torch.Generator | None = None,
    ):  # fmt: skip
        if router not in ("frozen", "learned", "noise"):
            raise ValueError(f"router is {router!r}; allowed: frozen, learned, noise")
        super().__init__()
        width = check_width(d_ff, num_experts)
        self.d_model, self.num_experts, self.router_kind = d_model, num_experts, router
        self.scale, self.dropout, self.act, self.balance, self.backend = scale, dropout, act, balance, backend
        self.k = check_k(num_experts if k is None else k, num_experts)
        self.aux_loss: Tensor | None = None
        self.expert_index: Tensor | None = None
        normal = lambda std, *shape: nn.Parameter(torch.randn(shape, generator=generator) * std)
        self.router = nn.Linear(d_model, num_experts, bias=False)
        self.router.weight = normal(router_init, num_experts, d_model).requires_grad_(router == "learned")
        self.w1, self.b1 = normal(init, num_experts, d_model, width), nn.Parameter(torch.zeros(num_experts, width))
        self.w2, self.b2 = normal(init, num_experts, width, d_model), nn.Parameter(torch.zeros(num_experts, d_model))

    def __getstate__(self) -> dict:
        """For copy.deepcopy and pickle: an auxiliary loss belongs to a forward pass, and cannot be copied."""
        return {**self.__dict__, "aux_loss": None}

    def set_k(self, k: int) -> None:
        self.k = check_k(k, self.num_experts)

    @torch.no_grad()
    def load_dense(self, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> None:
        """Take the weights of a dense feed-forward, cut by `split_dense`."""
        for mine, given in zip((self.w1, self.b1, self.w2, self.b2), split_dense(w1, b1, w2, b2, self.num_experts)):
            mine.copy_(given)

    def expert_outputs(self, x: Tensor) -> Tensor:
        """Every expert on every token, without output bias. [tokens, d_model] -> [num_experts, tokens, d_model]"""
        return kernels.ACTIVATIONS[self.act](x @ self.w1 + self.b1[:, None]) @ self.w2

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.d_model:
            raise ValueError(f"x has width {x.shape[-1]}; this layer was made for d_model = {self.d_model}")
        tokens = x.reshape(-1, self.d_model)  # [tokens, d_model]
        if self.router_kind == "noise":
            router_logits = torch.rand(len(tokens), self.num_experts, device=x.device)
        else:
            with torch.autocast(x.device.type, enabled=False):  # in bf16, top-k would flip between machines
                router_logits = self.router(tokens.to(self.router.weight.dtype))  # [tokens, num_experts]
        self.expert_index, gates = topk_gate(router_logits, self.k)
        self.aux_loss = self.balance * load_balancing_loss(router_logits, self.expert_index) if self.balance else None
        weights = (tokens, self.expert_index, self.scale * gates.to(torch.promote_types(x.dtype, torch.float32)))
        weights += (self.w1, self.w2, self.b1, self.b2, self.act, self.dropout if self.training else 0.0)
        y = masked_experts(*weights) if self.backend == "masked" else dispatched_experts(*weights, self.backend)
        return F.dropout(y, self.dropout, self.training).view_as(x)


def set_k(model: nn.Module, k: int) -> None:
    """Slim, or fatten, every SMoEDropout layer of a model."""
    for layer in moe_layers(model):
        layer.set_k(k)


@contextmanager
def at_k(model: nn.Module, k: int | None) -> Iterator[None]:
    """Inside, the model runs at k (None: as it is); afterwards every layer has its own k again."""
    before = [layer.k for layer in moe_layers(model)]
    try:
        if k is not None:
            set_k(model, k)
        yield
    finally:
        for layer, own in zip(moe_layers(model), before):
            layer.k = own


def moe_layers(model: nn.Module) -> list[SMoEDropout]:
    return [module for module in model.modules() if isinstance(module, SMoEDropout)]


def effective_rank(outputs: Tensor) -> float:
    """How many different experts there are: exp of the entropy of the normalised squared singular values, 1 .. experts.

    outputs [num_experts, ...], one expert's output on the same tokens in each row.
    """
    rows = outputs.flatten(1).double()
    energy = torch.linalg.eigvalsh(rows @ rows.T).clamp(min=0)  # squared singular values
    share = energy / energy.sum()
    return float(torch.special.entr(share).sum().exp())


def mean_cosine(outputs: Tensor) -> float:
    """Mean cosine between different experts' outputs on the same token. outputs [num_experts, tokens, d_model]."""
    unit = F.normalize(outputs.double(), dim=-1)
    num_experts, num_tokens, _ = outputs.shape
    both = unit.sum(dim=0).square().sum() - unit.square().sum()  # all ordered pairs of different experts
    return float(both / (num_tokens * num_experts * (num_experts - 1)))


# ---------------------------------------------------------------------------------------------------------------
# Baselines
# ---------------------------------------------------------------------------------------------------------------


class DenseFFN(nn.Module):
    """The dense feed-forward with the same parameters. x [..., d_model] -> the same shape.

    dropout      ordinary, on hidden units and output
    expert_drop  in training, each of num_blocks slices is left out of a whole batch with this probability, the others
                 scaled up to match
    """

    def __init__(
        self, d_model: int, d_ff: int, num_blocks: int, dropout: float = 0.0, expert_drop: float = 0.0,
        init: float = 0.02, generator: torch.Generator | None = None,
    ):  # fmt: skip
        super().__init__()
        self.num_blocks, self.dropout, self.expert_drop = num_blocks, dropout, expert_drop
        self.width = check_width(d_ff, num_blocks)
        self.w1 = nn.Parameter(torch.randn(d_model, d_ff, generator=generator) * init)
        self.w2 = nn.Parameter(torch.randn(d_ff, d_model, generator=generator) * init)
        self.b1, self.b2 = nn.Parameter(torch.zeros(d_ff)), nn.Parameter(torch.zeros(d_model))

    def expert_outputs(self, x: Tensor) -> Tensor:
        """Every slice on every token, without bias. [tokens, d_model] -> [num_blocks, tokens, d_model]"""
        hidden = F.relu(x @ self.w1 + self.b1).unflatten(-1, (self.num_blocks, -1))  # [tokens, num_blocks, width]
        return hidden.transpose(0, 1) @ self.w2.view(self.num_blocks, self.width, -1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.dropout(F.relu(x @ self.w1 + self.b1), self.dropout, self.training)  # [..., d_ff]
        if self.training and self.expert_drop:
            kept = torch.rand(self.num_blocks, device=x.device) >= self.expert_drop
            hidden = hidden * (kept / (1 - self.expert_drop)).to(hidden.dtype).repeat_interleave(self.width)
        return F.dropout(hidden @ self.w2 + self.b2, self.dropout, self.training)


def symmetric_kl(logits_a: Tensor, logits_b: Tensor) -> Tensor:
    """KL(a || b) + KL(b || a) over the last dimension: THOR asks two noisy passes to agree. [..., n] -> [...]"""
    log_a, log_b = logits_a.float().log_softmax(dim=-1), logits_b.float().log_softmax(dim=-1)
    return ((log_a.exp() - log_b.exp()) * (log_a - log_b)).sum(dim=-1)


# ---------------------------------------------------------------------------------------------------------------
# The experiment: every arm on the same batches and steps, measured at every k
# ---------------------------------------------------------------------------------------------------------------

GRID = (0.5, 1, 2)  # the learning rates that are tried, as multiples of lr: the same for every arm
NUM_BLOCKS = 16  # of the held-out text: what a run of one seed takes its standard error over
MASK = 256  # the token of a masked byte


@dataclass(frozen=True)
class Arm:
    router: str  # dense, or a router of SMoEDropout
    k_min: int  # experts a token at the first step
    k_max: int  # and at the last; of the dense layer all slices
    schedule: str = "linear"
    scale: float | None = None
    dropout: float | None = None
    expert_drop: float = 0.0
    balance: float = 0.0
    equal_flops: bool = False  # only as many steps as cost what SMoE-Dropout costs
    lr: float | None = None


def trained_arms(config: Config, ablate: bool) -> dict[str, Arm]:
    full, half = config.num_experts, config.num_experts // 2
    ramp = Arm("frozen", config.k_min, full, config.schedule)
    arms = {"dense": Arm("dense", full, full), "smoe_dropout": ramp}
    arms |= {"learned_k2": Arm("learned", 2, 2), "frozen_half": Arm("frozen", half, half)}
    if ablate:
        arms["dense_dropout"] = replace(arms["dense"], dropout=0.0 if config.dropout else 0.1)
        arms["dense_expert_drop"] = replace(arms["dense"], expert_drop=0.5)
        arms |= {"frozen_full": Arm("frozen", full, full), "learned_ramp": replace(ramp, router="learned")}
        arms |= {name: replace(ramp, schedule=name) for name in SCHEDULES if name != config.schedule}
        arms["dense_equal_flops"] = replace(arms["dense"], equal_flops=True)
        arms |= {"learned_half": Arm("learned", half, half), "learned_full": Arm("learned", full, full)}
        arms["learned_balance"] = replace(arms["learned_k2"], balance=config.balance)
        arms["thor"] = replace(arms["learned_k2"], router="noise")
        arms |= {"scale_1": replace(ramp, scale=1.0)} if config.scale != 1 else {}
    tried = [name for name in arms if not arms[name].equal_flops] if config.tune else ["dense", "smoe_dropout"] * ablate
    rates = [factor * config.lr for factor in GRID if config.tune or factor != 1]
    grid = {f"{name}@{lr:g}": replace(arms[name], lr=lr) for name in tried for lr in rates}
    return grid if config.tune else arms | grid


def build(config: Config, arm: Arm, seed: int) -> common.TransformerLM:
    generator = torch.Generator().manual_seed(seed)
    dropout = config.dropout if arm.dropout is None else arm.dropout
    sizes, options = (config.d_model, config.d_ff, config.num_experts), {"init": config.init, "generator": generator}

    def make_ffn(layer: int) -> nn.Module:
        if arm.router == "dense":
            return DenseFFN(*sizes, dropout, arm.expert_drop, **options)
        scale = config.scale if arm.scale is None else arm.scale
        options_moe = {"balance": arm.balance, "router_init": config.router_init, "backend": config.backend, **options}
        return SMoEDropout(*sizes, arm.k_max, arm.router, scale, dropout, **options_moe)

    shape = (MASK + (config.objective == "mlm"), config.num_layers, config.d_model, config.num_heads, config.context)
    causal = {"causal": config.objective == "lm", "positions": "rope", "conv": config.conv}
    return common.TransformerLM(*shape, make_ffn, **causal, **options)


def load_corpus(config: Config, data_dir: Path, enwik8: bool) -> text_data.Corpus:
    """Training text; as `val` the second half of the held-out text, or the first, which only --tune sees."""
    if enwik8 and not config.text:
        path = download.fetch("enwik8", data_dir) / "enwik8"
        size, checksum = download.ENWIK8.members["enwik8"]
        parts = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8).split([90_000_000, 10_000_000])
        corpus = text_data.Corpus("enwik8", *parts, digest=checksum[:16], num_documents=1)
    else:
        corpus = text_data.load_text(config.text) if config.text else text_data.load_domain("python")
    if config.drop_newlines:
        corpus = corpus._replace(train=corpus.train[corpus.train != 10], val=corpus.val[corpus.val != 10])
    return corpus._replace(val=corpus.val.tensor_split(2)[0 if config.tune else 1])


def held_out_windows(corpus: text_data.Corpus, config: Config, run: Run) -> Tensor:
    """[windows, context + 1], evenly spread over the held-out text."""
    windows = text_data.all_windows(corpus.val, config.context)
    num = max(NUM_BLOCKS, min(len(windows), config.eval_bytes // config.context))
    return windows[torch.linspace(0, len(windows) - 1, num).long()].to(run.device)


def pose(windows: Tensor, objective: str, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """What a model reads, what it should say, and where that counts: three times [batch, context]."""
    if objective == "lm":
        return windows[:, :-1], windows[:, 1:], torch.ones_like(windows[:, 1:], dtype=torch.bool)
    chosen = torch.rand(windows[:, 1:].shape, generator=torch.Generator().manual_seed(seed)) < 0.15
    chosen = chosen.to(windows.device)
    return windows[:, 1:].masked_fill(chosen, MASK), windows[:, 1:], chosen


def byte_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """[batch, context, vocabulary] -> [batch, context], in nats."""
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)


def training_loss(model: nn.Module, arm: Arm, config: Config, windows: Tensor, step: int) -> tuple[Tensor, dict]:
    tokens, targets, counted = pose(windows, config.objective, step)
    mean = lambda values: (values * counted).sum() / counted.sum().clamp(min=1)
    logits = model(tokens)
    loss = mean(byte_losses(logits, targets))
    aux_loss = model.aux_loss()
    if arm.router == "noise":  # THOR: two passes, which should agree
        again = model(tokens)
        loss = (loss + mean(byte_losses(again, targets))) / 2
        aux_loss = config.thor_alpha * mean(symmetric_kl(logits, again))
    return loss + aux_loss, {"lm_loss": loss.detach(), "aux_loss": aux_loss.detach()}


def training_flops(config: Config, arm: Arm, windows: Tensor, k: int) -> dict[str, float]:
    """FLOPs a byte of one training step and of the feed-forwards' forward pass, counted as torch runs them."""
    model = build(config, arm, seed=0).to(windows.device)
    for layer in moe_layers(model):
        layer.k, layer.backend = k, "torch"  # only the chosen experts are computed
    counts = common.count_flops(lambda: training_loss(model, arm, config, windows, 0)[0].backward())
    with torch.no_grad():
        forward = common.count_flops(lambda: model(windows[:, :-1]))
    ffn = sum(count for name, count in forward.items() if name.endswith(".ffn"))
    num_bytes = windows[:, 1:].numel()
    return {"train": counts["Global"] / num_bytes, "ffn": ffn / num_bytes}


def schedule_flops(config: Config, arm: Arm, windows: Tensor, steps_at_k: dict[int, int]) -> float:
    """Training FLOPs of an arm that spent steps_at_k[k] steps at k."""
    per_byte = {k: training_flops(config, arm, windows, k)["train"] for k in steps_at_k}
    return sum(per_byte[k] * steps for k, steps in steps_at_k.items()) * config.batch_size * config.context


@torch.no_grad()
def evaluate(model: nn.Module, windows: Tensor, config: Config, k: int | None = None) -> list[float]:
    """Bits/byte of every block of the windows, at k experts a token."""
    model.eval()
    torch.manual_seed(0)  # THOR draws its routing
    losses = []
    with at_k(model, k):
        for i, batch in enumerate(windows.split(64)):
            tokens, targets, counted = pose(batch, config.objective, i)
            nats = byte_losses(model(tokens), targets) * counted
            losses.append(torch.stack([nats.sum(dim=1), counted.sum(dim=1)]).double())
    nats, count = torch.cat(losses, dim=1)  # [windows]
    return [float(n.sum() / c.sum() / log(2)) for n, c in zip(*(x.tensor_split(NUM_BLOCKS) for x in (nats, count)))]


@torch.no_grad()
def expert_statistics(model: nn.Module, windows: Tensor, config: Config, k: int) -> dict:
    """How alike the experts are, with every expert on; how evenly tokens are spread at k. One number a layer."""
    model.eval()
    seen: dict[int, Tensor] = {}
    watch = lambda layer: lambda _, inputs: seen.update({layer: inputs[0].flatten(0, -2)})
    hooks = [ffn.register_forward_pre_hook(watch(i)) for i, ffn in enumerate(model.ffns())]
    with at_k(model, config.num_experts):
        model(windows[:, :-1])
    for hook in hooks:
        hook.remove()
    outputs = [ffn.expert_outputs(seen[i]) for i, ffn in enumerate(model.ffns())]
    with at_k(model, k):
        model(windows[:, :-1])
    counts = [layer.expert_index.flatten().bincount(minlength=config.num_experts) for layer in moe_layers(model)]
    loads = [(count / count.sum()).tolist() for count in counts]
    return {"rank": [*map(effective_rank, outputs)], "cosine": [*map(mean_cosine, outputs)], "load": loads}


def swept(config: Config) -> list[int]:
    """The k at which models are measured: a few small ones, and every one from num_experts / 2 on."""
    return sorted({1, 2, config.num_experts // 4, *range(config.num_experts // 2, config.num_experts + 1)})


def measure_model(model: nn.Module, arm: Arm, windows: Tensor, config: Config) -> dict:
    ks = swept(config) if moe_layers(model) else [config.num_experts]
    blocks = {str(k): evaluate(model, windows, config, k) for k in ks}
    few = windows[:2]
    return {
        "k_max": arm.k_max,
        "blocks": blocks,
        "bits": {k: float(np.mean(values)) for k, values in blocks.items()},
        "active": {str(k): common.count_parameters(model, k) for k in ks},
        "ffn_flops": {str(k): training_flops(config, arm, few, k)["ffn"] for k in ks},
        "frozen": sum(p.numel() for p in model.parameters() if not p.requires_grad),
        **expert_statistics(model, windows[:16], config, config.num_experts // 2),
    }


def train_arm(config: Config, arm: str, seed: int, run: Run) -> dict:
    settings, corpus = trained_arms(config, True)[arm], load_corpus(config, run.data_dir, run.scale == "full")
    windows = held_out_windows(corpus, config, run)
    steps = config.steps
    ramp = lambda step: k_at(step, config.steps, settings.k_min, settings.k_max, settings.schedule)
    if settings.equal_flops:
        rival = trained_arms(config, False)["smoe_dropout"]
        planned = Counter(k_at(s, steps, rival.k_min, rival.k_max, rival.schedule) for s in range(steps))
        cost = schedule_flops(config, rival, windows[:2], planned)
        steps = max(1, round(steps * cost / schedule_flops(config, settings, windows[:2], {settings.k_max: steps})))
    if run.compile:  # a graph for every k; by default torch stops compiling at the ninth
        torch._dynamo.config.recompile_limit = 4 * config.num_experts
    model = run.prepare(build(config, settings, seed))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=settings.lr or config.lr, betas=(0.9, config.beta2))

    def batches(step: int) -> Tensor:
        generator = torch.Generator().manual_seed(1_000_003 * seed + step)
        drawn = text_data.sample_windows(corpus.train, config.batch_size, config.context + 1, generator)
        return drawn.to(run.device)

    def loss_fn(drawn: Tensor, step: int) -> tuple[Tensor, dict]:
        set_k(model, ramp(step))
        loss, values = training_loss(model, settings, config, drawn, step)
        return loss, {**values, "k": float(ramp(step))}

    torch.manual_seed(seed)  # dropout and THOR draw from torch's own stream
    schedule = common.cosine(steps, warmup=min(config.warmup, steps // 5), final=config.lr_final)
    options = {"optimizer": optimizer, "schedule": schedule, "clip": config.clip, **run.train_options(arm, seed)}
    common.train(model, loss_fn, steps, batches=batches, **options)
    common.save(run.path(arm, seed, ".pt"), model.state_dict())
    log_lines = [json.loads(line) for line in run.path(arm, seed, ".jsonl").read_text().splitlines()]
    steps_at_k = Counter(int(line["k"]) for line in log_lines)  # read back: what ran, interrupted or not
    flops = schedule_flops(config, settings, windows[:2], steps_at_k)
    return {"train_flops": flops, "steps": sum(steps_at_k.values())} | measure_model(model, settings, windows, config)


def sliced(config: Config) -> Arm:
    return Arm("frozen", config.num_experts, config.num_experts, scale=config.num_experts)


def slice_dense(config: Config, arm: str, seed: int, run: Run) -> dict:
    """Control without training: the dense model cut into experts behind a frozen random router."""
    settings = sliced(config)
    corpus, model = load_corpus(config, run.data_dir, run.scale == "full"), build(config, settings, seed)
    dense = build(config, trained_arms(config, False)["dense"], seed)
    dense.load_state_dict(common.load(run.path("dense", seed, ".pt")))
    weights = {name: value for name, value in dense.state_dict().items() if ".ffn." not in name}
    model.load_state_dict(weights, strict=False)
    for ffn, whole in zip(model.ffns(), dense.ffns()):
        ffn.load_dense(whole.w1, whole.b1, whole.w2, whole.b2)
    common.save(run.path(arm, seed, ".pt"), model.state_dict())
    return measure_model(model.to(run.device), settings, held_out_windows(corpus, config, run), config)


class Classifier(nn.Module):
    """A body with a head on the last byte. rows [batch, choices, bytes] -> [batch, choices * num_classes]."""

    def __init__(self, body: common.TransformerLM, num_classes: int):
        super().__init__()
        d_model, body.head = body.embedding.embedding_dim, nn.Identity()
        self.body, self.hidden, self.out = body, nn.Linear(d_model, d_model), nn.Linear(d_model, num_classes)

    def forward(self, rows: Tensor) -> Tensor:
        last = self.body(rows.flatten(0, 1))[:, -1]  # [batch * choices, d_model]
        return self.out(F.dropout(self.hidden(last).tanh(), 0.1, self.training)).view(len(rows), -1)


def task_folds(config: Config, name: str) -> range:
    return range(config.folds if name in ("asdiv-a", "mawps") else 1)


def task_arms(config: Config, sources: list[str]) -> list[str]:
    """Every pre-trained model, at half and all experts, on every task and fold: "svamp.fold0.dense.k8"."""
    half, full = config.num_experts // 2, config.num_experts
    models = [f"{source}.k{k}" for source in sources for k in ((full,) if source == "dense" else (half, full))]
    return [f"{name}.fold{i}.{model}" for name in config.tasks for i in task_folds(config, name) for model in models]


def finetune_arm(config: Config, arm: str, seed: int, run: Run) -> dict:
    """A task for a pre-trained model, at one k from beginning to end; all weights but a frozen router are trained."""
    task, fold, source, k = arm.split(".")
    parts = tasks.load_task(task, run.data_dir, int(fold.removeprefix("fold")))
    rows, classes, dev_rows, right = tasks.pose(*parts, config.task_bytes)
    body = build(config, trained_arms(config, True)[source], seed)
    body.load_state_dict(common.load(run.path(source, seed, ".pt")))
    set_k(body, int(k.removeprefix("k")))
    torch.manual_seed(seed)
    model = run.prepare(Classifier(body, right.shape[1] // rows.shape[1]))
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=config.task_lr)

    def batches(step: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(1_000_003 * seed + step)
        drawn = torch.randint(len(rows), (config.task_batch,), generator=generator)
        return rows[drawn].to(run.device), classes[drawn].to(run.device)

    def loss_fn(batch: tuple[Tensor, Tensor], step: int) -> tuple[Tensor, dict]:
        return F.cross_entropy(model(batch[0]).float(), batch[1]), {}

    options = {"optimizer": optimizer, "schedule": common.cosine(config.task_steps, final=0.0), "clip": config.clip}
    common.train(model, loss_fn, config.task_steps, batches=batches, **options, **run.train_options(arm, seed))
    common.save(run.path(arm, seed, ".pt"), model.state_dict())
    model.eval()
    with torch.no_grad():
        predicted = torch.cat([model(part.to(run.device)).argmax(dim=1).cpu() for part in dev_rows.split(64)])
    return {"accuracy": float(right[torch.arange(len(right)), predicted].double().mean()), "examples": len(right)}


def load_trained(path: str | Path) -> nn.Module:
    """The model of an arm, in eval mode, from what a run left: runs/smoe_dropout-small/arms/smoe_dropout-seed0.pt.

    It runs at the k it was last trained at; `set_k` slims it. An arm of --tasks is a Classifier. Raises UsageError: see
    common.load_trained.
    """

    def make(trained: common.Trained) -> nn.Module:
        config, state = trained.config, common.load(path)
        source, k = trained.arm.split(".")[2:] if trained.arm.count(".") == 3 else (trained.arm, "")
        arms = trained_arms(config, ablate=True) | {"dense_sliced": sliced(config)}
        model = build(config, arms[source], seed=0)
        if k:
            set_k(model, int(k.removeprefix("k")))
            model = Classifier(model, len(state["out.bias"]))
        model.load_state_dict(state)
        return model

    return common.load_trained(path, Config, make)


# ---------------------------------------------------------------------------------------------------------------
# Claims
# ---------------------------------------------------------------------------------------------------------------

MATH = ("asdiv-a", "mawps", "svamp")
CLAIMS = [
    Claim("smoe_dropout.slimmable", "bits/byte falls with every expert switched on, from num_experts / 2 to all",
          "BPC 1.1776 at k = 8, 1.1486 at 16 (enwik8)", required=True),
    Claim("smoe_dropout.learned_peaks", "a learned router at constant k is best near that k and gets worse when all "
          "experts are on", "not verified (figures of Table 1 not seen)", required=True),
    Claim("smoe_dropout.beats_dense", "with all experts on, better than a dense model with the same parameters, "
          "each at its best learning rate", "not verified (dense row of Table 1 not seen)", required=True),
    Claim("smoe_dropout.compute", "training costs less than the dense model's", "up to 37 % of time", required=True),
    Claim("smoe_dropout.less_collapse", "experts are less alike (effective rank of their outputs) than the dense "
          "layer's slices or a learned router's", "not verified (its metric was not found)"),
    Claim("smoe_dropout.schedule", "with all experts on, the linear schedule beats the others",
          "BPC 1.1486 linear, 1.1858 cosine, 1.1877 exponential (enwik8)"),
    Claim("smoe_dropout.transfer", "fine-tuned on math word problems, better than dense",
          "+1.03, +0.78, +1.09 points on ASDiv-A, MAWPS, SVAMP (BERT)"),
    Claim("smoe_dropout.router_matters", "under the same growing k, a frozen router beats a learned one",
          "not verified (the control is ours)"),
]  # fmt: skip

Results = dict[str, list[dict]]  # {arm: [one result a seed]}


def bits(results: Results, arm: str, k: int) -> np.ndarray:
    """Bits/byte at k, one a seed; with a single seed, one a block of the held-out text."""
    found = results[arm]
    return np.array(found[0]["blocks"][str(k)] if len(found) == 1 else [result["bits"][str(k)] for result in found])


def curve(results: Results, arm: str) -> dict[int, float]:
    """Mean bits/byte by k."""
    return {int(k): float(np.mean([result["bits"][k] for result in results[arm]])) for k in results[arm][0]["bits"]}


def values(results: Results, arm: str, key: str) -> np.ndarray:
    return np.array([np.mean(result[key]) for result in results[arm]])  # [seeds]


def judge(config: Config, run: Run, results: Results, transfer: Results) -> None:
    """From measurements to claim rows."""
    full, half = config.num_experts, config.num_experts // 2
    ours = bits(results, "smoe_dropout", full)
    shown = lambda margin: common.show(margin if len(run.seeds) > 1 else [margin.mean()])

    def report(id: str, margin: np.ndarray, text: str, **numbers: object) -> None:
        lists = {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in numbers.items()}
        run.claim(f"smoe_dropout.{id}", text.format(shown(margin)), {"margin": margin.tolist(), **lists}, margin)

    ks = [k for k in swept(config) if k >= half]
    gains = {(a, b): bits(results, "smoe_dropout", a) - bits(results, "smoe_dropout", b) for a, b in zip(ks, ks[1:])}
    (a, b), weakest = min(gains.items(), key=lambda item: item[1].mean())
    by_k = curve(results, "smoe_dropout")
    text = f"{by_k[half]:.3f} bits/byte at k = {half}, {by_k[full]:.3f} at {full}; weakest step, {a} to {b}: {{}}"
    report("slimmable", weakest, text, bits=by_k)
    by_k = curve(results, "learned_k2")
    best = min(by_k, key=by_k.get)
    lost = bits(results, "learned_k2", full) - bits(results, "learned_k2", 2)
    text = f"trained at k = 2, best at {best}; {shown(lost)} bits/byte worse at {full} than at 2"
    report("learned_peaks", lost * (best <= half), text, bits=by_k)
    text = f"{{}} bits/byte better (k = {full})"
    numbers = {"dense": bits(results, "dense", full), "smoe_dropout": ours}
    if run.ablate:
        numbers["equal_flops"] = bits(results, "dense_equal_flops", full) - ours
        text += f"; {shown(numbers['equal_flops'])} at equal training FLOPs"
    report("beats_dense", numbers["dense"] - ours, text, **numbers)
    saved = 1 - values(results, "smoe_dropout", "train_flops") / values(results, "dense", "train_flops")
    ffn = [results[arm][0]["ffn_flops"][str(full)] for arm in ("dense", "smoe_dropout")]
    text = f"{100 * saved.mean():.1f} % of all training FLOPs saved; at k = {full} the feed-forward costs "
    report("compute", saved, text + f"{100 * ffn[1] / ffn[0] - 100:+.1f} % (the router)", saved=saved)
    ranks = {arm: values(results, arm, "rank") for arm in ("smoe_dropout", "dense", "learned_k2")}
    rival = max(("dense", "learned_k2"), key=lambda arm: ranks[arm].mean())
    text = "; ".join(f"{arm} {rank.mean():.2f}" for arm, rank in ranks.items())
    margin = ranks["smoe_dropout"] - ranks[rival]
    if len(run.seeds) == 1:
        margin = np.array(results["smoe_dropout"][0]["rank"]) - np.array(results[rival][0]["rank"])  # [layers]
    report("less_collapse", margin, f"{text} of at most {full}; {{}} more than {rival}", **ranks)
    if run.ablate:
        ends = {name: curve(results, name)[full] for name in SCHEDULES if name != config.schedule}
        rival = min(ends, key=ends.get)
        text = f"{{}} bits/byte better than the best other, {rival}; {curve(results, 'smoe_dropout')[full]:.3f} "
        text += ", ".join([config.schedule, *(f"{end:.3f} {name}" for name, end in ends.items())])
        report("schedule", bits(results, rival, full) - ours, text, **ends)
        text = "{} bits/byte better than a learned router (negative: worse)"
        report("router_matters", bits(results, "learned_ramp", full) - ours, text, smoe_dropout=ours)
    solved = {}  # task -> gain over dense, in points, one a seed
    for name in (name for name in config.tasks if name in MATH):
        right = lambda i, arm, name=name: values(transfer, f"{name}.fold{i}.{arm}.k{full}", "accuracy")
        gains = [right(i, "smoe_dropout") - right(i, "dense") for i in task_folds(config, name)]
        solved[name] = 100 * np.mean(gains, axis=0)  # [seeds]
    if solved:
        gain = np.array(list(solved.values()))  # [tasks, seeds]
        text = ", ".join(f"{name} {gain.mean():+.2f}" for name, gain in solved.items()) + " points; mean {}"
        report("transfer", gain.mean(axis=0) if len(run.seeds) > 1 else gain[:, 0], text, **solved)
    else:
        run.claim("smoe_dropout.transfer", f"not measured; needs --tasks {','.join(MATH)} (a download)", {})


def print_tables(config: Config, run: Run, results: Results, transfer: Results) -> None:
    full, half = config.num_experts, config.num_experts // 2
    arms, plural = [arm for arm in results if "@" not in arm], f"{len(run.seeds)} seed(s)"
    rows = []
    for arm in arms:
        by_k, spread = curve(results, arm), common.show([r["bits"][str(full)] for r in results[arm]], 3)
        rows.append([arm, *(f"{by_k[k]:.3f}" if k in by_k else "" for k in swept(config)), spread])
    run.table(f"bits/byte at k experts a token, {plural}", ["arm", *swept(config), f"k = {full}"], rows)
    rows, dense = [], values(results, "dense", "train_flops").mean()
    for arm in arms:
        first = results[arm][0]
        at = [str(k) for k in (half, full)] if str(half) in first["active"] else [str(full)] * 2
        active, flops = ([f"{first[key][k] / 1e3:,.1f}" for k in at] for key in ("active", "ffn_flops"))
        cost = values(results, arm, "train_flops").mean() if "train_flops" in first else 0.0
        rows.append([arm, *active, f"{first['frozen'] / 1e3:,.1f}", *flops, f"{cost:.3g}", f"{cost / dense:.3f}"])
    both = [f"k = {half}", f"k = {full}"]
    header = ["arm", *(f"active, {k}" for k in both), "frozen", *(f"FFN kFLOP/byte, {k}" for k in both)]
    run.table("parameters (thousands) and work", [*header, "training FLOPs", "of dense"], rows)
    rows = []
    for arm in arms:
        mean = {key: np.mean([result[key] for result in results[arm]], axis=0) for key in ("rank", "cosine")}
        loads = [np.std(load) / np.mean(load) for result in results[arm] for load in result["load"]]
        even = f"{np.mean(loads):.2f}" if loads else ""
        rows.append([arm, *(" ".join(f"{x:.2f}" for x in mean[key]) for key in mean), even])
    header = ["arm", f"effective rank of {full}", "cosine", f"load spread at k = {half}"]
    run.table("how alike the experts are, layer by layer; standard deviation / mean of the load", header, rows)
    if run.ablate:
        cell = lambda arm: f"{curve(results, arm)[half]:.3f}  {curve(results, arm)[full]:.3f}"
        grid = {"frozen": ("frozen_half", "frozen_full", "smoe_dropout")}
        grid["learned"] = ("learned_half", "learned_full", "learned_ramp")
        header = ["router", f"constant {half}", f"constant {full}", "growing"]
        rows = [[router, *map(cell, row)] for router, row in grid.items()]
        run.table(f"bits/byte at k = {half} and {full}: router by schedule", header, rows)
    if transfer:
        of = lambda arm: [common.show(100 * values(transfer, arm, "accuracy"), 2), transfer[arm][0]["examples"]]
        rows = [[arm, *of(arm)] for arm in transfer]
        run.table("fine-tuned: % right on the development set", ["task, fold, model, k", "% right", "examples"], rows)


def print_grid(config: Config, run: Run, results: Results) -> None:
    """The learning-rate grid, on the seeds that ran all of it: bits/byte at the last k of training."""
    rates, rows = [factor * config.lr for factor in GRID], []
    for name in dict.fromkeys(label.partition("@")[0] for label in results if "@" in label):
        tried = [results.get(f"{name}@{lr:g}", results.get(name)) for lr in rates]
        tried = [found[: min(map(len, tried))] for found in tried]
        rows.append([name, *(f"{np.mean([one['bits'][str(one['k_max'])] for one in found]):.3f}" for found in tried)])
    title = f"the learning-rate grid, {len(tried[0])} seed(s) from {run.seed}: bits/byte at the last k of training"
    run.table(title, ["arm", *(f"{lr:g}" for lr in rates)], rows)


def draw(config: Config, run: Run, results: Results) -> None:
    curves = {arm: curve(results, arm) for arm in results if "@" not in arm and "flops" not in arm}
    main_arms = [arm for arm in ("dense", "smoe_dropout", "learned_k2", "frozen_half", "dense_sliced") if arm in curves]
    crossed = [f"{router}_{k}" for router in ("frozen", "learned") for k in ("half", "full", "ramp")]

    def trade_off(ax) -> None:
        active = lambda arm: [results[arm][0]["active"][str(k)] / 1e3 for k in curves[arm]]
        series = {arm: (active(arm), list(curves[arm].values())) for arm in main_arms}
        common.lines(ax, series, xlabel="active parameters, thousands", ylabel="bits/byte", title="slimming")

    def grid(ax) -> None:
        trained = lambda arm: [(k, b) for k, b in curves[arm].items() if 2 * k >= config.num_experts]
        series = {arm: tuple(zip(*trained(arm))) for arm in ["smoe_dropout", *crossed] if arm in curves}
        common.lines(ax, series, xlabel="k", ylabel="bits/byte", title="is it the router or the growing k?")

    def ranks(ax) -> None:
        heights = {arm.replace("_", "\n"): values(results, arm, "rank").mean() for arm in main_arms[:4]}
        common.bars(ax, heights, ylabel="effective rank", title="how different the experts are")

    def load(ax) -> None:
        share = results["smoe_dropout"][0]["load"][0]
        common.bars(ax, {str(e): share[e] for e in range(len(share))}, xlabel="expert", ylabel="share of assignments",
                    title="load of the frozen router, first layer")  # fmt: skip

    run.plot("smoe_dropout", [trade_off, grid, ranks, load])


# ---------------------------------------------------------------------------------------------------------------
# main
# ---------------------------------------------------------------------------------------------------------------


def check(config: Config, run: Run, corpus: text_data.Corpus) -> None:
    """Refuse impossible settings before anything is written."""
    check_width(config.d_ff, config.num_experts)
    k_at(0, 1, config.k_min, config.num_experts, config.schedule)
    if config.num_experts < 4:
        raise ValueError(f"num_experts is {config.num_experts}; the arms (k = 2, half, all) need at least 4")
    if config.objective not in ("lm", "mlm"):
        raise ValueError(f"objective is {config.objective!r}; allowed: lm, mlm")
    if config.tune and config.tasks:
        raise ValueError("--tune tries learning rates and nothing else; drop --tasks")
    may_be_zero = ("conv", "warmup", "dropout", "balance", "thor_alpha", "lr_final", "router_init")
    for name, value in vars(config).items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if is_number and (value < 0 or (value == 0 and name not in may_be_zero) or (value >= 1 and name == "dropout")):
            raise ValueError(f"{name} is {value}; it must be positive{', and below 1' * (name == 'dropout')}")
    if config.folds > 5:
        raise ValueError(f"folds is {config.folds}; the cross-validated tasks have 5")
    for name in config.tasks if not run.dry_run else ():
        for fold in task_folds(config, name):
            tasks.load_task(name, run.data_dir, fold)
    needed = NUM_BLOCKS * config.context + 1
    if min(len(corpus.train), len(corpus.val)) < needed:
        sizes = f"{len(corpus.train)} bytes to train on, {len(corpus.val)} to measure on"
        raise ValueError(f"text {corpus.name!r} is too short: {sizes}, at least {needed} needed of each")


def main(config: Config, run: Run) -> dict:
    from_enwik8 = run.scale == "full" and not config.text
    corpus = load_corpus(config, run.data_dir, from_enwik8 and not run.dry_run)  # a dry run downloads nothing
    check(config, run, corpus)
    run.data = {corpus.name: corpus.digest}
    arms, windows = trained_arms(config, run.ablate), held_out_windows(corpus, config, run)
    sources = [arm for arm in ("dense", "learned_k2", "thor", "smoe_dropout") if arm in arms]
    steps = config.steps * len(arms) + config.task_steps * len(task_arms(config, sources))
    parts = config.batch_size if run.dry_run and run.device == "cpu" else 1  # there a full-scale step takes a minute
    typical = Arm("frozen", 1, config.num_experts)
    batch = windows[torch.arange(config.batch_size // parts) % len(windows)]
    model = build(config, typical, run.seed).to(run.device)
    step = lambda: training_loss(model, typical, config, batch, 0)[0].backward()
    if run.dry_run:
        names = {tasks.TASKS[name][1] for name in config.tasks} | ({"enwik8"} if from_enwik8 else set())
        size = sum(file.size or 0 for name in names for file in download.DATASETS[name].files)
        run.estimate(model, step, len(run.seeds) * steps, size, parts)
        return {}
    rounds = -(-len(run.seeds) * len(arms) // run.workers)  # arms that one worker trains in turn
    seconds = 1.4 * rounds * config.steps * common.median_seconds(step, run.device)  # measuring takes the rest
    run.header(f"text {corpus.name} {corpus.digest}", seconds)
    if corpus.note:
        print(corpus.note)

    once = [arm for arm in arms if "@" in arm and not config.tune]  # the grid, which one seed shows
    results = run.measure(train_arm, config, [arm for arm in arms if arm not in once])
    found = run.map_arms(train_arm, [(config, arm, run.seed) for arm in once])
    results |= {arm: [result] for arm, result in zip(once, found)}
    if config.tune:
        print_grid(config, run, results)
        for claim in run.claims:
            claim.measured = "not measured while tuning"
        return {"arms": results}
    results |= run.measure(slice_dense, config, ["dense_sliced"])
    transfer = run.measure(finetune_arm, config, task_arms(config, sources)) if config.tasks else {}
    print_tables(config, run, results, transfer)
    if run.ablate:
        print_grid(config, run, results)
    judge(config, run, results, transfer)
    draw(config, run, results)
    return {"arms": results, "tasks": transfer}


if __name__ == "__main__":
    common.run(main, SMALL, FULL, CLAIMS, data_parallel=True)
