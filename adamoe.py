"""AdaMoE: token-adaptive routing with null experts.

Zeng, Miao, Gao, Zhang, Deng, "AdaMoE: Token-Adaptive Routing with Null Experts for Mixture-of-Experts Language
Models" (Findings of EMNLP 2024, arXiv 2406.13233).

A top-k mixture spends the same compute on every token, though some tokens need less. AdaMoE adds num_null *null
experts*, whose output is 0 and whose cost is nothing, to the num_experts true ones, and raises top_k. Whatever share
of a token's picks falls on nulls is work saved, so the number of true experts varies by token:

    router_logits = x W_r                                     [tokens, num_experts + num_null]
    picks         = top_k of router_logits
    gates         = softmax over the picked TRUE experts only (zero if there is none: the token skips the layer)
    y             = sum of gates * Expert(x)

       num_experts=4, num_null=4, top_k=3        true experts   0 1 2 3 | 4 5 6 7   null experts
       token "("   picks 2 5 7  ->  1 expert     token "def"    picks 0 1 3  ->  3 experts

What keeps the average in hand is the balance loss (eqs. 3-6). With f_i the share of tokens that pick expert i and P_i
its mean probability, nulls enter with their average, since which null is picked does not matter:

    aux_loss = alpha * (num_experts + num_null) * sum_i f~_i P_i,   f~_i = f_i (true) or the mean f of all nulls

Balanced, every expert is picked equally often, hence the predicted load: top_k * num_experts / (num_experts +
num_null) true experts a token. That is how a budget is chosen before training: `--load 1.5`.

Null logits cancel out of the gates, so the language-model loss has exactly zero gradient on them; only aux_loss moves
them. Nothing rewards "hard token, more experts": true logits that sink below the null level are dropped, that is all.

Run      python adamoe.py              about a minute on two cores, no download
         python adamoe.py --ablate     every arm below
         python adamoe.py --text FILE  fine-tune on your own text
         python adamoe.py --setting lora            LoRA experts on a dense model (section 4.1)
         python adamoe.py --full [--dry-run]        null experts in OLMoE, or in Mixtral where it fits, on ARC-Challenge
         python adamoe.py --full --model FOLDER --task siqa --load 1.5
         python adamoe.py --full --model random --num-layers 12 --steps 20   Mixtral's width, no download: time, memory
         torchrun --nproc-per-node 4 adamoe.py --full       a model that one GPU does not hold (FSDP2)
You see  a byte model pre-trained on Python's library with top-2, then fine-tuned on its documentation as top-1, top-2
         and AdaMoE: loss, load and expert FLOPs of each, who gets how many experts, what the paper's claims became.
Found    (seeds 0-2) the budget is met, a quarter of top-2's expert work is saved, and the loss lies under the line from
         top-1 to top-2, at every learning rate of the grid. It does not beat top-2. And an honest rival needs no null
         expert: the top-2 model with top-p routing, applied after training, is better at the same load.
         --full has been run on tiny models of each family, not on the real ones.

Differences from the paper and its code
1. Equation 6 as written. The released Mixtral code averages an empty slice, so it trains with plain balancing.
2. The loss is per layer, then averaged; the released code pools all layers, which lets two collapsed layers cancel.
3. A copied null row ties with its twin and the winner would depend on the top-k kernel; rows get 1e-3 of noise.
4. alpha falls from alpha to alpha_late at half time, within one run (the paper: first epoch, second epoch).
5. Small scale: 2 layers, d_model 64, bytes, all weights trained, every arm with the same steps, batches and
   learning-rate grid (--ablate prints it); settings fixed on seeds 100-102. LoRA experts (--setting lora) have no
   dropout, q, k, v are one matrix, and the load's law alone is claimed.
6. --full trains Mixtral-8x7B with LoRA as the paper does, but from a base in bf16 (the paper: 4 bits), with one LoRA
   for router and null rows and one for gate and up projection; the answer is the likeliest letter, not a generated
   text. Models trained without normalised gates (OLMoE, Qwen-MoE) keep their scale: softmax over all true experts.
   Not stated in the paper and ours: batch 16, cosine, lora_alpha 16.

Break it yourself: --alpha 0 --alpha-late 0 (nothing holds the load); --num-null 32 (tokens starve);
normalize="all_picks" (the load creeps up when alpha drops).
"""

import copy
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import bridge as common
import kernels
from bridge import Claim, Run
from data import pretrained
from data import tasks as task_data
from data import text as text_data
from data.pretrained import Questions

# ---------------------------------------------------------------------------------------------------------------
# Config
# ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    num_experts: int = 8  # true experts; Mixtral has 8
    num_null: int | None = 8  # null experts; the paper's main setting
    top_k: int | None = 3  # picks a token, nulls included; the paper's main setting
    load: float | None = None  # budget of true experts a token; chooses num_null from top_k
    alpha: float = 0.02  # weight of the balance loss, first half; paper section 4.2.1
    alpha_late: float = 1e-4  # second half; paper section 4.2.1
    alpha_pretrain: float = 0.01  # the same while pre-training the top-2 base
    num_layers: int = 2  # transformer layers
    d_model: int = 64  # width
    d_ff: int = 128  # hidden width of one expert
    num_heads: int = 4  # attention heads
    context: int = 128  # bytes; at full scale tokens, of a longer question the end
    batch_size: int = 16  # sequences a step
    pretrain_steps: int = 400  # of the top-2 base
    steps: int = 300  # fine-tuning steps of every arm
    pretrain_lr: float = 6e-3  # peak, cosine to a tenth
    lr: float = 8e-3  # peak, cosine to a tenth; from LR_GRID, best for every arm on seeds 100-102
    init: float = 0.1  # standard deviation of initial weights outside the experts
    text: str = ""  # file or folder to fine-tune on instead of Python's documentation
    setting: str = "moe"  # or "lora": LoRA experts on a dense model, small scale only; paper section 4.1
    lora_experts: int = 4  # true LoRA experts a linear layer with --setting lora; paper section 4.1
    lora_lr: float = 1.6e-2  # lr of --setting lora: of 4e-3, 8e-3, 1.6e-2, 3.2e-2 best for k1, k2, m5k4 on seed 100
    lora_rank: int = 8  # of router and experts; paper section 4.1
    lora_alpha: float = 16.0  # LoRA is scaled by lora_alpha / lora_rank; the paper's is not stated
    model: str = "auto"  # folder, Hugging Face name, "random", or "auto": Mixtral where it fits, else OLMoE
    task: str = "arc-c"  # arc-c arc-e obqa siqa winogrande piqa hellaswag csqa
    train_examples: int = 1000  # questions; paper section 4.2
    accumulate: int = 1  # parts of a batch; the balance loss is then that of a part


SMALL = Config()
FULL = replace(
    SMALL,
    num_null=None,  # as many as the model has experts: the paper's ratio
    top_k=None,  # one and a half times the model's own: the paper's ratio
    steps=125,  # two epochs of 1000 questions
    lr=5e-5,  # the paper's
    context=512,  # ours; the questions are shorter
    num_layers=32,  # this and the next three are Mixtral's, for --model random; else the model's own
    d_model=4096,
    d_ff=14336,
    num_heads=32,
)

# ---------------------------------------------------------------------------------------------------------------
# The method
# ---------------------------------------------------------------------------------------------------------------


def check_sizes(num_experts: int, num_null: int, top_k: int) -> None:
    if num_experts < 1 or num_null < 0 or not 1 <= top_k <= num_experts + num_null:
        raise ValueError(
            f"num_experts is {num_experts}, num_null {num_null}, top_k {top_k}; needed: num_experts >= 1, "
            f"num_null >= 0 and 1 <= top_k <= num_experts + num_null"
        )


def route(
    router_logits: Tensor, num_experts: int, top_k: int, normalize: str = "true_experts"
) -> tuple[Tensor, Tensor]:
    """Pick top_k of all experts; nulls come back as index -1 with gate 0. Section 3.3.

    router_logits [tokens, num_experts + num_null] -> expert_index [tokens, top_k] int64, gates [tokens, top_k] fp32
    (float64 for float64 logits). Columns from num_experts on are nulls.
    normalize  "true_experts": gates of the picked true experts sum to 1 (the paper's choice); "all_picks": gates of
               all picks, nulls included, sum to 1, so that nulls shrink the output; "none": plain probabilities over
               the true experts, for models trained without normalised gates.
    Raises ValueError for impossible sizes, an unknown normalize, or non-finite logits (a GPU is not asked: that would
    wait for it).
    """
    check_sizes(num_experts, router_logits.shape[-1] - num_experts, top_k)
    if router_logits.device.type == "cpu" and not torch.isfinite(router_logits).all():
        raise ValueError(f"router_logits {list(router_logits.shape)} hold NaN or infinity")
    logits = router_logits.to(torch.promote_types(router_logits.dtype, torch.float32))
    picked, expert_index = logits.topk(top_k, dim=-1)  # [tokens, top_k]
    is_true = expert_index < num_experts
    if normalize == "true_experts":
        # Softmax over the picked true logits. Not -inf: a token without any would turn into NaN.
        gates = picked.masked_fill(~is_true, torch.finfo(logits.dtype).min).softmax(dim=-1)
    elif normalize == "all_picks":
        gates = picked.softmax(dim=-1)
    elif normalize == "none":
        gates = (picked - logits[:, :num_experts].logsumexp(dim=-1, keepdim=True)).masked_fill(~is_true, 0.0).exp()
    else:
        raise ValueError(f"normalize is {normalize!r}; allowed: 'true_experts', 'all_picks', 'none'")
    return expert_index.masked_fill(~is_true, -1), gates.masked_fill(~is_true, 0.0)


