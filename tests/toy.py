"""A script in the house shape that takes a second: what the tests of common.py run."""

import os
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common  # noqa: E402


@dataclass(frozen=True)
class Config:
    steps: int = 30  # optimizer steps
    lr: float = 0.1  # peak
    widths: tuple[int, ...] = (4,)  # of the layer
    budget: float | None = None  # optional number
    bias: bool = True  # with a bias
    batch_size: int = 8  # examples
    nan_at: int = -1  # step with a NaN in the data
    pause: float = 0.0  # seconds a step


SMALL = Config()
FULL = replace(SMALL, steps=60)
CLAIMS = [
    common.Claim("toy.learns", "the loss falls", "not verified", required=True),
    common.Claim("toy.fails", "the loss falls below zero", "-1", required=True),
    common.Claim("toy.open", "something else", "not verified"),
]


def train_arm(config: Config, arm: str, seed: int, run: common.Run) -> dict:
    run.path(arm, seed, ".pid").write_text(str(os.getpid()))
    torch.manual_seed(seed)
    model = run.prepare(nn.Linear(4, 1, bias=config.bias))

    def batches(step: int) -> torch.Tensor:
        x = torch.randn(config.batch_size, 4, generator=torch.Generator().manual_seed(1000 * seed + step))
        return (x * (float("nan") if step == config.nan_at else 1.0)).to(run.device)

    def loss_fn(x: torch.Tensor, step: int):
        noisy = nn.functional.dropout(x, 0.2)  # draws from torch's own stream, which a checkpoint must carry on
        loss = (model(noisy) - x.sum(1, keepdim=True)).square().mean()
        return loss, {"half": loss.detach() / 2}

    def on_step(step: int) -> None:
        time.sleep(config.pause)

    options = run.train_options(arm, seed)
    last = common.train(model, loss_fn, config.steps, batches=batches, lr=config.lr, on_step=on_step, **options)
    return {"loss": last["loss"], "weight": model.weight.tolist()}


def main(config: Config, run: common.Run) -> dict:
    model = nn.Linear(4, 1)
    if config.batch_size < 1:
        raise ValueError(f"batch_size is {config.batch_size}; at least 1 is needed")
    if run.dry_run:
        run.estimate(model, lambda: model(torch.randn(8, 4)).sum().backward(), config.steps)
        return {}
    run.header("no text", 1.0)
    arms = ["one", "two"] + ["three"] * run.ablate
    found = run.map_arms(train_arm, [(config, arm, seed) for arm in arms[:2] for seed in run.seeds])
    found += run.map_arms(train_arm, [(config, arm, seed) for arm in arms[2:] for seed in run.seeds])
    run.table("losses", ["arm", "loss"], [[arm, common.show([found[i]["loss"]])] for i, arm in enumerate(arms)])
    run.claim("toy.learns", "it did", {"loss": found[0]["loss"]}, margins=[1.0, 2.0])
    run.claim("toy.fails", "it did not", {}, margins=[-1.0, 2.0])
    run.plot("toy", [lambda ax: common.bars(ax, {"a": 1.0}, ylabel="height")])
    return {"arms": found}


if __name__ == "__main__":
    common.run(main, SMALL, FULL, CLAIMS, data_parallel=True)
