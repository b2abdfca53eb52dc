"""Dual-head distillation: losses and gradients by hand, what a head may touch, the experiment."""

import json
import math
import re
from dataclasses import replace
from functools import partial

import pytest
import tiny
import torch
import torch.nn.functional as F
from conftest import check_claims, report
from test_images import write_cifar100
from torch import nn

import common
import dual_head_kd as dhkd
from data import images

F64 = torch.float64
S = torch.tensor([[1, -2, 0.5], [0, 3, -1]], dtype=F64)
TEACHER = torch.tensor([[2, -1, 0], [-1, 4, -3]], dtype=F64)
LOSSES = {
    "kd": dhkd.kd_loss,
    "bkl": dhkd.binary_kl_loss,
    "bkln": dhkd.binary_kl_norm_loss,
    "mse": lambda s, t, T=1.0: dhkd.mse_loss(s, t),
    "dkd": lambda s, t, T=4.0: dhkd.dkd_loss(s, t, torch.arange(len(s)) % s.shape[1], T),
    "dist": dhkd.dist_loss,
    "lskd": dhkd.lskd_loss,
}


def near(value, expected, tolerance=1e-9):
    expected = torch.as_tensor(expected, dtype=value.dtype)
    torch.testing.assert_close(value, expected, atol=tolerance, rtol=0)


def gradient(loss, s, *rest):
    s = s.clone().requires_grad_()
    return torch.autograd.grad(loss(s, *rest), s)[0]


def random_logits(rows=6, classes=5, seed=0, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(2, rows, classes, generator=generator, dtype=F64)).unbind(0)


# --- losses ---------------------------------------------------------------------------------------


def test_worked_examples():
    for loss, T, value in [
        (dhkd.binary_kl_loss, 2.0, 0.3950274267),
        (dhkd.binary_kl_loss, 1.0, 0.2369430890),
        (dhkd.binary_kl_norm_loss, 2.0, 0.5032519215),
        (dhkd.binary_kl_norm_loss, 1.0, 0.4725843310),
        (dhkd.kd_loss, 4.0, 0.4732708958),
        (dhkd.kd_loss, 1.0, 0.1028164021),
    ]:
        near(loss(S, TEACHER, T), value)
    first, second = [-0.1085992474, -0.1085992474, 0.0621765009], [0.1224593312, -0.0632226018]
    near(gradient(dhkd.binary_kl_loss, S, TEACHER, 2.0), [first, [*second, 0.1951151450]])
    first, second = [-0.1224593312, -0.1224593312, 0.0621765009], [0.1224593312, -0.1224593312]
    near(gradient(dhkd.binary_kl_norm_loss, S, TEACHER, 2.0), [first, [*second, 0.2310585786]])


@pytest.mark.parametrize("T", [0.5, 2.0, 4.0])
def test_binary_losses_equal_their_other_forms(T):
    s, t = random_logits()
    a, b = torch.sigmoid(s / T), torch.sigmoid(t / T)
    kl = b * (b / a).log() + (1 - b) * ((1 - b) / (1 - a)).log()
    torch.testing.assert_close(dhkd.binary_kl_loss(s, t, T), T * T * kl.sum() / 6)
    torch.testing.assert_close(gradient(dhkd.binary_kl_loss, s, t, T), T / 6 * (a - b))
    cosh = T * T / 6 * torch.cosh((s - t) / (2 * T)).log().sum()
    torch.testing.assert_close(dhkd.binary_kl_norm_loss(s, t, T), cosh)
    slope = T / 12 * torch.tanh((s - t) / (2 * T))
    torch.testing.assert_close(gradient(dhkd.binary_kl_norm_loss, s, t, T), slope)


