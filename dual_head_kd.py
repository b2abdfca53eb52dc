"""Dual-head knowledge distillation: one classifier for labels, a second for the teacher's logits.

Yang, Zong, Huang, Feng, An, "Dual-Head Knowledge Distillation: Enhancing Logits Utilization with an
Auxiliary Head" (arXiv 2411.08937).

A student learns from labels y and from the logits t of a teacher. Softmax forgets the level of
logits: [2, 3, 4] and [-2, -1, 0] are one distribution to it. A loss on the logits themselves
remembers, yet the paper finds that such a loss, added to cross-entropy on the same classifier,
makes the student worse than either loss alone. Its diagnosis: the two agree about the features and
contradict each other in the classifier. Let h be the features of an image, s the student's logits,
w_c the classifier's row of class c, T a temperature, p = softmax(s), a = sigmoid(s/T) and
b = sigmoid(t/T). A step of gradient descent moves the row of class c by a multiple of h:

    cross-entropy  (1 - p_c) h for the label's class, -p_c h for the others      signs are fixed
    BinaryKL       T (b_c - a_c) h                                 up or down, as the teacher says

One image of class 0, T = 2, in numbers:

                     class 0    class 1    class 2
    student s           1.00      -2.00       0.50
    teacher t           2.00      -1.00       0.00
    cross-entropy      +0.40      -0.03      -0.37
    BinaryKL           +0.22      +0.22      -0.12      row 1 is pushed away and pulled near

So each loss gets a head of its own on shared features; the second is thrown away after training:

         x -> backbone -> h -+-> main head -> z        CE(z, y)                      predicts
                             +-> auxiliary -> s        alpha BinaryKL-Norm(s, t)     thrown away

    BinaryKL      = T^2/N sum_{i,c} KL(b || a), KL of two coins              N images i, classes c
    BinaryKL-Norm = T^2/N sum_{i,c} log cosh((s - t) / 2T)            BinaryKL of s - t against 0

BinaryKL hardly pulls a logit where the sigmoid is flat, the other pulls alike at every level.

Run      python dual_head_kd.py             two minutes on two cores, no download
         python dual_head_kd.py --ablate    rivals and controls, too; --seeds 8 for verdicts
         python dual_head_kd.py --full      CIFAR-100, resnet56 -> resnet20; --compile on a GPU
You see  students of one teacher on generated fine-grained images, each at its own best settings:
         accuracy, whether the gradients of the two losses agree, and what became of the claims.
Found    (seeds 0-7) On one head the gradients agree more in the backbone (cosine 0.40) than in the
         classifier (0.15). DHKD beats cross-entropy by 7.5 ± 1.7 points and KD by 2.4 ± 0.8, and by
         3.0 ± 0.9 where both give labels a tenth of the weight, as KD is usually run; KD so run is
         1.3 ± 1.1 above DHKD as published. One head does not collapse: cross-entropy + BinaryKL
         (74.5) is above cross-entropy (67.2); two heads (73.7) cannot be told from it, nor DHKD's
         loss on one head (75.0) from DHKD (74.8). Heads matter where the step is too large (57.6,
         one 38.9), and clipping closes that gap. Labels count for little with this teacher: best is
         DHKD with labels at a tenth (79.1), then BinaryKL-Norm without any (77.8).
Differences from the paper and its code (its tables could not be read: no number of it is quoted)
1. Stable closed forms. The official clamp at 1e-8 makes the loss infinite from logits of 34 on.
2. The arms it compares exist: its CIFAR script reads logits[0], so one-headed students break there.
3. Last epoch reported; the best epoch, which is chosen on the test set, stands beside it.
4. Small scale: generated images, one world and one teacher a seed, warm-up and cosine. Only the
   teacher is trained on random crops and mirror images, so it knows what 20 images a class cannot
   tell. Without that KD does not help (seed 100: cross-entropy 69.9, KD 68.9).
5. Small scale: every arm at the best lr and alpha found on validation images of seeds 100-103, in
   one grid that is not complete, see results/README.md. Full scale: the official settings.
6. alpha weighs a sum over classes: official 1 for 100 classes, 0.1 for 1000; here 0.1 is best for
   50 and about 0.5 for 10 (one seed). Begin with 5 / classes, then try a third and three times it.

Break it yourself (--seed 100 --seeds 3, validation accuracy of each seed, as tuned one head for
both losses 74 76 77, two heads 76 72 76): --arms {ce+bkl,dual-bkl}@lr=0.5,alpha=1 (too large a
step: 26 47 60, two 59 51 56); the same with ,clip=1 (74 76 75, two 72 74 74); with lr=0.1 instead
(68 70 72, two 69 70 73).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import common
from common import (
    Check,
    Count,
    Job,
    Margin,
    NonNegative,
    Positive,
    Results,
    Run,
    Share,
    Whole,
    check,
    claim,
    show,
)
from data import images

# --------------------------------------------------------------------------------------------------
# The method
# --------------------------------------------------------------------------------------------------


def check_logits(student: Tensor, teacher: Tensor, T: float) -> tuple[Tensor, Tensor]:
    """Both [N, K], in fp32 or better; the teacher's without gradient. Raises ValueError."""
    if student.shape != teacher.shape or student.dim() != 2:
        shapes = f"student logits are {list(student.shape)}, teacher logits {list(teacher.shape)}"
        raise ValueError(f"{shapes}; both must be [batch, classes], alike")
    if not T > 0:
        raise ValueError(f"T is {T}; a temperature above 0 is needed")
    dtype = torch.promote_types(student.dtype, torch.float32)
    return student.to(dtype), teacher.detach().to(dtype)


