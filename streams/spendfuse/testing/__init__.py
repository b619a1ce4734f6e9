"""For your own tests: `PipelineDriver` runs the worker's stages in memory, without a broker, a thread or a clock."""

from spendfuse.testing.driver import DeadLetterRow, PipelineDriver, SpendRow

__all__ = ["DeadLetterRow", "PipelineDriver", "SpendRow"]
