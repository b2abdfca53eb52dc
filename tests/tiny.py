"""Flags with which every script ends in seconds: the same code path as a real run, on next to
nothing.
"""

from pathlib import Path

ADAMOE = (
    "--num-layers 1 --d-model 16 --d-ff 16 --num-heads 2 --context 32 --batch-size 4 --pretrain-steps 6 --steps 6"
).split()
BTM = (
    "--num-layers 1 --d-model 16 --num-heads 2 --context 16 --steps 4 --branch-steps 2 --test-blocks 4 --dev-blocks 3"
).split()
DUAL_HEAD_KD = (
    "--epochs 1 --train-per-class 4 --val-per-class 1 --test-per-class 2 --batch-size 40 --probe-every 2 --lr 0.05"
).split()
HOME = (
    "--rows 2500 --users 60 --items 80 --hidden 8 --width 8 --tower 4 --experts 3 --batch-size 64 --embedding 4"
).split()
MCSMOE = (
    "--num-layers 2 --d-model 16 --d-ff 16 --num-heads 2 --context 64 --batch-size 3 --num-experts 4 --kept 2 "
    "--calibration 16 --rank 2 --c-rank 1 --pretrain-steps 4 --finetune-steps 3 --recover-steps 3 "
    "--compress-steps 6 --eval-sequences 8"
).split()
MOWST = "--num-nodes 400 --epochs 5 --turn-epochs 3 --rounds 1 --star-epochs 6".split()
SMOE_DROPOUT = (
    "--num-layers 1 --d-model 16 --d-ff 16 --num-experts 4 --k-min 2 --num-heads 2 --context 32 --batch-size 4 "
    "--steps 6 --eval-bytes 1024"
).split()

SCRIPTS = {
    "adamoe.py": ADAMOE,
    "btm.py": BTM,
    "dual_head_kd.py": DUAL_HEAD_KD,
    "home.py": HOME,
    "mcsmoe.py": MCSMOE,
    "mowst.py": MOWST,
    "smoe_dropout.py": SMOE_DROPOUT,
}
DATA_PARALLEL = ("adamoe.py", "smoe_dropout.py")  # those that torchrun spreads over processes
README = Path(__file__).resolve().parent.parent / "README.md"
EVERY_ARM = {  # what else the one run takes whose arms several tests look at (conftest.tiny_run)
    "adamoe": ["--text", README, "--load", 1.2, "--ablate"],
    "btm": [],
    "dual_head_kd": ["--ablate"],
    "home": ["--ablate"],
    "mcsmoe": ["--ablate"],
    "mowst": ["--ablate"],
    "smoe_dropout": ["--ablate"],
}