def binary_kl_loss(student_logits: Tensor, teacher_logits: Tensor, T: float = 2.0) -> Tensor:
    """BinaryKL: every class a coin of its own, T^2 KL(sigmoid(t/T) || sigmoid(s/T)), summed.

    student_logits, teacher_logits [N, K] -> 0-dim, the mean over the batch of the sum over classes.
    d/ds = T/N (sigmoid(s/T) - sigmoid(t/T)). No clamp: logsigmoid is exact where a clamped
    logarithm of a sigmoid is infinite or dead.
    """
    s, t = check_logits(student_logits, teacher_logits, T)
    heads = torch.sigmoid(t / T) * (F.logsigmoid(t / T) - F.logsigmoid(s / T))
    tails = torch.sigmoid(-t / T) * (F.logsigmoid(-t / T) - F.logsigmoid(-s / T))
    return T * T * (heads + tails).sum() / len(s)


def binary_kl_norm_loss(student_logits: Tensor, teacher_logits: Tensor, T: float = 2.0) -> Tensor:
    """BinaryKL-Norm: BinaryKL with the teacher's logit subtracted from both: its target is 1/2.

    student_logits, teacher_logits [N, K] -> 0-dim. Equals T^2/N sum log cosh((s - t)/2T), a smooth
    Huber regression of logits: (s - t)^2 / 8 when they are near, a gradient of T/2N when far.
    """
    s, t = check_logits(student_logits, teacher_logits, T)
    d = (s - t) / T
    log_cosh = -0.5 * (F.logsigmoid(d) + F.logsigmoid(-d)) - math.log(2)  # of d / 2
    return T * T * log_cosh.sum() / len(s)


class DualHead(nn.Module):
    """A student with a second head on the same features: one for labels, one for the teacher.

    x -> (main_logits, aux_logits), each [N, num_classes], in training mode; main_logits alone in
    eval mode, where the auxiliary head is not even computed.

    student   any module with `features(x) -> [N, D]`, and `fc`, its Linear(D, num_classes), which
              becomes the main head; Student makes one of any backbone
    kind      "linear", or "mlp": 200 hidden units with dropout and batch norm
    Raises ValueError: unknown kind, no features or fc, another width, features that are a map.
    """

    def __init__(self, student: nn.Module, num_classes: int, kind: str = "linear"):
        super().__init__()
        fc = getattr(student, "fc", None)
        if not callable(getattr(student, "features", None)) or not isinstance(fc, nn.Linear):
            needed = f"features(x) -> [N, D] and fc, a Linear(D, {num_classes})"
            raise ValueError(f"{type(student).__name__} needs {needed}; see Student")
        if fc.out_features != num_classes:
            found = f"the student's fc has {fc.out_features} outputs"
            raise ValueError(f"{found}; num_classes is {num_classes}")
        self.student = student
        if kind == "linear":
            self.aux: nn.Module = nn.Linear(fc.in_features, num_classes)
        elif kind == "mlp":
            self.aux = nn.Sequential(
                nn.Linear(fc.in_features, 200),
                nn.Dropout(0.1),
                nn.BatchNorm1d(200),
                nn.ReLU(),
                nn.Linear(200, num_classes),
            )
        else:
            raise ValueError(f"the auxiliary head is {kind!r}; allowed: 'linear', 'mlp'")

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        h = self.student.features(x)  # [N, D]
        if h.dim() != 2:
            raise ValueError(f"features(x) are {list(h.shape)}; [N, D] is needed, pool and flatten")
        main_logits = self.student.fc(h)
        return (main_logits, self.aux(h)) if self.training else main_logits


class Student(nn.Module):
    """Any backbone x -> [N, D] and any Linear(D, K) on top, as DualHead takes them."""

    def __init__(self, backbone: nn.Module, fc: nn.Linear):
        super().__init__()
        self.backbone, self.fc = backbone, fc

    def features(self, x: Tensor) -> Tensor:
        return self.backbone(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.features(x))


def align_gradients(reference: Tensor, other: Tensor, shared: Tensor | None = None) -> Tensor:
    """The step for both losses: reference + other, after other gave up what points against it.

    reference, other  [P] flat gradients of cross-entropy and of the logit loss
    shared            [P] bool: look at these entries only, leave the others as they are. The
                      official code looks at all (None); heads are disjoint, so its projection
                      also lengthens the main head's step
    """
    if reference.shape != other.shape or reference.dim() != 1:
        shapes = f"gradients are {list(reference.shape)} and {list(other.shape)}"
        raise ValueError(f"{shapes}; two flat vectors are needed")
    against = reference if shared is None else reference * shared
    tiny = torch.finfo(other.dtype).tiny
    coefficient = (other @ against) / (against @ against).clamp_min(tiny)
    return reference + other - coefficient.clamp(max=0) * against


