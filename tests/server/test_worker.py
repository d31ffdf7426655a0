"""The thread that generates: who leaves, is late or comes in vain leaves nothing behind."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest

pytest.importorskip("starlette")

from gpt_lightning.generation.engine import Engine  # noqa: E402
from gpt_lightning.generation.sampling import GenerationConfig  # noqa: E402
from gpt_lightning.server.fields import Refusal  # noqa: E402
from gpt_lightning.server.job import Job, Piece  # noqa: E402
from gpt_lightning.server.limits import Limits  # noqa: E402
from gpt_lightning.server.metrics import Metrics  # noqa: E402
from gpt_lightning.server.served import Asked, ServedModel  # noqa: E402
from tests.server.in_process import small_served  # noqa: E402

LONG = GenerationConfig(temperature=0.0, max_new_tokens=100_000, logit_bias={0: -100.0})


WRONG = replace(LONG, logit_bias={10**6: 1.0})


def job_of(model: ServedModel, *, n: int = 1, seconds: float = 60.0, prompts: Any = ((1, 2, 3),)) -> Job:
    asked = Asked(model, [[*prompt] for prompt in prompts], LONG, n=n)
    return asked.job(Limits(request_seconds=seconds))


def scored(model: ServedModel, *prompts: Sequence[int], settings: GenerationConfig | None = None) -> Job:
    """Asks for the prompts' scores, and for texts by the settings, if there are some."""
    asked = Asked(model, [[*prompt] for prompt in prompts], settings or LONG, n_likeliest=1, echoes=["", ""])
    return replace(asked, has_completion=settings is not None).job(Limits())


def run(test: Callable[[ServedModel, Metrics, list[Engine]], Any], **options: Any) -> None:
    """Runs a test in an event loop beside a worker, whose engines it can look into."""
    metrics = Metrics()
    model = small_served(metrics=metrics, **options)
    make_engine, engines = model.worker._make_engine, [model.worker._engine]

    def remembered() -> Engine:
        engines.append(make_engine())
        return engines[-1]

    model.worker._make_engine = remembered

    async def main() -> None:
        model.worker.start()
        try:
            await asyncio.wait_for(test(model, metrics, engines), 30)
        finally:
            model.worker.stop()

    asyncio.run(main())


async def until(is_true: Callable[[], bool]) -> None:
    while not is_true():
        await asyncio.sleep(0.002)


async def tokens(job: Job, n: int) -> None:
    """Waits for so many tokens of a job."""
    while n > 0:
        for news in await job.take():
            assert isinstance(news, Piece), news
            n -= len(news.tokens)


def is_empty(engine: Engine, model: ServedModel) -> bool:
    worker = model.worker
    left = (engine.n_rows, engine.n_waiting, len(worker._running), len(worker._jobs), worker._n_taken)
    return left == (0, 0, 0, 0, 0) and not worker._out and not worker._to_score


def test_who_leaves_frees_the_row_within_a_step() -> None:
    async def test(model: ServedModel, metrics: Metrics, engines: list[Engine]) -> None:
        first, second = job_of(model), job_of(model, n=2)
        model.worker.submit(first)
        model.worker.submit(second)
        await tokens(first, 3)
        steps: list[int] = []
        step = engines[0].step

        def counted() -> Any:  # a text that has outgrown the context waits for its row again
            steps.append(engines[0].n_rows + engines[0].n_waiting)
            return step()

        engines[0].step = counted  # type: ignore[method-assign]
        await until(lambda: 3 in steps)
        model.worker.cancel(first)
        n = len(steps)  # with the one that is being taken
        await until(lambda: len(steps) > n + 10)
        assert set(steps[n + 1 :]) == {2}
        await tokens(second, 20)
        model.worker.cancel(second)
        model.worker.cancel(second)
        await until(lambda: is_empty(engines[0], model))

    run(test)


def test_what_takes_too_long_ends_with_a_refusal() -> None:
    async def test(model: ServedModel, metrics: Metrics, engines: list[Engine]) -> None:
        job = job_of(model, n=6, seconds=0.2)  # two of which wait
        model.worker.submit(job)
        found = []
        while not any(isinstance(news, Refusal) for news in found):
            found += await job.take()
        (refusal,) = [news for news in found if isinstance(news, Refusal)]
        assert refusal.status == 503 and refusal.body["error"]["code"] == "timeout"
        await until(lambda: is_empty(engines[0], model))

    run(test)


