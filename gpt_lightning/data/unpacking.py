"""Reads the bytes of a file, of a packed one (.gz, .zst) those that are packed in it, to its very end.

A packed file that does not end is refused: half a text would pass for a whole one.
"""

import gzip
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import BinaryIO

from gpt_lightning.exit_codes import UserError

_CHUNK_BYTES = 1 << 18
# A kilobyte may unpack to 32 megabytes, where a text is one character over and over.
_PACKED_BYTES = 1 << 10
_LARGEST_WINDOW = 1 << 31  # the most that `zstd --long` packs with; memory is taken as a file needs it


def unpacked_chunks(
    path: str, on_bytes: Callable[[int], None], within: tuple[int, int] | None = None
) -> Iterator[bytes]:
    """Yields the unpacked bytes of a file, and tells how far into the packed file each chunk reaches.

    Of a file that is not packed only what is `within` two places may be asked for.
    """
    unpack = _unzstd if path.endswith(".zst") else _gunzip if path.endswith(".gz") else _plain
    told, end = within or (0, None)
    with open(path, "rb") as packed:
        packed.seek(told)
        for chunk in unpack(path, packed) if end is None else _up_to(end, packed):
            on_bytes(packed.tell() - told)
            told = packed.tell()
            yield chunk
        on_bytes(packed.tell() - told)


def damaged(path: str, error: Exception) -> UserError:
    problem = next(iter(str(error).splitlines()), type(error).__name__)
    return UserError(f"{path} is damaged ({problem}); copy or pack it again")


def _plain(path: str, file: BinaryIO) -> Iterator[bytes]:
    return iter(partial(file.read, _CHUNK_BYTES), b"")


def _up_to(end: int, file: BinaryIO) -> Iterator[bytes]:
    while chunk := file.read(min(_CHUNK_BYTES, end - file.tell())):
        yield chunk


def _gunzip(path: str, packed: BinaryIO) -> Iterator[bytes]:
    try:
        with gzip.GzipFile(fileobj=packed) as stream:
            yield from iter(partial(stream.read, _CHUNK_BYTES), b"")
        if packed.tell() == 0:  # which gzip takes for a file that ends
            raise EOFError("it is empty")
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise damaged(path, error) from None


def _unzstd(path: str, packed: BinaryIO) -> Iterator[bytes]:
    try:
        import zstandard
    except ImportError:
        raise UserError(f"{path} needs the package zstandard; pip install zstandard") from None
    decompressor = zstandard.ZstdDecompressor(max_window_size=_LARGEST_WINDOW)
    frame = decompressor.decompressobj()
    try:
        while data := packed.read(_PACKED_BYTES):
            while data:
                if frame.eof:
                    frame = decompressor.decompressobj()
                if text := frame.decompress(data):
                    yield text
                data = frame.unused_data if frame.eof else b""
        if not frame.eof:
            raise EOFError("it ends within a frame" if packed.tell() else "it is empty")
    except (EOFError, zstandard.ZstdError) as error:
        raise damaged(path, error) from None
