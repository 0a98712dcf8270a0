"""samfed's command line: one command per stage, no logic. Heavy imports stay inside commands."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from pipeline import __version__
from pipeline.errors import (
    EXIT_INTERRUPTED,
    EXIT_PARTIAL,
    ConfigError,
    CorruptStoreError,
    SamfedError,
)

if TYPE_CHECKING:
    from pipeline.config import Config
    from pipeline.federation.runs import RunFolder
    from pipeline.labelling.worker import Workplace

_debug = False
_OS_ADVICE = "check the path, its permissions and the space left on the disk"


class _Commands(TyperGroup):
    """Turns samfed's errors into one line on stderr and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except SamfedError as error:
            if _debug:
                raise
            typer.echo(f"error: {error}", err=True)
            sys.exit(error.exit_code)
        except OSError as error:
            if _debug or isinstance(error, BrokenPipeError):
                raise
            where = f"{error.filename}: " if error.filename is not None else ""
            typer.echo(f"error: {where}{error.strerror or error}; {_OS_ADVICE}", err=True)
            sys.exit(SamfedError.exit_code)
        except KeyboardInterrupt:
            if _debug:
                raise
            typer.echo("interrupted: run the same command again to continue", err=True)
            sys.exit(EXIT_INTERRUPTED)


app = typer.Typer(
    cls=_Commands,
    help="Federated medical segmentation from few labels, guided by a Segment Anything teacher.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

cache_app = typer.Typer(help="Look into, check, mend and clear the stores.", no_args_is_help=True)
app.add_typer(cache_app, name="cache")

Params = Annotated[Path, typer.Option("--params", help="Settings file.")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a setting, e.g. federate.rounds=5."),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object for machines.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Scheduler = Annotated[
    str | None,
    typer.Option(metavar="ADDRESS", help="Label on the workers of this dask scheduler (or file)."),
]
Workers = Annotated[
    int | None,
    typer.Option(min=1, help="Label in so many processes here: one per GPU, or sharing the cores."),
]
Name = Annotated[str | None, typer.Option("--name", help="Run (default: federate.name).")]

_PARAMS = Path("params.yaml")


def _version(value: bool) -> None:
    if value:
        typer.echo(f"samfed {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Federated medical segmentation from few labels, guided by a Segment Anything teacher."""


def _settings(params: Path | None, overrides: list[str] | None, debug: bool) -> Config:
    """The validated settings; also turns on the log."""
    global _debug
    _debug = debug
    from pipeline.config import load_config

    logging.basicConfig(
        level=logging.WARNING,
        format="%(levelname)s: %(message)s",
        stream=sys.stderr,
        force=True,
    )
    logging.getLogger("samfed").setLevel(logging.DEBUG if debug else logging.INFO)
    return load_config(params, tuple(overrides or ()))


@contextmanager
def _progress() -> Iterator[Callable[..., None]]:
    """A progress bar per step, on stderr."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    bars: dict[str, Any] = {}
    console = Console(stderr=True)
    # where nobody watches, stderr holds warnings and errors alone
    with Progress(*columns, console=console, disable=not console.is_terminal) as display:

        def advance(what: str, done: int, total: int, note: str = "") -> None:
            if what not in bars:
                bars[what] = display.add_task(what, total=total, note="")
            display.update(bars[what], completed=done, total=total, note=note)

        yield advance


def _say(result: dict[str, Any], as_json: bool, text: str) -> None:
    typer.echo(json.dumps(result, sort_keys=True) if as_json else text)


def _fail(errors: Sequence[str], code: int) -> None:
    """Name what went wrong, a line each, and leave with ``code``; nothing if nothing did."""
    for line in errors:
        typer.echo(f"error: {line}", err=True)
    if errors:
        raise typer.Exit(code)


def _can_ask() -> bool:
    return sys.stdin.isatty()


def _run(config: Config, name: str | None) -> RunFolder:
    from pipeline.disk import is_folder_name
    from pipeline.federation.runs import RunFolder

    if name is not None and not is_folder_name(name):
        raise ConfigError(f"--name {name!r}: expected the name of a folder under cache/runs")
    return RunFolder(config.cache.root / "runs" / (name or config.federate.name))


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for data, cache and report.")] = Path(
        "cache/demo"
    ),
    seed: Annotated[int, typer.Option(min=0, help="Seed of partition, teacher and rounds.")] = 0,
    method: Annotated[
        list[str] | None,
        typer.Option(help="Methods to compare (default: supervised, fedavg_ssl, sam_fed)."),
    ] = None,
    overrides: Set = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Run the whole pipeline on generated images and compare three methods; CPU, minutes."""
    config = _settings(None, [f"seed={seed}", *(overrides or [])], debug)
    from typing import get_args

    from pipeline.methods import Method
    from pipeline.results.demo import METHODS, demo_config, run_demo

    chosen: Any = tuple(method) if method else METHODS
    for each in chosen:
        if each not in get_args(Method):
            known = ", ".join(get_args(Method))
            raise ConfigError(f"--method {each}: no such method; expected one of {known}")
    with _progress() as advance:
        results = run_demo(demo_config(config, out), methods=chosen, progress=advance)
    lines = [f"{'method':<12} {'Dice':>6}  {'95 % interval':<15} {'HD95 px':>8} {'images':>7}"]
    for each in chosen:
        row = results[each]
        low, high = row["dice_ci95"]
        lines.append(
            f"{each:<12} {row['dice']:6.3f}  {low:.3f} to {high:.3f}  "
            f"{row['hd95']:8.2f} {row['n']:7d}"
        )
    _say(results, as_json, "\n".join([*lines, f"report: {results['report']}"]))


@app.command()
def synth(
    out: Annotated[Path, typer.Argument(help="Folder to write, in the input layout.")],
    params: Params = _PARAMS,
    overrides: Set = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Generate the embedded default data set: four sites of dermoscopy-like images with masks."""
    config = _settings(params, overrides, debug)
    from pipeline.data.synthetic import write_dataset

    write_dataset(
        out,
        images_per_site=config.synth.images_per_site,
        size_px=config.synth.size_px,
        seed=config.synth.seed,
    )
    count = 4 * config.synth.images_per_site
    _say({"images": count, "folder": str(out)}, as_json, f"{count} images in {out}")


@app.command()
def prepare(
    with_oracle: Annotated[
        bool, typer.Option(help="Also store the clients' labels, for the `oracle` ceiling alone.")
    ] = False,
    params: Params = _PARAMS,
    overrides: Set = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Partition data.root over server and clients and write the image stores."""
    config = _settings(params, overrides, debug)
    from pipeline.data.prepare import prepare as run_prepare

    with _progress() as advance:
        result = run_prepare(config, with_oracle=with_oracle, progress=advance)
    _say(result.as_json(), as_json, result.text())


@app.command("finetune-sam")
def finetune_sam(
    params: Params = _PARAMS, overrides: Set = None, as_json: Json = False, debug: Debug = False
) -> None:
    """Adapt the teacher to the server's labelled set."""
    config = _settings(params, overrides, debug)
    from pipeline.sam.finetune import finetune

    with _progress() as advance:
        card = finetune(config, progress=advance)
    text = (
        f"{card.variant}: Dice {card.calibration_dice:.3f} on {card.calibration_images} held-out "
        f"images, adapted on {card.train_images}"
    )
    _say(card.model_dump(), as_json, text)


@app.command("evaluate-sam")
def evaluate_sam(
    params: Params = _PARAMS, overrides: Set = None, as_json: Json = False, debug: Debug = False
) -> None:
    """Measure SAM, adapted and as it comes, on the server's calibration part, before any round."""
    config = _settings(params, overrides, debug)
    from pipeline.results.evaluate_teacher import as_table, evaluate_teacher

    with _progress() as advance:
        result = evaluate_teacher(config, progress=advance)
    text = f"{as_table(result)}\n{result['n']} images; {config.cache.root / 'evaluate-sam.html'}"
    _say(result, as_json, text)


@app.command("export-onnx")
def export_onnx(
    out: Annotated[
        Path | None,
        typer.Option(help="File to write (default: onnx/teacher.onnx in the cache, stage one's)."),
    ] = None,
    params: Params = _PARAMS,
    overrides: Set = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write the adapted teacher as one ONNX model, for `precompute-sam --backend onnx`."""
    config = _settings(params, overrides, debug)
    from dataclasses import asdict

    from pipeline.sam.export import export_teacher

    result = export_teacher(config, out)
    text = f"{result.megabytes:.1f} MB, {result.precision}, labels of {result.label_size} px"
    _say(asdict(result), as_json, f"{text}; {result.model}")


def _cluster(config: Config, scheduler: str | None, workers: int | None) -> Workplace | None:
    """Where ``--scheduler`` or ``--workers`` label; None is this process."""
    if scheduler is None and workers is None:
        return None
    if scheduler is not None and workers is not None:
        raise ConfigError("--scheduler and --workers: give one of them")
    from pipeline.labelling.cluster import connect, local_cluster

    logging.getLogger("distributed").setLevel(logging.WARNING)  # its own import sets INFO

    if scheduler is not None:
        return connect(scheduler)
    assert workers is not None
    return local_cluster(workers, device=config.precompute.device)


@app.command("precompute-sam")
def precompute_sam(
    client: Annotated[
        list[str] | None, typer.Option(help="Only this client (may be repeated).")
    ] = None,
    scheduler: Scheduler = None,
    workers: Workers = None,
    backend: Annotated[
        str | None, typer.Option(help="torch or onnx (default: precompute.backend).")
    ] = None,
    params: Params = _PARAMS,
    overrides: Set = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Stage one: label every client's images with the teacher, once."""
    extra = [] if backend is None else [f"precompute.backend={backend}"]
    config = _settings(params, [*(overrides or []), *extra], debug)
    from pipeline.labelling.precompute import precompute

    cluster = _cluster(config, scheduler, workers)
    with _progress() as advance:
        result = precompute(config, clients=tuple(client or ()), cluster=cluster, progress=advance)
    _say(result.as_json(), as_json, result.text())
    _fail(result.failures(), EXIT_PARTIAL)


@app.command()
def federate(
    name: Name = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Only continue; never begin anew.")
    ] = False,
    restart: Annotated[
        bool, typer.Option("--restart", help="Begin anew; an earlier run is moved aside.")
    ] = False,
    params: Params = _PARAMS,
    overrides: Set = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Stage two: federated rounds on the cached labels."""
    extra = [] if name is None else [f"federate.name={name}"]
    config = _settings(params, [*(overrides or []), *extra], debug)
    if resume and restart:
        raise ConfigError("--resume and --restart: give one of them")
    from pipeline.federation.server import federate as run_federate

    mode = "resume" if resume else "restart" if restart else "auto"
    with _progress() as advance:
        run = run_federate(config, mode=mode, progress=advance)
    last = run.history()[-1]
    dice = last["val"]["dice"]
    result = {"run": str(run.path), "rounds": last["round"], "val_dice": dice}
    shown = "" if dice is None else f", validation Dice {dice:.3f}"
    _say(result, as_json, f"{last['round']} rounds{shown}; {run.path}")


@app.command()
def evaluate(
    name: Name = None,
    params: Params = _PARAMS,
    overrides: Set = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Score a run's final model on every client's test images."""
    config = _settings(params, overrides, debug)
    from pipeline.results.evaluate import evaluate as run_evaluate

    with _progress() as advance:
        metrics = run_evaluate(config, _run(config, name), progress=advance)
    row = metrics["test"]["pooled"]
    low, high = row["dice_ci95"]
    text = (
        f"{metrics['method']}: Dice {row['dice']:.3f} ({low:.3f} to {high:.3f}), IoU "
        f"{row['iou']:.3f}, HD95 {row['hd95']:.1f} px, ASSD {row['assd']:.1f} px, {row['n']} images"
    )
    _say(metrics, as_json, text)


@app.command()
def compare(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[NAME]...",
            help="Row (of runs ROW-seed0, ROW-seed1, ...) or run; default: all evaluated runs.",
        ),
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option(metavar="ROW", help="Row that differences refer to (default: sam_fed)."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(metavar="FILE.md", help="Also write the tables to this file.")
    ] = None,
    params: Params = _PARAMS,
    overrides: Set = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Set evaluated runs side by side: means over seeds, intervals, paired tests, as Markdown."""
    config = _settings(params, overrides, debug)
    from pipeline.disk import write_bytes
    from pipeline.results.compare import as_markdown
    from pipeline.results.compare import compare as run_compare

    if output is not None and output.is_dir():
        raise ConfigError(f"--output {output}: is a folder; expected a file to write")
    found = run_compare(config.cache.root / "runs", names or (), reference=reference)
    text = as_markdown(found)
    if output is not None:
        write_bytes(output, f"{text}\n".encode())
    _say(found, as_json, text)


@app.command()
def report(
    name: Annotated[
        list[str] | None, typer.Option("--name", help="Run to show (may be repeated).")
    ] = None,
    params: Params = _PARAMS,
    overrides: Set = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write one HTML file with a run's curves, tables and a gallery."""
    config = _settings(params, overrides, debug)
    from pipeline.disk import write_bytes
    from pipeline.results.gallery import build_gallery
    from pipeline.results.report import load_run, render_report

    runs = [_run(config, each) for each in (name or [config.federate.name])]
    summaries = [load_run(run.path) for run in runs]
    page = render_report(summaries, build_gallery(config, runs[-1]), title="samfed report")
    path = runs[-1].path / "report.html"
    write_bytes(path, page.encode())
    _say({"report": str(path)}, as_json, str(path))


@cache_app.command("info")
def cache_info(
    params: Params = _PARAMS, overrides: Set = None, as_json: Json = False, debug: Debug = False
) -> None:
    """Show what the label stores hold: rows done, teacher, provenance, size."""
    config = _settings(params, overrides, debug)
    from pipeline.labelling.maintenance import info

    found = info(config)
    _say(found.as_json(), as_json, found.text())


@cache_app.command("verify")
def cache_verify(
    params: Params = _PARAMS, overrides: Set = None, as_json: Json = False, debug: Debug = False
) -> None:
    """Read every store whole and name each row that is damaged; exit code 5 if there is one."""
    config = _settings(params, overrides, debug)
    from pipeline.labelling.maintenance import verify

    with _progress() as advance:
        result = verify(config, progress=advance)
    _say(result.as_json(), as_json, result.text())
    _fail(result.failures(), CorruptStoreError.exit_code)


@cache_app.command("repair")
def cache_repair(
    scheduler: Scheduler = None,
    workers: Workers = None,
    params: Params = _PARAMS,
    overrides: Set = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Label anew what is damaged in the label stores, and finish these stores."""
    config = _settings(params, overrides, debug)
    from pipeline.labelling.repair import repair

    cluster = _cluster(config, scheduler, workers)
    with _progress() as advance:
        result = repair(config, cluster=cluster, progress=advance)
    _say(result.as_json(), as_json, result.text())
    code = CorruptStoreError.exit_code if result.remaining else EXIT_PARTIAL
    _fail(result.failures(), code)


@cache_app.command("prune")
def cache_prune(
    yes: Annotated[bool, typer.Option("--yes", help="Remove without asking.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only list.")] = False,
    params: Params = _PARAMS,
    overrides: Set = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Remove label stores that were moved aside, and what killed runs left behind."""
    config = _settings(params, overrides, debug)
    from pipeline.labelling.maintenance import prune, removable

    result = removable(config)
    asks = bool(result.found) and not (yes or dry_run)
    if asks and (as_json or not _can_ask()):
        raise ConfigError("cache prune: cannot ask here; give --yes to remove, --dry-run to list")
    if not as_json:
        typer.echo(result.text())
    if asks:
        typer.confirm("Remove all of these?", abort=True)
    if not dry_run:
        result = prune(config, result)
    if as_json or result.removed:
        _say(result.as_json(), as_json, result.text())


@cache_app.command("unlock")
def cache_unlock(
    yes: Annotated[bool, typer.Option("--yes", help="Clear them; without, only list.")] = False,
    params: Params = _PARAMS,
    overrides: Set = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """List or clear locks that name another host, as those of a container that was restarted."""
    config = _settings(params, overrides, debug)
    from pipeline.disk import unlock

    result = unlock(config.cache.root / "locks", clear=yes)
    _say(result.as_json(), as_json, result.text())


if __name__ == "__main__":
    app()
