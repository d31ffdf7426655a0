"""How the program ends: in one line, with a code that says why, and with all its ranks."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from gpt_lightning.callbacks.finite_guard import NonFiniteError
from gpt_lightning.callbacks.orderly_stop import Stopped
from gpt_lightning.callbacks.rank_guard import RankGuard
from gpt_lightning.checkpoint.files import CheckpointWriteError, NonFiniteCheckpointError
from gpt_lightning.cli.checks import say
from gpt_lightning.cli.parser import complaint_in, shorten
from gpt_lightning.exit_codes import INTERRUPTED, NON_FINITE, WRITE_FAILED


@contextmanager
def in_order(rank_guard: RankGuard) -> Iterator[None]:
    """Run the program; what is known to go wrong ends it with a line and a code, the rest by a traceback."""
    try:
        yield
        _leave_together(rank_guard)
    except (Stopped, NonFiniteError) as error:  # raised on all ranks
        say(str(error) if isinstance(error, Stopped) else f"error: {error}")
        _leave_together(rank_guard)
        sys.exit(error.exit_code if isinstance(error, Stopped) else NON_FINITE)
    except (CheckpointWriteError, NonFiniteCheckpointError) as error:  # on the rank that writes
        _complain(str(error))
        sys.exit(WRITE_FAILED if isinstance(error, CheckpointWriteError) else NON_FINITE)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except SystemExit as error:
        # Lightning makes a plain 1 of a second Ctrl-C.
        interrupted = isinstance(error.__context__, KeyboardInterrupt)
        sys.exit(INTERRUPTED if interrupted else error.code)
    except (ValueError, MisconfigurationException) as error:
        complaint = complaint_in(error, MisconfigurationException)
        if complaint is None:
            raise
        _complain(shorten(str(complaint)))
        sys.exit(2)
    except RuntimeError as error:
        rank_guard.explain(error)  # ends here if the error comes of a lost rank
        raise
    except OSError as error:
        if error.filename is None:
            raise
        _complain(f"{error.filename}: {error.strerror}; name a place that can be written")
        sys.exit(2)


def _complain(line: str) -> None:
    """Of a rank on its own: the others may not know what it has met."""
    rank = getattr(rank_zero_only, "rank", 0)
    print(f"error of rank {rank}: {line}" if rank else f"error: {line}", file=sys.stderr)


def _leave_together(rank_guard: RankGuard) -> None:
    """End the process groups while all ranks are there.

    Left to the interpreter's exit, gloo's threads abort a process now and then, after all its work was done.
    """
    if dist.is_available() and dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
        rank_guard.leave()  # last: the first rank waits for its children, and they for the groups' end
