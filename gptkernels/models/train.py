"""`gptkernels train`: trains a GPT on a text file, a tokenizer's tokens or a .bin of them, or fine-tunes one."""

import json
from argparse import ArgumentParser, Namespace
from dataclasses import asdict, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from . import checkpoint, cost
from .config import PRESETS, GPTConfig
from .data import MaskedText, Text, Tokenizer, read_examples, read_tokens
from .finetune import TASKS, Examples, TaskModel, accuracy, labels_of
from .gpt import GPT
from .hf_weights import from_hf
from .parallel import KINDS, Workers
from .training import Record, Trainer, TrainOptions

# Not a published one: what a laptop trains in a minute.
TINY = GPTConfig(vocabulary=256, context=128, layers=4, width=128, heads=4, pattern=("dense", "banded"), window=32)
MODELS = {"tiny": TINY} | PRESETS
VALIDATION_SHARE = 0.1


def add_arguments(parser: ArgumentParser) -> None:
    model = parser.add_argument_group("model")
    model.add_argument("--model", default="gpt2", choices=MODELS, metavar="NAME", help=", ".join(MODELS))
    model.add_argument("--init-from", metavar="hf:PATH|CHECKPOINT", help="start from these weights instead")
    model.add_argument("--context", type=int, help="tokens of a sequence; the model's own by default")
    model.add_argument("--window", type=int, help="of banded layers")
    model.add_argument("--dropout", type=float)
    model.add_argument("--save", choices=("all", "preact", "input"), help="what the MLP keeps for backward")
    model.add_argument("--backend", choices=("auto", "cuda", "triton", "eager"))
    model.add_argument("--dry-run", action="store_true", help="print what the model costs and stop")

    data = parser.add_argument_group("data")
    data.add_argument(
        "--data", metavar="FILE", help="text (its bytes, or with --tokenizer), or a .bin of uint16 tokens"
    )
    data.add_argument("--validation", metavar="FILE", help="like --data; by default the last tenth of it")
    data.add_argument("--tokenizer", metavar="FILE", help="a tokenizer.json")
    data.add_argument("--task", choices=TASKS, help="fine-tune for it; --data is then a file of one JSON per line")

    training = parser.add_argument_group("training")
    defaults = TrainOptions()
    training.add_argument("--steps", type=int, default=defaults.steps)
    training.add_argument("--batch", type=int, default=defaults.batch, help="sequences per step, of all processes")
    training.add_argument("--micro-batch", type=int, help="sequences at once in each process; the rest is accumulated")
    training.add_argument("--learning-rate", type=float, default=defaults.learning_rate)
    training.add_argument("--min-learning-rate", type=float, default=defaults.min_learning_rate, help="as a share")
    training.add_argument("--warmup", type=int, default=defaults.warmup, help="steps")
    training.add_argument("--weight-decay", type=float, default=defaults.weight_decay)
    training.add_argument("--clip", type=float, default=defaults.clip, help="largest norm of a gradient; 0: any")
    training.add_argument("--dtype", choices=("float32", "bfloat16"), help="bfloat16 on a GPU, float32 on a CPU")
    training.add_argument("--compile", action="store_true", help="torch.compile")
    training.add_argument("--seed", type=int, default=defaults.seed)
    training.add_argument("--parallel", default="none", choices=KINDS, help="under torchrun")
    training.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))

    output = parser.add_argument_group("output")
    output.add_argument("--out", metavar="FOLDER", help="for checkpoints and log.jsonl; without it nothing is kept")
    output.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    output.add_argument("--checkpoint-every", type=int, default=200, help="steps")
    output.add_argument("--evaluate-every", type=int, default=200, help="steps; 0: never")
    output.add_argument("--log-every", type=int, default=defaults.log_every, help="steps")


def run(options: Namespace) -> int:
    console = Console()
    if options.dry_run:
        dry_run(console, options)
        return 0
    try:
        workers = Workers(options.parallel, options.device)
        try:
            train(console, options, workers)
        finally:
            workers.close()
    except ValueError as error:
        console.print(f"gptkernels train: {error}", style="red", markup=False, soft_wrap=True)
        return 1
    return 0


