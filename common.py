"""What the seven scripts share: settings, files, a transformer, one training loop, claims, runs.

    settings     Settings: the base of every Config; the type of a field says what it allows
    files        save / load, read_json / write_json: atomic, and loading never executes anything
    model        TransformerLM, whose feed-forward is any module a script passes in; generate
    training     train: one loop with schedules, accumulation, checkpoints, resume, a stop at NaN
    accounting   count_parameters, count_flops: read from the module and the operators that ran
    claims       @claim, @check: a sentence above the function that measures it; Results, Margin
    a run        Run: what main gets; Job: an arm with a seed; load_trained gives its model back
    command line run(main, SMALL, FULL): flags from the Config, a process a job, results.json

An *arm* is one trained variant. Its name is a method and the settings it changes: "dhkd" or
"dhkd@lr=0.5,alpha=0.1". `run.train_arms(train_arm, arms)` trains every arm with every seed, each in
a process of its own, each result in a file of its own, which is all that `--resume` needs.
"""

import argparse
import dataclasses
import difflib
import errno
import hashlib
import importlib.util
import inspect
import io
import json
import math
import multiprocessing
import multiprocessing.connection
import multiprocessing.forkserver
import os
import platform
import re
import shlex
import signal
import stat
import subprocess
import sys
import threading
import time
import tokenize
import traceback
import types
import typing
import zipfile
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, NoReturn

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from data.arrays import atomic_file
from data.reading import sha256  # noqa: F401  for the scripts

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


class UsageError(ValueError):
    """Something the person at the keyboard can mend: one line, exit code 2."""


class NonFiniteLoss(RuntimeError):
    """The loss became NaN or infinite: one line, exit code 1."""


class JobFailed(RuntimeError):
    """A process of the run was killed, or ended in its own traceback: one line, exit code 1."""


class Terminated(KeyboardInterrupt):
    """SIGTERM, as sent by job schedulers; treated like Ctrl-C."""


class Planned(Exception):
    """--dry-run has printed what the run would take; there is nothing else to do."""


def reason_of(error: Exception) -> str:
    """What an error says, in one line that is not too long for a longer one."""
    return " ".join(str(error).split())[:160]


# --------------------------------------------------------------------------------------------------
# Settings: the type of a field says what it allows
# --------------------------------------------------------------------------------------------------


class Range(NamedTuple):
    """For Annotated: least <= value < below; with `open` least < value < below."""

    least: float
    below: float = math.inf
    open: bool = False

    def allows(self, value: float) -> bool:
        above = value > self.least if self.open else value >= self.least
        return above and value < self.below

    def __str__(self) -> str:
        text = f"above {self.least:g}" if self.open else f"at least {self.least:g}"
        return text if self.below == math.inf else f"{text} and below {self.below:g}"


class Only:
    """For Annotated: the flag works only where all of this holds, as in Only(scale="full")."""

    def __init__(self, **where: str):
        self.where = where


Count = Annotated[int, Range(1)]
Whole = Annotated[int, Range(0)]
Positive = Annotated[float, Range(0, open=True)]
NonNegative = Annotated[float, Range(0)]
Share = Annotated[float, Range(0, 1, open=True)]


class Settings:
    """Base of a script's Config, a frozen dataclass. Raises ValueError for a value not allowed.

    A field is typed int, float, str, bool, Literal["a", "b"], one of the types above,
    tuple[any of these, ...], or any of these | None. A rule over several fields goes into the
    Config's own __post_init__, after super().__post_init__().
    """

    def __post_init__(self) -> None:
        for name, kind in field_types(type(self)).items():
            reason = why_not(kind, getattr(self, name))
            if reason:
                raise ValueError(f"{name} is {getattr(self, name)!r}; {reason}")


def field_types(config_type: type) -> dict[str, Any]:
    return typing.get_type_hints(config_type, include_extras=True)


def is_optional(kind: Any) -> bool:
    return typing.get_origin(kind) in (types.UnionType, typing.Union)


def why_not(kind: Any, value: object) -> str:
    """Why the type of a field does not allow this value; empty when it does."""
    inside, origin = typing.get_args(kind), typing.get_origin(kind)
    if is_optional(kind):
        return "" if value is None else why_not(inside[0], value)
    if origin is Literal:
        return "" if value in inside else f"allowed: {', '.join(map(str, inside))}"
    if origin is tuple:
        if not isinstance(value, tuple):
            return "a tuple is needed"
        reasons = [why_not(inside[0], item) for item in value]
        return next(filter(None, reasons), "")
    if origin is Annotated:
        reason = why_not(inside[0], value)
        for limit in inside[1:]:
            if not reason and isinstance(limit, Range) and not limit.allows(value):
                reason = f"it must be {limit}"
        return reason
    if kind is float:
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return "" if is_number and math.isfinite(value) else "a finite number is needed"
    if kind is int:
        is_whole = isinstance(value, int) and not isinstance(value, bool)
        return "" if is_whole else "a whole number is needed"
    return "" if isinstance(value, kind) else f"a {kind.__name__} is needed"


def read_value(kind: Any, text: str) -> object:
    """What someone typed, as the type of a field wants it. Raises ValueError."""
    inside, origin = typing.get_args(kind), typing.get_origin(kind)
    if is_optional(kind):
        return None if text.lower() == "none" else read_value(inside[0], text)
    if origin is Annotated:
        return read_value(inside[0], text)
    if origin is tuple:
        words = [] if text == "empty" else text.split(",")
        return tuple(read_value(inside[0], word) for word in words)
    if origin is Literal or kind is str:
        return text
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise ValueError("allowed: true, false")
        return text.lower() == "true"
    try:
        return kind(text)
    except ValueError:
        raise ValueError(f"a {'whole ' if kind is int else ''}number is needed") from None


def as_typed(value: object) -> str:
    """A value as one would type it after its flag."""
    if value is None:
        return "none"
    if isinstance(value, tuple):
        return ",".join(map(as_typed, value)) or "empty"
    return f"{value:g}" if isinstance(value, float) else str(value)


def field_comments(config_type: type) -> dict[str, str]:
    """The trailing comment of every field, so that help and source cannot disagree."""
    comments = {}
    source = io.StringIO(inspect.getsource(config_type))
    for token in tokenize.generate_tokens(source.readline):
        name = re.match(r"\s*(\w+)\s*:", token.line)
        if token.type == tokenize.COMMENT and name:
            comments[name.group(1)] = token.string.lstrip("# ")
    return comments


def settings_of(arm: str) -> list[tuple[str, str]]:
    """The settings in an arm's name: method@field=value,field=value -> [(field, value), ...]."""
    found = []
    for setting in filter(None, arm.partition("@")[2].split(",")):
        name, _, text = setting.partition("=")
        found.append((name, text))
    return found


def arm_config(config: Any, arm: str) -> Any:
    """A config with the settings of an arm. Raises UsageError."""
    types_of, changes = field_types(type(config)), {}
    for name, text in settings_of(arm):
        if name not in types_of:
            near = difflib.get_close_matches(name, types_of, n=1, cutoff=0)
            raise UsageError(f"arm {arm}: there is no setting {name!r}; the nearest is {near[0]!r}")
        try:
            changes[name] = read_value(types_of[name], text)
        except ValueError as error:
            raise UsageError(f"arm {arm}: {name} is {text!r}; {error}") from error
    try:
        return dataclasses.replace(config, **changes)
    except ValueError as error:
        raise UsageError(f"arm {arm}: {error}") from error


def split_arms(text: str) -> list[str]:
    """ "ce,dhkd@lr=0.5,alpha=0.1,kd" -> ["ce", "dhkd@lr=0.5,alpha=0.1", "kd"]."""
    arms: list[str] = []
    for word in filter(None, text.split(",")):
        continues = "=" in word and "@" not in word
        if continues and arms and "@" in arms[-1]:
            arms[-1] += f",{word}"
        else:
            arms.append(word)
    return arms


# --------------------------------------------------------------------------------------------------
# Files
# --------------------------------------------------------------------------------------------------


def regular_file(path: str | Path) -> Path:
    """The path of an ordinary file. A FIFO or a device would be waited for, perhaps for ever."""
    path = Path(path)
    if not stat.S_ISREG(path.stat().st_mode):
        raise UsageError(f"{path} is not a regular file")
    return path


def write_json(path: str | Path, content: object) -> None:
    with atomic_file(path, "w") as file:
        json.dump(content, file, indent=1)
        file.write("\n")


def read_json(
    path: str | Path, way_out: str = "start anew with --overwrite", /, **wanted: type | tuple
) -> dict:
    """An object with at least these keys, of these types. Raises UsageError when damaged."""
    try:
        content = json.loads(regular_file(path).read_text())
        if not isinstance(content, dict):
            raise ValueError("not an object")
        for key, kind in wanted.items():
            if not isinstance(content.get(key), kind):
                raise ValueError(f"no {key}")
    except UsageError:
        raise
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is damaged ({error}); {way_out}") from error
    return content


def save(path: str | Path, state: object) -> None:
    """A checkpoint of tensors, numbers, strings, lists and dicts."""
    with atomic_file(path) as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:  # on a full disk torch fails to close the file, and says so
            cause = error.__context__
            raise cause if isinstance(cause, OSError) else error from None


def load(path: str | Path, map_location: object = "cpu") -> Any:
    """Read what `save` wrote; never executes anything. Raises UsageError: damaged or hostile."""
    try:
        with zipfile.ZipFile(regular_file(path)) as archive:  # torch compares no checksums
            compressed = any(info.compress_type for info in archive.infolist())
            if compressed or archive.testzip():
                raise ValueError("its checksums are wrong, or its members compressed")
        return torch.load(path, map_location=map_location, weights_only=True)
    except (FileNotFoundError, UsageError):
        raise
    except Exception as error:  # a damaged file can fail in any way
        reason = str(error).split("\n", 1)[0][:160]
        raise UsageError(f"{path} is not a readable file of tensors ({reason})") from error


