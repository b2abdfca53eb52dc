"""Branch-Train-Merge: expert language models trained apart, ensembled or averaged.

Li, Gururangan, Dettmers, Lewis, Althoff, Smith, Zettlemoyer, "Branch-Train-Merge: Embarrassingly
Parallel Training of Expert Language Models" (arXiv 2208.03306).

Training one large model needs machines that talk to each other at every step. Branch-Train-Merge
trains many models that never talk. A *seed* reads all text for a while; then it is copied once per
*domain* (text by provenance: code, law, news ...), and every copy, an *expert*, goes on alone with
its domain. The set of experts, the *forest*, is the model:

    branch   theta_j = theta_seed; in later rounds sum_i w_i theta_i over the experts that are there
    train    theta_j on domain j and nothing else, on any machine, at any time
    merge    put theta_j's file beside the others; to remove it is to delete the file

At inference the experts' next-token *probabilities* are mixed by how well each has predicted the
text so far, x_1 .. x_t-1. The prior, p(j), is how much each expert was believed on development text
of the target domain:

    p(x_t | x_<t) = sum_j p_j(x_t | x_<t) p(j | x_<t)                        (eq. 1)
    p(j | x_<t)   ~ p(j) prod_{s<t} p_j(x_s | x_<s), so that sum_j is 1      (eq. 2)

or the experts are averaged into one model, sum_j p(j) theta_j. Two experts, equal priors, and what
each gave to three true tokens, in numbers:

    p_1(x_t)         0.50    0.25    0.50       p_1 said 2 : 1 of the first token, so before the
    p_2(x_t)         0.25    0.50    0.125      second it is believed 2/3; then p_2 said 2 : 1
    p(1 | x_<t)      1/2     2/3     1/2
    p(x_t | x_<t)    0.375   0.333   0.3125     their product is (0.0625 + 0.015625) / 2

Run      python btm.py                      seed, experts, their rivals, later rounds; no download
         python btm.py --ablate --plot      every arm and the picture; --seeds 8 for verdicts
         python btm.py --full               the paper's 125M model on the public parts of the Pile
         python btm.py --sample "def "      write with the forest just trained
     The same as separate commands, on any machines, with nothing in common but a folder F:
         python btm.py --stage seed --forest F
         python btm.py --stage expert --forest F --domain python       anywhere, in any order
         sbatch --array=0-5 --wrap 'python btm.py --stage expert --forest F --domain-index ...'
         python btm.py --stage eval --forest F --without unicode       whoever is there, but for one
     A stopped command goes on when given again. A domain of your own, and all in one model:
         python btm.py --prepare ~/notes --domain notes
         python btm.py --stage expert --forest F --domain notes --branch-steps 300
         python btm.py --average posterior --domain notes --forest F
You see  bits/byte and perplexity by domain and method, whom the posterior believes, the claims.
Found    (seeds 0-7) TO BE MEASURED
Differences from the paper and its code (its tables could not be read)
1. The text defines eq. 2 over the whole prefix. The released scorer (DEMix) looks at the token
   before only, and gives all experts equal weights at the first token of a block: `released_nll`.
2. Ours is the plain mean of the posterior over 100 development blocks. The released prior is a
   moving average, 0.3 on the new, of last positions of 101 batches of 2, each with the prior so
   far: four fifths of its text are forgotten: `released_prior`. Both are arms.
3. Experts read the very bytes that the dense model reads of their domain at the same update, so
   that cost and data are equal by construction; the paper draws afresh after the branch.
4. In later rounds Adam starts afresh with its own warm-up: there are several parents.
5. Small scale: 2 layers, bytes, three quarters of the updates for the seed (the paper: one half).
6. Removing an expert removes what it learnt alone: the seed has read its domain, too.

Break it yourself: TO BE TRIED (see); TO BE TRIED (see); TO BE TRIED (see).
"""

import functools
import json
import math
import os
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import common
from common import (
    Check,
    Count,
    Job,
    Margin,
    NonNegative,
    Positive,
    Results,
    Run,
    Share,
    UsageError,
    Whole,
    check,
    claim,
    say,
    show,
)
from data import arrays
from data import text as text_data

# --------------------------------------------------------------------------------------------------
# The method: whom to believe, how to mix, how to average
# --------------------------------------------------------------------------------------------------


def log_posterior(logprobs: Tensor, log_prior: Tensor, window: int | None = None) -> Tensor:
    """log p(expert | text so far) before every token, and after the last: eq. 2.

    logprobs [E, N, T], log_prior [E] or [E, N], window: see ensemble_nll -> [E, N, T + 1], float64.
    """
    total = F.pad(logprobs.double().cumsum(dim=-1), (1, 0))  # at t the sum over s < t: no target
    evidence = total
    if window is not None:
        first = torch.arange(total.shape[-1], device=total.device) - window
        evidence = total - total[..., first.clamp(min=0)]
    by_block = log_prior.double().to(total.device).view(len(total), -1, 1)  # [E, 1 or N, 1]
    return (by_block + evidence).log_softmax(dim=0)


def ensemble_nll(
    expert_logprobs: Tensor, log_prior: Tensor, window: int | None = None
) -> tuple[Tensor, Tensor]:
    """Mix the experts' probabilities by the domain posterior: eqs. 1 and 2.

    expert_logprobs [E, N, T]  log-probability that each expert gave to each true token of N blocks
    log_prior [E] or [E, N]    log p(expert) at the start of every (each) block; -inf switches one
                               off
    window                     evidence from so many tokens before t: None all (eq. 2), 0 none
    Returns nll [N, T] in nats and the weights [E, N, T] in force at each token, both float64.
    Raises ValueError: shapes that do not fit, NaN or infinity, a prior without mass.
    """
    log_prior = torch.as_tensor(log_prior)
    if expert_logprobs.dim() != 3 or log_prior.shape not in (
        expert_logprobs.shape[:1],
        expert_logprobs.shape[:2],
    ):
        shapes = f"{list(expert_logprobs.shape)} with log_prior {list(log_prior.shape)}"
        raise ValueError(f"expert_logprobs are {shapes}; [E, N, T] and [E] or [E, N] are needed")
    if window is not None and window < 0:
        raise ValueError(f"window is {window}; None or at least 0 is allowed")
    if not torch.isfinite(expert_logprobs).all():
        raise ValueError("expert_logprobs hold NaN or infinity")
    if not (log_prior < torch.inf).all() or not (log_prior.amax(dim=0) > -torch.inf).all():
        raise ValueError("log_prior has no mass: one expert must be finite, none NaN or +inf")
    log_weights = log_posterior(expert_logprobs, log_prior, window)[..., :-1]
    return -(log_weights + expert_logprobs.double()).logsumexp(dim=0), log_weights.exp()


def moving_average(posteriors: Tensor, rate: float) -> Tensor:
    """The first row as it is, then weight `rate` on each new one. [N, E] -> [E]."""
    average = posteriors[0]
    for posterior in posteriors[1:]:
        average = rate * posterior + (1 - rate) * average
    return average


def cached_prior(
    expert_logprobs: Tensor, window: int | None = None, blocks: int = 100, rate: float | None = None
) -> Tensor:
    """p(expert) [E] for a target domain, from its development text; then fixed.

    expert_logprobs [E, N, T] of development blocks, of which the first `blocks` count. A block's
    posterior is the mean of its weights over positions, under a uniform prior; the prior is the
    plain mean of those. rate=0.3 takes a moving average instead, as the first edition did: that
    forgets all but the last dozen blocks. Raises ValueError without blocks.
    """
    logprobs = expert_logprobs[:, :blocks]
    if logprobs.shape[1] == 0:
        raise ValueError("no blocks to estimate a prior from")
    _, weights = ensemble_nll(logprobs, torch.zeros(len(logprobs)), window)
    posteriors = weights.mean(dim=-1).T  # [N, E]
    return posteriors.mean(dim=0) if rate is None else moving_average(posteriors, rate)


def released_nll(expert_logprobs: Tensor, prior: Tensor) -> Tensor:
    """What DEMix's released scorer gives: evidence from the token before only, no prior at first.

    expert_logprobs [E, N, T], prior [E] -> nll [N, T] in nats, float64.
    """
    log_weights = log_posterior(expert_logprobs, prior.log(), window=1)[..., :-1]
    log_weights[..., 0] = -math.log(len(prior))
    return -(log_weights + expert_logprobs.double()).logsumexp(dim=0)


def released_prior(
    expert_logprobs: Tensor, batches: int = 101, batch_size: int = 2, rate: float = 0.3
) -> Tensor:
    """The cached prior of the released evaluation: a moving average of last weights.

    expert_logprobs [E, N, T] of development blocks -> [E]. A batch's posterior is the mean of its
    blocks' weights at the last position, under the prior after the batches before.
    """
    prior = torch.full((len(expert_logprobs),), 1 / len(expert_logprobs), dtype=torch.float64)
    seen = []
    for batch in expert_logprobs.split(batch_size, dim=1)[:batches]:
        weights = log_posterior(batch, prior.log(), window=1)[..., -2].exp()  # [E, blocks]
        seen.append(weights.mean(dim=1))
        prior = moving_average(torch.stack(seen), rate)
    return prior


