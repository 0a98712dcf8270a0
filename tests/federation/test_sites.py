"""Sites that are really apart: each with its own folder and cache, and no network."""

from __future__ import annotations

import hashlib
import shutil
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY, answer, copy_cache, digest, fails, listing, tiny_config, write_params
from watched_engines import NETWORKS, changed, models

from pipeline.config import Config
from pipeline.data.partition import Partition, load_partition, save_partition
from pipeline.data.prepare import prepare, with_folder
from pipeline.data.public import import_public
from pipeline.disk import file_sha256
from pipeline.errors import ConfigError, DataError, IdentityError, SamfedError, StageError
from pipeline.federation.client import Client
from pipeline.federation.engines import InProcess
from pipeline.federation.inputs import ClientContext, load_inputs, load_public
from pipeline.federation.server import federate
from pipeline.federation.sites import at_site
from pipeline.federation.workplace import Workplace, build_networks
from pipeline.labelling.precompute import precompute
from pipeline.results.evaluate import evaluate
from pipeline.runtime import resolve_device
from pipeline.sam.finetune import finetune
from pipeline.sam.transfer import export_teacher, import_teacher

SITES = ("north", "south")


@dataclass(frozen=True)
class Apart:
    """A server and two sites, whose folders and caches share nothing."""

    folder: Path

    def config(self, owner: str, **federate: Any) -> Config:
        """Return the settings of one of them."""
        root = self.folder / owner
        sites = list(SITES) if owner == "server" else []
        return tiny_config(root / "images", root / "cache", federate={"sites": sites, **federate})

    @property
    def sent(self) -> dict[str, Path]:
        """What the server hands out."""
        return {kind: self.folder / f"{kind}.samfed" for kind in ("teacher", "public")}


def lay_out(images: Path, site: str, target: Path, name: str) -> None:
    """Copy a site's images to a folder of its own, under names that are not the site's."""
    for kind in ("images", "masks"):
        (target / kind).mkdir(parents=True, exist_ok=True)
        for path in sorted((images / kind).glob(f"{site}_*")):
            shutil.copy(path, target / kind / f"{name}{path.name.removeprefix(site)}")


@contextmanager
def no_network() -> Iterator[None]:
    """Let every use of a socket fail."""

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("a socket was asked for")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "socket", refuse)
        patch.setattr(socket, "create_connection", refuse)
        patch.setattr(socket, "getaddrinfo", refuse)
        yield


@pytest.fixture(scope="module")
def apart(tiny_images: Path, tmp_path_factory: pytest.TempPathFactory) -> Apart:
    """The server's part is done, and each site has labelled its images; tests only read it."""
    apart = Apart(tmp_path_factory.mktemp("apart"))
    for origin, owner in zip(("site_a", "site_b", "site_c"), ("server", *SITES), strict=True):
        name = "public" if owner == "server" else owner
        lay_out(tiny_images, origin, apart.folder / owner / "images", name)
    server = apart.config("server")
    prepare(server, owner="server")
    finetune(server)
    precompute(server)
    params = write_params(apart.folder / "server.yaml", server)
    for kind, file in apart.sent.items():
        sent = answer(kind, "export", file, "--params", params)
        assert sent["sha256"] == file_sha256(file)
    for site in SITES:  # as its administrator does
        own = ("--params", write_params(apart.folder / f"{site}.yaml", apart.config(site)))
        images = apart.folder / site / "images"
        with no_network():
            answer("prepare", "--site", site, "--data", images, *own)
            answer("teacher", "import", apart.sent["teacher"], *own)
            answer("precompute-sam", *own)
            answer("public", "import", apart.sent["public"], *own)
    return apart


def central(apart: Apart, folder: Path) -> Config:
    """Return settings of a cache with the same parts, made the ordinary way from one folder."""
    for owner in ("server", *SITES):
        shutil.copytree(apart.folder / owner / "images", folder / "images", dirs_exist_ok=True)
    caches = [apart.config(owner).cache.root for owner in ("server", *SITES)]
    server, *sites = (load_partition(cache / "partition.json") for cache in caches)
    images = {i: entry for each in (server, *sites) for i, entry in each.images.items()}
    whole = Partition(
        scheme="site",
        seed=0,
        server=server.server,
        clients={name: part for each in sites for name, part in each.clients.items()},
        images={i: images[i] for i in sorted(images)},
    )
    save_partition(folder / "published.json", whole)
    config = tiny_config(
        folder / "images",
        folder / "cache",
        partition={**TINY["partition"], "file": str(folder / "published.json")},
    )
    prepare(config)
    shutil.copytree(caches[0] / "teacher", folder / "cache" / "teacher")
    precompute(config)
    return config


