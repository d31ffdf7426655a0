"""Shows on a terminal that something goes on, and how much of the text has been read."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial


@contextmanager
def waiting(title: str) -> Iterator[None]:
    """Shows on a terminal's stderr for how long something has been going on, until the block ends."""
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    console, is_silent = Console(stderr=True), not sys.stderr.isatty()
    with Progress(*columns, console=console, transient=True, disable=is_silent) as bar:
        bar.add_task(title, total=None)
        yield


@contextmanager
def reading(title: str, n_bytes: int) -> Iterator[Callable[[int], None]]:
    """Shows on a terminal's stderr how many of so many bytes have been read, until the block ends."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    console, is_silent = Console(stderr=True), not sys.stderr.isatty()
    with Progress(*columns, console=console, transient=True, disable=is_silent) as bar:
        yield partial(bar.advance, bar.add_task(title, total=n_bytes))
