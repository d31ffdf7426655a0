"""Looks through a checkpoint's pickles, before anything is built of them, for what is endless or no data."""

import re
import zipfile
from io import BytesIO
from pathlib import Path
from pickle import Pickler
from typing import Any, BinaryIO

from torch import Tensor
from typing_extensions import override

from gpt_lightning.exit_codes import UserError

MOST_OPERATIONS = 1_000_000  # a checkpoint has some ten thousand; PyTorch takes 2 s for so many
DEEPEST = 100  # a checkpoint's containers are some ten deep
# What torch.save makes plain values and ordinary tensors of. PyTorch allows more, also what takes memory.
_GLOBALS = re.compile(
    r"collections\.(OrderedDict|Counter)|torch\._utils\._rebuild_(tensor_v[23]|parameter)"
    r"|torch\.(Size|device|\w+Storage|b?float\w*|u?int\d+|complex\d+|bool|double|half|long|short)"
    r"|torch\.storage\.UntypedStorage|_codecs\.encode|__builtin__\.(set|complex)"
)
_WIDTHS = {  # of the operations that a checkpoint's pickles have, how many bytes follow each
    **dict.fromkeys(b"\x81\x85\x86\x87\x88\x89\x93\x94Rbaesu(tN)]}\x8fQ", 0),
    **dict.fromkeys(b"\x80Khq", 1),
    **{ord("M"): 2, ord("J"): 4, ord("j"): 4, ord("r"): 4, ord("G"): 8, 0x95: 8},
}
_LENGTH_BYTES = {ord("X"): 4, ord("U"): 1, 0x8A: 1, 0x8C: 1}  # of those that say how many bytes follow
_PUSHING = frozenset(b"\x88\x89N)]}\x8fKMJGXU\x8a\x8c")
_TAKEN = {0x85: 1, 0x86: 2, 0x87: 3, ord("a"): 1, ord("s"): 2, ord("R"): 1, ord("b"): 1, 0x81: 1, 0x93: 1}
_NEW = frozenset(b"\x85\x86\x87t")  # tuples of what they take; the others put it into what is there
_GLOBAL, _STOP = ord("c"), ord(".")


def check_pickles(source: Path | BinaryIO) -> None:
    """Raises UserError for the first thing in a file's pickles that no checkpoint holds."""
    with zipfile.ZipFile(source) as archive:
        for record in archive.infolist():
            if record.filename.lower().endswith(".pkl"):
                try:
                    check_pickle(archive.read(record))
                except UserError as error:
                    raise UserError(f"its record {record.filename} {error}") from None


def check_pickle(pickle: bytes, most: int = MOST_OPERATIONS) -> None:
    """Raises UserError for what is endless, so deep that PyTorch or Python would fall, or no plain value."""
    depths = _Depths()
    at = 0
    for _ in range(most):
        if at >= len(pickle):
            raise UserError("is cut short")
        operation, start = pickle[at], at + 1
        if (width := _WIDTHS.get(operation)) is None:
            width = _width(pickle, operation, start)
        at = start + width
        if operation == _STOP:
            return
        try:
            depths.take(operation, pickle[start:at] if width <= 4 else b"")
        except IndexError:
            raise UserError("takes what is not there") from None
    raise UserError(f"has more than {most:,} operations")


def _width(pickle: bytes, operation: int, start: int) -> int:
    """Returns how many bytes follow an operation that says it itself; a name of no plain value is refused."""
    if (width := _LENGTH_BYTES.get(operation)) is not None:
        return width + int.from_bytes(pickle[start : start + width], "little")
    if operation == _GLOBAL:
        module, name, *_ = (*pickle[start : start + 300].split(b"\n", 2), b"", b"")
        full_name = f"{module.decode('utf-8', 'replace')}.{name.decode('utf-8', 'replace')}"
        if not _GLOBALS.fullmatch(full_name):
            raise UserError(f"asks for {full_name[:80]!r}, which is no plain value")
        return len(module) + len(name) + 2
    if operation == _STOP:
        return 0
    raise UserError(f"has an operation ({operation:#04x}) of no checkpoint")


def problem_of_pickling(value: Any, place: str = "") -> str | None:
    """Says what in a value, but for its tensors, is none that a checkpoint may hold; None of a plain one."""
    stream = BytesIO()
    try:
        _WithoutTensors(stream, protocol=2).dump(value)
        check_pickle(stream.getvalue())
        return None
    except UserError as error:
        problem = f"as {place} what {error}"
    except Exception:  # a class may raise anything where it is asked to be pickled
        problem = f"as {place} a {type(value).__name__}, which is no plain value"
    if isinstance(value, (list, tuple)):
        value = dict(enumerate(value))
    for key, part in value.items() if isinstance(value, dict) else ():
        if (inner := problem_of_pickling(part, f"{place}.{key}".strip("."))) is not None:
            return inner
    return problem


class _WithoutTensors(Pickler):
    """Writes what torch.save would write, with a mark in the place of each tensor."""

    @override
    def persistent_id(self, value: Any) -> str | None:
        return "a tensor" if isinstance(value, Tensor) else None


class _Depths:
    """Follows how deep the containers are that a pickle builds, without building them."""

    def __init__(self) -> None:
        self.stack: list[int] = []
        self.marks: list[int] = []
        self.memo: dict[int, int] = {}

    def take(self, operation: int, argument: bytes) -> None:
        if operation in _PUSHING or operation == _GLOBAL:
            self.stack.append(0)
        elif operation in b"qr":
            self.memo[int.from_bytes(argument, "little")] = self.stack[-1]
        elif operation in b"hj":
            self.stack.append(self.memo.get(int.from_bytes(argument, "little"), 0))
        elif operation == 0x94:  # MEMOIZE
            self.memo[len(self.memo)] = self.stack[-1]
        elif operation == ord("("):
            self.marks.append(len(self.stack))
            self._check(len(self.marks))
        elif operation in _TAKEN:
            self._put(len(self.stack) - _TAKEN[operation], operation)
        elif operation in b"teu":
            self._put(self.marks.pop(), operation)

    def _put(self, first: int, operation: int) -> None:
        """Puts what lies from `first` on into a new tuple, or into what lies before it."""
        if first < 0:
            raise IndexError
        depth = 1 + max(self.stack[first:], default=0)
        self._check(depth)
        del self.stack[first:]
        if operation in _NEW:
            self.stack.append(depth)
        else:
            self.stack[-1] = max(self.stack[-1], depth)

    def _check(self, depth: int) -> None:
        if depth > DEEPEST:
            raise UserError(f"nests more than {DEEPEST} containers")
