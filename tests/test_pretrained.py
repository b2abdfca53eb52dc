"""data/pretrained.py, data/targets.py and `mcsmoe.py --full` on tiny models of transformers."""

import functools
import json

import pytest
import torch

import common
import mcsmoe
from data import pretrained

WORDS = (
    "a gorgeous film dull and long yes no 1 2 negative positive sst2 sentence : sentence1 "
    "sentence2 mrpc premise copa question cause effect multirc paragraph answer winogrande wikiqa "
    "the it was _"
)


@pytest.fixture(scope="module")
def transformers():
    why = "only --full needs transformers (requirements-full.txt)"
    return pytest.importorskip("transformers", reason=why)


def a_tokenizer(transformers):
    import tokenizers

    names = ["<pad>", "</s>", "<unk>", *dict.fromkeys(WORDS.split())]
    vocabulary = {word: i for i, word in enumerate(names)}
    plain = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    plain.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return plain, special, len(vocabulary)


@pytest.fixture(scope="module")
def checkpoint(transformers, tmp_path_factory):
    """A folder as the hub would give it: config.json, model.safetensors, tokenizer.json."""
    import tokenizers

    folder = tmp_path_factory.mktemp("model") / "tiny-switch"
    plain, special, size = a_tokenizer(transformers)
    ends = {"single": "$A </s>", "special_tokens": [("</s>", 1)]}
    plain.post_processor = tokenizers.processors.TemplateProcessing(**ends)
    transformers.PreTrainedTokenizerFast(tokenizer_object=plain, **special).save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.SwitchTransformersConfig(
        vocab_size=size, d_model=16, d_kv=8, d_ff=24, num_layers=4, num_decoder_layers=4, num_heads=2,
        num_sparse_encoder_layers=2, num_sparse_decoder_layers=2, num_experts=4, expert_capacity=6,
        decoder_start_token_id=0,
    )  # fmt: skip
    transformers.SwitchTransformersForConditionalGeneration(config).save_pretrained(folder)
    return folder


FAMILIES = {
    "Mixtral": {"num_local_experts": 4, "intermediate_size": 24},
    "Olmoe": {"num_experts": 4, "intermediate_size": 24},
    "Qwen2Moe": {
        "num_experts": 4, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 20,
        "intermediate_size": 24,
    },
    "Qwen3Moe": {"num_experts": 4, "moe_intermediate_size": 24, "intermediate_size": 24, "head_dim": 8},
}  # fmt: skip


@pytest.fixture(scope="module")
def causal(transformers, tmp_path_factory):
    """causal("Mixtral") -> the folder of a tiny one with random weights."""

    @functools.cache
    def make(family):
        folder = tmp_path_factory.mktemp("model") / f"tiny-{family}"
        plain, special, size = a_tokenizer(transformers)
        fast = transformers.PreTrainedTokenizerFast(tokenizer_object=plain, **special)
        fast.save_pretrained(folder)
        config = getattr(transformers, f"{family}Config")(
            vocab_size=size, hidden_size=16, num_hidden_layers=3, num_attention_heads=2,
            num_key_value_heads=2, num_experts_per_tok=2, eos_token_id=1, bos_token_id=None,
            pad_token_id=0, **FAMILIES[family],
        )  # fmt: skip
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():  # routers and shared gates that matter
            parameter.data += 0.2 * torch.randn(parameter.shape)
        model.save_pretrained(folder)
        return folder

    return make


SST2 = "a gorgeous film\t1\ndull and long\t0\nthe film was gorgeous and long\t1\nit was dull\t0\n"
QUESTIONS = [
    {"question": "the film it was ?", "answers": [{"text": "gorgeous and long"}, {"text": "long"}]},
    {"question": "it was ?", "answers": [{"text": "dull"}]},
]


def squad(times):
    paragraph = {"context": "a gorgeous and long film", "qas": QUESTIONS * times}
    return json.dumps({"data": [{"paragraphs": [paragraph]}]})


FILES = {
    "sst2/SST-2/train.tsv": "sentence\tlabel\n" + SST2 * 12,
    "sst2/SST-2/dev.tsv": "sentence\tlabel\n" + SST2 * 5,
    "squad/train-v1.1.json": squad(8),
    "squad/dev-v1.1.json": squad(3),
}


