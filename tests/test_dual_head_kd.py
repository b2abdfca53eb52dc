"""Dual-head distillation: hand-worked losses and gradients, what each head may touch, and the experiment."""

import json
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from test_images import write_cifar100
from tiny import DUAL_HEAD_KD
from torch import nn

import common
import dual_head_kd as dhkd
from data import images

F64 = torch.float64
S = torch.tensor([[1, -2, 0.5], [0, 3, -1]], dtype=F64)
TEACHER = torch.tensor([[2, -1, 0], [-1, 4, -3]], dtype=F64)
Y = torch.tensor([0, 1])
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
    torch.testing.assert_close(value, torch.as_tensor(expected, dtype=value.dtype), atol=tolerance, rtol=0)


def gradient(loss, s, *rest):
    s = s.clone().requires_grad_()
    return torch.autograd.grad(loss(s, *rest), s)[0]


def random_logits(rows=6, classes=5, seed=0, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(2, rows, classes, generator=generator, dtype=F64)).unbind(0)


# --- losses --------------------------------------------------------------------------------------------------


def test_binary_kl_worked_example():
    near(dhkd.binary_kl_loss(S, TEACHER, 2.0), 0.3950274267)
    near(dhkd.binary_kl_loss(S, TEACHER, 1.0), 0.2369430890)
    expected = [[-0.1085992474, -0.1085992474, 0.0621765009], [0.1224593312, -0.0632226018, 0.1951151450]]
    near(gradient(dhkd.binary_kl_loss, S, TEACHER, 2.0), expected)


def test_binary_kl_norm_worked_example():
    near(dhkd.binary_kl_norm_loss(S, TEACHER, 2.0), 0.5032519215)
    near(dhkd.binary_kl_norm_loss(S, TEACHER, 1.0), 0.4725843310)
    expected = [[-0.1224593312, -0.1224593312, 0.0621765009], [0.1224593312, -0.1224593312, 0.2310585786]]
    near(gradient(dhkd.binary_kl_norm_loss, S, TEACHER, 2.0), expected)


def test_softmax_losses_worked_example():
    near(dhkd.kd_loss(S, TEACHER, 4.0), 0.4732708958)
    near(dhkd.kd_loss(S, TEACHER, 1.0), 0.1028164021)
    near(F.cross_entropy(S, Y), 0.2852404030)


@pytest.mark.parametrize("T", [0.5, 2.0, 4.0])
def test_binary_losses_equal_their_other_forms(T):
    s, t = random_logits()
    a, b = torch.sigmoid(s / T), torch.sigmoid(t / T)
    kl = b * (b / a).log() + (1 - b) * ((1 - b) / (1 - a)).log()
    torch.testing.assert_close(dhkd.binary_kl_loss(s, t, T), T * T * kl.sum() / 6)
    torch.testing.assert_close(gradient(dhkd.binary_kl_loss, s, t, T), T / 6 * (a - b))
    cosh = T * T / 6 * torch.cosh((s - t) / (2 * T)).log().sum()
    torch.testing.assert_close(dhkd.binary_kl_norm_loss(s, t, T), cosh)
    torch.testing.assert_close(gradient(dhkd.binary_kl_norm_loss, s, t, T), T / 12 * torch.tanh((s - t) / (2 * T)))


def test_decoupled_kd_and_dist_equal_their_definitions():
    s, t = random_logits()
    y, T, beta = torch.arange(6) % 5, 4.0, 2.0
    p, q = (s / T).softmax(1), (t / T).softmax(1)
    at = lambda z: z.gather(1, y[:, None])[:, 0]
    target = at(q) * (at(q) / at(p)).log() + (1 - at(q)) * ((1 - at(q)) / (1 - at(p))).log()
    rest = torch.ones_like(p, dtype=torch.bool).scatter(1, y[:, None], False)
    p_rest, q_rest = ((z[rest].view(6, 4)) / (1 - at(z))[:, None] for z in (p, q))
    within = (q_rest * (q_rest / p_rest).log()).sum(1)
    torch.testing.assert_close(dhkd.dkd_loss(s, t, y, T, beta), T * T * (target + beta * within).mean())
    # With beta = the teacher's weight of the rest, row by row, the two parts add up to plain KD.
    torch.testing.assert_close(dhkd.kd_loss(s, t, T), T * T * (target + (1 - at(q)) * within).mean())

    pearson = lambda a, b: torch.stack([1 - torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(a, b)]).mean()
    torch.testing.assert_close(dhkd.dist_loss(s, t, T), T * T * (pearson(p, q) + pearson(p.T, q.T)))


