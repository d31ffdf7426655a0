"""Writes a token alone: for people, and for programs."""

from gpt_lightning.data.tokenizer import TextTokenizer

UNKNOWN = "\ufffd"  # stands for a character of which there are only some bytes


def token_name(tokenizer: TextTokenizer, token_id: int, begun: bytes) -> str:
    """Writes a token for people: its text, or its name if it has none.

    Of some bytes of a character, which stand in ‹›, it is the character that they end: 我‹91›, or else �‹e6›.
    """
    found = tokenizer.bytes_of(token_id)
    try:
        return found.decode() if found else tokenizer.name_of(token_id)
    except UnicodeDecodeError:
        text = (begun + found).decode("utf-8", "replace")
        return f"{UNKNOWN if UNKNOWN in text else text}‹{found.hex()}›"


def token_string(tokenizer: TextTokenizer, token_id: int) -> str:
    """Writes a token as OpenAI does: its text, or after `bytes:` what is no whole character."""
    found = tokenizer.bytes_of(token_id)
    try:
        return found.decode() if found else tokenizer.name_of(token_id)
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in found)
