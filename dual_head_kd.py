"""Dual-head knowledge distillation: one classifier for the labels, a second one for the teacher's logits.

Yang, Zong, Huang, Feng, An, "Dual-Head Knowledge Distillation: Enhancing Logits Utilization with an Auxiliary Head"
(arXiv 2411.08937).

Softmax forgets the level of the logits: [2, 3, 4] and [-2, -1, 0] are one distribution to it. A loss on the logits
remembers, yet the paper finds that adding one to cross-entropy on the same linear classifier makes the student worse
than either loss alone. With p = softmax(z), a = sigmoid(s/T), b = sigmoid(t/T), teacher logits t, features h and class
rows w_c, descent moves w_c and h by

    -dCE/dw_c  = sum_{y=c} (1 - p_c) h  - sum_{y!=c} p_c h                   pull, push: the signs are fixed
    -dBKL/dw_c = T sum_{y=c} (b_c - a_c) h - T sum_{y!=c} (a_c - b_c) h       reversed where s_c is beyond t_c
    -dBKL/dh   = T sum_c (b_c - a_c) w_c                                         a sum in which signs average

A row of the classifier can be torn two ways; the backbone, the paper argues, is not. So each loss gets its own head:

         x -> backbone -> h -+-> main head -> z      CE(z, y)                     predicts
                             +-> auxiliary -> s      alpha * BinaryKL-Norm(s, t)  thrown away after training

    BinaryKL      = T^2/N sum_{i,c} KL(b || a)                      sigmoid distillation, summed over classes c
    BinaryKL-Norm = T^2/N sum_{i,c} log cosh((s - t) / 2T)          BinaryKL of s - t against 0

Run      python dual_head_kd.py             a minute on two cores, no download
         python dual_head_kd.py --ablate    every arm, controls and sweeps
         python dual_head_kd.py --full      CIFAR-100, resnet56 -> resnet20; --compile on a GPU
You see  students of one teacher on generated fine-grained images: accuracy, whether the gradients of the two losses
         agree (backbone, classifier, each class row), neural collapse, and what the paper's claims became.
Found    (seeds 0-2) on one head the gradients agree in the backbone (cosine 0.70), hardly in the classifier (0.13). Two
         heads beat one by 2.9 points, but reach 79.3 against 88.5 of cross-entropy alone and 87.1 of KD; one head
         (76.3) is not below BinaryKL alone (68.5). The gap is one of step size: 0.7 points at lr 0.1, 15.5 at 0.5, 1.1
         with a slowed head, none with clipping. At their best settings all methods lie within a point.

Differences from the paper and its code (its tables could not be read: no number of it is quoted)
1. Stable closed forms. The official clamp at 1e-8 does nothing above in fp32: from logits of 34 on its loss is
   infinite and its gradient NaN, far below its gradient is dead.
2. The arms it compares exist: its CIFAR script reads logits[0] as the main head, so one-headed students break there.
3. Last epoch reported; the best test epoch, which is chosen on the test set, stands beside it.
4. Small scale: generated images, one world and one teacher a seed, warm-up and cosine, no augmentation. The default
   learning rate, 0.35, is where the gap between one and two heads shows on seeds 100-103 (at 0.25 it is 1.3 points,
   at 0.35 4.6, at 0.5 10.6): a demonstration, not a good setting. Full scale: the official protocol, all of the above
   undone; the last, smaller batch of an epoch is dropped.
5. Each arm's learning rate and alpha were chosen from one grid on validation images of seeds 100-101 (--tune).
6. alpha stands for a sum over classes: the official settings, 1 for 100 classes and 0.1 for 1000, are one per class.

Break it yourself: --lr 0.1 (the gap closes); --head-lr-mult 0.2 (so it does); --alpha 4 (both
students fall apart).
"""

import difflib
import itertools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bridge as common
from bridge import Claim, Run
from data import images

# ---------------------------------------------------------------------------------------------------------------
# Config
# ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    data: str = "generated"  # generated, cifar100, cifar10, or a folder in the binary format of CIFAR
    pair: str = "resnet14-resnet8x0.5"  # teacher-student; full: any two of resnet8 14 20 32 56 110 8x4 32x4
    teacher_file: str = ""  # weights of a teacher trained before (arms/teacher-seedN.pt of another run)
    arms: tuple[str, ...] = ()  # students to train, comma-separated; none: those the required claims need
    alpha: float = 1.0  # weight of the logit loss, times what the arm's paper gives; official README
    temperature: float = 2.0  # of the binary losses; official default
    kd_temperature: float = 4.0  # of the softmax losses; official default
    aux: str = "linear"  # auxiliary head of dhkd: linear or mlp; linear for teacher and student of one family
    align: str = "whole"  # gradient alignment of dhkd-ga: whole vector (official) or backbone
    lr: float = 0.35  # peak, of every student; small: see Differences, 4; full: official code
    teacher_lr: float = 0.25  # peak, of the teacher
    head_lr_mult: float = 1.0  # learning rate of the heads, times lr: a control
    clip: float | None = None  # gradient norm; a control, not in the paper
    batch_size: int = 64  # images a step; official code
    epochs: int = 10  # passes over the training images; full: official code
    steps: int | None = None  # stop earlier: steps of every training, schedule included
    milestones: tuple[float, ...] = ()  # shares of the run at which lr falls tenfold; none: warm-up and cosine
    warmup: int = 30  # steps, with cosine only
    momentum: float = 0.9  # of SGD; official code
    weight_decay: float = 5e-4  # on all parameters; official code
    stem_stride: int = 2  # 2 halves the image at once: four times less work
    augment: bool = False  # random crop and mirroring, which needs the teacher at every step
    train_per_class: int = 80  # training images a class; full: 0, all
    val_per_class: int = 40  # images a class for choosing settings; full: 0, the paper chooses none
    test_per_class: int = 100  # generated test images a class
    probe_every: int = 20  # steps between comparisons of the two losses' gradients
    test_every: int = 0  # epochs between looks at the test set, for the best epoch beside the last; 0: once, at the end
    tune: bool = False  # run the tuning grid on the validation images and stop; use seeds from 100 on


SMALL = Config()
FULL = replace(
    SMALL,
    data="cifar100",
    pair="resnet56-resnet20",
    lr=0.05,
    teacher_lr=0.05,
    epochs=240,
    milestones=(150 / 240, 180 / 240, 210 / 240),
    stem_stride=1,
    augment=True,
    train_per_class=0,
    val_per_class=0,
    probe_every=500,
    test_every=1,
)