def load_balancing_loss(
    router_logits: Tensor,
    num_experts: int,
    top_k: int,
    alpha: float,
    token_mask: Tensor | None = None,
    average_nulls: bool = True,
) -> Tensor:
    """alpha * E * sum_i f~_i P_i over E = num_experts + num_null experts: eqs. 3-6. A 0-dim tensor.

    router_logits  [tokens, E]; the gradient flows through P only
    token_mask     [tokens] bool; False marks padding, which counts neither in f nor in P
    average_nulls  False gives the ordinary balance loss (l_bal), which also balances the nulls among themselves
    Under data parallelism f is averaged over the processes, so that the mean of their losses is the loss of the batch.
    """
    check_sizes(num_experts, router_logits.shape[-1] - num_experts, top_k)
    logits = router_logits.to(torch.promote_types(router_logits.dtype, torch.float32))
    weight = torch.ones_like(logits[:, :1]) if token_mask is None else token_mask.to(logits.dtype)[:, None]
    weight = weight / weight.sum().clamp(min=1)  # [tokens, 1]
    # Count selections, not non-zero gates: a null's gate is always zero. No gradient passes through topk's indices.
    picked = torch.zeros_like(logits).scatter_(1, logits.topk(top_k, dim=-1).indices, 1.0)  # [tokens, E]
    f = (weight * picked).sum(dim=0)  # [E]
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(f)
        f /= dist.get_world_size()
    if average_nulls and logits.shape[1] > num_experts:
        f[num_experts:] = f[num_experts:].mean()
    mean_prob = (weight * logits.softmax(dim=-1)).sum(dim=0)  # [E]
    return alpha * logits.shape[1] * (f * mean_prob).sum()


def predicted_load(num_experts: int, num_null: int, top_k: int) -> float:
    """True experts a token when all experts are picked equally often. Section 3.3."""
    return top_k * num_experts / (num_experts + num_null)


def num_null_for_load(num_experts: int, top_k: int, load: float) -> int:
    """The number of nulls whose predicted load is nearest the budget. Raises ValueError outside 0 < load <= top_k."""
    if not 0 < load <= top_k:
        raise ValueError(f"load is {load}; it must be above 0 and at most top_k = {top_k}")
    return round(num_experts * (top_k / load - 1))


def copy_null_rows(
    router_weight: Tensor, num_null: int, noise: float = 1e-3, generator: torch.Generator | None = None
) -> Tensor:
    """Append null rows to a trained router: copies of its true rows, block after block, so it starts balanced.

    router_weight [num_experts, d_model] -> [num_experts + num_null, d_model]. Section 3.5. `noise` (relative to a
    row's root mean square) breaks the ties between a row and its copies.
    """
    num_experts, d_model = router_weight.shape
    rows = router_weight[torch.arange(num_null, device=router_weight.device) % num_experts]  # [num_null, d_model]
    scale = noise * rows.norm(dim=-1, keepdim=True) / math.sqrt(d_model)
    jitter = torch.randn(rows.shape, generator=generator, dtype=torch.float64).to(rows)
    return torch.cat([router_weight, rows + scale * jitter])


def alpha_at(step: int, steps: int, alpha: float, alpha_late: float) -> float:
    """Tight first, loose after half time. Section 3.4."""
    return alpha if step < steps / 2 else alpha_late


def flops_saved(load: float, base_load: float, ffn_share: float) -> float:
    """Share of all FLOPs saved against base_load experts a token, from the feed-forwards' share. Table 1."""
    return ffn_share * (base_load - load) / base_load


class NullRouting(nn.Module):
    """What the layers below share: they pick experts, and leave behind what the loss and the curious need.

    Every forward leaves `aux_loss` (0-dim, add it to the loss) and `true_counts` [tokens], the number of true experts
    each token used. `choose`, when set, replaces `route`: a function router_logits -> (expert_index, gates).
    Raises ValueError for impossible sizes.
    """

    def __init__(
        self,
        num_experts: int,
        num_null: int,
        top_k: int,
        alpha: float = 0.02,
        normalize: str = "true_experts",
        average_nulls: bool = True,
        backend: str = "auto",
    ):
        check_sizes(num_experts, num_null, top_k)
        super().__init__()
        self.num_experts, self.num_null, self.top_k, self.alpha = num_experts, num_null, top_k, alpha
        self.normalize, self.average_nulls, self.backend = normalize, average_nulls, backend
        self.choose: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None
        self.aux_loss: Tensor | None = None
        self.true_counts: Tensor | None = None

    def __getstate__(self) -> dict:
        """For copy.deepcopy and pickle: an auxiliary loss belongs to a forward pass, and cannot be copied."""
        return {**self.__dict__, "aux_loss": None}

    def pick(self, router_logits: Tensor, token_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        sizes, mask = (self.num_experts, self.top_k), None if token_mask is None else token_mask.reshape(-1)
        choose = self.choose or (lambda logits: route(logits, *sizes, self.normalize))
        expert_index, gates = choose(router_logits)
        self.aux_loss = load_balancing_loss(router_logits, *sizes, self.alpha, mask, self.average_nulls)
        self.true_counts = (expert_index >= 0).sum(dim=-1)
        return expert_index, gates


class AdaMoE(NullRouting):
    """A drop-in feed-forward with true and null experts. x [..., d_model] -> the same shape.

    num_null=0 is an ordinary top-k mixture. `token_mask` [...] marks padding: padded tokens are routed but count
    neither in aux_loss nor in balance. Raises ValueError for a wrong width.
    """

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        num_experts: int,
        num_null: int,
        top_k: int,
        act: str = "gelu",
        glu: bool = False,
        generator: torch.Generator | None = None,
        **routing,
    ):
        super().__init__(num_experts, num_null, top_k, **routing)
        self.d_model, self.act, self.glu = d_model, act, glu

        def normal(*shape: int, fan_in: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(shape, generator=generator) * fan_in**-0.5)

        self.router = nn.Linear(d_model, num_experts + num_null, bias=False)
        self.router.weight = normal(num_experts + num_null, d_model, fan_in=d_model)
        self.w1 = normal(num_experts, d_model, d_ff * (2 if glu else 1), fan_in=d_model)  # [experts, in, out]
        self.w2 = normal(num_experts, d_ff, d_model, fan_in=d_ff)

    def forward(self, x: Tensor, token_mask: Tensor | None = None) -> Tensor:
        if x.shape[-1] != self.d_model:
            raise ValueError(f"x has width {x.shape[-1]}; this layer was made for d_model = {self.d_model}")
        tokens = x.reshape(-1, self.d_model)  # [tokens, d_model]
        with torch.autocast(x.device.type, enabled=False):  # routing stays in full precision under bf16
            router_logits = self.router(tokens.to(self.router.weight.dtype))  # [tokens, num_experts + num_null]
        expert_index, gates = self.pick(router_logits, token_mask)
        y = kernels.moe_mlp(
            tokens, expert_index, gates, self.w1, self.w2, act=self.act, glu=self.glu, backend=self.backend
        )
        return y.view_as(x)


