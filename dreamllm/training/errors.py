"""How a run can end early."""

from __future__ import annotations

INTERRUPTED_EXIT_CODE = 130


class TrainingInterrupted(SystemExit):
    """A signal asked the run to stop; its state is saved. Ends the program with exit code 130."""

    def __init__(self) -> None:
        super().__init__(INTERRUPTED_EXIT_CODE)


class NonFiniteLossError(ValueError):
    """A loss or gradient became NaN or infinite. The message names step, documents and the file of the batch."""


class SaveError(OSError):
    """Something could not be written. The message says what, why, and what is still intact."""


class ConfigurationChangedError(ValueError):
    """The run folder belongs to another configuration. The message names the fields that differ."""


class PeerFailed(SystemExit):
    """Another process of the run failed and says why. Ends this one with exit code 1."""

    def __init__(self) -> None:
        super().__init__(1)


class ProcessLostError(OSError):
    """Another process of the run ended without a message."""