# ---------------------------------------------------------------------------------------------------------------
# The method
# ---------------------------------------------------------------------------------------------------------------


def check_logits(student_logits: Tensor, teacher_logits: Tensor, T: float) -> tuple[Tensor, Tensor]:
    """Both [N, K], in fp32 or better; the teacher's without gradient. Raises ValueError for other shapes or T <= 0."""
    if student_logits.shape != teacher_logits.shape or student_logits.dim() != 2:
        shapes = f"student_logits are {list(student_logits.shape)}, teacher_logits {list(teacher_logits.shape)}"
        raise ValueError(f"{shapes}; both must be [batch, classes], alike")
    if not T > 0:
        raise ValueError(f"T is {T}; a temperature above 0 is needed")
    dtype = torch.promote_types(student_logits.dtype, torch.float32)
    return student_logits.to(dtype), teacher_logits.detach().to(dtype)


def binary_kl_loss(student_logits: Tensor, teacher_logits: Tensor, T: float = 2.0) -> Tensor:
    """BinaryKL: every class a coin of its own, KL(sigmoid(t/T) || sigmoid(s/T)), T^2, summed over classes.

    student_logits, teacher_logits [N, K] -> 0-dim, mean over the batch. d/ds = T/N (sigmoid(s/T) - sigmoid(t/T)).
    No clamp: logsigmoid is exact where a clamped logarithm of a sigmoid is infinite or dead.
    """
    s, t = check_logits(student_logits, teacher_logits, T)
    b = torch.sigmoid(t / T)
    on = b * (F.logsigmoid(t / T) - F.logsigmoid(s / T))
    off = torch.sigmoid(-t / T) * (F.logsigmoid(-t / T) - F.logsigmoid(-s / T))
    return T * T * (on + off).sum() / len(s)


def binary_kl_norm_loss(student_logits: Tensor, teacher_logits: Tensor, T: float = 2.0) -> Tensor:
    """BinaryKL-Norm: BinaryKL after subtracting the teacher's logit from both sides, so its target is 1/2 everywhere.

    student_logits, teacher_logits [N, K] -> 0-dim. Equals T^2/N sum log cosh((s - t)/2T): a smooth Huber regression of
    logits, (s - t)^2 / 8 when they are near, a gradient of at most T/2N when they are far.
    """
    s, t = check_logits(student_logits, teacher_logits, T)
    d = (s - t) / T
    return T * T * (-0.5 * (F.logsigmoid(d) + F.logsigmoid(-d)) - math.log(2)).sum() / len(s)


class DualHead(nn.Module):
    """A student with a second head on the same features: the main one for labels, the auxiliary one for the teacher.

    x -> (main_logits, aux_logits) [N, num_classes] in training mode; main_logits alone in eval mode, where the
    auxiliary head is not even computed.

    student   any module with `features(x) -> [N, D]`, and `fc`, its Linear(D, num_classes), which becomes the main head
    kind      "linear": Linear(D, num_classes); "mlp": Linear, Dropout, BatchNorm, ReLU, Linear with 200 hidden units
    Raises ValueError for an unknown kind, a student without features or fc, or an fc of another width.
    """

    def __init__(self, student: nn.Module, num_classes: int, kind: str = "linear"):
        super().__init__()
        fc = getattr(student, "fc", None)
        if not callable(getattr(student, "features", None)) or not isinstance(fc, nn.Linear):
            raise ValueError(f"{type(student).__name__} needs features(x) -> [N, D] and fc, a Linear(D, {num_classes})")
        if fc.out_features != num_classes:
            raise ValueError(f"the student's fc has {fc.out_features} outputs; num_classes is {num_classes}")
        self.student = student
        if kind == "linear":
            self.aux: nn.Module = nn.Linear(fc.in_features, num_classes)
        elif kind == "mlp":
            hidden = [nn.Dropout(0.1), nn.BatchNorm1d(200), nn.ReLU(), nn.Linear(200, num_classes)]
            self.aux = nn.Sequential(nn.Linear(fc.in_features, 200), *hidden)
        else:
            raise ValueError(f"the auxiliary head is {kind!r}; allowed: 'linear', 'mlp'")

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        h = self.student.features(x)  # [N, D]
        main_logits = self.student.fc(h)
        return (main_logits, self.aux(h)) if self.training else main_logits


def align_gradients(reference: Tensor, other: Tensor, shared: Tensor | None = None) -> Tensor:
    """The step for both losses: reference + other, after other gave up what points against reference.

    reference, other  [P] flat gradients of cross-entropy and of the logit loss
    shared            [P] bool: look at these entries only, and leave the others as they are. The official code looks
                      at all of them (None); heads are disjoint, so its projection also lengthens the main head's step
    """
    if reference.shape != other.shape or reference.dim() != 1:
        raise ValueError(f"gradients are {list(reference.shape)} and {list(other.shape)}; two flat vectors are needed")
    against = reference if shared is None else reference * shared
    coefficient = (other @ against) / (against @ against).clamp_min(torch.finfo(other.dtype).tiny)
    return reference + other - coefficient.clamp(max=0) * against


def flat_gradient(loss: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """d loss / d parameters as one vector [P]; zeros where loss does not depend on one. The graph stays."""
    gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True, materialize_grads=True)
    return torch.cat([gradient.flatten() for gradient in gradients])


