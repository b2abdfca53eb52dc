"""The mixture-of-experts blocks of transformers 5: find them, read them, put other layers in.

    find_blocks(model)              every mixture inside, as (parent, name, block)
    read_block(block)               its weights and how it routes, as MixtureWeights
    replace_blocks(model, make)     make(block) in the place of each, once compared with it
    all_or_nothing(model)           inside, an error leaves the model exactly as it was
    watch(model, layer_type)        hands the model's attention_mask to the new layers

A block of the usual layout has a router, `gate` or `router`, with one weight [experts, d_model],
and `experts` with gate_up_proj [experts, 2 * d_ff, d_model] and down_proj [experts, d_model, d_ff]:
Mixtral, OLMoE, FlexOlmo, Qwen2/3-MoE, Qwen3-Next, GraniteMoE, Jamba, MiniMax, DeepSeek-V2 and V3,
GLM-4-MoE, LFM2-MoE, Flint and others. What the reader does not know it refuses by name; what it
overlooks shows in the comparison. This file knows no method and needs no transformers.
"""

import copy
import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Facts that a router's attributes do not tell, by the name of its class.
UNNORMALIZED = ("JambaTopKRouter", "DeepseekV2TopkRouter", "DeepseekOcr2TextTopkRouter")
SIGMOID = ("FlintTopKRouter", "Lfm2MoeTopKRouter")

SHARED = ("shared_expert", "shared_experts", "shared_mlp")
BIASES = ("e_score_correction_bias", "expert_bias")
SCALES = ("routed_scaling_factor", "router_scaling_factor")
CHANGES = ("score_fn", "scoring_function", "output_multiplier", "global_scale")  # other formulas
LIMITS = ("limit", "swiglu_limit")  # experts that clamp their hidden values
ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


@dataclass
class MixtureWeights:
    """A block's parameters (views of them, no copies) and the rule by which it uses them.

    scores = softmax or sigmoid of x @ router.T; the top_k highest of scores + selection_bias are
    picked; their gates are the scores, normalized to sum 1 if `normalize`, times `scale`; an expert
    is (act(x @ w1) * (x @ w3)) @ w2; the shared expert, times the sigmoid of its gate, is added.
    """

    router: Tensor  # [num_experts, d_model]
    selection_bias: Tensor | None  # [num_experts], or None
    gate_up_proj: Tensor  # [num_experts, 2 * d_ff, d_model], as the block holds it
    down_proj: Tensor  # [num_experts, d_model, d_ff], as the block holds it
    act: str  # a name in ACTIVATIONS
    top_k: int
    scoring: str  # "softmax" or "sigmoid"
    normalize: bool
    scale: float
    shared: nn.Module | None  # the shared expert
    shared_gate: nn.Module | None  # [tokens, d_model] -> [tokens, 1]

    @property
    def num_experts(self) -> int:
        return self.down_proj.shape[0]

    @property
    def d_model(self) -> int:
        return self.down_proj.shape[1]

    @property
    def d_ff(self) -> int:
        return self.down_proj.shape[2]

    @property
    def w1(self) -> Tensor:
        """The gate projections [num_experts, d_model, d_ff]."""
        return self.gate_up_proj[:, : self.d_ff].transpose(1, 2)

    @property
    def w3(self) -> Tensor:
        """The up projections [num_experts, d_model, d_ff]."""
        return self.gate_up_proj[:, self.d_ff :].transpose(1, 2)

    @property
    def w2(self) -> Tensor:
        """The down projections [num_experts, d_ff, d_model]."""
        return self.down_proj.transpose(1, 2)


def find_blocks(model: nn.Module) -> list[tuple[nn.Module, str, nn.Module]]:
    """(parent, name, block) of every module inside with experts and a router, first to last."""
    found = []
    for parent in model.modules():
        for name, child in parent.named_children():
            has_router = router_of(child) is not None
            if has_router and isinstance(getattr(child, "experts", None), nn.Module):
                found.append((parent, name, child))
    return found


def router_of(block: nn.Module) -> nn.Module | None:
    """The block's router, whatever it is called."""
    for name in ("gate", "router"):
        if isinstance(getattr(block, name, None), nn.Module):
            return getattr(block, name)
    return None