def load_state(model: nn.Module, state: object, source: str | Path) -> None:
    """model.load_state_dict, but one line that names the first thing that does not fit."""
    wanted = model.state_dict()
    if not isinstance(state, dict):
        raise UsageError(f"{source} holds a {type(state).__name__}, not a dict of tensors")
    for name in [*state, *wanted]:
        if name not in wanted:
            near = difflib.get_close_matches(str(name), wanted, n=1, cutoff=0)
            raise UsageError(f"{source}: there is no weight {name!r} here; is it {near[0]!r}?")
        if name not in state:
            raise UsageError(f"{source}: the weight {name!r} is missing")
        if not isinstance(state[name], Tensor) or state[name].shape != wanted[name].shape:
            shape = list(getattr(state[name], "shape", []))
            raise UsageError(f"{source}: {name} is {shape}; {list(wanted[name].shape)} is needed")
    model.load_state_dict(state)


def digest(content: object) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


# --------------------------------------------------------------------------------------------------
# A small transformer
# --------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Multi-head self-attention. x [batch, time, d_model] -> the same shape."""

    def __init__(self, d_model: int, num_heads: int, causal: bool, rope: bool):
        super().__init__()
        if num_heads < 1 or d_model % num_heads or (rope and d_model // num_heads % 2):
            sizes = f"d_model is {d_model}, num_heads {num_heads}"
            raise ValueError(f"{sizes}; the head width must be whole (even with rope)")
        self.num_heads = num_heads
        self.causal = causal
        self.rope = rope
        self.qkv = nn.Linear(d_model, 3 * d_model, bias=False)
        self.out = nn.Linear(d_model, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, time, d_model = x.shape
        qkv = self.qkv(x).view(batch, time, 3, self.num_heads, d_model // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [batch, heads, time, head]
        if self.rope:
            q, k = rotate(q), rotate(k)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out(y.transpose(1, 2).reshape(batch, time, d_model))


def rotate(x: Tensor) -> Tensor:
    """Rotary positions (Su et al. 2021). x [..., time, head] -> the same shape and dtype."""
    time, head = x.shape[-2:]
    dtype = torch.promote_types(x.dtype, torch.float32)  # angles need it
    frequency = 10000.0 ** (-torch.arange(0, head, 2, device=x.device, dtype=dtype) / head)
    position = torch.arange(time, device=x.device, dtype=dtype)
    angle = position[:, None] * frequency  # [time, head / 2]
    cos, sin = angle.cos(), angle.sin()
    first, second = x.to(dtype).chunk(2, dim=-1)
    rotated = torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)
    return rotated.to(x.dtype)


class Block(nn.Module):
    def __init__(self, norm: type, attention: Attention, ffn: nn.Module, d_model: int):
        super().__init__()
        self.norm1, self.attention = norm(d_model), attention
        self.norm2, self.ffn = norm(d_model), ffn

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.ffn(self.norm2(x))


class TransformerLM(nn.Module):
    """Pre-norm language model. tokens [batch, time] int64 -> logits [batch, time, vocab_size].

    make_ffn(layer) gives each layer's feed-forward: any module [.., d_model] -> [.., d_model]. One
    that routes leaves its auxiliary loss in its `aux_loss`; the method `aux_loss` collects them.
    `conv` > 0 adds a causal convolution of that width, with a residual, right after the embedding:
    bytes are cheap to spell with neighbours, and the model reads words sooner. `init` is the
    standard deviation of the weights this class owns.
    Raises ValueError: unknown norm or positions, a sequence longer than the learned positions.
    """

    def __init__(
        self,
        vocab_size: int,
        num_layers: int,
        d_model: int,
        num_heads: int,
        context: int,
        make_ffn: Callable[[int], nn.Module],
        norm: str = "layer",
        positions: str = "learned",
        causal: bool = True,
        conv: int = 0,
        init: float = 0.02,
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        if norm not in ("layer", "rms") or positions not in ("learned", "rope"):
            given = f"norm is {norm!r}, positions {positions!r}"
            raise ValueError(f"{given}; allowed: layer or rms, learned or rope")
        norm_type = nn.LayerNorm if norm == "layer" else nn.RMSNorm
        self.context = context
        self.causal = causal
        self.conv_width = conv
        self.embedding = nn.Embedding(vocab_size, d_model)
        self.position = nn.Embedding(context, d_model) if positions == "learned" else None
        self.conv = nn.Conv1d(d_model, d_model, conv, bias=False) if conv else None
        blocks = []
        for layer in range(num_layers):
            ffn = make_ffn(layer)
            attention = Attention(d_model, num_heads, causal, positions == "rope")
            blocks.append(Block(norm_type, attention, ffn, d_model))
        self.blocks, self.norm = nn.ModuleList(blocks), norm_type(d_model)
        self.head = nn.Linear(d_model, vocab_size, bias=False)
        for name, parameter in self.named_parameters():
            if ".ffn." not in name and parameter.dim() > 1:
                residual = name.endswith("attention.out.weight")
                std = init / math.sqrt(2 * num_layers) if residual else init
                nn.init.normal_(parameter, std=std, generator=generator)

    def forward(self, tokens: Tensor) -> Tensor:
        time = tokens.shape[1]
        x = self.embedding(tokens)  # [batch, time, d_model]
        if self.position is not None:
            if time > self.context:
                raise ValueError(f"the sequence has {time} tokens; context is {self.context}")
            x = x + self.position.weight[:time]
        if self.conv is not None:
            left = self.conv_width - 1 if self.causal else self.conv_width // 2
            padded = F.pad(x.transpose(1, 2), (left, self.conv_width - 1 - left))
            x = x + self.conv(padded).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))

    def aux_loss(self) -> Tensor:
        """Mean over the layers that left one, and forget it: else it would keep the graph alive.

        Raises ValueError when activation checkpointing lost its gradient.
        """
        losses = []
        for ffn in self.ffns():
            if getattr(ffn, "aux_loss", None) is not None:
                losses.append(ffn.aux_loss)
            ffn.aux_loss = None
        if not losses:
            return self.head.weight.new_zeros(())
        mean = torch.stack(losses).mean()
        trained = any(p.requires_grad for ffn in self.ffns() for p in ffn.parameters())
        if trained and torch.is_grad_enabled() and not mean.requires_grad:
            reason = "the forward ran without gradients, as activation checkpointing does with"
            needed = "use_reentrant=True; set it to False"
            raise ValueError(f"aux_loss has no gradient: {reason} {needed}")
        return mean

    def ffns(self) -> list[nn.Module]:
        return [block.ffn for block in self.blocks]


def lm_loss(model: nn.Module, windows: Tensor) -> Tensor:
    """Next-token loss. windows [batch, context + 1] int64 -> [batch, context] fp32, in nats."""
    logits, target = model(windows[:, :-1]).float(), windows[:, 1:]
    loss = F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none")
    return loss.view_as(target)


@torch.no_grad()
def generate(
    model: nn.Module,
    prompt: Tensor,
    count: int,
    context: int,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Sample `count` more tokens. prompt [time] int64, at least one token -> [time + count].

    model: tokens [1, time] -> logits [1, time, vocab_size]; it sees the last `context` tokens.
    temperature 0 takes the likeliest token. The same generator gives the same text.
    """
    if prompt.dim() != 1 or len(prompt) == 0:
        raise ValueError(
            f"prompt is {list(prompt.shape)}; one sequence of a token or more is needed"
        )
    was_training = model.training
    model.eval()
    tokens = prompt
    for _ in range(count):
        logits = model(tokens[None, -context:])[0, -1].float()  # [vocab_size]
        if temperature == 0:
            token = logits.argmax(keepdim=True)
        else:
            probs = (logits / temperature).softmax(-1).cpu()  # a CPU generator serves any device
            token = torch.multinomial(probs, 1, generator=generator).to(tokens.device)
        tokens = torch.cat([tokens, token])
    model.train(was_training)
    return tokens


# --------------------------------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------------------------------


def adamw(
    model: nn.Module,
    lr: float,
    weight_decay: float = 0.01,
    betas: tuple[float, float] = (0.9, 0.95),
) -> torch.optim.AdamW:
    """AdamW over what requires a gradient. Biases (named b...) and vectors do not decay."""
    decayed, kept = [], []
    for name, parameter in model.named_parameters():
        is_bias = parameter.dim() < 2 or name.rsplit(".", 1)[-1].startswith("b")
        if parameter.requires_grad:
            (kept if is_bias else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}]
    if kept:
        groups.append({"params": kept, "weight_decay": 0.0})
    return torch.optim.AdamW(groups, lr=lr, betas=betas)


Schedule = Callable[[int], float]  # step -> factor on the learning rate


def cosine(steps: int, warmup: int = 0, final: float = 0.1) -> Schedule:
    """Linear warm-up to 1, then a half cosine down to `final` at the last step."""

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        progress = min(1.0, (step - warmup) / max(1, steps - 1 - warmup))
        return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))

    return factor


def processes() -> tuple[int, int]:
    """(rank, number of processes) under torchrun, once `run` has joined them; (0, 1) alone."""
    joined = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if joined else (0, 1)


def barrier() -> None:
    """Wait for all processes of torchrun."""
    if processes()[1] > 1:
        all_reduce(torch.zeros(()))


def all_reduce(tensor: Tensor, *operation: Any) -> None:
    """dist.all_reduce, in place. Raises JobFailed where another process has ended."""
    try:
        dist.all_reduce(tensor, *operation)
    except RuntimeError as error:
        reason = reason_of(error)
        lost = f"another process of this run seems to have ended ({reason})"
        raise JobFailed(f"{lost}; what is done is kept, go on with --resume") from error


@contextmanager
def deferred_signals():
    """Inside, Ctrl-C and SIGTERM only leave a note, so that a step and its checkpoint stay whole.

    At the end the first one noted is sent again. One that is ignored, as under nohup, stays so.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # only that may set handlers
        yield received
        return
    before = {}
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) != signal.SIG_IGN:
            before[number] = signal.signal(number, lambda number, frame: received.append(number))
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if received:
        signal.raise_signal(received[0])


class MetricsLog:
    """A JSON line a step. Losses wait on the device and come to the host together."""

    def __init__(self, path: Path | None, label: str, last: dict):
        self.path = path
        self.label = label
        self.last = last
        self.waiting: list[tuple[int, Tensor, dict]] = []

    def flush(self) -> None:
        """Raises NonFiniteLoss."""
        lines = []
        for step, loss, values in self.waiting:
            self.last.update(step=step, loss=float(loss))
            self.last.update({name: float(value) for name, value in values.items()})
            if not math.isfinite(self.last["loss"]):
                raise NonFiniteLoss(f"the loss is {self.last['loss']} at step {step}")
            lines.append(json.dumps({"arm": self.label, **self.last}) + "\n")
        self.waiting.clear()
        if self.path is not None:
            with open(self.path, "a") as file:
                file.writelines(lines)

    def forget(self, first_step: int, start_step: int) -> None:
        """Drop the lines of steps that run again, and a torn last one. Raises UsageError."""
        if self.path is None:
            return
        if not self.path.exists():
            if start_step > first_step:
                raise UsageError(f"{self.path} is missing; {afresh(self.path)}")
            return
        kept, steps = [], []
        try:
            for line in self.path.read_text().splitlines(True):
                if line.endswith("}\n") and json.loads(line)["step"] < start_step:
                    kept.append(line)
                    steps.append(json.loads(line)["step"])
            if steps != list(range(min([first_step, *steps]), start_step)):
                raise ValueError("steps are missing")
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            raise UsageError(f"{self.path} is damaged ({error}); {afresh(self.path)}") from error
        with atomic_file(self.path, "w") as file:
            file.writelines(kept)


def afresh(path: Path) -> str:
    return f"delete {path.with_suffix('.*')} and go on with --resume"


def train(
    model: nn.Module,
    loss_fn: Callable[[Any, int], tuple[Any, dict]],
    steps: int,
    *,
    batches: Callable[[int], Any],
    start_step: int = 0,
    stop_step: int | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    lr: float = 1e-3,
    schedule: Schedule | None = None,
    clip: float | None = 1.0,
    accumulate: int = 1,
    dtype: torch.dtype = torch.float32,
    backward: Callable[[Any], None] | None = None,
    on_step: Callable[[int], dict | None] | None = None,
    checkpoint: Path | None = None,
    checkpoint_seconds: float = 60.0,
    metrics: Path | None = None,
    label: str = "train",
    log_every: int = 10,
) -> dict[str, float]:
    """Train `model` in place, from start_step up to stop_step (default: steps); the last metrics.

    batches(step)        the batch of a step, a function of the step alone: resuming is exact
    loss_fn(batch, step) (loss, {metric: value}); values may be 0-dim tensors
    optimizer            default adamw(model, lr); handed on between calls it keeps its state
    schedule             factor on the learning rate by step; default cosine(steps)
    accumulate           the batch is cut into that many parts, gradients averaged by size
    backward(loss)       replaces loss.backward(); loss is then whatever loss_fn returned
    on_step(step)        after each optimizer step; a dict that it returns is logged, too
    checkpoint           written every checkpoint_seconds and if interrupted; if there, continued
    metrics              file that gets a JSON line per step

    Under torchrun every process takes its part of each batch, and gradients are summed: the same
    training as alone, but for rounding. Only the first process writes files.

    Raises NonFiniteLoss at the first NaN or infinite loss; interrupted, it saves and then obeys.
    """
    rank, world_size = processes()
    if backward is not None and world_size > 1:
        raise UsageError("this training has its own backward pass; start it without torchrun")
    optimizer = optimizer or adamw(model, lr)
    schedule = schedule or cosine(steps)
    stop_step = steps if stop_step is None else stop_step
    device = next(model.parameters()).device
    for group in optimizer.param_groups:
        group.setdefault("initial_lr", group["lr"])

    first_step, last = start_step, {}
    if checkpoint is not None and checkpoint.exists():
        start_step, last = restore(checkpoint, model, optimizer, range(first_step, stop_step + 1))
    log = MetricsLog(metrics if rank == 0 else None, label, last)
    log.forget(first_step, start_step)

    def one_step(step: int) -> tuple[Tensor, dict]:
        """Gradients, summed over the parts of the batch and over processes; a step along them."""
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * schedule(step)
        optimizer.zero_grad(set_to_none=True)
        total, values = torch.zeros((), device=device), {}
        own, own_share = parts_of(batches(step), world_size)[rank]
        for part, share in parts_of(own, accumulate):
            share *= own_share
            try:
                with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
                    loss, values = loss_fn(part, step)
            except ValueError as error:
                if step == first_step:  # a mistake; later it is a layer that refuses NaN
                    raise
                raise NonFiniteLoss(f"{error} at step {step}") from error
            if backward is None:
                (loss * share).backward()
            else:
                backward(loss)
            for one_loss in loss if isinstance(loss, (tuple, list)) else [loss]:
                total = total + share * one_loss.detach()
        if world_size > 1:
            total, values = sum_over_processes(model, total, values)
        if clip is not None:
            trained = [parameter for parameter in model.parameters() if parameter.grad is not None]
            nn.utils.clip_grad_norm_(trained, clip)
        optimizer.step()
        more = on_step(step) if on_step is not None else None
        return total, {**values, **(more or {})}

    def keep(step: int) -> None:
        if checkpoint is not None and rank == 0:
            random = [torch.get_rng_state()]
            if device.type == "cuda":
                random.append(torch.cuda.get_rng_state(device))
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            save(checkpoint, {**state, "random": random, "step": step, "last": last})

    model.train()
    saved = time.monotonic()
    quiet = True if rank else None  # None: no bar where stderr is a file
    bar = tqdm(total=stop_step, initial=start_step, desc=label, unit="step", leave=False,
               disable=quiet, mininterval=0.5)  # fmt: skip
    try:
        with bar, deferred_signals() as received:
            for step in range(start_step, stop_step):
                log.waiting.append((step, *one_step(step)))
                is_stopped = any_process_received(received)  # all leave after the same step
                due = time.monotonic() - saved >= checkpoint_seconds
                ends = is_stopped or step + 1 == stop_step
                if due or ends or len(log.waiting) >= log_every:
                    log.flush()
                    bar.set_postfix(loss=f"{last['loss']:.3f}", refresh=False)
                if (due or ends) and not is_finite(model):  # before it replaces the last good one
                    raise NonFiniteLoss(f"a weight is not finite after step {step}")
                if due or is_stopped:
                    keep(step + 1)
                    saved = time.monotonic()
                if is_stopped:
                    break
                bar.update()
    except NonFiniteLoss as error:
        good = checkpoint if checkpoint and checkpoint.exists() else "none yet"
        ways_out = "lower --lr, or use --dtype fp32"
        message = f"{label}: {error}; last good checkpoint: {good}; {ways_out}"
        raise NonFiniteLoss(message) from None
    barrier()  # every process finds the metrics whole
    return last


def restore(
    checkpoint: Path, model: nn.Module, optimizer: torch.optim.Optimizer, allowed: range
) -> tuple[int, dict]:
    """Put a checkpoint where it belongs: (its step, its metrics). Raises UsageError: a misfit."""
    try:
        state = load(checkpoint, map_location=next(model.parameters()).device)
        load_state(model, state["model"], checkpoint)
        settings = optimizer.state_dict()["param_groups"]  # no file chooses a learning rate
        optimizer.load_state_dict({"state": state["optimizer"]["state"], "param_groups": settings})
        for parameter, found in optimizer.state.items():
            for value in found.values():
                if isinstance(value, Tensor) and value.dim() and value.shape != parameter.shape:
                    raise ValueError("the optimizer's state has another shape")
        torch.set_rng_state(state["random"][0].cpu())
        if len(state["random"]) > 1:
            torch.cuda.set_rng_state(state["random"][1].cpu())
        if state["step"] not in allowed or not is_finite(model):
            raise ValueError(f"step {state['step']}")
        return state["step"], dict(state["last"])
    except (RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:
        reason = reason_of(error)
        misfit = f"{checkpoint} does not belong here ({reason})"
        raise UsageError(f"{misfit}; {afresh(checkpoint)}") from error


def is_finite(model: nn.Module) -> bool:
    for parameter in model.parameters():
        own = parameter.to_local() if hasattr(parameter, "to_local") else parameter  # FSDP2
        if not torch.isfinite(own).all():
            return False
    return True


def parts_of(batch: Any, count: int) -> list[tuple[Any, float]]:
    """Cut a tensor, or a tuple of tensors, along dim 0: `count` times (part, its share)."""
    if count == 1:
        return [(batch, 1.0)]
    tensors = (batch,) if isinstance(batch, Tensor) else batch
    size = len(tensors[0])
    if size < count:
        raise UsageError(f"a batch of {size} cannot be cut into {count} parts; raise --batch-size")
    found = []
    for part in zip(*(tensor.tensor_split(count) for tensor in tensors)):
        found.append((part[0] if isinstance(batch, Tensor) else part, len(part[0]) / size))
    return found


def sum_over_processes(model: nn.Module, loss: Tensor, values: dict) -> tuple[Tensor, dict]:
    """Sum gradients (in place) and loss over the processes, average the metrics."""
    gradients = []
    for parameter in model.parameters():
        summed_already = hasattr(parameter.grad, "full_tensor")  # by FSDP2
        if parameter.grad is not None and not summed_already:
            gradients.append(parameter.grad)
    if gradients:
        flat = nn.utils.parameters_to_vector(gradients)
        all_reduce(flat)
        nn.utils.vector_to_parameters(flat, gradients)
    numbers = [torch.as_tensor(value, device=loss.device).float() for value in values.values()]
    logged = torch.stack([loss, *numbers])
    all_reduce(logged)
    return logged[0], dict(zip(values, logged[1:] / dist.get_world_size()))


def any_process_received(received: list[int]) -> bool:
    """Whether a signal has reached any process by now; then the others note it as received, too.

    All get the same answer. A signal that comes after it waits for the next call.
    """
    if processes()[1] == 1:
        return bool(received)
    heard = torch.tensor(max(received, default=0))  # on the host: no GPU is waited for
    all_reduce(heard, dist.ReduceOp.MAX)
    if heard and not received:
        received.append(int(heard))
    return bool(heard)


# --------------------------------------------------------------------------------------------------
# Accounting
# --------------------------------------------------------------------------------------------------


def count_parameters(model: nn.Module, experts_per_token: float | None = None) -> int:
    """Parameters of a model; with experts_per_token, only those a token meets on average.

    A parameter is an expert's when its module has `num_experts` and it is [num_experts, .., ..].
    """
    total, counted = 0.0, set()
    for module in model.modules():
        num_experts = getattr(module, "num_experts", None)
        for parameter in module.parameters(recurse=False):
            if id(parameter) in counted:  # tied, as embeddings and head often are
                continue
            counted.add(id(parameter))
            is_expert = parameter.dim() == 3 and parameter.shape[0] == num_experts
            share = 1.0
            if is_expert and experts_per_token is not None:
                share = experts_per_token / num_experts
            total += share * parameter.numel()
    return round(total)


def count_flops(function: Callable[[], object]) -> dict[str, int]:
    """Matrix-multiplication FLOPs that ran during function(), by module name; "Global": the sum.

    Counted from the shapes of the operators torch executed, forward and backward. Triton kernels
    are not seen: count with backend="torch".
    """
    count = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.mm: mm_flops})
    # Eagerly: compiled operators are not counted, and a frame first met while counting would never
    # be compiled again.
    with torch.compiler.set_stance("force_eager"), count as counter:
        function()
    found = counter.get_flop_counts()
    return {name: sum(by_operator.values()) for name, by_operator in found.items()}


