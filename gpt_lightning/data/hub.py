"""Reads tokenizers by transformers: folders of other forms than tokenizer.json, and names on the hub."""

import os
import re
import socket
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

from tokenizers import Tokenizer

from gpt_lightning.data.tokenizer_folder import lost_token, usual_eos
from gpt_lightning.exit_codes import UserError


def is_hub_name(name: str) -> bool:
    """Tells what cannot be a path, and so may go to the network, from `texts/bpe` beside a folder `texts`."""
    path = os.path.expanduser(name)
    is_path = os.path.exists(path) or os.path.isdir(os.path.dirname(path))
    return not is_path and re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name) is not None


def from_transformers(name: str, option: str) -> tuple[Tokenizer, str | None]:
    """Loads a folder of another form, or a name on the hub, with the token that ends a text there.

    Where a tokenizer names none, as BERT's, it is the one that usually does: [SEP].
    """
    from transformers import AutoTokenizer  # seconds to import, and seldom needed

    try:
        local = os.path.isdir(name) or not hub_is_reachable()
        loaded = AutoTokenizer.from_pretrained(name, trust_remote_code=False, local_files_only=local)
    except Exception as error:  # network, hub, formats and missing packages each raise their own kinds
        remedy = "check the name and the network, or use bpe, bytes or a folder that holds tokenizer.json"
        raise UserError(f"{option} cannot be loaded ({first_line(error)}); {remedy}") from None
    if not loaded.is_fast:
        raise UserError(f"{option} has no fast (tokenizer.json) form; convert it with transformers")
    tokenizer: Tokenizer = loaded.backend_tokenizer
    if (token := lost_token(Path(name), tokenizer)) is not None:
        raise UserError(
            f"{option} is read as a {type(loaded).__name__}, which lacks {token!r} of its vocab.txt; add "
            '"tokenizer_class": "BertTokenizer", or another, to its tokenizer_config.json'
        )
    return tokenizer, usual_eos(tokenizer) if loaded.eos_token is None else loaded.eos_token


def hub_is_reachable() -> bool:
    """Tells whether a connection can be had; the hub's own client tries for minutes before it gives up."""
    from huggingface_hub import constants

    if getproxies():
        return True
    address = urlsplit(constants.ENDPOINT)
    try:
        socket.create_connection((address.hostname or "", address.port or 443), timeout=10).close()
    except OSError:
        return False
    return True


def first_line(error: Exception) -> str:
    """Returns the first line of what an error says, or else its kind."""
    return next(iter(str(error).splitlines()), type(error).__name__)
