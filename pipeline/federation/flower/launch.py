"""Start stage two at a SuperLink, and follow it to its end."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flwr.app.user_config import UserConfig
from flwr.cli.build import build_fab_from_disk
from flwr.common.serde import fab_to_proto, user_config_to_proto
from flwr.proto.control_pb2 import (
    ListNodesRequest,
    ListRunsRequest,
    StartRunRequest,
    StopRunRequest,
)
from flwr.proto.run_pb2 import RunStatus
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.fab import Fab

from pipeline.config import Config
from pipeline.errors import NetworkError, SamfedError
from pipeline.federation.diagnostics import round_note
from pipeline.federation.flower.link import Link, UnreachableError
from pipeline.federation.runs import RunFolder
from pipeline.federation.tracking import Track
from pipeline.params import absolute
from pipeline.progress import Progress

log = logging.getLogger("samfed.flower")

APP = Path(__file__).parent / "app"  # Flower's bundle: two names of the installed samfed
GONE_SECONDS = 30.0  # without an answer, before a SuperLink counts as gone
_POLL_SECONDS = 0.5
_FAILED = "ServerApp failed with exception: "  # before what a ServerApp raised


def launch(
    config: Config,
    link: Link,
    *,
    mode: str = "auto",
    progress: Progress | None = None,
    track: Track | None = None,
) -> RunFolder:
    """Run stage two at a SuperLink, which must see ``cache.root`` under this path.

    Its ServerApp is the server, and writes the run's folder. Whoever stops this command stops it.

    Raises:
        NetworkError: no SuperLink is there, is to be trusted, or takes the run.
        SamfedError: what the ServerApp raised, or that it died.
    """
    content = build_fab_from_disk(APP)
    given: UserConfig = {"settings": absolute(config).model_dump_json(), "mode": mode}
    run = RunFolder(config.cache.root / "runs" / config.federate.name)
    with link.open(ControlHttpClient, "flwr CLI") as control:
        with link.reaching():
            given["nodes"] = json.dumps(_registered(control))
            request = StartRunRequest(
                fab=fab_to_proto(Fab(hashlib.sha256(content).hexdigest(), content, {})),
                override_config=user_config_to_proto(given),
            )
            number = control.StartRun(request).run_id
        with _stopped_with_us(control, link, number):
            _follow(_Statuses(control, link, number), run, _Display(config, progress, track))
    return run


def _registered(control: ControlHttpClient) -> dict[int, str]:
    """Return the names that keys are registered with, by node: `flwr supernode register --name`."""
    nodes = control.ListNodes(ListNodesRequest()).nodes_info
    return {node.node_id: node.name for node in nodes if node.name}


class _Statuses:
    """A run's status at the SuperLink, each time that it is looked at."""

    def __init__(self, control: ControlHttpClient, link: Link, number: int) -> None:
        self._control, self._link, self._number = control, link, number

    def __iter__(self) -> Iterator[RunStatus]:
        """Yield it, until the run is over.

        Raises:
            NetworkError: the SuperLink is gone, or has forgotten the run.
        """
        heard = time.monotonic()
        while True:
            try:
                with self._link.reaching():
                    request = ListRunsRequest(run_id=self._number)
                    found = self._control.ListRuns(request).run_dict[self._number].status
                heard = time.monotonic()
                yield found
                if found.status == "finished":
                    return
            except UnreachableError as error:
                if time.monotonic() - heard > GONE_SECONDS:
                    raise NetworkError(
                        f"{error}; finished rounds are kept: start it again, and run the same "
                        "command to continue"
                    ) from error
            time.sleep(_POLL_SECONDS)


@dataclass(frozen=True)
class _Display:
    """Who is told of each round."""

    config: Config
    progress: Progress | None
    track: Track | None

    def show(self, entry: dict[str, Any]) -> None:
        """Tell them of a round of the history."""
        settings, number = self.config.federate, entry["round"]
        for warning in entry["warnings"]:
            log.warning("round %d: %s", number, warning)
        if self.progress is not None:
            note = round_note(entry)
            self.progress(f"{settings.method}: rounds", number, settings.played_rounds, note)
        if self.track is not None:
            self.track(entry)


def _follow(statuses: _Statuses, run: RunFolder, display: _Display) -> None:
    """Show rounds as the ServerApp finishes them.

    Raises:
        SamfedError: it did not end well.
    """
    shown, status = 0, RunStatus()
    for status in statuses:
        history = run.history() if status.status != "pending" else []
        for entry in history[shown:]:
            display.show(entry)
        shown = len(history)  # fewer than before where the run begins anew
    if status.sub_status != "completed":
        reason = status.details.removeprefix(_FAILED) or f"the run ended as {status.sub_status}"
        raise SamfedError(reason.splitlines()[0])


@contextmanager
def _stopped_with_us(control: ControlHttpClient, link: Link, number: int) -> Iterator[None]:
    """Stop the run where this command is interrupted."""
    try:
        yield
    except KeyboardInterrupt:
        with suppress(NetworkError), link.reaching():
            control.StopRun(StopRunRequest(run_id=number))
        raise