def mm_flops(a: Tensor, b: Tensor, *_: object, **__: object) -> int:
    """torch's own count takes a sparse matrix for a dense one."""
    return 2 * (a.numel() if a.layout == torch.strided else a._nnz()) * b.shape[1]


mm_flops._get_raw = True  # so that torch passes tensors, not their shapes


def median_seconds(step: Callable[[], object], device: str, repeats: int = 3) -> float:
    """Seconds of one call of step(), after a warm-up."""
    step()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        step()
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return sorted(seconds)[repeats // 2]


def peak_memory(device: str) -> int:
    """Bytes: of the device, or on a CPU of this process."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated()
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


# --------------------------------------------------------------------------------------------------
# Claims: what the paper says, what this run measured
# --------------------------------------------------------------------------------------------------

# Quantiles of Student's t at 95 %, one-sided, for 1 to 30 degrees of freedom.
T_95 = (
    6.314, 2.920, 2.353, 2.132, 2.015, 1.943, 1.895, 1.860, 1.833, 1.812,
    1.796, 1.782, 1.771, 1.761, 1.753, 1.746, 1.740, 1.734, 1.729, 1.725,
    1.721, 1.717, 1.714, 1.711, 1.708, 1.706, 1.703, 1.701, 1.699, 1.697,
)  # fmt: skip


def half_width(values: Sequence[float]) -> float:
    """Half the two-sided 90 % t-interval of the mean: its ends are the 95 % bounds of a verdict."""
    count = len(values)
    if count < 2:
        return math.inf
    quantile = T_95[min(count - 1, len(T_95)) - 1]
    return quantile * float(np.std(values, ddof=1)) / math.sqrt(count)


def verdict(margins: Sequence[float]) -> str:
    """What the margins, one a seed, say of a claim.

    From three seeds on by the t-interval of their mean: "holds" when all of it lies above 0,
    "contradicted" when all of it lies below, else "undecided". One or two seeds decide nothing:
    "seen" or "not seen" is the sign of their mean.
    """
    mean = float(np.mean(margins))
    if len(margins) < 3:
        return "seen" if mean > 0 else "not seen"
    if mean - half_width(margins) > 0:
        return "holds"
    return "contradicted" if mean + half_width(margins) < 0 else "undecided"


def show(values: Sequence[float] | float, digits: int = 4) -> str:
    """The mean over seeds; from three seeds on with ± half its 90 % interval."""
    values = np.atleast_1d(np.asarray(values, dtype=np.float64))
    text = f"{values.mean():.{digits}f}"
    if len(values) < 3 or np.ptp(values) == 0:  # a setting, say
        return text
    return f"{text} ± {half_width(values):.{digits}f}"


class Missing(Exception):
    """An arm that was not trained in this run: what needs it is not measured."""


class Results(dict):
    """{arm: [what its train function returned, one dict a seed]}. Another arm raises Missing."""

    def __missing__(self, arm: str) -> NoReturn:
        raise Missing(arm)

    def of(self, arm: str, key: str) -> np.ndarray:
        """[seeds]"""
        return np.array([result[key] for result in self[arm]], dtype=np.float64)

    def ahead(self, better: str, worse: str, key: str) -> np.ndarray:
        """[seeds]: how far one arm is above another, seed by seed."""
        return self.of(better, key) - self.of(worse, key)

    def difference(self, arm: str, first: str, second: str) -> np.ndarray:
        """[seeds]: first minus second, two measurements of one arm."""
        return self.of(arm, first) - self.of(arm, second)

    def table(
        self, arms: Iterable[str], columns: dict[str, tuple[str, int]]
    ) -> tuple[list[str], list[list[str]]]:
        """(header, rows) of {title: (key, digits)}; a column that no arm has is left out."""
        arms = list(arms)
        shown = {}
        for title, (key, digits) in columns.items():
            if any(key in self[arm][0] for arm in arms):
                shown[title] = (key, digits)
        rows = []
        for arm in arms:
            row = [arm]
            for key, digits in shown.values():
                row.append(show(self.of(arm, key), digits) if key in self[arm][0] else "")
            rows.append(row)
        return ["arm", *shown], rows


class Margin(NamedTuple):
    """What a claim measured: above 0 speaks for it."""

    values: Sequence[float]  # one a seed
    text: str  # the measurement, for people
    numbers: dict = {}  # noqa: RUF012  more of it, for results.json


class Check(NamedTuple):
    """What follows from the code or from arithmetic: no evidence, but checked all the same."""

    passed: bool
    text: str
    numbers: dict = {}  # noqa: RUF012


@dataclass
class Claim:
    """One sentence, the function that measures it, and what a run found."""

    id: str
    text: str
    paper: str  # the paper's number, or "not verified"
    required: bool  # a sentence of the abstract
    measure: Callable[[Results, Any], Margin | Check]
    is_check: bool = False
    verdict: str = "not measured"
    measured: str = ""
    margins: list[float] = field(default_factory=list)
    numbers: dict = field(default_factory=dict)

    def judge(self, results: Results, config: Any) -> None:
        try:
            found = self.measure(results, config)
        except Missing as missing:
            self.measured = f"it needs {missing}"
            return
        self.measured = found.text
        self.numbers = {name: np.asarray(value).tolist() for name, value in found.numbers.items()}
        if isinstance(found, Check):
            self.verdict = "passed" if found.passed else "failed"
        else:
            self.margins = np.atleast_1d(np.asarray(found.values, dtype=np.float64)).tolist()
            self.verdict = verdict(self.margins)

    def record(self) -> dict:
        """What results.json keeps."""
        content = dict(vars(self))
        del content["measure"]
        return content


def claim(text: str, paper: str = "not verified", required: bool = False) -> Callable:
    """Declares measure(results, config) -> Margin below it as a claim, named after it."""

    def declare(measure: Callable) -> Callable:
        measure.claim = {"text": text, "paper": paper, "required": required}
        return measure

    return declare


def check(text: str) -> Callable:
    """Declares measure(results, config) -> Check: something that holds by construction."""

    def declare(measure: Callable) -> Callable:
        measure.claim = {
            "text": text,
            "paper": "by construction",
            "required": False,
            "is_check": True,
        }
        return measure

    return declare


def claims_of(main: Callable) -> list[Claim]:
    """The claims of the script of `main`, in the order in which they stand there."""
    module, found = sys.modules[main.__module__], []
    for measure in vars(module).values():
        if callable(measure) and hasattr(measure, "claim"):
            name = f"{script_of(main).stem}.{measure.__name__}"
            found.append(Claim(name, measure=measure, **measure.claim))
    return found


HOW_TO_READ = """\
How to read: ± is half the 90 % interval of a mean over seeds. From three seeds on a claim holds (is
contradicted) when that whole interval of its margin lies above (below) 0, else it is undecided."""


def format_claims(claims: Sequence[Claim]) -> str:
    """Every claim with what was measured, those that were not in one line, checks apart."""
    lines = []
    absent = []
    checks = []
    for claim in claims:
        name = claim.id.partition(".")[2]
        if claim.verdict == "not measured":
            absent.append(name)
        elif claim.is_check:
            checks.append(f"{claim.verdict:14s}{name}: {claim.text}\n{'':16s}{claim.measured}")
        else:
            kind = "required" if claim.required else "open"
            lines.append(f"{claim.verdict:14s}{name} ({kind}): {claim.text}")
            lines.append(f"{'':16s}measured  {claim.measured}")
            lines.append(f"{'':16s}paper     {claim.paper}")
    if checks:
        lines += ["", "true by construction, checked", *checks]
    if absent:
        lines += ["", f"not measured: {', '.join(absent)}; --ablate trains what they need"]
    return "\n".join(lines)


def list_claims(claims: Sequence[Claim]) -> str:
    lines = []
    for claim in claims:
        kind = "by construction" if claim.is_check else "required" if claim.required else "open"
        lines.append(f"{claim.id} ({kind}): {claim.text}")
        if not claim.is_check:
            lines.append(f"    paper  {claim.paper}")
    return "\n".join(lines)


def in_short(claims: Sequence[Claim], num_seeds: int) -> str:
    """The end of a run for somebody who reads one sentence."""
    required = [claim for claim in claims if claim.required]
    by_verdict: dict[str, list[str]] = {}
    for claim in required:
        by_verdict.setdefault(claim.verdict, []).append(claim.id.partition(".")[2])
    parts = []
    for word in ("holds", "seen", "undecided", "not seen", "contradicted", "not measured"):
        if word in by_verdict:
            names = by_verdict[word]
            good = word in ("holds", "seen")
            listed = "" if good else f" ({', '.join(names)})"
            verb = "hold" if word == "holds" and len(names) > 1 else word
            parts.append(f"{len(names)} {verb}{listed}")
    text = f"In short: of {len(required)} required claims {', '.join(parts)}."
    if num_seeds < 3:
        decides = "One seed decides" if num_seeds == 1 else "Two seeds decide"
        text += f" {decides} nothing: --seeds 8 --overwrite does."
    return text


# --------------------------------------------------------------------------------------------------
# Pictures: one colour an arm in all panels, that the colour-blind can tell apart (Okabe and Ito)
# --------------------------------------------------------------------------------------------------

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")


def color_of(arm: str, arms: Sequence[str]) -> str:
    return COLORS[list(arms).index(arm) % len(COLORS)]


def curve(
    ax, x: Sequence[float], values: np.ndarray, label: str, color: str, style: str = "-"
) -> None:
    """values [seeds, points]: their mean, and from three seeds on the 90 % interval as a band."""
    mean = values.mean(axis=0)
    ax.plot(x, mean, style, color=color, label=label, marker="o" if len(x) < 12 else "")
    if len(values) >= 3:
        half = np.array([half_width(point) for point in values.T])
        ax.fill_between(x, mean - half, mean + half, color=color, alpha=0.2, linewidth=0)


def dots(ax, values: dict[str, np.ndarray], colors: dict[str, str] | None = None) -> None:
    """{label: [seeds]}: a row each, a dot a seed, the mean with its 90 % interval."""
    for row, (label, by_seed) in enumerate(values.items()):
        color = (colors or {}).get(label, COLORS[0])
        ax.plot(by_seed, [row] * len(by_seed), "o", color=color, alpha=0.3, markersize=4)
        bar = half_width(by_seed) if len(by_seed) >= 3 else 0.0
        ax.errorbar(np.mean(by_seed), row, xerr=bar, fmt="D", color=color, capsize=3, markersize=5)
    ax.set_yticks(range(len(values)), list(values))
    ax.invert_yaxis()
    ax.grid(axis="x", alpha=0.3)


# --------------------------------------------------------------------------------------------------
# A run: what main gets, and the jobs in their processes
# --------------------------------------------------------------------------------------------------


def say(text: str) -> None:
    """Print, also when nobody listens any more (`| head`): what was trained is still written."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def format_table(header: Sequence[object], rows: Sequence[Sequence[object]]) -> str:
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = []
    for first, *others in cells:
        padded = [cell.rjust(width) for cell, width in zip(others, widths[1:])]
        lines.append("  ".join([first.ljust(widths[0]), *padded]))
    lines.insert(1, "-" * len(lines[0]))
    return "\n".join(lines)


@dataclass
class Run:
    """What `main(config, run)` gets; a Job carries it into whatever process trains it."""

    method: str
    scale: str  # small | full
    device: str
    dtype: torch.dtype
    seeds: list[int]
    out: Path
    config: Any = None  # main replaces it when it settles a field
    arms: list[str] = field(default_factory=list)  # --arms; empty: the script chooses
    resume: bool = False
    overwrite: bool = False
    ablate: bool = False
    dry_run: bool = False
    compile: bool = False
    draw: bool = False
    traceback: bool = False
    workers: int = 1
    threads: int = 1
    data_dir: Path = Path("data/cache")
    given: frozenset[str] = frozenset()  # names of all flags that were given
    actions: dict[str, Any] = field(default_factory=dict)  # the script's own flags that were given
    data: dict[str, str] = field(default_factory=dict)  # name -> digest of what main trains on
    tables: list[dict] = field(default_factory=list)
    pictures: list[tuple] = field(default_factory=list)
    num_jobs: int = 1  # that can be trained at a time; `choose` counts them
    begun: bool = False
    lock: int | None = None  # file descriptor, in the process that holds it

    @property
    def seed(self) -> int:
        return self.seeds[0]

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def choose(
        self, known: Iterable[str], default: Sequence[str], more: Sequence[str]
    ) -> list[str]:
        """The arms of this run: those of --arms, else `default`, with --ablate `more`, too.

        known: names of methods; an arm may change settings, "method@lr=0.1". Raises UsageError.
        """
        chosen = self.arms or [*default, *(more if self.ablate else [])]
        for arm in chosen:
            method = arm.partition("@")[0]
            if method not in known:
                near = difflib.get_close_matches(method, known, n=1, cutoff=0)[0]
                there = f"the nearest is {near!r}, all: {', '.join(known)}"
                raise UsageError(f"--arms: there is no arm {method!r}; {there}")
            arm_config(self.config, arm)  # refuses settings
            if "/" in arm:
                raise UsageError(f"arm {arm}: files are named after it; give a path as a flag")
        chosen = list(dict.fromkeys(chosen))
        self.num_jobs = len(chosen) * len(self.seeds)
        return chosen

    def plan(
        self,
        text: str,
        model: nn.Module,
        step: Callable[[], object],
        steps: float,
        download_bytes: int | None = 0,
    ) -> None:
        """Print what the run works on and how long it takes; with --dry-run its cost, and stop.

        step: one typical training step; steps: how many the whole run makes, in all arms and seeds
        """
        count = len(self.seeds)
        seeds = f"seed {self.seed}" if count == 1 else f"seeds {self.seed}-{self.seeds[-1]}"
        at_once = min(self.workers, self.num_jobs)
        seconds = median_seconds(step, self.device) * steps / at_once
        where = [self.method, f"{self.scale} scale", self.device, self.dtype_name]
        say(" · ".join([*where, seeds, text, f"about {seconds:,.0f} s"]))
        if not self.dry_run:
            return
        at_a_time = f"{at_once} {'arms' if at_once > 1 else 'arm'} at a time"
        download = "not known" if download_bytes is None else f"{download_bytes:,}"
        rows = [
            ["parameters", f"{count_parameters(model):,}"],
            ["training FLOPs", f"{count_flops(step).get('Global', 0) * steps:.2e}"],
            ["bytes to download", download],
            ["peak memory of a step", f"{peak_memory(self.device) / 2**20:,.0f} MiB"],
            ["training time", f"{seconds / 3600:.3f} hours, {at_a_time}"],
        ]
        title = f"dry run: {steps:,.0f} training steps in all arms and seeds"
        self.table(title, ["", "estimate"], rows)
        raise Planned

    def table(self, title: str, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        say(f"\n{title}\n{format_table(header, rows)}")
        self.tables.append({"title": title, "header": list(header), "rows": rows})

    def plot(
        self, panels: Sequence[Callable], width: float = 4.6, height: float = 3.8, name: str = ""
    ) -> None:
        """With --plot, draw panels (functions of a matplotlib axis), three a row at most.

        Once results.json is written: a mistake in a panel loses no result. Train nothing after it.
        """
        if self.draw:
            self.pictures.append((panels, width, height, name or self.method))

    def draw_picture(
        self, panels: Sequence[Callable], width: float, height: float, name: str
    ) -> None:
        from matplotlib.figure import Figure

        columns = len(panels) if len(panels) <= 3 else math.ceil(len(panels) / 2)
        rows = math.ceil(len(panels) / columns)
        figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
        named = {}
        for place, panel in enumerate(panels, start=1):
            ax = figure.add_subplot(rows, columns, place)
            panel(ax)
            handles, labels = ax.get_legend_handles_labels()
            if ax.get_legend() is None:
                named.update(zip(labels, handles))
        if named:  # one legend for all panels, and over no data
            figure.legend(named.values(), named.keys(), loc="outside lower center",
                          ncols=min(len(named), 2 + 2 * columns), frameon=False,
                          fontsize=8)  # fmt: skip
        path = self.out / f"{name}.png"
        with atomic_file(path) as file:
            figure.savefig(file, format="png", dpi=130)
        say(f"\nwrote {path}")

    def path(self, arm: str, seed: int, suffix: str) -> Path:
        return self.out / "arms" / f"{arm}-seed{seed}{suffix}"

    def train_arms(
        self, train_arm: Callable, arms: Sequence[str], seeds: Sequence[int] = ()
    ) -> Results:
        """train_arm(job) -> dict (JSON) for every arm and seed, `workers` at a time.

        train_arm must stand at the top level of the script. Each result goes to a file of its own
        as soon as it is there; with --resume, finished arms are read back. The number of workers
        never changes a number.
        """
        jobs = [Job(self, arm, seed) for arm in arms for seed in seeds or self.seeds]
        self.do([(job, train_arm) for job in jobs])
        results = Results()
        for job in jobs:
            results.setdefault(job.arm, []).append(job.result())
        return results

    def do(self, jobs: Sequence[tuple["Job", Callable]]) -> None:
        """Train what has no result yet."""
        self.begin()
        todo = []
        for job, train_arm in jobs:
            if job.path(".json").exists():
                job.result()  # refuses a damaged one before hours are spent on the others
            else:
                todo.append((job, train_arm))
        if min(self.workers, len(todo)) > 1 and processes()[1] == 1:
            train_in_processes(self, todo)
            return
        for job, train_arm in todo:
            job.do(train_arm)

    def identity(self) -> dict:
        """What all arms of a folder must have in common. Threads and --compile change digits."""
        config = json.loads(json.dumps(dataclasses.asdict(self.config)))  # as it will be read back
        where = {"dtype": self.dtype_name, "device": self.device, "threads": self.threads}
        where["compile"] = self.compile
        return {"config": config, "data": self.data, **where, "torch": torch.__version__}

    def record(self) -> dict:
        """The content of OUT/run.json: what --resume compares, and what `load_trained` needs."""
        identity = self.identity()
        about = {"method": self.method, "scale": self.scale, "config": identity["config"]}
        return {**about, "data_dir": str(self.data_dir.absolute()), "identity": identity}

    def begin(self) -> None:
        """Claim the folder before the first arm: never mix two runs, never delete one too soon."""
        if self.begun:
            return
        if processes()[0] == 0:
            self.keep_others_out()
            self.claim_folder()
        self.begun = True
        barrier()

    def keep_others_out(self) -> None:
        """Lock the folder until this process ends; a disk without locks is trusted."""
        if self.lock is not None or fcntl is None:
            return
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            self.lock = os.open(self.out / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise unwritable(self.out, error) from error
        try:
            fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                who = os.pread(self.lock, 100, 0).decode(errors="replace").strip()
                in_use = f"{self.out} is in use by another run ({who})"
                raise UsageError(f"{in_use}; wait for it or choose another --out") from None
        os.truncate(self.lock, 0)
        os.pwrite(self.lock, f"process {os.getpid()} on {platform.node()}\n".encode(), 0)
        if not (self.resume or self.overwrite):
            refuse_a_second_run(self.out)  # one may have begun since the flags were read
        for path in self.out.rglob(".*.tmp"):  # half-written by a run that was killed
            path.unlink()

    def claim_folder(self) -> None:
        mark = self.out / "run.json"
        arms = self.out / "arms"
        now = self.identity()
        if self.resume:
            left = read_json(mark, method=str, identity=dict)
            if left["method"] != self.method:
                whose = f"{self.out} was left by {left['method']}.py"
                raise UsageError(f"--resume: {whose}; choose another --out")
            before = {"compile": False, **left["identity"]}  # an earlier version did not note it
            for old, new in [(before.get("config", {}), now["config"]), (before, now)]:
                for key in new:
                    if key not in old:
                        damaged = f"{mark} is damaged (no {key})"
                        raise UsageError(f"{damaged}; start anew with --overwrite")
                    if key != "config" and old[key] != new[key]:
                        differs = f"{key} = {old[key]}, not {new[key]}"
                        raise UsageError(f"--resume: {self.out} was run with {differs}")
        try:
            if self.overwrite:
                results = [self.out / "results.json", self.out / "metrics.jsonl"]
                for path in [*arms.glob("*"), *results]:
                    path.unlink(missing_ok=True)
            arms.mkdir(exist_ok=True)
            write_json(mark, self.record())
        except OSError as error:
            raise unwritable(self.out, error) from error


def unwritable(out: Path, error: OSError) -> UsageError:
    reason = f"{error.strerror}; choose another --out"
    return UsageError(f"--out {out} cannot be written: {reason}")


def refuse_a_second_run(out: Path) -> None:
    if (out / "run.json").exists() or (out / "arms").exists():
        ways_out = "continue it with --resume or replace it with --overwrite"
        raise UsageError(f"{out} holds a run; {ways_out}")


@dataclass(frozen=True)
class Job:
    """One arm with one seed: what a script's train function gets."""

    run: Run
    arm: str
    seed: int

    @property
    def method(self) -> str:
        return self.arm.partition("@")[0]

    @property
    def config(self) -> Any:
        """The run's settings, with the changes that the arm's name asks for."""
        return arm_config(self.run.config, self.arm)

    @property
    def label(self) -> str:
        return f"{self.arm}-seed{self.seed}"

    def path(self, suffix: str) -> Path:
        return self.run.path(self.arm, self.seed, suffix)

    def other(self, arm: str, seed: int | None = None) -> "Job":
        """Another job of the run, whose files this one reads."""
        return Job(self.run, arm, self.seed if seed is None else seed)

    def prepare(self, model: nn.Module) -> nn.Module:
        """Onto the run's device; with --compile compiled in place: names in its state stay."""
        model = model.to(self.run.device)
        if self.run.compile:
            model.compile()
        return model

    def train(self, model: nn.Module, loss_fn: Callable, steps: int, **options: Any) -> dict:
        """`train`, with this job's checkpoint, metrics, name and dtype."""
        files = {"checkpoint": self.path(".ckpt"), "metrics": self.path(".jsonl")}
        given = {**files, "label": self.label, "dtype": self.run.dtype, **options}
        return train(model, loss_fn, steps, **given)

    def log(self) -> list[dict]:
        """What `train` logged, a dict a step: also the steps before an interruption."""
        return [json.loads(line) for line in self.path(".jsonl").read_text().splitlines()]

    def result(self) -> dict:
        """What its train function returned. UsageError: a digit was changed, weights were cut."""
        path, weights = self.path(".json"), self.path(".pt")
        way_out = f"{afresh(path)} or start anew with --overwrite"
        found = read_json(path, way_out, result=dict, sha256=str)
        if found["sha256"] != digest(found["result"]):
            raise UsageError(f"{path} is damaged, its SHA-256 is another; {way_out}")
        whole = found.get("bytes")  # None: no weights, or of an earlier version
        if whole and weights.exists() and weights.stat().st_size != whole:
            raise UsageError(f"{weights} is damaged: it had {whole:,} bytes; {way_out}")
        return found["result"]

    def do(self, train_arm: Callable) -> None:
        start = time.monotonic()
        torch.manual_seed(self.seed)  # whatever this process has drawn before
        result = train_arm(self)
        seconds = round(time.monotonic() - start, 2)
        if self.run.device == "cuda":
            torch.cuda.empty_cache()
        barrier()
        if processes()[0] == 0:
            about = {"arm": self.arm, "seed": self.seed, "seconds": seconds}
            if self.path(".pt").exists():
                about["bytes"] = self.path(".pt").stat().st_size
            write_json(self.path(".json"), {**about, "result": result, "sha256": digest(result)})
            self.path(".ckpt").unlink(missing_ok=True)
            tqdm.write(f"  {self.arm}, seed {self.seed}: {seconds:.1f} s", file=sys.stderr)
        barrier()


# --------------------------------------------------------------------------------------------------
# A job, a process: whatever happens to one, nobody waits for it
# --------------------------------------------------------------------------------------------------

FORK_SERVER = sys.platform == "linux"  # forking with torch loaded is not safe elsewhere
# What a person can act on: it crosses from a job's process as it is, and becomes one line.
ONE_LINE = (ValueError, OSError, NonFiniteLoss, JobFailed, torch.OutOfMemoryError)


def start_fork_server(run: Run) -> multiprocessing.context.BaseContext:
    """A process that has imported torch and the script; it forks one for every job."""
    if not FORK_SERVER:
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([run.method, "torch._dynamo"])  # else each optimizer loads it
    limits = {"OMP_NUM_THREADS": str(run.threads), "OMP_WAIT_POLICY": "PASSIVE"}  # read at import
    before = dict(os.environ)
    os.environ.update(limits)
    try:
        with signals_ignored():  # what is started inside ignores them, too
            multiprocessing.forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)
    return context


@contextmanager
def signals_ignored():
    """A process that is started inside ignores Ctrl-C and SIGTERM until it sets handlers itself."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, signal.SIG_IGN) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Child(NamedTuple):
    """A process that trains a job; what it reports comes through a pipe, which needs no lock."""

    job: Job
    process: Any
    inbox: Any
    slot: int  # 0 .. workers - 1: its GPU


def train_in_processes(run: Run, jobs: Sequence[tuple[Job, Callable]]) -> None:
    """Every job in a process of its own, `run.workers` at a time.

    One that fails or is killed ends its job and nothing else; its error is raised at the end.
    Interrupted, all running ones are told to save a checkpoint, and waited for.
    """
    context = start_fork_server(run)
    waiting, running = list(reversed(jobs)), {}
    free = list(reversed(range(run.workers)))
    errors: list[Exception] = []
    try:
        while waiting or running:
            while waiting and free:
                child = start_child(context, *waiting.pop(), free.pop())
                running[child.process.sentinel] = child
            for sentinel in multiprocessing.connection.wait(list(running)):
                child = running.pop(sentinel)
                child.process.join()
                free.append(child.slot)
                error = error_of(child)
                if error is not None:
                    errors.append(error)
                    tqdm.write(f"  {child.job.label}: failed", file=sys.stderr)
    finally:
        for child in running.values():  # none, unless interrupted
            while child.process.is_alive():  # again, should it have been too young to listen
                child.process.terminate()
                child.process.join(0.5)
    if errors:
        raise errors[0]


def start_child(context: Any, job: Job, train_arm: Callable, slot: int) -> Child:
    inbox, outbox = context.Pipe(duplex=False)
    process = context.Process(target=child_main, args=(job, train_arm, slot, outbox))
    # The fork server's children ignore signals from the start; spawned ones inherit that from here.
    with deferred_signals() if FORK_SERVER else signals_ignored():
        process.start()
    outbox.close()
    return Child(job, process, inbox, slot)


def error_of(child: Child) -> Exception | None:
    """What went wrong in a process that has ended; the traceback of a mistake is printed here."""
    error, trace = None, ""
    with suppress(EOFError):  # it said nothing, as one that is killed
        if child.inbox.poll():
            error, trace = child.inbox.recv()
    child.inbox.close()
    if trace:
        tqdm.write(trace, file=sys.stderr)
    if error is None and child.process.exitcode != 0:
        way_out = "was killed (out of memory?); go on with --resume"
        error = JobFailed(f"{child.job.label} {way_out}")
    return error


def child_main(job: Job, train_arm: Callable, slot: int, outbox: Any) -> None:
    """In the process of a job."""
    signal.signal(signal.SIGTERM, stop)  # from the parent, which alone listens to Ctrl-C
    threading.Thread(target=end_with_parent, daemon=True).start()
    tqdm.set_lock(threading.RLock())  # the default one is shared by processes, and outlives none
    torch.set_num_threads(job.run.threads)
    if job.run.device == "cuda":
        torch.cuda.set_device(slot % torch.cuda.device_count())
    try:
        job.do(train_arm)
    except KeyboardInterrupt:
        sys.exit(143)
    except ONE_LINE as error:
        outbox.send((error, traceback.format_exc() if job.run.traceback else ""))
        sys.exit(1)
    except Exception:
        failed = JobFailed(f"{job.label} failed, see above; go on with --resume")
        outbox.send((failed, traceback.format_exc()))
        sys.exit(1)


def end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def load_trained(
    path: str | Path, config_type: type, rebuild: Callable[[Job, Any], nn.Module]
) -> nn.Module:
    """The model that a run left in OUT/arms/<arm>-seed<N>.pt, in eval mode, on the CPU.

    rebuild(job, state) -> the model with that state; the job has the settings of OUT/run.json.
    Raises UsageError: no such file, damaged, of another script or another version of it.
    """
    path, script = Path(path), Path(inspect.getfile(config_type))
    arm, _, seed = path.stem.rpartition("-seed")
    if not path.is_file():
        there = sorted(other.name for other in path.parent.glob(f"*-seed*{path.suffix}"))
        found = ", ".join(there) or f"none like it in {path.parent}"
        raise UsageError(f"{path}: no such weights; there are {found}")
    mark = path.parent.parent / "run.json"
    if not mark.is_file() or not seed.isdecimal():
        needed = f"{mark} and the name <arm>-seed<N> say how to build the model"
        raise UsageError(f"{path}: {needed}; keep both as they were")
    left = read_json(mark, method=str, config=dict, data_dir=str, identity=dict)
    if left["method"] != script.stem:
        raise UsageError(f"{path} was left by {left['method']}.py, not by {script.name}")
    odd = left["config"].keys() ^ {item.name for item in dataclasses.fields(config_type)}
    if odd:
        differs = f"{mark} differs in the settings {', '.join(sorted(odd)[:3])}"
        raise UsageError(f"{path} is of another version of {script.name}: {differs}")
    settings = {}
    for name, value in left["config"].items():
        settings[name] = tuple(value) if isinstance(value, list) else value
    try:
        dtype = getattr(torch, left["identity"]["dtype"])
        config, folder = config_type(**settings), path.parent.parent
        run = Run(left["method"], left["scale"], "cpu", dtype, [int(seed)], folder, config)
        run.data_dir = Path(left["data_dir"])
        state = load(path) if path.suffix == ".pt" else None
        return rebuild(Job(run, arm, int(seed)), state).eval()
    except (UsageError, FileNotFoundError):
        raise
    except (RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:
        reason = reason_of(error)
        misfit = f"{path} and {mark} do not fit together ({reason})"
        raise UsageError(f"{misfit}; run it again with --overwrite") from error


# --------------------------------------------------------------------------------------------------
# The command line
# --------------------------------------------------------------------------------------------------

FLAGS = {  # name: (default, metavar or choices, help); a default of False makes a switch
    "full": (False, None, "the paper's own scale and data"),
    "arms": ((), "ARM", "train these: method, or method@field=value,field=value"),
    "ablate": (False, None, "train every arm, not only those that the required claims need"),
    "seed": (0, "N", "first seed"),
    "seeds": (1, "K", "number of seeds: N .. N+K-1"),
    "device": ("auto", ("auto", "cpu", "cuda", "mps"), "auto: a GPU if there is one"),
    "dtype": ("auto", ("auto", "fp32", "bf16"), "auto: fp32, but bf16 for --full on a GPU"),
    "out": (Path(), "DIR", "where results go; default runs/<method>-<scale>"),
    "overwrite": (False, None, "replace the run in that folder"),
    "resume": (False, None, "continue the run in that folder"),
    "data_dir": (Path(), "DIR", "where downloads lie; default $MOE_DATA, else data/cache"),
    "workers": (0, "N", "arms trained at a time; default: as many as cores or GPUs"),
    "threads": (0, "N", "CPU threads of each; default 1 at small scale"),
    "compile": (False, None, "torch.compile the models"),
    "dry_run": (False, None, "print what the run would cost, and stop"),
    "plot": (False, None, "draw the picture (needs matplotlib)"),
    "strict": (
        False,
        None,
        "exit code 1 unless every required claim holds, or on 1-2 seeds is seen",
    ),
    "list_claims": (False, None, "print the claims, and stop"),
    "compare": (False, None, "say whether this run lies within the spread of the committed seeds"),
    "traceback": (False, None, "show where an error came from"),
}


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def script_of(main: Callable) -> Path:
    return Path(sys.modules[main.__module__].__file__)


def run(
    main: Callable[[Any, Run], Results | None],
    small: Any,
    full: Any,
    argv: Sequence[str] | None = None,
    actions: dict[str, tuple] | None = None,
    data_parallel: bool = False,
) -> NoReturn:
    """Parse the command line, call main(config, run), judge the claims, report, and exit.

    actions: a script's own flags, declared as in FLAGS. What was given stands in `run.actions`;
    main then does that instead of a whole run: no claims are judged, no results.json is written.
    data_parallel: under torchrun, the processes train every arm together; see `train`.

    Exit codes: 0; 1 failed (NaN, out of memory, disk full; --strict and a required claim does not
    hold); 2 usage; 130 Ctrl-C and 143 SIGTERM, after printing the command that resumes.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    program = script_of(main).name
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, OSError):  # of a stream that is none, or closed
            stream.reconfigure(errors="replace")  # show what the terminal can
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup leaves it
            signal.signal(number, stop)
    try:
        if data_parallel and int(os.environ.get("WORLD_SIZE", 1)) > 1:
            join_processes()
        code = run_script(main, small, full, argv, actions or {})
        if processes()[1] > 1:
            dist.destroy_process_group()
        sys.exit(code)
    except KeyboardInterrupt as stopped:
        again = [word for word in argv if word not in ("--resume", "--overwrite")]
        command = shlex.join([sys.executable, sys.argv[0], *again, "--resume"])
        kept = "" if "--dry-run" in argv else f"; what is done is kept. Go on with: {command}"
        print(f"\n{program}: stopped{kept}", file=sys.stderr)
        sys.exit(143 if isinstance(stopped, Terminated) else 130)
    except ONE_LINE as error:
        if "--traceback" in argv:
            traceback.print_exc()
        is_usage = isinstance(error, (ValueError, FileNotFoundError, PermissionError))
        print(f"{program}: {one_line(error, small, is_usage)}", file=sys.stderr)
        sys.exit(2 if is_usage else 1)


def one_line(error: Exception, small: Any, is_usage: bool) -> str:
    if isinstance(error, torch.OutOfMemoryError):
        sizes = ("batch_size", "context", "d_model", "hidden")
        flags = [flag(name) for name in sizes if hasattr(small, name)]
        return f"out of GPU memory; lower {' or '.join(flags)}"
    message = " ".join(str(error).split())
    if (
        isinstance(error, OSError) and error.errno is not None and not is_usage
    ):  # no failed download
        message += "; what is done is kept, go on with --resume"
    return message


def join_processes() -> None:
    """Become one of torchrun's processes. Only the first one prints."""
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    if dist.get_rank() > 0:
        sys.stdout = open(os.devnull, "w")


def stop(number: int, frame: object) -> NoReturn:
    """The first signal ends the run in order. `timeout` and impatient people send more."""
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, signal.SIG_IGN)
    raise Terminated if number == signal.SIGTERM else KeyboardInterrupt


