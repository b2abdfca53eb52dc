"""Branch-Train-Merge: expert language models trained apart, ensembled or averaged.

Li, Gururangan, Dettmers, Lewis, Althoff, Smith, Zettlemoyer, "Branch-Train-Merge: Embarrassingly Parallel Training of
Expert Language Models" (arXiv 2208.03306, 2022).

Training one large model needs machines that talk to each other at every step. Branch-Train-Merge trains many models
that never talk. A *seed* model reads all text for a while; then it is copied once per *domain* (text by provenance:
code, law, news ...), and every copy, an *expert*, goes on alone with its domain. The set of experts is the model:

    seed -> branch:  theta_j = theta_seed, or sum_i w_i theta_i over the experts that are there (later rounds)
         -> train:   theta_j on domain j, nothing else, on any machine, at any time
         -> merge:   put theta_j's folder beside the others. Removing it is deleting the folder.

At inference the experts' next-token *probabilities* are mixed by how well each has predicted the text so far:

    p(x_t | x_<t) = sum_j p_j(x_t | x_<t) p(j | x_<t)                              (eq. 1)
    p(j | x_<t)   = prior_j prod_{s<t} p_j(x_s | x_<s) / the same summed over j    (eq. 2)

or the experts are averaged into one model, sum_j prior_j theta_j. The prior is cached: how much each expert was
believed, on average, on development text of the target domain.

       text                      def f(x): return x | LATIN SMALL LETTER A;Ll
       python's weight, eq. 2    .3 .6  .9  1  1  1 | 1  1  1  .9  .8  .7  .7     all of the past counts
       from the last 24 bytes    .3 .6  .9  1  1  1 | .9 .5 .1  0   0   0   0     (--plot draws both)

Run      python btm.py                       seed, experts, their rivals, and one later round; no download
         python btm.py --ablate --plot       every arm below, and pictures
         python btm.py --sample "def "       write with the forest just trained, and see whom it believes
     The same in separate commands, on one machine or on many, with nothing in common but a folder F:
         python btm.py --stage seed --forest F
         python btm.py --stage expert --forest F --domain python            once a domain, anywhere, in any order
         torchrun --nproc-per-node 2 btm.py --stage expert --forest F       or: each process trains its own experts
         sbatch --array=0-7 --gpus=1 --wrap \
             'python btm.py --full --stage expert --forest F --domain-index $SLURM_ARRAY_TASK_ID'
         python btm.py --stage eval --forest F --without unicode            whoever is in the folder, but for one
     A command that was stopped goes on when it is given again. A domain of your own, in a later round:
         python btm.py --prepare ~/notes --domain notes
         python btm.py --stage expert --forest F --domain notes
You see  what each system cost, bits/byte by domain and method, whom the posterior believes, the claims.
Found    (seeds 0-2, bits/byte) at equal tokens and FLOPs the forest is 0.12 better than the dense LM on its domains;
         the dense LM needs 1.4 times the updates to match. Elsewhere eq. 2 gains 0.01, the last token only 0.06. Random
         splits lose to the dense LM on its domains (elsewhere they gain 0.01, last token 0.03). Averaged by posterior,
         one LM keeps 0.10 of the gain; equal weights lose, and without a common seed any average is ruined. An honest
         rival: DEMix, with half the parameters, is level on its domains when the last token decides (its attention
         reads all domains), but worse elsewhere by 0.04.

Differences from the paper and its code
1. The text defines eq. 2 over the whole prefix; the released scorer looks at the last token only. Both are printed.
2. The cached prior averages the posterior over positions; the released code takes the last position of 101 blocks.
3. Experts read exactly the bytes that the dense model reads of their domain at the same update, so that costs and data
   are equal by construction; the paper draws afresh after the branch.
4. In later rounds Adam starts afresh with its own warm-up: there are several parents (the paper's choice is unknown).
5. Small scale: 2 layers, bytes, three quarters of the updates for the seed (the paper: one half; shorter runs need more
   seed). `--full`: the paper's 125M model on the parts of the Pile that are still public, instead of the paper's text.
6. Removing an expert removes what it learnt alone: the seed has read its domain too, here as in the paper.

Break it yourself: --seed-share 0.25 (averages fall apart before the ensemble does); an inclusive cumsum in ensemble_nll
(the target leaks, wonderful results); --domains sums,dates,numerals,records (domains so far apart that routing is all).
"""

import copy
import functools
import hashlib
import itertools
import json
import math
import os
import shutil
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bridge as common
from bridge import Claim, Run, say
from data import text as text_data

# ---------------------------------------------------------------------------------------------------------------
# Config
# ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    domains: tuple[str, ...] = ("python", "headers", "docs", "tests", "operators", "unicode")  # one expert each
    novel: tuple[str, ...] = ("licences", "numpy", "cmake", "stubs")  # domains no expert is trained on
    steps: int = 600  # updates of seed and expert together, and of the dense model; the paper's 125M: 80,000
    tokens: float | None = None  # budget of the forest (and of the dense model); chooses steps
    seed_share: float = 0.75  # of the updates, spent on the seed; released scripts: one half
    blocks_per_domain: int = 4  # sequences an update, for an expert and for each domain of the seed; 125M: 128
    micro_batch: int = 1024  # sequences a forward pass; gradients are accumulated over them
    context: int = 64  # tokens; paper 1,024
    num_layers: int = 2  # transformer layers; 125M: 12
    d_model: int = 64  # width; 125M: 768
    num_heads: int = 4  # attention heads; 125M: 12
    conv: int = 4  # width of the causal convolution on the embeddings; the paper has none
    vocab_size: int = 256  # bytes; a domain of token ids brings its own
    init: float = 0.1  # standard deviation of initial weights; 125M: 0.02
    lr: float = 1e-2  # peak, linear to zero, from LR_GRID; released scripts 5e-4
    warmup_share: float = 0.08  # of the updates; released scripts
    clip: float = 1.0  # gradient norm; released scripts 0.1
    weight_decay: float = 0.1  # decoupled; released scripts
    grow: str = "licences"  # novel domain that gets an expert in a later round
    branch_steps: int = 150  # updates of an expert of a later round
    branch_lr: float = 4e-3  # its peak, own warm-up, linear to zero
    dev_blocks: int = 100  # development sequences a domain, for the cached prior; paper 100
    test_blocks: int = 128  # test sequences a domain
    top_k: int = 0  # experts kept a domain by --stage eval; 0 keeps all
    sample_bytes: int = 160  # tokens that --sample writes


SMALL = Config()
FULL = replace(
    SMALL,
    domains=("web", "arxiv", "pubmed-central", "freelaw", "github", "wikipedia", "stackexchange", "uspto"),
    novel=tuple("hackernews enron europarl philpapers nih-exporter pubmed-abstracts gutenberg mathematics".split()),
    **{"steps": 80_000, "seed_share": 0.5, "blocks_per_domain": 128, "micro_batch": 32, "context": 1024},
    **{"num_layers": 12, "d_model": 768, "num_heads": 12, "conv": 0, "init": 0.02, "lr": 5e-4, "clip": 0.1},
    **{"grow": "gutenberg", "branch_steps": 8_000, "branch_lr": 5e-4, "test_blocks": 1_000},
)
NOT_OF_A_FOREST = ("novel", "tokens", "micro_batch", "grow", "test_blocks", "top_k", "sample_bytes")
ACTIONS = {  # the script's own commands; see common.FLAGS
    "stage": ("", ("seed", "expert", "eval"), "one stage of a run, on a forest"),
    "forest": (Path(), "DIR", "the forest; default: the one in --out"),
    "domain": ("", "NAME", "domain of --stage expert (a new one starts a later round), or of --prepare"),
    "domain_index": (0, "I", "the same by number, for job arrays"),
    "without": ("", "NAMES", "experts that --stage eval and --sample leave out"),
    "force": (False, None, "train an expert again that is there already"),
    "sample": ("", "TEXT", "go on writing TEXT with the ensemble"),
    "prepare": (Path(), "PATH", "make domains of a file or folder; without --domain by the Pile's labels"),
}

# ---------------------------------------------------------------------------------------------------------------
# The method: whom to believe, how to mix, how to average
# ---------------------------------------------------------------------------------------------------------------


