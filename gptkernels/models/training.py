"""Training: AdamW, a cosine after a warm-up, accumulated and clipped gradients, checkpoints that resume to the bit.

Everything random in a step depends on the seed, the step and the worker alone, so there is no state but the model's,
the optimizer's and the number of the step.
"""

import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from .. import hardware
from ..arguments import SEEDS
from ..failures import UsageError
from ..parallel.layout import Layout
from . import checkpoint, cost
from .gpt import GPT
from .parallel import Workers

NEVER = 2**62


@dataclass(frozen=True)
class TrainOptions:
    steps: int = 1000
    batch: int = 16  # sequences per step, over all workers and micro-batches
    micro_batch: int | None = None  # sequences that a worker runs at once; as many as it has by default
    learning_rate: float = 3e-4
    min_learning_rate: float = 0.1  # share of it that the cosine ends at
    warmup: int = 100
    weight_decay: float = 0.1  # of matrices; norms and biases have none
    betas: tuple[float, float] = (0.9, 0.95)
    alpha: float = 0.5  # of a student: what its data count for, its teacher for the rest
    temperature: float = 2.0  # of its and the teacher's softmax
    clip: float = 1.0  # largest norm of the gradient, 0 for any
    dtype: str = "float32"  # or bfloat16: autocast
    compile: bool = False
    seed: int = 0
    log_every: int = 10
    evaluate_every: int = 0
    evaluate_batches: int = 8
    checkpoint_every: int = 0

    def __post_init__(self):
        lowest = {"steps": 1, "batch": 1, "log_every": 1, "warmup": 0, "evaluate_every": 0, "checkpoint_every": 0}
        for name, low in lowest.items():
            if getattr(self, name) < low:
                raise ValueError(f"{name} must be at least {low}, not {getattr(self, name)}")
        if self.micro_batch is not None and self.micro_batch < 1:
            raise ValueError(f"micro_batch must be at least 1, not {self.micro_batch}")
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype must be float32 or bfloat16, not {self.dtype!r}")
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate must be above 0 and finite, not {self.learning_rate}")
        for name in ("min_learning_rate", "alpha"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be a share, 0 ... 1, not {getattr(self, name)}")
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature must be above 0 and finite, not {self.temperature}")
        for name in ("weight_decay", "clip"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be at least 0 and finite, not {getattr(self, name)}")
        if not 0 <= self.seed < SEEDS:
            raise ValueError(f"seed must be 0 ... {SEEDS - 1}, not {self.seed}")

    def accumulate(self, world: int) -> int:
        """Micro-batches per step and worker."""
        if self.batch % world:
            raise ValueError(f"batch must be a multiple of the {world} workers, not {self.batch}")
        own = self.batch // world
        micro = min(self.micro_batch or own, own)
        if own % micro:
            raise ValueError(f"micro_batch must divide the {own} sequences of a worker, not {micro}")
        return own // micro

    def learning_rate_at(self, step: int) -> float:
        """step: from 0"""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        progress = (step - self.warmup) / max(1, self.steps - self.warmup)
        cosine = (1 + math.cos(math.pi * min(1.0, progress))) / 2
        return self.learning_rate * (self.min_learning_rate + (1 - self.min_learning_rate) * cosine)


class DivergedError(ArithmeticError):
    """The loss, or the gradient, is not finite."""


class NoiseScale:
    """The batch size up to which larger batches pay, in tokens (McCandlish et al., An Empirical Model of Large-Batch
    Training, appendix A): the gradient's variance over its squared size, from its norm at two batch sizes."""

    def __init__(self, decay: float = 0.95):
        self.decay = decay
        self.noise: float | Tensor = 0.0
        self.signal: float | Tensor = 0.0

    def update(self, small: int, small_norm2: Tensor, big: int, big_norm2: Tensor) -> None:
        """small_norm2, big_norm2: () squared norms of the mean gradient over `small` and over `big` tokens; they stay
        on their device, so that no step has to wait for it."""
        small_norm2, big_norm2 = small_norm2.double(), big_norm2.double()
        signal = (big * big_norm2 - small * small_norm2) / (big - small)
        noise = (small_norm2 - big_norm2) / (1 / small - 1 / big)
        # Each is unbiased, their ratio is not: smoothed one by one, and divided last.
        self.noise = self.decay * self.noise + (1 - self.decay) * noise
        self.signal = self.decay * self.signal + (1 - self.decay) * signal

    @property
    def tokens(self) -> float | None:
        noise, signal = float(self.noise), float(self.signal)
        return noise / signal if noise > 0 and signal > 0 else None

    def state(self) -> dict:
        return {"noise": float(self.noise), "signal": float(self.signal)}

    def load(self, state: dict) -> None:
        self.noise, self.signal = state["noise"], state["signal"]


@dataclass
class Record:
    """What is known after a step. mfu: by cost.training_flops_per_token, None where the device has no data sheet."""

    step: int
    loss: float
    learning_rate: float
    gradient_norm: float
    tokens_per_second: float
    mfu: float | None
    noise_scale: float | None
    validation_loss: float | None = None


def make_optimizer(model: nn.Module, options: TrainOptions) -> torch.optim.AdamW:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [x for x in parameters if x.ndim >= 2], "weight_decay": options.weight_decay},
        {"params": [x for x in parameters if x.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=options.learning_rate, betas=options.betas, fused=True)


class Trainer:
    """model: anything whose call with a batch's tensors by name is a mean loss. data, validation: have
    batch(step, rows, seed). about: what checkpoints say besides, such as the tokenizer."""

    def __init__(
        self,
        model: nn.Module,
        data,
        options: TrainOptions,
        *,
        workers: Workers | None = None,
        validation=None,
        out: Path | None = None,
        about: dict | None = None,
    ):
        self.data, self.validation, self.options, self.about = data, validation, options, about or {}
        self.workers = workers or Workers("none", "cpu")
        self.unwrapped = model
        gpt = model if isinstance(model, GPT) else model.gpt
        assert isinstance(gpt, GPT)
        self.gpt = gpt
        self.config = self.gpt.config
        self.layout = layout_for(self.workers.context_parallel, model, data)
        self.accumulate = options.accumulate(self.workers.data_parallel)
        self.dtype = getattr(torch, options.dtype)
        self.model = self.workers.wrap(model, list(self.gpt.blocks), self.dtype)
        if options.compile:
            if self.workers.split.tp != 1:
                raise UsageError("--compile must be off with tp: torch.compile cannot trace a model that is cut")
            self.model.compile()
        self.optimizer = make_optimizer(self.model, options)
        self.noise, self.step = NoiseScale(), 0
        self.path = None if out is None else Path(out) / checkpoint.NAME
        self.saved: int | None = None  # the step of the checkpoint there
        self.stop = self.stopped = False  # stop: asked to end after the step that is under way
        # The first step whose loss or gradient was not finite, on the device: no step waits for it.
        self.diverged = torch.full((), NEVER, dtype=torch.int64, device=self.workers.device)

    def train(self) -> Iterator[Record]:
        """Yields a record every log_every steps, and after the last. DivergedError where the loss is not finite,
        before anything is saved that it has touched."""
        options, tokens, started = self.options, 0, time.perf_counter()
        self.model.train()
        while self.step < options.steps:
            loss, norm, seen = self.one_step()
            tokens += seen
            self.step += 1
            last = self.step == options.steps
            save = self.path is not None and (last or self.stop or self.at(options.checkpoint_every))
            report = last or self.at(options.log_every)
            if save or report:
                self.check_finite()
            if save:
                self.save()
            if report:
                speed = tokens / (time.perf_counter() - started)
                yield Record(
                    self.step,
                    loss.item(),
                    options.learning_rate_at(self.step - 1),
                    norm.item(),
                    speed,
                    self.mfu(speed),
                    self.noise.tokens,
                    self.evaluate() if self.due(last) else None,
                )
                tokens, started = 0, time.perf_counter()
            if self.stop and not last:
                self.stopped = True
                return

    def at(self, every: int) -> bool:
        return bool(every) and self.step % every == 0

    def check_finite(self) -> None:
        step = int(self.diverged)
        if step != NEVER:
            raise DivergedError(f"the loss was not finite any more at step {step}")

    def due(self, last: bool) -> bool:
        every = self.options.evaluate_every
        return self.validation is not None and bool(every) and (last or self.at(every))

    def one_step(self) -> tuple[Tensor, Tensor, int]:
        """-> the loss and the gradient's norm before clipping, both (), and the tokens of all workers"""
        options, workers = self.options, self.workers
        batch = workers.own_share(self.data.batch(self.step, options.batch, options.seed), self.layout)
        seen = batch["tokens"].numel()
        torch.manual_seed(((options.seed * 1_000_003 + self.step) * 65_537 + workers.own_data) % 2**63)
        total, small = torch.zeros((), device=workers.device), None
        for number, micro in enumerate(micro_batches(batch, self.accumulate)):
            last = number == self.accumulate - 1
            with workers.micro_batch(self.model, last), workers.cutting(self.layout):
                loss = self.loss(micro) / self.accumulate
                loss.backward()
            total += loss.detach()
            if number == 0 and self.accumulate > 1:
                small = gradient_norm(self.model) * self.accumulate
        norm = gradient_norm(self.model)
        if small is not None:
            self.measure_noise(seen, small, norm)
        if options.clip:
            torch.nn.utils.clip_grads_with_norm_(self.model.parameters(), options.clip, norm)
        for group in self.optimizer.param_groups:
            group["lr"] = options.learning_rate_at(self.step)
        self.optimizer.step()
        self.optimizer.zero_grad()
        loss = workers.mean(total)
        bad = torch.where((loss + norm).isfinite(), NEVER, self.step + 1)
        self.diverged = torch.minimum(self.diverged, bad)
        return loss, norm, seen * workers.shares

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        device = self.workers.device
        batch = {name: x.to(device, non_blocking=True) for name, x in batch.items()}
        # FSDP has the parameters themselves in 16 bits.
        mixed = self.dtype != torch.float32 and self.workers.kind != "fsdp"
        with torch.autocast(device.type, self.dtype, enabled=mixed):
            return self.model(**batch)

    def measure_noise(self, seen: int, small: Tensor, norm: Tensor) -> None:
        """seen: tokens of this worker's step, small, norm: () of the first micro-batch's gradient and of the step's"""
        workers, big = self.workers, seen * self.workers.shares
        # The first micro-batch's gradient is each worker's own under DDP, and already everybody's mean under FSDP.
        first = big // self.accumulate if workers.kind == "fsdp" else seen // self.accumulate
        self.noise.update(first, workers.mean(small.square()), big, norm.square())

    @torch.no_grad()
    def evaluate(self) -> float:
        """The mean loss over the same batches each time."""
        options, losses = self.options, []
        self.model.eval()
        for number in range(options.evaluate_batches):
            batch = self.validation.batch(number, options.batch, options.seed + 1)
            parts = micro_batches(self.workers.own_share(batch, self.layout), self.accumulate)
            with self.workers.cutting(self.layout):
                losses += [self.workers.mean(self.loss(micro)) for micro in parts]
        self.model.train()
        return torch.stack(losses).mean().item()

    def mfu(self, tokens_per_second: float) -> float | None:
        peak = hardware.data_sheet_tflops(self.workers.device)
        if peak is None or not hasattr(self.data, "length"):
            return None
        flops = cost.training_flops_per_token(self.config, self.data.length)
        return flops * tokens_per_second / (peak * 1e12 * self.workers.world)

    def save(self) -> None:
        if self.path is None:
            raise ValueError("a Trainer without out has nowhere to save")
        model, optimizer = self.workers.state(self.model, self.optimizer)
        if self.workers.rank == 0:
            options = asdict(self.options) | {"betas": list(self.options.betas)}
            state: dict = {"config": checkpoint.describe(self.config), "model": model, "optimizer": optimizer}
            state |= {"step": self.step, "noise": self.noise.state(), "options": options}
            checkpoint.save(self.path, state | self.about)
        self.saved = self.step

    def resume(self, state: dict) -> None:
        """state: of a checkpoint, whose weights the model has been given already"""
        self.workers.load_optimizer(self.model, self.optimizer, state["optimizer"])
        self.step = self.saved = state["step"]
        self.noise.load(state["noise"])


def layout_for(ranks: int, model: nn.Module, data) -> str:
    """How so many ranks cut a sequence: zigzag where a causal layer is dense, so that each has as much to do."""
    if ranks == 1:
        return "contiguous"
    if not isinstance(model, GPT) or model.config.objective != "next_token":
        raise ValueError(f"model must be a GPT that predicts next tokens where {ranks} ranks cut a sequence (cp)")
    layout = "zigzag" if "dense" in model.config.pattern else "contiguous"
    pieces = Layout(ranks, layout).pieces
    if data.length % pieces:
        raise ValueError(f"context must be a multiple of {pieces} tokens for cp={ranks}, not {data.length}")
    return layout


def micro_batches(batch: dict[str, Tensor], count: int) -> list[dict[str, Tensor]]:
    parts = {name: x.chunk(count) for name, x in batch.items()}
    return [{name: part[number] for name, part in parts.items()} for number in range(count)]


def gradient_norm(model: nn.Module) -> Tensor:
    """-> (), over all parameters, also where each worker has a share of them"""
    norm = torch.nn.utils.get_total_norm([x.grad for x in model.parameters() if x.grad is not None])
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm
