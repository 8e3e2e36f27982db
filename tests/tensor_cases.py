"""What each process of a gang does in tests of tensor parallelism: our GPT cut between ranks against the whole one."""

import contextlib
import io
from collections import Counter
from collections.abc import Iterator
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from parity import check
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

import gptkernels as gk
from gptkernels import cli
from gptkernels.failures import UsageError
from gptkernels.models import checkpoint
from gptkernels.models.data import Text
from gptkernels.models.parallel import Workers
from gptkernels.models.plain import plain_twin
from gptkernels.models.training import Trainer, TrainOptions
from gptkernels.parallel import tensor_collectives, vocabulary
from gptkernels.parallel.tensor_parallel import in_model_order

SIZES = {"vocabulary": 61, "context": 32, "layers": 2, "width": 64, "heads": 4}
LLAMA = {"norm": "rms", "rotary": 1e4, "activation": "silu", "gated": True, "bias": False, "tied": False}
CONFIGS = {
    "gpt1": {"norm": "post"},
    "gpt2": {},
    "gpt3": {"pattern": ("dense", "banded"), "window": 5},
    "albert": {
        "norm": "post",
        "share_layers": True,
        "embedding_rank": 32,
        "token_types": 2,
        "objective": "masked",
    },
    "causal of low rank": {"embedding_rank": 32},
    "llama": {**LLAMA, "kv_heads": 2, "qk_norm": True},
    "llama, biases": {**LLAMA, "bias": True, "mlp_width": 96},
}
ROWS, TOKENS = 2, 12


def mesh():
    return dist.init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))


def whole(**config) -> gk.GPT:
    """With weights large enough for every one of them to matter, the same on all ranks"""
    torch.manual_seed(0)
    model = gk.GPT(gk.GPTConfig(**{**SIZES, **config}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.2 + (parameter.ndim == 1))
    return model


def cut(sequence: bool = True, **config) -> gk.GPT:
    return gk.parallel.tensor(whole(**config), mesh(), sequence=sequence)


def batch(rows: int = ROWS, tokens: int = TOKENS) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    tokens, targets = torch.randint(0, SIZES["vocabulary"], (2, rows, tokens), generator=generator)
    targets[0, 3] = -100
    return tokens, targets


def gradients(model: nn.Module) -> dict[str, Tensor]:
    grads = {name: x.grad for name, x in model.named_parameters() if x.grad is not None}
    return in_model_order(model, {name: full(grad) for name, grad in grads.items()})


def full(x: Tensor) -> Tensor:
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def truth_of(model: gk.GPT, tokens: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, gk.GPT]:
    """-> loss and logits in float64, and the model that has their gradients"""
    twin = plain_twin(model).double()
    logits = twin(tokens)
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    loss.backward()
    return loss, logits, twin


def compare(name: str, sequence: bool, tokens: int = TOKENS, dtype: torch.dtype = torch.float32) -> None:
    """Loss, logits and every gradient, each with at most twice one process's error"""
    one = whole(**CONFIGS[name]).to(dtype)
    several = gk.parallel.tensor(whole(**CONFIGS[name]).to(dtype), mesh(), sequence=sequence)
    inputs = batch(tokens=tokens)
    truth, true_logits, twin = truth_of(one, *inputs)
    losses = [model(*inputs) for model in (one, several)]
    for loss in losses:
        loss.backward()
    if dtype == torch.float32:  # a mean of rounded numbers is off by luck
        check(f"{name}: loss", losses[1], truth, losses[0])
    true_losses = F.cross_entropy(true_logits.mT, inputs[1], reduction="none")
    each = [model(*inputs, reduction="none") for model in (several, one)]
    check(f"{name}: losses of tokens", each[0], true_losses, each[1])
    check(f"{name}: logits", several(inputs[0]), true_logits, one(inputs[0]))
    truths, ordinary, found = (gradients(model) for model in (twin, one, several))
    assert found.keys() == ordinary.keys()
    for parameter, value in found.items():
        check(f"{name}: gradient of {parameter}", value, truths[parameter], ordinary[parameter])


def compare_all(names: list[str]) -> None:
    for name in names:
        for sequence in (True, False):
            compare(name, sequence)
    # Rows that do not divide are not cut.
    compare(names[0], True, tokens=TOKENS - 1)
    for sequence in (True, False):
        compare("gpt3", sequence, dtype=torch.bfloat16)


def under_autocast(sequence: bool) -> tuple[float, float, float]:
    """-> the losses in float32 of one process, and in bfloat16 of one and of all"""
    one, several = whole(), cut(sequence)
    losses = [one(*batch()).item()]
    for model in (one, several):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(*batch())
        loss.backward()
        losses.append(loss.item())
    assert gradients(several).keys() == {name for name, _ in one.named_parameters()}
    return losses[0], losses[1], losses[2]


def with_padding() -> None:
    one, several = whole(), cut()
    tokens, targets = batch()
    start = torch.tensor([0, 5], dtype=torch.int32)
    losses = [model(tokens, targets, key_start=start, reduction="none") for model in (one, several)]
    torch.testing.assert_close(losses[1], losses[0])
    for loss in losses:
        loss[1, 5:].sum().backward()
    expected, found = gradients(one), gradients(several)
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, atol=1e-5 * float(grad.abs().max()) + 1e-7, rtol=1e-5)


