"""Whom benchmark_kernels.py times, and on what: shapes, their FLOPs and bytes, inputs, contenders.

All compute the same layer, silu(gate) * up between two projections, on the same numbers.
"""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import kernels  # noqa: E402

# -------------------------------------------------------------------------------------------------
# Shapes and inputs
# -------------------------------------------------------------------------------------------------


class Shape(NamedTuple):
    tokens: int
    top_k: int
    num_experts: int
    d_model: int
    d_ff: int
    train: bool = True  # False: forward alone, without gradients, as in decoding

    def __str__(self) -> str:
        picks = f"{self.top_k} of {self.num_experts} experts"
        return f"{self.tokens:,} tokens, {picks}, {self.d_model} x {self.d_ff}"


# The kernels have three columns of tiles: from 128 rows an expert, from 48, and below.
GPU_SHAPES = {
    "qwen3-8k": Shape(8192, 8, 128, 2048, 768),
    "qwen3-1k": Shape(1024, 8, 128, 2048, 768),  # 64 rows an expert
    "qwen3-decode": Shape(64, 8, 128, 2048, 768, train=False),  # 4
    "mixtral-8k": Shape(8192, 2, 8, 4096, 14336),
    "mixtral-256": Shape(256, 2, 8, 4096, 14336),  # 64
    "mixtral-decode": Shape(16, 2, 8, 4096, 14336, train=False),  # 4
    "olmoe-8k": Shape(8192, 8, 64, 2048, 1024),
    "deepseek-4k": Shape(4096, 8, 256, 7168, 2048),  # 128
    "deepseek-decode": Shape(128, 8, 256, 7168, 2048, train=False),  # 4
    "teaching": Shape(8192, 2, 8, 512, 2048),
    "tiny": Shape(4096, 2, 16, 128, 256),
    "qwen3-32k": Shape(32768, 8, 128, 2048, 768),
    "olmoe-32k": Shape(32768, 8, 64, 2048, 1024),
    "deepseek-16k": Shape(16384, 8, 256, 7168, 2048),
}
CPU_SHAPES = {
    "512-8of64-64x64": Shape(512, 8, 64, 64, 64),
    "512-2of64-256x256": Shape(512, 2, 64, 256, 256),
    "512-2of8-1024x512": Shape(512, 2, 8, 1024, 512),
    "2k-2of8-64x128": Shape(2048, 2, 8, 64, 128),
    "2k-2of8-256x512": Shape(2048, 2, 8, 256, 512),
    "2k-8of64-64x64": Shape(2048, 8, 64, 64, 64),
    "2k-8of64-256x128": Shape(2048, 8, 64, 256, 128),
    "8k-2of8-64x128": Shape(8192, 2, 8, 64, 128),
    "8k-8of64-64x64": Shape(8192, 8, 64, 64, 64),
    "decode-1-8of64-256x256": Shape(1, 8, 64, 256, 256, train=False),
    "decode-16-8of64-64x64": Shape(16, 8, 64, 64, 64, train=False),
}
DTYPE = {"cuda": torch.bfloat16, "cpu": torch.float32}


def launches(shape: Shape, itemsize: int) -> list[tuple[int, int]]:
    """(FLOPs, bytes) of every launch, every tensor moved once."""
    rows = shape.tokens * shape.top_k
    x = shape.tokens * shape.d_model  # also out, d_out and dx
    y = rows * shape.d_model  # also the rows of dx
    a = rows * shape.d_ff  # act(gate) * up, also times the gates
    z = 2 * a  # gate | up, also its gradient
    matrix = shape.d_ff * shape.d_model
    w2 = min(shape.num_experts, rows) * matrix  # an expert without a row is not read
    w1 = 2 * w2
    dw2 = shape.num_experts * matrix
    dw1 = 2 * dw2
    down_flops = 2 * rows * matrix
    up_flops = 2 * down_flops
    saved_z = z if shape.train else 0
    up = (up_flops, x + w1 + saved_z + a)
    down = (down_flops, a + w2 + y)
    combine = (0, y + x)
    done = [up, down, combine]
    if shape.train:
        done += [(down_flops, x + w2 + z + z + a)]  # d_out and z in, dz and gated a out
        done += [(up_flops, z + w1 + y), combine]  # dx
        done += [(down_flops, a + x + dw2), (up_flops, x + z + dw1)]
    return [(flops, itemsize * elements) for flops, elements in done]