def train(console: Console, options: Namespace, workers: Workers) -> None:
    if options.data is None:
        raise ValueError("--data must name a file to train on")
    settings = TrainOptions(
        steps=options.steps,
        batch=options.batch,
        micro_batch=options.micro_batch,
        learning_rate=options.learning_rate,
        min_learning_rate=options.min_learning_rate,
        warmup=min(options.warmup, options.steps // 2),
        weight_decay=options.weight_decay,
        clip=options.clip,
        dtype=options.dtype or ("bfloat16" if workers.device.type == "cuda" else "float32"),
        compile=options.compile,
        seed=options.seed,
        log_every=options.log_every,
        evaluate_every=options.evaluate_every,
        checkpoint_every=options.checkpoint_every,
    )
    state = resumed(options)
    tokenizer = find_tokenizer(options, state)
    torch.manual_seed(options.seed)
    examples = read_examples(options.data) if options.task else None
    model = make_model(options, state, tokenizer, examples)
    data, validation = make_data(options, model, tokenizer, examples)
    about = {"tokenizer": None if tokenizer is None else tokenizer.state}
    if options.task:
        about["task"] = {"name": options.task, "labels": data.labels}
        if data.truncated and workers.rank == 0:
            console.print(f"{data.truncated} sequences were cut to the {data.length} tokens of the context")
    trainer = Trainer(model, data, settings, workers=workers, validation=validation, out=options.out, about=about)
    if state is not None:
        trainer.resume(state)
    if workers.rank == 0:
        gpt = trainer.gpt
        console.print(
            f"{describe(gpt.config)}, {gpt.parameter_count():,} parameters, on {workers.world} x "
            f"{workers.device.type}, {settings.batch} sequences per step in {trainer.accumulate} micro-batch(es) each",
            soft_wrap=True,
        )
    follow(console, trainer, options, workers)
    if options.task and workers.kind != "fsdp" and workers.rank == 0:
        shown = data if validation is None else validation
        console.print(f"accuracy {accuracy(model, shown):.1%} of {len(shown)} examples")


def resumed(options: Namespace) -> dict | None:
    """The checkpoint to go on from."""
    if options.out is None:
        if options.resume:
            raise ValueError("--resume needs --out, the folder with the checkpoint")
        return None
    if options.resume:
        return checkpoint.load(options.out)
    if (Path(options.out) / checkpoint.NAME).exists():
        raise ValueError(f"{options.out} has a checkpoint: --resume goes on from it, another --out starts anew")
    return None


def find_tokenizer(options: Namespace, state: dict | None) -> Tokenizer | None:
    """None: the data is a .bin, whose tokens are anybody's."""
    if options.tokenizer is None and state is not None:
        return state["tokenizer"] and Tokenizer(state["tokenizer"])
    if options.tokenizer is None and Path(options.data).suffix == ".bin":
        return None
    return Tokenizer.from_file(options.tokenizer)


def make_model(
    options: Namespace, state: dict | None, tokenizer: Tokenizer | None, examples: list[dict] | None
) -> torch.nn.Module:
    """examples: of the task to fine-tune for"""
    changes = {name: getattr(options, name) for name in ("dropout", "save", "backend", "window")}
    changes = {name: value for name, value in changes.items() if value is not None}
    if state is not None:
        config = GPTConfig(**{**state["config"], **changes})
        task = state.get("task")
        if (task or {}).get("name") != options.task:
            raise ValueError(f"--task must be what the checkpoint was trained for, {task and task['name']}")
        model = GPT(config) if task is None else TaskModel(GPT(config), task["name"], len(task["labels"]), grown=True)
        model.load_state_dict(state["model"])
        return model
    if options.init_from is None:
        config = MODELS[options.model]
        if tokenizer is not None:
            changes["vocabulary"] = tokenizer.vocabulary
            if config.objective == "masked":
                changes["vocabulary"] = max(tokenizer.vocabulary, 1 + max(tokenizer.special()))
        if options.context is not None:
            changes["context"] = options.context
        gpt = GPT(replace(config, **changes))
    elif options.init_from.startswith("hf:"):
        gpt = from_hf(options.init_from.removeprefix("hf:"), dtype=torch.float32, **changes)
    else:
        gpt, _ = checkpoint.load_model(options.init_from, **changes)
    if tokenizer is not None and tokenizer.vocabulary > gpt.config.vocabulary:
        raise ValueError(
            f"the tokenizer's {tokenizer.vocabulary} tokens must be among the model's {gpt.config.vocabulary}: "
            "--tokenizer names the file of the model's own"
        )
    if options.task is None:
        return gpt
    return TaskModel(gpt, options.task, len(labels_of(options.task, examples)))


def make_data(options: Namespace, model: torch.nn.Module, tokenizer: Tokenizer | None, examples: list[dict] | None):
    """-> data to train on, and to validate on or None"""
    if options.task:
        config = model.gpt.config
        length = options.context or config.context
        first_special = config.vocabulary - len(TaskModel.SPECIAL)
        data = Examples(options.task, examples, tokenizer, length, first_special)
        if not options.validation:
            return data, None
        unseen = read_examples(options.validation)
        return data, Examples(options.task, unseen, tokenizer, length, first_special, data.labels)
    length = min(options.context or model.config.context, model.config.context)

    def text(path: str) -> Text | MaskedText:
        tokens = read_tokens(path, tokenizer)
        if model.config.objective == "next_token":
            return Text(tokens, length, model.config.vocabulary)
        if tokenizer is None:
            raise ValueError("a masked model needs text and, for tokens other than bytes, --tokenizer")
        return MaskedText(Text(tokens, length, tokenizer.vocabulary), tokenizer.special())

    if options.validation:
        return text(options.data), text(options.validation)
    return text(options.data).split(VALIDATION_SHARE)


def follow(console: Console, trainer: Trainer, options: Namespace, workers: Workers) -> None:
    """Runs the training with a bar on a terminal, a line per record elsewhere, and log.jsonl."""
    if workers.rank != 0:
        for _ in trainer.train():
            pass
        return
    log = Path(options.out) / "log.jsonl" if options.out else None
    if log:
        log.parent.mkdir(parents=True, exist_ok=True)
    columns = [TextColumn("{task.completed}/{task.total}"), BarColumn(), TimeRemainingColumn()]
    columns.append(TextColumn("{task.description}"))
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task("", total=options.steps, completed=trainer.step)
        for record in trainer.train():
            progress.update(bar, completed=record.step, description=line(record))
            if not console.is_terminal or record.validation_loss is not None:
                console.print(f"step {record.step}: {line(record)}", highlight=False, soft_wrap=True)
            if log:
                with open(log, "a") as file:
                    file.write(json.dumps(asdict(record)) + "\n")
    if options.out:
        console.print(f"checkpoint: {trainer.path}", soft_wrap=True)


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
    changes = {name: getattr(options, name) for name in ("context", "dropout", "save") if getattr(options, name)}
    batch = options.micro_batch or options.batch
    table = Table(title=f"a step of {batch} sequence(s) in mixed precision with AdamW, on one device")
    for name in ("model", "parameters", "context", "training FLOPs/token", "banded as dense", "memory"):
        table.add_column(name, justify="left" if name == "model" else "right")
    for name, config in MODELS.items():
        config = replace(config, **changes)
        chosen = name == options.model
        if chosen and options.window:
            config = replace(config, window=options.window)
        memory = cost.training_memory(config, batch * config.context)
        table.add_row(
            name,
            f"{cost.parameter_count(config):,}",
            f"{config.context}",
            f"{cost.training_flops_per_token(config, config.context):.3e}",
            f"{cost.training_flops_per_token(config, config.context, window_aware=False):.3e}",
            f"{memory.total / 2**30:,.1f} GiB",
            style="bold" if chosen else None,
        )
        if chosen:
            picked = config, memory
    console.print(table)
    config, memory = picked
    console.print(f"{options.model}: {describe(config)}", highlight=False)
    for name, size in asdict(memory).items():
        console.print(f"  {name:12} {size / 2**30:9.2f} GiB", highlight=False)