def test_decoupled_kd_equals_its_definition():
    s, t = random_logits()
    y, T, beta = torch.arange(6) % 5, 4.0, 2.0
    p, q = (s / T).softmax(1), (t / T).softmax(1)
    at = lambda z: z.gather(1, y[:, None])[:, 0]
    target = at(q) * (at(q) / at(p)).log() + (1 - at(q)) * ((1 - at(q)) / (1 - at(p))).log()
    rest = torch.ones_like(p, dtype=torch.bool).scatter(1, y[:, None], False)
    p_rest, q_rest = ((z[rest].view(6, 4)) / (1 - at(z))[:, None] for z in (p, q))
    within = (q_rest * (q_rest / p_rest).log()).sum(1)
    expected = T * T * (target + beta * within).mean()
    torch.testing.assert_close(dhkd.dkd_loss(s, t, y, T, beta), expected)
    # With beta = the teacher's weight of the rest, row by row, the two parts add up to plain KD.
    expected = T * T * (target + (1 - at(q)) * within).mean()
    torch.testing.assert_close(dhkd.kd_loss(s, t, T), expected)


def test_dist_equals_its_definition():
    s, t = random_logits()
    p, q = (s / 4).softmax(1), (t / 4).softmax(1)

    def distance(a, b):
        pairs = [1 - torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(a, b)]
        return torch.stack(pairs).mean()

    expected = 16 * (distance(p, q) + distance(p.T, q.T))
    torch.testing.assert_close(dhkd.dist_loss(s, t, 4.0), expected)


def test_logit_standardisation_ignores_shift_and_scale():
    s, t = random_logits()
    standard = lambda z: (z - z.mean(1, keepdim=True)) / z.std(1, keepdim=True)
    close = partial(torch.testing.assert_close, rtol=1e-5, atol=0)
    close(dhkd.lskd_loss(s, t, 2.0), dhkd.kd_loss(standard(s), standard(t), 2.0))
    close(dhkd.lskd_loss(s, t), dhkd.lskd_loss(3 * s + 1, t / 2 - 5))


@pytest.mark.parametrize("name", LOSSES)
def test_at_the_teachers_logits_loss_and_gradient_vanish_and_the_teacher_gets_none(name):
    s, t = random_logits()
    near(LOSSES[name](t, t), 0.0, 1e-12)
    near(gradient(LOSSES[name], t, t), torch.zeros_like(t), 1e-9)
    t.requires_grad_()
    loss = LOSSES[name](s.requires_grad_(), t)
    loss.backward()
    assert loss > 0.1 and t.grad is None and s.grad.abs().max() > 0


@pytest.mark.parametrize("value", [40.0, -80.0, 1e4, -1e4])
def test_far_logits_stay_finite_in_fp32(value):
    s, t = torch.full((1, 3), value, requires_grad=True), torch.zeros(1, 3)
    for loss in (dhkd.binary_kl_loss, dhkd.binary_kl_norm_loss):
        found = loss(s, t, 2.0)
        (slope,) = torch.autograd.grad(found, s)
        assert torch.isfinite(found) and torch.isfinite(slope).all() and slope.abs().min() > 0.1
        assert torch.isfinite(loss(t, s.detach(), 2.0))
    assert slope.abs().max() <= 2.0 / 2  # T / 2N
    one = dhkd.binary_kl_norm_loss(torch.tensor([[1e4]]), torch.zeros(1, 1), 2.0)
    assert float(one) == pytest.approx(9997.2274, abs=1e-3)


def test_half_precision_logits_are_computed_in_fp32():
    s, t = (logits.bfloat16() for logits in random_logits())
    for name, loss in LOSSES.items():
        assert loss(s, t).dtype == torch.float32, name
        torch.testing.assert_close(loss(s, t), loss(s.float(), t.float()))


def test_mse_is_binary_kl_norm_for_small_differences():
    s, t = random_logits()
    s = t + 0.01 * s
    norm = dhkd.binary_kl_norm_loss(s, t, 2.0)
    torch.testing.assert_close(dhkd.mse_loss(s, t), norm, rtol=1e-3, atol=0)


