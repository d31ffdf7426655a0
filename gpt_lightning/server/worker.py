"""Generates in a thread of its own, which alone touches the model; the event loop asks and is told.

What the loop says to the thread lies in one queue, and is read between two steps of the Engine. What the
thread says to the loop goes out some fifty times a second, and at once where a text begins or ends.
"""

import asyncio
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from queue import Empty, SimpleQueue

from gpt_lightning.exit_codes import UserError
from gpt_lightning.generation.engine import Engine, Request, Step
from gpt_lightning.generation.surprise import ScoredToken
from gpt_lightning.server.fields import Refusal
from gpt_lightning.server.job import Job, News, Piece, Scores, Token
from gpt_lightning.server.metrics import Metrics

_log = logging.getLogger("gpt_lightning")
_BETWEEN = 0.02  # seconds between two messages to the loop
# Scores a prompt pass by pass, and tells after each whether something is kept for the next one.
Score = Callable[[list[int], int], Iterator[tuple[list[ScoredToken], bool]]]


class Worker:
    """Runs one model's Engine, which `make_engine` makes, for the jobs that are submitted.

    The methods but `_run` and what it calls are the event loop's.
    """

    def __init__(
        self,
        make_engine: Callable[[], Engine],
        score: Score,
        metrics: Metrics,
        n_places: int,
    ) -> None:
        self._engine = make_engine()  # here, where what it refuses ends the program
        self._make_engine, self._score, self._metrics = make_engine, score, metrics
        self._n_places, self._n_taken = n_places, 0  # rows and places of the queue
        self._orders: SimpleQueue[tuple[str, Job | None]] = SimpleQueue()
        self._running: dict[Job, None] = {}  # the thread's, in the order in which they came
        self._to_score: deque[tuple[Job, int, int, Iterator[tuple[list[ScoredToken], bool]]]] = deque()
        self._jobs: dict[Request, Job] = {}
        self._out: dict[Job, list[News]] = {}
        self._is_urgent, self._last_sent = False, 0.0
        self._thread = threading.Thread(target=self._run, name="generation", daemon=True)
        self._has_failed = False
        self._n_ended = 0  # choices and scores whose end the loop has not been told of

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
        return self._thread.is_alive() and not self._has_failed

    def submit(self, job: Job) -> None:
        """Has the job run, or raises a Refusal: the queue is full, or nothing runs any more."""
        if self._has_failed:
            raise _failed()
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

    def _give_up(self) -> None:
        """Tells those who came after the thread had failed; who comes later is refused."""
        self._has_failed = True
        while not self._orders.empty():
            _, job = self._orders.get()
            if job is not None:
                job.put([_failed()])

    # ---- the thread's side

    def _run(self) -> None:
        """Generates until it is told to stop; whatever else ends it leaves no client to wait for ever."""
        try:
            while self._go_on():
                pass
        except BaseException as error:
            _log.critical("no text can be generated any more; start the server anew", exc_info=error)
            self._fail_all()
            self._send()
            self._loop.call_soon_threadsafe(self._give_up)

    def _go_on(self) -> bool:
        """Does what is ordered, and then a step; tells whether another follows."""
        try:
            order = self._next_order(wait=not self._running)
            while order is not None:
                what, job = order
                if job is None:
                    return False
                if what == "add":
                    self._begin(job)
                else:
                    self._drop(job)
                order = self._next_order(wait=False)
            self._work()
        except Exception as error:
            _log_failure(error)
            self._fail_all()
            self._engine = self._make_engine()
        self._send()
        self._metrics.rows[id(self)] = self._engine.n_rows
        self._metrics.waiting[id(self)] = self._engine.n_waiting + len(self._to_score)
        return True

    def _next_order(self, *, wait: bool) -> tuple[str, Job | None] | None:
        try:
            return self._orders.get(block=wait)
        except Empty:
            return None

    def _begin(self, job: Job) -> None:
        self._running[job] = None
        for place, prompt in enumerate(job.to_score):
            self._to_score.append((job, place, len(prompt), self._score(prompt, job.n_others)))
        if not job.to_score:
            self._add(job)

    def _add(self, job: Job) -> None:
        """Gives the texts to the Engine; one that it refuses ends all."""
        try:
            for request in job.requests:
                self._engine.add(request)
                self._jobs[request] = job
        except UserError as error:
            self._drop(job)
            self._tell(job, Refusal(str(error)), urgent=True)

    def _drop(self, job: Job) -> None:
        """Ends what stands open of a job, and frees all that it holds; one that has ended holds nothing."""
        if job not in self._running:
            return
        del self._running[job]
        self._n_ended += job.n_open
        self._to_score = deque(entry for entry in self._to_score if entry[0] is not job)
        for request in job.requests:
            if self._jobs.pop(request, None) is not None:
                self._engine.cancel(request)
        self._out.pop(job, None)

    def _work(self) -> None:
        """Scores on, takes a step, and ends what has run too long."""
        now = time.monotonic()
        for job in [job for job in self._running if job.deadline < now]:
            self._drop(job)
            late = "the request has taken longer than the server lets one; ask for less, or try again later"
            self._tell(job, Refusal(late, status=503, kind="server_error", code="timeout"), urgent=True)
        if self._to_score:
            self._score_some()
        if self._engine.n_rows or self._engine.n_waiting:
            for step in self._engine.step():
                self._note(step)

    def _score_some(self) -> None:
        """Takes a pass over a prompt that is to be scored; after a context others have their turn."""
        job, place, n_left, passes = self._to_score.popleft()
        tokens, is_context_read = next(passes)
        if not all(math.isfinite(token.logprob or 0.0) for token in tokens):
            _log.error("a prompt has scores that are not finite: the weights diverged; use an earlier one")
            self._drop(job)
            self._tell(job, _failed(), urgent=True)
            return
        n_left -= len(tokens)
        if tokens:
            self._tell(job, Scores(place, tokens, not n_left), urgent=True)
        if n_left:
            entry = job, place, n_left, passes
            self._to_score.append(entry) if is_context_read else self._to_score.appendleft(entry)
            return
        self._end_one(job)
        if not any(other is job for other, *_ in self._to_score):
            self._add(job)

    def _note(self, step: Step) -> None:
        """Tells what a step has added to a text."""
        job = self._jobs[step.request]
        choice, text = job.choices[step.request], job.texts[step.request]
        tokens = []
        if step.token_id is not None:
            tokens = [Token(step.token_id, step.logprob, step.top_logprobs or [])]
        reason, end = None, None
        if step.end_id is not None:
            end = Token(step.end_id, step.logprob, step.top_logprobs or [])
        if step.completion is not None:
            text.end()
            reason = step.completion.finish_reason
            del self._jobs[step.request]
        new = text.text[job.n_sent[choice] :]
        is_first = not job.n_sent[choice]
        job.n_sent[choice] += len(new)
        self._tell(job, Piece(choice, new, tokens, reason, end), urgent=is_first or reason is not None)
        if reason is not None:
            self._end_one(job)

    def _end_one(self, job: Job) -> None:
        """Notes the end of a choice or of a prompt's scores."""
        self._n_ended += 1
        job.n_open -= 1
        if not job.n_open:
            del self._running[job]

    def _fail_all(self) -> None:
        """Ends all jobs after an error that is none of a client's."""
        self._n_ended += sum(job.n_open for job in self._running)
        for job in self._running:
            self._tell(job, _failed(), urgent=True)
        self._running.clear()
        self._to_score.clear()
        self._jobs.clear()

    def _tell(self, job: Job, news: News, *, urgent: bool) -> None:
        self._out.setdefault(job, []).append(news)
        self._is_urgent |= urgent

    def _send(self) -> None:
        """Hands over to the loop what is due."""
        now = time.monotonic()
        is_due = self._is_urgent or self._n_ended or now - self._last_sent >= _BETWEEN
        if is_due and (self._out or self._n_ended):
            self._loop.call_soon_threadsafe(self._hand_out, self._out, self._n_ended)
            self._out, self._n_ended, self._is_urgent, self._last_sent = {}, 0, False, now


def _failed() -> Refusal:
    return Refusal("the model failed", status=500, kind="server_error")


def _log_failure(error: Exception) -> None:
    if isinstance(error, UserError):  # which says all, as of weights that have diverged
        _log.error(f"a step of generation failed: {error}")
    else:
        _log.error("a step of generation failed", exc_info=error)