def flat_gradient(loss: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """d loss / d parameters as one vector [P]; zeros where it depends on none. The graph stays."""
    gradients = torch.autograd.grad(
        loss, parameters, retain_graph=True, allow_unused=True, materialize_grads=True
    )
    return torch.cat([gradient.flatten() for gradient in gradients])


def gradient_agreement(
    first: Tensor, second: Tensor, backbone: Sequence[Tensor], head: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Do two losses pull the same way? Three numbers, 0-dim.

    first, second  0-dim losses of one graph; backbone: parameters; head: the weight [K, D]
    ->             cosine in the backbone, cosine in the head, share of its class rows in conflict
    """
    in_backbone = [flat_gradient(loss, backbone) for loss in (first, second)]  # each [P]
    in_head = [flat_gradient(loss, [head]).view_as(head) for loss in (first, second)]  # each [K, D]
    by_row = (in_head[0] * in_head[1]).sum(dim=1)  # [K]
    flat = [gradient.flatten() for gradient in in_head]
    return (
        F.cosine_similarity(*in_backbone, dim=0),
        F.cosine_similarity(*flat, dim=0),
        (by_row < 0).float().mean(),
    )


# --------------------------------------------------------------------------------------------------
# Baselines
# --------------------------------------------------------------------------------------------------


def kd_loss(student_logits: Tensor, teacher_logits: Tensor, T: float = 4.0) -> Tensor:
    """T^2 KL(softmax(t/T) || softmax(s/T)), mean over the batch (Hinton et al. 2015)."""
    s, t = check_logits(student_logits, teacher_logits, T)
    return T * T * kl_of_logs((s / T).log_softmax(-1), (t / T).log_softmax(-1))


def kl_of_logs(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher || student) of log-probabilities [N, K], mean over the batch."""
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True)


def mse_loss(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Sum over classes of (s - t)^2 / 8, batch mean: BinaryKL-Norm for small differences."""
    s, t = check_logits(student_logits, teacher_logits, 1.0)
    return (s - t).square().sum() / (8 * len(s))


def dkd_loss(
    student_logits: Tensor, teacher_logits: Tensor, y: Tensor, T: float = 4.0, beta: float = 2.0
) -> Tensor:
    """Decoupled KD (Zhao et al. 2022): KL of target against the rest, plus beta KL within the rest.

    y [N], int64 labels. Raises ValueError for another dtype or labels that are no class.
    """
    s, t = check_logits(student_logits, teacher_logits, T)
    num_classes = s.shape[1]
    if y.dtype != torch.int64 or y.shape != s.shape[:1]:
        raise ValueError(f"y is {y.dtype} {list(y.shape)}; int64 [{len(s)}] is needed")
    if y.device.type == "cpu" and not ((y >= 0) & (y < num_classes)).all():
        raise ValueError(f"y has labels {int(y.min())} .. {int(y.max())}; {num_classes} classes")
    is_rest = torch.ones_like(s, dtype=torch.bool).scatter_(1, y[:, None], False)

    def target_or_rest(z: Tensor) -> Tensor:
        """log P(target), log P(any other): [N, 2]."""
        log_probs = (z / T).log_softmax(dim=-1)
        rest = log_probs[is_rest].view(len(z), -1).logsumexp(-1, keepdim=True)
        return torch.cat([log_probs.gather(1, y[:, None]), rest], dim=1)

    def within_rest(z: Tensor) -> Tensor:
        """log P(class | not the target): [N, K - 1]."""
        return (z / T)[is_rest].view(len(z), -1).log_softmax(-1)

    target = kl_of_logs(target_or_rest(s), target_or_rest(t))
    return T * T * (target + beta * kl_of_logs(within_rest(s), within_rest(t)))


def dist_loss(student_logits: Tensor, teacher_logits: Tensor, T: float = 4.0) -> Tensor:
    """DIST (Huang et al. 2022): T^2 (1 - correlation) of softmax outputs, by row and column."""
    s, t = check_logits(student_logits, teacher_logits, T)
    p, q = (s / T).softmax(dim=-1), (t / T).softmax(dim=-1)

    def distance(a: Tensor, b: Tensor) -> Tensor:
        a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
        return 1 - F.cosine_similarity(a, b, dim=1).mean()

    return T * T * (distance(p, q) + distance(p.T, q.T))


def lskd_loss(student_logits: Tensor, teacher_logits: Tensor, T: float = 2.0) -> Tensor:
    """Logit standardisation (Sun et al. 2024): KD of logits with mean 0 and deviation 1."""
    s, t = check_logits(student_logits, teacher_logits, T)

    def standard(z: Tensor) -> Tensor:
        return (z - z.mean(-1, keepdim=True)) / (z.std(-1, keepdim=True) + 1e-7)

    return kd_loss(standard(s), standard(t), T)


class BasicBlock(nn.Module):
    def __init__(self, width_in: int, width: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, padding=1, bias=False)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)
        self.shortcut = nn.Identity()
        if stride > 1 or width_in != width:
            conv = nn.Conv2d(width_in, width, 1, stride, bias=False)
            self.shortcut = nn.Sequential(conv, nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


class ResNet(nn.Module):
    """The CIFAR family (He et al. 2016, section 4.2). x [N, 3, height, width] -> [N, num_classes].

    depth 6n + 2: three stages of n blocks. widths: of the stem and the stages; the last one is the
    width of features(x). Raises ValueError for another depth.
    """

    def __init__(self, depth: int, widths: Sequence[int], num_classes: int, stem_stride: int = 1):
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise ValueError(f"depth is {depth}; 6n + 2 is needed: 8, 14, 20, ...")
        self.conv = nn.Conv2d(3, widths[0], 3, stem_stride, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(widths[0])
        blocks, width_in = [], widths[0]
        for stage, width in enumerate(widths[1:]):
            for i in range((depth - 2) // 6):
                halves = stage > 0 and i == 0  # the picture, at the start of stages 2 and 3
                blocks.append(BasicBlock(width_in, width, stride=2 if halves else 1))
                width_in = width
        self.blocks, self.fc = nn.Sequential(*blocks), nn.Linear(width_in, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def features(self, x: Tensor) -> Tensor:
        return self.blocks(F.relu(self.norm(self.conv(x)))).mean(dim=(2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.features(x))


# --------------------------------------------------------------------------------------------------
# Config
# --------------------------------------------------------------------------------------------------

Model = Literal[
    "resnet8", "resnet14", "resnet20", "resnet32", "resnet56", "resnet110",
    "resnet8x0.5", "resnet8x4", "resnet32x4",
]  # fmt: skip
WIDTHS = {"": (16, 16, 32, 64), "4": (32, 64, 128, 256), "0.5": (8, 8, 16, 32)}


@dataclass(frozen=True)
class Config(common.Settings):
    data: str = "generated"  # generated, cifar100, cifar10, or a folder in CIFAR's binary format
    teacher: Model = "resnet14"  # full: official code
    student: Model = "resnet8x0.5"  # full: official code
    teacher_file: str = ""  # weights of a teacher trained before (a state dict)
    lr: Positive | None = None  # peak, of every student; none: the arm's own best; full: official
    alpha: NonNegative | None = None  # weight of the logit loss; none: likewise; full: official
    temperature: Positive = 2.0  # of the binary losses and LSKD; official default
    kd_temperature: Positive = 4.0  # of KD, DKD and DIST; official default
    teacher_lr: Positive = 0.25  # peak, of the teacher
    head_lr_mult: Positive = 1.0  # learning rate of the heads, times lr: a control
    clip: Positive | None = None  # gradient norm; a control, not in the paper
    batch_size: Annotated[int, common.Range(2)] = 64  # images a step; official code
    epochs: Count = 60  # passes over the training images; full: official code
    steps: Count | None = None  # stop earlier: steps of every training, schedule included
    milestones: tuple[Share, ...] = ()  # shares of the run at which lr falls tenfold; none: cosine
    warmup: Whole = 30  # steps, with cosine only
    momentum: NonNegative = 0.9  # of SGD; official code
    weight_decay: NonNegative = 5e-4  # on all parameters; official code
    stem_stride: Count = 2  # 2 halves the image at once: four times less work
    augment: Literal["teacher", "all", "none"] = "teacher"  # who sees random crops and mirrors
    train_per_class: Whole = 20  # training images a class; full: 0, all
    val_per_class: Whole = 100  # images a class to choose settings on; full: 0, the paper has none
    test_per_class: Count = 100  # generated test images a class
    probe_every: Count = 20  # steps between comparisons of the two losses' gradients
    test_every: Whole = 0  # epochs between looks at the test set; 0: at the end only


SMALL = Config()
FULL = replace(
    SMALL,
    data="cifar100",
    teacher="resnet56",
    student="resnet20",
    lr=0.05,
    alpha=1.0,
    teacher_lr=0.05,
    epochs=240,
    milestones=(150 / 240, 180 / 240, 210 / 240),
    stem_stride=1,
    augment="all",
    train_per_class=0,
    val_per_class=0,
    probe_every=500,
    test_every=1,
)

# --------------------------------------------------------------------------------------------------
# The experiment: one teacher, and as every arm a student on the same batches, steps and schedule
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Arm:
    lr: float  # the best of one grid, on validation images of seeds 100-103
    loss: str = ""  # on the logits, see logit_loss; "": no teacher
    alpha: float = 0.0  # best with lr
    ce: float = 1.0  # weight of cross-entropy
    weight: float = 1.0  # of the logit loss as published, times alpha
    aux: str = ""  # auxiliary head, linear or mlp; "": one head for both losses
    align: bool = False
    ramp: float = 0.0  # share of the run over which the logit loss comes in


ARMS = {
    "ce": Arm(lr=1.0),
    "kd": Arm(1.0, "kd", alpha=0.1),
    "kd-crd": Arm(1.0, "kd", alpha=0.1, ce=0.1, weight=0.9),  # as in CRD's public tables
    "bkl": Arm(2.0, "bkl", alpha=0.03, ce=0.0),
    "ce+bkl": Arm(1.0, "bkl", alpha=0.1),
    "dual-bkl": Arm(0.5, "bkl", alpha=0.1, aux="linear"),
    "dhkd": Arm(0.5, "bkln", alpha=0.1, aux="linear"),
    "dhkd-crd": Arm(2.0, "bkln", alpha=0.03, ce=0.1, aux="linear"),  # labels at a tenth
    "dhkd-mlp": Arm(1.0, "bkln", alpha=0.03, aux="mlp"),
    "dhkd-ga": Arm(0.5, "bkln", alpha=0.1, aux="linear", align=True),
    "bkln": Arm(2.0, "bkln", alpha=0.03, ce=0.0),
    "ce+bkln": Arm(1.0, "bkln", alpha=0.03),
    "dual-mse": Arm(1.0, "mse", alpha=0.03, aux="linear"),
    "dkd": Arm(0.5, "dkd", alpha=0.1, ramp=20 / 240),
    "dist": Arm(0.5, "dist", alpha=0.1, weight=2.0),
    "lskd": Arm(1.0, "lskd", alpha=0.03, ce=0.1, weight=9.0),
}
DEFAULT = ["ce", "kd", "kd-crd", "bkl", "ce+bkl", "dual-bkl", "dhkd", "dhkd-crd"]
RIVALS = ["dkd", "dist", "lskd"]
MORE = ["bkln", "ce+bkln", "dhkd-mlp", *RIVALS]
LARGE_STEP = "lr=0.5,alpha=1"  # too large for BinaryKL: a demonstration, not a good setting
CLIPPED = f"{LARGE_STEP},clip=1"
DEMONSTRATION = [f"{arm}@{LARGE_STEP}" for arm in ("bkl", "ce+bkl", "dual-bkl")]
DEMONSTRATION += [f"{arm}@{CLIPPED}" for arm in ("ce+bkl", "dual-bkl")]
SHARED = ["data", "train_per_class", "val_per_class", "test_per_class", "augment"]  # by all arms
SHARED += ["teacher", "teacher_file", "teacher_lr", "stem_stride"]
PROBES = ("cos_backbone", "cos_head", "rows_in_conflict")


def logit_loss(name: str, s: Tensor, t: Tensor, y: Tensor, config: Config) -> Tensor:
    if name == "kd":
        return kd_loss(s, t, config.kd_temperature)
    if name == "bkl":
        return binary_kl_loss(s, t, config.temperature)
    if name == "bkln":
        return binary_kl_norm_loss(s, t, config.temperature)
    if name == "mse":
        return mse_loss(s, t)
    if name == "dkd":
        return dkd_loss(s, t, y, config.kd_temperature)
    if name == "dist":
        return dist_loss(s, t, config.kd_temperature)
    return lskd_loss(s, t, config.temperature)


def seeded(seed: int, build: Callable[[], nn.Module]) -> nn.Module:
    """What build() makes from this seed, whatever was drawn before: arms begin alike."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()


def make_model(name: Model, num_classes: int, stem_stride: int, seed: int) -> ResNet:
    depth, _, factor = name.removeprefix("resnet").partition("x")  # resnet8x4: four times as wide
    return seeded(seed, lambda: ResNet(int(depth), WIDTHS[factor], num_classes, stem_stride))


def load_images(config: Config, seed: int, run: Run) -> images.ImageSet:
    per_class = (config.train_per_class, config.val_per_class)
    if config.data == "generated":
        return images.fine_grained(seed, *per_class, config.test_per_class)
    if run.dry_run and config.data in images.FILES:
        return images.blank(config.data)  # a dry run downloads nothing
    return images.load(config.data, run.data_dir, *per_class)


def num_steps(config: Config, data: images.ImageSet) -> int:
    return config.steps or config.epochs * (len(data.train_y) // config.batch_size)


def to_device(model: nn.Module, job: Job) -> nn.Module:
    if job.run.device == "cuda":
        model = model.to(memory_format=torch.channels_last)  # what its convolutions are fastest in
    return job.prepare(model)


@torch.no_grad()
def predict(model: nn.Module, x: Tensor, data: images.ImageSet, run: Run) -> Tensor:
    """Logits of the main head, [N, K] fp32, in eval mode."""
    was_training = model.training
    model.eval()
    with torch.autocast(run.device, dtype=run.dtype, enabled=run.dtype != torch.float32):
        logits = torch.cat([model(data.prepare(part)).float() for part in x.split(500)])
    model.train(was_training)
    return logits


def accuracy(model: nn.Module, x: Tensor, y: Tensor, data: images.ImageSet, run: Run) -> float:
    """Percent of the images classified rightly."""
    right = predict(model, x, data, run).argmax(-1) == y
    return 100 * right.double().mean().item()


def fit(
    model: nn.Module,
    loss_fn: Callable,
    lr: float,
    data: images.ImageSet,
    job: Job,
    augmented: bool,
    backward: Callable | None = None,
) -> dict:
    """The SGD of the official code, with the schedule of the scale; then percent right."""
    config = job.config
    run = job.run
    steps = num_steps(job.config, data)
    backbone, heads = [], []
    for name, parameter in model.named_parameters():
        is_head = "fc" in name.split(".") or name.startswith("aux.")
        (heads if is_head else backbone).append(parameter)
    optimizer = torch.optim.SGD(
        [{"params": backbone, "lr": lr}, {"params": heads, "lr": lr * config.head_lr_mult}],
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        fused=True if run.device == "cuda" else None,
    )
    schedule = common.cosine(steps, min(config.warmup, steps // 5), final=0.0)
    if config.milestones:  # the official step schedule
        falls = [round(share * steps) for share in config.milestones]

        def schedule(step: int) -> float:
            return 0.1 ** sum(step >= fall for fall in falls)

    steps_per_epoch = len(data.train_y) // config.batch_size

    def test(step: int) -> dict:
        epoch, place = divmod(step + 1, steps_per_epoch)
        if place or not config.test_every or epoch % config.test_every:
            return {}
        return {"test": accuracy(model, data.test_x, data.test_y, data, run)}

    torch.manual_seed(job.seed)  # for the dropout of the mlp head
    job.train(
        model,
        loss_fn,
        steps,
        batches=images.batch_maker(data, config.batch_size, job.seed, augmented),
        optimizer=optimizer,
        schedule=schedule,
        clip=config.clip,
        on_step=test,
        backward=backward,
    )
    found = {"lr": lr, "accuracy": accuracy(model, data.test_x, data.test_y, data, run)}
    found["train_accuracy"] = accuracy(model, data.train_x[:5000], data.train_y[:5000], data, run)
    if len(data.val_y):
        found["val_accuracy"] = accuracy(model, data.val_x, data.val_y, data, run)
    if config.test_every:
        tests = [line["test"] for line in job.log() if "test" in line]
        if tests:  # a run shorter than test_every epochs has none
            found["best_accuracy"] = max(tests)
    return found


def train_teacher(job: Job) -> dict:
    """Cross-entropy alone, or the weights of teacher_file. Plain images: its logits are a table."""
    config, run = job.config, job.run
    data = load_images(config, job.seed, run).to(run.device)
    model = make_model(config.teacher, data.num_classes, config.stem_stride, job.seed)
    if config.teacher_file:
        common.load_state(model, common.load(config.teacher_file), config.teacher_file)
    model = to_device(model, job)
    if config.teacher_file:
        result = {"accuracy": accuracy(model, data.test_x, data.test_y, data, run)}
    else:

        def loss_fn(batch: tuple[Tensor, Tensor, Tensor], step: int) -> tuple[Tensor, dict]:
            x, y, _ = batch
            return F.cross_entropy(model(x).float(), y), {}

        augmented = config.augment != "none"
        result = fit(model, loss_fn, config.teacher_lr, data, job, augmented)
    common.save(job.path(".pt"), model.state_dict())
    if config.augment != "all":
        common.save(job.path("-logits.pt"), predict(model, data.train_x, data, run).cpu())
    return result


def load_teacher(data: images.ImageSet, job: Job) -> Callable[[Tensor, Tensor], Tensor]:
    """(x, index of each image) -> teacher logits [N, K]; the teacher is frozen, in eval mode."""
    config, run = job.config, job.run
    seed = job.seed if config.data == "generated" else 0  # photographs: one teacher for all seeds
    teacher = job.other("teacher", seed)
    if config.augment != "all":
        table = common.load(teacher.path("-logits.pt")).to(run.device)
        return lambda x, index: table[index]
    model = rebuild(teacher, common.load(teacher.path(".pt")))
    model = to_device(model, job).eval().requires_grad_(False)
    return lambda x, index: model(x)


def train_student(job: Job) -> dict:
    arm = ARMS[job.method]
    config = job.config
    run = job.run
    lr = arm.lr if config.lr is None else config.lr
    alpha = arm.alpha if config.alpha is None else config.alpha
    data = load_images(config, job.seed, run).to(run.device)
    student = make_model(config.student, data.num_classes, config.stem_stride, job.seed)
    model: nn.Module = student
    if arm.aux:
        model = seeded(job.seed + 1_000_000, lambda: DualHead(student, data.num_classes, arm.aux))
    model, steps = to_device(model, job), num_steps(config, data)
    teacher = load_teacher(data, job) if arm.loss else None
    backbone = [p for name, p in student.named_parameters() if not name.startswith("fc.")]
    probed = bool(arm.loss and arm.ce)

    def loss_fn(batch: tuple[Tensor, Tensor, Tensor], step: int) -> tuple:
        x, y, index = batch
        probing = probed and step % config.probe_every == 0
        # Gradients of two losses walk one graph twice, which a compiled one may refuse.
        outputs = model.forward(x) if probing or arm.align else model(x)
        main, second = outputs if arm.aux else (outputs, outputs)
        ce = arm.ce * F.cross_entropy(main.float(), y)
        if teacher is None:
            return ce, {}
        come_in = min(1.0, step / (arm.ramp * steps)) if arm.ramp else 1.0
        logit = logit_loss(arm.loss, second, teacher(x, index), y, config)
        logit = come_in * alpha * arm.weight * logit
        values = {"ce": ce.detach(), "logit": logit.detach()}
        if probing:
            found = gradient_agreement(ce, logit, backbone, student.fc.weight)
            shared = found[:1] if arm.aux else found  # two heads share the backbone only
            values.update(zip(PROBES, shared))
        return (ce, logit) if arm.align else ce + logit, values

    backward = aligned_backward(model) if arm.align else None
    result = fit(model, loss_fn, lr, data, job, config.augment == "all", backward)
    common.save(job.path(".pt"), student.state_dict())  # what is deployed: no auxiliary head
    if arm.loss:
        result["alpha"] = alpha
    if probed:
        lines = [line for line in job.log() if line["step"] % config.probe_every == 0]
        for name in PROBES:
            if name in lines[0]:
                result[name] = [line[name] for line in lines]
    return result | inspect_student(model, student, data, job)


def aligned_backward(model: nn.Module) -> Callable[[tuple[Tensor, Tensor]], None]:
    """A backward for common.train: gradients of (cross-entropy, logit loss), aligned."""
    parameters = list(model.parameters())
    sizes = [parameter.numel() for parameter in parameters]

    def backward(losses: tuple[Tensor, Tensor]) -> None:
        ce, logit = (flat_gradient(loss, parameters) for loss in losses)
        merged = align_gradients(ce, logit)
        for parameter, gradient in zip(parameters, merged.split(sizes)):
            parameter.grad = gradient.view_as(parameter)

    return backward


@torch.no_grad()
def inspect_student(model: nn.Module, student: ResNet, data: images.ImageSet, job: Job) -> dict:
    """The exported weights in a plain student beside the model that was trained."""
    plain = to_device(rebuild(job, student.state_dict()), job).eval()
    model.eval()
    x = data.prepare(data.test_x[:100])
    return {
        "export_difference": float((plain.forward(x) - model.forward(x)).abs().max()),
        "parameters": common.count_parameters(plain),
        "flops": common.count_flops(lambda: plain.forward(x[:1]))["Global"],
    }


def rebuild(job: Job, state: dict) -> ResNet:
    """The student of a job, or the teacher, from its weights: without an auxiliary head."""
    config = job.config
    name = config.teacher if job.arm == "teacher" else config.student
    model = make_model(name, len(state["fc.bias"]), config.stem_stride, job.seed)
    common.load_state(model, state, f"{job.label}.pt")
    return model


def load_trained(path: str) -> ResNet:
    """The student of an arm, or the teacher: runs/dual_head_kd-small/arms/dhkd-seed0.pt.

    In eval mode, on the CPU, as it is deployed: without the auxiliary head. Raises UsageError, see
    common.load_trained.
    """
    return common.load_trained(path, Config, rebuild)


# --------------------------------------------------------------------------------------------------
# Claims. The paper's tables could not be read, so none of them has a number of it.
# --------------------------------------------------------------------------------------------------


def compared(results: Results, better: str, worse: str, words: str = "") -> Margin:
    """How far one arm is above another, in points of test accuracy."""
    margin = results.ahead(better, worse, "accuracy")
    means = [show(results.of(arm, "accuracy").mean(), 1) for arm in (better, worse)]
    text = f"{better} {means[0]}, {worse} {means[1]}: {show(margin, 1)} points{words}"
    return Margin(margin, text)


def stronger(results: Results, arms: Sequence[str]) -> str:
    """The arm of the highest mean accuracy: a claim about a baseline is judged by the best one."""
    return max(arms, key=lambda arm: results.of(arm, "accuracy").mean())


@claim("one head: the losses agree more in the backbone than in the classifier, cosine + 0.1",
       required=True)  # fmt: skip
def conflict(results: Results, config: Config) -> Margin:
    backbone, head, rows = (results.of("ce+bkl", name).mean(axis=1) for name in PROBES)
    text = f"cosine {show(backbone, 2)} in the backbone, {show(head, 2)} in the classifier, "
    text += f"{100 * rows.mean():.0f} % of whose class rows are in conflict"
    return Margin(backbone - head - 0.1, text)


@claim("one head for cross-entropy and BinaryKL is worse than either loss alone", required=True)
def one_head_collapse(results: Results, config: Config) -> Margin:
    """Worse than either: below the weaker of the two."""
    other = stronger(results, ["ce", "bkl"])
    weaker = "ce" if other == "bkl" else "bkl"
    words = f"; {other} {show(results.of(other, 'accuracy').mean(), 1)}"
    return compared(results, weaker, "ce+bkl", words)


@claim("a head for each loss is better than one head for both", required=True)
def two_heads_recover(results: Results, config: Config) -> Margin:
    return compared(results, "dual-bkl", "ce+bkl")


@claim("DHKD beats cross-entropy alone", required=True)
def beats_ce(results: Results, config: Config) -> Margin:
    return compared(results, "dhkd", "ce")


@claim("DHKD beats softmax distillation, with labels at full weight and at a tenth", required=True)
def beats_kd(results: Results, config: Config) -> Margin:
    """By the smaller of the two leads. KD is usually run at a tenth, the official DHKD at one."""
    leads = {}
    for ours, theirs in (("dhkd", "kd"), ("dhkd-crd", "kd-crd")):
        leads[ours, theirs] = results.ahead(ours, theirs, "accuracy")
    weakest = min(leads, key=lambda pair: leads[pair].mean())
    other = max(leads, key=lambda pair: leads[pair].mean())
    across = results.ahead("dhkd", "kd-crd", "accuracy")
    words = f"; {' - '.join(other)} {show(leads[other], 1)}, dhkd - kd-crd {show(across, 1)}"
    return compared(results, *weakest, words)


@claim("DHKD beats the later DKD, DIST and LSKD, by the best of them")
def beats_rivals(results: Results, config: Config) -> Margin:
    return compared(results, "dhkd", stronger(results, RIVALS))


@claim("it is the second head that helps: DHKD beats its own loss on one head")
def beats_one_head(results: Results, config: Config) -> Margin:
    return compared(results, "dhkd", "ce+bkln")


@claim("a demonstration, at a step too large for BinaryKL: two heads beat one")
def large_step(results: Results, config: Config) -> Margin:
    clipped = results.ahead(f"dual-bkl@{CLIPPED}", f"ce+bkl@{CLIPPED}", "accuracy")
    words = f"; with gradients clipped {show(clipped, 1)}"
    return compared(results, f"dual-bkl@{LARGE_STEP}", f"ce+bkl@{LARGE_STEP}", words)


@check("the auxiliary head is gone at inference: same logits, same size as a plain student")
def export(results: Results, config: Config) -> Check:
    differences = []
    found = {}  # name of the network: (parameters, FLOPs) of the students that are one
    for arm in results:
        if arm == "teacher":
            continue
        student = common.arm_config(config, arm).student
        for result in results[arm]:
            differences.append(result["export_difference"])
            found.setdefault(student, set()).add((result["parameters"], result["flops"]))
    alike = all(len(sizes) == 1 for sizes in found.values())
    parameters, flops = min(min(sizes) for sizes in found.values())
    text = f"logits differ by {max(differences):g} in {len(differences)} students of "
    text += "" if len(found) == 1 else f"{len(found)} networks, the smallest of "
    text += f"{parameters:,} parameters and {flops:,} FLOPs an image"
    return Check(max(differences) == 0 and alike, text)


def draw(results: Results, config: Config, run: Run) -> None:
    shown = [arm for arm in ("ce+bkl", "dual-bkl", "dhkd") if arm in results]

    def cosines(ax) -> None:
        for arm in shown:
            backbone = results.of(arm, "cos_backbone")  # [seeds, probes]
            steps = config.probe_every * np.arange(backbone.shape[1])
            color = common.color_of(arm, DEFAULT)
            common.curve(ax, steps, backbone, f"{arm}, backbone", color)
            if arm == "ce+bkl":  # its two losses share the classifier, too
                head = results.of(arm, "cos_head")
                common.curve(ax, steps, head, f"{arm}, classifier", color, "--")
        title = "do cross-entropy and logit loss pull the same way?"
        ax.set(xlabel="step", ylabel="cosine of their gradients", title=title)
        ax.axhline(0, color="0.7", zorder=0)

    def accuracies(ax) -> None:
        methods = [arm for arm in results if "@" not in arm]
        colors = {arm: common.color_of(arm, DEFAULT) for arm in DEFAULT}
        values = {arm: results.of(arm, "accuracy") for arm in methods}
        common.dots(ax, values, {arm: colors.get(arm, common.COLORS[7]) for arm in methods})
        ax.set(xlabel="test top-1, %", title="each arm at its own best settings")

    run.plot([cosines, accuracies], width=5.2)


# --------------------------------------------------------------------------------------------------
# main
# --------------------------------------------------------------------------------------------------


def check_arm(arm: str) -> None:
    """Refuse settings of what all arms share: the images and the teacher. Raises UsageError."""
    for name, _ in common.settings_of(arm):
        if name in SHARED:
            told = f"arm {arm}: all arms share the images and the teacher"
            raise common.UsageError(f"{told}; give {common.flag(name)} to the whole run")


def main(config: Config, run: Run) -> Results:
    more = MORE + (DEMONSTRATION if config.data == "generated" else [])
    arms = run.choose(ARMS, default=DEFAULT, more=more)
    for arm in arms:
        check_arm(arm)
    data = load_images(config, run.seed, run)
    if len(data.train_y) < config.batch_size:
        count = f"{len(data.train_y)} training images"
        raise ValueError(f"{count} are less than one batch of {config.batch_size}")
    run.data = {data.name: data.digest}
    if config.teacher_file:
        run.data["teacher"] = common.sha256(config.teacher_file)[:12]

    student = make_model(config.student, data.num_classes, config.stem_stride, run.seed)
    student = student.to(run.device)
    x = data.prepare(data.train_x[: config.batch_size]).to(run.device)
    steps = num_steps(config, data) * (len(arms) + 3) * len(run.seeds)  # a teacher: three students
    text = f"{data.name} {data.digest}, {config.teacher} -> {config.student}"
    download = images.download_size(config.data, run.data_dir)
    run.plan(text, student, lambda: student(x).sum().backward(), steps, download)

    seeds = run.seeds if config.data == "generated" else [0]
    results = run.train_arms(train_teacher, ["teacher"], seeds)
    results |= run.train_arms(train_student, arms)
    columns = {"lr": ("lr", 4), "alpha": ("alpha", 4), "test": ("accuracy", 1)}
    columns |= {"best epoch": ("best_accuracy", 1), "train": ("train_accuracy", 1)}
    columns |= {"validation": ("val_accuracy", 1)}
    title = f"top-1 in percent, {len(run.seeds)} seed(s), {data.name} images"
    run.table(title, *results.table(results, columns))
    draw(results, config, run)
    return results


if __name__ == "__main__":
    common.run(main, SMALL, FULL)