def run_script(
    main: Callable, small: Any, full: Any, argv: list[str], actions: dict[str, tuple]
) -> int:
    start = time.monotonic()
    options, settings = parse(main, small, full, argv, actions)
    claims = claims_of(main)
    if options["list_claims"]:
        say(list_claims(claims))
        return 0
    run = make_run(
        script_of(main).stem, full if options["full"] else small, options, settings, actions
    )
    committed = committed_margins(script_of(main), run, settings) if options["compare"] else {}
    torch.set_num_threads(run.threads)
    barrier()  # before one process claims the folder that the others have just looked at
    try:
        if (run.resume or run.overwrite) and run.out.is_dir() and processes()[0] == 0:
            if not (run.dry_run or run.actions):
                run.keep_others_out()
        results = main(run.config, run)
    except Planned:
        return 0
    except KeyboardInterrupt:
        if not (run.begun or run.resume or run.dry_run or run.actions):
            print(f"\n{script_of(main).name}: stopped before the first step", file=sys.stderr)
            return 130
        raise
    finally:
        if run.lock is not None:
            os.close(run.lock)
    if run.dry_run or run.actions or processes()[0] > 0:
        return 0
    code = report(main, run, claims, results or Results(), options["strict"], start)
    for picture in run.pictures:
        run.draw_picture(*picture)
    if options["compare"]:
        say(f"\n{format_comparison(committed, claims)}")
    return code


