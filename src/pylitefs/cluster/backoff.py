"""When to try again."""

from __future__ import annotations

import random


class Backoff:
    """Pauses for a replica that has lost its primary: exponential with full jitter, so that many do not come in step.

    The n-th pause is a random part of min(base · 2^n, cap). After a connection that worked and was closed in good
    order the first pause is zero, once. A refusal that will last gives the cap itself.
    """

    def __init__(self, base_s: float, cap_s: float = 2.5, rng: random.Random | None = None) -> None:
        self._base_s = min(base_s, cap_s)
        self._cap_s = cap_s
        self._rng = rng or random.Random()
        self._failures = 0

    def after_failure(self) -> float:
        limit_s = min(self._cap_s, self._base_s * 2.0 ** min(self._failures, 32))
        self._failures += 1
        return self._rng.uniform(0, limit_s)

    def after_refusal(self) -> float:
        self._failures += 1
        return self._cap_s

    def after_session(self, clean: bool) -> float:
        """A connection that worked has ended."""
        self._failures = 0
        if clean:
            return 0.0
        return self.after_failure()
