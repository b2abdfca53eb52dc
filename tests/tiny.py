"""Flags with which every script ends in seconds: the same code path as a real run, on next to nothing."""

ADAMOE = (
    "--num-layers 1 --d-model 16 --d-ff 16 --num-heads 2 --context 32 --batch-size 4 --pretrain-steps 6 --steps 6"
).split()

SMOE_DROPOUT = (
    "--num-layers 1 --d-model 16 --d-ff 16 --num-experts 4 --k-min 2 --num-heads 2 --context 32 --batch-size 4 "
    "--steps 6 --eval-bytes 1024"
).split()

SCRIPTS = {"adamoe.py": ADAMOE, "smoe_dropout.py": SMOE_DROPOUT}
NEED_FILES = {"smoe_dropout.transfer"}  # open claims that are null until a data set is downloaded
