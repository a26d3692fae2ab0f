"""What a forward computed for the rows it was asked for."""

from __future__ import annotations

from contextlib import suppress
from typing import Protocol

import numpy as np
import numpy.typing as npt

from pydflash.errors import SessionClosed, StateError
from pydflash.native import DeviceLock, exclusive
from pydflash.runtime.runner import Head, StepReplay

__all__ = ["Output"]


class Owner(Protocol):
    """The session of an output. ``serial``: counts its steps."""

    serial: int

    def check_open(self) -> None: ...
    @property
    def lock(self) -> DeviceLock: ...


class Output:
    """Logits, copied from the device when first asked for, and most likely tokens; valid until the session's next
    forward.

    ``logits``: (rows, vocab) float32. ``argmax``: (rows,) int32, the most likely token of each row, the first of equal
    ones; -1 where a logit is NaN or the largest is infinite. ``count``: tokens that the step computed. StateError for
    either after a forward with logits='none'.
    """

    def __init__(self, owner: Owner, step: StepReplay, head: Head, count: int, first: int) -> None:
        """Of a step for ``count`` tokens of ``owner``, whose logits lie from row ``first`` on."""
        self.lock, self.count = owner.lock, count
        self._owner, self._serial = owner, owner.serial
        self._step = None if head == "none" else step
        self._first, self._rows = first, count if head == "all" else 1
        self._logits: npt.NDArray[np.float32] | None = None
        self._argmax: npt.NDArray[np.int32] | None = None

    @classmethod
    def joined(cls, outputs: list[Output]) -> Output:
        """The last of ``outputs``, with the rows of all, which are on the host already."""
        last = outputs[-1]
        logits, likely = [o.logits for o in outputs], [o.argmax for o in outputs]
        last._logits, last._argmax = np.concatenate(logits), np.concatenate(likely)
        last.count = last._rows = len(last._argmax)
        return last

    def fetch(self) -> None:
        """Copy both now, so that they outlive the session's next forward."""
        _ = self.logits, self.argmax

    @property
    def logits(self) -> npt.NDArray[np.float32]:
        return self._read_logits() if self._logits is None else self._logits

    @property
    def argmax(self) -> npt.NDArray[np.int32]:
        return self._most_likely() if self._argmax is None else self._argmax

    def save(self) -> None:
        """Another session's step is about to overwrite both: copy them now, if they are still valid."""
        if self._serial == self._owner.serial:
            with suppress(SessionClosed):
                self.fetch()

    @exclusive
    def _read_logits(self) -> npt.NDArray[np.float32]:
        if self._logits is None:  # another thread's step may have had them saved since
            step = self._current()
            out: npt.NDArray[np.float32] = np.empty((self._rows, step.logits.shape[1]), np.float32)
            step.graph.backend.read(step.logits, out, self._first * out.strides[0])
            self._logits = out
        return self._logits

    @exclusive
    def _most_likely(self) -> npt.NDArray[np.int32]:
        if self._argmax is None:
            self._argmax = self._current().results["argmax"][self._first : self._first + self._rows].copy()
        return self._argmax

    def _current(self) -> StepReplay:
        if self._step is None:
            raise StateError("the forward ran with logits='none'; ask for 'last' or 'all'")
        self._owner.check_open()
        if self._serial != self._owner.serial:
            raise StateError("this output belongs to an earlier forward; read logits before the next one")
        return self._step
