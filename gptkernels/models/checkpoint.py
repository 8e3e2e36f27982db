"""Checkpoints: one file, plain tensors and numbers only, complete or not there at all."""

import os
from dataclasses import asdict
from pathlib import Path

import torch

from .config import GPTConfig
from .gpt import GPT

NAME = "checkpoint.pt"
FORMAT = 1


def save(path: Path, state: dict) -> None:
    """Writes beside the old file and then takes its place: whoever is killed in between leaves the old one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".writing")
    with open(beside, "wb") as file:
        torch.save(state | {"format": FORMAT}, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


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
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises a different one for each way in which a file can be wrong
        raise ValueError(f"{path} is not a whole checkpoint: {str(error).splitlines()[0]}") from None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise ValueError(f"{path} must be a checkpoint of gptkernels train, format {FORMAT}")
    return state


def describe(config: GPTConfig) -> dict:
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
