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
        return cls({"kind": "json", "json": read_text(path)})

    @property
    def vocabulary(self) -> int:
        """Its tokens; the special ones of bytes come behind them, for a masked model."""
        return 256 if self.inner is None else self.inner.get_vocab_size()

    def special(self) -> tuple[int, int, int]:
        """The tokens [CLS], [SEP] and [MASK]."""
        if self.inner is None:
            return 256, 257, 258
        cls, sep, mask = (self.inner.token_to_id(name) for name in ("[CLS]", "[SEP]", "[MASK]"))
        if cls is None or sep is None or mask is None:
            raise ValueError("a masked model needs a tokenizer.json with the tokens [CLS], [SEP] and [MASK]")
        return cls, sep, mask

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
        if not path.stat().st_size:
            raise ValueError(f"{path} must hold tokens, it is empty")
        return np.memmap(path, dtype="<u2", mode="r")
    data = path.read_bytes()
    if tokenizer is None:
        raise ValueError(f"{path} must be a .bin of tokens where there is no tokenizer")
    if tokenizer.inner is None:
        return np.frombuffer(data, dtype=np.uint8)
    return np.array(tokenizer.encode(decoded(path, data)), dtype=np.int64)


def read_text(path: str | Path) -> str:
    return decoded(path, Path(path).read_bytes())


def decoded(path: str | Path, data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} must be text in UTF-8 ({error})") from None


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

    def __len__(self) -> int:
        """In tokens"""
        return len(self.tokens)

    def batch(self, step: int, rows: int, seed: int) -> dict[str, Tensor]:
        """-> tokens, targets: (rows, length) int64"""
        starts = np.random.default_rng((seed, step)).integers(0, len(self.tokens) - self.length, rows)
        pieces = np.stack([self.tokens[start : start + self.length + 1] for start in starts]).astype(np.int64)
        if pieces.max() >= self.vocabulary:
            raise ValueError(f"tokens must be below the vocabulary of {self.vocabulary}, not {pieces.max()}")
        rows_of_tokens = torch.from_numpy(pieces)
        return {"tokens": rows_of_tokens[:, :-1], "targets": rows_of_tokens[:, 1:]}

    def split(self, share: float) -> tuple["Text", "Text | None"]:
        """The text without its end, and its end, to validate on; None where that is shorter than a sequence."""
        at = int(len(self.tokens) * (1 - share))
        if len(self.tokens) - at <= self.length or at <= self.length:
            return self, None
        return Text(self.tokens[:at], self.length, self.vocabulary), Text(
            self.tokens[at:], self.length, self.vocabulary
        )


MASKED_SHARE = 0.15
LONGEST_SPAN = 3


@dataclass(frozen=True)
class MaskedText:
    """Two neighbouring pieces of a text, [CLS] one [SEP] other [SEP], half of the time in the wrong order, with spans
    of up to three tokens masked: ALBERT's objective."""

    text: Text
    special: tuple[int, int, int]  # [CLS], [SEP], [MASK]

    @property
    def length(self) -> int:
        return self.text.length

    def __len__(self) -> int:
        """In tokens"""
        return len(self.text)

    def split(self, share: float) -> tuple["MaskedText", "MaskedText | None"]:
        text, end = self.text.split(share)
        return MaskedText(text, self.special), None if end is None else MaskedText(end, self.special)

    def batch(self, step: int, rows: int, seed: int) -> dict[str, Tensor]:
        """-> tokens, targets (-100 where nothing is asked), token_types: (rows, length) int64, order: (rows,), 1 where
        the pieces were swapped"""
        cls, sep, _ = self.special
        pieces = self.text.batch(step, rows, seed)["tokens"].numpy()[:, : self.length - 3]
        generator = np.random.default_rng((seed, step, 1))
        tokens = np.full((rows, self.length), sep)
        types = np.zeros((rows, self.length), np.int64)
        order = generator.integers(0, 2, rows)
        cuts = generator.integers(1, pieces.shape[1], rows)
        for row, (piece, cut, swapped) in enumerate(zip(pieces, cuts, order, strict=True)):
            first, second = (piece[cut:], piece[:cut]) if swapped else (piece[:cut], piece[cut:])
            tokens[row, :-1] = [cls, *first, sep, *second]
            types[row, len(first) + 2 :] = 1
        targets = np.full_like(tokens, -100)
        for row in range(rows):
            self.mask(tokens[row], targets[row], generator)
        return {
            "tokens": torch.from_numpy(tokens),
            "targets": torch.from_numpy(targets),
            "token_types": torch.from_numpy(types),
            "order": torch.from_numpy(order),
        }

    def mask(self, tokens: np.ndarray, targets: np.ndarray, generator: np.random.Generator) -> None:
        """tokens, targets: (length,), changed in place: of a span, mostly [MASK], at times any token or its own"""
        ordinary = ~np.isin(tokens, self.special[:2])
        wanted = max(1, round(MASKED_SHARE * ordinary.sum()))
        spans = 1 / np.arange(1, LONGEST_SPAN + 1)
        while (targets >= 0).sum() < wanted:
            start = generator.integers(len(tokens))
            length = 1 + generator.choice(LONGEST_SPAN, p=spans / spans.sum())
            for place in range(start, min(start + length, len(tokens))):
                if ordinary[place] and targets[place] < 0:
                    targets[place] = tokens[place]
                    kind = generator.random()
                    if kind < 0.8:
                        tokens[place] = self.special[2]
                    elif kind < 0.9:
                        tokens[place] = generator.integers(self.text.vocabulary)


def read_examples(path: str | Path) -> list[dict]:
    """One JSON object per line."""
    examples = []
    for number, line in enumerate(read_text(path).splitlines(), 1):
        if not line.strip():
            continue
        try:
            example = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error})") from None
        if not isinstance(example, dict):
            raise ValueError(f"{path}, line {number}: must be an object, not {type(example).__name__}")
        examples.append(example)
    if not examples:
        raise ValueError(f"{path} must have at least one example")
    return examples
