"""samfed's command line: one command per stage, no logic. Heavy imports stay inside commands."""

# Annotations are evaluated here, unlike elsewhere: typer makes options of them.

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer import Argument, Option

from pipeline import __version__
from pipeline.commands import cache, public, site, start, teacher
from pipeline.commands.options import INSECURE, ROOT_CERTIFICATES, SCHEDULER, SUPERLINK, WORKERS
from pipeline.console import Result, command
from pipeline.errors import ConfigError
from pipeline.progress import Progress

if TYPE_CHECKING:
    from pipeline.config import Config


app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)
app.add_typer(start.app)
app.add_typer(cache.app, name="cache")
app.add_typer(teacher.app, name="teacher")
app.add_typer(public.app, name="public")
app.add_typer(site.app, name="site")


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
    from pipeline.data.prepare import alone, prepare, with_folder
    from pipeline.setup.fit import check_networks, name_traps

    owner = alone(site, server=server)
    config = with_folder(config, data)
    check_networks(config)
    name_traps(config)
    return prepare(
        config,
        owner=owner,
        with_oracle=with_oracle,
        allow_duplicates=allow_duplicates,
        progress=progress,
    )


@command(app)
def finetune_sam(config: "Config", progress: Progress) -> Result:
    """Adapt the teacher to the server's labelled set."""
    from pipeline.sam.finetune import finetune

    return finetune(config, progress=progress)


@command(app, out="Folder for page and numbers (default: the cache).")
def evaluate_sam(config: "Config", progress: Progress, out: Path | None = None) -> Result:
    """Say whether SAM is likely to help: measure it, and the clients' network without it."""
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


if __name__ == "__main__":
    app()
