"""Bug fixes for pinned SGLang releases, kept the way a distribution keeps its patches."""

__version__ = "0.1.0"
