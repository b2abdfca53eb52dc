"""Null experts in models of transformers: adding, training, saving, and `adamoe.py --full`.

Models and tokenizers are tiny, random, and made on the spot; without transformers all is skipped.
"""

import copy
import importlib.util
import json
import shutil
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import report
from forked import finished
from torch import nn

import adamoe
import common
from data import arrays, mixtures, pretrained, tasks

transformers = pytest.importorskip("transformers", reason="pip install -r requirements-full.txt")
SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 24, "moe_intermediate_size": 24,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8,
    "num_local_experts": 8, "num_experts": 8, "n_routed_experts": 8, "num_experts_per_tok": 2,
    "n_shared_experts": 1, "shared_expert_intermediate_size": 24, "n_group": 1, "topk_group": 1,
    "first_k_dense_replace": 0, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4, "v_head_dim": 8, "num_dense_layers": 0, "mlp_only_layers": [],
    "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2, "max_position_embeddings": 128,
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8,
    "linear_value_head_dim": 8, "decoder_sparse_step": 1,
}  # fmt: skip
MORE = {
    "qwen3_next": {"layer_types": ["full_attention", "linear_attention"]},
    "lfm2_moe": {"layer_types": ["full_attention", "conv"]},
    "deepseek_v3": {"head_dim": 4},  # of the rotated part
}


def tiny(family, **changes):
    """A model of a family, weights and biases large enough for a difference to show."""
    config_type = type(transformers.AutoConfig.for_model(family))
    known = set(config_type().to_dict()) | set(config_type.attribute_map)
    sizes = {name: value for name, value in SIZES.items() if name in known}
    config = config_type(**{**sizes, **MORE.get(family, {}), **changes})
    config.use_cache = False
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if "inv_freq" not in name and tensor.is_floating_point():
            spread = 1.0 if tensor.dim() == 1 and "norm" in name else 0.0
            nn.init.normal_(tensor.data, mean=spread, std=0.5 if "gate.weight" in name else 0.15)
    return model


TOKENS = torch.randint(3, 60, (3, 9), generator=torch.Generator().manual_seed(1))
EQUAL = [
    "mixtral", "olmoe", "flex_olmo", "qwen2_moe", "qwen3_moe", "qwen3_next", "granitemoe",
    "minimax", "deepseek_v2", "deepseek_v3", "glm4_moe", "lfm2_moe", "flint",
]  # fmt: skip
GROUPS = {"n_group": 4, "topk_group": 2, "topk_method": "group_limited_greedy"}
REFUSED = {
    "gpt_oss": ({}, "GptOssTopKRouter has bias"),
    "ernie4_5_moe": ({}, "moe_statics"),
    "phimoe": ({}, "PhimoeSparseMoeBlock: it differs by"),
    "deepseek_v2": (GROUPS, "picks among 4 groups"),
    "llama": ({}, "LlamaForCausalLM has no mixture"),
}


@pytest.mark.parametrize("family", EQUAL)
def test_without_nulls_a_patched_model_equals_the_model(family):
    model = tiny(family)
    with torch.no_grad():
        before = model(TOKENS).logits
        other = copy.deepcopy(model)
        layers = adamoe.add_null_experts(model, 0, rank=2)
        torch.testing.assert_close(model(TOKENS).logits, before, atol=2e-5, rtol=0)
        assert len(layers) == 2 and all(layer.true_counts.eq(2).all() for layer in layers)
        adamoe.add_null_experts(other, 8, 3)
        assert (other(TOKENS).logits - before).abs().max() > 1e-3


@pytest.mark.parametrize("family", REFUSED)
def test_what_would_be_another_model_is_refused_and_left_as_it_was(family):
    changes, reason = REFUSED[family]
    model = tiny(family, **changes)
    model.lm_head.requires_grad_(False)
    modules = [id(module) for module in model.modules()]
    trained = [parameter.requires_grad for parameter in model.parameters()]
    with pytest.raises(ValueError, match=reason) as refusal:
        adamoe.add_null_experts(model, 8, 3, rank=2)
    assert "\n" not in str(refusal.value)
    assert [id(module) for module in model.modules()] == modules
    assert [parameter.requires_grad for parameter in model.parameters()] == trained


