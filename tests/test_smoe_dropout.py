"""SMoE-Dropout: the numbers of the hand-worked examples, and what the method promises."""

import json
import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import ROOT, check_claims, judged, report
from tiny import SMOE_DROPOUT

import common
import smoe_dropout as smoe

F64 = torch.float64
TINY = replace(
    smoe.SMALL, num_layers=1, d_model=16, d_ff=16, num_experts=4, k_min=2, num_heads=2, context=16,
    batch_size=4, steps=4, eval_bytes=512,
)  # fmt: skip


def tensor(*rows):
    return torch.tensor(rows, dtype=F64)


def layer(num_experts=4, d_model=6, d_ff=8, seed=0, router_init=1.0, init=0.5, **options):
    """In float64, with biases that are not 0."""
    generator = torch.Generator().manual_seed(seed)
    sizes = {"init": init, "router_init": router_init, "generator": generator}
    module = smoe.SMoEDropout(d_model, d_ff, num_experts, **sizes, **options).double()
    with torch.no_grad():
        for bias in (module.b1, module.b2):
            bias.copy_(torch.randn(bias.shape, generator=generator))
    return module


def by_hand(module, x):
    """One token, one expert at a time."""
    logits, out = x @ module.router.weight.T, []
    for token, scores in zip(x, logits):
        chosen = scores.topk(module.k).indices
        gates = scores[chosen].exp() / scores[chosen].exp().sum()
        y = 0
        for gate, expert in zip(gates, chosen):
            hidden = torch.relu(token @ module.w1[expert] + module.b1[expert])
            y = y + gate * (hidden @ module.w2[expert] + module.b2[expert])
        out.append(module.scale * y)
    return torch.stack(out)


def test_the_example_of_the_docstring():
    example = smoe.__doc__.split("In numbers:")[1].split("What does")[0]
    numbers = [list(map(float, part.split(","))) for part in re.findall(r"\[(.*?)\]", example)]
    logits, experts = tensor(*numbers)
    rows = re.findall(r"w at k = (\d) +\|(.*)", example)
    assert [k for k, _ in rows] == ["1", "2", "4"]
    for k, line in rows:
        index, gates = smoe.topk_gate(logits[None], int(k))
        weight = torch.zeros(4, dtype=F64).scatter(0, index[0], gates[0])
        shown = [float(cell or 0) for cell in map(str.strip, line.split("|"))]
        assert shown == pytest.approx([*weight.tolist(), float(weight @ experts)], abs=0.005)


@pytest.mark.parametrize("num_experts", [1, 2, 8])
@pytest.mark.parametrize("has_bias", [True, False])
def test_a_cut_dense_layer_is_the_dense_layer(num_experts, has_bias):
    generator = torch.Generator().manual_seed(0)
    shapes = ((6, 8), (8,), (8, 6), (6,))
    w1, b1, w2, b2 = (torch.randn(shape, generator=generator, dtype=F64) for shape in shapes)
    x = torch.randn(30, 6, dtype=F64)
    dense = torch.relu(x @ w1 + b1 * has_bias) @ w2 + b2 * has_bias
    if not has_bias:
        b1 = b2 = None
    parts = smoe.split_dense(w1, b1, w2, b2, num_experts)
    for part, whole in zip(parts, (w1, b1, w2, b2)):  # training experts leaves the dense one alone
        assert (
            whole is None or part.untyped_storage().data_ptr() != whole.untyped_storage().data_ptr()
        )
    first, bias, second, out = parts
    summed = ((x @ first + bias[:, None]).relu() @ second + out[:, None]).sum(0)
    torch.testing.assert_close(summed, dense, atol=1e-12, rtol=0)
    module = layer(num_experts, router_init=0.0, scale=num_experts)  # equal gates
    module.load_dense(w1, b1, w2, b2)
    torch.testing.assert_close(module(x), dense, atol=1e-12, rtol=0)


