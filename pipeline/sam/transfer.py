"""The teacher as one file, from the server that adapted it to the sites that label with it."""

from __future__ import annotations

import hashlib
import os
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import safetensors.torch

from pipeline.config import Config
from pipeline.data.partition import PARTITION_FILE, load_partition
from pipeline.disk import file_sha256, to_json, writer_lock
from pipeline.errors import ConfigError, DataError, IdentityError
from pipeline.folders import folder_beside
from pipeline.sam.checkpoints import base_checkpoint, load_state
from pipeline.sam.onnx import check_model, model_path
from pipeline.sam.teacher import ADAPTER_FILE, BASE_FILE, checked_card
from pipeline.stores.bundle import Bundle, unpacked, write_bundle
from pipeline.stores.onnx_sidecar import read_sidecar, sidecar_path
from pipeline.stores.teacher_card import CARD_FILE, TeacherCard, load_card

KIND = "teacher"


def export_teacher(
    config: Config, file: Path, *, with_base: bool = False, with_onnx: bool = False
) -> Bundle:
    """Write the teacher of this cache to ``file``: its card and what was adapted.

    Args:
        with_base: also SAM's own weights, for sites that cannot fetch them.
        with_onnx: also the model of ``samfed export-onnx``, for ``precompute.backend: onnx``.

    Raises:
        StageError: an earlier stage is missing. IdentityError: the teacher is not the one that the
        settings ask for, or its adapter is not the card's. ConfigError: there is no base.
    """
    cache = config.cache.root
    card = checked_card(config, load_partition(cache / PARTITION_FILE, with_public=True))
    contents: dict[str, Path | bytes] = {}
    if card.prompt == "none":
        contents[ADAPTER_FILE] = adapter = cache / "teacher" / ADAPTER_FILE
        if file_sha256(adapter) != card.adapter_sha256:
            raise IdentityError(
                f"{adapter}: sha256 differs from its card; run `samfed finetune-sam`"
            )
    if with_base:
        base, _ = base_checkpoint(config.sam)
        if base is None:
            raise ConfigError("--base: this teacher began with random weights; leave it out")
        contents[BASE_FILE] = copy = safetensors.torch.save(load_state(base))
        sha256 = hashlib.sha256(copy).hexdigest()
        card = card.model_copy(update={"base_copy_sha256": sha256})
    if with_onnx:
        check_model(config, card)
        path = model_path(cache)
        names = [*read_sidecar(path).files, sidecar_path(path).name]
        contents |= {name: path.with_name(name) for name in names}
    text = to_json(card.as_json(), indent=1).encode()
    return replace(write_bundle(file, KIND, {CARD_FILE: text, **contents}), about=card.text())


def import_teacher(config: Config, file: Path) -> Bundle:
    """Read the server's teacher into ``cache/teacher``, and its ONNX model into ``cache/onnx``.

    Nothing is changed unless all of it is whole and is what the settings ask for.

    Raises:
        DataError: the file is missing or damaged. FormatError: another samfed's. IdentityError: the
        settings ask for another teacher. ConfigError: this cache has a server's set of its own.
    """
    cache = config.cache.root
    manifest = cache / PARTITION_FILE
    if manifest.exists() and load_partition(manifest).has_public:
        raise ConfigError(
            f"{manifest}: has a server's set, on which `samfed finetune-sam` adapts a teacher; "
            "choose another cache.root"
        )
    cache.mkdir(parents=True, exist_ok=True)
    with (
        writer_lock(cache / "locks" / "teacher.lock"),
        writer_lock(cache / "locks" / "export-onnx.lock"),
        unpacked(file, KIND, beside=cache) as (folder, bundle),
    ):
        card = _checked(file, folder)
        card.check(config, None, path=file)
        onnx = [name for name in bundle.files if name.startswith(model_path(cache).name)]
        ours = {CARD_FILE, ADAPTER_FILE, BASE_FILE}.intersection(bundle.files)
        with ExitStack() as stack:
            for target, names in ((cache / "teacher", ours), (model_path(cache).parent, onnx)):
                building = stack.enter_context(folder_beside(target)) if names else target
                for name in names:
                    os.replace(folder / name, building / name)
    return replace(bundle, about=card.text())


def _checked(file: Path, folder: Path) -> TeacherCard:
    """Return the card of an unpacked teacher, whose files must be those of the card.

    Raises:
        DataError: they are not.
    """
    fault = "no card of a teacher"
    try:
        card = load_card(folder)
        files = {ADAPTER_FILE: card.adapter_sha256, BASE_FILE: card.base_copy_sha256 or "none"}
        for name, expected in files.items():
            fault = f"{name} is not its card's"
            path = folder / name
            if (file_sha256(path) if path.exists() else "none") != expected:
                raise DataError(fault)
    except DataError as error:
        raise DataError(f"{file}: holds {fault}; export the teacher again") from error
    return card
