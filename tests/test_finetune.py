"""GPT-1's task heads: what goes in, what comes out, and that each task is learnt."""

import json
import random

import pytest
import torch
import torch.nn.functional as F

from gptkernels import cli
from gptkernels.models import GPT, GPTConfig, checkpoint
from gptkernels.models.data import BYTES, Tokenizer
from gptkernels.models.finetune import AUXILIARY, Examples, TaskModel, accuracy, grow
from gptkernels.models.training import Trainer, TrainOptions

TOKENIZER = Tokenizer(BYTES)
START, DELIMITER, EXTRACT = 256, 257, 258


def gpt(seed: int = 0, **changes) -> GPT:
    torch.manual_seed(seed)
    return GPT(GPTConfig(vocabulary=256, context=32, layers=2, width=64, heads=4, norm="post", **changes))


def words(rng, count=4):
    return "".join(rng.choice("abcdefgh") for _ in range(count))


def example(task: str, rng, text: str, other: str, yes: bool, number: int) -> dict:
    if task == "classification":
        return {"text": text + "!?"[yes] + words(rng), "label": "ask" if yes else "shout"}
    if task == "entailment":
        return {"premise": text, "hypothesis": "yn"[yes] + words(rng), "label": yes}
    if task == "similarity":
        return {"first": "x" * yes + other, "second": text, "label": int(yes)}
    choices = [words(rng) + "!" * (choice == number % 3) for choice in range(3)]
    return {"context": text, "choices": choices, "label": number % 3}


def examples(task: str, count: int, seed: int) -> list[dict]:
    """Examples that a reader of both texts can answer."""
    rng, found = random.Random(seed), []
    for number in range(count):
        text, yes = words(rng), number % 2 == 0
        other = text if yes else words(rng)
        found.append(example(task, rng, text, other, yes, number))
    return found


def test_sequences_as_in_the_paper():
    data = Examples("classification", [{"text": "ab", "label": 1}, {"text": "c", "label": 0}], TOKENIZER, 32, 256)
    batch = data.pick([0, 1])
    assert data.labels == [0, 1]
    assert batch["tokens"].tolist() == [[[START, 97, 98, EXTRACT]], [[START, 99, EXTRACT, EXTRACT]]]
    assert batch["targets"].tolist() == [[[97, 98, EXTRACT, -100]], [[99, EXTRACT, -100, -100]]]
    assert batch["ends"].tolist() == [[3], [2]]
    assert batch["labels"].tolist() == [1, 0]

    pair = [{"first": "a", "second": "b", "label": 1}, {"first": "a", "second": "b", "label": 0}]
    both = Examples("similarity", pair, TOKENIZER, 32, 256).pick([0])["tokens"][0].tolist()
    assert both == [[START, 97, DELIMITER, 98, EXTRACT], [START, 98, DELIMITER, 97, EXTRACT]]

    question = [{"context": "q", "choices": ["a", "bc"], "label": 1}]
    several = Examples("multiple_choice", question, TOKENIZER, 32, 256).pick([0])
    assert several["tokens"][0, 0].tolist() == [START, 113, DELIMITER, 97, EXTRACT, EXTRACT]
    assert several["ends"].tolist() == [[4, 5]]


def test_what_is_too_long_loses_the_end_of_its_longest_text():
    pair = {"premise": "p" * 50, "hypothesis": "hij", "label": 0}
    data = Examples("entailment", [pair, pair | {"label": 1, "premise": "p"}], TOKENIZER, 16, 256)
    tokens = data.sequences[0][0]
    assert len(tokens) == 16
    assert tokens[-5:] == [DELIMITER, *b"hij", EXTRACT]
    assert data.truncated == 1
    both = Examples("entailment", [pair | {"hypothesis": "h" * 60}, pair | {"label": 1}], TOKENIZER, 16, 256)
    assert [len(several[0]) for several in both.sequences] == [16, 16]
    assert both.sequences[0][0].count(ord("h")) in (6, 7)


def test_every_example_once_per_epoch():
    data = Examples("classification", [{"text": str(i), "label": i} for i in range(10)], TOKENIZER, 32, 256)
    seen = torch.cat([data.batch(step, 4, seed=1)["labels"] for step in range(5)])
    assert sorted(seen[:10].tolist()) == list(range(10)) == sorted(seen[10:].tolist())
    assert seen[:10].tolist() != seen[10:].tolist()


