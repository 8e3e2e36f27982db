"""`gptkernels generate`: continues a prompt with a trained model, token by token."""

import codecs
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterable, Iterator

import torch

from . import checkpoint
from .data import Tokenizer
from .generation import stream
from .hf_weights import from_hf


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--checkpoint", required=True, metavar="PATH", help="of gptkernels train, or hf:PATH")
    parser.add_argument("--prompt", required=True)
    parser.add_argument(
        "--tokens", type=int, default=200, help="how many to add, at most what the context has room for"
    )
    parser.add_argument("--temperature", type=float, default=0.8, help="0: always the likeliest token")
    parser.add_argument("--top-k", type=int)
    parser.add_argument("--top-p", type=float)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokenizer", metavar="FILE", help="a tokenizer.json, where the checkpoint has none")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))


def run(options: Namespace) -> int:
    try:
        generate(options)
    except ValueError as error:
        print(f"gptkernels generate: {error}", file=sys.stderr)
        return 1
    return 0


def generate(options: Namespace) -> None:
    if options.checkpoint.startswith("hf:"):
        model, state = from_hf(options.checkpoint.removeprefix("hf:")), {"tokenizer": None}
    else:
        model, state = checkpoint.load_model(options.checkpoint)
    if options.tokenizer is None and state["tokenizer"] is None:
        raise ValueError("--tokenizer must name the tokenizer.json of the tokens this model was trained on")
    tokenizer = Tokenizer.from_file(options.tokenizer) if options.tokenizer else Tokenizer(state["tokenizer"])
    name = ("cuda" if torch.cuda.is_available() else "cpu") if options.device == "auto" else options.device
    model = model.to(name)
    prompt = torch.tensor(tokenizer.encode(options.prompt), dtype=torch.int64, device=name)
    room = model.config.context - len(prompt)
    if room < 1:
        raise ValueError(f"--prompt must be shorter than the context of {model.config.context}, not {len(prompt)}")
    steps = stream(
        model,
        [prompt],
        min(options.tokens, room),
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        generator=torch.Generator(name).manual_seed(options.seed),
    )
    print(options.prompt, end="", flush=True)
    for piece in pieces(tokenizer, prompt.tolist(), (chosen.item() for chosen in steps)):
        print(piece, end="", flush=True)
    print()


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