def committed_margins(script: Path, run: Run, settings: dict) -> dict[str, list[float]]:
    """The margins of each claim that were committed with the code: what --compare compares with.

    Without those of the seeds of this run: a seed says nothing beside itself. Raises UsageError
    where a comparison would mean nothing: other settings, another scale, no other seeds.
    """
    path = script.parent / "results" / "cpu-2-cores" / f"{script.stem}.json"
    if run.scale == "full" or not path.is_file():
        raise UsageError(f"--compare: there is no committed result of {script.name} at this scale")
    if settings:
        flags = ", ".join(flag(name) for name in sorted(settings))
        raise UsageError(f"--compare: the committed seeds ran with the defaults; leave out {flags}")
    left = read_json(path, seeds=list, claims=list)
    if len(set(left["seeds"]) - set(run.seeds)) < 3:
        way_out = f"take others, --seed {max(left['seeds']) + 1}"
        raise UsageError(f"--compare: these seeds are the committed ones themselves; {way_out}")
    others = {}
    for claim in left["claims"]:
        by_seed = zip(left["seeds"], claim["margins"])  # a dear control has only the first seeds
        others[claim["id"]] = [margin for seed, margin in by_seed if seed not in run.seeds]
    return others


def format_comparison(committed: dict[str, list[float]], claims: Sequence[Claim]) -> str:
    """Every margin of this run beside the committed seeds and their 90 % prediction interval."""
    rows = []
    for claim in claims:
        before = committed.get(claim.id, ())
        if len(before) < 3 or not claim.margins:
            continue
        here, mean = float(np.mean(claim.margins)), float(np.mean(before))
        # of the difference between a mean over these seeds and one over those
        width = half_width(before) * math.sqrt(1 + len(before) / len(claim.margins))
        word = "within" if abs(here - mean) <= width else "outside"
        name = claim.id.partition(".")[2]
        rows.append([name, f"{here:.4f}", f"{mean - width:.4f} to {mean + width:.4f}", word])
    title = "this run beside the committed seeds: one margin in ten lies outside by chance"
    return f"{title}\n{format_table(['margin of', 'this run', 'expected', ''], rows)}"


