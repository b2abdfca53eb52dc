"""What the seven scripts share: files, a small transformer, one training loop, claims, and the command line.

    files        save / load (checkpoints), save_arrays / load_arrays (arrays to exchange): atomic, nothing executed
    model        TransformerLM, whose feed-forward is any module a script passes in
    training     train: one loop with schedules, accumulation, checkpoints, resume, and a stop at the first NaN
    accounting   count_parameters, count_flops: read from the module and from the operators that ran
    claims       Claim, verdict: what the paper says, what this run measured, holds or not
    pictures     lines, bars, heatmap: panels for `run.plot`
    command line run(main, SMALL, FULL, CLAIMS): flags from a dataclass, arms in worker processes, results.json
    afterwards   load_trained: the model of an arm, from the weights a run left; each script has its own on top

A script's `main(config, run)` gets a `Run`: device, dtype, seeds, `map_arms`, `table`, `claim`, `plot`. An *arm* is
one trained variant with one seed; `run.map_arms(train_arm, jobs)` trains arms in parallel and keeps each one's result
in its own file, which is all that `--resume` needs.
"""

import argparse
import dataclasses
import difflib
import errno
import glob
import hashlib
import importlib.util
import inspect
import io
import itertools
import json
import math
import multiprocessing
import os
import platform
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
import tokenize
import traceback
import types
import typing
import zipfile
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


class UsageError(ValueError):
    """Something the person at the keyboard can mend: one line, exit code 2."""


class NonFiniteLoss(RuntimeError):
    """The loss became NaN or infinite: one line, exit code 1."""


class Terminated(KeyboardInterrupt):
    """SIGTERM, as sent by job schedulers; treated like Ctrl-C."""


# ---------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------


