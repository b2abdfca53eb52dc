"""Dual-head distillation: losses by hand, what a head may touch. Claims: see test_house.py."""

import json
import math
import re
from dataclasses import replace

import pytest
import tiny
import torch
import torch.nn.functional as F
from conftest import report
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


def test_worked_examples():
    for loss, T, value in [
        (dhkd.binary_kl_loss, 2.0, 0.3950274267),
        (dhkd.binary_kl_norm_loss, 2.0, 0.5032519215),
        (dhkd.kd_loss, 4.0, 0.4732708958),
        (dhkd.kd_loss, 1.0, 0.1028164021),
    ]:
        near(loss(S, TEACHER, T), value)


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


def test_dist_equals_its_definition():
    s, t = random_logits()
    p, q = (s / 4).softmax(1), (t / 4).softmax(1)

    def distance(a, b):
        pairs = [1 - torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(a, b)]
        return torch.stack(pairs).mean()

    expected = 16 * (distance(p, q) + distance(p.T, q.T))
    torch.testing.assert_close(dhkd.dist_loss(s, t, 4.0), expected)


def test_logit_standardisation_is_kd_of_standard_logits():
    s, t = random_logits()
    standard = lambda z: (z - z.mean(1, keepdim=True)) / z.std(1, keepdim=True)
    expected = dhkd.kd_loss(standard(s), standard(t), 2.0)
    torch.testing.assert_close(dhkd.lskd_loss(s, t, 2.0), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", LOSSES)
def test_at_the_teachers_logits_loss_and_gradient_vanish_and_the_teacher_gets_none(name):
    s, t = random_logits()
    near(LOSSES[name](t, t), 0.0, 1e-12)
    near(gradient(LOSSES[name], t, t), torch.zeros_like(t), 1e-9)
    t.requires_grad_()
    loss = LOSSES[name](s.requires_grad_(), t)
    loss.backward()
    assert loss > 0.1 and t.grad is None and s.grad.abs().max() > 0


def test_far_logits_stay_finite_in_fp32():
    for value in (40.0, -80.0, 1e4, -1e4):
        s, t = torch.full((1, 3), value, requires_grad=True), torch.zeros(1, 3)
        for loss in (dhkd.binary_kl_loss, dhkd.binary_kl_norm_loss):
            (slope,) = torch.autograd.grad(loss(s, t, 2.0), s)
            assert torch.isfinite(slope).all() and slope.abs().min() > 0.1
            assert torch.isfinite(loss(s, t, 2.0)) and torch.isfinite(loss(t, s.detach(), 2.0))


def test_bad_logits_temperatures_and_labels_are_refused():
    s, t = random_logits()
    for loss, *given, message in [
        (dhkd.kd_loss, t[:, :1], r"student logits are \[6, 5\], teacher logits"),
        (dhkd.binary_kl_loss, t, 0.0, "T is 0.0"),
        (dhkd.dkd_loss, t, torch.arange(6) % 5 + 1, "y has labels 1 .. 5; 5 classes"),
    ]:
        with pytest.raises(ValueError, match=message):
            loss(s, *given)


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


def test_a_step_along_aligned_gradients_follows_cross_entropy():
    student = dhkd.make_model("resnet8x0.5", 4, 2, 0)
    model = dhkd.DualHead(student, 4)
    model.aux.load_state_dict(student.fc.state_dict())
    y = torch.arange(6) % 4
    main, aux = model(torch.randn(6, 3, 16, 16))
    ce, logit = F.cross_entropy(main, y), 4 * dhkd.binary_kl_norm_loss(aux, -9 * F.one_hot(y, 4))
    first, second = (dhkd.flat_gradient(loss, list(model.parameters())) for loss in (ce, logit))
    assert second @ first < 0
    dhkd.aligned_backward(model)((ce, logit))
    merged = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    expected = first + second - (second @ first) / (first @ first) * first
    torch.testing.assert_close(merged, expected)


def test_agreement_of_two_gradients():
    backbone = torch.ones(2, dtype=F64, requires_grad=True)
    head = torch.ones(2, 2, dtype=F64, requires_grad=True)
    first = (backbone * torch.tensor([1, 0])).sum() + (head * torch.tensor([[1, 0], [1, 1]])).sum()
    second = (backbone * torch.tensor([1, 1])).sum()
    second = second + (head * torch.tensor([[-1, 0], [1, 1]])).sum()
    found = dhkd.gradient_agreement(first, second, [backbone], head)
    near(torch.stack(found[:2]), [1 / math.sqrt(2), 1 / 3])
    assert float(found[2]) == 0.5


PUBLISHED = {"resnet20": 278_324, "resnet32": 472_756, "resnet56": 861_620}
PUBLISHED |= {"resnet110": 1_736_564, "resnet8x4": 1_233_540, "resnet32x4": 7_433_860}


def test_parameters_are_the_published_ones():
    for name, parameters in PUBLISHED.items():
        student = dhkd.make_model(name, 100, 1, 0)
        assert common.count_parameters(student) == parameters
        width = student.fc.in_features
        for kind, count in ("linear", 100 * (width + 1)), ("mlp", {64: 33_500, 256: 71_900}[width]):
            dual = dhkd.DualHead(student, 100, kind)
            assert common.count_parameters(dual) - parameters == count


def test_feature_maps_halve_twice():
    model, sizes = dhkd.make_model("resnet20", 10, 1, 0), []
    for block in model.blocks:
        block.register_forward_hook(lambda module, given, out: sizes.append(tuple(out.shape[1:])))
    assert model.features(torch.randn(2, 3, 32, 32)).shape == (2, 64)
    assert sizes == [(16, 32, 32)] * 3 + [(32, 16, 16)] * 3 + [(64, 8, 8)] * 3


def test_features_that_are_a_map_are_refused():
    dual = dhkd.DualHead(dhkd.Student(nn.Conv2d(3, 8, 3), nn.Linear(8, 4)), 4)
    with pytest.raises(ValueError, match=r"\[N, D\] is needed"):
        dual(torch.randn(2, 3, 32, 32))


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
        assert seen["schedule"](2 * epoch - 2) == pytest.approx(factor), epoch
        assert seen["schedule"](2 * epoch - 1) == pytest.approx(factor), epoch
    backbone, heads = seen["optimizer"].param_groups
    assert (backbone["lr"], heads["lr"]) == (0.05, pytest.approx(0.01))
    assert len(heads["params"]) == 2 and backbone["momentum"] == 0.9
    assert backbone["weight_decay"] == heads["weight_decay"] == 5e-4
    assert seen["clip"] is None


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


@pytest.mark.parametrize("augment, crops", [("none", [False, False]), ("all", [True, True])])
def test_teacher_is_frozen_whoever_sees_random_crops(tmp_path, monkeypatch, augment, crops):
    seen, batches = [], images.batch_maker

    def look(data, batch_size, seed, augmented):
        seen.append(augmented)
        return batches(data, batch_size, seed, augmented)

    monkeypatch.setattr(images, "batch_maker", look)
    job = make_job(tmp_path, "dhkd", replace(TINY, augment=augment))
    teacher_job = job.other("teacher")
    dhkd.train_teacher(teacher_job)
    before = common.load(teacher_job.path(".pt"))
    data = images.fine_grained(0, 4, 1, 2)
    x, _, index = batches(data, 20, 0, False)(0)
    logits = dhkd.load_teacher(data, job)(x, index)
    expected = dhkd.rebuild(teacher_job, before).eval()(x).detach()
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    dhkd.train_student(job)
    assert not logits.requires_grad and seen == crops


def test_arms_have_the_best_settings_that_are_written_down(tmp_path):
    """Its own lr and alpha; a setting in its name or the Config takes their place."""
    config = replace(TINY, lr=None, alpha=None, steps=1)
    result, _ = trained(tmp_path, config, "dhkd")
    assert (result["lr"], result["alpha"]) == (dhkd.ARMS["dhkd"].lr, dhkd.ARMS["dhkd"].alpha)
    result, _ = trained(tmp_path, config, "dhkd@lr=0.3,alpha=2")
    assert (result["lr"], result["alpha"]) == (0.3, 2.0)


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


def test_script_end_to_end_with_every_arm(tiny_run):
    verdicts = {claim["id"]: claim["verdict"] for claim in tiny_run(dhkd).report["claims"]}
    assert verdicts["dual_head_kd.export"] == "passed"
    assert "not measured" not in verdicts.values()


def test_full_scale_on_a_folder_of_photographs(command_line, tmp_path):
    labels = [i % 5 for i in range(60)]
    write_cifar100(tmp_path / "photos", train=labels, test=labels[:20])
    flags = "--full --data photos --teacher resnet8x0.5 --student resnet8x0.5 --epochs 2 "
    flags += "--batch-size 20 --stem-stride 2 --probe-every 2 --workers 1 --threads 1 --arms "
    done = command_line(dhkd, *flags.split(), "ce,dhkd")
    assert done.returncode == 0, done.stderr
    out = tmp_path / "runs" / "dual_head_kd-full"
    first = report(out)["results"]["arms"]
    assert (first["dhkd"][0]["lr"], first["dhkd"][0]["alpha"]) == (0.05, 1.0)
    lines = (out / "arms" / "dhkd-seed0.jsonl").read_text().splitlines()
    tested = [json.loads(line)["test"] for line in lines if '"test"' in line]
    assert first["dhkd"][0]["best_accuracy"] == max(tested)
    assert first["dhkd"][0]["accuracy"] == pytest.approx(tested[-1])  # the last epoch counts
    # The teacher is trained once and reused: by another seed, and by another run.
    more = ["ce", "dhkd", "--seeds", 2, "--out", "again"]
    more += ["--teacher-file", out / "arms" / "teacher-seed0.pt"]
    assert command_line(dhkd, *flags.split(), *more).returncode == 0
    again = report(tmp_path / "again")
    assert again["results"]["arms"]["dhkd"][0] == first["dhkd"][0] and "teacher" in again["data"]


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