def test_a_refusal_in_the_second_layer_leaves_the_first():
    """A router that picks otherwise, though all its parts look alike."""
    model = tiny("mixtral")
    block = model.model.layers[1].mlp
    route = block.gate.forward
    block.gate.forward = lambda x: (*route(x)[:2], route(-x)[2])
    with pytest.raises(ValueError, match="MixtralSparseMoeBlock: it differs by"):
        adamoe.add_null_experts(model, 8, 3, rank=2)
    assert not adamoe.null_layers(model) and model.model.layers[0].mlp.gate.weight.requires_grad


def test_a_model_may_be_half_precision_before_or_after():
    """Blocks are compared in float32: in bf16 a rounded logit changes a pick."""
    model = tiny("olmoe").to(torch.bfloat16)
    layers = adamoe.add_null_experts(model, 8, 3)
    rows = layers[0].router.weight
    assert rows.dtype == torch.float32
    assert (rows[8:] != rows[:8]).float().mean() > 0.9  # the noise survives
    assert model(TOKENS).logits.isfinite().all()
    model = tiny("mixtral")
    adamoe.add_null_experts(model, 8, 3, rank=4)
    half = copy.deepcopy(model).to(torch.bfloat16)
    loss = half(TOKENS).logits.float().square().mean()
    (loss + adamoe.take_aux_loss(adamoe.null_layers(half))).backward()
    assert all(p.grad.isfinite().all() for p in half.parameters() if p.requires_grad)


# --- a training step -----------------------------------------------------------------------------


def test_checkpointed_activations_give_the_same_gradients_and_keep_no_graph():
    """Padding included: four of the eighteen tokens."""
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, 5:] = 0
    found = []
    for checkpointed in (False, True):
        model = tiny("olmoe").train()
        layers = adamoe.add_null_experts(model, 8, 3, 2, alpha=0.5, generator=torch.Generator())
        if checkpointed:
            model.activation_checkpointing_enable({"use_reentrant": False})
        loss = model(TOKENS[:2], attention_mask=mask).logits.square().mean()
        aux_loss = adamoe.take_aux_loss(layers)
        (loss + aux_loss).backward()
        assert all(layer.aux_loss is None for layer in layers)  # recomputed ones are not kept
        gradients = [p.grad for p in model.parameters() if p.requires_grad]
        assert len(gradients) == 12 and any(gradient.any() for gradient in gradients)
        assert adamoe.counts_of(layers).shape == (14, 2)
        found.append([loss.detach(), aux_loss.detach(), *gradients])
    for one, other in zip(*found):
        torch.testing.assert_close(one, other)


def test_what_fails_silently_elsewhere_is_said():
    model = tiny("mixtral").train()
    layers = adamoe.add_null_experts(model, 8, 3, rank=2)
    with pytest.raises(ValueError, match="there is no aux_loss"):
        adamoe.take_aux_loss(layers)
    with pytest.raises(ValueError, match="output_router_logits is on"):
        model(TOKENS, output_router_logits=True)
    model.activation_checkpointing_enable({"use_reentrant": True})
    model(inputs_embeds=torch.randn(1, 4, 32, requires_grad=True))
    with pytest.raises(ValueError, match="use_reentrant=True; set it to False"):
        adamoe.take_aux_loss(layers)
    model.requires_grad_(False)  # as get_peft_model does
    with pytest.warns(UserWarning, match="nothing is trained; with PEFT"):
        model(TOKENS)
    with pytest.raises(ValueError, match="has null experts already"):
        adamoe.add_null_experts(model, 8)


def test_weights_that_somebody_froze_stay_their_matter():
    """PEFT's order: it freezes the model and trains adapters of its own, here the output's."""
    model = tiny("mixtral").requires_grad_(False)
    model.lm_head.requires_grad_(True)
    adamoe.add_null_experts(model, 8, 3, rank=2)
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert "lm_head.weight" in names and len(names) == 1 + 2 * 6
    assert all("lora" in name for name in names - {"lm_head.weight"})


