"""``make federation-demo``: a server and three hospitals on this machine, each in its own folder.

Generated images; stage one at each hospital; certificates, keys, a SuperLink and a node of each;
five rounds; the model and its report. All that was started ends with it, Ctrl-C included, and only
the run's folder is left. ``docs/deployment.md`` has the same on machines of their own.
"""

from __future__ import annotations

import argparse
import logging
import shutil
import signal
import sys
import tempfile
from pathlib import Path
from types import FrameType
from typing import NoReturn

import yaml

from pipeline.config import Config
from pipeline.data.prepare import prepare
from pipeline.data.public import export_public, import_public
from pipeline.data.synthetic import write_dataset
from pipeline.errors import EXIT_INTERRUPTED, EXIT_TERMINATED, SamfedError, Terminated
from pipeline.federation.flower.launch import launch
from pipeline.federation.flower.local import deployed
from pipeline.labelling.precompute import precompute
from pipeline.params import parse_config
from pipeline.progress import console_progress
from pipeline.results.evaluate import evaluate
from pipeline.results.report import write_report
from pipeline.sam.finetune import finetune
from pipeline.sam.transfer import export_teacher, import_teacher

SITES = ("north", "east", "south")


def main() -> int:
    """Run the demo; return the exit code."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", 1)[0])
    parser.add_argument("--out", type=Path, default=Path("cache/federation-demo"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=40, help="of each site")
    given = parser.parse_args()
    logging.basicConfig(format="%(levelname)s: %(message)s")
    logging.getLogger("samfed").setLevel(logging.INFO)
    signal.signal(signal.SIGTERM, terminate)
    try:
        with tempfile.TemporaryDirectory(prefix="samfed-federation-") as name:
            play(Path(name), given.out, rounds=given.rounds, images=given.images)
    except SamfedError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt as stop:
        print("interrupted: all processes have ended, nothing is left", file=sys.stderr)
        return EXIT_TERMINATED if isinstance(stop, Terminated) else EXIT_INTERRUPTED
    return 0


def terminate(number: int, frame: FrameType | None) -> NoReturn:
    """End it in order where SIGTERM comes, as Ctrl-C does."""
    raise Terminated


def play(folder: Path, out: Path, *, rounds: int, images: int) -> None:
    """Run all of it in ``folder``; leave the run and its report in ``out``."""
    hand_out_images(folder, images)
    server = settings(folder / "server", rounds=rounds)
    say("the server prepares its labelled set, and adapts SAM on it")
    prepare(server, owner="server")
    finetune(server)
    precompute(server)
    teacher, public = folder / "teacher.samfed", folder / "public.samfed"
    export_teacher(server, teacher)
    export_public(server, public)
    for name in SITES:
        say(f"{name} prepares its images, and labels them with the server's teacher")
        site = settings(folder / name, rounds=rounds)
        prepare(site, owner=name)
        import_teacher(site, teacher)
        precompute(site)
        import_public(site, public)
    say("a SuperLink starts, and a node at each site")
    (folder / "flower").mkdir()
    with deployed(folder / "flower") as deployment, console_progress() as progress:
        for name in SITES:
            deployment.add_node(name, folder / name / "params.yaml")
        run = launch(server, deployment.link, mode="auto", progress=progress)
    evaluate(server, run)  # no scores: the sites' images are not here, as a warning says
    page = write_report([run], run.path / "report.html")
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(run.path, out)
    say(run.text().rpartition(";")[0])
    say(f"model: {out / 'models/global.safetensors'}; report: {out / page.path.name}")


def hand_out_images(folder: Path, images: int) -> None:
    """Give the images of each generated site, and their masks, to one owner."""
    write_dataset(folder / "all", images_per_site=images, size_px=128, seed=0)
    for origin, owner in zip("abcd", ("server", *SITES), strict=True):
        for kind in ("images", "masks"):
            target = folder / owner / "data" / kind
            target.mkdir(parents=True)
            for path in sorted((folder / "all" / kind).glob(f"site_{origin}_*")):
                new = path.name.replace(f"site_{origin}", owner)
                path.rename(target / new)
    shutil.rmtree(folder / "all")


def settings(folder: Path, *, rounds: int) -> Config:
    """Write the settings of one owner into its folder, and return them."""
    sites = list(SITES) if folder.name == "server" else []
    raw = {
        "data": {"root": str(folder / "data")},
        "cache": {"root": str(folder / "cache")},
        "sam": {"epochs": 15},
        "federate": {"rounds": rounds, "sites": sites, "pretrain_steps": 100},
    }
    (folder / "params.yaml").write_text(yaml.safe_dump(raw))
    return parse_config(raw, source="federation-demo")


def say(line: str) -> None:
    """Print a heading."""
    print(f"== {line}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
