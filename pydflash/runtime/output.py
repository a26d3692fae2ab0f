"""What a forward computed for the rows it was asked for."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from pydflash.errors import StateError
from pydflash.native import DeviceLock, exclusive
from pydflash.runtime.runner import Head, StepReplay

__all__ = ["Output"]


class Output:
    """Logits, copied from the device when first asked for, and most likely tokens; valid until the session's next
    forward.

    ``logits``: (rows, vocab) float32. ``argmax``: (rows,) int32, the most likely token of each row, the first of equal
    ones; -1 where a logit is NaN or the largest is infinite. ``count``: tokens that the step computed. StateError for
    either after a forward with logits='none'.
    """

    def __init__(self, lock: DeviceLock, step: StepReplay, count: int, head: Head, check: Callable[[], None]) -> None:
        """``check`` raises when the session has gone on or was closed."""
        self.lock, self.count = lock, count
        self._step, self._check = None if head == "none" else step, check
        self._rows = count if head == "all" else 1
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
        if self._logits is None:
            self._logits = self._read_logits()
        return self._logits

    @property
    def argmax(self) -> npt.NDArray[np.int32]:
        if self._argmax is None:
            self._argmax = self._most_likely()
        return self._argmax

    @exclusive
    def _read_logits(self) -> npt.NDArray[np.float32]:
        step = self._current()
        out: npt.NDArray[np.float32] = np.empty((self._rows, step.logits.shape[1]), np.float32)
        step.graph.backend.read(step.logits, out)
        return out

    @exclusive
    def _most_likely(self) -> npt.NDArray[np.int32]:
        found: npt.NDArray[np.int32] = self._current().results["argmax"][: self._rows].copy()
        return found

    def _current(self) -> StepReplay:
        if self._step is None:
            raise StateError("the forward ran with logits='none'; ask for 'last' or 'all'")
        self._check()
        return self._step
