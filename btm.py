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
text so far, x_1 .. x_t-1; the prior p(j) is how far it was believed on text for development:

    p(x_t | x_<t) = sum_j p_j(x_t | x_<t) p(j | x_<t)                        (eq. 1)
    p(j | x_<t)   ~ p(j) prod_{s<t} p_j(x_s | x_<s), so that sum_j is 1      (eq. 2)

or the experts are averaged into one model, sum_j p(j) theta_j. Two experts, equal priors, and what
each gave to three true tokens, in numbers:

    p_1(x_t)         0.50    0.25    0.50       p_1 said 2 : 1 of the first token, so before the
    p_2(x_t)         0.25    0.50    0.125      second it is believed 2/3; then p_2 said 2 : 1
    p(1 | x_<t)      1/2     2/3     1/2
    p(x_t | x_<t)    0.375   0.333   0.3125     their product is (0.0625 + 0.015625) / 2

Run      python btm.py                    seed, experts, their rivals, later rounds; no download
         python btm.py --ablate           the two curves, too; --seeds 8 for verdicts
         python btm.py --full             the paper's 125M model on the public parts of the Pile
     One part a command, on any machines that share a folder F; docs/btm.md tells the story:
         python btm.py --stage seed --forest F
         python btm.py --stage expert --forest F --domain-index 2      or --domain docs, or all
         python btm.py --stage eval --forest F --without unicode
         python btm.py --average posterior --forest F --domain docs
         python btm.py --sample "def " --forest F
You see  bits/byte and perplexity by domain and method, whom the posterior believes, the claims.
Found    (seeds 0-7, bits/byte) At equal cost the forest is 0.115 below the dense LM on its domains,
         0.050 ± 0.008 on the weakest. On python and headers alone that grows from 0.041 ± 0.002
         with two experts to 0.111 ± 0.004 with six. With a quarter, a half, three quarters of the
         cost in the seed it is 0.093, 0.129, 0.115; averaged into one LM 0.021, 0.107, 0.105. On
         novel domains eq. 2 gains 0.014 ± 0.025 (on stubs it loses 0.062), the last token alone
         0.070 ± 0.027. Random splits lose 0.134 to the forest in domain (novel: undecided). To
         remove python's expert, or docs', tests', numpy's, is felt in other domains, too.
Differences from the paper and its code (its tables could not be read)
1. The text defines eq. 2 over the whole prefix. The released scorer (DEMix) looks at the token
   before only, and gives all experts equal weights at the first token of a block: `released_nll`.
2. Our prior is a plain mean over 100 development blocks. The released one is a moving average, 0.3
   on the new, over last positions of 101 batches of 2; the last dozen count: `released_prior`.
3. Experts read the very bytes that the dense LM reads of their domain at the same update, so that
   cost and data are equal; the paper draws afresh. In later rounds Adam starts afresh.
4. Small scale: 2 layers, bytes, three quarters of the updates for the seed (the paper: one half).
5. To remove an expert removes what it learnt alone: the seed has read its domain, too.

