"""The layers that people paste, in the conditions they meet elsewhere: autocast, torch.compile, one
row, no rows, strided input, float64, copies.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import Tensor, nn

import adamoe
import btm
import common
import dual_head_kd
import home
import kernels
import mcsmoe
import mowst
import smoe_dropout
from data import mixtures
from mowst import Adjacency

D, CLASSES = 8, 3


class MoEMLP(nn.Module):
    """kernels.moe_mlp with weights of its own; every fourth pick is null."""

    def __init__(self, act="gelu", glu=False, bias=False):
        super().__init__()
        width = 12 * (1 + glu)
        self.w1 = nn.Parameter(torch.randn(4, D, width) / 3)
        self.w2 = nn.Parameter(torch.randn(4, 12, D) / 3)
        self.b1, self.b2 = (nn.Parameter(torch.randn(4, n)) if bias else None for n in (width, D))
        self.options = {"act": act, "glu": glu}

    def forward(self, x: Tensor) -> Tensor:
        picks = torch.arange(2 * len(x), device=x.device).view(-1, 2)
        index, gates = torch.where(picks % 4 == 3, -1, picks % 3), 0.1 + (picks % 5).to(x.dtype) / 5
        return kernels.moe_mlp(x, index, gates, self.w1, self.w2, self.b1, self.b2, **self.options)


def mixture() -> nn.Module:
    """A trained mixture as transformers lays it out."""
    block = nn.Module()
    block.gate, block.experts = nn.Linear(D, 4, bias=False), nn.Module()
    block.gate.top_k, block.experts.act_fn = 2, nn.SiLU()
    block.experts.gate_up_proj = nn.Parameter(torch.randn(4, 24, D) / 3)
    block.experts.down_proj = nn.Parameter(torch.randn(4, D, 12) / 3)
    return block


def null_experts(rank: int = 0) -> adamoe.AdaMoE:
    layer = adamoe.AdaMoE.around(mixtures.read_block(mixture()), 4, 3, rank)
    with torch.no_grad():  # null rows start as copies of true ones: a tie may fall either way
        layer.router.weight[4:] += 0.3 * torch.randn_like(layer.router.weight[4:])
    return layer


def ring(num_nodes: int, dtype: torch.dtype) -> Adjacency:
    edges = torch.stack([torch.arange(num_nodes), torch.arange(num_nodes).roll(1)])
    adjacency = Adjacency(torch.cat([edges, edges.flip(0)], dim=1), num_nodes, dtype)
    adjacency.with_loops, adjacency.gcn, adjacency.mean, adjacency.sum  # noqa: B018  built here, not while traced
    return adjacency


RINGS = {(n, dtype): ring(n, dtype) for n in (0, 1, 6) for dtype in (torch.float32, torch.float64)}


class OnGraph(nn.Module):
    """A model of nodes, which stand in a ring."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor):
        return self.model(x, RINGS[len(x), x.dtype])