@contextmanager
def atomic_file(path: str | Path, mode: str = "wb"):
    """Write beside `path`, then rename: a reader finds the old file or the new one, never half of it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, mode) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.errno is not None and error.filename is None:  # a full disk does not say where
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: str | Path, content: object) -> None:
    with atomic_file(path, "w") as file:
        json.dump(content, file, indent=1)
        file.write("\n")


# What the files of a run hold.
KINDS = {"identity": dict, "result": dict, "sha256": dict, "wall_seconds": (int, float)}


def read_json(path: str | Path, *keys: str) -> dict:
    """An object with at least these keys. Raises UsageError when the file is damaged."""
    try:
        content = json.loads(Path(path).read_text())
        if not isinstance(content, dict):
            raise ValueError("not an object")
        if missing := [key for key in keys if not isinstance(content.get(key), KINDS.get(key, object))]:
            raise ValueError(f"no {', '.join(missing)}")
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is damaged ({error}); start anew with --overwrite") from error
    return content


def save(path: str | Path, state: object) -> None:
    """A checkpoint of tensors, numbers, strings, lists and dicts."""
    with atomic_file(path) as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:  # on a full disk torch also fails to close the file, and says only that
            raise error.__context__ if isinstance(error.__context__, OSError) else error from None


def load(path: str | Path, map_location: object = "cpu") -> Any:
    """Read what `save` wrote; never executes anything. Raises UsageError when the file is damaged or hostile."""
    try:
        with zipfile.ZipFile(path) as archive:  # torch compares no checksums, and would unpack to any size
            if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()) or archive.testzip():
                raise ValueError("its checksums are wrong, or its members compressed")
        return torch.load(path, map_location=map_location, weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:
        reason = str(error).split("\n", 1)[0][:160]
        raise UsageError(f"{path} is not a readable checkpoint ({reason}); {_afresh(path)}") from error


def _afresh(path: str | Path) -> str:
    return f"delete {Path(path).with_suffix('.*')} and go on with --resume"


def save_arrays(path: str | Path, arrays: dict[str, Tensor | np.ndarray], meta: dict | None = None) -> str:
    """Arrays to hand to other people: an uncompressed .npz without pickle. Returns its SHA-256 (hex).

    `meta` is any JSON. bfloat16, which NumPy lacks, is stored as its 16 bits. Raises ValueError for a non-finite
    array or a reserved name.
    """
    stored, dtypes = {}, {}
    for name, array in arrays.items():
        if name in ("__meta__", "file", "allow_pickle"):  # the last two are arguments of np.savez
            raise ValueError(f"{name!r} is a reserved array name")
        tensor = torch.as_tensor(array).detach().cpu().contiguous()
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ValueError(f"array {name!r} holds NaN or infinity; nothing was written")
        dtypes[name] = str(tensor.dtype).removeprefix("torch.")
        stored[name] = (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
    header = json.dumps({"dtypes": dtypes, "meta": meta or {}}).encode()
    with atomic_file(path) as file:
        np.savez(file, **stored, __meta__=np.frombuffer(header, dtype=np.uint8))
    return sha256(path)


def load_arrays(
    path: str | Path, expected: dict[str, tuple[Sequence[int], str]] | None = None, digest: str | None = None
) -> tuple[dict[str, Tensor], dict]:
    """Read what `save_arrays` wrote, trusting nothing: (arrays, meta).

    `expected` maps every name to (shape, dtype) and must match exactly; `digest` is the SHA-256 the file must have.
    Raises ValueError naming the file and what is wrong: damage, pickled objects, compressed members (which could
    unpack to any size), missing or extra arrays, other shapes or dtypes, NaN.
    """
    path = Path(path)
    if digest is not None and sha256(path) != digest:
        raise ValueError(f"{path}: the SHA-256 is not the recorded one; the file is damaged or was changed")
    try:
        with zipfile.ZipFile(path) as archive:
            if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
                raise ValueError("compressed members are refused")
        with np.load(path, allow_pickle=False) as archive:
            stored = {name: archive[name] for name in archive.files}
        header = json.loads(stored.pop("__meta__").tobytes())
        dtypes, meta = header["dtypes"], header["meta"]
        arrays = {name: torch.from_numpy(array.copy()) for name, array in stored.items()}
        for name, tensor in arrays.items():
            arrays[name] = tensor.view(torch.bfloat16) if dtypes[name] == "bfloat16" else tensor
    except FileNotFoundError:
        raise
    except Exception as error:  # a damaged zip can fail in any way
        raise ValueError(f"{path} is not a readable array file: {error}") from error
    if expected is not None and set(arrays) != set(expected):
        odd = sorted(set(arrays) ^ set(expected))
        raise ValueError(f"{path}: missing or unexpected arrays: {', '.join(odd[:5])}")
    for name, tensor in arrays.items():
        found = (tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
        if expected is not None and found != (tuple(expected[name][0]), expected[name][1]):
            raise ValueError(f"{path}: {name} is {found[1]} {list(found[0])}; {expected[name]} is needed")
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ValueError(f"{path}: {name} holds NaN or infinity")
    return arrays, meta


def sha256(path: str | Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---------------------------------------------------------------------------------------------------------------
# A small transformer
# ---------------------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Multi-head self-attention. x [batch, time, d_model] -> the same shape."""

    def __init__(self, d_model: int, num_heads: int, causal: bool, rope: bool):
        super().__init__()
        if d_model % num_heads or (rope and d_model // num_heads % 2):
            raise ValueError(
                f"d_model is {d_model}, num_heads {num_heads}; the head width must be whole (even with rope)"
            )
        self.num_heads, self.causal, self.rope = num_heads, causal, rope
        self.qkv = nn.Linear(d_model, 3 * d_model, bias=False)
        self.out = nn.Linear(d_model, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, time, d_model = x.shape
        q, k, v = (
            self.qkv(x).view(batch, time, 3, self.num_heads, d_model // self.num_heads).permute(2, 0, 3, 1, 4)
        )  # [batch, heads, time, head]
        if self.rope:
            q, k = rotate(q), rotate(k)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out(y.transpose(1, 2).reshape(batch, time, d_model))


def rotate(x: Tensor) -> Tensor:
    """Rotary positions (Su et al. 2021). x [..., time, head] -> the same shape, in x.dtype; angles in fp32, or as x."""
    (time, head), dtype = x.shape[-2:], torch.promote_types(x.dtype, torch.float32)
    frequency = 10000.0 ** (-torch.arange(0, head, 2, device=x.device, dtype=dtype) / head)
    angle = torch.arange(time, device=x.device, dtype=dtype)[:, None] * frequency  # [time, head / 2]
    cos, sin = angle.cos(), angle.sin()
    first, second = x.to(dtype).chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1).to(x.dtype)


class Block(nn.Module):
    def __init__(self, d_model: int, num_heads: int, ffn: nn.Module, norm: type[nn.Module], causal: bool, rope: bool):
        super().__init__()
        self.norm1, self.attention = norm(d_model), Attention(d_model, num_heads, causal, rope)
        self.norm2, self.ffn = norm(d_model), ffn

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.ffn(self.norm2(x))


class TransformerLM(nn.Module):
    """Pre-norm transformer language model. tokens [batch, time] int64 -> logits [batch, time, vocab_size].

    make_ffn(layer_index) gives each layer's feed-forward: any module [.., d_model] -> [.., d_model]. One that routes
    leaves its auxiliary loss in its `aux_loss` attribute at every forward; `aux_loss()` collects it. `conv` > 0 adds
    a causal convolution of that width, with a residual, right after the embedding: bytes are cheap to spell with
    neighbours, and the model reads words sooner. `init` is the standard deviation of the weights this class owns.
    Raises ValueError for an unknown norm or positions, or a sequence longer than context with learned positions.
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
            raise ValueError(f"norm is {norm!r}, positions {positions!r}; allowed: layer or rms, learned or rope")
        norm_type = nn.LayerNorm if norm == "layer" else nn.RMSNorm
        self.context, self.causal, self.conv_width = context, causal, conv
        self.embedding = nn.Embedding(vocab_size, d_model)
        self.position = nn.Embedding(context, d_model) if positions == "learned" else None
        self.conv = nn.Conv1d(d_model, d_model, conv, bias=False) if conv else None
        blocks = [
            Block(d_model, num_heads, make_ffn(i), norm_type, causal, positions == "rope") for i in range(num_layers)
        ]
        self.blocks, self.norm = nn.ModuleList(blocks), norm_type(d_model)
        self.head = nn.Linear(d_model, vocab_size, bias=False)
        for name, parameter in self.named_parameters():
            if ".ffn." not in name and parameter.dim() > 1:
                scale = init / math.sqrt(2 * num_layers) if name.endswith("attention.out.weight") else init
                nn.init.normal_(parameter, std=scale, generator=generator)

    def forward(self, tokens: Tensor) -> Tensor:
        time = tokens.shape[1]
        x = self.embedding(tokens)  # [batch, time, d_model]
        if self.position is not None:
            if time > self.context:
                raise ValueError(f"the sequence has {time} tokens; context is {self.context}")
            x = x + self.position.weight[:time]
        if self.conv is not None:
            left, both = (self.conv_width - 1, 0), (self.conv_width // 2, (self.conv_width - 1) // 2)
            x = x + self.conv(F.pad(x.transpose(1, 2), left if self.causal else both)).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))

    def aux_loss(self) -> Tensor:
        """Mean auxiliary loss over the layers that left one, and forget it: kept, it would keep the graph alive."""
        losses = [ffn.aux_loss for ffn in self.ffns() if getattr(ffn, "aux_loss", None) is not None]
        for ffn in self.ffns():
            ffn.aux_loss = None
        return torch.stack(losses).mean() if losses else self.head.weight.new_zeros(())

    def ffns(self) -> list[nn.Module]:
        return [block.ffn for block in self.blocks]


def lm_loss(model: nn.Module, windows: Tensor) -> Tensor:
    """Next-token loss of every position. windows [batch, context + 1] int64 -> [batch, context] fp32, in nats."""
    logits = model(windows[:, :-1]).float()
    return F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten(), reduction="none").view_as(windows[:, 1:])


# ---------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------


def adamw(model: nn.Module, lr: float, weight_decay: float = 0.01, betas: tuple[float, float] = (0.9, 0.95)):
    """AdamW over what requires a gradient; biases (names that begin with b) and vectors are not decayed."""
    decayed, kept = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_bias = parameter.dim() < 2 or name.rsplit(".", 1)[-1].startswith("b")
            (kept if is_bias else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=lr, betas=betas)


def cosine(steps: int, warmup: int = 0, final: float = 0.1) -> Callable[[int], float]:
    """Learning-rate factor by step: linear warm-up to 1, then a half cosine down to `final` at the last step."""

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        progress = min(1.0, (step - warmup) / max(1, steps - 1 - warmup))
        return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))

    return factor


def linear(steps: int, warmup: int = 0, final: float = 0.0) -> Callable[[int], float]:
    """Learning-rate factor by step: linear warm-up to 1, then a straight line down to `final` at the last step."""
    return lambda step: (
        (step + 1) / warmup
        if step < warmup
        else 1 - (1 - final) * min(1.0, (step - warmup) / max(1, steps - 1 - warmup))
    )


def milestones(steps: Sequence[int], gamma: float = 0.1) -> Callable[[int], float]:
    """Learning-rate factor by step: times gamma from each of the given steps on."""
    return lambda step: gamma ** sum(step >= milestone for milestone in steps)


def processes() -> tuple[int, int]:
    """(rank, number of processes) under torchrun, once `run` has joined them; (0, 1) alone."""
    joined = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if joined else (0, 1)


def _barrier() -> None:
    if processes()[1] > 1:
        dist.barrier()


@contextmanager
def deferred_signals():
    """Inside, Ctrl-C and SIGTERM only leave a note, so that a step and its checkpoint are never cut in two."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield received
        return
    names = (signal.SIGINT, signal.SIGTERM)
    previous = {name: signal.signal(name, lambda number, frame: received.append(number)) for name in names}
    try:
        yield received
    finally:
        for name, handler in previous.items():
            signal.signal(name, handler)


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
    schedule: Callable[[int], float] | None = None,
    clip: float | None = 1.0,
    accumulate: int = 1,
    dtype: torch.dtype = torch.float32,
    backward: Callable[[Any], None] | None = None,
    on_step: Callable[[int], None] | None = None,
    checkpoint: Path | None = None,
    checkpoint_seconds: float = 60.0,
    metrics: Path | None = None,
    label: str = "train",
    log_every: int = 10,
) -> dict[str, float]:
    """Train `model` in place from start_step up to stop_step (default: steps); returns the last logged metrics.

    batches(step)        the batch of a step, a function of the step alone: that is what makes a resumed run exact
    loss_fn(batch, step) (loss, {metric: value}); values may be 0-dim tensors
    optimizer            default adamw(model, lr); handed on between calls it keeps its state
    schedule             factor on the learning rate by step; default cosine(steps)
    accumulate           the batch is cut into that many parts along dim 0, gradients averaged by size
    backward(loss)       replaces loss.backward(); loss is then whatever loss_fn returned
    on_step(step)        after each optimizer step
    checkpoint           file to write every checkpoint_seconds and on an interrupt, and to continue from if it exists
    metrics              file that gets a JSON line per step

    Under torchrun every process takes its part of each batch, and gradients are summed: the same training as alone,
    but for rounding. Only the first process writes files.

    Raises NonFiniteLoss at the first NaN or infinite loss, KeyboardInterrupt after saving when interrupted.
    """
    rank, world_size = processes()
    if backward is not None and world_size > 1:
        raise UsageError("this training has its own backward pass and runs in one process; start it without torchrun")
    optimizer = optimizer or adamw(model, lr)
    schedule = schedule or cosine(steps)
    stop_step = steps if stop_step is None else stop_step
    device = next(model.parameters()).device
    for group in optimizer.param_groups:
        group.setdefault("initial_lr", group["lr"])
    last: dict[str, float] = {}
    first_step = start_step
    if checkpoint is not None and checkpoint.exists():
        state = load(checkpoint, map_location=device)
        try:
            start_step, last = _restore(state, model, optimizer, device)
            if not first_step <= start_step <= stop_step:
                raise ValueError(f"step {start_step}")
        except (RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise UsageError(f"{checkpoint} is a checkpoint of something else; {_afresh(checkpoint)}") from error
    metrics = metrics if rank == 0 else None
    if metrics is not None and metrics.exists():
        _forget_steps(metrics, first_step, start_step)
    pending: list[tuple[int, Tensor, dict]] = []

    def fail(what: str) -> NoReturn:
        kept = checkpoint if checkpoint and checkpoint.exists() else "none yet"
        raise NonFiniteLoss(f"{label}: {what}; last good checkpoint: {kept}; lower --lr, or use --dtype fp32")

    def flush(bar: tqdm) -> None:
        """Move the waiting losses to the host in one go, so that a GPU is not stopped at every step."""
        lines = []
        for step, loss, values in pending:
            last.update(step=step, loss=float(loss), **{name: float(value) for name, value in values.items()})
            if not math.isfinite(last["loss"]):
                fail(f"the loss is {last['loss']} at step {step}")
            lines.append(json.dumps({"arm": label, **last}))
        pending.clear()
        if metrics is not None and lines:
            with open(metrics, "a") as file:
                file.write("\n".join(lines) + "\n")
        if last:
            bar.set_postfix(loss=f"{last['loss']:.3f}", refresh=False)

    def keep(step: int) -> None:
        if checkpoint is not None and rank == 0:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "last": last}
            state["rng"] = torch.get_rng_state()
            if device.type == "cuda":
                state["cuda_rng"] = torch.cuda.get_rng_state(device)
            save(checkpoint, state)

    model.train()
    saved = time.monotonic()
    quiet = True if rank else None  # None: no bar where stderr is a file
    bar = tqdm(
        total=stop_step, initial=start_step, desc=label, unit="step", leave=False, disable=quiet, mininterval=0.5
    )
    with bar, deferred_signals() as received:
        for step in range(start_step, stop_step):
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * schedule(step)
            optimizer.zero_grad(set_to_none=True)
            total, values = 0.0, {}
            own, own_share = _parts(batches(step), world_size)[rank]
            for part, share in _parts(own, accumulate):
                share *= own_share
                try:
                    with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
                        loss, values = loss_fn(part, step)
                except ValueError as error:  # a layer that refuses NaN; other mistakes show at the first step
                    if step == 0:
                        raise
                    fail(f"{error} at step {step}")
                if backward is not None:
                    backward(loss)
                else:
                    (loss * share).backward()
                total = total + share * sum(loss if isinstance(loss, (tuple, list)) else [loss]).detach()
            if world_size > 1:
                total, values = _sum_over_processes(model, total, values)
            if clip is not None:
                nn.utils.clip_grad_norm_((p for p in model.parameters() if p.grad is not None), clip)
            optimizer.step()
            if on_step is not None:
                on_step(step)
            stop = max(received, default=0)
            if world_size > 1:  # what one process has received, all have
                dist.all_reduce(heard := torch.tensor(stop), dist.ReduceOp.MAX)  # on the host: no GPU is waited for
                stop = int(heard)
            pending.append((step, total, values))
            due = time.monotonic() - saved >= checkpoint_seconds
            ends = step + 1 == stop_step
            if due or stop or ends or len(pending) >= log_every:
                flush(bar)
            if (due or stop or ends) and not _is_finite(model):
                fail(f"a weight is not finite after step {step}")
            if due or stop:  # after these: a model that has seen NaN must not replace the last good checkpoint
                keep(step + 1)
                saved = time.monotonic()
            if stop:
                raise Terminated if stop == signal.SIGTERM else KeyboardInterrupt
            bar.update()
    _barrier()  # every process finds the metrics whole
    return last


def _restore(state: dict, model: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device) -> tuple[int, dict]:
    """Put a checkpoint where it belongs: (its step, its metrics). Raises any error when it does not fit."""
    model.load_state_dict(state["model"])
    settings = optimizer.state_dict()["param_groups"]  # the script's: no file chooses a learning rate
    optimizer.load_state_dict({"state": state["optimizer"]["state"], "param_groups": settings})
    for parameter, found in optimizer.state.items():
        if any(value.shape != parameter.shape for value in found.values() if isinstance(value, Tensor) and value.dim()):
            raise ValueError("the optimizer's state has another shape")
    step, last = state["step"], state["last"]
    if type(step) is not int or not _is_finite(model) or not all(isinstance(v, (int, float)) for v in last.values()):
        raise ValueError("no numbers")
    torch.set_rng_state(state["rng"].cpu())
    if device.type == "cuda" and "cuda_rng" in state:
        torch.cuda.set_rng_state(state["cuda_rng"].cpu(), device)
    return step, last


def _is_finite(model: nn.Module) -> bool:
    own = (parameter.to_local() if hasattr(parameter, "to_local") else parameter for parameter in model.parameters())
    return all(bool(torch.isfinite(parameter).all()) for parameter in own)


def _forget_steps(metrics: Path, first_step: int, start_step: int) -> None:
    """Drop the lines of steps that run again, and a torn last one. Raises UsageError when others are not there."""
    try:
        whole = [line for line in metrics.read_text().splitlines(True) if line.endswith("}\n")]
        kept = [line for line in whole if json.loads(line)["step"] < start_step]
        steps = [json.loads(line)["step"] for line in kept]
        if steps != list(range(min([first_step, *steps]), start_step)):
            raise ValueError("steps are missing")
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise UsageError(f"{metrics} is damaged ({error}); {_afresh(metrics)}") from error
    with atomic_file(metrics, "w") as file:
        file.writelines(kept)


def _parts(batch: Any, count: int) -> Sequence[tuple[Any, float]]:
    """Cut a tensor, or a tuple of tensors, into `count` parts along dim 0: (part, its share of the batch)."""
    if count == 1:
        return [(batch, 1.0)]
    size = len(batch if isinstance(batch, Tensor) else batch[0])
    if size < count:
        raise UsageError(f"a batch of {size} cannot be cut into {count} parts; raise --batch-size")
    if isinstance(batch, Tensor):
        return [(part, len(part) / size) for part in batch.tensor_split(count)]
    return [(part, len(part[0]) / size) for part in zip(*(tensor.tensor_split(count) for tensor in batch))]


def _sum_over_processes(model: nn.Module, loss: Tensor, values: dict) -> tuple[Tensor, dict]:
    """Sum gradients (in place) and loss over the processes, average the metrics."""
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    gradients = [gradient for gradient in gradients if not hasattr(gradient, "full_tensor")]  # FSDP2 has summed those
    logged = torch.stack([loss, *(torch.as_tensor(value, device=loss.device).float() for value in values.values())])
    if gradients:
        flat = nn.utils.parameters_to_vector(gradients)
        dist.all_reduce(flat)
        nn.utils.vector_to_parameters(flat, gradients)
    dist.all_reduce(logged)
    return logged[0], dict(zip(values, logged[1:] / dist.get_world_size()))


# ---------------------------------------------------------------------------------------------------------------
# Accounting
# ---------------------------------------------------------------------------------------------------------------


def count_parameters(model: nn.Module, experts_per_token: float | None = None) -> int:
    """Parameters of a model; with experts_per_token, only those a token meets on average.

    A parameter is an expert's when its module has `num_experts` and it is stacked [num_experts, ...] beyond a matrix.
    """
    total, counted = 0.0, set()
    for module in model.modules():
        num_experts = getattr(module, "num_experts", None)
        for parameter in module.parameters(recurse=False):
            if id(parameter) in counted:  # tied, as embeddings and head often are
                continue
            counted.add(id(parameter))
            is_expert = num_experts is not None and parameter.dim() == 3 and parameter.shape[0] == num_experts
            share = experts_per_token / num_experts if is_expert and experts_per_token is not None else 1.0
            total += share * parameter.numel()
    return round(total)


def count_flops(function: Callable[[], object]) -> dict[str, int]:
    """Matrix-multiplication FLOPs that really ran during function(), by module name ("Global" is the sum).

    Counted from the shapes of the operators torch executed, forward and backward. Triton kernels are not seen:
    count with backend="torch".
    """
    count = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.mm: _mm_flops})
    # Eagerly: compiled operators are not counted, and a frame first met while counting would never be compiled again.
    with torch.compiler.set_stance("force_eager"), count as counter:
        function()
    return {name: sum(by_operator.values()) for name, by_operator in counter.get_flop_counts().items()}