@contextlib.contextmanager
def planted(bug: str) -> Iterator[None]:
    leave = tensor_collectives.Ranks.leave

    def every_bias(ranks, x, bias=None):
        return leave(ranks, x if bias is None else x + bias)

    def no_sum(ranks, *tensors):
        return tensors

    patches = {
        "the bias on every rank": (tensor_collectives.Ranks, "leave", every_bias),
        "no sum of shared gradients": (tensor_collectives.Share, "apply", no_sum),
        "no maximum of all": (vocabulary.Vocabulary, "highest", lambda part, peak: peak),
        "no sum of exponentials": (vocabulary.Vocabulary, "summed", lambda part, *sums: sums),
        "no sum of the loss's gradient": (vocabulary.Vocabulary, "complete", lambda part, grads: tuple(grads)),
    }
    owner, name, patch = patches[bug]
    with mock.patch.object(owner, name, patch):
        yield


def is_caught(bug: str) -> bool:
    with planted(bug):
        try:
            compare("gpt2", True)
        except AssertionError:
            return True
    return False


class Sent(Counter):
    """Elements that go into sums over all ranks and come out of gathers, by collective"""

    @contextlib.contextmanager
    def counting(self) -> Iterator["Sent"]:
        places = {"all_reduce": (dist, 0), "all_gather": (tensor_collectives, 0)}
        places["reduce_scatter"] = (tensor_collectives, 1)

        def counted(name: str, real, whole: int):
            def call(*args, **kwargs):
                self[name] += args[whole].numel()
                return real(*args, **kwargs)

            return call

        with contextlib.ExitStack() as patches:
            for name, (owner, whole) in places.items():
                counter = counted(name, getattr(owner, name), whole)
                patches.enter_context(mock.patch.object(owner, name, counter))
            yield self


def sent_by(model: nn.Module, backward: bool) -> dict[str, int]:
    sent, (tokens, targets) = Sent(), batch()
    with sent.counting():
        loss = model(tokens, targets)
        if backward:
            loss.backward()
    return dict(sent)