def uniform(*shape: int, like: Tensor, generator: torch.Generator | None = None) -> nn.Parameter:
    """[..., in, out] within 1 / sqrt(in), as LoRA's A and its routers begin. On the device of `like`, at least fp32."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    if like.is_meta:  # nothing to draw for shapes without memory
        return nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"))
    values = (2 * torch.rand(shape, generator=generator) - 1) / math.sqrt(shape[-2])
    return nn.Parameter(values.to(like.device, dtype))


def expert_low_rank(rows: Tensor, a: Tensor, b: Tensor, dispatch: kernels.Dispatch, backend: str) -> Tensor:
    """rows [rows, in] of experts, a [num_experts, in, rank], b [num_experts, rank, out] -> [rows, out]."""
    low = kernels.grouped_mm(rows, a.to(rows.dtype), dispatch, backend=backend)
    return kernels.grouped_mm(low, b.to(rows.dtype), dispatch, backend=backend)


def live_dispatch(expert_index: Tensor, num_experts: int) -> kernels.Dispatch:
    """A dispatch without the rows of null picks, so that nothing between the products touches them either."""
    dispatch = kernels.make_dispatch(expert_index, num_experts)
    return dispatch._replace(slot=dispatch.slot[: int(dispatch.offsets[-1])])


class NullExpertMoE(NullRouting):
    """A trained mixture with null experts added, and LoRA on router and experts. x [..., d_model] -> the same shape.

    block   a module with gate.weight [num_experts, d_model] and SiLU-like gated experts, experts.gate_up_proj
            [num_experts, 2 * d_ff, d_model] and experts.down_proj [num_experts, d_model, d_ff]: the layout of Mixtral,
            OLMoE and Qwen-MoE in transformers 5. A shared expert, if there is one, is kept. Router noise is not.
    rank    0: no LoRA, and every weight can be trained. The rank of gate and up projection is shared.
    `token_mask`, when set, is [...] bool and False at padding: see load_balancing_loss.
    Null rows start as copies (section 3.5), or, with copy_rows=False, at random with the same spread.
    """

    def __init__(
        self,
        block: nn.Module,
        num_null: int,
        top_k: int,
        act: str = "silu",
        rank: int = 0,
        lora_alpha: float = 16.0,
        copy_rows: bool = True,
        generator: torch.Generator | None = None,
        **routing,
    ):
        num_experts, d_model = block.gate.weight.shape
        d_ff = block.experts.down_proj.shape[-1]
        shapes = [list(weight.shape) for weight in (block.experts.gate_up_proj, block.experts.down_proj)]
        if shapes != [[num_experts, 2 * d_ff, d_model], [num_experts, d_model, d_ff]]:
            raise ValueError(f"experts of shapes {shapes} do not fit a gate of shape {[num_experts, d_model]}")
        if odd := [name for name in block.gate.state_dict() if name != "weight"]:  # it would route otherwise
            raise ValueError(f"the gate has {', '.join(odd)} beside its weight; only softmax over x W is understood")
        if act not in kernels.ACTIVATIONS:
            raise ValueError(f"act is {act!r}; allowed: {', '.join(kernels.ACTIVATIONS)}")
        if not getattr(block.gate, "norm_topk_prob", True):  # gates keep the scale that the model was trained with
            routing.setdefault("normalize", "none")
        super().__init__(num_experts, num_null, top_k, **routing)
        self.gate, self.experts, self.act, self.rank = block.gate, block.experts, act, rank
        self.shared_expert = getattr(block, "shared_expert", None)
        self.shared_expert_gate = getattr(block, "shared_expert_gate", None)
        precise = self.gate.weight.detach().to(torch.promote_types(self.gate.weight.dtype, torch.float32))
        rows = copy_null_rows(precise, num_null, generator=generator)[num_experts:]  # bf16 would round the noise away
        if not copy_rows:
            rows = precise.std() * torch.randn(rows.shape, generator=generator).to(rows)
        self.null_rows = nn.Parameter(rows.contiguous(), requires_grad=not rank)  # [num_null, d_model]
        self.token_mask: Tensor | None = None
        if rank:
            like, self.lora_scale = self.gate.weight, lora_alpha / rank
            shapes = {"gate": (d_model, num_experts + num_null)}
            shapes |= {"up": (num_experts, d_model, 2 * d_ff), "down": (num_experts, d_ff, d_model)}
            for name, (*batch, fan_in, fan_out) in shapes.items():
                a = uniform(*batch, fan_in, rank, like=like, generator=generator)
                setattr(self, f"{name}_a", a)
                setattr(self, f"{name}_b", nn.Parameter(a.new_zeros(*batch, rank, fan_out)))

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, x.shape[-1])  # [tokens, d_model]
        with torch.autocast(x.device.type, enabled=False):  # routing in full precision, as in AdaMoE
            router = torch.cat([self.gate.weight, self.null_rows])  # [num_experts + num_null, d_model]
            router = router.to(torch.promote_types(router.dtype, torch.float32))
            router_logits = tokens.to(router.dtype) @ router.T
            if self.rank:
                router_logits = router_logits + self.lora_scale * (tokens.to(router.dtype) @ self.gate_a @ self.gate_b)
        expert_index, gates = self.pick(router_logits, self.token_mask)
        w1, w2 = (w.transpose(1, 2) for w in (self.experts.gate_up_proj, self.experts.down_proj))  # [experts, in, out]
        if self.rank:
            y = self.lora_experts(tokens, live_dispatch(expert_index, self.num_experts), gates, w1, w2)
        else:
            y = kernels.moe_mlp(tokens, expert_index, gates, w1, w2, act=self.act, glu=True, backend=self.backend)
        if self.shared_expert is not None:
            y = y + self.shared_expert_gate(tokens).sigmoid() * self.shared_expert(tokens)
        return y.view_as(x)

    def lora_experts(self, tokens: Tensor, dispatch: kernels.Dispatch, gates: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
        """moe_mlp with w1 + scale * up_a @ up_b and w2 + scale * down_a @ down_b, which are never formed."""
        product = lambda rows, w: kernels.grouped_mm(rows, w, dispatch, backend=self.backend)
        low = lambda rows, a, b: self.lora_scale * expert_low_rank(rows, a, b, dispatch, self.backend)
        rows = kernels.gather(tokens, dispatch, backend=self.backend)  # [live rows, d_model], expert by expert
        gate, up = (product(rows, w1) + low(rows, self.up_a, self.up_b)).chunk(2, dim=-1)
        rows = kernels.ACTIVATIONS[self.act](gate) * up  # [live rows, d_ff]
        rows = product(rows, w2) + low(rows, self.down_a, self.down_b)
        return kernels.scatter(rows, dispatch, gates, backend=self.backend)


def find_children(model: nn.Module, matches: Callable[[nn.Module], bool]) -> list[tuple[nn.Module, str, nn.Module]]:
    """(parent, name, child) of every module inside that matches."""
    children = ((parent, *named) for parent in model.modules() for named in parent.named_children())
    return [place for place in children if matches(place[-1])]


def add_null_experts(
    model: nn.Module, num_null: int, top_k: int | None = None, rank: int = 0, **options
) -> list[NullExpertMoE]:
    """Put null experts into every mixture of a model, in place; returns the new layers.

    A mixture is any module with `gate` and `experts` in the layout of NullExpertMoE, which takes `options`. top_k None
    keeps each layer's own. With rank > 0 all weights of the model are frozen; LoRA's alone are trained.
    Raises ValueError if the model has no such module, or is patched already.
    """
    found = find_children(model, lambda m: hasattr(getattr(m, "gate", None), "weight") and hasattr(m, "experts"))
    if any(isinstance(block, NullExpertMoE) for *_, block in found):
        raise ValueError("this model has null experts already; load it anew")
    if not found or not all(hasattr(block.experts, "gate_up_proj") for *_, block in found):
        raise ValueError(f"{type(model).__name__} has no mixture with gate.weight, experts.gate_up_proj and .down_proj")
    if rank:
        model.requires_grad_(False)
    act, layers = getattr(getattr(model, "config", None), "hidden_act", "silu"), []
    for parent, name, block in found:
        picks = block.gate.top_k if top_k is None else top_k
        layers.append(NullExpertMoE(block, num_null, picks, **({"act": act, "rank": rank} | options)))
        setattr(parent, name, layers[-1].train(block.training))
    return layers


class LoRAExperts(NullRouting):
    """A frozen linear layer plus routed low-rank experts, nulls among them: section 4.1. x [..., in] -> [..., out].

    y = W x + lora_alpha / rank * sum of gates * B_j A_j x. A token without a true expert gets W x.
    """

    def __init__(
        self,
        linear: nn.Linear,
        num_experts: int,
        num_null: int,
        top_k: int,
        rank: int = 8,
        lora_alpha: float = 16.0,
        generator: torch.Generator | None = None,
        **routing,
    ):
        super().__init__(num_experts, num_null, top_k, **routing)
        self.linear, self.scale = linear.requires_grad_(False), lora_alpha / rank
        options = {"like": linear.weight, "generator": generator}
        self.a = uniform(num_experts, linear.in_features, rank, **options)
        self.b = nn.Parameter(self.a.new_zeros(num_experts, rank, linear.out_features))
        self.router = uniform(linear.in_features, num_experts + num_null, **options)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, x.shape[-1])  # [tokens, in]
        with torch.autocast(x.device.type, enabled=False):
            router_logits = tokens.to(self.router.dtype) @ self.router  # [tokens, num_experts + num_null]
        expert_index, gates = self.pick(router_logits, None)
        dispatch = live_dispatch(expert_index, self.num_experts)
        rows = kernels.gather(tokens, dispatch, backend=self.backend)
        rows = expert_low_rank(rows, self.a, self.b, dispatch, self.backend)
        y = kernels.scatter(rows, dispatch, gates, backend=self.backend)  # [tokens, out]
        return self.linear(x) + self.scale * y.view(*x.shape[:-1], y.shape[-1])


def add_lora_experts(module: nn.Module, *sizes, **options) -> list[LoRAExperts]:
    """Give every nn.Linear inside a module its own router and LoRA experts, in place; returns the new layers.

    sizes, options  of LoRAExperts, after its first argument
    """
    layers = []
    for parent, name, linear in find_children(module, lambda m: type(m) is nn.Linear):
        layers.append(LoRAExperts(linear, *sizes, **options))
        setattr(parent, name, layers[-1])
    return layers


def routed(model: nn.Module) -> list[NullRouting]:
    """The layers that pick experts, first to last."""
    return [module for module in model.modules() if isinstance(module, NullRouting)]


def take_aux_loss(layers: list[NullRouting]) -> Tensor:
    """Mean balance loss of the last forward over the layers, and forget it: kept, it would keep the graph alive."""
    losses = [layer.aux_loss for layer in layers]
    for layer in layers:
        layer.aux_loss = None
    return torch.stack(losses).mean()


# ---------------------------------------------------------------------------------------------------------------
# Baselines and controls: other ways to say how many experts a token gets
# ---------------------------------------------------------------------------------------------------------------


def route_counts(router_logits: Tensor, num_experts: int, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Give token t its counts[t] best true experts, gates normalised: route with the counts dictated from outside."""
    width = int(counts.max().clamp(min=1))
    picked, expert_index = router_logits[:, :num_experts].float().topk(width, dim=-1)  # [tokens, width]
    unused = torch.arange(width, device=counts.device) >= counts[:, None]
    gates = picked.masked_fill(unused, torch.finfo(picked.dtype).min).softmax(dim=-1)
    return expert_index.masked_fill(unused, -1), gates.masked_fill(unused, 0.0)


def top_p_counts(router_logits: Tensor, num_experts: int, threshold: float) -> Tensor:
    """[tokens]: the fewest experts whose probabilities reach the threshold (Huang et al. 2024), without training."""
    probs = router_logits[:, :num_experts].float().softmax(dim=-1).sort(dim=-1, descending=True).values
    return 1 + (probs.cumsum(dim=-1) < threshold).sum(dim=-1).clamp(max=num_experts - 1)


def random_counts(counts: Tensor, load: float, generator: torch.Generator) -> Tensor:
    """[tokens]: floor(load) or one more at random, `load` on average: an adaptive budget without adaptivity."""
    extra = torch.rand(len(counts), generator=generator) < load % 1
    return math.floor(load) + extra.to(counts)


def shuffle_counts(counts: Tensor, generator: torch.Generator) -> Tensor:
    """[tokens]: the same counts dealt out to other tokens. What is lost is the worth of their placement."""
    return counts[torch.randperm(len(counts), generator=generator).to(counts.device)]


# ---------------------------------------------------------------------------------------------------------------
# The experiment: one pre-trained top-2 model, fine-tuned as every arm on the same batches, steps and learning rate
# ---------------------------------------------------------------------------------------------------------------

BYTE_CLASSES = {
    "letter": [b for b in range(128) if chr(b).isalpha()],
    "digit": [b for b in range(128) if chr(b).isdigit()],
    "space": [b for b in range(128) if chr(b).isspace()],
    "punctuation": [b for b in range(33, 127) if not chr(b).isalnum()],
}
LR_GRID = (2e-3, 4e-3, 8e-3, 1.6e-2)  # the same for every arm; --ablate prints it
NUM_BLOCKS = 16  # of the validation text: what a run of one seed takes its standard error over