def test_bad_logits_temperatures_and_labels_are_refused():
    s, t = random_logits()
    for name, loss in LOSSES.items():
        for other in (t[:, :1], t[:1], t[0], t[None]):
            with pytest.raises(ValueError, match=r"student logits are \[6, 5\], teacher logits"):
                loss(s, other)
        for T in (0.0, -1.0, math.nan) if name != "mse" else ():
            with pytest.raises(ValueError, match=f"T is {T}"):
                loss(s, t, T)
    labels = torch.arange(6) % 5
    for y, message in [
        (labels.int(), "y is torch.int32"),
        (labels.double(), "y is torch.float64"),
        (labels[:-1], r"int64 \[6\] is needed"),
        (labels - 1, "y has labels -1 .. 3; 5 classes"),
        (labels + 1, "y has labels 1 .. 5; 5 classes"),
    ]:
        with pytest.raises(ValueError, match=message):
            dhkd.dkd_loss(s, t, y)


# --- gradients ------------------------------------------------------------------------------------


def test_alignment_worked_example():
    first, second = torch.tensor([3, 4, 1, 0], dtype=F64), torch.tensor([-1, -2, 0, 5], dtype=F64)
    merged = dhkd.align_gradients(first, second)
    near(merged, [3.2692307692, 3.6923076923, 1.4230769231, 5.0])
    near((merged - first) @ first, 0.0, 1e-12)  # nothing points against the reference any more
    shared = torch.tensor([True, True, False, False])
    merged = dhkd.align_gradients(first, second, shared)
    near(merged, [3.32, 3.76, 1.0, 5.0])
    near((merged - first)[shared] @ first[shared], 0.0, 1e-12)


def test_alignment_leaves_agreeing_and_empty_gradients_alone():
    first, second = torch.tensor([1, 2, 0], dtype=F64), torch.tensor([1, 0, -3], dtype=F64)
    assert torch.equal(dhkd.align_gradients(first, second), first + second)
    assert torch.equal(dhkd.align_gradients(torch.zeros(3, dtype=F64), second), second)


def test_agreement_of_two_gradients():
    backbone = torch.ones(2, dtype=F64, requires_grad=True)
    head = torch.ones(2, 2, dtype=F64, requires_grad=True)
    first = (backbone * torch.tensor([1, 0])).sum() + (head * torch.tensor([[1, 0], [1, 1]])).sum()
    second = (backbone * torch.tensor([1, 1])).sum()
    second = second + (head * torch.tensor([[-1, 0], [1, 1]])).sum()
    found = dhkd.gradient_agreement(first, second, [backbone], head)
    near(torch.stack(found[:2]), [1 / math.sqrt(2), 1 / 3])
    assert float(found[2]) == 0.5


def small_student(seed=0, classes=4, aux="linear"):
    student = dhkd.make_model("resnet8x0.5", classes, 2, seed)
    model = dhkd.seeded(seed, lambda: dhkd.DualHead(student, classes, aux)) if aux else student
    return model.train(), student, torch.randn(6, 3, 16, 16), torch.arange(6) % classes


def test_each_loss_reaches_its_head_and_both_reach_the_backbone():
    model, student, x, y = small_student()
    main, aux = model(x)
    logit = dhkd.binary_kl_norm_loss(aux, torch.randn(6, 4))
    losses = {"ce": F.cross_entropy(main, y), "logit": logit}
    for name, loss in losses.items():
        model.zero_grad()
        loss.backward(retain_graph=True)
        own, other = (student.fc, model.aux) if name == "ce" else (model.aux, student.fc)
        assert other.weight.grad is None
        assert own.weight.grad.any() and student.conv.weight.grad.any()
    assert not any("aux" in name for name, _ in small_student(aux="")[0].named_parameters())


def test_aligned_backward_equals_the_flat_formula():
    model, student, x, y = small_student()
    model.aux.load_state_dict(student.fc.state_dict())
    main, aux = model(x)
    against_y = -9 * F.one_hot(y, 4)
    ce, logit = F.cross_entropy(main, y), 4 * dhkd.binary_kl_norm_loss(aux, against_y)
    first, second = (dhkd.flat_gradient(loss, list(model.parameters())) for loss in (ce, logit))
    dhkd.aligned_backward(model)((ce, logit))
    merged = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert second @ first < 0
    expected = first + second - (second @ first) / (first @ first) * first
    torch.testing.assert_close(merged, expected)


# --- models ---------------------------------------------------------------------------------------

