"""A client's site: what it answers to the server's letters, from its own folders."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from pipeline.config import Config
from pipeline.errors import SamfedError, StageError, first_line, one_line
from pipeline.federation.audit import note_sent, sent_file
from pipeline.federation.flower.letters import Letter
from pipeline.federation.hosting import VERSION, Run, answer
from pipeline.federation.inputs import ClientContext
from pipeline.federation.sites import at_site
from pipeline.params import load_config

log = logging.getLogger("samfed.site")


def told(context: ClientContext) -> str:
    """Return as JSON what a client is told of a run; no folder of the server, and no rows."""
    config = context.config
    nowhere = {
        "data": config.data.model_copy(update={"root": Path()}),
        "cache": config.cache.model_copy(update={"root": Path()}),
    }
    bare = replace(context, config=config.model_copy(update=nowhere), train=(), val=(), test=())
    return bare.to_json().decode()


@dataclass(frozen=True)
class Site:
    """One client's place: its name, and its own settings, which say where its cache lies."""

    name: str
    config: Config

    @staticmethod
    def of(node_config: dict[str, object]) -> Site:
        """Return the site that a node's configuration names: ``client`` and ``params``.

        Raises:
            ConfigError: the settings cannot be read. StageError: no client is named.
        """
        name, params = str(node_config.get("client", "")), str(node_config.get("params", ""))
        if not name or not params:
            raise StageError(
                f"node config: found {node_config}, expected client and params; start the "
                """SuperNode with --node-config 'client="site_a" params="/srv/site/params.yaml"'"""
            )
        return Site(name, load_config(Path(params)))

    def context(self, letter: Letter) -> ClientContext:
        """Return what the client needs: what the server tells it, joined with what is here.

        Raises:
            SamfedError: this site is another client, runs another samfed, or does not fit.
        """
        if letter.version != VERSION:
            raise SamfedError(
                f"found samfed {VERSION}, expected {letter.version} as at the server; install it"
            )
        context = ClientContext.from_json(letter.told.encode())
        if context.name != self.name:
            raise SamfedError(f"it is asked as {context.name}; see the server's log")
        try:
            return at_site(context, self.config)
        except SamfedError as error:  # the server is told why
            file = sent_file(self.config.cache.root, context.config.federate.name, self.name)
            note_sent(file, "entry", 0, {"error": str(error)})
            raise


def reply_to(letter: Letter, site: Site, at_work: Callable[[str], bool]) -> Letter:
    """Return a site's answer; whatever goes wrong here is named in it.

    Args:
        at_work: says whether the site is at work on a request.
    """
    reply = Letter(letter.kind, client=site.name, version=VERSION, about=letter.about)
    try:
        if letter.kind == "who":
            return reply
        if letter.kind == "busy":
            return replace(reply, at_work=at_work(letter.about))
        context = site.context(letter).to_json()
        body = letter.body if letter.kind == "ask" else None
        run = Run(letter.run)
        return replace(reply, body=answer(run, context, body, letter.state_round))
    except SamfedError as error:
        log.error("%s", one_line(str(error)))  # it may quote what the server said
        return replace(reply, error=str(error).removeprefix(f"{site.name}: "))
    except Exception as error:  # the server is told, whatever it is, and goes on without us
        log.exception("%s: no reply to the server", site.name)
        return replace(reply, error=f"{type(error).__name__}: {first_line(error)}")
