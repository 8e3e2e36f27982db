"""Models of transformers whose sequences are cut between processes: the losses, logits and gradients of one."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from context_cases import one_mesh
from gang import Gang

import gptkernels as gk
from gptkernels.parallel.layout import Layout
from gptkernels.parallel.shards import Shard
from gptkernels.swap import cut_attention
from gptkernels.swap.masks import Mask

pytest.importorskip("transformers")
from swap_models import GPT2, NO_DROPOUT, VOCABULARY, llama_like, transformers_model

MODELS = {
    "llama": llama_like("Llama"),
    "gpt2": transformers_model("GPT2LMHeadModel", "GPT2Config", **GPT2, **NO_DROPOUT),
    "mistral": llama_like("Mistral", sliding_window=7),
    "qwen3": llama_like("Qwen3"),
}


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """-> tokens and labels, which are missing in some places"""
    tokens = torch.randint(VOCABULARY, (2, 32), generator=torch.Generator().manual_seed(1))
    labels = tokens.clone()
    labels[0, 5:21] = labels[1, :2] = -100
    return tokens, labels


def made(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    return MODELS[name]()


def run(name: str, training: bool, window: int | None, loss: bool) -> tuple[float, np.ndarray, np.ndarray]:
    """-> the means over the ranks of the loss and of all gradients, and in evaluation this rank's logits"""
    mesh = one_mesh()
    model = made(name).train(training)
    gk.accelerate(model, window=window, loss=loss, context_parallel=mesh)
    tokens, labels = (gk.parallel.shard_sequence(x, mesh, 1) for x in batch())
    outputs = model(tokens, labels=labels)
    outputs.loss.backward()
    value, grads = outputs.loss.detach(), torch.cat([x.grad.flatten() for x in model.parameters()])
    for x in (value, grads):
        torch.distributed.all_reduce(x)
        x /= mesh.size()
    return value.item(), grads.numpy(), None if training else outputs.logits.detach().numpy()


def checkpointed(name: str) -> tuple[bool, bool]:
    """-> whether checkpoints change no gradient, and whether undo() gives the model back as it was"""
    mesh, found = one_mesh(), []
    tokens, labels = (gk.parallel.shard_sequence(x, mesh, 1) for x in batch())
    for again in (False, True):
        model = made(name).train()
        before = model(tokens).logits
        report = gk.accelerate(model, context_parallel=mesh)
        if again:
            model.gradient_checkpointing_enable()
        model(tokens, labels=labels).loss.backward()
        found.append(torch.cat([x.grad.flatten() for x in model.parameters()]))
        report.undo()
    return torch.allclose(*found, atol=1e-7), torch.allclose(model(tokens).logits, before)


