"""Every split of a run over its GPUs: what it would take, or why it cannot be."""

from dataclasses import dataclass

from ..models import cost
from ..models.config import GPTConfig
from .facts import GPU
from .memory import USABLE, Memory, step_memory
from .model import model_size
from .rates import Rates
from .split import Split, does_not_fit, splits
from .step import Times, step_times
from .traffic import Step

DAY = 86400.0
DEFAULT_MODEL = "gpt3-1.3b"
# How far the batch may be from the one that was asked for, to be a whole number of sequences for every GPU.
BATCH_TOLERANCE = 0.1
SAME = 1.005  # times that the model cannot tell apart


@dataclass(frozen=True)
class Job:
    """What is to be trained on what. batch, tokens: of a step and of the run; price: of a GPU's hour"""

    config: GPTConfig
    length: int
    gpu: GPU
    gpus: int
    batch: float
    tokens: float
    price: float


@dataclass(frozen=True)
class Plan:
    """A split that fits."""

    job: Job
    step: Step
    memory: Memory
    times: Times

    @property
    def split(self) -> Split:
        return self.step.split

    @property
    def sequences(self) -> int:
        return round(self.step.micro * self.step.times * self.split.data)

    @property
    def batch(self) -> int:
        """Tokens of a step"""
        return self.sequences * self.job.length

    @property
    def tokens_per_second(self) -> float:
        return self.batch / self.times.total

    @property
    def mfu(self) -> float:
        flops = cost.training_flops_per_token(self.job.config, self.job.length)
        return flops * self.tokens_per_second / (self.job.gpu.peak * self.job.gpus)

    @property
    def days(self) -> float:
        return self.job.tokens / self.tokens_per_second / DAY

    @property
    def money(self) -> float:
        return self.days * 24 * self.job.gpus * self.job.price


@dataclass(frozen=True)
class Infeasible:
    split: Split
    reason: str
    kind: str  # the same for all that fail for the same reason


def search(job: Job, rates: Rates) -> tuple[list[Plan], list[Infeasible]]:
    """-> the splits that fit, fastest first, and the others"""
    found: list[Plan] = []
    others: list[Infeasible] = []
    size = model_size(job.config)
    for split in splits(job.gpus, job.gpu):
        result = best_of(job, rates, size, split)
        (found if isinstance(result, Plan) else others).append(result)  # type: ignore[arg-type]
    return sorted(found, key=lambda plan: plan.times.total / plan.batch), others


def best_of(job: Job, rates: Rates, size, split: Split) -> Plan | Infeasible:
    """With the micro-batch that is fastest of those that fit"""
    reason = does_not_fit(job.config, job.length, split)
    if reason is not None:
        return Infeasible(split, reason, "the model or its sequences cannot be cut so")
    each = round(job.batch / job.length / split.data)  # sequences of a data-parallel rank
    off = each * split.data * job.length / job.batch - 1
    if each < 1 or abs(off) > BATCH_TOLERANCE:
        wanted = job.batch / job.length
        reason = f"a batch of {wanted:,.6g} sequences does not go into {split.data} shares of the same size"
        return Infeasible(split, reason, "the batch does not go into equal shares")
    plans, needed = [], float("inf")
    for micro in divisors(each):
        step = Step(job.config, size, job.length, micro, each // micro, split, job.gpu)
        memory = step_memory(step)
        needed = min(needed, memory.total)
        if memory.total <= USABLE * job.gpu.memory:
            plans.append(Plan(job, step, memory, step_times(step, rates)))
    if not plans:
        has = USABLE * job.gpu.memory
        reason = f"needs {needed / 1e9:,.0f} GB of the {has / 1e9:,.0f} GB that a {job.gpu.name} can give"
        return Infeasible(split, reason, "it does not fit into memory")
    fastest = min(plan.times.total for plan in plans)
    # Few large micro-batches rather than many small ones, which launch more kernels for the same work.
    return max((plan for plan in plans if plan.times.total <= SAME * fastest), key=lambda plan: plan.step.micro)


def divisors(number: int) -> list[int]:
    return [each for each in range(1, number + 1) if number % each == 0]
