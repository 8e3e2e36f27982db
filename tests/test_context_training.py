"""Training with sequences cut between processes is training with whole ones."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from context_cases import one_mesh
from gang import Gang

import gptkernels as gk
from gptkernels.models import GPT, GPTConfig
from gptkernels.models.data import Text
from gptkernels.models.parallel import Workers
from gptkernels.models.training import Trainer, TrainOptions

SMALL = GPTConfig(vocabulary=64, context=32, layers=2, width=64, heads=4, pattern=("dense", "banded"), window=8)
BANDED = {"pattern": ("banded",), "window": 12}
LLAMA = {"norm": "rms", "rotary": 1e4, "kv_heads": 2, "gated": True, "activation": "silu", "bias": False, "tied": False}
OPTIONS = TrainOptions(steps=20, batch=4, learning_rate=3e-3, warmup=5, log_every=1, evaluate_every=10, micro_batch=1)
RUNS = {
    "cp=4": {},
    "ddp,cp=2": LLAMA,
    "fsdp,cp=2": {"share_layers": True, "pattern": ("banded",), "window": 5},
    "fsdp,cp=4": {**LLAMA, **BANDED, "qk_norm": True},
}


def text() -> Text:
    generator = np.random.default_rng(0)
    runs = [(start + np.arange(12)) % 64 for start in generator.integers(0, 64, 400)]
    return Text(np.concatenate(runs), 32, 64)


def train(parallel: str, changes: dict, options: TrainOptions = OPTIONS) -> tuple[list[list[float]], float]:
    """-> of every step the loss, the gradient's norm and sometimes the validation's loss; the norm of all weights"""
    torch.manual_seed(0)
    workers = Workers(parallel, "cpu")
    trainer = Trainer(GPT(replace(SMALL, **changes)), text(), options, workers=workers, validation=text())
    records = [[x.loss, x.gradient_norm, x.validation_loss or 0.0] for x in trainer.train()]
    state, _ = workers.state(trainer.model, trainer.optimizer)
    return records, sum(x.double().square().sum().item() for x in state.values())


def refused(parallel: str, changes: dict, length: int) -> str:
    try:
        config = replace(SMALL, **changes)
        Trainer(GPT(config), replace(text(), length=length), OPTIONS, workers=Workers(parallel, "cpu"))
    except ValueError as error:
        return str(error)
    return "nothing was refused"


def loss_of_shards(layout: str, changes: dict) -> tuple[float, float, float]:
    """Of a model whose targets are missing in some places: the mean over the ranks of the loss and of its gradient's
    first weights, and the loss of the sum"""
    mesh = one_mesh()
    model, tokens, targets, key_start = model_and_batch(changes)
    own, wanted = (gk.parallel.shard_sequence(x, mesh, 1, layout) for x in (tokens, targets))
    with gk.parallel.context(mesh, layout):
        loss = model(own, wanted, key_start=key_start)
        loss.backward()
        total = model(own, wanted, key_start=key_start, reduction="sum")
        found = gk.parallel.gather_sequence(model(own, key_start=key_start), mesh, 1, layout)
    values = torch.stack((loss, total)).detach()
    grads = torch.cat([x.grad.flatten() for x in model.parameters()])
    for x in (values, grads):
        torch.distributed.all_reduce(x)
    return values[0].item() / mesh.size(), values[1].item(), (grads / mesh.size()).numpy(), found.detach().numpy()


def model_and_batch(changes: dict):
    torch.manual_seed(0)
    model = GPT(replace(SMALL, **changes))
    tokens = torch.randint(64, (2, 32))
    targets = tokens.roll(-1, 1)
    targets[0, 3:20] = targets[1, 31:] = -100
    return model, tokens, targets, torch.tensor([0, 11], dtype=torch.int32)


def refusals() -> list[str]:
    found, model = [], model_and_batch({})[0]
    tokens = torch.zeros(1, 8, dtype=torch.int64)
    with gk.parallel.context(one_mesh()):
        for call in (
            lambda: model.generate(tokens, 2),
            lambda: model(torch.zeros(1, 9, dtype=torch.int64)),
            lambda: gk.attention(*(torch.zeros(1, 2, n, 16) for n in (4, 8, 8))),
            lambda: gk.decode_attention(*(torch.zeros(1, 2, 4, 16),) * 3, torch.ones(1, dtype=torch.int32)),
        ):
            try:
                call()
            except ValueError as error:
                found.append(str(error))
    assert gk.attention(*(torch.zeros(1, 2, n, 16) for n in (4, 8, 8))).shape == (1, 2, 4, 16)
    return found


@pytest.fixture(scope="module")
def gang():
    with Gang(4) as four:
        yield four


@pytest.mark.parametrize("parallel", RUNS)
def test_twenty_steps_are_those_of_one_process(gang, parallel):
    one, weights = train("none", RUNS[parallel])
    one = np.array(one)
    assert len(one) == 20
    assert one[-1, 0] < one[0, 0] - 0.3, "a model that stands still proves nothing"
    ranks = gang.run("test_context_training:train", parallel, RUNS[parallel])
    assert ranks[0][1] == pytest.approx(weights, rel=1e-5)
    for records, _ in ranks:
        found = np.array(records)
        assert found[:, 0] == pytest.approx(one[:, 0], rel=2e-5)
        assert found[:, 1] == pytest.approx(one[:, 1], rel=5e-4)
        assert found[:, 2] == pytest.approx(one[:, 2], rel=2e-5)


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
@pytest.mark.parametrize("changes", [{}, LLAMA], ids=["learned", "rotary"])
def test_the_mean_of_the_ranks_is_the_mean_of_all_targets(gang, layout, changes):
    model, tokens, targets, key_start = model_and_batch(changes)
    loss = model(tokens, targets, key_start=key_start)
    loss.backward()
    grads = torch.cat([x.grad.flatten() for x in model.parameters()]).numpy()
    total = model(tokens, targets, key_start=key_start, reduction="sum").item()
    logits = model(tokens, key_start=key_start).detach().numpy()
    real = np.arange(32) >= key_start.numpy()[:, None]  # what padding gives is nobody's
    for found, found_total, found_grads, found_logits in gang.run(
        "test_context_training:loss_of_shards", layout, changes
    ):
        assert found == pytest.approx(loss.item(), rel=1e-6)
        assert found_total == pytest.approx(total, rel=1e-6)
        assert np.abs(found_grads - grads).max() < 1e-6 * max(1.0, np.abs(grads).max())
        assert np.abs(found_logits - logits)[real].max() < 1e-5


@pytest.mark.parametrize(
    ("parallel", "changes", "length", "message"),
    [
        ("cp=4", {}, 20, "context must be a multiple of 8 tokens for cp=4, not 20"),
        ("cp=4", BANDED, 30, "context must be a multiple of 4 tokens for cp=4, not 30"),
        ("cp=4", {"objective": "masked"}, 32, "model must be a GPT that predicts next tokens where 4 ranks"),
        ("fsdp,cp=3", {}, 32, "--parallel fsdp,cp=3 needs a multiple of 3 processes, not 4"),
        ("ddp,cp=8", {}, 32, "--parallel ddp,cp=8 needs a multiple of 8 processes, not 4"),
    ],
)
def test_what_does_not_fit_is_one_line_on_every_rank(gang, parallel, changes, length, message):
    for found in gang.run("test_context_training:refused", parallel, changes, length):
        assert found.startswith(message)


def test_what_knows_no_shards_is_refused(gang):
    expected = [
        "generation must be outside of gptkernels.parallel.context: every rank has whole prompts",
        "tokens must be at most the context of 32 long, not 36",
        "k must have q's 4 tokens inside gptkernels.parallel.context, where both are a shard of one sequence, not 8",
        "decode_attention must be outside of gptkernels.parallel.context: a cache holds whole sequences",
    ]
    assert gang.run("test_context_training:refusals") == [expected] * 4