def test_what_cannot_be_cut_built_or_routed_is_refused():
    w1, w2 = torch.zeros(8, 6), torch.zeros(6, 8)
    for function, *arguments, told in [
        (layer, 3, "d_ff is 8, num_experts 3"),
        (layer().load_dense, w1, None, w2, None, r"\[6, 8\] .* transposed"),
        (layer(), torch.zeros(2, 5, dtype=F64), "width 5.*d_model = 6"),
        (smoe.topk_gate, tensor([math.nan, 0, 0]), 2, "hold NaN or infinity"),
        (smoe.topk_gate, torch.zeros(1, 4), 2.5, "whole number from 1 to num_experts = 4"),
        (smoe.k_at, 0, 10, 9, 8, "k_min is"),
    ]:
        with pytest.raises(ValueError, match=told):
            function(*arguments)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_both_forms_equal_a_loop_forward_and_backward(k):
    """The gradient into x, through the experts and through the frozen gates, included."""
    x, found = torch.randn(37, 6, dtype=F64), []
    for backend in ("masked", "torch", None):
        module = layer(k=k, scale=3.0, backend=backend)
        inputs = x.clone().requires_grad_()
        y = by_hand(module, inputs) if backend is None else module(inputs)
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        found.append([y, *torch.autograd.grad(y.square().sum(), [inputs, *trained])])
    for masked, dispatched, reference in zip(*found):
        torch.testing.assert_close(masked, reference, atol=1e-10, rtol=1e-10)
        torch.testing.assert_close(dispatched, reference, atol=1e-10, rtol=1e-10)


def test_dropout_acts_in_training_only():
    for backend in ("masked", "torch"):
        module, x = layer(dropout=0.5, backend=backend), torch.ones(400, 6, dtype=F64)
        assert 0.4 < (module(x) == 0).double().mean() < 0.6
        torch.testing.assert_close(module.eval()(x), layer()(x))


def test_the_masked_form_in_bf16():
    x, form = torch.randn(9, 6).bfloat16(), layer(k=2, backend="masked").bfloat16()
    torch.testing.assert_close(form(x), layer(k=2).bfloat16()(x), atol=0.05, rtol=0.05)


def test_a_process_that_checks_alone_waits_for_nobody(monkeypatch):
    asked, module = [], layer(router="learned", balance=0.1)
    for name, does in (("is_initialized", lambda: True), ("get_world_size", lambda: 1)):
        monkeypatch.setattr(torch.distributed, name, does)
    monkeypatch.setattr(torch.distributed, "all_reduce", asked.append)
    for trains, times in ((True, 1), (False, 1)):
        with torch.set_grad_enabled(trains):
            module(torch.ones(3, 6, dtype=F64))
        assert len(asked) == times


