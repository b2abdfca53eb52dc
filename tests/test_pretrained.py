"""data/pretrained.py and `mcsmoe.py --full` on a tiny Switch model, made and saved by transformers on the spot."""

import importlib.util
import json
import sys

import pytest
import torch

import bridge as common
import mcsmoe
from data import pretrained, tasks

WORDS = "a gorgeous film dull and long yes no 1 2 negative positive sst2 sentence : sentence1 sentence2 mrpc premise"
WORDS += " copa question cause effect multirc paragraph answer winogrande wikiqa the it was _"


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers", reason="only --full needs transformers (requirements-full.txt)")


@pytest.fixture(scope="module")
def checkpoint(transformers, tmp_path_factory):
    """A folder as the hub would give it: config.json, model.safetensors, tokenizer.json."""
    import tokenizers

    folder = tmp_path_factory.mktemp("model") / "tiny-switch"
    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *dict.fromkeys(WORDS.split())])}
    plain = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    plain.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    plain.post_processor = tokenizers.processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=plain, **special).save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.SwitchTransformersConfig(
        vocab_size=len(vocabulary), d_model=16, d_kv=8, d_ff=24, num_layers=4, num_decoder_layers=4, num_heads=2,
        num_sparse_encoder_layers=2, num_sparse_decoder_layers=2, num_experts=4, expert_capacity=6,
        decoder_start_token_id=0,
    )  # fmt: skip
    transformers.SwitchTransformersForConditionalGeneration(config).save_pretrained(folder)
    return folder


@pytest.fixture
def data_dir(tmp_path):
    folder = tmp_path / "data" / "sst2" / "SST-2"
    folder.mkdir(parents=True)
    rows = ["a gorgeous film\t1\n", "dull and long\t0\n", "the film was gorgeous and long\t1\n", "it was dull\t0\n"]
    for name, times in (("train.tsv", 12), ("dev.tsv", 5)):
        (folder / name).write_text("sentence\tlabel\n" + "".join(rows * times))
    (tmp_path / "data" / "squad").mkdir()
    qas = [{"question": "the film it was ?", "answers": [{"text": "gorgeous and long"}, {"text": "long"}]}]
    qas += [{"question": "it was ?", "answers": [{"text": "dull"}]}]
    for name, times in (("train-v1.1.json", 8), ("dev-v1.1.json", 3)):
        document = {"data": [{"paragraphs": [{"context": "a gorgeous and long film", "qas": qas * times}]}]}
        (tmp_path / "data" / "squad" / name).write_text(json.dumps(document))
    (tmp_path / "data" / "hotpotqa").mkdir()
    context = [["Film", ["It was dull.", " It was long."]], ["Other", ["A gorgeous film."]]]
    asked = [("the film it was ?", "dull", [["Film", 0]]), ("it was long ?", "yes", [["Film", 1], ["Other", 0]])]
    asked = [{"question": q, "answer": a, "supporting_facts": f, "context": context} for q, a, f in asked]
    for name, times in (("hotpot_train_v1.1.json", 8), ("hotpot_dev_distractor_v1.json", 3)):
        (tmp_path / "data" / "hotpotqa" / name).write_text(json.dumps(asked * times))
    return tmp_path / "data"


def a_batch():
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 30, (5, 12), generator=generator)
    ids[2:, 8:] = 0
    decoder = torch.randint(3, 30, (5, 2), generator=generator)
    return {"input_ids": ids, "attention_mask": (ids > 0).long(), "decoder_input_ids": decoder}


def test_the_patched_model_equals_the_original(transformers, checkpoint):
    """Routing, scores and the capacity of 6 tokens a sequence included."""
    original = transformers.SwitchTransformersForConditionalGeneration.from_pretrained(checkpoint).eval()
    patched = pretrained.load_switch(checkpoint, mcsmoe.switch_layer)
    layers = mcsmoe.moe_layers(patched)
    assert list(layers) == [
        f"{part}.block.{i}.layer.{j}.mlp" for part, j in (("encoder", 1), ("decoder", 2)) for i in (1, 3)
    ]
    with torch.no_grad():
        ours, theirs = patched(**a_batch()).logits, original(**a_batch()).logits
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
        for layer in layers.values():
            layer.capacity = None
        assert (patched(**a_batch()).logits - theirs).abs().max() > 1e-4  # it was binding
    assert common.count_parameters(patched) == sum(p.numel() for p in original.parameters())


