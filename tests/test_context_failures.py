"""A process that dies, or stops answering, ends the others with one clear error and in time."""

import contextlib
import io
import os
import signal
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from gang import Gang, GangError
from torch.distributed.device_mesh import DeviceMesh

import gptkernels as gk
from gptkernels import cli, failures

# Of the ranks that wait; starting takes as long as it takes.
TIMEOUT_S = 8.0
SAID = "another process of this run has ended or does not answer"


def attend_forever(method: str, options: dict, folder: str, stuck: int | None) -> None:
    """Until an error; the file says that this rank is at work. stuck: a rank that stops answering"""
    group = dist.new_group(timeout=timedelta(seconds=TIMEOUT_S))
    mesh = DeviceMesh.from_group(group, "cpu", mesh_dim_names=("cp",))
    q = torch.randn(1, 2, 16, 16).requires_grad_()
    with gk.parallel.context(mesh, method=method):
        for step in range(10**6):
            gk.attention(q, q, q, **options).sum().backward()
            if step == 3:
                (Path(folder) / str(dist.get_rank())).touch()
            if step == 5 and dist.get_rank() == stuck:
                os.kill(os.getpid(), signal.SIGSTOP)


def train_forever(folder: str, parallel: str) -> tuple[int, str]:
    """-> the exit status of the command line, and what it said"""
    data = Path(folder) / f"data{dist.get_rank()}"
    data.write_bytes(bytes(range(256)) * 40)
    arguments = ["train", "--model", "tiny", "--data", str(data), "--device", "cpu", "--parallel", parallel]
    arguments += ["--context", "16", "--batch", "4", "--steps", "1000000", "--log-every", "1"]
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        (Path(folder) / str(dist.get_rank())).touch()
        return cli.main(arguments), said.getvalue()


def wait_for(folder: Path, size: int) -> None:
    deadline = time.monotonic() + 60
    while len([path for path in folder.iterdir() if path.name.isdecimal()]) < size:
        assert time.monotonic() < deadline, "the processes never began"
        time.sleep(0.05)


@pytest.mark.parametrize(("method", "options"), [("gather", {}), ("auto", {"window": 5})], ids=["gather", "halo"])
def test_a_killed_rank_ends_the_others(tmp_path, method, options):
    with Gang(4) as gang:
        gang.start("test_context_failures:attend_forever", method, options, str(tmp_path), None)
        wait_for(tmp_path, 4)
        gang.kill(2)
        started = time.monotonic()
        with pytest.raises(GangError) as error:
            gang.finish(30)
        assert time.monotonic() - started < 20
    assert error.value.errors[2] == "died with exit code -9"
    for rank in (0, 1, 3):
        assert error.value.errors[rank].startswith(f"LostRankError: rank {rank}: {SAID}")


def test_a_rank_that_does_not_answer_is_given_up(tmp_path):
    with Gang(2) as gang:
        gang.start("test_context_failures:attend_forever", "auto", {"window": 5}, str(tmp_path), 1)
        wait_for(tmp_path, 2)
        started = time.monotonic()
        with pytest.raises(GangError) as error:
            gang.finish(15)
        assert error.value.errors[0].startswith(f"LostRankError: rank 0: {SAID}")
        assert time.monotonic() - started < 20


@pytest.mark.parametrize("parallel", ["cp=4", "fsdp,cp=2"])
def test_training_says_so_in_one_line(tmp_path, parallel):
    with Gang(4, 10.0) as gang:
        gang.start("test_context_failures:train_forever", str(tmp_path), parallel)
        wait_for(tmp_path, 4)
        time.sleep(3)
        gang.kill(1)
        started = time.monotonic()
        with pytest.raises(GangError) as error:
            gang.finish(30)
        assert time.monotonic() - started < 20
    assert error.value.errors[1] == "died with exit code -9"
    assert error.value.errors.count(None) == 3
    for status, said in (found for found in error.value.results if found is not None):
        lines = [line for line in said.splitlines() if line.startswith("gptkernels train:")]
        assert status == 1
        assert len(lines) == 1
        assert SAID in lines[0]


def test_only_lost_ranks_are_said_to_be_lost():
    assert failures.one_line(RuntimeError("timed out")) is None
    assert failures.one_line(RuntimeError("[gloo/transport/tcp/pair.cc:5] a shape is wrong")) is None
    assert SAID in failures.one_line(RuntimeError("[gloo/pair.cc:534] Connection closed by peer [127.0.0.1]:1"))
    assert SAID in failures.one_line(dist.DistBackendError("NCCL error: remote process exited"))
