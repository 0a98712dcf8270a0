"""Where a run's clients are: here, on dask's workers, or at their own sites, through Flower."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NoReturn

from pipeline.cluster import choose_cluster
from pipeline.config import Config
from pipeline.disk import is_site_name
from pipeline.errors import ConfigError
from pipeline.federation.cluster import reach
from pipeline.federation.runs import RunFolder
from pipeline.federation.server import federate
from pipeline.federation.tracking import Track
from pipeline.progress import Progress

EngineName = Literal["here", "dask", "flower"]


@dataclass(frozen=True)
class Places:
    """What a command was told of where clients run."""

    engine: str | None = None  # None: as the other fields say
    scheduler: str | None = None
    workers: int | None = None
    superlink: str | None = None
    root_certificates: Path | None = None
    insecure: bool = False

    def federate(
        self, config: Config, *, mode: str, progress: Progress | None, track: Track | None
    ) -> RunFolder:
        """Run stage two with its clients there.

        Raises:
            ConfigError: the fields contradict each other, or Flower is not installed.
            SamfedError: as ``server.federate``.
        """
        dask = self.scheduler is not None or self.workers is not None
        self._check("dask" if dask else "flower" if self.superlink is not None else "here", dask)
        if self.superlink is None:
            cluster = choose_cluster(
                scheduler=self.scheduler, workers=self.workers, device=config.federate.device
            )
            connect = reach(cluster)
            return federate(config, mode=mode, progress=progress, connect=connect, track=track)
        check_flower()
        from pipeline.federation.flower.launch import launch
        from pipeline.federation.flower.link import Link

        link = Link(self.superlink, self.root_certificates, self.insecure)
        return launch(config, link, mode=mode, progress=progress, track=track)

    def serve(self, config: Config, name: str, key: Path | None) -> NoReturn:
        """Be the client ``name`` at the SuperLink until somebody stops this process.

        Args:
            key: the site's private key; None where the SuperLink asks for none.

        Raises:
            ConfigError: no client can have this name. SamfedError: as ``flower.node.run_node``.
        """
        if not is_site_name(name):
            raise ConfigError(f"--name {name!r}: expected this site's name in federate.sites")
        check_flower()
        from pipeline.federation.flower.link import Link
        from pipeline.federation.flower.node import run_node
        from pipeline.federation.flower.site import Site

        link = Link(self.superlink or "", self.root_certificates, self.insecure)
        run_node(Site(name, config), link, key)

    def _check(self, found: EngineName, dask: bool) -> None:
        if dask and self.superlink is not None:
            raise ConfigError("--superlink and --scheduler or --workers: give one of them")
        if self.engine not in (None, found):
            raise ConfigError(
                f"--engine {self.engine}: found the options of {found}; "
                "here needs none, dask --workers or --scheduler, flower --superlink"
            )


def check_flower() -> None:
    """Check that Flower is there.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import flwr  # noqa: F401
    except ModuleNotFoundError as error:
        raise ConfigError(
            "Flower is not installed; install samfed with its extra: pip install 'samfed[flower]'"
        ) from error
