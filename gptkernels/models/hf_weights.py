"""Weights to and from what transformers reads: GPT-1, GPT-2, GPT-Neo, ALBERT and Llama, as files or as models.

A family is a table of names and two translations of the configuration. Nothing here needs transformers, except
to_hf's model object. Files are read as safetensors, else with torch.load(weights_only=True), which runs no code.
"""

import json
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from . import hf_config
from .config import GPTConfig

if TYPE_CHECKING:
    from .gpt import GPT


Model = TypeVar("Model", bound="GPT")
Names = dict[str, str | tuple[str, ...]]

# Conv1D stores (in, out): transposed to a Linear's (out, in).
GPT2_BLOCK: Names = {
    "norm1.weight": "ln_1.weight",
    "norm1.bias": "ln_1.bias",
    "attention.qkv.weight": "attn.c_attn.weight",
    "attention.qkv.bias": "attn.c_attn.bias",
    "attention.out.weight": "attn.c_proj.weight",
    "attention.out.bias": "attn.c_proj.bias",
    "norm2.weight": "ln_2.weight",
    "norm2.bias": "ln_2.bias",
    "mlp.fc.weight": "mlp.c_fc.weight",
    "mlp.fc.bias": "mlp.c_fc.bias",
    "mlp.proj.weight": "mlp.c_proj.weight",
    "mlp.proj.bias": "mlp.c_proj.bias",
}
GPT_NEO_BLOCK: Names = GPT2_BLOCK | {
    "attention.qkv.weight": tuple(f"attn.attention.{x}_proj.weight" for x in "qkv"),
    "attention.out.weight": "attn.attention.out_proj.weight",
    "attention.out.bias": "attn.attention.out_proj.bias",
}
del GPT_NEO_BLOCK["attention.qkv.bias"]
ALBERT_BLOCK: Names = {
    "attention.qkv.weight": tuple(f"attention.{x}.weight" for x in ("query", "key", "value")),
    "attention.qkv.bias": tuple(f"attention.{x}.bias" for x in ("query", "key", "value")),
    "attention.out.weight": "attention.dense.weight",
    "attention.out.bias": "attention.dense.bias",
    "norm1.weight": "attention.LayerNorm.weight",
    "norm1.bias": "attention.LayerNorm.bias",
    "mlp.fc.weight": "ffn.weight",
    "mlp.fc.bias": "ffn.bias",
    "mlp.proj.weight": "ffn_output.weight",
    "mlp.proj.bias": "ffn_output.bias",
    "norm2.weight": "full_layer_layer_norm.weight",
    "norm2.bias": "full_layer_layer_norm.bias",
}
LLAMA_BLOCK: Names = {
    "norm1.weight": "input_layernorm.weight",
    "attention.qkv.weight": tuple(f"self_attn.{x}_proj.weight" for x in "qkv"),
    "attention.out.weight": "self_attn.o_proj.weight",
    "norm2.weight": "post_attention_layernorm.weight",
    "mlp.gate.weight": "mlp.gate_proj.weight",
    "mlp.up.weight": "mlp.up_proj.weight",
    "mlp.down.weight": "mlp.down_proj.weight",
}
LLAMA_BIASES: Names = {
    "attention.qkv.bias": tuple(f"self_attn.{x}_proj.bias" for x in "qkv"),
    "attention.out.bias": "self_attn.o_proj.bias",
    "mlp.gate.bias": "mlp.gate_proj.bias",
    "mlp.up.bias": "mlp.up_proj.bias",
    "mlp.down.bias": "mlp.down_proj.bias",
}


@dataclass(frozen=True)
class Family:
    architecture: str  # transformers' class
    prefix: str  # which files of the base model leave out
    layer: str  # path of block number {}
    block: Names  # our name in the block -> theirs; several are rows of ours
    outer: dict[str, str]
    head: dict[str, str]  # outside the base model
    transposed: bool
    config_from: Callable[[dict], GPTConfig]
    config_to: Callable[[GPTConfig], dict]
    biases: Names = field(default_factory=dict)  # of the block, where config.bias decides that they are there


