"""`gptkernels generate`: continues a prompt with a trained model, token by token."""

import codecs
import os
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Iterable, Iterator

import torch

from .. import arguments
from ..arguments import number, whole
from ..failures import UsageError
from ..parallel import mesh
from . import checkpoint
from .data import Tokenizer
from .generation import stream
from .gpt import GPT
from .parallel import Workers


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--checkpoint", required=True, metavar="PATH", help="of gptkernels train, or hf:PATH")
    parser.add_argument("--prompt", required=True)
    parser.add_argument(
        "--tokens", type=whole(1), default=200, help="how many to add, at most what the context has room for"
    )
    parser.add_argument(
        "--temperature", type=number(at_least=0), default=0.8, help="0: always the likeliest token (0.8)"
    )
    parser.add_argument("--top-k", type=whole(1), help="sample from the likeliest K tokens only")
    parser.add_argument("--top-p", type=number(above=0, at_most=1), help="... from those that reach P together")
    parser.add_argument("--seed", type=arguments.seed, default=0)
    parser.add_argument("--tokenizer", metavar="FILE", help="a tokenizer.json, where the checkpoint has none")
    parser.add_argument(
        "--parallel", default="none", type=of_tensors, metavar="HOW", help="under torchrun: tp cuts every layer"
    )
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))


def of_tensors(text: str) -> str:
    """The type of an argument: none, or tensor parallelism alone"""
    if text != "none" and not (text.startswith("tp") and "," not in text):
        raise ArgumentTypeError(f"must be none, tp or tp=N, not {text!r}")
    return mesh.accepted(text)


def run(options: Namespace) -> int:
    if options.parallel == "none":
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise UsageError("several processes need --parallel tp: without, each would do the same")
        model, tokenizer = load(options.checkpoint, options.tokenizer, options.device)
        return generate(options, model, tokenizer)
    workers = Workers(options.parallel, options.device)
    try:
        # No device has to hold all of it.
        model, tokenizer = load(options.checkpoint, options.tokenizer, "cpu")
        workers.cut(model, sequence=False)
        return generate(options, model.to(workers.device), tokenizer, show=workers.rank == 0)
    finally:
        workers.close()


def generate(options: Namespace, model: GPT, tokenizer: Tokenizer, show: bool = True) -> int:
    device = model.embedding.token.weight.device
    prompt = torch.tensor(tokenizer.encode(options.prompt), dtype=torch.int64, device=device)
    room = model.config.context - len(prompt)
    if not len(prompt):
        raise UsageError("--prompt must have at least one token")
    if room < 1:
        raise UsageError(f"--prompt must be shorter than the context of {model.config.context}, not {len(prompt)}")
    steps = stream(
        model,
        [prompt],
        min(options.tokens, room),
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        generator=torch.Generator(device).manual_seed(options.seed),
    )
    shown = print if show else lambda *_, **__: None
    shown(options.prompt, end="", flush=True)
    for piece in pieces(tokenizer, prompt.tolist(), (int(chosen) for chosen in steps)):
        shown(piece, end="", flush=True)
    shown()
    return 0


def load(path: str, tokenizer_file: str | None, device: str) -> tuple[GPT, Tokenizer]:
    """path: a checkpoint of gptkernels train, or hf:PATH"""
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch sees no GPU here")
    if path.startswith("hf:"):
        model, known = GPT.from_hf(path.removeprefix("hf:")), None
    else:
        model, state = checkpoint.load_model(path)
        known = state["tokenizer"]
    if tokenizer_file is not None:
        tokenizer = Tokenizer.from_file(tokenizer_file)
    elif known is not None:
        tokenizer = Tokenizer(known)
    else:
        raise UsageError("--tokenizer must name the tokenizer.json of the tokens this model was trained on")
    if tokenizer.vocabulary > model.config.vocabulary:
        raise UsageError(
            f"--tokenizer must have the model's {model.config.vocabulary} tokens at most, not {tokenizer.vocabulary}"
        )
    name = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    return model.to(name), tokenizer


def pieces(tokenizer: Tokenizer, prompt: list[int], tokens: Iterable[int]) -> Iterator[str]:
    """The text behind the prompt as it becomes certain: a character may take several tokens."""
    if tokenizer.inner is None:
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for token in tokens:
            yield decoder.decode(bytes([token]))
        yield decoder.decode(b"", final=True)
        return
    seen = list(prompt)
    shown = tokenizer.decode(seen)
    for token in tokens:
        seen.append(token)
        text = tokenizer.decode(seen)
        if not text.endswith("�"):
            yield text[len(shown) :]
            shown = text
    yield tokenizer.decode(seen)[len(shown) :]
