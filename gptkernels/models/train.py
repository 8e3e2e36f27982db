"""`gptkernels train`: trains a GPT on a text file, a tokenizer's tokens or a .bin of them, or fine-tunes one."""

import json
import math
import os
import signal
import sys
import threading
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from ..failures import UsageError, is_out_of_memory
from ..files import write_text
from . import checkpoint, cost
from .config import GPTConfig
from .data import MaskedText, Text, Tokenizer, read_examples, read_tokens
from .distill import Student, check_options, load_teacher
from .finetune import Examples, TaskModel, accuracy, labels_of
from .gpt import GPT
from .parallel import Workers
from .train_options import DEFAULTS, MODELS, add_arguments, check_resumed, differs, settings_of
from .training import DivergedError, Record, Trainer

__all__ = ["MODELS", "add_arguments", "run"]

VALIDATION_SHARE = 0.1
Data = Text | MaskedText | Examples
INTERRUPTED = 130


def run(options: Namespace) -> int:
    console = Console()
    if options.dry_run:
        dry_run(console, options)
        return 0
    workers = Workers(options.parallel, options.device)
    try:
        return train(console, options, workers)
    finally:
        workers.close()


def train(console: Console, options: Namespace, workers: Workers) -> int:
    trainer = make_trainer(console, options, workers)
    config, settings = trainer.gpt.config, trainer.options
    if workers.rank == 0:
        console.print(
            f"{describe(config)}, {trainer.gpt.parameter_count():,} parameters, on {workers.world} x "
            f"{workers.device.type}, {settings.batch} sequences per step in {trainer.accumulate} micro-batch(es) each",
            soft_wrap=True,
        )
    try:
        stopped = follow(console, trainer, options, workers)
    except DivergedError as error:
        raise ValueError(f"{error}; {kept(trainer)}, a smaller --learning-rate may help") from None
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        rows = settings.batch // workers.data_parallel // trainer.accumulate
        where = {"mixed": settings.dtype == "bfloat16", "on_cpu": workers.device.type == "cpu"}
        needed = cost.training_memory(config, rows * trainer.data.length, **where).total
        raise MemoryError(
            f"a step of {rows} sequence(s) at once needs about {needed / 2**30:.1f} GiB (--dry-run says of what); a "
            "smaller --micro-batch or --save input needs less"
        ) from None
    if stopped:
        print(f"gptkernels train: stopped after step {trainer.step}; {kept(trainer)}", file=sys.stderr)
        return INTERRUPTED
    model, shown = trainer.unwrapped, trainer.data if trainer.validation is None else trainer.validation
    if isinstance(model, TaskModel) and workers.kind != "fsdp" and workers.rank == 0:
        console.print(f"accuracy {accuracy(model, shown):.1%} of {len(shown)} examples")
    return 0


def kept(trainer: Trainer) -> str:
    if trainer.path is None:
        return "without --out nothing is kept"
    if trainer.saved is None:
        return "no checkpoint was written yet"
    return f"the checkpoint of step {trainer.saved} is in {trainer.path.parent}, --resume goes on from it"


def make_trainer(console: Console, options: Namespace, workers: Workers) -> Trainer:
    if options.data is None:
        raise UsageError("--data must name a file to train on")
    state = resumed(options)
    if state is not None:
        check_resumed(options, state)
    settings = settings_of(options, state, workers.device.type)
    tokenizer = find_tokenizer(options, state)
    torch.manual_seed(settings.seed)
    examples = read_examples(options.data) if options.task else []
    model = make_model(options, state, tokenizer, examples)
    length = options.context if state is None else state["about"]["context"]
    data, validation = make_data(options, model, tokenizer, examples, length)
    source = options.distill_from if state is None else state["about"].get("distill_from")
    check_options(options, source)
    if source is not None and isinstance(model, GPT):
        dtype = getattr(torch, settings.dtype)
        teacher, tokens = load_teacher(source, model, tokenizer, data.length, dtype, workers.device)
        model = Student.of(model, teacher, settings.alpha, settings.temperature, tokens)
        if isinstance(data, Text):  # refuses tokens that the teacher does not know
            data = replace(data, vocabulary=tokens)
        if workers.rank == 0:
            console.print(
                f"loss: {settings.alpha:g} cross-entropy + {(1 - settings.alpha) * settings.temperature**2:g} KL from "
                f"{source} ({describe(teacher.config)}) at temperature {settings.temperature:g}",
                soft_wrap=True,
            )
    about: dict = {
        "tokenizer": None if tokenizer is None else tokenizer.state,
        "about": {
            "model": None if options.init_from else options.model or "gpt2",
            "init_from": options.init_from,
            "distill_from": options.distill_from,
            "data": f"{len(data)} {'examples' if options.task else 'tokens'}",
            "context": data.length,
        },
    }
    if isinstance(data, Examples):
        about["task"] = {"name": options.task, "labels": data.labels}
        if data.truncated and workers.rank == 0:
            console.print(f"{data.truncated} sequences were cut to the {data.length} tokens of the context")
    if state is not None:
        if about["about"]["data"] != state["about"]["data"]:
            raise differs("data", state["about"]["data"], about["about"]["data"])
        about["about"] = state["about"]
    trainer = Trainer(model, data, settings, workers=workers, validation=validation, out=options.out, about=about)
    if state is not None:
        trainer.resume(state)
        if workers.rank == 0:
            console.print(
                f"goes on after step {trainer.step} of {trainer.path}, with its model, batch of {settings.batch}, "
                f"learning rate of {settings.learning_rate:g} and seed {settings.seed}",
                soft_wrap=True,
            )
    return trainer


