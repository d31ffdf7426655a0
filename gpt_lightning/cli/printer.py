"""Writes completions to a stream of text while the model draws them."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import NamedTuple, TextIO

from gpt_lightning.callbacks.terminal import for_readers
from gpt_lightning.cli.errors import say
from gpt_lightning.data.prompts import encode_prompts, special_token_hint
from gpt_lightning.data.tokenizer import TextTokenizer
from gpt_lightning.exit_codes import UserError
from gpt_lightning.generation.engine import Engine
from gpt_lightning.generation.rows import Request, Step
from gpt_lightning.generation.sampling import GenerationConfig
from gpt_lightning.generation.text_stream import TextStream
from gpt_lightning.kernels.packed_linear import packed
from gpt_lightning.model.gpt import GPTModel

_ENDED_BY = {
    "eos": "the end of the document",
    "stop": "a stop string",
    "length": "its length",
    "exhausted": "no_repeat_ngram_size, which leaves no token",
    "interrupt": "Ctrl-C",
}
_ROWS = 8  # samples decoded together


@dataclass
class _Sample:
    """Tells how a completion that is drawn stands."""

    text: TextStream
    token_ids: list[int] = field(default_factory=list)
    ended_by: str = ""  # nothing yet

    def end(self, reason: str) -> None:
        self.text.end()
        self.ended_by = _ENDED_BY[reason]


class Written(NamedTuple):
    """Holds the tokens of a prompt and of what was drawn to follow it, and the model that drew them."""

    model: GPTModel
    prompt: list[int]
    samples: list[list[int]]


class TextWriter:
    """Writes prompt and completion to `output`, and says how fast it went and what ended the text."""

    def __init__(
        self, model: GPTModel, tokenizer: TextTokenizer, output: TextIO, parse_special_tokens: bool = False
    ) -> None:
        self.tokenizer, self._output = tokenizer, output
        self._parse_special_tokens = parse_special_tokens
        self._packed = lru_cache(maxsize=1)(partial(packed, model))  # the same one for the next prompt

    def write(
        self, prompt: str, settings: GenerationConfig, is_interrupted: Callable[[], bool] = lambda: False
    ) -> Written:
        """Writes all samples, the first as it is drawn and each other one when those before it end.

        The texts are those of `predict` for this prompt alone.
        """
        model = self._packed(quantize=settings.quantize, n_rows=min(_ROWS, settings.num_samples))
        start = time.perf_counter()
        engine = Engine(model, settings, eos_token_id=self.tokenizer.eos_token_ids, batch_size=_ROWS)
        (token_ids,) = encode_prompts([prompt], self.tokenizer, self._parse_special_tokens)
        hint = special_token_hint([prompt], self.tokenizer, "--parse_special_tokens")
        if hint and not self._parse_special_tokens:
            say(hint)
        samples = [_Sample(TextStream(self.tokenizer, settings.stop)) for _ in range(settings.num_samples)]
        for number, sample in enumerate(samples):
            engine.add(Request(token_ids, sample=number, ends_with=sample.text.add))
        steps = engine.run()
        for number, sample in enumerate(samples):
            self._show(prompt)
            self._write_on(number, samples, steps, is_interrupted)
            if sample.ended_by == _ENDED_BY["interrupt"]:
                break
            if len(samples) > 1:
                what = f"{_tokens(len(sample.token_ids))}; ended by {sample.ended_by}"
                say(f"sample {number + 1} of {len(samples)}: {what}")
        seconds, count = time.perf_counter() - start, sum(len(sample.token_ids) for sample in samples)
        rate = f": {count / seconds:,.0f} tokens/s" if count and seconds else ""
        reason = f"; ended by {samples[0].ended_by}" if len(samples) == 1 else ""
        say(f"{_tokens(count)} in {seconds:.1f} s{rate}{reason}")
        return Written(model, token_ids, [sample.token_ids for sample in samples])

    def _write_on(
        self, number: int, samples: list[_Sample], steps: Iterator[Step], is_interrupted: Callable[[], bool]
    ) -> None:
        """Writes a sample as the steps add to it; what they add to others waits for its turn."""
        sample, n_written = samples[number], 0
        while not sample.ended_by:
            self._show(sample.text.text[n_written:])
            self._output.flush()
            n_written = len(sample.text.text)
            if is_interrupted():
                sample.end("interrupt")
            else:
                step = self._next(steps)
                drawn = samples[step.request.sample]
                drawn.token_ids += [] if step.token_id is None else [step.token_id]
                if step.completion is not None:
                    drawn.end(step.completion.finish_reason)
        self._show(sample.text.text[n_written:] + "\n")
        self._output.flush()

    def _next(self, steps: Iterator[Step]) -> Step:
        """Ends the line before a refusal, which has one of its own."""
        try:
            return next(steps)
        except UserError:
            self._show("\n")
            self._output.flush()
            raise

    def _show(self, text: str) -> None:
        self._output.write(for_readers(text, self._output))


def _tokens(count: int) -> str:
    return f"{count:,} token{'s' if count != 1 else ''}"
