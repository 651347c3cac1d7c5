"""pylitefs: mount a directory, and every SQLite database in it is replicated live."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pylitefs.halt_lock import HaltFailed, HaltLost, halt

__version__ = "0.1.0"
__all__ = ["HaltFailed", "HaltLost", "__version__", "halt"]


def __getattr__(name: str) -> Any:
    """`pylitefs.halt` and its errors, loaded when they are used."""
    if name in ("HaltFailed", "HaltLost", "halt"):
        from pylitefs import halt_lock

        return getattr(halt_lock, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