def test_logit_standardisation_ignores_shift_and_scale():
    s, t = random_logits()
    standard = lambda z: (z - z.mean(1, keepdim=True)) / z.std(1, keepdim=True)
    torch.testing.assert_close(
        dhkd.lskd_loss(s, t, 2.0), dhkd.kd_loss(standard(s), standard(t), 2.0), rtol=1e-5, atol=0
    )
    torch.testing.assert_close(dhkd.lskd_loss(s, t), dhkd.lskd_loss(3 * s + 1, t / 2 - 5), rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", LOSSES)
def test_at_the_teachers_logits_loss_and_gradient_vanish_and_the_teacher_gets_none(name):
    s, t = random_logits()
    near(LOSSES[name](t, t), 0.0, 1e-12)
    near(gradient(LOSSES[name], t, t), torch.zeros_like(t), 1e-9)
    t.requires_grad_()
    loss = LOSSES[name](s.requires_grad_(), t)
    loss.backward()
    assert loss > 0.1 and t.grad is None and s.grad.abs().max() > 0


def test_what_a_shift_of_the_logits_does():
    for shifted, plain in ((dhkd.binary_kl_norm_loss(S + 5, TEACHER + 5), dhkd.binary_kl_norm_loss(S, TEACHER)),
                           (dhkd.kd_loss(S + 5, TEACHER), dhkd.kd_loss(S, TEACHER))):  # fmt: skip
        torch.testing.assert_close(shifted, plain)
    near(dhkd.binary_kl_loss(S + 5, TEACHER + 5), 0.2337733290)
    near(dhkd.binary_kl_loss(S + 5, TEACHER), 7.7562555516)
    near(dhkd.binary_kl_norm_loss(S + 5, TEACHER), 7.9744126172)


def test_logits_that_softmax_cannot_tell_apart():
    s, t = torch.tensor([[-2, -1, 0]], dtype=F64), torch.tensor([[2, 3, 4]], dtype=F64)
    near(dhkd.kd_loss(s, t), 0.0, 1e-12)
    near(dhkd.binary_kl_loss(s, t), 4.7909725653)
    near(dhkd.binary_kl_norm_loss(s, t), 5.2053699658)


def test_mean_over_the_batch_and_sum_over_classes():
    s, t = random_logits()
    for name in ("kd", "bkl", "bkln", "mse", "lskd"):
        torch.testing.assert_close(LOSSES[name](s.repeat(2, 1), t.repeat(2, 1)), LOSSES[name](s, t))
    for name in ("bkl", "bkln", "mse"):
        torch.testing.assert_close(LOSSES[name](s.repeat(1, 2), t.repeat(1, 2)), 2 * LOSSES[name](s, t))


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
    torch.testing.assert_close(dhkd.mse_loss(s, t), dhkd.binary_kl_norm_loss(s, t, 2.0), rtol=1e-3, atol=0)


@pytest.mark.parametrize("name", LOSSES)
def test_bad_logits_and_temperatures_are_refused(name):
    s, t = random_logits()
    for other in (t[:, :1], t[:1], t[0], t[None]):
        with pytest.raises(ValueError, match=r"student_logits are \[6, 5\], teacher_logits"):
            LOSSES[name](s, other)
    if name != "mse":
        for T in (0.0, -1.0, math.nan):
            with pytest.raises(ValueError, match=f"T is {T}"):
                LOSSES[name](s, t, T)


# --- gradients -----------------------------------------------------------------------------------------------


def test_alignment_worked_example():
    first, second = torch.tensor([3, 4, 1, 0], dtype=F64), torch.tensor([-1, -2, 0, 5], dtype=F64)
    merged = dhkd.align_gradients(first, second)
    near(merged, [3.2692307692, 3.6923076923, 1.4230769231, 5.0])
    near((merged - first) @ first, 0.0, 1e-12)  # what is left of the other no longer points against the reference
    shared = torch.tensor([True, True, False, False])
    merged = dhkd.align_gradients(first, second, shared)
    near(merged, [3.32, 3.76, 1.0, 5.0])
    near((merged - first)[shared] @ first[shared], 0.0, 1e-12)


def test_alignment_leaves_agreeing_and_empty_gradients_alone():
    first, second = torch.tensor([1, 2, 0], dtype=F64), torch.tensor([1, 0, -3], dtype=F64)
    assert torch.equal(dhkd.align_gradients(first, second), first + second)
    assert torch.equal(dhkd.align_gradients(torch.zeros(3, dtype=F64), second), second)
    with pytest.raises(ValueError, match=r"\[3\] and \[2\]"):
        dhkd.align_gradients(first, second[:2])


def test_agreement_of_two_gradients():
    backbone, head = torch.ones(2, dtype=F64, requires_grad=True), torch.ones(2, 2, dtype=F64, requires_grad=True)
    first = (backbone * torch.tensor([1, 0])).sum() + (head * torch.tensor([[1, 0], [1, 1]])).sum()
    second = (backbone * torch.tensor([1, 1])).sum() + (head * torch.tensor([[-1, 0], [1, 1]])).sum()
    found = dhkd.gradient_agreement(first, second, [backbone], head)
    near(torch.stack(found[:2]), [1 / math.sqrt(2), 1 / 3])
    assert float(found[2]) == 0.5


def small_student(seed=0, classes=4, aux="linear"):
    model, student = dhkd.make_student(dhkd.SMALL, dhkd.Arm(aux=aux), classes, seed)
    return model.train(), student, torch.randn(6, 3, 16, 16), torch.arange(6) % classes


def test_each_loss_reaches_its_head_and_both_reach_the_backbone():
    model, student, x, y = small_student()
    main, aux = model(x)
    losses = {"ce": F.cross_entropy(main, y), "logit": dhkd.binary_kl_norm_loss(aux, torch.randn(6, 4))}
    for name, loss in losses.items():
        model.zero_grad()
        loss.backward(retain_graph=True)
        own, other = (student.fc, model.aux) if name == "ce" else (model.aux, student.fc)
        assert other.weight.grad is None and own.weight.grad.any() and student.conv.weight.grad.any()
    assert not any("aux" in name for name, _ in small_student(aux="")[0].named_parameters())


def test_aligned_backward_equals_the_flat_formula():
    for kind in ("whole", "backbone"):
        model, student, x, y = small_student()
        model.aux.load_state_dict(student.fc.state_dict())
        main, aux = model(x)
        ce, logit = F.cross_entropy(main, y), 4 * dhkd.binary_kl_norm_loss(aux, -9 * F.one_hot(y, 4))  # against y
        backbone = [p for name, p in student.named_parameters() if not name.startswith("fc.")]
        first, second = (dhkd.flat_gradient(loss, list(model.parameters())) for loss in (ce, logit))
        dhkd.aligned_backward(model, backbone if kind == "backbone" else None)((ce, logit))
        merged = torch.cat([p.grad.flatten() for p in model.parameters()])
        inside = torch.cat([torch.full_like(p, any(p is q for q in backbone)).flatten() for p in model.parameters()])
        against = first if kind == "whole" else first * inside
        assert second @ against < 0
        torch.testing.assert_close(merged, first + second - (second @ against) / (against @ against) * against)


# --- models --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, parameters",
    [
        ("resnet20", 278_324),
        ("resnet32", 472_756),
        ("resnet56", 861_620),
        ("resnet110", 1_736_564),
        ("resnet8x4", 1_233_540),
        ("resnet32x4", 7_433_860),
    ],
)
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
    assert dhkd.ResNet(8, (4, 4, 4, 4), 3)(torch.randn(2, 3, 8, 8)).shape == (2, 3)  # strides without new widths
    h = model.features(torch.randn(2, 3, 32, 32))
    assert sizes == [(16, 32, 32)] * 3 + [(32, 16, 16)] * 3 + [(64, 8, 8)] * 3 and h.shape == (2, 64)
    torch.testing.assert_close(model(torch.ones(2, 3, 32, 32)), model.fc(model.features(torch.ones(2, 3, 32, 32))))


