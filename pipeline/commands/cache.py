"""``samfed cache``: look into, check, mend and clear the stores."""

# Annotations are evaluated here, unlike elsewhere: typer makes options of them.

from pathlib import Path
from typing import TYPE_CHECKING

import typer
from typer import Argument, Option

from pipeline import console
from pipeline.commands.options import SCHEDULER, WORKERS
from pipeline.console import Result, command
from pipeline.errors import ConfigError
from pipeline.progress import Progress

if TYPE_CHECKING:
    from pipeline.config import Config

app = typer.Typer(help="Look into, check, mend and clear the stores.", no_args_is_help=True)


@command(app)
def info(config: "Config") -> Result:
    """Show what the label stores hold: rows done, teacher, provenance, size."""
    from pipeline.labelling.maintenance import info

    return info(config)


@command(app)
def verify(config: "Config", progress: Progress) -> Result:
    """Read every store whole and name each row that is damaged; exit code 5 if there is one."""
    from pipeline.labelling.maintenance import verify

    return verify(config, progress=progress)


@command(app, scheduler=SCHEDULER, workers=WORKERS)
def repair(
    config: "Config", progress: Progress, scheduler: str | None = None, workers: int | None = None
) -> Result:
    """Label anew what is damaged in the label stores, and finish these stores."""
    from pipeline.cluster import choose_cluster
    from pipeline.labelling.repair import repair

    device = config.precompute.device
    cluster = choose_cluster(scheduler=scheduler, workers=workers, device=device)
    return repair(config, cluster=cluster, progress=progress)


@command(
    app,
    client=Argument(help="A client's name, or server."),
    image_id=Argument(metavar="ID", help="Id of one of its images that SAM labels."),
    out="PNG to write (default: show/CLIENT/ID.png in the cache).",
)
def show(config: "Config", client: str, image_id: str, out: Path | None = None) -> Result:
    """Show one image, SAM's label on it and the confidence, as a picture and in numbers."""
    from pipeline.results.inspection import show

    return show(config, client, image_id, out=out)


@command(
    app,
    ome_zarr=Option(metavar="FOLDER", help="Write CLIENT.ome.zarr for each client to this folder."),
    client="Only this client, or server (may be repeated).",
)
def export(
    config: "Config", progress: Progress, ome_zarr: Path, client: list[str] | None = None
) -> Result:
    """Write images, SAM's labels and their confidence for other viewers, as OME-Zarr 0.5."""
    from pipeline.results.inspection import export

    return export(config, ome_zarr, clients=client or (), progress=progress)


@command(
    app,
    yes=Option("--yes", help="Remove without asking."),
    dry_run=Option("--dry-run", help="Only list."),
)
def prune(config: "Config", yes: bool = False, dry_run: bool = False) -> Result:
    """Remove label stores moved aside, fetched archives, and what killed runs left behind."""
    from pipeline.labelling.maintenance import prune, removable

    found = removable(config)
    if dry_run or not found.found:
        return found
    if not yes and not console.can_ask():
        raise ConfigError("cache prune: cannot ask here; give --yes to remove, --dry-run to list")
    if not yes:
        typer.confirm(f"{found.text()}\nRemove all of these?", abort=True, err=True)
    return prune(config, found)


@command(app, yes=Option("--yes", help="Clear them; without, only list."))
def unlock(config: "Config", yes: bool = False) -> Result:
    """List or clear locks that name another host, as those of a container that was restarted."""
    from pipeline.disk import unlock

    return unlock(config.cache.root / "locks", clear=yes)
