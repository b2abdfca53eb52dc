"""AdaMoE: token-adaptive routing with null experts.

Zeng, Miao, Gao, Zhang, Deng, "AdaMoE: Token-Adaptive Routing with Null Experts for Mixture-of-
Experts Language Models" (Findings of EMNLP 2024, arXiv 2406.13233).

A top-k mixture spends the same compute on every token, though some tokens need less. AdaMoE adds
num_null *null experts*, whose output is 0 and whose cost is nothing, to the num_experts true ones,
and raises top_k. Picks that fall on nulls are work saved, so true experts vary by token:

    router_logits = x W^T                             [tokens, num_experts + num_null]
    picks         = top_k of router_logits
    gates         = softmax over the picked TRUE experts only; none: 0, the token skips the layer
    y             = sum of gates * Expert(x)

The balance loss (eqs. 3-6) keeps the average in hand. With f_i the share of tokens that pick expert
i and P_i its mean in the softmax over all, nulls enter with their average: which one is picked
makes no difference. When all are picked equally often, the loss is top_k * alpha.

    aux_loss = alpha * (num_experts + num_null) * sum_i f~_i P_i,  f~_i: f_i, or the nulls' mean f

One token, 3 true and 2 null experts, top_k = 3, in numbers:

                      true 0    true 1    true 2    null 3    null 4
    router_logits       2.00      1.00      0.00      1.50     -1.00
    picked               yes       yes         .       yes         .       2 true experts, 1 null
    gates               0.73      0.27         .         .         .       = softmax([2, 1])
    f~                  1.00      1.00      0.00      0.50      0.50
    P                   0.46      0.17      0.06      0.28      0.02       aux_loss = 3.93 alpha

Balanced, the predicted load is top_k * num_experts / (num_experts + num_null) true experts a token:
a budget is chosen before training, `--load 1.5`. Null logits do not enter the gates, so the task's
loss gives them no gradient; with one true pick (top_k=1 always) the gate is 1, and the router gets
none either. Nothing rewards "hard token, more experts".

Run      python adamoe.py              two minutes on two cores, no download
         python adamoe.py --ablate     every arm; --seeds 8 for verdicts
         python adamoe.py --text FILE  fine-tune on your own text
         python adamoe.py --full       OLMoE, or Mixtral where it fits, on ARC-Challenge
         torchrun --nproc-per-node 4 adamoe.py --full       where one GPU does not hold the model
You see  a byte model pre-trained on Python's library with top-2, then fine-tuned on its manual as
         top-1, top-2 and AdaMoE: loss, load, FLOPs and time of each, and a text with its counts.
Found    (seeds 0-7) The budget is met (1.494 of 1.5 experts), a quarter of top-2's expert work is
         saved, and the loss lies 0.009 ± 0.003 nats/byte under the line from top-1 to top-2: the
         same counts dealt out at random lose 0.12. But AdaMoE does not beat top-2 (-0.030), and
         an honest rival needs no null expert: top-p routing, put on the trained top-2 model, is
         0.022 better at the same load. --full has been run on tiny models of each family only.
Differences from the paper and its code
1. Equation 6 as written: the released Mixtral code averages an empty slice, so balances each null.
2. The loss is per layer, then averaged; pooled, as released, two collapsed layers cancel.
3. Copied null rows get 1e-3 of noise: else a row ties with its twin.
4. alpha falls to alpha_late at half time, within one run (the paper: after the first epoch).
5. Small scale: all weights trained, every arm at the same rate, its best of one grid on seeds
   100-102. LoRA experts on a dense model (setting A, section 4.1, table 7) are left out.
6. --full: LoRA as in the paper, on a base in bf16 (the paper: 4 bits), one for gate and up; the
   answer is the likeliest letter; models trained without normalised gates keep their scale.

Break it yourself (seeds 0-2, as it is: load 1.50, 1.465 nats/byte, top-2 1.438): --alpha 0
--alpha-late 0 (load 1.75, and the loss *improves*: 1.438); --top-k 4 (load 2.00, and 1.449, worse
than top-2); --arms top1,top2,adamoe,all_picks (once alpha has dropped, gates over all picks let the
load creep to 1.75).
"""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import common
import kernels
from common import (
    Check,
    Count,
    Job,
    Margin,
    Missing,
    NonNegative,
    Only,
    Positive,
    Results,
    Run,
    Whole,
    check,
    claim,
    show,
)
from data import mixtures, pretrained
from data import tasks as task_data
from data import text as text_data
from data.arrays import load_arrays, save_arrays

# --------------------------------------------------------------------------------------------------
# The method
# --------------------------------------------------------------------------------------------------


def check_sizes(num_experts: int, num_null: int, top_k: int) -> None:
    if num_experts < 1 or num_null < 0 or not 1 <= top_k <= num_experts + num_null:
        found = f"num_experts is {num_experts}, num_null {num_null}, top_k {top_k}"
        needed = "num_experts >= 1, num_null >= 0 and 1 <= top_k <= num_experts + num_null"
        raise ValueError(f"{found}; needed: {needed}")


def full_precision(tensor: Tensor) -> Tensor:
    """In float32 at least: routing stays precise under bf16."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def pick_experts(router_logits: Tensor, top_k: int, selection: Tensor | None) -> Tensor:
    """The top_k columns [tokens, top_k] by logits, or by another score [tokens, experts]."""
    score = router_logits if selection is None else selection
    return score.topk(top_k, dim=-1).indices


def route(
    router_logits: Tensor,
    num_experts: int,
    top_k: int,
    normalize: str = "true_experts",
    selection: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Pick top_k of all experts; nulls come back as index -1 with gate 0. Section 3.3.

    router_logits [tokens, num_experts + num_null] -> expert_index [tokens, top_k] int64, gates
    [tokens, top_k] fp32 (float64 for float64 logits). Columns from num_experts on are nulls.
    normalize  "true_experts": gates of the picked true experts sum to 1 (the paper's choice);
               "all_picks": gates of all picks do, nulls included, so that nulls shrink the output;
               "none": probabilities over the true experts, for models trained like that
    selection  [tokens, num_experts + num_null]: what to pick by instead of the logits
    Raises ValueError for impossible sizes, an unknown normalize, or non-finite logits (a GPU is not
    asked: that would wait for it).
    """
    check_sizes(num_experts, router_logits.shape[-1] - num_experts, top_k)
    if router_logits.device.type == "cpu" and not torch.isfinite(router_logits).all():
        raise ValueError(f"router_logits {list(router_logits.shape)} hold NaN or infinity")
    logits = full_precision(router_logits)
    expert_index = pick_experts(logits, top_k, selection)
    picked = logits.gather(-1, expert_index)  # [tokens, top_k]
    is_true = expert_index < num_experts
    if normalize == "true_experts":
        # Softmax over the picked true logits. Not -inf: a token without any would turn into NaN.
        lowest = torch.finfo(logits.dtype).min
        gates = picked.masked_fill(~is_true, lowest).softmax(dim=-1)
    elif normalize == "all_picks":
        gates = picked.softmax(dim=-1)
    elif normalize == "none":
        log_sum = logits[:, :num_experts].logsumexp(dim=-1, keepdim=True)
        gates = (picked - log_sum).masked_fill(~is_true, 0.0).exp()
    else:
        allowed = "'true_experts', 'all_picks', 'none'"
        raise ValueError(f"normalize is {normalize!r}; allowed: {allowed}")
    return expert_index.masked_fill(~is_true, -1), gates.masked_fill(~is_true, 0.0)


