"""SIGTERM, which SLURM, Kubernetes and ``docker stop`` send, ends a command in order."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import pytest
from conftest import write_params
from dask_processes import group_is_there
from forks import Forks

from pipeline.config import Config
from pipeline.errors import Terminated
from pipeline.federation.runs import RunFolder
from tools import federation_demo


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


@pytest.mark.parametrize(("stop", "code"), [(Terminated, 143), (KeyboardInterrupt, 130)])
def test_the_federation_demo_says_what_ended_it(
    monkeypatch: pytest.MonkeyPatch, stop: type[BaseException], code: int
) -> None:
    def play(*_: object, **__: object) -> None:
        if stop is Terminated:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)
        raise stop

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(sys, "argv", ["federation_demo"])
    monkeypatch.setattr(federation_demo, "play", play)
    try:
        assert federation_demo.main() == code
    finally:
        signal.signal(signal.SIGTERM, before)
