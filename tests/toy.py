"""A script in the house shape that takes a second: what the tests of common.py run."""

import os
import sys
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common  # noqa: E402
from common import Count, Job, Margin, Only, Positive, Results, Run, claim  # noqa: E402


@dataclass(frozen=True)
class Config(common.Settings):
    steps: Count = 30  # optimizer steps
    lr: Positive = 0.1  # peak
    widths: tuple[Count, ...] = (4,)  # of the layer
    budget: Positive | None = None  # optional number
    kind: Literal["plain", "fancy"] = "plain"  # of layer
    bias: bool = True  # with a bias
    batch_size: Count = 8  # examples
    pause: Annotated[float, common.Range(0)] = 0.0  # seconds a step
    hold: str = ""  # a file: as long as it is there, steps after the tenth take 0.2 s
    pages: Annotated[Count, Only(scale="full")] = 7  # of a book that only the full scale reads


SMALL = Config()
FULL = replace(SMALL, steps=60)
ARMS = ("one", "two", "three")


def train_arm(job: Job) -> dict:
    config = job.config
    job.path(".pid").write_text(str(os.getpid()))
    model = job.prepare(nn.Linear(4, 1, bias=config.bias))

    def batches(step: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(1000 * job.seed + step)
        return torch.randn(config.batch_size, 4, generator=generator).to(job.run.device)

    def loss_fn(x: torch.Tensor, step: int):
        noisy = nn.functional.dropout(x, 0.2)  # draws from torch's own stream: a checkpoint has it
        loss = (model(noisy) - x.sum(1, keepdim=True)).square().mean()
        return loss, {"half": loss.detach() / 2}

    def on_step(step: int) -> None:
        is_held = step >= 10 and config.hold and os.path.exists(config.hold)
        time.sleep(0.2 if is_held else config.pause)

    last = job.train(model, loss_fn, config.steps, batches=batches, lr=config.lr, on_step=on_step)
    common.save(job.path(".pt"), model.state_dict())
    return {"loss": last["loss"], "weight": model.weight.tolist()}


def rebuild(job: Job, state: dict) -> nn.Module:
    model = nn.Linear(4, 1, bias=job.config.bias)
    common.load_state(model, state, "the weights")
    return model


load_trained = partial(common.load_trained, config_type=Config, rebuild=rebuild)


@claim("the loss falls", required=True)
def learns(results: Results, config: Config) -> Margin:
    return Margin(10.0 - results.of("one", "loss"), "it did", {"loss": results.of("one", "loss")})


@claim("the loss falls below zero", paper="-1", required=True)
def fails(results: Results, config: Config) -> Margin:
    return Margin(-results.of("one", "loss"), "it did not")


@claim("something else")
def other(results: Results, config: Config) -> Margin:
    return Margin(results.ahead("three", "one", "loss"), "level")


def main(config: Config, run: Run) -> Results:
    arms = run.choose(ARMS, default=ARMS[:2], more=ARMS[2:])
    model = nn.Linear(4, 1)
    step = lambda: model(torch.randn(8, 4)).sum().backward()
    run.plan("no text", model, step, config.steps * len(arms) * len(run.seeds))
    results = run.train_arms(train_arm, arms)
    run.table("losses", *results.table(results, {"loss": ("loss", 3)}))
    run.plot([lambda ax: common.dots(ax, {arm: results.of(arm, "loss") for arm in results})])
    return results


if __name__ == "__main__":
    common.run(main, SMALL, FULL, data_parallel=True)
