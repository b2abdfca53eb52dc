"""Pre-trained mixture models from Hugging Face: find the files, load them, hand out plain modules
and tensors.

    load_switch(folder, make_layer)    the model, each mixture replaced by make_layer(its tensors)
    empty_switch(folder, make_layer)   the same without weights, to be filled from an export
    load_causal(folder, dtype)         a causal language model with experts (Mixtral, OLMoE, ...)
    random_causal(config, dtype, dev)  the same shape with random weights
    place_causal(source, ...)          either of these, patched, on its device; spread by torchrun
    shard(model, device)               spreads one over processes with FSDP2
    TextToText(task, ...)              a task of data/tasks.py: batches, logits, answers, scores
    LetterTask(...)                    multiple choice by the letter of the answer
    load_tokenizer(folder)             its tokenizer; encode(tokenizer, texts, length)

Needs transformers (requirements-full.txt), imported only when used. Nothing is executed from a
checkpoint: weights are safetensors, or a .bin that torch reads with weights_only. A script brings
its own layer, so this file knows no method.
"""

import os
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from data import mixtures, tasks, text
from data.mixtures import MixtureWeights, read_block, replace_blocks

# --------------------------------------------------------------------------------------------------
# Files of a checkpoint
# --------------------------------------------------------------------------------------------------

WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


def require_transformers():
    """The package, or ValueError with the way to get it."""
    try:
        import transformers
    except ImportError as error:
        raise ValueError(
            f"this needs transformers: pip install -r requirements-full.txt ({error})"
        ) from error
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


def locate(model: str, data_dir: str | Path) -> Path:
    """The folder of a checkpoint: `model` itself, or its copy under data_dir.

    What is not there is downloaded from the hub.
    Raises ValueError for a folder that lacks the configuration, weights or tokenizer,
    FileNotFoundError when the download fails; both say which files belong where.
    """
    folder = _folder(model, data_dir)
    if not folder.is_dir():
        _refuse_a_path(model)
        _download(model, folder)
    missing = [name for name in ("config.json", "tokenizer.json") if not (folder / name).is_file()]
    if not any((folder / name).is_file() for name in WEIGHTS):
        missing.append("model.safetensors or pytorch_model.bin")
    if missing:
        raise ValueError(
            f"{folder} lacks {', '.join(missing)};"
            " take them from the model's page on huggingface.co"
        )
    return folder


def is_here(model: str, data_dir: str | Path) -> bool:
    """Whether locate() finds a model without downloading it."""
    return _folder(model, data_dir).is_dir()


def _refuse_a_path(model: str) -> None:
    """What is not there and cannot be a name on the hub is not promised as a download."""
    if model.count("/") != 1 or model.startswith((".", "/", "~")):
        raise FileNotFoundError(
            f"model {model}: no such folder, and not a name like google/switch-base-32"
        )


def _folder(model: str, data_dir: str | Path) -> Path:
    given = Path(model).expanduser()
    if given.is_dir():
        return given
    return Path(data_dir).expanduser() / "models" / model.replace("/", "--")


def _download(model: str, folder: Path) -> None:
    require_transformers()
    import huggingface_hub  # comes with transformers; checks sizes and hashes, resumes

    huggingface_hub.utils.logging.set_verbosity_error()
    try:
        files = huggingface_hub.HfApi().list_repo_files(model)
        kind = "safetensors" if any(name.endswith(".safetensors") for name in files) else "bin"
        part = folder.with_name(folder.name + ".part")
        huggingface_hub.snapshot_download(
            model, local_dir=part, allow_patterns=["*.json", "*.model", f"*.{kind}"]
        )
        part.rename(folder)
    except Exception as error:  # the hub's client raises whatever its transport does
        reason = _reason(error)
        wanted = "config.json, tokenizer.json and model.safetensors or pytorch_model.bin"
        text = f"put {wanted} of https://huggingface.co/{model} into {folder} by hand"
        raise FileNotFoundError(
            f"model {model} is not here and cannot be downloaded ({reason}); {text}"
        ) from error


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:120]


