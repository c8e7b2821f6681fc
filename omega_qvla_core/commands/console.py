"""What all verbs share: progress bars and errors as one line."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from omega_qvla_core.errors import OmegaQVLAError

console = Console()
error_console = Console(stderr=True)


def setup_logging() -> None:
    """Show warnings of the library on the terminal."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[RichHandler(console=error_console)])


@contextmanager
def user_errors() -> Iterator[None]:
    """Print an error that the user can mend as one line and exit with 1; anything else stays a traceback."""
    try:
        yield
    except OmegaQVLAError as error:
        error_console.print(f"[red]error:[/red] {escape(str(error))}", highlight=False, soft_wrap=True)
        raise typer.Exit(1) from error


@contextmanager
def progress_bar(description: str, total: int | None = None) -> Iterator[ProgressBar]:
    """A progress bar with ETA."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("eta"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console) as progress:
        yield ProgressBar(progress, progress.add_task(description, total=total, note=""))


class ProgressBar:
    """One bar; ``update`` takes what the library's progress callbacks give."""

    def __init__(self, progress: Progress, task_id: int) -> None:
        self._progress, self._task_id = progress, task_id

    def update(self, done: int, total: int, note: str = "") -> None:
        """Show ``done`` of ``total``."""
        self._progress.update(self._task_id, completed=done, total=total, note=note)

    def advance(self) -> None:
        """One more is done."""
        self._progress.advance(self._task_id)

    def print(self, text: str) -> None:
        """Print a line above the bar."""
        self._progress.console.print(text, highlight=False, soft_wrap=True)