def read_block(block: nn.Module) -> MixtureWeights:
    """A block of the usual layout. Raises ValueError, by name, for what MixtureWeights cannot say.

    On the device "meta" shapes are read as well.
    """
    router, experts = router_of(block), block.experts
    refuse_unknown_parts(block, router, experts)
    num_experts, d_model = router.weight.shape
    d_ff = experts.down_proj.shape[-1]
    shapes = [list(experts.gate_up_proj.shape), list(experts.down_proj.shape)]
    if shapes != [[num_experts, 2 * d_ff, d_model], [num_experts, d_model, d_ff]]:
        router_shape = [num_experts, d_model]
        refuse(block, f"experts of shapes {shapes} do not fit a router of shape {router_shape}")

    name = type(router).__name__
    selection_bias = first_of((router, block), BIASES)
    is_sigmoid = selection_bias is not None or name in SIGMOID
    return MixtureWeights(
        router=router.weight,
        selection_bias=selection_bias,
        gate_up_proj=experts.gate_up_proj,
        down_proj=experts.down_proj,
        act=name_of_activation(block, experts),
        top_k=int(first_of((router, block), ("top_k",))),
        scoring="sigmoid" if is_sigmoid else "softmax",
        normalize=bool(getattr(router, "norm_topk_prob", name not in UNNORMALIZED)),
        scale=float(first_of((router, block), SCALES) or 1.0),
        shared=first_of((block,), SHARED),
        shared_gate=getattr(block, "shared_expert_gate", None),
    )


def refuse(block: nn.Module, reason: str) -> None:
    raise ValueError(f"{type(block).__name__}: {reason}; this mixture cannot be replaced")


def refuse_unknown_parts(block: nn.Module, router: nn.Module, experts: nn.Module) -> None:
    """Every tensor of the block has to be one that read_block takes into account."""
    expected = {
        block: {"gate", "router", "experts", "shared_expert_gate", *SHARED, *BIASES},
        router: {"weight", *BIASES},
        experts: {"gate_up_proj", "down_proj", "act_fn"},
    }
    for module, known in expected.items():
        tensors = [name for name, _ in module.named_parameters(recurse=False)]
        tensors += [name for name, _ in module.named_buffers(recurse=False)]
        children = [name for name, child in module.named_children() if child is not None]
        unknown = [name for name in tensors + children if name not in known]
        if unknown:
            refuse(
                block, f"{type(module).__name__} has {', '.join(unknown)}, which is not understood"
            )
    needed = [(router, "weight"), (experts, "gate_up_proj"), (experts, "down_proj")]
    for module, name in needed:
        tensor = getattr(module, name, None)
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            refuse(block, f"{type(module).__name__} has no {name} of floating-point numbers")
    for name in CHANGES:
        if hasattr(router, name):
            refuse(block, f"its router has {name}, which is not understood")
    for name in LIMITS:
        if getattr(experts, name, None) is not None:
            refuse(block, f"its experts have {name}, which is not understood")
    if first_of((router, block), ("top_k",)) is None:
        refuse(block, "its router has no top_k")
    if getattr(router, "router_logit_softcapping", 0.0):
        refuse(block, "its router has router_logit_softcapping, which is not understood")
    groups = getattr(router, "num_group", None) or 1
    if groups > 1 and getattr(router, "topk_method", "") != "greedy":
        refuse(
            block, f"its router picks among {groups} groups (num_group), which is not understood"
        )


def first_of(modules: tuple, names: tuple[str, ...]) -> object:
    """The first attribute with one of these names that is there and not None."""
    for module in modules:
        for name in names:
            found = getattr(module, name, None)
            if found is not None:
                return found
    return None


def name_of_activation(block: nn.Module, experts: nn.Module) -> str:
    """Which activation the experts have, found by its values."""
    points = torch.linspace(-8, 8, 101)
    values = experts.act_fn(points)
    for name, activation in ACTIVATIONS.items():
        if torch.allclose(values, activation(points), rtol=1e-6, atol=1e-6):
            return name
    refuse(block, f"its activation is none of {', '.join(ACTIVATIONS)}")


@contextmanager
def all_or_nothing(model: nn.Module) -> Iterator[None]:
    """Inside, any error leaves the model's mixtures and what is trained exactly as they were."""
    places = find_blocks(model)
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    except BaseException:
        for parent, name, block in places:
            setattr(parent, name, block)
        for parameter, requires_grad in trained:
            parameter.requires_grad_(requires_grad)
        raise