def gradient_agreement(
    first: Tensor, second: Tensor, backbone: Sequence[Tensor], head: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Do two losses pull the same way? Cosine in the backbone, cosine in the head, share of its class rows in conflict.

    first, second  0-dim losses of one graph; backbone: parameters; head: the weight [K, D] of the classifier
    """
    a, b = (flat_gradient(loss, [*backbone, head]) for loss in (first, second))
    split = [a.numel() - head.numel(), head.numel()]
    (a_backbone, a_head), (b_backbone, b_head) = a.split(split), b.split(split)
    rows = (a_head.view_as(head) * b_head.view_as(head)).sum(dim=1) < 0  # [K]
    cosine = lambda x, y: F.cosine_similarity(x, y, dim=0)
    return cosine(a_backbone, b_backbone), cosine(a_head, b_head), rows.float().mean()


# ---------------------------------------------------------------------------------------------------------------
# Baselines
# ---------------------------------------------------------------------------------------------------------------


def kd_loss(student_logits: Tensor, teacher_logits: Tensor, T: float = 4.0) -> Tensor:
    """T^2 KL(softmax(t/T) || softmax(s/T)), mean over the batch (Hinton et al. 2015)."""
    s, t = check_logits(student_logits, teacher_logits, T)
    return T * T * F.kl_div(F.log_softmax(s / T, -1), F.log_softmax(t / T, -1), reduction="batchmean", log_target=True)


def mse_loss(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Sum over classes of (s - t)^2 / 8, mean over the batch: what BinaryKL-Norm is for small differences."""
    s, t = check_logits(student_logits, teacher_logits, 1.0)
    return (s - t).square().sum() / (8 * len(s))


def dkd_loss(student_logits: Tensor, teacher_logits: Tensor, y: Tensor, T: float = 4.0, beta: float = 2.0) -> Tensor:
    """Decoupled KD (Zhao et al. 2022): KL of target against the rest, plus beta times KL within the rest."""
    s, t = check_logits(student_logits, teacher_logits, T)
    is_rest = torch.ones_like(s, dtype=torch.bool).scatter_(1, y[:, None], False)

    def parts(z: Tensor) -> tuple[Tensor, Tensor]:
        z = (z / T).log_softmax(dim=-1)
        rest = z[is_rest].view(len(z), -1)  # [N, K - 1]
        return torch.cat([z.gather(1, y[:, None]), rest.logsumexp(-1, keepdim=True)], dim=1), rest.log_softmax(-1)

    (s_target, s_rest), (t_target, t_rest) = parts(s), parts(t)
    kl = lambda s, t: F.kl_div(s, t, reduction="batchmean", log_target=True)
    return T * T * (kl(s_target, t_target) + beta * kl(s_rest, t_rest))


def dist_loss(student_logits: Tensor, teacher_logits: Tensor, T: float = 4.0) -> Tensor:
    """DIST (Huang et al. 2022): 1 - correlation of softmax outputs over classes, plus the same over the batch; T^2."""
    s, t = check_logits(student_logits, teacher_logits, T)
    p, q = (s / T).softmax(dim=-1), (t / T).softmax(dim=-1)

    def distance(a: Tensor, b: Tensor) -> Tensor:
        return 1 - F.cosine_similarity(a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True), dim=1).mean()

    return T * T * (distance(p, q) + distance(p.T, q.T))


def lskd_loss(student_logits: Tensor, teacher_logits: Tensor, T: float = 2.0) -> Tensor:
    """Logit standardisation (Sun et al. 2024): KD after each row of logits is brought to mean 0 and deviation 1."""
    s, t = check_logits(student_logits, teacher_logits, T)
    standard = lambda z: (z - z.mean(-1, keepdim=True)) / (z.std(-1, keepdim=True) + 1e-7)
    return kd_loss(standard(s), standard(t), T)


# ---------------------------------------------------------------------------------------------------------------
# Models: the CIFAR family of residual networks (He et al. 2016, section 4.2)
# ---------------------------------------------------------------------------------------------------------------