def test_any_module_with_features_and_fc_can_be_the_student():
    class Tiny(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.fc = nn.Linear(7, 5), nn.Linear(5, 3)

        def features(self, x):
            return self.body(x).relu()

    model, x = dhkd.DualHead(Tiny(), 3, "mlp"), torch.randn(4, 7)
    main, aux = model(x)
    assert main.shape == aux.shape == (4, 3)
    assert torch.equal(model.eval()(x), main)


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
    for depth in (2, 9, 18, 21):
        with pytest.raises(ValueError, match=f"depth is {depth}"):
            dhkd.ResNet(depth, (4, 4, 8, 8), 3)
    student = dhkd.make_model("resnet8", 4, 1, 0)
    with pytest.raises(ValueError, match="auxiliary head is 'none'"):
        dhkd.DualHead(student, 4, "none")
    with pytest.raises(ValueError, match="4 outputs; num_classes is 5"):
        dhkd.DualHead(student, 5)
    with pytest.raises(ValueError, match="Linear needs features"):
        dhkd.DualHead(nn.Linear(3, 4), 4)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        dhkd.DualHead(student, 4, "mlp")(torch.randn(1, 3, 32, 32))


# --- neural collapse -----------------------------------------------------------------------------------------


def test_neural_collapse_is_zero_at_its_end_and_not_before():
    simplex = torch.eye(4, dtype=F64) - 0.25
    y = torch.arange(12) % 4
    found = dhkd.neural_collapse(3 * simplex[y], y, 2 * simplex + 5)
    assert found["scatter"] == pytest.approx(0, abs=1e-12) and found["etf_distance"] == pytest.approx(0, abs=1e-12)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(4000, 4, dtype=F64, generator=generator)
    y = torch.arange(4000) % 4
    found = dhkd.neural_collapse(3 * simplex[y] + noise, y, torch.randn(4, 4, dtype=F64, generator=generator))
    # Within-class covariance I; between-class 9/4 on 3 of the 4 directions: tr / K = 3 / (9/4) / 4.
    assert found["scatter"] == pytest.approx(1 / 3, rel=0.05) and found["etf_distance"] > 0.3


# --- the experiment ------------------------------------------------------------------------------------------

TINY = replace(
    dhkd.SMALL, epochs=1, train_per_class=4, val_per_class=1, test_per_class=2, batch_size=20, probe_every=4, lr=0.05
)
TINY_STEPS = 10


def make_run(tmp_path, config=TINY, **options):
    run = common.Run("dual_head_kd", "small", "cpu", torch.float32, [0], tmp_path, config=config, **options)
    (tmp_path / "arms").mkdir(exist_ok=True)
    return run


def test_learning_rate_falls_at_the_milestones_of_the_paper(monkeypatch, tmp_path):
    seen = {}
    monkeypatch.setattr(common, "train", lambda model, loss_fn, steps, **options: seen.update(options, steps=steps))
    data = images.fine_grained(0, 2, 0, 1)
    config = replace(dhkd.FULL, data="generated", batch_size=50)  # 2 steps an epoch
    arm = dhkd.Arm(lr=config.lr, head_lr_mult=0.2)
    dhkd.fit(dhkd.make_model("resnet8", 50, 1, 0), None, data, config, arm, "ce", 0, make_run(tmp_path))
    assert seen["steps"] == 480
    for epoch, factor in {1: 1, 150: 1, 151: 0.1, 180: 0.1, 181: 0.01, 210: 0.01, 211: 0.001, 240: 0.001}.items():
        for step in (2 * epoch - 2, 2 * epoch - 1):
            assert seen["schedule"](step) == pytest.approx(factor), epoch
    backbone, heads = seen["optimizer"].param_groups
    assert (backbone["lr"], heads["lr"]) == (0.05, pytest.approx(0.01)) and len(heads["params"]) == 2
    assert backbone["momentum"] == 0.9 and backbone["weight_decay"] == heads["weight_decay"] == 5e-4
    assert seen["clip"] is None
    dual = dhkd.make_student(TINY, dhkd.Arm(aux="mlp"), 50, 0)[0]
    dhkd.fit(dual, None, data, config, arm, "dhkd", 0, make_run(tmp_path))
    heads = seen["optimizer"].param_groups[1]["params"]
    assert {id(p) for p in heads} == {id(p) for p in (*dual.student.fc.parameters(), *dual.aux.parameters())}


def trained(tmp_path, config, arm, seed=0):
    """A student's result and exported weights; the teacher beside it is trained once."""
    run = make_run(tmp_path, config)
    if not run.path("teacher", 0, ".pt").exists():
        dhkd.train_teacher(config, "teacher", 0, run)
    result = dhkd.train_student(config, arm, seed, run)
    return result, common.load(run.path(arm, seed, ".pt"))


def test_with_alpha_0_two_heads_follow_cross_entropy_alone(tmp_path):
    config = replace(TINY, alpha=0.0)
    alone, weights = trained(tmp_path, config, "ce")
    two, two_weights = trained(tmp_path, config, "dhkd")
    assert all(torch.equal(weights[name], two_weights[name]) for name in weights)
    assert two["accuracy"] == alone["accuracy"] and two["export_difference"] == 0
    assert two["training_parameters"] - two["parameters"] == 50 * 33 and two["flops"] == alone["flops"]
    config = replace(TINY, alpha=0.1)
    assert not torch.equal(trained(tmp_path, config, "dhkd")[1]["conv.weight"], weights["conv.weight"])


def test_arms_train_on_the_loss_their_name_says(tmp_path):
    """The first logged loss of each arm, worked out again from the first batch."""
    run = make_run(tmp_path)
    dhkd.train_teacher(TINY, "teacher", 0, run)
    data = images.fine_grained(0, 4, 1, 2)
    x, y, index = images.batch_maker(data, 20, 0, False)(0)
    t = common.load(run.path("teacher", 0, "-logits.pt"))[index]
    student = dhkd.make_model("resnet8x0.5", 50, 2, 0)
    s = student(x)
    aux = dhkd.make_student(TINY, dhkd.Arm(aux="linear"), 50, 0)[0](x)[1]
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
        "dkd": ce,  # the logit loss comes in from 0
        "dist": ce + 2 * dhkd.dist_loss(s, t, 4.0),
        "lskd": 0.1 * ce + 9 * dhkd.lskd_loss(s, t, 2.0),
    }
    assert set(expected) | {"dhkd-mlp", "dhkd-ga"} == {name for name in dhkd.all_arms(TINY) if "@" not in name}
    for arm, loss in ((arm, loss.item()) for arm, loss in expected.items()):
        dhkd.train_student(replace(TINY, steps=1), arm, 0, run)
        logged = json.loads(run.path(arm, 0, ".jsonl").read_text().splitlines()[0])
        assert logged["loss"] == pytest.approx(loss, rel=1e-5), arm


