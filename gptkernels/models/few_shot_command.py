"""`gptkernels few-shot`: evaluates a trained GPT on questions with a few answers each, told by examples alone."""

import json
from argparse import ArgumentParser, Namespace
from pathlib import Path

from rich.console import Console

from .. import arguments
from ..arguments import whole
from ..failures import UsageError
from ..files import write_text
from .data import read_examples
from .few_shot import NORMALISATIONS, Question, evaluate
from .generate import load

SHOWN = 5


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--checkpoint", required=True, metavar="PATH", help="of gptkernels train, or hf:PATH")
    parser.add_argument(
        "--questions",
        required=True,
        metavar="FILE",
        help='one JSON per line: {"context": text, "choices": [texts], "answer": place of the right one}',
    )
    parser.add_argument("--pool", metavar="FILE", help="where shots are drawn from; the questions by default")
    parser.add_argument("--shots", type=whole(0), default=0, help="solved questions before each (0)")
    parser.add_argument("--description", default="", help="of the task, at the start of every prompt")
    parser.add_argument("--normalise", choices=NORMALISATIONS, default="length", help="by what (length)")
    parser.add_argument("--tokenizer", metavar="FILE", help="a tokenizer.json, where the checkpoint has none")
    parser.add_argument("--batch", type=whole(1), default=16, help="choices that are read at once (16)")
    parser.add_argument("--seed", type=arguments.seed, default=0, help="of which shots are drawn")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--json", metavar="FILE", help="also write scores and answers there")


def run(options: Namespace) -> int:
    questions = read_questions(options.questions)
    pool = read_questions(options.pool) if options.pool else questions
    if options.shots and len(pool) <= options.shots:
        raise UsageError(f"--shots must be fewer than the {len(pool)} questions they are drawn from")
    model, tokenizer = load(options.checkpoint, options.tokenizer, options.device)
    result = evaluate(
        model,
        tokenizer,
        questions,
        pool=pool,
        shots=options.shots,
        description=options.description,
        normalise=options.normalise,
        seed=options.seed,
        batch=options.batch,
    )
    console = Console(soft_wrap=True, highlight=False)
    for question, answer in list(zip(questions, result.answers, strict=True))[:SHOWN]:
        verdict = "right" if answer == question.answer else f"wrong, it is {question.choices[question.answer]!r}"
        console.print(f"{question.context!r}: {question.choices[answer]!r} ({verdict})", markup=False)
    chance = sum(1 / len(question.choices) for question in questions) / len(questions)
    console.print(
        f"{options.shots} shot(s): {result.accuracy:.1%} of {len(questions)} questions right, by chance {chance:.1%}"
    )
    if options.json:
        found = {"accuracy": result.accuracy, "answers": result.answers, "scores": result.scores}
        write_text(options.json, json.dumps(found, indent=1))
    return 0


def read_questions(path: str | Path) -> list[Question]:
    questions = []
    for number, example in enumerate(read_examples(path), 1):
        context, choices, answer = (example.get(name) for name in ("context", "choices", "answer"))
        if (
            not isinstance(context, str)
            or not isinstance(choices, list)
            or not all(isinstance(choice, str) for choice in choices)
            or type(answer) is not int
        ):
            raise UsageError(f"{path}, question {number}: must have a text context, a list of choices, an answer")
        try:
            questions.append(Question(context, tuple(choices), answer))
        except ValueError as error:
            raise UsageError(f"{path}, question {number}: {error}") from None
    return questions