def _config(folder: str | Path):
    transformers = require_transformers()
    try:
        return transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # a damaged file can fail in any way
        reason = _reason(error)
        raise ValueError(f"{folder}/config.json cannot be read: {reason}") from error


def _load(model_class, folder: str | Path, config, dtype: torch.dtype) -> nn.Module:
    """Weights into a model class, on the CPU. Raises ValueError: damaged, missing or misshapen."""
    options = {"config": config, "dtype": dtype, "local_files_only": True}
    options["output_loading_info"] = True
    options["ignore_mismatched_sizes"] = True  # they are reported below
    try:
        model, report = model_class.from_pretrained(folder, **options)
    except Exception as error:
        reason = _reason(error)
        raise ValueError(f"{folder} holds no readable weights: {reason}") from error
    wrong = [*map(str, report["missing_keys"]), *map(str, report["mismatched_keys"])]
    if wrong:
        some = ", ".join(sorted(wrong)[:3])
        raise ValueError(f"{folder}: weights missing or of another shape: {some}")
    return model.eval()


def load_tokenizer(folder: str | Path):
    transformers = require_transformers()
    try:
        return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # a damaged file can fail in any way
        reason = _reason(error)
        raise ValueError(f"{folder}: the tokenizer cannot be read: {reason}") from error


# --------------------------------------------------------------------------------------------------
# Switch: an encoder-decoder
# --------------------------------------------------------------------------------------------------


# make_layer(router_weight, w1, w2, act, capacity), of the shapes
# [experts, d_model], [experts, d_model, d_ff], [experts, d_ff, d_model]
MakeLayer = Callable[[Tensor, Tensor, Tensor, str, int], nn.Module]


def _switch_config(folder: str | Path):
    config = _config(folder)
    if config.model_type != "switch_transformers":
        raise ValueError(
            f"{folder} holds a {config.model_type} model; a switch_transformers one is needed"
        )
    config.dropout_rate = 0.0
    return config


def switch_base_config(num_experts: int):
    """The configuration of google/switch-base-8, -16, -32 ..., known before it is downloaded."""
    return require_transformers().SwitchTransformersConfig(
        d_model=768,
        d_kv=64,
        d_ff=3072,
        num_layers=12,
        num_decoder_layers=12,
        num_heads=12,
        num_sparse_encoder_layers=6,
        num_sparse_decoder_layers=6,
        num_experts=num_experts,
    )


def load_switch(folder: str | Path, make_layer: MakeLayer) -> nn.Module:
    """An encoder-decoder Switch model in fp32 without dropout, its mixtures replaced.

    Raises ValueError: damaged.
    """
    config = _switch_config(folder)
    model_class = require_transformers().SwitchTransformersForConditionalGeneration
    return _replace_mixtures(_load(model_class, folder, config, torch.float32), make_layer)


def empty_switch(folder: str | Path, make_layer: MakeLayer) -> nn.Module:
    """The same on the meta device: shapes without memory."""
    return empty_switch_like(_switch_config(folder), make_layer)


def empty_switch_like(config, make_layer: MakeLayer) -> nn.Module:
    with torch.device("meta"):
        model = require_transformers().SwitchTransformersForConditionalGeneration(config)
        return _replace_mixtures(model, make_layer)


def _replace_mixtures(model: nn.Module, make_layer: MakeLayer) -> nn.Module:
    config = model.config
    for block in [*model.encoder.block, *model.decoder.block]:
        feed_forward = block.layer[-1]
        if not feed_forward.is_sparse:
            continue
        mixture = feed_forward.mlp
        experts = [mixture.experts[f"expert_{index}"] for index in range(config.num_experts)]
        router_weight = mixture.router.classifier.weight
        w1 = torch.stack([expert.wi.weight.T for expert in experts])  # [experts, d_model, d_ff]
        w2 = torch.stack([expert.wo.weight.T for expert in experts])  # [experts, d_ff, d_model]
        act, capacity = config.dense_act_fn, config.expert_capacity
        feed_forward.mlp = make_layer(router_weight, w1, w2, act, capacity)
    return model.eval()


# --------------------------------------------------------------------------------------------------
# Causal language models with experts
# --------------------------------------------------------------------------------------------------


