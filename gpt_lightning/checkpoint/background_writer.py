"""One job at a time beside the training loop, whose failure is not lost."""

import threading
from collections.abc import Callable


class BackgroundWriter:
    """Its thread is waited for when the program ends: what was begun is written."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    def start(self, job: Callable[[], None]) -> None:
        """Begin the job; the one before must have been waited for."""
        assert self._thread is None, "one snapshot at a time is what memory is planned for"
        self._thread = threading.Thread(target=self._run, args=(job,), name="checkpoint writer")
        self._thread.start()

    def _run(self, job: Callable[[], None]) -> None:
        try:
            job()
        except BaseException as error:
            self._failure = error

    def wait(self) -> None:
        """Until nothing is being written, whether it went well or not."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def raise_failure(self) -> None:
        """What went wrong since the last call."""
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure
