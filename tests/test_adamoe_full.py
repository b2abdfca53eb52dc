"""adamoe.py on pre-trained models and with LoRA experts: the added layers, and `--full` from files to claims.

Models and tokenizers are tiny, random, and made here with transformers; without it those tests are skipped.
"""

import copy
import importlib.util
import json
import math
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from forked import finished
from torch import nn

import adamoe
import bridge as common
import kernels
from data import pretrained, tasks

F64 = torch.float64

# --- the layers ----------------------------------------------------------------------------------------------


class Mixture(nn.Module):
    """What transformers' mixtures look like from outside."""

    def __init__(self, num_experts=4, d_model=6, d_ff=5, top_k=2, norm_topk_prob=None, dtype=F64):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        normal = lambda *shape: nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype))
        self.gate, self.experts = nn.Linear(d_model, num_experts, bias=False), nn.Module()
        self.gate.weight, self.gate.top_k = normal(num_experts, d_model), top_k
        if norm_topk_prob is not None:
            self.gate.norm_topk_prob = norm_topk_prob
        self.experts.gate_up_proj = normal(num_experts, 2 * d_ff, d_model)
        self.experts.down_proj = normal(num_experts, d_model, d_ff)


def patched(num_null=4, top_k=3, **options):
    module = nn.Sequential(Mixture(**{name: options.pop(name) for name in ("norm_topk_prob",) if name in options}))
    (layer,) = adamoe.add_null_experts(module, num_null, top_k, generator=torch.Generator().manual_seed(1), **options)
    assert module[0] is layer
    if layer.rank:  # B starts at zero, which would hide its half of the work
        for name, parameter in layer.named_parameters():
            if name.endswith("_b"):
                nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(2))
    return layer


def dense_reference(layer, x):
    """Every token alone, LoRA merged into the weights, every gate worked out with Python's exp."""
    merged = lambda w, name: (
        w + layer.lora_scale * getattr(layer, name + "_a") @ getattr(layer, name + "_b") if layer.rank else w
    )
    router = merged(torch.cat([layer.gate.weight, layer.null_rows]).T, "gate")
    w1, w2 = (
        merged(w.transpose(1, 2), n) for w, n in ((layer.experts.gate_up_proj, "up"), (layer.experts.down_proj, "down"))
    )
    out = []
    for token in x:
        logits = token @ router
        picks = [i for i in logits.topk(layer.top_k).indices.tolist() if i < layer.num_experts]
        chosen = picks if layer.normalize == "true_experts" else range(layer.num_experts)
        total = sum((logits[i].exp() for i in chosen), torch.zeros((), dtype=x.dtype))
        y = torch.zeros_like(token)
        for i in picks:
            gate, up = (token @ w1[i]).chunk(2)
            y = y + logits[i].exp() / total * ((F.silu(gate) * up) @ w2[i])
        out.append(y)
    return torch.stack(out)


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("norm_topk_prob", [None, True, False])
def test_patched_layer_and_its_gradients_equal_a_dense_reference(rank, norm_topk_prob):
    layer = patched(rank=rank, norm_topk_prob=norm_topk_prob, copy_rows=False)
    assert layer.normalize == ("none" if norm_topk_prob is False else "true_experts")
    x = torch.randn(40, 6, dtype=F64, generator=torch.Generator().manual_seed(3))
    weight = torch.randn(40, 6, dtype=F64)
    parameters = [p for p in layer.parameters() if p.requires_grad]
    got, expected = layer(x.view(4, 10, 6)).view(40, 6), dense_reference(layer, x)
    assert {0, 1, 2} <= set(layer.true_counts.tolist())
    torch.testing.assert_close(got, expected, atol=1e-12, rtol=1e-10)
    for ours, theirs in zip(
        *(torch.autograd.grad((y * weight).sum(), parameters, allow_unused=True) for y in (got, expected))
    ):
        torch.testing.assert_close(
            torch.zeros(1) if ours is None else ours, torch.zeros(1) if theirs is None else theirs
        )


def test_lora_freezes_the_model_and_starts_as_the_model():
    plain, lora = patched(), nn.Sequential(Mixture())
    (layer,) = adamoe.add_null_experts(lora, 4, 3, rank=2, generator=torch.Generator().manual_seed(1))
    x = torch.randn(30, 6, dtype=F64)
    torch.testing.assert_close(layer(x), plain(x))
    trained = {name for name, p in layer.named_parameters() if p.requires_grad}
    assert trained == {f"{where}_{side}" for where in ("gate", "up", "down") for side in "ab"}
    assert layer.up_a.abs().max() <= 6**-0.5 and layer.down_a.abs().max() <= 5**-0.5