def causal_config(folder: str | Path):
    """The configuration of a checkpoint.

    Raises ValueError: damaged, or not a causal language model with experts.
    """
    config = _config(folder)
    is_causal = type(config) in require_transformers().MODEL_FOR_CAUSAL_LM_MAPPING
    if not (is_causal and hasattr(config, "num_experts_per_tok")):
        needed = "a causal language model with experts is needed"
        raise ValueError(f"{folder} holds a {config.model_type} model; {needed}")
    return _plain_forward(config)


def _plain_forward(config):
    config.output_router_logits = False  # the library's own balance loss knows no null experts
    config.use_cache = False
    return config


RANDOM_VOCABULARY = 32000  # Mixtral's


def mixtral_config(
    num_layers: int,
    d_model: int,
    d_ff: int,
    num_heads: int,
    num_experts: int,
    vocab_size: int = RANDOM_VOCABULARY,
):
    """The configuration of a Mixtral-shaped model, for random weights; 4 heads share a key and a
    value, as there.
    """
    kv_heads = num_heads // 4 if num_heads % 4 == 0 else num_heads
    config = require_transformers().MixtralConfig(
        vocab_size=vocab_size,
        hidden_size=d_model,
        intermediate_size=d_ff,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=kv_heads,
        num_local_experts=num_experts,
        num_experts_per_tok=2,
    )
    return _plain_forward(config)


def random_causal(config, dtype: torch.dtype, device: str) -> nn.Module:
    """A model with random weights; on the device "meta", shapes without memory."""
    with torch.device(device):
        return require_transformers().AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def empty_causal(folder: str | Path, dtype: torch.dtype) -> nn.Module:
    """A causal language model on the device "meta": shapes without memory.

    Only the rotary frequencies, which stand in no state dict, are real.
    """
    config = causal_config(folder)
    model = random_causal(config, dtype, "meta")
    rotary = model.base_model.rotary_emb
    model.base_model.rotary_emb = type(rotary)(config)
    return model


def load_causal(folder: str | Path, dtype: torch.dtype) -> nn.Module:
    """A causal language model on the CPU.

    Raises ValueError for damaged, missing or misshapen weights.
    """
    return _load(require_transformers().AutoModelForCausalLM, folder, causal_config(folder), dtype)


def place_causal(
    source, dtype: torch.dtype, device: str, patch: Callable[[nn.Module], None]
) -> nn.Module:
    """A causal language model after patch(model), on its device; under torchrun spread over all
    processes by shard().

    source  a folder, or a configuration for random weights. Raises ValueError like load_causal.
    """
    alone = not (torch.distributed.is_available() and torch.distributed.is_initialized())
    if not alone and torch.distributed.get_rank() > 0:  # the first process has the weights
        config = causal_config(source) if isinstance(source, (str, Path)) else source
        model = random_causal(config, dtype, "meta")
    elif isinstance(source, (str, Path)):
        model = load_causal(source, dtype)
    else:
        model = random_causal(source, dtype, device if alone else "cpu")
    patch(model)
    return model.to(device) if alone else shard(model, device)


def shard(model: nn.Module, device: str) -> nn.Module:
    """Spread a model over the processes of torchrun with FSDP2, a layer at a time. In place.

    Only the first process has to hold the weights; in the others the model may lie on the device
    "meta". Every process must call this with the same model. A layer's weights come together on
    each device only while it computes.
    """
    import torch.distributed as dist
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
    from torch.distributed.fsdp import fully_shard

    first = dist.get_rank() == 0
    whole = model.state_dict() if first else {}
    buffers = [buffer.detach().to(device) if first else None for _, buffer in model.named_buffers()]
    model.to("meta")
    mesh = dist.init_device_mesh(device, (dist.get_world_size(),))
    for module in [*model.base_model.layers, model]:
        fully_shard(module, mesh=mesh)
        module.set_gradient_divide_factor(1.0)  # the gradients' sum, not their mean
        module.set_force_sum_reduction_for_comms(True)  # the one way to it that gloo has
    model.to_empty(device=device)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, whole, options=options)
    for buffer, value in zip(model.buffers(), buffers):  # rotary frequencies are in no state dict
        if first:
            buffer.copy_(value)
        dist.broadcast(buffer, src=0)
    return model


