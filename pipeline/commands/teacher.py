"""``samfed teacher``: carry the adapted teacher from the server to a site."""

# Annotations are evaluated here, unlike elsewhere: typer makes options of them.

from pathlib import Path
from typing import TYPE_CHECKING

import typer
from typer import Argument, Option

from pipeline.console import Result, command

if TYPE_CHECKING:
    from pipeline.config import Config

app = typer.Typer(
    help="Carry the adapted teacher from the server to a site, as one file.", no_args_is_help=True
)


@command(
    app,
    file=Argument(help="File to write: a zip of JSON and safetensors."),
    base=Option("--base", help="Also SAM's own weights, for sites that cannot fetch them."),
    onnx=Option("--onnx", help="Also the model that `samfed export-onnx` wrote."),
)
def export(config: "Config", file: Path, base: bool = False, onnx: bool = False) -> Result:
    """Write the teacher to FILE: its card, what was adapted, and their digests."""
    from pipeline.sam.transfer import export_teacher

    return export_teacher(config, file, with_base=base, with_onnx=onnx)


@command(app, file=Argument(help="File that `samfed teacher export` wrote."))
def import_(config: "Config", file: Path) -> Result:
    """Take the server's teacher into this site's cache; then run `samfed precompute-sam`."""
    from pipeline.sam.transfer import import_teacher

    return import_teacher(config, file)