def _mm_flops(a: Tensor, b: Tensor, *_: object, **__: object) -> int:
    """torch's own count takes a sparse matrix for a dense one."""
    return 2 * (a.numel() if a.layout == torch.strided else a._nnz()) * b.shape[1]


_mm_flops._get_raw = True  # so that torch passes tensors, not their shapes


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


def measure_step(step: Callable[[], object], device: str) -> dict[str, float]:
    """Median seconds, FLOPs and peak memory in bytes of one call of step()."""
    cost = {"seconds": median_seconds(step, device), "flops": count_flops(step)["Global"]}
    if device.startswith("cuda"):
        return cost | {"memory": torch.cuda.max_memory_allocated()}
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return cost | {"memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}


# ---------------------------------------------------------------------------------------------------------------
# Claims, tables, pictures
# ---------------------------------------------------------------------------------------------------------------


@dataclass
class Claim:
    """One sentence of the paper, and what a run found. `holds` None: not measured in this run."""

    id: str
    text: str
    paper: str  # the paper's number, or "not verified"
    required: bool = False
    measured: str = "not measured; run --ablate"
    values: dict = field(default_factory=dict)  # numbers per seed
    holds: bool | None = None


def show(values: Sequence[float], digits: int = 4) -> str:
    """Mean, and sample standard deviation where there is more than one value."""
    array = np.asarray(values, dtype=np.float64)
    return f"{array.mean():.{digits}f}" + (f" ± {array.std(ddof=1):.{digits}f}" if len(array) > 1 else "")


def verdict(margins: Sequence[float]) -> bool:
    """The one rule for `holds`: the mean paired margin is positive and exceeds its standard error.

    margins: one per seed; a run of a single seed passes one per evaluation block instead.
    """
    array = np.asarray(margins, dtype=np.float64)
    error = array.std(ddof=1) / math.sqrt(len(array)) if len(array) > 1 else 0.0
    return bool(array.mean() > 0 and array.mean() > error)


def say(text: str) -> None:
    """Print, also when nobody listens any more (`| head`): what was trained is still to be written."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def format_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    text = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in cells]
    return "\n".join([text[0], "-" * len(text[0]), *text[1:]])


def format_claims(claims: Sequence[Claim], measured: bool = True) -> str:
    words = {True: "holds", False: "DOES NOT HOLD", None: "not measured"}
    rows = []
    for claim in claims:
        kind = "required" if claim.required else "open"
        rows += [f"{words[claim.holds] if measured else '':15s}{claim.id} ({kind}): {claim.text}"]
        rows += [f"{'':15s}  measured  {claim.measured}"] * measured + [f"{'':15s}  paper     {claim.paper}"]
    return "\n".join(rows)


def lines(ax, series: dict[str, tuple[Sequence[float], Sequence[float]]], **labels: str) -> None:
    """Panel for run.plot: {label: (x, y)}; a series of one point is a marker. labels: xlabel, ylabel, title."""
    for i, (label, (x, y)) in enumerate(series.items()):
        ax.plot(x, y, marker="os^"[i // 10 % 3] if len(x) == 1 else "", label=label)  # colours repeat after ten
    ax.set(**labels)
    ax.legend(frameon=False, fontsize=8)


def bars(ax, values: dict[str, float], **labels: str) -> None:
    """Panel for run.plot: {name: height}."""
    ax.bar(list(values), list(values.values()))
    ax.set(**labels)


def heatmap(ax, values: np.ndarray, **labels: str) -> None:
    """Panel for run.plot: values [rows, columns], each cell labelled."""
    ax.imshow(values, aspect="auto")
    middle = (values.min() + values.max()) / 2
    for (row, column), value in np.ndenumerate(values):
        color = "black" if value > middle else "white"
        ax.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=7, color=color)
    ax.set(**labels)


def painted_text(ax, text: str, values: Sequence[float], title: str, rows: int = 14, columns: int = 48) -> None:
    """Panel for run.plot: the text in a grid, each character on a background as bright as its value."""
    grid, row, column = np.full((rows, columns), np.nan), 0, 0
    middle = (min(values) + max(values)) / 2
    for char, value in zip(text, values):
        if char == "\n" or column == columns:
            row, column = row + 1, 0
        if row == rows:
            break
        if char != "\n":
            grid[row, column] = value
            color = "black" if value > middle else "white"
            ax.text(column, row, char, family="monospace", fontsize=7, ha="center", va="center", color=color)
            column += 1
    ax.imshow(grid, aspect="auto", cmap="viridis")
    ax.set(title=title, xticks=[], yticks=[])


# ---------------------------------------------------------------------------------------------------------------
# A run: what main gets, and the arms in their worker processes
# ---------------------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """What `main(config, run)` gets; also handed to every arm, in whatever process trains it."""

    method: str
    scale: str  # small | full
    device: str
    dtype: torch.dtype
    seeds: list[int]
    out: Path
    resume: bool = False
    ablate: bool = False
    dry_run: bool = False
    compile: bool = False
    draw: bool = False
    workers: int = 1
    threads: int = 1
    data_dir: Path = Path("data/cache")
    overwrite: bool = False
    config: object = None  # what runs; main replaces it when it settles a field
    actions: dict[str, Any] = field(default_factory=dict)  # the script's own flags that were given
    data: dict[str, str] = field(default_factory=dict)  # name -> digest of what main trains on
    begun: bool = False
    lock: int | None = None  # file descriptor, in the process that holds it
    claims: list[Claim] = field(default_factory=list)
    tables: list[dict] = field(default_factory=list)
    pool: ProcessPoolExecutor | None = None  # the workers, from the first arms that run side by side to the end

    def __getstate__(self) -> dict:
        return vars(self) | {"pool": None}  # a worker has no workers

    @property
    def seed(self) -> int:
        return self.seeds[0]

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def path(self, arm: str, seed: int, suffix: str) -> Path:
        return self.out / "arms" / f"{arm}-seed{seed}{suffix}"

    def train_options(self, arm: str, seed: int) -> dict:
        """Keyword arguments for `train`: where this arm logs and checkpoints, under which name, in which dtype."""
        files = {"checkpoint": self.path(arm, seed, ".ckpt"), "metrics": self.path(arm, seed, ".jsonl")}
        return {**files, "label": f"{arm}-seed{seed}", "dtype": self.dtype}

    def prepare(self, model: nn.Module) -> nn.Module:
        """Onto the run's device; with --compile compiled in place, so that names in its state stay."""
        model = model.to(self.device)
        if self.compile:
            model.compile()
        return model

    def header(self, text: str, eta_seconds: float | None = None) -> None:
        seeds = "seed " + str(self.seed) if len(self.seeds) == 1 else f"seeds {self.seeds[0]}-{self.seeds[-1]}"
        parts = [self.method, f"{self.scale} scale", self.device, self.dtype_name, seeds, text]
        say(" · ".join(parts if eta_seconds is None else [*parts, f"about {eta_seconds:.0f} s"]))

    def table(self, title: str, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        say(f"\n{title}\n{format_table(header, rows)}")
        self.tables.append({"title": title, "header": list(header), "rows": rows})

    def claim(
        self, id: str, measured: str, values: dict, margins: Sequence[float] | None = None, holds: bool | None = None
    ) -> None:
        """Fill in a declared claim: `margins` go through `verdict`; `holds` is for properties that are exact."""
        claim = next(claim for claim in self.claims if claim.id == id)
        claim.measured, claim.values = measured, values
        claim.holds = holds if margins is None else verdict(margins)

    def plot(self, name: str, panels: Sequence[Callable], width: float = 4.6, height: float = 3.6) -> None:
        """With --plot, draw panels (functions of a matplotlib axis) side by side into OUT/<name>.png."""
        if not self.draw:
            return
        from matplotlib.figure import Figure

        figure = Figure(figsize=(width * len(panels), height), layout="constrained")
        for panel, ax in zip(panels, np.atleast_1d(figure.subplots(1, len(panels)))):
            panel(ax)
        with atomic_file(self.out / f"{name}.png") as file:
            figure.savefig(file, format="png", dpi=130)
        say(f"\nwrote {self.out / name}.png")

    def estimate(
        self, model: nn.Module, step: Callable, steps: int, download_bytes: int | None = 0, parts: int = 1
    ) -> None:
        """--dry-run: what the whole run would take, from a few real steps on this device, or parts of steps."""
        cost = measure_step(step, self.device)
        hours = cost["seconds"] * steps * parts / 3600 / self.workers
        rows = [
            ["parameters", f"{count_parameters(model):,}"],
            ["training FLOPs", f"{cost['flops'] * steps * parts:.2e}"],
            ["bytes to download", "not known" if download_bytes is None else f"{download_bytes:,}"],
            [
                f"peak memory of {'a step' if parts == 1 else f'1/{parts} of a step'}",
                f"{cost['memory'] / 2**20:,.0f} MiB",
            ],
            ["training time", f"{hours:.3f} hours, {self.workers} {'arms' if self.workers > 1 else 'arm'} at a time"],
        ]
        self.table(f"dry run: {steps:,} training steps in all arms and seeds", ["", "estimate"], rows)

    def map_arms(self, train_arm: Callable, jobs: Sequence[tuple[object, str, int]]) -> list[dict]:
        """train_arm(config, arm, seed, run) -> dict (JSON) for every job (config, arm, seed), in worker processes.

        train_arm must be importable (top level). Each result goes to its own file as soon as it is there; with
        --resume, finished arms are read back. The number of workers never changes a number.
        """
        self._begin()
        found = [self._finished(arm, seed) for _, arm, seed in jobs]  # hashes weights, so no arm is asked twice
        todo = [job for job, result in zip(jobs, found) if result is None]
        workers = min(self.workers, len(todo))
        if workers > 1 and processes()[1] == 1:
            self._map_in_workers(train_arm, todo, workers)
        else:
            for job in todo:
                _run_job(self, train_arm, *job)
        return [self._finished(*job[1:]) if result is None else result for job, result in zip(jobs, found)]

    def _finished(self, arm: str, seed: int) -> dict | None:
        """The result of an arm, None if it has none yet. Raises UsageError when it or its weights were changed."""
        path = self.path(arm, seed, ".json")
        if not path.exists():
            return None
        found, now = read_json(path, "result", "sha256"), self.digests(arm, seed)
        changed = [name for name, digest in found["sha256"].items() if digest != now.get(name, digest)]
        if changed or found["sha256"].get("result") != _digest(found["result"]):
            what = path.with_name(changed[0]) if changed else path
            raise UsageError(
                f"{what} is damaged, its SHA-256 is another; {_afresh(path)} or start anew with --overwrite"
            )
        return found["result"]

    def digests(self, arm: str, seed: int) -> dict[str, str]:
        """{file: SHA-256} of the weights that an arm left."""
        left = self.path(arm, seed, "").parent.glob(f"{glob.escape(arm)}-seed{seed}[.-]*")
        return {path.name: sha256(path) for path in left if path.suffix in (".pt", ".npz")}

    def identity(self) -> dict:
        """What all arms of a folder must have in common."""
        config = json.loads(json.dumps(dataclasses.asdict(self.config)))  # as it will be read back: tuples are lists
        where = {"dtype": self.dtype_name, "device": self.device, "torch": torch.__version__}
        return {**config, "data": self.data, **where}

    def record(self, wall_seconds: float) -> dict:
        """The content of OUT/run.json: what --resume compares, and what `load_trained` builds a model from."""
        about = {"method": self.method, "scale": self.scale, "config": dataclasses.asdict(self.config)}
        about["data_dir"] = str(self.data_dir.absolute())
        return {**about, "identity": self.identity(), "wall_seconds": wall_seconds}

    def _begin(self) -> None:
        """Claim the output folder, before the first arm: never mix two runs, never delete one for a mistyped flag."""
        if self.begun:
            return
        if processes()[0] == 0:
            self.keep_others_out()
            self._claim_folder()
        self.begun = True
        _barrier()

    def keep_others_out(self) -> None:
        """Lock the folder until this process ends, in whatever way. A file system without locks is trusted."""
        if self.lock is not None or fcntl is None:
            return
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            self.lock = os.open(self.out / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise UsageError(f"--out {self.out} cannot be written: {error.strerror}") from error
        try:
            fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                who = os.pread(self.lock, 100, 0).decode(errors="replace").strip()
                raise UsageError(
                    f"{self.out} is in use by another run ({who}); wait for it or choose another --out"
                ) from None
        os.truncate(self.lock, 0)
        os.pwrite(self.lock, f"process {os.getpid()} on {platform.node()}\n".encode(), 0)
        if not (self.resume or self.overwrite):
            _refuse_a_second_run(self.out)  # one may have begun since the flags were read
        for path in self.out.rglob(".*.tmp"):  # half-written by a run that was killed
            path.unlink()

    def _claim_folder(self) -> None:
        mark, arms = self.out / "run.json", self.out / "arms"
        if self.resume:
            before = read_json(mark, "identity")["identity"]
            for key, now in self.identity().items():
                if before.get(key) != now:
                    raise UsageError(f"--resume: {self.out} was run with {key} = {before.get(key)}, not {now}")
            arms.mkdir(exist_ok=True)
        else:
            try:
                if self.overwrite:
                    for path in [*arms.glob("*"), *(self.out / name for name in ("results.json", "metrics.jsonl"))]:
                        path.unlink(missing_ok=True)
                write_json(mark, self.record(wall_seconds=0.0))
                arms.mkdir(exist_ok=True)
            except OSError as error:
                raise UsageError(f"--out {self.out} cannot be written: {error.strerror}") from error

    def measure(self, train_arm: Callable, config: object, arms: Sequence[str]) -> dict[str, list[dict]]:
        """map_arms over every arm and every seed of the run: {arm: [one result a seed]}."""
        found = iter(self.map_arms(train_arm, [(config, arm, seed) for arm in arms for seed in self.seeds]))
        return {arm: [next(found) for _ in self.seeds] for arm in arms}

    def _map_in_workers(self, train_arm: Callable, todo: Sequence[tuple], workers: int) -> None:
        # OpenMP reads its environment once, while a worker imports torch.
        limits = {"OMP_NUM_THREADS": str(self.threads), "OMP_WAIT_POLICY": "PASSIVE"}
        before = {name: os.environ.get(name) for name in limits}
        os.environ.update(limits)
        if self.pool is None:  # starting workers takes seconds, so they stay for the next call
            context = multiprocessing.get_context("spawn")
            ranks = context.Queue()
            for rank in range(self.workers):
                ranks.put(rank)
            self.pool = ProcessPoolExecutor(self.workers, context, _start_worker, (self, ranks, context.RLock()))
        pool = self.pool
        try:

            def submit(job: tuple) -> Future:
                with deferred_signals() as received, _held_back(signal.SIGINT):
                    future = pool.submit(_run_job, self, train_arm, *job)
                if received:
                    signal.raise_signal(received[-1])
                return future

            waiting = iter(todo)  # no job waits inside the pool, where an interrupt would not reach it
            running = {submit(job) for job in itertools.islice(waiting, workers)}
            while running:
                done, running = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    future.result()
                running |= {submit(job) for job in itertools.islice(waiting, len(done))}
        except BrokenProcessPool as error:
            raise BrokenProcessPool("a worker was killed (out of memory?); go on with --resume") from error
        except BaseException:  # an arm failed or Ctrl-C: let the others save a checkpoint and end
            for process in multiprocessing.active_children():
                process.terminate()
            raise
        finally:
            for name, value in before.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})


def _run_job(run: Run, train_arm: Callable, config: object, arm: str, seed: int) -> None:
    start = time.monotonic()
    result = train_arm(config, arm, seed, run)
    seconds = round(time.monotonic() - start, 2)
    if run.device == "cuda":
        torch.cuda.empty_cache()  # this worker waits for its next arm, and others may need the memory
    _barrier()
    if processes()[0] == 0:
        found = {"arm": arm, "seed": seed, "seconds": seconds, "result": result}
        found["sha256"] = {"result": _digest(result), **run.digests(arm, seed)}
        write_json(run.path(arm, seed, ".json"), found)
        run.path(arm, seed, ".ckpt").unlink(missing_ok=True)
        tqdm.write(f"  {arm}, seed {seed}: {seconds:.1f} s", file=sys.stderr)
    _barrier()


def _digest(result: dict) -> str:
    return hashlib.sha256(json.dumps(result).encode()).hexdigest()


@contextmanager
def _held_back(number: int):
    """A process started inside begins with the signal held back: Ctrl-C must not meet it while it imports torch.

    This thread holds it back too, but another one may take it, so the caller needs `deferred_signals` as well.
    """
    has_masks = hasattr(signal, "pthread_sigmask")  # not on Windows
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {number}) if has_masks else None
    try:
        yield
    finally:
        if has_masks:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_worker(run: Run, ranks: multiprocessing.Queue, bar_lock: object) -> None:
    signal.signal(signal.SIGINT, lambda number, frame: os._exit(128 + number))  # one that was held back
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, _leave)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    tqdm.set_lock(bar_lock)
    torch.set_num_threads(run.threads)
    if run.device == "cuda":
        torch.cuda.set_device(ranks.get() % torch.cuda.device_count())


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def _leave(number: int, frame: object) -> NoReturn:
    raise SystemExit(128 + number)