def resumed(options: Namespace) -> dict | None:
    """The checkpoint to go on from."""
    if options.out is None:
        if options.resume:
            raise UsageError("--resume needs --out, the folder with the checkpoint")
        return None
    if options.resume:
        return checkpoint.load(options.out)
    if (Path(options.out) / checkpoint.NAME).exists():
        raise UsageError(f"{options.out} has a checkpoint: --resume goes on from it, another --out starts anew")
    Path(options.out).mkdir(parents=True, exist_ok=True)
    if not os.access(options.out, os.W_OK):
        raise UsageError(f"--out {options.out} must be a folder that can be written to")
    return None


def find_tokenizer(options: Namespace, state: dict | None) -> Tokenizer | None:
    """None: the data is a .bin, whose tokens are anybody's."""
    if options.tokenizer is None and state is not None:
        return state["tokenizer"] and Tokenizer(state["tokenizer"])
    if options.tokenizer is None and Path(options.data).suffix == ".bin":
        return None
    tokenizer = Tokenizer.from_file(options.tokenizer)
    if state is not None and tokenizer.state != state["tokenizer"]:
        raise UsageError("--tokenizer must be what the checkpoint was trained with")
    return tokenizer


def make_model(
    options: Namespace, state: dict | None, tokenizer: Tokenizer | None, examples: list[dict]
) -> GPT | TaskModel:
    """examples: of the task to fine-tune for"""
    changes = {name: getattr(options, name) for name in ("dropout", "save", "backend", "window")}
    changes = {name: value for name, value in changes.items() if value is not None}
    if state is not None:
        config, task = GPTConfig(**{**state["config"], **changes}), state.get("task")
        model = GPT(config) if task is None else TaskModel(GPT(config), task["name"], len(task["labels"]), grown=True)
        model.load_state_dict(state["model"])
        return model
    if options.init_from is None:
        config = MODELS[options.model or "gpt2"]
        if tokenizer is not None:
            changes["vocabulary"] = tokenizer.vocabulary
            if config.objective == "masked":
                changes["vocabulary"] = max(tokenizer.vocabulary, 1 + max(tokenizer.special()))
        if options.context is not None:
            changes["context"] = options.context
        gpt = GPT(replace(config, **changes))
    else:
        if options.model is not None:
            raise UsageError("--model must not be given with --init-from, which says what model it is")
        if options.init_from.startswith("hf:"):
            gpt = GPT.from_hf(options.init_from.removeprefix("hf:"), dtype=torch.float32, **changes)
        else:
            gpt, _ = checkpoint.load_model(options.init_from, **changes)
        if options.context is not None and options.context > gpt.config.context:
            raise UsageError(
                f"--context must be at most the {gpt.config.context} positions of {options.init_from}, "
                f"not {options.context}"
            )
    if tokenizer is not None and tokenizer.vocabulary > gpt.config.vocabulary:
        raise ValueError(
            f"the tokenizer's {tokenizer.vocabulary} tokens must be among the model's {gpt.config.vocabulary}: "
            "--tokenizer names the file of the model's own"
        )
    if options.task is None:
        return gpt
    return TaskModel(gpt, options.task, len(labels_of(options.task, examples)))


def make_data(
    options: Namespace,
    model: GPT | TaskModel,
    tokenizer: Tokenizer | None,
    examples: list[dict],
    longest: int | None,
) -> tuple[Data, Data | None]:
    """longest: of sequences, None for the model's context -> data to train on, and to validate on or None"""
    config = model.gpt.config if isinstance(model, TaskModel) else model.config
    length = longest or config.context
    if options.task:
        first_special = config.vocabulary - len(TaskModel.SPECIAL)
        data = Examples(options.task, examples, tokenizer, length, first_special)
        if not options.validation:
            return data, None
        unseen = read_examples(options.validation)
        return data, Examples(options.task, unseen, tokenizer, length, first_special, data.labels)

    def text(path: str) -> Text | MaskedText:
        tokens = read_tokens(path, tokenizer)
        if config.objective == "next_token":
            return Text(tokens, length, config.vocabulary)
        if tokenizer is None:
            raise ValueError("a masked model needs text and, for tokens other than bytes, --tokenizer")
        return MaskedText(Text(tokens, length, tokenizer.vocabulary), tokenizer.special())

    if options.validation:
        return text(options.data), text(options.validation)
    return text(options.data).split(VALIDATION_SHARE)


