"""Inside a context: autocast, compiled functions, checkpoints, explain; and what decides how keys travel."""

import pytest
import torch
from context_cases import one_mesh
from gang import Gang
from torch.utils.checkpoint import checkpoint

import gptkernels as gk
from gptkernels.parallel import attention as parts
from gptkernels.parallel.calls import Options
from gptkernels.parallel.inside import current
from gptkernels.parallel.layout import Layout
from gptkernels.parallel.shards import Shard


def heads(mesh, dtype=torch.float32) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """-> q, k, v: of the whole, and this rank's"""
    generator = torch.Generator().manual_seed(0)
    whole = [torch.randn(1, 2, 32, 16, generator=generator).to(dtype) for _ in range(3)]
    return whole, [gk.parallel.shard_sequence(x, mesh, 2).clone().requires_grad_() for x in whole]


def banded(q, k, v):
    return gk.attention(q * 1.0, k, v, window=7) + 1


def compiled() -> tuple[bool, bool, bool]:
    """-> whether a function compiled outside of a context knows that it is in one, and then that it is not"""
    mesh = one_mesh()
    (q, k, v), own = heads(mesh)
    function = torch.compile(banded, backend="eager")
    plain, found = banded(*own), []
    with torch.no_grad():
        found.append(torch.equal(function(*own), plain))
        with gk.parallel.context(mesh):
            inside = function(*own)
        expected = gk.parallel.shard_sequence(banded(q, k, v), mesh, 2)
        found.append(torch.allclose(inside, expected, atol=1e-6))
        found.append(torch.equal(function(*own), plain))
    return tuple(found)


def under_autocast() -> tuple[torch.dtype, bool, list[torch.dtype]]:
    mesh = one_mesh()
    _, own = heads(mesh)
    with gk.parallel.context(mesh):
        with torch.autocast("cpu", torch.bfloat16):
            found = gk.attention(*own, window=7)
            found.float().sum().backward()
        same = gk.attention(*(x.detach().bfloat16() for x in own), window=7)
    return found.dtype, torch.equal(found, same), [x.grad.dtype for x in own]


def checkpointed(use_reentrant: bool) -> bool:
    mesh = one_mesh()
    _, own = heads(mesh)
    with gk.parallel.context(mesh):
        expected = torch.autograd.grad(banded(*own).square().sum(), own)
        loss = checkpoint(banded, *own, use_reentrant=use_reentrant).square().sum()
        loss.backward()
    return all(torch.equal(x.grad, grad) for x, grad in zip(own, expected, strict=True))


def without_gradients() -> tuple[bool, str]:
    mesh = one_mesh()
    _, own = heads(mesh)
    with gk.parallel.context(mesh), torch.no_grad():
        out = gk.attention(*own)
        told = str(gk.explain(gk.attention, *own))
    return out.requires_grad, told


def nested() -> list[str | None]:
    """What layout the process has, in a context within a context, and where one ends by an error"""
    mesh, found = one_mesh(), []

    def look() -> None:
        found.append(None if current() is None else current().layout.kind)

    look()
    with gk.parallel.context(mesh):
        try:
            with gk.parallel.context(mesh, "zigzag"):
                look()
                raise RuntimeError
        except RuntimeError:
            look()
    look()
    return found


@pytest.fixture(scope="module")
def pair():
    with Gang(2) as gang:
        yield gang


def test_compiled_functions_know_where_they_are(pair):
    assert pair.run("test_context_features:compiled") == [(True, True, True)] * 2


def test_autocast(pair):
    expected = (torch.bfloat16, True, [torch.float32] * 3)
    assert pair.run("test_context_features:under_autocast") == [expected] * 2


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoints(pair, use_reentrant):
    assert pair.run("test_context_features:checkpointed", use_reentrant) == [True] * 2


def test_inference_and_explain(pair):
    for requires_grad, told in pair.run("test_context_features:without_gradients"):
        assert not requires_grad
        assert told.startswith("attention: eager runs this call")


def test_contexts_end(pair):
    assert pair.run("test_context_features:nested") == [[None, "zigzag", "contiguous", None]] * 2


def method_of(
    tokens: int = 64, method: str = "auto", ranks: int = 4, packed: bool = False, slopes=None, **window
) -> str:
    """For a causal dense layer with bfloat16 keys of 8 heads of 64"""
    sides = (window.get("left"), window.get("right", 0))
    options = Options(sides[1] == 0, sides, 0.125, None, 0.0, None, slopes, packed, tokens, False, "auto")
    shard = Shard(None, 0, Layout(ranks), method)
    return parts.method_of(shard, options, torch.empty(1, 8, tokens // ranks, 64, dtype=torch.bfloat16, device="meta"))


def test_how_keys_travel():
    assert method_of() == "gather"
    assert method_of(1 << 17) == "gather"
    assert method_of(1 << 18) == "ring"
    assert method_of(1 << 18, "gather") == "gather"
    assert method_of(64, "ring") == "ring"
    assert method_of(1 << 18, left=1000) == method_of(packed=True) == method_of(64, "ring", ranks=1) == "near"
    assert method_of(1 << 18, slopes=torch.ones(8)) == method_of(1 << 18, left=9, right=None) == "gather"
    with pytest.raises(ValueError, match="method must be auto or gather for attention with alibi_slopes"):
        method_of(64, "ring", slopes=torch.ones(8))
