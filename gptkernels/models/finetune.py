"""GPT-1's fine-tuning: every task as one or more sequences between special tokens, and a linear head at their end.

| task | an example (one JSON per line) | sequences |
|---|---|---|
| classification | {"text", "label"} | start text extract |
| entailment | {"premise", "hypothesis", "label"} | start premise delimiter hypothesis extract |
| similarity | {"first", "second", "label"} | both orders, their hidden states added |
| multiple_choice | {"context", "choices", "label": place of the right one} | start context delimiter choice extract |

The loss is the task's plus AUXILIARY times the language model's on the same sequences, as the paper has it.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..parallel import inside
from .data import Tokenizer
from .gpt import GPT

AUXILIARY = 0.5


@dataclass(frozen=True)
class Task:
    keys: tuple[str, ...]
    sequences: Callable[[dict], list[list[str]]]  # example -> sequences of one or two texts


TASKS = {
    "classification": Task(("text",), lambda x: [[x["text"]]]),
    "entailment": Task(("premise", "hypothesis"), lambda x: [[x["premise"], x["hypothesis"]]]),
    "similarity": Task(("first", "second"), lambda x: [[x["first"], x["second"]], [x["second"], x["first"]]]),
    "multiple_choice": Task(("context", "choices"), lambda x: [[x["context"], choice] for choice in x["choices"]]),
}


# An example of any task, to count what it has.
PLACEHOLDER = dict.fromkeys(("text", "premise", "hypothesis", "first", "second", "context"), "") | {"choices": [""]}


class Examples:
    """The examples of a task as tokens. special: the first of the three special tokens; labels: known ones, for
    validation."""

    def __init__(
        self,
        task: str,
        examples: list[dict],
        tokenizer: Tokenizer | None,
        length: int,
        special: int,
        labels: list | None = None,
    ):
        if tokenizer is None:
            raise ValueError("tokenizer must be given: a task's examples are text")
        self.task, self.length, self.truncated = task, length, 0
        texts = len(TASKS[task].sequences(PLACEHOLDER)[0])
        if length < 2 * texts + 1:
            raise ValueError(f"the context must be at least {2 * texts + 1} tokens for {task}, not {length}")
        self.start, self.delimiter, self.extract = special, special + 1, special + 2
        if labels is None:
            labels = labels_of(task, examples)
        else:
            check_examples(task, examples, labels)
        self.labels = labels
        self.answers = torch.tensor([self.labels.index(example["label"]) for example in examples])
        self.sequences = [
            [self.sequence([tokenizer.encode(text) for text in texts]) for texts in TASKS[task].sequences(example)]
            for example in examples
        ]

    def __len__(self) -> int:
        return len(self.sequences)

    def sequence(self, parts: list[list[int]]) -> list[int]:
        """One or two texts' tokens with the special ones; what is too long loses the end of its longest text."""
        room = self.length - len(parts) - 1
        if sum(map(len, parts)) > room:
            self.truncated += 1
        while sum(map(len, parts)) > room:
            longest = max(parts, key=len)
            others = sum(map(len, parts)) - len(longest)
            second = max((len(part) for part in parts if part is not longest), default=0)
            del longest[max(room - others, min(second, len(longest) - 1)) :]
        tokens = [self.start, *parts[0]]
        for part in parts[1:]:
            tokens += [self.delimiter, *part]
        return [*tokens, self.extract]

    def batch(self, step: int, rows: int, seed: int) -> dict[str, Tensor]:
        """The examples in a new order each epoch: as `pick`."""
        wanted = np.arange(step * rows, (step + 1) * rows)
        epochs = set((wanted // len(self)).tolist())
        orders = {epoch: np.random.default_rng((seed, epoch)).permutation(len(self)) for epoch in epochs}
        return self.pick([orders[number // len(self)][number % len(self)] for number in wanted])

    def pick(self, chosen) -> dict[str, Tensor]:
        """-> tokens, targets: (B, S, T) int64 for S sequences per example, padded on the right, ends: (B, S) places of
        the extract token, labels: (B,)"""
        sequences = [self.sequences[number] for number in chosen]
        longest = max(len(sequence) for several in sequences for sequence in several)
        tokens = torch.full((len(sequences), len(sequences[0]), longest), self.extract)
        targets = torch.full_like(tokens, -100)
        ends = torch.tensor([[len(sequence) - 1 for sequence in several] for several in sequences])
        for row, several in enumerate(sequences):
            for place, sequence in enumerate(several):
                tokens[row, place, : len(sequence)] = torch.tensor(sequence)
                targets[row, place, : len(sequence) - 1] = torch.tensor(sequence[1:])
        return {"tokens": tokens, "targets": targets, "ends": ends, "labels": self.answers[list(chosen)]}


def check_examples(task: str, examples: list[dict], labels: list | None) -> None:
    keys = (*TASKS[task].keys, "label")
    for number, example in enumerate(examples, 1):
        for key in keys:
            if key not in example:
                raise ValueError(f"example {number} must have {', '.join(keys)} for {task}, it lacks {key}")
        for key in TASKS[task].keys:
            texts = example[key] if key == "choices" else [example[key]]
            if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
                raise ValueError(f"example {number}: {key} must be text, not {example[key]!r}")
        if not isinstance(example["label"], (str, int)):
            raise ValueError(f"example {number}: label must be text or a whole number, not {example['label']!r}")
        if task == "multiple_choice":
            count = len(examples[0]["choices"])
            if len(example["choices"]) != count or count < 2:
                raise ValueError(f"example {number} must have two or more choices, as many as the first ({count})")
            if example["label"] not in range(count):
                raise ValueError(f"example {number}: label must be 0 ... {count - 1}, not {example['label']!r}")
        elif labels is not None and example["label"] not in labels:
            raise ValueError(f"example {number}: label must be one of {labels}, not {example['label']!r}")


def labels_of(task: str, examples: list[dict]) -> list:
    """What an answer can be, by the examples; ValueError for one that the task cannot have"""
    check_examples(task, examples, None)
    if task == "multiple_choice":
        return list(range(len(examples[0]["choices"])))
    labels = sorted({example["label"] for example in examples}, key=str)
    if len(labels) < 2:
        raise ValueError(f"the examples must have at least two labels, not only {labels}")
    return labels


class TaskModel(nn.Module):
    """A GPT with three more tokens and a head. grown: the GPT has the tokens already."""

    SPECIAL = ("start", "delimiter", "extract")

    def __init__(self, gpt: GPT, task: str, classes: int, *, grown: bool = False):
        super().__init__()
        if gpt.config.objective != "next_token":
            raise ValueError(f'a task needs a model with objective="next_token", not "{gpt.config.objective}"')
        self.gpt, self.task = gpt if grown else grow(gpt, len(self.SPECIAL)), task
        self.dropout = nn.Dropout(gpt.config.dropout)
        self.classify = nn.Linear(gpt.config.width, 1 if task == "multiple_choice" else classes)
        nn.init.normal_(self.classify.weight, std=gpt.config.init_std)
        nn.init.zeros_(self.classify.bias)

    def forward(self, tokens: Tensor, targets: Tensor, ends: Tensor, labels: Tensor) -> Tensor:
        """As Examples.pick gives them -> the loss"""
        hidden = self.hidden(tokens)
        loss = F.cross_entropy(self.scores(hidden, ends).float(), labels)
        return loss + AUXILIARY * self.gpt.loss(hidden, targets.flatten(0, 1))

    def predict(self, tokens: Tensor, ends: Tensor) -> Tensor:
        """-> (B, classes) scores"""
        return self.scores(self.hidden(tokens), ends)

    def hidden(self, tokens: Tensor) -> Tensor:
        """tokens: (B, S, T) -> (B * S, T, C); causal, so what is padded on the right is seen by nobody"""
        return self.gpt.hidden(tokens.flatten(0, 1))

    def scores(self, hidden: Tensor, ends: Tensor) -> Tensor:
        """hidden: (B * S, T, C), ends: (B, S) -> (B, classes)"""
        inside.refuse("a task's model", "only one rank has a sequence's last token")
        rows = torch.arange(hidden.shape[0], device=hidden.device)
        last = self.dropout(hidden[rows, ends.flatten()]).view(*ends.shape, -1)
        if self.task == "multiple_choice":
            return self.classify(last).squeeze(-1)
        return self.classify(last.sum(1))


def grow(gpt: GPT, count: int) -> GPT:
    """The same model with `count` new tokens at the end of its vocabulary."""
    bigger = GPT(replace(gpt.config, vocabulary=gpt.config.vocabulary + count))
    weights = gpt.state_dict()
    for name in ("embedding.token.weight", "head.weight"):
        if name in weights:
            fresh = bigger.state_dict()[name][-count:].to(weights[name])
            weights[name] = torch.cat((weights[name], fresh))
    bigger.load_state_dict(weights, assign=True)
    return bigger.train(gpt.training)


@torch.no_grad()
def accuracy(model: TaskModel, examples: Examples, batch: int = 16) -> float:
    """The share of the examples whose right label has the highest score."""
    device, right = model.classify.weight.device, 0
    model.eval()
    for first in range(0, len(examples), batch):
        picked = examples.pick(range(first, min(first + batch, len(examples))))
        scores = model.predict(picked["tokens"].to(device), picked["ends"].to(device))
        right += int((scores.argmax(-1).cpu() == picked["labels"]).sum())
    return right / len(examples)