class Student(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.fc = nn.Linear(D, 12), nn.Linear(12, CLASSES)

    def features(self, x: Tensor) -> Tensor:
        return self.body(x).relu()


def sparse_moe(**options) -> mcsmoe.SparseMoE:
    up, down = torch.randn(3, D, 12) / 3, torch.randn(3, 12, D) / 3
    experts = mcsmoe.DenseExperts(mcsmoe.Expert(up, down))
    rank = options.pop("rank", 0)
    experts = mcsmoe.LowRankExperts(experts, rank) if rank else experts
    if options.pop("compact", False):
        for linear in (experts.up, experts.down):
            linear.prune(torch.arange(linear.score.numel()).view_as(linear.score) % 5 < 2)
            linear.compact()
    return mcsmoe.SparseMoE(torch.randn(5, D), experts, torch.tensor([0, 1, 2, 1, 0]), **options)


def low_rank_linear(compact: bool = False) -> mcsmoe.LowRankSparseLinear:
    linear = mcsmoe.LowRankSparseLinear(torch.randn(D, 6) / 3, rank=2, bias=torch.randn(6))
    if compact:
        linear.prune(torch.tensor([[True, False] * 3]))
        linear.compact()
    return linear


def language_model(make_ffn: Callable, **options) -> common.TransformerLM:
    return common.TransformerLM(11, 2, D, 2, 6, make_ffn, **options)


GROUPS = {"watch": ["finish", "long"], "inter": ["like"]}
MASK = torch.tensor([[1, 0, 1, 0], [0, 1, 1, 1], [1, 1, 1, 1]], dtype=torch.bool)
OWN = torch.tensor([[1, 0, 0, 0], [0, 1, 0, 1], [0, 0, 0, 0]], dtype=torch.bool)


def mlp_and_gnn(backbone: str) -> tuple[nn.Module, nn.Module]:
    return mowst.MLP(D, 12, CLASSES, 2, 0.0), mowst.GNN(backbone, D, 12, CLASSES, 2, 0.0)


def masked_experts(widths: tuple[int, ...], **options) -> home.MaskedExpertLayer:
    return home.MaskedExpertLayer(MASK, OWN, d_in=D, widths=widths, **options)


def mowst_layer() -> nn.Module:
    return OnGraph(mowst.Mowst(*mlp_and_gnn("gcn"), mowst.Confidence("monotone")))


def learned_dropout() -> smoe_dropout.SMoEDropout:
    options = {"router": "learned", "balance": 0.1, "dropout": 0.1}
    return smoe_dropout.SMoEDropout(D, 12, 4, k=2, **options)


def roped(layer: int) -> nn.Module:
    return adamoe.AdaMoE(D, 12, 4, 4, 3)


@dataclass
class Layer:
    make: Callable[[], nn.Module]
    shape: tuple[int, ...] = (4, 6, D)  # of the input; `rows` is the dimension that may be 1 or 0
    rows: int = 0
    tokens: bool = False  # the input is token numbers
    norm: bool = False  # batch normalisation: a batch in training has two rows or more
    alone: bool = True  # in evaluation mode a row's output does not depend on the others


LAYERS = {
    "AdaMoE": Layer(lambda: adamoe.AdaMoE(D, 12, 4, 4, 3)),
    "AdaMoE, glu": Layer(
        lambda: adamoe.AdaMoE(D, 12, 4, 2, 3, act="silu", glu=True, normalize="none")
    ),
    "AdaMoE around a mixture": Layer(null_experts),
    "AdaMoE around a mixture, LoRA": Layer(lambda: null_experts(rank=2)),
    "SMoEDropout": Layer(lambda: smoe_dropout.SMoEDropout(D, 12, 4, k=2)),
    "SMoEDropout, masked": Layer(lambda: smoe_dropout.SMoEDropout(D, 12, 4, k=2, backend="masked")),
    "SMoEDropout, learned": Layer(learned_dropout),
    "DenseFFN": Layer(lambda: smoe_dropout.DenseFFN(D, 12, 4, dropout=0.1, expert_drop=0.5)),
    "SparseMoE": Layer(lambda: sparse_moe(top_k=2, normalize=True)),
    "SparseMoE, Switch": Layer(lambda: sparse_moe(balance=0.1, capacity=3)),
    "SparseMoE, low rank": Layer(lambda: sparse_moe(rank=2)),
    "SparseMoE, compact": Layer(lambda: sparse_moe(rank=2, compact=True)),
    "LowRankSparseLinear": Layer(low_rank_linear),
    "LowRankSparseLinear, compact": Layer(lambda: low_rank_linear(compact=True)),
    "HoME": Layer(lambda: home.HoME(D, GROUPS), (6, D), norm=True),
    "MaskedExpertLayer": Layer(
        lambda: masked_experts((12, 5), norm=False, rank=2), (1, 6, D), rows=1
    ),
    "MaskedExpertLayer, norm": Layer(
        lambda: masked_experts((5,), constant_self=True), (1, 6, D), rows=1, norm=True
    ),
    "FeatureGate": Layer(lambda: home.FeatureGate(D, 2, 2), (6, D)),
    "Mowst": Layer(mowst_layer, (6, D), norm=True, alone=False),
    "Confidence, features": Layer(lambda: mowst.MonotoneGate(4), (6, 2)),
    "DualHead": Layer(lambda: dual_head_kd.DualHead(Student(), CLASSES), (6, D)),
    "DualHead, mlp": Layer(
        lambda: dual_head_kd.DualHead(Student(), CLASSES, "mlp"), (6, D), norm=True
    ),
    "ResNet": Layer(lambda: dual_head_kd.ResNet(8, (4, 4, 4, 4), CLASSES), (2, 3, 8, 8), norm=True),
    "moe_mlp": Layer(MoEMLP, (6, D)),
    "moe_mlp, glu": Layer(lambda: MoEMLP("silu", glu=True, bias=True), (6, D)),
    "TransformerLM": Layer(
        lambda: language_model(lambda i: btm.MLP(D, 0.1, 2), conv=3), (4, 6), tokens=True
    ),
    "TransformerLM, rope": Layer(
        lambda: language_model(roped, positions="rope", causal=False), (4, 6), tokens=True
    ),
}  # fmt: skip
for kind in ("gcn", "sage", "gin", "gat"):
    make_gnn = partial(lambda kind: OnGraph(mlp_and_gnn(kind)[1]), kind)
    LAYERS[f"GNN, {kind}"] = Layer(make_gnn, (6, D), norm=True, alone=False)


def make(name: str) -> nn.Module:
    """The layer with no weight at zero: some start with B = 0, which would hide half of what they
    do.
    """
    torch.manual_seed(0)
    layer = LAYERS[name].make()
    for parameter in layer.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.3)
    return layer


