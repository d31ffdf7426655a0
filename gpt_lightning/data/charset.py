"""Says how bytes that are not UTF-8 are made so, and guesses for that what they are."""

import codecs

from gpt_lightning.exit_codes import UserError

_ENOUGH = 1 << 16  # bytes to guess by


class NotUTF8(UserError):
    """Is raised by a file of the text, of which there may be more."""


def not_utf8(place: str, position: int, data: bytes) -> str:
    """Says where a text is not UTF-8, and the command to convert it.

    `data` is of the text's beginning, or of its surroundings. iconv takes what it is not told for the
    locale's own encoding, which is UTF-8.
    """
    guess = _guess(data[:_ENOUGH])
    remedy = f"iconv -f {guess or 'ENCODING'} -t UTF-8 OLD > NEW"
    looks = f"as it seems to be {guess}" if guess else "with the encoding that it has"
    return f"{place} is not UTF-8 at byte {position}; convert it, {looks}: {remedy}"


def _guess(data: bytes) -> str | None:
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "UTF-16"
    try:
        text = codecs.getincrementaldecoder("gb18030")().decode(data)  # the last character may be cut
    except UnicodeDecodeError:
        return None
    foreign = [character.encode("gb18030") for character in text if not character.isascii()]
    # Latin-1 and Big5 may decode, too, but to rare characters.
    common = sum(map(_is_common, foreign))
    return "GB18030" if foreign and common >= 0.8 * len(foreign) else None


def _is_common(character: bytes) -> bool:
    """Tells whether a character is punctuation, or of the 3,755 frequent ones of GB 2312."""
    lead, trail = character[:2]
    return (0xA1 <= lead <= 0xA3 or 0xB0 <= lead <= 0xD7) and trail >= 0xA1