def load_balancing_loss(
    router_logits: Tensor,
    num_experts: int,
    top_k: int,
    alpha: float,
    token_mask: Tensor | None = None,
    average_nulls: bool = True,
    selection: Tensor | None = None,
) -> Tensor:
    """alpha * E * sum_i f~_i P_i over E = num_experts + num_null experts: eqs. 3-6. 0-dim.

    router_logits  [tokens, E]; the gradient flows through P only
    token_mask     [tokens] bool; False marks padding, which counts neither in f nor in P
    average_nulls  False: the ordinary balance loss (l_bal), which also balances nulls one by one
    selection      as in route
    In data-parallel training f is averaged over the processes: the mean of their losses is then the
    loss of the batch.
    """
    check_sizes(num_experts, router_logits.shape[-1] - num_experts, top_k)
    logits = full_precision(router_logits)
    weight = torch.ones_like(logits[:, :1])  # [tokens, 1]
    if token_mask is not None:
        weight = token_mask.to(logits)[:, None]
    weight = weight / weight.sum().clamp(min=1)
    # Count picks, not gates above 0: a null's gate is always 0. No gradient passes their indices.
    expert_index = pick_experts(logits, top_k, selection)
    picked = torch.zeros_like(logits).scatter_(1, expert_index, 1.0)  # [tokens, E]
    f = (weight * picked).sum(dim=0)  # [E]
    # Without gradients nobody trains, and a process may be alone in this, as where it checks.
    if torch.is_grad_enabled() and dist.is_available() and dist.is_initialized():
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
    """The number of nulls whose predicted load is nearest the budget. Raises ValueError."""
    if not 0 < load <= top_k:
        raise ValueError(f"load is {load}; it must be above 0 and at most top_k = {top_k}")
    return round(num_experts * (top_k / load - 1))