def test_null_rows_are_copies_or_random_and_survive_half_precision():
    layer = patched()
    torch.testing.assert_close(layer.null_rows, layer.gate.weight, atol=0.02, rtol=0)
    assert not torch.equal(layer.null_rows, layer.gate.weight)
    fresh = patched(copy_rows=False)
    assert (fresh.null_rows - layer.gate.weight).abs().max() > 0.5
    half = nn.Sequential(Mixture().to(torch.bfloat16))
    (half,) = adamoe.add_null_experts(half, 4, 3)
    assert half.null_rows.dtype == torch.float32 and (half.null_rows != half.gate.weight).float().mean() > 0.9
    assert half(torch.randn(20, 6, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_rows_of_null_picks_are_not_even_gathered():
    layer, x = patched(rank=2), torch.randn(50, 6, dtype=F64)
    seen, gather = [], kernels.gather
    kernels.gather = lambda *given, **options: seen.append(gather(*given, **options)) or seen[-1]
    try:
        layer(x)
    finally:
        kernels.gather = gather
    assert len(seen[0]) == int(layer.true_counts.sum()) < 150
    flops = common.count_flops(lambda: layer(x))["Global"]
    a_row = 2 * (6 * 10 + 5 * 6 + 2 * (6 + 10) + 2 * (5 + 6))  # w1, w2, LoRA of each, rank 2
    assert flops == int(layer.true_counts.sum()) * a_row + 50 * 2 * (6 * 8 + 6 * 2 + 2 * 8)


def test_a_batch_of_null_picks_and_an_expert_full_of_nan():
    layer = patched(rank=2)
    with torch.no_grad():
        layer.gate_b.zero_()
        layer.null_rows[:3] = 50 * torch.ones(3, 6)
    y = layer(torch.rand(20, 6, dtype=F64) + 1)
    y.sum().backward()
    assert not y.any() and not layer.true_counts.any()
    layer, x = patched(rank=2), torch.randn(300, 6, dtype=F64)
    router = torch.cat([layer.gate.weight, layer.null_rows]).T + layer.lora_scale * layer.gate_a @ layer.gate_b
    unpicked = x[~((x @ router).topk(3).indices == 3).any(-1)]
    with torch.no_grad():
        layer.experts.gate_up_proj[3] = math.nan
    assert len(unpicked) > 20 and torch.isfinite(layer(unpicked)).all()


def test_padding_counts_neither_in_the_loss_nor_in_the_gradient():
    layer, x = patched(rank=2), torch.randn(2, 5, 6, dtype=F64)
    layer.token_mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]], dtype=torch.bool)
    layer(x)
    padded, layer.token_mask = layer.aux_loss, None
    layer(x[torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]], dtype=torch.bool)])
    torch.testing.assert_close(padded, layer.aux_loss)


def test_what_cannot_be_patched_is_refused():
    with pytest.raises(ValueError, match="Linear has no mixture"):
        adamoe.add_null_experts(nn.Linear(2, 2), 4)
    old = nn.Sequential(Mixture())
    del old[0].experts.gate_up_proj  # the layout of transformers 4: one module an expert
    with pytest.raises(ValueError, match="no mixture with gate.weight, experts.gate_up_proj"):
        adamoe.add_null_experts(old, 4)
    twice = nn.Sequential(Mixture())
    adamoe.add_null_experts(twice, 4)
    with pytest.raises(ValueError, match="already"):
        adamoe.add_null_experts(twice, 4)
    with pytest.raises(ValueError, match="top_k 9"):
        adamoe.add_null_experts(nn.Sequential(Mixture()), 4, 9)
    with pytest.raises(ValueError, match="act is 'tanh'"):
        adamoe.add_null_experts(nn.Sequential(Mixture()), 4, act="tanh")
    biased = nn.Sequential(Mixture())
    biased[0].gate.register_buffer(
        "e_score_correction_bias", torch.zeros(4)
    )  # as DeepSeek's, which also has no softmax
    with pytest.raises(ValueError, match="the gate has e_score_correction_bias"):
        adamoe.add_null_experts(biased, 4)
    turned = nn.Sequential(Mixture())
    turned[0].experts.gate_up_proj = nn.Parameter(turned[0].experts.gate_up_proj.transpose(1, 2).contiguous())
    with pytest.raises(ValueError, match=r"\[4, 6, 10\]"):
        adamoe.add_null_experts(turned, 4)


