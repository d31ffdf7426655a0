"""Decides what of a text the model sees, and brings it into the cache in as few passes as possible."""

from collections.abc import Iterator

import torch

from gpt_lightning.kernels.attention import KVCache, in_blocks
from gpt_lightning.model.gpt import GPTModel

PIECE = 256  # tokens of a text that a pass on a CPU reads; more are hardly faster there


def visible_start(n_tokens: int, context_length: int, stride: int | None = None) -> int:
    """Returns where in a sequence of `n_tokens` the context begins that the next token is predicted from.

    Up to `context_length` tokens it is all of them. A sequence that grows past that loses its first `stride`
    tokens (None: about half a context), the rest is encoded anew from position 0, and grows from there until
    the context is full again. With stride 1 it is always the last `context_length` tokens. The start follows
    from the length alone, so a long prompt continues exactly as if its end had been generated.
    """
    if n_tokens <= context_length:
        return 0
    if stride is None:
        stride = context_length + 1 - max(1, context_length // 2)
    slides = -(-(n_tokens - context_length) // stride)
    return slides * stride


def fill(
    model: GPTModel,
    cache: KVCache,
    texts: dict[int, list[int]],
    missing: set[int],
    device: torch.device,
    piece: int,
) -> None:
    """Reads into the cache's rows their `texts`, which all but those of `missing` hold already.

    Equal texts, such as samples of one prompt, are computed once.
    """
    held = {place: tokens for place, tokens in texts.items() if place not in missing}
    computed: dict[int, list[int]] = {}
    copies: list[tuple[int, int]] = []
    for place in sorted(missing):
        source = holder(texts[place], held)
        if source is None:
            computed[place] = held[place] = texts[place]
        else:
            copies.append((source, place))
    for first, group in _groups(computed):
        compute(model, cache, first, group, device, piece)
    for source, place in copies:
        cache.copy_row(source, place, len(texts[place]))


def holder(tokens: list[int], rows: dict[int, list[int]]) -> int | None:
    """Finds a row that read these tokens; one that read others too would have rounded otherwise."""
    return next((place for place, others in rows.items() if others == tokens), None)


def _groups(rows: dict[int, list[int]]) -> Iterator[tuple[int, list[list[int]]]]:
    """Yields neighbouring rows of as many blocks: the first one's place, and their tokens."""
    group: list[list[int]] = []
    first = 0
    for place, tokens in sorted(rows.items()):
        if group and (place != first + len(group) or in_blocks(len(tokens)) != in_blocks(len(group[0]))):
            yield first, group
            group = []
        if not group:
            first = place
        group.append(tokens)
    if group:
        yield first, group


def compute(
    model: GPTModel,
    cache: KVCache,
    first: int,
    texts: list[list[int]],
    device: torch.device,
    piece: int,
    n_cached: int = 0,
) -> None:
    """Reads what follows the first `n_cached` tokens of some rows' texts, which the cache holds, in pieces.

    Each pass is padded to whole blocks, which nothing before them sees: so a text's own length alone decides
    how it is computed, and its mates in the batch change no bit of it.
    """
    rows = cache.rows(first, first + len(texts))
    rows.lengths.fill_(n_cached)
    room = min(in_blocks(cache.max_length), model.config.max_position_embeddings)
    longest = max(map(len, texts))
    for begin in range(n_cached, longest, piece):
        end = min(begin + piece, longest)
        width = min(in_blocks(end - begin), room - begin)
        padded = [(tokens[begin:end] + [0] * width)[:width] for tokens in texts]
        model.hidden_states(torch.tensor(padded, device=device), kv_cache=rows)
        rows.lengths.fill_(end)
    rows.lengths.copy_(torch.tensor([len(tokens) for tokens in texts]))
