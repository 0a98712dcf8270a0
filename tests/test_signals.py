"""SIGTERM, which SLURM, Kubernetes and ``docker stop`` send, ends a command in order."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from conftest import write_params
from dask_processes import ROOT, group_is_there

from pipeline.config import Config
from pipeline.federation.runs import RunFolder


def test_sigterm_to_federate_with_a_worker(labelled: Config, tmp_path: Path) -> None:
    """The command ends its workers, and its rounds are kept (of labels: labelling/test_cluster)."""
    federate = labelled.federate.model_copy(update={"name": "stopped", "rounds": 10_000})
    params = write_params(
        tmp_path / "params.yaml", labelled.model_copy(update={"federate": federate})
    )
    run = RunFolder(labelled.cache.root / "runs" / "stopped")
    command = [sys.executable, str(ROOT / "cli.py"), "federate", "--params", str(params)]
    with subprocess.Popen(
        [*command, "--workers", "1"],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            while not run.history():
                assert process.poll() is None
                time.sleep(0.02)
            process.terminate()
            _, err = process.communicate()
            ended = time.monotonic() + 10
            while group_is_there(process.pid):
                assert time.monotonic() < ended, "processes are left"
                time.sleep(0.05)
        finally:
            if group_is_there(process.pid):
                os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 143
    assert err.endswith("terminated: run the same command again to continue\n")
    assert "Traceback" not in err
    assert "leaked" not in err
    assert run.load_checkpoint() is not None
