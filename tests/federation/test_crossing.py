"""The page says every field that crosses between a site and its server, and nothing else does."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import Any, get_args

from conftest import copy_cache
from torch import Tensor
from watched_engines import Watched, changed

from pipeline.config import Config
from pipeline.data.partition import load_partition
from pipeline.federation import messages
from pipeline.federation.messages import AnyRequest, Reply
from pipeline.federation.server import federate
from pipeline.stores.plain_data import tensors_of
from tools.crossing import COMES, LEAVES, METRICS, PAGE, renewed

RUNS: dict[str, dict[str, Any]] = {
    "sam_fed": {"audit": True, "proximal_weight": 0.1},
    "own": {"own": True, "method": "sam_fed"},
    "fedmd": {"own": True, "method": "fedmd"},
    "fedavg_ssl": {"method": "fedavg_ssl"},
    "packed": {"compression": "int8"},
}


def test_the_page_is_current() -> None:
    """`python -m tools.crossing` makes it so."""
    page = PAGE.read_text()
    assert renewed(page) == page


def test_the_page_has_every_message() -> None:
    kinds = {kind for kind in vars(messages).values() if isinstance(kind, type)}
    own = {each for each in kinds if is_dataclass(each) and each.__module__ == messages.__name__}
    assert own - {messages.Message, messages.Request} == {*LEAVES, *COMES}
    assert {*get_args(AnyRequest)} == {*COMES}


def test_nothing_else_leaves(shared_pipeline: Config, tmp_path_factory: Any) -> None:
    """Of every answer of five runs: its type, its numbers' names, and what its tensors can be."""
    config = copy_cache(shared_pipeline, tmp_path_factory.mktemp("leaves"))
    manifest = load_partition(config.cache.root / "partition.json")
    seen: set[str] = set()
    for name, settings in RUNS.items():
        watched = Watched()
        federate(changed(config, name, rounds=1, **settings), connect=watched.connect)
        assert {type(entry) for entry in watched.entries} == {LEAVES[0]}
        for request, reply in watched.seen:
            assert type(reply) is Reply
            seen |= reply.metrics.keys()
            received = sum(each.nbytes for each in tensors_of(request).values())
            sent = {each.name: tensors_of(getattr(reply, each.name)) for each in fields(reply)}
            for field, tensors in sent.items():
                assert not tensors or field in ("weights", "logits", "features"), field
            if settings.get("own"):
                assert not sent["weights"]
            elif sent["weights"]:  # a network's, as it came, and no number more
                assert sum(each.nbytes for each in sent["weights"].values()) <= received * 1.1
            for logits in sent["logits"].values():  # on the server's images alone
                assert logits.shape == (len(manifest.server.train), 2, 32, 32)
            for sums in sent["features"].values():  # over all images at once
                assert sums.shape[0] == sums.shape[1] + 1
            text = [value for value in vars(reply).values() if isinstance(value, str)]
            assert text == [reply.client, ""]
            names_no_image(reply, [*manifest.images])
    assert seen == {*METRICS}


def names_no_image(reply: Reply, ids: list[str]) -> None:
    """Check everything in a reply that is no tensor."""
    plain = str({k: v for k, v in vars(reply).items() if not isinstance(v, Tensor | dict)})
    assert not any(image_id in plain for image_id in ids)
