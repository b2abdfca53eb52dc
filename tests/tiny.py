"""Flags with which every script ends in seconds: the same code path as a real run, on next to nothing."""

ADAMOE = (
    "--num-layers 1 --d-model 16 --d-ff 16 --num-heads 2 --context 32 --batch-size 4 --pretrain-steps 6 --steps 6"
).split()
MCSMOE = (
    "--num-layers 2 --d-model 16 --d-ff 16 --num-heads 2 --context 64 --batch-size 3 --num-experts 4 --kept 2 "
    "--calibration 16 --rank 2 --c-rank 1 --pretrain-steps 4 --finetune-steps 3 --recover-steps 3 "
    "--compress-steps 6 --eval-sequences 32"
).split()

SCRIPTS = {"adamoe.py": ADAMOE, "mcsmoe.py": MCSMOE}