def test_gradient_alignment_changes_the_run_only_where_losses_disagree(tmp_path, monkeypatch):
    def final(arm, **changes):  # few steps: rounding grows tenfold at each
        return trained(tmp_path, replace(TINY, steps=5, **changes), arm)[1]["conv.weight"]

    plain, whole, backbone = final("dhkd"), final("dhkd-ga"), final("dhkd-ga", align="backbone")
    assert not torch.equal(whole, plain) and not torch.equal(whole, backbone)
    monkeypatch.setattr(dhkd, "align_gradients", lambda first, second, shared: first + second)
    torch.testing.assert_close(final("dhkd-ga"), plain, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("augment", [False, True])
def test_teacher_is_frozen_and_left_bit_for_bit_as_it_was(tmp_path, monkeypatch, augment):
    config, teachers = replace(TINY, augment=augment), []
    make = dhkd.make_model
    monkeypatch.setattr(dhkd, "make_model", lambda *given: teachers.append(make(*given)) or teachers[-1])
    run = make_run(tmp_path, config)
    dhkd.train_teacher(config, "teacher", 0, run)
    before = common.load(run.path("teacher", 0, ".pt"))
    data = images.fine_grained(0, 4, 1, 2)
    teacher = dhkd.load_teacher(config, 0, data, run)
    x, _, index = images.batch_maker(data, 20, 0, False)(0)
    teachers[-1].load_state_dict(before)
    torch.testing.assert_close(teacher(x, index), teachers[-1].eval()(x).detach(), atol=1e-5, rtol=1e-5)
    del teachers[:]
    dhkd.train_student(config, "dhkd", 0, run)
    if augment:
        teacher = next(model for model in teachers if not model.fc.weight.requires_grad)
        assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())
        assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())
    assert all(torch.equal(before[name], value) for name, value in common.load(run.path("teacher", 0, ".pt")).items())