@contextmanager
def stopping_after_the_step(trainer: Trainer) -> Iterator[None]:
    """The first Ctrl-C lets a single process finish its step; several processes could not agree on one."""
    alone = trainer.workers.world == 1 and threading.current_thread() is threading.main_thread()
    if not alone:
        yield
        return

    def stop(*_) -> None:
        trainer.stop = True
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def follow(console: Console, trainer: Trainer, options: Namespace, workers: Workers) -> bool:
    """Runs the training with a bar on a terminal, a line per record elsewhere, and log.jsonl. -> stopped by Ctrl-C?"""
    if workers.rank != 0:
        for _ in trainer.train():
            pass
        return False
    log = Path(options.out) / "log.jsonl" if options.out else None
    if log:
        forget_after(log, trainer.step)
    columns = [TextColumn("{task.completed}/{task.total}"), BarColumn(), TimeRemainingColumn()]
    columns.append(TextColumn("{task.description}"))
    with (
        Progress(*columns, console=console, disable=not console.is_terminal) as progress,
        stopping_after_the_step(trainer),
    ):
        bar = progress.add_task("", total=trainer.options.steps, completed=trainer.step)
        for record in trainer.train():
            progress.update(bar, completed=record.step, description=line(record))
            if not console.is_terminal or record.validation_loss is not None:
                console.print(f"step {record.step}: {line(record)}", highlight=False, soft_wrap=True)
            if log:
                with open(log, "a") as file:
                    file.write(json.dumps(asdict(record)) + "\n")
    if options.out and not trainer.stopped:
        console.print(f"checkpoint: {trainer.path}", soft_wrap=True)
    return trainer.stopped


def forget_after(log: Path, step: int) -> None:
    """Records of steps behind the checkpoint, which are about to be made again."""
    if log.exists():
        lines = [line for line in log.read_text().splitlines() if step_of(line) <= step]
        write_text(log, "".join(f"{line}\n" for line in lines))


def step_of(line: str) -> float:
    """Infinite for a line that was cut off."""
    try:
        return json.loads(line)["step"]
    except ValueError:
        return math.inf


def line(record: Record) -> str:
    parts = [f"loss {record.loss:.3f}"]
    if record.validation_loss is not None:
        parts.append(f"validation {record.validation_loss:.3f}")
    parts += [f"lr {record.learning_rate:.1e}", f"{record.tokens_per_second:,.0f} tokens/s"]
    parts.append("MFU n/a" if record.mfu is None else f"MFU {record.mfu:.1%}")
    if record.noise_scale is not None:
        parts.append(f"noise scale {record.noise_scale:,.0f} tokens")
    return ", ".join(parts)


def describe(config: GPTConfig) -> str:
    pattern = " and ".join(dict.fromkeys(config.pattern))
    window = f" (window {config.window})" if "banded" in config.pattern else ""
    return f"{config.layers} layers of {config.width}, {config.heads} heads, {pattern} attention{window}"


def dry_run(console: Console, options: Namespace) -> None:
    """What every preset costs, and more about the one that was asked for."""
    changes = {name: getattr(options, name) for name in ("context", "dropout", "save")}
    changes = {name: value for name, value in changes.items() if value is not None}
    chosen = options.model or "gpt2"
    batch = options.micro_batch or options.batch or DEFAULTS.batch
    console.print(f"a step of {batch} sequence(s) in mixed precision with AdamW, on one device:")
    table = Table(box=None)
    for column in ("model", "parameters", "context", "FLOPs/token", "as dense", "memory"):
        table.add_column(column, justify="left" if column == "model" else "right", no_wrap=True)
    for name in MODELS:
        config, memory = cost_of(name, changes, options.window if name == chosen else None, batch)
        table.add_row(
            name,
            f"{cost.parameter_count(config):,}",
            f"{config.context}",
            f"{cost.training_flops_per_token(config, config.context):.3e}",
            f"{cost.training_flops_per_token(config, config.context, window_aware=False):.3e}",
            f"{memory.total / 2**30:,.1f} GiB",
            style="bold" if name == chosen else None,
        )
    console.print(table)
    config, memory = cost_of(chosen, changes, options.window, batch)
    console.print(f"{chosen}: {describe(config)}", highlight=False)
    for name, size in asdict(memory).items():
        console.print(f"  {name:12} {size / 2**30:9.2f} GiB", highlight=False)


def cost_of(name: str, changes: dict, window: int | None, batch: int) -> tuple[GPTConfig, cost.Memory]:
    config = replace(MODELS[name], **changes)
    if window is not None:
        config = replace(config, window=window)
    return config, cost.training_memory(config, batch * config.context)