def last_logits(model: nn.Module, tokens: Tensor, lengths: Tensor) -> Tensor:
    """What the model expects after each text, [batch, vocab_size] fp32; tokens [batch, time] are
    padded on the right.

    A causal model does not see what follows a position: the mask is for layers that count tokens.
    """
    positions, column = (lengths - 1).unique(return_inverse=True)  # only these logits are computed
    mask = torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]
    kept = positions.to(tokens.device)
    logits = model(input_ids=tokens, attention_mask=mask.long(), logits_to_keep=kept).logits
    row = torch.arange(len(tokens), device=logits.device)  # logits: [batch, positions, vocab_size]
    return logits[row, column.to(logits.device)].float()


# --------------------------------------------------------------------------------------------------
# Either kind
# --------------------------------------------------------------------------------------------------


MakeBlock = Callable[[nn.Module], nn.Module]  # a mixture block of transformers -> another layer


def is_switch(folder: str | Path) -> bool:
    """An encoder-decoder Switch model, or a causal one with experts? Raises ValueError: neither."""
    if _config(folder).model_type == "switch_transformers":
        return True
    causal_config(folder)
    return False


def load_mixtures(
    folder: str | Path,
    dtype: torch.dtype,
    make_switch: MakeLayer,
    make_block: MakeBlock,
    empty: bool = False,
) -> nn.Module:
    """A Switch model in fp32, or a causal one in dtype, with its mixtures replaced.

    empty: on the device "meta". Raises ValueError like load_switch, load_causal, replace_blocks.
    """
    if is_switch(folder):
        return empty_switch(folder, make_switch) if empty else load_switch(folder, make_switch)
    model = empty_causal(folder, dtype) if empty else load_causal(folder, dtype)
    replace_blocks(model, make_block)
    return model


def nominal_mixtures(
    name: str,
    data_dir: str | Path,
    dtype: torch.dtype,
    make_switch: MakeLayer,
    make_block: MakeBlock,
) -> nn.Module:
    """The same on the device "meta", of a well-known model before it is downloaded, too."""
    if is_here(name, data_dir):
        return load_mixtures(locate(name, data_dir), dtype, make_switch, make_block, empty=True)
    if name == "google/switch-base-32":
        return empty_switch_like(switch_base_config(32), make_switch)
    model = random_causal(find_config(name, data_dir, may_download=False), dtype, "meta")
    replace_blocks(model, make_block)
    return model


class SharedExpert(nn.Module):
    """What every token meets, scaled by the sigmoid of a gate of its own, if there is one."""

    def __init__(self, expert: nn.Module, gate: nn.Module | None):
        super().__init__()
        self.expert, self.gate = expert, gate

    def forward(self, x: Tensor) -> Tensor:
        y = self.expert(x)
        return y if self.gate is None else torch.sigmoid(self.gate(x)) * y


def shared_expert(read: MixtureWeights) -> SharedExpert | None:
    """Of a block that data/mixtures.py has read."""
    return None if read.shared is None else SharedExpert(read.shared, read.shared_gate)


def save_plain(
    model: nn.Module, names: Sequence[str], weights_of: Callable, folder: str | Path
) -> None:
    """Write a model whose mixtures were replaced as a plain checkpoint of transformers.

    names       of the replaced mixtures
    weights_of  name -> (router [experts, d_model], w1 and w2 [experts, in, out], w_gate like w1 or
                None, a SharedExpert or None)
    Raises ValueError for a weight that has no place in the plain model.
    """
    plain = type(model)(model.config).to(model.dtype)
    weights = model.state_dict()
    for name in names:
        write_mixture(plain.get_submodule(name), *weights_of(name))
        weights = {key: value for key, value in weights.items() if not key.startswith(f"{name}.")}
    odd = plain.load_state_dict(weights, strict=False).unexpected_keys
    if odd:
        raise ValueError(f"{odd[0]} has no place in a plain {type(model).__name__}")
    plain.save_pretrained(folder)


