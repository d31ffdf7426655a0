"""Generates in a thread of its own, which alone touches the model; the event loop asks and is told.

What the loop says to the thread lies in one queue, and is read between two steps of the Engine. What the
thread says to the loop goes out some fifty times a second, and at once where a text begins or ends.
"""

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import NamedTuple

from gpt_lightning.exit_codes import UserError
from gpt_lightning.generation.engine import Engine, Request, Step
from gpt_lightning.generation.rows import FinishReason
from gpt_lightning.generation.surprise import ScoredToken
from gpt_lightning.generation.text_stream import TextStream
from gpt_lightning.server.fields import Refusal
from gpt_lightning.server.metrics import Metrics

_log = logging.getLogger("gpt_lightning")
_BETWEEN = 0.02  # seconds between two messages to the loop


class Token(NamedTuple):
    """Holds a token, its log-probability, and the likeliest ones there with theirs."""

    token_id: int
    logprob: float | None
    likeliest: list[tuple[int, float]]


class Piece(NamedTuple):
    """Holds what is new of one choice: text, tokens and, where it has ended, why."""

    choice: int
    text: str
    tokens: list[Token]
    finish_reason: FinishReason | None = None


class Scores(NamedTuple):
    """Holds the tokens of a prompt with their log-probabilities."""

    prompt: int
    tokens: list[ScoredToken]


News = Piece | Scores | Refusal


@dataclass(eq=False)
class Job:
    """Is what one HTTP request asks for: texts that continue its prompts, and maybe scores of these.

    `requests` are in the order of the choices. `news` is the loop's: what the thread has told so far.
    """

    requests: list[Request]
    texts: dict[Request, TextStream]
    to_score: list[list[int]]  # prompts
    n_others: int  # likeliest tokens told of each scored one
    deadline: float
    news: list[News] = field(default_factory=list)
    has_news: asyncio.Event = field(default_factory=asyncio.Event)
    n_open: int = 0  # choices and scores that have not ended
    start: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.choices = {request: choice for choice, request in enumerate(self.requests)}
        self.n_sent = [0] * len(self.requests)  # characters
        self.n_open = self.n_choices_and_scores = len(self.requests) + len(self.to_score)

    def put(self, news: Iterable[News]) -> None:
        self.news += news
        self.has_news.set()

    async def take(self) -> list[News]:
        """Waits for news, and returns all that there are."""
        await self.has_news.wait()
        self.has_news.clear()
        found, self.news = self.news, []
        return found