def replace_blocks(
    model: nn.Module,
    make: Callable[[nn.Module], nn.Module],
    make_equal: Callable[[nn.Module], nn.Module] | None = None,
    tokens: int = 16,
) -> list[nn.Module]:
    """Put make(block) in the place of every mixture; returns the new layers, first to last.

    make        block -> a layer [..., d_model] -> the same shape
    make_equal  block -> the layer that must compute what the block does; None: make's own
    tokens      how many random vectors both are tried on before any block is replaced

    Raises ValueError, in one line and with the model as it was, for a model without mixtures, for a
    block that read_block refuses, and where block and layer differ.
    """
    places = find_blocks(model)
    if not places:
        raise ValueError(f"{type(model).__name__} has no mixture: no module with gate and experts")
    new_layers = []
    with all_or_nothing(model):
        for _, _, block in places:
            compare(block, make_equal or make, tokens)
        for parent, name, block in places:
            layer = make(block).train(block.training)
            setattr(parent, name, layer)
            new_layers.append(layer)
    return new_layers


@torch.no_grad()
def compare(block: nn.Module, make_equal: Callable[[nn.Module], nn.Module], tokens: int) -> None:
    """Refuse a layer that does not compute what its block does, on random tokens in float32.

    Not in bf16: there a rounded logit changes a pick, and that looks like another formula. Shapes
    on the device "meta" cannot be compared.
    """
    weights = read_block(block)
    if weights.router.is_meta:
        return
    block = copy.deepcopy(block).eval()
    if weights.router.dtype.itemsize < 4:
        block = block.float()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, tokens, weights.d_model, generator=generator)
    x = x.to(router_of(block).weight)
    try:
        expected = block(x.clone())
    except Exception as error:  # a block of somebody else can fail in any way
        refuse(block, f"it takes more than hidden states ({' '.join(str(error).split())[:80]})")
    if not isinstance(expected, Tensor) or expected.shape != x.shape:
        refuse(block, "its output is not one tensor of the shape of its input")
    difference = (make_equal(block).eval()(x) - expected).abs().max() / expected.abs().max()
    if not difference <= 1e-3:
        refuse(block, f"it differs by {float(difference):.2g} of its output from what was read")


def watch(model: nn.Module, layer_type: type) -> None:
    """From now on the model's attention_mask reaches its layers of this type as their token_mask.

    [batch, time] bool, False at padding, None where the model got none; it stays until the next
    forward, for activation checkpointing computes again in backward. Models inside hand on theirs,
    too: they may be called alone. A forward that asks for the library's own balance loss is
    refused; one in training, of layers in which nothing is trained, warns.
    """
    check = partial(refuse_or_warn, layer_type=layer_type)
    model.register_forward_pre_hook(check, with_kwargs=True)
    for module in model.modules():
        names = tuple(inspect.signature(module.forward).parameters)
        if module is model or "input_ids" in names:
            hook = partial(hand_on_mask, layer_type=layer_type, names=names)
            module.register_forward_pre_hook(hook, with_kwargs=True)


def layers_of(model: nn.Module, layer_type: type) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, layer_type)]


def refuse_or_warn(model: nn.Module, args: tuple, kwargs: dict, layer_type: type) -> None:
    default = getattr(getattr(model, "config", None), "output_router_logits", False)
    if kwargs.get("output_router_logits", default):
        reason = "the library's balance loss does not know the new layers"
        raise ValueError(f"output_router_logits is on, but {reason}; add their aux_loss instead")
    if model.training and torch.is_grad_enabled():
        layers = layers_of(model, layer_type)
        parameters = [parameter for layer in layers for parameter in layer.parameters()]
        if not any(parameter.requires_grad for parameter in parameters):
            told = "in the replaced mixtures nothing is trained"
            warnings.warn(f"{told}; with PEFT, replace them after get_peft_model", stacklevel=2)


def hand_on_mask(
    model: nn.Module, args: tuple, kwargs: dict, layer_type: type, names: tuple[str, ...]
) -> None:
    given = {**dict(zip(names, args)), **kwargs}
    mask = given.get("attention_mask")
    inputs = [given.get("input_ids"), given.get("inputs_embeds"), *args]
    tokens = next((found for found in inputs if isinstance(found, Tensor)), None)
    if isinstance(mask, Tensor) and mask.dim() == 2 and tokens is not None:
        token_mask = mask[:, -tokens.shape[1] :].bool()  # without what lies in the cache
    else:
        token_mask = None
    for layer in layers_of(model, layer_type):
        layer.token_mask = token_mask