def report(
    main: Callable, run: Run, claims: Sequence[Claim], results: Results, strict: bool, start: float
) -> int:
    """Judge, write results.json, and tell a stranger what came out. The exit code."""
    for claim in claims:
        claim.judge(results, run.config)
    with atomic_file(run.out / "metrics.jsonl") as file:
        for path in sorted((run.out / "arms").glob("*.jsonl")):
            file.write(path.read_bytes())
    seconds = round(time.monotonic() - start, 1)
    content = {
        "method": run.method,
        "scale": run.scale,
        "seeds": run.seeds,
        **machine(run.device),
        "threads": run.threads,
        "git": git_version(script_of(main).parent),
        "dtype": run.dtype_name,
        "config": dataclasses.asdict(run.config),
        "data": run.data,
        "wall_seconds": seconds,
        "results": {"arms": results, "tables": run.tables},
        "claims": [claim.record() for claim in claims],
    }
    write_json(run.out / "results.json", content)
    if claims:
        seeds = f"{len(run.seeds)} seed{'s' * (len(run.seeds) > 1)}"
        say(f"\nclaims of the paper, on {seeds}\n{format_claims(claims)}")
        say(f"\n{HOW_TO_READ}\n{in_short(claims, len(run.seeds))}")
    say(f"\nwrote {run.out / 'results.json'} ({seconds:.0f} s)")
    good = ("holds", "seen", "passed")
    bad = [claim.id for claim in claims if claim.required and claim.verdict not in good]
    bad += [claim.id for claim in claims if claim.verdict == "failed"]
    if strict and bad:
        print(f"required claims that do not hold: {', '.join(bad)}", file=sys.stderr)
    return int(strict and bool(bad))


