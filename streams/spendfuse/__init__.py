"""spendfuse: a fuse for AI-agent spend."""

__version__ = "0.1.0"
