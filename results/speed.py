"""What the scripts do, timed side by side with the code one would write first: python results/speed.py [--json PATH]

Every pair is checked to give the same numbers, at the sizes of the scripts' small runs. Then the two take turns, the
order changing, and a ratio is taken within each turn, so that whatever else the machine does meets both alike. A ratio
is the alternative's time over ours: above 1 the script is faster. One thread, as in the small runs; half a minute.
"""

import argparse
import importlib.util
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from timeit import timeit

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import adamoe, btm, common, home, mcsmoe, mowst  # noqa: E401, E402, I001
from data import behavior, graphs, text  # noqa: E402

CONFIGS = {script.__name__: script.SMALL for script in (adamoe, btm, home, mcsmoe, mowst)}
TURN_SECONDS = 0.02  # that a turn lasts at least
Pair = tuple[Callable[[], list[Tensor]], Callable[[], list[Tensor]]]  # ours, the alternative; the tensors must agree


def with_gradients(function: Callable[[Tensor], Tensor], x: Tensor, parameters: Sequence[Tensor] = ()) -> Callable:
    """() -> the output, and the gradients of x and the parameters for a random gradient of the output."""
    gradient = torch.randn(function(x).shape, generator=torch.Generator().manual_seed(0))
    return lambda: [out := function(x), *torch.autograd.grad(out, [x, *parameters], gradient)]


def expert_layer(config: adamoe.Config) -> Pair:
    sizes = config.nulls_and_picks(config.num_experts, adamoe.OWN_TOP_K)
    layer = adamoe.AdaMoE(config.d_model, config.d_ff, config.num_experts, *sizes)
    x = torch.randn(config.batch_size * config.context, config.d_model, requires_grad=True)

    def loop(x: Tensor) -> Tensor:
        expert_index, gates = layer.pick(layer.router(x))
        out = torch.zeros_like(x)
        for expert in range(layer.num_experts):
            token, pick = torch.where(expert_index == expert)
            y = F.gelu(x[token] @ layer.w1[expert]) @ layer.w2[expert]
            out = out.index_add(0, token, y * gates[token, pick, None])
        return out

    return tuple(with_gradients(function, x, list(layer.parameters())) for function in (layer, loop))


def stacked_experts(config: home.Config) -> Pair:
    log, widths = behavior.synthetic(0, rows=1000), (config.hidden, config.width)  # for its fields and groups
    d_in, level = len(log.fields) * config.embedding, home.masks("home", log.groups, num_meta=config.meta)[0]
    layer = home.MaskedExpertLayer(level.mask, d_in=d_in, widths=widths)
    linears = [[nn.Linear(*pair) for pair in ((d_in, widths[0]), widths)] for _ in range(layer.num_experts)]
    for i in range(2):
        layer.weights[i].data = torch.stack([pair[i].weight.detach().T for pair in linears])
        layer.biases[i].data = torch.stack([pair[i].bias.detach()[None] for pair in linears])
    tail = lambda: (nn.BatchNorm1d(widths[1]), nn.SiLU())
    experts = nn.ModuleList(nn.Sequential(first, nn.SiLU(), second, *tail()) for first, second in linears)
    x = torch.randn(config.batch_size, d_in, requires_grad=True)
    parameters = [*layer.weights, *layer.biases, *layer.norm.parameters()]
    listed = lambda x: torch.stack([expert(x) for expert in experts], dim=1)
    ours = with_gradients(lambda x: layer.experts(x[None]), x, parameters)
    return ours, with_gradients(listed, x, list(experts.parameters()))


def graph_product(config: mowst.Config) -> Pair:
    graph = graphs.contextual_sbm(0, config.num_nodes)
    adjacency = graphs.Adjacency(graph.edge_index, len(graph.x))
    (source, target), scale = adjacency.with_loops, (adjacency.degree + 1).rsqrt()
    weight = (scale[source] * scale[target])[:, None]  # [edges, 1]
    x = torch.randn(len(graph.x), config.hidden, requires_grad=True)
    scatter = lambda x: torch.zeros_like(x).index_add(0, target, weight * x[source])
    return with_gradients(lambda x: adjacency.gcn @ x, x), with_gradients(scatter, x)


def ensemble(config: btm.Config) -> Pair:
    shape = num_experts, num_blocks, length = len(config.domains), config.test_blocks, config.context
    logprobs = 5 * torch.rand(shape, dtype=torch.float64).log()
    log_prior = torch.full((num_experts,), -math.log(num_experts), dtype=torch.float64)

    def loop() -> list[Tensor]:
        evidence, nll = log_prior[:, None].repeat(1, num_blocks), torch.empty(shape[1:], dtype=torch.float64)
        for t in range(length):
            weights, prob = evidence.softmax(dim=0), torch.zeros(num_blocks, dtype=torch.float64)
            for expert in range(num_experts):
                prob += weights[expert] * logprobs[expert, :, t].exp()
                evidence[expert] += logprobs[expert, :, t]
            nll[:, t] = -prob.log()
        return [nll]

    return lambda: [btm.ensemble_nll(logprobs, log_prior)[0]], loop