def test_lora_experts_equal_a_dense_reference():
    linear = nn.Linear(6, 7, bias=True).double()
    layer = adamoe.LoRAExperts(linear, 4, 5, 4, rank=2, lora_alpha=3.0, generator=torch.Generator().manual_seed(0))
    x = torch.randn(30, 6, dtype=F64)
    assert torch.equal(layer(x), linear(x))  # B starts at zero
    nn.init.normal_(layer.b)
    y = layer(x.view(3, 10, 6)).view(30, 7)
    index, gates = adamoe.route(x @ layer.router, 4, 4)
    expected = linear(x) + torch.stack(
        [
            sum(
                (1.5 * g * (x[t] @ layer.a[e] @ layer.b[e]) for e, g in zip(index[t], gates[t]) if e >= 0),
                torch.zeros(7),
            )
            for t in range(30)
        ]
    )
    torch.testing.assert_close(y, expected)
    assert {name for name, p in layer.named_parameters() if p.requires_grad} == {"a", "b", "router"}
    with torch.no_grad():
        layer.router[:, :4], layer.router[:, 4:] = -50, 50
    positive = torch.rand(9, 6, dtype=F64)
    assert torch.equal(layer(positive), linear(positive)) and not layer.true_counts.any()


SAME_OUTPUT = """
import torch, sys
sys.path.insert(0, "tests")
from test_adamoe_full import Mixture
import adamoe
normal = torch.Generator().manual_seed(3)
block = torch.nn.Sequential(Mixture(5, 16, 24, dtype=torch.float32))
(layer,) = adamoe.add_null_experts(block, 5, 3, rank=8, generator=normal)
for name, parameter in layer.named_parameters():
    if name.endswith("_b"):
        torch.nn.init.normal_(parameter, std=0.1, generator=normal)
x = torch.randn(70, 16, generator=normal)
def results(backend, dtype):
    layer.zero_grad()
    layer.to(dtype)
    layer.backend = backend
    given = x.to(dtype, copy=True).requires_grad_()
    y = layer(given)
    y.square().sum().backward()
    gradients = {name: p.grad for name, p in layer.named_parameters() if p.requires_grad}
    return {"y": y.detach(), "x": given.grad, **gradients}
fp32 = results("triton", torch.float32)
exact = results("torch", torch.float64)
assert len(fp32) == len(exact) == 8
for name, value in exact.items():
    # A single element may be the small difference of large terms; the norm of the tensor is as large as its terms.
    error = ((fp32[name].double() - value).norm() / value.norm()).item()
    assert error < 5e-6, f"{name}: relative error {error:.1e}"
"""


def test_the_triton_kernels_give_the_same_output_and_gradients():
    """The kernels run in triton's interpreter, on the CPU, on a dispatch without the rows of null picks."""
    pytest.importorskip("triton", minversion="3.7", reason="older interpreters do not run with NumPy 2.4")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SAME_OUTPUT]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


# --- pre-trained models --------------------------------------------------------------------------------------

SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2}
QUESTION = "where do fish live ?"
WORDS = "Answer Question A B C D E . : [UNK] sea tree sky car hat".split() + QUESTION.split()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """checkpoint("mixtral") -> a folder with a random model and a tokenizer of a few words."""
    transformers = pytest.importorskip("transformers", reason="pip install -r requirements-full.txt")
    from tokenizers import Tokenizer, models, pre_tokenizers

    configs = {
        "mixtral": lambda: transformers.MixtralConfig(**SIZES, num_local_experts=8, num_experts_per_tok=2),
        "olmoe": lambda: transformers.OlmoeConfig(**SIZES, num_experts=8, num_experts_per_tok=2),
        "qwen2_moe": lambda: transformers.Qwen2MoeConfig(
            **SIZES, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=16, shared_expert_intermediate_size=24
        ),
        "llama": lambda: transformers.LlamaConfig(**SIZES),
    }
    made = {}

    def make(family):
        if family not in made:
            torch.manual_seed(0)
            model = transformers.AutoModelForCausalLM.from_config(configs[family](), dtype=torch.float32)
            for name, parameter in model.named_parameters():
                if parameter.dim() > 1:  # larger than at birth, so that a difference shows
                    nn.init.normal_(parameter, std=1.0 if "gate.weight" in name else 0.1)
            made[family] = tmp_path_factory.mktemp(family)
            model.save_pretrained(made[family])
            tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(dict.fromkeys(WORDS))}, "[UNK]"))
            tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
            fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")
            fast.save_pretrained(made[family])
        return made[family]

    return make


@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("family", ["mixtral", "olmoe", "qwen2_moe"])
def test_without_nulls_a_patched_model_equals_the_model(checkpoint, family, rank):
    model = pretrained.load_causal(checkpoint(family), torch.float32)
    tokens, lengths = torch.randint(64, (3, 9)), torch.tensor([9, 4, 6])
    before = pretrained.last_logits(model, tokens, lengths)
    layers = adamoe.add_null_experts(model, 0, rank=rank)
    torch.testing.assert_close(pretrained.last_logits(model, tokens, lengths), before, atol=1e-5, rtol=0)
    assert len(layers) == 2 and layers[0].normalize == ("true_experts" if family == "mixtral" else "none")
    assert before.std() > 0.1
    adamoe.add_null_experts(other := pretrained.load_causal(checkpoint(family), torch.float32), 8, 3, rank=rank)
    assert (pretrained.last_logits(other, tokens, lengths) - before).abs().max() > 1e-2


