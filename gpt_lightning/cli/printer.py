"""Writes completions to a stream of text while the model draws them."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TextIO

from gpt_lightning.data.prompts import encode_prompts
from gpt_lightning.data.tokenizer import TextTokenizer
from gpt_lightning.generation.engine import Engine, Request, Step
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


class TextWriter:
    """Writes prompt and completion to `output`, and tells `say` how fast it went and what ended the text."""

    def __init__(
        self, model: GPTModel, tokenizer: TextTokenizer, output: TextIO, say: Callable[[str], None]
    ) -> None:
        self._model, self._tokenizer = model, tokenizer
        self._output, self._say = output, say
        self._packed: dict[tuple[str | None, int], GPTModel] = {}  # the last one used

    def write(
        self, prompt: str, settings: GenerationConfig, is_interrupted: Callable[[], bool] = lambda: False
    ) -> None:
        """Writes all samples of one prompt, the first as it is drawn, each other when those before it end.

        The texts are those of `predict` for this prompt alone.
        """
        model, eos = self._ready(settings), self._tokenizer.eos_token_id
        start = time.perf_counter()
        engine = Engine(model, settings, eos_token_id=eos, batch_size=_ROWS)
        (token_ids,) = encode_prompts([prompt], self._tokenizer)
        samples = [_Sample(TextStream(self._tokenizer, settings.stop)) for _ in range(settings.num_samples)]
        for number, sample in enumerate(samples):
            engine.add(Request(token_ids, sample=number, ends_with=sample.text.add))
        printer = _Printer(prompt, samples, self._output, self._say)
        for step in engine.run():
            printer.add(step)
            if is_interrupted():
                break
        printer.end(time.perf_counter() - start)

    def _ready(self, settings: GenerationConfig) -> GPTModel:
        """Returns the model that decodes by these settings, kept for the next prompt."""
        key = (settings.quantize, min(_ROWS, settings.num_samples))
        if key not in self._packed:
            self._packed = {key: packed(self._model, quantize=settings.quantize, n_rows=key[1])}
        return self._packed[key]


@dataclass
class _Sample:
    """Holds a completion that is being drawn, and how it stands."""

    text: TextStream
    n_tokens: int = 0
    reason: str | None = None  # why it ended


class _Printer:
    """Writes the samples of a prompt, which are drawn together, one after the other."""

    def __init__(
        self, prompt: str, samples: list[_Sample], output: TextIO, say: Callable[[str], None]
    ) -> None:
        self._prompt, self._samples, self._output, self._say = prompt, samples, output, say
        self._turn, self._written = 0, 0  # the sample that is written now, and its characters
        self._put(prompt)

    def add(self, step: Step) -> None:
        sample = self._samples[step.request.sample]
        if step.token_id is not None:
            sample.n_tokens += 1
        if step.completion is not None:
            sample.text.end()
            sample.reason = step.completion.finish_reason
        self._write_on()

    def end(self, seconds: float) -> None:
        """Writes the rest of what an interruption ended, and says the line about all of it."""
        samples = self._samples
        if self._turn < len(samples):
            samples[self._turn].reason = "interrupt"
            self._put(samples[self._turn].text.end()[self._written :] + "\n")
        count = sum(sample.n_tokens for sample in samples)
        rate = f": {count / seconds:,.0f} tokens/s" if count and seconds else ""
        reason = f"; ended by {_ENDED_BY[samples[0].reason or '']}" if len(samples) == 1 else ""
        self._say(f"{_tokens(count)} in {seconds:.1f} s{rate}{reason}")

    def _write_on(self) -> None:
        """Writes what is new of the sample whose turn it is and, where it has ended, of those after it."""
        while self._turn < len(self._samples):
            sample = self._samples[self._turn]
            self._put(sample.text.text[self._written :])
            self._written = len(sample.text.text)
            if sample.reason is None:
                return
            self._put("\n")
            self._turn, self._written = self._turn + 1, 0
            if len(self._samples) > 1:
                what = f"{_tokens(sample.n_tokens)}; ended by {_ENDED_BY[sample.reason]}"
                self._say(f"sample {self._turn} of {len(self._samples)}: {what}")
            if self._turn < len(self._samples):
                self._put(self._prompt)

    def _put(self, text: str) -> None:
        if text:
            self._output.write(text)
            self._output.flush()


def _tokens(count: int) -> str:
    return f"{count:,} token{'s' if count != 1 else ''}"
