"""Gangs: several processes that talk by gloo on this machine, for the tests of what runs in parallel.

with Gang(4) as gang:
    results = gang.run("test_module:function", case)     # function(case) in every process -> by rank

A gang lives for many cases, because starting its processes costs more than most of them. A function that raises gives
GangError with every rank's error; one that does not end in time, or a process that dies, ends the whole gang.
"""

import multiprocessing
import os
import signal
import socket
import time
import traceback
from importlib import import_module
from multiprocessing.connection import Connection, wait
from typing import Any

TIMEOUT_S = 60.0


class GangError(AssertionError):
    """errors: by rank, what was raised or how the process ended; None where all was well. results: of those"""

    def __init__(self, errors: list[str | None], results: list[Any]):
        super().__init__("\n".join(f"rank {rank}: {error}" for rank, error in enumerate(errors) if error))
        self.errors, self.results = errors, results


class Gang:
    def __init__(self, size: int, timeout_s: float = TIMEOUT_S):
        """timeout_s: also of the process group, for a process that waits for another one"""
        self.size, self.timeout_s = size, timeout_s
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        # A server that has imported what all of them need, and is small enough to be forked.
        spawning = multiprocessing.get_context("forkserver")
        spawning.set_forkserver_preload(["torch.distributed", "gptkernels.models.training"])
        self.pipes: list[Connection] = []
        self.processes: list[Any] = []
        threads = os.environ.get("OMP_NUM_THREADS")
        os.environ["OMP_NUM_THREADS"] = "1"
        try:
            for rank in range(size):
                ours, theirs = spawning.Pipe()
                process = spawning.Process(target=member, args=(rank, size, port, timeout_s, theirs), daemon=True)
                process.start()
                theirs.close()
                self.pipes.append(ours)
                self.processes.append(process)
        finally:
            os.environ.pop("OMP_NUM_THREADS")
            if threads is not None:
                os.environ["OMP_NUM_THREADS"] = threads

    def __enter__(self) -> "Gang":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def run(self, function: str, *arguments, timeout_s: float | None = None) -> list[Any]:
        """function: "module:name", called with the arguments in every process -> what each returned"""
        self.start(function, *arguments)
        return self.finish(timeout_s)

    def start(self, function: str, *arguments) -> None:
        for pipe in self.pipes:
            pipe.send((function, arguments))

    def finish(self, timeout_s: float | None = None) -> list[Any]:
        """GangError where a rank raised, died, or had not ended after the time"""
        results: list[Any] = [None] * self.size
        errors: list[str | None] = [None] * self.size
        waiting, deadline = (
            dict(zip(self.pipes, range(self.size), strict=True)),
            time.monotonic() + (timeout_s or 2 * self.timeout_s),
        )
        alive = True
        while waiting:
            ready = wait(list(waiting), max(0.0, deadline - time.monotonic()))
            for pipe in ready:
                assert isinstance(pipe, Connection)
                rank = waiting.pop(pipe)
                try:
                    well, value = pipe.recv()
                except (EOFError, OSError):
                    self.processes[rank].join(5)
                    well, value, alive = False, f"died with exit code {self.processes[rank].exitcode}", False
                results[rank], errors[rank] = (value, None) if well else (None, value)
            if not ready:
                for rank in waiting.values():
                    errors[rank] = "had not ended in time"
                alive = False
                break
        if not alive:
            self.close()
        if any(errors):
            raise GangError(errors, results)
        return results

    def kill(self, rank: int) -> None:
        process = self.processes[rank]
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)

    def close(self) -> None:
        for process, pipe in zip(self.processes, self.pipes, strict=True):
            process.kill()
            pipe.close()
        for process in self.processes:
            process.join(5)


def member(rank: int, size: int, port: int, timeout_s: float, pipe: Connection) -> None:
    """One process of a gang: environment as torchrun's, a gloo group, and then whatever it is told"""
    from datetime import timedelta

    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    dist.init_process_group("gloo", timeout=timedelta(seconds=timeout_s))
    while True:
        try:
            function, arguments = pipe.recv()
        except (EOFError, OSError):
            return
        module, name = function.split(":")
        try:
            pipe.send((True, getattr(import_module(module), name)(*arguments)))
        except Exception as error:
            last = traceback.format_exc().strip().splitlines()
            pipe.send((False, f"{type(error).__name__}: {error}\n" + "\n".join(last[-8:-1])))