@dataclass(frozen=True)
class Arm:
    num_null: int
    top_k: int | None  # None: the model's own
    normalize: str = "true_experts"
    average_nulls: bool = True
    copy_rows: bool = True
    lr: float | None = None


def trained_arms(config: Config, ablate: bool) -> dict[str, Arm]:
    if config.setting == "lora":  # the paper's Table 7, whose names these are: m null experts, k picks
        arms = {"k1": Arm(0, 1), "k2": Arm(0, 2), "m5k4": Arm(5, 4)}
        return arms | ({"m7k4": Arm(7, 4), "m9k4": Arm(9, 4), "m5k2": Arm(5, 2)} if ablate else {})
    arms = {"top1": Arm(0, 1), "top2": Arm(0, 2), "adamoe": Arm(config.num_null, config.top_k)}
    if ablate:
        adamoe, default = arms["adamoe"], tuple(arms.items())
        arms["all_picks"] = replace(adamoe, normalize="all_picks")
        arms["l_bal"] = replace(adamoe, average_nulls=False)
        arms["random_nulls"] = replace(adamoe, copy_rows=False)
        arms["k+1"] = replace(adamoe, top_k=min(adamoe.top_k + 1, config.num_experts + adamoe.num_null))
        arms["k-1"] = replace(adamoe, top_k=max(adamoe.top_k - 1, 1))
        arms |= {f"{name}@{lr:g}": replace(arm, lr=lr) for lr in LR_GRID for name, arm in default if lr != config.lr}
    return arms


def build(config: Config, arm: Arm, generator: torch.Generator) -> common.TransformerLM:
    """A byte model with AdaMoE layers; with --setting lora a dense one that does as much work as top-2."""

    def linear(width: int, out_width: int) -> nn.Linear:
        layer = nn.Linear(width, out_width, bias=False)
        layer.weight.data = torch.randn(out_width, width, generator=generator) * width**-0.5
        return layer

    def make_ffn(layer: int) -> nn.Module:
        if config.setting == "lora":
            up, down = linear(config.d_model, 2 * config.d_ff), linear(2 * config.d_ff, config.d_model)
            return nn.Sequential(up, nn.GELU(), down)
        sizes = (config.d_model, config.d_ff, config.num_experts, arm.num_null, arm.top_k)
        return AdaMoE(*sizes, normalize=arm.normalize, average_nulls=arm.average_nulls, generator=generator)

    shape = (256, config.num_layers, config.d_model, config.num_heads, config.context, make_ffn)
    return common.TransformerLM(*shape, norm="rms", conv=4, init=config.init, generator=generator)


def add_balance(loss: Tensor, layers: list[NullRouting], name: str, mask: Tensor | slice = slice(None)) -> tuple:
    """A loss plus the balance loss of its forward, and {metric: value}. mask [tokens]: whose load is logged."""
    counts, aux_loss = torch.stack([layer.true_counts for layer in layers]), take_aux_loss(layers)  # [layers, tokens]
    metrics = {name: loss.detach(), "aux_loss": aux_loss.detach(), "load": counts[:, mask].float().mean()}
    return loss + aux_loss, metrics


