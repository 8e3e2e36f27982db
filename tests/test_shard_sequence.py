"""Sequences cut between processes, and gathered again."""

import pytest
import torch
import torch.distributed as dist
from context_cases import one_mesh
from gang import Gang

import gptkernels as gk


def there_and_back(dim: int, layout: str) -> tuple[bool, bool, list[float]]:
    """-> whether the whole comes back, whether its gradient is the sum of every rank's, and the first column of the
    shard"""
    mesh = one_mesh()
    rank, size = dist.get_rank(), dist.get_world_size()
    whole = torch.arange(3 * 16 * 2, dtype=torch.float32).view(3, 16, 2).transpose(1, dim).contiguous()
    x = gk.parallel.shard_sequence(whole, mesh, dim, layout).clone().requires_grad_()
    again = gk.parallel.gather_sequence(x, mesh, dim, layout)
    weight = torch.stack([(whole + 1) * (r + 1) for r in range(size)])
    (again * weight[rank]).sum().backward()
    expected = gk.parallel.shard_sequence(weight.sum(0), mesh, dim, layout)
    first = x.detach().select(-1, 0) if dim != x.ndim - 1 else x.detach()
    return torch.equal(again, whole), torch.equal(x.grad, expected), first.transpose(0, dim)[:, 0].flatten().tolist()


def refusals() -> list[str]:
    mesh, x = one_mesh(), torch.zeros(2, 6)
    big = dist.init_device_mesh("cpu", (1, 2))
    calls = [
        lambda: gk.parallel.shard_sequence(x, mesh, 1, layout="zigzag"),
        lambda: gk.parallel.shard_sequence(x[:, :5], mesh, 1),
        lambda: gk.parallel.shard_sequence(x, mesh, 2),
        lambda: gk.parallel.shard_sequence(x, mesh, 1, layout="stripes"),
        lambda: gk.parallel.shard_sequence(x, "cp", 1),
        lambda: gk.parallel.shard_sequence(x, big, 1),
        lambda: gk.parallel.gather_sequence(x[:, :3], mesh, 1, layout="zigzag"),
        lambda: gk.parallel.context(mesh, method="ulysses").__enter__(),
    ]
    return [message_of(call) for call in calls]


def message_of(call) -> str:
    try:
        call()
    except (TypeError, ValueError) as error:
        return str(error)
    return "nothing was refused"


@pytest.fixture(scope="module")
def pair():
    with Gang(2) as gang:
        yield gang


def test_there_and_back(pair):
    for dim in (0, 1):
        for layout in ("contiguous", "zigzag"):
            for whole, gradient, _ in pair.run("test_shard_sequence:there_and_back", dim, layout):
                assert whole
                assert gradient


@pytest.mark.parametrize(("layout", "tokens"), [("contiguous", range(8, 16)), ("zigzag", range(4, 12))])
def test_which_tokens_are_whose(pair, layout, tokens):
    _, (_, _, found) = pair.run("test_shard_sequence:there_and_back", 1, layout)
    assert found[: len(tokens)] == [2.0 * token for token in tokens]


def test_what_is_refused(pair):
    expected = [
        "x must have a multiple of 4 tokens in dimension 1 for 2 ranks with layout='zigzag', not 6",
        "x must have a multiple of 2 tokens in dimension 1 for 2 ranks with layout='contiguous', not 5",
        "dim must be a dimension of x, which has 2, not 2",
        "layout must be one of contiguous, zigzag, not 'stripes'",
        'mesh must be a DeviceMesh of one dimension, such as mesh["cp"], not str',
        "mesh must be a DeviceMesh of one dimension, not 2",
        "x must have an even number of tokens in dimension 1 with layout='zigzag', not (2, 3)",
        "method must be one of auto, gather, ring, not 'ulysses'",
    ]
    assert pair.run("test_shard_sequence:refusals") == [expected] * 2