def test_an_export_fills_an_empty_model(checkpoint, tmp_path):
    model = pretrained.load_switch(checkpoint, mcsmoe.switch_layer)
    empty = pretrained.empty_switch(checkpoint, mcsmoe.switch_layer)
    assert all(p.is_meta for p in empty.parameters())
    size = mcsmoe.export_model(model, tmp_path / "model.npz")
    assert size < 4 * common.count_parameters(model) + 60_000  # tied embeddings are stored once
    again = mcsmoe.import_model(tmp_path / "model.npz", empty)
    with torch.no_grad():
        assert torch.equal(again(**a_batch()).logits, model(**a_batch()).logits)
    assert again.lm_head.weight is again.shared.weight


def test_the_ledger_is_the_parameter_count_of_the_real_shape(transformers):
    config = transformers.SwitchTransformersConfig(
        d_model=768, d_kv=64, d_ff=3072, num_layers=12, num_decoder_layers=12, num_heads=12,
        num_sparse_encoder_layers=6, num_sparse_decoder_layers=6, num_experts=32,
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.SwitchTransformersForConditionalGeneration(config)
    full = mcsmoe.switch_ledger(mcsmoe.FULL)[0]
    assert full[0] == "full" and int(full[1].replace(",", "")) == sum(p.numel() for p in model.parameters())


FLAGS = (
    "--full --kept 2 --rank 2 --c-rank 1 --calibration 8 --batch-size 6 --finetune-steps 3 --recover-steps 3 "
    "--compress-steps 6 --lr 1e-3 --recover-lr 1e-3 --compress-lr 1e-3 --workers 1 --threads 1"
).split()


def test_full_scale_end_to_end(command_line, checkpoint, data_dir, tmp_path):
    plot = ["--plot"] if importlib.util.find_spec("matplotlib") else []
    done = command_line(mcsmoe, *FLAGS, "--model", checkpoint, "--data-dir", data_dir, *plot)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "runs" / "mcsmoe-full" / "results.json").read_text())
    arms = report["results"]["arms"]
    assert {*mcsmoe.RECIPES, "msmoe+kd", "mc", "mc_all", "c_equal_size"} <= set(arms)
    assert arms["full"][0]["flops"] == arms["msmoe"][0]["flops"] > arms["mc"][0]["flops"]
    experts = 2 * 16 * 24
    assert arms["full"][0]["parameters"] - arms["msmoe"][0]["parameters"] == 3 * 2 * experts
    assert arms["mc"][0]["reload_change"] < 1e-5
    layers = [layer["layer"] for layer in arms["msmoe"][0]["layers"]]
    assert layers == ["encoder.block.3.layer.1.mlp", "decoder.block.1.layer.2.mlp", "decoder.block.3.layer.2.mlp"]
    assert sum(len(layer["dominant"]) for layer in arms["msmoe"][0]["layers"]) == 6
    assert "381" in done.stdout or "733 M" in done.stdout  # the ledger of the real shape
    assert report["config"]["num_experts"] == 4 and "points" in report["claims"][1]["measured"]
    out = tmp_path / "runs" / "mcsmoe-full"
    loaded = mcsmoe.load_trained(out / "arms" / "mc-seed0.npz")
    run = common.Run("mcsmoe", "full", "cpu", torch.float32, [0], out, data_dir=data_dir)
    task = mcsmoe.make_task(mcsmoe.Config(**report["config"]), run, 0, 1)
    assert mcsmoe.evaluate(loaded, task, run)["loss"] == arms["mc"][0]["loss"]


@pytest.mark.parametrize("task", ["squad", "hotpotqa"])
def test_answers_in_words_are_generated_and_scored(command_line, checkpoint, data_dir, tmp_path, monkeypatch, task):
    monkeypatch.setattr(tasks.PromptBatches, "MAX_ANSWER", 4)  # to be quick
    flags = [*FLAGS, "--task", task, "--arms", "mc,redirect+kd", "--model", checkpoint, "--data-dir", data_dir]
    done = command_line(mcsmoe, *flags)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "runs" / "mcsmoe-full" / "results.json").read_text())
    arms = report["results"]["arms"]
    expected = ["full", "msmoe", "redirect", "msmoe+kd", "redirect+kd", "mc"]  # and what those start from
    assert list(arms) == expected
    assert all(claim["verdict"] == "not measured" for claim in report["claims"])
    header, first = (report["results"]["tables"][1][key] for key in ("header", "rows"))
    assert header[1:4] == ["nats", "f1 %", "exact match %"] and len(first[0]) == len(header)
    assert len(arms["mc"][0]["f1_blocks"]) == 6 and 0 <= arms["mc"][0]["exact_match"] <= arms["mc"][0]["f1"] <= 1


def prompts(checkpoint, data_dir, tmp_path, name, **options):
    (tmp_path / "out" / "arms").mkdir(parents=True, exist_ok=True)
    config = mcsmoe.replace(mcsmoe.FULL, model=str(checkpoint), task=name, **options)
    run = common.Run("mcsmoe", "full", "cpu", torch.float32, [0], tmp_path / "out", data_dir=data_dir)
    return mcsmoe.make_task(config, run, 0, 1), run