def test_arms_are_what_their_names_say():
    arms = dhkd.all_arms(dhkd.SMALL)
    base = {"lr": dhkd.SMALL.lr, "alpha": 1.0}
    assert arms["dhkd"] == dhkd.Arm("bkln", aux="linear", **base) and arms["ce"].alpha == 0
    assert arms["ce+bkl@head-lr0.2"] == dhkd.Arm("bkl", head_lr_mult=0.2, **base)
    assert arms["dual-bkl@clip1"] == dhkd.Arm("bkl", aux="linear", clip=1.0, **base)
    assert arms["dual-bkl@alpha0.3"] == dhkd.Arm("bkl", aux="linear", lr=dhkd.SMALL.lr, alpha=0.3)
    assert set(dhkd.chosen_arms(dhkd.SMALL, ablate=False)) == set(dhkd.DEFAULT)
    assert {"ce", "kd", "bkl", "ce+bkl", "dual-bkl", "dhkd", "dhkd-mlp", "dhkd-ga", "dual-mse"} < set(dhkd.TUNED)
    for name, (lr, alpha) in dhkd.TUNED.items():
        assert lr in dhkd.GRID["lr"] and alpha in (*dhkd.GRID["alpha"], 0.0)
        assert arms[f"{name}@tuned"] == replace(arms[name], lr=lr, alpha=alpha)
    grid = dhkd.chosen_arms(replace(dhkd.SMALL, tune=True), ablate=False)
    assert len(grid) == 15 * len(dhkd.GRID["lr"]) * len(dhkd.GRID["alpha"])
    assert grid["ce@lr0.5-alpha0.3"] == dhkd.Arm(lr=0.5, alpha=0.0)  # without a teacher alpha means nothing
    nonlinear = dhkd.all_arms(replace(dhkd.SMALL, aux="mlp"))
    assert [nonlinear[name].aux for name in ("dhkd", "dhkd-ga", "dual-bkl")] == ["mlp", "mlp", "linear"]
    assert not any("@lr" in name or "@tuned" in name for name in dhkd.all_arms(dhkd.FULL))