class Trained(typing.NamedTuple):
    """Whose weights a file holds, from its name and the run.json of its run."""

    config: Any  # the script's Config, as it was run
    arm: str
    seed: int
    dtype: torch.dtype
    data_dir: Path  # where that run looked for downloads


def load_trained(path: str | Path, config_type: type, make: Callable[[Trained], nn.Module]) -> nn.Module:
    """A model that a run left in OUT/arms/<arm>-seed<N>.*, in eval mode, on the CPU; OUT/run.json has its settings.

    config_type  the script's Config; make(trained) -> the model with its weights
    Raises UsageError in one line: no such file, damaged, of another script, of another version of this one.
    """
    path, script = Path(path), Path(inspect.getfile(config_type))
    mark, (arm, _, seed) = path.parent.parent / "run.json", path.stem.rpartition("-seed")
    if not path.is_file():
        there = sorted(other.name for other in path.parent.glob(f"*-seed*{path.suffix}"))
        raise UsageError(
            f"{path}: there are no such weights, but {', '.join(there) or f'none like it in {path.parent}'}"
        )
    if not mark.is_file() or not seed.isdecimal():
        raise UsageError(
            f"{path}: {mark} and the name <arm>-seed<N> say how to build the model; keep both as they were"
        )
    left = read_json(mark, "identity")
    if left.get("method", script.stem) != script.stem:
        raise UsageError(f"{path} was left by {left['method']}.py, not by {script.name}")
    expected = {item.name for item in dataclasses.fields(config_type)}
    if not isinstance(left.get("config"), dict) or (odd := expected ^ set(left["config"])):
        what = f"has other settings ({', '.join(sorted(odd)[:3])})" if "config" in left else "lacks its settings"
        raise UsageError(f"{path} is of another version of {script.name}: {mark} {what}; run it again with --overwrite")
    settings = {name: tuple(value) if isinstance(value, list) else value for name, value in left["config"].items()}
    try:
        where = (getattr(torch, left["identity"]["dtype"]), Path(left["data_dir"]))
        return make(Trained(config_type(**settings), arm, int(seed), *where)).eval()
    except (UsageError, FileNotFoundError):
        raise
    except (RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:160]
        raise UsageError(f"{path} and {mark} do not fit together ({reason}); run it again with --overwrite") from error


