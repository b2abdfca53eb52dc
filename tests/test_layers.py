"""The layers that people paste, elsewhere: under autocast, one row, no rows, float64, copies."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import adamoe
import common
import dual_head_kd
import home
import mcsmoe
import mowst
import smoe_dropout
from data import mixtures
from mowst import Adjacency

D, CLASSES = 8, 3


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
    return Adjacency(torch.cat([edges, edges.flip(0)], dim=1), num_nodes, dtype)


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


@dataclass
class Layer:
    make: Callable[[], nn.Module]
    shape: tuple[int, ...] = (4, 6, D)  # of the input; `rows` is the dimension that may be 1 or 0
    rows: int = 0
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
    "SMoEDropout, learned": Layer(learned_dropout),
    "SparseMoE": Layer(lambda: sparse_moe(top_k=2, normalize=True)),
    "SparseMoE, Switch": Layer(lambda: sparse_moe(balance=0.1, capacity=3)),
    "SparseMoE, low rank": Layer(lambda: sparse_moe(rank=2)),
    "SparseMoE, compact": Layer(lambda: sparse_moe(rank=2, compact=True)),
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
}  # fmt: skip
for kind in ("gcn", "sage", "gin", "gat"):
    make_gnn = partial(lambda kind: OnGraph(mlp_and_gnn(kind)[1]), kind)
    LAYERS[f"GNN, {kind}"] = Layer(make_gnn, (6, D), norm=True, alone=False)


def make(name: str) -> nn.Module:
    """The layer with no weight at zero: some start with B = 0, which would hide half of it."""
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
    return torch.randn(shape, generator=generator)


def tensors(y: object) -> list[Tensor]:
    return [y] if isinstance(y, Tensor) else list(y)


def loss_of(module: nn.Module, y: object) -> Tensor:
    """The outputs squared, plus every auxiliary loss that a layer left."""
    losses = [z.double().square().sum() for z in tensors(y)]
    left = [getattr(m, "aux_loss", None) for m in module.modules()]
    left = [loss for loss in left if isinstance(loss, Tensor)]
    return sum(losses + [loss.double() for loss in left])


def step(module: nn.Module, x: Tensor) -> tuple[object, Tensor, dict[str, Tensor]]:
    """Forward and backward: (outputs, gradient of x, gradients of the parameters)."""
    module.zero_grad()
    x = x.detach().requires_grad_()
    torch.manual_seed(2)  # of dropout
    y = module(x)
    loss = loss_of(module, y)
    assert torch.isfinite(loss)  # the auxiliary one included
    loss.backward()
    return y, x.grad, {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


def assert_finite(found: tuple[object, Tensor, dict[str, Tensor]]) -> None:
    y, dx, gradients = found
    for tensor in [*tensors(y), dx, *gradients.values()]:
        assert torch.isfinite(tensor).all()


def assert_near(found: object, expected: object, **tolerance) -> None:
    for a, b in zip(tensors(found), tensors(expected), strict=True):
        assert a.shape == b.shape
        torch.testing.assert_close(a.to(b.dtype), b, **tolerance)


@pytest.mark.parametrize("name", LAYERS)
def test_under_autocast_bf16_rounds_and_nothing_else(name):
    """Routing stays in full precision: outputs differ by the rounding of a few sums to 2^-8."""
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


@pytest.mark.parametrize("name", ("AdaMoE", "SMoEDropout", "SparseMoE"))
def test_compiled_is_the_same_step(name):
    """Traced, and run without a compiler: that takes seconds, and what it makes is torch's."""
    module, x = make(name), inputs(name)
    expected = step(copy.deepcopy(module), x)
    torch.compiler.reset()
    module.compile(backend="eager")
    found = step(module, x)
    assert_near(found[0], expected[0], rtol=1e-4, atol=1e-5)
    assert_near(found[1], expected[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ("SMoEDropout", "SparseMoE"))
def test_a_copy_of_a_compiled_layer_has_weights_of_its_own(name):
    module, x = make(name), inputs(name)
    module.compile(backend="eager")
    copied = copy.deepcopy(module)
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    assert copied(x).any()


@pytest.mark.parametrize("name", ("SMoEDropout, learned", "SparseMoE, Switch"))
def test_under_activation_checkpointing_the_balance_loss_is_taken_once_or_refused(name):
    layer, x = make(name), inputs(name).requires_grad_()
    model = common.TransformerLM(5, 1, D, 2, 6, lambda _: layer)
    y = checkpoint(layer, x, use_reentrant=False)
    (y.square().sum() + model.aux_loss()).backward()  # computes the forward again
    assert layer.aux_loss is None and layer.router.weight.grad.any()
    checkpoint(layer, x, use_reentrant=True)
    with pytest.raises(ValueError, match="use_reentrant=True; set it to False"):
        model.aux_loss()


@pytest.mark.parametrize("name", LAYERS)
def test_one_row_is_what_it_is_among_others_and_no_rows_give_none(name):
    """An expert of a data-parallel job may get nothing; its step must not spoil the others'."""
    layer = LAYERS[name]
    num_rows = layer.shape[layer.rows]
    module, x = make(name).eval(), inputs(name)
    with torch.no_grad():
        whole = tensors(module(x))
    found = step(module, x.narrow(layer.rows, 0, 1))
    assert_finite(found)
    if layer.alone:
        rows = [y.narrow(y.shape.index(num_rows), 0, 1) for y in whole]
        assert_near(found[0], rows, rtol=1e-4, atol=1e-5)
    nothing = step(module.train(not layer.norm), inputs(name, rows=0))
    assert_finite(nothing)
    for y, y_rows in zip(tensors(nothing[0]), whole):
        assert sorted(y.shape) == sorted(0 if n == num_rows else n for n in y_rows.shape)


@pytest.mark.parametrize("name", LAYERS)
def test_in_float64_gradients_are_right_to_five_digits(name):
    """Along a random direction: a single step in fp32 on the way would spoil the difference."""
    module, x = make(name).eval(), inputs(name)
    expected = step(copy.deepcopy(module), x)
    x = x.double()
    y, dx, gradients = step(module.double(), x)
    assert all(tensor.dtype == torch.float64 for tensor in [*tensors(y), *gradients.values()])
    assert_near(y, expected[0], rtol=1e-3, atol=1e-4)
    assert_near(dx, expected[1], rtol=1e-3, atol=1e-4)
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
    """deepcopy right after a step, as averages of weights do; a state goes into another layer."""
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