PUBLISHED = {"resnet20": 278_324, "resnet32": 472_756, "resnet56": 861_620}
PUBLISHED |= {"resnet110": 1_736_564, "resnet8x4": 1_233_540, "resnet32x4": 7_433_860}


@pytest.mark.parametrize("name, parameters", PUBLISHED.items())
def test_parameters_are_the_published_ones(name, parameters):
    student = dhkd.make_model(name, 100, 1, 0)
    assert common.count_parameters(student) == parameters
    width = student.fc.in_features
    extra = {"linear": 100 * (width + 1), "mlp": {64: 33_500, 256: 71_900}[width]}
    for kind, count in extra.items():
        assert common.count_parameters(dhkd.DualHead(student, 100, kind)) - parameters == count


def test_feature_maps_halve_twice():
    model, sizes = dhkd.make_model("resnet20", 10, 1, 0), []
    for block in model.blocks:
        block.register_forward_hook(lambda module, given, out: sizes.append(tuple(out.shape[1:])))
    assert model.features(torch.randn(2, 3, 32, 32)).shape == (2, 64)
    assert sizes == [(16, 32, 32)] * 3 + [(32, 16, 16)] * 3 + [(64, 8, 8)] * 3
    strided = dhkd.ResNet(8, (4, 4, 4, 4), 3)  # strides without new widths
    assert strided(torch.randn(2, 3, 8, 8)).shape == (2, 3)


def test_auxiliary_head_plays_no_part_at_inference_and_is_not_exported():
    model, student, x, _ = small_student(aux="mlp")
    model.eval()
    before = model(x)
    with torch.no_grad():
        for p in model.aux.parameters():
            p.fill_(math.nan)
    assert torch.equal(model(x), before)
    plain = dhkd.make_model("resnet8x0.5", 4, 2, seed=9)
    plain.load_state_dict(student.state_dict(), strict=True)
    assert torch.equal(plain.eval()(x), before)


def test_a_second_head_does_not_change_how_the_student_begins():
    one, two, nonlinear = (small_student(aux=aux)[1] for aux in ("", "linear", "mlp"))
    for p, q, r in zip(one.parameters(), two.parameters(), nonlinear.parameters()):
        assert torch.equal(p, q) and torch.equal(p, r)
    model = small_student()[0]
    assert not torch.equal(model.aux.weight, model.student.fc.weight)
    assert not torch.equal(one.conv.weight, small_student(seed=1)[1].conv.weight)


def test_impossible_models_are_refused():
    student = dhkd.make_model("resnet8", 4, 1, 0)
    map_of_features = dhkd.Student(nn.Conv2d(3, 8, 3), nn.Linear(8, 4))
    one, two = torch.randn(1, 3, 32, 32), torch.randn(2, 3, 32, 32)
    needed = r"features\(x\) are \[2, 8, 30, 30\]; \[N, D\] is needed"
    for function, *arguments, told in [
        (dhkd.ResNet, 2, (4, 4, 8, 8), 3, "depth is 2"),
        (dhkd.ResNet, 9, (4, 4, 8, 8), 3, "depth is 9"),
        (dhkd.DualHead, student, 4, "none", "auxiliary head is 'none'"),
        (dhkd.DualHead, student, 5, "4 outputs; num_classes is 5"),
        (dhkd.DualHead, nn.Linear(3, 4), 4, "Linear needs features"),
        (dhkd.DualHead(map_of_features, 4), two, needed),
        (dhkd.DualHead(student, 4, "mlp"), one, "more than 1 value per channel"),
        (dhkd.align_gradients, torch.ones(3), torch.ones(2), r"\[3\] and \[2\]"),
    ]:
        with pytest.raises(ValueError, match=told):
            function(*arguments)


# --- the experiment -------------------------------------------------------------------------------

SIZES = {"train_per_class": 4, "val_per_class": 1, "test_per_class": 2, "batch_size": 20}
TINY = replace(dhkd.SMALL, **SIZES, epochs=1, probe_every=4, lr=0.05, alpha=1.0, augment="none")


