"""The version, written once: the package, its metadata and the compiled extension all take it from here."""

__version__ = "0.1.0"