class BasicBlock(nn.Module):
    def __init__(self, width_in: int, width: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, padding=1, bias=False)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm1, self.norm2, self.shortcut = nn.BatchNorm2d(width), nn.BatchNorm2d(width), nn.Identity()
        if stride > 1 or width_in != width:
            self.shortcut = nn.Sequential(nn.Conv2d(width_in, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


class ResNet(nn.Module):
    """x [N, 3, height, width] -> logits [N, num_classes]; features(x) -> [N, widths[-1]].

    depth 6n + 2: three stages of n blocks. widths: of the stem and the stages. Raises ValueError for another depth.
    """

    def __init__(self, depth: int, widths: Sequence[int], num_classes: int, stem_stride: int = 1):
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise ValueError(f"depth is {depth}; 6n + 2 is needed: 8, 14, 20, ...")
        stem, *stages = widths
        self.conv = nn.Conv2d(3, stem, 3, stem_stride, padding=1, bias=False)
        self.norm, blocks, width_in = nn.BatchNorm2d(stem), [], stem
        for stage, width in enumerate(stages):
            for i in range((depth - 2) // 6):
                blocks.append(BasicBlock(width_in, width, stride=2 if stage and not i else 1))
                width_in = width
        self.blocks, self.fc = nn.Sequential(*blocks), nn.Linear(width_in, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def features(self, x: Tensor) -> Tensor:
        return self.blocks(F.relu(self.norm(self.conv(x)))).mean(dim=(2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.features(x))


WIDTHS = {"": (16, 16, 32, 64), "x4": (32, 64, 128, 256), "x0.5": (8, 8, 16, 32)}
MODELS = {  # name: (depth, widths)
    f"resnet{depth}{suffix}": (depth, WIDTHS[suffix])
    for suffix, depths in (("", (8, 14, 20, 32, 56, 110)), ("x4", (8, 32)), ("x0.5", (8,)))
    for depth in depths
}


def seeded(seed: int, build: Callable[[], nn.Module]) -> nn.Module:
    """What build() makes from this seed, whatever was drawn before: an extra head does not change the others."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()


def make_model(name: str, num_classes: int, stem_stride: int, seed: int) -> ResNet:
    return seeded(seed, lambda: ResNet(*MODELS[name], num_classes, stem_stride))


# ---------------------------------------------------------------------------------------------------------------
# The experiment: one teacher, and as every arm a student on the same batches, steps and schedule
# ---------------------------------------------------------------------------------------------------------------

LOGIT_LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor, Config], Tensor]] = {
    "kd": lambda s, t, y, config: kd_loss(s, t, config.kd_temperature),
    "bkl": lambda s, t, y, config: binary_kl_loss(s, t, config.temperature),
    "bkln": lambda s, t, y, config: binary_kl_norm_loss(s, t, config.temperature),
    "mse": lambda s, t, y, config: mse_loss(s, t),
    "dkd": lambda s, t, y, config: dkd_loss(s, t, y, config.kd_temperature),
    "dist": lambda s, t, y, config: dist_loss(s, t, config.kd_temperature),
    "lskd": lambda s, t, y, config: lskd_loss(s, t, config.temperature),
}
DEFAULT = ("ce", "kd", "bkl", "ce+bkl", "dual-bkl", "dhkd")
SWEPT = {"ce": "CE alone", "bkl": "BinaryKL alone", "ce+bkl": "one head for both", "dual-bkl": "two heads"}
SWEEP = (("lr", 0.1), ("lr", 0.25), ("lr", 0.5), ("alpha", 0.1), ("alpha", 0.3))
GRID = {"lr": (0.25, 0.5, 1.0), "alpha": (0.1, 0.3, 1.0)}  # the same for every arm; --tune prints it
TUNED = {  # arm: (lr, alpha), the best of GRID on the validation images of seeds 100 and 101
    "ce": (1.0, 0.0),
    "kd": (0.5, 0.1),
    "bkl": (0.5, 0.1),
    "ce+bkl": (0.5, 0.1),
    "dual-bkl": (0.5, 0.1),
    "dhkd": (0.5, 0.1),
    "bkln": (0.5, 0.1),
    "ce+bkln": (0.25, 0.1),
    "dhkd-mlp": (0.25, 0.1),
    "dhkd-ga": (0.25, 0.1),
    "dual-mse": (0.5, 0.1),
}
NUM_BLOCKS = 10  # of the test images, of the probes: what a run of one seed takes its standard error over
PROBES = ("cos_backbone", "cos_head", "rows_in_conflict")


@dataclass(frozen=True)
class Arm:
    loss: str = ""  # a key of LOGIT_LOSSES
    ce: float = 1.0  # weight of cross-entropy
    weight: float = 1.0  # of the logit loss as published, times alpha
    aux: str = ""  # auxiliary head; "": one head for both losses
    align: bool = False
    ramp: float = 0.0  # share of the run over which the logit loss comes in
    alpha: float = 1.0
    lr: float = 0.0
    head_lr_mult: float = 1.0
    clip: float | None = None


METHODS = {
    "ce": Arm(),
    "kd": Arm("kd"),
    "bkl": Arm("bkl", ce=0.0),
    "ce+bkl": Arm("bkl"),
    "dual-bkl": Arm("bkl", aux="linear"),
    "dhkd": Arm("bkln", aux="linear"),
    "bkln": Arm("bkln", ce=0.0),
    "ce+bkln": Arm("bkln"),
    "dhkd-mlp": Arm("bkln", aux="mlp"),
    "dhkd-ga": Arm("bkln", aux="linear", align=True),
    "dual-mse": Arm("mse", aux="linear"),
    "kd-crd": Arm("kd", ce=0.1, weight=0.9),  # the weights behind the public tables
    "dkd": Arm("dkd", ramp=20 / 240),
    "dist": Arm("dist", weight=2.0),
    "lskd": Arm("lskd", ce=0.1, weight=9.0),
}


def all_arms(config: Config) -> dict[str, Arm]:
    """Methods; controls that slow the head or bound the step; sweeps; every method at its best settings; the grid."""
    small = config.data == "generated"  # tuned settings and sweeps are of the small scale
    given = {"alpha": config.alpha, "lr": config.lr, "head_lr_mult": config.head_lr_mult, "clip": config.clip}
    methods = {name: replace(arm, **given) for name, arm in METHODS.items()}
    methods["ce"] = replace(methods["ce"], alpha=0.0)
    for name in ("dhkd", "dhkd-ga"):
        methods[name] = replace(methods[name], aux=config.aux)
    arms = {name: methods[name] for name in DEFAULT}

    def vary(suffix: str, names: Sequence[str], **changes: float) -> None:
        for name in names:
            if methods[name].loss:
                arms[f"{name}@{suffix}"] = replace(methods[name], **changes)
            elif set(changes) != {"alpha"}:  # without a teacher alpha means nothing, and stays 0
                arms[f"{name}@{suffix}"] = replace(methods[name], **changes | {"alpha": 0.0})

    vary("head-lr0.2", ("ce+bkl", "dual-bkl"), head_lr_mult=0.2)
    vary("clip1", ("ce+bkl", "dual-bkl"), clip=1.0)
    for name, (lr, alpha) in TUNED.items() if small else ():
        vary("tuned", [name], lr=lr, alpha=alpha)
    arms |= methods
    for field, value in SWEEP if small else ():
        vary(f"{field}{value:g}", SWEPT, **{field: value})
    vary("lr0.5", ("bkln", "ce+bkln", "dhkd") if small else (), lr=0.5)
    for lr, alpha in itertools.product(*GRID.values()) if config.tune else ():
        vary(f"lr{lr:g}-alpha{alpha:g}", methods, lr=lr, alpha=alpha)
    return arms


def chosen_arms(config: Config, ablate: bool) -> dict[str, Arm]:
    """The arms of this run. Raises ValueError for a name that does not exist."""
    arms = all_arms(config)
    for name in config.arms:
        if name not in arms:
            near = difflib.get_close_matches(name, arms, n=1, cutoff=0)[0]
            raise ValueError(f"--arms: there is no arm {name!r}; the nearest is {near!r}, all: {', '.join(arms)}")
    if config.tune:
        names = config.arms or [name for name in arms if "@" not in name]
        return {name: arm for name, arm in arms.items() if "-alpha" in name and name.split("@")[0] in names}
    return {name: arms[name] for name in config.arms or (arms if ablate else DEFAULT)}


def load_images(config: Config, seed: int, run: Run) -> images.ImageSet:
    if config.data == "generated":
        return images.fine_grained(seed, config.train_per_class, config.val_per_class, config.test_per_class)
    return images.load(config.data, run.data_dir, config.train_per_class, config.val_per_class)


def num_steps(config: Config, data: images.ImageSet) -> int:
    return config.steps or config.epochs * (len(data.train_y) // config.batch_size)


def fit(model: nn.Module, loss_fn: Callable, data: images.ImageSet, config: Config, arm: Arm, *job, **options) -> None:
    """common.train with the SGD of the official code and the schedule of the scale. job: (arm's name, seed, run)."""
    steps, (name, seed, run) = num_steps(config, data), job
    is_head = lambda path: "fc" in path.split(".") or path.startswith("aux.")
    backbone, heads = ([p for n, p in model.named_parameters() if is_head(n) == wanted] for wanted in (False, True))
    groups = [{"params": backbone, "lr": arm.lr}, {"params": heads, "lr": arm.lr * arm.head_lr_mult}]
    fused = True if run.device == "cuda" else None
    sgd = torch.optim.SGD(groups, momentum=config.momentum, weight_decay=config.weight_decay, fused=fused)
    schedule = common.cosine(steps, min(config.warmup, steps // 5), final=0.0)
    if config.milestones:
        schedule = common.milestones([round(share * steps) for share in config.milestones])
    tested, per_epoch = run.path(name, seed, ".epochs.json"), len(data.train_y) // config.batch_size

    def test(step: int) -> None:
        epoch, place = divmod(step + 1, per_epoch)
        if config.test_every and not config.tune and place == 0 and epoch % config.test_every == 0:
            seen = common.read_json(tested) if epoch > config.test_every and tested.exists() else {}
            common.write_json(tested, seen | {str(epoch): top1(model, data.test_x, data.test_y, data, run).mean()})

    torch.manual_seed(seed)  # for the dropout of the mlp head
    options |= {"optimizer": sgd, "schedule": schedule, "clip": arm.clip, "on_step": test}
    batches = images.batch_maker(data, config.batch_size, seed, config.augment)
    common.train(model, loss_fn, steps, batches=batches, **run.train_options(name, seed), **options)


def prepare(model: nn.Module, run: Run) -> nn.Module:
    """Onto the run's device, in the memory layout its convolutions are fastest in."""
    model = model.to(run.device)
    if run.device == "cuda":
        model = model.to(memory_format=torch.channels_last)
    if run.compile:
        model.compile(mode="reduce-overhead" if run.device == "cuda" else "default")  # the former: CUDA graphs
    return model


@torch.no_grad()
def predict(model: nn.Module, x: Tensor, data: images.ImageSet, run: Run) -> Tensor:
    """Logits of the main head, [N, K] fp32, in eval mode."""
    was_training = model.training
    model.eval()
    with torch.autocast(run.device, dtype=run.dtype, enabled=run.dtype != torch.float32):
        logits = torch.cat([model(data.prepare(part)).float() for part in x.split(500)])
    model.train(was_training)
    return logits


def top1(model: nn.Module, x: Tensor, y: Tensor, data: images.ImageSet, run: Run) -> np.ndarray:
    """[N] 100 where the image is classified rightly, else 0."""
    return 100.0 * (predict(model, x, data, run).argmax(-1) == y).cpu().numpy()


def accuracies(model: nn.Module, data: images.ImageSet, config: Config, arm: str, seed: int, run: Run) -> dict:
    """Percent right of the validation images, if there are any; of the test images, unless settings are sought."""
    found = {}
    if len(data.val_y):
        found["val_accuracy"] = top1(model, data.val_x, data.val_y, data, run).mean()
    if not config.tune:
        right = top1(model, data.test_x, data.test_y, data, run)
        blocks = [part.mean() for part in np.array_split(right, NUM_BLOCKS)]
        found |= {"accuracy": right.mean(), "accuracy_blocks": blocks}
        if run.path(arm, seed, ".epochs.json").exists():
            found["best_accuracy"] = max(common.read_json(run.path(arm, seed, ".epochs.json")).values())
    return found


def train_teacher(config: Config, arm: str, seed: int, run: Run) -> dict:
    """Cross-entropy alone, or the weights of teacher_file. Without augmentation its logits are worked out once."""
    data, name = load_images(config, seed, run).to(run.device), config.pair.split("-")[0]
    model = make_model(name, data.num_classes, config.stem_stride, seed)
    if config.teacher_file:
        try:
            model.load_state_dict(common.load(config.teacher_file))
        except (RuntimeError, AttributeError, TypeError) as error:
            wanted = f"a {name} with {data.num_classes} classes and stem stride {config.stem_stride}"
            raise ValueError(f"--teacher-file {config.teacher_file} does not hold the weights of {wanted}") from error
    model = prepare(model, run)
    if not config.teacher_file:
        cross_entropy = lambda batch, step: (F.cross_entropy(model(batch[0]).float(), batch[1]), {})
        fit(model, cross_entropy, data, config, Arm(lr=config.teacher_lr), arm, seed, run)
    common.save(run.path(arm, seed, ".pt"), model.state_dict())
    if not config.augment:
        common.save(run.path(arm, seed, "-logits.pt"), predict(model, data.train_x, data, run).cpu())
    return accuracies(model, data, config, arm, seed, run)


def load_teacher(config: Config, seed: int, data: images.ImageSet, run: Run) -> Callable[[Tensor, Tensor], Tensor]:
    """(x, index of each image) -> teacher logits [N, K]; the teacher is frozen, in eval mode."""
    seed = seed if config.data == "generated" else run.seed  # on photographs one teacher serves all seeds
    if not config.augment:
        table = common.load(run.path("teacher", seed, "-logits.pt")).to(run.device)
        return lambda x, index: table[index]
    model = make_model(config.pair.split("-")[0], data.num_classes, config.stem_stride, seed)
    model.load_state_dict(common.load(run.path("teacher", seed, ".pt")))
    model = prepare(model, run).eval().requires_grad_(False)
    return lambda x, index: model(x)


def make_student(config: Config, arm: Arm, num_classes: int, seed: int) -> tuple[nn.Module, ResNet]:
    """(what is trained, the plain student inside it): one and the same without a second head."""
    student = make_model(config.pair.split("-")[1], num_classes, config.stem_stride, seed)
    dual = lambda: DualHead(student, num_classes, arm.aux)
    return (seeded(seed + 1_000_000, dual) if arm.aux else student), student


def train_student(config: Config, arm: str, seed: int, run: Run) -> dict:
    settings, data = all_arms(config)[arm], load_images(config, seed, run).to(run.device)
    model, student = make_student(config, settings, data.num_classes, seed)
    model, steps = prepare(model, run), num_steps(config, data)
    teacher = load_teacher(config, seed, data, run) if settings.loss else None
    backbone = [p for name, p in student.named_parameters() if not name.startswith("fc.")]
    probed = bool(settings.loss and settings.ce and not config.tune)

    def loss_fn(batch: tuple[Tensor, Tensor, Tensor], step: int) -> tuple[Tensor | tuple[Tensor, Tensor], dict]:
        x, y, index = batch
        probing = probed and step % config.probe_every == 0
        # Gradients of two losses walk one graph twice, which a compiled one may refuse.
        outputs = model.forward(x) if probing or settings.align else model(x)
        main, second = outputs if settings.aux else (outputs, outputs)
        ce = settings.ce * F.cross_entropy(main.float(), y)
        if teacher is None:
            return ce, {}
        come_in = min(1.0, step / (settings.ramp * steps)) if settings.ramp else 1.0
        logit = LOGIT_LOSSES[settings.loss](second, teacher(x, index), y, config)
        logit = come_in * settings.alpha * settings.weight * logit
        values = {"ce": ce.detach(), "logit": logit.detach()}
        if probing:
            found = gradient_agreement(ce, logit, backbone, student.fc.weight)
            values |= dict(zip(PROBES, found[:1] if settings.aux else found))
        return (ce, logit) if settings.align else ce + logit, values

    backward = aligned_backward(model, backbone if config.align == "backbone" else None) if settings.align else None
    try:
        fit(model, loss_fn, data, config, settings, arm, seed, run, backward=backward)
    except common.NonFiniteLoss:
        if config.tune:  # a point of the grid that diverges has lost, and the others go on
            return {"val_accuracy": 0.0}
        raise
    result = accuracies(model, data, config, arm, seed, run)
    if config.tune:
        return result
    common.save(run.path(arm, seed, ".pt"), student.state_dict())  # what is deployed: no auxiliary head
    lines = map(json.loads, run.path(arm, seed, ".jsonl").read_text().splitlines() if probed else ())
    probes = [line for line in lines if line["step"] % config.probe_every == 0]
    result["probes"] = [[line["step"], *(round(line[name], 4) for name in PROBES if name in line)] for line in probes]
    return result | inference(model, student, settings, data, config, seed, run)


def load_trained(path: str | Path) -> ResNet:
    """The student of an arm, or the teacher, in eval mode: runs/dual_head_kd-small/arms/dhkd-seed0.pt.

    What is deployed: the auxiliary head is not in it. --tune leaves no weights. Raises UsageError: see
    common.load_trained.
    """

    def make(trained: common.Trained) -> ResNet:
        config, state = trained.config, common.load(path)
        name = config.pair.split("-")[trained.arm != "teacher"]
        model = make_model(name, len(state["fc.bias"]), config.stem_stride, trained.seed)
        model.load_state_dict(state)
        return model

    return common.load_trained(path, Config, make)


def aligned_backward(model: nn.Module, backbone: Sequence[Tensor] | None) -> Callable[[tuple[Tensor, Tensor]], None]:
    """A backward for common.train: gradients of (cross-entropy, logit loss), aligned, into the parameters."""
    parameters, shared = list(model.parameters()), None
    if backbone is not None:
        inside = {id(p) for p in backbone}
        shared = torch.cat([torch.full_like(p, id(p) in inside, dtype=torch.bool).flatten() for p in parameters])

    def backward(losses: tuple[Tensor, Tensor]) -> None:
        merged = align_gradients(*(flat_gradient(loss, parameters) for loss in losses), shared)
        for p, gradient in zip(parameters, merged.split([p.numel() for p in parameters])):
            p.grad = gradient.view_as(p)

    return backward


@torch.no_grad()
def inference(
    model: nn.Module, student: ResNet, arm: Arm, data: images.ImageSet, config: Config, seed: int, run: Run
) -> dict:
    """The exported weights in a plain student beside the model that was trained; what the heads learnt."""
    plain = make_model(config.pair.split("-")[1], data.num_classes, config.stem_stride, seed + 1)
    plain.load_state_dict({name: value.cpu() for name, value in student.state_dict().items()})
    plain, model = prepare(plain, run).eval(), model.eval()
    x, one = data.prepare(data.test_x[:100]), data.prepare(data.test_x[:1])
    features = lambda x: torch.cat([student.features(data.prepare(part)) for part in x.split(500)])
    seen, y = features(data.train_x[:5000]), data.train_y[:5000]
    percent = lambda head, h, y: 100 * float((head(h).argmax(-1) == y).float().mean())
    return {
        "export_difference": float((plain.forward(x) - model.forward(x)).abs().max()),
        "parameters": common.count_parameters(plain),
        "training_parameters": common.count_parameters(model),
        "flops": common.count_flops(lambda: plain.forward(one))["Global"],
        "train_accuracy": percent(student.fc, seen, y),
        **({"aux_accuracy": percent(model.aux, features(data.test_x), data.test_y)} if arm.aux else {}),
        **neural_collapse(seen, y, student.fc.weight),
    }


def neural_collapse(features: Tensor, labels: Tensor, weight: Tensor) -> dict[str, float]:
    """How far a classifier is on its way to neural collapse (Papyan et al. 2020); both are 0 at its end.

    features [N, D], labels [N] of K classes, weight [K, D] -> "scatter": trace of the within-class covariance times
    the pseudo-inverse of the between-class one, over K; "etf_distance": Frobenius distance of the normalised Gram
    matrix of the centred class rows from that of a simplex equiangular tight frame (reachable if D >= K - 1).
    """
    h, w, num_classes = features.double().cpu(), weight.detach().double().cpu(), len(weight)
    member = F.one_hot(labels.cpu(), num_classes).double()  # [N, K]
    means = member.T @ h / member.sum(dim=0).clamp(min=1)[:, None]  # [K, D]
    within, between = h - means[labels.cpu()], means - means.mean(dim=0)
    scatter = torch.trace(within.T @ within / len(h) @ torch.linalg.pinv(between.T @ between / num_classes))
    w = w - w.mean(dim=0)
    gram, simplex = w @ w.T, torch.eye(num_classes, dtype=w.dtype) - 1 / num_classes
    distance = torch.linalg.norm(gram / torch.linalg.norm(gram) - simplex / torch.linalg.norm(simplex))
    return {"scatter": float(scatter) / num_classes, "etf_distance": float(distance)}


# ---------------------------------------------------------------------------------------------------------------
# Claims
# ---------------------------------------------------------------------------------------------------------------

CONFLICT = "one head: the gradients of both losses agree more in the backbone than in the classifier, by over 0.1"
EXPORT = "the auxiliary head costs nothing at inference: the plain student gives the same logits at the same size"
UNREAD = "not verified"
CLAIMS = [
    Claim("dhkd.conflict", CONFLICT, UNREAD, required=True),
    Claim("dhkd.one_head_collapse", "cross-entropy + BinaryKL on one head is worse than either alone", UNREAD),
    Claim("dhkd.two_heads_recover", "a head for each loss is better than one head for both", UNREAD, required=True),
    Claim("dhkd.beats_ce", "DHKD beats cross-entropy alone, each at its best settings", UNREAD),
    Claim("dhkd.beats_kd", "DHKD beats softmax distillation, each at its best settings", UNREAD),
    Claim("dhkd.export", EXPORT, "by design", required=True),
]
CONTROLS = {"head-lr0.2": "head slowed to a fifth", "clip1": "clipped", "lr0.1": "lr 0.1", "tuned": "each tuned"}

Results = dict[str, list[dict]]  # {arm: [one result a seed]}


def values(results: Results, arm: str, key: str = "accuracy") -> np.ndarray:
    return np.array([result[key] for result in results[arm]])  # [seeds]


def scores(results: Results, arm: str) -> np.ndarray:
    """What margins are taken over: one accuracy a seed; with a single seed, one a block of the test images."""
    return np.array(results[arm][0]["accuracy_blocks"]) if len(results[arm]) == 1 else values(results, arm)


def judge(config: Config, run: Run, results: Results) -> None:
    """From measurements to claim rows; a claim whose arms are not in this run stays unmeasured."""
    have = lambda *arms: set(arms) <= set(results)
    mean = lambda arm: f"{values(results, arm).mean():.1f}"
    ahead = lambda better, arm: scores(results, better) - scores(results, arm)
    shown = lambda margin, digits=1: common.show(margin if len(run.seeds) > 1 else [margin.mean()], digits)

    def report(id: str, text: str, better: str, worse: str) -> None:
        """The claim that one arm is ahead of another; {} in text becomes the margin."""
        margin = ahead(better, worse)
        numbers = {"margin": margin, better: values(results, better), worse: values(results, worse)}
        numbers = {name: by_seed.tolist() for name, by_seed in numbers.items()}
        run.claim(f"dhkd.{id}", text.format(shown(margin)), numbers, margin)

    if have("ce+bkl"):
        probes = [np.array(result["probes"])[:, 1:] for result in results["ce+bkl"]]  # [probes, 3] a seed
        blocks = np.array_split(probes[0], min(NUM_BLOCKS, len(probes[0]))) if len(probes) == 1 else probes
        found = dict(zip(PROBES, np.array([block.mean(axis=0) for block in blocks]).T))
        backbone, head, rows = found.values()
        text = f"cosine {shown(backbone, 2)} in the backbone, {shown(head, 2)} in the classifier, "
        text += f"{100 * rows.mean():.0f} % of whose class rows are in conflict"
        margin = backbone - head - 0.1
        run.claim("dhkd.conflict", text, {name: value.tolist() for name, value in found.items()}, margin)
    if have("ce", "bkl", "ce+bkl"):
        alone = min(("ce", "bkl"), key=lambda arm: values(results, arm).mean())
        text = f"one head {mean('ce+bkl')}, CE {mean('ce')}, BinaryKL alone {mean('bkl')}: {{}} points below the worse"
        if have("bkln@lr0.5", "ce+bkln@lr0.5"):
            norm, norm_alone = mean("ce+bkln@lr0.5"), mean("bkln@lr0.5")
            text += f" (BinaryKL-Norm at lr 0.5: {norm}, alone {norm_alone})"
        report("one_head_collapse", text, alone, "ce+bkl")
    if have("ce+bkl", "dual-bkl"):
        text = f"two heads {mean('dual-bkl')}, one {mean('ce+bkl')}: {{}} points"
        for suffix, words in CONTROLS.items():
            if have(f"dual-bkl@{suffix}", f"ce+bkl@{suffix}"):
                text += f"; {words} {shown(ahead(f'dual-bkl@{suffix}', f'ce+bkl@{suffix}'))}"
        report("two_heads_recover", text, "dual-bkl", "ce+bkl")
    tuned = "" if run.scale == "full" else "@tuned"  # the full scale has published settings
    for id, rival in (("beats_ce", "ce"), ("beats_kd", "kd")):
        if have(f"dhkd{tuned}", f"{rival}{tuned}"):
            text = f"dhkd {mean(f'dhkd{tuned}')}, {rival} {mean(f'{rival}{tuned}')}: {{}} points"
            if have(f"dhkd-mlp{tuned}"):
                text += f"; with an mlp head {shown(ahead(f'dhkd-mlp{tuned}', f'{rival}{tuned}'))}"
            report(id, text, f"dhkd{tuned}", f"{rival}{tuned}")
    dual = [arm for arm in results if "aux_accuracy" in results[arm][0]]
    if dual:
        difference = max(result["export_difference"] for arm in dual for result in results[arm])
        students = [result for arm in results.values() for result in arm if "flops" in result]
        sizes, costs = (sorted({result[key] for result in students}) for key in ("parameters", "flops"))
        text = f"logits differ by {difference:g} in {len(dual)} arms; {sizes[0]:,} parameters and {costs[0]:,} FLOPs "
        found = {"difference": difference, "parameters": sizes, "flops": costs}
        same = difference == 0 and len(sizes) == len(costs) == 1
        run.claim("dhkd.export", text + "an image, as with one head", found, holds=same)


def print_tables(config: Config, run: Run, results: Results, arms: dict[str, Arm]) -> None:
    titles = [("accuracy", "test"), ("best_accuracy", "best epoch"), ("train_accuracy", "train")]
    titles += [("aux_accuracy", "auxiliary head")]
    columns = {key: title for key, title in titles if any(key in found[0] for found in results.values())}
    show = lambda arm, key, digits=1: common.show(values(results, arm, key), digits) if key in results[arm][0] else ""
    rows = []
    for name in results:
        arm = arms.get(name, Arm(lr=config.teacher_lr))
        settings = [f"{arm.lr:g}", f"{arm.alpha:g}" if arm.loss else ""]
        rows.append([name, *settings, *(show(name, key) for key in columns)])
    title = f"top-1 in percent after the last epoch, {len(run.seeds)} seed(s), {Path(config.data).name} images"
    run.table(title, ["arm", "lr", "alpha", *columns.values()], rows)
    methods, rows = [name for name in arms if "@" not in name], []
    for name in (name for name in methods if results[name][0]["probes"]):
        probes = np.mean([result["probes"] for result in results[name]], axis=0)  # [probes, step and cosines]
        for i, part in enumerate(("backbone", "classifier", "class rows in conflict")[: probes.shape[-1] - 1]):
            quarters = [quarter[:, 1 + i].mean() for quarter in np.array_split(probes, min(4, len(probes)))]
            rows.append([f"{name}: {part}", *(f"{value:.2f}" for value in quarters)])
    if rows:
        header = ["", *("1st quarter", "2nd", "3rd", "4th")[: len(rows[0]) - 1]]
        run.table("cosine of the gradients of cross-entropy and logit loss, over the run", header, rows)
    rows = [[name, *(show(name, key, 3) for key in ("scatter", "etf_distance"))] for name in methods]
    run.table("neural collapse of the main head (0: complete)", ["arm", "within / between", "distance to ETF"], rows)


def print_grid(run: Run, results: Results, arms: dict[str, Arm]) -> None:
    """Validation accuracy over the grid, and the best point of every method in the form of TUNED."""
    rows, best = [], {}
    for name in dict.fromkeys(point.split("@")[0] for point in arms):
        found = {point: values(results, point, "val_accuracy") for point in arms if point.split("@")[0] == name}
        for lr in GRID["lr"]:
            rows.append([name, f"{lr:g}", *(common.show(v, 1) for point, v in found.items() if arms[point].lr == lr)])
        top = arms[max(found, key=lambda point: found[point].mean())]
        best[name] = (top.lr, top.alpha)
    header = ["arm", "lr", *(f"alpha {alpha:g}" for alpha in GRID["alpha"])]
    run.table(f"validation top-1, {len(run.seeds)} seed(s); without a teacher alpha means nothing", header, rows)
    print(f"\nTUNED = {best}")


def draw(config: Config, run: Run, results: Results, arms: dict[str, Arm]) -> None:
    def cosines(ax) -> None:
        series = {}
        for arm in [arm for arm in ("ce+bkl", "dual-bkl") if arm in results]:
            steps, *cosines = np.mean([result["probes"] for result in results[arm]], axis=0).T[:3]
            series |= {f"{SWEPT[arm]}: {part}": (steps, y) for part, y in zip(("backbone", "classifier"), cosines)}
        common.lines(ax, series, xlabel="step", ylabel="cosine", title="do the two losses pull the same way?")

    def sweep(ax, field: str) -> None:
        series = {}
        for name, title in SWEPT.items():
            points = [n for n in arms if n == name or n.startswith(f"{name}@{field}")]
            points = sorted((getattr(arms[n], field), values(results, n).mean()) for n in points)
            series |= {title: tuple(zip(*points))} if len(points) > 1 else {}
        common.lines(ax, series, xlabel=field, ylabel="test top-1, %", title=f"accuracy against {field}")
        ax.set_xscale("log")

    def heights(ax) -> None:
        common.bars(ax, {arm: values(results, arm).mean() for arm in results if "@" not in arm}, ylabel="test top-1, %")

    swept = [lambda ax: sweep(ax, "lr"), lambda ax: sweep(ax, "alpha")]
    run.plot("dual_head_kd", [cosines, *(swept if run.ablate and config.data == "generated" else [heights])])


# ---------------------------------------------------------------------------------------------------------------
# main
# ---------------------------------------------------------------------------------------------------------------


def check(config: Config) -> None:
    """Refuse impossible settings before anything is read or written."""
    names = config.pair.split("-")
    if len(names) != 2 or not set(names) <= set(MODELS):
        raise ValueError(f"pair is {config.pair!r}; needed: teacher-student, each one of {', '.join(MODELS)}")
    above_zero = ("temperature", "kd_temperature", "lr", "teacher_lr", "head_lr_mult", "clip")
    least = dict.fromkeys(("epochs", "steps", "stem_stride", "probe_every", "test_per_class"), 1) | {"batch_size": 2}
    zeros = ("alpha", "warmup", "momentum", "weight_decay", "test_every", "train_per_class", "val_per_class")
    least |= dict.fromkeys(zeros, 0)
    for name, value in vars(config).items():
        if value is not None and (not value > 0 if name in above_zero else name in least and not value >= least[name]):
            allowed = "above 0" if name in above_zero else f"of at least {least[name]}"
            raise ValueError(f"{name} is {value}; a number {allowed} is needed")
    if config.aux not in ("linear", "mlp") or config.align not in ("whole", "backbone"):
        text = f"aux is {config.aux!r}, align {config.align!r}"
        raise ValueError(f"{text}; dhkd needs an auxiliary head, linear or mlp, and align whole or backbone")
    if not all(0 < share < 1 for share in config.milestones):
        raise ValueError(f"milestones are {config.milestones}; shares of the run between 0 and 1 are needed")
    if config.tune and not config.val_per_class:
        raise ValueError("--tune chooses on validation images, and val_per_class is 0; give e.g. --val-per-class 50")


def main(config: Config, run: Run) -> dict:
    check(config)
    arms, unique = chosen_arms(config, run.ablate), {}
    for name, arm in arms.items():  # settings that stand under two names are trained once
        unique.setdefault(arm, name)
    seeds = run.seeds if config.data == "generated" else run.seeds[:1]  # of teachers
    unread = run.dry_run and config.data in images.FILES
    data = images.blank(config.data) if unread else load_images(config, run.seed, run)
    if len(data.train_y) < config.batch_size:
        raise ValueError(f"{len(data.train_y)} training images are less than one batch of {config.batch_size}")
    steps, x = num_steps(config, data), images.batch_maker(data, config.batch_size, 0, False)(0)[0].to(run.device)
    student = prepare(make_student(config, Arm(), data.num_classes, run.seed)[0], run)
    teacher = prepare(make_model(config.pair.split("-")[0], data.num_classes, config.stem_stride, run.seed), run)

    def student_step() -> None:
        if config.augment:
            with torch.no_grad():
                teacher(x)
        student(x).sum().backward()

    if run.dry_run:
        size = images.download_size(config.data, run.data_dir)
        run.estimate(student, student_step, steps * (len(unique) * len(run.seeds) + 3 * len(seeds)), size)
        return {}
    run.data = {loaded.name: loaded.digest for loaded in (load_images(config, seed, run) for seed in seeds)}
    if config.teacher_file:
        run.data["teacher"] = common.sha256(config.teacher_file)[:12]
    each = (lambda: teacher(x).sum().backward(), student_step)
    cost = [common.median_seconds(step, run.device) for step in each]
    rounds = [math.ceil(n / run.workers) for n in (len(seeds), len(unique) * len(run.seeds))]  # jobs in turn
    seconds = 1.3 * steps * (rounds[0] * cost[0] * (not config.teacher_file) + rounds[1] * cost[1])
    run.header(f"{data.name} {data.digest}, {config.pair}, {steps} steps", seconds)

    taught = {"teacher": run.map_arms(train_teacher, [(config, "teacher", seed) for seed in seeds])}
    found = run.measure(train_student, config, list(unique.values()))
    results = {name: found[unique[arm]] for name, arm in arms.items()}
    if config.tune:
        print_grid(run, results, arms)
        return {"arms": results}
    print_tables(config, run, taught | results, arms)
    judge(config, run, results)
    draw(config, run, results, arms)
    return {"arms": taught | results}


if __name__ == "__main__":
    common.run(main, SMALL, FULL, CLAIMS)