# ---------------------------------------------------------------------------------------------------------------
# The command line
# ---------------------------------------------------------------------------------------------------------------

FLAGS = {  # name: (default, metavar or choices, help); a default of False makes a switch
    "full": (False, None, "the paper's own scale and data"),
    "ablate": (False, None, "train every arm, not only those that the required claims need"),
    "seed": (0, "N", "first seed"),
    "seeds": (1, "K", "number of seeds: N .. N+K-1, reported as mean and standard deviation"),
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
    "plot": (False, None, "draw the pictures (needs matplotlib)"),
    "strict": (False, None, "exit code 1 if a required claim does not hold"),
    "list_claims": (False, None, "print the claims, and stop"),
    "traceback": (False, None, "show where an error came from"),
}


def run(
    main: Callable,
    small: object,
    full: object | None = None,
    claims: Sequence[Claim] = (),
    argv: Sequence[str] | None = None,
    actions: dict[str, tuple] | None = None,
    data_parallel: bool = False,
) -> NoReturn:
    """Parse the command line, call main(config, run) -> dict, report, and exit.

    actions: a script's own flags, declared as in FLAGS. What was given stands in `run.actions`; main then does that
    instead of a whole run: no claims are judged, no results.json is written, and --out is left alone.
    data_parallel: under torchrun, the processes train every arm together; see `train`.

    Exit codes: 0; 1 failed (NaN, out of memory, disk full; --strict and a required claim does not hold); 2 usage;
    130 Ctrl-C and 143 SIGTERM, after printing the command that resumes.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    program = Path(inspect.getfile(main)).name
    for name in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(name) is not signal.SIG_IGN:  # as nohup leaves it
            signal.signal(name, _stop)
    try:
        if data_parallel and int(os.environ.get("WORLD_SIZE", 1)) > 1:
            _join_processes()
        code = _run(main, small, full, claims, argv, program, actions or {})
        if processes()[1] > 1:
            dist.destroy_process_group()
        sys.exit(code)
    except KeyboardInterrupt as stop:
        again = [flag for flag in argv if flag not in ("--resume", "--overwrite")]
        command = shlex.join([sys.executable, sys.argv[0], *again, "--resume"])
        kept = "" if "--dry-run" in argv else f"; what is done is kept. Go on with: {command}"
        print(f"\n{program}: stopped{kept}", file=sys.stderr)
        sys.exit(143 if isinstance(stop, Terminated) else 130)
    except (ValueError, OSError, NonFiniteLoss, BrokenProcessPool, torch.OutOfMemoryError) as error:
        if "--traceback" in argv:
            traceback.print_exc()
        message = " ".join(str(error).split())
        if isinstance(error, torch.OutOfMemoryError):
            names = [name for name in ("batch_size", "context", "d_model", "hidden") if hasattr(small, name)]
            message = "out of GPU memory; lower " + " or ".join(f"--{name.replace('_', '-')}" for name in names)
        usage = isinstance(error, (ValueError, FileNotFoundError, PermissionError))
        if not usage and isinstance(error, OSError) and error.errno is not None:  # not a failed download
            message += "; what is done is kept, go on with --resume"
        print(f"{program}: {message}", file=sys.stderr)
        sys.exit(2 if usage else 1)


def _join_processes() -> None:
    """Become one of torchrun's processes. Only the first one prints."""
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    if dist.get_rank() > 0:
        sys.stdout = open(os.devnull, "w")