@pytest.fixture
def data_dir(tmp_path):
    for name, content in FILES.items():
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return tmp_path / "data"


def load_switch(folder):
    return pretrained.load_switch(folder, mcsmoe.switch_layer)


def a_batch():
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 30, (5, 12), generator=generator)
    ids[2:, 8:] = 0
    decoder = torch.randint(3, 30, (5, 2), generator=generator)
    return {"input_ids": ids, "attention_mask": (ids > 0).long(), "decoder_input_ids": decoder}


def test_the_patched_model_equals_the_original(transformers, checkpoint):
    """Routing, scores and the capacity of 6 tokens a sequence included."""
    switch = transformers.SwitchTransformersForConditionalGeneration
    original = switch.from_pretrained(checkpoint).eval()
    patched = load_switch(checkpoint)
    layers = mcsmoe.moe_layers(patched)
    with torch.no_grad():
        ours, theirs = patched(**a_batch()).logits, original(**a_batch()).logits
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
        for layer in layers.values():
            layer.capacity = None
        assert (patched(**a_batch()).logits - theirs).abs().max() > 1e-4  # it was binding


def test_the_ledger_of_switch_base_32_is_the_papers(transformers):
    """2.0B, 733M, 381M, and 571M for C-SMoE: of the real shape, which holds no memory here."""
    config = pretrained.switch_base_config(32)
    model = pretrained.empty_switch_like(config, mcsmoe.switch_layer)
    sizes = mcsmoe.ledger(model, mcsmoe.FULL)
    assert sizes["full"] == 1_978_514_688 == common.count_parameters(model)
    millions = [size / 1e6 for size in sizes.values()]
    assert millions == pytest.approx([1979, 733, 381, 571], abs=1.0)


FLAGS = (
    "--full --kept 2 --rank 2 --c-rank 1 --calibration 8 --batch-size 6 --recover-steps 3 "
    "--compress-steps 6 --recover-lr 1e-3 --compress-lr 1e-3 --workers 1 --threads 1"
).split()
SWITCH = [*FLAGS, "--finetune-steps", "3", "--lr", "1e-3"]


def report_of(tmp_path):
    report = json.loads((tmp_path / "runs" / "mcsmoe-full" / "results.json").read_text())
    return report, {arm: found[0] for arm, found in report["results"]["arms"].items()}


def written_back(transformers, path, folder, tokens):
    """Logits of plain transformers for what to_transformers wrote, and of load_trained."""
    mcsmoe.to_transformers(path, folder)
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        return plain(tokens).logits, mcsmoe.load_trained(path)(tokens).logits


