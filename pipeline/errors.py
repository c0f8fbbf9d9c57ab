"""The few exceptions of featuremaps, each with the exit code that the command ends with.

Every message is one paragraph: the value, what was expected, what it means and what to do.
"""

EXIT_COMPLETE = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_QUARANTINED = 3
EXIT_RUN_AGAIN = 75


class FeaturemapsError(Exception):
    """Something stopped the work; what the store already holds is intact."""

    exit_code = EXIT_FAILED


class UsageError(FeaturemapsError):
    """The command, the job file, the source or the store cannot be used as asked."""

    exit_code = EXIT_USAGE


class StoreBusyError(FeaturemapsError):
    """Another run holds the store; it is safe to run again later."""

    exit_code = EXIT_RUN_AGAIN


class StoppedError(FeaturemapsError):
    """The run was asked to stop before there was anything to finish; it is safe to run again."""

    exit_code = EXIT_RUN_AGAIN


class StaleWriterError(FeaturemapsError):
    """A task was about to write for a run that no longer holds the store."""


class PassingFaultError(FeaturemapsError):
    """The storage failed in a way that may pass (EIO, stale handle, time-out); no image is to blame."""


class ImageError(Exception):
    """One image cannot be used; it costs itself only.

    Parameters
    ----------
    code : str
        Stable, lower-case code, for instance ``truncated``.
    text : str
        What was found, for a person.

    Examples
    --------
    >>> str(ImageError("empty", "the file has 0 bytes"))
    'empty: the file has 0 bytes'
    """

    def __init__(self, code: str, text: str) -> None:
        super().__init__(code, text)
        self.code = code
        self.text = text

    def __str__(self) -> str:
        return f"{self.code}: {self.text}"