def top_k_prior(prior: Tensor, top_k: int) -> Tensor:
    """Keep the top_k largest entries (ties: the first), zero the rest, renormalise. [E] -> [E]."""
    if not 1 <= top_k <= len(prior):
        raise ValueError(f"top_k is {top_k}; 1 to {len(prior)} experts can be kept")
    kept = prior.sort(descending=True, stable=True).indices[:top_k]
    sparse = torch.zeros_like(prior).index_copy(0, kept, prior[kept])
    return sparse / sparse.sum()


def average_parameters(
    state_dicts: Iterable[dict[str, Tensor]], weights: Sequence[float]
) -> dict[str, Tensor]:
    """sum_i w_i theta_i, summed in float64 and cast back; integer buffers are the first one's.

    state_dicts  any iterable: one that loads them as it goes needs the memory of one
    weights      one for each, at least 0, their sum 1
    Raises ValueError naming the parameter: other names or shapes, NaN or infinity.
    """
    weights = [float(weight) for weight in weights]
    if not all(weight >= 0 for weight in weights) or abs(sum(weights) - 1) > 1e-6:
        raise ValueError(f"weights {weights} must be at least 0 and sum to 1")
    first, total, count = {}, {}, 0
    for state in state_dicts:
        count += 1
        first = first or {name: tensor.clone() for name, tensor in state.items()}
        for name in [*first, *state]:
            shapes = [list(model[name].shape) for model in (first, state) if name in model]
            if len(shapes) < 2 or shapes[0] != shapes[1]:
                found = f"{shapes[1]}, not {shapes[0]}" if len(shapes) > 1 else "not in all"
                raise ValueError(f"model {count}: the parameter {name!r} is {found}")
        if count > len(weights):
            break
        for name, tensor in state.items():
            if tensor.is_floating_point():
                if not torch.isfinite(tensor).all():
                    raise ValueError(f"model {count}: the parameter {name!r} holds NaN or infinity")
                total[name] = total.get(name, 0) + weights[count - 1] * tensor.double()
    if count != len(weights):
        raise ValueError(f"{len(weights)} weights for {count} models or more; one each is needed")
    return {name: total.get(name, tensor).to(tensor.dtype) for name, tensor in first.items()}


class Ensemble(nn.Module):
    """The forest as one language model: tokens [batch, time] -> log p [batch, time, vocab].

    models  language models of one vocabulary: tokens [batch, time] -> logits [batch, time, vocab]
    prior   [E]; None: uniform
    Evidence comes from the tokens given. `weights` [E, batch, time] says whom the last forward
    believed after each token.
    """

    def __init__(self, models: Sequence[nn.Module], prior: Tensor | None = None):
        super().__init__()
        self.models = nn.ModuleList(models)
        self.prior = torch.full((len(models),), 1 / len(models)) if prior is None else prior

    def forward(self, tokens: Tensor) -> Tensor:
        given = [model(tokens).float().log_softmax(dim=-1) for model in self.models]
        logprobs = torch.stack(given)  # [E, batch, time, vocab]
        true = tokens[None, :, 1:, None].expand(len(given), -1, -1, -1)
        said = logprobs[:, :, :-1].gather(-1, true)[..., 0]  # [E, batch, time - 1]
        log_weights = log_posterior(said, self.prior.log())  # [E, batch, time]
        self.weights = log_weights.exp().detach()
        return (log_weights[..., None] + logprobs).logsumexp(dim=0)


def learning_rate_factor(update: int, updates: int, warmup_share: float = 0.08) -> float:
    """Linear warm-up to 1, then straight down to 0 at the last update; they count from 1."""
    warmup = max(1, round(warmup_share * updates))
    if update <= warmup:
        return update / warmup
    return (updates - update) / max(1, updates - warmup)


# --------------------------------------------------------------------------------------------------
# The model: a GPT
# --------------------------------------------------------------------------------------------------


class MLP(nn.Module):
    """The feed-forward of GPT. x [..., d_model] -> the same shape."""

    def __init__(
        self, d_model: int, init: float, num_layers: int, generator: torch.Generator | None = None
    ):
        super().__init__()
        self.fc1 = nn.Linear(d_model, 4 * d_model)
        self.fc2 = nn.Linear(4 * d_model, d_model)
        nn.init.normal_(self.fc1.weight, std=init, generator=generator)
        nn.init.normal_(self.fc2.weight, std=init / math.sqrt(2 * num_layers), generator=generator)
        nn.init.zeros_(self.fc1.bias)
        nn.init.zeros_(self.fc2.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


# --------------------------------------------------------------------------------------------------
# Config
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config(common.Settings):
    domains: tuple[str, ...] = (
        "python",
        "headers",
        "docs",
        "tests",
        "operators",
        "unicode",
    )  # seed
    novel: tuple[str, ...] = ("licences", "numpy", "cmake", "stubs")  # no expert, but later rounds
    num_domains: Whole = 0  # of `domains`, the first ones; 0: all
    steps: Count = 600  # updates of seed and expert together, and of the dense model; paper 80,000
    tokens: Positive | None = None  # budget of the forest, and of the dense model; chooses steps
    seed_share: Annotated[float, common.Range(0, 1)] = 0.75  # of the updates; released scripts 0.5
    blocks_per_domain: Count = 4  # sequences an update, of an expert; full: released scripts
    micro_batch: Count = 1024  # sequences a forward pass; gradients are accumulated over them
    context: Count = 64  # tokens; paper 1,024
    num_layers: Annotated[int, common.Range(1, 1000)] = 2  # transformer layers; paper 12
    d_model: Count = 64  # width; paper 768
    num_heads: Count = 4  # attention heads; paper 12
    conv: Whole = 4  # width of the causal convolution on the embeddings; the paper has none
    vocab_size: Count = 256  # bytes; a domain of token ids brings its own
    init: Positive = 0.1  # standard deviation of initial weights; full: 0.02
    lr: Positive = 1e-2  # peak, linear to zero; chosen on seed 100; released scripts 5e-4
    warmup_share: Share = 0.08  # of the updates; released scripts
    clip: Positive = 1.0  # gradient norm; released scripts 0.1
    weight_decay: NonNegative = 0.1  # decoupled; released scripts
    domain: str = ""  # whose expert --stage expert trains; of --prepare and --average
    branch: Literal["posterior", "nearest", "uniform", "seed", "scratch"] = (
        "posterior"  # later rounds
    )
    branch_steps: Count = 150  # updates of an expert of a later round
    branch_lr: Positive = 4e-3  # its peak, own warm-up, linear to zero; chosen on seed 100
    dev_blocks: Count = 100  # development sequences a domain, for the cached prior; paper 100
    test_blocks: Count = 128  # test sequences a domain

    def __post_init__(self) -> None:
        super().__post_init__()
        names = (*self.domains, *self.novel)
        for name in (*names, *filter(None, [self.domain])):
            text_data.check_name(name)
        if len(self.own) < 2 or len(set(names)) < len(names) or len(self.own) < self.num_domains:
            listed = f"domains {','.join(self.domains)}, novel {','.join(self.novel)}"
            raise ValueError(f"{listed}: two domains or more are needed, none of them twice")
        leaves_one_out = self.seed_steps == self.steps or (self.seed_share and not self.seed_steps)
        if leaves_one_out:
            shares = f"seed_share {self.seed_share:g} of {self.steps} updates"
            raise ValueError(f"{shares} leaves nothing to the seed or to the experts")
        if self.d_model % self.num_heads:
            raise ValueError(f"d_model is {self.d_model}; it must be a multiple of num_heads")

    @property
    def own(self) -> tuple[str, ...]:
        """The domains of the first round."""
        return self.domains[: self.num_domains or None]

    @property
    def seed_steps(self) -> int:
        return round(self.seed_share * self.steps)


SMALL = Config()
FULL = replace(
    SMALL,
    domains=("web", "arxiv", "pubmed-central", "freelaw", "github", "wikipedia", "stackexchange",
             "uspto"),
    novel=("hackernews", "enron", "europarl", "philpapers", "nih-exporter", "pubmed-abstracts",
           "gutenberg", "mathematics"),
    steps=80_000,
    seed_share=0.5,
    blocks_per_domain=128,
    micro_batch=32,
    context=1024,
    num_layers=12,
    d_model=768,
    num_heads=12,
    conv=0,
    init=0.02,
    lr=5e-4,
    clip=0.1,
    branch_steps=8_000,
    branch_lr=5e-4,
    test_blocks=1_000,
)  # fmt: skip
SHAPE = ("vocab_size", "num_layers", "d_model", "num_heads", "context", "conv")
OF_A_FOREST = (  # settings that all who add to a forest must share; others are one's own
    "domains", "num_domains", "steps", "seed_share", "blocks_per_domain", *SHAPE,
    "init", "lr", "warmup_share", "clip", "weight_decay",
)  # fmt: skip


def make_model(config: Config, key: str) -> common.TransformerLM:
    """A GPT with tied embeddings; the same key gives the same initial weights, in any process."""
    generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))

    def make_ffn(layer: int) -> MLP:
        return MLP(config.d_model, config.init, config.num_layers, generator)

    shape = {name: getattr(config, name) for name in SHAPE}
    model = common.TransformerLM(**shape, make_ffn=make_ffn, init=config.init, generator=generator)
    model.head.weight = model.embedding.weight
    return model


