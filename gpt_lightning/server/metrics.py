"""Counts what the server does, and writes it as Prometheus reads it."""

from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass, field

_BOUNDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


@dataclass
class Histogram:
    """Counts seconds by bounds."""

    counts: list[int] = field(default_factory=lambda: [0] * (len(_BOUNDS) + 1))
    total: float = 0.0

    def add(self, seconds: float) -> None:
        self.counts[bisect_left(_BOUNDS, seconds)] += 1
        self.total += seconds

    def lines(self, name: str) -> list[str]:
        lines, n = [f"# TYPE {name} histogram"], 0
        for bound, count in zip((*_BOUNDS, "+Inf"), self.counts):
            n += count
            lines.append(f'{name}_bucket{{le="{bound}"}} {n}')
        return [*lines, f"{name}_sum {self.total}", f"{name}_count {n}"]


@dataclass
class Metrics:
    """Holds what is counted; each number is changed by one thread alone."""

    requests: Counter[tuple[str, int]] = field(default_factory=Counter)  # by path and status
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cancelled: int = 0  # requests whose clients left
    cut: int = 0  # requests that the server has ended with itself
    connections: int = 0
    rows: dict[int, int] = field(default_factory=dict)  # in use, by worker
    waiting: dict[int, int] = field(default_factory=dict)
    request_seconds: Histogram = field(default_factory=Histogram)
    first_token_seconds: Histogram = field(default_factory=Histogram)

    def text(self) -> str:
        prefix = "gpt_lightning_"
        lines = [f"# TYPE {prefix}requests_total counter"]
        for (path, status), count in sorted(self.requests.items()):
            lines.append(f'{prefix}requests_total{{path="{path}",status="{status}"}} {count}')
        for name, kind, value in (
            ("prompt_tokens_total", "counter", self.prompt_tokens),
            ("completion_tokens_total", "counter", self.completion_tokens),
            ("cancelled_requests_total", "counter", self.cancelled),
            ("cut_requests_total", "counter", self.cut),
            ("connections", "gauge", self.connections),
            ("rows_in_use", "gauge", sum(self.rows.values())),
            ("queue", "gauge", sum(self.waiting.values())),
        ):
            lines += [f"# TYPE {prefix}{name} {kind}", f"{prefix}{name} {value}"]
        lines += self.request_seconds.lines(f"{prefix}request_seconds")
        lines += self.first_token_seconds.lines(f"{prefix}first_token_seconds")
        return "\n".join(lines) + "\n"
