"""`samfed site doctor`: what is wrong at a site is said before it takes part."""

from __future__ import annotations

import shutil
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from socket import create_server

import pytest
from conftest import answer, call, tiny_config, write_params
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from pipeline.config import Config
from pipeline.data.partition import Partition, load_partition, save_partition
from pipeline.setup.site import Reach, examine_site
from pipeline.stores.label_store import LabelStore

SITE = "site_b"


@pytest.fixture
def site(shared_pipeline: Config, tmp_path: Path) -> Config:
    """Settings of a site's own cache, made of its part of the shared one."""
    cache, source = tmp_path / "cache", shared_pipeline.cache.root
    stores = [s for o in ("server", SITE) for s in (f"images/{o}", f"sam/{o}.zarr")]
    for part in ("teacher", *stores):
        shutil.copytree(source / part, cache / part)
    whole = load_partition(source / "partition.json")

    def only(*owners: str) -> Partition:
        ids = sorted(i for o in owners for part in whole.splits(o).values() for i in part)
        images = {i: whole.images[i] for i in ids}
        update = {"images": images, "clients": {o: whole.clients[o] for o in owners if o == SITE}}
        empty = whole.server.model_copy(update={"train": (), "calibration": ()})
        server = whole.server if "server" in owners else empty
        return whole.model_copy(update=update | {"server": server})

    save_partition(cache / "partition.json", only(SITE))
    save_partition(cache / "public.json", only("server"))
    return tiny_config(shared_pipeline.data.root, cache)


def said(config: Config, reach: Reach | None = None) -> dict[str, tuple[str, str]]:
    """Return each finding's kind and text by its name; the last where there are several."""
    found = examine_site(config, reach or Reach()).findings
    return {each.what: (each.kind, each.text) for each in found}


def test_a_site_that_can_take_part(site: Config) -> None:
    found = said(site)
    assert {what for what, (kind, _) in found.items() if kind == "problem"} == set()
    part = load_partition(site.cache.root / "partition.json").clients[SITE]
    train, counts = len(part.train), f"{len(part.train)} train, {len(part.val)} val"
    assert found["manifest"][1].startswith(f"{SITE}: {counts}, ")
    assert found["manifest"][1].endswith("; names nobody else's images")
    assert found["stage two"][1] == (
        f"{train} images here, 2 of the server's to train on, 4 to calibrate with: all can be read"
    )
    assert f"{train} of {train} images" in found["labels"][1]
    # what is looked at only where an option names it
    skipped = {what for what, (kind, _) in found.items() if kind == "skipped"}
    assert skipped == {"key", "certificates", "server"}
    before = sorted(path for path in site.cache.root.rglob("*"))
    params = ("--params", write_params(site.cache.root.parent / "params.yaml", site))
    counts = answer("site", "doctor", *params)
    assert (counts["problem"], counts["skipped"]) == (0, 3)
    assert sorted(path for path in site.cache.root.rglob("*")) == before


def test_what_is_missing_is_a_problem_that_says_what_to_do(site: Config) -> None:
    cache = site.cache.root
    (cache / "public.json").unlink()
    store = LabelStore(cache / "sam" / f"{SITE}.zarr")
    store.forget_chunk(0, store.rows)
    found = said(site)
    assert found["stage two"] == (
        "problem", f"{cache / 'public.json'}: not found; run `samfed public import` first"
    )  # fmt: skip
    assert found["labels"][0] == "problem"
    assert found["labels"][1].endswith("; run `samfed precompute-sam` to finish it")
    shutil.rmtree(cache / "teacher")
    assert said(site)["teacher"][0] == "problem"
    params = ("--params", write_params(cache.parent / "params.yaml", site))
    result = call("site", "doctor", *params)
    assert result.exit_code == 1
    assert "Traceback" not in result.output


def test_settings_that_are_not_those_of_the_labels(site: Config) -> None:
    """What differs is named: the labels may be right, and the settings not the server's."""
    data = site.data.model_copy(update={"image_size": 64})
    status, text = said(site.model_copy(update={"data": data}))["labels"]
    assert status == "problem"
    assert "label_size: found 32, expected 64 by the settings here; take the server's" in text