def test_padding_on_the_right_changes_no_answer(checkpoint):
    model = pretrained.load_causal(checkpoint("mixtral"), torch.float32)
    adamoe.add_null_experts(model, 8, 3)
    tokens, lengths = torch.randint(64, (3, 9)), torch.tensor([9, 4, 6])
    together = pretrained.last_logits(model, tokens, lengths)
    for row, length, logits in zip(tokens, lengths, together):
        alone = pretrained.last_logits(model, row[None, :length], length[None])
        torch.testing.assert_close(alone[0], logits, atol=1e-5, rtol=0)


def test_checkpointed_activations_give_the_same_loss_and_gradients(checkpoint):
    found = []
    for checkpointed in (False, True):
        model = pretrained.load_causal(checkpoint("olmoe"), torch.float32)
        generator = torch.Generator().manual_seed(0)
        layers = adamoe.add_null_experts(model, 8, 3, rank=2, alpha=0.5, generator=generator)
        if checkpointed:
            model.activation_checkpointing_enable({"use_reentrant": False})
        batch = (torch.arange(18).view(2, 9), torch.tensor([9, 5]), torch.tensor([1, 0]))
        loss, parts = adamoe.answer_loss(model.train(), layers, torch.tensor([2, 3]), batch)
        assert loss.item() == pytest.approx(float(parts["answer_loss"] + parts["aux_loss"])) and parts["aux_loss"] > 0.5
        counts = torch.stack([layer.true_counts.view(2, 9) for layer in layers]).float()
        real = torch.cat([counts[:, 0], counts[:, 1, :5]], dim=1)  # four tokens are padding
        assert parts["load"] == real.mean() != counts.mean()
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters() if p.requires_grad)])
    for one, other in zip(*found):
        torch.testing.assert_close(one, other)
    assert all(gradient.any() for gradient in found[0][1:] if gradient.dim()) is False  # A waits for B
    assert any(gradient.any() for gradient in found[0][1:])


def test_what_was_added_is_saved_and_comes_back(checkpoint, tmp_path):
    model = pretrained.load_causal(checkpoint("mixtral"), torch.float32)
    layers = adamoe.add_null_experts(model, 8, 3, rank=2, generator=torch.Generator().manual_seed(5))
    for layer in layers:
        nn.init.normal_(layer.up_b)
    adamoe.save_null_experts(tmp_path / "added.npz", model, num_null=8, top_k=3, rank=2, lora_alpha=16.0)
    again = pretrained.load_causal(checkpoint("mixtral"), torch.float32)
    adamoe.load_null_experts(tmp_path / "added.npz", again)
    tokens, lengths = torch.randint(64, (2, 7)), torch.tensor([7, 7])
    assert torch.equal(*(pretrained.last_logits(m, tokens, lengths) for m in (model, again)))
    with pytest.raises(ValueError, match="added.npz does not fit this model"):
        adamoe.load_null_experts(tmp_path / "added.npz", nn.Sequential(Mixture(dtype=torch.float32)))


def test_shapes_of_the_published_models():
    pytest.importorskip("transformers", reason="pip install -r requirements-full.txt")
    expected = {adamoe.MIXTRAL: (46.7e9, 12.9e9, 0.884), adamoe.OLMOE: (6.92e9, 1.28e9, 0.68)}
    for name, (parameters, active, share) in expected.items():
        shape = pretrained.published_config(name)
        model = pretrained.random_causal(shape, torch.bfloat16, "meta")
        met = [common.count_parameters(model, k) for k in (shape.num_experts_per_tok, 0)]
        assert common.count_parameters(model) == pytest.approx(parameters, rel=0.01)
        assert met[0] == pytest.approx(active, rel=0.01)
        embedding = model.get_input_embeddings().weight.numel()
        assert 1 - (met[1] - embedding) / (met[0] - embedding) == pytest.approx(share, abs=0.01)


# --- questions -----------------------------------------------------------------------------------------------


def arc_line(i, choices="tree sky sea car", answer=None):
    names = choices.split()
    labels = "ABCDE"[: len(names)]
    texts = [names[(j + i) % len(names)] for j in range(len(names))]
    answer = labels[texts.index("sea")] if answer is None else answer
    given = [{"text": text, "label": label} for text, label in zip(texts, labels)]
    return json.dumps({"id": str(i), "question": {"stem": QUESTION, "choices": given}, "answerKey": answer})


@pytest.fixture
def arc(tmp_path):
    """A data folder with ARC-Challenge as AI2 packs it: 12 training and 9 development questions, one with 3 choices."""
    folder = tmp_path / "data" / "arc" / "ARC-V1-Feb2018-2" / "ARC-Challenge"
    folder.mkdir(parents=True)
    (folder / "ARC-Challenge-Train.jsonl").write_text("".join(arc_line(i) + "\n" for i in range(12)))
    odd = arc_line(0, "tree sky sea") + "\n"
    (folder / "ARC-Challenge-Dev.jsonl").write_text(odd + "".join(arc_line(i) + "\n" for i in range(9)))
    return tmp_path / "data"