def copy_null_rows(
    router_weight: Tensor,
    num_null: int,
    noise: float = 1e-3,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Append null rows to a trained router: copies of its true rows, so that it starts balanced.

    router_weight [num_experts, d_model] -> [num_experts + num_null, d_model]; all true rows in
    turn, again and again. Section 3.5. `noise` (relative to a row's root mean square) breaks the
    ties between a row and its copies.
    """
    num_experts, d_model = router_weight.shape
    source = torch.arange(num_null, device=router_weight.device) % num_experts
    rows = router_weight[source]  # [num_null, d_model]
    scale = noise * rows.norm(dim=-1, keepdim=True) / math.sqrt(d_model)
    jitter = torch.randn(rows.shape, generator=generator, dtype=torch.float64).to(rows)
    return torch.cat([router_weight, rows + scale * jitter])


def alpha_at(step: int, steps: int, alpha: float, alpha_late: float) -> float:
    """Tight first, loose after half time. Section 3.4."""
    return alpha if step < steps / 2 else alpha_late


def flops_saved(load: float, base_load: float, ffn_share: float) -> float:
    """Share of all FLOPs saved against base_load experts a token, from the experts' share."""
    return ffn_share * (base_load - load) / base_load


class LowRank(nn.Module):
    """LoRA: x [.., in] -> scale * (x A) B [.., out]. A is random, B zero: it starts as nothing.

    shape  (in, out), or (num_experts, in, out) for a pair of matrices an expert
    like   a tensor on whose device, and in whose dtype (float32 at least), it is made
    """

    def __init__(
        self,
        shape: Sequence[int],
        rank: int,
        scale: float,
        like: Tensor,
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        *experts, width, out_width = shape
        self.scale = scale
        if like.is_meta:  # nothing to draw for shapes without memory
            values = like.new_empty(*experts, width, rank)
        else:
            values = torch.rand(*experts, width, rank, generator=generator)
        like = full_precision(like.new_empty(0))
        self.lora_a = nn.Parameter(((2 * values - 1) / math.sqrt(width)).to(like))
        self.lora_b = nn.Parameter(like.new_zeros(*experts, rank, out_width))

    def forward(self, x: Tensor, product: Callable = torch.matmul) -> Tensor:
        low = product(x, self.lora_a.to(x.dtype))  # [.., rank]
        return self.scale * product(low, self.lora_b.to(x.dtype))


class Router(nn.Module):
    """x [tokens, d_model] -> logits of all experts, the true ones first, in full precision."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.weight = nn.Parameter(weight)  # [num_experts + num_null, d_model]
        self.low_rank: LowRank | None = None

    def forward(self, tokens: Tensor) -> Tensor:
        with torch.autocast(tokens.device.type, enabled=False):
            weight = full_precision(self.weight)
            tokens = tokens.to(weight.dtype)
            logits = F.linear(tokens, weight)
            if self.low_rank is not None:
                logits = logits + self.low_rank(tokens)
        return logits


class AdaMoE(nn.Module):
    """A drop-in feed-forward with true and null experts. x [..., d_model] -> the same shape.

    Every forward leaves `aux_loss` (0-dim, add it to the loss; see take_aux_loss) and `true_counts`
    [tokens], the number of true experts each token used. num_null=0 is an ordinary top-k mixture.
    With top_k=1 every gate is 1, so the output gives the router no gradient at all.

    token_mask  [...] bool, an argument or the attribute: False marks padding, which is routed but
                counts neither in aux_loss nor in balance
    choose      if set, replaces `route`: router_logits -> (expert_index, gates)
    Raises ValueError for impossible sizes and for a wrong width. `around` makes one of the weights
    of a trained mixture.
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
        alpha: float = 0.02,
        normalize: str = "true_experts",
        average_nulls: bool = True,
        backend: str = "auto",
    ):
        check_sizes(num_experts, num_null, top_k)
        if act not in kernels.ACTIVATIONS:
            raise ValueError(f"act is {act!r}; allowed: {', '.join(kernels.ACTIVATIONS)}")
        super().__init__()
        self.d_model = d_model
        self.act = act
        self.glu = glu
        self.num_experts = num_experts
        self.num_null = num_null
        self.top_k = top_k
        self.alpha = alpha
        self.normalize = normalize
        self.average_nulls = average_nulls
        self.backend = backend

        def normal(*shape: int, fan_in: int) -> Tensor:
            return torch.randn(shape, generator=generator) * fan_in**-0.5

        self.router = Router(normal(num_experts + num_null, d_model, fan_in=d_model))
        width = 2 * d_ff if glu else d_ff
        self.w1 = nn.Parameter(normal(num_experts, d_model, width, fan_in=d_model))  # [.., in, out]
        self.w2 = nn.Parameter(normal(num_experts, d_ff, d_model, fan_in=d_ff))

        # What a trained mixture may bring along; see `around`.
        self.out_in = False  # w1 and w2 are [num_experts, out, in]
        self.scoring, self.scale = "softmax", 1.0
        self.register_buffer("selection_bias", None, persistent=False)
        self.shared: nn.Module | None = None
        self.shared_gate: nn.Module | None = None
        self.up_low_rank: LowRank | None = None
        self.down_low_rank: LowRank | None = None

        self.choose: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None
        self.token_mask: Tensor | None = None
        self.aux_loss: Tensor | None = None
        self.true_counts: Tensor | None = None

    @classmethod
    def around(
        cls,
        mixture,
        num_null: int,
        top_k: int,
        rank: int = 0,
        lora_alpha: float = 16.0,
        copy_rows: bool = True,
        generator: torch.Generator | None = None,
        **options,
    ) -> "AdaMoE":
        """Null experts in a trained mixture, whose weights are used, not copied. Section 3.5.

        mixture    what data.mixtures.read_block returns, or anything with these attributes
        rank       0: every weight can be trained; else LoRA on router and experts
        copy_rows  False: null rows at random with the spread of the true ones
        options    alpha, normalize, average_nulls, backend
        """
        if mixture.act not in kernels.ACTIVATIONS:
            allowed = ", ".join(kernels.ACTIVATIONS)
            raise ValueError(f"the experts' activation is {mixture.act!r}; allowed: {allowed}")
        options.setdefault("normalize", "true_experts" if mixture.normalize else "none")
        sizes = (mixture.d_model, mixture.d_ff, mixture.num_experts, num_null, top_k)
        with torch.device("meta"):  # sizes alone: no memory for weights that are replaced below
            layer = cls(*sizes, act=mixture.act, glu=True, **options)
        layer.w1 = mixture.gate_up_proj
        layer.w2 = mixture.down_proj
        layer.out_in = True
        layer.scoring, layer.scale = mixture.scoring, mixture.scale
        layer.shared, layer.shared_gate = mixture.shared, mixture.shared_gate

        true_rows = full_precision(mixture.router.detach())  # bf16 would round the noise away
        rows = copy_null_rows(true_rows, num_null, generator=generator)
        if not copy_rows:
            random = torch.randn(num_null, layer.d_model, generator=generator).to(rows)
            rows[mixture.num_experts :] = rows[: mixture.num_experts].std() * random
        layer.router = Router(rows)
        if mixture.selection_bias is not None:
            copies = torch.arange(num_null, device=rows.device) % mixture.num_experts
            bias = mixture.selection_bias.detach()
            layer.selection_bias = torch.cat([bias, bias[copies]])
        if rank:
            give = partial(
                LowRank, rank=rank, scale=lora_alpha / rank, like=rows, generator=generator
            )
            layer.router.low_rank = give((layer.d_model, len(rows)))
            layer.up_low_rank = give((mixture.num_experts, layer.d_model, 2 * mixture.d_ff))
            layer.down_low_rank = give((mixture.num_experts, mixture.d_ff, layer.d_model))
        return layer

    def __getstate__(self) -> dict:
        """For copy.deepcopy and pickle: an auxiliary loss belongs to a forward pass."""
        return {**super().__getstate__(), "aux_loss": None}

    def forward(self, x: Tensor, token_mask: Tensor | None = None) -> Tensor:
        if x.shape[-1] != self.d_model:
            made_for = f"this layer was made for d_model = {self.d_model}"
            raise ValueError(f"x has width {x.shape[-1]}; {made_for}")
        tokens = x.reshape(-1, self.d_model)  # [tokens, d_model]
        router_logits = self.router(tokens)  # [tokens, num_experts + num_null]
        expert_index, gates = self.pick(router_logits, token_mask)  # [tokens, top_k]
        y = self.experts(tokens, expert_index, gates)  # [tokens, d_model]
        if self.shared_gate is not None:
            y = y + self.shared_gate(tokens).sigmoid() * self.shared(tokens)
        elif self.shared is not None:
            y = y + self.shared(tokens)
        return y.view_as(x)

    def pick(
        self, router_logits: Tensor, token_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The routing, and what it leaves behind."""
        mask = self.token_mask if token_mask is None else token_mask
        if mask is not None:
            mask = mask.reshape(-1)
            if len(mask) != len(router_logits):
                raise ValueError(
                    f"token_mask has {len(mask)} entries, x {len(router_logits)} tokens"
                )
        selection = None
        if self.scoring == "sigmoid":  # sigmoid(z) over its sum is softmax(log sigmoid(z))
            router_logits = F.logsigmoid(router_logits)
        if self.selection_bias is not None:
            selection = router_logits.exp() + self.selection_bias
        sizes = (self.num_experts, self.top_k)
        if self.choose is None:
            expert_index, gates = route(router_logits, *sizes, self.normalize, selection)
        else:
            expert_index, gates = self.choose(router_logits)
        balance = (self.alpha, mask, self.average_nulls, selection)
        aux_loss = load_balancing_loss(router_logits, *sizes, *balance)
        if not is_backward_running():  # where a forward is a repetition, and nobody takes its loss
            self.aux_loss = aux_loss
        self.true_counts = (expert_index >= 0).sum(dim=-1)
        return expert_index, self.scale * gates

    def experts(self, tokens: Tensor, expert_index: Tensor, gates: Tensor) -> Tensor:
        """sum of gates * Expert(x), [tokens, d_model]. Null picks are never computed."""
        w1, w2 = self.w1, self.w2
        if self.out_in:
            w1, w2 = w1.transpose(1, 2), w2.transpose(1, 2)
        act, backend = self.act, self.backend
        if self.up_low_rank is None:
            return kernels.moe_mlp(
                tokens, expert_index, gates, w1, w2, act=act, glu=self.glu, backend=backend
            )
        dispatch = kernels.make_dispatch(expert_index, self.num_experts)
        live_rows = int(dispatch.offsets[-1])  # the others are null picks
        slot, pos, offsets, num_experts = dispatch  # torch 2.11 does not compile dispatch._replace
        dispatch = kernels.Dispatch(slot[:live_rows], pos, offsets, num_experts)
        product = partial(kernels.grouped_mm, dispatch=dispatch, backend=backend)
        rows = kernels.gather(tokens, dispatch, backend)  # [live rows, d_model], by expert
        hidden = product(rows, w1) + self.up_low_rank(rows, product)
        gate, up = hidden.chunk(2, dim=-1)
        rows = kernels.ACTIVATIONS[act](gate) * up  # [live rows, d_ff]
        rows = product(rows, w2) + self.down_low_rank(rows, product)
        return kernels.scatter(rows, dispatch, gates, backend)


def is_backward_running() -> bool:
    """Whether backward is running: a forward in it is activation checkpointing computing again."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def null_layers(model: nn.Module) -> list[AdaMoE]:
    """The AdaMoE layers of a model, first to last."""
    return [module for module in model.modules() if isinstance(module, AdaMoE)]


def take_aux_loss(layers: Sequence[AdaMoE]) -> Tensor:
    """Mean balance loss of the last forward over the layers, 0-dim; it is theirs no longer.

    Once after each forward: kept, it would keep the graph alive. Raises ValueError when there is
    none, or when activation checkpointing lost its gradient.
    """
    losses = [layer.aux_loss for layer in layers]
    for layer in layers:
        layer.aux_loss = None
    if not losses or any(loss is None for loss in losses):
        raise ValueError("there is no aux_loss: take it once after each forward of all layers")
    mean = torch.stack([loss.to(losses[0].device) for loss in losses]).mean()
    trained = any(p.requires_grad for layer in layers for p in layer.router.parameters())
    if trained and torch.is_grad_enabled() and not mean.requires_grad:
        reason = "the forward ran without gradients, as activation checkpointing does with"
        raise ValueError(f"aux_loss has no gradient: {reason} use_reentrant=True; set it to False")
    return mean


# --------------------------------------------------------------------------------------------------
# Null experts in a model of transformers
# --------------------------------------------------------------------------------------------------


def add_null_experts(
    model: nn.Module, num_null: int, top_k: int | None = None, rank: int = 0, **options
) -> list[AdaMoE]:
    """Put null experts into every mixture of a model, in place; returns the new layers.

    top_k    None: each layer's own
    rank     above 0: the mixtures are frozen, LoRA on router and experts is trained; the rest of
             the model is frozen, too, unless part of it is already (as by PEFT)
    options  of AdaMoE.around
    The model's attention_mask says what is padding. model.save_pretrained is refused from now on:
    what was added is kept by save_null_experts. Raises ValueError, and leaves the model as it was,
    if it has no mixture, is patched already, or has one that a layer with 0 nulls does not equal.
    """
    layers = put_null_experts(model, num_null, top_k, rank, **options)
    options.pop("generator", None)
    finish_patch(model, {"num_null": num_null, "top_k": top_k, "rank": rank, **options})
    return layers


def finish_patch(model: nn.Module, sizes: dict) -> None:
    """Keep sizes for save_null_experts, refuse save_pretrained, hand on the attention_mask."""
    model.null_expert_sizes = sizes
    for module in model.modules():
        is_peft = hasattr(module, "get_base_model")  # which saves its own adapters alone
        if hasattr(module, "save_pretrained") and not is_peft:
            module.save_pretrained = refuse_to_save
    mixtures.watch(model, AdaMoE)


def refuse_to_save(*_, **__) -> None:
    reason = "from_pretrained would draw its experts at random"
    raise ValueError(f"this model has null experts: {reason}; use adamoe.save_null_experts")


def put_null_experts(
    model: nn.Module, num_null: int, top_k: int | None = None, rank: int = 0, **options
) -> list[AdaMoE]:
    if null_layers(model):
        raise ValueError("this model has null experts already; load it anew")

    def make(block: nn.Module) -> AdaMoE:
        mixture = mixtures.read_block(block)
        return AdaMoE.around(mixture, num_null, top_k or mixture.top_k, rank, **options)

    def make_equal(block: nn.Module) -> AdaMoE:
        mixture = mixtures.read_block(block)
        return AdaMoE.around(mixture, 0, mixture.top_k)

    is_untouched = all(parameter.requires_grad for parameter in model.parameters())
    with mixtures.all_or_nothing(model):
        layers = mixtures.replace_blocks(model, make, make_equal)
        if rank and is_untouched:
            model.requires_grad_(False)
        if rank:
            for layer in layers:
                for name, parameter in layer.named_parameters():
                    parameter.requires_grad_("lora" in name)
    return layers


def added_names(model: nn.Module) -> set[str]:
    """The parameters that add_null_experts made: routers and LoRA."""
    names = set()
    for name, _ in model.named_parameters():
        *_, parent, own = ("", "", *name.split("."))
        if own.startswith("lora") or parent == "router":
            names.add(name)
    return names


def save_null_experts(path: str | Path, model: nn.Module, **sizes) -> None:
    """What add_null_experts added and what else is trained: megabytes with LoRA.

    sizes  what add_null_experts was given; left out, it is known. Raises ValueError if it differs.
    """
    given = getattr(model, "null_expert_sizes", sizes)
    for name, value in sizes.items():
        if given.get(name) not in (None, value):
            made = f"the null experts were made with {given[name]!r}"
            raise ValueError(f"{name} is {value!r}; {made}")
    kept, added = {}, added_names(model)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad or name in added:
            is_spread = hasattr(parameter, "full_tensor")  # over processes, by FSDP2
            kept[name] = parameter.full_tensor() if is_spread else parameter
    if common.processes()[0] == 0:
        save_arrays(path, kept, {"sizes": given})


def load_null_experts(path: str | Path, model: nn.Module) -> list[AdaMoE]:
    """Patch a freshly loaded model as it was saved.

    Raises ValueError, and leaves the model as it was, for a file with an array missing, of another
    shape, or that belongs to no patch.
    """
    arrays, meta = load_arrays(path)
    sizes = meta.get("sizes", {})
    if "num_null" not in sizes:
        raise ValueError(f"{path} does not say how many null experts it has")
    with mixtures.all_or_nothing(model):
        layers = put_null_experts(model, **sizes)
        there, added = dict(model.named_parameters()), added_names(model)
        allowed = added if sizes.get("rank") else there
        odd = sorted(added - arrays.keys())
        for name, array in arrays.items():
            if name not in allowed or array.shape != there[name].shape:
                odd.append(name)
        if odd:
            raise ValueError(f"{path} does not fit this model: {', '.join(odd[:3])}")
        model.load_state_dict(arrays, strict=False)
    finish_patch(model, sizes)
    return layers


# --------------------------------------------------------------------------------------------------
# Baselines and controls: other ways to say how many experts a token gets
# --------------------------------------------------------------------------------------------------


def route_counts(router_logits: Tensor, num_experts: int, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Give token t its counts[t] best true experts, gates normalised: route with given counts."""
    width = int(counts.max().clamp(min=1))
    picked, expert_index = router_logits[:, :num_experts].float().topk(width, dim=-1)
    unused = torch.arange(width, device=counts.device) >= counts[:, None]  # [tokens, width]
    lowest = torch.finfo(picked.dtype).min
    gates = picked.masked_fill(unused, lowest).softmax(dim=-1)
    return expert_index.masked_fill(unused, -1), gates.masked_fill(unused, 0.0)


def top_p_counts(router_logits: Tensor, num_experts: int, threshold: float) -> Tensor:
    """[tokens]: the fewest experts whose probabilities reach the threshold (Huang et al. 2024)."""
    probs = router_logits[:, :num_experts].float().softmax(dim=-1)
    reached = probs.sort(dim=-1, descending=True).values.cumsum(dim=-1)
    return 1 + (reached < threshold).sum(dim=-1).clamp(max=num_experts - 1)


def route_top_p(router_logits: Tensor, num_experts: int, threshold: float) -> tuple[Tensor, Tensor]:
    """Top-p routing, which needs no null expert and no training."""
    counts = top_p_counts(router_logits, num_experts, threshold)
    return route_counts(router_logits, num_experts, counts)


def shuffle_counts(counts: Tensor, generator: torch.Generator) -> Tensor:
    """[tokens]: the same counts dealt out to other tokens. What is lost is their placement."""
    return counts[torch.randperm(len(counts), generator=generator).to(counts.device)]


# --------------------------------------------------------------------------------------------------
# Config
# --------------------------------------------------------------------------------------------------

FullCount = Annotated[Count, Only(scale="full")]


@dataclass(frozen=True)
class Config(common.Settings):
    num_null: Whole | None = None  # null experts; none: as many as true ones, as in the paper
    top_k: Count | None = None  # picks, nulls included; none: 1.5 times the model's own
    load: Positive | None = None  # budget of true experts a token; chooses num_null from top_k
    alpha: NonNegative = 0.02  # weight of the balance loss, first half; paper section 4.2.1
    alpha_late: NonNegative = 1e-4  # second half; paper section 4.2.1
    num_experts: Count = 8  # true experts; Mixtral has 8
    num_layers: Count = 2  # transformer layers
    d_model: Count = 64  # width
    d_ff: Count = 128  # hidden width of one expert
    num_heads: Count = 4  # attention heads
    context: Count = 128  # bytes; at full scale tokens, of a longer question the end
    batch_size: Count = 16  # sequences a step
    pretrain_steps: Annotated[Count, Only(scale="small")] = 400  # of the top-2 model
    steps: Count = 300  # fine-tuning steps of every arm
    pretrain_lr: Annotated[Positive, Only(scale="small")] = 6e-3  # peak, cosine to a tenth
    lr: Positive = 8e-3  # peak, cosine to a tenth; best for every arm on seeds 100-102
    text: Annotated[str, Only(scale="small")] = ""  # file or folder instead of Python's manual
    model: Annotated[str, Only(scale="full")] = "auto"  # folder, name, "random" or "auto"
    task: Annotated[Literal[task_data.LETTER_TASKS], Only(scale="full")] = "arc-c"  # questions
    train_examples: FullCount = 1000  # questions; paper section 4.2
    accumulate: FullCount = 1  # parts of a batch; the balance loss is then that of a part
    lora_rank: FullCount = 8  # of router and experts; paper section 4.1
    lora_alpha: Annotated[Positive, Only(scale="full")] = 16.0  # LoRA is scaled by this / rank

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.load is not None and self.num_null is not None:
            raise ValueError("load chooses the number of nulls; give --load or --num-null")

    def nulls_and_picks(self, num_experts: int, own_top_k: int) -> tuple[int, int]:
        """(num_null, top_k) for a model with so many experts, trained with own_top_k picks."""
        top_k = round(1.5 * own_top_k) if self.top_k is None else self.top_k
        num_null = num_experts if self.num_null is None else self.num_null
        if self.load is not None:
            num_null = num_null_for_load(num_experts, top_k, self.load)
        check_sizes(num_experts, num_null, top_k)
        return num_null, top_k


SMALL = Config()
FULL = replace(
    SMALL,
    steps=125,  # two epochs of 1000 questions
    lr=5e-5,  # the paper's
    context=512,  # ours; the questions are shorter
    num_layers=32,  # this and the next three are Mixtral's, for --model random
    d_model=4096,
    d_ff=14336,
    num_heads=32,
)
SHAPE = ("num_experts", "num_layers", "d_model", "d_ff", "num_heads")

# --------------------------------------------------------------------------------------------------
# The task: bytes of a text, or at full scale questions (data.pretrained.LetterTask)
# --------------------------------------------------------------------------------------------------


class ByteText:
    """Next bytes of a text. The batch of a step depends on `stream` and the step alone."""

    measure = "loss"  # the mean over a window: less is better
    unit = "nats/byte"

    def __init__(self, corpus: text_data.Corpus, config: Config, device: str, stream: int):
        self.corpus = corpus
        self.config = config
        self.device = device
        self.stream = stream
        windows = text_data.all_windows(corpus.val, config.context).to(device)
        self.eval_batches = windows.split(max(1, 4096 // config.context))

    def batch(self, step: int) -> Tensor:
        generator = torch.Generator().manual_seed(1_000_003 * self.stream + step)
        return self.windows(self.config.batch_size, generator)

    def windows(self, count: int, generator: torch.Generator) -> Tensor:
        """Random windows of training text [count, context + 1]."""
        length = self.config.context + 1
        found = text_data.sample_windows(self.corpus.train, count, length, generator)
        return found.to(self.device)

    def loss(self, model: nn.Module, windows: Tensor) -> Tensor:
        return common.lm_loss(model, windows).mean()

    def scores(self, model: nn.Module, windows: Tensor) -> Tensor:
        return common.lm_loss(model, windows).mean(dim=1)  # [windows]

    def num_tokens(self, windows: Tensor) -> int:
        return windows[:, 1:].numel()

    def sample(self) -> tuple[Tensor, list[str]]:
        """A batch of text to show, and its tokens as text."""
        windows = self.eval_batches[-1][-4:]
        return windows, list(bytes(windows[:, :-1].flatten().tolist()).decode("latin-1"))


def manual(config: Config) -> text_data.Corpus:
    """What the small model is fine-tuned on."""
    return text_data.load_text(config.text) if config.text else text_data.load_domain("docs")


def task_of(job: Job) -> ByteText | pretrained.LetterTask:
    config, run = job.config, job.run
    if run.scale == "small":
        return ByteText(manual(config), config, run.device, 2 * job.seed + 1)
    sizes = (config.train_examples, config.context, config.batch_size)
    return pretrained.LetterTask(
        config.model, config.task, run.data_dir, *sizes, job.seed, run.device
    )


# --------------------------------------------------------------------------------------------------
# The experiment: one pre-trained top-k model, fine-tuned as every arm on the same batches
# --------------------------------------------------------------------------------------------------

OWN_TOP_K = 2  # of the small model
PRETRAIN_ALPHA = 0.01  # weight of its balance loss
COST_BATCHES = 4  # batches on which FLOPs and times are taken


@dataclass(frozen=True)
class Arm:
    num_null: int | None = None  # None: the settings'
    top_k: int | None = None  # None: the settings', or without nulls the model's own
    normalize: str | None = None  # None: what the model was trained with
    average_nulls: bool = True
    copy_rows: bool = True


ARMS = {
    "original": Arm(num_null=0),  # not fine-tuned
    "vanilla": Arm(num_null=0),  # fine-tuned with the model's own top-k
    "top1": Arm(num_null=0, top_k=1),
    "top2": Arm(num_null=0, top_k=2),
    "adamoe": Arm(),
    "all_picks": Arm(normalize="all_picks"),
    "l_bal": Arm(average_nulls=False),
    "random_nulls": Arm(copy_rows=False),
}
CONTROLS = {"shuffled": "adamoe", "top_p": "top2"}  # rules on the weights of these, untrained
DEFAULT = {
    "small": ["original", "top1", "top2", "adamoe", "shuffled", "top_p"],
    "full": ["original", "vanilla", "adamoe"],
}
MORE = {"small": ["all_picks", "l_bal", "random_nulls"], "full": ["l_bal", "random_nulls"]}
NULLS = ("num_null", "top_k", "load")
TUNING = ("steps", "lr", "alpha", "alpha_late", "train_examples", "accumulate")
TUNING += ("lora_rank", "lora_alpha")


def check_arm(arm: str, config: Config, run: Run) -> None:
    """Refuse settings that would do nothing in an arm, or not fit what it starts from."""
    method, settings = arm.partition("@")[0], common.settings_of(arm)
    if method in CONTROLS:  # rules on the weights of other arms
        fixed = {*vars(config)}
    elif method == "original":
        fixed = {*TUNING, *NULLS}
    else:
        fixed = {"pretrain_steps", "pretrain_lr", *SHAPE}
        fixed.update(NULLS if ARMS[method].num_null == 0 else ())
        fixed.update(["context"] if run.scale == "small" else ())
    fixed.update(SHAPE if run.scale == "full" else ())
    common.refuse_idle_flags(config, dict(settings), run.scale)
    for name, _ in settings:
        if name in fixed:
            raise common.UsageError(f"arm {arm}: {name} is not {method}'s own to change")


def model_shape(config: Config, run: Run):
    """transformers' configuration of the model of --full."""
    if config.model == "random":
        sizes = (config.num_layers, config.d_model, config.d_ff, config.num_heads)
        return pretrained.mixtral_config(*sizes, config.num_experts)
    return pretrained.find_config(config.model, run.data_dir, may_download=not run.dry_run)


def experts_of(config: Config, run: Run) -> tuple[int, int]:
    """(num_experts, top_k) of the pre-trained model."""
    if run.scale == "small":
        return config.num_experts, OWN_TOP_K
    shape = model_shape(config, run)
    return pretrained.sizes(shape)["num_experts"], shape.num_experts_per_tok


def nulls_and_picks(job: Job) -> tuple[int, int]:
    """(num_null, top_k) of an arm."""
    arm = ARMS[job.method]
    num_experts, own_top_k = experts_of(job.config, job.run)
    if arm.num_null == 0:
        return 0, arm.top_k or own_top_k
    return job.config.nulls_and_picks(num_experts, own_top_k)


def build(job: Job, generator: torch.Generator) -> common.TransformerLM:
    """The byte model with the layers of an arm."""
    config, arm = job.config, ARMS[job.method]
    sizes = (config.d_model, config.d_ff, config.num_experts, *nulls_and_picks(job))
    normalize = arm.normalize or "true_experts"
    options = {"normalize": normalize, "average_nulls": arm.average_nulls, "generator": generator}
    return common.TransformerLM(
        256,
        config.num_layers,
        config.d_model,
        config.num_heads,
        config.context,
        lambda layer: AdaMoE(*sizes, **options),
        norm="rms",
        conv=4,
        init=0.1,
        generator=generator,
    )


def start_small(job: Job) -> nn.Module:
    """The byte model with the routers of an arm: as it was pre-trained, or about to be."""
    arm, generator = ARMS[job.method], torch.Generator().manual_seed(job.seed)
    model = build(job, generator)
    if job.method == "original":
        return job.prepare(model)
    state = common.load(job.other("original").path(".pt"))
    for name, fresh in model.state_dict().items():
        if name.endswith("router.weight"):
            num_experts, num_null = len(state[name]), len(fresh) - len(state[name])
            copied = copy_null_rows(state[name], num_null, generator=generator)
            random = torch.cat([state[name], fresh[num_experts:]])
            state[name] = copied if arm.copy_rows else random
    common.load_state(model, state, "original")
    return job.prepare(model)


def patch_sizes(job: Job) -> dict:
    """What add_null_experts gets, and a file of save_null_experts repeats."""
    num_null, top_k = nulls_and_picks(job)
    lora = {"rank": job.config.lora_rank, "lora_alpha": job.config.lora_alpha}
    return {"num_null": num_null, "top_k": top_k, **lora}


def start_full(job: Job) -> nn.Module:
    """A pre-trained model, patched as the arm wants it; under torchrun spread over processes."""
    arm = ARMS[job.method]
    config = job.config
    run = job.run
    options = {"average_nulls": arm.average_nulls, "copy_rows": arm.copy_rows}
    options["generator"] = torch.Generator().manual_seed(job.seed)

    def patch(model: nn.Module) -> None:
        if job.method != "original":
            add_null_experts(model, **patch_sizes(job), **options)

    torch.manual_seed(job.seed)  # for random weights
    source = model_shape(config, run) if config.model == "random" else config.model
    model = pretrained.place_causal(source, run.dtype, run.device, patch)
    if job.method != "original":
        model.activation_checkpointing_enable({"use_reentrant": False})
    return model


def finetune(
    job: Job, model: nn.Module, task, steps: int, lr: float, alphas: tuple[float, float]
) -> None:
    """Loss of the task plus balance loss. Of a frozen model checkpoints hold what is trained."""
    layers = null_layers(model)

    def loss_fn(batch, step: int) -> tuple[Tensor, dict]:
        for layer in layers:
            layer.alpha = alpha_at(step, steps, *alphas)
        loss = task.loss(model, batch)
        aux_loss = take_aux_loss(layers)
        load = counts_of(layers).float().mean()
        values = {"task_loss": loss.detach(), "aux_loss": aux_loss.detach(), "load": load}
        return loss + aux_loss, values

    trained, options = model, {}
    if not all(parameter.requires_grad for parameter in model.parameters()):
        part = {name: p for name, p in model.named_parameters() if p.requires_grad}
        trained = nn.ParameterDict({name.replace(".", "/"): part[name] for name in part})
        if common.processes()[1] > 1:  # each process holds a part: finished arms alone are kept
            options = {"checkpoint": None, "checkpoint_seconds": math.inf}
    options["accumulate"] = job.config.accumulate
    schedule = common.cosine(steps, warmup=min(20, steps // 5))
    model.train()
    job.train(trained, loss_fn, steps, batches=task.batch, lr=lr, schedule=schedule, **options)
    model.eval()


def train_arm(job: Job) -> dict:
    """Load or pre-train, fine-tune, keep what was trained, answer, and measure the cost."""
    config, is_small = job.config, job.run.scale == "small"
    task = task_of(job)
    model = start_small(job) if is_small else start_full(job)
    if job.method != "original":
        finetune(job, model, task, config.steps, config.lr, (config.alpha, config.alpha_late))
    elif is_small:
        library = ByteText(text_data.load_domain("python"), config, job.run.device, 2 * job.seed)
        alphas = (PRETRAIN_ALPHA, PRETRAIN_ALPHA)
        finetune(job, model, library, config.pretrain_steps, config.pretrain_lr, alphas)
    if is_small:
        common.save(job.path(".pt"), model.state_dict())
    elif job.method != "original":
        save_null_experts(job.path(".npz"), model, **patch_sizes(job))
    result = evaluate(model, task) | cost(model, task, job)
    if job.method == "adamoe":
        num_experts, _ = experts_of(config, job.run)
        result["predicted"] = predicted_load(num_experts, *nulls_and_picks(job))
        result["sample"] = count_sample(model, task)
        if is_small:
            result["leak"] = future_leak(model, task.eval_batches[0][0, :-1])
    return result


def control_arm(job: Job) -> dict:
    """No training: another rule for how many experts a token gets, on weights that are there."""
    source, generator = job.other(CONTROLS[job.method]), torch.Generator().manual_seed(job.seed)
    task, model = task_of(job), build(source, generator)
    common.load_state(model, common.load(source.path(".pt")), source.label)
    model = model.to(job.run.device)
    if job.method == "shuffled":
        return evaluate(model, task, lambda counts: shuffle_counts(counts, generator))
    # top_p: the threshold whose load on training text is AdaMoE's, by bisection.
    load, layers = job.other("adamoe").result()["load"], null_layers(model)
    calibration = copy.copy(task)
    calibration.eval_batches = [task.windows(32, generator)]
    low, high = 0.0, 1.0
    for _ in range(16):
        threshold = (low + high) / 2
        for layer in layers:
            sizes = {"num_experts": layer.num_experts, "threshold": threshold}
            layer.choose = partial(route_top_p, **sizes)
        is_low = evaluate(model, calibration)["load"] < load
        low, high = (threshold, high) if is_low else (low, threshold)
    return evaluate(model, task) | {"threshold": threshold}


def rebuild(job: Job, state: dict | None) -> nn.Module:
    """The model of a trained arm; of --full, what was added is put into the pre-trained model."""
    if job.run.scale == "full":
        model = pretrained.load_causal(job.config.model, job.run.dtype)
        load_null_experts(job.path(".npz"), model)
        return model
    model = build(job, torch.Generator())
    common.load_state(model, state, f"{job.label}.pt")
    return model


def load_trained(path: str | Path) -> nn.Module:
    """The model of a trained arm, in eval mode: runs/adamoe-small/arms/adamoe-seed0.pt.

    An .npz of --full goes onto the pre-trained model it was made for. "shuffled" and "top_p" are
    rules on weights of other arms and have none of their own. Raises UsageError, see
    common.load_trained.
    """
    return common.load_trained(path, Config, rebuild)


# --------------------------------------------------------------------------------------------------
# What is measured
# --------------------------------------------------------------------------------------------------


def counts_of(layers: Sequence[AdaMoE]) -> Tensor:
    """True experts of the last forward's real tokens in every layer, [tokens, layers]."""
    counts = torch.stack([layer.true_counts for layer in layers], dim=-1)
    mask = layers[0].token_mask
    return counts if mask is None else counts[mask.reshape(-1)]


@torch.no_grad()
def evaluate(model: nn.Module, task, dictate: Callable[[Tensor], Tensor] | None = None) -> dict:
    """The task's measure on every batch, and how many experts the tokens used.

    dictate  counts [tokens] -> counts [tokens]: each batch runs once to see the model's own counts
             in every layer, and once more with the dictated ones
    """
    model.eval()
    layers = null_layers(model)
    scores = []
    counts = []
    for batch in task.eval_batches:
        score = task.scores(model, batch)
        if dictate is not None:
            for layer in layers:
                given = dictate(layer.true_counts)
                layer.choose = partial(route_counts, num_experts=layer.num_experts, counts=given)
            score = task.scores(model, batch)
            for layer in layers:
                layer.choose = None
        scores.append(score)
        if layers:
            counts.append(counts_of(layers))
    score = torch.cat(scores).double()
    found = {task.measure: float(score.mean()), "count": len(score)}
    if layers:
        count = torch.cat(counts)  # [tokens, layers]
        found["load"] = float(count.double().mean())
        found["load_by_layer"] = count.double().mean(dim=0).tolist()
        tokens_with = torch.bincount(count.flatten(), minlength=layers[0].num_experts + 1)
        found["histogram"] = (tokens_with / count.numel()).tolist()
    return found


def cost(model: nn.Module, task, job: Job) -> dict:
    """What a token costs, layer by layer.

    FLOPs of a forward, counted from the operators that ran; seconds of a forward and of a training
    step. `rows`: how often an expert was applied to a token, from its FLOPs.
    """
    layers, device = null_layers(model), job.run.device
    if not layers:  # the library's own, whose operators the counter may not know
        return {}
    batches = task.eval_batches[:COST_BATCHES]
    num_tokens = sum(task.num_tokens(batch) for batch in batches)

    @torch.no_grad()
    def forward() -> None:
        for batch in batches:
            task.scores(model, batch)
            picks.append(sum(int(layer.true_counts.sum()) for layer in layers))

    def step() -> None:
        is_low = job.run.dtype != torch.float32
        with torch.autocast(device, dtype=job.run.dtype, enabled=is_low):
            loss = task.loss(model, batches[0]) + take_aux_loss(layers)
        loss.backward()
        model.zero_grad(set_to_none=True)

    picks: list[int] = []
    found = {"seconds_forward": common.median_seconds(forward, device) / num_tokens}
    model.train()
    found["seconds_step"] = common.median_seconds(step, device) / task.num_tokens(batches[0])
    model.eval()
    if job.run.scale == "full":
        found["peak_bytes"] = common.peak_memory(device)

    for layer in layers:
        layer.backend = "torch"  # the counter does not see into Triton kernels
    flops, in_experts = common.count_flops(forward), 0
    for name, module in model.named_modules(prefix=type(model).__name__):
        if isinstance(module, AdaMoE):
            others = [
                flops.get(f"{name}.{part}", 0) for part in ("router", "shared", "shared_gate")
            ]
            in_experts += flops[name] - sum(others)
    found["flops"] = flops["Global"] / num_tokens
    found["expert_flops"] = in_experts / num_tokens
    if common.processes()[1] == 1:  # else each process holds a part of an expert
        found["rows"] = in_experts / flops_of_one_row(layers[0])
        found["true_picks"] = sum(picks[-len(batches) :])
    for layer in layers:
        layer.backend = "auto"
    return found


@torch.no_grad()
def flops_of_one_row(layer: AdaMoE) -> int:
    """FLOPs of one expert on one token."""
    x = layer.w1.new_zeros(1, layer.d_model)
    first = torch.zeros(1, 1, dtype=torch.long, device=x.device)
    gate = torch.ones(1, 1, device=x.device)
    return common.count_flops(lambda: layer.experts(x, first, gate))["Global"]


@torch.no_grad()
def future_leak(model: nn.Module, tokens: Tensor) -> float:
    """Largest change of the first half's logits when the second half of tokens [time] is replaced,
    in float64.
    """
    model, half = copy.deepcopy(model).double(), len(tokens) // 2
    changed = tokens.clone()
    changed[half:] = (changed[half:] + 1) % 256
    before, after = model(tokens[None])[0, :half], model(changed[None])[0, :half]
    return float((before - after).abs().max())


@torch.no_grad()
def count_sample(model: nn.Module, task) -> dict:
    """A piece of text, token by token, and the true experts each used, summed over layers."""
    batch, words = task.sample()
    task.scores(model, batch)
    return {"words": words, "counts": counts_of(null_layers(model)).sum(dim=1).tolist()}


# --------------------------------------------------------------------------------------------------
# Claims
# --------------------------------------------------------------------------------------------------


def rival(results: Results) -> str:
    """Fine-tuning with the model's own top-k."""
    return "top2" if "top2" in results else "vanilla"


def compared(results: Results, other: str, words: str = "") -> Margin:
    """How much better AdaMoE is than another arm, in nats/byte less or points more."""
    if "accuracy" in results["adamoe"][0]:
        gain, unit = results.ahead("adamoe", other, "accuracy"), "points"
        words += f"; {results['adamoe'][0]['count']} questions"
    else:
        gain, unit = results.ahead(other, "adamoe", "loss"), "nats/byte"
    return Margin(gain, f"{show(gain)} {unit} better than {other} (negative: worse){words}")


def under_line(results: Results, arm: str) -> np.ndarray:
    """[seeds]: nats/byte under the line through (1, top-1) and (2, top-2), at the arm's load."""
    one, two = results.of("top1", "loss"), results.of("top2", "loss")
    on_line = one + (results.of(arm, "load") - 1) * (two - one)
    return on_line - results.of(arm, "loss")


def saved(results: Results, key: str) -> np.ndarray:
    """[seeds]: percent that AdaMoE has less of than its rival."""
    return 100 * (1 - results.of("adamoe", key) / results.of(rival(results), key))


@claim("the load follows top_k * num_experts / (num_experts + num_null), within a tenth",
       paper="1.66 measured, 1.5 predicted (Mixtral, mean of six)", required=True)  # fmt: skip
def load(results: Results, config: Config) -> Margin:
    found, predicted = results.of("adamoe", "load"), results.of("adamoe", "predicted")
    text = f"{show(found, 3)}, predicted {predicted[0]:.3f}"
    return Margin(0.1 - abs(found / predicted - 1), text)


@claim("at its own load, the loss lies under the straight line from top-1 to top-2",
       paper="not verified (no top-1 on Mixtral)", required=True)  # fmt: skip
def quality(results: Results, config: Config) -> Margin:
    gain = under_line(results, "adamoe")
    return Margin(gain, f"{show(gain)} nats/byte under the line")


@claim("tokens use different numbers of experts; the same numbers dealt out at random are worse",
       paper="not verified (the control is ours)", required=True)  # fmt: skip
def adaptive(results: Results, config: Config) -> Margin:
    varied = 1 - results.of("adamoe", "histogram").max(axis=1)  # [seeds]
    words = f"; {100 * varied.mean():.0f} % of tokens off the commonest number"
    gain, text, _ = compared(results, "shuffled", words)
    return Margin(gain * (varied.min() > 0), text)


@claim("better than fine-tuning with the model's own top-k, at a lower load",
       paper="accuracy 85.35 against 84.64 (Mixtral, mean of six)", required=True)  # fmt: skip
def beats_top_k(results: Results, config: Config) -> Margin:
    return compared(results, rival(results))


@claim("better than top-2 with top-p routing, put on after training, at the same load",
       paper="not verified (top-p is not compared)")  # fmt: skip
def beats_top_p(results: Results, config: Config) -> Margin:
    loads = [show(results.of(arm, "load"), 3) for arm in ("adamoe", "top_p")]
    return compared(results, "top_p", f"; load {loads[0]} against {loads[1]}")


@claim("gates over true picks beat gates over all picks (distance to the line: their loads differ)",
       paper="accuracy 81.27 at load 1.54 against 80.19 at 1.50 (SIQA)")  # fmt: skip
def true_norm(results: Results, config: Config) -> Margin:
    gain = under_line(results, "adamoe") - under_line(results, "all_picks")
    loads = show(results.of("all_picks", "load"), 3)
    return Margin(gain, f"{show(gain)} nats/byte further under it; load over all picks {loads}")


@claim("copied null rows beat random null rows")
def copy_init(results: Results, config: Config) -> Margin:
    return compared(results, "random_nulls")


@claim("averaging the nulls in the balance loss beats balancing each null",
       paper="accuracy 67.51 against 56.68 (RTE), 71.40 against 69.80 (OBQA)")  # fmt: skip
def null_loss(results: Results, config: Config) -> Margin:
    return compared(results, "l_bal")


@check("null experts cost nothing: rows processed = true picks")
def null_free(results: Results, config: Config) -> Check:
    if "rows" not in results["adamoe"][0]:
        raise Missing("a run in one process")
    rows, picks = results.of("adamoe", "rows"), results.of("adamoe", "true_picks")
    return Check(bool((rows == picks).all()), f"{rows.sum():,.0f} rows, {picks.sum():,.0f} picks")


@check("fewer experts are fewer FLOPs")
def flops(results: Results, config: Config) -> Check:
    experts, whole = saved(results, "expert_flops"), saved(results, "flops")
    text = f"{show(experts, 1)} % less expert work than {rival(results)}, {show(whole, 1)} % of all"
    text += " FLOPs saved (the paper: 15.21 %, Mixtral, mean of six)"
    return Check(bool((experts > 0).all()), text)


@check("routing does not look at later tokens")
def causal(results: Results, config: Config) -> Check:
    if "leak" not in results["adamoe"][0]:
        raise Missing("the small scale")
    leak = results.of("adamoe", "leak").max()
    return Check(leak < 1e-9, f"logits move by at most {leak:.0e} when later text changes")


# --------------------------------------------------------------------------------------------------
# Tables and pictures
# --------------------------------------------------------------------------------------------------

PAPER = {  # Table 1, Mixtral: accuracy of the original, fine-tuned with top-2, of AdaMoE
    "winogrande": "55.96, 80.43, 81.93",
    "hellaswag": "53.62, 84.10, 85.50",
    "piqa": "68.06, 90.48, 90.32",
    "siqa": "64.59, 76.36, 76.97",
    "obqa": "65.40, 89.00, 88.20",
    "arc-c": "83.73, 87.46, 89.15",
}
COLUMNS = {  # title: (key, unit, digits)
    "nats/byte": ("loss", 1, 4),
    "accuracy %": ("accuracy", 1, 2),
    "load": ("load", 1, 3),
    "experts kFLOP": ("expert_flops", 1e-3, 1),
    "all kFLOP": ("flops", 1e-3, 1),
    "forward µs": ("seconds_forward", 1e6, 1),
    "step µs": ("seconds_step", 1e6, 1),
    "peak GB": ("peak_bytes", 1e-9, 2),
}


def print_tables(results: Results, config: Config, run: Run) -> None:
    columns = {}
    for title, (key, unit, digits) in COLUMNS.items():
        if any(key in found[0] for found in results.values()):
            columns[title] = (key, unit, digits)
    if {"top1", "top2"} <= results.keys():
        columns["under the line"] = None
    rows = []
    for arm, found in results.items():
        row = [arm]
        for column in columns.values():
            if column is None:
                row.append(show(under_line(results, arm)))
            elif column[0] in found[0]:
                key, unit, digits = column
                row.append(show(unit * results.of(arm, key), digits))
            else:
                row.append("")
        rows.append(row)
    title = f"{len(run.seeds)} seed(s); load = true experts a token; FLOPs and time a token"
    if run.scale == "full" and config.task in PAPER:
        title += f"\nthe paper, Mixtral-8x7B, {config.task}: {PAPER[config.task]} %"
    run.table(title, ["arm", *columns], rows)
    if "adamoe" not in results:
        return
    shares = 100 * np.trim_zeros(results.of("adamoe", "histogram").mean(axis=0), "b")
    cells = [f"{share:.1f} %" for share in shares]
    run.table("AdaMoE: true experts a token", [*range(len(shares))], [cells])
    by_layer = results.of("adamoe", "load_by_layer").T  # [layers, seeds]
    common.say(f"\nload by layer: {', '.join(show(loads, 3) for loads in by_layer)}")
    sample = results["adamoe"][0]["sample"]
    common.say("\nAdaMoE, first seed: true experts of each token, summed over layers")
    common.say(with_counts(sample["words"][:400], sample["counts"]))


def with_counts(words: Sequence[str], counts: Sequence[int], width: int = 96) -> str:
    """A text, and under every token its number."""
    lines = []
    text = ""
    numbers = ""
    for word, count in zip(words, counts):
        shown = word if word.isprintable() else "·"
        size = max(len(shown), len(str(count)))
        if len(text) + size > width:
            lines += [text, numbers]
            text = numbers = ""
        text += shown.ljust(size)
        numbers += str(count).ljust(size)
    return "\n".join([*lines, text, numbers])


def draw(results: Results, config: Config, run: Run) -> None:
    adamoe = results["adamoe"]
    arms = [arm for arm in DEFAULT[run.scale][1:] if arm in results]
    is_text = "loss" in adamoe[0]
    measure, unit = ("loss", "nats/byte") if is_text else ("accuracy", "right answers, %")

    def trade_off(ax) -> None:
        """With the line through top-1 and top-2, and intervals from three seeds on."""
        for arm in arms:
            x, y = results.of(arm, "load"), results.of(arm, measure)
            half = [common.half_width(values) if len(x) > 2 else 0.0 for values in (y, x)]
            color = common.color_of(arm, arms)
            ax.errorbar(x.mean(), y.mean(), *half, fmt="o", color=color, label=arm, capsize=3)
        if {"top1", "top2"} <= results.keys():
            ends = [results.of(arm, measure).mean() for arm in ("top1", "top2")]
            ax.plot([1, 2], ends, color="0.6", zorder=0, label="line from top1 to top2")
        ax.set(xlabel="true experts a token", ylabel=unit, title="quality against load")

    def counts(ax) -> None:
        shares = 100 * np.trim_zeros(results.of("adamoe", "histogram").mean(axis=0), "b")
        ax.bar(range(len(shares)), shares, color=common.color_of("adamoe", arms))
        ax.set_xticks(range(len(shares)))
        ax.set(xlabel="true experts", ylabel="% of tokens", title="AdaMoE: experts a token gets")

    def text(ax) -> None:
        painted_text(ax, adamoe[0]["sample"])
        ax.set(title="true experts, summed over layers", xticks=[], yticks=[])

    run.plot([trade_off, counts, text])


def painted_text(ax, sample: dict, rows: int = 14, columns: int = 48) -> None:
    """Characters of a text on a grid, each on the colour of its token's count, with a scale."""
    grid = np.full((rows, columns), np.nan)
    middle = (min(sample["counts"]) + max(sample["counts"])) / 2
    style = {"family": "monospace", "fontsize": 7, "ha": "center", "va": "center"}
    row, column = 0, 0
    for word, count in zip(sample["words"], sample["counts"]):
        for char in word:
            if char == "\n" or column == columns:
                row, column = row + 1, 0
            if row < rows and char != "\n":
                grid[row, column] = count
                color = "black" if count > middle else "white"
                ax.text(column, row, char, color=color, **style)
                column += 1
    image = ax.imshow(grid, aspect="auto", cmap="viridis")
    ax.figure.colorbar(image, ax=ax)


# --------------------------------------------------------------------------------------------------
# main
# --------------------------------------------------------------------------------------------------


def plan_small(config: Config, run: Run, arms: int) -> None:
    """Refuse what cannot work, say what the run is about and what it will take."""
    python, downstream = text_data.load_domain("python"), manual(config)
    shortest, needed = min(len(downstream.train), len(downstream.val)), config.context + 1
    if shortest < needed:
        text = f"{shortest} bytes to train or validate on, {needed} needed of each"
        raise ValueError(f"text {downstream.name!r} is too short: {text}")
    if config.num_experts < OWN_TOP_K:
        raise ValueError(f"num_experts is {config.num_experts}; the top-2 model needs {OWN_TOP_K}")
    num_null, top_k = config.nulls_and_picks(config.num_experts, OWN_TOP_K)
    load = predicted_load(config.num_experts, num_null, top_k)
    run.data = {corpus.name: corpus.digest for corpus in (python, downstream)}
    text = "text " + ", ".join(f"{name} {digest}" for name, digest in run.data.items())
    text += f", {num_null} nulls, {top_k} picks: load {load:.2f}"
    model = start_small(Job(run, "original", run.seed))
    task = ByteText(downstream, config, run.device, stream=0)
    steps = config.pretrain_steps + 1.3 * arms * config.steps  # evaluation takes the rest

    def step() -> None:
        task.loss(model, task.batch(0)).backward()

    run.plan(text, model, step, len(run.seeds) * steps)
    for corpus in (python, downstream):
        if corpus.note:
            common.say(corpus.note)


def plan_full(config: Config, run: Run) -> Config:
    """Settle the model, say what it will take, and refuse what does not fit."""
    _, processes = common.processes()
    memory = pretrained.device_memory(run.device) * (processes if run.device == "cuda" else 1)
    if run.compile:
        raise ValueError("--compile belongs to the small scale: here shapes change with each batch")
    config = replace(config, model=pretrained.choose_model(config.model, memory))
    is_random = config.model == "random"
    for name in SHAPE:
        if not is_random and getattr(config, name) != getattr(FULL, name):
            raise ValueError(
                f"{common.flag(name)} belongs to --model random; others have their own"
            )
    needed = estimate(config, run, memory)
    if run.dry_run:
        raise common.Planned
    if needed > memory:
        remedy = "a lower --batch-size or --context, a smaller --model, --dtype bf16, more GPUs"
        if is_random:
            remedy = f"a lower --num-layers (about {int(config.num_layers * memory / needed)})"
        found = f"{needed / 1e9:.0f} GB needed, {memory / 1e9:.0f} GB there"
        raise ValueError(f"{found}; what helps: {remedy}")
    if processes > 1 or run.device == "cpu":
        at_a_time = 1 if processes > 1 else int(memory / needed)
        run.workers = min(run.workers, at_a_time)
    run.data = {"random": "tokens"}
    if not is_random:
        config = replace(config, model=str(pretrained.locate(config.model, run.data_dir)))
        train, dev = task_data.task_files(config.task, run.data_dir)
        files = {"train": train, "dev": dev, "model": Path(config.model) / "config.json"}
        run.data = {name: common.sha256(path)[:12] for name, path in files.items()}
    return config


def estimate(config: Config, run: Run, memory: int) -> float:
    """Print what --full will take, from the shapes of the model alone; the bytes needed."""
    shape = model_shape(config, run)
    num_experts, own_top_k = experts_of(config, run)
    num_null, top_k = config.nulls_and_picks(num_experts, own_top_k)
    load = predicted_load(num_experts, num_null, top_k)

    def patch(model: nn.Module) -> None:
        add_null_experts(model, num_null, top_k, rank=config.lora_rank)

    count = pretrained.count_parts(shape, run.dtype, patch)
    active = count.outside_experts + count.in_experts * own_top_k / num_experts
    share = 1 - count.outside_experts / active
    tokens = config.batch_size * config.context // config.accumulate
    needed = {
        "weights": count.parameters * run.dtype.itemsize,
        "LoRA and Adam": 16 * count.trained,
        "activations": pretrained.activation_bytes(shape, load, tokens),
    }
    is_here = config.model == "random" or pretrained.is_here(config.model, run.data_dir)
    download = "none" if is_here else f"{2 * count.parameters / 1e9:.2f} GB in 16 bits"
    # Forward twice, for activation checkpointing, and a backward without frozen weights' gradients.
    training = 6 * active * config.steps * config.batch_size * config.context
    parts = [f"{name} {size / 1e9:.2f} GB" for name, size in needed.items()]
    rows = [
        ["parameters", f"{count.parameters:,}"],
        ["of which a token meets", f"{active:,.0f}, {100 * share:.1f} % of them in experts"],
        ["predicted load", f"{load:.3f} of {own_top_k} experts ({num_null} nulls, {top_k} picks)"],
        ["FLOPs saved, predicted", f"{100 * flops_saved(load, own_top_k, share):.1f} %"],
        ["training FLOPs an arm, at most", f"{training:.1e}"],
        ["weights to download", download],
        ["memory needed, about", " + ".join(parts)],
        ["memory there", f"{memory / 1e9:.2f} GB ({run.device})"],
    ]
    run.table(f"what {config.model} will take", ["", "estimate"], rows)
    return sum(needed.values())


def main(config: Config, run: Run) -> Results:
    default, more = DEFAULT[run.scale], MORE[run.scale]
    arms = run.choose([*default, *more], default=default, more=more)
    for arm in arms:
        check_arm(arm, config, run)
    controls = [arm for arm in arms if arm in CONTROLS]
    for control in controls:  # it needs their weights, and AdaMoE's load
        arms += [CONTROLS[control], "adamoe"]
    arms = list(dict.fromkeys(arms))
    trained = [arm for arm in arms if arm not in ("original", *controls)]
    if run.scale == "small":
        plan_small(config, run, len(trained))
    else:
        run.config = config = plan_full(config, run)

    results = Results()
    if run.scale == "small" or "original" in arms:  # small ones begin with its weights
        results |= run.train_arms(train_arm, ["original"])
    results |= run.train_arms(train_arm, trained)
    results |= run.train_arms(control_arm, controls)
    print_tables(results, config, run)
    if "adamoe" in results:
        draw(results, config, run)
    return results


if __name__ == "__main__":
    common.run(main, SMALL, FULL, data_parallel=True)