def test_full_scale_end_to_end(command_line, transformers, checkpoint, data_dir, tmp_path):
    done = command_line(mcsmoe, *SWITCH, "--model", checkpoint, "--data-dir", data_dir)
    assert done.returncode == 0, done.stderr
    report, arms = report_of(tmp_path)
    assert set(mcsmoe.DEFAULT) == set(arms)
    assert arms["full"]["parameters"] - arms["msmoe"]["parameters"] == 3 * 2 * (2 * 16 * 24)
    empty = pretrained.empty_switch(checkpoint, mcsmoe.switch_layer)
    sizes = mcsmoe.ledger(empty, mcsmoe.Config(**report["config"]))
    assert arms["msmoe"]["parameters"] == sizes["M-SMoE"]
    assert arms["mc"]["parameters"] == pytest.approx(sizes["MC-SMoE"], abs=24)  # within a neuron
    merged = [layer["layer"] for layer in arms["msmoe"]["layers"]]
    names = ["encoder.block.3.layer.1", "decoder.block.1.layer.2", "decoder.block.3.layer.2"]
    assert merged == [f"{name}.mlp" for name in names]
    out = tmp_path / "runs" / "mcsmoe-full"
    loaded = mcsmoe.load_trained(out / "arms" / "mc-seed0.pt")
    run = common.Run("mcsmoe", "full", "cpu", torch.float32, [0], out, data_dir=data_dir)
    run.config = mcsmoe.Config(**report["config"])
    task = mcsmoe.make_task(common.Job(run, "mc", 0), 1)
    assert mcsmoe.evaluate(loaded, task, run)["loss"] == pytest.approx(arms["mc"]["loss"], rel=1e-6)
    # and what it wrote is a model of the library
    path = out / "arms" / "msmoe-seed0.pt"
    mcsmoe.to_transformers(path, tmp_path / "plain")
    switch = transformers.SwitchTransformersForConditionalGeneration
    plain = switch.from_pretrained(tmp_path / "plain").eval()
    with torch.no_grad():
        ours = mcsmoe.load_trained(path)(**a_batch()).logits
        torch.testing.assert_close(plain(**a_batch()).logits, ours, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_causal_models_are_merged_recovered_exported_and_written_back(
    command_line, transformers, causal, tmp_path, family
):
    folder = causal(family)
    tokens = torch.randint(3, 30, (2, 12), generator=torch.Generator().manual_seed(0))
    original = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    layers = (mcsmoe.switch_layer, mcsmoe.from_block)
    converted = pretrained.load_mixtures(folder, torch.float32, *layers)
    with torch.no_grad():
        logits = original(tokens).logits
        torch.testing.assert_close(converted(tokens).logits, logits, atol=1e-6, rtol=0)

    (tmp_path / "own.txt").write_text(f"{WORDS} . " * 40)
    flags = ["--model", folder, "--text", tmp_path / "own.txt", "--context", 16]
    flags += ["--eval-sequences", 8]
    arms = ["full", "full@top_k=1", "msmoe", "mc"]
    done = command_line(mcsmoe, *FLAGS, *flags, "--arms", *arms)
    assert done.returncode == 0, done.stderr
    _, found = report_of(tmp_path)
    assert found["full"]["parameters"] - found["msmoe"]["parameters"] == 2 * 2 * (3 * 16 * 24)
    assert found["full"]["loss"] != found["full@top_k=1"]["loss"]
    assert found["msmoe"]["loss"] != found["msmoe"]["loss at once"]  # a few steps of recovery
    out = tmp_path / "runs" / "mcsmoe-full" / "arms"
    for arm in ("msmoe", "mc"):
        path = out / f"{arm}-seed0.pt"
        plain, ours = written_back(transformers, path, tmp_path / arm, tokens)
        torch.testing.assert_close(plain, ours, atol=1e-6, rtol=1e-5)


def prompts(checkpoint, data_dir, tmp_path, name, **options):
    (tmp_path / "out" / "arms").mkdir(parents=True, exist_ok=True)
    config = mcsmoe.replace(mcsmoe.FULL, model=str(checkpoint), task=name, **options)
    run = common.Run("mcsmoe", "full", "cpu", torch.float32, [0], tmp_path / "out", config)
    run.data_dir = data_dir
    job = common.Job(run, "full", 0)
    return mcsmoe.make_task(job, 1), job


def test_answers_of_several_tokens(checkpoint, data_dir, tmp_path):
    task, job = prompts(checkpoint, data_dir, tmp_path, "squad", batch_size=4, calibration=8)
    batch = task.validation[0]
    assert batch["labels"][1].tolist()[1:] == [1, -100, -100]
    model = load_switch(checkpoint)
    seen = mcsmoe.calibrate(model, task)
    answers = sum(int((batch["labels"] >= 0).sum()) for batch in task.calibration)
    assert len(seen["decoder.block.1.layer.2.mlp"]) == answers < 8 * 4  # without padding
    with torch.no_grad():
        logits, labels = task.outputs(model, batch)
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
        own = model(**inputs).logits
        torch.testing.assert_close(logits, own)  # as the library shifts labels, start token first
        given = labels >= 0
        log_probs = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
        means = [row[kept].mean() for row, kept in zip(log_probs, given)]
        loss = -torch.stack(means).mean()
    assert mcsmoe.evaluate(model, task, job.run)["loss"] == pytest.approx(float(loss), rel=1e-5)


@torch.no_grad()
def test_answers_come_from_the_model_alone(checkpoint, data_dir):
    model, generator = load_switch(checkpoint), torch.Generator().manual_seed(3)
    for parameter in model.parameters():  # so that its answers differ
        parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    data = pretrained.TextToText("squad", data_dir, checkpoint, 64, "cpu")
    batch = data.encode(data.dev[:2])
    logits = torch.zeros(2, 4, 40)  # of the right answer, token by token: not to be looked at
    generated = pretrained.generate(model, batch, 64)
    expected = data.tokenizer.batch_decode(generated, skip_special_tokens=True)
    assert data.answers(model, batch, logits) == expected and any(expected)
    words = pretrained.TextToText("sst2", data_dir, checkpoint, 64, "cpu")
    for first, expected in ((words.words[1], 1), (words.words[0], 0), (3, None)):
        logits = torch.zeros(1, 2, 40)
        logits[0, 0, first], logits[0, 1, words.words[1]] = 2.0, 3.0
        assert words.answers(model, batch, logits) == [expected]


def test_distillation_leaves_padding_out(checkpoint, data_dir, tmp_path):
    task, job = prompts(checkpoint, data_dir, tmp_path, "squad", batch_size=4, calibration=8)
    model, teacher = (load_switch(checkpoint) for _ in range(2))
    with torch.no_grad():
        teacher.shared.weight.mul_(1.5)
        ours, labels = task.outputs(model, task.train_batch(0))
        wanted, _ = task.outputs(teacher, task.train_batch(0))
        expected = mcsmoe.distillation_loss(ours[labels >= 0], wanted[labels >= 0], 2.0)
        assert (labels < 0).any() and expected > 1e-4
    mcsmoe.tune(job, model, task, 1, 1e-3, teacher)
    line = json.loads(job.path(".jsonl").read_text())
    assert line["distillation"] == pytest.approx(float(expected), rel=1e-4)


def test_epochs_cover_the_training_set_and_padding_stays_out(checkpoint, data_dir, tmp_path):
    task, _ = prompts(checkpoint, data_dir, tmp_path, "sst2", batch_size=10, calibration=20)
    # five epochs of 48 rows
    batches = [task.train_batch(step)["input_ids"] for step in range(24)]
    padded = [torch.nn.functional.pad(ids, (0, 20 - ids.shape[1])) for ids in batches]
    _, counts = torch.cat(padded).unique(dim=0, return_counts=True)
    assert counts.tolist() == [60] * 4
    model = load_switch(checkpoint)
    seen = mcsmoe.calibrate(model, task)
    valid = sum(int(batch["attention_mask"].sum()) for batch in task.calibration)
    width = task.calibration[0]["input_ids"].shape[1]
    assert len(seen["encoder.block.1.layer.1.mlp"]) == valid < 20 * width
    assert len(seen["decoder.block.1.layer.2.mlp"]) == 20 * 2


def test_a_folder_without_a_model_is_one_line(command_line, data_dir, tmp_path):
    done = command_line(mcsmoe, "--full", "--data-dir", data_dir, "--model", tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "lacks config.json, tokenizer.json, model.safetensors" in done.stderr


def test_in_bf16_and_with_fewer_picks_what_was_measured_is_what_is_written(
    command_line, transformers, causal, tmp_path
):
    """Tuning leaves the frequencies of rotary positions in fp32; --top-k is in the checkpoint."""
    (tmp_path / "own.txt").write_text(f"{WORDS} . " * 80)
    flags = ["--model", causal("Mixtral"), "--text", tmp_path / "own.txt", "--context", 128]
    flags += ["--dtype", "bf16", "--top-k", 1, "--arms", "msmoe", "mc"]
    assert command_line(mcsmoe, *FLAGS, *flags).returncode == 0
    assert report_of(tmp_path)[1]["mc"]["reload_change"] < 0.1
    path = tmp_path / "runs" / "mcsmoe-full" / "arms" / "msmoe-seed0.pt"
    tokens = torch.randint(3, 30, (2, 12), generator=torch.Generator().manual_seed(0))
    plain, ours = written_back(transformers, path, tmp_path / "plain", tokens)
    torch.testing.assert_close(plain, ours, atol=0.1, rtol=0)