def test_letter_prompt():
    example = tasks.Example("What next ?", 1, choices=("Run", "Sleep "), context="Ann was tired.")
    assert tasks.letter_prompt(example) == "Ann was tired.\nQuestion: What next ?\nA. Run\nB. Sleep\nAnswer:"


def test_questions_are_read_cut_and_dealt_out(checkpoint, arc, tmp_path):
    run = common.Run("adamoe", "full", "cpu", torch.float32, [0], tmp_path, data_dir=arc)
    config = replace(adamoe.FULL, model=str(checkpoint("mixtral")), train_examples=10)
    train, dev, letters, words = adamoe.load_questions(config, 0, run)
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys(WORDS))}
    assert letters == [vocabulary[letter] for letter in "ABCD"]
    assert (len(train.labels), len(dev.labels)) == (10, 9)  # the question with three choices is left out
    assert words[:3] == ["Question", ":", "where"] and len(words) == int(dev.lengths[0])
    assert dev.labels.tolist() == [[2, 1, 0, 3][i % 4] for i in range(9)]
    short, _, _, _ = adamoe.load_questions(replace(config, context=5), 0, run)
    assert short.tokens.shape[1] == 5 and short.tokens[0].tolist() == train.tokens[0, : train.lengths[0]][-5:].tolist()
    other, _, _, _ = adamoe.load_questions(config, 1, run)
    assert not torch.equal(other.labels, train.labels)


def test_only_real_tokens_are_marked():
    mask = adamoe.set_mask([layer := patched()], torch.zeros(3, 4), torch.tensor([4, 1, 3]))
    assert mask.tolist() == [True] * 5 + [False] * 3 + [True] * 3 + [False] and layer.token_mask is mask


def test_every_epoch_asks_every_question_once(checkpoint, monkeypatch, tmp_path):
    run = common.Run("adamoe", "full", "cpu", torch.float32, [0], tmp_path)
    config, asked = replace(adamoe.FULL, steps=6, batch_size=4), []

    def train(model, loss_fn, steps, batches, **options):
        asked.extend(batches(step)[2] for step in range(steps))

    monkeypatch.setattr(common, "train", train)
    questions = pretrained.Questions(torch.zeros(12, 3, dtype=torch.long), torch.full((12,), 3), torch.arange(12))
    adamoe.train_answers(nn.Linear(2, 2), questions, torch.arange(4), config, 0, run, {})
    asked = torch.cat(asked)
    assert asked[:12].sort().values.tolist() == asked[12:].sort().values.tolist() == list(range(12))
    assert not torch.equal(asked[:12], asked[12:])


def test_a_checkpoint_holds_what_is_trained_and_goes_on_bit_for_bit(checkpoint, tmp_path):
    run = common.Run("adamoe", "full", "cpu", torch.float32, [0], tmp_path)
    config = replace(adamoe.FULL, model="random", steps=6, batch_size=2, context=5, lr=1e-2)
    questions, letters = pretrained.random_questions(8, 5, 64, 0)[0], torch.arange(4)

    def trained(**options):
        model = pretrained.load_causal(checkpoint("mixtral"), torch.float32)
        adamoe.add_null_experts(model, 8, 3, rank=2, generator=torch.Generator().manual_seed(0))
        adamoe.train_answers(model, questions, letters, config, 0, run, options)
        return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}

    whole, file = trained(), tmp_path / "half.ckpt"
    trained(checkpoint=file, checkpoint_seconds=0.0, stop_step=3)
    state = common.load(file)
    assert state["step"] == 3 and state["model"].keys() == {name.replace(".", "/") for name in whole}
    resumed = trained(checkpoint=file)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_alpha_falls_at_half_time(checkpoint, monkeypatch, tmp_path):
    run, alphas, balance = (
        common.Run("adamoe", "full", "cpu", torch.float32, [0], tmp_path),
        [],
        adamoe.load_balancing_loss,
    )
    record = lambda z, n, k, alpha, *rest: (alphas.append(alpha), balance(z, n, k, alpha, *rest))[1]
    monkeypatch.setattr(adamoe, "load_balancing_loss", record)
    model = pretrained.load_causal(checkpoint("mixtral"), torch.float32)
    adamoe.add_null_experts(model, 8, 3, rank=2)
    config = replace(adamoe.FULL, steps=4, batch_size=2)
    questions = pretrained.random_questions(8, 5, 64, 0)[0]
    adamoe.train_answers(model, questions, torch.arange(4), config, 0, run, {})
    assert alphas == [0.02] * 4 + [1e-4] * 4  # two layers, four steps


