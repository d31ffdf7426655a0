"""Stands in for the Engine's settings of each request: an Engine for each settings."""

from dataclasses import dataclass
from typing import Any

from gpt_lightning.generation.engine import Engine, Request, Step
from gpt_lightning.generation.sampling import GenerationConfig


@dataclass(frozen=True, eq=False)
class SettledRequest(Request):
    settings: GenerationConfig | None = None


class ManyEngines:
    def __init__(self, model: Any, settings: GenerationConfig, **options: Any) -> None:
        self._model, self._settings, self._options = model, settings, options
        self._engines: dict[str, Engine] = {}

    @property
    def n_rows(self) -> int:
        return sum(len(engine._rows) for engine in self._engines.values())

    @property
    def n_waiting(self) -> int:
        return sum(len(engine._waiting) for engine in self._engines.values())

    def add(self, request: Any) -> None:
        settings = request.settings or self._settings
        if repr(settings) not in self._engines:
            self._engines = {key: each for key, each in self._engines.items() if each._rows or each._waiting}
            self._engines[repr(settings)] = Engine(self._model, settings, **self._options)
        self._engines[repr(settings)].add(request)

    def step(self) -> list[Any]:
        return [_Step(step) for engine in self._engines.values() for step in engine.step()]

    def cancel(self, request: Request) -> bool:
        for engine in self._engines.values():
            if request in engine._waiting:
                engine._waiting.remove(request)
                return True
            for place, row in enumerate(engine._rows):
                if row.request is request:
                    engine._release(place)
                    return True
        return False


class _Step:
    def __init__(self, step: Step) -> None:
        self.request, self.token_id, self.logprob, self.completion = step
        self.top_logprobs = None
