"""The gangs of processes that tests of parallel code run in."""

import os
import time

import pytest
import torch
import torch.distributed as dist
from gang import Gang, GangError


def total(x: float) -> float:
    y = torch.tensor(x * dist.get_rank())
    dist.all_reduce(y)
    return y.item()


def fail_on(rank: int) -> int:
    if dist.get_rank() == rank:
        raise ValueError("this one fails")
    return os.getpid()


def hang_on(rank: int) -> None:
    if dist.get_rank() == rank:
        time.sleep(60)


def threads() -> tuple[int, str]:
    return torch.get_num_threads(), os.environ["OMP_NUM_THREADS"]


def test_many_calls_in_one_gang():
    with Gang(2) as gang:
        assert gang.run("test_gang:total", 2.0) == [2.0, 2.0]
        with pytest.raises(GangError, match="rank 1: ValueError: this one fails") as error:
            gang.run("test_gang:fail_on", 1)
        assert error.value.errors[0] is None
        assert gang.run("test_gang:threads") == [(1, "1")] * 2
        with pytest.raises(GangError, match="rank 0: had not ended in time"):
            gang.run("test_gang:hang_on", 0, timeout_s=1)
    assert all(process.exitcode is not None for process in gang.processes)


def test_a_process_that_dies_is_seen():
    with Gang(2) as gang:
        assert gang.run("test_gang:total", 1.0) == [1.0, 1.0]
        gang.start("test_gang:hang_on", 1)
        gang.kill(1)
        with pytest.raises(GangError, match="rank 1: died with exit code -9"):
            gang.finish()
