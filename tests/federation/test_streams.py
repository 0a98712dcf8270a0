"""The random streams of a run: none meets another, and settings of views move no image."""

from __future__ import annotations

from itertools import product
from typing import get_args

import torch

from pipeline.federation.streams import Purpose, Streams
from pipeline.federation.views import PublicSet, Sampling, labelled_batch
from pipeline.params import parse_config


def test_no_stream_meets_another() -> None:
    """The seed of one client's dropout was that of its batches, and one more that of its views."""
    keys = product(get_args(Purpose), range(4), range(4), range(4))
    every = [(purpose, Streams(seed, party, number)) for purpose, seed, party, number in keys]
    draws = [streams.rng(purpose).bytes(16) for purpose, streams in every]
    words = [streams.word(purpose) for purpose, streams in every]
    assert len(set(draws)) == len(set(words)) == len(every)


def test_the_same_key_gives_the_same_stream() -> None:
    assert Streams.of_client(7, 0, 3) == Streams(7, 1, 3)
    first, again = (Streams(7, 1, 3).rng("labelled rows").random(5).tolist() for _ in range(2))
    assert first == again


def test_settings_of_views_move_no_image() -> None:
    """Each image is of one value, which tells which images a batch holds."""
    images = torch.arange(8, dtype=torch.uint8)[:, None, None, None].expand(8, 3, 16, 16) * 30
    public = PublicSet(images, images[:, 0], calibration=None, groups=())  # type: ignore[arg-type]
    device, seen = torch.device("cpu"), []
    for augment in ({}, {"flips": "none", "turns": False, "intensity": 0.0, "scale": 0.0}):
        raw = {"augment": augment, "federate": {"labelled_batch": 3}}
        config = parse_config(raw, source="test")
        sampling = Sampling.labelled(Streams(0), config, device)
        batches = [labelled_batch(public, sampling)[1] for _ in range(4)]
        seen.append([batch[:, 0, 0].tolist() for batch in batches])
    assert seen[0] == seen[1]
    assert len({tuple(rows) for rows in seen[0]}) > 1