def sent_per_block(sequence: bool, backward: bool) -> dict[str, int]:
    few, many = (sent_by(cut(sequence, layers=layers), backward) for layers in (1, 3))
    return {name: (count - few.get(name, 0)) // 2 for name, count in many.items() if count != few.get(name, 0)}


class Largest(TorchDispatchMode):
    """The most elements of any tensor that an op makes"""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for each in out if isinstance(out, (tuple, list)) else (out,):
            # A DTensor is one in name only: its ops on parts come here as well.
            if isinstance(each, Tensor) and not isinstance(each, DTensor) and not func.is_view:
                self.elements = max(self.elements, each.numel())
        return out


def largest_in_a_step(vocabulary: int, rows: int, tokens: int) -> int:
    model = cut(vocabulary=vocabulary, layers=1)
    inputs = batch(rows, tokens)
    with Largest() as seen:
        model(*inputs).backward()
    return seen.elements


def generated(name: str, use_cache: bool = True) -> tuple[bool, bool, int]:
    """-> whether greedy and sampled tokens are one process's, and the elements of one layer's cache"""
    one, several = whole(**CONFIGS[name]), cut(**CONFIGS[name])
    prompts, cache_sizes = [torch.arange(5), torch.arange(9)], []
    greedy = [model.generate(prompts, 8, temperature=0, use_cache=use_cache) for model in (one, several)]
    # Ranks whose generators differ take what the first one draws.
    seeds = torch.Generator().manual_seed(3), torch.Generator().manual_seed(3 + dist.get_rank())
    sampled = [
        model.generate(prompts, 8, temperature=1.2, top_p=0.9, generator=seed, use_cache=use_cache)
        for model, seed in zip((one, several), seeds, strict=True)
    ]
    cache_class = gk.models.generation.KVCache
    with mock.patch.object(cache_class, "positions", noting_sizes(cache_class.positions, cache_sizes)):
        several.generate(torch.zeros(2, 4, dtype=torch.int64), 3, temperature=0)
    same = [all(torch.equal(a, b) for a, b in zip(*pair, strict=True)) for pair in (greedy, sampled)]
    return same[0], same[1], cache_sizes[-1]


def noting_sizes(positions, sizes: list[int]):
    def noted(cache, tokens):
        sizes.append(0 if cache.layers[0].k is None else cache.layers[0].k.numel())
        return positions(cache, tokens)

    return noted


def dropped(sequence: bool) -> tuple[float, float, float]:
    """-> the loss of one process, and of this rank twice, with other seeds the second time"""
    found = []
    for model, seed in ((whole(dropout=0.3), 5), (cut(sequence, dropout=0.3), 5), (cut(sequence, dropout=0.3), 6)):
        torch.manual_seed(seed + (seed == 6) * dist.get_rank())
        found.append(model.train()(*batch()).item())
    return found[0], found[1], found[2]


def mask_of_attention() -> list[bool]:
    """Which keys a rank's first head drops"""
    model = cut(attention_dropout=0.5, layers=1).train()
    torch.manual_seed(1)
    seen = []
    real = gk.ops.dropout.draw_seed
    with mock.patch("gptkernels.ops.attention.op.draw_seed", lambda device: seen.append(real(device)) or seen[-1]):
        model(*batch())
    keep = gk.ops.dropout.keep_mask(seen[0], 8, 8, 0.5)
    return keep.flatten().tolist()


def refusal(config: dict, **options) -> str:
    try:
        gk.parallel.tensor(whole(**config), options.get("mesh", mesh()))
    except (ValueError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def refused_twice() -> str:
    model = cut()
    try:
        gk.parallel.tensor(model, mesh())
    except ValueError as error:
        return str(error)
    return ""


TRAINED = {"vocabulary": 64, "context": 32, "width": 64, "heads": 4, "layers": 2, "pattern": ("dense", "banded")}


def trained(parallel: str, out: str | None, config: dict, resume: bool = False) -> list[float]:
    """-> the losses of a run, which goes on from the checkpoint in `out`"""
    torch.manual_seed(0)
    model = gk.GPT(gk.GPTConfig(**{**TRAINED, "window": 8, **config}))
    state = checkpoint.load(out) if resume else None
    if state is not None:
        model.load_state_dict(state["model"])
    workers = Workers(parallel, "cpu")
    options = TrainOptions(
        steps=25 if resume else 20, batch=8, micro_batch=4, learning_rate=3e-3, warmup=5, log_every=1
    )
    tokens = torch.arange(5000).remainder(13).mul(5).remainder(64).numpy()
    trainer = Trainer(model, Text(tokens, 32, 64), options, workers=workers, out=out)
    if state is not None:
        trainer.resume(state)
    return [record.loss for record in trainer.train()]


def refused_training(parallel: str, compiled: bool) -> str:
    model, tokens = gk.GPT(gk.GPTConfig(**TRAINED, window=8)), torch.zeros(500, dtype=torch.int64).numpy()
    options = TrainOptions(steps=1, batch=4, compile=compiled)
    try:
        Trainer(model, Text(tokens, 32, 64), options, workers=Workers(parallel, "cpu"))
    except UsageError as error:
        return str(error)
    return ""


def written(folder: str) -> str:
    """What `gptkernels generate` prints"""
    words = ["--checkpoint", folder, "--prompt", "ab", "--tokens", "12", "--device", "cpu", "--parallel", "tp"]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert cli.main(["generate", *words]) == 0
    return out.getvalue()