def make_job(folder, arm, config=TINY, seed=0, **options):
    run = common.Run("dual_head_kd", "small", "cpu", torch.float32, [0], folder, config, **options)
    (folder / "arms").mkdir(exist_ok=True)
    return common.Job(run, arm, seed)


def test_learning_rate_falls_at_the_milestones_of_the_paper(monkeypatch, tmp_path):
    seen = {}

    def look(model, loss_fn, steps, **options):
        seen.update(options, steps=steps)

    monkeypatch.setattr(common, "train", look)
    data = images.fine_grained(0, 2, 0, 1)
    changes = {"data": "generated", "batch_size": 50, "head_lr_mult": 0.2, "test_every": 0}
    config = replace(dhkd.FULL, **changes)  # 2 steps an epoch
    job = make_job(tmp_path, "ce", config)
    dhkd.fit(dhkd.make_model("resnet8", 50, 1, 0), None, config.lr, data, job, augmented=False)
    assert seen["steps"] == 480
    falls = {1: 1, 150: 1, 151: 0.1, 180: 0.1, 181: 0.01, 210: 0.01, 211: 0.001, 240: 0.001}
    for epoch, factor in falls.items():
        for step in (2 * epoch - 2, 2 * epoch - 1):
            assert seen["schedule"](step) == pytest.approx(factor), epoch
    backbone, heads = seen["optimizer"].param_groups
    assert (backbone["lr"], heads["lr"]) == (0.05, pytest.approx(0.01))
    assert len(heads["params"]) == 2 and backbone["momentum"] == 0.9
    assert backbone["weight_decay"] == heads["weight_decay"] == 5e-4
    assert seen["clip"] is None
    dual = dhkd.DualHead(dhkd.make_model("resnet8", 50, 1, 0), 50, "mlp")
    dhkd.fit(dual, None, config.lr, data, job, augmented=False)
    heads = seen["optimizer"].param_groups[1]["params"]
    own = (*dual.student.fc.parameters(), *dual.aux.parameters())
    assert {id(p) for p in heads} == {id(p) for p in own}


def trained(folder, config, arm):
    """A student's result and exported weights; the teacher beside it is trained once."""
    job = make_job(folder, arm, config)
    teacher = job.other("teacher")
    if not teacher.path(".pt").exists():
        dhkd.train_teacher(teacher)
    result = dhkd.train_student(job)
    return result, common.load(job.path(".pt"))


def test_with_alpha_0_two_heads_follow_cross_entropy_alone(tmp_path):
    config = replace(TINY, alpha=0.0)
    alone, weights = trained(tmp_path, config, "ce")
    two, two_weights = trained(tmp_path, config, "dhkd")
    assert all(torch.equal(weights[name], two_weights[name]) for name in weights)
    assert two["accuracy"] == alone["accuracy"] and two["export_difference"] == 0
    assert two["parameters"] == alone["parameters"] and two["flops"] == alone["flops"]
    other = trained(tmp_path, replace(TINY, alpha=0.1), "dhkd")[1]
    assert not torch.equal(other["conv.weight"], weights["conv.weight"])