def ensemble_nll(expert_logprobs: Tensor, log_prior: Tensor, window: int | None = None) -> tuple[Tensor, Tensor]:
    """Mix the experts' probabilities by the domain posterior: eqs. 1 and 2.

    expert_logprobs [E, N, T]  log-probability that each expert gave to each true token of N blocks
    log_prior [E] or [E, N]    log p(expert) at the start of every (each) block; -inf switches an expert off
    window                     evidence from so many tokens before t: None all (eq. 2), 1 the released code, 0 none
    Returns nll [N, T] in nats and the weights [E, N, T] that were in force at each token, both float64.
    Raises ValueError for shapes that do not fit, non-finite log-probabilities, or a prior without mass.
    """
    logprobs, log_prior = expert_logprobs.double(), torch.as_tensor(log_prior).double().to(expert_logprobs.device)
    if logprobs.dim() != 3 or log_prior.shape not in (logprobs.shape[:1], logprobs.shape[:2]):
        raise ValueError(f"expert_logprobs {[*logprobs.shape]} with log_prior {[*log_prior.shape]}: not [E, N, T]")
    if window is not None and window < 0:
        raise ValueError(f"window is {window}; None or at least 0 is allowed")
    if not torch.isfinite(logprobs).all():
        raise ValueError("expert_logprobs hold NaN or infinity")
    if not (log_prior < torch.inf).all() or not (log_prior.amax(dim=0) > -torch.inf).all():
        raise ValueError("log_prior has no mass: at least one expert must be finite, none NaN or +inf")
    length = logprobs.shape[-1]
    total = F.pad(logprobs.cumsum(dim=-1), (1, 0))  # [E, N, T + 1]; at t the sum over s < t: the target stays out
    evidence = total[..., :length]
    if window is not None:
        evidence = evidence - total[..., (torch.arange(length) - window).clamp(min=0)]
    log_prior = log_prior[..., None] if log_prior.dim() == 2 else log_prior[:, None, None]
    log_weights = (log_prior + evidence).log_softmax(dim=0)  # [E, N, T]
    return -(log_weights + logprobs).logsumexp(dim=0), log_weights.exp()


def smoothed(posteriors: Tensor, rate: float = 0.3) -> Tensor:
    """Exponential moving average: the first block as it is, then weight `rate` on each new one. [N, E] -> [E]."""
    if len(posteriors) == 0:
        raise ValueError("no blocks to estimate a prior from")
    prior = posteriors[0]
    for posterior in posteriors[1:]:
        prior = rate * posterior + (1 - rate) * prior
    return prior / prior.sum()


def cached_prior(expert_logprobs: Tensor, window: int | None = None, blocks: int = 100, rate: float = 0.3) -> Tensor:
    """p(expert) [E] for a target domain, from its development text; then fixed. Section "cached prior".

    expert_logprobs [E, N, T] of development blocks, of which the first `blocks` count. Each block's posterior is the
    mean of its weights over positions under a uniform prior. Raises ValueError without blocks.
    """
    logprobs = expert_logprobs[:, :blocks]
    _, weights = ensemble_nll(logprobs, torch.zeros(len(logprobs)), window)
    return smoothed(weights.mean(dim=-1).T, rate)


def updating_prior(expert_logprobs: Tensor, window: int | None = None, rate: float = 0.3) -> Tensor:
    """The prior in force at each block when it follows the blocks seen so far: [E, N + 1], column 0 is uniform.

    Its last column is the cached prior of the released code. expert_logprobs [E, N, T].
    """
    num_experts, num_blocks, _ = expert_logprobs.shape
    priors = [torch.full((num_experts,), 1 / num_experts, dtype=torch.float64)]
    for n in range(num_blocks):
        _, weights = ensemble_nll(expert_logprobs[:, n : n + 1], priors[-1].log(), window)
        posterior = weights.mean(dim=(1, 2))
        priors.append(posterior if n == 0 else rate * posterior + (1 - rate) * priors[-1])
    return torch.stack(priors, dim=1)


def em_prior(expert_logprobs: Tensor, iterations: int = 20) -> Tensor:
    """Mixture weights [E] that fit development text best, by expectation-maximization. An option beyond the paper."""
    logprobs = expert_logprobs.double().flatten(1)  # [E, tokens]
    log_prior = torch.full((len(logprobs), 1), -math.log(len(logprobs)), dtype=torch.float64)
    for _ in range(iterations):
        responsibility = (log_prior + logprobs).softmax(dim=0)
        log_prior = responsibility.mean(dim=1, keepdim=True).log()
    return log_prior.exp().squeeze(1)


def top_k_prior(prior: Tensor, top_k: int) -> Tensor:
    """Keep the top_k largest entries (ties: the first), zero the rest, renormalise. [E] -> [E]."""
    if not 1 <= top_k <= len(prior):
        raise ValueError(f"top_k is {top_k}; 1 to {len(prior)} experts can be kept")
    kept = prior.sort(descending=True, stable=True).indices[:top_k]
    sparse = torch.zeros_like(prior).index_copy(0, kept, prior[kept])
    return sparse / sparse.sum()


def average_parameters(state_dicts: Sequence[dict[str, Tensor]], weights: Sequence[float]) -> dict[str, Tensor]:
    """sum_i w_i theta_i, summed in float64 and cast back; integer buffers are the first one's. Inputs stay as they are.

    Raises ValueError for an empty list, other keys or shapes, or weights that are negative or do not sum to 1 (1e-6).
    """
    weights = [float(weight) for weight in weights]
    if not state_dicts or len(state_dicts) != len(weights):
        raise ValueError(f"{len(state_dicts)} models and {len(weights)} weights; at least one, and equally many")
    if not all(weight >= 0 for weight in weights) or abs(sum(weights) - 1) > 1e-6:
        raise ValueError(f"weights {weights} must be at least 0 and sum to 1")
    shapes = [{name: tensor.shape for name, tensor in state.items()} for state in state_dicts]
    if any(shape != shapes[0] for shape in shapes):
        raise ValueError("the models differ in names or shapes of their parameters")
    averaged = {name: tensor.clone() for name, tensor in state_dicts[0].items()}
    for name, first in averaged.items():
        if first.is_floating_point():
            total = sum(w * state[name].double() for w, state in zip(weights, state_dicts) if w > 0)
            averaged[name] = total.to(first.dtype)
    return averaged


def learning_rate_factor(update: int, updates: int, warmup_share: float = 0.08) -> float:
    """Linear warm-up to 1, then straight down to 0 at the last update; updates count from 1. Released scripts."""
    warmup = max(1, round(warmup_share * updates))
    return update / warmup if update <= warmup else (updates - update) / max(1, updates - warmup)


