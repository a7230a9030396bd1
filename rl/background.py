"""One thing at a time on a thread of its own, while the caller goes on."""

from __future__ import annotations

import threading
from collections.abc import Callable

from rollout.patience import wait_for


class Background:
    """Does what it is given on a thread; what goes wrong there is raised where it is asked about.

    Args:
        what: is done, for messages.
        limit_s: longest wait for it.
    """

    def __init__(self, what: str, limit_s: float) -> None:
        self._what, self._limit_s = what, limit_s
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def begin(self, work: Callable[[Callable[[], None]], None]) -> None:
        """Wait for what was begun before, then begin `work`; returns once that calls what it is given, or is through.

        Raises: what `check` raises, of either.
        """
        self.wait()
        may_go_on = threading.Event()

        def run() -> None:
            try:
                work(may_go_on.set)
            except BaseException as error:  # told where it is asked about
                self._error = error
            finally:
                may_go_on.set()

        self._thread = threading.Thread(target=run, name=self._what, daemon=True)
        self._thread.start()
        self._until(may_go_on.wait)
        self.check()

    def check(self) -> None:
        """Raise what went wrong, once; returns at once."""
        error, self._error = self._error, None
        if error is not None:
            raise error

    def wait(self) -> None:
        """Until nothing is under way.

        Raises: WaitTimeout; what `check` raises.
        """
        thread = self._thread
        if thread is not None:
            self._until(lambda timeout_s: thread.join(timeout_s) or not thread.is_alive())
        self.check()

    def _until(self, arrives: Callable[[float], bool]) -> None:
        wait_for(lambda timeout_s: arrives(timeout_s) or None, limit_s=self._limit_s, what=f"the end of {self._what}")
