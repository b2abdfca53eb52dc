"""Flags with which every script ends in seconds: the same code path as a real run, on next to nothing."""

ADAMOE = (
    "--num-layers 1 --d-model 16 --d-ff 16 --num-heads 2 --context 32 --batch-size 4 --pretrain-steps 6 --steps 6"
).split()

DUAL_HEAD_KD = (
    "--epochs 1 --train-per-class 4 --val-per-class 1 --test-per-class 2 --batch-size 40 --probe-every 2 --lr 0.05"
).split()

SCRIPTS = {"adamoe.py": ADAMOE, "dual_head_kd.py": DUAL_HEAD_KD}