@torch.no_grad()
def generate(
    models: Sequence[nn.Module], tokens: Tensor, log_prior: Tensor, num: int, context: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Sample `num` tokens from the ensemble after a prompt [time]: (tokens [time + num], weights [E, time + num]).

    weights[:, t] are in force when token t is read or written. Token 0 is taken as given; start with a separator.
    """
    evidence = torch.stack([text_log_probs(model, tokens, context) for model in models]).double()  # [E, time - 1]
    for _ in range(num):
        logits = torch.stack([model(tokens[None, -context:])[0, -1].cpu() for model in models])
        logprobs = logits.double().log_softmax(dim=-1)  # [E, vocab]
        log_weights = (log_prior.double() + evidence.sum(dim=1)).log_softmax(dim=0)
        probs = (log_weights[:, None] + logprobs).logsumexp(dim=0).exp()
        token = torch.multinomial(probs, 1, generator=generator)
        tokens = torch.cat([tokens, token.to(tokens.device)])
        evidence = torch.cat([evidence, logprobs[:, token]], dim=1)
    _, weights = ensemble_nll(evidence[:, None], log_prior)
    return tokens, torch.cat([log_prior.double().softmax(dim=0)[:, None], weights[:, 0]], dim=1)


@torch.no_grad()
def text_log_probs(model: nn.Module, tokens: Tensor, context: int) -> Tensor:
    """log p of every token but the first, from at most `context` tokens before it. tokens [time] -> [time - 1] fp32."""
    if len(tokens) < 2:
        return torch.zeros(0)
    windows = tokens.unfold(0, min(context + 1, len(tokens)), 1)  # [windows, context + 1]
    logprobs = torch.cat([-common.lm_loss(model, part) for part in windows.split(64)])
    return torch.cat([logprobs[0], logprobs[1:, -1]]).cpu()


# ---------------------------------------------------------------------------------------------------------------
# The models: a GPT, and the DEMix baseline
# ---------------------------------------------------------------------------------------------------------------


class MLP(nn.Module):
    """The feed-forward of GPT. x [..., d_model] -> the same shape."""

    def __init__(self, d_model: int, init: float, num_layers: int, generator: torch.Generator | None = None):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(d_model, 4 * d_model), nn.Linear(4 * d_model, d_model)
        nn.init.normal_(self.fc1.weight, std=init, generator=generator)
        nn.init.normal_(self.fc2.weight, std=init / math.sqrt(2 * num_layers), generator=generator)
        nn.init.zeros_(self.fc1.bias), nn.init.zeros_(self.fc2.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class DomainFFN(nn.Module):
    """DEMix (Gururangan et al. 2022): one feed-forward per domain, chosen by label. x [rows, ..., d_model] -> the same.

    In training row r belongs to domain r % num_domains. Set `domain` to use one of them as an expert.
    """

    def __init__(self, mlp: nn.Module, num_domains: int):
        super().__init__()
        self.mlps, self.domain = nn.ModuleList([copy.deepcopy(mlp) for _ in range(num_domains)]), None

    def forward(self, x: Tensor) -> Tensor:
        if self.domain is not None:
            return self.mlps[self.domain](x)
        rows = x.unflatten(0, (-1, len(self.mlps)))  # [rows / domains, domains, ..., d_model]
        return torch.stack([mlp(rows[:, i]) for i, mlp in enumerate(self.mlps)], dim=1).flatten(0, 1)


SHAPE = ("vocab_size", "num_layers", "d_model", "num_heads", "context", "conv")  # as in common.TransformerLM


def language_model(
    init: float = 0.02, num_domains: int = 0, generator: torch.Generator | None = None, **shape: int
) -> common.TransformerLM:
    """A GPT of that SHAPE with tied embeddings; num_domains > 0 makes it DEMix. tokens [batch, time] -> logits."""

    def make_ffn(layer: int) -> nn.Module:
        mlp = MLP(shape["d_model"], init, shape["num_layers"], generator)
        return DomainFFN(mlp, num_domains) if num_domains else mlp

    model = common.TransformerLM(**shape, make_ffn=make_ffn, init=init, generator=generator)
    model.head.weight = model.embedding.weight
    return model


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """A language_model's state, tied weights once."""
    return {name: tensor for name, tensor in model.state_dict().items() if name != "head.weight"}


def put_weights(model: nn.Module, weights: dict[str, Tensor]) -> nn.Module:
    model.load_state_dict(weights | {"head.weight": weights["embedding.weight"]})
    return model


def shapes_of(weights: dict[str, Tensor]) -> dict[str, tuple[tuple[int, ...], str]]:
    return {name: (tuple(w.shape), str(w.dtype).removeprefix("torch.")) for name, w in weights.items()}


# ---------------------------------------------------------------------------------------------------------------
# The forest on disk: a folder per expert, no manifest, no lock, nothing executed
# ---------------------------------------------------------------------------------------------------------------


class Forest:
    """A folder of experts that anyone may add to: F/config.json, F/seed/ and F/experts/<name>/{weights.npz,meta.json}.

    The folder listing *is* the forest: add is dropping a folder in, remove is deleting one. weights.npz is written
    first and meta.json, which holds its SHA-256, last: an expert without meta.json is still being made and is passed
    over. `load` trusts nothing: name, size, hash, arrays, shapes, dtypes, finiteness and the configuration are checked,
    and nothing is unpickled. A hash in the same folder shows damage, not malice.
    """

    FORMAT = 1

    def __init__(self, path: str | Path):
        """Raises FileNotFoundError without a config.json, ValueError for a damaged one."""
        self.path = Path(path)
        if not (self.path / "config.json").is_file():
            raise FileNotFoundError(f"{self.path} is no forest: there is no config.json; --stage seed makes one")
        try:
            content = self._read_small(self.path / "config.json")
            self.config = json.loads(content)
            shape = {name: int(self.config[name]) for name in SHAPE}
            if self.config["format"] != self.FORMAT or not 1 <= shape["num_layers"] <= 1000:
                raise ValueError(f"format {self.config['format']}, {shape['num_layers']} layers")
            with torch.device("meta"):  # no memory is spent on the weights
                self.expected = shapes_of(weights_of(language_model(**shape)))
        except (ValueError, LookupError, TypeError, RuntimeError, OverflowError) as error:
            raise ValueError(f"{self.path / 'config.json'} is damaged ({error})") from error
        self.digest = hashlib.sha256(content).hexdigest()

    @classmethod
    def create(cls, path: str | Path, config: dict) -> "Forest":
        """Make an empty forest, or open the one that is there. ValueError when it was made otherwise."""
        path, config = Path(path), {"format": cls.FORMAT, **json.loads(json.dumps(config))}
        if not (path / "config.json").exists():
            common.write_json(path / "config.json", config)
        forest = cls(path)
        for name in config:
            if forest.config.get(name) != config[name]:
                raise ValueError(f"{path} was made with {name} = {forest.config.get(name)}, not {config[name]}")
        return forest

    @staticmethod
    def _read_small(path: Path) -> bytes:
        if path.stat().st_size > 1_000_000:
            raise ValueError(f"{path} is too large")
        return path.read_bytes()

    def folder(self, name: str) -> Path:
        if not text_data.NAME.fullmatch(name):
            raise ValueError(f"expert name {name[:80]!r}: letters, digits, '_', '.' and '-' are allowed, at most 64")
        return self.path / "seed" if name == "seed" else self.path / "experts" / name

    def folders(self) -> list[str]:
        return sorted(path.name for path in self.path.glob("experts/*") if not path.name.startswith("."))

    def verify(self) -> dict[str, str | None]:
        """Every folder under experts/: None when it loads, otherwise what is wrong in one line."""
        return {name: self.wrong_with(name) for name in self.folders()}

    def wrong_with(self, name: str) -> str | None:
        try:
            self.load(name)
        except ValueError as error:
            return str(error)
        return None

    def add(self, name: str, weights: dict[str, Tensor], meta: dict | None = None, force: bool = False) -> str:
        """Commit an expert; returns the SHA-256 of its weights. Raises ValueError when it is there, or does not fit."""
        folder = self.folder(name)
        if folder.is_symlink():
            raise ValueError(f"expert {name!r}: {folder} is a link; nothing is written outside the forest")
        if (folder / "meta.json").exists():
            if not force:
                raise ValueError(f"expert {name!r} is in {self.path} already; --force replaces it")
            (folder / "meta.json").unlink()
        if (found := shapes_of(weights)) != self.expected:
            odd = sorted(key for key in found.keys() | self.expected if found.get(key) != self.expected.get(key))
            raise ValueError(f"expert {name!r} does not fit {self.path}: {', '.join(odd[:3])}")
        digest = common.save_arrays(folder / "weights.npz", weights)
        own = {"format": self.FORMAT, "name": name, "config": self.digest, "sha256": digest}
        common.write_json(folder / "meta.json", {"parents": [], **(meta or {}), **own})
        return digest

    def remove(self, name: str) -> None:
        """Delete an expert: first out of the listing, then from the disk. Raises ValueError when there is none."""
        folder = self.folder(name)
        if folder.is_symlink():
            return folder.unlink()  # what it points to is not the forest's
        if not folder.is_dir():
            raise ValueError(f"there is no expert {name!r} in {self.path}")
        gone = folder.with_name(f".removed-{name}")
        shutil.rmtree(gone, ignore_errors=True)
        os.replace(folder, gone)
        shutil.rmtree(gone)

    def load(self, name: str) -> tuple[dict[str, Tensor], dict]:
        """(weights, meta). Raises ValueError in one line that begins with the expert's name."""
        try:
            folder = self.folder(name)
            path = folder / "weights.npz"
            if folder.is_symlink() or path.is_symlink() or (folder / "meta.json").is_symlink():
                raise ValueError("links are refused")
            if not (folder / "meta.json").is_file():
                raise ValueError("no meta.json: still being made, or its maker was stopped")
            meta = json.loads(self._read_small(folder / "meta.json"))
            if not isinstance(meta, dict) or meta.get("name") != name or meta.get("format") != self.FORMAT:
                raise ValueError("meta.json does not describe this expert")
            if meta.get("config") != self.digest:
                raise ValueError("made for another configuration than this forest's")
            for parent in meta["parents"]:
                if not text_data.NAME.fullmatch(parent["name"]) or not 0 <= parent["weight"] <= 1:
                    raise ValueError("meta.json names impossible parents")
            if not path.is_file():
                raise ValueError("no weights.npz")
            room = sum(4 * math.prod(shape) + 1024 for shape, _ in self.expected.values()) + 65_536
            if path.stat().st_size > room:
                raise ValueError(f"weights.npz has {path.stat().st_size:,} bytes, more than this architecture needs")
            return common.load_arrays(path, self.expected, str(meta.get("sha256")))[0], meta
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError, OSError) as error:
            raise ValueError(f"expert {name[:80]!r} refused: {' '.join(str(error).split())}") from error


def load_trained(path: str | Path) -> nn.Module:
    """A language model in eval mode, from what a run left.

    path  the folder of a seed or an expert, runs/btm-small/forest-seed0/experts/python; or of the other arms
          runs/btm-small/arms/dense-seed0.pt. In DEMix, set `domain` of every layer in ffns() to use one of them.
    Raises ValueError: see Forest.load and common.load_trained.
    """
    path = Path(path)
    if path.is_dir():
        forest = Forest(path.parent.parent if path.parent.name == "experts" else path.parent)
        weights, _ = forest.load(path.name)
        return put_weights(language_model(**{name: forest.config[name] for name in SHAPE}), weights).eval()

    def make(trained: common.Trained) -> nn.Module:
        is_demix = trained.arm == "demix"
        model = build(trained.config, "", len(trained.config.domains) if is_demix else 0)
        return put_weights(model, common.load(path))

    return common.load_trained(path, Config, make)


# ---------------------------------------------------------------------------------------------------------------
# The experiment: seed, experts, and rivals that cost the same
# ---------------------------------------------------------------------------------------------------------------

LR_GRID, BRANCH_LR_GRID = (5e-3, 1e-2, 2e-2), (2e-3, 4e-3, 8e-3)  # the same for every arm; --ablate prints them
INITS = ("posterior", "nearest", "uniform", "seed", "scratch")  # where a later round may branch from
MORE_COMPUTE, FEWER_DOMAINS = (1.25, 1.5, 2.0), (2, 4)  # for --ablate: updates of the dense LM, domains of all
AVERAGED = ("", "@unseeded")  # systems whose experts are averaged, too
NUM_GROUPS = 16  # of test blocks: what a run of one seed takes its standard error over
EQ2, LAST_TOKEN = "BTM, eq. 2", "BTM, last token (released code)"