def student(accuracy, cosines=(0.5, 0.1, 0.4), **more):
    blocks = [accuracy - 0.01, accuracy + 0.01]
    result = {"accuracy": accuracy, "accuracy_blocks": blocks, "probes": [[0, *cosines], [20, *cosines]]}
    return result | {"export_difference": 0.0, "parameters": 5, "flops": 7, **more}


GOOD = {
    "ce": student(80.0),
    "bkl": student(70.0),
    "ce+bkl": student(60.0),
    "dual-bkl": student(75.0, aux_accuracy=70.0),
    "ce@tuned": student(80.0),
    "kd@tuned": student(81.0),
    "dhkd@tuned": student(82.0, aux_accuracy=70.0),
}
WORSE = {  # claim -> what has to change for it to fail
    "conflict": {"ce+bkl": student(60.0, (0.5, 0.41, 0.4))},
    "one_head_collapse": {"bkl": student(59.0)},
    "two_heads_recover": {"dual-bkl": student(59.0, aux_accuracy=70.0)},
    "beats_ce": {"ce@tuned": student(83.0)},
    "beats_kd": {"kd@tuned": student(83.0)},
    "export": {"dual-bkl": student(75.0, aux_accuracy=70.0, export_difference=1e-3)},
}


@pytest.mark.parametrize("num_seeds", [1, 3])
def test_every_claim_can_hold_and_can_fail(num_seeds, tmp_path):
    def judged(changes):
        claims = [replace(claim) for claim in dhkd.CLAIMS]
        run = make_run(tmp_path, ablate=True, claims=claims)
        run.seeds = [0] * num_seeds
        dhkd.judge(dhkd.SMALL, run, {arm: [result] * num_seeds for arm, result in (GOOD | changes).items()})
        return {claim.id.removeprefix("dhkd."): claim for claim in claims}

    good = judged({})
    assert set(good) == set(WORSE) and all(claim.holds for claim in good.values())
    assert "15.0" in good["two_heads_recover"].measured and "cosine 0.50" in good["conflict"].measured
    for id, changes in WORSE.items():
        assert judged(changes)[id].holds is False, id
    assert judged({"ce": student(80.0, parameters=6)})["export"].holds is False
    assert judged({"ce": student(59.0)})["one_head_collapse"].holds is False  # worse than only one of them


# --- the script ----------------------------------------------------------------------------------------------


