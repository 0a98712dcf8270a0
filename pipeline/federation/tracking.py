"""``samfed federate --tensorboard``: a run's history as TensorBoard shows it, while it grows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.errors import ConfigError

Entry = dict[str, Any]
Track = Callable[[Entry], None]  # is told each round of the run, from the first

EVENTS = "events.out.tfevents.*"  # TensorBoard's files


@contextmanager
def following(folder: Path | None, name: str) -> Iterator[Track | None]:
    """Write rounds to ``folder``/``name`` for TensorBoard, in place of what was there of a run.

    Without a folder nothing is written, and nothing needs to be told.

    A run that is continued tells its earlier rounds again, so that each is there once, as in the
    history, whatever a killed run had written.

    Raises:
        ConfigError: the extra is missing.
    """
    if folder is None:
        yield None
        return
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ConfigError(
            "--tensorboard: tensorboard is not installed; run pip install 'samfed[tracking]'"
        ) from error
    for file in (folder / name).glob(EVENTS):
        file.unlink()
    with SummaryWriter(str(folder / name)) as writer:

        def track(entry: Entry) -> None:
            for name, value in scalars(entry).items():
                writer.add_scalar(name, value, entry["round"])
            writer.flush()

        yield track


def scalars(entry: Entry) -> dict[str, float]:
    """Return the numbers of a round of the history, by name: ``val_dice/all``, ``loss/<client>``.

    The quantity comes first, so that clients share a chart's group; ``server`` is the server's.
    """
    found = {f"round/{key}": value for key, value in entry.items() if key != "round"}
    found["val_dice/all"] = entry["val"]["dice"]
    found |= {f"val_dice/{name}": dice for name, dice in entry["val"]["clients"].items()}
    for name, report in ({"server": entry["server"]} | entry["clients"]).items():
        found |= {f"{key}/{name}": value for key, value in report.items()}
    return {key: float(value) for key, value in found.items() if isinstance(value, int | float)}
