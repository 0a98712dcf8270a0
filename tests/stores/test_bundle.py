"""The file in which a teacher or a public set goes to a site."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest
from conftest import listing

from pipeline.errors import DataError, FormatError, SamfedError
from pipeline.stores.bundle import unpacked, write_bundle
from pipeline.stores.label_store import LABEL_VERSION


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A small bundle, and what is in it beside it."""
    (tmp_path / "large").write_bytes(bytes(range(256)) * 20)
    write_bundle(tmp_path / "it.samfed", "public", {"a.json": b"{}", "b": tmp_path / "large"})
    return tmp_path / "it.samfed"


def fault(file: Path, kind: str = "public") -> str:
    """Return the one line that a bundle is refused with; nothing is left behind."""
    beside = file.parent / "cache"
    beside.mkdir(exist_ok=True)
    with pytest.raises(SamfedError) as caught, unpacked(file, kind, beside=beside):
        pytest.fail("it was taken")
    assert listing(beside) == {}
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"{file}: ")
    return message.removeprefix(f"{file}: ")


def test_what_goes_in_comes_out(file: Path) -> None:
    again = file.with_name("again.samfed")
    contents = {"a.json": b"{}", "b": file.with_name("large")}
    written = write_bundle(again, "public", contents)
    assert again.read_bytes() == file.read_bytes()  # no dates, no names of this computer
    with unpacked(file, "public", beside=file.parent) as (folder, bundle):
        assert (folder / "a.json").read_bytes() == b"{}"
        assert (folder / "b").read_bytes() == file.with_name("large").read_bytes()
        assert bundle.files == written.files == {"a.json": 2, "b": 5120}
        assert bundle.sha256 == written.sha256
    assert not folder.exists()
    assert written.text().splitlines()[-1] == f"sha256 {written.sha256}"


def test_damage_anywhere_is_one_line(file: Path) -> None:
    """A flipped byte is refused, or lies in what nobody reads, as a date of the zip."""
    whole, large = file.read_bytes(), file.with_name("large").read_bytes()
    refused = []
    for place in range(0, len(whole), 37):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 255]) + whole[place + 1 :])
        try:
            with unpacked(file, "public", beside=file.parent) as (folder, bundle):
                assert (folder / "b").read_bytes() == large
                assert bundle.files == {"a.json": 2, "b": 5120}
        except (DataError, FormatError) as error:
            refused.append(str(error))
    assert len(refused) > len(large) // 37
    assert all(line.startswith(f"{file}: ") and "\n" not in line for line in refused)
    reasons = {line.partition(" export` (")[2].partition(")")[0] for line in refused}
    known = ("", "it ", "its manifest ", "a.json has ", "b has ")
    assert all(reason == "" or reason.startswith(known[1:]) for reason in reasons)
    for length in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:length])
        assert fault(file) == (
            "damaged, or no file of `samfed public export` (it is no zip of samfed's); copy it "
            "again"
        )


def test_what_it_is_not_is_said(file: Path) -> None:
    assert fault(file, "teacher") == "found a public export, expected a teacher export"
    missing = file.with_name("missing")
    assert fault(missing) == "no such file; run `samfed public export` at the server"
    missing.mkdir()
    assert fault(missing) == (
        "found a folder, expected a file; run `samfed public export` at the server"
    )
    with zipfile.ZipFile(file.with_name("zip"), "w") as archive:
        archive.writestr("photograph.png", b"x")
    assert "(it is no zip of samfed's)" in fault(file.with_name("zip"))


def rewritten(file: Path, manifest: dict[str, object], *more: tuple[str, bytes]) -> Path:
    """Change a bundle's manifest, and add files, as somebody with bad intentions could."""
    with zipfile.ZipFile(file) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    content = json.loads(contents["manifest.json"]) | manifest
    contents["manifest.json"] = json.dumps(content).encode()
    with zipfile.ZipFile(file, "w") as archive:
        for name, body in [*contents.items(), *more]:
            archive.writestr(name, body)
    return file


def test_another_samfed_is_named(file: Path) -> None:
    other = {"samfed": "9.9", "labels": LABEL_VERSION + 1}
    assert fault(rewritten(file, other)).startswith(
        f"of samfed 9.9 (format 1, labels {LABEL_VERSION + 1}), this is samfed "
    )


def test_no_file_leads_out_of_its_folder(file: Path) -> None:
    evil = {"bytes": 1, "sha256": "0" * 64}
    for name in ("../evil", "/evil", "a/../../evil", "..", "a\\evil"):
        before = file.read_bytes()
        rewritten(file, {"files": {name: evil}})
        assert "it holds other files than its manifest says" in fault(file)
        rewritten(file, {}, (name, b"x"))
        assert fault(file).startswith("damaged, or no file of")
        file.write_bytes(before)
    files = {"a.json": {"bytes": 2, "sha256": "0" * 64}}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        manifest = {"format": 1, "kind": "public", "labels": LABEL_VERSION, "samfed": "0"}
        stored = zipfile.ZipInfo("manifest.json")
        archive.writestr(stored, json.dumps(manifest | {"files": files}))
        archive.writestr("a.json", b"{}")
    assert "'a.json' is no plain file" in fault(file)