def make_run(method: str, config: Any, options: dict, settings: dict, actions: dict) -> Run:
    """Everything that flags can get wrong is refused here, before anything is done."""
    given, scale = options["given"], "full" if options["full"] else "small"
    for name, least in {"seeds": 1, "workers": 1, "threads": 1, "seed": 0}.items():
        if name in given and options[name] < least:
            raise UsageError(f"--{name} is {options[name]}; at least {least} is needed")
    if options["overwrite"] and options["resume"]:
        raise UsageError("--overwrite and --resume exclude each other")
    if options["plot"] and importlib.util.find_spec("matplotlib") is None:
        raise UsageError("--plot needs matplotlib: pip install -r requirements-full.txt")
    refuse_idle_flags(config, settings, scale)
    config = dataclasses.replace(config, **settings)

    own = {name: options[name] for name in actions if name in given}
    out = options["out"] if "out" in given else Path("runs") / f"{method}-{scale}"
    if options["resume"] and not own and not (out / "run.json").exists():
        raise UsageError(f"--resume: there is no run in {out}")
    if not (options["resume"] or options["overwrite"] or options["dry_run"] or own):
        refuse_a_second_run(out)

    there = {
        "cpu": True,
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
    }
    device = options["device"]
    if device == "auto":
        device = "cuda" if there["cuda"] else "cpu"
    if not there[device]:
        raise UsageError(f"--device {device}: torch finds no such device here; use --device cpu")
    on_gpu = device == "cuda"
    is_bf16 = options["dtype"] == "bf16" or (
        options["dtype"] == "auto" and scale == "full" and on_gpu
    )
    cache = os.environ.get("MOE_DATA", Path(__file__).parent / "data" / "cache")
    switches = ("resume", "overwrite", "ablate", "dry_run", "compile", "traceback")
    return Run(
        method=method,
        scale=scale,
        config=config,
        device=device,
        dtype=torch.bfloat16 if is_bf16 else torch.float32,
        seeds=list(range(options["seed"], options["seed"] + options["seeds"])),
        out=out,
        arms=split_arms(options["arms"]),
        workers=options["workers"] or (torch.cuda.device_count() if on_gpu else num_cores()),
        threads=options["threads"] or (1 if scale == "small" else num_cores()),
        data_dir=options["data_dir"] if "data_dir" in given else Path(cache),
        draw=options["plot"],
        given=frozenset(given),
        actions=own,
        **{name: options[name] for name in switches},
    )


