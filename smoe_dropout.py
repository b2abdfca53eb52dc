"""SMoE-Dropout: a frozen random router, a growing k, and a transformer that can be slimmed at will.

Chen, Zhang, Jaiswal, Liu, Wang, "Sparse MoE as the New Dropout: Scaling Dense and Self-Slimmable
Transformers" (ICLR 2023, arXiv 2303.01610). Its abstract, captions and official code were read.

In a mixture of experts a learned router fits the k it was trained with: whom it chooses improves
and is chosen more, experts grow alike, and to switch more of them on does not help. SMoE-Dropout
cuts a feed-forward of width d_ff into num_experts slices, the experts E_e, and never trains the
router W_r. For a token x that chooses the experts S:

    router_logits r = x W_r                         W_r ~ N(0, 0.02^2), frozen
    S               = the k largest of r
    w_e             = exp(r_e) / sum_{j in S} exp(r_j)  for e in S, else 0     their sum is 1
    y               = scale * sum_e w_e E_e(x),   E_e(x) = relu(x W1_e + b1_e) W2_e + b2_e
    k(step)         = k_min + round((num_experts - k_min) * step / steps)

In numbers: r = [1, 3, 2, 0], the experts say E = [8, 4, 2, 6], and scale is 1.

                 hidden units of the dense layer   |  E_0  |  E_1  |  E_2  |  E_3  |    y
                 w at k = 1                        |       |  1.00 |       |       |   4.00
                 w at k = 2                        |       |  0.73 |  0.27 |       |   3.46
                 w at k = 4                        |  0.09 |  0.64 |  0.24 |  0.03 |   3.94

What does a frozen router do to the gradient? dy/dx = sum_e w_e dE_e/dx + sum_e w_e (E_e - y) W_r^e,
W_r^e the column of expert e. The second sum moves x to where better experts are, but none of it
reaches W_r: no expert wins the router over. Why does k grow? Training masks hidden units of the
dense layer in blocks, chosen by the token and a random matrix: a dropout, less and less of it, and
cheap in the beginning. What is slimmable? The gate is a mean, so the scale of y does not depend on
k, and k is a knob of the finished model: more experts, more work, better text.

Run      python smoe_dropout.py                      two minutes on two cores, no download
         python smoe_dropout.py --ablate             two controls, too; --seeds 8 for verdicts
         python smoe_dropout.py --sample 'class '    the trained model writes, at several k
         python smoe_dropout.py --full               enwik8, 400,000 steps (needs a GPU)
         python smoe_dropout.py --tasks sst2,svamp   then fine-tunes; others: csqa asdiv-a mawps
You see  bits/byte at every k of byte models trained dense, as SMoE-Dropout and with learned
         routers; what each k costs; a text written at several k; and what became of the claims.
Found    (seeds 0-7) Every expert from the fifth to the eighth improves the finished model: 2.548
         bits/byte at k = 4, 2.433 at 8, the last step by 0.006 ± 0.001. With all on it beats the
         dense model (2.452) by 0.019 ± 0.009 at 80 % of its training FLOPs, and its experts are
         less alike: effective rank 7.0, dense 5.4, learned 6.7. But no time is saved: a step took
         7 ± 3 % more of a busy CPU, where sorting by expert costs what it saves. And a learned
         router at constant k = 4 hardly minds more experts (0.002 ± 0.001 lost at 8) and is better
         at every k: 2.407 at 4, 2.409 at 8.
Differences from the paper and its code
1. A pre-norm transformer with rotary positions on windows of 512 bytes, not Transformer-XL with
   memory; enwik8 with its newlines: bits/byte of --full are not comparable. No BERT, no RoBERTa.
2. Small scale: scale = num_experts, so that equal gates at k = num_experts give the dense layer;
   router_init = 0.04 spreads logits as the official 0.02 does at d_model 256.
3. Exponential schedule: officially 0.99 ** (step // (steps // 300)), here 0.99 ** (300 * step //
   steps), which a run of less than 300 steps can have, too; from 8 to 16, 258 of 1000 differ.
4. Expert drop (dense@expert_drop=0.5): officially unit j belongs to slice j mod num_experts and
   nothing is rescaled; here slices are contiguous, and those kept are scaled by 1 / (1 - p).
5. Left out: THOR (official code: a KL averaged over the 256 bytes, 1/256 of the usual sum),
   DropBlock, Concrete Dropout.
6. The paper cuts dense layers but released no code for it: `split_dense`, exact. How math problems
   are answered is not known: here a head on the last byte picks an equation, which is executed.
7. Every arm at lr 6e-3, on seed 100 the best of 3e-3, 6e-3, 1.2e-2 of all that were tried: dense,
   smoe_dropout, learned_k2, frozen_half.

Break it yourself: --k-min 8 (seeds 2-4: dearer, not better: 2.576 at k = 4, 2.450 at 8, instead
of 2.547, 2.439); --arms learned_ramp (seeds 0, 2, 3: better at every k: 2.422, 2.413, instead of
2.548, 2.436); detach router_logits in `SMoEDropout.forward` (seed 0: 2.671, 2.450, instead of
2.544, 2.422).
"""

import operator
import random
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise, zip_longest
from math import cos, log, pi
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
    Positive,
    Range,
    Results,
    Run,
    Share,
    Whole,
    check,
    claim,
    show,
)
from data import download, tasks
from data import text as text_data

# --------------------------------------------------------------------------------------------------
# The method
# --------------------------------------------------------------------------------------------------


