"""Completions written to a stream of text while the model draws them."""

import time
from collections.abc import Callable
from typing import TextIO

from gpt_lightning.data.prompts import encode_prompts
from gpt_lightning.data.tokenizer import TextTokenizer
from gpt_lightning.generation.engine import stream
from gpt_lightning.generation.interface import CausalLanguageModel, Step
from gpt_lightning.kernels.packed_linear import packed
from gpt_lightning.generation.sampling import GenerationConfig
from gpt_lightning.generation.text_stream import TextStream, stop_test
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
        self._packed: dict[tuple[str | None, int], CausalLanguageModel] = {}  # the last one used

    def write(
        self, prompt: str, settings: GenerationConfig, is_interrupted: Callable[[], bool] = lambda: False
    ) -> None:
        """All samples of one prompt, the first as it is drawn and each other one when those before it end.

        The texts are those of `predict` for this prompt alone.
        """
        samples = _InTurn(prompt, self._tokenizer, settings, self._output, self._say)
        model = self._ready(settings)
        start = time.perf_counter()
        steps = stream(
            model,
            encode_prompts([prompt], self._tokenizer),
            settings,
            eos_token_id=self._tokenizer.eos_token_id,
            batch_size=_ROWS,
            should_stop=stop_test(self._tokenizer, settings.stop),
        )
        samples.begin()  # not before the settings were found to fit the model
        for step in steps:
            samples.add(step)
            if is_interrupted():
                break
        samples.end(time.perf_counter() - start)

    def _ready(self, settings: GenerationConfig) -> CausalLanguageModel:
        """The model that decodes by these settings, kept for the next prompt."""
        key = (settings.quantize, min(_ROWS, settings.num_samples))
        if key not in self._packed:
            self._packed = {key: packed(self._model, quantize=settings.quantize, n_rows=key[1])}
        return self._packed[key]


class _InTurn:
    """The samples of a prompt, which are drawn together and written one after the other."""

    def __init__(
        self,
        prompt: str,
        tokenizer: TextTokenizer,
        settings: GenerationConfig,
        output: TextIO,
        say: Callable[[str], None],
    ) -> None:
        self._prompt, self._output, self._say = prompt, output, say
        n = settings.num_samples
        self._streams = [TextStream(tokenizer, settings.stop) for _ in range(n)]
        self._waiting = [""] * n  # text that is drawn and not yet written
        self._n_tokens = [0] * n
        self._reasons: list[str | None] = [None] * n
        self._turn = 0

    def begin(self) -> None:
        self._put(self._prompt)

    def add(self, step: Step) -> None:
        text = self._streams[step.sample]
        if step.token_id is not None:
            self._n_tokens[step.sample] += 1
            self._waiting[step.sample] += text.add(step.token_id)
        if step.finish_reason is not None:
            self._waiting[step.sample] += text.rest()
            self._reasons[step.sample] = step.finish_reason
        self._write_on()

    def end(self, seconds: float) -> None:
        """The rest of what an interruption ended, and the line about all of it."""
        if self._turn < len(self._streams):
            self._waiting[self._turn] += self._streams[self._turn].rest()
            self._reasons[self._turn:] = ["interrupt"] * (len(self._reasons) - self._turn)
            self._put(self._waiting[self._turn] + "\n")
        count = sum(self._n_tokens)
        rate = f": {count / seconds:,.0f} tokens/s" if count and seconds else ""
        reason = f"; ended by {_ENDED_BY[self._reasons[-1] or '']}" if len(self._reasons) == 1 else ""
        self._say(f"{_tokens(count)} in {seconds:.1f} s{rate}{reason}")

    def _write_on(self) -> None:
        while self._turn < len(self._streams):
            self._put(self._waiting[self._turn])
            self._waiting[self._turn] = ""
            reason = self._reasons[self._turn]
            if reason is None:
                return
            self._put("\n")
            self._turn += 1
            if len(self._streams) > 1:
                what = f"{_tokens(self._n_tokens[self._turn - 1])}; ended by {_ENDED_BY[reason]}"
                self._say(f"sample {self._turn} of {len(self._streams)}: {what}")
            if self._turn < len(self._streams):
                self.begin()

    def _put(self, text: str) -> None:
        if text:
            self._output.write(text)
            self._output.flush()


def _tokens(count: int) -> str:
    return f"{count:,} token{'s' if count != 1 else ''}"