def refuse_idle_flags(config: Any, settings: dict, scale: str) -> None:
    """A flag that would do nothing, by the Only(...) in the type of its field."""
    here = {"scale": scale, **vars(config), **settings}
    for name in settings:
        for note in getattr(field_types(type(config))[name], "__metadata__", ()):
            where = note.where if isinstance(note, Only) else {}
            for key, value in where.items():
                if here[key] != value:
                    wanted = "--full" if (key, value) == ("scale", "full") else f"{key} {value}"
                    raise UsageError(f"{flag(name)} does nothing here; it belongs to {wanted}")


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see --help)")


def parse(
    main: Callable, small: Any, full: Any, argv: list[str], actions: dict[str, tuple]
) -> tuple[dict, dict]:
    """The house flags and a flag a field: ({flag: value, "given": names}, {field: value given})."""
    parser = Parser(
        prog=script_of(main).name,
        description=sys.modules[main.__module__].__doc__,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    comments, kinds = field_comments(type(small)), field_types(type(small))
    flags = {name: how for name, how in (FLAGS | actions).items() if name not in kinds}
    for name, (default, kind, text) in flags.items():
        how = {"type": type(default), "metavar": kind}
        if default is False:
            how = {"action": "store_true"}
        elif isinstance(kind, tuple):
            how = {"choices": kind}
        elif isinstance(default, tuple):
            how = {"nargs": "+", "metavar": kind}
        parser.add_argument(flag(name), help=text, **how)
    fields = parser.add_argument_group("settings (small scale / full scale)")
    for name, kind in kinds.items():
        defaults = {as_typed(getattr(config, name)): None for config in (small, full)}
        text = f"{comments.get(name, '')} ({' / '.join(defaults)})".replace("%", "%%")
        how = {"metavar": name.upper()}
        if kind is bool:
            how = {"action": argparse.BooleanOptionalAction}
        fields.add_argument(flag(name), help=text, **how)

    found, unknown = parser.parse_known_args(argv)
    if unknown:
        near = similar_flags(unknown[0].split("=")[0], list(parser._option_string_actions))
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise UsageError(f"unknown argument {unknown[0]!r}{hint} (see --help)")
    given, settings = vars(found), {}
    for name in kinds.keys() & given.keys():
        settings[name] = given[name]
        if kinds[name] is not bool:
            try:
                settings[name] = read_value(kinds[name], given[name])
            except ValueError as error:
                raise UsageError(f"{flag(name)} is {given[name]!r}; {error}") from error
        reason = why_not(kinds[name], settings[name])
        if reason:
            raise UsageError(f"{flag(name)} is {as_typed(settings[name])}; {reason}")
    options = {name: default for name, (default, _, _) in (FLAGS | actions).items()}
    options |= {name: given[name] for name in flags.keys() & given.keys()}
    options["arms"] = ",".join(options["arms"])
    return {**options, "given": set(given)}, settings


def similar_flags(wrong: str, known: list[str]) -> list[str]:
    """--steps may be --recover-steps and others; --epochs and --steps mean alike."""
    word = wrong.strip("-").removesuffix("s")
    inside = [name for name in known if len(word) > 3 and word in name]
    other = {"step": "epoch", "epoch": "step"}.get(word, "?")
    alike = [name for name in known if other in name]
    return inside or alike or difflib.get_close_matches(wrong, known, n=1, cutoff=0.4)


def num_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def machine(device: str) -> dict:
    """Where numbers come from: another CPU, or other threads, give other last digits."""
    name, cpuinfo = platform.processor() or platform.machine(), Path("/proc/cpuinfo")
    if cpuinfo.exists():
        found = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text())
        name = found.group(1) if found else name
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else device,
        "machine": f"{platform.system()}, {name}, {num_cores()} cores",
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "versions": versions,
    }


def git_version(folder: Path) -> str:
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.strip()