def test_padding_and_the_loss():
    data = Examples("similarity", examples("similarity", 6, 0), TOKENIZER, 32, 256)
    model = TaskModel(gpt(), "similarity", 2).eval()
    together = data.pick(range(6))
    scores = model.predict(together["tokens"], together["ends"])
    for number in range(6):
        alone = data.pick([number])
        torch.testing.assert_close(model.predict(alone["tokens"], alone["ends"])[0], scores[number])
    logits = model.gpt(together["tokens"].flatten(0, 1))
    language = F.cross_entropy(logits.flatten(0, 1), together["targets"].flatten())
    expected = F.cross_entropy(scores, together["labels"]) + AUXILIARY * language
    torch.testing.assert_close(model(**together), expected)


@pytest.mark.parametrize("tied", [True, False])
def test_growing_keeps_the_model(tied):
    model = gpt(tied=tied).eval()
    bigger = grow(model, 3)
    tokens = torch.randint(256, (2, 9))
    torch.testing.assert_close(bigger(tokens)[..., :256], model(tokens))
    assert bigger.config.vocabulary == 259 == bigger(tokens).shape[-1]


@pytest.mark.parametrize("task", ["classification", "entailment", "similarity", "multiple_choice"])
def test_tasks_are_learnt(task):
    data = Examples(task, examples(task, 64, 0), TOKENIZER, 32, 256)
    unseen = Examples(task, examples(task, 60, 1), TOKENIZER, 32, 256, data.labels)
    # One that does not happen to answer right before it has learnt anything.
    untrained = (TaskModel(gpt(seed), task, len(data.labels)) for seed in range(20))
    model = next(model for model in untrained if accuracy(model, unseen) <= 0.5)
    for _ in Trainer(model, data, TrainOptions(steps=60, batch=16, learning_rate=2e-3, warmup=5)).train():
        pass
    assert accuracy(model, unseen) > 0.9


def test_from_the_command_line(tmp_path, capsys):
    for name, seed in (("train", 0), ("validation", 1)):
        lines = [json.dumps(example) for example in examples("classification", 48, seed)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    out = str(tmp_path / "run")
    arguments = [
        *("train", "--model", "tiny", "--task", "classification", "--data", str(tmp_path / "train.jsonl")),
        *("--validation", str(tmp_path / "validation.jsonl"), "--context", "32", "--batch", "16", "--device", "cpu"),
        *("--learning-rate", "2e-3", "--warmup", "5", "--out", out, "--evaluate-every", "20"),
    ]
    assert cli.main([*arguments, "--steps", "20"]) == 0
    assert cli.main([*arguments, "--steps", "40", "--resume"]) == 0
    shown = capsys.readouterr().out
    assert "accuracy" in shown
    assert float(shown.rsplit("accuracy ", 1)[1].split("%")[0]) > 90
    state = checkpoint.load(out)
    assert state["task"] == {"name": "classification", "labels": ["ask", "shout"]}
    assert cli.main(["generate", "--checkpoint", out, "--prompt", "a"]) == 1
    assert "fine-tuned for classification" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("task", "bad", "message"),
    [
        ("classification", [{"text": "a"}], "it lacks label"),
        ("classification", [{"text": 3, "label": 0}], "text must be text"),
        ("classification", [{"text": "a", "label": 0}], "at least two labels"),
        ("entailment", [{"premise": "a", "label": 0}], "it lacks hypothesis"),
        ("multiple_choice", [{"context": "a", "choices": ["b"], "label": 0}], "two or more choices"),
        ("multiple_choice", [{"context": "a", "choices": ["b", "c"], "label": 2}], r"label must be 0 \.\.\. 1"),
    ],
)
def test_bad_examples(task, bad, message):
    with pytest.raises(ValueError, match=message):
        Examples(task, bad, TOKENIZER, 32, 256)


def test_unknown_label_in_validation():
    with pytest.raises(ValueError, match="label must be one of"):
        Examples("classification", [{"text": "a", "label": 7}], TOKENIZER, 32, 256, [0, 1])