def peak_bytes(shape: Shape, itemsize: int) -> int:
    """Bytes beyond the inputs: output and rows; to train also z, dz, gated a and all gradients."""
    rows = shape.tokens * shape.top_k
    x = shape.tokens * shape.d_model
    if not shape.train:
        return itemsize * (x + rows * (shape.d_ff + shape.d_model))
    weights = 3 * shape.num_experts * shape.d_model * shape.d_ff
    return itemsize * (2 * x + rows * (5 * shape.d_ff + shape.d_model) + weights)


class Problem(NamedTuple):
    x: Tensor  # [tokens, d_model]
    expert_index: Tensor  # [tokens, top_k]
    gates: Tensor  # [tokens, top_k], fp32
    w1: Tensor  # [num_experts, d_model, 2 * d_ff], columns gate | up
    w2: Tensor  # [num_experts, d_ff, d_model]
    d_out: Tensor  # [tokens, d_model], the gradient of the output

    def leaves(self) -> list[Tensor]:
        return [self.x, self.gates, self.w1, self.w2]


def make_problem(shape: Shape, device: str) -> Problem:
    """Random numbers, never zeros: those draw less power, and time too well."""
    new = partial(torch.randn, device=device, dtype=DTYPE[device])
    x = new(shape.tokens, shape.d_model)
    d_out = new(shape.tokens, shape.d_model)
    gates = torch.rand(shape.tokens, shape.top_k, device=device).softmax(dim=-1)
    # On a GPU stored as nn.Linear does, [out, in]: peers take nothing else, ours takes either.
    w1 = new(shape.num_experts, 2 * shape.d_ff, shape.d_model).mul_(shape.d_model**-0.5).mT
    w2 = new(shape.num_experts, shape.d_model, shape.d_ff).mul_(shape.d_ff**-0.5).mT
    if device == "cpu":  # there all but transformers like [in, out] more
        w1 = w1.contiguous()
        w2 = w2.contiguous()
    problem = Problem(x, route(shape, device), gates, w1, w2, d_out)
    for leaf in problem.leaves():
        leaf.requires_grad_(shape.train)
    return problem


def make_dense_problem(shape: Shape, device: str) -> Problem:
    """A layer of equal FLOPs: a token for every assignment, and weights that are matrices."""
    rows = shape.tokens * shape.top_k
    p = make_problem(shape._replace(tokens=rows, top_k=1, num_experts=1), device)
    w1 = p.w1.detach().squeeze(0).requires_grad_(shape.train)
    w2 = p.w2.detach().squeeze(0).requires_grad_(shape.train)
    return p._replace(w1=w1, w2=w2)


