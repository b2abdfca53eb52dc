"""What scripts of the first edition still use, on top of common.py; it goes with the last of them.

They declare their claims in a list, fill them in with `run.claim`, and train arms with functions of
(config, arm, seed, run). Everything else is common.py's.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial, wraps
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
from torch import nn

import common
from common import *  # noqa: F403
from common import (
    FLAGS,  # noqa: F401
    Check,
    Job,
    Margin,
    Missing,
    Results,
    UsageError,
    count_flops,
    count_parameters,
    median_seconds,
    peak_memory,
    say,  # noqa: F401
)
from data.arrays import load_arrays, save_arrays  # noqa: F401


@dataclass
class Claim:
    """A sentence of the paper in a script's list of them."""

    id: str
    text: str
    paper: str
    required: bool = False
    measured: str = "not measured; run --ablate"
    values: dict = field(default_factory=dict)
    holds: bool | None = None


def verdict(margins: Sequence[float]) -> bool:
    return common.verdict(np.atleast_1d(margins)) in ("holds", "seen")


@dataclass
class OldTrain:
    """train_arm(config, arm, seed, run) as the function of a job."""

    train_arm: Callable
    config: Any

    def __call__(self, job: Job) -> dict:
        return self.train_arm(self.config, job.arm, job.seed, job.run)


@dataclass
class Run(common.Run):
    claims: list[Claim] = field(default_factory=list)
    found: dict[str, Any] = field(default_factory=dict)  # claim id -> Margin, Check, or why not

    def train_options(self, arm: str, seed: int) -> dict:
        files = {
            "checkpoint": self.path(arm, seed, ".ckpt"),
            "metrics": self.path(arm, seed, ".jsonl"),
        }
        return {**files, "label": f"{arm}-seed{seed}", "dtype": self.dtype}

    def prepare(self, model: nn.Module) -> nn.Module:
        return Job(self, "", 0).prepare(model)

    def header(self, text: str, eta_seconds: float | None = None) -> None:
        seeds = (
            f"seed {self.seed}" if len(self.seeds) == 1 else f"seeds {self.seed}-{self.seeds[-1]}"
        )
        parts = [self.method, f"{self.scale} scale", self.device, self.dtype_name, seeds, text]
        about = [] if eta_seconds is None else [f"about {eta_seconds:.0f} s"]
        common.say(" · ".join([*parts, *about]))

    def estimate(
        self,
        model: nn.Module,
        step: Callable,
        steps: int,
        download_bytes: int | None = 0,
        parts: int = 1,
    ) -> None:
        seconds, flops = median_seconds(step, self.device), count_flops(step)["Global"]
        hours = seconds * steps * parts / 3600 / self.workers
        part = "a step" if parts == 1 else f"1/{parts} of a step"
        rows = [
            ["parameters", f"{count_parameters(model):,}"],
            ["training FLOPs", f"{flops * steps * parts:.2e}"],
            ["bytes to download", "not known" if download_bytes is None else f"{download_bytes:,}"],
            [f"peak memory of {part}", f"{peak_memory(self.device) / 2**20:,.0f} MiB"],
            ["training time", f"{hours:.3f} hours, {self.workers} at a time"],
        ]
        self.table(
            f"dry run: {steps:,} training steps in all arms and seeds", ["", "estimate"], rows
        )

    def claim(
        self,
        id: str,
        measured: str,
        values: dict,
        margins: Sequence[float] | None = None,
        holds: bool | None = None,
    ) -> None:
        if margins is None and holds is None:
            self.found[id] = measured
        elif margins is None:
            self.found[id] = Check(bool(holds), measured, values)
        else:
            by_seed = np.atleast_1d(np.asarray(margins, dtype=np.float64))
            if len(self.seeds) == 1:  # parts of one trained model are not seeds
                by_seed = by_seed.mean(keepdims=True)
            self.found[id] = Margin(by_seed, measured, values)
        claim = next(claim for claim in self.claims if claim.id == id)
        claim.measured, claim.values, claim.holds = measured, values, holds
        if margins is not None:
            claim.holds = verdict(by_seed)

    def map_arms(self, train_arm: Callable, jobs: Sequence[tuple[Any, str, int]]) -> list[dict]:
        made = [(Job(self, arm, seed), OldTrain(train_arm, config)) for config, arm, seed in jobs]
        self.do(made)
        return [job.result() for job, _ in made]

    def measure(
        self, train_arm: Callable, config: Any, arms: Sequence[str]
    ) -> dict[str, list[dict]]:
        jobs = [(config, arm, seed) for arm in arms for seed in self.seeds]
        found = iter(self.map_arms(train_arm, jobs))
        return {arm: [next(found) for _ in self.seeds] for arm in arms}

    def plot(self, name: str, panels: Sequence[Callable], **size: float) -> None:
        super().plot(panels, name=name, **size)


