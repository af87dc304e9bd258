"""A lock that is given in the order in which it was asked for."""

from __future__ import annotations

import threading


class FairLock:
    """A context manager. With `threading.Lock` an engine that takes it again at once may keep the others waiting."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self.asked = self._served = 0  # how often it was asked for, and given back

    def __enter__(self) -> None:
        with self._condition:
            number = self.asked
            self.asked += 1
            self._condition.wait_for(lambda: self._served == number)

    def __exit__(self, *_: object) -> None:
        with self._condition:
            self._served += 1
            self._condition.notify_all()
