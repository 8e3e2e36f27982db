"""How far a long command is: a bar with the time left on a terminal, elsewhere a line now and then."""

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

SECONDS_BETWEEN_LINES = 15.0


class Steps:
    """with Steps(console, total, "checking") as steps: ... steps.begin("attention") ... steps.done()"""

    def __init__(self, console: Console, total: int, what: str):
        self.console, self.total, self.what = console, total, what
        self.finished, self.started = 0, time.monotonic()
        self.told = self.started
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self.bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self.task = self.bar.add_task(what, total=total)

    def __enter__(self) -> "Steps":
        self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.stop()

    def begin(self, step: str) -> None:
        """step: what is worked on now"""
        self.bar.update(self.task, description=f"{self.what}: {step}")
        if not self.console.is_terminal and time.monotonic() - self.told > SECONDS_BETWEEN_LINES:
            self.told = time.monotonic()
            self.console.print(f"{self.what}: {self.finished}/{self.total}, {step}{self.left()}", highlight=False)

    def done(self) -> None:
        self.finished += 1
        self.bar.update(self.task, completed=self.finished)

    def at(self, finished: int, total: int) -> None:
        """For work that counts itself"""
        self.finished, self.total = finished, total
        self.bar.update(self.task, completed=finished, total=total)
        self.begin(f"{finished} of {total}")

    def left(self) -> str:
        if not self.finished:
            return ""
        seconds = (time.monotonic() - self.started) / self.finished * (self.total - self.finished)
        return f", about {seconds:.0f} s left"
