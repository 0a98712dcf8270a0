"""What leaves a client is written down where it is, before it leaves."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest
from conftest import answer, call, fails, write_params
from watched_engines import Watched, changed

from pipeline.config import Config
from pipeline.errors import SamfedError
from pipeline.federation.audit import audit, sent_file
from pipeline.federation.flower.letters import Letter
from pipeline.federation.flower.site import Site, reply_to, told
from pipeline.federation.hosting import VERSION
from pipeline.federation.inputs import load_inputs
from pipeline.federation.messages import Reply
from pipeline.federation.server import federate

CLIENT = "site_b"


@pytest.mark.parametrize("own", [False, True])
def test_every_answer_is_noted_with_its_fields(labelled: Config, own: bool) -> None:
    config, watched = changed(labelled, "noted", own=own, rounds=1), Watched()
    run = federate(config, connect=watched.connect)
    found = audit(config)
    assert list(found.sent) == ["site_a", "site_b", "site_c", "site_d"]
    entry, *noted = found.sent[CLIENT]
    assert (entry.kind, entry.round) == ("entry", 0)
    assert set(entry.fields) == {"name", "images", "val_images", "flip_dice"}
    replies = [reply for _, reply in watched.seen if reply.client == CLIENT]
    assert len(noted) == len(replies)
    names = {field.name for field in fields(Reply)}
    for line, reply in zip(noted, replies, strict=True):
        says = {name for name in names if getattr(reply, name) not in (None, "", {})}
        assert set(line.fields) == says
        assert line.round == reply.round_number
        tensors = {name: line.fields.get(name, 0) for name in ("weights", "logits")}
        assert sum(tensors.values()) == reply.nbytes
    up = sum(entry["clients"][CLIENT]["bytes_up"] for entry in run.history())
    (lines,) = (each for client, each in found.sent.items() if client == CLIENT)
    assert sum(each.fields.get("weights", 0) + each.fields.get("logits", 0) for each in lines) == up
    if own:
        return
    federate(config, mode="restart")  # both are kept, though the run's folder begins anew
    assert audit(config).sent[CLIENT][: len(lines)] == lines
    assert len(audit(config).sent[CLIENT]) == 2 * len(lines)


def test_an_error_of_which_the_server_is_told_is_noted(labelled: Config) -> None:
    config = changed(labelled, "lost", own=True)
    run = federate(config)
    (run.path / "clients" / "site_a" / "round_0002.safetensors").unlink()
    with pytest.raises(SamfedError) as caught:
        federate(config)
    last = audit(config).sent["site_a"][-1]
    assert (last.kind, last.round) == ("evaluate", 2)
    assert last.fields == {"error": len(str(caught.value)) + 2}  # as JSON, with its quotes


def test_what_cannot_be_noted_does_not_leave(labelled: Config) -> None:
    config = changed(labelled, "full")
    sent_file(config.cache.root, "full", CLIENT).mkdir(parents=True)  # as if the disk were full
    with pytest.raises(OSError, match="Is a directory"):
        federate(config)


def test_the_command(labelled: Config) -> None:
    config = changed(labelled, "shown", rounds=1)
    federate(config)
    params = ("--params", write_params(labelled.cache.root / "params.yaml", config))
    lines = call("site", "audit", "shown", *params).stdout.splitlines()
    (fit,) = (line for line in lines if line.startswith(f"{CLIENT} ") and " round 1 fit: " in line)
    assert ", weights " in fit
    assert any(line.startswith("total evaluate: client ") for line in lines)
    said = answer("site", "audit", *params)
    assert said["totals"]["entry"]["name"] == 4 * len('"site_a"')
    assert fails(4, "site", "audit", "other", *params) == (
        f"{config.cache.root / 'sent' / 'other'}: nothing was sent in this run; found runs: shown"
    )
    assert fails(2, "site", "audit", "../shown", *params) == (
        "run '../shown': expected the name of a folder under cache/sent"
    )
    file = sent_file(config.cache.root, "shown", CLIENT)
    with file.open("ab") as log:
        log.write(b'{"time": "2026-')
    damaged = call("site", "audit", *params)
    assert damaged.exit_code == 3
    assert damaged.stdout.splitlines() == lines
    count = len(audit(config).sent[CLIENT]) + 1
    assert damaged.stderr == f"error: {file}: line {count} is damaged\n"


def test_a_site_that_refuses_over_flower_notes_what_it_says(
    labelled: Config, tmp_path: Path
) -> None:
    """It has no client yet that would."""
    config = changed(labelled, "refused")
    (context, *_) = load_inputs(config).contexts
    own = config.model_copy(update={"cache": config.cache.model_copy(update={"root": tmp_path})})
    asked = Letter("entry", told=told(context), version=VERSION)
    reply = reply_to(asked, Site(context.name, own), lambda about: False)
    assert reply.error == f"{tmp_path / 'partition.json'}: not found; run `samfed prepare` first"
    (line,) = audit(own).sent[context.name]
    assert (line.kind, line.round) == ("entry", 0)
    assert line.fields == {"error": len(reply.error) + 2}