def test_generate_with_a_cache_and_left_padding_after_training():
    model = tiny("mixtral").train()
    layers = adamoe.add_null_experts(model, 8, 3, rank=2)
    model(TOKENS, attention_mask=torch.ones_like(TOKENS))  # leaves masks of 27 tokens behind
    model.eval()
    prompt = TOKENS[:1, :5]
    options = {"do_sample": False, "max_new_tokens": 6, "pad_token_id": 0}
    alone = model.generate(prompt, use_cache=True, **options)
    assert torch.equal(alone, model.generate(prompt, use_cache=False, **options))
    two = torch.cat([F.pad(prompt, (3, 0)), TOKENS[1:2, :8]])
    mask = torch.stack([torch.arange(8) >= 3, torch.arange(8) >= 0]).long()
    together = model.generate(two, attention_mask=mask, use_cache=True, **options)
    assert torch.equal(together[0, 8:], alone[0, 5:])
    assert layers[0].token_mask.shape == (2, 1)  # of the last step: one token each


# --- files ---------------------------------------------------------------------------------------


def test_what_was_added_is_saved_and_comes_back(tmp_path):
    model = tiny("mixtral")
    before = copy.deepcopy(model)
    sizes = {"num_null": 8, "top_k": 3, "rank": 2}
    for layer in adamoe.add_null_experts(model, **sizes):
        for parameter in layer.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter, std=0.3)
    path = tmp_path / "added.npz"
    adamoe.save_null_experts(path, model, **sizes)
    again = copy.deepcopy(before)
    adamoe.load_null_experts(path, again)
    assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)
    assert path.stat().st_size < 40_000

    kept, meta = arrays.load_arrays(path)
    name = "model.layers.0.mlp.router.weight"
    other = "model.embed_tokens.weight"
    missing = {key: kept[key] for key in kept if key != name}
    damaged = {
        "missing": (missing, name),
        "none": ({}, "model.layers.0.mlp.down_low_rank.lora_a"),
        "the base's": (kept | {other: torch.zeros(64, 32)}, other),
        "another shape": (kept | {name: torch.zeros(3, 32)}, name),
    }
    for case, (content, odd) in damaged.items():
        arrays.save_arrays(path, content, meta)
        plain = copy.deepcopy(before)
        with pytest.raises(ValueError, match=f"does not fit this model: {odd}"):
            adamoe.load_null_experts(path, plain)
        assert torch.equal(plain(TOKENS).logits, before(TOKENS).logits), case
        assert all(parameter.requires_grad for parameter in plain.parameters())


