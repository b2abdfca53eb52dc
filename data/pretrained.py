"""Pre-trained mixture models from Hugging Face: find the files, load them, hand out plain modules and tensors.

    load_switch(folder, make_layer)     the model, each of its mixtures replaced by make_layer(its tensors)
    empty_switch(folder, make_layer)    the same without weights, to be filled from an export; costs no memory
    load_tokenizer(folder)              its tokenizer; word_ids(tokenizer, words): one token for each word

Needs transformers (requirements-full.txt), imported only when used. Nothing is executed from a checkpoint: weights are
safetensors, or a .bin that torch reads with weights_only. A script brings its own layer, so this file knows no method.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

# make_layer(router_weight [experts, d_model], w1 [experts, d_model, d_ff], w2 [experts, d_ff, d_model], act, capacity)
MakeLayer = Callable[[Tensor, Tensor, Tensor, str, int], nn.Module]
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


def require_transformers():
    """The package, or ValueError with the way to get it."""
    try:
        import transformers
    except ImportError as error:
        raise ValueError(f"this needs transformers: pip install -r requirements-full.txt ({error})") from error
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


def locate(model: str, data_dir: str | Path) -> Path:
    """The folder of a checkpoint: `model` itself, or its copy under data_dir, downloaded from the hub if need be.

    Raises ValueError for a folder that lacks the configuration, weights or tokenizer, FileNotFoundError when the
    download fails; both say which files belong where.
    """
    folder = Path(model).expanduser()
    if not folder.is_dir():
        folder = Path(data_dir).expanduser() / "models" / model.replace("/", "--")
    if not folder.is_dir():
        if model.count("/") != 1 or model.startswith((".", "/", "~")):
            raise FileNotFoundError(f"model {model}: no such folder, and not a name like google/switch-base-32")
        _download(model, folder)
    missing = [name for name in ("config.json", "tokenizer.json") if not (folder / name).is_file()]
    missing += [] if any((folder / name).is_file() for name in WEIGHTS) else ["model.safetensors or pytorch_model.bin"]
    if missing:
        raise ValueError(f"{folder} lacks {', '.join(missing)}; take them from the model's page on huggingface.co")
    return folder


def _download(model: str, folder: Path) -> None:
    require_transformers()
    import huggingface_hub  # comes with transformers; checks sizes and hashes, resumes

    try:
        files = huggingface_hub.HfApi().list_repo_files(model)
        kind = "safetensors" if any(name.endswith(".safetensors") for name in files) else "bin"
        part = folder.with_name(folder.name + ".part")
        huggingface_hub.snapshot_download(model, local_dir=part, allow_patterns=["*.json", "*.model", f"*.{kind}"])
        part.rename(folder)
    except Exception as error:  # the hub's client raises whatever its transport does
        reason = " ".join(str(error).split())[:120]
        wanted = "config.json, tokenizer.json and model.safetensors or pytorch_model.bin"
        text = f"put {wanted} of https://huggingface.co/{model} into {folder} by hand"
        raise FileNotFoundError(f"model {model} is not here and cannot be downloaded ({reason}); {text}") from error


def _switch_config(folder: Path):
    transformers = require_transformers()
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{folder}/config.json cannot be read: {' '.join(str(error).split())[:120]}") from error
    if config.model_type != "switch_transformers":
        raise ValueError(f"{folder} holds a {config.model_type} model; a switch_transformers one is needed")
    config.dropout_rate = 0.0
    return config


def load_switch(folder: str | Path, make_layer: MakeLayer) -> nn.Module:
    """An encoder-decoder Switch model in fp32 without dropout, its mixtures replaced. Raises ValueError: damaged."""
    folder, transformers = Path(folder), require_transformers()
    config = _switch_config(folder)
    try:
        model, report = transformers.SwitchTransformersForConditionalGeneration.from_pretrained(
            folder, config=config, dtype=torch.float32, local_files_only=True, output_loading_info=True
        )
    except Exception as error:  # a damaged file can fail in any way
        raise ValueError(f"{folder} holds no readable weights: {' '.join(str(error).split())[:120]}") from error
    wrong = [str(name) for kind in ("missing_keys", "mismatched_keys") for name in report[kind]]
    if wrong:
        raise ValueError(f"{folder}: weights missing or of another shape: {', '.join(sorted(wrong)[:3])}")
    return _replace_mixtures(model, make_layer)


def empty_switch(folder: str | Path, make_layer: MakeLayer) -> nn.Module:
    """The same on the meta device: shapes without memory."""
    return empty_switch_like(_switch_config(Path(folder)), make_layer)


def empty_switch_like(config, make_layer: MakeLayer) -> nn.Module:
    with torch.device("meta"):
        model = require_transformers().SwitchTransformersForConditionalGeneration(config)
        return _replace_mixtures(model, make_layer)


@torch.no_grad()
def _replace_mixtures(model: nn.Module, make_layer: MakeLayer) -> nn.Module:
    config = model.config
    for block in [*model.encoder.block, *model.decoder.block]:
        feed_forward = block.layer[-1]
        if not feed_forward.is_sparse:
            continue
        mixture = feed_forward.mlp
        experts = [mixture.experts[f"expert_{i}"] for i in range(config.num_experts)]
        stack = lambda name: torch.stack([getattr(e, name).weight.T for e in experts])  # noqa: B023  [experts, in, out]
        weights = (mixture.router.classifier.weight, stack("wi"), stack("wo"))
        feed_forward.mlp = make_layer(*weights, config.dense_act_fn, config.expert_capacity)
    return model.eval()


def load_tokenizer(folder: str | Path):
    try:
        return require_transformers().AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{folder}: the tokenizer cannot be read: {' '.join(str(error).split())[:120]}") from error


def word_ids(tokenizer, words: Sequence[str]) -> list[int]:
    """The token of each word. Raises ValueError for a word that is not one token, or two words with the same."""
    tokens = [tokenizer(word, add_special_tokens=False)["input_ids"] for word in words]
    for word, ids in zip(words, tokens):
        if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
            raise ValueError(f"the answer {word!r} is not one token of this tokenizer: {ids}")
    if len({ids[0] for ids in tokens}) < len(words):
        raise ValueError(f"two of the answers {', '.join(words)} are the same token")
    return [ids[0] for ids in tokens]
