"""Few-shot evaluation as the GPT-3 paper does it: no gradient, the task is told by examples in the prompt, and the
answer is the choice that the model finds likeliest.

questions = [Question("Paris is in", (" France", " Spain"), 0), ...]
evaluate(model, tokenizer, questions, pool=others, shots=3).accuracy
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .data import Tokenizer
from .gpt import GPT

SEPARATOR = "\n\n"
NORMALISATIONS = ("none", "length", "unconditional")


@dataclass(frozen=True)
class Question:
    """context and each choice are read without anything between them: a choice brings its own space."""

    context: str
    choices: tuple[str, ...]
    answer: int  # which choice is right

    def __post_init__(self):
        if not self.choices or not all(self.choices):
            raise ValueError("choices must have at least one text, none of them empty")
        if self.answer not in range(len(self.choices)):
            raise ValueError(f"answer must be 0 ... {len(self.choices) - 1}, not {self.answer!r}")


@dataclass(frozen=True)
class Result:
    scores: list[list[float]]  # of each question's choices
    answers: list[int]  # the choice with the highest
    accuracy: float


def build_prompt(question: Question, shots: Sequence[Question] = (), description: str = "") -> str:
    """The description of the task, then the shots with their answers, then the question without: zero-shot has no
    shots, one-shot one."""
    solved = [shot.context + shot.choices[shot.answer] for shot in shots]
    return SEPARATOR.join([*([description] if description else []), *solved, question.context])


@torch.no_grad()
def log_likelihoods(
    model: GPT, tokenizer: Tokenizer, pairs: Sequence[tuple[str, str]], batch: int = 16
) -> list[tuple[float, int]]:
    """pairs: (prompt, continuation) -> the continuation's log-likelihood after the prompt, and its tokens"""
    encoded = [(tokenizer.encode(prompt), tokenizer.encode(text)) for prompt, text in pairs]
    for (prompt, _), (prefix, text) in zip(pairs, encoded, strict=True):
        if not prefix or not text:
            raise ValueError(f"a prompt and its continuation must have at least one token each, not {prompt!r}")
        if len(prefix) + len(text) - 1 > model.config.context:
            raise ValueError(
                f"a prompt with its continuation must fit the context of {model.config.context}, "
                f"not {len(prefix) + len(text) - 1} tokens: use fewer shots"
            )
    device, training, found = model.embedding.token.weight.device, model.training, []
    model.eval()
    for first in range(0, len(encoded), batch):
        some = encoded[first : first + batch]
        longest = max(len(prefix) + len(text) for prefix, text in some)
        tokens = torch.zeros(len(some), longest, dtype=torch.int64)
        targets = torch.full_like(tokens, -100)
        for row, (prefix, text) in enumerate(some):
            tokens[row, : len(prefix) + len(text)] = torch.tensor(prefix + text)
            targets[row, len(prefix) - 1 : len(prefix) + len(text) - 1] = torch.tensor(text)
        tokens, targets = tokens[:, :-1], targets[:, :-1]
        losses = model(tokens.to(device), targets.to(device), reduction="none").double().sum(1)
        found += [(-loss, len(text)) for loss, (_, text) in zip(losses.tolist(), some, strict=True)]
    model.train(training)
    return found


def evaluate(
    model: GPT,
    tokenizer: Tokenizer,
    questions: Sequence[Question],
    *,
    pool: Sequence[Question] = (),
    shots: int = 0,
    description: str = "",
    normalise: str = "length",
    answer_context: str = "Answer:",
    seed: int = 0,
    batch: int = 16,
) -> Result:
    """shots: how many questions of the pool, drawn anew for each question, come solved before it.

    normalise: what a choice's log-likelihood is divided by: "none"; "length", its tokens; or "unconditional", its
    likelihood after answer_context alone, which the paper uses where some choices are likely anyway."""
    if normalise not in NORMALISATIONS:
        raise ValueError(f"normalise must be one of {', '.join(NORMALISATIONS)}, not {normalise!r}")
    if not questions:
        raise ValueError("questions must have at least one question")
    if shots and len(pool) <= shots:
        raise ValueError(f"pool must have more than {shots} questions to draw shots from, not {len(pool)}")
    draw, pairs, plain = random.Random(seed), [], []
    for question in questions:
        others = [candidate for candidate in pool if candidate != question] if shots else []
        prompt = build_prompt(question, draw.sample(others, shots), description)
        pairs += [(prompt, choice) for choice in question.choices]
        plain += [(answer_context, choice) for choice in question.choices]
    likelihoods = log_likelihoods(model, tokenizer, pairs, batch)
    if normalise == "length":
        values = [value / count for value, count in likelihoods]
    elif normalise == "unconditional":
        base = log_likelihoods(model, tokenizer, plain, batch)
        values = [value - other for (value, _), (other, _) in zip(likelihoods, base, strict=True)]
    else:
        values = [value for value, _ in likelihoods]
    scores, place = [], 0
    for question in questions:
        scores.append(values[place : place + len(question.choices)])
        place += len(question.choices)
    answers = [max(range(len(row)), key=row.__getitem__) for row in scores]
    right = sum(answer == question.answer for answer, question in zip(answers, questions, strict=True))
    return Result(scores, answers, right / len(questions))
