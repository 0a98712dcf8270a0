"""Every error that samfed raises on purpose, with the exit code that its command ends with.

Exit code 0 is success, 6 means "done, except for the images named on stderr", 130 is Ctrl-C, 143 is
SIGTERM.
A message names the file or key, what was found, what was expected, and what to do.
"""

EXIT_PARTIAL = 6
EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 143
_LINE = 500  # characters of what another machine says


class Terminated(KeyboardInterrupt):
    """SIGTERM, as SLURM, Kubernetes and ``docker stop`` send it; it ends a command like Ctrl-C."""


class SamfedError(Exception):
    """Base of samfed's errors; ``str(error)`` is one line for a person."""

    exit_code = 1


class ConfigError(SamfedError):
    """A setting is unknown, ill-typed or out of range."""

    exit_code = 2


class DataError(SamfedError):
    """A user's input file or folder is missing, damaged or inconsistent."""

    exit_code = 3


class StageError(SamfedError):
    """A stage was asked for before the stage that makes its input."""

    exit_code = 4


class NetworkError(SamfedError):
    """A server cannot be reached, refuses, or is not to be trusted; exit code 1."""


class StoreError(SamfedError):
    """A store on disk cannot be used."""

    exit_code = 5


class IdentityError(StoreError):
    """A store was made by another teacher, at another size, or from other images."""


class FormatError(StoreError):
    """A store was written by a samfed with another store format."""


class CorruptStoreError(StoreError):
    """A store's bytes fail their checksum, or a row marked done is missing."""


class LockedStoreError(StoreError):
    """Another process holds the store's lock."""


class NotFiniteError(SamfedError):
    """Numbers became NaN or infinite: a training diverged, or a precision is too low."""


def first_line(error: BaseException) -> str:
    """Return the first line of another library's error, or its class where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def one_line(text: str) -> str:
    """Return what another machine says as one line, which no terminal takes for more than text."""
    return "".join(each if each.isprintable() else " " for each in text[:_LINE])
