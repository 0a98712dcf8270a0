"""SIGTERM, which SLURM, Kubernetes and ``docker stop`` send, ends a command in order."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from conftest import write_params
from dask_processes import group_is_there
from forks import Forks

from pipeline.config import Config
from pipeline.federation.runs import RunFolder


def test_sigterm_to_federate_with_a_worker(labelled: Config, tmp_path: Path, forks: Forks) -> None:
    """The command ends its workers, and its rounds are kept (of labels: labelling/test_cluster)."""
    federate = labelled.federate.model_copy(update={"name": "stopped", "rounds": 10_000})
    params = write_params(
        tmp_path / "params.yaml", labelled.model_copy(update={"federate": federate})
    )
    run = RunFolder(labelled.cache.root / "runs" / "stopped")
    with (tmp_path / "err").open("w") as said:
        words = ("federate", "--params", params, "--workers", 1)
        process = forks.start("samfed", *words, files=(None, None, said.fileno()))
    try:
        while not run.history():
            assert process.is_running()
            time.sleep(0.02)
        process.kill(signal.SIGTERM)
        code = process.wait()
        while group_is_there(process.pid):
            time.sleep(0.05)  # dask's own helpers take a moment
    finally:
        if group_is_there(process.pid):
            os.killpg(process.pid, signal.SIGKILL)
    err = (tmp_path / "err").read_text()
    assert code == 143
    assert err.endswith("terminated: run the same command again to continue\n")
    assert "Traceback" not in err
    assert "leaked" not in err
    assert run.load_checkpoint() is not None
