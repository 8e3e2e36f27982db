"""Checkpoints: one safetensors file, complete or not there at all, whose every byte is under a checksum.

Tensors are named model.* (the weights) and optimizer.<parameter>.<state>; everything else is JSON in the file's
metadata, beside the checksum of each tensor and one of the metadata and of the tensors' names, shapes and dtypes.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from ..files import replacing
from .config import GPTConfig
from .gpt import GPT

NAME = "checkpoint.safetensors"
FORMAT = 2
MODEL, OPTIMIZER = "model.", "optimizer."


def save(path: Path, state: dict) -> None:
    """state: model, optimizer (as torch.distributed.checkpoint.state_dict has it), and what JSON can say"""
    optimizer = state.get("optimizer", {"state": {}, "param_groups": []})
    tensors = {MODEL + name: x for name, x in state.get("model", {}).items()}
    tensors |= {f"{OPTIMIZER}{name}.{key}": x for name, parts in optimizer["state"].items() for key, x in parts.items()}
    tensors = {name: x.detach().cpu().contiguous() for name, x in tensors.items()}
    rest = {key: value for key, value in state.items() if key not in ("model", "optimizer")}
    rest |= {"format": FORMAT, "param_groups": optimizer["param_groups"]}
    metadata = {"state": json.dumps(rest), "checksums": json.dumps({name: digest(x) for name, x in tensors.items()})}
    metadata["checksum"] = digest_of_header(metadata, tensors)
    with replacing(path) as staged:
        try:
            safetensors.torch.save_file(tensors, str(staged), metadata)
        except safetensors.SafetensorError as error:
            raise OSError(f"{path} could not be written: {error}") from None


def digest(x: Tensor) -> str:
    """Of the values; x: contiguous, on the CPU"""
    values: Any = x.view(-1).view(torch.uint8).numpy()
    return hashlib.sha256(values).hexdigest()


def digest_of_header(metadata: dict[str, str], tensors: dict[str, Tensor]) -> str:
    layout = sorted((name, list(x.shape), str(x.dtype)) for name, x in tensors.items())
    return hashlib.sha256(json.dumps([metadata["state"], metadata["checksums"], layout]).encode()).hexdigest()


def find(path: str | Path) -> Path:
    """A checkpoint, or the one in a folder."""
    path = Path(path)
    path = path / NAME if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"no checkpoint at {path}")
    return path


def load(path: str | Path) -> dict:
    path = find(path)
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata, tensors = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{path} is not a whole checkpoint: {str(error).splitlines()[0]}") from None
    if set(metadata) != {"state", "checksums", "checksum"}:
        raise ValueError(f"{path} must be a checkpoint of gptkernels train, format {FORMAT}")
    check(path, metadata, tensors)
    state = json.loads(metadata["state"])
    if state["format"] != FORMAT:
        raise ValueError(f"{path} must be a checkpoint of gptkernels train, format {FORMAT}, not {state['format']}")
    state["model"] = dict(without_prefix(tensors, MODEL))
    moments: dict[str, dict[str, Tensor]] = {}
    for name, x in without_prefix(tensors, OPTIMIZER):
        parameter, key = name.rsplit(".", 1)
        moments.setdefault(parameter, {})[key] = x
    state["optimizer"] = {"state": moments, "param_groups": state.pop("param_groups")}
    return state


def check(path: Path, metadata: dict[str, str], tensors: dict[str, Tensor]) -> None:
    """ValueError that names the file, and the tensor, where a byte is not what was written"""
    if digest_of_header(metadata, tensors) != metadata["checksum"]:
        raise ValueError(f"{path} is damaged: its header is not what its checksum says")
    for name, expected in json.loads(metadata["checksums"]).items():
        if digest(tensors[name]) != expected:
            raise ValueError(f"{path} is damaged: the tensor {name} is not what its checksum says")


def without_prefix(tensors: dict[str, Tensor], prefix: str) -> Iterator[tuple[str, Tensor]]:
    return ((name.removeprefix(prefix), x) for name, x in tensors.items() if name.startswith(prefix))


def describe(config: GPTConfig) -> dict[str, Any]:
    """What a checkpoint says of a model; GPTConfig(**of it) is the config."""
    return asdict(config) | {"pattern": list(config.pattern)}


def load_model(path: str | Path, **changes) -> tuple[GPT, dict]:
    """-> the model in evaluation mode, and the rest of the checkpoint"""
    state = load(path)
    if "task" in state:
        raise ValueError(f"{path} was fine-tuned for {state['task']['name']}: it is no language model any more")
    with torch.device("meta"):
        model = GPT(GPTConfig(**{**state["config"], **changes}))
    model.load_state_dict(state["model"], assign=True)
    return model.eval(), state