def test_schedules():
    steps = (0, 25_000, 25_001, 74_999, 75_000, 200_000, 374_999, 375_000)
    assert [smoe.k_at(step, 400_000, 8, 16) for step in steps] == [8, 8, 9, 9, 10, 12, 15, 16]
    assert smoe.k_at(200_000, 400_000, 8, 16, "cosine") == 10
    different = 0
    for step in range(1000):
        official = round(-8 * 0.99 ** (step // 3)) + 16
        different += smoe.k_at(step, 1000, 8, 16, "exponential") != official
    assert different == 258 and "258 of 1000 differ" in smoe.__doc__


def test_effective_rank():
    assert smoe.effective_rank(torch.eye(4, dtype=F64)) == pytest.approx(4)
    assert smoe.effective_rank(torch.ones(5, 3, 2)) == pytest.approx(1)
    # singular values 3 and 1: shares 0.9 and 0.1 of the energy, exp(their entropy)
    assert smoe.effective_rank(tensor([3.0, 0], [0, 1.0])) == pytest.approx(0.9**-0.9 * 0.1**-0.1)


def test_balance_loss_worked_example():
    logits = tensor([2, 1, 0, -1], [0, 2, 1, -1])
    loss = smoe.load_balancing_loss(logits, smoe.topk_gate(logits, 2)[0])
    assert float(loss) == pytest.approx(1.4083399357, abs=1e-9)


def build(method, seed=0, **changes):
    return smoe.build(replace(TINY, **changes), method, seed)


def windows(num=32):
    return torch.randint(256, (num, TINY.context + 1), generator=torch.Generator().manual_seed(5))


def job_in(folder, arm, config=TINY, seed=0, **options):
    (folder / "arms").mkdir(exist_ok=True)
    where = ("smoe_dropout", "small", "cpu", torch.float32)
    return common.Job(common.Run(*where, [seed], folder, config, **options), arm, seed)


def test_bits_are_a_mean_over_bytes_at_the_k_asked_for():
    model, batch = build("smoe_dropout", num_layers=2), windows(70)  # batches of 64 and 6
    found = smoe.evaluate(model, batch, 2)
    assert [ffn.k for ffn in model.ffns()] == [2, 2]
    whole = common.lm_loss(model, batch).double().mean() / math.log(2)
    assert found == pytest.approx(whole.item(), rel=1e-6)
    with torch.no_grad():
        model.head.weight.zero_()
    assert smoe.evaluate(model, batch, 4) == pytest.approx(8.0)


def test_arms_are_what_their_names_say():
    spans = {"dense": (8, 8), "smoe_dropout": (4, 8), "learned_ramp": (4, 8)}
    spans |= {"learned_k2": (2, 2), "learned_half": (4, 4), "learned_full": (8, 8)}
    spans |= {"frozen_half": (4, 4), "frozen_full": (8, 8)}
    assert {arm: smoe.trained_k(arm, smoe.SMALL) for arm in smoe.ARMS} == spans
    for arm in set(spans) - {"dense"}:
        ffn = build(arm, scale=3.0, dropout=0.2).ffns()[0]
        assert (ffn.scale, ffn.dropout) == (3.0, 0.2)
        assert ffn.router.weight.requires_grad is arm.startswith("learned")


def test_training_follows_the_schedule_and_counts_what_ran(tmp_path, monkeypatch):
    config, used, loss = replace(TINY, steps=8), [], smoe.text_loss

    def watched(model, batch):
        used.append(getattr(model.ffns()[0], "k", None))
        return loss(model, batch)

    monkeypatch.setattr(smoe, "text_loss", watched)
    job = job_in(tmp_path, "smoe_dropout", config)
    result = smoe.train_arm(job)
    planned = [smoe.k_at(step, 8, 2, 4) for step in range(8)]
    assert [line["k"] for line in job.log()] == planned == used[:8]
    start, end = smoe.build(config, "smoe_dropout", 0).state_dict(), common.load(job.path(".pt"))
    for name, value in start.items():
        assert torch.equal(value, end[name]) is name.endswith("router.weight"), name
    expert = 2 * 2 * config.d_model * config.d_ff // config.num_experts  # FLOPs a byte, forward
    num_bytes = config.batch_size * config.context
    assert result["flops_4"] - result["flops_2"] == num_bytes * 3 * 2 * expert
    assert result["active_4"] - result["active_2"] == expert  # two matrices, twice
    for unit in ("flops", "seconds"):
        mean = np.mean([result[f"{unit}_{k}"] for k in planned])
        assert result[f"{unit}_growing"] == pytest.approx(mean)


def test_arms_train_on_the_same_batches_at_their_own_rate(tmp_path):
    found = []
    for arm, seed in (("dense", 0), ("smoe_dropout@lr=0.003", 0), ("smoe_dropout", 1)):
        job = job_in(tmp_path, arm, replace(TINY, lr_final=0.25), seed)
        found.append(smoe.text_task(job))
    assert [task.lr for task in found] == [6e-3, 3e-3, 6e-3]
    assert [task.schedule(TINY.steps - 1) for task in found] == pytest.approx([0.25] * 3)
    one, same, other = (task.batches(3) for task in found)
    assert torch.equal(one, same) and not torch.equal(one, other)


def test_settings_are_chosen_on_other_text_than_results_are_reported_on():
    text = torch.arange(250, dtype=torch.uint8)
    corpus = smoe.text_data.Corpus("counted", text[:50], text[50:], "", 1)
    to_choose, to_report = smoe.held_out(corpus, replace(TINY, eval_bytes=10_000))
    assert to_choose.max() < 150 <= to_report.min()
    assert to_choose.shape == to_report.shape == (6, 17)


def test_enwik8_is_split_as_published(tmp_path, monkeypatch):
    """A sparse file stands in: 90 million bytes train, the last 5 are reported."""
    monkeypatch.setattr(smoe.download, "fetch", lambda name, root: tmp_path)
    with open(tmp_path / "enwik8", "wb") as file:
        file.seek(95_000_000)
        file.write(b"test")
        file.truncate(100_000_000)
    run = common.Run("smoe_dropout", "full", "cpu", torch.float32, [0], tmp_path)
    corpus = smoe.load_corpus(smoe.FULL, run)
    assert len(corpus.train) == 90_000_000 and "a1fa5ffddb56" in corpus.digest
    _, to_report = smoe.held_out(corpus, smoe.FULL)
    assert bytes(to_report[0, :4].tolist()) == b"test" and len(to_report) == 9765


@pytest.fixture
def task_folder(tmp_path):
    """Twenty questions, and twenty problems of fold 1: adding up, or taking away."""
    questions, problems = [], ["Question,Numbers,Equation,Answer\n"]
    for i in range(20):
        choices = []
        for label, text in zip("ABCDE", ("tree", "sky", "sea", "car", "hat")):
            choices.append({"label": label, "text": text})
        question = {"stem": f"where {i}?", "choices": choices}
        questions.append(json.dumps({"answerKey": "ABCDE"[i % 5], "question": question}) + "\n")
        sign, answer = ("-", i + 4) if i % 2 else ("+", i + 6)
        problems.append(f"number0 {sign} number1 ?,{i + 5} 1,{sign} number0 number1,{answer}.0\n")
    for split in ("train", "dev"):
        files = {f"csqa/{split}_rand_split.jsonl": questions}
        files[f"svamp/cv_mawps/fold1/{split}.csv"] = problems
        for name, lines in files.items():
            path = tmp_path / "data" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(lines))
    return tmp_path / "data"


def test_fine_tuning_starts_from_the_arm_keeps_k_and_the_router(tmp_path, task_folder):
    config = replace(TINY, task_steps=3, task_bytes=48)
    source = job_in(tmp_path, "smoe_dropout@d_ff=32", config, data_dir=task_folder)
    smoe.train_arm(source)
    base = common.load(source.path(".pt"))
    job = source.other("smoe_dropout@d_ff=32,task=csqa,task_k=3")
    body = smoe.finetuning_task(job).model.body.state_dict()
    assert all(torch.equal(value, base[name]) for name, value in body.items())
    smoe.train_arm(job)
    (ffn,) = smoe.rebuild(job, common.load(job.path(".pt"))).body.ffns()
    assert torch.equal(ffn.router.weight, base["blocks.0.ffn.router.weight"])
    assert not torch.equal(ffn.w1, base["blocks.0.ffn.w1"])
    assert {line["k"] for line in job.log()} == {3} == {ffn.k}


def test_a_seed_sees_a_fold_of_its_own(tmp_path, task_folder):
    run = job_in(tmp_path, "dense", data_dir=task_folder).run
    config = replace(TINY, task="mawps", task_bytes=48)
    rows, classes, _, right = smoe.load_examples(config, 6, run)  # fold 1
    assert rows.shape == (20, 1, 48) and right.shape == (20, 2)
    assert right.double().argmax(1).equal(classes)
    rows, classes, _, right = smoe.load_examples(replace(config, task="csqa"), 6, run)
    assert rows.shape == (20, 5, 48) and bytes(rows[7, 2].tolist()).endswith(b"\nwhere 7? sea")
    assert classes[7] == 2 and right[7].tolist() == [False, False, True, False, False]


def trained(*bits, rank=3.0, **more):
    """bits: at k = 1, 2, 3, 4, or one number for a dense model."""
    ks = range(5 - len(bits), 5)
    return {**{f"bits_{k}": at_k for k, at_k in zip(ks, bits)}, "rank": rank, **more}


WORK = {"flops_growing": 8.0, "flops_4": 11.0, "flops_dense": 10.0}
WORK |= {"seconds_growing": 0.9, "seconds_dense": 1.0}


def method(*bits, **more):
    return trained(*bits, **{"rank": 3.5, **WORK, **more})


GOOD = {
    "dense": trained(2.3),
    "smoe_dropout": method(2.6, 2.4, 2.3, 2.2),
    "learned_k2": trained(2.5, 2.3, 2.35, 2.4),
    "learned_half": trained(2.5, 2.3, 2.35, 2.32, rank=3.2),
    "learned_ramp": trained(2.6, 2.43, 2.3, 2.25),
    "frozen_full": trained(2.6, 2.45, 2.3, 2.24),
}
for name in ("asdiv-a", "mawps", "svamp"):
    GOOD[f"dense@task={name}"] = {"accuracy": 50.0}
    GOOD[f"smoe_dropout@task={name}"] = {"accuracy": 52.0}
WORSE = {  # claim: what has to change for it to fail
    "slimmable": [{"smoe_dropout": {"bits_4": 2.41}}],
    "learned_overfits": [{"learned_half": {"bits_4": 2.29}}],
    "learned_overfits_two": [{"learned_k2": {"bits_4": 2.29}}],
    "beats_dense": [{"dense": {"bits_4": 2.1}}],
    "step_time": [{"smoe_dropout": {"seconds_growing": 1.1}}],
    "less_collapse": [{"learned_half": {"rank": 3.6}}],
    "router_matters": [{"learned_ramp": {"bits_2": 2.39, "bits_4": 2.3}}],
    "growth_matters": [{"frozen_full": {"bits_2": 2.5, "bits_4": 2.1}}],
    "transfer": [{"smoe_dropout@task=mawps": {"accuracy": 49.0}}],
    "compute": [{"smoe_dropout": {"flops_growing": 12.0}}],
}


def test_every_claim_can_hold_and_can_fail():
    holding = check_claims(smoe, TINY, GOOD, WORSE)
    assert holding["compute"].measured.startswith("20.0 % of training FLOPs saved")
    bent = GOOD | {"smoe_dropout": method(2.6, 2.4, 2.1, 2.39)}  # its last step is bad
    claim = judged(smoe, TINY, bent)["slimmable"]
    assert claim.verdict == "holds" and claim.margins == pytest.approx([0.01] * 3)


def test_the_script_with_every_arm(tiny_run, command_line):
    done = tiny_run(smoe)
    words = {claim["id"].partition(".")[2]: claim["verdict"] for claim in done.report["claims"]}
    assert [name for name, word in words.items() if word == "not measured"] == ["transfer"]
    written = command_line(smoe, *SMOE_DROPOUT, "--out", done.folder, "--sample", "class Ä")
    assert written.returncode == 0 and "class ?" in written.stdout


def test_full_scale_runs_on_a_file_and_is_fine_tuned_on_tasks(command_line, tmp_path, task_folder):
    """The official configuration but for sizes, dropout included."""
    lines = [f"<page> {i} the quick brown fox [[{i * i}]] </page>\n" for i in range(4000)]
    (tmp_path / "slice").write_text("".join(lines))
    flags = ["--full", *SMOE_DROPOUT, "--dropout", 0.1, "--text", "slice", "--out", "out"]
    flags += ["--tasks", "csqa", "--data-dir", task_folder, "--task-steps", 2]
    flags += ["--task-bytes", 32, "--workers", 1, "--threads", 1]
    assert command_line(smoe, *flags).returncode == 0
    before = report(tmp_path / "out")
    assert before["config"]["scale"] == 1.0 and "slice" in before["data"]
    arms = before["results"]["arms"]
    assert "dense@task=csqa" in arms and "frozen_full@task=csqa" not in arms


def test_the_page_cuts_a_gpt2():
    transformers = pytest.importorskip("transformers")
    page = (ROOT / "docs" / "smoe_dropout.md").read_text()
    (snippet,) = re.findall(r"```py\n(import transformers.*?)```", page, flags=re.DOTALL)
    torch.manual_seed(0)
    tokens = torch.randint(100, (2, 9))
    config = transformers.GPT2Config(n_layer=2, n_embd=64, n_head=4, vocab_size=100)
    gpt2 = transformers.GPT2LMHeadModel(config).eval()
    before = gpt2(tokens).logits
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformers.GPT2LMHeadModel, "from_pretrained", lambda name: gpt2)
        exec(snippet, {"torch": torch})
    assert len(smoe.moe_layers(gpt2)) == 2 and smoe.moe_layers(gpt2)[0].act == "gelu_new"
    smoe.set_k(gpt2, 8)
    torch.testing.assert_close(gpt2(tokens).logits, before, atol=2e-3, rtol=0)
    smoe.set_k(gpt2, 4)
    assert (gpt2(tokens).logits - before).abs().max() > 1e-2
