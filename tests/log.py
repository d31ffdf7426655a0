"""Reads what a fit has said, each line of which begins with its time where no terminal shows it."""

import re

TIME = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  "
STARTING = r"gpt_lightning [\d.]+: starting\n"


def untimed(log: str) -> str:
    return re.sub(rf"^{TIME}", "", log, flags=re.MULTILINE)


def since_start(log: str) -> str:
    """Leaves out the line with which each fit shows that it lives."""
    return re.sub(rf"^{TIME}{STARTING}", "", log)
