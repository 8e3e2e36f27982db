"""What accelerate() did to a model, to be printed, and undone."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Replaced:
    """A module that has changed."""

    path: str
    part: str
    was: str
    became: str
    backend: str  # that runs it on the device where the model is now


@dataclass(frozen=True)
class Left:
    """A module that has not, and why."""

    path: str
    part: str
    was: str
    reason: str


@dataclass
class Report:
    """print() it for a table; undo() restores the model exactly."""

    replaced: list[Replaced]
    left: list[Left]
    restore: Callable[[], None] = field(repr=False)
    undone: bool = False

    def undo(self) -> None:
        """Every class, attribute and setting as before accelerate(); parameters were never touched."""
        if self.undone:
            raise RuntimeError("this report's changes are undone already")
        self.restore()
        self.undone = True

    def counts(self) -> dict[str, int]:
        """How many modules of each part were replaced."""
        return dict(Counter(row.part for row in self.replaced))

    def __rich__(self) -> Table:
        done = ", ".join(f"{count} {part}" for part, count in self.counts().items())
        table = Table(title=f"gptkernels replaced {done}; left {len(self.left)}", title_justify="left")
        for column in ("module", "was", "now", "backend"):
            table.add_column(column, overflow="fold")
        for row in self.replaced:
            table.add_row(row.path, row.was, row.became, row.backend)
        for left in self.left:
            table.add_row(left.path, left.was, f"left: {left.reason}", "")
        return table

    def __str__(self) -> str:
        console = Console(width=140, color_system=None, force_terminal=False)
        with console.capture() as capture:
            console.print(self)
        return capture.get()