def _stop(number: int, frame: object) -> NoReturn:
    """The first signal ends the run in order. `timeout` and impatient people send more, which would cut that short."""
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, signal.SIG_IGN)
    raise Terminated if number == signal.SIGTERM else KeyboardInterrupt


def _run(
    main: Callable, small: object, full: object, claims: Sequence, argv: list[str], program: str, actions: dict
) -> int:
    options, settings = _parse(program, main, small, full, argv, actions)
    claims = [dataclasses.replace(claim) for claim in claims]
    if options["list_claims"]:
        say(format_claims(claims, measured=False))
        return 0
    if options["full"] and full is None:
        raise UsageError(f"there is no full scale yet; `python {program}` runs the small one")
    for name, value in settings.items():  # else a stage that comes late would find it out
        rates = value if isinstance(value, tuple) else (value,)
        if re.search(r"(^|_)lr$", name) and not all(rate is None or rate > 0 for rate in rates):
            raise UsageError(f"--{name.replace('_', '-')} is {_as_typed(value)}; it must be above 0")
    run = _make_run(options, program.removesuffix(".py"), claims, actions)
    run.config = dataclasses.replace(full if options["full"] else small, **settings)
    torch.set_num_threads(run.threads)
    _barrier()  # before the first process claims the folder that the others have just looked at
    if run.dry_run or run.actions:
        main(run.config, run)
        return 0
    try:
        if (run.resume or run.overwrite) and run.out.is_dir() and processes()[0] == 0:
            run.keep_others_out()
        return _train_and_report(main, run, options["strict"], program)
    finally:
        if run.lock is not None:
            os.close(run.lock)


