"""Flags with which every script ends in seconds: the same code path as a real run, on next to nothing."""

ADAMOE = (
    "--num-layers 1 --d-model 16 --d-ff 16 --num-heads 2 --context 32 --batch-size 4 --pretrain-steps 6 --steps 6"
).split()

SCRIPTS = {"adamoe.py": ADAMOE}
DATA_PARALLEL = ("adamoe.py",)  # those that torchrun spreads over processes
NEED_FILES = {f"adamoe.full_{name}" for name in ("accuracy", "flops", "time")}  # open claims, null at small scale
