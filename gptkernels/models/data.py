"""Tokens to train on. A batch depends on the seed and the step alone: a resumed run sees what it would have seen."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

BYTES = {"kind": "bytes"}


class Tokenizer:
    """Text to tokens and back: the bytes of UTF-8, or what a tokenizer.json says. A checkpoint keeps `state`."""

    def __init__(self, state: dict):
        self.state, self.inner = state, None
        if state["kind"] == "json":
            try:
                from tokenizers import Tokenizer as Inner
            except ImportError:
                raise ValueError("a tokenizer.json needs tokenizers: pip install tokenizers") from None
            try:
                self.inner = Inner.from_str(state["json"])
            except Exception as error:  # the library raises a bare Exception
                raise ValueError(f"not a tokenizer.json: {error}") from None

    @classmethod
    def from_file(cls, path: str | Path | None) -> "Tokenizer":
        if path is None:
            return cls(BYTES)
        return cls({"kind": "json", "json": Path(path).read_text(encoding="utf-8")})

    @property
    def vocabulary(self) -> int:
        return 256 if self.inner is None else self.inner.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        return list(text.encode()) if self.inner is None else self.inner.encode(text, add_special_tokens=False).ids

    def decode(self, tokens: list[int]) -> str:
        if self.inner is None:
            return bytes(tokens).decode(errors="replace")
        return self.inner.decode(tokens, skip_special_tokens=False)


def read_tokens(path: str | Path, tokenizer: Tokenizer | None) -> np.ndarray:
    """(N,) tokens: of a .bin of little-endian uint16 (read as it is used), or of a text through the tokenizer."""
    path = Path(path)
    if path.suffix == ".bin":
        if path.stat().st_size % 2:
            raise ValueError(f"{path} must hold uint16 tokens, an even number of bytes, not {path.stat().st_size}")
        return np.memmap(path, dtype="<u2", mode="r")
    data = path.read_bytes()
    if tokenizer.inner is None:
        return np.frombuffer(data, dtype=np.uint8)
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} must be text in UTF-8 for a tokenizer.json ({error})") from None
    return np.array(tokenizer.encode(text), dtype=np.int64)


@dataclass(frozen=True)
class Text:
    """Random pieces of a long text, with the token after each as its target."""

    tokens: np.ndarray  # (N,)
    length: int
    vocabulary: int

    def __post_init__(self):
        if len(self.tokens) <= self.length:
            raise ValueError(
                f"the text must have more than the {self.length} tokens of one sequence, not {len(self.tokens)}"
            )

    def batch(self, step: int, rows: int, seed: int) -> dict[str, Tensor]:
        """-> tokens, targets: (rows, length) int64"""
        starts = np.random.default_rng((seed, step)).integers(0, len(self.tokens) - self.length, rows)
        pieces = np.stack([self.tokens[start : start + self.length + 1] for start in starts]).astype(np.int64)
        if pieces.max() >= self.vocabulary:
            raise ValueError(f"tokens must be below the vocabulary of {self.vocabulary}, not {pieces.max()}")
        pieces = torch.from_numpy(pieces)
        return {"tokens": pieces[:, :-1], "targets": pieces[:, 1:]}

    def split(self, share: float) -> tuple["Text", "Text | None"]:
        """The text without its end, and its end, to validate on; None where that is shorter than a sequence."""
        at = int(len(self.tokens) * (1 - share))
        if len(self.tokens) - at <= self.length or at <= self.length:
            return self, None
        return Text(self.tokens[:at], self.length, self.vocabulary), Text(
            self.tokens[at:], self.length, self.vocabulary
        )


def read_examples(path: str | Path) -> list[dict]:
    """One JSON object per line."""
    examples = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            example = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error})") from None
        if not isinstance(example, dict):
            raise ValueError(f"{path}, line {number}: must be an object, not {type(example).__name__}")
        examples.append(example)
    if not examples:
        raise ValueError(f"{path} must have at least one example")
    return examples