def test_letters_must_be_tokens(checkpoint):
    tokenizer = pretrained.load_tokenizer(checkpoint("mixtral"))
    with pytest.raises(ValueError, match="'F' is not one token"):
        pretrained.answer_ids(tokenizer, "AF")
    with pytest.raises(ValueError, match="the same token"):
        pretrained.answer_ids(tokenizer, "AA")


# --- claims --------------------------------------------------------------------------------------------------


def answered(right, flops=1.0, seconds=1.0, load=1.5):
    per_batch = {"forward_flops": [flops] * 4, "forward_seconds": [seconds] * 4, "step_seconds": [seconds] * 4}
    return {"right": right, "load": load, **per_batch}


@pytest.mark.parametrize("num_seeds", [1, 3])
def test_claims_of_the_full_scale_can_hold_and_can_fail(num_seeds, tmp_path):
    def judged(mine, other, **changes):
        claims = [replace(claim) for claim in adamoe.CLAIMS]
        run = common.Run("adamoe", "full", "cpu", torch.float32, [0] * num_seeds, tmp_path, claims=claims)
        results = {
            "adamoe": [answered(mine, **changes)] * num_seeds,
            "vanilla": [answered(other, load=2.0)] * num_seeds,
        }
        adamoe.judge_full(replace(adamoe.FULL, model="x"), run, results, 2, 0.88)
        return {c.id.removeprefix("adamoe.full_"): c for c in claims if ".full_" in c.id}

    good = judged([1] * 60 + [0] * 40, [1] * 40 + [0] * 60, flops=0.8, seconds=0.9)
    assert all(claim.holds for claim in good.values())
    assert good["accuracy"].measured.startswith(
        "60.00 against 40.00 % of 100 questions (arc-c), difference 20.00 points"
    )
    assert 0.12 < good["accuracy"].values["interval"][0] < 0.2 < good["accuracy"].values["interval"][1] < 0.29
    assert "20.0 % fewer" in good["flops"].measured and "22.0 % by the paper's formula" in good["flops"].measured
    bad = judged([1] * 40 + [0] * 60, [1] * 60 + [0] * 40, flops=1.1, seconds=1.1)
    assert not any(claim.holds for claim in bad.values())
    assert judged([1, 0] * 50, [1, 0] * 50)["accuracy"].holds is False


def test_bootstrap_interval_of_a_known_sample():
    low, high = adamoe.bootstrap(np.array([1.0] * 50 + [0.0] * 50))
    assert low == pytest.approx(0.5 - 1.96 * 0.05, abs=0.015) and high == pytest.approx(0.5 + 1.96 * 0.05, abs=0.015)


def test_tokens_in_color_and_without():
    assert adamoe.painted(["Where", " ", "is"], [1, 0, 3], color=False) == "Where·1 ' '·0 is·3"
    shown = adamoe.painted(["a", "b"], [1, 3], color=True)
    assert "48;5;232;38;5;15ma" in shown and "48;5;255;38;5;16mb" in shown and shown.endswith("\x1b[0m")


# --- the script ----------------------------------------------------------------------------------------------

TINY = "--full --device cpu --workers 1 --threads 1 --batch-size 4 --steps 6 --train-examples 8 --lora-rank 2".split()
RANDOM = (
    "--full --device cpu --workers 1 --threads 1 --model random --num-layers 2 --d-model 16 --d-ff 64 --num-heads 2"
    " --context 12 --batch-size 4 --steps 4 --lora-rank 2 --lr 1e-2"
).split()


@pytest.mark.parametrize("family", ["mixtral", "olmoe"])
def test_full_run_from_files_to_claims(checkpoint, arc, command_line, tmp_path, family):
    plot = ["--plot"] if family == "mixtral" and importlib.util.find_spec("matplotlib") else []
    ablate = ["--ablate", *plot] if family == "mixtral" else []
    flags = [*TINY, "--model", checkpoint(family), "--data-dir", arc, "--lr", "1e-2", *ablate]
    done = command_line(adamoe, *flags)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "runs" / "adamoe-full" / "results.json").read_text())
    arms = {name: found[0] for name, found in report["results"]["arms"].items()}
    assert list(arms) == ["original", "vanilla", "adamoe"] + (["l_bal", "random_nulls"] if ablate else [])
    assert {claim["id"]: claim["verdict"] == "not measured" for claim in report["claims"]} == {
        f"adamoe.full_{name}": False for name in ("accuracy", "flops", "time")
    }
    assert all(len(arm["right"]) == 9 for arm in arms.values())
    assert arms["vanilla"]["load"] == 2.0 and 0.5 < arms["adamoe"]["load"] < 2.5
    assert report["config"]["num_null"] == 8 and report["config"]["top_k"] == 3
    assert (report["config"]["d_model"], report["config"]["num_layers"], report["config"]["d_ff"]) == (32, 2, 24)
    assert len(report["data"]) == 3 and report["scale"] == "full"
    metrics = [
        json.loads(line) for line in (tmp_path / "runs" / "adamoe-full" / "metrics.jsonl").read_text().splitlines()
    ]
    answer = {m["step"]: m["answer_loss"] for m in metrics if m["arm"] == "vanilla-seed0"}
    assert answer[5] < answer[0] - 0.5  # it learns to answer with a letter
    assert "memory there" in done.stdout and "paper %" in done.stdout and "Question·" in done.stdout
    assert ("89.15" in done.stdout) and (not plot or (tmp_path / "runs" / "adamoe-full" / "adamoe.png").exists())
    saved = adamoe.load_trained(tmp_path / "runs" / "adamoe-full" / "arms" / "adamoe-seed0.npz")
    run = common.Run("adamoe", "full", "cpu", torch.float32, [0], tmp_path, data_dir=arc)
    config = replace(adamoe.FULL, model=str(checkpoint(family)), train_examples=8, batch_size=4)
    _, dev, letters, _ = adamoe.load_questions(config, 0, run)
    again = adamoe.answer_questions(saved, dev, torch.tensor(letters), config, run)
    assert again["right"] == arms["adamoe"]["right"] and again["load"] == arms["adamoe"]["load"]


