"""What `gptkernels train` may be told, and what a checkpoint decides in a run that goes on from it."""

from argparse import ArgumentParser, Namespace
from dataclasses import fields

from .. import arguments
from ..arguments import number, whole
from ..failures import UsageError
from ..parallel import mesh
from .config import PRESETS, GPTConfig
from .finetune import TASKS
from .training import TrainOptions

# Not a published one: what a laptop trains in a minute.
TINY = GPTConfig(vocabulary=256, context=128, layers=4, width=128, heads=4, pattern=("dense", "banded"), window=32)
MODELS = {"tiny": TINY} | PRESETS

DEFAULTS = TrainOptions(evaluate_every=200, checkpoint_every=200)
# Options of the model that a checkpoint's config has under the same name.
OF_CONFIG = ("window", "dropout")
# What a run that goes on may do differently: how it computes and when it reports, not what it computes. More steps
# stretch the rest of the cosine.
FREE = ("steps", "micro_batch", "compile", "log_every", "evaluate_every", "checkpoint_every")


def add_arguments(parser: ArgumentParser) -> None:
    model = parser.add_argument_group("model")
    model.add_argument("--model", choices=MODELS, metavar="NAME", help=f"{', '.join(MODELS)} (gpt2)")
    model.add_argument("--init-from", metavar="hf:PATH|CHECKPOINT", help="start from these weights instead")
    model.add_argument("--context", type=whole(1), help="tokens of a sequence; the model's own by default")
    model.add_argument("--window", type=whole(1), help="of banded layers")
    model.add_argument("--dropout", type=number(at_least=0, at_most=0.999))
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

    teacher = parser.add_argument_group("teacher")
    teacher.add_argument("--distill-from", metavar="hf:PATH|CHECKPOINT", help="learn from this model's predictions too")
    teacher.add_argument(
        "--alpha", type=number(at_least=0, at_most=1), help=f"share of the data in the loss ({DEFAULTS.alpha:g})"
    )
    teacher.add_argument(
        "--temperature", type=number(above=0), help=f"of both models' softmax ({DEFAULTS.temperature:g})"
    )

    training = parser.add_argument_group("training")

    def add(name: str, kind, about: str = "") -> None:
        default = getattr(DEFAULTS, name)
        shown = about if default is None else f"{about} ({default})".strip()
        training.add_argument("--" + name.replace("_", "-"), type=kind, help=shown)

    add("steps", whole(1))
    add("batch", whole(1), "sequences per step, of all processes")
    add("micro_batch", whole(1), "sequences at once in each process; the rest is accumulated")
    add("learning_rate", number(above=0))
    add("min_learning_rate", number(at_least=0, at_most=1), "at the end, as a share")
    add("warmup", whole(0), "steps")
    add("weight_decay", number(at_least=0))
    add("clip", number(at_least=0), "largest norm of a gradient; 0: any")
    training.add_argument("--dtype", choices=("float32", "bfloat16"), help="bfloat16 on a GPU, float32 on a CPU")
    training.add_argument("--compile", action="store_true", default=None, help="torch.compile")
    add("seed", arguments.seed)
    training.add_argument(
        "--parallel", default="none", type=mesh.accepted, metavar="HOW", help=f"under torchrun: {mesh.ACCEPTED}"
    )
    training.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))

    output = parser.add_argument_group("output")
    output.add_argument("--out", metavar="FOLDER", help="for checkpoints and log.jsonl; without it nothing is kept")
    output.add_argument(
        "--resume", action="store_true", help="go on from the checkpoint in --out, as that run was told"
    )
    output.add_argument("--checkpoint-every", type=whole(1), help=f"steps ({DEFAULTS.checkpoint_every})")
    output.add_argument("--evaluate-every", type=whole(0), help=f"steps; 0: never ({DEFAULTS.evaluate_every})")
    output.add_argument("--log-every", type=whole(1), help=f"steps ({DEFAULTS.log_every})")


def settings_of(options: Namespace, state: dict | None, device: str) -> TrainOptions:
    """The options that were given, else the checkpoint's, else the defaults. state: of the checkpoint to go on from."""
    names = [field.name for field in fields(TrainOptions) if hasattr(options, field.name)]
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    if state is None:
        dtype = "bfloat16" if device == "cuda" else "float32"
        values = {name: getattr(DEFAULTS, name) for name in names} | {"dtype": dtype} | given
        # A run shorter than the warm-up would never reach its learning rate.
        values["warmup"] = min(values["warmup"], values["steps"] // 2)
    else:
        own = {name: getattr(DEFAULTS, name) for name in names}  # for what older checkpoints do not have
        kept = own | state["options"] | {"betas": tuple(state["options"]["betas"])}
        if "warmup" in given:
            given["warmup"] = min(given["warmup"], kept["steps"] // 2)
        for name, value in given.items():
            if name not in FREE and kept[name] != value:
                raise differs(name, kept[name], value)
        values = kept | given
    try:
        return TrainOptions(**values)
    except ValueError as error:
        name, rest = str(error).split(" ", 1)
        raise UsageError(f"{flag(name)} {rest}") from None


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def differs(name: str, kept, got) -> UsageError:
    return UsageError(f"{flag(name)} must be what the checkpoint was trained with, {kept}, not {got}")


def check_resumed(options: Namespace, state: dict) -> None:
    """Refuses whatever says that the model, or what it was started from, is another one than the checkpoint's."""
    config, about = state["config"], state["about"]
    for name in OF_CONFIG:
        value = getattr(options, name)
        if value is not None and value != config[name]:
            raise differs(name, config[name], value)
    for name in ("model", "init_from", "context", "distill_from"):
        value, kept = getattr(options, name), about.get(name)
        if value is not None and value != kept:
            raise differs(name, kept or "nothing", value)
    task = (state.get("task") or {}).get("name")
    if options.task != task:
        raise differs("task", task or "nothing", options.task or "nothing")
