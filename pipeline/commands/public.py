"""``samfed public``: carry the server's labelled set to a site."""

# Annotations are evaluated here, unlike elsewhere: typer makes options of them.

from pathlib import Path
from typing import TYPE_CHECKING

import typer
from typer import Argument

from pipeline.console import Result, command

if TYPE_CHECKING:
    from pipeline.config import Config

app = typer.Typer(
    help="Carry the server's labelled set, which stage two needs everywhere, to a site.",
    no_args_is_help=True,
)


@command(app, file=Argument(help="File to write: a zip of JSON and safetensors."))
def export(config: "Config", file: Path) -> Result:
    """Write the server's set to FILE: images at data.image_size, labels, SAM's labels, digests."""
    from pipeline.data.public import export_public

    return export_public(config, file)


@command(app, file=Argument(help="File that `samfed public export` wrote."))
def import_(config: "Config", file: Path) -> Result:
    """Take the server's set into this site's cache, for `samfed federate`."""
    from pipeline.data.public import import_public

    return import_public(config, file)