def test_arms_train_on_the_loss_their_name_says(tmp_path):
    """The first logged loss of each arm, worked out again from the first batch."""
    one_step = replace(TINY, steps=1)
    job = make_job(tmp_path, "ce", one_step)
    dhkd.train_teacher(job.other("teacher"))
    data = images.fine_grained(0, 4, 1, 2)
    x, y, index = images.batch_maker(data, 20, 0, False)(0)
    t = common.load(job.other("teacher").path("-logits.pt"))[index]
    student = dhkd.make_model("resnet8x0.5", 50, 2, 0)
    dual = dhkd.seeded(1_000_000, lambda: dhkd.DualHead(student, 50))
    s, aux = dual(x)
    ce = F.cross_entropy(s, y)
    expected = {
        "ce": ce,
        "kd": ce + dhkd.kd_loss(s, t, 4.0),
        "bkl": dhkd.binary_kl_loss(s, t, 2.0),
        "ce+bkl": ce + dhkd.binary_kl_loss(s, t, 2.0),
        "dual-bkl": ce + dhkd.binary_kl_loss(aux, t, 2.0),
        "dhkd": ce + dhkd.binary_kl_norm_loss(aux, t, 2.0),
        "bkln": dhkd.binary_kl_norm_loss(s, t, 2.0),
        "ce+bkln": ce + dhkd.binary_kl_norm_loss(s, t, 2.0),
        "dual-mse": ce + dhkd.mse_loss(aux, t),
        "kd-crd": 0.1 * ce + 0.9 * dhkd.kd_loss(s, t, 4.0),
        "dhkd-crd": 0.1 * ce + dhkd.binary_kl_norm_loss(aux, t, 2.0),
        "dkd": ce,  # the logit loss comes in from 0
        "dist": ce + 2 * dhkd.dist_loss(s, t, 4.0),
        "lskd": 0.1 * ce + 9 * dhkd.lskd_loss(s, t, 2.0),
        "dhkd@alpha=0.5": ce + 0.5 * dhkd.binary_kl_norm_loss(aux, t, 2.0),
    }
    assert {arm for arm in expected if "@" not in arm} | {"dhkd-mlp", "dhkd-ga"} == set(dhkd.ARMS)
    for arm, loss in expected.items():
        own = job.other(arm)
        dhkd.train_student(own)
        assert own.log()[0]["loss"] == pytest.approx(loss.item(), rel=1e-5), arm


def test_gradient_alignment_changes_the_run_only_where_losses_disagree(tmp_path, monkeypatch):
    def final(arm):  # few steps: rounding grows tenfold at each
        return trained(tmp_path, replace(TINY, steps=5), arm)[1]["conv.weight"]

    plain, aligned = final("dhkd"), final("dhkd-ga")
    assert not torch.equal(aligned, plain)
    monkeypatch.setattr(dhkd, "align_gradients", lambda first, second: first + second)
    torch.testing.assert_close(final("dhkd-ga"), plain, atol=1e-5, rtol=1e-4)


CROPS = {"none": [False, False], "teacher": [True, False], "all": [True, True]}


@pytest.mark.parametrize("augment", CROPS)
def test_teacher_is_frozen_and_left_as_it_was_whoever_sees_random_crops(
    tmp_path, monkeypatch, augment
):
    config, made, crops = replace(TINY, augment=augment), [], []
    make, batches = dhkd.make_model, images.batch_maker

    def look(data, batch_size, seed, augmented):
        crops.append(augmented)
        return batches(data, batch_size, seed, augmented)

    monkeypatch.setattr(dhkd, "make_model", lambda *given: made.append(make(*given)) or made[-1])
    monkeypatch.setattr(images, "batch_maker", look)
    job = make_job(tmp_path, "dhkd", config)
    teacher_job = job.other("teacher")
    dhkd.train_teacher(teacher_job)
    before = common.load(teacher_job.path(".pt"))
    data = images.fine_grained(0, 4, 1, 2)
    teacher = dhkd.load_teacher(data, job)
    x, _, index = batches(data, 20, 0, False)(0)
    made[-1].load_state_dict(before)
    expected = made[-1].eval()(x).detach()
    torch.testing.assert_close(teacher(x, index), expected, atol=1e-5, rtol=1e-5)
    del made[:]
    dhkd.train_student(job)
    assert crops == CROPS[augment]
    if augment == "all":
        teacher = next(model for model in made if not model.fc.weight.requires_grad)
        assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())
        assert all(torch.equal(before[name], v) for name, v in teacher.state_dict().items())
    after = common.load(teacher_job.path(".pt"))
    assert all(torch.equal(before[name], value) for name, value in after.items())


def test_arms_have_the_best_settings_that_are_written_down(tmp_path):
    """Its own lr and alpha; a setting in its name or the Config takes their place."""
    config = replace(TINY, lr=None, alpha=None, steps=1)
    result, _ = trained(tmp_path, config, "dhkd")
    assert (result["lr"], result["alpha"]) == (dhkd.ARMS["dhkd"].lr, dhkd.ARMS["dhkd"].alpha)
    result, _ = trained(tmp_path, config, "dhkd@lr=0.3,alpha=2")
    assert (result["lr"], result["alpha"]) == (0.3, 2.0)
    assert "alpha" not in trained(tmp_path, config, "ce")[0]
    assert (dhkd.FULL.lr, dhkd.FULL.alpha) == (0.05, 1.0)  # full scale: the official ones for all


