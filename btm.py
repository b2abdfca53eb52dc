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

Run      python btm.py             seed, experts, their rivals, later rounds; no download
         python btm.py --ablate    curves over the seed's share and the domains; --seeds 8, --plot
         python btm.py --full      the paper's 125M model on the public parts of the Pile
     One part a command, on any machines, with nothing in common but a folder F:
         python btm.py --stage seed --forest F
         python btm.py --stage expert --forest F --domain-index 2      or --domain docs, or all
         python btm.py --stage eval --forest F --without unicode
     A stopped command goes on when given again. Your own domain, one model of all, a text:
         python btm.py --prepare ~/notes --domain notes
         python btm.py --stage expert --forest F --domain notes --branch-steps 300
         python btm.py --average posterior --forest F --domain notes
         python btm.py --sample "def " --model F/averages/notes.npz    or --forest F
You see  bits/byte and perplexity by domain and method, whom the posterior believes, the claims.
Found    (seeds 0-7, bits/byte) At equal cost the forest is 0.115 below the dense LM on its domains,
         0.050 on the weakest; averaged by posterior, one LM keeps 0.105 of it. On novel domains
         eq. 2 gains 0.014 ± 0.025 (it loses 0.062 on stubs), the last token alone 0.070 ± 0.027.
         Random splits lose 0.134 to it in domain; on novel ones that is undecided. To add an expert
         gains 0.19 to 1.07; to remove python's, or tests', docs', numpy's, is felt elsewhere, too.
         The curves have not been measured on several seeds.
Differences from the paper and its code (its tables could not be read)
1. The text defines eq. 2 over the whole prefix. The released scorer (DEMix) looks at the token
   before only, and gives all experts equal weights at the first token of a block: `released_nll`.
2. Our prior is the plain mean of the posterior over 100 development blocks. The released one is
   a moving average, 0.3 on the new, over last positions of 101 batches of 2, each under the
   prior so far; it forgets all but the last dozen: `released_prior`.
3. Experts read the very bytes that the dense LM reads of their domain at the same update, so that
   cost and data are equal by construction; the paper draws afresh after the branch.
4. In later rounds Adam starts afresh with its own warm-up: there are several parents.
5. Small scale: 2 layers, bytes, three quarters of the updates for the seed (the paper: one half).
6. To remove an expert removes what it learnt alone: the seed has read its domain, too.

