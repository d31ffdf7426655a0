"""Looks through a checkpoint's pickles, before anything is built of them, for what is endless or no data."""

import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from gpt_lightning.exit_codes import UserError

MOST_OPERATIONS = 1_000_000  # a checkpoint has some ten thousand; PyTorch takes 2 s for so many
DEEPEST = 100  # a checkpoint's containers are some ten deep
# What torch.save makes plain values and ordinary tensors of. PyTorch allows more, also what takes memory.
_GLOBALS = re.compile(
    r"collections\.(OrderedDict|Counter)|torch\._utils\._rebuild_(tensor_v[23]|parameter)"
    r"|torch\.(Size|device|\w+Storage|b?float\w*|u?int\d+|complex\d+|bool|double|half|long|short)"
    r"|torch\.storage\.UntypedStorage|_codecs\.encode|__builtin__\.(set|complex)"
)
_WIDTHS = {  # of the operations that PyTorch's own unpickler knows, how many bytes follow each
    **dict.fromkeys(b"\x81\x85\x86\x87\x88\x89Rbaesu(tN)]}\x8fQ", 0),
    **dict.fromkeys(b"\x80Khq", 1),
    **{ord("M"): 2, ord("J"): 4, ord("j"): 4, ord("r"): 4, ord("G"): 8},
}
_LENGTH_BYTES = {ord("X"): 4, ord("U"): 1, 0x8A: 1}  # of those that say how many bytes follow
_OPENING, _CLOSING, _GLOBAL, _STOP = ord("("), b"eut", ord("c"), ord(".")


def check_pickles(source: Path | BinaryIO) -> None:
    """Raises UserError for the first thing in a file's pickles that no checkpoint holds."""
    with zipfile.ZipFile(source) as archive:
        for record in archive.infolist():
            if record.filename.lower().endswith(".pkl"):
                if (problem := next(_problems(archive.read(record)), None)) is not None:
                    raise UserError(f"its record {record.filename} {problem}")


def _problems(pickle: bytes) -> Iterator[str]:
    at = marks = 0
    for _ in range(MOST_OPERATIONS):
        if at >= len(pickle):
            yield "is cut short"
            return
        operation = pickle[at]
        if (width := _WIDTHS.get(operation)) is not None:
            at += 1 + width
            if operation == _OPENING:
                marks += 1
                if marks > DEEPEST:
                    yield f"nests more than {DEEPEST} containers"
            elif operation in _CLOSING:
                marks -= 1
        elif (width := _LENGTH_BYTES.get(operation)) is not None:
            at += 1 + width + int.from_bytes(pickle[at + 1 : at + 1 + width], "little")
        elif operation == _GLOBAL:
            module, name, _ = (*pickle[at + 1 : at + 300].split(b"\n", 2), b"", b"")[:3]
            full_name = f"{module.decode('utf-8', 'replace')}.{name.decode('utf-8', 'replace')}"
            if not _GLOBALS.fullmatch(full_name):
                yield f"asks for {full_name[:80]!r}, which is no plain value"
            at += 3 + len(module) + len(name)
        elif operation == _STOP:
            return
        else:
            yield f"has an operation ({operation:#04x}) of no checkpoint"
    yield f"has more than {MOST_OPERATIONS:,} operations"