Break it yourself (seeds 0-2: as it is 2.465 bits/byte in domain, 3.187 on novel ones): pad the
other side in log_posterior (2.415, 3.055: the target leaks); mix log-probabilities in ensemble_nll,
(weights * logprobs).sum(0) (2.496, 3.264: no distribution any more); a uniform cached_prior (eq. 2
hardly minds, 2.492, but the last token alone gives 2.638, worse than the dense LM's 2.589).
"""

import functools
import itertools
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
    Raises ValueError: shapes that do not fit, NaN or infinity, logits or probabilities where
    logarithms of probabilities are wanted, a prior without mass.
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
    if (expert_logprobs > 1e-3).any():
        raise ValueError("expert_logprobs are above 0; give log_softmax of the logits")
    if not (log_prior <= 1e-3).all():
        raise ValueError("log_prior is NaN or above 0; give prior.log()")
    if not (log_prior.amax(dim=0) > -torch.inf).all():
        raise ValueError("log_prior has no mass: one expert must be finite")
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
        if count > len(weights):
            break
        if count == 1:
            first = {name: tensor.clone() for name, tensor in state.items()}
        for name in [*first, *state]:
            reason = why_not_averaged(first.get(name), state.get(name))
            if reason:
                raise ValueError(f"model {count}: the parameter {name!r} {reason}")
        for name, tensor in state.items():
            if tensor.is_floating_point():
                total[name] = total.get(name, 0) + weights[count - 1] * tensor.double()
    if count != len(weights):
        raise ValueError(f"{len(weights)} weights for {count} models or more; one each is needed")
    return {name: total.get(name, tensor).to(tensor.dtype) for name, tensor in first.items()}


def why_not_averaged(first: Tensor | None, other: Tensor | None) -> str:
    """What keeps two parameters of one name from being averaged; empty: nothing."""
    if first is None or other is None:
        return "is not in all"
    if first.shape != other.shape:
        return f"is {list(other.shape)}, not {list(first.shape)}"
    return "" if torch.isfinite(other).all() else "holds NaN or infinity"


class Ensemble(nn.Module):
    """The forest as one language model: tokens [batch, time] -> log p [batch, time, vocab] float64.

    models  language models of one vocabulary: tokens [batch, time] -> logits [batch, time, vocab]
    prior   [E], at least 0, part of the state_dict; None: uniform
    Evidence comes from the tokens given. `weights` [E, batch, time] says whom the last forward
    believed after each token. Raises ValueError for a prior of another length, or below 0.
    """

    def __init__(self, models: Sequence[nn.Module], prior: Tensor | None = None):
        super().__init__()
        self.models = nn.ModuleList(models)
        prior = torch.full((len(models),), 1 / len(models)) if prior is None else prior
        prior = torch.as_tensor(prior, dtype=torch.float64)
        if prior.shape != (len(models),) or not (prior >= 0).all() or not prior.sum() > 0:
            raise ValueError(f"prior {prior.tolist()} of {len(models)} models; a share each")
        self.register_buffer("prior", prior)

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
    seed_share: Share = 0.75  # of the updates; released scripts 0.5
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
        if not 0 < self.seed_steps < self.steps:
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
            settings = {name: content[name] for name in OF_A_FOREST}
            self.seed = content["seed"]
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

    def sound(self, without: str = "") -> dict[str, dict]:
        """{name: meta} of the experts that load, a line for each that does not. UsageError.

        without: names to leave out, "docs,tests"
        """
        found, there = {}, self.names()
        left_out = list(filter(None, without.split(",")))
        for name in left_out:
            if name not in there:
                raise UsageError(f"{self.path}: there is no expert {name!r}")
        for name in there:
            try:
                if name not in left_out:
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
        if not path.is_file():
            raise FileNotFoundError(f"{path}: there is no such file")
        forest = Forest(path.parent if path.stem == "seed" else path.parent.parent)
        return forest.filled(forest.load(path)[0])
    return common.load_trained(path, Config, rebuild)


def rebuild(job: Job, state: dict) -> nn.Module:
    model = make_model(job.config, "")
    common.load_state(model, state, f"{job.label}.pt")
    return model


# --------------------------------------------------------------------------------------------------
# The experiment: systems that cost the same, each a seed and the models that branch from it
#
# Every model is an arm of its own: seed, dense, expert@domain=python, shard@domain=python. It
# leaves what it says of every text, and from that its system is put together: no second training.
# --------------------------------------------------------------------------------------------------

SYSTEMS = {
    "dense": "the rival: the seed's own run goes on, on all domains",
    "btm": "the forest: an expert a domain",
    "random": "the control: as many experts, each on a random shard of all domains",
    "grow": "the forest and one expert more, of a novel domain; each of them alone",
}
SHARES = (0.25, 0.5)  # of the seed, beside the config's
COUNTS = (2, 4)  # of domains, beside all


def with_share(share: float, config: Config) -> str:
    return "btm" if share == config.seed_share else f"btm@seed_share={share:g}"


def with_count(system: str, count: int, config: Config) -> str:
    return system if count == len(config.own) else f"{system}@num_domains={count}"


def counts(config: Config) -> list[int]:
    return [count for count in COUNTS if count < len(config.own)] + [len(config.own)]


def curves(config: Config) -> list[str]:
    """The systems of the curves over the seed's share and the number of domains."""
    found = [with_share(share, config) for share in SHARES]
    for count in counts(config):
        found += [with_count("dense", count, config), with_count("btm", count, config)]
    return found


def sister(arm: str, method: str) -> str:
    """An arm of the same forest: ("expert@lr=0.1,domain=docs", "seed") -> "seed@lr=0.1"."""
    changes = arm.partition("@")[2].split(",")
    shared = [change for change in changes if change and not change.startswith("domain=")]
    return f"{method}@{','.join(shared)}" if shared else method


def models_of(system: str, config: Config) -> list[str]:
    """The arms that a system trains, beside its seed: ["expert@domain=python", ...]."""
    method, _, changes = system.partition("@")
    if method == "dense":
        return [system]
    kind = "shard" if method == "random" else "expert"
    before = f"{kind}@{changes}," if changes else f"{kind}@"
    config = common.arm_config(config, system)
    names = config.novel if method == "grow" else config.own
    return [f"{before}domain={name}" for name in names]


def scored(arm: str, config: Config) -> tuple[str, ...]:
    """The domains that a system is compared on: its own, and unless it is of a curve the novel."""
    own = common.arm_config(config, arm).own
    return own if "@" in sister(arm, "") else (*own, *config.novel)


def forest_of(job: Job) -> Forest:
    """The forest of a stage, or of the system that an arm belongs to."""
    default = job.run.out / sister(job.arm, f"forest-seed{job.seed}")
    return Forest.create(job.run.actions.get("forest", default), job.config, job.seed)


find_text = functools.cache(text_data.find_split)


@functools.cache
def read_kept(path: Path) -> text_data.Split:
    return text_data.Split(**common.load(path))


def read_domain(name: str, run: Run) -> text_data.Split:
    """A text in three parts, from the run's folder if `main` has read this very text before."""
    kept = run.out / "texts" / f"{name}-{run.data.get(name)}.pt"
    return read_kept(kept) if kept.exists() else find_text(name, run.data_dir / "btm")


def keep_texts(run: Run) -> None:
    """To gather the texts of a domain takes a second, too long for every process of a run."""
    for name, digest in run.data.items():
        kept = run.out / "texts" / f"{name}-{digest}.pt"
        is_folder = (run.data_dir / "btm" / name).exists()  # which is read fast, and may be huge
        if not is_folder and not kept.exists():
            common.save(kept, find_text(name, run.data_dir / "btm")._asdict())


def stream(data: Tensor, num: int, context: int, key: str) -> Callable[[int], Tensor]:
    """Batches [num, context + 1]: a function of key and step alone, whoever asks, anywhere."""
    first = zlib.crc32(key.encode()) << 28  # two keys are further apart than any run has steps

    def batch(step: int) -> Tensor:
        generator = torch.Generator().manual_seed(first + step)
        return text_data.sample_windows(data, num, context + 1, generator)

    return batch


def domain_batches(job: Job, name: str) -> Callable[[int], Tensor]:
    data, config = read_domain(name, job.run).train, job.config
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
        part = shard(read_domain(name, job.run).train, index, k)
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
    if job.method == "seed":
        return Start(make_model(config, f"{job.seed} seed"), config.lr, range(first), last, {})
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
    read = {}  # tokens, by step

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
        forest.save(forest.file(config.domain), model, meta)
    else:
        common.save(job.path(".pt"), model.state_dict())
    return model, cost


@torch.no_grad()
def score(model: nn.Module, part: str, name: str, config: Config, run: Run) -> Tensor:
    """log p of every token of a domain's "dev" or "test" blocks: [N, context] fp32, on the CPU."""
    num = config.dev_blocks if part == "dev" else config.test_blocks
    text, model = getattr(read_domain(name, run), part), model.to(run.device).eval()
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


def mixtures(dev: Tensor, test: Tensor, config: Config) -> dict[str, float]:
    """Bits of every way to mix E experts on one domain. dev, test: log-probabilities [E, N, T]."""
    prior = cached_prior(dev, blocks=config.dev_blocks)
    moving = cached_prior(dev, blocks=config.dev_blocks, rate=0.3)
    return {
        "eq2": bits(ensemble_nll(test, prior.log())[0]),
        "last": bits(ensemble_nll(test, prior.log(), window=1)[0]),
        "released": bits(released_nll(test, released_prior(dev))),
        "moving": bits(ensemble_nll(test, moving.log())[0]),
        "top1": bits(-test[prior.argmax()]),
    }


def all_rules(
    forest: Forest, experts: Sequence[str], name: str, dev: Tensor, test: Tensor, run: Run
) -> dict[str, Any]:
    """A forest on one domain: its mixtures, its average, and whom eq. 2 believes: weights [E]."""
    prior = cached_prior(dev, blocks=run.config.dev_blocks)
    average = forest.average(experts, prior)
    _, weights = ensemble_nll(test, prior.log())
    return {
        **mixtures(dev, test, run.config),
        "posterior": bits(-score(average, "test", name, run.config, run)),
        "weights": weights.mean(dim=(1, 2)).tolist(),
    }


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
    config, names = job.config, scored(job.arm, job.run.config)
    if job.method == "grow":
        return {"eq2": [bits_with(job, new) for new in models_of(job.arm, job.run.config)]}
    said = read_said(job, models_of(job.arm, job.run.config))
    found: dict[str, list] = {}
    for name in names:
        dev, test = said[f"dev {name}"], said[f"test {name}"]
        if job.method == "random":
            on_this = mixtures(dev, test, config)
        else:
            on_this = all_rules(forest_of(job), config.own, name, dev, test, job.run)
        for key, value in on_this.items():
            found.setdefault(key, []).append(value)
    return found if job.method == "random" else found | uniform_and_removed(job, said, names)


def uniform_and_removed(job: Job, said: dict[str, Tensor], names: Sequence[str]) -> dict:
    """What asks for no domain: the average with equal weights, and the forest less one expert."""
    config, experts = job.config, len(job.config.own)
    equal = torch.full((experts,), 1 / experts, dtype=torch.float64)
    average, uniform = forest_of(job).average(config.own, equal), []
    for name in names:
        uniform.append(bits(-score(average, "test", name, config, job.run)))
    without = []  # [removed, domains]
    for removed in range(experts):
        others = [expert for expert in range(experts) if expert != removed]
        kept = {key: values[others] for key, values in said.items()}
        without.append(bits_of(kept, names, config))
    return {"uniform": uniform, "without": without}


def bits_with(job: Job, new: str) -> list[float]:
    """Of the experts of the first round and one more, alone: bits [domains]."""
    experts = models_of(sister(job.arm, "btm"), job.run.config)
    return bits_of(read_said(job, [*experts, new]), scored(job.arm, job.run.config), job.config)


def bits_of(said: dict[str, Tensor], names: Sequence[str], config: Config) -> list[float]:
    """Of eq. 2 with the cached prior: bits [domains]."""
    found = []
    for name in names:
        prior = cached_prior(said[f"dev {name}"], blocks=config.dev_blocks)
        found.append(bits(ensemble_nll(said[f"test {name}"], prior.log())[0]))
    return found


# --------------------------------------------------------------------------------------------------
# Claims. The paper's tables could not be read; its abstract, and a few numbers, could.
# --------------------------------------------------------------------------------------------------

WHERE = {"in": "in domain", "novel": "on novel domains"}
PPL = "perplexity 19.8 against 22.5 (125M, mean of all 16 domains)"


def split(values: np.ndarray, where: str, config: Config) -> np.ndarray:
    """The columns of values [seeds, domains] that are training domains ("in") or novel ones."""
    k = len(config.own)
    return values[:, :k] if where == "in" else values[:, k:]


def gains(
    results: Results, config: Config, rule: str, where: str, system: str = "btm"
) -> np.ndarray:
    """[seeds, domains]: bits by which a system is below the dense LM."""
    dense = split(results.of("dense", "bits"), where, config)
    return dense - split(results.of(system, rule), where, config)


def mean_gain(
    results: Results, config: Config, rule: str, where: str, system: str = "btm"
) -> np.ndarray:
    return gains(results, config, rule, where, system).mean(axis=1)  # [seeds]


def weakest(margins: dict[Any, np.ndarray]) -> Any:
    """Of {name: margin [seeds]} the name whose 90 % interval has the lowest end."""
    ends = {}
    for name, margin in margins.items():
        half = common.half_width(margin) if len(margin) > 2 else 0.0
        ends[name] = np.mean(margin) - half
    return min(ends, key=ends.get)


def worst_domain(results: Results, config: Config, rule: str, where: str) -> tuple[np.ndarray, str]:
    """(gain [seeds], what to say of it) of the domain on which a rule gains least."""
    names = config.own if where == "in" else config.novel
    by_domain = dict(zip(names, gains(results, config, rule, where).T))
    worst = weakest(by_domain)
    return by_domain[worst], f"{show(by_domain[worst])} bits/byte on {worst}, the weakest"


def listed(margins: dict[Any, np.ndarray]) -> str:
    return ", ".join(f"{name}: {show(margin)}" for name, margin in margins.items())


def perplexity(bits_by_domain: np.ndarray) -> str:
    """Of a byte (or token), the mean over domains and seeds, as in the paper's tables."""
    return f"{np.mean(2.0**bits_by_domain):.2f}"


@claim("at equal cost the forest beats the dense LM on every training domain", paper=PPL,
       required=True)  # fmt: skip
def in_domain(results: Results, config: Config) -> Margin:
    worst, text = worst_domain(results, config, "eq2", "in")
    mean = mean_gain(results, config, "eq2", "in")
    forest = perplexity(split(results.of("btm", "eq2"), "in", config))
    dense = perplexity(split(results.of("dense", "bits"), "in", config))
    text += f"; mean {show(mean)}, perplexity {forest} against {dense}"
    return Margin(worst, text, {"mean": mean})


@claim("... and, in the mean, on domains that no expert was trained on", paper=PPL, required=True)
def out_of_domain(results: Results, config: Config) -> Margin:
    """The mean over domains is what the paper's tables have; the weakest domain is named."""
    means = {}
    for rule in ("eq2", "last", "released"):
        means[rule] = mean_gain(results, config, rule, "novel")
    _, text = worst_domain(results, config, "eq2", "novel")
    return Margin(means["eq2"], f"{text}; means ({listed(means)})", means)


@claim("random splits of the data do not do: their ensemble loses to the dense LM on training "
       "domains, and to the forest there and on novel ones", required=True)  # fmt: skip
def random_split(results: Results, config: Config) -> Margin:
    """The weakest of its defeats, whether the whole past counts or the last token."""
    leads = {}
    for rule in ("eq2", "last"):
        for where in WHERE:
            gain = mean_gain(results, config, rule, where, "random")
            forest = mean_gain(results, config, rule, where)
            leads[f"forest {WHERE[where]} by {rule}"] = forest - gain
            if where == "in":
                leads[f"dense LM by {rule}"] = -gain
    return Margin(leads[weakest(leads)], f"bits/byte behind ({listed(leads)})", leads)


@claim("averaged by posterior into one LM it still beats the dense LM on every training domain",
       required=True)  # fmt: skip
def posterior_average(results: Results, config: Config) -> Margin:
    worst, text = worst_domain(results, config, "posterior", "in")
    means = {}
    for where in WHERE:
        means[WHERE[where]] = mean_gain(results, config, "posterior", where)
    return Margin(worst, f"{text}; mean {listed(means)}", means)


@claim("the gain is robust to the initialisation: a seed of a quarter, a half, three quarters of "
       "the compute", required=True)  # fmt: skip
def robust_to_seed(results: Results, config: Config) -> Margin:
    """The share with the smallest gain over the dense LM, mean of the training domains."""
    found = gains_by_share(results, config, "eq2")
    averaged = gains_by_share(results, config, "posterior")
    text = f"bits/byte gained by share of the seed ({listed(found)})"
    text += f"; averaged by posterior ({listed(averaged)})"
    return Margin(found[weakest(found)], text, found)


@claim("the gain over the dense LM grows with the number of domains", required=True)
def more_domains(results: Results, config: Config) -> Margin:
    """On the same first domains, so that easier ones do not count; the smaller step."""
    found, steps = gains_by_count(results, config), {}
    for fewer, more in itertools.pairwise(found):
        steps[more] = found[more] - found[fewer]
    if not steps:
        raise common.Missing("more than two domains")
    on = " and ".join(config.own[: min(found)])
    text = f"bits/byte gained on {on} by number of domains ({listed(found)})"
    return Margin(steps[weakest(steps)], text, found)


@claim("an added or removed expert changes its own domain only: others by less than a tenth",
       required=True)  # fmt: skip
def add_remove(results: Results, config: Config) -> Margin:
    """The worst of all experts that can be added or removed, and of all other domains."""
    found, margins = moves(results, config), {}
    for change, (own, other, _) in found.items():
        margins[change] = 0.1 * own - other
    worst = weakest(margins)
    own, other, where = found[worst]
    good = sum(common.verdict(margin) in ("holds", "seen") for margin in margins.values())
    text = f"worst of {len(margins)} is {worst}: {show(own)} bits/byte there, {show(other)} on "
    return Margin(margins[worst], f"{text}{where}; so it is with {good} of them", margins)


@claim("the plain mean is a better cached prior than the moving average", paper="0.3 on the new")
def plain_prior(results: Results, config: Config) -> Margin:
    """The weaker of training and novel domains."""
    leads = {}
    for where in WHERE:
        plain = mean_gain(results, config, "eq2", where)
        leads[WHERE[where]] = plain - mean_gain(results, config, "moving", where)
    return Margin(leads[weakest(leads)], f"bits/byte better {listed(leads)}", leads)


@check("seed and experts read as many tokens as the dense LM, with models of its size")
def cost_matched(results: Results, config: Config) -> Check:
    seed, dense = results["seed"][0]["tokens"], results["dense"][0]["tokens"]
    spent = {}
    for system in ("btm", "random"):
        spent[system] = sum(results[arm][0]["tokens"] for arm in models_of(system, config))
    text = f"{seed + spent['btm']:,} of {seed + dense:,} tokens, {seed:,} of them in the seed"
    return Check(spent == {"btm": dense, "random": dense}, text)


def gains_by_share(results: Results, config: Config, rule: str) -> dict[float, np.ndarray]:
    """{share of the seed: bits gained over the dense LM, mean of the training domains [seeds]}."""
    found = {}
    for share in sorted({*SHARES, config.seed_share}):
        found[share] = mean_gain(results, config, rule, "in", with_share(share, config))
    return found


def gains_by_count(results: Results, config: Config) -> dict[int, np.ndarray]:
    """{number of domains: bits gained over a dense LM of the same domains, on the first few}."""
    found, first = {}, min(counts(config))
    for count in counts(config):
        dense = results.of(with_count("dense", count, config), "bits")
        forest = results.of(with_count("btm", count, config), "eq2")
        found[count] = (dense - forest)[:, :first].mean(axis=1)
    return found


def moves(results: Results, config: Config) -> dict[str, tuple[np.ndarray, np.ndarray, str]]:
    """{"+ licences": (bits gained there [seeds], largest change elsewhere [seeds], where)}."""
    before, names = results.of("btm", "eq2"), scored("btm", config)  # [seeds, domains]
    after = {}
    for i, name in enumerate(config.novel):
        after[f"+ {name}"] = results.of("grow", "eq2")[:, i]
    for i, name in enumerate(config.own):
        after[f"- {name}"] = results.of("btm", "without")[:, i]
    found = {}
    for change, changed in after.items():
        own = names.index(change[2:])
        sizes = np.abs(changed - before)
        others = sizes.copy()
        others[:, own] = 0
        most = int(others.mean(axis=0).argmax())
        found[change] = (sizes[:, own], others[:, most], names[most])
    return found


# --------------------------------------------------------------------------------------------------
# Tables and picture
# --------------------------------------------------------------------------------------------------

RULES = {
    "eq2": "forest, eq. 2",
    "last": "forest, last token",
    "released": "forest, released scorer",
    "moving": "forest, moving-average prior",
    "top1": "forest, best expert alone",
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
        for where in WHERE:
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
    names, colors = scored("btm", config), dict(zip(("eq2", "last", "posterior"), common.COLORS))

    def by_domain(ax: Any) -> None:
        for i, (rule, color) in enumerate(colors.items()):
            gain = results.of("dense", "bits") - results.of("btm", rule)  # [seeds, domains]
            bars = [common.half_width(column) for column in gain.T] if len(gain) > 2 else None
            rows = np.arange(len(names)) + 0.2 * (i - 1)
            ax.errorbar(gain.mean(axis=0), rows, xerr=bars, fmt="o", markersize=4, color=color,
                        label=RULES[rule])  # fmt: skip
        ax.set_yticks(range(len(names)), names)
        ax.invert_yaxis()
        ax.axvline(0, color="0.7", zorder=0)
        ax.axhline(len(config.own) - 0.5, color="0.7", linestyle=":")
        ax.set(
            xlabel="bits/byte below the dense LM",
            title="gain by domain; below the line: novel domains",
        )

    def by_count(ax: Any) -> None:
        found = gains_by_count(results, config)
        values = np.stack(list(found.values()), axis=1)  # [seeds, counts]
        common.curve(ax, list(found), values, RULES["eq2"], colors["eq2"])
        title = f"gain on {' and '.join(config.own[: min(found)])}"
        ax.set(xlabel="number of domains", ylabel="bits/byte below the dense LM", title=title,
               xticks=list(found), ylim=(0, None))  # fmt: skip

    def by_share(ax: Any) -> None:
        for rule in ("eq2", "posterior"):
            found = gains_by_share(results, config, rule)
            values = np.stack(list(found.values()), axis=1)  # [seeds, shares]
            common.curve(ax, list(found), values, RULES[rule], colors[rule])
        ax.axhline(0, color="0.7", zorder=0)
        ax.set(xlabel="seed's share of compute", ylabel="bits/byte below the dense LM",
               title="gain in domain", xticks=list(found))  # fmt: skip

    if {"dense", "btm"} <= results.keys():
        has_curves = set(curves(config)) <= results.keys()
        run.plot([by_domain, by_count, by_share] if has_curves else [by_domain], width=5.2)


# --------------------------------------------------------------------------------------------------
# Commands: parts of a run, with nothing in common but the forest's folder
# --------------------------------------------------------------------------------------------------


def act(config: Config, run: Run) -> None:
    """The command that was given: a flag is used or refused, never ignored."""
    given = [name for name in ("stage", "sample", "average", "prepare") if name in run.actions]
    if len(given) != 1:
        flags = ", ".join(common.flag(name) for name in run.actions)
        raise UsageError(f"{flags}: goes with one of --stage, --sample, --average, --prepare")
    command = run.actions["stage"] if given == ["stage"] else given[0]
    function, uses = COMMANDS[command]
    idle = set(run.given) - ANYWHERE - uses - set(given)
    if idle:
        does = f"--stage {command}" if given == ["stage"] else common.flag(command)
        raise UsageError(f"{common.flag(min(idle))} does nothing with {does}")
    run.actions.setdefault("forest", run.out / f"forest-seed{run.seed}")
    function(config, run)


def open_forest(config: Config, run: Run) -> Forest:
    """The forest of a command, whose settings become the run's. UsageError: others were given."""
    forest = Forest(run.actions["forest"])
    seed = run.seed if "seed" in run.given else forest.seed
    forest.refuse_others(config, seed, [name for name in OF_A_FOREST if name in run.given])
    run.config = replace(config, **{name: getattr(forest.config, name) for name in OF_A_FOREST})
    return forest


def train_seed(config: Config, run: Run) -> None:
    """--stage seed"""
    run.config = check_texts(config, config.own, run)
    train_here(["seed"], Forest.create(run.actions["forest"], run.config, run.seed), run)


def train_experts(config: Config, run: Run) -> None:
    """--stage expert: one by --domain or --domain-index, or all of the first round."""
    forest = open_forest(config, run)
    config = run.config
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
    checked = check_texts(config, names, run)
    forest.refuse_others(checked, forest.seed, ["vocab_size"])
    run.config = replace(config, domain="")
    train_here([f"expert@domain={name}" for name in names], forest, run)


def train_here(arms: Sequence[str], forest: Forest, run: Run) -> None:
    """Train who is not there yet, `workers` at a time; checkpoints are in FOREST/work."""
    run.out, run.seeds = forest.path / "work", [forest.seed]
    (run.out / "arms").mkdir(parents=True, exist_ok=True)
    parts = {}  # {file: the job that makes it}
    for arm in arms:
        job = Job(run, arm, forest.seed)
        parts[forest.file(job.config.domain or "seed")] = job
    todo = []
    for file, job in parts.items():
        if file.exists():
            say(f"{file} is there already; delete it to train it again")
        else:
            todo.append((job, train_part))
    if min(run.workers, len(todo)) > 1:
        common.train_in_processes(run, todo)
    else:
        for job, train in todo:
            job.do(train)
    for file in parts:
        meta = forest.load(file)[1]
        say(f"{file}: from {lineage(meta)}, {meta['updates']} updates, {meta['tokens']:,} tokens")


def train_part(job: Job) -> dict:
    return train_model(job)[1]


def lineage(meta: dict) -> str:
    parents = sorted(meta["parents"].items(), key=lambda parent: -parent[1])
    shown = [f"{weight:.2f} {name}" for name, weight in parents if weight >= 0.005]
    return " + ".join(shown) or "scratch"


def evaluate(config: Config, run: Run) -> None:
    """--stage eval: whoever loads, one model at a time, on every domain whose text is here."""
    forest = open_forest(config, run)
    metas = forest.sound(run.actions.get("without", ""))
    for name, meta in metas.items():
        say(f"{name}: from {lineage(meta)}")
    config, texts = run.config, []
    asked = [config.domain] if config.domain else []
    for name in dict.fromkeys([*config.own, *config.novel, *forest.names(), *asked]):
        try:
            read_domain(name, run)
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
        found = all_rules(forest, list(metas), name, dev, test, run)
        shown = [f"{found[rule]:.3f}" for rule in RULES if rule in found]
        rows.append([name, f"{2 ** found['eq2']:.2f}", *shown])
        believed.append(found["weights"])
    header = ["", "perplexity", "eq. 2", "last token", "released", "moving", "best expert",
              "average"]  # fmt: skip
    run.table("bits/byte on test text; perplexity is that of eq. 2", header, rows)
    run.table(*posterior_table(texts, list(metas), believed))


def save_average(config: Config, run: Run) -> None:
    """--average: all experts as one model, which load_trained and --sample --model read."""
    forest = open_forest(config, run)
    kind, names = run.actions["average"], list(forest.sound(run.actions.get("without", "")))
    if (kind == "posterior") != bool(config.domain):
        raise UsageError("--average posterior goes with the --domain it is for, uniform without")
    weights = torch.full((len(names),), 1 / len(names), dtype=torch.float64)
    if config.domain:
        weights = prior_of(forest, names, config.domain, run.config, run)
    path = forest.path / "averages" / f"{config.domain or kind}.npz"
    meta = {"parents": dict(zip(names, weights.tolist()))}
    forest.save(path, forest.average(names, weights), meta)
    say(f"{path}: {lineage(meta)}")


def write(config: Config, run: Run) -> None:
    """--sample: go on with a text; at its end, whom the ensemble believes."""
    if "model" in run.actions:
        idle = (FOREST | {"without"}) & set(run.given) - {"seed"}
        if idle:
            raise UsageError(f"{common.flag(min(idle))} does nothing with --model")
        names, models = ["model"], [load_trained(run.actions["model"])]
    else:
        forest = open_forest(config, run)
        names = list(forest.sound(run.actions.get("without", "")))
        models = [forest.model(name) for name in names]
    if models[0].head.out_features != 256:
        raise UsageError("--sample writes bytes; this forest was trained on token ids")
    ensemble = Ensemble(models).to(run.device)
    prompt = torch.tensor([0, *run.actions["sample"].encode()], device=run.device)
    generator = torch.Generator().manual_seed(run.seed)
    tokens = common.generate(ensemble, prompt, 160, models[0].context, generator=generator)
    text = bytes(tokens[1:].tolist()).decode("utf-8", "replace")
    say("".join(char if char.isprintable() or char in "\n\t" else "\ufffd" for char in text))
    if len(models) > 1:
        believed = {"parents": dict(zip(names, ensemble.weights[:, 0, -1].tolist()))}
        say(f"\nbelieved at the end: {lineage(believed)}")


def prepare(config: Config, run: Run) -> None:
    """--prepare: a domain of one's own, or those of the Pile by their labels."""
    root = run.data_dir / "btm"
    sizes, labels = text_data.prepare(run.actions["prepare"], root, config.domain)
    for name, parts in sizes.items():
        shown = ", ".join(f"{size:,} bytes of {part}" for part, size in parts.items())
        say(f"{root / name}: {shown}")
    lacking = [label for label, name in text_data.PILE.items() if name not in sizes]
    if labels and lacking:
        say(f"too little of {', '.join(lacking)}; labels found: {', '.join(map(repr, labels))}")


ACTIONS = {  # the script's own flags; see common.FLAGS
    "stage": ("", ("seed", "expert", "eval"), "one part of a run, on a forest"),
    "forest": (Path(), "DIR", "the forest; default: that of the run in --out"),
    "domain_index": (0, "I", "the domain of --stage expert by number, for job arrays"),
    "without": ("", "NAMES", "experts that --stage eval, --sample and --average leave out"),
    "sample": ("", "TEXT", "go on writing TEXT with the ensemble, or with --model"),
    "model": (Path(), "FILE", "a file of a forest, for --sample"),
    "average": ("", ("uniform", "posterior"), "save all experts as one; posterior: by --domain"),
    "prepare": (Path(), "PATH", "make domains of a file or folder; without --domain by the Pile's"),
}
ANYWHERE = set("full device dtype threads data_dir resume traceback out".split())
FOREST = {"forest", "seed", *OF_A_FOREST}
TRAINING = {*FOREST, "workers", "compile", "micro_batch"}
COMMANDS = {  # what does it, and the flags that it uses, beside ANYWHERE
    "seed": (train_seed, TRAINING),
    "expert": (
        train_experts,
        {*TRAINING, "domain", "domain_index", "branch_steps", "branch_lr", "dev_blocks"},
    ),
    "eval": (evaluate, {*FOREST, "without", "domain", "novel", "dev_blocks", "test_blocks"}),
    "sample": (write, {*FOREST, "without", "model"}),
    "average": (save_average, {*FOREST, "without", "domain", "dev_blocks"}),
    "prepare": (prepare, {"domain"}),
}


# --------------------------------------------------------------------------------------------------
# main
# --------------------------------------------------------------------------------------------------


def check_texts(config: Config, names: Sequence[str], run: Run) -> Config:
    """Read the texts before anything is written; settle the vocabulary."""
    splits = {}
    for name in names:
        try:
            splits[name] = read_domain(name, run)
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


def rounds(systems: Sequence[str], config: Config) -> list[list[str]]:
    """Who must be there before whom: seeds, models of the first round, of later rounds."""
    seeds, first, later = [], [], []
    for system in systems:
        seeds.append(sister(system, "seed"))
        if system.partition("@")[0] == "grow":
            later += models_of(system, config)
            system = sister(system, "btm")
        first += models_of(system, config)
    return [list(dict.fromkeys(wave)) for wave in (seeds, first, later)]


def sequences(arm: str, config: Config) -> int:
    """How many an arm reads in training."""
    config, method = common.arm_config(config, arm), arm.partition("@")[0]
    if config.domain in config.novel:
        return config.branch_steps * config.blocks_per_domain
    updates = config.seed_steps if method == "seed" else config.steps - config.seed_steps
    width = len(config.own) if method in ("seed", "dense") else 1
    return updates * width * config.blocks_per_domain


def plan(waves: Sequence[Sequence[str]], config: Config, run: Run) -> None:
    model = make_model(config, "").to(run.device)
    slow = run.scale == "full" and run.device == "cpu"  # there a batch would take minutes
    rows = 1 if slow else min(config.micro_batch, len(config.own) * config.blocks_per_domain)
    windows = torch.zeros(rows, config.context + 1, dtype=torch.long, device=run.device)
    reads = sum(sequences(arm, config) for wave in waves for arm in wave) * len(run.seeds)
    text = f"{len(run.data)} domains {common.digest(run.data)[:12]}"
    run.num_jobs = max(len(wave) for wave in waves) * len(run.seeds)
    run.plan(text, model, lambda: common.lm_loss(model, windows).mean().backward(), reads / rows)


def main(config: Config, run: Run) -> Results | None:
    if run.actions:
        return act(config, run)
    if config.domain:
        raise UsageError("--domain goes with one of --stage, --average, --prepare")
    run.config = config = check_texts(config, scored("btm", config), run)
    systems = run.choose(SYSTEMS, default=[*SYSTEMS], more=curves(config))
    waves = rounds(systems, config)
    plan(waves, config, run)
    run.begin()
    if not run.resume:
        for path in run.out.glob("forest-seed*"):
            shutil.rmtree(path)
    keep_texts(run)

    results = Results()
    for wave in waves:
        results |= run.train_arms(train_arm, wave)
    forests = [system for system in systems if system.partition("@")[0] != "dense"]
    results |= run.train_arms(merge, forests)
    shutil.rmtree(run.out / "texts", ignore_errors=True)  # none where all texts are folders
    print_tables(results, config, run)
    draw(results, config, run)
    say(f"\nthe forest is in {run.out / f'forest-seed{run.seed}'}; --sample 'def ' writes with it")
    return results


if __name__ == "__main__" and int(os.environ.get("RANK", 0)) == 0:
    # Experts never talk: under torchrun the first process trains as many at a time as it has GPUs
    # or cores, and the others are not needed.
    common.run(main, SMALL, FULL, actions=ACTIONS)