class Worker:
    """Runs one model's Engine, which `make_engine` makes, for the jobs that are submitted.

    The methods but `_run` and what it calls are the event loop's.
    """

    def __init__(
        self,
        make_engine: Callable[[], Engine],
        score: Callable[[list[int], int], list[ScoredToken]],
        metrics: Metrics,
        n_places: int,
    ) -> None:
        self._make_engine, self._score, self._metrics = make_engine, score, metrics
        self._n_places, self._n_taken = n_places, 0  # rows and places of the queue
        self._orders: SimpleQueue[tuple[str, Job | None]] = SimpleQueue()
        self._running: dict[Job, None] = {}  # the thread's, in the order in which they came
        self._to_score: deque[tuple[Job, int]] = deque()
        self._jobs: dict[Request, Job] = {}
        self._out: dict[Job, list[News]] = {}
        self._is_urgent, self._last_sent = False, 0.0
        self._thread = threading.Thread(target=self._run, name="generation", daemon=True)

    # ---- the event loop's side

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread after its present step."""
        self._orders.put(("stop", None))
        self._thread.join(timeout=30)

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def submit(self, job: Job) -> None:
        """Has the job run, or raises the Refusal that tells of a full queue."""
        if self._n_taken + job.n_open > self._n_places:
            raise Refusal(
                "the server has as many requests as it takes; try again later",
                status=429,
                kind="rate_limit_error",
                code="queue_full",
            )
        self._n_taken += job.n_open
        self._orders.put(("add", job))

    def cancel(self, job: Job) -> None:
        """Lets go of a job, whatever stands open; one that has ended is none."""
        self._orders.put(("cancel", job))

    def _hand_out(self, out: dict[Job, list[News]], n_ended: int) -> None:
        self._n_taken -= n_ended
        for job, news in out.items():
            pieces = [each for each in news if isinstance(each, Piece)]
            self._metrics.completion_tokens += sum(len(piece.tokens) for piece in pieces)
            job.put(news)

    # ---- the thread's side

    def _run(self) -> None:
        engine = self._make_engine()
        n_ended = 0
        while True:
            order = self._next_order(wait=not self._running)
            while order is not None:
                what, job = order
                if job is None:
                    return
                if what == "add":
                    self._begin(engine, job)
                else:
                    n_ended += self._drop(engine, job)
                order = self._next_order(wait=False)
            try:
                n_ended += self._work(engine)
            except Exception as error:
                n_ended += self._fail_all(error)
                engine = self._make_engine()
            n_ended = self._send(n_ended)
            self._metrics.rows[id(self)] = engine.n_rows
            self._metrics.waiting[id(self)] = engine.n_waiting + len(self._to_score)

    def _next_order(self, *, wait: bool) -> tuple[str, Job | None] | None:
        try:
            return self._orders.get(block=wait)
        except Empty:
            return None

    def _begin(self, engine: Engine, job: Job) -> None:
        self._running[job] = None
        self._to_score.extend((job, place) for place in range(len(job.to_score)))
        if not job.to_score:
            self._add(engine, job)

    def _add(self, engine: Engine, job: Job) -> None:
        for request in job.requests:
            self._jobs[request] = job
            engine.add(request)

    def _drop(self, engine: Engine, job: Job) -> int:
        """Frees all that a job holds; returns how many of its choices and scores had not ended."""
        if job not in self._running:
            return 0
        del self._running[job]
        self._to_score = deque(entry for entry in self._to_score if entry[0] is not job)
        for request in job.requests:
            if self._jobs.pop(request, None) is not None:
                engine.cancel(request)
        self._out.pop(job, None)
        return job.n_open

    def _work(self, engine: Engine) -> int:
        """Scores a prompt, takes a step, and ends what has run too long; returns how much has ended."""
        n_ended = 0
        now = time.monotonic()
        for job in [job for job in self._running if job.deadline < now]:
            n_ended += self._drop(engine, job)
            late = "the request has taken longer than the server lets one; ask for less, or try again later"
            self._tell(job, Refusal(late, status=503, kind="server_error", code="timeout"), urgent=True)
        if self._to_score:
            job, place = self._to_score.popleft()
            self._tell(job, Scores(place, self._score(job.to_score[place], job.n_others)), urgent=True)
            n_ended += self._end_one(job)
            if not any(other is job for other, _ in self._to_score):
                self._add(engine, job)
        if engine.n_rows or engine.n_waiting:
            for step in engine.step():
                n_ended += self._note(step)
        return n_ended

    def _note(self, step: Step) -> int:
        """Tells what a step has added to a text; returns 1 where that has ended."""
        job = self._jobs[step.request]
        choice, text = job.choices[step.request], job.texts[step.request]
        tokens = []
        if step.token_id is not None:
            tokens = [Token(step.token_id, step.logprob, step.top_logprobs or [])]
        reason = None
        if step.completion is not None:
            text.end()
            reason = step.completion.finish_reason
            del self._jobs[step.request]
        new = text.text[job.n_sent[choice] :]
        is_first = not job.n_sent[choice]
        job.n_sent[choice] += len(new)
        self._tell(job, Piece(choice, new, tokens, reason), urgent=is_first or reason is not None)
        return self._end_one(job) if reason is not None else 0

    def _end_one(self, job: Job) -> int:
        job.n_open -= 1
        if not job.n_open:
            self._running.pop(job, None)
        return 1

    def _fail_all(self, error: Exception) -> int:
        """Ends all jobs after an error that is none of a client's."""
        if not isinstance(error, UserError):
            _log.error("a step of generation failed", exc_info=error)
        else:
            _log.error(f"a step of generation failed: {error}")
        n_open = sum(job.n_open for job in self._running)
        for job in self._running:
            self._tell(job, Refusal("the model failed", status=500, kind="server_error"), urgent=True)
        self._running.clear()
        self._to_score.clear()
        self._jobs.clear()
        return n_open

    def _tell(self, job: Job, news: News, *, urgent: bool) -> None:
        self._out.setdefault(job, []).append(news)
        self._is_urgent |= urgent

    def _send(self, n_ended: int) -> int:
        """Hands over to the loop what is due; returns the number that it has not been told."""
        now = time.monotonic()
        is_due = self._is_urgent or n_ended or now - self._last_sent >= _BETWEEN
        if not is_due or not (self._out or n_ended):
            return n_ended
        self._loop.call_soon_threadsafe(self._hand_out, self._out, n_ended)
        self._out, self._is_urgent, self._last_sent = {}, False, now
        return 0
