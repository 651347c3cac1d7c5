"""A process that ends before a chosen change to the disk."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any


class Crash(Exception):
    """The process ends here. (Not an OSError: nobody makes up for it.)"""


class Steppable:
    """The module `os` as somebody sees it: the process ends before the `step`th of the changes `names`, or of those
    that are `wrap`ped. `made`: those that were made."""

    def __init__(self, step: int, *names: str) -> None:
        self.step, self.made = step, list[str]()
        self._names = names

    def wrap(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **more: Any) -> Any:
            if len(self.made) >= self.step:
                raise Crash
            self.made.append(f"{name} {os.path.basename(str(args[0]))}")
            return real(*args, **more)

        return call

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        return self.wrap(name, real) if name in self._names else real
