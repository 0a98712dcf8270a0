"""Networks that train in bfloat16: weights and answers stay float32, copies compute alike."""

from __future__ import annotations

import copy
from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import tiny_config
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from pipeline.config import Config
from pipeline.deciding import deciding_settings
from pipeline.errors import ConfigError
from pipeline.federation.server import federate
from pipeline.federation.targets import measure_consistency
from pipeline.federation.workplace import build_networks
from pipeline.params import with_settings
from pipeline.segmentation.networks import (
    build_for_training,
    logits_of,
    normalise,
    predict_masks,
)


def test_only_the_arithmetic_is_in_bfloat16(tmp_path: Path) -> None:
    images = normalise(torch.rand(4, 3, 32, 32, generator=torch.manual_seed(0)))
    logits = {}
    for precision in ("fp32", "bf16"):
        config = tiny_config(tmp_path, tmp_path, federate={"precision": precision})
        network = build_for_training(config, config.model, torch.device("cpu")).eval()
        logits[precision] = logits_of(network, images)
        assert torch.equal(logits_of(copy.deepcopy(network), images), logits[precision])
        logits[precision].square().mean().backward()
        kinds = {w.dtype for w in network.parameters()}
        kinds |= {w.grad.dtype for w in network.parameters() if w.grad is not None}
        assert kinds == {torch.float32}
    exact, fast = logits["fp32"], logits["bf16"]
    assert exact.dtype == fast.dtype == torch.float32
    assert not torch.equal(exact, fast)
    assert (exact - fast).abs().max() < 0.05 * exact.abs().max()


def test_the_precision_decides_the_first_model_too(tmp_path: Path) -> None:
    found = [
        deciding_settings(tiny_config(tmp_path, tmp_path, federate={"precision": p}), "first_model")
        for p in ("fp32", "bf16")
    ]
    assert found[0] != found[1]


def test_a_run_builds_its_networks_so(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, tmp_path, federate={"precision": "bf16"})
    (network,) = build_networks(config, torch.device("cpu")).values()
    images = normalise(torch.rand(2, 3, 32, 32))
    with torch.no_grad():
        assert not torch.equal(logits_of(network.eval(), images), network(images))


class Passes:
    """What passes of networks that a run built were: in training, and in bfloat16."""

    def __init__(self) -> None:
        self.seen: Counter[tuple[bool, bool]] = Counter()

    def __call__(self, module: nn.Module, _: object) -> None:
        if hasattr(module, "computes_in"):
            self.seen[module.training, torch.is_autocast_enabled("cpu")] += 1


@pytest.mark.parametrize(("method", "networks"), [("semifl", 1), ("rc_rf", 2)])
def test_every_training_pass_is_in_bfloat16(prepared: Config, method: str, networks: int) -> None:
    """First models, clients, and the server's own steps or the exchange; scored masks are not."""
    model = prepared.model.model_dump(exclude={"clients"})
    config = with_settings(
        prepared,
        "test",
        model={"clients": [model] * networks if networks > 1 else []},
        federate={"method": method, "precision": "bf16", "fusion_epochs": 1},
    )
    passes = Passes()
    hook = register_module_forward_pre_hook(passes)
    try:
        federate(config)
    finally:
        hook.remove()
    local = config.federate.rounds * config.federate.local_steps * 4  # clients
    assert passes.seen[True, True] > local + config.federate.pretrain_steps * networks
    assert passes.seen[True, False] == 0
    assert passes.seen[False, False] > 0


def test_what_targets_are_made_of_is_measured_in_bfloat16(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, tmp_path, federate={"precision": "bf16"})
    network = build_for_training(config, config.model, torch.device("cpu"))
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    passes = Passes()
    hook = register_module_forward_pre_hook(passes)
    try:
        measure_consistency(network, images, config)
    finally:
        hook.remove()
    assert dict(passes.seen) == {(False, True): 2}


def test_masks_do_not_hang_on_the_precision_of_training(tmp_path: Path) -> None:
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    masks = []
    for precision in ("fp32", "bf16"):
        config = tiny_config(tmp_path, tmp_path, federate={"precision": precision})
        network = build_for_training(config, config.model, torch.device("cpu"))
        masks.append(predict_masks(network, images))
    assert torch.equal(*masks)


def test_adabn_needs_batch_norm(tmp_path: Path) -> None:
    config = tiny_config(
        tmp_path,
        tmp_path,
        federate={"method": "adabn"},
        model={"normalisation": "group"},
    )
    with pytest.raises(ConfigError, match="teach batch norm alone"):
        build_networks(config, torch.device("cpu"))