def inputs(name: str, rows: int | None = None) -> Tensor:
    layer, generator = LAYERS[name], torch.Generator().manual_seed(1)
    shape = list(layer.shape)
    shape[layer.rows] = shape[layer.rows] if rows is None else rows
    if layer.tokens:
        return torch.randint(11, shape, generator=generator)
    return torch.randn(shape, generator=generator)


def tensors(y: object) -> list[Tensor]:
    return [y] if isinstance(y, Tensor) else list(y)


def loss_of(module: nn.Module, y: object) -> Tensor:
    """The outputs squared, plus every auxiliary loss that a layer left."""
    losses = [z.double().square().sum() for z in tensors(y)]
    left = [getattr(m, "aux_loss", None) for m in module.modules()]
    left = [loss for loss in left if isinstance(loss, Tensor)]
    return sum(losses + [loss.double() for loss in left])


def step(module: nn.Module, x: Tensor, seed: int = 2) -> tuple[object, Tensor, dict[str, Tensor]]:
    """Forward and backward: (outputs, gradient of x, gradients of the parameters)."""
    module.zero_grad()
    x = x.detach().requires_grad_() if x.is_floating_point() else x
    torch.manual_seed(seed)  # of dropout
    y = module(x)
    loss = loss_of(module, y)
    assert torch.isfinite(loss)  # the auxiliary one included
    loss.backward()
    return y, x.grad, {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


def assert_finite(found: tuple[object, Tensor, dict[str, Tensor]]) -> None:
    y, dx, gradients = found
    for tensor in [*tensors(y), *([] if dx is None else [dx]), *gradients.values()]:
        assert torch.isfinite(tensor).all()


def assert_near(found: object, expected: object, **tolerance) -> None:
    for a, b in zip(tensors(found), tensors(expected), strict=True):
        assert a.shape == b.shape
        torch.testing.assert_close(a.to(b.dtype), b, **tolerance)


def same_step(found, expected, **tolerance) -> None:
    assert_near(found[0], expected[0], **tolerance)
    assert found[2].keys() == expected[2].keys()
    pairs = [(found[1], expected[1])] if expected[1] is not None else []
    for a, b in pairs + [(found[2][name], expected[2][name]) for name in expected[2]]:
        assert_near(a, b, **tolerance)


@pytest.mark.parametrize("name", LAYERS)
def test_under_autocast_bf16_rounds_and_nothing_else(name):
    """Routing stays in full precision: the same picks, so outputs differ by the rounding of a few
    sums to 2^-8.
    """
    module, x = make(name).eval(), inputs(name)
    for training in (False, True):
        expected, aux_loss = step(module.train(training), x), getattr(module, "aux_loss", None)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = step(module, x)
        assert_finite(found)
        assert found[2].keys() == expected[2].keys()
        assert all(found[2][key].dtype == expected[2][key].dtype for key in expected[2])
        if isinstance(aux_loss, Tensor):  # made of router logits alone
            assert torch.equal(module.aux_loss, aux_loss)
        if not training:
            assert_near(found[0], expected[0], rtol=0.05, atol=0.05)


# layer: is it one graph? Not where it looks for NaN (on the CPU), reads a number of rows, is sparse
COMPILED = {
    "AdaMoE around a mixture, LoRA": False, "SMoEDropout, learned": False, "SparseMoE": True,
    "LowRankSparseLinear, compact": True, "HoME": True, "MaskedExpertLayer": True, "Mowst": False,
    "DualHead, mlp": True, "moe_mlp, glu": True, "TransformerLM": True,
}  # fmt: skip


@pytest.mark.parametrize("name", COMPILED)
def test_compiled_is_the_same_step(name, monkeypatch):
    """Traced, and run without a compiler: that takes seconds a layer, and what it makes is torch's
    to test.
    """
    module, x = make(name), inputs(name)
    expected = step(copy.deepcopy(module), x)
    torch.compiler.reset()
    # A diagnostic that flushes the caches of the processor at every graph: a third of the time.
    monkeypatch.setattr("torch._dynamo.guards.profile_guard_manager", lambda *_: 0.0, raising=False)
    module.compile(backend="eager", fullgraph=COMPILED[name])
    same_step(step(module, x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", LAYERS)
def test_one_row_is_what_it_is_among_others_and_no_rows_give_none(name):
    """An expert of a data-parallel job, or a domain, may get nothing; its step must not spoil the
    others'.
    """
    layer = LAYERS[name]
    num_rows = layer.shape[layer.rows]
    module, x = make(name).eval(), inputs(name)
    with torch.no_grad():
        whole = tensors(module(x))
    one = x.narrow(layer.rows, 0, 1)
    found = step(module, one)
    assert_finite(found)
    if layer.alone:
        rows = [y.narrow(y.shape.index(num_rows), 0, 1) for y in whole]
        assert_near(found[0], rows, rtol=1e-4, atol=1e-5)
    found = [step(module, inputs(name, rows=0))]
    if not layer.norm:
        module.train()
        assert_finite(step(module, one))
        found.append(step(module, inputs(name, rows=0)))
    for nothing in found:
        assert_finite(nothing)
        for y, y_rows in zip(tensors(nothing[0]), whole):
            assert sorted(y.shape) == sorted(0 if n == num_rows else n for n in y_rows.shape)


@pytest.mark.parametrize("name", LAYERS)
def test_strided_input_is_the_same_as_contiguous(name):
    module, x = make(name), inputs(name)
    strided = x.transpose(0, -1).contiguous().transpose(0, -1)
    assert not strided.is_contiguous() or 1 in x.shape
    apart = torch.empty(*x.shape[:-1], 2 * x.shape[-1], dtype=x.dtype)[..., ::2].copy_(x)
    expected = step(copy.deepcopy(module), x)
    for given in (strided, apart):
        same_step(step(copy.deepcopy(module), given), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", LAYERS)
def test_in_float64_gradients_are_right_to_five_digits(name):
    """Along a random direction, against a central difference, which a single step in fp32 on the
    way would spoil.
    """
    module, x = make(name).eval(), inputs(name)
    expected = step(copy.deepcopy(module), x)
    x = x.double() if x.is_floating_point() else x
    y, _, gradients = found = step(module.double(), x)
    assert all(tensor.dtype == torch.float64 for tensor in [*tensors(y), *gradients.values()])
    same_step(found, expected, rtol=1e-3, atol=1e-4)
    parameters = {key: p for key, p in module.named_parameters() if key in gradients}
    generator, losses = torch.Generator().manual_seed(3), []
    direction = {}
    for key, p in parameters.items():
        direction[key] = torch.randn(p.shape, generator=generator, dtype=p.dtype)
    with torch.no_grad():
        for move in (1e-5, -2e-5):
            for key, p in parameters.items():
                p += move * direction[key]
            losses.append(loss_of(module, module(x)))
    slope = sum((gradients[key] * direction[key]).sum() for key in parameters)
    torch.testing.assert_close((losses[0] - losses[1]) / 2e-5, slope, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", LAYERS)
def test_a_copy_and_a_restored_state_compute_the_same(name):
    """deepcopy right after a step, as moving averages of weights do; a state goes into another
    instance.
    """
    module, x = make(name), inputs(name)
    step(module, x)
    copied = copy.deepcopy(module).eval()
    torch.manual_seed(9)
    other = LAYERS[name].make().eval()
    other.load_state_dict(module.state_dict())
    with torch.no_grad():
        expected = tensors(module.eval()(x))
        for again in (copied, other):
            assert all(torch.equal(a, b) for a, b in zip(tensors(again(x)), expected, strict=True))


# --- functions that people paste ------------------------------------------------------------------


def test_ensemble_nll_of_one_block_of_none_and_of_strided_ones():
    logprobs = torch.randn(3, 4, 6).log_softmax(dim=0).requires_grad_()
    nll, weights = btm.ensemble_nll(logprobs, torch.zeros(3))
    nll.sum().backward()
    assert torch.isfinite(logprobs.grad).all() and logprobs.grad.dtype == torch.float32
    one = btm.ensemble_nll(logprobs[:, :1], torch.zeros(3))
    assert torch.equal(one[0], nll[:1]) and torch.equal(one[1], weights[:, :1])
    strided = logprobs.transpose(0, 2).contiguous().transpose(0, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = btm.ensemble_nll(logprobs, torch.zeros(3))
    others = [btm.ensemble_nll(given, torch.zeros(3)) for given in (strided, logprobs.double())]
    for found in (*others, under_autocast):
        assert found[0].dtype == torch.float64
        assert torch.equal(found[0], nll) and torch.equal(found[1], weights)
    for shape in ((3, 0, 6), (3, 4, 0)):
        nll, weights = btm.ensemble_nll(torch.empty(shape), torch.zeros(3))
        assert nll.shape == shape[1:] and weights.shape == shape


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_average_parameters_of_any_module(dtype):
    modules = [nn.Sequential(nn.Linear(D, 3), nn.BatchNorm1d(3)).to(dtype) for _ in range(2)]
    states = [module.state_dict() | {"none": torch.empty(0, D, dtype=dtype)} for module in modules]
    states[1]["0.weight"] = states[1]["0.weight"].T.contiguous().T  # strided
    found = btm.average_parameters(states, [0.25, 0.75])
    for name, first in states[0].items():
        expected = 0.25 * first.double() + 0.75 * states[1][name].double()
        assert found[name].dtype == first.dtype
        assert torch.equal(found[name], expected.to(first.dtype)), name
    assert torch.equal(modules[0][0].weight, states[0]["0.weight"])  # inputs stay as they are


def test_the_loss_of_no_windows_is_no_loss():
    model = make("TransformerLM")
    for rows in (0, 1):
        assert common.lm_loss(model, torch.zeros(rows, 7, dtype=torch.long)).shape == (rows, 6)