class Shift(torch.nn.Module):
    """As a short convolution does, it lets a token see the one before it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + x.roll(1, 1)


def refusals() -> list[str]:
    mesh, (tokens, _) = one_mesh(), batch()
    llama = made("llama")
    gk.accelerate(llama, context_parallel=mesh)
    other, plain = made("llama").bfloat16(), torch.nn.Sequential(torch.nn.LayerNorm(8))
    gk.accelerate(other)
    shifting = made("llama")
    shifting.model.norm = torch.nn.Sequential(shifting.model.norm, Shift())
    before = type(shifting.model.layers[0].mlp)
    padded = torch.ones_like(tokens)
    padded[0, :3] = 0

    def in_a_context():
        with gk.parallel.context(mesh):
            other(tokens)

    calls = [
        lambda: llama(tokens, attention_mask=padded),
        lambda: llama(tokens, position_ids=torch.arange(32).unsqueeze(0) % 20),
        lambda: llama.generate(tokens, max_new_tokens=2),
        in_a_context,
        lambda: gk.accelerate(plain, context_parallel=mesh),
        lambda: gk.accelerate(made("llama"), attention=False, context_parallel=mesh),
        lambda: gk.accelerate(shifting, context_parallel=mesh),
        lambda: gk.accelerate(made("llama").to("meta"), context_parallel=mesh),
        lambda: llama(tokens, output_router_logits=True),
    ]
    found = []
    for call in calls:
        try:
            call()
            found.append("nothing was refused")
        except (TypeError, ValueError) as error:
            found.append(str(error).splitlines()[0])
    assert type(shifting.model.layers[0].mlp) is before
    assert llama(tokens, attention_mask=torch.ones_like(tokens)).logits.shape == (2, 32, VOCABULARY)
    return found


@pytest.fixture(scope="module")
def gang():
    with Gang(2) as pair:
        yield pair


@pytest.mark.parametrize(
    ("name", "training", "window", "loss"),
    [
        ("llama", True, None, True),
        ("llama", False, 6, True),
        ("gpt2", True, None, False),
        ("gpt2", False, None, True),
        ("mistral", True, None, True),
        ("qwen3", True, 5, True),
    ],
)
def test_a_model_of_shards_is_the_whole_one(gang, name, training, window, loss):
    model = made(name).train(training)
    gk.accelerate(model, window=window)
    tokens, labels = batch()
    outputs = model(tokens, labels=labels)
    outputs.loss.backward()
    grads = torch.cat([x.grad.flatten() for x in model.parameters()]).numpy()
    ranks = gang.run("test_context_models:run", name, training, window, loss)
    for found, found_grads, _ in ranks:
        assert found == pytest.approx(outputs.loss.item(), rel=1e-6)
        assert np.abs(found_grads - grads).max() < 2e-6 * max(1.0, np.abs(grads).max())
    if not training:
        logits = np.concatenate([rank[2] for rank in ranks], 1)
        assert np.abs(logits - outputs.logits.detach().numpy()).max() < 1e-5
    plain = made(name).train(training)(tokens, labels=labels).loss.item()
    if window is None:
        assert ranks[0][0] == pytest.approx(plain, rel=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_checkpoints_and_undo(gang, name):
    assert gang.run("test_context_models:checkpointed", name) == [(True, True)] * 2


def test_masks_of_other_kinds_are_refused():
    q = torch.zeros(1, 2, 8, 16)
    for mask in (Mask("full", None, torch.empty(1, 0)), Mask("causal", None, torch.ones(1, 1))):
        with pytest.raises(ValueError, match=f"attention_mask must hide nothing.*not be of kind {mask.kind}"):
            cut_attention.attend(Shard(None, 0, Layout(2)), q, q, q, mask)


def test_what_is_refused(gang):
    expected = [
        "attention_mask must be None or (batch, tokens) without padding with context_parallel",
        "position_ids must be None or count from",
        "use_cache must be False with context_parallel",
        "model must be accelerated with context_parallel=mesh, not run inside gptkernels.parallel.context",
        "context_parallel must be None for Sequential, which is no model of transformers",
        "context_parallel must be None for LlamaForCausalLM: not all of its attention is ours",
        "context_parallel must be None for LlamaForCausalLM: not only its attention takes tokens together",
        "context_parallel must be None for LlamaForCausalLM on the meta device",
        "output_router_logits must be False with context_parallel",
    ]
    for found in gang.run("test_context_models:refusals"):
        assert len(found) == len(expected)
        for said, start in zip(found, expected, strict=True):
            assert said.startswith(start)


def readme_example(text: str) -> tuple[float, float]:
    """-> the means over the ranks of the two losses"""
    tokens, targets = batch()
    namespace: dict = {"gk": gk, "torch": torch, "tokens": tokens, "targets": targets, "llama": made("llama").eval()}
    namespace["model"] = small_gpt()
    first, second = text.split("\n\n")
    found = []
    for part in (first, second):
        exec(compile(part, "README.md", "exec"), namespace)
        loss = namespace["loss"].detach()
        torch.distributed.all_reduce(loss)
        found.append(loss.item() / 4)
    return tuple(found)


def test_the_example_in_the_readme():
    readme = (Path(__file__).resolve().parent.parent / "README.md").read_text()
    (text,) = [text for text in re.findall(r"```py\n(.*?)```", readme, flags=re.S) if "parallel.context(" in text]
    tokens, targets = batch()
    torch.manual_seed(0)
    llama = made("llama").eval()
    expected = small_gpt()(tokens, targets).item(), llama(tokens, labels=tokens).loss.item()
    with Gang(4) as four:
        for found in four.run("test_context_models:readme_example", text):
            assert found == pytest.approx(expected, rel=1e-5)


def small_gpt() -> gk.GPT:
    torch.manual_seed(0)
    return gk.GPT(gk.GPTConfig(vocabulary=VOCABULARY, context=32, layers=2, width=32, heads=2))
