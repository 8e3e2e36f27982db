"""A GPT that learns from a teacher beside its data (Hinton et al. 2015):

    loss = alpha * cross-entropy + (1 - alpha) * temperature^2 * KL(teacher || student)

with both softmaxes of the KL at the temperature, whose square keeps the gradients of soft targets at the size of those
of the data. In evaluation the loss is the cross-entropy alone, as any model's.
"""

import json
from argparse import Namespace
from pathlib import Path

import torch
from torch import Tensor

from ..failures import UsageError
from ..ops.linear_kl_div import linear_kl_div
from ..parallel.mesh import parse
from . import checkpoint
from .data import Tokenizer
from .gpt import GPT
from .hf_weights import find

# Vocabularies are padded to a multiple of this at most.
PADDING = 128


class Student(GPT):
    """The modules of a GPT, with another loss in training; checkpoints are those of the GPT."""

    teacher: GPT
    alpha: float
    temperature: float
    tokens: int  # of the vocabulary that both have

    @classmethod
    def of(cls, gpt: GPT, teacher: GPT, alpha: float, temperature: float, tokens: int) -> "Student":
        """gpt: whose parameters are trained; teacher: on the same device"""
        student = cls.__new__(cls)
        # Not through __setattr__, by which the teacher would be a part of the student, and trained and saved with it.
        vars(student).update(vars(gpt))
        vars(student).update(teacher=teacher, alpha=alpha, temperature=temperature, tokens=tokens)
        return student

    def forward(self, tokens: Tensor, targets: Tensor | None = None, **options) -> Tensor:
        """As GPT's; in training options are those of hidden(), and the loss is a mean"""
        if targets is None or not self.training:
            return super().forward(tokens, targets, **options)
        hidden = self.hidden(tokens, **options)
        with torch.no_grad():
            expected = self.teacher.reduced(self.teacher.hidden(tokens, **options))
        divergence = linear_kl_div(
            self.reduced(hidden),
            self.head_weight(),
            expected,
            self.teacher.head_weight(),
            targets,
            vocabulary=self.tokens,
            temperature=self.temperature,
            backend=self.config.backend,
        )
        loss = (1 - self.alpha) * self.temperature**2 * divergence
        return loss + self.alpha * self.loss(hidden, targets) if self.alpha else loss


def check_options(options: Namespace, source: str | None) -> None:
    """source: as --distill-from has it, of this run or the one that goes on"""
    if source is None:
        for name in ("alpha", "temperature"):
            if getattr(options, name) is not None:
                raise UsageError(f"--{name} needs --distill-from, the teacher that it is about")
    elif options.task:
        raise UsageError("--distill-from is for language models: it goes with no --task")
    elif (split := parse(options.parallel)).cp != 1 or split.tp != 1:
        raise UsageError(f"--distill-from goes with --parallel none, ddp or fsdp, not {options.parallel}")


def load_teacher(
    source: str, student: GPT, tokenizer: Tokenizer | None, length: int, dtype: torch.dtype, device: torch.device
) -> tuple[GPT, int]:
    """source: hf:PATH, or a run of ours; tokenizer: None where the data are a .bin; length: of sequences
    -> the teacher, whole on the device, and how many tokens it and the student have"""
    flag = f"--distill-from {source}"
    if source.startswith("hf:"):
        folder = find(source.removeprefix("hf:"))
        teacher, state = GPT.from_hf(folder, dtype=dtype), tokenizer_of(folder)
    else:
        teacher, rest = checkpoint.load_model(source)
        state = rest.get("tokenizer")
    for name, gpt in (("the model", student), (flag, teacher)):
        if gpt.config.objective != "next_token":
            raise UsageError(f"{name} must predict next tokens to be distilled, not {gpt.config.objective} ones")
    if length > teacher.config.context:
        raise UsageError(f"--context must be at most the {teacher.config.context} tokens of {flag}, not {length}")
    tokens = shared_vocabulary(flag, student, teacher, tokenizer, state)
    return teacher.to(device, dtype).eval().requires_grad_(False), tokens


def tokenizer_of(folder: Path) -> dict | None:
    """Of a model of transformers, where it is there as a tokenizer.json"""
    path = folder / "tokenizer.json"
    return {"kind": "json", "json": path.read_text(encoding="utf-8")} if path.is_file() else None


def shared_vocabulary(flag: str, student: GPT, teacher: GPT, own: Tokenizer | None, its: dict | None) -> int:
    """own, its: the tokenizers of the student and of the teacher, where they are known"""
    sizes = student.config.vocabulary, teacher.config.vocabulary
    if own is not None and its is not None:
        if not same_tokenizer(own.state, its):
            raise UsageError(f"{flag} must have the tokenizer of this run (--tokenizer), not another")
        return min(own.vocabulary, *sizes)
    if abs(sizes[0] - sizes[1]) >= PADDING:
        raise UsageError(f"{flag} must have the {sizes[0]} tokens of this run, but for padding, not {sizes[1]}")
    return min(sizes)


def same_tokenizer(one: dict, other: dict) -> bool:
    if one["kind"] == other["kind"] == "json":
        return json.loads(one["json"]) == json.loads(other["json"])
    return one == other