@functools.cache
def load_domain(name: str, root: Path) -> text_data.Split:
    return text_data.find_split(name, root / "btm")


def seed_steps(config: Config) -> int:
    return round(config.seed_share * config.steps)


def expert_arms(config: Config, suffix: str = "") -> list[str]:
    return [f"expert-{name}{suffix}" for name in config.domains]


def random_arms(config: Config) -> list[str]:
    return [f"random-{i}" for i in range(len(config.domains))]


def demix_experts(config: Config) -> list[str]:
    return [f"demix:{name}" for name in config.domains]


def fewer_domains(config: Config) -> dict[int, str]:
    """{number of domains: suffix of the system that has the first so many}, the whole last."""
    return {n: f"@first{n}" for n in FEWER_DOMAINS if n < len(config.domains)} | {len(config.domains): ""}


def systems(config: Config, ablate: bool) -> dict[str, tuple[Config, list[str]]]:
    """What is trained in one round: {suffix: (config, arms without the suffix)}; "" is the system itself."""
    pair = ["dense", *expert_arms(config)]
    found = {"": (config, [*pair, *random_arms(config), *["demix"] * ablate])}
    if ablate:
        inside = replace(config, novel=())
        found |= {f"@lr{lr:g}": (replace(inside, lr=lr), pair) for lr in LR_GRID if lr != config.lr}
        for num, suffix in [*fewer_domains(config).items()][:-1]:
            found[suffix] = (replace(inside, domains=config.domains[:num]), pair[: 1 + num])
        found["@unseeded"] = (replace(inside, seed_share=0.0), expert_arms(config))
        for times in MORE_COMPUTE:
            found[f"@x{times:g}"] = (replace(inside, steps=round(times * config.steps), seed_share=0.0), ["dense"])
    return found


def grown_arms(config: Config, ablate: bool) -> list[str]:
    """Experts of the later round, grown-domain@init[@lr]."""
    arms = [f"grown-{config.grow}@{init}" for init in (INITS if ablate else INITS[:1])]
    return arms + [f"{arm}@{lr:g}" for lr in BRANCH_LR_GRID if ablate and lr != config.branch_lr for arm in arms]


def stream(data: Tensor, num: int, context: int, key: str) -> Callable[[int], Tensor]:
    """Batches [num, context + 1] int64: a function of key and step alone, whoever asks, in whatever process."""
    first = zlib.crc32(key.encode()) << 28  # the seeds of two keys are further apart than any run has steps
    draw = lambda step: torch.Generator().manual_seed(first + step)
    return lambda step: text_data.sample_windows(data, num, context + 1, draw(step))


def domain_batches(config: Config, name: str, seed: int, run: Run) -> Callable[[int], Tensor]:
    data = load_domain(name, run.data_dir).train
    return stream(data, config.blocks_per_domain, config.context, f"{seed} {name}")


def mixed_batches(config: Config, seed: int, run: Run) -> Callable[[int], Tensor]:
    """Equally many blocks of every domain, the very ones its expert would read; row r is of domain r % k."""
    streams = [domain_batches(config, name, seed, run) for name in config.domains]
    return lambda step: torch.stack([batches(step) for batches in streams], dim=1).flatten(0, 1)


def random_batches(config: Config, index: int, seed: int, run: Run) -> Callable[[int], Tensor]:
    """The control: as many blocks as an expert reads, each from this model's shard of a domain drawn at random."""
    num, k = config.blocks_per_domain, len(config.domains)
    shards = [shard(load_domain(name, run.data_dir).train, index, k) for name in config.domains]
    streams = [stream(data, num, config.context, f"{seed} random {index} {i}") for i, data in enumerate(shards)]
    which = stream(torch.arange(k), num, 0, f"{seed} which {index}")
    return lambda step: torch.stack([batches(step) for batches in streams])[which(step)[:, 0], torch.arange(num)]