@torch.no_grad()
def outspoken(checkpoint):
    """A model whose answers differ."""
    model, generator = pretrained.load_switch(checkpoint, mcsmoe.switch_layer), torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


def test_generation_is_greedy_and_sees_no_label(checkpoint, data_dir, tmp_path):
    model = outspoken(checkpoint)
    with torch.no_grad():
        batch = a_batch()
        ids = torch.zeros(5, 1, dtype=torch.long)
        for _ in range(6):
            inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
            ids = torch.cat([ids, model(**inputs, decoder_input_ids=ids).logits[:, -1:].argmax(-1)], dim=1)
        found = pretrained.generate(model, batch, 6)
    ended = (ids[:, 1:] == 1).cumsum(1).cumsum(1) > 1  # after the first end of text
    assert torch.equal(found, ids[:, 1:].masked_fill(ended, 0)[:, : found.shape[1]]) and len(found.unique(dim=0)) > 1


def test_answers_of_several_tokens(checkpoint, data_dir, tmp_path):
    task, run = prompts(checkpoint, data_dir, tmp_path, "squad", batch_size=4, calibration=8)
    batch, tokenizer = task.validation[0], pretrained.load_tokenizer(checkpoint)
    assert tokenizer.batch_decode(batch["labels"].clamp(min=0)[:2]) == [
        "gorgeous and long </s>",
        "dull </s> <pad> <pad>",
    ]
    assert batch["labels"][1].tolist()[1:] == [1, -100, -100]
    model = pretrained.load_switch(checkpoint, mcsmoe.switch_layer)
    seen = mcsmoe.calibrate(model, task)
    answers = sum(int((batch["labels"] >= 0).sum()) for batch in task.calibration)
    assert len(seen["decoder.block.1.layer.2.mlp"].inputs) == answers < 8 * 4  # without padding
    with torch.no_grad():
        logits, labels = task.outputs(model, batch)
        own = model(**{name: batch[name] for name in ("input_ids", "attention_mask", "labels")}).logits
        torch.testing.assert_close(logits, own)  # as the library shifts labels, start token first
        changed = {**batch, "labels": torch.where(labels < 0, 5, labels)}  # padding is seen by no answer before it
        torch.testing.assert_close(task.outputs(model, changed)[0][labels >= 0], logits[labels >= 0])
        log_probs = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
        loss = -torch.stack([row[label >= 0].mean() for row, label in zip(log_probs, labels)]).mean()
    assert mcsmoe.evaluate(model, task, run)["loss"] == pytest.approx(float(loss), rel=1e-5)
    assert task.scores(["Gorgeous, and long!", "the dull film"], slice(2)) == {
        "f1": pytest.approx(5 / 6),
        "exact_match": 0.5,
    }


def test_answers_come_from_the_model_alone(checkpoint, data_dir, tmp_path):
    model = outspoken(checkpoint)
    data = pretrained.TextToText("squad", data_dir, checkpoint, 64, "cpu")
    batch = data.encode(data.dev[:2])
    logits = torch.zeros(2, 4, 40)  # of the right answer, token by token: not to be looked at
    with torch.no_grad():
        expected = data.tokenizer.batch_decode(pretrained.generate(model, batch, 64), skip_special_tokens=True)
    assert data.answers(model, batch, logits) == expected and any(expected)
    long = data.encode([data.dev[0]._replace(answers=("long " * 99,))])["labels"]
    assert long.shape == (1, 64) and long[0, -1] == 1  # what fits a decoder's experts, the end included
    words = pretrained.TextToText("sst2", data_dir, checkpoint, 64, "cpu")
    for first, expected in ((words.words[1], 1), (words.words[0], 0), (3, None)):
        logits = torch.zeros(1, 2, 40)
        logits[0, 0, first], logits[0, 1, words.words[1]] = 2.0, 3.0
        assert words.answers(model, batch, logits) == [expected]


def test_distillation_leaves_padding_out(checkpoint, data_dir, tmp_path):
    task, run = prompts(checkpoint, data_dir, tmp_path, "squad", batch_size=4, calibration=8)
    model, teacher = (pretrained.load_switch(checkpoint, mcsmoe.switch_layer) for _ in range(2))
    with torch.no_grad():
        teacher.shared.weight.mul_(1.5)
        (ours, labels), (wanted, _) = (task.outputs(m, task.train_batch(0)) for m in (model, teacher))
        expected = mcsmoe.distillation_loss(ours[labels >= 0], wanted[labels >= 0], 2.0)
        assert (labels < 0).any() and expected > 1e-4
    mcsmoe.tune(model, task, mcsmoe.FULL, 1, 1e-3, teacher, metrics=tmp_path / "steps.jsonl")
    line = json.loads((tmp_path / "steps.jsonl").read_text())
    assert line["distillation"] == pytest.approx(float(expected), rel=1e-4)