def test_script_end_to_end_with_every_kind_of_arm(command_line, tmp_path):
    some = "ce,kd,bkl,ce+bkl,dual-bkl,dhkd,dhkd-mlp,dhkd-ga,dkd,dist,lskd,ce+bkl@clip1,ce@tuned,kd@tuned,dhkd@tuned"
    done = command_line(dhkd, *DUAL_HEAD_KD, "--arms", some, "--workers", 1)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "runs" / "dual_head_kd-small" / "results.json").read_text())
    assert [claim["id"] for claim in report["claims"]] == [claim.id for claim in dhkd.CLAIMS]
    assert all(claim["holds"] in (True, False) for claim in report["claims"])
    assert {claim["id"]: claim["holds"] for claim in report["claims"]}["dhkd.export"]
    assert {"teacher", *some.split(",")} == set(report["results"]["arms"])
    assert "generated-0" in report["data"] and "neural collapse" in done.stdout


def test_resumed_run_gives_the_same_numbers(command_line, tmp_path, monkeypatch):
    def results(out):
        report = json.loads((tmp_path / out / "results.json").read_text())
        return report["results"]["arms"], report["claims"]

    flags = [*DUAL_HEAD_KD, "--arms", "ce+bkl,dhkd-mlp", "--workers", 1]
    assert command_line(dhkd, *flags, "--out", "whole").returncode == 0
    train, calls = common.train, []

    def interrupted(model, loss_fn, steps, **options):
        calls.append(options["label"])
        options["checkpoint_seconds"] = 0.0
        if options["label"].startswith("dhkd-mlp") and len(calls) <= 3:
            train(model, loss_fn, steps, **options, stop_step=2)
            raise KeyboardInterrupt
        return train(model, loss_fn, steps, **options)

    monkeypatch.setattr(common, "train", interrupted)
    assert command_line(dhkd, *flags, "--out", "cut").returncode == 130
    done = command_line(dhkd, *flags, "--out", "cut", "--resume")
    assert done.returncode == 0 and calls[-1].startswith("dhkd-mlp") and len(calls) == 4
    assert results("cut") == results("whole")


def test_tuning_reads_validation_images_only(command_line, tmp_path, monkeypatch):
    def refuse(*given):
        raise AssertionError("test images were read")

    load = dhkd.load_images
    blank = lambda data: data._replace(test_x=torch.full_like(data.test_x, math.nan))
    monkeypatch.setattr(dhkd, "load_images", lambda *given: blank(load(*given)))
    monkeypatch.setattr(dhkd, "inference", refuse)
    monkeypatch.setattr(dhkd, "GRID", {"lr": (0.1, 1e30), "alpha": (0.3, 1.0)})
    done = command_line(dhkd, *DUAL_HEAD_KD, "--tune", "--arms", "ce,kd", "--workers", 1, "--seed", 100)
    assert done.returncode == 0, done.stderr
    assert "validation top-1" in done.stdout and "TUNED = {'ce': (" in done.stdout
    arms = json.loads((tmp_path / "runs" / "dual_head_kd-small" / "results.json").read_text())["results"]["arms"]
    assert len(arms) == 8 and arms["ce@lr0.1-alpha0.3"] == arms["ce@lr0.1-alpha1"]
    assert arms["kd@lr1e+30-alpha1"] == [{"val_accuracy": 0.0}] and "TUNED = {'ce': (0.1, " in done.stdout
    assert all(set(result) == {"val_accuracy"} for found in arms.values() for result in found)