def test_a_full_queue_refuses_and_takes_again_what_has_room() -> None:
    async def test(model: ServedModel, metrics: Metrics, engines: list[Engine]) -> None:
        job = job_of(model, n=6)  # 4 rows and 2 places
        model.worker.submit(job)
        with pytest.raises(Refusal) as refused:
            model.worker.submit(job_of(model))
        assert refused.value.status == 429
        await tokens(job, 4)
        await until(lambda: sum(metrics.waiting.values()) == 2)
        assert sum(metrics.rows.values()) == 4
        model.worker.cancel(job)
        await until(lambda: is_empty(engines[0], model))
        again = job_of(model, n=6)
        model.worker.submit(again)
        await tokens(again, 4)

    run(test, limits=Limits(max_queue=2))


def test_a_step_that_fails_ends_those_it_was_for_and_no_others() -> None:
    async def test(model: ServedModel, metrics: Metrics, engines: list[Engine]) -> None:
        jobs = [job_of(model), job_of(model)]
        for job in jobs:
            model.worker.submit(job)
            await tokens(job, 2)

        def fail() -> Any:
            raise RuntimeError("a device is gone")

        engines[0].step = fail  # type: ignore[method-assign]
        for job in jobs:
            found = []
            while not any(isinstance(news, Refusal) for news in found):
                found += await job.take()
            assert "gone" not in str(found[-1])
        later = job_of(model)
        model.worker.submit(later)
        await tokens(later, 5)
        model.worker.cancel(later)
        await until(lambda: is_empty(engines[1], model))
        assert len(engines) == 2 and model.worker.is_alive

    run(test)


def test_a_step_that_fails_keeps_no_place_of_what_ended_just_before_it() -> None:
    async def test(model: ServedModel, metrics: Metrics, engines: list[Engine]) -> None:
        def fail() -> Any:
            raise RuntimeError("a device is gone")

        engines[0].step = fail  # type: ignore[method-assign]
        job = scored(model, (1, 2), settings=LONG)
        model.worker.submit(job)
        found = []
        while not any(isinstance(news, Refusal) for news in found):
            found += await job.take()
        await until(lambda: len(engines) == 2)
        await until(lambda: is_empty(engines[1], model))

    run(test)


def test_a_request_that_the_engine_refuses_ends_alone() -> None:
    async def test(model: ServedModel, metrics: Metrics, engines: list[Engine]) -> None:
        running = job_of(model)
        model.worker.submit(running)
        await tokens(running, 2)
        for job in (job_of(model, prompts=[(1, 2), (10**6,)]), scored(model, (1,), (2, 3), settings=WRONG)):
            model.worker.submit(job)
            found = []
            while not any(isinstance(news, Refusal) for news in found):
                found += await job.take()
            assert isinstance(found[-1], Refusal) and found[-1].status == 400
        await tokens(running, 5)
        model.worker.cancel(running)
        await until(lambda: is_empty(engines[0], model))
        assert len(engines) == 1 and model.worker.is_alive

    run(test)


def test_a_thread_that_cannot_go_on_lets_nobody_wait(caplog: pytest.LogCaptureFixture) -> None:
    async def test(model: ServedModel, metrics: Metrics, engines: list[Engine]) -> None:
        def fail(*_: Any) -> Any:
            raise RuntimeError("a device is gone")

        model.worker._make_engine = engines[0].step = engines[0].cancel = fail  # type: ignore[method-assign]
        running, later = job_of(model), job_of(model)
        model.worker.submit(running)
        model.worker.submit(later)
        for job in (running, later):
            (refusal,) = await job.take()
            assert isinstance(refusal, Refusal) and refusal.status == 500
        await until(lambda: not model.worker.is_alive)
        with pytest.raises(Refusal):
            model.worker.submit(job_of(model))

    run(test)
    assert "start the server anew" in caplog.text


def test_a_long_prompt_is_scored_beside_the_others() -> None:
    async def test(model: ServedModel, metrics: Metrics, engines: list[Engine]) -> None:
        running, long, short = job_of(model), scored(model, [5] * 3000), scored(model, [6] * 20)
        model.worker.submit(running)
        await tokens(running, 2)
        model.worker.submit(long)
        model.worker.submit(short)
        ids: list[int] = []
        while len(ids) < 20:
            ids += [token.token_id for news in await short.take() for token in news.tokens]
        await tokens(running, 20)
        assert ids == [6] * 20 and long.n_open == 1  # of which a part is scored
        model.worker.cancel(long)
        model.worker.cancel(running)
        await until(lambda: is_empty(engines[0], model))

    run(test)