def test_epochs_cover_the_training_set_and_padding_stays_out(checkpoint, data_dir, tmp_path):
    task, _ = prompts(checkpoint, data_dir, tmp_path, "sst2", batch_size=10, calibration=20)
    rows = torch.cat([F_pad(task.train_batch(step)["input_ids"]) for step in range(24)])  # five epochs of 48
    _, counts = rows.unique(dim=0, return_counts=True)
    assert counts.tolist() == [60] * 4
    model = pretrained.load_switch(checkpoint, mcsmoe.switch_layer)
    seen = mcsmoe.calibrate(model, task)
    valid = sum(int(batch["attention_mask"].sum()) for batch in task.calibration)
    assert len(seen["encoder.block.1.layer.1.mlp"].inputs) == valid < 20 * task.calibration[0]["input_ids"].shape[1]
    assert len(seen["decoder.block.1.layer.2.mlp"].inputs) == 20 * 2
    batch = task.validation[0]
    assert batch["labels"][:, 1].unique().tolist() == [1]  # the answer, then the end
    tokenizer = pretrained.load_tokenizer(checkpoint)
    assert set(tokenizer.convert_ids_to_tokens(batch["labels"][:, 0])) == {"positive", "negative"}


def F_pad(ids):
    return torch.nn.functional.pad(ids, (0, 20 - ids.shape[1]))


def test_mistakes_are_one_line(command_line, checkpoint, data_dir, tmp_path, monkeypatch):
    def refused(*flags, expected, code=2):
        done = command_line(mcsmoe, "--full", "--data-dir", data_dir, *flags)
        assert done.returncode == code and expected in done.stderr and done.stderr.count("\n") == 1, done.stderr

    broken = tmp_path / "broken"
    broken.mkdir()
    refused("--model", "no/such/folder/here", expected="no such folder")
    refused("--model", broken, expected="lacks config.json, tokenizer.json, model.safetensors or pytorch_model.bin")
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (broken / name).write_bytes((checkpoint / name).read_bytes())
    (broken / "model.safetensors").write_bytes((checkpoint / "model.safetensors").read_bytes()[:5000])
    refused("--model", broken, expected="holds no readable weights")
    config = json.loads((checkpoint / "config.json").read_text())
    (broken / "model.safetensors").write_bytes((checkpoint / "model.safetensors").read_bytes())
    (broken / "config.json").write_text(json.dumps({**config, "num_experts": 5}))
    refused("--model", broken, expected="weights missing or of another shape")
    (broken / "config.json").write_text(json.dumps({**config, "model_type": "t5"}))
    refused("--model", broken, expected="holds a t5 model")
    (broken / "config.json").write_text("{")
    refused("--model", broken, expected="config.json cannot be read")
    refused("--model", checkpoint, "--kept", "9", expected="the model has 4 experts")
    (data_dir / "sst2" / "SST-2" / "train.tsv").write_text("sentence\tlabel\nfine\tgood\n")
    refused("--model", checkpoint, expected="train.tsv, line 2")
    monkeypatch.setitem(sys.modules, "transformers", None)
    (data_dir / "sst2" / "SST-2" / "train.tsv").write_text("fine\t1\n")
    refused("--model", checkpoint, expected="pip install -r requirements-full.txt")


def test_a_model_that_cannot_be_downloaded_says_what_to_put_where(transformers, tmp_path, monkeypatch):
    import huggingface_hub

    def offline(*args, **options):
        raise ConnectionError("nobody there")

    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", offline)
    with pytest.raises(
        FileNotFoundError, match="put config.json, tokenizer.json .*huggingface.co/google/x into .*google--x"
    ):
        pretrained.locate("google/x", tmp_path)


def test_answers_must_be_one_token(checkpoint):
    tokenizer = pretrained.load_tokenizer(checkpoint)
    for prompt in filter(lambda prompt: prompt.words, tasks.PROMPTS.values()):
        assert len(set(tasks.word_ids(tokenizer, prompt.words))) == 2
    for words, expected in {("yes", "unheard"): "'unheard' is not one token", ("yes no",): "not one token"}.items():
        with pytest.raises(ValueError, match=expected):
            tasks.word_ids(tokenizer, words)
    with pytest.raises(ValueError, match="the same token"):
        tasks.word_ids(tokenizer, ("yes", "yes"))