def topk_gate(router_logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest logits, and a softmax over these alone: a mean over experts for every k.

    router_logits [tokens, num_experts] -> expert_index [tokens, k] int64, gates [tokens, k], fp32
    (float64 for float64). Raises ValueError for k outside 1 .. num_experts, and for logits that are
    not finite (a GPU is not asked, that would wait for it: there NaN goes on into the gates).
    """
    k = check_k(k, router_logits.shape[-1])
    if router_logits.device.type == "cpu" and not torch.isfinite(router_logits).all():
        raise ValueError(f"router_logits {list(router_logits.shape)} hold NaN or infinity")
    logits = router_logits.to(torch.promote_types(router_logits.dtype, torch.float32))
    chosen, expert_index = logits.topk(k, dim=-1)  # [tokens, k]
    return expert_index, chosen.softmax(dim=-1)


def check_k(k: int, num_experts: int) -> int:
    """k as an int, whatever kind of whole number it is (NumPy's, say). Raises ValueError."""
    try:
        whole = operator.index(k)
    except TypeError:
        whole = 0
    if isinstance(k, bool) or not 1 <= whole <= num_experts:
        needed = f"a whole number from 1 to num_experts = {num_experts} is needed"
        raise ValueError(f"k is {k!r}; {needed}")
    return whole


def k_at(step: int, total_steps: int, k_min: int, k_max: int, schedule: str = "linear") -> int:
    """Experts a token at a step (from 0). The paper's schedule is linear.

    schedule  linear, cosine, exponential, or random: uniform, drawn from the step alone
    Raises ValueError for k_min < 1, k_min > k_max, total_steps < 1 or an unknown schedule.
    """
    if not 1 <= k_min <= k_max or total_steps < 1:
        given = f"k_min is {k_min}, k_max {k_max}, total_steps {total_steps}"
        raise ValueError(f"{given}; needed: 1 <= k_min <= k_max and a step")
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
        raise ValueError(f"schedule is {schedule!r}; linear, cosine, exponential, random are known")
    return min(max(k, k_min), k_max)


def split_dense(
    w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, num_experts: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Cut a dense feed-forward into experts whose SUM is exactly the dense layer.

    w1 [d_model, d_ff], b1 [d_ff], w2 [d_ff, d_model], b2 [d_model]; a bias may be None, which is 0
    ->  with h = d_ff / num_experts: w1 [num_experts, d_model, h], b1 [num_experts, h],
        w2 [num_experts, h, d_model], b2 [num_experts, d_model]
    Copies: training them leaves the dense layer as it is. SMoEDropout averages: with k = scale =
    num_experts and equal gates it gives this sum.
    Raises ValueError when num_experts does not divide d_ff.
    """
    d_model, d_ff = w1.shape
    width = check_width(d_ff, num_experts)
    b1 = w1.new_zeros(d_ff) if b1 is None else b1
    b2 = w1.new_zeros(d_model) if b2 is None else b2
    in_order = torch.contiguous_format
    return (
        w1.reshape(d_model, num_experts, width).transpose(0, 1).clone(memory_format=in_order),
        b1.reshape(num_experts, width).clone(),
        w2.reshape(num_experts, width, d_model).clone(),
        (b2 / num_experts).repeat(num_experts, 1),
    )


def check_width(d_ff: int, num_experts: int) -> int:
    """Hidden units of an expert. Raises ValueError."""
    if num_experts < 1 or d_ff % num_experts:
        given = f"d_ff is {d_ff}, num_experts {num_experts}"
        raise ValueError(f"{given}; num_experts must be at least 1 and divide d_ff")
    return d_ff // num_experts


ACTIVATIONS = kernels.ACTIVATIONS | {"gelu_new": partial(F.gelu, approximate="tanh")}  # GPT-2's


def load_balancing_loss(router_logits: Tensor, expert_index: Tensor) -> Tensor:
    """num_experts * sum_e f_e P_e: f the share of choices, P the mean probability. 0-dim.

    1 when uniform, 0 without tokens. For learned routers: SMoE-Dropout has none. (The official gate
    divides P by k once more.) Under data parallelism f is averaged over the processes, so that the
    mean of their losses is the loss of the batch.
    """
    num_tokens, num_experts = router_logits.shape
    if num_tokens == 0:
        return router_logits.sum()
    f = torch.bincount(expert_index.flatten(), minlength=num_experts) / expert_index.numel()
    # Without gradients nobody trains, and a process may be alone in this, as where it checks.
    trains = torch.is_grad_enabled()
    if trains and torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(f)
        f /= torch.distributed.get_world_size()
    return num_experts * (f * router_logits.softmax(dim=-1).mean(dim=0)).sum()


def is_backward_running() -> bool:
    """Whether backward is running: a forward in it is activation checkpointing computing again."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


class SMoEDropout(nn.Module):
    """A drop-in feed-forward that can be slimmed. x [..., d_model] -> the same shape.

    d_ff     hidden width of all experts together; num_experts must divide it
    k        experts a token (default: all); `set_k` changes it, in training and after; like the
             other arguments it is no part of a state_dict
    router   "frozen": random, never trained (the method); or "learned"
    scale    factor on the output: 1 in the paper, num_experts to match a dense layer that was cut
    act      "relu", "gelu" (exact, BERT's), "gelu_new" (GPT-2's), "silu", "none"
    balance  weight of the balance loss, which a forward leaves in `aux_loss`; under activation
             checkpointing it has a gradient with use_reentrant=False only
    backend  "masked", or one of kernels.moe_mlp: "auto", "torch", "triton"
    A forward leaves its choice in `expert_index` [tokens, k]. Raises ValueError for what is not
    possible, and for an x of another width.
    """

    def __init__(
        self, d_model: int, d_ff: int, num_experts: int, k: int | None = None,
        router: str = "frozen", scale: float = 1.0, dropout: float = 0.0, act: str = "relu",
        balance: float = 0.0, init: float = 0.02, router_init: float = 0.02,
        backend: str = "auto", generator: torch.Generator | None = None,
    ):  # fmt: skip
        if router not in ("frozen", "learned"):
            raise ValueError(f"router is {router!r}; allowed: frozen, learned")
        if act not in ACTIVATIONS:
            raise ValueError(f"act is {act!r}; allowed: {', '.join(ACTIVATIONS)}")
        super().__init__()
        width = check_width(d_ff, num_experts)
        self.d_model = d_model
        self.d_ff = d_ff
        self.num_experts = num_experts
        self.scale = scale
        self.dropout = dropout
        self.act = act
        self.balance, self.backend = balance, backend
        self.k = check_k(num_experts if k is None else k, num_experts)
        self.aux_loss: Tensor | None = None
        self.expert_index: Tensor | None = None

        def normal(std: float, *shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(shape, generator=generator) * std)

        self.router = nn.Linear(d_model, num_experts, bias=False)
        self.router.weight = normal(router_init, num_experts, d_model)
        self.router.weight.requires_grad_(router == "learned")
        self.w1 = normal(init, num_experts, d_model, width)
        self.b1 = nn.Parameter(torch.zeros(num_experts, width))
        self.w2 = normal(init, num_experts, width, d_model)
        self.b2 = nn.Parameter(torch.zeros(num_experts, d_model))

    def __getstate__(self) -> dict:
        """For copy.deepcopy and pickle: an auxiliary loss belongs to a forward, and has a graph."""
        return {**super().__getstate__(), "aux_loss": None}

    def set_k(self, k: int) -> None:
        self.k = check_k(k, self.num_experts)

    @torch.no_grad()
    def load_dense(self, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None) -> None:
        """Take the weights of a dense feed-forward, see `split_dense`. Raises ValueError."""
        if w1.shape != (self.d_model, self.d_ff) or w2.shape != (self.d_ff, self.d_model):
            given = f"w1 is {list(w1.shape)}, w2 {list(w2.shape)}"
            needed = f"[{self.d_model}, {self.d_ff}] and [{self.d_ff}, {self.d_model}] are needed"
            raise ValueError(f"{given}; {needed} (of nn.Linear the transposed weight)")
        own = (self.w1, self.b1, self.w2, self.b2)
        for parameter, value in zip(own, split_dense(w1, b1, w2, b2, self.num_experts)):
            parameter.copy_(value)

    def expert_outputs(self, x: Tensor) -> Tensor:
        """Every expert on every token, without b2: [num_experts, tokens, d_model]."""
        return ACTIVATIONS[self.act](x @ self.w1 + self.b1[:, None]) @ self.w2

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.d_model:
            needed = f"this layer was made for d_model = {self.d_model}"
            raise ValueError(f"x has width {x.shape[-1]}; {needed}")
        tokens = x.reshape(-1, self.d_model)  # [tokens, d_model]
        with torch.autocast(x.device.type, enabled=False):  # in bf16 choices would flip
            router_logits = self.router(tokens.to(self.router.weight.dtype))  # [tokens, experts]
        self.expert_index, gates = topk_gate(router_logits, self.k)
        aux_loss = None
        if self.balance:
            aux_loss = self.balance * load_balancing_loss(router_logits, self.expert_index)
        if not is_backward_running():  # where a forward is a repetition, and nobody takes its loss
            self.aux_loss = aux_loss
        gates = self.scale * gates.to(torch.promote_types(x.dtype, torch.float32))
        experts = self.masked if self.backend == "masked" else self.dispatched
        y = experts(tokens, self.expert_index, gates)  # [tokens, d_model]
        return F.dropout(y, self.dropout, self.training).view_as(x)

    def masked(self, x: Tensor, expert_index: Tensor, gates: Tensor) -> Tensor:
        """Why it is called dropout: the dense layer, its hidden units masked in blocks.

        x [tokens, d_model], expert_index and gates [tokens, k] -> [tokens, d_model]. All experts
        are computed, whatever k is: this is the reference.
        """
        weight = gates.new_zeros(len(x), self.num_experts).scatter(1, expert_index, gates)
        mask = weight.repeat_interleave(self.d_ff // self.num_experts, dim=1)  # [tokens, d_ff]
        w1 = self.w1.transpose(0, 1).reshape(self.d_model, self.d_ff)
        hidden = ACTIVATIONS[self.act](x @ w1 + self.b1.flatten())  # [tokens, d_ff]
        hidden = F.dropout(hidden, self.dropout, self.training) * mask.to(hidden.dtype)
        return hidden @ self.w2.flatten(0, 1) + weight.to(self.b2.dtype) @ self.b2

    def dispatched(self, x: Tensor, expert_index: Tensor, gates: Tensor) -> Tensor:
        """The same numbers from the chosen experts alone: sort by expert, multiply, add up."""
        w1, b1 = self.w1, self.b1
        w2, b2 = self.w2, self.b2
        act, backend = self.act, self.backend
        if act in kernels.ACTIVATIONS and not (self.dropout and self.training):
            return kernels.moe_mlp(x, expert_index, gates, w1, w2, b1, b2, act, backend=backend)
        dispatch = kernels.make_dispatch(expert_index, self.num_experts)
        rows = kernels.gather(x, dispatch, backend)  # [tokens * k, d_model], sorted by expert
        hidden = ACTIVATIONS[act](kernels.grouped_mm(rows, w1, dispatch, b1, backend))
        hidden = F.dropout(hidden, self.dropout, self.training)
        y = kernels.grouped_mm(hidden, w2, dispatch, b2, backend)
        return kernels.scatter(y, dispatch, gates, backend)


def moe_layers(model: nn.Module) -> list[SMoEDropout]:
    return [module for module in model.modules() if isinstance(module, SMoEDropout)]


def set_k(model: nn.Module, k: int) -> None:
    """Slim, or fatten, every SMoEDropout layer of a model."""
    for layer in moe_layers(model):
        layer.set_k(k)


@torch.no_grad()
def effective_rank(outputs: Tensor) -> float:
    """How many different experts there are, 1 .. num_experts: exp of the entropy of the squared
    singular values, normalised. outputs [num_experts, ...]: what each says to the same tokens.
    """
    rows = outputs.flatten(1).double()
    energy = torch.linalg.eigvalsh(rows @ rows.T).clamp(min=0)  # squared singular values
    share = energy / energy.sum()
    return float(torch.special.entr(share).sum().exp())


# --------------------------------------------------------------------------------------------------
# Baselines
# --------------------------------------------------------------------------------------------------


class DenseFFN(nn.Module):
    """The dense feed-forward with the same parameters. x [..., d_model] -> the same shape.

    dropout      ordinary, on hidden units and output
    expert_drop  in training, each of num_blocks slices is left out of a whole batch with this
                 probability, the others scaled up to match
    """

    def __init__(
        self, d_model: int, d_ff: int, num_blocks: int, dropout: float = 0.0,
        expert_drop: float = 0.0, init: float = 0.02, generator: torch.Generator | None = None,
    ):  # fmt: skip
        super().__init__()
        self.num_blocks = num_blocks
        self.dropout = dropout
        self.expert_drop = expert_drop
        self.width = check_width(d_ff, num_blocks)
        self.w1 = nn.Parameter(torch.randn(d_model, d_ff, generator=generator) * init)
        self.w2 = nn.Parameter(torch.randn(d_ff, d_model, generator=generator) * init)
        self.b1 = nn.Parameter(torch.zeros(d_ff))
        self.b2 = nn.Parameter(torch.zeros(d_model))

    def expert_outputs(self, x: Tensor) -> Tensor:
        """Every slice on every token, without b2: [num_blocks, tokens, d_model]."""
        hidden = F.relu(x @ self.w1 + self.b1).unflatten(-1, (self.num_blocks, self.width))
        return hidden.transpose(0, 1) @ self.w2.unflatten(0, (self.num_blocks, self.width))

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu(x @ self.w1 + self.b1)  # [..., d_ff]
        hidden = F.dropout(hidden, self.dropout, self.training)
        if self.training and self.expert_drop:
            kept = torch.rand(self.num_blocks, device=x.device) >= self.expert_drop
            factor = (kept / (1 - self.expert_drop)).to(hidden.dtype)  # [blocks]
            hidden = hidden * factor.repeat_interleave(self.width)
        return F.dropout(hidden @ self.w2 + self.b2, self.dropout, self.training)


# --------------------------------------------------------------------------------------------------
# Config
# --------------------------------------------------------------------------------------------------

Schedule = Literal["linear", "cosine", "exponential", "random"]
TaskName = Literal["sst2", "csqa", "asdiv-a", "mawps", "svamp"]
Probability = Annotated[float, Range(0, 1)]  # 0 is allowed, 1 is not


@dataclass(frozen=True)
class Config(common.Settings):
    num_experts: Annotated[int, Range(4)] = 8  # slices of the feed-forward; official script: 16
    d_ff: Count = 1024  # hidden width of all experts together; official script: 16 x 512
    k_min: Count = 4  # experts a token at the first step; official script: half of num_experts
    schedule: Schedule = "linear"  # how k grows: linear (the paper's), or one of k_at's others
    scale: Positive = 8.0  # factor on the output of the experts; the paper has 1
    num_layers: Count = 2  # transformer layers; official script: 4
    d_model: Count = 64  # width; official script: 256
    num_heads: Count = 4  # attention heads; official script: 8
    context: Count = 64  # bytes; official script: 512
    conv: Whole = 4  # width of the causal convolution after the embedding; 0: none
    dropout: Probability = 0.0  # on hidden units and output of a feed-forward; official: 0.1
    expert_drop: Probability = 0.0  # that a slice of the dense layer is left out; a baseline
    balance: NonNegative = 0.0  # weight of the balance loss of routers; a control
    init: Positive = 0.1  # standard deviation of initial weights; official code: 0.02
    router_init: NonNegative = 0.04  # that of the router's; official code: 0.02
    steps: Count = 1000  # training steps of every arm; official script: 400,000
    batch_size: Count = 8  # windows a step; official script: 22
    lr: Positive = 6e-3  # peak, then a cosine; official script: 2.5e-4
    beta2: Share = 0.98  # of Adam; official script: torch's default
    lr_final: NonNegative = 0.1  # share of the peak at the last step; official script: 0
    warmup: Whole = 20  # steps; official script: none
    clip: Positive = 1.0  # largest norm of the gradient; official script: 0.25
    eval_bytes: Count = 32768  # of held-out text, evenly spread; official script: all
    text: str = ""  # file or folder to train on instead of the Python library or enwik8
    tasks: tuple[TaskName, ...] = ()  # then fine-tune on sst2, csqa, asdiv-a, mawps, svamp
    task_steps: Count = 300  # fine-tuning steps; official script: 5000
    task_batch: Count = 16  # examples a step; official script
    task_lr: Positive = 1e-3  # peak, cosine to 0; official script: 1e-4
    task_bytes: Count = 256  # the last bytes of a text that are read
    task: TaskName | None = None  # of an arm, as in dense@task=sst2: fine-tune the arm dense on it
    task_k: Count | None = None  # of an arm with a task: experts a token; none: all

    def __post_init__(self) -> None:
        super().__post_init__()
        check_width(self.d_ff, self.num_experts)
        k_at(0, 1, self.k_min, self.num_experts)
        check_k(self.task_k or self.num_experts, self.num_experts)


SMALL = Config()
FULL = replace(
    SMALL,
    num_experts=16, d_ff=8192, k_min=8, scale=1.0, dropout=0.1, init=0.02, router_init=0.02,
    num_layers=4, d_model=256, num_heads=8, context=512, conv=0,
    steps=400_000, batch_size=22, lr=2.5e-4, beta2=0.999, lr_final=0.0, warmup=0, clip=0.25,
    eval_bytes=5_000_000,
    task_steps=5000, task_lr=1e-4, task_bytes=512,
)  # fmt: skip

# --------------------------------------------------------------------------------------------------
# The experiment: every arm on the same batches and steps, measured at every k
# --------------------------------------------------------------------------------------------------


class Arm(NamedTuple):
    router: str  # of SMoEDropout; "dense": no mixture
    k: str  # experts a token in training: two, half, all, or growing


ARMS = {
    "dense": Arm("dense", "all"),
    "smoe_dropout": Arm("frozen", "growing"),
    "learned_k2": Arm("learned", "two"),  # the official code's default k
    "learned_half": Arm("learned", "half"),
    "frozen_half": Arm("frozen", "half"),
    "frozen_full": Arm("frozen", "all"),
    "learned_ramp": Arm("learned", "growing"),
    "learned_full": Arm("learned", "all"),
}
DEFAULT = ["dense", "smoe_dropout", "learned_half"]
CONTROLS = ["learned_k2", "learned_ramp", "frozen_full"]
CONTROL_SEEDS = 5  # of a run of more: they are dear, and what they answer needs no more


def trained_k(method: str, config: Config) -> tuple[int, int]:
    """Experts a token at the first step and at the last."""
    half, full = config.num_experts // 2, config.num_experts
    spans = {"two": (2, 2), "half": (half, half), "all": (full, full)}
    spans["growing"] = (config.k_min, full)
    return spans[ARMS[method].k]


def upper_half(config: Config) -> list[int]:
    return list(range(config.num_experts // 2, config.num_experts + 1))


def swept(method: str, config: Config) -> list[int]:
    """The k at which a model is measured: a few small ones, and every one from half to all."""
    if ARMS[method].router == "dense":
        return [config.num_experts]
    return sorted({1, 2, config.num_experts // 4, *upper_half(config)})


def build(config: Config, method: str, seed: int) -> common.TransformerLM:
    """The model of an arm before training, at its last k."""
    generator = torch.Generator().manual_seed(seed)
    sizes = (config.d_model, config.d_ff, config.num_experts)
    options = {"dropout": config.dropout, "init": config.init, "generator": generator}

    def make_ffn(layer: int) -> nn.Module:
        if ARMS[method].router == "dense":
            return DenseFFN(*sizes, expert_drop=config.expert_drop, **options)
        return SMoEDropout(
            *sizes,
            k=trained_k(method, config)[1],
            router=ARMS[method].router,
            scale=config.scale,
            balance=config.balance,
            router_init=config.router_init,
            **options,
        )

    return common.TransformerLM(
        256,
        config.num_layers,
        config.d_model,
        config.num_heads,
        config.context,
        make_ffn,
        positions="rope",
        conv=config.conv,
        init=config.init,
        generator=generator,
    )


def load_corpus(config: Config, run: Run) -> text_data.Corpus:
    """The Python library, enwik8 or the reader's own text; a dry run downloads nothing."""
    if config.text:
        return text_data.load_text(config.text)
    if run.scale == "small" or run.dry_run:
        return text_data.load_domain("python")
    path = download.fetch("enwik8", run.data_dir) / "enwik8"
    size, checksum = download.ENWIK8.members["enwik8"]
    whole = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
    train, held_out = whole.split([90_000_000, 10_000_000])
    return text_data.Corpus("enwik8", train, held_out, digest=checksum[:16], num_documents=1)


def held_out(corpus: text_data.Corpus, config: Config) -> tuple[Tensor, Tensor]:
    """Windows of the two halves of held-out text: to choose settings on, and to report.

    Each [windows, context + 1], evenly spread. Raises ValueError for a text that is too short.
    """
    num = max(1, config.eval_bytes // config.context)
    to_choose, to_report = corpus.val.tensor_split(2)
    shortest = min(len(corpus.train), len(to_report))
    if shortest <= config.context:
        needed = f"each part needs more than context = {config.context} bytes, one has {shortest}"
        raise ValueError(f"text {corpus.name!r} is too short: {needed}")
    return (
        text_data.spread_windows(to_choose, config.context, num),
        text_data.spread_windows(to_report, config.context, num),
    )


class Task(NamedTuple):
    """What an arm is trained on and measured by: a text, or examples to be fine-tuned on."""

    model: nn.Module  # where training starts
    k: tuple[int, int]  # experts a token at the first step and at the last
    batches: Callable[[int], Any]
    loss: Callable[[nn.Module, Any], tuple[Tensor, dict]]
    measure: Callable[[nn.Module], dict]
    steps: int
    lr: float
    schedule: common.Schedule


def text_task(job: Job) -> Task:
    """The next byte of a text."""
    config, corpus = job.config, load_corpus(job.config, job.run)

    def batches(step: int) -> Tensor:
        generator = torch.Generator().manual_seed(1_000_003 * job.seed + step)
        length = config.context + 1
        windows = text_data.sample_windows(corpus.train, config.batch_size, length, generator)
        return windows.to(job.run.device)

    warmup = min(config.warmup, config.steps // 5)
    schedule = common.cosine(config.steps, warmup, config.lr_final)
    return Task(
        model=build(config, job.method, job.seed),
        k=trained_k(job.method, config),
        batches=batches,
        loss=text_loss,
        measure=partial(measure_text, job),
        steps=config.steps,
        lr=config.lr,
        schedule=schedule,
    )


def text_loss(model: nn.Module, windows: Tensor) -> tuple[Tensor, dict]:
    """Nats a byte, and what the layers ask for. windows [batch, context + 1]."""
    loss = common.lm_loss(model, windows).mean()
    aux_loss = model.aux_loss()
    return loss + aux_loss, {"lm_loss": loss.detach(), "aux_loss": aux_loss.detach()}


@torch.no_grad()
def evaluate(model: nn.Module, windows: Tensor, k: int) -> float:
    """Bits/byte of windows [windows, context + 1], at k experts a token; the model stays at k."""
    model.eval()
    set_k(model, k)
    device = model.head.weight.device
    nats = [common.lm_loss(model, part.to(device)).double() for part in windows.split(64)]
    return float(torch.cat(nats).mean()) / log(2)


def measure_text(job: Job, model: nn.Module) -> dict:
    config = job.config
    to_choose, to_report = held_out(load_corpus(config, job.run), config)
    found = {"val_bits": evaluate(model, to_choose, trained_k(job.method, config)[1])}
    for k in swept(job.method, config):
        found[f"bits_{k}"] = evaluate(model, to_report, k)
    found["rank_by_layer"] = expert_ranks(model, to_report[:16], config)
    found["rank"] = float(np.mean(found["rank_by_layer"]))
    if job.method == "smoe_dropout":
        found |= step_costs(job, to_report[: config.batch_size])
    return found


@torch.no_grad()
def expert_ranks(model: nn.Module, windows: Tensor, config: Config) -> list[float]:
    """The effective rank of each layer's experts, with all of them on."""
    seen: list[Tensor] = []  # the input of each layer, [tokens, d_model]

    def watch(layer: nn.Module, inputs: tuple) -> None:
        seen.append(inputs[0].flatten(0, -2))

    hooks = [ffn.register_forward_pre_hook(watch) for ffn in model.ffns()]
    evaluate(model, windows, config.num_experts)
    for hook in hooks:
        hook.remove()
    return [effective_rank(ffn.expert_outputs(x)) for ffn, x in zip(model.ffns(), seen)]


def step_costs(job: Job, windows: Tensor) -> dict:
    """What a training step costs, dense and at every k of training: parameters that a token meets,
    FLOPs, seconds; and the means over the growing k.

    Seconds are taken in turns: what slows the machine down for a while slows all of them.
    FLOPs are counted on the CPU, as torch runs them, on two windows.
    """
    config = job.config
    names = {"dense": config.num_experts}
    names |= {str(k): k for k in range(config.k_min, config.num_experts + 1)}
    here = windows.to(job.run.device)
    few = windows[:2]
    found: dict[str, float] = {}
    timed = {}
    for name, k in names.items():
        method = "dense" if name == "dense" else "smoe_dropout"
        model, step = training_step(job, method, k, few)
        found[f"active_{name}"] = common.count_parameters(model, k)
        found[f"flops_{name}"] = common.count_flops(step)["Global"] * len(windows) / len(few)
        _, timed[name] = training_step(job, method, k, here)
    seconds = {name: [] for name in names}
    for _ in range(9):
        for name, step in timed.items():
            seconds[name].append(seconds_of(step, job.run.device))
    for name in names:
        found[f"seconds_{name}"] = float(np.median(seconds[name]))
    steps_at_k = [int(line["k"]) for line in job.log()]  # what ran, resumed or not
    for unit in ("flops", "seconds"):
        found[f"{unit}_growing"] = float(np.mean([found[f"{unit}_{k}"] for k in steps_at_k]))
    return found


def seconds_of(step: Callable[[], None], device: str) -> float:
    """After a warm-up: of the clock on a GPU; of a CPU the seconds that it worked for this."""
    if device == "cuda":
        return common.median_seconds(step, device, repeats=1)
    step()
    start = time.process_time()
    step()
    return time.process_time() - start


def training_step(
    job: Job, method: str, k: int, windows: Tensor
) -> tuple[nn.Module, Callable[[], None]]:
    """A new model on the device of the windows, and a step that trains it at k."""
    run, device = job.run, windows.device.type
    model = build(job.config, method, job.seed).to(device)
    set_k(model, k)
    optimizer = adam(model, job.config.lr, job.config)

    def step() -> None:
        with torch.autocast(device, dtype=run.dtype, enabled=run.dtype != torch.float32):
            loss, _ = text_loss(model, windows)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    return model, step


def adam(model: nn.Module, lr: float, config: Config) -> torch.optim.Adam:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.Adam(trained, lr=lr, betas=(0.9, config.beta2))


class Classifier(nn.Module):
    """A head on the last byte. rows [batch, choices, bytes] -> [batch, choices * num_classes]."""

    def __init__(self, body: common.TransformerLM, num_classes: int):
        super().__init__()
        d_model, body.head = body.embedding.embedding_dim, nn.Identity()
        self.body, self.hidden = body, nn.Linear(d_model, d_model)
        self.out = nn.Linear(d_model, num_classes)

    def forward(self, rows: Tensor) -> Tensor:
        last = self.body(rows.flatten(0, 1))[:, -1]  # [batch * choices, d_model]
        hidden = F.dropout(self.hidden(last).tanh(), 0.1, self.training)
        return self.out(hidden).view(len(rows), -1)


def load_examples(config: Config, seed: int, run: Run) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows and classes to train on, rows to measure on and which classes are right there.

    Of the cross-validated tasks a seed sees fold seed % 5.
    """
    train, dev = tasks.load_task(config.task, run.data_dir, seed % 5)
    return tasks.pose(train, dev, config.task_bytes)


def finetuning_task(job: Job) -> Task:
    """Examples for a model that was trained on text, at one k from beginning to end."""
    config, device = job.config, job.run.device
    rows, classes, dev_rows, right = load_examples(config, job.seed, job.run)
    body = build(config, job.method, job.seed)
    source = job.other(job.arm.partition("task=")[0].rstrip("@,"))  # dense@task=sst2: dense
    common.load_state(body, common.load(source.path(".pt")), source.label)
    torch.manual_seed(job.seed)

    def batches(step: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(1_000_003 * job.seed + step)
        drawn = torch.randint(len(rows), (config.task_batch,), generator=generator)
        return rows[drawn].to(device), classes[drawn].to(device)

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, dict]:
        rows, classes = batch
        return F.cross_entropy(model(rows).float(), classes), {}

    @torch.no_grad()
    def measure(model: nn.Module) -> dict:
        model.eval()
        answers = [model(part.to(device)).argmax(dim=1).cpu() for part in dev_rows.split(64)]
        is_right = right[torch.arange(len(right)), torch.cat(answers)]
        return {"accuracy": 100 * float(is_right.double().mean()), "examples": len(right)}

    k = config.task_k or config.num_experts
    return Task(
        model=Classifier(body, right.shape[1] // rows.shape[1]),
        k=(k, k),
        batches=batches,
        loss=loss,
        measure=measure,
        steps=config.task_steps,
        lr=config.task_lr,
        schedule=common.cosine(config.task_steps, final=0.0),
    )


def train_arm(job: Job) -> dict:
    config = job.config
    task = finetuning_task(job) if config.task else text_task(job)
    if job.run.compile:  # a graph for every k; by default torch stops compiling at the ninth
        torch._dynamo.config.recompile_limit = 4 * config.num_experts
    model = job.prepare(task.model)
    first, last = task.k

    def loss_fn(batch: Any, step: int) -> tuple[Tensor, dict]:
        k = k_at(step, task.steps, first, last, config.schedule)
        set_k(model, k)
        loss, values = task.loss(model, batch)
        return loss, {**values, "k": k}

    torch.manual_seed(job.seed)  # for dropout
    job.train(
        model,
        loss_fn,
        task.steps,
        batches=task.batches,
        optimizer=adam(model, task.lr, config),
        schedule=task.schedule,
        clip=config.clip,
    )
    common.save(job.path(".pt"), model.state_dict())
    return task.measure(model)


def rebuild(job: Job, state: dict) -> nn.Module:
    """The model of a job from its weights; no text and no task is read."""
    model = build(job.config, job.method, job.seed)
    if job.config.task:
        set_k(model, job.config.task_k or job.config.num_experts)
        model = Classifier(model, len(state["out.bias"]))
    model.load_state_dict(state)
    return model


def load_trained(path: str | Path) -> nn.Module:
    """The model of an arm, in eval mode: runs/smoe_dropout-small/arms/smoe_dropout-seed0.pt.

    tokens [batch, bytes] -> logits [batch, bytes, 256], at the k it was last trained at; `set_k`
    slims it. An arm with a task is a Classifier. Raises UsageError, see common.load_trained.
    """
    return common.load_trained(path, Config, rebuild)


# --------------------------------------------------------------------------------------------------
# Claims
# --------------------------------------------------------------------------------------------------


def listed(values: dict[str, np.ndarray], digits: int = 4) -> str:
    return ", ".join(f"{name} {show(by_seed, digits)}" for name, by_seed in values.items())


@claim("bits/byte falls as experts are switched on, from half of them to all: along the line "
       "through all k, and from start to end", paper="BPC 1.1776 at k = 8, 1.1486 at 16 (enwik8)",
       required=True)  # fmt: skip
def slimmable(results: Results, config: Config) -> Margin:
    """The smaller of two gains from half to all: the fitted line's, and the measured one."""
    ks, steps = upper_half(config), {}
    for k, more in pairwise(ks):
        steps[f"{k}-{more}"] = results.difference("smoe_dropout", f"bits_{k}", f"bits_{more}")
    bits = [results.of("smoe_dropout", f"bits_{k}") for k in ks]  # [k, seeds]
    line = -np.polyfit(ks, bits, 1)[0] * (ks[-1] - ks[0])  # [seeds]
    gains = {"line": line, "start to end": bits[0] - bits[-1]}
    text = f"bits/byte gained: {listed(gains)}; by step {listed(steps)}"
    return Margin(min(gains.values(), key=np.mean), text, {**gains, **steps})


def loss_with_all(arm: str, results: Results, config: Config) -> Margin:
    """What an arm loses when all experts are switched on, instead of those it was trained with."""
    k, full = trained_k(arm, config)[1], config.num_experts
    loss = results.difference(arm, f"bits_{full}", f"bits_{k}")
    return Margin(loss, f"{show(loss)} bits/byte lost from k = {k} to {full} ({len(loss)} seeds)")


@claim("with a learned router trained at half of the experts, bits/byte rises when all are on",
       required=True)  # fmt: skip
def learned_overfits(results: Results, config: Config) -> Margin:
    return loss_with_all("learned_half", results, config)


@claim("with a learned router trained at two experts, the official default, it rises, too")
def learned_overfits_two(results: Results, config: Config) -> Margin:
    return loss_with_all("learned_k2", results, config)


@claim("with all experts on, better than a dense model of equal parameters after equal steps",
       required=True)  # fmt: skip
def beats_dense(results: Results, config: Config) -> Margin:
    key = f"bits_{config.num_experts}"
    margin = results.ahead("dense", "smoe_dropout", key)
    means = {arm: results.of(arm, key).mean() for arm in ("smoe_dropout", "dense")}
    return Margin(margin, f"{listed(means, 3)}: {show(margin)} bits/byte better")


@claim("a training step takes less time than the dense model's, in the mean over the growing k",
       paper="up to 37 % of time (introduction)", required=True)  # fmt: skip
def step_time(results: Results, config: Config) -> Margin:
    growing = results.of("smoe_dropout", "seconds_growing")
    dense = results.of("smoe_dropout", "seconds_dense")
    saved = 1 - growing / dense
    means = f"{1000 * growing.mean():.1f} ms a step, dense {1000 * dense.mean():.1f}"
    return Margin(saved, f"{show(100 * saved, 1)} % saved: {means}")


@claim("experts are less alike (effective rank) than a dense layer's slices or a learned router's",
       paper="not verified (its metric was not found)", required=True)  # fmt: skip
def less_collapse(results: Results, config: Config) -> Margin:
    """Against the better of the two."""
    others = ("dense", "learned_half")
    ranks = {arm: results.of(arm, "rank") for arm in ("smoe_dropout", *others)}
    rival = max(others, key=lambda arm: ranks[arm].mean())
    text = f"{listed(ranks, 2)}, of at most {config.num_experts}"
    return Margin(ranks["smoe_dropout"] - ranks[rival], text, ranks)


def lead_over(other: str, results: Results, config: Config) -> Margin:
    """How far the method is ahead of a control, at half and at all experts: the smaller lead."""
    leads = {}
    for k in (config.num_experts // 2, config.num_experts):
        theirs = results.of(other, f"bits_{k}")  # of the first CONTROL_SEEDS seeds
        leads[f"k = {k}"] = theirs - results.of("smoe_dropout", f"bits_{k}")[: len(theirs)]
    text = f"bits/byte better than {other} ({len(theirs)} seeds): {listed(leads)}"
    return Margin(min(leads.values(), key=np.mean), text, leads)


@claim("under the same growing k, a frozen router beats a learned one")
def router_matters(results: Results, config: Config) -> Margin:
    return lead_over("learned_ramp", results, config)


@claim("under a frozen router, a growing k beats all experts from the beginning")
def growth_matters(results: Results, config: Config) -> Margin:
    return lead_over("frozen_full", results, config)


@claim("fine-tuned on math word problems (--tasks asdiv-a,mawps,svamp), better than dense",
       paper="+1.03, +0.78, +1.09 points on ASDiv-A, MAWPS, SVAMP (BERT)")  # fmt: skip
def transfer(results: Results, config: Config) -> Margin:
    """With all experts on; the task that gains least."""
    gains = {}
    for task in ("asdiv-a", "mawps", "svamp"):
        ours, theirs = f"smoe_dropout@task={task}", f"dense@task={task}"
        gains[task] = results.ahead(ours, theirs, "accuracy")
    return Margin(min(gains.values(), key=np.mean), f"points: {listed(gains, 2)}", gains)


@check("by its schedule it trains with fewer FLOPs than the dense model")
def compute(results: Results, config: Config) -> Check:
    found = results["smoe_dropout"][0]
    saved = 1 - found["flops_growing"] / found["flops_dense"]
    more = found[f"flops_{config.num_experts}"] / found["flops_dense"] - 1
    text = f"{100 * saved:.1f} % of training FLOPs saved; with all experts on a step costs "
    return Check(saved > 0, f"{text}{100 * more:+.1f} % (the router)")


# --------------------------------------------------------------------------------------------------
# Tables, text, picture, main
# --------------------------------------------------------------------------------------------------


def print_tables(results: Results, config: Config, run: Run) -> None:
    columns = {f"k = {k}": (f"bits_{k}", 3) for k in swept("smoe_dropout", config)}
    columns |= {"validation": ("val_bits", 3), "rank": ("rank", 2)}
    trained = [arm for arm in results if "task=" not in arm]
    title = f"bits/byte at k experts a token, {len(run.seeds)} seed(s); effective rank of experts"
    run.table(title, *results.table(trained, columns))
    if "smoe_dropout" in results:
        run.table("what a training step costs", *cost_table(results, config))
    if len(trained) < len(results):
        title = "% right; every row starts from one model, which is fine-tuned at several k"
        run.table(title, *task_table(results, config))


def cost_table(results: Results, config: Config) -> tuple[list[str], list[list[str]]]:
    found = results["smoe_dropout"][0]
    rows = []
    dense = results.of("smoe_dropout", "seconds_dense")
    for name in ("dense", *range(config.k_min, config.num_experts + 1)):
        ratio = results.of("smoe_dropout", f"seconds_{name}") / dense
        flops = found[f"flops_{name}"] / found["flops_dense"]
        label = name if name == "dense" else f"k = {name}"
        rows.append([label, f"{found[f'active_{name}']:,}", f"{flops:.2f}", show(ratio, 2)])
    return ["", "parameters a token meets", "FLOPs, of dense", "time, of dense"], rows


def task_table(results: Results, config: Config) -> tuple[list[str], list[list[str]]]:
    """A column for each k at which models were fine-tuned and measured."""
    found: dict[str, dict[int, str]] = {}
    for arm in results:
        if "task=" in arm:
            weights, _, k = arm.partition(",task_k=")
            k = int(k or config.num_experts)
            found.setdefault(weights, {})[k] = show(results.of(arm, "accuracy"), 1)
    ks = sorted({k for by_k in found.values() for k in by_k})
    rows = [[weights, *(by_k.get(k, "") for k in ks)] for weights, by_k in found.items()]
    return ["", *(f"k = {k}" for k in ks)], rows


WIDTH = 36  # of a column of text


def sample_table(model: nn.Module, prompt: str, count: int = 160) -> tuple[list, list]:
    """One model going on with a prompt, at a quarter, half and all of its experts, side by side."""
    num_experts = moe_layers(model)[0].num_experts
    tokens = torch.tensor(list(prompt.encode()))
    columns = {}
    for k in (num_experts // 4, num_experts // 2, num_experts):
        set_k(model, k)
        generator = torch.Generator().manual_seed(0)
        written = common.generate(model, tokens, count, model.context, 0.6, generator)
        text = bytes(written.tolist()).decode(errors="replace")
        shown = re.sub(r"[^ -~\n]", "?", text)  # no terminal is upset
        columns[f"k = {k}"] = [line[:WIDTH].ljust(WIDTH) for line in shown.split("\n")]
    rows = [["", *line] for line in zip_longest(*columns.values(), fillvalue=" " * WIDTH)]
    return ["", *(title.ljust(WIDTH) for title in columns)], rows


def print_sample(run: Run, prompt: str) -> None:
    model = load_trained(run.path("smoe_dropout", run.seed, ".pt"))
    run.table(f"the trained model goes on with {prompt!r}", *sample_table(model, prompt))


def draw(results: Results, config: Config, run: Run) -> None:
    colors = {arm: common.color_of(arm, list(ARMS)) for arm in ARMS}

    def curves(ax: Any, arms: Sequence[str], ks: Sequence[int], title: str) -> None:
        for arm in arms:
            if arm in results:
                bits = np.array([results.of(arm, f"bits_{k}") for k in ks]).T  # [seeds, k]
                common.curve(ax, ks, bits, arm, colors[arm])
        ax.set(xlabel="experts a token, k", ylabel="bits/byte", title=title, xticks=ks)

    def slimming(ax: Any) -> None:
        arms, ks = ("smoe_dropout", "learned_k2", "learned_half"), swept("smoe_dropout", config)
        curves(ax, arms, ks, "one model, any number of experts")
        if "dense" in results:
            dense = results.of("dense", f"bits_{config.num_experts}").mean()
            ax.axhline(dense, color=colors["dense"], label="dense")

    def controls(ax: Any) -> None:
        arms = ("smoe_dropout", "learned_half", *CONTROLS)
        curves(ax, arms, upper_half(config), "is it the router or the growing k?")

    def ranks(ax: Any) -> None:
        common.dots(ax, {arm: results.of(arm, "rank") for arm in results if arm in ARMS}, colors)
        ax.set(xlabel=f"effective rank of {config.num_experts} experts", title="are experts alike?")

    run.plot([slimming, controls, ranks])


def task_arms(arms: Sequence[str], config: Config) -> list[str]:
    """Every model on every task; a mixture at half, three quarters and all of its experts."""
    found, full = [], config.num_experts
    for task in config.tasks:
        for arm in arms:
            name = f"{arm}{',' if '@' in arm else '@'}task={task}"
            if ARMS[arm.partition("@")[0]].router != "dense":
                found += [f"{name},task_k={k}" for k in (full // 2, full * 3 // 4)]
            found.append(name)
    return found


def download_bytes(config: Config, run: Run) -> int:
    names = {tasks.TASKS[name][1] for name in config.tasks}
    if run.scale == "full" and not config.text:
        names.add("enwik8")
    missing = [name for name in names if not (run.data_dir / name).exists()]
    return sum(file.size or 0 for name in missing for file in download.DATASETS[name].files)


ACTIONS = {"sample": ("", "TEXT", "the model trained in --out goes on with TEXT, at several k")}


def main(config: Config, run: Run) -> Results:
    if "sample" in run.actions:
        print_sample(run, run.actions["sample"])
        return Results()
    if config.task:
        raise ValueError("--task belongs to an arm, as in dense@task=sst2; for all: --tasks sst2")
    chosen = run.choose(ARMS, DEFAULT, more=CONTROLS)
    controls = [arm for arm in chosen if arm in CONTROLS]
    arms = [arm for arm in chosen if arm not in controls and "task=" not in arm]
    finetuned = [arm for arm in chosen if "task=" in arm] + task_arms(arms, config)
    corpus = load_corpus(config, run)
    run.data = {corpus.name: corpus.digest}
    windows, _ = held_out(corpus, config)
    if not run.dry_run:
        for task in {common.arm_config(config, arm).task for arm in finetuned}:
            load_examples(replace(config, task=task), run.seed, run)  # damaged files are told now

    model = build(config, "smoe_dropout", run.seed).to(run.device)
    batch = windows[torch.arange(config.batch_size) % len(windows)].to(run.device)
    control_seeds = run.seeds[:CONTROL_SEEDS]
    steps = config.steps * len(arms) + config.task_steps * len(finetuned)  # of a seed
    steps = steps * len(run.seeds) + config.steps * len(controls) * len(control_seeds)
    text = f"text {corpus.name} {corpus.digest}"
    if run.dry_run and run.device == "cpu":  # which takes a minute for a step of the full scale
        text += ", in steps of one window"
        steps *= len(batch)
        batch = batch[:1]
    step = lambda: text_loss(model, batch)[0].backward()
    run.plan(text, model, step, steps, download_bytes(config, run))
    if corpus.note:
        common.say(corpus.note)
    results = run.train_arms(train_arm, arms)
    results |= run.train_arms(train_arm, controls, control_seeds)
    results |= run.train_arms(train_arm, finetuned)
    print_tables(results, config, run)
    draw(results, config, run)
    if "smoe_dropout" in arms:
        print_sample(run, "def ")
    return results


if __name__ == "__main__":
    common.run(main, SMALL, FULL, actions=ACTIONS, data_parallel=True)