def route(shape: Shape, device: str, routing: str = "balanced") -> Tensor:
    """expert_index [tokens, top_k], random. skewed: every second token goes to expert 0."""
    score = torch.rand(shape.tokens, shape.num_experts, device=device)
    if routing == "skewed":
        score[::2, 0] += 1
    if routing == "half empty":
        score[:, shape.num_experts // 2 :] -= 1
    expert_index = score.topk(shape.top_k).indices
    if routing == "half null":
        null = torch.rand(shape.tokens, shape.top_k, device=device) < 0.5
        expert_index = expert_index.masked_fill(null, -1)
    return expert_index


def stored_out_in(problem: Problem) -> Problem:
    """The same numbers, with weights that lie in memory as [out, in]."""
    stored = []
    for w in (problem.w1, problem.w2):
        copy = w.detach().mT.contiguous().mT
        stored.append(copy.requires_grad_(w.requires_grad))
    return problem._replace(w1=stored[0], w2=stored[1])


# -------------------------------------------------------------------------------------------------
# Contenders: problem -> the layer, a function without arguments; what is prepared once is not timed
# -------------------------------------------------------------------------------------------------


def activate(z: Tensor) -> Tensor:
    gate, up = z.chunk(2, dim=-1)
    return F.silu(gate) * up


def ours(p: Problem) -> Callable:
    return partial(kernels.moe_mlp, *p[:5], act="silu", glu=True)


def dense(p: Problem) -> Callable:
    """One expert, nothing to sort."""
    return lambda: activate(p.x @ p.w1) @ p.w2


def where_loop(p: Problem) -> Callable:
    """What one would write first: every expert looks for its tokens."""
    return partial(loop_over_experts, *p[:5])


def loop_over_experts(
    x: Tensor, expert_index: Tensor, gates: Tensor, w1: Tensor, w2: Tensor,
    b1: Tensor | None = None, b2: Tensor | None = None, glu: bool = True,
) -> Tensor:  # fmt: skip
    """With float64 inputs also the reference for all others."""
    out = torch.zeros_like(x)
    for expert in range(len(w1)):
        token, pick = torch.where(expert_index == expert)
        z = x[token] @ w1[expert]
        if b1 is not None:
            z = z + b1[expert]
        y = (activate(z) if glu else F.silu(z)) @ w2[expert]
        if b2 is not None:
            y = y + b2[expert]
        out = out.index_add(0, token, (y * gates[token, pick, None]).to(out.dtype))
    return out


def torch_grouped_mm(p: Problem) -> Callable:
    """Sort and copy the rows, torch's grouped product twice, sum in fp32."""
    multiply = getattr(F, "grouped_mm", None) or torch._grouped_mm
    top_k = p.gates.shape[1]

    def forward() -> Tensor:
        dispatch = kernels.make_dispatch(p.expert_index, len(p.w1))
        slot, ends = dispatch.slot.long(), dispatch.offsets[1:]
        token = slot // top_k
        rows = p.x.index_select(0, token)
        y = multiply(activate(multiply(rows, p.w1, offs=ends)), p.w2, offs=ends)
        y = y.float() * p.gates.reshape(-1, 1).index_select(0, slot)
        return y.new_zeros(p.x.shape).index_add(0, token, y).to(p.x.dtype)

    return forward


def transformers_experts(implementation: str, p: Problem) -> Callable:
    """The experts of transformers' Mixtral, in a formulation that all its mixtures share."""
    from transformers.models.mixtral.modeling_mixtral import MixtralConfig, MixtralExperts

    num_experts, d_ff, d_model = p.w2.shape
    config = MixtralConfig(
        hidden_size=d_model, intermediate_size=d_ff, num_local_experts=num_experts
    )
    config._experts_implementation = implementation
    with torch.device("meta"):  # no memory for weights that are replaced at once
        experts = MixtralExperts(config)
    del experts.gate_up_proj, experts.down_proj
    experts.gate_up_proj = p.w1.mT
    experts.down_proj = p.w2.mT
    return partial(experts, p.x, p.expert_index, p.gates)


def scatter_moe(p: Problem) -> Callable:
    from scattermoe.parallel_experts import flatten_sort_count, parallel_linear

    def forward() -> Tensor:
        order = flatten_sort_count(p.expert_index, num_experts=len(p.w1))
        z = parallel_linear(p.x, p.w1, p.gates.shape[1], *order, grouped_out=True)
        gates = p.gates.to(p.x.dtype)
        return parallel_linear(activate(z), p.w2, 1, *order, gates=gates, grouped_in=True)

    return forward


def liger(p: Problem) -> Callable:
    from liger_kernel.ops.fused_moe import LigerFusedMoEFunction

    def forward() -> Tensor:
        index, gates = p.expert_index.int(), p.gates.to(p.x.dtype)
        return LigerFusedMoEFunction.apply(p.x, p.w1.mT, p.w2.mT, index, gates)

    return forward


CONTENDERS = {
    "ours": ours,
    "F.grouped_mm": torch_grouped_mm,
    "ScatterMoE": scatter_moe,
    "Liger": liger,
    "transformers grouped": partial(transformers_experts, "grouped_mm"),
    "transformers eager": partial(transformers_experts, "eager"),
    "where loop": where_loop,
    "dense": dense,
}
GPU_ONLY = ("ScatterMoE", "Liger")
STORED_OUT_IN = ("transformers grouped", "transformers eager")
# Both index w[expert], and autograd makes a gradient of the size of ALL experts for each of them.
LOOPS = ("transformers eager", "where loop")
LOOP_BYTES = {"cuda": 1e12, "cpu": 3e10}  # what such gradients may move in a step


def loop_bytes(shape: Shape, device: str) -> int:
    """An expert's gradient is written as zeros, then added to a sum: two reads and a write."""
    weights = 3 * shape.num_experts * shape.d_model * shape.d_ff * DTYPE[device].itemsize
    return 4 * shape.num_experts * weights if shape.train else 0


def choose(shape: Shape, names: list[str], device: str) -> list[str]:
    """Without those that would take longer on this shape than all others together; says so."""
    moved, allowed = loop_bytes(shape, device), LOOP_BYTES[device]
    if moved <= allowed:
        return names
    for name in set(names) & set(LOOPS):
        print(
            f"{name}: left out, its gradients would move {moved:.1e} bytes, {allowed:.0e} allowed"
        )
    return [name for name in names if name not in LOOPS]
