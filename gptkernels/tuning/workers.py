"""The other end of worker.py: starts it, waits for its answers so long and no longer, and starts it again."""

import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

START_LIMIT_S = 120.0


class Workers:
    """One worker at a time. command: what starts it"""

    def __init__(self, where: str, command: tuple[str, ...] = (sys.executable, "-m", "gptkernels.tuning.worker")):
        self.where, self.command = where, command
        self.process: subprocess.Popen | None = None
        self.said = b""

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_) -> None:
        self.stop()

    def start(self) -> None:
        # It finds this package where this process did, installed or not.
        paths = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
        self.process = subprocess.Popen(
            self.command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            start_new_session=True,  # Ctrl-C is ours to handle
        )
        self.said = b""
        answer = self.exchange({"device": self.where}, START_LIMIT_S)
        if answer.get("status") != "ready":
            raise RuntimeError(f"the process that measures does not start: {answer['detail']}")

    def stop(self) -> None:
        if self.process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.communicate()
            self.process = None

    def ask(self, job: dict, limit_s: float) -> dict[str, Any]:
        """-> the worker's answer, or what became of it"""
        if self.process is None:
            self.start()
        answer = self.exchange(job, limit_s)
        if answer["status"] in ("crashed", "hung"):
            self.stop()
        return answer

    def exchange(self, job: dict, limit_s: float) -> dict[str, Any]:
        process = self.process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps(job).encode() + b"\n")
            process.stdin.flush()
        except BrokenPipeError:
            return self.gone()
        deadline = time.monotonic() + limit_s
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            while b"\n" not in self.said:
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    return {"status": "hung", "detail": f"no answer in {limit_s:.0f} s", "us": {}}
                part = os.read(process.stdout.fileno(), 1 << 16)
                if not part:
                    return self.gone()
                self.said += part
        line, _, self.said = self.said.partition(b"\n")
        return json.loads(line)

    def gone(self) -> dict[str, Any]:
        assert self.process is not None
        code = self.process.wait()
        name = signal.Signals(-code).name if code < 0 else f"exit status {code}"
        return {"status": "crashed", "detail": f"the process ended: {name}", "us": {}}


class Compilers:
    """Several workers that compile at once, as many as there are cores to spare, and none on a CPU. Each that shares a
    GPU takes some of its memory."""

    MOST = 8

    def __init__(self, where: str, make: Callable[[str], Workers] = Workers):
        count = 0 if where == "cpu" else max(1, min(self.MOST, len(os.sched_getaffinity(0)) // 2))
        self.workers = [make(where) for _ in range(count)]
        self.idle = list(self.workers)

    def __enter__(self) -> "Compilers":
        return self

    def __exit__(self, *_) -> None:
        for workers in self.workers:
            workers.stop()

    def ask_all(self, jobs: list[dict], limit_s: float, deadline: float) -> list[dict[str, Any] | None]:
        """-> the answers; None of those that nobody came to before the deadline"""

        def ask(job: dict) -> dict[str, Any] | None:
            if time.monotonic() > deadline:
                return None
            workers = self.idle.pop()
            try:
                return workers.ask(job, limit_s)
            finally:
                self.idle.append(workers)

        if not self.workers:
            return [None] * len(jobs)
        with ThreadPoolExecutor(len(self.workers)) as pool:
            try:
                return list(pool.map(ask, jobs))
            except BaseException:  # Ctrl-C: nobody waits for what is being compiled
                pool.shutdown(wait=False, cancel_futures=True)
                self.__exit__()
                raise