def shard(data: Tensor, index: int, num_shards: int) -> Tensor:
    return data[len(data) * index // num_shards : len(data) * (index + 1) // num_shards]


def build(config: Config, key: str, num_domains: int = 0) -> common.TransformerLM:
    generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
    shape = {name: getattr(config, name) for name in SHAPE}
    return language_model(**shape, init=config.init, num_domains=num_domains, generator=generator)


def filled(config: Config, weights: dict[str, Tensor], run: Run) -> nn.Module:
    return put_weights(build(config, ""), weights).to(run.device)


def train(
    model: nn.Module, batches: Callable, config: Config, optimizer: object, start: int, stop: int, steps: int, **options
) -> dict:
    """Plain next-token loss, updates start to stop of a schedule over `steps`; what it cost, read from counters."""
    device, seen = next(model.parameters()).device, {"tokens": 0}

    def counted(step: int) -> Tensor:
        seen["tokens"] = 0
        return batches(step).to(device)

    def loss_fn(windows: Tensor, step: int) -> tuple[Tensor, dict]:
        seen["tokens"] += windows[:, 1:].numel()  # of all parts of the batch
        return common.lm_loss(model, windows).mean(), dict(seen)

    began, batch, num = time.perf_counter(), batches(start), config.blocks_per_domain
    # A part has equally many rows of every domain.
    parts = next((n for n in range(1, num + 1) if num % n == 0 and len(batch) // n <= config.micro_batch), num)
    schedule = lambda step: learning_rate_factor(max(1, step), steps, config.warmup_share)  # as fairseq counts
    options |= {"start_step": start, "stop_step": stop, "optimizer": optimizer, "schedule": schedule}
    common.train(model, loss_fn, steps, batches=counted, clip=config.clip, accumulate=parts, **options)
    seconds, part = time.perf_counter() - began, batch.chunk(parts)[0].to(device)
    flops = common.count_flops(lambda: common.lm_loss(model, part).mean().backward())["Global"]
    model.zero_grad(set_to_none=True)
    updates = [int(json.loads(line)["tokens"]) for line in options["metrics"].read_text().splitlines()]
    numbers = {"updates": len(updates), "tokens": sum(updates), "flops": flops * sum(updates) // part[:, 1:].numel()}
    return numbers | {"seconds": seconds, "parameters": common.count_parameters(model)}


@torch.no_grad()
def score(model: nn.Module, part: str, name: str, config: Config, run: Run) -> Tensor:
    """log p of every token of a domain's "dev" or "test" blocks: [N, context] fp32, on the CPU."""
    num, text = config.dev_blocks if part == "dev" else config.test_blocks, load_domain(name, run.data_dir)
    windows, model = text_data.spread_windows(getattr(text, part), config.context, num), model.eval()
    return torch.cat([-common.lm_loss(model, some.to(run.device)).cpu() for some in windows.split(64)])


def forest_path(run: Run, seed: int, system: str = "") -> Path:
    return run.actions.get("forest", run.out / f"forest-seed{seed}{system}")


def forest_config(config: Config, seed: int) -> dict:
    return {name: value for name, value in asdict(config).items() if name not in NOT_OF_A_FOREST} | {"seed": seed}


def branch(config: Config, forest: Forest, run: Run) -> tuple[nn.Module, torch.optim.Optimizer, list]:
    """Round 1: the seed's weights, Adam moments and (in `train_model`) schedule; the third is where they come from."""
    weights, meta = forest.load("seed")
    model = filled(config, weights, run)
    optimizer = common.adamw(model, config.lr, config.weight_decay)
    optimizer.load_state_dict(common.load(forest.path / "seed" / "resume.pt", run.device)["optimizer"])
    return model, optimizer, [{"name": "seed", "sha256": meta["sha256"], "weight": 1.0}]


def branch_later(
    config: Config, domain: str, init: str, seed: int, names: Sequence[str], forest: Forest, run: Run
) -> tuple[nn.Module, list]:
    """Later rounds: the average of the experts, weighted by their posterior on the new domain's development text."""
    if init == "scratch":
        return build(config, f"{seed} scratch {domain}").to(run.device), []
    loaded = [forest.load(name) for name in (["seed"] if init == "seed" else names)]
    weights = torch.full((len(loaded),), 1 / len(loaded), dtype=torch.float64)
    if init in ("posterior", "nearest"):
        logprobs = [score(filled(config, state, run), "dev", domain, config, run) for state, _ in loaded]
        weights = cached_prior(torch.stack(logprobs), blocks=config.dev_blocks)
        weights = top_k_prior(weights, 1) if init == "nearest" else weights
    model = filled(config, average_parameters([state for state, _ in loaded], weights), run)
    parents = zip([meta for _, meta in loaded], weights.tolist())
    return model, [{"name": m["name"], "sha256": m["sha256"], "weight": weight} for m, weight in parents]


def train_model(config: Config, arm: str, seed: int, names: Sequence[str], run: Run) -> tuple[nn.Module, dict]:
    """Train the model of an arm kind-which@system: (model, what it cost). names: the experts a later round may use.

    A seed or an expert is committed to the forest; its checkpoints and metrics, and other models, stay with the run.
    """
    base, _, system = arm.partition("@")
    kind, _, which = base.partition("-")
    own_forest = "" if kind == "grown" or not system else "@" + system
    forest = Forest.create(forest_path(run, seed, own_forest), forest_config(config, seed))
    start, stop, steps, lr, parents, optimizer = 0, config.steps, config.steps, config.lr, [], None
    if kind == "grown":
        init, _, rate = system.partition("@")
        model, parents = branch_later(config, which, init, seed, names, forest, run)
        stop, steps, lr = config.branch_steps, config.branch_steps, float(rate or config.branch_lr)
    elif kind == "demix":
        model = build(config, f"{seed} demix", len(config.domains)).to(run.device)
    elif kind == "seed" or not seed_steps(config):
        model = build(config, f"{seed} {which or 'seed'}").to(run.device)
        stop = seed_steps(config) or stop
    else:
        model, optimizer, parents = branch(config, forest, run)
        start = seed_steps(config)
    optimizer = optimizer or common.adamw(model, lr, config.weight_decay)
    if kind == "random":
        batches = random_batches(config, int(which), seed, run)
    else:
        batches = domain_batches(config, which, seed, run) if which else mixed_batches(config, seed, run)
    model = run.prepare(model)
    cost = train(model, batches, config, optimizer, start, stop, steps, **run.train_options(arm, seed))
    if kind == "seed":
        common.save(forest.path / "seed" / "resume.pt", {"optimizer": optimizer.state_dict(), "step": stop})
    if kind in ("seed", "expert") or (kind == "grown" and system == "posterior"):
        meta = {"domain": which, "parents": parents, "updates_from_to": [start, stop], "seed": seed, **cost}
        meta["init"] = "average" if kind == "grown" else "copy" if parents else "scratch"
        meta |= {"device": run.device, "torch": torch.__version__}
        if which:
            meta["data"] = load_domain(which, run.data_dir).digest
            meta["dev_bits"] = float(bits(-score(model, "dev", which, config, run)).mean())
        forest.add(which or "seed", weights_of(model), meta, force=True)
    else:
        common.save(run.path(arm, seed, ".pt"), weights_of(model))
    return model, cost


def train_arm(config: Config, arm: str, seed: int, run: Run) -> dict:
    """train_model, with the log-probability of every development and test token kept: read once, mixed in many ways."""
    if arm.startswith("average"):
        return score_averages(config, arm.removeprefix("average"), seed, run)
    model, cost = train_model(config, arm, seed, config.domains, run)
    keys = [(part, name) for name in (*config.domains, *config.novel) for part in ("dev", "test")]
    for i, expert in enumerate(demix_experts(config) if arm == "demix" else [arm]):
        for ffn in model.ffns() if arm == "demix" else ():
            ffn.domain = i
        kept = {f"{part} {name}": score(model, part, name, config, run) for part, name in keys}
        common.save_arrays(said_path(run, expert, seed), kept)
    return cost


def said_path(run: Run, arm: str, seed: int) -> Path:
    """Where log-probabilities are kept; of ARM:PART, one of several that an arm leaves, under the name of the arm."""
    arm, _, part = arm.partition(":")
    return run.path(arm, seed, f"-{part}.npz" if part else ".npz")


def reader(run: Run, seed: int) -> Callable[[str, str, Sequence[str]], Tensor]:
    """said(part, domain, arms) -> log p [E, N, T]: what the models of these arms said of a part of a domain."""
    load = functools.cache(lambda arm: common.load_arrays(said_path(run, arm, seed))[0])
    return lambda part, name, arms: torch.stack([load(arm)[f"{part} {name}"] for arm in arms])


def score_averages(config: Config, system: str, seed: int, run: Run) -> dict:
    """The experts collapsed into one model: with equal weights, and by the cached prior of each target domain."""
    forest, said, kept = Forest(forest_path(run, seed, system)), reader(run, seed), {"uniform": {}, "posterior": {}}
    states = [forest.load(name)[0] for name in config.domains]
    uniform = filled(config, average_parameters(states, [1 / len(states)] * len(states)), run)
    for name in (*config.domains, *config.novel):
        prior = cached_prior(said("dev", name, expert_arms(config, system)), blocks=config.dev_blocks)
        posterior = filled(config, average_parameters(states, prior), run)
        for kind, average in (("uniform", uniform), ("posterior", posterior)):
            kept[kind][f"test {name}"] = score(average, "test", name, config, run)
    for kind in kept:
        common.save_arrays(said_path(run, f"average{system}:{kind}", seed), kept[kind])
    return {}


# ---------------------------------------------------------------------------------------------------------------
# Mixing what was kept: every rule on the same log-probabilities
# ---------------------------------------------------------------------------------------------------------------

Rows = dict[str, dict[str, np.ndarray]]  # {method: {domain: bits/byte [groups of test blocks]}}


def bits(nll: Tensor) -> np.ndarray:
    """nll [N, T] in nats -> bits a token of NUM_GROUPS groups of blocks, in order."""
    by_block = nll.double().mean(dim=-1) / math.log(2)
    return np.array([float(part.mean()) for part in by_block.tensor_split(min(NUM_GROUPS, len(by_block)))])


def mixtures(dev: Tensor, test: Tensor, num_blocks: int) -> dict[str, np.ndarray]:
    """Bits of every way to mix E experts on one domain, from log-probabilities dev and test [E, N, T]."""
    prior = cached_prior(dev, blocks=num_blocks)
    uniform = torch.full_like(prior, 1 / len(prior))
    mixed = lambda prior, window=None: bits(ensemble_nll(test, prior.log(), window)[0])
    found = {EQ2: mixed(prior), LAST_TOKEN: mixed(prior, 1), "BTM, last 8 tokens": mixed(prior, 8)}
    found["BTM, EM prior, last token"] = mixed(em_prior(dev[:, :num_blocks]), 1)
    found |= {"BTM, uniform prior": mixed(uniform), "BTM, updating prior": mixed(updating_prior(test)[:, :-1])}
    found["BTM, simple average"] = mixed(uniform, 0)
    return found | {f"BTM, top-{k}": mixed(top_k_prior(prior, k)) for k in (1, 2, 4) if k < len(prior)}


def measure(config: Config, plan: dict, seed: int, run: Run) -> Rows:
    """Bits of every method on every domain. A method's name ends in its system: "dense@lr0.02"."""
    rows, said = {}, reader(run, seed)
    alone = lambda arm, name: bits(-said("test", name, [arm])[0])
    for system, (few, arms) in plan.items():
        experts = expert_arms(few, system)
        for name in (*few.domains, *few.novel):
            mix = lambda arms, name=name: mixtures(said("dev", name, arms), said("test", name, arms), config.dev_blocks)
            found = {"seed": alone("seed", name)} if system == "" else {}
            if "dense" in arms:
                found["dense"] = alone("dense" + system, name)
            if len(arms) > 1:
                found |= mix(experts)
            if system in AVERAGED:
                found |= {
                    f"average, {kind}": alone(f"average{system}:{kind}", name) for kind in ("uniform", "posterior")
                }
            if system == "":
                found["average, argmax"] = found["BTM, top-1"]  # the same model
                rivals = {"random split": random_arms(few)} | ({"DEMix": demix_experts(few)} if "demix" in arms else {})
                for label, rival in rivals.items():
                    mixed = mix(rival)
                    found |= {f"{label}, eq. 2": mixed[EQ2], f"{label}, last token": mixed[LAST_TOKEN]}
                found["added"] = mix([*experts, f"grown-{few.grow}@posterior"])[EQ2]
                found["removed"] = mix(experts[:-1])[EQ2]
            for method, value in found.items():
                rows.setdefault(method + system, {})[name] = value
    return rows | {arm: {config.grow: alone(arm, config.grow)} for arm in grown_arms(config, run.ablate)}


def posteriors(config: Config, seed: int, run: Run) -> np.ndarray:
    """Mean weight (eq. 2) of each expert on the test text of each domain: [domains, E]."""
    found, said = [], reader(run, seed)
    for name in (*config.domains, *config.novel):
        dev, test = (said(part, name, expert_arms(config)) for part in ("dev", "test"))
        weights = ensemble_nll(test, cached_prior(dev, blocks=config.dev_blocks).log())[1]
        found.append(weights.mean(dim=(1, 2)).numpy())
    return np.stack(found)


def mean_bits(rows: Rows, method: str, domains: Sequence[str] = ()) -> np.ndarray:
    """Unweighted mean over domains (default: all that the method was measured on), group by group: [groups]."""
    found = [rows[method][name] for name in domains or rows[method]]
    return np.mean([by_group[: min(map(len, found))] for by_group in found], axis=0)


# ---------------------------------------------------------------------------------------------------------------
# Claims
# ---------------------------------------------------------------------------------------------------------------

PPL, UNSEEN = "perplexity 19.8 against 22.5 (125M, all 16 domains)", "not verified"
SPLIT = "an ensemble over random splits of the data does not beat the dense LM"
CLAIMS = [
    Claim("btm.in_domain", "at equal cost the ensemble beats the dense LM on the training domains", PPL, required=True),
    Claim("btm.out_of_domain", "... and on domains that no expert was trained on", PPL),
    Claim("btm.random_split", SPLIT, UNSEEN, required=True),
    Claim(
        "btm.cost_matched", "seed and experts cost what the dense LM costs: tokens, FLOPs", "by design", required=True
    ),
    Claim(
        "btm.posterior_average", "one LM, averaged by posterior, beats the dense LM in domain", UNSEEN, required=True
    ),
    Claim("btm.uniform_average", "averaged with equal weights, it is worse than the dense LM", UNSEEN, required=True),
    Claim("btm.seed_needed_for_averaging", "experts without a common seed cannot be averaged", UNSEEN),
    Claim("btm.branch_init", "a new expert is best branched from the posterior average", UNSEEN),
    Claim("btm.add_remove", "adding or removing an expert changes its own domain only", UNSEEN, required=True),
    Claim("btm.topk", "two experts a domain do nearly as well as all: within 1 %", UNSEEN),
    Claim("btm.more_domains", "the gain over the dense LM grows with the number of domains", UNSEEN),
    Claim("btm.compute_saving", "to match, the dense LM needs more compute", "2.5 times (64 domains, 22.4B in all)"),
]


def compute_factor(times: Sequence[float], losses: Sequence[float], target: float) -> float:
    """Compute at which a falling loss reaches target, linear in log compute; the last of `times` if it never does."""
    reached = [i for i, loss in enumerate(losses) if loss <= target]
    if not reached or reached[0] == 0:
        return times[reached[0] if reached else -1]
    i = reached[0]
    share = (losses[i - 1] - target) / (losses[i - 1] - losses[i])
    return times[i - 1] * (times[i] / times[i - 1]) ** share


def judge(config: Config, run: Run, costs: dict[str, list[dict]], rows: Sequence[Rows]) -> None:
    """From measurements to claim rows. A margin is one number a seed, or of a single seed one a group of blocks."""
    inside, novel, everywhere = config.domains, config.novel, (*config.domains, *config.novel)
    by_seed = lambda values: values[0] if len(rows) == 1 else np.array([value.mean() for value in values])
    level = lambda method, where=(): by_seed([mean_bits(found, method, where) for found in rows])
    ahead = lambda worse, better=EQ2, where=inside: level(worse, where) - level(better, where)
    shown = lambda margin, digits=4: common.show([margin.mean()] if len(rows) == 1 else margin, digits)

    def report(id: str, margin: np.ndarray, text: str, **numbers: np.ndarray) -> None:
        numbers = {name: np.asarray(values).tolist() for name, values in numbers.items()}
        run.claim(f"btm.{id}", text, {"margin": margin.tolist(), **numbers}, margin)

    for id, where in (("in_domain", inside), ("out_of_domain", novel)):
        margin, last = ahead("dense", EQ2, where), ahead("dense", LAST_TOKEN, where)
        text = f"{shown(margin)} bits/byte better than dense (eq. 2); last token only: {shown(last)}"
        report(id, margin, text, last_token=last)
    margin, split = ahead("random split, eq. 2", "dense"), "random split, eq. 2"
    report("random_split", margin, f"{shown(margin)} bits/byte worse than dense, {shown(ahead(split))} worse than BTM")

    total = lambda arms, key: np.sum([[cost[key] for cost in costs[arm]] for arm in arms], axis=0)  # [seeds]
    both = [["seed", *expert_arms(config)], ["seed", "dense"]]
    spent = {key: [total(arms, key).tolist() for arms in both] for key in ("tokens", "flops")}
    text = "; ".join(f"{key}: {sum(forest):,} forest, {sum(dense):,} dense" for key, (forest, dense) in spent.items())
    run.claim("btm.cost_matched", text, spent, holds=all(forest == dense for forest, dense in spent.values()))

    margin, outside = ahead("dense", "average, posterior"), ahead("dense", "average, posterior", novel)
    text = f"{shown(margin)} bits/byte better than dense; novel domains {shown(outside)}"
    report("posterior_average", margin, text, novel=outside)
    margin = ahead("average, uniform", "dense")
    report("uniform_average", margin, f"{shown(margin)} bits/byte worse than dense")
    gain, loss = ahead(EQ2, "added", [config.grow]), ahead("removed", EQ2, inside[-1:])
    moved = lambda method, own: [abs(ahead(method, EQ2, [name])) for name in everywhere if name != own]
    stir = [np.max(moved(*change), axis=0) for change in (("added", config.grow), ("removed", inside[-1]))]
    text = f"{config.grow} added: {shown(-gain)} there, at most {shown(stir[0])} in any other domain; "
    text += f"{inside[-1]} removed: {shown(loss)} there, at most {shown(stir[1])} (holds below a tenth)"
    numbers = {"added": gain, "others_added": stir[0], "removed": loss, "others_removed": stir[1]}
    report("add_remove", np.minimum(gain / 10 - stir[0], loss / 10 - stir[1]), text, **numbers)
    if "BTM, top-2" in rows[0]:
        worse, whole = ahead("BTM, top-2", EQ2, everywhere), level(EQ2, everywhere)
        report("topk", 0.01 * whole - worse, f"{shown(worse)} bits/byte worse than all, of {shown(whole)}")
    if not run.ablate:
        return
    margin = ahead("average, uniform@unseeded", "average, uniform")
    report("seed_needed_for_averaging", margin, f"{shown(margin)} bits/byte worse than with a seed (equal weights)")
    inits = {init: level(f"grown-{config.grow}@{init}") for init in INITS}
    rival = min(INITS[1:], key=lambda init: inits[init].mean())
    text = ", ".join(f"{init} {shown(found, 3)}" for init, found in inits.items())
    report("branch_init", inits[rival] - inits["posterior"], f"bits/byte on {config.grow}: {text}", **inits)
    first = inside[: min(fewer_domains(config))]
    gains = {num: ahead(f"dense{suffix}", EQ2 + suffix, first) for num, suffix in fewer_domains(config).items()}
    steps = [more - fewer for fewer, more in itertools.pairwise(gains.values())] or [np.zeros(1)]
    text = f"bits/byte gained on {' and '.join(first)}: "
    text += ", ".join(f"{shown(gain)} with {num}" for num, gain in gains.items())
    report("more_domains", min(steps, key=np.mean), text, **{str(num): gain for num, gain in gains.items()})
    times, mean = (1.0, *MORE_COMPUTE), lambda found, method: mean_bits(found, method, inside).mean()
    curves = [[mean(found, f"dense@x{t:g}" if t > 1 else "dense") for t in times] for found in rows]
    goals = [mean(found, EQ2) for found in rows]
    factor = np.array([compute_factor(times, *found) for found in zip(curves, goals)])
    text = f"{common.show(factor, 2)} times the updates ({times[-1]:g}: or more)"
    report("compute_saving", factor - 1, text, dense=curves, forest=goals)


def print_tables(config: Config, run: Run, costs: dict, rows: Sequence[Rows], weights: np.ndarray) -> None:
    names, table = (*config.domains, *config.novel), []
    parts = {"dense LM": ["dense"], "BTM": expert_arms(config), "random split": random_arms(config), "DEMix": ["demix"]}
    mean = lambda key, arms: np.array([np.mean([cost[key] for cost in costs[arm]]) for arm in arms])
    for label, arms in ((label, arms) for label, arms in parts.items() if arms[0] in costs):
        before = [] if label == "DEMix" else ["seed"]
        tokens, flops, seconds = (mean(key, before + arms).sum() for key in ("tokens", "flops", "seconds"))
        critical = mean("seconds", before).sum() + mean("seconds", arms).max()
        passes = len(config.domains) if label == "DEMix" else len(arms)
        spent = [f"{tokens:,.0f}", f"{flops:.3e}", f"{seconds:.1f}", f"{critical:.1f}"]
        table.append([label, *spent, f"{mean('parameters', arms).sum():,.0f}", passes])
    header = ["system", "tokens", "FLOPs", "seconds", "critical path", "parameters", "passes a token"]
    run.table("training cost, seed included; FLOPs counted in the operators of an update", header, table)

    at = lambda method, where: [mean_bits(found, method, where).mean() for found in rows]
    plain = [method for method in rows[0] if "@" not in method and method not in ("added", "removed")]
    groups = (config.domains, config.novel)
    each = lambda method: [f"{np.mean(at(method, [name])):.3f}" for name in names]
    table = [[method, *(common.show(at(method, group), 3) for group in groups), *each(method)] for method in plain]
    title = f"bits/byte on test text, {len(rows)} seed(s): means over domains, then each; novel ones have no expert"
    run.table(title, ["method", "in domain", "novel", *names], table)
    table = [[name, *(f"{weight:.2f}" for weight in found)] for name, found in zip(names, weights)]
    run.table("whom eq. 2 believes: mean weight of each expert, by test domain", ["", *config.domains], table)
    if run.ablate:
        shown = lambda method: common.show(at(method, ()), 3) if method in rows[0] else ""
        columns, others = ["dense", EQ2, "average, uniform"], [system for system in systems(config, True) if system]
        table = [[system, *(shown(column + system) for column in columns)] for system in others]
        run.table("other settings: bits/byte in their domains", ["", *columns], table)
        lrs = [f"@{lr:g}" if lr != config.branch_lr else "" for lr in BRANCH_LR_GRID]
        table = [[init, *(shown(f"grown-{config.grow}@{init}{lr}") for lr in lrs)] for init in INITS]
        title = f"a new expert for {config.grow}, alone, by where it branched from and learning rate"
        run.table(title, ["", *BRANCH_LR_GRID], table)


def draw(config: Config, run: Run, rows: Sequence[Rows]) -> None:
    methods = ["seed", "dense", EQ2, "random split, eq. 2", "average, uniform", "average, posterior"]
    names, k = (*config.domains, *config.novel), len(config.domains)

    def by_domain(ax) -> None:
        values = np.array([[np.mean([found[m][n].mean() for found in rows]) for m in methods] for n in names])
        ticks = {"xticks": range(len(methods)), "yticks": range(len(names)), "yticklabels": names}
        labels = [method.replace(", ", ",\n") for method in methods]
        common.heatmap(ax, values, title="bits/byte", **ticks, xticklabels=labels)
        ax.tick_params(axis="x", labelsize=6)

    def believed(ax, window: int | None, title: str) -> None:
        weights = ensemble_nll(logprobs, torch.zeros(k), window)[1].mean(dim=1)  # [E, bytes], over the texts
        series = {name: (range(len(w)), w.tolist()) for name, w in zip(config.domains, weights)}
        common.lines(ax, series, title=title, xlabel=f"byte ({where})", ylabel="weight")

    def growing(ax) -> None:
        counts = fewer_domains(config)
        at = lambda method: np.mean([mean_bits(by, method, names[: min(counts)]).mean() for by in rows])
        gains = [at("dense" + system) - at(EQ2 + system) for system in counts.values()]
        title = f"gain on the first {min(counts)} domains, by number of domains"
        common.lines(ax, {"dense - BTM": (list(counts), gains)}, title=title, xlabel="domains", ylabel="bits/byte")

    logprobs, where = changing_text(config, run) if run.draw else (None, "")
    all_past = lambda ax: believed(ax, None, "whom to believe, from all of the past (eq. 2)")
    short = lambda ax: believed(ax, 24, "... from the last 24 bytes")
    run.plot("btm", [by_domain, all_past, short, *[growing] * run.ablate], width=5.2, height=4.2)


def changing_text(config: Config, run: Run, length: int = 80, num: int = 6) -> tuple[Tensor, str]:
    """Test texts that change their domain twice, as the first seed's experts read them: ([E, texts, bytes], what)."""
    chosen = [config.domains[i] for i in (0, -1, 1)]
    tests = [load_domain(name, run.data_dir).test for name in chosen]
    length = min(length, *(len(test) // num for test in tests))
    parts = [test[: num * length].long().view(num, length) for test in tests]
    texts = torch.cat([torch.zeros(num, 1, dtype=torch.long), *parts], dim=1).to(run.device)  # begin at a separator
    forest = Forest(forest_path(run, run.seed))
    models = [filled(config, forest.load(name)[0], run).eval() for name in config.domains]
    logprobs = [torch.stack([text_log_probs(model, text, config.context) for text in texts]) for model in models]
    return torch.stack(logprobs), ", ".join(f"{name} from {i * length}" for i, name in enumerate(chosen))


# ---------------------------------------------------------------------------------------------------------------
# Stages: the same as separate commands, with nothing in common but the forest's folder
# ---------------------------------------------------------------------------------------------------------------


def settings_of(forest: Forest, config: Config, run: Run) -> Config:
    """The forest's own settings; flags that ask for other ones are refused."""
    default, settled = forest_config(FULL if run.scale == "full" else SMALL, seed=0), {}
    for name, value in forest_config(config, run.seed).items():
        stored = forest.config.get(name)
        stored = tuple(stored) if isinstance(stored, list) else stored
        kinds = {type(value), type(stored)}
        if len(kinds) > 1 and not kinds <= {int, float}:
            raise common.UsageError(f"{forest.path / 'config.json'} is damaged: {name} = {stored!r}")
        if value not in (stored, default[name]):
            raise common.UsageError(f"{forest.path} was made with {name} = {stored}, not {value}")
        settled[name] = stored
    run.seeds = [settled.pop("seed")]
    return replace(config, **settled)


def lineage(meta: dict) -> str:
    return " + ".join(f"{p['weight']:.2f} {p['name']}" for p in meta["parents"] if p["weight"] >= 0.005) or "scratch"


def run_stage(config: Config, run: Run, stage: str) -> None:
    """--stage seed or expert: train what this command (or torchrun process) is asked for and is not there yet."""
    path, seed = forest_path(run, run.seed), run.seed
    run.out, run.actions["forest"] = path / "work", path  # checkpoints and metrics of what is unfinished
    (run.out / "arms").mkdir(parents=True, exist_ok=True)
    names, index = list(config.domains), run.actions.get("domain_index")
    if index is not None and "domain" in run.actions:
        raise common.UsageError("--domain and --domain-index exclude each other")
    if index is not None and not 0 <= index < len(names):
        raise common.UsageError(f"--domain-index is {index}; it counts the {len(names)} domains from 0")
    names = ["seed"] if stage == "seed" else names if index is None else [names[index]]
    if stage == "expert" and "domain" in run.actions:
        names = [run.actions["domain"]]
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # set by torchrun
    for name in names[rank::world]:
        arm = "seed" if stage == "seed" else f"expert-{name}" if name in config.domains else f"grown-{name}@posterior"
        forest = Forest.create(path, forest_config(config, seed))
        if stage == "expert" and not (path / "seed" / "meta.json").exists():
            raise common.UsageError(f"{path} has no seed yet; --stage seed comes first")
        if (forest.folder(name) / "meta.json").exists() and "force" not in run.actions:
            say(f"{forest.wrong_with(name) or f'{name} is in {path} already'}; --force trains it again")
            continue
        others = [expert for expert in sound(forest, run) if expert != name] if arm.startswith("grown") else []
        others.sort(key=lambda expert: [*config.domains, expert].index(expert))  # as in a run
        cost = train_model(config, arm, seed, others, run)[1]
        run.path(arm, seed, ".ckpt").unlink(missing_ok=True)
        spent = f"{cost['tokens']:,} tokens, {cost['seconds']:.1f} s"
        say(f"{name}: from {lineage(forest.load(name)[1])}, {spent}; in {forest.folder(name)}")


def sound(forest: Forest, run: Run) -> dict[str, tuple[dict, dict]]:
    """{name: (weights, meta)} of the experts that load and are not left out; one line for each that is refused."""
    without, found = [name for name in run.actions.get("without", "").split(",") if name], {}
    for name in without:
        if name not in forest.folders():
            raise common.UsageError(f"{forest.path}: there is no expert {name!r}")
    for name in (name for name in forest.folders() if name not in without):
        try:
            found[name] = forest.load(name)
        except ValueError as error:
            say(str(error))
    if not found:
        raise common.UsageError(f"{forest.path}: no expert to use; --stage expert trains one")
    return found


def evaluate_forest(config: Config, forest: Forest, run: Run) -> None:
    """--stage eval: lineage, bits/byte of the ensemble and its averages, whom the posterior believes."""
    experts = sound(forest, run)
    states = [weights for weights, _ in experts.values()]
    models = [filled(config, state, run) for state in states]
    if not 0 <= config.top_k <= len(models):
        raise common.UsageError(f"--top-k {config.top_k}: there are {len(models)} experts; 0 keeps all")
    told = lambda meta: [str(meta.get(key, "?"))[:6] for key in ("updates", "dev_bits")]
    table = [[name, lineage(meta), *told(meta)] for name, (_, meta) in experts.items()]
    run.table(f"lineage of {forest.path}", ["expert", "branched from", "updates", "dev bits/byte"], table)
    given = [run.actions["domain"]] if "domain" in run.actions else []
    table, weights = [], []
    for name in dict.fromkeys([*config.domains, *config.novel, *given]):
        dev = torch.stack([score(model, "dev", name, config, run) for model in models])
        prior = top_k_prior(cached_prior(dev, blocks=config.dev_blocks), config.top_k or len(models))
        kept = prior.nonzero().flatten().tolist()  # the others are not run at all
        test = torch.stack([score(models[i], "test", name, config, run) for i in kept])
        (eq2, believed), (last, _) = (ensemble_nll(test, prior[kept].log(), window) for window in (None, 1))
        average = score(filled(config, average_parameters(states, prior), run), "test", name, config, run)
        nlls = [eq2, last, -average, -test[prior[kept].argmax()]]
        table.append([name, *(f"{bits(nll).mean():.3f}" for nll in nlls), len(kept)])
        share = torch.zeros_like(prior).index_copy(0, torch.tensor(kept), believed.mean(dim=(1, 2)))
        weights.append([name, *(f"{weight:.2f}" for weight in share)])
    header = ["domain", "eq. 2", "last token", "posterior average", "best expert", "passes a token"]
    run.table("bits/byte on test text", header, table)
    run.table("whom eq. 2 believes: mean weight of each expert, by test domain", ["", *experts], weights)


def write_sample(config: Config, forest: Forest, run: Run) -> None:
    """--sample: go on with a text, and show whom the ensemble believes as it does."""
    if config.vocab_size != 256:
        raise common.UsageError("--sample writes bytes; this forest was trained on token ids")
    if config.top_k:
        raise common.UsageError("--top-k goes with --stage eval; a sample has no development text to choose by")
    experts = sound(forest, run)
    models = [filled(config, weights, run).eval() for weights, _ in experts.values()]
    tokens = torch.tensor([0, *run.actions["sample"].encode()], device=run.device)
    generator = torch.Generator().manual_seed(run.seed)
    prior = torch.full((len(models),), 1 / len(models), dtype=torch.float64)
    written, weights = generate(models, tokens, prior.log(), config.sample_bytes, config.context, generator)
    text = bytes(written[1:].tolist())
    printable = lambda char: char if char.isprintable() or char in "\n\t" else "\N{REPLACEMENT CHARACTER}"
    say("".join(map(printable, text.decode("utf-8", "replace"))))
    means = [(text[i : i + 16], weights[:, 1 + i : 17 + i].mean(dim=1)) for i in range(0, len(text), 16)]
    table = [[repr(part.decode("latin-1")), *(f"{weight:.2f}" for weight in mean)] for part, mean in means]
    run.table("whom eq. 2 believes, as the text goes on", ["text", *experts], table)


def act(config: Config, run: Run) -> None:
    """The script's own commands, instead of a whole run."""
    given, root = run.actions, run.data_dir / "btm"
    if sum(name in given for name in ("stage", "sample", "prepare")) != 1 or run.dry_run:
        flags = ", ".join("--" + name.replace("_", "-") for name in given)
        raise common.UsageError(f"{flags}: goes with one of --stage, --sample and --prepare, and without --dry-run")
    if "prepare" in given:
        sizes, labels = text_data.prepare(given["prepare"], root, given.get("domain", ""))
        table = [[name, *(f"{parts[part]:,}" for part in text_data.PARTS)] for name, parts in sizes.items()]
        run.table(f"bytes written to {root}", ["domain", *text_data.PARTS], table)
        lacking = [label for label, name in text_data.PILE.items() if name not in sizes]
        if labels and lacking:
            say(f"too little of {', '.join(lacking)}; labels found: {', '.join(map(repr, labels))}")
        return
    if run.device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
    if given.get("stage") == "seed":
        return run_stage(check(config, run), run, "seed")
    forest = Forest(forest_path(run, run.seed))
    config = settings_of(forest, config, run)
    if given.get("stage") == "expert":
        return run_stage(config, run, "expert")
    return evaluate_forest(config, forest, run) if "stage" in given else write_sample(config, forest, run)


# ---------------------------------------------------------------------------------------------------------------
# main
# ---------------------------------------------------------------------------------------------------------------


def check(config: Config, run: Run) -> Config:
    """Refuse impossible settings before anything is written; settle steps and vocabulary."""
    names = (*config.domains, *config.novel)
    if len(config.domains) < 2 or len(set(names)) < len(names) or config.grow not in config.novel:
        text = f"domains {','.join(config.domains)}, novel {','.join(config.novel)}, grow {config.grow}"
        raise ValueError(f"{text}: two domains or more, none twice, and grow one of novel")
    if not 0 < config.seed_share < 1:
        raise ValueError(f"seed_share is {config.seed_share:g}; it must lie between 0 and 1")
    for name, value in vars(config).items():
        if isinstance(value, int) and value < (name not in ("conv", "top_k")):
            raise ValueError(f"{name} is {value}; at least {int(name not in ('conv', 'top_k'))} is needed")
    with torch.device("meta"):
        language_model(**{name: getattr(config, name) for name in SHAPE})  # refuses impossible shapes
    try:
        splits = {name: load_domain(name, run.data_dir) for name in names}
    except FileNotFoundError as missing:
        if not run.dry_run:
            raise
        say(f"{missing}; the cost below is that of a text of bytes")
        splits = {}
    for name, split in splits.items():
        shortest = min(len(split.train) // len(config.domains), len(split.dev), len(split.test))
        if shortest <= config.context:
            raise ValueError(f"domain {name!r} is too short for sequences of {config.context}")
    sizes = {split.vocab_size for split in splits.values()} or {config.vocab_size}
    if len(sizes) > 1:
        raise ValueError(f"vocabularies differ: {', '.join(f'{name} {s.vocab_size}' for name, s in splits.items())}")
    run.data = {name: split.digest for name, split in splits.items()}
    update = len(config.domains) * config.blocks_per_domain * config.context
    if config.tokens is not None:
        config = replace(config, steps=int(config.tokens // update))
    if not 1 <= seed_steps(config) < config.steps:
        raise ValueError(f"{config.steps} updates of {update:,} tokens leave nothing to the seed or to the experts")
    return replace(config, vocab_size=sizes.pop())


def main(config: Config, run: Run) -> dict | None:
    if run.actions:
        return act(config, run)
    for name, action in {"top_k": "--stage eval", "sample_bytes": "--sample"}.items():
        if getattr(config, name) != getattr(SMALL, name):
            raise common.UsageError(f"--{name.replace('_', '-')} goes with {action}")
    run.config = config = check(config, run)
    plan, grown = systems(config, run.ablate), grown_arms(config, run.ablate)

    def work(few: Config, arm: str) -> int:
        """Updates of an arm, times the domains that each of them reads."""
        first, wide = seed_steps(few), len(few.domains)
        own = {"seed": wide * first, "dense": wide * (few.steps - first), "demix": wide * few.steps}
        return own.get(arm, few.steps - first)

    updates = sum(work(few, arm) for few, arms in plan.values() for arm in ("seed", *arms))
    updates += config.branch_steps * len(grown)
    model = run.prepare(build(config, f"{run.seed} seed"))
    micro_batch = min(config.micro_batch, len(config.domains) * config.blocks_per_domain)
    num_parts = math.ceil(len(run.seeds) * updates * config.blocks_per_domain / micro_batch)
    pieces = micro_batch if run.dry_run and run.scale == "full" and run.device == "cpu" else 1  # a whole one: minutes
    part = torch.arange(micro_batch // pieces * (config.context + 1), device=run.device) % config.vocab_size
    part = part.view(-1, config.context + 1)  # what a step costs does not depend on the text

    def step() -> None:
        with torch.autocast(run.device, dtype=run.dtype, enabled=run.dtype != torch.float32):
            loss = common.lm_loss(model, part).mean()
        loss.backward()

    if run.dry_run:
        return run.estimate(model, step, num_parts, parts=pieces)
    cost = common.measure_step(step, run.device)
    seconds = 1.6 * cost["seconds"] * num_parts / run.workers  # batches of one domain, and evaluation, take the rest
    digest = hashlib.sha256(json.dumps(run.data).encode()).hexdigest()[:12]
    tokens = f"{num_parts * part[:, 1:].numel():.1e} tokens, {num_parts * cost['flops']:.1e} FLOPs in all"
    hours = f", about {seconds / 3600:,.1f} hours" if seconds > 7200 else ""
    run.header(f"{len(run.data)} domains {digest}, {tokens}{hours} (--tokens chooses)", seconds)
    for note in filter(None, (load_domain(name, run.data_dir).note for name in run.data)):
        say(note)
    for path in [] if run.resume else run.out.glob("forest-seed*"):
        shutil.rmtree(path)

    def train_all(jobs: Sequence[tuple[Config, str]]) -> dict[str, list[dict]]:
        found = iter(run.map_arms(train_arm, [(few, arm, seed) for few, arm in jobs for seed in run.seeds]))
        return {arm: [next(found) for _ in run.seeds] for _, arm in jobs}

    costs = train_all([(few, "seed" + system) for system, (few, _) in plan.items() if seed_steps(few)])
    costs |= train_all([(few, arm + system) for system, (few, arms) in plan.items() for arm in arms])
    averages = [(plan[system][0], "average" + system) for system in AVERAGED if system in plan]
    costs |= train_all(averages + [(config, arm) for arm in grown])
    rows = [measure(config, plan, seed, run) for seed in run.seeds]
    weights = np.mean([posteriors(config, seed, run) for seed in run.seeds], axis=0)
    print_tables(config, run, costs, rows, weights)
    judge(config, run, costs, rows)
    say(f"\nthe forest is in {forest_path(run, run.seed)}; --sample 'def ' writes with it, --stage eval looks into it")
    draw(config, run, rows)
    means = [{m: {name: float(b.mean()) for name, b in found.items()} for m, found in by.items()} for by in rows]
    return {"bits": means, "posterior": weights.tolist(), "costs": costs}


if __name__ == "__main__":
    common.run(main, SMALL, FULL, CLAIMS, actions=ACTIONS)