FAMILIES = {
    "gpt2": Family(
        "GPT2LMHeadModel",
        "transformer.",
        "h.{}.",
        GPT2_BLOCK,
        {
            "embedding.token.weight": "wte.weight",
            "embedding.position.weight": "wpe.weight",
            "final_norm.weight": "ln_f.weight",
            "final_norm.bias": "ln_f.bias",
        },
        {"head.weight": "lm_head.weight"},
        True,
        hf_config.from_gpt2,
        hf_config.to_gpt2,
    ),
    "openai-gpt": Family(
        "OpenAIGPTLMHeadModel",
        "transformer.",
        "h.{}.",
        GPT2_BLOCK,
        {"embedding.token.weight": "tokens_embed.weight", "embedding.position.weight": "positions_embed.weight"},
        {"head.weight": "lm_head.weight"},
        True,
        hf_config.from_openai_gpt,
        hf_config.to_openai_gpt,
    ),
    "gpt_neo": Family(
        "GPTNeoForCausalLM",
        "transformer.",
        "h.{}.",
        GPT_NEO_BLOCK,
        {
            "embedding.token.weight": "wte.weight",
            "embedding.position.weight": "wpe.weight",
            "final_norm.weight": "ln_f.weight",
            "final_norm.bias": "ln_f.bias",
        },
        {"head.weight": "lm_head.weight"},
        False,
        hf_config.from_gpt_neo,
        hf_config.to_gpt_neo,
    ),
    "albert": Family(
        "AlbertForPreTraining",
        "albert.",
        "encoder.albert_layer_groups.0.albert_layers.{}.",
        ALBERT_BLOCK,
        {
            "embedding.token.weight": "embeddings.word_embeddings.weight",
            "embedding.position.weight": "embeddings.position_embeddings.weight",
            "embedding.token_type.weight": "embeddings.token_type_embeddings.weight",
            "embedding.norm.weight": "embeddings.LayerNorm.weight",
            "embedding.norm.bias": "embeddings.LayerNorm.bias",
            "embedding.project.weight": "encoder.embedding_hidden_mapping_in.weight",
            "embedding.project.bias": "encoder.embedding_hidden_mapping_in.bias",
            "masked_head.pooler.weight": "pooler.weight",
            "masked_head.pooler.bias": "pooler.bias",
        },
        {
            "masked_head.transform.weight": "predictions.dense.weight",
            "masked_head.transform.bias": "predictions.dense.bias",
            "masked_head.norm.weight": "predictions.LayerNorm.weight",
            "masked_head.norm.bias": "predictions.LayerNorm.bias",
            "masked_head.vocabulary_bias": "predictions.bias",
            "masked_head.order.weight": "sop_classifier.classifier.weight",
            "masked_head.order.bias": "sop_classifier.classifier.bias",
        },
        False,
        hf_config.from_albert,
        hf_config.to_albert,
    ),
    "llama": Family(
        "LlamaForCausalLM",
        "model.",
        "layers.{}.",
        LLAMA_BLOCK,
        {"embedding.token.weight": "embed_tokens.weight", "final_norm.weight": "norm.weight"},
        {"head.weight": "lm_head.weight"},
        False,
        hf_config.from_llama,
        hf_config.to_llama,
        LLAMA_BIASES,
    ),
}
# A model for masked tokens alone has no sentence order to predict; ours then starts as a new one.
OPTIONAL = ("masked_head.pooler.", "masked_head.order.")


@dataclass(frozen=True)
class Name:
    ours: str
    theirs: tuple[str, ...]
    transposed: bool


def names(family: Family, model: "GPT") -> Iterator[Name]:
    wanted = dict(model.named_parameters())
    for ours, theirs in family.outer.items():
        yield Name(ours, (family.prefix + theirs,), False)
    for ours, theirs in family.head.items():
        if ours in wanted:
            yield Name(ours, (theirs,), False)
    block = family.block | (family.biases if model.config.bias else {})
    for number in range(len(model.blocks)):
        for ours, of_block in block.items():
            parts = (of_block,) if isinstance(of_block, str) else of_block
            full = tuple(family.prefix + family.layer.format(number) + part for part in parts)
            yield Name(
                f"blocks.{number}.{ours}", full, family.transposed and wanted[f"blocks.{number}.{ours}"].ndim == 2
            )


def from_hf(make: Callable[[GPTConfig], Model], source, *, dtype: torch.dtype | None = None, **changes) -> Model:
    """make: GPT, or a class like it. source: a transformers model, a folder with config.json and its weights, or a name
    on the Hugging Face hub.

    dtype: of the parameters, as stored by default. changes: fields of GPTConfig to set differently. The model is in
    evaluation mode, as those of transformers are."""
    if hasattr(source, "state_dict") and hasattr(source, "config"):
        settings, weights = source.config.to_dict(), source.state_dict()
    else:
        folder = find(source)
        settings, weights = read_json(folder / "config.json"), read_weights(folder)
    model_type = settings.get("model_type")
    if model_type not in FAMILIES:
        raise ValueError(f"the model's type must be one of {', '.join(FAMILIES)}, not {model_type!r}")
    family = FAMILIES[model_type]
    config = replace(family.config_from(settings), **changes)
    with torch.device("meta"):
        model = make(config)
    model = model.to_empty(device="cpu")
    load(model, family, weights)
    return model.to(dtype).eval()


def load(model: "GPT", family: Family, weights: dict[str, Tensor]) -> None:
    """Copies weights into the model, whose parameters take their dtype; ValueError where one is missing or misshapen"""
    if not any(key.startswith(family.prefix) for key in weights):
        weights = {key if key in family.head.values() else family.prefix + key: x for key, x in weights.items()}
    parameters, missing = dict(model.named_parameters()), []
    for name in names(family, model):
        absent = [part for part in name.theirs if part not in weights]
        if absent and name.ours.startswith(OPTIONAL):
            reset(parameters[name.ours], model.config)
            warnings.warn(f"the weights have no {absent[0]}: it starts as a new one", stacklevel=4)
            continue
        missing += absent
        if absent:
            continue
        parts = [weights[part] for part in name.theirs]
        stored = torch.cat([part.mT if name.transposed else part for part in parts])
        target = parameters[name.ours]
        if stored.shape != target.shape:
            raise ValueError(
                f"{' + '.join(name.theirs)} must have shape {tuple(target.shape)} for this config.json, "
                f"not {tuple(stored.shape)}" + (" (transposed)" if name.transposed else "")
            )
        target.data = stored.to(device=target.device, dtype=stored.dtype, copy=True)
    if missing:
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise ValueError(f"the weights must have {', '.join(missing[:5])}{more}, which they lack")


