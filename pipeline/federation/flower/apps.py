"""What Flower's SuperLink and SuperNode run: the server loop, and a client's answer."""

from __future__ import annotations

import json
import logging
from functools import partial
from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.supercore.inflatable.inflatable_utils import pull_objects

from pipeline.config import Config
from pipeline.errors import ConfigError
from pipeline.federation.flower.engine import over_grid
from pipeline.federation.flower.letters import Letter
from pipeline.federation.flower.site import Site, reply_to
from pipeline.federation.server import federate
from pipeline.params import load_config, parse_config, with_settings

_RETRY_SECONDS = 0.05
_MODES = ("auto", "resume", "restart")

server_app = ServerApp()
client_app = ClientApp()


@server_app.main()
def serve(grid: Grid, context: Context) -> None:
    """Run stage two where the SuperLink is, with the settings that the run's configuration names.

    The run's folder is ``runs/<name>/`` in the cache of these settings.
    """
    logging.basicConfig(format="%(levelname)s: %(message)s", force=True)
    logging.getLogger("samfed").setLevel(logging.INFO)
    given = {key: str(value) for key, value in context.run_config.items()}
    # a reply's last piece is mostly there after milliseconds; Flower looks again after a second
    assert pull_objects.__kwdefaults__ is not None
    pull_objects.__kwdefaults__["initial_backoff"] = _RETRY_SECONDS
    mode = given.get("mode", "auto")
    if mode not in _MODES:
        raise ConfigError(f"flwr run: mode: found '{mode}', expected one of {', '.join(_MODES)}")
    registered = {int(node): name for node, name in json.loads(given.get("nodes") or "{}").items()}
    connect = partial(over_grid, grid, registered=registered)
    federate(_settings(given), mode=mode, connect=connect)


@client_app.query()
def respond(message: Message, context: Context) -> Message:
    """Answer one message of the server's from this site's own folders."""
    site = Site.of(dict(context.node_config))
    letter = Letter.unpack(message.content)
    return Message(reply_to(letter, site, lambda about: False).pack(), reply_to=message)


def _settings(given: dict[str, str]) -> Config:
    """Return the settings: as JSON from ``samfed federate``, or a file named to ``flwr run``."""
    if given.get("settings"):
        return parse_config(json.loads(given["settings"]), source="samfed federate")
    if not given.get("params"):
        raise ConfigError(
            "flwr run: found no params, expected a settings file on the SuperLink's machine; "
            """give --run-config 'params="/srv/samfed/params.yaml"'"""
        )
    config = load_config(Path(given["params"]))
    return with_settings(config, "flwr run", federate={"name": given.get("name") or None})