def write_mixture(
    block: nn.Module, router: Tensor, w1: Tensor, w2: Tensor, w_gate: Tensor | None, shared
) -> None:
    if w_gate is None:  # Switch: a module for each expert
        block.router.classifier.weight.copy_(router)
        for index, expert in enumerate(block.experts.values()):
            expert.wi.weight.copy_(w1[index].T)
            expert.wo.weight.copy_(w2[index].T)
        return
    read = read_block(block)
    read.router.copy_(router)
    read.w1.copy_(w_gate)
    read.w3.copy_(w1)
    read.w2.copy_(w2)
    if shared is not None:
        shared_expert(read).load_state_dict(shared.state_dict())


# --------------------------------------------------------------------------------------------------
# Which model fits, and what it takes
# --------------------------------------------------------------------------------------------------


MIXTRAL, OLMOE = "mistralai/Mixtral-8x7B-v0.1", "allenai/OLMoE-1B-7B-0924"


def choose_model(model: str, memory: float) -> str:
    """ "auto" is Mixtral where so many bytes hold it, else OLMoE."""
    if model != "auto":
        return model
    return MIXTRAL if memory > 110e9 else OLMOE


def published_config(model: str):
    """The configuration of a well-known checkpoint, known before it is downloaded; else None."""
    transformers = require_transformers()
    if model == "mistralai/Mixtral-8x7B-v0.1":
        return _plain_forward(transformers.MixtralConfig())
    if model == "allenai/OLMoE-1B-7B-0924":
        return _plain_forward(transformers.OlmoeConfig(intermediate_size=1024))
    return None


def find_config(model: str, data_dir: str | Path, may_download: bool = True):
    """The configuration of a well-known model, or of what locate() finds.

    Raises ValueError like causal_config.
    """
    if (known := published_config(model)) is not None:
        return known
    if not may_download and not is_here(model, data_dir):
        _refuse_a_path(model)
        raise ValueError(
            f"{model} is not here, so its size is not known; without --dry-run it is downloaded"
        )
    return causal_config(locate(model, data_dir))


def device_memory(device: str) -> int:
    """Bytes of a GPU, or of the machine."""
    if device == "cuda":
        return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def sizes(config) -> dict[str, int]:
    """num_layers, d_model, d_ff of one expert, num_heads and num_experts of a configuration,
    whatever it calls them.
    """
    return {
        "num_layers": config.num_hidden_layers,
        "d_model": config.hidden_size,
        "d_ff": getattr(config, "moe_intermediate_size", None) or config.intermediate_size,
        "num_heads": config.num_attention_heads,
        "num_experts": getattr(config, "num_local_experts", None) or config.num_experts,
    }


class Parts(NamedTuple):
    """Numbers of parameters."""

    parameters: int
    in_experts: int
    outside_experts: int  # without the embedding, which is looked up, not multiplied
    trained: int


def count_parts(config, dtype: torch.dtype, patch: Callable[[nn.Module], None]) -> Parts:
    """Of a model after patch(model), from its shapes: no memory is taken."""
    model = random_causal(config, dtype, "meta")
    parameters = sum(parameter.numel() for parameter in model.parameters())
    in_experts = 0
    for _, _, block in mixtures.find_blocks(model):
        weights = mixtures.read_block(block)
        in_experts += weights.gate_up_proj.numel() + weights.down_proj.numel()
    embedding = model.get_input_embeddings().weight.numel()
    patch(model)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return Parts(parameters, in_experts, parameters - in_experts - embedding, trained)


def activation_bytes(config, load: float, tokens: int) -> float:
    """What a training step holds beside the weights, with activation checkpointing and LoRA.

    Of every layer its input, and once all that a layer computes: attention, and `load` experts a
    token. Measured (float32, one CPU, 2048 tokens, 6 to 24 layers of three shapes) it is 7 to 31 %
    less.
    """
    found = sizes(config)
    d_model, d_ff = found["d_model"], found["d_ff"]
    kept = 1.5 * found["num_layers"] * d_model
    one_layer = 5 * d_model + load * (4 * d_model + 6 * d_ff)
    return 4 * tokens * (kept + one_layer)