def loaded(batches: list[Tensor], workers: int, *tensors: Tensor) -> Callable:
    """() -> rows of the tensors, batch by batch, through a DataLoader whose workers are started once."""
    batches, options = [rows.tolist() for rows in batches], {"num_workers": workers, "persistent_workers": workers > 0}
    loader = DataLoader(TensorDataset(*tensors), batch_sampler=batches, **options)
    return lambda: [part for batch in loader for part in batch]


def text_windows(config: adamoe.Config, workers: int, num: int = 50) -> Pair:
    data, length, draw = text.load_domain("docs").train, config.context + 1, torch.Generator().manual_seed
    windows = data.unfold(0, length, 1)
    starts = [torch.randint(len(windows), (config.batch_size,), generator=draw(step)) for step in range(num)]
    ours = lambda: [text.sample_windows(data, config.batch_size, length, draw(step)) for step in range(num)]
    return ours, loaded(starts, workers, windows)


def log_rows(config: home.Config, workers: int, num: int = 50) -> Pair:
    log = behavior.synthetic(0, config.rows, config.users, config.items).train
    order = torch.randperm(len(log.labels)).split(config.batch_size)[:num]
    ours = lambda: [part for rows in order for part in (log.ids[rows], log.labels[rows])]
    return ours, loaded(order, workers, log.ids, log.labels)


def assignment(config: mcsmoe.Config) -> Pair:
    from scipy.optimize import linear_sum_assignment

    gain = np.random.default_rng(0).standard_normal((config.d_ff, config.d_ff))
    ours = lambda: [torch.from_numpy(mcsmoe.shortest_augmenting_paths(-gain))]
    return ours, lambda: [torch.from_numpy(linear_sum_assignment(gain, maximize=True)[1])]


def pairs(configs: dict) -> Iterator[tuple[str, str, Pair]]:
    """(what, alternative, pair), at the sizes of the given configs of the scripts."""
    torch.manual_seed(0)
    yield "AdaMoE's layer, forward and backward", "loop over experts and masks", expert_layer(configs["adamoe"])
    yield "HoME's experts, forward and backward", "ModuleList, one by one", stacked_experts(configs["home"])
    yield "Mowst's graph product, forward and backward", "index_add by edge", graph_product(configs["mowst"])
    yield "BTM's ensemble on a domain", "loop over tokens and experts", ensemble(configs["btm"])
    for loader, workers in (("DataLoader, no workers", 0), ("DataLoader, 2 workers", 2)):
        yield "50 batches of text", loader, text_windows(configs["adamoe"], workers)
        yield "50 batches of HoME's log", loader, log_rows(configs["home"], workers)
    if importlib.util.find_spec("scipy") is not None:
        yield "MC-SMoE's assignment without SciPy", "SciPy, used if installed", assignment(configs["mcsmoe"])


def agree(ours: list[Tensor], other: list[Tensor]) -> bool:
    """Tensor by tensor; gradients of weights that are stacked in one and not in the other by their norm."""
    if [tensor.shape for tensor in ours] != [tensor.shape for tensor in other]:
        norm = lambda gradients: torch.cat([gradient.flatten() for gradient in gradients]).norm()
        ours, other = ([*tensors[:2], norm(tensors[2:])] for tensors in (ours, other))
    close = lambda a, b: (a - b).abs().max() <= 1e-5 * b.abs().max()  # fp32, summed in another order
    return all(a.shape == b.shape and close(a.double(), b.double()) for a, b in zip(ours, other))


def compare(pair: Pair, turns: int) -> dict:
    """Ratio of the times, median and quartiles over the turns; medians of the milliseconds of one call."""
    repeats = {job: math.ceil(2 * TURN_SECONDS / timeit(job, number=2)) for job in pair}
    found = {job: [] for job in pair}
    for turn in range(turns):
        for job in pair[:: 1 if turn % 2 else -1]:
            found[job].append(1e3 * timeit(job, number=repeats[job]) / repeats[job])
    ours, other = (np.array(found[job]) for job in pair)
    low, ratio, high = np.quantile(other / ours, (0.25, 0.5, 0.75)).tolist()
    milliseconds = {"ours_ms": float(np.median(ours)), "other_ms": float(np.median(other))}
    return {"ratio": ratio, "low": low, "high": high, **milliseconds, "turns": turns}


def main(argv: Sequence[str] | None = None, configs: dict = CONFIGS, turns: int = 15) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the figures, with machine and versions")
    path, rows = parser.parse_args(argv).json, []
    if path and path.is_dir():
        parser.error(f"--json {path} is a folder; a file is needed")
    torch.set_num_threads(1)
    for what, alternative, pair in pairs(configs):
        if not agree(*(job() for job in pair)):
            sys.exit(f"speed.py: {what} and {alternative} give different numbers")
        rows.append({"what": what, "alternative": alternative, **compare(pair, turns)})
        print("{what:44}{alternative:30}{ratio:8.3g}  ({low:.3g} to {high:.3g})".format(**rows[-1]), flush=True)
    if path:
        about = {**common.machine("cpu"), "git": common.git_version(ROOT)}
        common.write_json(path, {**about, "rows": rows})


if __name__ == "__main__":
    main()
