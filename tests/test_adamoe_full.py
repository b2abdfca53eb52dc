"""Null experts in models of transformers, tiny and random ones, and `adamoe.py --full`."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from conftest import report
from forked import finished
from torch import nn

import adamoe
from data import arrays, pretrained

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


def tiny(family):
    """A model of a family, weights and biases large enough for a difference to show."""
    config_type = type(transformers.AutoConfig.for_model(family))
    known = set(config_type().to_dict()) | set(config_type.attribute_map)
    sizes = {name: value for name, value in SIZES.items() if name in known}
    config = config_type(**{**sizes, **MORE.get(family, {})})
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
REFUSED = {
    "gpt_oss": "GptOssTopKRouter has bias",
    "phimoe": "PhimoeSparseMoeBlock: it differs by",  # it picks otherwise, though all looks alike
    "llama": "LlamaForCausalLM has no mixture",
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
    model = tiny(family)
    model.lm_head.requires_grad_(False)
    modules = [id(module) for module in model.modules()]
    trained = [parameter.requires_grad for parameter in model.parameters()]
    with pytest.raises(ValueError, match=REFUSED[family]):
        adamoe.add_null_experts(model, 8, 3, rank=2)
    assert [id(module) for module in model.modules()] == modules
    assert [parameter.requires_grad for parameter in model.parameters()] == trained


def test_a_model_may_be_half_precision():
    """Blocks are compared in float32: in bf16 a rounded logit changes a pick."""
    model = tiny("olmoe").to(torch.bfloat16)
    rows = adamoe.add_null_experts(model, 8, 3)[0].router.weight
    assert rows.dtype == torch.float32
    assert (rows[8:] != rows[:8]).float().mean() > 0.9  # the noise survives


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


def test_what_fails_silently_elsewhere_is_said(tmp_path):
    model = tiny("mixtral").train()
    layers = adamoe.add_null_experts(model, 8, 3, rank=2)
    with pytest.raises(ValueError, match="output_router_logits is on"):
        model(TOKENS, output_router_logits=True)
    model.activation_checkpointing_enable({"use_reentrant": True})
    model(inputs_embeds=torch.randn(1, 4, 32, requires_grad=True))
    with pytest.raises(ValueError, match="use_reentrant=True; set it to False"):
        adamoe.take_aux_loss(layers)
    with pytest.raises(ValueError, match="has null experts already"):
        adamoe.add_null_experts(model, 8)
    for saved in (model, model.model):
        with pytest.raises(ValueError, match="use adamoe.save_null_experts"):
            saved.save_pretrained(tmp_path)


def test_the_mask_is_that_of_the_last_call_however_it_was_given():
    model = tiny("mixtral")
    layers = adamoe.add_null_experts(model, 8, 3)
    mask = torch.arange(9).expand(3, 9) < 5
    model(TOKENS, mask.long())
    assert all(torch.equal(layer.token_mask, mask) for layer in layers)
    model.model(TOKENS)  # past the outer model, as PEFT's generate goes
    assert all(layer.token_mask is None for layer in layers)


def test_generate_with_a_cache_and_left_padding_after_training():
    model = tiny("mixtral").train()
    adamoe.add_null_experts(model, 8, 3, rank=2)
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


def test_what_was_added_is_saved_and_comes_back(tmp_path):
    model = tiny("mixtral")
    before = copy.deepcopy(model)
    sizes = {"num_null": 8, "top_k": 3, "rank": 2, "normalize": "all_picks", "lora_alpha": 4.0}
    for layer in adamoe.add_null_experts(model, **sizes):
        for parameter in layer.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter, std=0.3)
    path = tmp_path / "added.npz"
    with pytest.raises(ValueError, match="top_k is 4; .* made with 3"):
        adamoe.save_null_experts(path, model, num_null=8, top_k=4)
    adamoe.save_null_experts(path, model, num_null=8)  # what is left out is known
    again = copy.deepcopy(before)
    adamoe.load_null_experts(path, again)
    assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)

    kept, meta = arrays.load_arrays(path)
    name, other = "model.layers.0.mlp.router.weight", "model.embed_tokens.weight"
    missing = {key: kept[key] for key in kept if key != name}
    damaged = [(missing, name), (kept | {other: torch.zeros(64, 32)}, other)]
    for content, odd in damaged:
        arrays.save_arrays(path, content, meta)
        plain = copy.deepcopy(before)
        with pytest.raises(ValueError, match=f"does not fit this model: {odd}"):
            adamoe.load_null_experts(path, plain)
        assert torch.equal(plain(TOKENS).logits, before(TOKENS).logits)


WORDS = "Answer Question A B C D E . : [UNK] sea tree sky car where do fish live ?".split()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A folder with a random model and a tokenizer of a few words."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("olmoe")
    tiny("olmoe").save_pretrained(folder)
    words = {word: i for i, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(words, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"tokenizer_object": tokenizer, "unk_token": "[UNK]"}
    transformers.PreTrainedTokenizerFast(**special).save_pretrained(folder)
    return folder


@pytest.fixture
def arc(tmp_path):
    """A data folder with a few questions, whose answer is always B."""
    folder = tmp_path / "data" / "arc" / "ARC-V1-Feb2018-2" / "ARC-Challenge"
    folder.mkdir(parents=True)
    words = {"A": "tree", "B": "sky", "C": "sea", "D": "car"}
    choices = [{"text": text, "label": label} for label, text in words.items()]
    question = {"stem": "where do fish live ?", "choices": choices}
    for name, count in (("Train", 12), ("Dev", 9)):
        lines = []
        for i in range(count):
            lines.append(json.dumps({"id": f"{name}{i}", "question": question, "answerKey": "B"}))
        (folder / f"ARC-Challenge-{name}.jsonl").write_text("\n".join(lines))
    return tmp_path / "data"


SHORT = "--full --device cpu --workers 1 --threads 1 --batch-size 4 --steps 6 --lora-rank 2".split()
RANDOM = "--model random --num-layers 2 --d-model 16 --d-ff 64 --num-heads 2 --context 12".split()
RANDOM = [*SHORT, *RANDOM, "--lr", "1e-2"]


def test_full_run_from_files_to_claims(checkpoint, arc, command_line, tmp_path):
    flags = [*SHORT, "--model", checkpoint, "--data-dir", arc, "--lr", "1e-2", "--ablate"]
    done = command_line(adamoe, *flags, "--train-examples", 8)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "runs" / "adamoe-full"
    told = report(folder)
    arms = {name: found[0] for name, found in told["results"]["arms"].items()}
    assert arms["vanilla"]["load"] == 2.0 and 0.5 < arms["adamoe"]["load"] < 2.5
    assert arms["adamoe"]["rows"] == arms["adamoe"]["true_picks"] > 0
    verdicts = {claim["id"]: claim["verdict"] for claim in told["claims"]}
    assert verdicts["adamoe.flops"] == verdicts["adamoe.null_free"] == "passed"
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    losses = [line["task_loss"] for line in metrics if line["arm"] == "vanilla-seed0"]
    assert losses[5] < losses[0] - 0.3  # it learns to answer with a letter
    saved = adamoe.load_trained(folder / "arms" / "adamoe-seed0.npz")
    task = pretrained.LetterTask(str(checkpoint), "arc-c", arc, 8, 512, 4, 0, "cpu")
    assert task.train.labels.tolist() == [1] * 8 and task.letters.tolist() == [2, 3, 4, 5]
    again = adamoe.evaluate(saved, task)
    assert all(again[key] == arms["adamoe"][key] for key in ("accuracy", "load", "histogram"))


def test_dry_run_of_mixtral(command_line, tmp_path):
    flags = ["--full", "--device", "cpu", "--dry-run", "--data-dir", tmp_path]
    done = command_line(adamoe, *flags, "--model", pretrained.MIXTRAL)
    for figure in ("46,702,792,704", "88.4 %", "93.41 GB in 16 bits"):
        assert figure in done.stdout


def test_two_processes_share_a_model(fork, command_line, tmp_path):
    """Each holds half of it (FSDP2), and both together do what one does."""
    two = fork.two("adamoe.py", *RANDOM, "--out", tmp_path / "two", folder=tmp_path)
    assert command_line(adamoe, *RANDOM, "--out", tmp_path / "one").returncode == 0
    first, second = map(finished, two)
    assert [first.returncode, second.returncode] == [0, 0], first.stderr + second.stderr
    kept = []
    for folder in (tmp_path / "one", tmp_path / "two"):
        kept.append(arrays.load_arrays(folder / "arms" / "adamoe-seed0.npz")[0])
    assert kept[0].keys() == kept[1].keys() and len(kept[0]) == 14
    for name in kept[0]:
        torch.testing.assert_close(kept[0][name], kept[1][name], atol=2e-4, rtol=0)
