"""Few-shot evaluation, with a model that learns in this test to take its task from the prompt."""

import random

import numpy as np
import pytest
import torch

from gptkernels.models import GPT, GPTConfig
from gptkernels.models.data import BYTES, Text, Tokenizer
from gptkernels.models.few_shot import Question, build_prompt, evaluate, log_likelihoods
from gptkernels.models.training import Trainer, TrainOptions

TOKENIZER = Tokenizer(BYTES)
ANSWERS = ("A", "B", "C", "D")
QUESTION = Question("2+2=", ("4", "5"), 0)


def asked(rng: random.Random, answer: int) -> Question:
    """What is right depends on the others in the prompt alone: all of them have the same answer."""
    return Question(f"{rng.choice('abcdefgh')}:", ANSWERS, answer)


@pytest.fixture(scope="module")
def model() -> GPT:
    """Reads rows of solved questions with one answer each, until it answers as those before."""
    rng, rows = random.Random(0), []
    for _ in range(1500):
        answer = rng.randrange(4)
        rows.append(build_prompt(asked(rng, answer), [asked(rng, answer) for _ in range(5)])[:-2])
    text = np.frombuffer("".join(f"{row}\n\n\n" for row in rows).encode(), dtype=np.uint8)
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocabulary=256, context=64, layers=2, width=64, heads=4, init_std=0.08))
    options = TrainOptions(steps=250, batch=16, learning_rate=5e-3, warmup=20)
    for _ in Trainer(model, Text(text, 48, 256), options).train():
        pass
    return model


def test_examples_in_the_prompt_tell_the_task(model):
    rng, results = random.Random(1), {}
    for shots in (0, 1, 4):
        right = []
        for answer in range(4):
            questions = [asked(rng, answer) for _ in range(5)]
            pool = [Question(f"{letter}:", ANSWERS, answer) for letter in "abcdefgh"]
            right.append(evaluate(model, TOKENIZER, questions, pool=pool, shots=shots).accuracy)
        results[shots] = sum(right) / 4
    assert results[0] <= 0.5, "without an example nobody can know"
    assert results[1] > 0.9
    assert results[4] > 0.9


def test_prompts():
    shots = [Question("1+1=", ("2", "3"), 0), Question("1+2=", ("2", "3"), 1)]
    assert build_prompt(QUESTION) == "2+2="
    assert build_prompt(QUESTION, shots[:1]) == "1+1=2\n\n2+2="
    assert build_prompt(QUESTION, shots, "Add.") == "Add.\n\n1+1=2\n\n1+2=3\n\n2+2="


def test_log_likelihoods_are_those_of_the_logits(model):
    pairs = [("ab", "c"), ("a:", "A\n\nb:"), ("xyz", "12")]
    for (prompt, text), (value, count) in zip(pairs, log_likelihoods(model, TOKENIZER, pairs, batch=2), strict=True):
        tokens = torch.tensor([list((prompt + text).encode())])
        weights = model.eval()(tokens)[0].double().log_softmax(-1)
        places = range(len(prompt) - 1, len(prompt + text) - 1)
        assert value == pytest.approx(sum(weights[p, tokens[0, p + 1]].item() for p in places), rel=1e-5)
        assert count == len(text)


def test_normalisations(model):
    question = Question("a:", ("A", "AA"), 0)
    (first, second), (base1, base2) = (
        [value for value, _ in log_likelihoods(model, TOKENIZER, [(prompt, "A"), (prompt, "AA")])]
        for prompt in ("a:", "Answer:")
    )
    for normalise, expected in {
        "none": [first, second],
        "length": [first, second / 2],
        "unconditional": [first - base1, second - base2],
    }.items():
        assert evaluate(model, TOKENIZER, [question], normalise=normalise).scores[0] == pytest.approx(
            expected, rel=1e-5
        )


def test_a_question_is_never_among_its_shots(model, monkeypatch):
    pool = [Question(f"{letter}:", ANSWERS, 0) for letter in "abcd"]
    prompts = []
    monkeypatch.setattr(
        "gptkernels.models.few_shot.log_likelihoods",
        lambda model, tokenizer, pairs, batch: [prompts.append(pair[0]) or (0.0, 1) for pair in pairs],
    )
    evaluate(model, TOKENIZER, pool, pool=pool, shots=3)
    for question, prompt in zip(pool, prompts[::4], strict=True):
        assert prompt.count(question.context) == 1
        assert prompt.endswith(question.context)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"normalise": "words"}, "normalise must be"),
        ({"shots": 2, "pool": [QUESTION]}, "pool must have more than 2"),
        ({"questions": [Question("x" * 70, ("a",), 0)]}, "fit the context of 64"),
        ({"questions": [Question("", ("a",), 0)]}, "at least one token"),
    ],
)
def test_bad_arguments(model, options, message):
    arguments = {"questions": [QUESTION]} | options
    with pytest.raises(ValueError, match=message):
        evaluate(model, TOKENIZER, **arguments)


def test_bad_questions():
    with pytest.raises(ValueError, match="answer must be"):
        Question("a", ("b",), 1)
    with pytest.raises(ValueError, match="choices must"):
        Question("a", ("",), 0)