def test_budget_and_dry_run(checkpoint, command_line, tmp_path):
    done = command_line(adamoe, *RANDOM, "--load", "1.2", "--dry-run")
    assert done.returncode == 0 and "1.200 of 2 experts (12 nulls, 3 picks)" in done.stdout
    assert not list(tmp_path.iterdir())
    done = command_line(
        adamoe, "--full", "--device", "cpu", "--model", adamoe.MIXTRAL, "--dry-run", "--data-dir", tmp_path
    )
    assert "46,702,792,704" in done.stdout and "88.4 %" in done.stdout and "93.41 GB in 16 bits" in done.stdout


def test_random_weights_alone_and_shared_by_two_processes(fork, command_line, tmp_path):
    pytest.importorskip("transformers", reason="pip install -r requirements-full.txt")
    two = fork.two("adamoe.py", *RANDOM, "--out", tmp_path / "two", folder=tmp_path)
    assert command_line(adamoe, *RANDOM, "--out", tmp_path / "one").returncode == 0
    report = json.loads((tmp_path / "one" / "results.json").read_text())
    holds = {claim["id"]: claim["verdict"] for claim in report["claims"]}
    assert holds["adamoe.full_accuracy"] == "not measured" and holds["adamoe.full_flops"] == "seen"
    assert holds["adamoe.full_time"] in ("seen", "not seen")
    first, second = map(finished, two)
    assert [first.returncode, second.returncode] == [0, 0], first.stderr[-3000:] + second.stderr[-3000:]
    assert first.stdout.count("claims of the paper") == 1 and not second.stdout  # the second process is silent
    arrays, results, losses = [], [], []
    for name in ("one", "two"):
        arrays.append(common.load_arrays(tmp_path / name / "arms" / "adamoe-seed0.npz")[0])
        results.append(json.loads((tmp_path / name / "results.json").read_text())["results"]["arms"]["adamoe"][0])
        losses.append([json.loads(line)["loss"] for line in (tmp_path / name / "metrics.jsonl").open()])
    assert results[0]["right"] == results[1]["right"]
    assert results[0]["load"] == pytest.approx(results[1]["load"], abs=0.01)
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)  # of the whole batch, whoever computed which part
    assert arrays[0].keys() == arrays[1].keys() and len(arrays[0]) == 14
    for name in arrays[0]:
        torch.testing.assert_close(*(array[name] for array in arrays), atol=2e-4, rtol=0)
    assert max(array.abs().max() for name, array in arrays[0].items() if name.endswith("_b")) > 0.01


def test_lora_setting_end_to_end(command_line, tmp_path):
    flags = "--num-layers 1 --d-model 16 --d-ff 16 --num-heads 2 --context 32 --batch-size 4 --pretrain-steps 3".split()
    plot = ["--plot"] if importlib.util.find_spec("matplotlib") else []
    done = command_line(adamoe, *flags, "--setting", "lora", "--steps", 3, "--ablate", "--workers", 1, *plot)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "runs" / "adamoe-small" / "results.json").read_text())
    assert list(report["results"]["arms"]) == ["k1", "k2", "m5k4", "m7k4", "m9k4", "m5k2"]
    assert [claim["id"] for claim in report["claims"]] == ["adamoe.load"]
    assert report["claims"][0]["verdict"] != "not measured" and "predicted 1.778" in report["claims"][0]["measured"]
    layers = report["results"]["arms"]["k2"][0]["load_by_layer"]
    assert layers == [2.0] * 4  # qkv, out, up, down
    base, tuned = (common.load(tmp_path / "runs/adamoe-small/arms" / f"{arm}-seed0.pt") for arm in ("base", "k2"))
    plain = {name.replace(".linear.", "."): value for name, value in tuned.items()}
    assert all(torch.equal(plain[name], value) for name, value in base.items())  # nothing but the added is trained
    assert any(value.any() for name, value in tuned.items() if name.endswith(".b"))


