"""What comes before the first stage: images, settings, and whether everything fits."""

# Annotations are evaluated here, unlike elsewhere: typer makes options of them.

import logging
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from typer import Argument, Option

from pipeline import console
from pipeline.console import Result, command
from pipeline.errors import ConfigError
from pipeline.progress import Progress

if TYPE_CHECKING:
    from pipeline.config import Config

app = typer.Typer(no_args_is_help=True)


@command(
    app,
    params_file=False,
    out="Folder for data, cache and report.",
    seed=Option(min=0, help="Seed of partition, teacher and rounds (default: 0)."),
    method="Methods to compare (default: supervised, fedavg_ssl, sam_fed).",
)
def demo(
    config: "Config",
    progress: Progress,
    out: Path = Path("cache/demo"),
    seed: int | None = None,
    method: list[str] | None = None,
) -> Result:
    """Run the whole pipeline on generated images and compare three methods; CPU, minutes."""
    from pipeline.results.demo import demo_config, run_demo

    return run_demo(demo_config(config, out, seed=seed), methods=method, progress=progress)


@command(
    app,
    name=Argument(metavar="[NAME]", help="What to get (default: list all names)."),
    out="Folder for it (default: weights, or data/NAME).",
    yes=Option("--yes", help="Accept the licence without being asked."),
)
def fetch(
    config: "Config",
    progress: Progress,
    name: str | None = None,
    out: Path | None = None,
    yes: bool = False,
) -> Result:
    """Download public weights or a public data set, once its licence and size are accepted."""
    from pipeline.data.catalogue import SOURCES
    from pipeline.data.fetching import Listing, fetch, offer

    if name is None:
        return Listing(SOURCES)
    offered = offer(name, out=out, cache=config.cache.root)
    if not yes and not console.can_ask():
        raise ConfigError(f"fetch: cannot ask here; give --yes to accept {offered.terms}")
    if yes:
        logging.getLogger("samfed").info(offered.text())
    else:
        typer.echo(offered.text(), err=True)
        typer.confirm("Accept the licence and download?", abort=True, err=True)
    return fetch(offered, progress=progress)


@command(app, out=Argument(help="Folder to write, in the input layout."))
def synth(config: "Config", progress: Progress, out: Path) -> Result:
    """Generate the embedded default data set: four sites of dermoscopy-like images with masks."""
    from pipeline.data.synthetic import write_dataset

    return write_dataset(out, **config.synth.model_dump(), progress=progress)


@command(
    app,
    params_file=False,
    kind=Argument(help="What it is, as docs/public.md lists: isic2018, kvasir-seg, nifti, ..."),
    source=Argument(help="Folder or archive; it is only read."),
    out=Argument(help="Folder to write, in the input layout."),
    labels="Where labels lie, {} being an image's name: '{}_seg', '../labels/{}' (nifti, dicom).",
    axis="Plane of slices: axial, coronal, sagittal (default: as acquired).",
    window=Option(metavar="CENTER,WIDTH", help="Values that become 0..255 (default: percentiles)."),
    drop_empty=Option("--drop-empty", help="Leave out slices whose mask is empty."),
)
def import_(
    config: "Config",
    progress: Progress,
    kind: str,
    source: Path,
    out: Path,
    labels: str | None = None,
    axis: str | None = None,
    window: str | None = None,
    drop_empty: bool = False,
) -> Result:
    """Bring a public data set, NIfTI volumes or DICOM series into the input layout."""
    from pipeline.data.importers.importing import import_data
    from pipeline.data.importers.items import Options, parse_window

    options = Options(labels, axis, parse_window(window), drop_empty)
    return import_data(kind, source, out, options=options, progress=progress)


@command(app, distance=Option(min=0, max=32, help="Bits of 64 that differ at most."))
def duplicates(config: "Config", progress: Progress, distance: int = 4) -> Result:
    """List images of different groups that look alike, by perceptual hash; changes nothing."""
    from pipeline.data.duplicates import find_duplicates

    return find_duplicates(config, distance=distance, progress=progress)


@command(
    app,
    params_file=False,
    folder=Argument(help="Folder with images/ and masks/; it is only read."),
    out="Settings file to write.",
    force=Option("--force", help="Replace a file that is there."),
)
def init(
    config: "Config", folder: Path, out: Path = Path("params.yaml"), force: bool = False
) -> Result:
    """Look at a folder of images and write commented settings that suit it."""
    from pipeline.setup.init import init

    return init(folder, out, force=force)


@command(app)
def doctor(config: "Config") -> Result:
    """Say whether this machine, the settings and the data will do; exit code 1 if not."""
    from pipeline.setup.doctor import examine

    return examine(config)