def test_full_scale_on_a_folder_of_photographs(command_line, tmp_path):
    write_cifar100(tmp_path / "photos", train=[i % 5 for i in range(60)], test=[i % 5 for i in range(20)])
    flags = ["--full", "--data", "photos", "--pair", "resnet8x0.5-resnet8x0.5", "--epochs", 2]
    flags += ["--batch-size", 20, "--stem-stride", 2, "--probe-every", 2, "--workers", 1, "--threads", 1]
    done = command_line(dhkd, *flags, "--arms", "ce,kd,bkl,ce+bkl,dual-bkl,dhkd")
    assert done.returncode == 0, done.stderr
    out = tmp_path / "runs" / "dual_head_kd-full"
    report = json.loads((out / "results.json").read_text())
    assert report["scale"] == "full" and list(report["data"]) == ["photos"]
    assert "best epoch" in done.stdout and "photos images" in done.stdout
    epochs = json.loads((out / "arms" / "dhkd-seed0.epochs.json").read_text())
    result = report["results"]["arms"]["dhkd"][0]
    assert dhkd.load_trained(out / "arms" / "dhkd-seed0.pt").fc.out_features == 5
    assert set(epochs) == {"1", "2"} and result["best_accuracy"] == max(epochs.values())
    assert result["accuracy"] == pytest.approx(epochs["2"])  # the last epoch is what counts
    assert all(claim["holds"] in (True, False) for claim in report["claims"])
    # The teacher is trained once and reused: by another seed, and by another run.
    assert not (out / "arms" / "teacher-seed1.pt").exists()
    teacher = out / "arms" / "teacher-seed0.pt"
    done = command_line(dhkd, *flags, "--arms", "ce,kd", "--seeds", 2, "--teacher-file", teacher, "--out", "again")
    assert done.returncode == 0, done.stderr
    again = json.loads((tmp_path / "again" / "results.json").read_text())
    assert again["results"]["arms"]["kd"][0] == report["results"]["arms"]["kd"][0] and "teacher" in again["data"]
    arms = {path.name for path in (tmp_path / "again" / "arms").glob("teacher*")}
    assert arms == {"teacher-seed0.json", "teacher-seed0.pt"}


def test_dry_run_of_the_paper_downloads_nothing(command_line, tmp_path):
    flags = ["--full", "--dry-run", "--pair", "resnet8-resnet8", "--data-dir", "none", "--threads", 1]
    done = command_line(dhkd, *flags)
    assert done.returncode == 0 and "168,513,733" in done.stdout and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "flags, expected",
    [
        (["--temperatur", "1"], "--temperature"),
        (["--temperature", "0"], "temperature is 0.0"),
        (["--kd-temperature", "-1"], "kd_temperature is -1.0"),
        (["--alpha", "-1"], "alpha is -1.0"),
        (["--aux", "none"], "dhkd needs an auxiliary head"),
        (["--align", "some"], "align"),
        (["--pair", "resnet56"], "teacher-student"),
        (["--pair", "resnet14-resnet9"], "each one of resnet8"),
        (["--arms", "ce,dkhd"], "the nearest is 'dkd'"),
        (["--clip", "0"], "clip is 0.0"),
        (["--epochs", "0"], "epochs is 0"),
        (["--lr", "nan"], "invalid float value: 'nan'"),
        (["--batch-size", "1"], "batch_size is 1; a number of at least 2"),
        (["--batch-size", "5000"], "less than one batch"),
        (["--milestones", "0.5,2"], "milestones are"),
        (["--train-per-class", "0"], "train_per_class is 0"),
        (["--full", "--tune", "--data", "photos"], "--val-per-class"),
        (["--full", "--data", "nowhere"], "nowhere holds neither train.bin"),
        (["--full", "--data", "short"], "truncated"),
        (["--full", "--data", "photos", "--val-per-class", "4"], "smallest class has 4"),
        (["--teacher-file", "photos/none.pt"], "none.pt"),
        (["--teacher-file", "photos/train.bin"], "not a readable checkpoint"),
        (["--teacher-file", "other.pt"], "does not hold the weights of a resnet14"),
    ],
)
def test_mistakes_are_one_line_exit_code_2(command_line, tmp_path, flags, expected):
    write_cifar100(tmp_path / "photos")
    write_cifar100(tmp_path / "short")
    (tmp_path / "short" / "train.bin").write_bytes(b"123")
    torch.save(dhkd.make_model("resnet8", 50, 2, 0).state_dict(), tmp_path / "other.pt")
    done = command_line(dhkd, *flags, *(["--workers", "1"] if "--teacher-file" in flags else []))
    assert done.returncode == 2 and expected in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_wrong_checksum_of_the_download_is_one_line(command_line, tmp_path):
    (tmp_path / "cifar100").mkdir()
    (tmp_path / "cifar100" / "cifar-100-binary.tar.gz").write_bytes(b"not it")
    done = command_line(dhkd, "--full", "--data-dir", tmp_path)
    assert done.returncode != 0 and done.stderr.count("\n") == 1
    assert "has 6 bytes, not 168,513,733" in done.stderr and "by hand" in done.stderr


def test_diverging_training_is_one_line_and_exit_code_1(command_line):
    done = command_line(dhkd, *DUAL_HEAD_KD, "--teacher-lr", "1e30", "--workers", "1")
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "at step" in done.stderr
