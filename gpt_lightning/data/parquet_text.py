"""Reads a column of text of a .parquet file, row by row, of all its groups of rows or of some."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

from gpt_lightning.data.unpacking import damaged
from gpt_lightning.exit_codes import UserError

# Bytes are how parquet keeps text that nobody said is text.
_PARQUET_TEXT = (
    "string",
    "large_string",
    "string_view",
    "binary",
    "large_binary",
    "binary_view",
    "fixed_size_binary",
)


def parquet_texts(
    path: str, text_key: str, on_bytes: Callable[[int], None], groups: tuple[int, int] | None
) -> Iterator[str]:
    """Yields the text of each row, "" where there is none, from one group of rows up to another."""
    with _opened(path) as file:
        _check_is_text(file.schema_arrow, text_key, path)
        first, end = groups or (0, file.num_row_groups)
        row, n_rows = sum(_rows_of_groups(file, first)), file.metadata.num_rows
        for batch in file.iter_batches(batch_size=64, row_groups=range(first, end), columns=[text_key]):
            for row, value in enumerate(batch.column(0), start=row + 1):
                yield _parquet_text(value, text_key, f"{path}, row {row}")
            on_bytes(os.path.getsize(path) * len(batch) // n_rows)


def group_ends(path: str) -> list[int]:
    """Tells up to which byte of the file each group of rows reaches, about."""
    with _opened(path) as file:
        n_rows, size = max(1, file.metadata.num_rows), os.path.getsize(path)
        return [size * row // n_rows for row in accumulate(_rows_of_groups(file, file.num_row_groups))]


def _rows_of_groups(file: Any, end: int) -> Iterator[int]:
    """Yields how many rows each of the groups before `end` has."""
    return (file.metadata.row_group(group).num_rows for group in range(end))


@contextmanager
def _opened(path: str) -> Iterator[Any]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise UserError(f"{path} needs the package pyarrow; pip install pyarrow") from None
    try:
        with parquet.ParquetFile(path, page_checksum_verification=True) as file:
            yield file
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # of the disk, not of what is on it
            raise
        raise damaged(path, error) from None


def _parquet_text(value: Any, text_key: str, place: str) -> str:
    try:
        text = value.as_py()
        return text.decode("utf-8") if isinstance(text, bytes) else text or ""
    except UnicodeDecodeError:
        raise UserError(f"{place}: data.text_key={text_key} is not UTF-8; choose another column") from None


def _check_is_text(schema: Any, text_key: str, path: str) -> None:
    """Refuses a column of anything but text, its bytes, or categories of either."""
    from pyarrow import types

    if schema.names.count(text_key) > 1:
        raise UserError(f"{path} has two columns data.text_key={text_key}; rename one")
    if text_key not in schema.names:
        raise UserError(f"{path} has no column data.text_key={text_key}; it has: {', '.join(schema.names)}")
    kind = schema.field(text_key).type
    values = kind.value_type if types.is_dictionary(kind) else kind
    if not any(getattr(types, f"is_{name}")(values) for name in _PARQUET_TEXT):
        raise UserError(f"{path}: column data.text_key={text_key} is {kind}, not text; choose another")
