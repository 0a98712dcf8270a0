"""``samfed site``: what a hospital runs by itself."""

# Annotations are evaluated here, unlike elsewhere: typer makes options of them.

from pathlib import Path
from typing import TYPE_CHECKING

import typer
from typer import Argument

from pipeline.commands.options import INSECURE, KEY, ROOT_CERTIFICATES, SUPERLINK
from pipeline.console import Result, command

if TYPE_CHECKING:
    from pipeline.config import Config

app = typer.Typer(help="What a hospital runs by itself.", no_args_is_help=True)


@command(
    app,
    superlink=SUPERLINK,
    root_certificates=ROOT_CERTIFICATES,
    key=KEY,
    insecure=INSECURE,
)
def doctor(
    config: "Config",
    superlink: str | None = None,
    root_certificates: Path | None = None,
    key: Path | None = None,
    insecure: bool = False,
) -> Result:
    """Say whether this site can take part: images, labels, keys, server; exit code 1 if not."""
    from pipeline.setup.site import Reach, examine_site

    return examine_site(config, Reach(superlink, root_certificates, key, insecure))


@command(
    app,
    name="Client that this site is.",
    superlink=SUPERLINK,
    root_certificates=ROOT_CERTIFICATES,
    key=KEY,
    insecure=INSECURE,
)
def run(
    config: "Config",
    name: str,
    superlink: str,
    root_certificates: Path | None = None,
    key: Path | None = None,
    insecure: bool = False,
) -> Result:
    """Take part in stage two as one client, from this site's own cache, until it is stopped."""
    from pipeline.federation.places import Places

    places = Places(superlink=superlink, root_certificates=root_certificates, insecure=insecure)
    places.serve(config, name, key)


@command(app, run=Argument(metavar="[RUN]", help="Run (default: federate.name)."))
def audit(config: "Config", run: str | None = None) -> Result:
    """Show what left this site in a run: a line for each answer, with the bytes of every field."""
    from pipeline.federation.audit import audit

    return audit(config, run)
