"""Checkpoints written so that a good one is always there."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.types import _PATH
from lightning.pytorch.plugins.io import TorchCheckpointIO
from typing_extensions import override

from gpt_lightning.checkpoint.background_writer import BackgroundWriter
from gpt_lightning.checkpoint.checkpoint import check_exists, check_not_sharded
from gpt_lightning.checkpoint.contents import read_checked
from gpt_lightning.checkpoint.files import write
from gpt_lightning.checkpoint.folder import remove, replaced_by_a_file
from gpt_lightning.checkpoint.snapshot import HostMemory, check_finite


@dataclass(frozen=True)
class SaveOptions:
    """As `storage_options` of a save: what else happens to the same checkpoint.

    Args:
        background: Write while the training goes on.
        also: Where it is written too, once it is in its place.
        remove: Checkpoints that are removed then.
    """

    background: bool = False
    also: tuple[Path, ...] = ()
    remove: tuple[Path, ...] = ()


class DurableCheckpointIO(TorchCheckpointIO):
    """Writes beside the target, flushes to disk, renames; never what is not finite.

    Lightning stages in TMPDIR: on another file system the final move is a plain copy, and a crash inside it
    leaves a torn file under the final name.
    """

    def __init__(self) -> None:
        self._memory = HostMemory()
        self._writer = BackgroundWriter()

    @override
    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: _PATH, storage_options: SaveOptions | None = None
    ) -> None:
        """Raises the failure of an earlier save in the background, too."""
        options = storage_options or SaveOptions()
        self.wait()
        self.raise_failure()
        if options.background:
            snapshot = self._memory.snapshot(checkpoint)
            self._writer.start(lambda: _write_all(snapshot, Path(path), options))
        else:
            _write_all(checkpoint, Path(path), options)

    def wait(self) -> None:
        """Until everything that was to be written is, or has failed."""
        self._writer.wait()

    def raise_failure(self) -> None:
        """The error of a save in the background, once."""
        self._writer.raise_failure()

    @override
    def load_checkpoint(
        self, path: _PATH, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Never runs what a stranger may have put into the file, whatever `weights_only` says."""
        self.wait()
        check_not_sharded(Path(path))
        check_exists(Path(path))
        return read_checked(path)

    @override
    def remove_checkpoint(self, path: _PATH) -> None:
        self.wait()
        remove(Path(path))

    @override
    def teardown(self) -> None:
        self.wait()
        self._memory = HostMemory()
        self.raise_failure()


def _write_all(checkpoint: dict[str, Any], path: Path, options: SaveOptions) -> None:
    check_finite(checkpoint)
    for target in (path, *options.also):
        with replaced_by_a_file(target):
            write(checkpoint, target)
    for old in options.remove:  # not earlier: there is no moment without a good file
        remove(old)