def _train_and_report(main: Callable, run: Run, strict: bool, program: str) -> int:
    mark, start = run.out / "run.json", time.monotonic()
    earlier = read_json(mark, "wall_seconds")["wall_seconds"] if run.resume else 0.0
    try:
        results = main(run.config, run) or {}
    except KeyboardInterrupt:
        if run.begun or run.resume:
            raise
        print(f"\n{program}: stopped before the first step", file=sys.stderr)
        return 130
    finally:
        if run.pool is not None:
            with deferred_signals():
                run.pool.shutdown(wait=True, cancel_futures=True)
        wall_seconds = round(earlier + time.monotonic() - start, 1)
        if run.begun and processes()[0] == 0:
            write_json(mark, run.record(wall_seconds))
    if processes()[0] > 0:
        return 0
    with atomic_file(run.out / "metrics.jsonl") as file:
        file.writelines(part.read_bytes() for part in sorted((run.out / "arms").glob("*.jsonl")))
    report = {
        "method": run.method,
        "scale": run.scale,
        "seeds": run.seeds,
        "device": torch.cuda.get_device_name() if run.device == "cuda" else run.device,
        "machine": _machine(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
        "git": _git(Path(inspect.getfile(main)).parent),
        "dtype": run.dtype_name,
        "config": dataclasses.asdict(run.config),
        "data": run.data,
        "wall_seconds": wall_seconds,
        "results": {**results, "tables": run.tables},
        "claims": [dataclasses.asdict(claim) for claim in run.claims],
    }
    write_json(run.out / "results.json", report)
    if run.claims:
        say(f"\nclaims of the paper\n{format_claims(run.claims)}")
    say(f"\nwrote {run.out / 'results.json'} ({wall_seconds:.0f} s)")
    failed = [claim.id for claim in run.claims if claim.required and claim.holds is not True]
    if strict and failed:
        print(f"{program}: required claims that do not hold: {', '.join(failed)}", file=sys.stderr)
        return 1
    return 0


def _make_run(options: dict, method: str, claims: list[Claim], actions: dict) -> Run:
    given = {name: options[name] for name in actions if name in options["given"]}
    for name, least in {"seeds": 1, "workers": 1, "threads": 1, "seed": 0}.items():
        if name in options["given"] and options[name] < least:
            raise UsageError(f"--{name} is {options[name]}; at least {least} is needed")
    if options["overwrite"] and options["resume"]:
        raise UsageError("--overwrite and --resume exclude each other")
    scale, cores = ("full" if options["full"] else "small"), _cores()
    out = options["out"] if "out" in options["given"] else Path("runs") / f"{method}-{scale}"
    if options["resume"] and not given and not (out / "run.json").exists():
        raise UsageError(f"--resume: there is no run in {out}")
    if not (options["resume"] or options["overwrite"] or options["dry_run"] or given):
        _refuse_a_second_run(out)
    if options["plot"] and importlib.util.find_spec("matplotlib") is None:
        raise UsageError("--plot needs matplotlib: pip install -r requirements-full.txt")
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    device = options["device"] if options["device"] != "auto" else ("cuda" if there["cuda"] else "cpu")
    if not there[device]:
        raise UsageError(f"--device {device}: torch finds no such device here; use --device cpu")
    bf16 = options["dtype"] == "bf16" or (options["dtype"] == "auto" and scale == "full" and device == "cuda")
    cache = os.environ.get("MOE_DATA", Path(__file__).parent / "data" / "cache")
    return Run(
        method=method,
        scale=scale,
        device=device,
        dtype=torch.bfloat16 if bf16 else torch.float32,
        seeds=list(range(options["seed"], options["seed"] + options["seeds"])),
        out=out,
        workers=options["workers"] or (torch.cuda.device_count() if device == "cuda" else cores),
        threads=options["threads"] or (1 if scale == "small" else cores),
        data_dir=options["data_dir"] if "data_dir" in options["given"] else Path(cache),
        draw=options["plot"],
        claims=claims,
        actions=given,
        **{name: options[name] for name in ("resume", "overwrite", "ablate", "dry_run", "compile")},
    )


def _refuse_a_second_run(out: Path) -> None:
    if (out / "run.json").exists() or (out / "arms").exists():
        raise UsageError(f"{out} holds a run; continue it with --resume or replace it with --overwrite")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see --help)")