def run(
    main: Callable,
    small: Any,
    full: Any = None,
    claims: Sequence[Claim] = (),
    argv: Sequence[str] | None = None,
    actions: dict[str, tuple] | None = None,
    data_parallel: bool = False,
) -> NoReturn:
    old: list[Run] = []

    @wraps(main)
    def adapted(config: Any, new: common.Run) -> Results:
        defaults = small if new.scale == "small" else full
        for name, value in asdict(config).items():
            rates = value if isinstance(value, tuple) else (value,)
            is_rate = name == "lr" or name.endswith("_lr")
            given = value != getattr(defaults, name)
            if given and is_rate and not all(rate is None or rate > 0 for rate in rates):
                typed = common.as_typed(value)
                raise UsageError(f"{common.flag(name)} is {typed}; it must be above 0")
        old.append(Run(**vars(new), claims=[replace(claim) for claim in claims]))
        try:
            found = main(config, old[0])
        finally:
            vars(new).update({name: getattr(old[0], name) for name in vars(new)})
        kept = {claim.id: claim.required for claim in old[0].claims}  # main may have dropped some
        judged[:] = [
            replace(claim, required=kept[claim.id]) for claim in judged if claim.id in kept
        ]
        return found

    def measured(id: str, results: Results, config: Any) -> Margin | Check:
        declared = next(claim for claim in claims if claim.id == id)
        found = old[0].found.get(id, declared.measured)
        if isinstance(found, str):
            raise Missing(found)
        return found

    judged = []
    for claim in claims:
        measure = partial(measured, claim.id)
        judged.append(common.Claim(claim.id, claim.text, claim.paper, claim.required, measure))
    common.run(adapted, small, full, argv, judged, actions, data_parallel)


def linear(steps: int, warmup: int = 0, final: float = 0.0) -> Callable[[int], float]:
    """Linear warm-up to 1, then a straight line down to `final` at the last step."""

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 1 - (1 - final) * min(1.0, (step - warmup) / max(1, steps - 1 - warmup))

    return factor


class Trained(NamedTuple):
    """Whose weights a file holds."""

    config: Any
    arm: str
    seed: int
    dtype: torch.dtype
    data_dir: Path


def load_trained(
    path: str | Path, config_type: type, make: Callable[[Trained], nn.Module]
) -> nn.Module:
    def rebuild(job: Job, state: Any) -> nn.Module:
        run = job.run
        return make(Trained(run.config, job.arm, job.seed, run.dtype, run.data_dir))

    return common.load_trained(path, config_type, rebuild)


def lines(ax, series: dict[str, tuple[Sequence[float], Sequence[float]]], **labels: str) -> None:
    for i, (label, (x, y)) in enumerate(series.items()):
        ax.plot(x, y, marker="os^"[i // 10 % 3] if len(x) == 1 else "", label=label)
    ax.set(**labels)


def bars(ax, values: dict[str, float], **labels: str) -> None:
    ax.bar(list(values), list(values.values()))
    ax.set(**labels)


def heatmap(ax, values: np.ndarray, **labels: str) -> None:
    ax.imshow(values, aspect="auto")
    middle = (values.min() + values.max()) / 2
    for (row, column), value in np.ndenumerate(values):
        color = "black" if value > middle else "white"
        ax.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=7, color=color)
    ax.set(**labels)


def painted_text(
    ax, text: str, values: Sequence[float], title: str, rows: int = 14, columns: int = 48
) -> None:
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
            style = {"family": "monospace", "fontsize": 7, "ha": "center", "va": "center"}
            ax.text(column, row, char, color=color, **style)
            column += 1
    ax.imshow(grid, aspect="auto", cmap="viridis")
    ax.set(title=title, xticks=[], yticks=[])


def measure_step(step: Callable, device: str) -> dict[str, float]:
    cost = {"seconds": median_seconds(step, device), "flops": count_flops(step)["Global"]}
    return cost | {"memory": peak_memory(device)}
