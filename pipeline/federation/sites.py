"""A client at a site of its own: what the server tells it is joined with what the site has.

The server knows such a client by name (``federate.sites``). Its context (``load_inputs``) lacks the
client's rows, and travels as JSON. At the site

    context = at_site(ClientContext.from_json(content), own)
    networks = build_networks(context.config, resolve_device(context.config.federate.device))
    client = Client(context, Workplace(context.config, load_public(context), networks))

makes the client, where ``own`` are the site's settings: ``own.cache.root`` holds its manifest and
stores (``samfed prepare --site``), its labels (``samfed precompute-sam``) and D_p (``samfed public
import``), and takes its private state. Nothing else is read, and no network is used.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline.config import Config, NetworkConfig
from pipeline.data.partition import PARTITION_FILE, PUBLIC_FILE, Partition, load_partition
from pipeline.disk import file_sha256
from pipeline.errors import ConfigError, DataError, IdentityError, SamfedError, StageError
from pipeline.federation.inputs import ClientContext, PublicRows
from pipeline.federation.privacy import check_covered
from pipeline.stores.label_store import LabelStore, differences

log = logging.getLogger("samfed.site")


def at_site(told: ClientContext, own: Config) -> ClientContext:
    """Return the client's context as it holds at its site.

    What decides the result is the server's; where files lie and what computes is the site's:
    ``cache``, ``data.root``, ``sam``, ``precompute`` but for ``probabilities``,
    ``federate.device`` and ``model.encoder_weights``.

    Args:
        told: the context that the server made. own: the site's settings.

    Raises:
        SamfedError: the site does not fit the run; names the client, what was found, what was
            expected, and what to do.
    """
    cache = own.cache.root
    _check_settings(told, own)
    manifest = load_partition(cache / PARTITION_FILE)
    part = manifest.clients.get(told.name)
    if part is None:
        raise StageError(
            f"{told.name}: {cache / PARTITION_FILE} is of {', '.join(manifest.owners)}, expected "
            f"{told.name}; run `samfed prepare --site {told.name}`, or use its own settings"
        )
    _check_public(told, manifest, cache)
    _check_labels(told, cache)
    server = told.config
    asked = server.precompute.keeps_probabilities(server.data.num_classes)  # rounds read them
    config = server.model_copy(
        update={
            "data": server.data.model_copy(update={"root": own.data.root}),
            "cache": own.cache,
            "sam": own.sam,
            "precompute": own.precompute.model_copy(update={"probabilities": asked}),
            "model": _with_own_weights(told, own),
            "federate": server.federate.model_copy(update={"device": own.federate.device}),
        }
    )
    train = manifest.row_keys(part.train)
    return replace(told, config=config, train=train, val=part.val, test=part.test)


def _check_settings(told: ClientContext, own: Config) -> None:
    for key in ("num_classes", "image_size"):
        found, expected = getattr(own.data, key), getattr(told.config.data, key)
        if found != expected:
            advice = "set it, and run `samfed prepare --site` again"
            raise _differs(told, f"data.{key}", found, expected, advice)
    for key in type(own.privacy).model_fields if own.privacy.on else ():
        found, expected = getattr(own.privacy, key), getattr(told.config.privacy, key)
        if found != expected:  # a site that asks for privacy takes part in no run with another one
            raise _differs(told, f"privacy.{key}", found, expected, "agree on one")
    try:
        check_covered(told.config)  # not every server asks itself
    except ConfigError as error:
        raise ConfigError(f"{told.name}: {error} at the server") from error


def _check_public(told: ClientContext, manifest: Partition, cache: Path) -> None:
    """Refuse another D_p than the server's, and images of the client's own that are in it."""
    public = load_partition(cache / PUBLIC_FILE, with_public=True, stage="public import")
    found = PublicRows.of(public)
    if found != told.public:
        here, there = found.sha256[:16], told.public.sha256[:16]
        advice = "import the server's present one with `samfed public import`"
        raise _differs(told, "sha256 of the server's set", here, there, advice)
    shared = {entry.image_sha256 for entry in public.images.values()}
    both = [i for i, entry in manifest.images.items() if entry.image_sha256 in shared]
    if both:
        # no image's name: the server is told of this
        log.warning("in the server's set too: %s", ", ".join(both))
        raise DataError(
            f"{told.name}: {len(both)} of its images are in the server's set too; take those that "
            "its log names out of its folder, and run `samfed prepare --site` again"
        )


def _check_labels(told: ClientContext, cache: Path) -> None:
    """Refuse labels of another teacher than the server's."""
    if told.identity is None:
        return
    advice = "import the server's teacher, and run `samfed precompute-sam` again"
    for owner in ("server", told.name):
        own = LabelStore(cache / "sam" / f"{owner}.zarr").identity
        for field, found, expected in differences(own, told.identity):
            what = f"{field} of the labels in {cache / 'sam' / owner}.zarr"
            raise _differs(told, what, found, expected, advice)


def _with_own_weights(told: ClientContext, own: Config) -> Any:
    """Return the run's networks with the site's copy of the weights that its own one starts from.

    No other network needs any here: what they start from comes with the first request.
    """
    model, config = told.config.model, told.config
    asked, mine = config.network_of(told.index), own.network_of(told.index).encoder_weights
    found = None if mine is None or not mine.is_file() else file_sha256(mine)
    if told.encoder_sha256 is not None and found != told.encoder_sha256:
        key = f"sha256 of model.encoder_weights ({mine})"
        raise _differs(told, key, found, told.encoder_sha256, "give the server's file")

    def local(network: NetworkConfig) -> NetworkConfig:
        weights = mine if told.encoder_sha256 is not None and network == asked else None
        return network.model_copy(update={"encoder_weights": weights})

    clients = tuple(map(local, model.clients))
    return model.model_copy(update={"encoder_weights": None, "clients": clients})


def _differs(
    told: ClientContext, what: str, found: object, expected: object, advice: str
) -> SamfedError:
    return IdentityError(
        f"{told.name}: {what}: found {found} at the site, expected {expected} as at the server; "
        f"{advice}"
    )