def student(accuracy, cosines=(0.5, 0.1, 0.4), **more):
    probes = {name: [value, value] for name, value in zip(dhkd.PROBES, cosines)}
    result = {"accuracy": accuracy, **probes, "export_difference": 0.0, "parameters": 5, "flops": 7}
    return {**result, **more}


ACCURACY = {"ce": 80, "kd": 81, "kd-crd": 80.5, "dhkd-crd": 83, "bkl": 70, "ce+bkl": 60}
ACCURACY |= {"dual-bkl": 75, "dhkd": 82, "dkd": 81, "dist": 80, "lskd": 79, "ce+bkln": 81}
ACCURACY |= {arm: 70 if arm.startswith("dual") else 60 for arm in dhkd.DEMONSTRATION}
GOOD = {arm: student(float(accuracy)) for arm, accuracy in ACCURACY.items()}
WORSE = {  # claim: changes, each of which alone makes it fail
    "conflict": [{"ce+bkl": student(60.0, (0.5, 0.41, 0.4))}],
    "one_head_collapse": [{"ce": {"accuracy": 59.0}}],  # worse than only one of them
    "two_heads_recover": [{"dual-bkl": {"accuracy": 59.0}}],
    "beats_ce": [{"ce": {"accuracy": 83.0}}],
    "beats_kd": [{"kd-crd": {"accuracy": 84.0}}],
    "beats_rivals": [{"dist": {"accuracy": 83.0}}],
    "beats_one_head": [{"ce+bkln": {"accuracy": 83.0}}],
    "large_step": [{f"dual-bkl@{dhkd.LARGE_STEP}": {"accuracy": 59.0}}],
    "export": [
        {"ce": {"export_difference": 1e-3}},
        {"ce": {"parameters": 6}},
        {"ce": {"flops": 8}},
    ],
}


@pytest.mark.parametrize("num_seeds", [1, 3])
def test_every_claim_can_hold_and_can_fail(num_seeds):
    holding = check_claims(dhkd, dhkd.SMALL, GOOD, WORSE, num_seeds)
    assert "15.0" in holding["two_heads_recover"].measured
    assert "cosine 0.50" in holding["conflict"].measured


# --- the docstring --------------------------------------------------------------------------------


def test_the_worked_example_of_the_docstring():
    row = r"^    (student s|teacher t|cross-entropy|BinaryKL) +([+-]?\d.*)$"
    numbers = {}
    for name, text in re.findall(row, dhkd.__doc__, re.M):
        numbers[name] = torch.tensor([float(word) for word in text.split()[:3]], dtype=F64)
    s, t, T = numbers["student s"], numbers["teacher t"], 2.0
    ce = torch.tensor([1.0, 0, 0], dtype=F64) - s.softmax(0)
    bkl = T * (torch.sigmoid(t / T) - torch.sigmoid(s / T))
    torch.testing.assert_close(numbers["cross-entropy"], ce, atol=0.005, rtol=0)
    torch.testing.assert_close(numbers["BinaryKL"], bkl, atol=0.005, rtol=0)
    # and they are the steps that the losses really take
    y = torch.tensor([0])
    steps = [-gradient(F.cross_entropy, s[None], y)]
    steps += [-gradient(dhkd.binary_kl_loss, s[None], t[None], T)]
    torch.testing.assert_close(torch.cat(steps), torch.stack([ce, bkl]))


# --- the script -----------------------------------------------------------------------------------


def test_script_end_to_end_with_every_arm(tiny_run):
    done = tiny_run(dhkd)
    verdicts = {claim["id"].partition(".")[2]: claim["verdict"] for claim in done.report["claims"]}
    assert set(verdicts) == set(WORSE) and verdicts["export"] == "passed"
    assert "not measured" not in verdicts.values()
    arms = [*dhkd.DEFAULT, *dhkd.MORE, *dhkd.DEMONSTRATION]
    assert set(done.arms) == {"teacher", *arms}
    assert "generated-0" in done.report["data"] and "validation" in done.stdout