def damage(folder, what):
    if what == "weights":
        (folder / "model.safetensors").write_bytes(b"not tensors")
    elif what == "missing":
        (folder / "tokenizer.json").unlink()
    elif what == "shape":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    elif what == "config":
        (folder / "config.json").write_text("{")
    elif what == "letters":
        text = (folder / "tokenizer.json").read_text()
        (folder / "tokenizer.json").write_text(text.replace('"C"', '"Q"'))


@pytest.mark.parametrize(
    "what, expected",
    [
        ("weights", "holds no readable weights"),
        ("missing", "lacks tokenizer.json"),
        ("shape", "weights missing or of another shape: model.layers.2"),
        ("config", "config.json cannot be read"),
        ("letters", "'C' is not one token of this tokenizer"),
    ],
)
def test_a_damaged_checkpoint_is_one_line(checkpoint, arc, command_line, tmp_path, what, expected):
    import shutil

    folder = tmp_path / "model"
    shutil.copytree(checkpoint("mixtral"), folder)
    damage(folder, what)
    done = command_line(adamoe, *TINY, "--model", folder, "--data-dir", arc)
    assert done.returncode == 2 and expected in done.stderr and done.stderr.count("\n") == 1, done.stderr


@pytest.mark.parametrize(
    "flags, expected",
    [
        (["--full", "--model", "no/such/folder"], "no such folder"),
        (["--full", "--model", "LLAMA"], "holds a llama model; a causal language model with experts is needed"),
        (["--full", "--model", "MIXTRAL", "--num-layers", "3"], "--num-layers is 3, this model's 2"),
        (["--full", "--model", "MIXTRAL", "--load", "1", "--num-null", "3"], "not both"),
        (["--full", "--model", "MIXTRAL", "--top-k", "40"], "top_k 40"),
        (["--full", "--model", "MIXTRAL", "--task", "mmlu"], "task is 'mmlu'; allowed: arc-c"),
        (["--full", "--model", "random", "--d-ff", "1000000000"], "a lower --num-layers (about 0)"),
        (["--full", "--text", "x"], "--text belongs to the small scale"),
        (["--full", "--batch-size", "0"], "batch_size is 0"),
        (["--model", "x"], "--model belongs to --full"),
        (["--setting", "dense"], "setting is 'dense'"),
        (["--setting", "lora", "--num-null", "3"], "--num-null belongs to --setting moe"),
        (["--setting", "lora", "--alpha-pretrain", "1"], "--alpha-pretrain belongs to --setting moe"),
        (["--lora-rank", "3"], "--lora-rank belongs to --setting lora"),
        (["--num-null", "none"], "num_null is None"),
        (["--full", "--compile"], "--compile belongs to the small scale"),
        (["--full", "--model", "someone/something", "--dry-run"], "is not here, so its size is not known"),
        (["--full", "--model", "MIXTRAL", "--top-k", "0"], "top_k 0"),
    ],
)
def test_mistakes_are_one_line_exit_code_2_and_leave_nothing(checkpoint, command_line, tmp_path, flags, expected):
    names = {"LLAMA": "llama", "MIXTRAL": "mixtral"}
    flags = [checkpoint(names[flag]) if flag in names else flag for flag in flags]
    done = command_line(adamoe, *flags, "--device", "cpu", "--data-dir", tmp_path)
    assert done.returncode == 2 and expected in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert not list(tmp_path.iterdir())


def test_without_transformers_one_line_says_what_to_install(command_line, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    done = command_line(adamoe, "--full", "--device", "cpu")
    assert done.returncode == 2 and "pip install -r requirements-full.txt" in done.stderr
    assert done.stderr.count("\n") == 1


def test_missing_task_files_name_the_place(checkpoint, command_line, tmp_path, monkeypatch):
    def fetch(name, data_dir):
        raise tasks.download.DownloadError(
            f"{name}: no connection to the server. Run again, or put URL at PATH by hand"
        )

    monkeypatch.setattr(tasks.download, "fetch", fetch)
    done = command_line(adamoe, *TINY, "--model", checkpoint("mixtral"), "--data-dir", tmp_path)
    assert done.returncode == 1 and "by hand" in done.stderr and done.stderr.count("\n") == 1


def test_patched_model_can_be_copied():
    layer = patched(rank=2)
    x = torch.randn(5, 6, dtype=F64)
    y = layer(x)
    layer.aux_loss = None
    torch.testing.assert_close(copy.deepcopy(layer)(x), y)