def train_text(
    model: nn.Module, data: Tensor, config: Config, steps: int, lr: float, alphas: tuple, stream: int, options: dict
) -> None:
    """Language-model loss plus balance loss. The batch of a step depends on `stream` and the step, not on the arm."""
    device, layers = next(model.parameters()).device, routed(model)

    def batches(step: int) -> Tensor:
        generator = torch.Generator().manual_seed(1_000_003 * stream + step)
        return text_data.sample_windows(data, config.batch_size, config.context + 1, generator).to(device)

    def loss_fn(windows: Tensor, step: int) -> tuple[Tensor, dict]:
        for layer in layers:
            layer.alpha = alpha_at(step, steps, *alphas)
        loss = common.lm_loss(model, windows).mean()
        if not layers:  # the dense base
            return loss, {"lm_loss": loss.detach()}
        return add_balance(loss, layers, "lm_loss")

    schedule = common.cosine(steps, warmup=min(20, steps // 5))
    common.train(model, loss_fn, steps, batches=batches, lr=lr, schedule=schedule, **options)


def describe_counts(count: Tensor) -> dict:
    """Of the true experts [..., layers] that tokens used: the mean, by layer too, and the share of 0, 1, 2 ..."""
    by_layer = count.double().flatten(0, -2).mean(dim=0)  # [layers]
    histogram = torch.bincount(count.flatten()).double() / count.numel()
    load = float(count.double().mean())
    return {"load": load, "load_by_layer": by_layer.tolist(), "histogram": histogram.tolist()}


def in_batches(windows: Tensor, num_tokens: int = 4096) -> tuple[Tensor, ...]:
    """windows [count, context + 1] in parts of so many tokens, whatever the context."""
    return windows.split(max(1, num_tokens // (windows.shape[1] - 1)))


@torch.no_grad()
def evaluate(model: nn.Module, windows: Tensor, dictate: Callable[[Tensor], Tensor] | None = None) -> dict:
    """Loss and load on every window, in order, and who got how many experts.

    dictate  counts [tokens] -> counts [tokens]: each batch runs once to see the model's own counts in every layer,
             and once more with the dictated ones.
    """
    model.eval()
    losses, counts, layers = [], [], routed(model)
    for batch in in_batches(windows):
        loss = common.lm_loss(model, batch)
        if dictate is not None:
            for layer in layers:
                given = dictate(layer.true_counts)
                layer.choose = lambda logits, given=given, n=layer.num_experts: route_counts(logits, n, given)
            loss = common.lm_loss(model, batch)
            for layer in layers:
                layer.choose = None
        losses.append(loss.mean(dim=1))  # [batch]
        counts.append(torch.stack([layer.true_counts.view(len(batch), -1) for layer in layers], dim=-1))
    loss, count = torch.cat(losses).double(), torch.cat(counts)  # [windows], [windows, context, layers]
    tokens = windows[:, :-1].unsqueeze(-1).expand_as(count)
    classes = {name: torch.isin(tokens, torch.tensor(members).to(tokens)) for name, members in BYTE_CLASSES.items()}
    by_class = {name: count[chosen].double().mean() for name, chosen in classes.items() if chosen.any()}
    return {
        "loss": float(loss.mean()),
        "loss_blocks": [float(part.mean()) for part in loss.tensor_split(NUM_BLOCKS)],
        "load_by_class": {name: float(load) for name, load in by_class.items()},
        **describe_counts(count),
    }


@torch.no_grad()
def expert_work(model: nn.Module, windows: Tensor) -> dict:
    """What the experts really computed, counted from the operators torch ran (on the torch path), forward only."""
    work, tokens = {"expert_flops": 0, "model_flops": 0, "true_picks": 0}, windows[:, 1:].numel()
    for ffn in model.ffns():
        ffn.backend = "torch"
    for batch in in_batches(windows):
        flops = common.count_flops(lambda inputs=batch[:, :-1]: model(inputs))
        work["expert_flops"] += sum(flops[name] - flops[f"{name}.router"] for name in flops if name.endswith(".ffn"))
        work["model_flops"] += flops["Global"]
        work["true_picks"] += sum(int(ffn.true_counts.sum()) for ffn in model.ffns())
    w1, w2 = model.ffns()[0].w1[:1], model.ffns()[0].w2[:1]
    x, first = w1[0, :, :1].T, torch.zeros(1, 1, dtype=torch.long, device=w1.device)  # one row for expert 0
    row = common.count_flops(lambda: kernels.moe_mlp(x, first, first.to(w1), w1, w2, backend="torch"))["Global"]
    per_token = {name: work[name] / tokens for name in ("expert_flops", "model_flops")}
    return work | per_token | {"rows": work["expert_flops"] / row}


@torch.no_grad()
def future_leak(model: nn.Module, tokens: Tensor) -> float:
    """Largest change of the first half's logits when the second half of tokens [time] is replaced, in float64."""
    model, changed, half = copy.deepcopy(model).double().eval(), tokens.clone(), len(tokens) // 2
    changed[half:] = (changed[half:] + 1) % 256
    before, after = model(tokens[None])[0, :half], model(changed[None])[0, :half]
    return float((before - after).abs().max())


@torch.no_grad()
def count_sample(model: nn.Module, windows: Tensor) -> dict:
    """A piece of text and the true experts each byte used, summed over layers."""
    model(windows[:, :-1])
    counts = sum(ffn.true_counts for ffn in model.ffns()).tolist()
    return {"text": bytes(windows[:, :-1].flatten().tolist()).decode("latin-1"), "counts": counts}


def downstream_text(config: Config) -> text_data.Corpus:
    return text_data.load_text(config.text) if config.text else text_data.load_domain("docs")


def validation_windows(corpus: text_data.Corpus, config: Config, run: Run) -> Tensor:
    return text_data.all_windows(corpus.val, config.context).to(run.device)


def pretrain_base(config: Config, arm: str, seed: int, run: Run) -> dict:
    python = text_data.load_domain("python")
    model = run.prepare(build(config, Arm(0, 2), torch.Generator().manual_seed(seed)))
    alphas, options = (config.alpha_pretrain, config.alpha_pretrain), run.train_options(arm, seed)
    train_text(model, python.train, config, config.pretrain_steps, config.pretrain_lr, alphas, 2 * seed, options)
    common.save(run.path(arm, seed, ".pt"), model.state_dict())
    return evaluate(model, validation_windows(downstream_text(config), config, run)) if routed(model) else {}


def finetune_arm(config: Config, arm: str, seed: int, run: Run) -> dict:
    """From the base, with the arm's router (--setting lora: with its routers and experts): train and measure."""
    settings, downstream = trained_arms(config, ablate=True)[arm], downstream_text(config)
    generator, lora = torch.Generator().manual_seed(seed), config.setting == "lora"
    model, state = build(config, settings, generator), common.load(run.path("base", seed, ".pt"))
    for name, fresh in model.state_dict().items():
        if name.endswith("router.weight"):
            copied = copy_null_rows(state[name], settings.num_null, generator=generator)
            state[name] = copied if settings.copy_rows else torch.cat([state[name], fresh[config.num_experts :]])
    model.load_state_dict(state)
    if lora:
        sizes = (config.lora_experts, settings.num_null, settings.top_k, config.lora_rank, config.lora_alpha)
        add_lora_experts(model.requires_grad_(False).blocks, *sizes, generator=generator)
    model, options = run.prepare(model), run.train_options(arm, seed)
    alphas, lr = (config.alpha, config.alpha_late), settings.lr or (config.lora_lr if lora else config.lr)
    train_text(model, downstream.train, config, config.steps, lr, alphas, 2 * seed + 1, options)
    common.save(run.path(arm, seed, ".pt"), model.state_dict())
    windows = validation_windows(downstream, config, run)
    result = evaluate(model, windows) | ({} if lora else expert_work(model, windows))
    if arm == "adamoe":
        result |= {"leak": future_leak(model, windows[0, :-1]), "sample": count_sample(model, windows[-4:])}
    return result


def control_arm(config: Config, arm: str, seed: int, run: Run) -> dict:
    """Arms without training: another rule for how many experts a token gets, on weights that are there."""
    downstream, source = downstream_text(config), "adamoe" if arm == "shuffled" else "top2"
    generator = torch.Generator().manual_seed(seed)
    model = build(config, trained_arms(config, ablate=False)[source], generator)
    model.load_state_dict(common.load(run.path(source, seed, ".pt")))
    model, windows = model.to(run.device), validation_windows(downstream, config, run)
    load = common.read_json(run.path("adamoe", seed, ".json"))["result"]["load"]
    if arm == "shuffled":
        return evaluate(model, windows, lambda counts: shuffle_counts(counts, generator))
    if arm == "random_k":
        return evaluate(model, windows, lambda counts: random_counts(counts, load, generator))
    # top_p: the threshold whose load on training text is AdaMoE's, by bisection.
    calibration = text_data.sample_windows(downstream.train, 32, config.context + 1, generator).to(run.device)
    low, high = 0.0, 1.0
    for _ in range(16):
        middle = (low + high) / 2
        for ffn in model.ffns():
            ffn.choose = lambda z, p=middle: route_counts(z, config.num_experts, top_p_counts(z, config.num_experts, p))
        low, high = (middle, high) if evaluate(model, calibration)["load"] < load else (low, middle)
    return evaluate(model, windows) | {"threshold": middle}


# ---------------------------------------------------------------------------------------------------------------
# The experiment at full scale: LoRA fine-tuning of a pre-trained mixture on multiple-choice questions
# ---------------------------------------------------------------------------------------------------------------

MIXTRAL, OLMOE = "mistralai/Mixtral-8x7B-v0.1", "allenai/OLMoE-1B-7B-0924"
RANDOM_VOCABULARY = 32000  # of --model random: Mixtral's
COST_BATCHES = 4  # development batches on which FLOPs and times are taken


def full_arms(config: Config, ablate: bool) -> dict[str, Arm]:
    """ "original" is not fine-tuned, "vanilla" is with the model's own top-k; the rest have null experts."""
    adamoe = Arm(config.num_null, config.top_k)
    arms = {"original": Arm(0, None), "vanilla": Arm(0, None), "adamoe": adamoe}
    more = {"l_bal": replace(adamoe, average_nulls=False), "random_nulls": replace(adamoe, copy_rows=False)}
    return arms | (more if ablate else {})


def load_questions(config: Config, seed: int, run: Run) -> tuple[Questions, Questions, list[int], list[str]]:
    """Training and development questions, the letters' tokens, the tokens of the first development question as text."""
    if config.model == "random":
        return pretrained.random_questions(config.batch_size * COST_BATCHES, config.context, RANDOM_VOCABULARY, seed)
    sizes = (config.train_examples, config.context)
    return pretrained.letter_questions(config.model, config.task, run.data_dir, *sizes, seed)


def set_mask(layers: list[NullExpertMoE], tokens: Tensor, lengths: Tensor) -> Tensor:
    """Tell the layers which of the next forward's tokens are real: [batch * time] bool."""
    mask = (torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]).flatten()
    for layer in layers:
        layer.token_mask = mask
    return mask


def model_shape(config: Config, run: Run):
    """The library's configuration of the model."""
    if config.model == "random":
        sizes = (config.num_layers, config.d_model, config.d_ff, config.num_heads, config.num_experts)
        return pretrained.mixtral_config(*sizes, vocab_size=RANDOM_VOCABULARY)
    return pretrained.find_config(config.model, run.data_dir, may_download=not run.dry_run)


def pretrained_model(config: Config, arm: str, seed: int, run: Run) -> nn.Module:
    """The model, patched as the arm wants it, on its device; under torchrun spread over all processes."""
    settings, generator = full_arms(config, ablate=True)[arm], torch.Generator().manual_seed(seed)
    options = {"average_nulls": settings.average_nulls, "copy_rows": settings.copy_rows, "generator": generator}
    options |= {"rank": config.lora_rank, "lora_alpha": config.lora_alpha}

    def patch(model: nn.Module) -> None:
        if arm != "original":
            add_null_experts(model, settings.num_null, settings.top_k, **options)

    torch.manual_seed(seed)  # for random weights
    source = model_shape(config, run) if config.model == "random" else config.model
    return pretrained.place_causal(source, run.dtype, run.device, patch)


def answer_loss(model: nn.Module, layers: list, letters: Tensor, batch: tuple) -> tuple[Tensor, dict]:
    """Loss of the letter alone, plus balance loss over the real tokens."""
    tokens, lengths, labels = batch
    mask = set_mask(layers, tokens, lengths)
    loss = F.cross_entropy(pretrained.last_logits(model, tokens, lengths), letters[labels])
    return add_balance(loss, layers, "answer_loss", mask)


def train_answers(
    model: nn.Module, train: Questions, letters: Tensor, config: Config, seed: int, run: Run, options: dict
) -> None:
    """The batch of a step depends on seed and step, not on the arm. Checkpoints hold what is trained and no more."""
    layers = routed(model)

    def batches(step: int) -> tuple[Tensor, Tensor, Tensor]:
        return train.train_batch(step, config.batch_size, seed, run.device)

    def loss_fn(batch: tuple, step: int) -> tuple[Tensor, dict]:
        for layer in layers:
            layer.alpha = alpha_at(step, config.steps, config.alpha, config.alpha_late)
        return answer_loss(model, layers, letters, batch)

    trained = {name.replace(".", "/"): p for name, p in model.named_parameters() if p.requires_grad}
    if common.processes()[1] > 1:  # each process holds a part; finished arms are kept all the same
        options = options | {"checkpoint": None, "checkpoint_seconds": math.inf}
    schedule = common.cosine(config.steps, warmup=min(10, config.steps // 5))
    options = options | {"accumulate": config.accumulate, "schedule": schedule}
    model.train()
    common.train(nn.ParameterDict(trained), loss_fn, config.steps, batches=batches, lr=config.lr, **options)
    model.eval()


@torch.no_grad()
def answer_questions(model: nn.Module, dev: Questions, letters: Tensor, config: Config, run: Run) -> dict:
    """Which questions are answered rightly (the likeliest letter counts), and how many experts the tokens used."""
    layers, right, counts = routed(model), [], []
    for rows in torch.arange(len(dev.labels)).split(config.batch_size):
        tokens, lengths, labels = dev.batch(rows, run.device)
        mask = set_mask(layers, tokens, lengths)
        scores = pretrained.last_logits(model, tokens, lengths)[:, letters]  # [batch, letters]
        right += (scores.argmax(dim=-1) == labels).int().tolist()
        counts += [torch.stack([layer.true_counts for layer in layers], dim=-1)[mask].cpu()] if layers else []
    if not layers:
        return {"right": right}
    count = torch.cat(counts)  # [real tokens, layers]
    return {"right": right, "sample": count[: int(dev.lengths[0])].sum(dim=1).tolist(), **describe_counts(count)}


def cost(model: nn.Module, dev: Questions, letters: Tensor, config: Config, run: Run) -> dict:
    """Per real token, one entry a batch: forward FLOPs counted from the operators that ran, seconds of a forward and
    of a training step; and the peak memory of all of it in bytes."""
    layers, found = routed(model), {"forward_flops": [], "forward_seconds": [], "step_seconds": []}
    for rows in torch.arange(len(dev.labels)).split(config.batch_size)[:COST_BATCHES]:
        batch = tokens, lengths, _ = dev.batch(rows, run.device)
        num_tokens = int(lengths.sum())

        @torch.no_grad()
        def forward(tokens=tokens, lengths=lengths) -> None:
            set_mask(layers, tokens, lengths)
            pretrained.last_logits(model, tokens, lengths)

        def step(batch=batch) -> None:
            with torch.autocast(run.device, dtype=run.dtype, enabled=run.dtype != torch.float32):
                loss, _ = answer_loss(model, layers, letters, batch)
            loss.backward()
            model.zero_grad()

        found["forward_seconds"].append(common.median_seconds(forward, run.device) / num_tokens)
        if not layers:  # the library's own layers may compute with operators that the counter does not know
            continue
        model.train()
        measured = common.measure_step(step, run.device)
        model.eval()
        found["step_seconds"].append(measured["seconds"] / num_tokens)
        found.setdefault("memory", measured["memory"])
        for layer in layers:
            layer.backend = "torch"  # the counter does not see into Triton kernels
        found["forward_flops"].append(common.count_flops(forward)["Global"] / num_tokens)
        for layer in layers:
            layer.backend = "auto"
    return found


def full_arm(config: Config, arm: str, seed: int, run: Run) -> dict:
    """Load, patch, fine-tune, save what was trained, answer the questions, and measure the cost."""
    if run.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    train, dev, letters, _ = load_questions(config, seed, run)
    model, letters = pretrained_model(config, arm, seed, run), torch.tensor(letters, device=run.device)
    if arm != "original":
        model.activation_checkpointing_enable({"use_reentrant": False})
        train_answers(model, train, letters, config, seed, run, run.train_options(arm, seed))
        settings = full_arms(config, ablate=True)[arm]
        sizes = {"num_null": settings.num_null, "top_k": settings.top_k, "rank": config.lora_rank}
        save_null_experts(run.path(arm, seed, ".npz"), model, **sizes, lora_alpha=config.lora_alpha)
    return answer_questions(model, dev, letters, config, run) | cost(model, dev, letters, config, run)


def save_null_experts(path: Path, model: nn.Module, **sizes) -> None:
    """What add_null_experts added, and with which sizes; megabytes, while the model stays where it was."""
    added = {name: p for name, p in model.named_parameters() if p.requires_grad or name.endswith("null_rows")}
    whole = {name: p.full_tensor() if hasattr(p, "full_tensor") else p for name, p in added.items()}
    if common.processes()[0] == 0:
        common.save_arrays(path, whole, {"sizes": sizes})


def load_null_experts(path: str | Path, model: nn.Module) -> list[NullExpertMoE]:
    """Patch a freshly loaded model as it was saved. Raises ValueError for a file of another model."""
    arrays, meta = common.load_arrays(path)
    layers = add_null_experts(model, **meta["sizes"])
    there = {name: tuple(p.shape) for name, p in model.named_parameters()}
    if odd := [name for name, array in arrays.items() if there.get(name) != tuple(array.shape)]:
        raise ValueError(f"{path} does not fit this model: {', '.join(sorted(odd)[:3])}")
    model.load_state_dict(arrays, strict=False)
    return layers


def load_trained(path: str | Path) -> nn.Module:
    """The model of a trained arm, in eval mode, from what a run left: runs/adamoe-small/arms/adamoe-seed0.pt.

    An .npz of --full goes onto the pre-trained model it was made for. "shuffled", "random_k" and "top_p" are rules on
    weights of other arms and have none of their own. Raises UsageError: see common.load_trained.
    """

    def make(trained: common.Trained) -> nn.Module:
        config, arm = trained.config, trained.arm
        if Path(path).suffix == ".npz":
            model = pretrained.load_causal(config.model, trained.dtype)
            load_null_experts(path, model)
            return model
        lora = config.setting == "lora"
        arms = {"base": Arm(0, 2)} | trained_arms(config, ablate=True)
        model = build(config, arms[arm], torch.Generator())
        if lora and arm != "base":
            sizes = (config.lora_experts, arms[arm].num_null, arms[arm].top_k, config.lora_rank, config.lora_alpha)
            add_lora_experts(model.blocks, *sizes)
        model.load_state_dict(common.load(path))
        return model

    return common.load_trained(path, Config, make)


def bootstrap(differences: np.ndarray, draws: int = 10_000) -> tuple[float, float]:
    """95 % confidence interval of the mean of paired differences [questions]: questions drawn anew, with repetition."""
    drawn = np.random.default_rng(0).integers(len(differences), size=(draws, len(differences)))
    return tuple(np.quantile(differences[drawn].mean(axis=1), (0.025, 0.975)).tolist())


# ---------------------------------------------------------------------------------------------------------------
# Claims
# ---------------------------------------------------------------------------------------------------------------

NEEDS_FULL = "not measured; run --full"
CLAIMS = [
    Claim("adamoe.load", "the load follows top_k * num_experts / (num_experts + num_null), within 0.15",
          "1.66 measured, 1.5 predicted (Mixtral, mean of six tasks)", required=True),
    Claim("adamoe.flops", "expert work is below top-2's",
          "15.21 % of all FLOPs saved (Mixtral, mean of six tasks)", required=True),
    Claim("adamoe.quality", "at its own load, the loss lies under the straight line from top-1 to top-2",
          "not verified (no top-1 on Mixtral)", required=True),
    Claim("adamoe.adaptive", "tokens use different numbers of experts; the same numbers dealt out at random are worse",
          "not verified (the control is ours)", required=True),
    Claim("adamoe.null_free", "null experts cost nothing: rows processed = true picks", "by design", required=True),
    Claim("adamoe.causal", "routing does not look at later tokens", "by design", required=True),
    Claim("adamoe.beats_top2", "better than top-2 fine-tuning outright",
          "accuracy 85.35 against 84.64 (Mixtral, mean of six tasks)"),
    Claim("adamoe.true_norm",
          "gates over true picks beat gates over all picks (distance to the line: their loads differ)",
          "accuracy 81.27 at load 1.54 against 80.19 at 1.50 (SIQA)"),
    Claim("adamoe.copy_init", "copied null rows beat random null rows", "not verified"),
    Claim("adamoe.null_loss", "averaging the nulls in the balance loss beats balancing each null",
          "accuracy 67.51 against 56.68 (RTE), 71.40 against 69.80 (OBQA)"),
    Claim("adamoe.full_accuracy",
          "a pre-trained mixture fine-tuned with null experts answers better than with its own top-k",
          "89.15 against 87.46 (Mixtral, ARC-C)", measured=NEEDS_FULL),
    Claim("adamoe.full_flops", "and needs fewer FLOPs",
          "14.55 % of all FLOPs saved at load 1.67 (Mixtral, ARC-C)", measured=NEEDS_FULL),
    Claim("adamoe.full_time", "and less time: the FLOPs saving shows in a training step",
          "not verified (no times in the paper)", measured=NEEDS_FULL),
]  # fmt: skip

Results = dict[str, list[dict]]  # {arm: [one result a seed]}


def values(results: Results, arm: str, key: str) -> np.ndarray:
    return np.array([result[key] for result in results[arm]])  # [seeds]


def losses(results: Results, arm: str) -> np.ndarray:
    """What margins are taken over: one loss a seed; with a single seed, one a block of the validation text."""
    return np.array(results[arm][0]["loss_blocks"]) if len(results[arm]) == 1 else values(results, arm, "loss")


def under_line(results: Results, arm: str, top1: str = "top1", top2: str = "top2") -> np.ndarray:
    """How far an arm's loss lies under the line through (1, top-1) and (2, top-2) at its load, in nats/byte."""
    one, two = losses(results, top1), losses(results, top2)
    return one + (values(results, arm, "load") - 1) * (two - one) - losses(results, arm)


def shown(margin: np.ndarray, num_seeds: int) -> str:
    return common.show(margin if num_seeds > 1 else [margin.mean()])


def judge(config: Config, run: Run, results: Results) -> None:
    """From measurements to claim rows."""
    of = lambda arm, key: values(results, arm, key)
    ahead = lambda arm, better="adamoe": losses(results, arm) - losses(results, better)

    def report(id: str, margin: np.ndarray, text: str, **numbers: np.ndarray) -> None:
        measured = text.format(margin=shown(margin, len(run.seeds)))
        numbers = {name: np.asarray(by_seed).tolist() for name, by_seed in numbers.items()}
        run.claim(f"adamoe.{id}", measured, {"margin": margin.tolist(), **numbers}, margin)

    predicted, load = predicted_load(config.num_experts, config.num_null, config.top_k), of("adamoe", "load")
    text = f"{common.show(load, 3)}, predicted {predicted:.3f}"
    report("load", 0.15 - abs(load - predicted), text, load=load, predicted=[predicted])
    share, saved = (1 - of("adamoe", key) / of("top2", key) for key in ("expert_flops", "model_flops"))
    text = f"{100 * share.mean():.1f} % less expert work than top-2; {100 * saved.mean():.1f} % of all FLOPs saved"
    report("flops", share, text, expert_work_saved=share, saved=saved)
    gain = under_line(results, "adamoe")
    report("quality", gain, "{margin} nats/byte under the line", loss=of("adamoe", "loss"))
    varied = np.array([1 - max(result["histogram"]) for result in results["adamoe"]])
    text = f"{100 * varied.mean():.0f} % of tokens off the commonest number; shuffled {{margin}} nats/byte worse"
    report("adaptive", ahead("shuffled") * (varied.min() > 0), text, varied=varied)
    rows, picks, leak = (of("adamoe", key) for key in ("rows", "true_picks", "leak"))
    counted = {"rows": rows.tolist(), "true_picks": picks.tolist()}
    text = f"{rows.sum():,.0f} rows, {picks.sum():,} true picks"
    run.claim("adamoe.null_free", text, counted, holds=bool((rows == picks).all()))
    text = f"logits move by at most {leak.max():.0e} when later text changes (float64)"
    run.claim("adamoe.causal", text, {"leak": leak.tolist()}, holds=bool(leak.max() < 1e-9))
    report("beats_top2", ahead("top2"), "{margin} nats/byte better than top-2 (negative: worse)")
    if run.ablate:
        loads = common.show(of("all_picks", "load"), 3)
        text = f"{{margin}} nats/byte further under the line; load over all picks {loads}"
        report("true_norm", gain - under_line(results, "all_picks"), text)
        report("copy_init", ahead("random_nulls"), "{margin} nats/byte better than random null rows")
        report("null_loss", ahead("l_bal"), "{margin} nats/byte better than l_bal")


def judge_full(config: Config, run: Run, results: Results, base_k: int, share: float) -> None:
    """The three claims of --full, AdaMoE against "vanilla". One seed: the margins are taken over questions, batches."""
    of = lambda arm, key: np.array([result[key] for result in results[arm]], dtype=float)  # [seeds, ...]
    over = lambda margins: margins.mean(axis=1) if len(margins) > 1 else margins[0]
    if config.model == "random":
        run.claim("adamoe.full_accuracy", "not measured: random weights answer at random", {})
    else:
        mine, other = of("adamoe", "right"), of("vanilla", "right")  # [seeds, questions]
        interval = bootstrap((mine - other).mean(axis=0))
        points = [100 * number for number in (mine.mean(), other.mean(), (mine - other).mean(), *interval)]
        text = f"{points[0]:.2f} against {points[1]:.2f} % of {mine.shape[1]} questions ({config.task}), difference "
        text += f"{points[2]:.2f} points, 95 % interval {points[3]:.2f} to {points[4]:.2f}"
        numbers = {"adamoe": mine.mean(axis=1).tolist(), "vanilla": other.mean(axis=1).tolist(), "interval": interval}
        run.claim("adamoe.full_accuracy", text, numbers, over(mine - other))
    costs = ("forward_flops", "forward_seconds", "step_seconds")
    saved = {key: 1 - of("adamoe", key) / of("vanilla", key) for key in costs}  # [seeds, batches] each
    load, percent = of("adamoe", "load"), {key: f"{100 * value.mean():.1f} %" for key, value in saved.items()}
    text = f"{percent['forward_flops']} fewer, counted; load {common.show(load, 3)} of {base_k}; "
    text += f"{100 * flops_saved(load.mean(), base_k, share):.1f} % by the paper's formula, "
    text += f"with {100 * share:.1f} % of all FLOPs in the experts"
    numbers = {"saved": saved["forward_flops"].tolist(), "load": load.tolist(), "ffn_share": share}
    run.claim("adamoe.full_flops", text, numbers, over(saved["forward_flops"]))
    text = f"{percent['step_seconds']} less time a training step, {percent['forward_seconds']} less a forward"
    numbers = {key: value.tolist() for key, value in saved.items()}
    run.claim("adamoe.full_time", text, numbers, over(saved["step_seconds"]))


def report_lora(config: Config, run: Run, results: Results) -> None:
    """Setting A: of the claims, the load's; the table says the rest."""
    run.claims[:] = [claim for claim in run.claims if claim.id == "adamoe.load"]
    rows, texts, off = [], [], []
    for arm, settings in trained_arms(config, run.ablate).items():
        predicted = predicted_load(config.lora_experts, settings.num_null, settings.top_k)
        loss, load = values(results, arm, "loss"), values(results, arm, "load")
        gain = shown(under_line(results, arm, "k1", "k2"), len(run.seeds))
        rows.append([arm, common.show(loss), common.show(load, 3), f"{predicted:.3f}", gain])
        texts += [f"{arm} {common.show(load, 3)} (predicted {predicted:.3f})"] if settings.num_null else []
        off.append(abs(load - predicted))
    header = ["arm", "nats/byte", "load", "predicted", "under the line k1-k2"]
    run.table(f"LoRA experts on a dense model: validation loss, {len(run.seeds)} seed(s)", header, rows)
    loads = {arm: values(results, arm, "load").tolist() for arm in results}
    run.claim("adamoe.load", "; ".join(texts), loads, 0.15 - np.max(off, axis=0))


def print_tables(config: Config, run: Run, results: Results) -> None:
    rows, num_seeds = [], len(run.seeds)
    for arm in (arm for arm in results if "@" not in arm):
        loss, load = values(results, arm, "loss"), values(results, arm, "load")
        work = f"{values(results, arm, 'expert_flops').mean() / 1e3:.1f}" if "rows" in results[arm][0] else ""
        gain = shown(under_line(results, arm), num_seeds)
        rows.append([arm, common.show(loss), f"{loss.mean() / math.log(2):.3f}", f"{load.mean():.3f}", work, gain])
    header = ["arm", "nats/byte", "bits/byte", "load", "expert kFLOP/byte", "under the line"]
    run.table(f"validation loss, {num_seeds} seed(s); load = true experts a token", header, rows)

    adamoe = results["adamoe"]
    widest = max(len(result["histogram"]) for result in adamoe)
    shares = np.mean([r["histogram"] + [0.0] * (widest - len(r["histogram"])) for r in adamoe], axis=0)
    run.table("AdaMoE: true experts a token", [*range(widest)], [[f"{100 * share:.1f} %" for share in shares]])
    loads = {name: [result["load_by_class"][name] for result in adamoe] for name in adamoe[0]["load_by_class"]}
    loads |= {f"layer {i}": [result["load_by_layer"][i] for result in adamoe] for i in range(config.num_layers)}
    rows = [[name, common.show(by_seed, 3)] for name, by_seed in loads.items()]
    run.table("AdaMoE: load by kind of byte, by layer", ["", "load"], rows)
    if run.ablate:
        rows = []
        for lr in LR_GRID:
            trio = [arm if lr == config.lr else f"{arm}@{lr:g}" for arm in ("top1", "top2", "adamoe")]
            gain = shown(under_line(results, trio[2], *trio[:2]), num_seeds)
            rows.append([f"{lr:g}", *(common.show(values(results, arm, "loss")) for arm in trio), gain])
        run.table("the learning-rate grid", ["lr", "top1", "top2", "adamoe", "under the line"], rows)


PAPER = {  # Table 1, Mixtral: accuracy of the original, of top-2 fine-tuned, of AdaMoE
    "winogrande": ("55.96", "80.43", "81.93 (load 1.66, 14.99 % of FLOPs saved)"),
    "hellaswag": ("53.62", "84.10", "85.50 (load 1.68, 14.10 % of FLOPs saved)"),
    "piqa": ("68.06", "90.48", "90.32 (load 1.59, 18.07 % of FLOPs saved)"),
    "siqa": ("64.59", "76.36", "76.97 (load 1.63, 16.31 % of FLOPs saved)"),
    "obqa": ("65.40", "89.00", "88.20 (load 1.70, 13.22 % of FLOPs saved)"),
    "arc-c": ("83.73", "87.46", "89.15 (load 1.67, 14.55 % of FLOPs saved)"),
}


def painted(words: list[str], counts: list[int], color: bool) -> str:
    """Tokens of a text, the brighter the more true experts; without colors the number follows each token."""
    if not color:
        return " ".join(f"{word.strip() or repr(word)}·{count}" for word, count in zip(words, counts))
    low, span = min(counts), max(1, max(counts) - min(counts))
    greys = [round(23 * (count - low) / span) for count in counts]
    cells = [f"\x1b[48;5;{232 + grey};38;5;{15 if grey < 12 else 16}m{word}" for word, grey in zip(words, greys)]
    return "".join(cells).replace("\n", "\x1b[0m\n") + "\x1b[0m"


def print_full(config: Config, run: Run, results: Results, words: list[str]) -> None:
    columns = {"load": 1.0, "forward_flops": 1e-9, "forward_seconds": 1e6, "step_seconds": 1e6, "memory": 1e-9}
    paper = dict(zip(("original", "vanilla", "adamoe"), PAPER.get(config.task, ()) if config.model != "random" else ()))
    rows, adamoe = [], results["adamoe"]
    for arm, found in results.items():
        right = np.array([result["right"] for result in found])  # [seeds, questions]
        error = 100 * math.sqrt(right.mean() * (1 - right.mean()) / right.shape[1])
        row = [arm, f"{100 * right.mean():.2f} ± {error:.2f}"]
        for key, unit in columns.items():  # some are not measured for the original
            row.append(f"{unit * np.mean([r[key] for r in found]):.4g}" if found[0].get(key) else "")
        rows.append([*row, paper.get(arm, "")])
    header = ["arm", "accuracy %", "load", "GFLOP/token", "forward µs/token", "step µs/token", "peak GB", "paper %"]
    title = f"{config.task if config.model != 'random' else 'random tokens'}, {len(run.seeds)} seed(s)"
    title += f"; ± is the standard error over {right.shape[1]} questions; paper: Mixtral-8x7B"
    run.table(title, header, rows)
    loads = np.mean([result["load_by_layer"] for result in adamoe], axis=0)
    run.table("AdaMoE: load by layer", ["layer", "load"], [[i, f"{load:.3f}"] for i, load in enumerate(loads)])
    shares = [f"{100 * share:.1f} %" for share in adamoe[0]["histogram"]]
    run.table("AdaMoE: true experts a token, first seed", [*range(len(shares))], [shares])
    common.say("\nthe first question, true experts of each token over all layers")
    common.say(painted(words, adamoe[0]["sample"], sys.stdout.isatty()))


def trade_off(results: Results, one: str, two: str) -> Callable:
    """Panel: loss against load, with the line through the arms that use one and two experts."""

    def panel(ax) -> None:
        mean = {arm: [np.mean([r[key] for r in found]) for key in ("load", "loss")] for arm, found in results.items()}
        line = {f"{one} to {two}": ([1, 2], [mean[one][1], mean[two][1]])}
        points = {arm: ([x], [y]) for arm, (x, y) in mean.items() if "@" not in arm}
        common.lines(ax, line | points, xlabel="true experts a token", ylabel="nats/byte", title="loss against load")

    return panel


def draw(run: Run, panel: Callable, result: dict, text: str, counts: list[int]) -> None:
    """A panel, and for the first seed's result: who gets how many experts; counts [characters] painted on the text."""
    shares = {str(i): share for i, share in enumerate(result["histogram"])}
    labels = {"xlabel": "true experts", "ylabel": "share of tokens"}
    panels = [
        panel,
        lambda ax: common.bars(ax, shares, **labels, title="how many experts a token gets, first seed"),
        lambda ax: common.painted_text(ax, text, counts, title="the brighter, the more true experts"),
    ]
    run.plot("adamoe", panels)


# ---------------------------------------------------------------------------------------------------------------
# main
# ---------------------------------------------------------------------------------------------------------------


BELONGS = {  # options that do nothing elsewhere
    "the small scale": "alpha_pretrain pretrain_steps pretrain_lr init text setting lora_experts lora_lr",
    "--full": "model task train_examples accumulate",
    "--setting moe": "num_experts num_null top_k load lr alpha_pretrain",
    "--setting lora": "lora_experts lora_lr",
    "--setting lora or --full": "lora_rank lora_alpha",
}


def refuse(config: Config, run: Run) -> None:
    """An option that would do nothing, or a number that nothing can be done with, is an error."""
    full, default = run.scale == "full", FULL if run.scale == "full" else SMALL
    if config.setting not in ("moe", "lora"):
        raise ValueError(f"setting is {config.setting!r}; allowed: moe, lora")
    here = {"--full" if full else "the small scale", f"--setting {config.setting}"}
    here |= {"--setting lora or --full"} if full or config.setting == "lora" else set()
    for where in (place for place in BELONGS if place not in here):
        for name in BELONGS[where].split():
            if getattr(config, name) != getattr(default, name):
                raise ValueError(f"--{name.replace('_', '-')} belongs to {where}")
    if full and run.compile:
        raise ValueError("--compile belongs to the small scale: here the rows of an expert change with every batch")
    if config.load is not None and config.num_null != default.num_null:
        raise ValueError("--load chooses the number of nulls; give --load or --num-null, not both")
    for name, value in vars(config).items():
        if isinstance(value, int) and name not in ("num_null", "top_k") and value < 1:
            raise ValueError(f"{name} is {value}; at least 1 is needed")


def check(config: Config, corpus: text_data.Corpus) -> Config:
    """Refuse what the small scale cannot do before anything is written; turn a load budget into a number of nulls."""
    sizes, needed = [len(corpus.train), len(corpus.val)], NUM_BLOCKS * config.context + 1
    if min(sizes) < needed:
        text = f"{sizes[0]} bytes to train on, {sizes[1]} to validate, at least {needed} needed of each"
        raise ValueError(f"text {corpus.name!r} is too short: {text}")
    if config.num_null is None or config.top_k is None:
        raise ValueError(f"num_null is {config.num_null}, top_k {config.top_k}; at this scale both need a number")
    if config.num_experts < 2:
        raise ValueError(f"num_experts is {config.num_experts}; the base and the top-2 arm need at least 2")
    if config.load is not None:
        config = replace(config, num_null=num_null_for_load(config.num_experts, config.top_k, config.load))
    if config.num_null > 4096 or config.init <= 0:
        raise ValueError(f"num_null is {config.num_null}, init {config.init:g}; at most 4096 and above 0 are allowed")
    check_sizes(config.num_experts, config.num_null, config.top_k)
    return config


def fit(config: Config, shape) -> Config:
    """The sizes that the model decides: its shape, and the nulls and picks that were not given."""
    own = pretrained.sizes(shape)
    for name, value in own.items():
        if getattr(config, name) not in (getattr(FULL, name), value):
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(config, name)}, this model's {value}")
    num_experts, num_null = own["num_experts"], config.num_null
    top_k = round(1.5 * shape.num_experts_per_tok) if config.top_k is None else config.top_k
    if num_null is None:
        num_null = num_experts if config.load is None else num_null_for_load(num_experts, top_k, config.load)
    check_sizes(num_experts, num_null, top_k)
    return replace(config, **own, num_null=num_null, top_k=top_k)


def main_full(config: Config, run: Run) -> dict:
    """Settle the model, say what it will cost, then every arm; see full_arm."""
    run.claims[:] = [claim for claim in run.claims if claim.id.startswith("adamoe.full_")]
    if config.task not in task_data.LETTER_TASKS:
        raise ValueError(f"task is {config.task!r}; allowed: {', '.join(task_data.LETTER_TASKS)}")
    is_random, (_, processes) = config.model == "random", common.processes()
    memory = pretrained.device_memory(run.device) * (processes if run.device == "cuda" else 1)
    if config.model == "auto":
        config = replace(config, model=MIXTRAL if memory > 110e9 else OLMOE)
    shape = model_shape(config, run)
    config = fit(config, shape)
    share, needed = estimate_full(config, run, shape, memory, processes)
    if run.dry_run:
        return {}
    if needed > memory:
        remedy = "a lower --batch-size or --context, a smaller --model, --dtype bf16, or more GPUs with torchrun"
        if is_random:
            remedy = f"a lower --num-layers (about {int(config.num_layers * memory / needed)})"
        raise ValueError(f"{needed / 1e9:.0f} GB needed, {memory / 1e9:.0f} GB there; what helps: {remedy}")
    if processes > 1:
        run.workers = 1
    elif run.device == "cpu":
        run.workers = max(1, min(run.workers, int(memory / needed)))
    run.data = {"random": "tokens"}
    if not is_random:
        files = task_data.task_files(config.task, run.data_dir)
        config = replace(config, model=str(pretrained.locate(config.model, run.data_dir)))
        files = [*files, Path(config.model) / "config.json"]
        run.data = dict(zip(("train", "dev", "model"), (common.sha256(path)[:12] for path in files)))
    run.config = config
    train, dev, _, words = load_questions(config, run.seed, run)
    text = f"{len(train.labels)} questions to train on, {len(dev.labels)} to answer"
    run.header(f"{Path(config.model).name} · {'random tokens' if is_random else config.task}: {text}")
    results = run.measure(full_arm, config, list(full_arms(config, run.ablate)))
    print_full(config, run, results, words)
    judge_full(config, run, results, shape.num_experts_per_tok, share)
    right = {arm: 100 * np.mean([result["right"] for result in found]) for arm, found in results.items()}
    counts = [count for word, count in zip(words, results["adamoe"][0]["sample"]) for _ in word]
    accuracy = lambda ax: common.bars(ax, right, ylabel="accuracy %", title="right answers")
    draw(run, accuracy, results["adamoe"][0], "".join(words), counts)
    return {"arms": results}


def estimate_full(config: Config, run: Run, shape, memory: int, processes: int) -> tuple[float, float]:
    """Print what --full will take, from the model's shape: (experts' share of a token's FLOPs, bytes needed)."""
    model = pretrained.random_causal(shape, run.dtype, "meta")  # shapes, no memory
    embedding, base_k = model.get_input_embeddings().weight.numel(), shape.num_experts_per_tok
    met = lambda experts: common.count_parameters(model, experts) - embedding  # a FLOP pair each, attention's aside
    parameters, active, share = met(None) + embedding, met(base_k), 1 - met(0) / met(base_k)
    load, tokens = predicted_load(config.num_experts, config.num_null, config.top_k), config.batch_size * config.context
    add_null_experts(model, config.num_null, config.top_k, rank=config.lora_rank)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    # Of every checkpointed layer its input, of one all that it computes.
    held = config.num_layers * config.d_model + config.top_k * (4 * config.d_model + 6 * config.d_ff)
    needed = {"weights": parameters * run.dtype.itemsize, "LoRA and Adam": 16 * trained}
    needed["activations"] = 4 * held * tokens / config.accumulate
    here = config.model == "random" or pretrained.is_here(config.model, run.data_dir)
    size = lambda count: f"{count / 1e9:.2f} GB"
    rows = [
        ["parameters", f"{parameters:,}"],
        ["of which a token meets", f"{active:,} and its embedding, {100 * share:.1f} % of them in experts"],
        ["predicted load", f"{load:.3f} of {base_k} experts ({config.num_null} nulls, {config.top_k} picks)"],
        ["FLOPs saved, predicted", f"{100 * flops_saved(load, base_k, share):.1f} %"],
        # Forward, forward again for the checkpointed layers, and a backward that needs no gradient of frozen weights.
        ["training FLOPs an arm, at most", f"{6 * active * config.steps * tokens:.1e}"],
        ["weights to download", "none" if here else f"{size(2 * parameters)} in 16 bits"],
        ["memory needed, at most", " + ".join(f"{name} {size(count)}" for name, count in needed.items())],
        ["memory there", f"{size(memory)} ({run.device if processes == 1 else f'{processes} processes'})"],
    ]
    run.table(f"what {config.model} will take", ["", "estimate"], rows)
    return share, sum(needed.values())


def main(config: Config, run: Run) -> dict:
    refuse(config, run)
    if run.scale == "full":
        return main_full(config, run)
    python, downstream = text_data.load_domain("python"), downstream_text(config)
    run.config = config = check(config, downstream)
    run.data = {corpus.name: corpus.digest for corpus in (python, downstream)}
    windows, arms = validation_windows(downstream, config, run), list(trained_arms(config, run.ablate))
    model = build(config, Arm(0, 2), torch.Generator().manual_seed(run.seed)).to(run.device)
    step = lambda: common.lm_loss(model, windows[: config.batch_size]).mean().backward()
    if run.dry_run:
        run.estimate(model, step, len(run.seeds) * (config.pretrain_steps + config.steps * len(arms)))
        return {}
    rounds = [math.ceil(len(run.seeds) * n / run.workers) for n in (1, len(arms))]  # jobs one worker does in turn
    steps = rounds[0] * config.pretrain_steps + rounds[1] * config.steps
    seconds = 1.3 * steps * common.median_seconds(step, run.device)  # evaluation takes the rest
    run.header("text " + ", ".join(map(" ".join, run.data.items())), seconds)
    for note in filter(None, {python.note, downstream.note}):
        common.say(note)
    if config.load is not None:
        predicted = predicted_load(config.num_experts, config.num_null, config.top_k)
        common.say(f"load {config.load:g}: {config.num_null} nulls, predicted load {predicted:.3f}")

    run.measure(pretrain_base, config, ["base"])
    results = run.measure(finetune_arm, config, arms)
    if config.setting == "lora":
        report_lora(config, run, results)
        run.plot("adamoe", [trade_off(results, "k1", "k2")])
        return {"arms": results}
    results |= run.measure(control_arm, config, ["shuffled", "random_k", "top_p"] if run.ablate else ["shuffled"])
    print_tables(config, run, results)
    judge(config, run, results)
    first = results["adamoe"][0]
    draw(run, trade_off(results, "top1", "top2"), first, first["sample"]["text"], first["sample"]["counts"])
    return {"arms": results}


if __name__ == "__main__":
    common.run(main, SMALL, FULL, CLAIMS, data_parallel=True)