def test_full_scale_on_a_folder_of_photographs(command_line, tmp_path):
    labels = [i % 5 for i in range(60)]
    write_cifar100(tmp_path / "photos", train=labels, test=labels[:20])
    flags = "--full --data photos --teacher resnet8x0.5 --student resnet8x0.5 --epochs 2 "
    flags += "--batch-size 20 --stem-stride 2 --probe-every 2 --workers 1 --threads 1"
    done = command_line(dhkd, *flags.split())
    assert done.returncode == 0, done.stderr
    out = tmp_path / "runs" / "dual_head_kd-full"
    first = report(out)
    assert first["scale"] == "full" and list(first["data"]) == ["photos"]
    assert "best epoch" in done.stdout and "photos images" in done.stdout
    result = first["results"]["arms"]["dhkd"][0]
    assert (result["lr"], result["alpha"]) == (0.05, 1.0)
    lines = (out / "arms" / "dhkd-seed0.jsonl").read_text().splitlines()
    tested = [json.loads(line)["test"] for line in lines if '"test"' in line]
    assert dhkd.load_trained(out / "arms" / "dhkd-seed0.pt").fc.out_features == 5
    assert result["best_accuracy"] == max(tested)
    assert result["accuracy"] == pytest.approx(tested[-1])  # the last epoch is what counts
    verdicts = {claim["verdict"] for claim in first["claims"] if claim["required"]}
    assert verdicts <= {"seen", "not seen"}
    # The teacher is trained once and reused: by another seed, and by another run.
    assert not (out / "arms" / "teacher-seed1.pt").exists()
    more = ["--arms", "ce,kd", "--seeds", 2, "--out", "again"]
    more += ["--teacher-file", out / "arms" / "teacher-seed0.pt"]
    done = command_line(dhkd, *flags.split(), *more)
    assert done.returncode == 0, done.stderr
    again = report(tmp_path / "again")
    assert again["results"]["arms"]["kd"][0] == first["results"]["arms"]["kd"][0]
    assert "teacher" in again["data"]
    arms = {path.name for path in (tmp_path / "again" / "arms").glob("teacher*")}
    assert arms == {"teacher-seed0.json", "teacher-seed0.pt"}


def test_an_arm_may_not_change_what_all_arms_share(command_line):
    for setting in ("teacher=resnet8", "teacher_lr=0.01", "train_per_class=9", "stem_stride=1"):
        done = command_line(dhkd, "--dry-run", "--arms", f"ce,dhkd@clip=1,{setting}")
        flag = "--" + setting.partition("=")[0].replace("_", "-")
        assert done.returncode == 2 and f"give {flag} to the whole run" in done.stderr


def test_every_seed_learns_from_one_teacher_of_photographs(command_line, tmp_path):
    """Also trained apart; in less than an epoch, after which nothing has been tested."""
    write_cifar100(tmp_path / "photos", train=[0, 1, 2] * 20, test=[0, 1, 2])
    flags = "--full --data photos --teacher resnet8x0.5 --student resnet8x0.5 --steps 2 "
    flags = f"{flags} --batch-size 20 --arms kd --workers 1 --threads 1".split()
    for more in (["--seed", 1, "--out", "one"], ["--seeds", 2, "--out", "both"]):
        assert command_line(dhkd, *flags, *more).returncode == 0
    one, both = (report(tmp_path / name)["results"]["arms"] for name in ("one", "both"))
    assert one["teacher"] == both["teacher"] and one["kd"] == both["kd"][1:]


def test_students_of_two_sizes_are_each_compared_with_their_own(command_line):
    arms = "ce,kd@student=resnet14,alpha=0.004"
    done = command_line(dhkd, *tiny.DUAL_HEAD_KD, "--arms", arms, "--workers", 1, "--threads", 1)
    assert re.search("passed +export: .*\\n.* 2 students of 2 networks", done.stdout)
    assert "  0.0040  " in done.stdout
