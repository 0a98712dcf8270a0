"""Images and labels as OME-Zarr 0.5 (ngff.openmicroscopy.org/0.5), for viewers of other projects.

One OME-Zarr image is a client's whole store: axis ``t`` goes through its images, ``c`` has red,
green, blue and the label's confidence, and ``labels/sam`` the classes (T, S, S).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from pipeline.errors import ConfigError
from pipeline.folders import folder_beside
from pipeline.stores.arrays import read_rows
from pipeline.stores.image_store import ImageStore
from pipeline.stores.label_store import LabelStore

Pixels = NDArray[np.uint8]
LABEL = "sam"
_CHANNELS = (("red", "FF0000"), ("green", "00FF00"), ("blue", "0000FF"), ("confidence", "FFFFFF"))


def write_ome_zarr(
    path: Path,
    images: ImageStore,
    store: LabelStore,
    *,
    colours: Mapping[int, tuple[int, ...]],
) -> Iterator[int]:
    """Write images and their labels, row for row, to ``path``.

    It appears complete or not at all. The ids of the images and the labels' identity are in the
    image's attribute ``samfed``.

    Args:
        colours: red, green and blue, 0..255, of each class.

    Yields:
        the number of images that were written since.

    Raises:
        ConfigError: the extra is missing. CorruptStoreError: a store is damaged.
    """
    try:
        from yaozarrs.write.v05 import LabelsBuilder, prepare_image
    except ImportError as error:
        raise ConfigError(
            "cache export: yaozarrs is not installed; run pip install 'samfed[ngff]'"
        ) from error
    count, size, step = len(store), images.image_size, store.rows_per_chunk
    about = {"image_ids": images.image_ids, "identity": store.identity.model_dump()}
    with folder_beside(path) as folder:
        folder.rmdir()  # yaozarrs makes it
        _, pixels = prepare_image(
            folder,
            _image(),
            ((count, len(_CHANNELS), size, size), "uint8"),
            extra_attributes={"samfed": about},
            chunks=(1, 1, size, size),
            writer="zarr",
        )
        builder = LabelsBuilder(folder / "labels", chunks=(1, size, size), writer="zarr")
        builder.add_label(LABEL, _label(), ((count, size, size), "uint8"))
        _, labels = builder.prepare()
        _set_colours(folder / "labels" / LABEL, colours)
        for start in range(0, count, step):
            rows = range(start, min(start + step, count))
            span = slice(rows.start, rows.stop)
            pixels["0"][span, :3] = images.read(rows).images.transpose(0, 3, 1, 2)
            pixels["0"][span, 3] = read_rows(store.path, store.arrays["confidences"], rows)
            labels[f"{LABEL}/0"][span] = read_rows(store.path, store.arrays["masks"], rows)
            yield len(rows)


def _multiscale(name: str, axes: str) -> Any:
    """Return one level; lengths are pixels of the client's frame, which has no unit."""
    from yaozarrs import v05

    kinds = {"t": v05.TimeAxis, "c": v05.ChannelAxis, "y": v05.SpaceAxis, "x": v05.SpaceAxis}
    scale: list[Any] = [v05.ScaleTransformation(scale=[1.0] * len(axes))]
    return v05.Multiscale(
        name=name,
        axes=[kinds[axis](name=axis) for axis in axes],
        datasets=[v05.Dataset(path="0", coordinateTransformations=scale)],
    )


def _image() -> Any:
    from yaozarrs import v05

    window = v05.OmeroWindow(min=0, max=255, start=0, end=255)
    channels = [
        v05.OmeroChannel(label=name, color=colour, window=window, active=name != "confidence")
        for name, colour in _CHANNELS
    ]
    return v05.Image(
        multiscales=[_multiscale("images", "tcyx")], omero=v05.Omero(channels=channels)
    )


def _label() -> Any:
    from yaozarrs import v05

    known = {"source": {"image": "../../"}}
    fields = {"multiscales": [_multiscale(LABEL, "tyx")], "image-label": known}
    return v05.LabelImage.model_validate(fields)


def _set_colours(path: Path, colours: Mapping[int, tuple[int, ...]]) -> None:
    """Add the classes' colours; yaozarrs would write 1.0 for class 1, which viewers pass over."""
    group = zarr.open_group(path, mode="r+")
    content: Any = group.attrs["ome"]
    content["image-label"]["colors"] = [
        {"label-value": index, "rgba": [*colour, 255]} for index, colour in colours.items()
    ]
    group.attrs["ome"] = content
