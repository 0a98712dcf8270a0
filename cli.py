"""samfed's command line: one command per stage, no logic. Heavy imports stay inside commands."""

# Annotations are evaluated here, unlike elsewhere: typer makes options of them.

import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer import Argument, Option

from pipeline import __version__
from pipeline.console import Result, command
from pipeline.errors import ConfigError
from pipeline.progress import Progress

if TYPE_CHECKING:
    from pipeline.config import Config

SCHEDULER = Option(metavar="ADDRESS", help="Label on the workers of this dask scheduler (or file).")
WORKERS = Option(min=1, help="Label in so many processes here: one per GPU, or sharing the cores.")
SUPERLINK = Option(metavar="HOST:PORT", help="Flower's SuperLink.")
ROOT_CERTIFICATES = Option(
    metavar="FILE", help="Authority that signed the SuperLink's certificate."
)
KEY = Option(metavar="FILE", help="This site's private key, whose public one is registered.")
INSECURE = Option("--insecure", help="Without TLS: whoever is between reads and changes all.")

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)
cache_app = typer.Typer(help="Look into, check, mend and clear the stores.", no_args_is_help=True)
app.add_typer(cache_app, name="cache")
teacher_app = typer.Typer(
    help="Carry the adapted teacher from the server to a site, as one file.", no_args_is_help=True
)
app.add_typer(teacher_app, name="teacher")
public_app = typer.Typer(
    help="Carry the server's labelled set, which stage two needs everywhere, to a site.",
    no_args_is_help=True,
)
app.add_typer(public_app, name="public")
site_app = typer.Typer(help="What a hospital runs by itself.", no_args_is_help=True)
app.add_typer(site_app, name="site")


def can_ask() -> bool:
    """Return whether somebody is there to answer a question."""
    return sys.stdin.isatty()