def _parse(
    program: str, main: Callable, small: object, full: object, argv: list[str], actions: dict
) -> tuple[dict, dict]:
    """The house flags, and one flag per config field: ({flag: value, "given": names}, {field: value given})."""
    parser = _Parser(
        prog=program,
        description=sys.modules[main.__module__].__doc__,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    flags = FLAGS | actions
    for name, (default, kind, text) in flags.items():
        how = {"action": "store_true"} if default is False else {"type": type(default), "metavar": kind}
        if isinstance(kind, tuple):
            how = {"choices": kind}
        parser.add_argument("--" + name.replace("_", "-"), help=text, **how)
    fields = parser.add_argument_group("settings (small scale / full scale)")
    comments, hints = _field_comments(type(small)), typing.get_type_hints(type(small))
    for item in dataclasses.fields(small):
        values = [_as_typed(getattr(config, item.name)) for config in (small, full) if config is not None]
        how = {"type": _reader(hints[item.name]), "metavar": item.name.upper()}
        if hints[item.name] is bool:
            how = {"action": argparse.BooleanOptionalAction}
        text = f"{comments.get(item.name, '')} ({' / '.join(dict.fromkeys(values))})".replace("%", "%%")
        fields.add_argument("--" + item.name.replace("_", "-"), help=text, **how)
    found, unknown = parser.parse_known_args(argv)
    if unknown:
        name, known = unknown[0].split("=")[0], [*parser._option_string_actions]
        word = name.strip("-").removesuffix("s")
        inside = [flag for flag in known if len(word) > 3 and word in flag]  # --steps: --recover-steps and others
        inside = inside or [flag for flag in known if {"step": "epoch", "epoch": "step"}.get(word, "?") in flag]
        near = inside or difflib.get_close_matches(name, known, n=1, cutoff=0.4)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise UsageError(f"unknown argument {unknown[0]!r}{hint} (see --help)")
    given = vars(found)
    options = {name: given.get(name, default) for name, (default, _, _) in flags.items()}
    return options | {"given": set(given)}, {name: given[name] for name in given if name not in flags}


def _as_typed(value: object) -> str:
    """A value as one would type it after its flag."""
    if isinstance(value, tuple):
        return ",".join(map(str, value)) or "empty"
    return {None: "none", "": "empty"}.get(value, str(value))


def _reader(hint: object) -> Callable[[str], object]:
    """From a type hint to what reads it: int, finite float, str, tuple[int, ...] ("1,2,3"), T | None ("none")."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    is_tuple = typing.get_origin(options[0]) is tuple
    element = typing.get_args(options[0])[0] if is_tuple else options[0]

    def read_one(text: str) -> object:
        value = element(text)
        if element is float and not math.isfinite(value):
            raise ValueError(f"{text} is no finite number")
        return value

    def read(text: str) -> object:
        if text.lower() == "none" and type(None) in options:
            return None
        return tuple(map(read_one, text.split(","))) if is_tuple else read_one(text)

    read.__name__ = f"comma-separated {element.__name__}" if is_tuple else element.__name__
    return read


def _field_comments(kind: type) -> dict[str, str]:
    """The trailing comment of every field, so that help and source cannot disagree."""
    comments = {}
    for token in tokenize.generate_tokens(io.StringIO(inspect.getsource(kind)).readline):
        field_name = re.match(r"\s*(\w+)\s*:", token.line)
        if token.type == tokenize.COMMENT and field_name:
            comments[field_name.group(1)] = token.string.lstrip("# ")
    return comments


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _machine() -> str:
    name, cpuinfo = platform.processor() or platform.machine(), Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return f"{platform.system()}, {found.group(1) if found else name}, {_cores()} cores"


def _git(folder: Path) -> str:
    try:
        command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12"]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"
