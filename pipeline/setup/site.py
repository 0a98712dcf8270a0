"""``samfed site doctor``: whether a site can take part, before it does; a line for each thing.

Nothing is changed, and nothing is sent but the greeting of a TLS connection.
"""

from __future__ import annotations

import os
import socket
import ssl
import stat
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.config import Config
from pipeline.data.partition import PARTITION_FILE, PUBLIC_FILE, Partition, load_partition
from pipeline.errors import ConfigError, IdentityError, NetworkError, StageError, first_line
from pipeline.federation.inputs import ClientContext, PublicRows, load_client, load_public
from pipeline.federation.sites import at_site
from pipeline.methods import METHODS
from pipeline.sam.teacher import checked_card
from pipeline.setup.doctor import CHECKS, DoctorResult, Lines, examined
from pipeline.stores.label_store import LabelStore, differences

_MACHINE = ("versions", "device", "threads", "disk", "locks")  # of `samfed doctor`
_SOON_DAYS = 30  # before a certificate's end
_DAY = 24 * 60 * 60
_WAIT_SECONDS = 10.0  # for the server


@dataclass(frozen=True)
class Reach:
    """How a site reaches the server; what is not given is not looked at."""

    superlink: str | None = None  # host:port
    root_certificates: Path | None = None  # PEM; None: those of the public authorities
    key: Path | None = None  # the site's private key
    insecure: bool = False  # without TLS


def examine_site(config: Config, reach: Reach) -> DoctorResult:
    """Look at the machine, the site's images, teacher, labels and D_p, its key and the server."""
    own = {
        "manifest": partial(_manifest, config),
        "data": partial(CHECKS["data"], config),
        "teacher": partial(_teacher, config),
        "labels": partial(_labels, config),
        "stage two": partial(_stage_two, config),
        "key": partial(_key, reach.key),
        "certificates": partial(_certificates, reach),
        "server": partial(_server, reach),
    }
    return examined({what: partial(CHECKS[what], config) for what in _MACHINE} | own)


# --------------------------------------------------------------------------- what is here


def _own(config: Config) -> tuple[str, Partition]:
    """Return the site's name and its manifest.

    Raises:
        StageError: there is none, or it names others too.
    """
    path = config.cache.root / PARTITION_FILE
    manifest = load_partition(path)
    if len(manifest.owners) > 1 or manifest.has_public:
        raise StageError(
            f"{path}: names {', '.join(manifest.owners)}, expected one site alone; run `samfed "
            "prepare --site NAME` with a cache.root of its own"
        )
    (name,) = manifest.owners
    return name, manifest


def _manifest(config: Config) -> Lines:
    name, manifest = _own(config)
    parts = ", ".join(f"{len(ids)} {part}" for part, ids in manifest.splits(name).items())
    yield "ok", f"{name}: {parts}; names nobody else's images"


def _teacher(config: Config) -> Lines:
    _, manifest = _own(config)
    yield "ok", checked_card(config, manifest).text()


def _labels(config: Config) -> Lines:
    name, manifest = _own(config)
    card = checked_card(config, manifest)
    asked = card.labels(config)
    path = config.cache.root / "sam" / f"{name}.zarr"
    store = LabelStore(path)
    for field, found, expected in differences(store.identity, asked):
        raise IdentityError(
            f"{path}: {field}: found {found}, expected {expected} by the settings here; take the "
            "server's settings and teacher, then run `samfed precompute-sam`"
        )
    if store.rows != manifest.row_keys(manifest.clients[name].train):
        raise IdentityError(f"{path}: made for other images; run `samfed precompute-sam`")
    done = int(store.done().sum())
    text = f"{path}: {done} of {len(store)} images, teacher {asked.digest}"
    if done == len(store):
        yield "ok", text
    else:
        yield "problem", f"{text}; run `samfed precompute-sam` to finish it"