Break it yourself (seeds 0-2: as it is 2.465 bits/byte in domain, 3.187 on novel ones): pad the
other side in log_posterior (2.415, 3.055: the target leaks); mix log-probabilities in ensemble_nll,
(weights * logprobs).sum(0) (2.496, 3.264: no distribution any more); a uniform cached_prior (eq. 2
hardly minds, 2.492, but the last token alone gives 2.638, worse than the dense LM's 2.589).
"""

import functools
import json
import math
import os
import shutil
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, NamedTuple

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
    fits = log_prior.shape in (expert_logprobs.shape[:1], expert_logprobs.shape[:2])
    if expert_logprobs.dim() != 3 or not fits:
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
    for number, batch in enumerate(expert_logprobs.split(batch_size, dim=1)[:batches]):
        weights = log_posterior(batch, prior.log(), window=1)[..., -2].exp()  # [E, blocks]
        posterior = weights.mean(dim=1)
        prior = posterior if number == 0 else rate * posterior + (1 - rate) * prior
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


HERE = ("python", "headers", "docs", "tests", "operators", "unicode")  # where torch is
ALSO_HERE = ("licences", "numpy", "cmake", "stubs")


@dataclass(frozen=True)
class Config(common.Settings):
    domains: tuple[str, ...] = HERE  # the seed reads all; each gets an expert in the first round
    novel: tuple[str, ...] = ALSO_HERE  # each gets an expert in a later round, alone
    num_domains: Whole = 0  # of `domains`, the first ones; 0: all
    steps: Count = 600  # updates of seed and expert together, and of the dense model; paper 80,000
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
    branch_steps: Count = 150  # updates of an expert of a later round
    branch_lr: Positive = 4e-3  # its peak, own warm-up, linear to zero; chosen on seed 100
    dev_blocks: Count = 100  # development sequences a domain, for the cached prior; paper 100
    test_blocks: Count = 128  # test sequences a domain

    def __post_init__(self) -> None:
        super().__post_init__()
        names = (*self.domains, *self.novel)
        for name in (*names, *filter(None, [self.domain])):
            text_data.check_name(name)
        if len(self.own) < 2 or len(set(names)) < len(names):
            listed = f"domains are {','.join(names)}"
            raise ValueError(f"{listed}; two or more are needed, none of them twice")
        if self.num_domains > len(self.domains):
            raise ValueError(f"num_domains is {self.num_domains} of {len(self.domains)} domains")
        if self.seed_steps == self.steps or (self.seed_share and not self.seed_steps):
            share = f"seed_share {self.seed_share:g} of {self.steps} updates"
            raise ValueError(f"{share} leaves nothing to the seed or to the experts")
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
        self.path = Path(path)
        mark = self.path / "forest.json"
        if not mark.is_file():
            raise FileNotFoundError(f"{path} is no forest: no forest.json; --stage seed makes one")
        try:
            content = json.loads(mark.read_bytes())
            self.seed, settings = content["seed"], {name: content[name] for name in OF_A_FOREST}
            if type(self.seed) is not int or len(content) != 1 + len(settings):
                raise ValueError("a seed, its settings and nothing else are needed")
            self.config = replace(SMALL, **settings | {"domains": tuple(settings["domains"])})
            with torch.device("meta"):  # no memory is spent on the weights
                state = make_model(self.config, "").state_dict()
        except (ValueError, LookupError, TypeError, RecursionError, RuntimeError) as error:
            raise UsageError(f"{mark} is damaged ({error})") from error
        self.shapes = {name: (tuple(tensor.shape), "float32") for name, tensor in state.items()}
        self.digest = common.digest(content)[:12]

    @classmethod
    def create(cls, path: Path, config: Config, seed: int) -> "Forest":
        """Make an empty one, or open the one that is there. UsageError: it was made otherwise."""
        if not (path / "forest.json").exists():
            settings = {name: getattr(config, name) for name in OF_A_FOREST}
            common.write_json(path / "forest.json", {"seed": seed, **settings})
        forest = cls(path)
        forest.refuse_others(config, seed, OF_A_FOREST)
        return forest

    def refuse_others(self, config: Config, seed: int, names: Iterable[str]) -> None:
        """UsageError when the seed, or one of these settings, is not the forest's own."""
        pairs = {name: (getattr(self.config, name), getattr(config, name)) for name in names}
        for name, (own, other) in {**pairs, "seed": (self.seed, seed)}.items():
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

    def save(self, path: Path, model: nn.Module, meta: dict) -> None:
        about = {**meta, "name": path.stem, "forest": self.digest}
        arrays.save_arrays(path, model.state_dict(), about)

    def load(self, path: Path) -> tuple[dict[str, Tensor], dict]:
        """(state, meta). Raises ValueError in one line that begins with the expert's name."""
        try:
            room = sum(4 * math.prod(shape) + 1024 for shape, _ in self.shapes.values()) + 65_536
            if path.stat().st_size > room:
                raise ValueError("it is larger than this architecture needs")
            state, meta = arrays.load_arrays(path, self.shapes)
            if meta["name"] != path.stem:
                raise ValueError("it was saved under another name")
            if meta["forest"] != self.digest:
                raise ValueError("it was made for another forest")
            for parent, weight in meta["parents"].items():
                if not text_data.NAME.fullmatch(parent) or not 0 <= weight <= 1:
                    raise ValueError("it names impossible parents")
        except (ValueError, LookupError, TypeError, AttributeError, OSError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"{path.stem[:64]!r} refused: {reason}") from error
        return state, meta

    def model(self, name: str) -> nn.Module:
        return self.filled(self.load(self.file(name))[0])

    def average(self, names: Sequence[str], weights: Tensor) -> nn.Module:
        """One state after another is in memory, never all of them."""
        states = (self.load(self.file(name))[0] for name in names)
        return self.filled(average_parameters(states, weights.tolist()))

    def filled(self, state: dict[str, Tensor]) -> nn.Module:
        model = make_model(self.config, "")
        model.load_state_dict(state)
        return model.eval()

    def sound(self, without: Sequence[str] = ()) -> dict[str, dict]:
        """{name: meta} of the experts that load, a line for each that does not. UsageError."""
        found, there = {}, self.names()
        for name in without:
            if name not in there:
                raise UsageError(f"{self.path}: there is no expert {name!r}")
        for name in there:
            try:
                if name not in without:
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
        forest = Forest(path.parent if path.stem == "seed" else path.parent.parent)
        return forest.filled(forest.load(path)[0])
    return common.load_trained(path, Config, rebuild)


def rebuild(job: Job, state: dict) -> nn.Module:
    model = make_model(job.config, "")
    common.load_state(model, state, f"{job.label}.pt")
    return model


# --------------------------------------------------------------------------------------------------
# The experiment: seed, experts, and rivals that cost the same
# --------------------------------------------------------------------------------------------------

ARMS = ("dense", "btm", "random", "grow")  # systems: a seed, and the models branched from it
SHARES = (0.25, 0.5)  # of the seed, beside the config's
COUNTS = (2, 4)  # of domains, beside all


@functools.cache
def read_domain(name: str, root: Path) -> text_data.Split:
    return text_data.find_split(name, root / "btm")


def changes_of(arm: str) -> list[str]:
    """ "grow@lr=0.1,branch_steps=9" -> ["lr=0.1", "branch_steps=9"]."""
    return list(filter(None, arm.partition("@")[2].split(",")))


def sister(arm: str, method: str) -> str:
    """An arm of the same forest: ("grow@lr=0.1,branch_steps=9", "seed") -> "seed@lr=0.1"."""
    shared = [change for change in changes_of(arm) if change.partition("=")[0] in OF_A_FOREST]
    return f"{method}@{','.join(shared)}" if shared else method


def models_of(arm: str, config: Config) -> list[str]:
    """The arms that a system branches from its seed: ["expert@domain=python", ...]."""
    method, config = arm.partition("@")[0], common.arm_config(config, arm)
    if method == "dense":
        return [arm]
    kind = "shard" if method == "random" else "expert"
    names = config.novel if method == "grow" else config.own
    return [f"{kind}@{','.join([*changes_of(arm), f'domain={name}'])}" for name in names]


def forest_of(job: Job) -> Forest:
    """The forest of a stage, or of the system that an arm belongs to."""
    name = sister(job.arm, f"forest-seed{job.seed}")
    path = job.run.actions.get("forest", job.run.out / name)
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
    """The control: as many blocks as an expert reads, of its shard of domains drawn at random."""
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
    if domain and domain not in config.own:
        model, parents = branch_later(job, forest)
        steps = config.branch_steps
        return Start(model, config.branch_lr, range(steps), steps, parents)
    first, last = config.seed_steps, config.steps
    if job.method == "seed" or first == 0:
        model = make_model(config, f"{job.seed} {domain or 'seed'}")
        return Start(model, config.lr, range(first or last), last, {})
    if not forest.file("seed").exists():
        raise UsageError(f"{forest.path} has no seed yet; --stage seed comes first")
    return Start(forest.model("seed"), config.lr, range(first, last), last, {"seed": 1.0})


def branch_later(job: Job, forest: Forest) -> tuple[nn.Module, dict[str, float]]:
    """The average of the experts, by their posterior on the new domain's development text."""
    names = list(job.config.own)  # in a run every new domain is added alone
    if "stage" in job.run.actions:
        names = [name for name in forest.sound() if name != job.config.domain]
    weights = prior_of(forest, names, job.config.domain, job.config, job.run)
    return forest.average(names, weights), dict(zip(names, weights.tolist()))


def train_model(job: Job) -> tuple[nn.Module, dict]:
    """Plain next-token loss on a domain, a shard or all domains: (model, what it cost).

    The model of a seed or of an expert goes into the forest, others stay with the run.
    """
    config, run, forest = job.config, job.run, forest_of(job)
    start = branch(job, forest)
    model = job.prepare(start.model)
    optimizer = common.adamw(model, start.lr, config.weight_decay)
    if start.updates.start:  # the seed's own run goes on: Adam's moments, and the schedule
        moments = common.load(forest.path / "seed-adam.pt", run.device)["state"]
        optimizer.load_state_dict({**optimizer.state_dict(), "state": moments})
    if job.method == "shard":
        batches = random_batches(job)
    else:
        batches = domain_batches(job, config.domain) if config.domain else mixed_batches(job)
    read = {}

    def counted(step: int) -> Tensor:
        windows = batches(step)
        read[step] = windows[:, 1:].numel()
        return windows.to(run.device)

    def schedule(step: int) -> float:  # fairseq sets the rate after each update
        return learning_rate_factor(max(1, step), start.schedule, config.warmup_share)

    rows = len(batches(start.updates.start))
    job.train(
        model,
        lambda windows, step: (common.lm_loss(model, windows).mean(), {}),
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
    tokens = [int(line["tokens"]) for line in job.log()]  # also of before an interruption
    cost = {"updates": len(tokens), "tokens": sum(tokens)}
    meta = {"parents": start.parents, **cost}
    if job.method == "seed":
        common.save(forest.path / "seed-adam.pt", optimizer.state_dict())
        forest.save(forest.file("seed"), model, meta)  # last: with it the seed is there
    elif job.method == "expert":
        meta["data"] = read_domain(config.domain, run.data_dir).digest
        forest.save(forest.file(config.domain), model, meta)
    else:
        common.save(job.path(".pt"), model.state_dict())
    return model, cost


@torch.no_grad()
def score(model: nn.Module, part: str, name: str, config: Config, run: Run) -> Tensor:
    """log p of every token of a domain's "dev" or "test" blocks: [N, context] fp32, on the CPU."""
    num = config.dev_blocks if part == "dev" else config.test_blocks
    text, model = getattr(read_domain(name, run.data_dir), part), model.to(run.device).eval()
    windows = text_data.spread_windows(text, config.context, num)
    found = [-common.lm_loss(model, some.to(run.device)).cpu() for some in windows.split(64)]
    return torch.cat(found)


def bits(nll: Tensor) -> float:
    """Nats -> bits a token, the mean."""
    return float(nll.double().mean()) / math.log(2)


def prior_of(forest: Forest, names: Sequence[str], domain: str, config: Config, run: Run) -> Tensor:
    """p(expert) on the development text of a domain; one model at a time is in memory."""
    said = [score(forest.model(name), "dev", domain, config, run) for name in names]
    return cached_prior(torch.stack(said), blocks=config.dev_blocks)


def forest_bits(dev: Tensor, test: Tensor, config: Config) -> float:
    """Of eq. 2 with the cached prior. dev, test: log-probabilities [E, N, T]."""
    prior = cached_prior(dev, blocks=config.dev_blocks)
    return bits(ensemble_nll(test, prior.log())[0])


def mixtures(dev: Tensor, test: Tensor, config: Config) -> dict[str, float]:
    """Bits of every way to mix E experts on one domain. dev, test: [E, N, T]."""
    prior = cached_prior(dev, blocks=config.dev_blocks)
    moving = cached_prior(dev, blocks=config.dev_blocks, rate=0.3)
    two = top_k_prior(prior, min(2, len(prior)))
    return {
        "eq2": forest_bits(dev, test, config),
        "last": bits(ensemble_nll(test, prior.log(), window=1)[0]),
        "released": bits(released_nll(test, released_prior(dev))),
        "moving": bits(ensemble_nll(test, moving.log())[0]),
        "top1": bits(-test[prior.argmax()]),
        "top2": bits(ensemble_nll(test, two.log())[0]),
    }


def scored(arm: str, config: Config) -> tuple[str, ...]:
    """The domains that a system is compared on: its own, and unless it is of a curve the novel."""
    own = common.arm_config(config, arm).own
    return own if "@" in sister(arm, "") else (*own, *config.novel)


def train_arm(job: Job) -> dict:
    """train_model; the log-probability of every token is kept: read once, mixed in many ways."""
    model, result = train_model(job)
    said, names = {}, scored(job.arm, job.run.config)
    for name in names:
        for part in ("dev", "test"):
            said[f"{part} {name}"] = score(model, part, name, job.config, job.run)
    common.save(job.path("-said.pt"), said)
    return result | {"bits": [bits(-said[f"test {name}"]) for name in names]}


def read_said(job: Job, arms: Sequence[str]) -> dict[str, Tensor]:
    """{"dev python": log-probabilities [E, N, T] of the models of these arms, ...}."""
    models = [common.load(job.other(arm).path("-said.pt")) for arm in arms]
    return {key: torch.stack([said[key] for said in models]) for key in models[0]}


def merge(job: Job) -> dict:
    """A system on every domain: {rule: bits [domains]}. Nothing is trained any more."""
    config, run, names = job.config, job.run, scored(job.arm, job.run.config)
    said = read_said(job, models_of(job.arm, run.config))
    result: dict[str, list] = {}

    def note(**values: Any) -> None:
        for key, value in values.items():
            result.setdefault(key, []).append(value)

    for name in names:
        note(**mixtures(said[f"dev {name}"], said[f"test {name}"], config))
    if job.method == "random":
        return result
    forest, experts = forest_of(job), len(config.own)
    uniform = forest.average(config.own, torch.full((experts,), 1 / experts, dtype=torch.float64))
    for name in names:
        prior = cached_prior(said[f"dev {name}"], blocks=config.dev_blocks)
        posterior = forest.average(config.own, prior)
        _, weights = ensemble_nll(said[f"test {name}"], prior.log())
        note(
            uniform=bits(-score(uniform, "test", name, config, run)),
            posterior=bits(-score(posterior, "test", name, config, run)),
            weights=weights.mean(dim=(1, 2)).tolist(),
        )
    for removed in range(experts):
        kept = [expert for expert in range(experts) if expert != removed]
        row = []
        for name in names:
            row.append(forest_bits(said[f"dev {name}"][kept], said[f"test {name}"][kept], config))
        note(without=row)
    return result


def merge_grown(job: Job) -> dict:
    """Every new expert put beside those of the first round, alone: {"eq2": [new, domains]}."""
    config, run, names = job.config, job.run, scored(job.arm, job.run.config)
    experts, found = models_of(sister(job.arm, "btm"), run.config), []
    for new in models_of(job.arm, run.config):
        said, row = read_said(job, [*experts, new]), []
        for name in names:
            row.append(forest_bits(said[f"dev {name}"], said[f"test {name}"], config))
        found.append(row)
    return {"eq2": found}


# --------------------------------------------------------------------------------------------------
# Claims. The paper's tables could not be read; its abstract, and a few numbers, could.
# --------------------------------------------------------------------------------------------------

PPL = "perplexity 19.8 against 22.5 (125M, mean of all 16 domains)"


def split(values: np.ndarray, where: str, config: Config) -> np.ndarray:
    """The columns of values [seeds, domains] that are training domains ("in") or novel ones."""
    k = len(config.own)
    return values[:, :k] if where == "in" else values[:, k:]


def gains(results: Results, config: Config, rule: str, where: str, arm: str = "btm") -> np.ndarray:
    """[seeds, domains]: bits by which a system is below the dense LM."""
    return split(results.of("dense", "bits") - results.of(arm, rule), where, config)


def mean_gain(
    results: Results, config: Config, rule: str, where: str, arm: str = "btm"
) -> np.ndarray:
    return gains(results, config, rule, where, arm).mean(axis=1)  # [seeds]


def low_end(values: np.ndarray) -> float:
    """Of the 90 % interval of the mean over seeds: by it the weakest of several is chosen."""
    spread = common.half_width(values) if len(values) >= 3 else 0.0
    return float(np.mean(values)) - spread


def weakest_domain(values: np.ndarray, names: Sequence[str]) -> tuple[np.ndarray, str]:
    """Of values [seeds, domains] the column with the lowest end, and what to say of it."""
    worst = int(np.argmin([low_end(column) for column in values.T]))
    text = f"{show(values[:, worst])} bits/byte on {names[worst]}, the weakest; "
    return values[:, worst], text + f"mean {show(values.mean(axis=1))}"


def perplexity(bits_by_domain: np.ndarray) -> str:
    """Of a byte (or token), the mean over domains and seeds, as in the paper's tables."""
    return f"{np.mean(2.0**bits_by_domain):.2f}"


@claim("at equal cost the forest beats the dense LM on every training domain", paper=PPL,
       required=True)  # fmt: skip
def in_domain(results: Results, config: Config) -> Margin:
    gain = gains(results, config, "eq2", "in")
    weakest, text = weakest_domain(gain, config.own)
    forest = perplexity(split(results.of("btm", "eq2"), "in", config))
    dense = perplexity(split(results.of("dense", "bits"), "in", config))
    text += f", perplexity {forest} against {dense}"
    return Margin(weakest, text, {"mean": gain.mean(axis=1)})


@claim("... and, in the mean, on domains that no expert was trained on", paper=PPL, required=True)
def out_of_domain(results: Results, config: Config) -> Margin:
    """The mean over domains is what the paper's tables have; the weakest domain is named."""
    gain = gains(results, config, "eq2", "novel")
    weakest, text = weakest_domain(gain, config.novel)
    numbers = {"weakest": weakest}
    for rule in ("last", "released"):
        numbers[rule] = mean_gain(results, config, rule, "novel")
        text += f"; {RULES[rule]} {show(numbers[rule])}"
    return Margin(gain.mean(axis=1), text, numbers)


@claim("random splits of the data do not do: their ensemble loses to the dense LM on training "
       "domains, and to the forest there and on novel ones", required=True)  # fmt: skip
def random_split(results: Results, config: Config) -> Margin:
    """The weakest of its defeats, whether the whole past counts or the last token."""
    leads = {}
    for rule in ("eq2", "last"):
        for where in ("in", "novel"):
            gain = mean_gain(results, config, rule, where, "random")
            leads[f"forest, {rule}, {where}"] = mean_gain(results, config, rule, where) - gain
            if where == "in":
                leads[f"dense, {rule}"] = -gain
    weakest = min(leads, key=lambda name: low_end(leads[name]))
    text = "; ".join(f"{name} {show(lead)}" for name, lead in leads.items())
    return Margin(leads[weakest], f"bits/byte behind the {text}", leads)


@claim("averaged by posterior into one LM it still beats the dense LM on every training domain",
       required=True)  # fmt: skip
def posterior_average(results: Results, config: Config) -> Margin:
    gain = gains(results, config, "posterior", "in")
    weakest, text = weakest_domain(gain, config.own)
    novel = mean_gain(results, config, "posterior", "novel")
    numbers = {"mean": gain.mean(axis=1), "novel": novel}
    return Margin(weakest, f"{text}; novel domains {show(novel)}", numbers)


@claim("the gain is robust to the initialisation: a seed of a quarter, a half, three quarters of "
       "the compute")  # fmt: skip
def robust_to_seed(results: Results, config: Config) -> Margin:
    """The share with the smallest gain over the dense LM, mean of the training domains."""
    found = gains_by_share(results, config, "eq2")
    weakest = min(found, key=lambda share: low_end(found[share]))
    text = ", ".join(f"{share:g}: {show(gain)}" for share, gain in found.items())
    numbers = {f"{share:g}": gain for share, gain in found.items()}
    return Margin(found[weakest], f"bits/byte gained, by share of the seed, {text}", numbers)


@claim("the gain over the dense LM grows with the number of domains")
def more_domains(results: Results, config: Config) -> Margin:
    """On the same first domains, so that easier ones do not count; the smaller step."""
    found = gains_by_count(results, config)
    grown = list(found.values())
    if len(grown) < 2:
        raise common.Missing("more than two domains")
    steps = [more - fewer for fewer, more in zip(grown, grown[1:])]
    text = ", ".join(f"{show(gain)} with {count}" for count, gain in found.items())
    listed = " and ".join(config.own[: min(found)])
    numbers = {str(count): gain for count, gain in found.items()}
    return Margin(min(steps, key=low_end), f"bits/byte gained on {listed}: {text}", numbers)


@claim("an added or removed expert changes its own domain only: others by less than a tenth",
       required=True)  # fmt: skip
def add_remove(results: Results, config: Config) -> Margin:
    """The worst of all experts that can be added or removed, and of all other domains."""
    return worst_move(results, config, share=0.1)


@claim("... its own domain most: an expert is worth more there than anywhere else")
def coverage(results: Results, config: Config) -> Margin:
    """The worst likewise."""
    return worst_move(results, config, share=1.0)


@claim("averaged with equal weights it loses to the dense LM on the training domains")
def uniform_average(results: Results, config: Config) -> Margin:
    margin = -mean_gain(results, config, "uniform", "in")
    return Margin(margin, f"{show(margin)} bits/byte worse than dense")


@claim("the plain mean is a better cached prior than the moving average", paper="0.3 on the new")
def plain_prior(results: Results, config: Config) -> Margin:
    """The weaker of training and novel domains."""
    leads = []
    for where in ("in", "novel"):
        plain = mean_gain(results, config, "eq2", where)
        leads.append(plain - mean_gain(results, config, "moving", where))
    text = f"{show(leads[0])} bits/byte on training domains, {show(leads[1])} on novel ones"
    return Margin(min(leads, key=low_end), text)


@check("seed and experts read as many tokens as the dense LM, with models of its size")
def cost_matched(results: Results, config: Config) -> Check:
    seed, dense = results["seed"][0]["tokens"], results["dense"][0]["tokens"]
    spent = {}
    for system in ("btm", "random"):
        spent[system] = sum(results[arm][0]["tokens"] for arm in models_of(system, config))
    text = f"{seed + spent['btm']:,} of {seed + dense:,} tokens, {seed:,} of them in the seed"
    return Check(spent == {"btm": dense, "random": dense}, text)


def with_share(share: float, config: Config) -> str:
    return "btm" if share == config.seed_share else f"btm@seed_share={share:g}"


def with_count(method: str, count: int, config: Config) -> str:
    return method if count == len(config.own) else f"{method}@num_domains={count}"


def counts(config: Config) -> list[int]:
    return [count for count in COUNTS if count < len(config.own)] + [len(config.own)]


def gains_by_share(results: Results, config: Config, rule: str) -> dict[float, np.ndarray]:
    """{share of the seed: bits gained over the dense LM on training domains [seeds]}."""
    found = {}
    for share in sorted({*SHARES, config.seed_share}):
        forest = results.of(with_share(share, config), rule)
        dense = results.of("dense", "bits")[: len(forest)]
        found[share] = split(dense, "in", config).mean(axis=1)
        found[share] = found[share] - split(forest, "in", config).mean(axis=1)
    return at_same_seeds(found)


def gains_by_count(results: Results, config: Config) -> dict[int, np.ndarray]:
    """{number of domains: bits gained over a dense LM of the same domains, on the first few}."""
    found, first = {}, min(counts(config))
    for count in counts(config):
        dense = results.of(with_count("dense", count, config), "bits")
        forest = results.of(with_count("btm", count, config), "eq2")
        found[count] = (dense - forest)[:, :first].mean(axis=1)
    return at_same_seeds(found)


def at_same_seeds(found: dict) -> dict:
    """Curves are of the first few seeds; so are the points that have more."""
    fewest = min(map(len, found.values()))
    return {key: values[:fewest] for key, values in found.items()}


def moves(results: Results, config: Config) -> dict[str, tuple[np.ndarray, np.ndarray, str]]:
    """{"+ licences": (bits gained there [seeds], largest change elsewhere [seeds], where)}."""
    before, names = results.of("btm", "eq2"), scored("btm", config)  # [seeds, domains]
    changed = {f"+ {name}": results.of("grow", "eq2")[:, i] for i, name in enumerate(config.novel)}
    for i, name in enumerate(config.own):
        changed[f"- {name}"] = results.of("btm", "without")[:, i]
    found = {}
    for change, after in changed.items():
        own = names.index(change[2:])
        sizes = np.abs(after - before)
        others = sizes.copy()
        others[:, own] = 0
        most = int(others.mean(axis=0).argmax())
        found[change] = (sizes[:, own], others[:, most], names[most])
    return found


def worst_move(results: Results, config: Config, share: float) -> Margin:
    """Of the changes where a share of the own domain's exceeds the largest elsewhere least."""
    found, margins = moves(results, config), {}
    for change, (own, other, _) in found.items():
        margins[change] = share * own - other
    worst = min(margins, key=lambda change: low_end(margins[change]))
    own, other, where = found[worst]
    good = sum(low_end(margin) > 0 for margin in margins.values())
    text = f"worst of {len(margins)} is {worst}: {show(own)} bits/byte there, {show(other)} on "
    return Margin(margins[worst], f"{text}{where}; so it is with {good} of them", margins)


# --------------------------------------------------------------------------------------------------
# Tables and picture
# --------------------------------------------------------------------------------------------------

RULES = {
    "eq2": "forest, eq. 2",
    "last": "forest, last token",
    "released": "forest, released scorer",
    "moving": "forest, moving-average prior",
    "top1": "forest, best expert alone",
    "top2": "forest, two experts",
    "posterior": "average by posterior",
    "uniform": "average, equal weights",
}


def print_tables(results: Results, config: Config, run: Run) -> None:
    names = scored("btm", config)
    found = {arm: results.of(arm, "bits") for arm in ("seed", "dense") if arm in results}
    if "btm" in results:
        found |= {label: results.of("btm", rule) for rule, label in RULES.items()}
    if "random" in results:
        found["random split, eq. 2"] = results.of("random", "eq2")
        found["random split, last token"] = results.of("random", "last")
    rows = []
    for label, by_domain in found.items():
        row = [label]
        for where in ("in", "novel"):
            group = split(by_domain, where, config)
            row += [show(group.mean(axis=1), 3), perplexity(group)]
        rows.append(row + [f"{value:.3f}" for value in by_domain.mean(axis=0)])
    title = f"bits/byte and perplexity of a byte on test text, {len(run.seeds)} seed(s): "
    title += "means over domains, then bits of each; novel ones have no expert"
    run.table(title, ["", "in domain", "perplexity", "novel", "perplexity", *names], rows)

    if "btm" in results:
        weights = np.mean([result["weights"] for result in results["btm"]], axis=0)
        run.table(*posterior_table(names, config.own, weights))
    if {"btm", "grow"} <= results.keys():
        rows = []
        for change, (own, other, where) in moves(results, config).items():
            rows.append([change, show(own, 3), show(other, 3), where])
        title = "an expert more (+) or less (-): bits/byte that its own domain gains or loses"
        run.table(title, ["", "own domain", "largest change elsewhere", "where"], rows)


def posterior_table(domains: Sequence[str], experts: Sequence[str], weights: Any) -> tuple:
    rows = []
    for name, row in zip(domains, weights):
        rows.append([name, *(f"{float(weight):.2f}" for weight in row)])
    return "whom eq. 2 believes: mean weight of each expert, by test domain", ["", *experts], rows


def draw(results: Results, config: Config, run: Run) -> None:
    def by_domain(ax: Any) -> None:
        for i, rule in enumerate(("eq2", "last", "posterior")):
            gain = results.of("dense", "bits") - results.of("btm", rule)  # [seeds, domains]
            bars = [common.half_width(column) for column in gain.T] if len(gain) > 2 else None
            rows = np.arange(gain.shape[1]) + 0.2 * (i - 1)
            ax.errorbar(gain.mean(axis=0), rows, xerr=bars, fmt="o", markersize=4,
                        color=common.COLORS[i], label=RULES[rule])  # fmt: skip
        ax.set_yticks(range(len(names)), names)
        ax.invert_yaxis()
        ax.axvline(0, color="0.7", zorder=0)
        ax.axhline(len(config.own) - 0.5, color="0.7", linestyle=":")
        ax.set(xlabel="bits/byte below the dense LM", title="gain by domain; below: novel domains")

    def by_count(ax: Any) -> None:
        found = gains_by_count(results, config)
        values = np.stack(list(found.values()), axis=1)  # [seeds, counts]
        common.curve(ax, list(found), values, RULES["eq2"], common.COLORS[0])
        title = f"gain on {' and '.join(config.own[: min(found)])}"
        ax.set(xlabel="domains", ylabel="bits/byte", title=title, ylim=(0, None))

    def by_share(ax: Any) -> None:
        for rule, color in (("eq2", common.COLORS[0]), ("posterior", common.COLORS[2])):
            found = gains_by_share(results, config, rule)
            values = np.stack(list(found.values()), axis=1)
            common.curve(ax, list(found), values, RULES[rule], color)
        ax.axhline(0, color="0.7", zorder=0)
        ax.set(xlabel="seed's share of compute", ylabel="bits/byte", title="gain in domain")

    names = scored("btm", config)
    if not {"dense", "btm"} <= results.keys():
        return
    has_curves = set(curves(config)) <= results.keys()
    run.plot([by_domain, by_count, by_share] if has_curves else [by_domain], width=5.2)


# --------------------------------------------------------------------------------------------------
# Commands: parts of a run, with nothing in common but the forest's folder
# --------------------------------------------------------------------------------------------------

ACTIONS = {  # the script's own flags; see common.FLAGS
    "stage": ("", ("seed", "expert", "eval"), "one part of a run, on a forest"),
    "forest": (Path(), "DIR", "the forest; default: that of the run in --out"),
    "domain_index": (0, "I", "the domain of --stage expert by number, for job arrays"),
    "without": ("", "NAMES", "experts that --stage eval, --sample and --average leave out"),
    "sample": ("", "TEXT", "go on writing TEXT with the ensemble, or with --model"),
    "sample_bytes": (160, "N", "bytes that --sample writes; default 160"),
    "model": (Path(), "FILE", "a file of a forest, for --sample"),
    "average": ("", ("uniform", "posterior"), "save all experts as one; posterior: by --domain"),
    "prepare": (Path(), "PATH", "make domains of a file or folder; without --domain by the Pile's"),
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
TRAINING = {"workers", "compile", "micro_batch"}
GOES_WITH = {  # what may be given with a command, beside ANYWHERE and the forest's own settings
    "seed": TRAINING,
    "expert": {"domain", "domain_index", "branch_steps", "branch_lr", "dev_blocks", *TRAINING},
    "eval": {"without", "domain", "novel", "dev_blocks", "test_blocks"},
    "sample": {"sample_bytes", "without", "model"},
    "average": {"domain", "without", "dev_blocks"},
    "prepare": {"domain"},
}


def act(config: Config, run: Run) -> None:
    """The command that was given: a flag is used or refused, never ignored."""
    given = [name for name in ("stage", "sample", "average", "prepare") if name in run.actions]
    if len(given) != 1:
        flags = ", ".join(common.flag(name) for name in run.actions)
        raise UsageError(f"{flags}: goes with one of --stage, --sample, --average, --prepare")
    command = run.actions["stage"] if given == ["stage"] else given[0]
    shared = set() if command == "prepare" else {"seed", *OF_A_FOREST}
    idle = set(run.given) - ANYWHERE - GOES_WITH[command] - shared - set(given)
    if idle:
        does = f"--stage {command}" if given == ["stage"] else common.flag(command)
        raise UsageError(f"{common.flag(min(idle))} does nothing with {does}")
    if command == "prepare":
        return prepare(config, run)
    default = run.out / f"forest-seed{run.seed}"
    if "model" in run.actions:
        default = run.actions["model"].parent.parent
    path = run.actions.setdefault("forest", default)
    if command == "seed":
        run.config = check_data(config, config.own, run)
        return train_here(["seed"], Forest.create(path, run.config, run.seed), run)
    forest = Forest(path)
    seed = run.seed if "seed" in run.given else forest.seed
    forest.refuse_others(config, seed, [name for name in OF_A_FOREST if name in run.given])
    run.config = replace(config, **{name: getattr(forest.config, name) for name in OF_A_FOREST})
    commands = {"expert": train_experts, "eval": evaluate, "sample": write, "average": save_average}
    return commands[command](forest, run.config, run)


def train_experts(forest: Forest, config: Config, run: Run) -> None:
    """--stage expert: one by --domain or --domain-index, or all of the first round."""
    names = [config.domain] if config.domain else list(config.own)
    if "domain_index" in run.actions:
        index = run.actions["domain_index"]
        if config.domain or not 0 <= index < len(names):
            count = f"it counts the {len(config.own)} domains from 0, and --domain excludes it"
            raise UsageError(f"--domain-index is {index}; {count}")
        names = [names[index]]
    own = {"branch_steps", "branch_lr", "dev_blocks"} & set(run.given)
    if own and names[0] in config.own:
        goes_on = "an expert of the first round goes on with the seed's schedule"
        raise UsageError(f"{common.flag(min(own))} does nothing for {names[0]}: {goes_on}")
    checked = check_data(config, names, run)
    forest.refuse_others(checked, forest.seed, ["vocab_size"])
    run.config = replace(config, domain="")
    train_here([f"expert@domain={name}" for name in names], forest, run)


def train_here(arms: Sequence[str], forest: Forest, run: Run) -> None:
    """Train who is not there yet, `workers` at a time; checkpoints are in FOREST/work."""
    run.out, run.seeds = forest.path / "work", [forest.seed]
    (run.out / "arms").mkdir(parents=True, exist_ok=True)
    jobs = []
    for job in (Job(run, arm, forest.seed) for arm in arms):
        file = forest.file(job.config.domain or "seed")
        if file.exists():
            say(f"{file} is there already; delete it to train it again")
        else:
            jobs.append((job, train_part))
    if min(run.workers, len(jobs)) > 1:
        common.train_in_processes(run, jobs)
    else:
        for job, train in jobs:
            job.do(train)
    for job, _ in jobs:
        file = forest.file(job.config.domain or "seed")
        meta = forest.load(file)[1]
        say(f"{file}: from {lineage(meta)}, {meta['updates']} updates, {meta['tokens']:,} tokens")


def train_part(job: Job) -> dict:
    return train_model(job)[1]


def lineage(meta: dict) -> str:
    parents = sorted(meta["parents"].items(), key=lambda parent: -parent[1])
    shown = [f"{weight:.2f} {name}" for name, weight in parents if weight >= 0.005]
    return " + ".join(shown) or "scratch"


def evaluate(forest: Forest, config: Config, run: Run) -> None:
    """--stage eval: whoever loads, one model at a time, on every domain whose text is here."""
    metas = forest.sound(left_out(run))
    rows = []
    for name, meta in metas.items():
        rows.append([name, lineage(meta), meta.get("updates", "?")])
    run.table(f"lineage of {forest.path}", ["", "branched from", "updates"], rows)

    names = dict.fromkeys([*scored("btm", config), *forest.names(), config.domain or config.own[0]])
    texts = []
    for name in names:
        try:
            read_domain(name, run.data_dir)
            texts.append(name)
        except (FileNotFoundError, ValueError) as error:
            say(f"no row for {name}: {error}")
    said: dict[str, list] = {f"{part} {name}": [] for name in texts for part in ("dev", "test")}
    for expert in metas:
        model = forest.model(expert)
        for key, found in said.items():
            found.append(score(model, *key.split(), config, run))

    rows, believed = [], []
    for name in texts:
        dev, test = torch.stack(said[f"dev {name}"]), torch.stack(said[f"test {name}"])
        prior = cached_prior(dev, blocks=config.dev_blocks)
        average = forest.average(list(metas), prior)
        found = mixtures(dev, test, config)
        found["posterior"] = bits(-score(average, "test", name, config, run))
        shown = [found[rule] for rule in ("eq2", "last", "released", "top1", "posterior")]
        rows.append([name, f"{2 ** found['eq2']:.2f}", *(f"{value:.3f}" for value in shown)])
        believed.append(ensemble_nll(test, prior.log())[1].mean(dim=(1, 2)))
    header = ["", "perplexity", "eq. 2", "last token", "released", "best expert", "average"]
    run.table("bits/byte on test text; perplexity is that of eq. 2", header, rows)
    run.table(*posterior_table(texts, list(metas), believed))


def left_out(run: Run) -> list[str]:
    return [name for name in run.actions.get("without", "").split(",") if name]


def save_average(forest: Forest, config: Config, run: Run) -> None:
    """--average: all experts as one model, which load_trained and --sample --model read."""
    kind, names = run.actions["average"], list(forest.sound(left_out(run)))
    if (kind == "posterior") != bool(config.domain):
        raise UsageError("--average posterior goes with the --domain it is for, uniform without")
    weights = torch.full((len(names),), 1 / len(names), dtype=torch.float64)
    if config.domain:
        weights = prior_of(forest, names, config.domain, config, run)
    path = forest.path / "averages" / f"{config.domain or kind}.npz"
    meta = {"parents": dict(zip(names, weights.tolist()))}
    forest.save(path, forest.average(names, weights), meta)
    say(f"{path}: {lineage(meta)}")


def write(forest: Forest, config: Config, run: Run) -> None:
    """--sample: go on with a text; at its end, whom the ensemble believes."""
    if config.vocab_size != 256:
        raise UsageError("--sample writes bytes; this forest was trained on token ids")
    if "model" in run.actions:
        names, models = ["model"], [load_trained(run.actions["model"])]
    else:
        names = list(forest.sound(left_out(run)))
        models = [forest.model(name) for name in names]
    ensemble = Ensemble(models).to(run.device)
    prompt = torch.tensor([0, *run.actions["sample"].encode()], device=run.device)
    generator = torch.Generator().manual_seed(run.seed)
    count = run.actions.get("sample_bytes", 160)
    tokens = common.generate(ensemble, prompt, count, config.context, generator=generator)
    text = bytes(tokens[1:].tolist()).decode("utf-8", "replace")
    say("".join(char if char.isprintable() or char in "\n\t" else "\ufffd" for char in text))
    if len(models) > 1:
        believed = {"parents": dict(zip(names, ensemble.weights[:, 0, -1].tolist()))}
        say(f"\nbelieved at the end: {lineage(believed)}")


def prepare(config: Config, run: Run) -> None:
    """--prepare: a domain of one's own, or those of the Pile by their labels."""
    root = run.data_dir / "btm"
    sizes, labels = text_data.prepare(run.actions["prepare"], root, config.domain)
    rows = []
    for name, parts in sizes.items():
        rows.append([name, *(f"{parts[part]:,}" for part in text_data.PARTS)])
    run.table(f"bytes written to {root}", ["domain", *text_data.PARTS], rows)
    lacking = [label for label, name in text_data.PILE.items() if name not in sizes]
    if labels and lacking:
        say(f"too little of {', '.join(lacking)}; labels found: {', '.join(map(repr, labels))}")


# --------------------------------------------------------------------------------------------------
# main
# --------------------------------------------------------------------------------------------------

CURVE_SEEDS = 5  # at most: the curves cost more than all the rest


def curves(config: Config) -> list[str]:
    arms = [with_share(share, config) for share in SHARES]
    arms += [with_count(method, n, config) for n in counts(config) for method in ("dense", "btm")]
    return [arm for arm in arms if "@" in arm]


def check_data(config: Config, names: Sequence[str], run: Run) -> Config:
    """Read the texts before anything is written; settle the vocabulary."""
    splits = {}
    for name in names:
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
    return replace(config, vocab_size=sizes.pop())


def rounds(arms: Sequence[str], config: Config) -> list[list[str]]:
    """Who must be there before whom: seeds, models of the first round, of later rounds."""
    seeds, first, later = [], [], []
    for arm in arms:
        if common.arm_config(config, arm).seed_steps:
            seeds.append(sister(arm, "seed"))
        if arm.partition("@")[0] == "grow":
            later += models_of(arm, config)
            arm = sister(arm, "btm")
        first += models_of(arm, config)
    return [list(dict.fromkeys(some)) for some in (seeds, first, later)]


def sequences(arm: str, config: Config) -> int:
    """How many an arm reads in training."""
    config, method = common.arm_config(config, arm), arm.partition("@")[0]
    if config.domain in config.novel:
        return config.branch_steps * config.blocks_per_domain
    updates = config.seed_steps if method == "seed" else config.steps - config.seed_steps
    width = len(config.own) if method in ("seed", "dense") else 1
    return updates * width * config.blocks_per_domain


def main(config: Config, run: Run) -> Results | None:
    if run.actions:
        return act(config, run)
    if config.domain:
        raise UsageError("--domain goes with one of --stage, --average, --prepare")
    run.config = config = check_data(config, scored("btm", config), run)
    arms = run.choose(ARMS, default=ARMS, more=curves(config))
    waves = rounds(arms, config)

    model = make_model(config, "").to(run.device)
    slow = run.scale == "full" and run.device == "cpu"  # there a batch would take minutes
    rows = 1 if slow else min(config.micro_batch, len(config.own) * config.blocks_per_domain)
    windows = torch.zeros(rows, config.context + 1, dtype=torch.long, device=run.device)
    reads = sum(sequences(arm, config) for wave in waves for arm in wave) * len(run.seeds)
    text = f"{len(run.data)} domains {common.digest(run.data)[:12]}"
    run.plan(text, model, lambda: common.lm_loss(model, windows).mean().backward(), reads / rows)
    for path in [] if run.resume else run.out.glob("forest-seed*"):
        shutil.rmtree(path)

    results = Results()
    for wave in waves:
        results |= train_or_merge(train_arm, wave, run)
    results |= train_or_merge(merge, [arm for arm in arms if arm[:3] in ("btm", "ran")], run)
    results |= train_or_merge(merge_grown, [arm for arm in arms if arm[:4] == "grow"], run)
    print_tables(results, config, run)
    draw(results, config, run)
    say(f"\nthe forest is in {run.out / f'forest-seed{run.seed}'}; --sample 'def ' writes with it")
    return results


def train_or_merge(function: Callable, arms: Sequence[str], run: Run) -> Results:
    """With every seed; the curves, unless asked for by name, with the first few."""
    plain = [arm for arm in arms if run.arms or not is_extra(arm)]
    results = run.train_arms(function, plain)
    extra = [arm for arm in arms if arm not in plain]
    return results | run.train_arms(function, extra, run.seeds[:CURVE_SEEDS])


def is_extra(arm: str) -> bool:
    return any(not change.startswith("domain=") for change in changes_of(arm))


if __name__ == "__main__" and int(os.environ.get("RANK", 0)) == 0:
    # Experts never talk: under torchrun the first process trains as many at a time as it has GPUs
    # or cores, and the others are not needed.
    common.run(main, SMALL, FULL, actions=ACTIONS)