# --------------------------------------------------------------------------------------------------
# The forest on disk: a file an expert, no manifest, no lock, nothing executed
# --------------------------------------------------------------------------------------------------


class Forest:
    """A folder that anyone may add to: forest.json, seed.npz, experts/NAME.npz, averages/NAME.npz.

    The listing is the forest: to add is to drop a file in, to remove is to delete one. A file is
    written beside its name and then renamed, so that a reader finds all of it or nothing. `load`
    trusts nothing: size, checksums, names, shapes, dtypes, finiteness, the forest it was made for;
    nothing is unpickled. Checksums show damage, not malice.
    """

    def __init__(self, path: str | Path):
        """Raises FileNotFoundError without a forest.json, UsageError for a damaged one."""
        self.path, mark = Path(path), Path(path) / "forest.json"
        if not mark.is_file():
            raise FileNotFoundError(f"{path} is no forest: no forest.json; --stage seed makes one")
        try:
            if mark.stat().st_size > 100_000:
                raise ValueError("it is too large")
            content = json.loads(mark.read_bytes())
            if set(content) != {"seed", *OF_A_FOREST} or type(content["seed"]) is not int:
                raise ValueError("it lacks a setting, or has one too many")
            settings = {name: content[name] for name in OF_A_FOREST}
            self.config = replace(SMALL, **settings | {"domains": tuple(content["domains"])})
            self.seed = content["seed"]
            with torch.device("meta"):  # no memory is spent on the weights
                state = make_model(self.config, "").state_dict()
        except (ValueError, TypeError, RecursionError, RuntimeError) as error:
            raise UsageError(f"{mark} is damaged ({error})") from error
        self.shapes = {name: (tuple(tensor.shape), "float32") for name, tensor in state.items()}
        self.digest = common.digest(content)[:12]

    @classmethod
    def create(cls, path: Path, config: Config, seed: int) -> "Forest":
        """Make an empty forest, or open the one that is there. UsageError: it was made otherwise."""
        if not (path / "forest.json").exists():
            settings = {name: getattr(config, name) for name in OF_A_FOREST}
            common.write_json(path / "forest.json", {"seed": seed, **settings})
        forest = cls(path)
        forest.refuse_others(config, seed, OF_A_FOREST)
        return forest

    def refuse_others(self, config: Config, seed: int | None, names: Iterable[str]) -> None:
        """UsageError when one of these settings is not the forest's own."""
        pairs = {name: (getattr(self.config, name), getattr(config, name)) for name in names}
        if seed is not None:
            pairs["seed"] = (self.seed, seed)
        for name, (own, other) in pairs.items():
            if own != other:
                made = f"{self.path} was made with {name} = {common.as_typed(own)}"
                raise UsageError(f"{made}, not {common.as_typed(other)}")

    def file(self, name: str) -> Path:
        """Raises ValueError for a name that leads elsewhere."""
        if name == "seed":
            return self.path / "seed.npz"
        text_data.check_name(name)
        return self.path / "experts" / f"{name}.npz"

    def names(self) -> list[str]:
        """Who is in the folder: the first round in its order, then the others by name."""
        there = sorted(path.stem for path in self.path.glob("experts/[!.]*.npz"))
        first = [name for name in self.config.own if name in there]
        return first + [name for name in there if name not in first]

    def add(self, path: Path, model: nn.Module, meta: dict) -> None:
        common_to_all = {"name": path.stem, "forest": self.digest}
        arrays.save_arrays(path, model.state_dict(), {**meta, **common_to_all})

    def load(self, path: Path) -> tuple[dict[str, Tensor], dict]:
        """(state, meta). Raises ValueError in one line that begins with the expert's name."""
        try:
            room = sum(4 * math.prod(shape) + 1024 for shape, _ in self.shapes.values()) + 65_536
            if path.stat().st_size > room:
                raise ValueError("it is larger than this architecture needs")
            state, meta = arrays.load_arrays(path, self.shapes)
            if not isinstance(meta, dict) or meta.get("name") != path.stem:
                raise ValueError("it was saved under another name")
            if meta.get("forest") != self.digest:
                raise ValueError("it was made for another forest")
            for parent, weight in meta["parents"].items():
                if not text_data.NAME.fullmatch(parent) or not 0 <= weight <= 1:
                    raise ValueError("it names impossible parents")
        except (ValueError, LookupError, TypeError, AttributeError, OSError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"{path.stem[:64]!r} refused: {reason}") from error
        return state, meta

    def model(self, path: Path) -> nn.Module:
        model = make_model(self.config, "")
        model.load_state_dict(self.load(path)[0])
        return model.eval()

    def states(self, names: Iterable[str]) -> Iterator[dict[str, Tensor]]:
        """One after another, so that one at a time is in memory."""
        for name in names:
            yield self.load(self.file(name))[0]

    def average(self, names: Sequence[str], weights: Tensor) -> nn.Module:
        model = make_model(self.config, "")
        model.load_state_dict(average_parameters(self.states(names), weights.tolist()))
        return model.eval()

    def sound(self, without: Iterable[str] = ()) -> dict[str, dict]:
        """{name: meta} of the experts that load; a line for each that is refused. UsageError: none."""
        for name in without:
            if name not in self.names():
                raise UsageError(f"{self.path}: there is no expert {name!r}")
        found = {}
        for name in self.names():
            if name not in without:
                try:
                    found[name] = self.load(self.file(name))[1]
                except ValueError as error:
                    say(f"{self.path}: {error}")
        if not found:
            raise UsageError(f"{self.path}: no expert to use; --stage expert trains one")
        return found


def load_trained(path: str | Path) -> nn.Module:
    """A language model in eval mode, on the CPU, from what a run or a stage left.

    path  a file of a forest: runs/btm-small/forest-seed0/experts/python.npz, its seed.npz, or an
          average of --average; or of another arm: runs/btm-small/arms/dense-seed0.pt
    Raises UsageError or ValueError: see Forest.load and common.load_trained.
    """
    path = Path(path)
    if path.suffix == ".npz":
        root = path.parent if path.stem == "seed" else path.parent.parent
        return Forest(root).model(path)
    return common.load_trained(path, Config, rebuild)


def rebuild(job: Job, state: dict) -> nn.Module:
    model = make_model(job.config, "")
    common.load_state(model, state, f"{job.label}.pt")
    return model


# --------------------------------------------------------------------------------------------------
# The experiment: seed, experts, and rivals that cost the same
# --------------------------------------------------------------------------------------------------

ARMS = ("dense", "btm", "random", "grow")  # systems; a system is a seed and one or several models
FEWER = ["btm@num_domains=2", "dense@num_domains=2", "btm@num_domains=4", "dense@num_domains=4"]
LESS_SEED = ["btm@seed_share=0.25", "btm@seed_share=0.5"]
DEFAULT = [*ARMS, *FEWER, *LESS_SEED]
UNSEEDED, LONGER, FROM_SEED = "btm@seed_share=0", "dense@steps=750", "grow@branch=seed"
MORE = [UNSEEDED, LONGER, FROM_SEED]


@functools.cache
def read_domain(name: str, root: Path) -> text_data.Split:
    return text_data.find_split(name, root / "btm")


def settings_of(arm: str, of_a_forest: bool = False) -> str:
    """ "grow@lr=0.1,branch=seed" -> "lr=0.1,branch=seed"; of_a_forest: "lr=0.1"."""
    changes = arm.partition("@")[2].split(",")
    kept = [change for change in changes if change.partition("=")[0] in OF_A_FOREST]
    return ",".join(kept if of_a_forest else changes)


def seed_of(arm: str) -> str:
    return "@".join(filter(None, ["seed", settings_of(arm, of_a_forest=True)]))


def models_of(arm: str, config: Config) -> list[str]:
    """The arms that a system branches from its seed: ["expert@domain=python", ...]."""
    method, config = arm.partition("@")[0], common.arm_config(config, arm)
    if method == "dense":
        return [arm]
    kind = "shard" if method == "random" else "expert"
    found = []
    for name in config.novel if method == "grow" else config.own:
        found.append(f"{kind}@" + ",".join(filter(None, [settings_of(arm), f"domain={name}"])))
    return found


def forest_of(job: Job) -> Forest:
    """The forest of a stage, or of the system that an arm belongs to."""
    suffix = seed_of(job.arm).removeprefix("seed")
    path = job.run.actions.get("forest", job.run.out / f"forest-seed{job.seed}{suffix}")
    return Forest.create(path, job.config, job.seed)


def stream(data: Tensor, num: int, context: int, key: str) -> Callable[[int], Tensor]:
    """Batches [num, context + 1]: a function of key and step alone, whoever asks, anywhere."""
    first = zlib.crc32(key.encode()) << 28  # two keys are further apart than any run has steps

    def batch(step: int) -> Tensor:
        generator = torch.Generator().manual_seed(first + step)
        return text_data.sample_windows(data, num, context + 1, generator)

    return batch


def domain_batches(job: Job, name: str) -> Callable[[int], Tensor]:
    data, config = read_domain(name, job.run.data_dir).train, job.config
    return stream(data, config.blocks_per_domain, config.context, f"{job.seed} {name}")