@torch.no_grad()
def reset(parameter: Tensor, config: GPTConfig) -> None:
    parameter.normal_(0.0, config.init_std) if parameter.ndim == 2 else parameter.zero_()


def find(source: str | os.PathLike) -> Path:
    """The folder of that name, or of that model of the hub, downloaded."""
    folder = Path(source)
    if folder.is_dir():
        return folder
    if folder.is_absolute() or str(source).count("/") > 1 or str(source).startswith("."):
        raise ValueError(f"no folder {source}")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ValueError(
            f"no folder {source}; to take a name from the Hugging Face hub: pip install huggingface_hub"
        ) from None
    return Path(snapshot_download(str(source), allow_patterns=["config.json", "*.safetensors*", "pytorch_model*"]))


def read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"{path.parent} has no {path.name}") from None
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error})") from None


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The weights of the folder: one file or several with an index, safetensors before pickles."""
    for single, read in (("model.safetensors", read_safetensors), ("pytorch_model.bin", read_pickle)):
        if (folder / single).exists():
            return read(folder / single)
        index = folder / f"{single}.index.json"
        if index.exists():
            files = sorted(set(read_json(index).get("weight_map", {}).values()))
            if not files or any(Path(name).name != name for name in files):
                raise ValueError(f"{index} must name files of its own folder, not {files[:3]}")
            return {key: x for name in files for key, x in read(folder / name).items()}
    raise ValueError(f"{folder} must have model.safetensors or pytorch_model.bin (or their index), which it lacks")


def read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from None


def read_pickle(path: Path) -> dict[str, Tensor]:
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises a different one for each way in which a file can be wrong
        raise ValueError(f"{path} cannot be read as plain tensors: {str(error).splitlines()[0]}") from None
    if not isinstance(weights, dict) or not all(isinstance(x, Tensor) for x in weights.values()):
        raise ValueError(f"{path} must hold a dict of tensors, not {type(weights).__name__}")
    return weights


def export(model: "GPT") -> tuple[dict, dict[str, Tensor]]:
    """-> transformers' config.json and state dict; ValueError with the reason where no family has such a model"""
    config = model.config
    model_type = hf_config.family_of(config)
    family, settings = FAMILIES[model_type], hf_config.BASICS | {"model_type": model_type}
    settings |= family.config_to(config) | {"architectures": [family.architecture]}
    parameters, weights = dict(model.named_parameters()), {}
    for name in names(family, model):
        whole = parameters[name.ours].detach()
        # Several parts are the rows of queries, keys and values.
        rows = [config.width, config.kv_width, config.kv_width] if len(name.theirs) > 1 else [len(whole)]
        for part, x in zip(name.theirs, whole.split(rows), strict=True):
            weights[part] = (x.mT if name.transposed else x).contiguous()
    if model_type == "gpt_neo":
        # GPT-Neo does not scale its scores: the queries' weights do.
        scale = config.head_size**-0.5 if config.attention_scale is None else config.attention_scale
        for part in [part for part in weights if part.endswith("q_proj.weight")]:
            weights[part] = weights[part] * scale
    if model_type == "albert":
        weights["predictions.decoder.bias"] = weights["predictions.bias"]
    return settings, weights


def to_hf(model: "GPT"):
    """The same model as a transformers model, with copies of the weights."""
    import transformers

    settings, weights = export(model)
    config = transformers.AutoConfig.for_model(**settings)
    config.dtype = model.embedding.token.weight.dtype
    twin = getattr(transformers, settings["architectures"][0])(config).to(config.dtype)
    result = twin.load_state_dict(weights, strict=False)
    tied = {"lm_head.weight", "predictions.decoder.weight"} if model.config.tied else set()
    if result.unexpected_keys or set(result.missing_keys) - tied:
        raise RuntimeError(f"transformers' model has other weights than ours: {result}")
    twin.tie_weights()
    return twin.train(model.training)


def save_hf(model: "GPT", folder: Path) -> Path:
    """Writes config.json and model.safetensors for transformers' from_pretrained."""
    from safetensors.torch import save_file

    settings, weights = export(model)
    folder.mkdir(parents=True, exist_ok=True)
    # The decoder's bias is the predictions' own: safetensors stores no tensor twice.
    weights.pop("predictions.decoder.bias", None)
    save_file({key: x.cpu() for key, x in weights.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    dtype = str(model.embedding.token.weight.dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(settings | {"dtype": dtype}, indent=2) + "\n")
    return folder
