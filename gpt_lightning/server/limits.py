"""Says how much of the server one client, and all together, can take."""

from dataclasses import dataclass, fields

from gpt_lightning.exit_codes import UserError


@dataclass(frozen=True)
class Limits:
    """Bounds what clients may send, and how long they may take.

    Args:
        max_body_bytes: Of one request; a longer one gets 413.
        max_prompt_tokens: Of one prompt; the model sees as many of the last ones as fit into its context.
        max_tokens: Of one completion.
        max_logprobs: Of one answer, those of the likeliest tokens and of each choice's echo counted too.
        max_queue: Completions that wait for a row; a request for more gets 429.
        max_connections: Open at a time; of more, those go that have said nothing for the longest time.
        header_seconds: For a request's head, and again for its body.
        idle_seconds: Until a connection that asks for nothing more is closed.
        reader_seconds: Until a connection is cut whose client takes nothing of its answer.
        request_seconds: From a request to the end of its answer, waiting included.
        grace_seconds: For what runs when the server is told to end.
    """

    max_body_bytes: int = 2**20
    max_prompt_tokens: int = 2**15
    max_tokens: int = 4096
    max_logprobs: int = 2**20
    max_queue: int = 256
    max_connections: int = 512
    header_seconds: float = 10.0
    idle_seconds: float = 30.0
    reader_seconds: float = 30.0
    request_seconds: float = 600.0
    grace_seconds: float = 30.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            least = 0 if field.name in ("max_queue", "grace_seconds") else 1 if type(value) is int else 0.1
            if not least <= value < float("inf"):
                rule = f"is below {least} or infinite"
                raise UserError(f"limits.{field.name}={value} {rule}; choose a number between")