class Sites:
    """Clients each of which has nothing but its own site's cache; give ``connect`` to a run."""

    def __init__(self, own: dict[str, Config]) -> None:
        self._own = own

    @contextmanager
    def connect(self, contexts: Sequence[ClientContext], _: Workplace) -> Iterator[InProcess]:
        """Make each client as its site would."""
        yield InProcess([self._client(context.to_json(), context.name) for context in contexts])

    def _client(self, told: bytes, name: str) -> Client:
        context = at_site(ClientContext.from_json(told), self._own[name])
        networks = build_networks(context.config, resolve_device("cpu"))
        return Client(context, Workplace(context.config, load_public(context), networks))


def test_sites_apart_give_the_bytes_of_one_cache(
    apart: Apart, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Stage one, and stage two with equal networks and with own ones."""
    whole = central(apart, tmp_path / "central")
    for site in SITES:
        own = apart.config(site).cache.root
        for store in (f"sam/{site}.zarr", f"images/{site}", "sam/server.zarr", "images/server"):
            assert digest(own / store) == digest(whole.cache.root / store), store
    local = {
        owner: copy_cache(apart.config(owner), tmp_path / owner) for owner in ("server", *SITES)
    }
    for site in SITES:
        shutil.copy(apart.config(site).cache.root / "public.json", local[site].cache.root)
    engine = Sites({site: local[site] for site in SITES})
    for own_networks in (False, True):
        name, settings = f"own_{own_networks}", {"own": own_networks, "rounds": 1 + own_networks}
        here = federate(changed(whole, name, **settings))
        with no_network():
            there = federate(changed(local["server"], name, **settings), connect=engine.connect)
        found = models(there)
        for site in SITES:
            private = local[site].cache.root / "runs" / name
            found |= {
                str(path.relative_to(private)): path.read_bytes()
                for path in private.glob("clients/*/model.safetensors")
            }
        assert found == models(here) != {}
        scores = [[entry["val"] for entry in run.history()] for run in (here, there)]
        assert scores[0] == scores[1]
    evaluate(local["server"], there)
    assert "no client has a test part, as all are at sites of their own; nothing is scored" in (
        caplog.messages
    )
    for site, other in zip(SITES, reversed(SITES), strict=True):
        names_nobody_else(local[site].cache.root, other)
        assert not list((local["server"].cache.root / "runs").rglob(f"{site}*"))


def names_nobody_else(cache: Path, other: str) -> None:
    """Check every file's name and bytes."""
    for name, content in listing(cache).items():
        assert other not in name
        assert other.encode() not in content, name


def test_a_site_alone_and_the_server_name_nobody_else(apart: Apart) -> None:
    for site, other in zip(SITES, reversed(SITES), strict=True):
        names_nobody_else(apart.config(site).cache.root, other)
        names_nobody_else(apart.config("server").cache.root, site)
    server = load_partition(apart.config("server").cache.root / "partition.json")
    assert (server.owners, server.scheme) == (("server",), "alone")
    for site in SITES:
        assert load_partition(apart.config(site).cache.root / "partition.json").owners == (site,)


# ----------------------------------------------------------------------- what does not fit


@pytest.fixture
def north(apart: Apart, tmp_path: Path) -> Config:
    """Settings of a copy of one site's cache."""
    config = copy_cache(apart.config("north"), tmp_path / "cache")
    shutil.copy(apart.config("north").cache.root / "public.json", tmp_path / "cache")
    return config


def refusal(apart: Apart, own: Config, told: Config | None = None, client: str = "north") -> str:
    """Return the line with which a site refuses to take part."""
    inputs = load_inputs(told or apart.config("server"))
    (context,) = (each for each in inputs.contexts if each.name == client)
    with pytest.raises(SamfedError) as caught:
        at_site(context, own)
    message = str(caught.value)
    assert "\n" not in message
    return message


def replaced(config: Config, section: str, **values: Any) -> Config:
    """Return other settings."""
    part = getattr(config, section).model_copy(update=values)
    return config.model_copy(update={section: part})


def test_a_site_that_does_not_fit_says_what_differs(apart: Apart, north: Config) -> None:
    assert refusal(apart, north, client="south") == (
        f"south: {north.cache.root / 'partition.json'} is of north, expected south; run `samfed "
        "prepare --site south`, or use its own settings"
    )
    assert refusal(apart, replaced(north, "data", image_size=64)) == (
        "north: data.image_size: found 64 at the site, expected 32 as at the server; set it, and "
        "run `samfed prepare --site` again"
    )
    assert refusal(apart, replaced(north, "privacy", mode="client")) == (
        "north: privacy.mode: found client at the site, expected none as at the server; agree on "
        "one"
    )
    # a server that does not ask itself whether the noise covers all that it asks for
    own = replaced(apart.config("server"), "model", clients=NETWORKS)
    private = replaced(own, "privacy", mode="client")
    assert refusal(apart, replaced(north, "privacy", mode="client"), private) == (
        "north: privacy.mode client has no bound for logits: leave model.clients empty at the "
        "server"
    )
    manifest = north.cache.root / "public.json"
    public = load_partition(manifest)
    fewer = public.server.model_copy(update={"train": public.server.train[:-1]})
    save_partition(manifest, public.model_copy(update={"server": fewer}))
    assert refusal(apart, north).startswith("north: sha256 of the server's set: found ")
    own = load_partition(north.cache.root / "partition.json")
    copied = next(iter(own.images.values())).image_sha256
    images = dict(public.images)
    first = next(iter(images))
    images[first] = images[first].model_copy(update={"image_sha256": copied})
    save_partition(manifest, public.model_copy(update={"images": images}))
    assert "found" in refusal(apart, north)
    manifest.unlink()
    assert refusal(apart, north) == f"{manifest}: not found; run `samfed public import` first"


def test_images_that_the_server_shares_train_at_no_site(
    apart: Apart, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Nobody trains on the calibration part, nor is tested on what the others trained on."""
    root = tmp_path / "images"
    shutil.copytree(apart.folder / "north" / "images", root)
    public = load_partition(apart.config("server").cache.root / "partition.json")
    shared = public.images[public.server.calibration[0]]
    shutil.copy(apart.folder / "server" / "images" / shared.image, root / "images" / "copy.png")
    own = tiny_config(root, tmp_path / "cache")
    prepare(own, owner="north")
    import_teacher(own, apart.sent["teacher"])
    import_public(own, apart.sent["public"])
    assert refusal(apart, own) == (
        "north: 1 of its images are in the server's set too; take those that its log names out of "
        "its folder, and run `samfed prepare --site` again"
    )
    assert "in the server's set too: copy" in caplog.messages


def test_labels_of_another_teacher_are_named(apart: Apart, north: Config) -> None:
    (context, _) = load_inputs(apart.config("server")).contexts
    assert context.identity is not None
    other = context.identity.model_copy(update={"adapter_sha256": "f" * 64})
    with pytest.raises(IdentityError) as caught:
        at_site(replace(context, identity=other), north)
    assert str(caught.value) == (
        f"north: adapter_sha256 of the labels in {north.cache.root / 'sam/server.zarr'}: found "
        f"{context.identity.adapter_sha256} at the site, expected {'f' * 64} as at the server; "
        "import the server's teacher, and run `samfed precompute-sam` again"
    )


def test_own_networks_start_from_the_servers_weights(apart: Apart, north: Config) -> None:
    (context, _) = load_inputs(changed(apart.config("server"), "own", own=True)).contexts
    weights = north.cache.root / "encoder.safetensors"
    weights.write_bytes(b"weights")
    asked = replace(context, encoder_sha256=hashlib.sha256(b"weights").hexdigest())
    with pytest.raises(IdentityError, match=r"encoder_weights \(None\): found None at the site"):
        at_site(asked, north)
    found = at_site(asked, replaced(north, "model", encoder_weights=weights)).config.model
    assert [network.encoder_weights for network in found.clients] == [weights, None]


def test_clients_elsewhere_are_not_looked_for_here(apart: Apart, tmp_path: Path) -> None:
    server = copy_cache(apart.config("server"), tmp_path / "cache")
    with pytest.raises(StageError, match=r"^north: its images are at its own site, not in "):
        federate(server)
    nobody = replaced(server, "federate", sites=())
    with pytest.raises(ConfigError, match=r"^federate.sites: found none, and no client in .*json;"):
        federate(nobody)
    assert not (tmp_path / "cache" / "runs").exists()


def test_what_is_the_servers_is_not_done_at_a_site(apart: Apart, north: Config) -> None:
    before = digest(north.cache.root)
    for act in (finetune, lambda c: export_teacher(c, north.cache.root / "x")):
        with pytest.raises(StageError, match="found a site's own manifest, expected one with the"):
            act(north)
    server = apart.config("server")
    for act, kind in ((import_teacher, "teacher"), (import_public, "public")):
        with pytest.raises(ConfigError, match="has a server's set"):
            act(server, apart.sent[kind])
    assert digest(north.cache.root, leave_out=("teacher.lock",)) == before


def test_a_cache_is_of_one_owner_or_of_all(apart: Apart, north: Config) -> None:
    before = listing(north.cache.root)
    cases = {"south": "than south (north)", "server": "than server (north)", None: "is one site's"}
    for owner, found in cases.items():
        with pytest.raises(ConfigError) as caught:
            prepare(north, owner=owner)
        assert found in str(caught.value)
    assert listing(north.cache.root) == before
    prepare(north, owner="north")  # again: the same bytes, and what was imported stays
    after = listing(north.cache.root)
    assert {k: v for k, v in after.items() if not k.startswith("locks")} == before


def test_names_that_no_site_can_have(apart: Apart, tmp_path: Path) -> None:
    params = ("--params", write_params(tmp_path / "params.yaml", apart.config("north")))
    for name in ("server", "a/b", ".hidden"):
        assert fails(2, "prepare", "--site", name, *params).startswith(f"--site {name!r}: cannot")
    both = fails(2, "prepare", "--site", "north", "--server", *params)
    assert both == "--site and --server: give one of them"


def test_a_folder_that_the_settings_do_not_name_is_warned_of(
    apart: Apart, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Stage one reads ``data.root``, and would fail on the images of another folder."""
    images, own = apart.folder / "north" / "images", tiny_config(tmp_path / "x", tmp_path / "cache")
    assert with_folder(own, images).data.root == images
    assert caplog.messages == [
        f"--data {images}: data.root is {tmp_path / 'x'}, which later stages read; set data.root "
        "to this folder"
    ]
    caplog.clear()
    same = replaced(own, "data", root=images)
    assert with_folder(same, images / ".." / "images").data.root.resolve() == images
    assert with_folder(own, None) is own
    assert caplog.messages == []


def test_an_import_that_does_not_fit_changes_nothing(apart: Apart, north: Config) -> None:
    before = listing(north.cache.root)
    small = replaced(north, "data", image_size=64)
    with pytest.raises(IdentityError, match=r"data.image_size is 32, this site's is 64; take the"):
        import_public(small, apart.sent["public"])
    with pytest.raises(IdentityError, match="variant is vit_t, the settings ask for vit_b; take"):
        import_teacher(replaced(north, "sam", variant="vit_b"), apart.sent["teacher"])
    with pytest.raises(IdentityError, match="lora_rank is 2, the settings ask for 3; take the ser"):
        import_teacher(replaced(north, "sam", lora_rank=3), apart.sent["teacher"])
    for act, kind in ((import_teacher, "teacher"), (import_public, "public")):
        damaged = north.cache.root.parent / f"{kind}.damaged"
        content = bytearray(apart.sent[kind].read_bytes())
        content[len(content) // 2] ^= 1
        damaged.write_bytes(content)
        with pytest.raises(DataError, match="damaged, or no file of `samfed") as caught:
            act(north, damaged)
        assert "\n" not in str(caught.value)
    after = listing(north.cache.root)
    assert {k: v for k, v in after.items() if not k.startswith("locks")} == before


def test_sams_own_weights_come_along_where_they_are_asked_for(
    apart: Apart, north: Config, tmp_path: Path
) -> None:
    """Then the site needs no checkpoint, and its labels are the same."""
    file = tmp_path / "whole.samfed"
    export_teacher(apart.config("server"), file, with_base=True)
    before = digest(north.cache.root / "sam")
    import_teacher(north, file)
    shutil.rmtree(north.cache.root / "sam" / "north.zarr")
    gone = replaced(north, "sam", checkpoint=tmp_path / "nowhere.pth")
    assert precompute(gone).labelled == len(
        load_partition(north.cache.root / "partition.json").clients["north"].train
    )
    assert digest(north.cache.root / "sam") == before
    copy = north.cache.root / "teacher" / "base.safetensors"
    copy.write_bytes(copy.read_bytes()[:-1] + b"x")
    with pytest.raises(
        IdentityError, match=r"base_sha256 is .* import a teacher that was exported"
    ):
        precompute(north)