def _stage_two(config: Config) -> Lines:
    """Load all that a client loads, as if the server had this site's settings."""
    name, manifest = _own(config)
    public = load_partition(
        config.cache.root / PUBLIC_FILE, with_public=True, stage="public import"
    )
    identity = None
    if METHODS[config.federate.method].uses_sam:
        identity = checked_card(config, manifest).labels(config)
    told = ClientContext(
        name=name,
        index=0,
        config=config,
        identity=identity,
        encoder_sha256=None,
        public=PublicRows.of(public),
    )
    context = at_site(told, config)
    shared, own = load_public(context), load_client(context)
    counts = f"{len(own.images)} images here, {len(shared.images)} of the server's to train on, "
    yield "ok", f"{counts}{len(shared.calibration.images)} to calibrate with: all can be read"


# --------------------------------------------------------------------------- the way out


def _key(path: Path | None) -> Lines:
    if path is None:
        yield "skipped", "none given; look at this site's with --key FILE"
        return
    try:
        from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
        from cryptography.hazmat.primitives.serialization import load_ssh_private_key
    except ModuleNotFoundError as error:
        raise ConfigError("Flower is not installed; pip install 'samfed[flower]'") from error
    make = "make one: ssh-keygen -t ecdsa -b 384 -N '' -f FILE"
    try:
        key = load_ssh_private_key(path.read_bytes(), None)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{path}: no private key ({first_line(error)}); {make}") from error
    if not isinstance(key, EllipticCurvePrivateKey):
        raise ConfigError(f"{path}: a key of another kind, expected ecdsa; {make}")
    mode = stat.S_IMODE(os.stat(path).st_mode)
    if mode & 0o077:
        yield "problem", f"{path}: others may read it (mode {mode:o}); chmod 600 {path}"
    else:
        yield "ok", f"{path}: {key.curve.name}, readable by its owner alone"


def _certificates(reach: Reach) -> Lines:
    if reach.insecure:
        yield "problem", "--insecure: whoever is on the way reads and changes everything"
        return
    if reach.root_certificates is None:
        yield "skipped", "none given, so the public authorities'; others: --root-certificates FILE"
        return
    for found in _context(reach).get_ca_certs():
        subject: Any = found["subject"]
        yield _until(", ".join(value for ((_, value),) in subject), found)


def _server(reach: Reach) -> Lines:
    if reach.superlink is None:
        yield "skipped", "none given; look for it with --superlink HOST:PORT"
        return
    host, _, port = reach.superlink.rpartition(":")
    if not host or not port.isdigit():
        raise ConfigError(f"--superlink {reach.superlink}: expected HOST:PORT")
    name, trusted = host.strip("[]"), _context(reach)
    try:
        with socket.create_connection((name, int(port)), timeout=_WAIT_SECONDS) as plain:
            if reach.insecure:
                yield "ok", f"{reach.superlink}: a connection, without TLS"
                return
            with trusted.wrap_socket(plain, server_hostname=name) as secure:
                found, version = secure.getpeercert() or {}, secure.version()
    except ssl.SSLError as error:
        reason = getattr(error, "verify_message", "") or first_line(error)
        raise NetworkError(
            f"{reach.superlink}: found a certificate that is not trusted ({reason}), expected one "
            "signed by the authority in --root-certificates; ask the server's administrator"
        ) from error
    except OSError as error:
        reason = error.strerror or first_line(error)
        raise NetworkError(
            f"{reach.superlink}: no answer ({reason}); check the address, the firewall, and that "
            "the server runs"
        ) from error
    yield _until(f"{reach.superlink}, {version}", found)


def _context(reach: Reach) -> ssl.SSLContext:
    path = reach.root_certificates
    if path is not None and not path.is_file():
        raise ConfigError(f"{path}: no such file; ask the server's administrator for it")
    try:
        return ssl.create_default_context(cafile=None if path is None else str(path))
    except ssl.SSLError as error:
        raise ConfigError(
            f"{path}: no certificate ({first_line(error)}), expected PEM; ask the server's "
            "administrator for the authority's"
        ) from error


def _until(what: str, certificate: dict[str, Any]) -> tuple[Any, str]:
    """Return a finding on a certificate's end."""
    end = str(certificate["notAfter"])
    days = int((ssl.cert_time_to_seconds(end) - time.time()) / _DAY)
    text = f"{what}: certificate until {end}"
    if days < 0:
        return "problem", f"{text}, which is over; ask the server's administrator for a new one"
    if days < _SOON_DAYS:
        return "warning", f"{text}, in {days} days; ask the server's administrator for a new one"
    return "ok", text
