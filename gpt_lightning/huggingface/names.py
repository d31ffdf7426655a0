"""Holds other people's weights to the names that a configuration asks for."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from gpt_lightning.exit_codes import UserError
from gpt_lightning.model.config import GPTConfig

HEAD = "lm_head.weight"


def complete(
    theirs: Mapping[str, Tensor], names: Iterable[str], table: str, config: GPTConfig
) -> dict[str, Tensor]:
    """Adds the head that is tied to `table`, and raises UserError unless the weights have these names."""
    found = dict(theirs)
    if config.tie_embeddings and table in found:
        if not torch.equal(found.setdefault(HEAD, found[table]), found[table]):
            problem = f"tie_word_embeddings=True, but {HEAD} differs from {table}"
            raise UserError(f"{problem}; set it to false in config.json")
    expected = {*names}
    for problem, odd in (("lack", expected - found.keys()), ("hold unknown", found.keys() - expected)):
        if odd:
            some = ", ".join(sorted(odd)[:3]) + (f" and {len(odd) - 3} more" if len(odd) > 3 else "")
            raise UserError(f"the weights {problem} {some}; import a plain model with its own configuration")
    return found
