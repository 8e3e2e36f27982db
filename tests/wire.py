"""Counts what this process sends to others, around torch.distributed's own functions."""

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch.distributed as dist

from gptkernels.parallel.gather import ALL_GATHER


def size_of(x) -> int:
    return x.numel() * x.element_size()


@contextmanager
def counted() -> Iterator[Counter]:
    """-> bytes sent by kind, of a collective those that go to other ranks, and messages from one rank to one"""
    sent: Counter = Counter()
    real = {name: getattr(dist, name) for name in ("batch_isend_irecv", ALL_GATHER, "all_to_all_single")}

    def point_to_point(operations):
        sent["messages"] += sum(operation.op is dist.isend for operation in operations)
        sent["point_to_point"] += sum(size_of(each.tensor) for each in operations if each.op is dist.isend)
        return real["batch_isend_irecv"](operations)

    def all_gather(output, x, group=None, **options):
        sent["all_gather"] += size_of(x) * (dist.get_world_size(group) - 1)
        return real[ALL_GATHER](output, x, group=group, **options)

    def all_to_all(output, x, *splits, group=None, **options):
        ranks = dist.get_world_size(group)
        sent["all_to_all"] += size_of(x) * (ranks - 1) // ranks
        return real["all_to_all_single"](output, x, *splits, group=group, **options)

    with ExitStack() as stack:
        for name, function in zip(real, (point_to_point, all_gather, all_to_all), strict=True):
            stack.enter_context(mock.patch.object(dist, name, function))
        yield sent
