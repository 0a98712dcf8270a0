"""What every command of the command line has: its options, errors as one line, and its printing."""

# Annotations are evaluated here, unlike elsewhere: typer makes options of them.

import inspect
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import pairwise
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, NoReturn, Protocol, TypeVar

import typer
from click import Context
from typer import Option
from typer.core import TyperCommand

from pipeline.disk import to_json
from pipeline.errors import (
    EXIT_INTERRUPTED,
    EXIT_PARTIAL,
    EXIT_TERMINATED,
    ConfigError,
    SamfedError,
    Terminated,
)
from pipeline.progress import Style, console_progress

log = logging.getLogger("samfed")

PROGRESS_HELP = "On stderr: bars, or a line now and then (auto); a JSON line an event (json)."
ProgressOption = Annotated[Style, Option(metavar="|".join(Style), help=PROGRESS_HELP)]
ParamsOption = Annotated[
    Path | None, Option(help="Settings file (default: params.yaml, if there is one).")
]
OS_ADVICE = "check the path, its permissions and the space left on the disk"


class Result(Protocol):
    """What a command returns; it may have ``failures()``, lines, and an ``exit_code`` (else 6)."""

    def text(self) -> str:
        """Return it for a person."""

    def as_json(self) -> dict[str, Any]:
        """Return it for a machine."""


C = TypeVar("C", bound=Callable[..., Result])


def command(group: typer.Typer, /, *, params_file: bool = True, **helps: Any) -> Callable[[C], C]:
    """Make a command of a function, with its own options and those that every command has.

    The function is given the validated settings as ``config`` and, if it asks for it, a display as
    ``progress``. What it returns is printed; an error becomes one line and an exit code.

    Args:
        params_file: whether settings come from a file; else they are the defaults.
        helps: the help of each of the function's options, or an ``Option`` or ``Argument``.
    """

    def register(function: C) -> C:
        own = dict(inspect.signature(function).parameters)
        is_long = "progress" in own

        def run(
            *,
            params: ParamsOption = None,
            overrides: Annotated[
                list[str] | None,
                Option("--set", metavar="KEY=VALUE", help="Override a setting, e.g. seed=5."),
            ] = None,
            as_json: Annotated[bool, Option("--json", help="Print one JSON object.")] = False,
            debug: Annotated[bool, Option("--debug", help="Show an error's traceback.")] = False,
            progress: ProgressOption = Style.AUTO,
            **given: Any,
        ) -> None:
            with _errors(debug, progress), _sigterm_as_ctrl_c():
                from pipeline.params import load_config

                _log_to_stderr(progress, logging.DEBUG if debug else logging.INFO)
                file = (params or _default_params()) if params_file else None
                config = load_config(file, tuple(overrides or ()))
                with console_progress(progress) if is_long else nullcontext() as display:
                    result = function(config, **given | ({"progress": display} if is_long else {}))
            _show(result, as_json, progress)

        common = dict(inspect.signature(run).parameters)
        every = {key: own[key] for key in own if key not in common} | common
        shown = {"config": False, "given": False, "params": params_file}
        options = [_option(every[key], helps.get(key)) for key in every if shown.get(key, True)]
        run.__annotations__ = {each.name: each.annotation for each in options}
        run.__signature__ = inspect.Signature(options)  # type: ignore[attr-defined]
        run.__name__ = function.__name__.rstrip("_")  # `import_`, as Python keeps `import`
        run.__doc__ = function.__doc__
        group.command(cls=_Command)(run)
        return function

    return register


class _Command(TyperCommand):
    """A command that takes no empty text: as a path it would stand for the current folder."""

    def parse_args(self, ctx: Context, args: list[str]) -> list[str]:
        """Refuse what a variable of the shell leaves that has no value; then parse."""
        given = [] if ctx.resilient_parsing else args  # completing, it may be empty still
        with _errors("--debug" in args, Style.AUTO):
            for before, each in pairwise([str(self.name), *given]):
                if not each or (each.startswith("--") and each.find("=") == len(each) - 1):
                    where = each or f"empty text after {before}"
                    raise ConfigError(
                        f"{where}: found none, expected a value; is a variable unset?"
                    )
        return super().parse_args(ctx, args)


def can_ask() -> bool:
    """Return whether somebody is there to answer a question."""
    return sys.stdin.isatty()


def _default_params() -> Path | None:
    """Return the settings file of the current folder; without one, say that the defaults serve."""
    path = Path("params.yaml")
    if os.path.lexists(path):
        return path
    log.info("no %s in the current folder; the defaults serve", path)
    return None


def _option(parameter: inspect.Parameter, given: Any) -> inspect.Parameter:
    """Return a keyword-only parameter with this help, or with this ``Option`` or ``Argument``."""
    option = Option(help=given) if isinstance(given, str) else given
    annotation = parameter.annotation if given is None else Annotated[parameter.annotation, option]
    return parameter.replace(kind=parameter.KEYWORD_ONLY, annotation=annotation)


class _OnStderr(logging.Handler):
    """Writes to stderr as it is at the time: above bars, each record on lines of its own."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            print(self.format(record), file=sys.stderr, flush=True)
        except Exception:
            self.handleError(record)


class _AsJson(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return _event(record.levelname.lower(), record.getMessage())


def _log_to_stderr(style: Style, level: int) -> None:
    """Write what is logged to stderr, from ``level`` on what is samfed's."""
    handler = _OnStderr()
    as_json = style is Style.JSON
    handler.setFormatter(_AsJson() if as_json else logging.Formatter("%(levelname)s: %(message)s"))
    logging.basicConfig(handlers=[handler], force=True)
    logging.getLogger("samfed").setLevel(level)


def _event(event: str, message: str) -> str:
    return to_json({"event": event, "message": message}, sort_keys=False)


def _tell(event: str, message: str, style: Style) -> None:
    """Write one line to stderr that says how a command ended."""
    line = _event(event, message) if style is Style.JSON else f"{event}: {message}"
    typer.echo(line, err=True)


@contextmanager
def _errors(debug: bool, style: Style) -> Iterator[None]:
    """Turn an error into one line on stderr and an exit code, unless ``debug`` asks for more."""
    try:
        yield
    except (SamfedError, OSError, KeyboardInterrupt) as error:
        if debug or isinstance(error, BrokenPipeError):
            raise
        event, line = "error", str(error)
        code = getattr(error, "exit_code", SamfedError.exit_code)
        if isinstance(error, OSError):
            where = f"{error.filename}: " if error.filename is not None else ""
            line = f"{where}{error.strerror or error}; {OS_ADVICE}"
        elif isinstance(error, KeyboardInterrupt):
            by_signal = isinstance(error, Terminated)
            code = EXIT_TERMINATED if by_signal else EXIT_INTERRUPTED
            event = "terminated" if by_signal else "interrupted"
            line = "run the same command again to continue"
        _tell(event, line, style)
        raise typer.Exit(code) from error


@contextmanager
def _sigterm_as_ctrl_c() -> Iterator[None]:
    """Raise ``Terminated`` where SIGTERM comes, so that everything ends in order."""

    def terminate(number: int, frame: FrameType | None) -> NoReturn:
        raise Terminated

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _show(result: Result, as_json: bool, style: Style) -> None:
    """Print a result, and name on stderr what it failed to do."""
    typer.echo(to_json(result.as_json(), sort_keys=False) if as_json else result.text())
    failures = getattr(result, "failures", list[str])()
    for line in failures:
        _tell("error", line, style)
    if failures:
        raise typer.Exit(getattr(result, "exit_code", EXIT_PARTIAL))