def test_a_cache_of_many_is_no_sites(shared_pipeline: Config) -> None:
    kind, text = said(shared_pipeline)["manifest"]
    assert kind == "problem"
    assert "names server, site_a, site_b, site_c, site_d, expected one site alone" in text


# ----------------------------------------------------------------------- the way out


def make_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """Write a private key that its owner alone may read."""
    key = ec.generate_private_key(ec.SECP384R1())
    path.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
    path.chmod(0o600)
    return key


def make_certificate(folder: Path, *, days: int) -> tuple[Path, Path]:
    """Write a certificate for this host, its own authority, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "a server")])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - timedelta(days=400))
        .not_valid_after(now + timedelta(days=days, hours=1))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False
        )
        .sign(key, hashes.SHA256())
    )
    certificate, private = folder / f"{days}.pem", folder / f"{days}.key"
    certificate.write_bytes(made.public_bytes(Encoding.PEM))
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    private.write_bytes(pem)
    return certificate, private


@contextmanager
def serving(certificate: Path, key: Path) -> Iterator[str]:
    """Greet whoever connects, and give the address."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with create_server(("127.0.0.1", 0)) as server:

        def greet() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                    with context.wrap_socket(connection, server_side=True) as secure:
                        secure.recv(1)
                except ssl.SSLError:
                    continue  # the client does not trust us
                except OSError:
                    return  # closed

        thread = threading.Thread(target=greet, daemon=True)
        thread.start()
        yield f"127.0.0.1:{server.getsockname()[1]}"
        server.shutdown(2)
    thread.join(5)


def way(site: Config, **reach: object) -> dict[str, tuple[str, str]]:
    """Return what is found on the way to the server."""
    found = said(site, Reach(**reach))  # type: ignore[arg-type]
    return {what: found[what] for what in ("key", "certificates", "server")}


def test_the_way_to_the_server(site: Config, tmp_path: Path) -> None:
    certificate, private = make_certificate(tmp_path, days=200)
    make_key(tmp_path / "key")
    with serving(certificate, private) as address:
        found = way(site, superlink=address, root_certificates=certificate, key=tmp_path / "key")
        assert {kind for kind, _ in found.values()} == {"ok"}
        assert found["server"][1].startswith(f"{address}, TLSv1.3: certificate until ")
        assert found["key"][1] == f"{tmp_path / 'key'}: secp384r1, readable by its owner alone"
        other, _ = make_certificate(tmp_path, days=20)
        found = way(site, superlink=address, root_certificates=other)
        kind, text = found["certificates"]
        assert kind == "warning"
        assert text.endswith(", in 20 days; ask the server's administrator for a new one")
        kind, text = found["server"]
        assert kind == "problem"
        assert text.startswith(f"{address}: found a certificate that is not trusted (")
        plain = way(site, superlink=address, insecure=True)
        assert plain["certificates"][0] == "problem"
        assert plain["server"] == ("ok", f"{address}: a connection, without TLS")
    kind, text = way(site, superlink=address, root_certificates=certificate)["server"]
    assert (kind, text.split(";")[0]) == ("problem", f"{address}: no answer (Connection refused)")


def test_what_is_wrong_on_the_way(site: Config, tmp_path: Path) -> None:
    over, _ = make_certificate(tmp_path, days=-2)
    make_key(tmp_path / "key")
    (tmp_path / "key").chmod(0o644)
    found = way(site, root_certificates=over, key=tmp_path / "key")
    assert found["certificates"][0] == "problem"
    assert ", which is over; " in found["certificates"][1]
    key = tmp_path / "key"
    assert found["key"] == ("problem", f"{key}: others may read it (mode 644); chmod 600 {key}")
    key.write_text("no key")
    found = way(site, root_certificates=tmp_path / "key", key=tmp_path / "key", superlink="host")
    assert found["key"][1].startswith(f"{tmp_path / 'key'}: no private key (")
    assert found["certificates"][1].startswith(f"{tmp_path / 'key'}: no certificate (")
    assert found["server"][1] == "--superlink host: expected HOST:PORT"
    found = way(site, root_certificates=tmp_path / "none", key=tmp_path / "none")
    assert found["certificates"][1].startswith(f"{tmp_path / 'none'}: no such file; ask ")
    assert found["key"][1].startswith(f"{tmp_path / 'none'}: No such file or directory")
