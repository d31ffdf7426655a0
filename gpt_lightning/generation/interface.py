"""What goes into the engine and comes out of it, beside the prompts and the settings."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol, TypedDict

from torch import Tensor, nn

from gpt_lightning.model.config import GPTConfig
from gpt_lightning.model.kv_cache import KVCache

FinishReason = Literal["eos", "stop", "length", "exhausted"]


class CausalLanguageModel(Protocol):
    """What the engine asks of a model."""

    @property
    def config(self) -> GPTConfig: ...

    @property
    def lm_head(self) -> Callable[[Tensor], Tensor]: ...

    def hidden_states(self, input_ids: Tensor, *, kv_cache: KVCache | None = None) -> Tensor: ...

    def modules(self) -> Iterator[nn.Module]: ...

    def parameters(self) -> Iterator[Tensor]: ...


class Options(TypedDict, total=False):
    """How prompts are decoded, whatever is drawn.

    prompt_numbers: What a prompt's random numbers follow from, beside the seed; its place in the list unless
        given.
    batch_size: Rows decoded together (8): more are faster and take more memory.
    should_stop: Sees a row's new tokens after each of them, and ends the row, with that token, by True.
    use_cache: False computes each text anew for each token: slow, and what the cache is judged by.
    agree: For processes that run a model together: gives all of them one process's numbers.
    """

    prompt_numbers: list[int] | None
    batch_size: int
    should_stop: Callable[[list[int]], bool] | None
    use_cache: bool
    agree: Callable[[Tensor], Tensor] | None


class Step(NamedTuple):
    """A token of one completion, and why it is the last one, if it is.

    There is none where the completion ends without it: at the eos, or where `no_repeat_ngram_size` leaves no
    token ("exhausted"). `logprob` is the model's own, or None unless the settings ask for it.
    """

    prompt: int  # its place in the list
    sample: int
    token_id: int | None
    logprob: float | None
    finish_reason: FinishReason | None


@dataclass(frozen=True)
class Completion:
    """The new tokens of one prompt, without the eos, and what ended them.

    `logprobs` are the tokens' own, if they were asked for.
    """

    token_ids: list[int]
    finish_reason: FinishReason
    logprobs: list[float] | None = None
