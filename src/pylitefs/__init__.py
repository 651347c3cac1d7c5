"""pylitefs: mount a directory, and every SQLite database in it is replicated live."""

__version__ = "0.1.0"
