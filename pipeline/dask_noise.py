"""What dask logs of a stop that is in order: news to nobody, and kept out of the log.

dask imports this module in each worker process that we start (``preload``).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

#: How the messages begin of a worker whose task is cancelled, or whose scheduler is closed.
_OF_A_STOP = (
    "Async instruction for ",
    "Failed to communicate with scheduler during heartbeat",
)
_WORKERS = ("distributed.worker", "distributed.worker.state_machine")


def dask_setup(worker: object) -> None:
    """Keep a worker's messages of its end out of its log; dask calls this where it starts one."""
    for name in _WORKERS:
        logging.getLogger(name).addFilter(_is_no_stop)


def _is_no_stop(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(_OF_A_STOP)


@contextmanager
def interrupted_quietly() -> Iterator[None]:
    """Keep an interrupted call of dask's from printing a traceback of its own.

    Where a signal arrives before the event loop began with the call, what cancels the call finds
    nothing to cancel: ``distributed.utils.sync`` then raises a NameError in the loop.
    """
    loops = logging.getLogger("tornado.application")
    loops.addFilter(_is_no_name_error)
    try:
        yield
    finally:
        loops.removeFilter(_is_no_name_error)


def _is_no_name_error(record: logging.LogRecord) -> bool:
    return not (record.exc_info and isinstance(record.exc_info[1], NameError))
