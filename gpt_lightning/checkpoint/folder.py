"""Verifies and reads the folder of a sharded checkpoint.

It holds tensors in the files of torch.distributed.checkpoint, `.metadata`, their table of contents, and
`rest.pt`, all else that a checkpoint has, with the digests of the other files. This module is slow to import:
it is imported when the first such folder is met.
"""

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from typing_extensions import override

from gpt_lightning.checkpoint.files import FOLDER_KEY, OPTIMIZERS, REST, WEIGHTS, check_bytes
from gpt_lightning.checkpoint.pickles import check_pickles
from gpt_lightning.checkpoint.table import CONTENTS, read_table
from gpt_lightning.checkpoint.values import check_plain
from gpt_lightning.exit_codes import UserError

TIED_KEY = "tied_parameters"
DIGESTS_KEY = "digests"


@contextmanager
def complaining(folder: Path) -> Generator[None, None, None]:
    """Raises UserError, in one line, for whatever a torn folder leads to."""
    try:
        yield
    except Exception as error:  # what a changed byte leads to may be anything
        reason = str(error).strip().split("\n")[-1][:120]
        raise UserError(f"ckpt_path={folder} cannot be read ({reason}); name another") from error


def check_rest(rest: Mapping[str, Any]) -> None:
    """Raises, before anything is written, for what no reader would take beside the tensors."""
    check_plain(rest)


def check_whole(folder: Path, *, share: int = 0, shares: int = 1) -> dict[str, Any]:
    """Returns all but the tensors; raises UserError if a file is missing or not as it was written.

    It reads only a share of the files: as many ranks can divide the work.
    """
    rest = read_rest(folder)
    with complaining(folder):
        names = {place.relative_path for place in read_table(folder).storage_data.values()}
        digests = rest.get(DIGESTS_KEY, {})  # old folders have none
        if not isinstance(digests, dict) or digests and digests.keys() != {*names, CONTENTS}:
            raise UserError(f"{REST} names other files than {CONTENTS}")
        for name, digest in sorted(digests.items())[share::shares]:
            try:
                check_bytes(folder / name, str(digest))
            except UserError as error:
                raise UserError(f"{name}: {error}") from error
    return rest


def read_rest(folder: Path) -> dict[str, Any]:
    """Returns all of the checkpoint but its tensors."""
    with complaining(folder):
        check_bytes(folder / REST)
        check_pickles(folder / REST)
        rest = torch.load(folder / REST, map_location="cpu", weights_only=True)
        if not isinstance(rest, dict):
            raise UserError(f"{REST} is a {type(rest).__name__}")
    return {**rest, FOLDER_KEY: str(folder)}


def read_whole(folder: Path) -> dict[str, Any]:
    """Returns the ordinary checkpoint that the folder stands for, read by one process."""
    whole = {
        key: torch.empty(meta.size, dtype=meta.properties.dtype) for key, meta in tensors_in(folder, "")
    }
    with complaining(folder):
        dcp.load(whole, storage_reader=Reader(folder), no_dist=True)
    checkpoint = read_rest(folder)
    del checkpoint[FOLDER_KEY]
    checkpoint.pop(DIGESTS_KEY, None)  # old folders have none
    weights = {key.partition("/")[2]: value for key, value in whole.items() if key.startswith(f"{WEIGHTS}/")}
    for name, original in checkpoint.pop(TIED_KEY).items():
        weights[name] = weights[original]
    put_back(checkpoint.get(OPTIMIZERS, []), whole)
    return {**checkpoint, WEIGHTS: weights}


def tensors_in(folder: Path, prefix: str) -> list[tuple[str, TensorStorageMetadata]]:
    """Lists the folder's tensors whose names begin with `prefix`, with what is known of each."""
    with complaining(folder):
        contents = Reader(folder).read_metadata().state_dict_metadata
    return [
        (key, meta)
        for key, meta in contents.items()
        if key.startswith(prefix) and isinstance(meta, TensorStorageMetadata)
    ]


def put_back(optimizers: Sequence[Mapping[str, Any]], tensors: Mapping[str, Tensor]) -> None:
    """Puts the folder's tensors back into the state dicts of the optimizers."""
    for key, value in tensors.items():
        if key.startswith(f"{OPTIMIZERS}/"):
            _, number, index, name = key.split("/")
            optimizers[int(number)]["state"].setdefault(int(index), {})[name] = value


class Reader(dcp.FileSystemReader):
    """Reads the table of contents without running what a stranger may have put there."""

    @override
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        metadata = read_table(Path(self.path))
        assert metadata.storage_meta is not None
        metadata.storage_meta.load_id = self.load_id  # as FileSystemReader does
        return metadata