def mixed_batches(job: Job) -> Callable[[int], Tensor]:
    """Equally many blocks of every domain: the very ones that its expert would read."""
    streams = [domain_batches(job, name) for name in job.config.own]

    def batch(step: int) -> Tensor:
        return torch.stack([batches(step) for batches in streams], dim=1).flatten(0, 1)

    return batch


def random_batches(job: Job) -> Callable[[int], Tensor]:
    """The control: as many blocks as an expert reads, of its share of domains drawn at random."""
    config = job.config
    index, num, k = config.own.index(config.domain), config.blocks_per_domain, len(config.own)
    streams = []
    for number, name in enumerate(config.own):
        part = shard(read_domain(name, job.run.data_dir).train, index, k)
        streams.append(stream(part, num, config.context, f"{job.seed} random {index} {number}"))
    which = stream(torch.arange(k), num, 0, f"{job.seed} which {index}")

    def batch(step: int) -> Tensor:
        of_all = torch.stack([batches(step) for batches in streams])  # [k, num, context + 1]
        return of_all[which(step)[:, 0], torch.arange(num)]

    return batch


def shard(data: Tensor, index: int, num_shards: int) -> Tensor:
    return data[len(data) * index // num_shards : len(data) * (index + 1) // num_shards]


class Start(NamedTuple):
    """What training begins with."""

    model: nn.Module
    lr: float
    updates: range  # those to make
    schedule: int  # updates from warm-up to zero
    parents: dict[str, float]  # {expert: its weight in the initial parameters}


def branch(job: Job, forest: Forest) -> Start:
    """A seed from scratch, the first round from the seed, a later one from those that are there."""
    config, domain = job.config, job.config.domain
    in_round_one = job.method == "seed" or not domain or domain in config.own
    if not in_round_one:
        model, parents = branch_later(job, forest)
        steps = config.branch_steps
        return Start(model, config.branch_lr, range(steps), steps, parents)
    first, last = config.seed_steps, config.steps
    if job.method == "seed" or first == 0:
        model = make_model(config, f"{job.seed} {domain or 'seed'}").to(job.run.device)
        return Start(model, config.lr, range(first or last), last, {})
    if not forest.file("seed").exists():
        raise UsageError(f"{forest.path} has no seed yet; --stage seed comes first")
    model = forest.model(forest.file("seed")).to(job.run.device)
    return Start(model, config.lr, range(first, last), last, {"seed": 1.0})


def branch_later(job: Job, forest: Forest) -> tuple[nn.Module, dict[str, float]]:
    """An average of the experts, weighted by their posterior on the new domain's development text.

    The other values of `branch`: the likeliest expert alone, equal weights, the seed, none.
    """
    config, run = job.config, job.run
    if config.branch == "scratch":
        return make_model(config, f"{job.seed} scratch {config.domain}").to(run.device), {}
    names = list(config.own)  # in a run every new domain is added alone
    if "stage" in run.actions:
        names = [name for name in forest.sound() if name != config.domain]
    if config.branch == "seed":
        names = ["seed"]
    weights = torch.full((len(names),), 1 / len(names), dtype=torch.float64)
    if config.branch in ("posterior", "nearest"):
        weights = prior_of(forest, names, config.domain, config, run)
    if config.branch == "nearest":
        weights = top_k_prior(weights, 1)
    return forest.average(names, weights).to(run.device), dict(zip(names, weights.tolist()))


def train_model(job: Job) -> tuple[nn.Module, dict]:
    """Plain next-token loss on a domain, a shard or all domains: (model, what it cost).

    The model of a seed or of an expert goes into the forest, others stay with the run.
    """
    config, run, forest = job.config, job.run, forest_of(job)
    start = branch(job, forest)
    model = job.prepare(start.model)
    optimizer = common.adamw(model, start.lr, config.weight_decay)
    if start.updates.start:  # the seed's own run goes on: Adam's moments, and the schedule
        moments = common.load(forest.path / "seed-adam.pt", run.device)
        optimizer.load_state_dict(moments)
    if job.method == "shard":
        batches = random_batches(job)
    else:
        batches = domain_batches(job, config.domain) if config.domain else mixed_batches(job)
    rows = len(batches(start.updates.start))
    read = {}

    def counted(step: int) -> Tensor:
        windows = batches(step)
        read[step] = windows[:, 1:].numel()
        return windows.to(run.device)

    def loss_fn(windows: Tensor, step: int) -> tuple[Tensor, dict]:
        return common.lm_loss(model, windows).mean(), {}

    def schedule(step: int) -> float:  # fairseq sets the rate after each update
        return learning_rate_factor(max(1, step), start.schedule, config.warmup_share)

    job.train(
        model,
        loss_fn,
        start.schedule,
        batches=counted,
        start_step=start.updates.start,
        stop_step=start.updates.stop,
        optimizer=optimizer,
        schedule=schedule,
        clip=config.clip,
        accumulate=math.ceil(rows / config.micro_batch),
        on_step=lambda step: {"tokens": read.pop(step)},
    )
    cost = cost_of(job, model, counted(start.updates.start)[: config.micro_batch])
    meta = {"parents": start.parents, "domain": config.domain, **cost}
    if job.method == "seed":
        common.save(forest.path / "seed-adam.pt", optimizer.state_dict())
        forest.add(forest.file("seed"), model, meta)
    elif job.method == "expert" and config.branch == run.config.branch:
        split = read_domain(config.domain, run.data_dir)
        dev_bits = bits(-score(model, "dev", config.domain, config, run))
        meta |= {"data": split.digest, "dev_bits": dev_bits}
        forest.add(forest.file(config.domain), model, meta)
    else:
        common.save(job.path(".pt"), model.state_dict())
    return model, cost


def cost_of(job: Job, model: nn.Module, some: Tensor) -> dict:
    """Tokens as they were read, FLOPs of the operators that some rows ran."""
    counts = [int(line["tokens"]) for line in job.log()]
    flops = common.count_flops(lambda: common.lm_loss(model, some).mean().backward())["Global"]
    model.zero_grad(set_to_none=True)
    return {
        "updates": len(counts),
        "tokens": sum(counts),
        "flops": flops * sum(counts) // some[:, 1:].numel(),
        "parameters": common.count_parameters(model),
    }


@torch.no_grad()
def score(model: nn.Module, part: str, name: str, config: Config, run: Run) -> Tensor:
    """log p of every token of a domain's "dev" or "test" blocks: [N, context] fp32, on the CPU."""
    num = config.dev_blocks if part == "dev" else config.test_blocks
    text = getattr(read_domain(name, run.data_dir), part)
    windows, model = text_data.spread_windows(text, config.context, num), model.eval()
    found = []
    for some in windows.split(64):
        found.append(-common.lm_loss(model, some.to(run.device)).cpu())
    return torch.cat(found)


def bits(nll: Tensor) -> float:
    """Nats -> bits a token, the mean."""
    return float(nll.double().mean()) / math.log(2)


def prior_of(forest: Forest, names: Sequence[str], domain: str, config: Config, run: Run) -> Tensor:
    """p(expert) on the development text of a domain; one model at a time is in memory."""
    said = []
    for name in names:
        model = forest.model(forest.file(name)).to(run.device)
        said.append(score(model, "dev", domain, config, run))
    return cached_prior(torch.stack(said), blocks=config.dev_blocks)


def mixtures(dev: Tensor, test: Tensor, config: Config) -> dict[str, float]:
    """Bits of every way to mix E experts on one domain, from log-probabilities [E, N, T]."""
    prior = cached_prior(dev, blocks=config.dev_blocks)
    moving = cached_prior(dev, blocks=config.dev_blocks, rate=0.3)
    found = {
        "eq2": ensemble_nll(test, prior.log())[0],
        "last": ensemble_nll(test, prior.log(), window=1)[0],
        "released": released_nll(test, released_prior(dev)),
        "moving": ensemble_nll(test, moving.log())[0],
    }
    for k in (1, 2):
        found[f"top{k}"] = ensemble_nll(test, top_k_prior(prior, min(k, len(prior))).log())[0]
    return {rule: bits(nll) for rule, nll in found.items()}


def scored(arm: str, config: Config) -> tuple[str, ...]:
    """The domains that a system is compared on: its own, and if it is none of a curve the novel."""
    is_plain = not settings_of(arm, of_a_forest=True)
    own = common.arm_config(config, arm).own
    return (*own, *config.novel) if is_plain else own


def train_arm(job: Job) -> dict:
    """train_model; the log-probability of every token is kept: read once, mixed in many ways."""
    model, result = train_model(job)
    said, config, run = {}, job.config, job.run
    names = scored(job.arm, run.config)
    for name in names:
        for part in ("dev", "test"):
            said[f"{part} {name}"] = score(model, part, name, config, run)
    common.save(job.path("-said.pt"), said)
    result["bits"] = [bits(-said[f"test {name}"]) for name in names]
    return result


class Said:
    """What the models of a system said: said("dev", "python") -> [E, N, T]."""

    def __init__(self, job: Job, arms: Sequence[str]):
        self.models = [common.load(job.other(arm).path("-said.pt")) for arm in arms]

    def __call__(self, part: str, name: str) -> Tensor:
        return torch.stack([said[f"{part} {name}"] for said in self.models])


def merge(job: Job) -> dict:
    """A system on every domain: {rule: bits [domains]}. Nothing is trained any more."""
    config = job.config
    said = Said(job, models_of(job.arm, job.run.config))
    result: dict[str, list] = {}
    for name in scored(job.arm, job.run.config):
        dev, test = said("dev", name), said("test", name)
        for rule, value in mixtures(dev, test, config).items():
            result.setdefault(rule, []).append(value)
    return result | (inspect_forest(job, said) if job.method == "btm" else {})


def inspect_forest(job: Job, said: Said) -> dict:
    """Whom it believes, its averages, and what becomes of it without each of its experts."""
    config, run, forest = job.config, job.run, forest_of(job)
    names, experts = scored(job.arm, run.config), len(config.own)
    equal = torch.full((experts,), 1 / experts, dtype=torch.float64)
    uniform = forest.average(config.own, equal).to(run.device)
    result: dict[str, list] = {"uniform": [], "posterior": [], "weights": []}
    for name in names:
        dev, test = said("dev", name), said("test", name)
        prior = cached_prior(dev, blocks=config.dev_blocks)
        weights = ensemble_nll(test, prior.log())[1].mean(dim=(1, 2))
        result["weights"].append(weights.tolist())
        average = forest.average(config.own, prior).to(run.device)
        for kind, model in (("uniform", uniform), ("posterior", average)):
            result[kind].append(bits(-score(model, "test", name, config, run)))
    result["without"] = []  # [expert removed, domains]
    for removed in range(experts):
        kept = [expert for expert in range(experts) if expert != removed]
        found = [
            mixtures(said("dev", name)[kept], said("test", name)[kept], config) for name in names
        ]
        result["without"].append([one["eq2"] for one in found])
    return result


def merge_grown(job: Job) -> dict:
    """Every new expert put beside those of the first round, alone: {"eq2": [new, domains]}."""
    config = job.config
    plain = "@".join(filter(None, ["btm", settings_of(job.arm, of_a_forest=True)]))
    experts = models_of(plain, job.run.config)
    result: dict[str, list] = {"eq2": [], "alone": []}
    for number, arm in enumerate(models_of(job.arm, job.run.config)):
        said, row = Said(job, [*experts, arm]), []
        for name in scored(job.arm, job.run.config):
            prior = cached_prior(said("dev", name), blocks=config.dev_blocks)
            row.append(bits(ensemble_nll(said("test", name), prior.log())[0]))
        result["eq2"].append(row)
        result["alone"].append(job.other(arm).result()["bits"][len(config.own) + number])
    return result


# --------------------------------------------------------------------------------------------------
# Claims. The paper's tables could not be read; its abstract, and a few numbers, could.
# --------------------------------------------------------------------------------------------------

PPL = "perplexity 19.8 against 22.5 (125M, mean of all 16 domains)"
SHARES = (0.25, 0.5)  # of the seed, beside the config's
COUNTS = (2, 4)  # of domains, beside all


def with_share(share: float, config: Config) -> str:
    return "btm" if share == config.seed_share else f"btm@seed_share={share:g}"


def with_count(method: str, count: int, config: Config) -> str:
    return method if count == len(config.own) else f"{method}@num_domains={count}"


def shares(config: Config) -> list[float]:
    return sorted({*SHARES, config.seed_share})


def counts(config: Config) -> list[int]:
    return [count for count in COUNTS if count < len(config.own)] + [len(config.own)]


def perplexity(bits_by_domain: np.ndarray) -> float:
    """Per token, the mean over domains (and seeds), as in the paper's tables."""
    return float(np.mean(2.0**bits_by_domain))


def gains(
    results: Results, config: Config, rule: str, where: str, better: str = "btm"
) -> np.ndarray:
    """[seeds, domains]: bits by which a rule is below the dense LM, in the domain or on novel ones."""
    gain = results.of("dense", "bits") - results.of(better, rule)
    k = len(config.own)
    return gain[:, :k] if where == "in" else gain[:, k:]


def by_the_worst(values: np.ndarray, names: Sequence[str]) -> tuple[np.ndarray, str]:
    """Of values [seeds, names] the column of the smallest mean, and its name."""
    worst = int(values.mean(axis=0).argmin())
    return values[:, worst], names[worst]


@claim("at equal cost the forest beats the dense LM on every training domain", paper=PPL,
       required=True)  # fmt: skip
def in_domain(results: Results, config: Config) -> Margin:
    """By its weakest domain."""
    gain, k = gains(results, config, "eq2", "in"), len(config.own)
    weakest, name = by_the_worst(gain, config.own)
    dense, forest = results.of("dense", "bits")[:, :k], results.of("btm", "eq2")[:, :k]
    text = f"{show(weakest)} bits/byte on {name}, the weakest; mean {show(gain.mean(axis=1))}: "
    text += f"perplexity {perplexity(forest):.2f} against {perplexity(dense):.2f}"
    return Margin(weakest, text, {"mean": gain.mean(axis=1)})


@claim("... and, in the mean, on domains that no expert was trained on", paper=PPL, required=True)
def out_of_domain(results: Results, config: Config) -> Margin:
    """The mean over domains, which the paper's tables have; the weakest domain is named."""
    gain = gains(results, config, "eq2", "novel")
    weakest, name = by_the_worst(gain, config.novel)
    others = {rule: gains(results, config, rule, "novel").mean(axis=1) for rule in RIVAL_RULES}
    text = f"{show(gain.mean(axis=1))} bits/byte; weakest {name}, {show(weakest)}; "
    text += ", ".join(f"{RULES[rule]} {show(value)}" for rule, value in others.items())
    return Margin(gain.mean(axis=1), text, {"weakest": weakest, **others})


@claim("random splits of the data do not do: their ensemble loses to the dense LM on training "
       "domains, and to the forest there and on novel ones", required=True)  # fmt: skip
def random_split(results: Results, config: Config) -> Margin:
    """The weakest of three leads, each against the random split's better rule."""
    leads = {}
    for rule in ("eq2", "last"):
        behind_dense = -gains(results, config, rule, "in", "random").mean(axis=1)
        leads[f"dense, {rule}"] = behind_dense
        for where in ("in", "novel"):
            random = gains(results, config, rule, where, "random").mean(axis=1)
            forest = gains(results, config, rule, where).mean(axis=1)
            leads[f"forest, {where}, {rule}"] = forest - random
    weakest = min(leads, key=lambda name: leads[name].mean())
    text = "bits/byte behind the " + "; ".join(
        f"{name} {show(lead)}" for name, lead in leads.items()
    )
    return Margin(leads[weakest], text, leads)


@claim("averaged by posterior into one LM it still beats the dense LM on every training domain",
       required=True)  # fmt: skip
def posterior_average(results: Results, config: Config) -> Margin:
    """By its weakest domain."""
    gain = gains(results, config, "posterior", "in")
    weakest, name = by_the_worst(gain, config.own)
    novel = gains(results, config, "posterior", "novel").mean(axis=1)
    text = f"{show(weakest)} bits/byte on {name}, the weakest; mean {show(gain.mean(axis=1))}; "
    text += f"novel domains {show(novel)}"
    return Margin(weakest, text, {"mean": gain.mean(axis=1), "novel": novel})


@claim("the gain is robust to the initialisation: a seed of a quarter, a half and three quarters "
       "of the compute", required=True)  # fmt: skip
def robust_to_seed(results: Results, config: Config) -> Margin:
    """The share with the smallest gain over the dense LM, mean of the training domains."""
    found = gains_by_share(results, config)
    weakest = min(found, key=lambda share: found[share].mean())
    text = ", ".join(f"{share:g}: {show(gain)}" for share, gain in found.items())
    return Margin(found[weakest], f"bits/byte gained, by share of the seed, {text}", named(found))


@claim("the gain over the dense LM grows with the number of domains", required=True)
def more_domains(results: Results, config: Config) -> Margin:
    """On the same first domains, so that easier ones do not count; the smaller step."""
    found = gains_by_count(results, config)
    grown = list(found.values())
    if len(grown) < 2:
        raise common.Missing("more than two domains")
    steps = [more - fewer for fewer, more in zip(grown, grown[1:])]
    listed = " and ".join(config.own[: min(found)])
    text = ", ".join(f"{show(gain)} with {count}" for count, gain in found.items())
    return Margin(min(steps, key=np.mean), f"bits/byte gained on {listed}: {text}", named(found))


@claim("an added or removed expert changes its own domain only: others by less than a tenth",
       required=True)  # fmt: skip
def add_remove(results: Results, config: Config) -> Margin:
    """The worst of all experts that can be added or removed, and of all other domains."""
    found = {change: own / 10 - other for change, (own, other, _) in moves(results, config).items()}
    return worst_change(found, results, config)


@claim("... its own domain most: an expert is worth more there than anywhere else")
def coverage(results: Results, config: Config) -> Margin:
    """The worst likewise."""
    found = {change: own - other for change, (own, other, _) in moves(results, config).items()}
    return worst_change(found, results, config)


@claim("averaged with equal weights it loses to the dense LM on the training domains")
def uniform_average(results: Results, config: Config) -> Margin:
    margin = -gains(results, config, "uniform", "in").mean(axis=1)
    return Margin(margin, f"{show(margin)} bits/byte worse than dense")


@claim("two experts a domain do nearly as well as all: within 1 %, also on novel domains")
def topk(results: Results, config: Config) -> Margin:
    """The weaker of training and novel domains."""
    margins, parts = [], []
    for where in ("in", "novel"):
        lost = gains(results, config, "eq2", where) - gains(results, config, "top2", where)
        lost, whole = lost.mean(axis=1), results.of("btm", "eq2")
        k = len(config.own)
        whole = (whole[:, :k] if where == "in" else whole[:, k:]).mean(axis=1)
        margins.append(0.01 * whole - lost)
        parts.append(f"{where} {show(100 * lost / whole, 2)} %")
    return Margin(min(margins, key=np.mean), f"bits/byte lost: {', '.join(parts)}")


@claim("the plain mean is a better cached prior than the moving average", paper="0.3 on the new")
def plain_prior(results: Results, config: Config) -> Margin:
    """The weaker of training and novel domains."""
    margins = []
    for where in ("in", "novel"):
        gain = gains(results, config, "eq2", where) - gains(results, config, "moving", where)
        margins.append(gain.mean(axis=1))
    text = f"{show(margins[0])} bits/byte in domain, {show(margins[1])} on novel domains"
    return Margin(min(margins, key=np.mean), text)


@claim("experts without a common seed cannot be averaged")
def averaging_needs_seed(results: Results, config: Config) -> Margin:
    margin = results.of(UNSEEDED, "uniform") - results.of("btm", "uniform")
    margin = margin[:, : len(config.own)].mean(axis=1)
    ensemble = gains(results, config, "eq2", "in", UNSEEDED).mean(axis=1)
    text = f"{show(margin)} bits/byte worse (equal weights); their ensemble gains {show(ensemble)}"
    return Margin(margin, text)


@claim("the forest matches a dense LM that had a quarter more compute",
       paper="2.5 times the compute (64 domains, 22.4B parameters in all)")  # fmt: skip
def compute(results: Results, config: Config) -> Margin:
    margin = results.of(longer(config), "bits") - results.of("btm", "eq2")
    margin = margin[:, : len(config.own)].mean(axis=1)
    return Margin(margin, f"{show(margin)} bits/byte better on the training domains")


@claim("a new expert does better from the posterior average than from the seed, in every domain")
def branch_init(results: Results, config: Config) -> Margin:
    """By the weakest new domain."""
    gain = results.of(FROM_SEED, "alone") - results.of("grow", "alone")
    weakest, name = by_the_worst(gain, config.novel)
    text = f"{show(weakest)} bits/byte on {name}, the weakest; mean {show(gain.mean(axis=1))}"
    return Margin(weakest, text)


@check("seed and experts cost what the dense LM costs, in tokens and FLOPs")
def cost_matched(results: Results, config: Config) -> Check:
    parts, passed = [], True
    for key in ("tokens", "flops"):
        spent = {}
        for system in ("dense", "btm", "random"):
            models = models_of(system, config)
            spent[system] = [sum(results[arm][seed][key] for arm in models)
                             for seed in range(len(results["dense"]))]  # fmt: skip
        passed = passed and spent["dense"] == spent["btm"] == spent["random"]
        seed = results["seed"][0][key]
        parts.append(f"{seed + spent['btm'][0]:,} {key} of {seed + spent['dense'][0]:,}")
    return Check(passed, "; ".join(parts))


def named(found: dict) -> dict[str, np.ndarray]:
    return {f"{key:g}": value for key, value in found.items()}


def gains_by_share(results: Results, config: Config) -> dict[float, np.ndarray]:
    """{share of the seed: bits gained over the dense LM on training domains [seeds]}."""
    found = {}
    for share in shares(config):
        arm = with_share(share, config)
        found[share] = gains(results, config, "eq2", "in", arm).mean(axis=1)
    return found


def gains_by_count(results: Results, config: Config) -> dict[int, np.ndarray]:
    """{number of domains: bits gained over a dense LM of the same domains, on the first few}."""
    found, first = {}, min(counts(config))
    for count in counts(config):
        dense = results.of(with_count("dense", count, config), "bits")
        forest = results.of(with_count("btm", count, config), "eq2")
        found[count] = (dense - forest)[:, :first].mean(axis=1)
    return found


Moves = dict[str, tuple[np.ndarray, np.ndarray, str]]


def moves(results: Results, config: Config) -> Moves:
    """{"+ licences": (bits gained there, largest change elsewhere, where)}, and "- python" lost."""
    before = results.of("btm", "eq2")  # [seeds, domains]
    names, found = scored("btm", config), {}
    for sign, after, changed in (
        ("+", results.of("grow", "eq2"), config.novel),  # [seeds, new, domains]
        ("-", results.of("btm", "without"), config.own),
    ):
        for number, name in enumerate(changed):
            own = names.index(name)
            change = after[:, number] - before
            others = np.delete(np.abs(change), own, axis=1)
            most = int(others.mean(axis=0).argmax())
            where = [other for other in names if other != name][most]
            found[f"{sign} {name}"] = (np.abs(change[:, own]), others[:, most], where)
    return found


def worst_change(margins: dict[str, np.ndarray], results: Results, config: Config) -> Margin:
    worst = min(margins, key=lambda change: margins[change].mean())
    own, other, where = moves(results, config)[worst]
    good = sum(margin.mean() > 0 for margin in margins.values())
    text = f"worst of {len(margins)} is {worst}: {show(own)} bits/byte there, {show(other)} on "
    return Margin(
        margins[worst], f"{text}{where}; {good} of {len(margins)} are so in the mean", margins
    )


# --------------------------------------------------------------------------------------------------
# Tables and picture
# --------------------------------------------------------------------------------------------------

RULES = {
    "eq2": "forest, eq. 2",
    "last": "forest, last token",
    "released": "forest, released scorer and prior",
    "moving": "forest, moving-average prior",
    "top1": "forest, best expert alone",
    "top2": "forest, two experts",
    "posterior": "average by posterior",
    "uniform": "average, equal weights",
}
RIVAL_RULES = ("last", "released")


def print_tables(results: Results, config: Config, run: Run) -> None:
    names, k = scored("btm", config), len(config.own)
    found = {arm: results.of(arm, "bits") for arm in ("seed", "dense") if arm in results}
    if "btm" in results:
        found |= {label: results.of("btm", rule) for rule, label in RULES.items()}
    if "random" in results:
        found["random split, eq. 2"] = results.of("random", "eq2")
        found["random split, last token"] = results.of("random", "last")
    rows = []
    for label, by_domain in found.items():
        row = [label]
        for group in (by_domain[:, :k], by_domain[:, k:]):
            row += [show(group.mean(axis=1), 3), f"{perplexity(group):.2f}"]
        rows.append(row + [f"{value:.3f}" for value in by_domain.mean(axis=0)])
    title = f"bits/byte and perplexity a byte on test text, {len(run.seeds)} seed(s): "
    title += "means over domains, then bits of each; novel ones have no expert"
    header = ["method", "in domain", "perplexity", "novel", "perplexity", *names]
    run.table(title, header, rows)

    if "btm" in results:
        weights = np.mean([result["weights"] for result in results["btm"]], axis=0)
        rows = [[name, *(f"{weight:.2f}" for weight in row)] for name, row in zip(names, weights)]
        title = "whom eq. 2 believes: mean weight of each expert, by test domain"
        run.table(title, ["", *config.own], rows)
    if {"btm", "grow"} <= results.keys():
        rows = []
        for change, (own, other, where) in moves(results, config).items():
            rows.append([change, show(own, 3), show(other, 3), where])
        title = "an expert more (+) or less (-): bits/byte that its own domain gains or loses"
        run.table(title, ["", "own domain", "largest change elsewhere", "where"], rows)
    others = [arm for arm in results if arm.partition("@")[0] in ("btm", "dense") and "@" in arm]
    rows = []
    for arm in others:
        by_domain = results.of(arm, "bits" if arm.startswith("dense") else "eq2")
        own = common.arm_config(config, arm).own
        rows.append([arm, show(by_domain[:, : len(own)].mean(axis=1), 3)])
    if rows:
        run.table("other systems: bits/byte in their domains", ["", "in domain"], rows)


def draw(results: Results, config: Config, run: Run) -> None:
    colors = dict(zip(("eq2", "last", "posterior"), common.COLORS))

    def by_domain(ax) -> None:
        for offset, rule in ((-0.2, "eq2"), (0.0, "last"), (0.2, "posterior")):
            gain = results.of("dense", "bits") - results.of("btm", rule)  # [seeds, domains]
            bars = [common.half_width(column) for column in gain.T] if len(gain) > 2 else None
            rows = np.arange(gain.shape[1]) + offset
            ax.errorbar(gain.mean(axis=0), rows, xerr=bars, fmt="o", color=colors[rule],
                        label=RULES[rule], markersize=4)  # fmt: skip
        ax.set_yticks(range(len(scored("btm", config))), scored("btm", config))
        ax.invert_yaxis()
        ax.axvline(0, color="0.7", zorder=0)
        ax.axhline(len(config.own) - 0.5, color="0.7", linestyle=":")
        ax.set(xlabel="bits/byte gained over the dense LM", title="by domain; below: novel ones")

    def by_count(ax) -> None:
        found = gains_by_count(results, config)
        values = np.stack(list(found.values()), axis=1)  # [seeds, counts]
        common.curve(ax, list(found), values, RULES["eq2"], colors["eq2"])
        first = " and ".join(config.own[: min(found)])
        ax.set(
            xlabel="domains", ylabel="bits/byte gained", title=f"gain on {first}", ylim=(0, None)
        )

    def by_share(ax) -> None:
        found = gains_by_share(results, config)
        values = np.stack(list(found.values()), axis=1)
        common.curve(ax, list(found), values, RULES["eq2"], colors["eq2"])
        average = [results.of("dense", "bits") - results.of(with_share(share, config), "posterior")
                   for share in found]  # fmt: skip
        average = np.stack([gain[:, : len(config.own)].mean(axis=1) for gain in average], axis=1)
        common.curve(ax, list(found), average, RULES["posterior"], colors["posterior"])
        title = "gain in domain, by the seed's share of compute"
        ax.set(xlabel="share", ylabel="bits/byte gained", title=title)
        ax.axhline(0, color="0.7", zorder=0)

    def believed(ax) -> None:
        chosen = [config.own[0], config.own[-1]]
        for name, weights in zip(config.own, changing_text(config, run, chosen)):
            ax.plot(weights, label=f"expert {name}")
        title = f"whom eq. 2 believes: {chosen[0]}, then {chosen[1]}"
        ax.set(xlabel="byte of a text", ylabel="weight", title=title)

    panels = []
    if {"dense", "btm"} <= results.keys():
        panels = [by_domain, believed]
        needed = {with_count(method, count, config)
                  for method in ("dense", "btm") for count in counts(config)}  # fmt: skip
        panels += [by_count] if needed <= results.keys() else []
        needed = {with_share(share, config) for share in shares(config)}
        panels += [by_share] if needed <= results.keys() else []
    if panels:
        run.plot(panels, width=5.0, height=4.2)


@torch.no_grad()
def changing_text(config: Config, run: Run, chosen: Sequence[str]) -> np.ndarray:
    """Weights [E, bytes] along a context that changes its domain half-way, mean of eight texts."""
    half, num = config.context // 2, 8
    parts = []
    for name in chosen:
        test = read_domain(name, run.data_dir).test
        parts.append(test[: num * half].long().view(num, half))
    forest = forest_of(Job(run, "btm", run.seed))
    ensemble = Ensemble([forest.model(forest.file(name)) for name in config.own])
    ensemble(torch.cat(parts, dim=1))
    return ensemble.weights.mean(dim=1).numpy()


# --------------------------------------------------------------------------------------------------
# Stages: the same as separate commands, with nothing in common but the forest's folder
# --------------------------------------------------------------------------------------------------

ACTIONS = {  # the script's own commands; see common.FLAGS
    "stage": ("", ("seed", "expert", "eval"), "one part of a run, on a forest"),
    "forest": (Path(), "DIR", "the forest; default: the one of the run in --out"),
    "domain_index": (0, "I", "the domain of --stage expert by number, for job arrays"),
    "without": ("", "NAMES", "experts that --stage eval, --sample and --average leave out"),
    "force": (False, None, "with --stage: train again what is there already"),
    "top_k": (0, "K", "experts that --stage eval keeps a domain; the others are not run"),
    "sample": ("", "TEXT", "go on writing TEXT with the ensemble, or with --model"),
    "sample_bytes": (160, "N", "bytes that --sample writes"),
    "model": (Path(), "FILE", "one model of a forest for --sample"),
    "average": ("", ("uniform", "posterior"), "save all experts as one; posterior: on --domain"),
    "prepare": (
        Path(),
        "PATH",
        "make domains of a file or folder; without --domain by Pile labels",
    ),
}
ANYWHERE = {
    "full",
    "device",
    "dtype",
    "threads",
    "data_dir",
    "resume",
    "traceback",
    "forest",
    "out",
}
TRAINS = {"workers", "compile", "force", "micro_batch"}
MAY_HAVE = {  # what may be given with a command, beside ANYWHERE and the forest's own settings
    "seed": {"tokens", *TRAINS},
    "expert": {
        "domain",
        "domain_index",
        "branch",
        "branch_steps",
        "branch_lr",
        "dev_blocks",
        *TRAINS,
    },
    "eval": {"without", "top_k", "domain", "novel", "dev_blocks", "test_blocks"},
    "sample": {"sample_bytes", "without", "model"},
    "average": {"domain", "without", "dev_blocks"},
    "prepare": {"domain"},
}


def act(config: Config, run: Run) -> None:
    """The command that was given, instead of a whole run."""
    given = [name for name in ("stage", "sample", "average", "prepare") if name in run.actions]
    if len(given) != 1:
        flags = ", ".join(common.flag(name) for name in run.actions)
        raise UsageError(f"{flags}: goes with one of --stage, --sample, --average, --prepare")
    command = run.actions["stage"] if given == ["stage"] else given[0]
    of_a_forest = {"seed", *OF_A_FOREST} if command != "prepare" else set()
    idle = set(run.given) - ANYWHERE - MAY_HAVE[command] - of_a_forest - set(given)
    if idle:
        what = "--stage " + command if given == ["stage"] else common.flag(command)
        raise UsageError(f"{common.flag(min(idle))} does nothing with {what}")
    if command == "prepare":
        return prepare(config, run)
    path = run.actions.setdefault("forest", run.out / f"forest-seed{run.seed}")
    if command == "seed":
        run.config = check_data(config, run)
        forest = Forest.create(path, run.config, run.seed)
        return train_here(["seed"], [forest.file("seed")], forest, run)
    forest = Forest(path)
    seed = run.seed if "seed" in run.given else None
    forest.refuse_others(config, seed, [name for name in OF_A_FOREST if name in run.given])
    own = {name: getattr(forest.config, name) for name in OF_A_FOREST}
    run.config, run.seeds = replace(config, **own), [forest.seed]
    commands = {"expert": train_experts, "eval": evaluate, "sample": write, "average": save_average}
    return commands[command](forest, run.config, run)


def train_experts(forest: Forest, config: Config, run: Run) -> None:
    """--stage expert: one by --domain or --domain-index, or all of the first round."""
    names, index = list(config.own), run.actions.get("domain_index")
    if index is not None and config.domain:
        raise UsageError("--domain and --domain-index exclude each other")
    if index is not None and not 0 <= index < len(names):
        raise UsageError(f"--domain-index is {index}; it counts the {len(names)} domains from 0")
    if index is not None:
        names = [names[index]]
    if config.domain:
        names = [config.domain]
    own = {"branch", "branch_steps", "branch_lr", "dev_blocks"} & set(run.given)
    if own and names[0] in config.own:
        goes_on = "an expert of the first round goes on with the seed's schedule"
        raise UsageError(f"{common.flag(min(own))} does nothing for {names[0]}: {goes_on}")
    run.config = replace(config, domain="")
    arms = [f"expert@domain={name}" for name in names]
    train_here(arms, [forest.file(name) for name in names], forest, run)


def train_here(arms: Sequence[str], files: Sequence[Path], forest: Forest, run: Run) -> None:
    """Train what is not there yet, `workers` at a time; unfinished work stays in FOREST/work."""
    run.out = forest.path / "work"
    (run.out / "arms").mkdir(parents=True, exist_ok=True)
    todo = []
    for arm, file in zip(arms, files):
        if file.exists() and "force" not in run.actions:
            say(f"{file} is there already; --force trains it again")
        else:
            todo.append((Job(run, arm, forest.seed), train_part))
    if min(run.workers, len(todo)) > 1:
        common.train_in_processes(run, todo)
    else:
        for job, train in todo:
            job.do(train)
    for job, _ in todo:
        name = job.config.domain or "seed"
        _, meta = forest.load(forest.file(name))
        say(f"{forest.file(name)}: from {lineage(meta)}, {meta['tokens']:,} tokens")


def train_part(job: Job) -> dict:
    return train_model(job)[1]


def lineage(meta: dict) -> str:
    parents = meta["parents"].items()
    return (
        " + ".join(f"{weight:.2f} {name}" for name, weight in parents if weight >= 0.005)
        or "scratch"
    )


def evaluate(forest: Forest, config: Config, run: Run) -> None:
    """--stage eval: every domain whose text is here, by every expert that loads, one at a time."""
    top_k, without = run.actions.get("top_k", 0), split_names(run)
    metas = forest.sound(without)
    experts = list(metas)
    if not 0 <= top_k <= len(experts):
        raise UsageError(f"--top-k is {top_k}; there are {len(experts)} experts, 0 keeps all")
    rows = []
    for name, meta in metas.items():
        rows.append(
            [name, lineage(meta), meta.get("updates", ""), f"{meta.get('dev_bits', 0):.3f}"]
        )
    run.table(f"lineage of {forest.path}", ["", "branched from", "updates", "dev bits/byte"], rows)

    texts = []
    for name in dict.fromkeys(
        [*scored("btm", config), *forest.names(), *filter(None, [config.domain])]
    ):
        try:
            read_domain(name, run.data_dir)
            texts.append(name)
        except FileNotFoundError as missing:
            say(f"no row for {name}: {missing}")
    said = {part: {name: [] for name in texts} for part in ("dev", "test")}
    priors: dict[str, Tensor] = {}
    for part in said:
        for number, expert in enumerate(experts):
            model = forest.model(forest.file(expert)).to(run.device)
            for name in texts:
                if part == "dev" or priors[name][number] > 0:
                    said[part][name].append(score(model, part, name, config, run))
        for name in texts if part == "dev" else []:
            prior = cached_prior(torch.stack(said["dev"][name]), blocks=config.dev_blocks)
            priors[name] = top_k_prior(prior, top_k or len(experts))

    rows, believed = [], []
    for name, prior in priors.items():
        kept = prior.nonzero()[:, 0]
        dev, test = torch.stack(said["dev"][name])[kept], torch.stack(said["test"][name])
        nll, weights = ensemble_nll(test, prior[kept].log())
        average = forest.average(experts, prior).to(run.device)
        others = [ensemble_nll(test, prior[kept].log(), window=1)[0]]
        others += [released_nll(test, released_prior(dev))]
        others += [-score(average, "test", name, config, run), -test[prior[kept].argmax()]]
        shown = [
            f"{bits(nll):.3f}",
            f"{2 ** bits(nll):.2f}",
            *(f"{bits(one):.3f}" for one in others),
        ]
        rows.append([name, *shown, len(kept)])
        share = torch.zeros_like(prior).index_copy(0, kept, weights.mean(dim=(1, 2)))
        believed.append([name, *(f"{weight:.2f}" for weight in share)])
    header = ["", "eq. 2", "perplexity", "last token", "released", "posterior average", "best expert",
              "passes a token"]  # fmt: skip
    run.table("bits/byte (and perplexity) on test text", header, rows)
    run.table("whom eq. 2 believes: mean weight, by test domain", ["", *experts], believed)


def split_names(run: Run) -> list[str]:
    return [name for name in run.actions.get("without", "").split(",") if name]


def save_average(forest: Forest, config: Config, run: Run) -> None:
    """--average: all experts as one model, which load_trained and --sample --model read."""
    kind, names = run.actions["average"], list(forest.sound(split_names(run)))
    if (kind == "posterior") != bool(config.domain):
        raise UsageError(
            "--average posterior goes with --domain, whose text it is for; uniform without"
        )
    weights = torch.full((len(names),), 1 / len(names), dtype=torch.float64)
    if kind == "posterior":
        weights = prior_of(forest, names, config.domain, config, run)
    path = forest.path / "averages" / f"{config.domain or kind}.npz"
    parents = dict(zip(names, weights.tolist()))
    forest.add(path, forest.average(names, weights), {"parents": parents})
    say(f"{path}: {lineage({'parents': parents})}")


def write(forest: Forest, config: Config, run: Run) -> None:
    """--sample: go on with a text, and show whom the ensemble believes as it does."""
    if config.vocab_size != 256:
        raise UsageError("--sample writes bytes; this forest was trained on token ids")
    if "model" in run.actions:
        names, models = [run.actions["model"].stem], [load_trained(run.actions["model"])]
    else:
        names = list(forest.sound(split_names(run)))
        models = [forest.model(forest.file(name)) for name in names]
    ensemble = Ensemble(models).to(run.device)
    prompt = torch.tensor([0, *run.actions["sample"].encode()], device=run.device)
    generator = torch.Generator().manual_seed(run.seed)
    count = run.actions.get("sample_bytes", 160)
    tokens = common.generate(ensemble, prompt, count, config.context, generator=generator)
    text = bytes(tokens[1:].tolist()).decode("utf-8", "replace")
    say("".join(char if char.isprintable() or char in "\n\t" else "\ufffd" for char in text))
    if len(models) == 1:
        return
    rows = []
    with torch.no_grad():
        for last in range(16, len(tokens), 16):
            ensemble(tokens[None, max(0, last + 1 - config.context) : last + 1])
            part = bytes(tokens[last - 15 : last + 1].tolist()).decode("latin-1")
            weights = ensemble.weights[:, 0, -1].tolist()
            rows.append([repr(part), *(f"{weight:.2f}" for weight in weights)])
    run.table("whom eq. 2 believes after these bytes", ["text", *names], rows)


def prepare(config: Config, run: Run) -> None:
    """--prepare: a domain of one's own, or those of the Pile by their labels."""
    root = run.data_dir / "btm"
    sizes, labels = text_data.prepare(run.actions["prepare"], root, config.domain)
    rows = [
        [name, *(f"{parts[part]:,}" for part in text_data.PARTS)] for name, parts in sizes.items()
    ]
    run.table(f"bytes written to {root}", ["domain", *text_data.PARTS], rows)
    lacking = [label for label, name in text_data.PILE.items() if name not in sizes]
    if labels and lacking:
        say(f"too little of {', '.join(lacking)}; labels found: {', '.join(map(repr, labels))}")


# --------------------------------------------------------------------------------------------------
# main
# --------------------------------------------------------------------------------------------------


def longer(config: Config) -> str:
    return f"dense@steps={round(1.25 * config.steps)}"


def check_data(config: Config, run: Run) -> Config:
    """Read every text once; settle vocabulary and steps. Raises ValueError before anything is written."""
    splits = {}
    for name in scored("btm", config):
        try:
            splits[name] = read_domain(name, run.data_dir)
        except FileNotFoundError as missing:
            if not run.dry_run:
                raise
            say(f"{missing}; the cost below is that of a text of bytes")
    for name, split in splits.items():
        shortest = min(len(split.train) // len(config.own), len(split.dev), len(split.test))
        if shortest <= config.context:
            raise ValueError(f"domain {name!r} is too short for sequences of {config.context}")
        if split.note:
            say(split.note)
    sizes = {split.vocab_size for split in splits.values()} or {config.vocab_size}
    if len(sizes) > 1:
        found = ", ".join(f"{name} {split.vocab_size}" for name, split in splits.items())
        raise ValueError(f"vocabularies differ: {found}")
    run.data = {name: split.digest for name, split in splits.items()}
    config = replace(config, vocab_size=sizes.pop())
    if config.tokens is not None:
        update = len(config.own) * config.blocks_per_domain * config.context
        steps = int(config.tokens // update)
        if steps < 2:
            raise ValueError(f"{config.tokens:g} tokens are less than two updates of {update:,}")
        config = replace(config, steps=steps)
    return config


def rounds(arms: Sequence[str], config: Config) -> list[list[str]]:
    """Who must be there before whom: seeds, models of the first round, of later rounds."""
    seeds, first, later = [], [], []
    for arm in arms:
        if common.arm_config(config, arm).seed_steps:
            seeds.append(seed_of(arm))
        if arm.partition("@")[0] == "grow":
            later += models_of(arm, config)
            arm = "@".join(filter(None, ["btm", settings_of(arm, of_a_forest=True)]))
        first += models_of(arm, config)
    return [list(dict.fromkeys(some)) for some in (seeds, first, later)]


def sequences(arm: str, config: Config) -> int:
    """How many an arm reads in training."""
    config, method = common.arm_config(config, arm), arm.partition("@")[0]
    blocks = config.blocks_per_domain
    if method == "seed":
        return config.seed_steps * blocks * len(config.own)
    if config.domain in config.novel:
        return config.branch_steps * blocks
    width = len(config.own) if method == "dense" else 1
    return (config.steps - config.seed_steps) * blocks * width


def main(config: Config, run: Run) -> Results | None:
    if run.actions:
        return act(config, run)
    if config.domain:
        raise UsageError("--domain goes with one of --stage, --average, --prepare")
    run.config = config = check_data(config, run)
    default = list(ARMS)
    if run.scale == "small":
        default += [with_share(share, config) for share in shares(config)]
        default += [
            with_count(method, n, config) for n in counts(config) for method in ("dense", "btm")
        ]
    arms = run.choose(ARMS, default=default, more=[UNSEEDED, longer(config), FROM_SEED])
    waves = rounds(arms, config)

    model = make_model(config, "").to(run.device)
    slow = run.scale == "full" and run.device == "cpu"  # one sequence: a batch would take minutes
    rows = 1 if slow else min(config.micro_batch, len(config.own) * config.blocks_per_domain)
    windows = torch.arange(rows * (config.context + 1), device=run.device) % config.vocab_size
    windows = windows.view(rows, -1)  # what a step costs does not depend on the text

    def step() -> None:
        common.lm_loss(model, windows).mean().backward()

    total = sum(sequences(arm, config) for wave in waves for arm in wave) * len(run.seeds)
    text = f"{len(run.data)} domains {common.digest(run.data)[:12]}"
    run.plan(text, model, step, total / rows)
    for path in [] if run.resume else run.out.glob("forest-seed*"):
        shutil.rmtree(path)

    results = Results()
    for wave in waves:
        results |= run.train_arms(train_arm, wave)
    merged = [arm for arm in arms if arm.partition("@")[0] in ("btm", "random")]
    results |= run.train_arms(merge, merged)
    grown = [arm for arm in arms if arm.partition("@")[0] == "grow"]
    results |= run.train_arms(merge_grown, grown)
    print_tables(results, config, run)
    draw(results, config, run)
    say(f"\nthe forest is in {run.out / f'forest-seed{run.seed}'}; --sample 'def ' writes with it")
    return results


if __name__ == "__main__" and int(os.environ.get("RANK", 0)) == 0:
    # Experts never talk: under torchrun the first process trains as many at a time as it has
    # GPUs or cores, and the others are not needed.
    common.run(main, SMALL, FULL, actions=ACTIONS)