WORDS = "Answer Question A B C D E . : [UNK] sea tree sky car where do fish live ?".split()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """checkpoint("mixtral") -> a folder with a random model and a tokenizer of a few words."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    made = {}

    def make(family):
        if family not in made:
            made[family] = tmp_path_factory.mktemp(family)
            transformers.utils.logging.disable_progress_bar()
            tiny(family).save_pretrained(made[family])
            transformers.utils.logging.enable_progress_bar()
            words = {word: i for i, word in enumerate(WORDS)}
            tokenizer = Tokenizer(models.WordLevel(words, "[UNK]"))
            tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
            special = {"tokenizer_object": tokenizer, "unk_token": "[UNK]"}
            fast = transformers.PreTrainedTokenizerFast(**special)
            fast.save_pretrained(made[family])
        return made[family]

    return make


@pytest.fixture
def arc(tmp_path):
    """A data folder with a few questions, whose answer is always B."""
    folder = tmp_path / "data" / "arc" / "ARC-V1-Feb2018-2" / "ARC-Challenge"
    folder.mkdir(parents=True)
    for name, count in (("Train", 12), ("Dev", 9)):
        lines = []
        for i in range(count):
            words = "tree sky sea car".split()
            choices = [{"text": text, "label": label} for text, label in zip(words, "ABCD")]
            question = {"stem": "where do fish live ?", "choices": choices}
            lines.append(json.dumps({"id": f"{name}{i}", "question": question, "answerKey": "B"}))
        (folder / f"ARC-Challenge-{name}.jsonl").write_text("\n".join(lines))
    return tmp_path / "data"


# --- the script ----------------------------------------------------------------------------------

SHORT = "--full --device cpu --workers 1 --threads 1 --batch-size 4 --steps 6 --lora-rank 2".split()
RANDOM = "--model random --num-layers 2 --d-model 16 --d-ff 64 --num-heads 2 --context 12".split()
RANDOM = [*SHORT, *RANDOM, "--lr", "1e-2"]


def test_full_run_from_files_to_claims(checkpoint, arc, command_line, tmp_path):
    plot = ["--plot"] if importlib.util.find_spec("matplotlib") else []
    flags = [*SHORT, "--model", checkpoint("olmoe"), "--data-dir", arc, "--lr", "1e-2"]
    done = command_line(adamoe, *flags, "--train-examples", 8, "--ablate", *plot)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "runs" / "adamoe-full"
    told = report(folder)
    arms = {name: found[0] for name, found in told["results"]["arms"].items()}
    assert list(arms) == ["original", "vanilla", "adamoe", "l_bal", "random_nulls"]
    assert arms["vanilla"]["load"] == 2.0 and 0.5 < arms["adamoe"]["load"] < 2.5
    assert all(arm["count"] == 9 for arm in arms.values())
    assert arms["adamoe"]["rows"] == arms["adamoe"]["true_picks"] > 0
    verdicts = {claim["id"].removeprefix("adamoe."): claim["verdict"] for claim in told["claims"]}
    assert verdicts["flops"] == verdicts["null_free"] == "passed"
    absent = {name for name, verdict in verdicts.items() if verdict == "not measured"}
    assert absent == {"quality", "adaptive", "beats_top_p", "true_norm", "causal"}
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    losses = [line["task_loss"] for line in metrics if line["arm"] == "vanilla-seed0"]
    assert losses[5] < losses[0] - 0.3  # it learns to answer with a letter
    assert "memory there" in done.stdout and "83.73, 87.46, 89.15" in done.stdout
    saved = adamoe.load_trained(folder / "arms" / "adamoe-seed0.npz")
    sizes = (str(checkpoint("olmoe")), "arc-c", arc, 8, 512, 4, 0, "cpu")
    again = adamoe.evaluate(saved, pretrained.LetterTask(*sizes))
    assert all(again[key] == arms["adamoe"][key] for key in ("accuracy", "load", "histogram"))


def test_budget_and_dry_run(command_line, tmp_path):
    done = command_line(adamoe, *RANDOM, "--load", "1.2", "--dry-run")
    assert done.returncode == 0 and "1.200 of 2 experts (12 nulls, 3 picks)" in done.stdout
    flags = ["--full", "--device", "cpu", "--dry-run", "--data-dir", tmp_path]
    done = command_line(adamoe, *flags, "--model", pretrained.MIXTRAL)
    for figure in ("46,702,792,704", "88.4 %", "93.41 GB in 16 bits"):
        assert figure in done.stdout
    assert not list(tmp_path.iterdir())


def test_two_processes_share_a_model(fork, command_line, tmp_path):
    """Each holds half of it (FSDP2), and both together do what one does."""
    two = fork.two("adamoe.py", *RANDOM, "--out", tmp_path / "two", folder=tmp_path)
    assert command_line(adamoe, *RANDOM, "--out", tmp_path / "one").returncode == 0
    first, second = map(finished, two)
    errors = first.stderr[-3000:] + second.stderr[-3000:]
    assert [first.returncode, second.returncode] == [0, 0], errors
    assert "claims of the paper" in first.stdout and not second.stdout
    found, kept, losses = [], [], []
    for folder in (tmp_path / "one", tmp_path / "two"):
        kept.append(arrays.load_arrays(folder / "arms" / "adamoe-seed0.npz")[0])
        found.append(report(folder)["results"]["arms"]["adamoe"][0])
        losses.append([json.loads(line)["loss"] for line in (folder / "metrics.jsonl").open()])
    assert found[0]["accuracy"] == found[1]["accuracy"]
    assert found[0]["load"] == pytest.approx(found[1]["load"], abs=0.01)
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    assert kept[0].keys() == kept[1].keys() and len(kept[0]) == 14
    for name in kept[0]:
        torch.testing.assert_close(kept[0][name], kept[1][name], atol=2e-4, rtol=0)


DAMAGES = [  # a file of a checkpoint, what becomes of its text, what is said
    ("model.safetensors", lambda text: "not tensors", "holds no readable weights"),
    ("tokenizer.json", None, "lacks tokenizer.json"),
    (
        "config.json",
        lambda text: text.replace('"num_hidden_layers": 2', '"num_hidden_layers": 3'),
        "weights missing or of another shape: model.layers.2",
    ),
    ("config.json", lambda text: "{", "config.json cannot be read"),
    (
        "tokenizer.json",
        lambda text: text.replace('"C"', '"Q"'),
        "'C' is not one token of this tokenizer",
    ),
]


@pytest.mark.parametrize("name, damage, told", DAMAGES)
def test_a_damaged_checkpoint_is_one_line(
    checkpoint, arc, command_line, tmp_path, name, damage, told
):
    shutil.copytree(checkpoint("mixtral"), tmp_path / "model")
    path = tmp_path / "model" / name
    if damage is None:
        path.unlink()
    else:
        path.write_text(damage(path.read_text(errors="replace")))
    done = command_line(adamoe, *SHORT, "--model", "model", "--data-dir", arc)
    assert done.returncode == 2 and told in done.stderr, done.stderr
    assert done.stderr.count("\n") == 1


MISTAKES = [
    ("--model no/such/folder", "no such folder"),
    ("--model /missing/path --dry-run", "model /missing/path: no such folder"),
    ("--model someone/something --dry-run", "is not here, so its size is not known"),
    ("--model LLAMA", "holds a llama model; a causal language model with experts is needed"),
    ("--model MIXTRAL --num-layers 3", "--num-layers belongs to --model random"),
    ("--model MIXTRAL --top-k 40", "top_k 40"),
    ("--model GROUPS --task arc-c", "picks among 4 groups"),
    ("--task mmlu", "allowed: arc-c"),
    ("--model random --d-ff 1000000000", "a lower --num-layers (about 0)"),
    ("--compile", "--compile belongs to the small scale"),
    ("--arms top_p", "there is no arm 'top_p'"),
]


@pytest.mark.parametrize("flags, expected", MISTAKES)
def test_mistakes_are_one_line_and_leave_nothing(
    checkpoint, command_line, tmp_path, tmp_path_factory, flags, expected
):
    words = []
    for word in flags.split():
        if word == "GROUPS":
            word = tmp_path_factory.mktemp("groups")
            shutil.copytree(checkpoint("mixtral"), word, dirs_exist_ok=True)
            tiny("deepseek_v2", **GROUPS).save_pretrained(word)
        words.append(checkpoint(word.lower()) if word in ("LLAMA", "MIXTRAL") else word)
    done = command_line(adamoe, "--full", *words, "--device", "cpu", "--data-dir", tmp_path)
    *_, told = done.stderr.splitlines()
    assert done.returncode == 2 and expected in told, done.stderr
    assert told.startswith("adamoe.py: ") and not list(tmp_path.iterdir())


def test_without_transformers_one_line_says_what_to_install(command_line, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    done = command_line(adamoe, "--full", "--device", "cpu")
    assert done.returncode == 2 and "pip install -r requirements-full.txt" in done.stderr
    assert done.stderr.count("\n") == 1


def test_questions_are_read_cut_and_dealt_out(checkpoint, arc):
    """Eight of twelve for training, all nine to answer, and each epoch asks every one once."""
    task = pretrained.LetterTask(checkpoint("mixtral"), "arc-c", arc, 8, 10, 4, 0, "cpu")
    assert len(task.train.labels) == 8 and [len(b[2]) for b in task.eval_batches] == [4, 4, 1]
    tokens, lengths, labels = task.batch(0)
    assert tokens.shape == (4, 10) and lengths.tolist() == [10] * 4 and labels.tolist() == [1] * 4
    assert task.words[-2:] == ["Answer", ":"] and task.letters.tolist() == [2, 3, 4, 5]
    seen = torch.cat([tasks.epoch_rows(8, step, 4, 0) for step in (2, 3)])
    assert sorted(seen.tolist()) == list(range(8))
    with pytest.raises(ValueError, match="the same token"):
        pretrained.answer_ids(pretrained.load_tokenizer(checkpoint("mixtral")), "AA")


def test_blocks_are_found_and_read_without_memory():
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(tiny("qwen2_moe").config)
    (_, name, block), _ = mixtures.find_blocks(model)
    weights = mixtures.read_block(block)
    assert name == "mlp" and weights.w1.shape == weights.w3.shape == (8, 32, 24)
    assert weights.w2.shape == (8, 24, 32) and weights.act == "silu" and weights.shared is not None
    assert (weights.scoring, weights.normalize, weights.scale) == ("softmax", False, 1.0)
    assert common.count_parameters(model, 0) < common.count_parameters(model)