def _version(value: bool) -> None:
    if value:
        typer.echo(f"samfed {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Federated medical segmentation from few labels, guided by a Segment Anything teacher."""


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
    if not yes and not can_ask():
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


@command(
    app,
    with_oracle=Option("--with-oracle", help="Also store the labels that `oracle` alone reads."),
    allow_duplicates=Option("--allow-duplicates", help="Keep groups apart that share an image."),
    site=Option(metavar="NAME", help="All images are this site's; names nobody else's."),
    server=Option("--server", help="All images are the server's; takes its labelled set alone."),
    data=Option(metavar="DIR", help="Folder with images/ (default: data.root)."),
)
def prepare(
    config: "Config",
    progress: Progress,
    with_oracle: bool = False,
    allow_duplicates: bool = False,
    site: str | None = None,
    server: bool = False,
    data: Path | None = None,
) -> Result:
    """Partition data.root over server and clients and write the image stores."""
    from pipeline.data.prepare import alone, prepare
    from pipeline.params import with_settings
    from pipeline.setup.fit import check_networks, name_traps

    owner = alone(site, server=server)
    config = with_settings(config, "--data", data={"root": data})
    check_networks(config)
    name_traps(config)
    return prepare(
        config,
        owner=owner,
        with_oracle=with_oracle,
        allow_duplicates=allow_duplicates,
        progress=progress,
    )


@command(app, distance=Option(min=0, max=32, help="Bits of 64 that differ at most."))
def duplicates(config: "Config", progress: Progress, distance: int = 4) -> Result:
    """List images of different groups that look alike, by perceptual hash; changes nothing."""
    from pipeline.data.duplicates import find_duplicates

    return find_duplicates(config, distance=distance, progress=progress)


@command(app)
def finetune_sam(config: "Config", progress: Progress) -> Result:
    """Adapt the teacher to the server's labelled set."""
    from pipeline.sam.finetune import finetune

    return finetune(config, progress=progress)


@command(app, out="Folder for page and numbers (default: the cache).")
def evaluate_sam(config: "Config", progress: Progress, out: Path | None = None) -> Result:
    """Measure SAM, adapted and as it comes, on the server's calibration part, before any round."""
    from pipeline.results.evaluate_teacher import evaluate_teacher

    return evaluate_teacher(config, out=out, progress=progress)


@command(app, out="File to write (default: onnx/teacher.onnx in the cache).")
def export_onnx(config: "Config", progress: Progress, out: Path | None = None) -> Result:
    """Write the adapted teacher as one ONNX model, for `precompute-sam --backend onnx`."""
    from pipeline.sam.export import export_teacher

    return export_teacher(config, out, progress=progress)


@command(
    app,
    client="Only this client (may be repeated).",
    scheduler=SCHEDULER,
    workers=WORKERS,
    backend="torch or onnx (default: precompute.backend).",
)
def precompute_sam(
    config: "Config",
    progress: Progress,
    client: list[str] | None = None,
    scheduler: str | None = None,
    workers: int | None = None,
    backend: str | None = None,
) -> Result:
    """Stage one: label every client's images with the teacher, once."""
    from pipeline.cluster import choose_cluster
    from pipeline.labelling.precompute import precompute
    from pipeline.params import with_settings

    config = with_settings(config, "--backend", precompute={"backend": backend})
    device = config.precompute.device
    cluster = choose_cluster(scheduler=scheduler, workers=workers, device=device)
    return precompute(config, clients=tuple(client or ()), cluster=cluster, progress=progress)


@command(
    app,
    name="Run (default: federate.name).",
    engine="here, dask or flower (default: what the other options ask for).",
    scheduler=Option(metavar="ADDRESS", help="Run clients on the workers of this dask scheduler."),
    workers=Option(min=1, help="Run clients in so many processes here."),
    superlink=SUPERLINK,
    root_certificates=ROOT_CERTIFICATES,
    insecure=INSECURE,
    resume=Option("--resume", help="Only continue; never begin anew."),
    restart=Option("--restart", help="Begin anew; an earlier run is moved aside."),
    tensorboard=Option(metavar="FOLDER", help="Also write the rounds to FOLDER/NAME."),
)
def federate(
    config: "Config",
    progress: Progress,
    name: str | None = None,
    engine: str | None = None,
    scheduler: str | None = None,
    workers: int | None = None,
    superlink: str | None = None,
    root_certificates: Path | None = None,
    insecure: bool = False,
    resume: bool = False,
    restart: bool = False,
    tensorboard: Path | None = None,
) -> Result:
    """Stage two: federated rounds on the cached labels."""
    if resume and restart:
        raise ConfigError("--resume and --restart: give one of them")
    from pipeline.federation.places import Places
    from pipeline.federation.tracking import following
    from pipeline.params import with_settings

    config = with_settings(config, "--name", federate={"name": name})
    mode = "resume" if resume else "restart" if restart else "auto"
    places = Places(engine, scheduler, workers, superlink, root_certificates, insecure)
    with following(tensorboard, config.federate.name) as track:
        return places.federate(config, mode=mode, progress=progress, track=track)


@command(
    app,
    model=Argument(help="Run (its name or folder), or a file that `samfed export` wrote."),
    images=Argument(help="Images or NIfTI volumes, or folders of them."),
    out="Folder for masks and predictions.csv; what is finished there is kept.",
    client="This client's own model, where clients have networks of their own.",
    teacher=Option("--teacher", help="Predict with SAM, as the run's settings ask for it."),
    probabilities=Option("--probabilities", help="Also write a probability map of each class."),
    overlays=Option("--overlays", help="Also write the images with their masks over them."),
    tiff=Option("--tiff", help="Write masks as TIFF instead of indexed PNG."),
    batch_size=Option(min=1, help="Images (or slices) at a time."),
    device="auto, cpu, cuda or cuda:N.",
)
def predict(
    config: "Config",
    progress: Progress,
    model: str,
    images: list[Path],
    out: Path,
    client: str | None = None,
    teacher: bool = False,
    probabilities: bool = False,
    overlays: bool = False,
    tiff: bool = False,
    batch_size: int = 16,
    device: str = "auto",
) -> Result:
    """Predict masks of new images with a finished model; exit code 6 if some cannot be read."""
    from pipeline.inference.loading import Choice, load_model
    from pipeline.inference.outputs import Wanted
    from pipeline.inference.predict import predict

    chosen = load_model(config, Choice(model, client, teacher=teacher, device=device))
    wanted = Wanted(out, "tiff" if tiff else "png", probabilities=probabilities, overlays=overlays)
    return predict(chosen, images, wanted, batch_size=batch_size, progress=progress)


@command(
    app,
    model=Argument(help="Run: its name or folder."),
    out="Folder to write (default: export in the run's folder).",
    client="This client's own model, where clients have networks of their own.",
)
def export(
    config: "Config", model: str, out: Path | None = None, client: str | None = None
) -> Result:
    """Write a finished model as ONNX and safetensors, with a model card."""
    from pipeline.inference.export import export_model
    from pipeline.inference.loading import Choice

    return export_model(config, Choice(model, client, device="cpu"), out)


@command(
    app,
    name="Run (default: federate.name).",
    out="Write to the folder of the run's name in this one (default: the run's own).",
    data=Option(
        metavar="FOLDER", help="Score on this labelled folder instead, as another hospital's."
    ),
    label=Option("--as", metavar="NAME", help="What that test is called (default: FOLDER's name)."),
    client="With --data: this client's own model.",
    teacher=Option("--teacher", help="With --data: SAM, as the run's settings ask for it."),
)
def evaluate(
    config: "Config",
    progress: Progress,
    name: str | None = None,
    out: Path | None = None,
    data: Path | None = None,
    label: str | None = None,
    client: str | None = None,
    teacher: bool = False,
) -> Result:
    """Score a run's final model on every client's test images, or on another labelled folder."""
    from pipeline.inference.loading import Choice
    from pipeline.results.evaluate import evaluate
    from pipeline.results.evaluate_external import evaluate_external
    from pipeline.results.finished import run_folder

    run = run_folder(config, name)
    if data is not None:
        if out is not None:
            raise ConfigError("--out and --data: an external test goes into the run's folder")
        choice = Choice(str(run.path), client, teacher=teacher)
        return evaluate_external(config, choice, data, name=label, progress=progress)
    if client or teacher or label:
        raise ConfigError("--client, --teacher and --as need --data")
    return evaluate(config, run, out=out, progress=progress)


@command(
    app,
    names=Argument(metavar="[NAME]...", help="Row (of runs ROW-seed<k>) or run (default: all)."),
    reference=Option(metavar="ROW", help="Row that differences refer to (default: sam_fed)."),
    output=Option(metavar="FILE", help="Also write the tables to this file."),
    csv=Option("--csv", help="Print CSV: a line for each row, its clients and its classes."),
    latex=Option("--latex", help="Print LaTeX tables for booktabs."),
)
def compare(
    config: "Config",
    names: list[str] | None = None,
    reference: str | None = None,
    output: Path | None = None,
    csv: bool = False,
    latex: bool = False,
) -> Result:
    """Set evaluated runs side by side: means over seeds, intervals, paired tests, as Markdown."""
    from pipeline.results.compare import choose_layout, compare

    layout, runs = choose_layout(csv=csv, latex=latex), config.cache.root / "runs"
    return compare(runs, names or (), reference=reference, output=output, layout=layout)


@command(
    app,
    runs=Argument(metavar="[RUN]...", help="Runs to show, side by side (default: federate.name)."),
    name="Another run to show (may be repeated).",
    scores="Folder that `evaluate` was given as --out (default: the runs' own).",
    out="File to write (default: report.html of the last run).",
)
def report(
    config: "Config",
    runs: list[str] | None = None,
    name: list[str] | None = None,
    scores: Path | None = None,
    out: Path | None = None,
) -> Result:
    """Write one HTML file about runs: warnings, scores and tests, curves, test images."""
    from pipeline.results.finished import run_folder
    from pipeline.results.report import write_report

    names = dict.fromkeys([*(runs or ()), *(name or ())]) or [config.federate.name]
    return write_report([run_folder(config, each) for each in names], out, scores=scores)


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


@command(
    teacher_app,
    file=Argument(help="File to write: a zip of JSON and safetensors."),
    base=Option("--base", help="Also SAM's own weights, for sites that cannot fetch them."),
    onnx=Option("--onnx", help="Also the model that `samfed export-onnx` wrote."),
)
def export__(config: "Config", file: Path, base: bool = False, onnx: bool = False) -> Result:
    """Write the teacher to FILE: its card, what was adapted, and their digests."""
    from pipeline.sam.transfer import export_teacher

    return export_teacher(config, file, with_base=base, with_onnx=onnx)


@command(teacher_app, file=Argument(help="File that `samfed teacher export` wrote."))
def import__(config: "Config", file: Path) -> Result:
    """Take the server's teacher into this site's cache; then run `samfed precompute-sam`."""
    from pipeline.sam.transfer import import_teacher

    return import_teacher(config, file)


@command(public_app, file=Argument(help="File to write: a zip of JSON and safetensors."))
def export___(config: "Config", file: Path) -> Result:
    """Write the server's set to FILE: images at data.image_size, labels, SAM's labels, digests."""
    from pipeline.data.public import export_public

    return export_public(config, file)


@command(public_app, file=Argument(help="File that `samfed public export` wrote."))
def import___(config: "Config", file: Path) -> Result:
    """Take the server's set into this site's cache, for `samfed federate`."""
    from pipeline.data.public import import_public

    return import_public(config, file)


@command(
    site_app,
    superlink=SUPERLINK,
    root_certificates=ROOT_CERTIFICATES,
    key=KEY,
    insecure=INSECURE,
)
def doctor_(
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
    site_app,
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


@command(site_app, run=Argument(metavar="[RUN]", help="Run (default: federate.name)."))
def audit(config: "Config", run: str | None = None) -> Result:
    """Show what left this site in a run: a line for each answer, with the bytes of every field."""
    from pipeline.federation.audit import audit

    return audit(config, run)


@command(cache_app)
def info(config: "Config") -> Result:
    """Show what the label stores hold: rows done, teacher, provenance, size."""
    from pipeline.labelling.maintenance import info

    return info(config)


@command(cache_app)
def verify(config: "Config", progress: Progress) -> Result:
    """Read every store whole and name each row that is damaged; exit code 5 if there is one."""
    from pipeline.labelling.maintenance import verify

    return verify(config, progress=progress)


@command(cache_app, scheduler=SCHEDULER, workers=WORKERS)
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
    cache_app,
    client=Argument(help="A client's name, or server."),
    image_id=Argument(metavar="ID", help="Id of one of its images that SAM labels."),
    out="PNG to write (default: show/CLIENT/ID.png in the cache).",
)
def show(config: "Config", client: str, image_id: str, out: Path | None = None) -> Result:
    """Show one image, SAM's label on it and the confidence, as a picture and in numbers."""
    from pipeline.results.inspection import show

    return show(config, client, image_id, out=out)


@command(
    cache_app,
    ome_zarr=Option(metavar="FOLDER", help="Write CLIENT.ome.zarr for each client to this folder."),
    client="Only this client, or server (may be repeated).",
)
def export_(
    config: "Config", progress: Progress, ome_zarr: Path, client: list[str] | None = None
) -> Result:
    """Write images, SAM's labels and their confidence for other viewers, as OME-Zarr 0.5."""
    from pipeline.results.inspection import export

    return export(config, ome_zarr, clients=client or (), progress=progress)


@command(
    cache_app,
    yes=Option("--yes", help="Remove without asking."),
    dry_run=Option("--dry-run", help="Only list."),
)
def prune(config: "Config", yes: bool = False, dry_run: bool = False) -> Result:
    """Remove label stores moved aside, fetched archives, and what killed runs left behind."""
    from pipeline.labelling.maintenance import prune, removable

    found = removable(config)
    if dry_run or not found.found:
        return found
    if not yes and not can_ask():
        raise ConfigError("cache prune: cannot ask here; give --yes to remove, --dry-run to list")
    if not yes:
        typer.confirm(f"{found.text()}\nRemove all of these?", abort=True, err=True)
    return prune(config, found)


@command(cache_app, yes=Option("--yes", help="Clear them; without, only list."))
def unlock(config: "Config", yes: bool = False) -> Result:
    """List or clear locks that name another host, as those of a container that was restarted."""
    from pipeline.disk import unlock

    return unlock(config.cache.root / "locks", clear=yes)


if __name__ == "__main__":
    app()