# --------------------------------------------------------------------------------------------------
# Tasks and text as tokens
# --------------------------------------------------------------------------------------------------


class TextToText(tasks.PromptBatches):
    """A task as text to text for an encoder-decoder; see tasks.PromptBatches for the batches."""

    def __init__(
        self, task: str, data_dir: str | Path, folder: str | Path, max_tokens: int, device: str
    ):
        super().__init__(task, data_dir, load_tokenizer(folder), max_tokens)
        self.device = device

    def encode(self, examples: Sequence) -> dict[str, Tensor]:
        return {name: tensor.to(self.device) for name, tensor in super().encode(examples).items()}

    def outputs(self, model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Logits [batch, answer, vocab_size] of the right answer, given its tokens so far, and the
        labels.
        """
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        shifted = nn.functional.pad(batch["labels"][:, :-1], (1, 0))  # T5 starts with token 0
        logits = model(**inputs, decoder_input_ids=shifted.clamp(min=0)).logits
        return logits, batch["labels"]

    def token_mask(self, batch: dict[str, Tensor], layer: str) -> Tensor:
        """[batch, time] bool of the stack that a layer, by name, belongs to: False is padding."""
        if layer.startswith("encoder"):
            return batch["attention_mask"].bool()
        return batch["labels"] >= 0

    def answers(self, model: nn.Module, batch: dict[str, Tensor], logits: Tensor) -> list:
        """A class or a text for each row.

        The first logits depend on no label; longer answers are generated.
        """
        if self.words:
            return self.read_answers(logits[:, :1].argmax(-1))
        return self.read_answers(generate(model, batch, self.MAX_ANSWER + 1))

    def scores(self, answers: list, where: slice) -> dict[str, float]:
        """The metrics of the answers to these development examples."""
        return tasks.scores(self.name, self.dev[where], answers)


def generate(model: nn.Module, batch: dict[str, Tensor], max_tokens: int) -> Tensor:
    """What an encoder-decoder answers, greedily: tokens [batch, time], up to the end of text, then
    padding.

    batch: {"input_ids", "attention_mask": [batch, tokens]}; time is max_tokens at most.
    """
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    return model.generate(**inputs, do_sample=False, num_beams=1, max_new_tokens=max_tokens)[:, 1:]


def text_tokens(folder: str | Path, path: str | Path) -> tuple[Tensor, Tensor]:
    """A file or folder of text as tokens of a checkpoint: training and held-out part, [tokens]."""
    tokenizer, corpus = load_tokenizer(folder), text.load_text(path)
    parts = []
    for part in (corpus.train, corpus.val):
        words = bytes(part.tolist()).decode(errors="replace")
        parts.append(torch.tensor(tokenizer(words, add_special_tokens=False)["input_ids"]))
    return parts[0], parts[1]


def encode(tokenizer, texts: Sequence[str], length: int) -> tuple[Tensor, Tensor]:
    """Tokens [texts, longest] int64, padded with 0 on the right, and lengths [texts]; of a long
    text, its end.
    """
    rows = [torch.tensor(ids[-length:]) for ids in tokenizer(list(texts))["input_ids"]]
    lengths = torch.tensor([len(row) for row in rows])
    return nn.utils.rnn.pad_sequence(rows, batch_first=True), lengths


def answer_ids(tokenizer, words: Sequence[str], before: str = "Answer:") -> list[int]:
    """The token that each word becomes after `before` and a space.

    Raises ValueError unless it is one token each.
    """
    start = tokenizer(before)["input_ids"]
    found = []
    for word in words:
        ids = tokenizer(f"{before} {word}")["input_ids"]
        if ids[:-1] != start or ids[-1] == tokenizer.unk_token_id:
            odd = f"{word!r} is not one token of this tokenizer: {ids[len(start) :]}"
            raise ValueError(f"after {before!r}, {odd}")
        found.append(ids[-1])
    if len(set(found)) < len(found):
        raise ValueError(f"two of the answers {', '.join(words)} are the same token")
    return found


class Questions(NamedTuple):
    """Multiple-choice questions as tokens."""

    tokens: Tensor  # [questions, longest] int64, padded on the right
    lengths: Tensor  # [questions]
    labels: Tensor  # [questions], which letter is right

    def batch(self, rows: Tensor, device: str) -> tuple[Tensor, Tensor, Tensor]:
        lengths = self.lengths[rows]
        return (
            self.tokens[rows, : int(lengths.max())].to(device),
            lengths.to(device),
            self.labels[rows].to(device),
        )

    def train_batch(
        self, step: int, size: int, seed: int, device: str
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Batch number `step` of the endless sequence of epochs, each in an order of its own."""
        return self.batch(tasks.epoch_rows(len(self.labels), step, size, seed), device)


def letter_questions(
    folder: str | Path, task: str, data_dir: str | Path, num_train: int, length: int, seed: int
) -> tuple[Questions, Questions, list[int], list[str]]:
    """num_train random training questions, all development questions, the letters' tokens, the
    words of the first one.

    Questions with an uncommon number of choices are left out (a few of ARC's have three or five).
    """
    tokenizer = load_tokenizer(folder)
    train, dev = tasks.load_task(task, data_dir)
    options = statistics.mode(len(example.choices) for example in dev)
    train = [example for example in train if len(example.choices) == options]
    dev = [example for example in dev if len(example.choices) == options]
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
    chosen = [train[row] for row in order[:num_train].tolist()]
    parts = []
    for part in (chosen, dev):
        encoded = encode(tokenizer, [tasks.letter_prompt(example) for example in part], length)
        parts.append(Questions(*encoded, torch.tensor([example.label for example in part])))
    words = tokenizer.batch_decode(parts[1].tokens[0, : int(parts[1].lengths[0]), None])
    return *parts, answer_ids(tokenizer, tasks.LETTERS[:options]), words


def random_questions(
    count: int, length: int, vocab_size: int, seed: int
) -> tuple[Questions, Questions, list[int], list[str]]:
    """The same from random tokens, to measure costs: nothing can be learnt from them."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(vocab_size, (count, length), generator=generator)
    labels = torch.randint(4, (count,), generator=generator)
    part = Questions(tokens, torch.full((count,), length), labels)
    return part, part, [0, 1, 2, 3], [str(token) for token in tokens[0].tolist()]


class LetterTask:
    """Multiple-choice questions for a causal model: the loss is that of the right letter, the
    answer the likeliest one.

    model  folder of a checkpoint; "random": random tokens, for a model with random weights
    """

    measure = "accuracy"  # percent of the questions answered rightly: more is better
    unit = "points"

    def __init__(
        self,
        model: str,
        task: str,
        data_dir: str | Path,
        num_train: int,
        length: int,
        batch_size: int,
        seed: int,
        device: str,
    ):
        if model == "random":
            found = random_questions(4 * batch_size, length, RANDOM_VOCABULARY, seed)
        else:
            found = letter_questions(model, task, data_dir, num_train, length, seed)
        self.train, self.dev, letters, self.words = found
        self.letters = torch.tensor(letters, device=device)
        self.batch_size = batch_size
        self.seed = seed
        self.device = device
        rows = torch.arange(len(self.dev.labels)).split(batch_size)
        self.eval_batches = [self.dev.batch(some, device) for some in rows]

    def batch(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """The batch of a step depends on seed and step alone."""
        return self.train.train_batch(step, self.batch_size, self.seed, self.device)

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        tokens, lengths, labels = batch
        logits = last_logits(model, tokens, lengths)  # [batch, vocab_size]
        return nn.functional.cross_entropy(logits, self.letters[labels])

    def scores(self, model: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """100 or 0 for each question."""
        tokens, lengths, labels = batch
        logits = last_logits(model, tokens, lengths)[:, self.letters]
        return 100.0 * (logits.argmax(dim=-1) == labels)

    def num_tokens(self, batch: tuple[Tensor, Tensor, Tensor]) -> int:
        return int(batch[1].sum())

    def sample(self) -> tuple[tuple[Tensor, Tensor, Tensor], list[str]]:
        """The first development question as a batch, and its tokens as text."""
        return self.dev.batch(torch.tensor([0]), self.device), self.words
