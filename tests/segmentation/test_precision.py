"""Networks that train in bfloat16: weights and answers stay float32, copies compute alike."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from conftest import tiny_config

from pipeline.deciding import deciding_settings
from pipeline.errors import ConfigError
from pipeline.federation.workplace import build_networks
from pipeline.segmentation.networks import build_for_training, logits_of, normalise


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


def test_adabn_needs_batch_norm(tmp_path: Path) -> None:
    config = tiny_config(
        tmp_path,
        tmp_path,
        federate={"method": "adabn"},
        model={"normalisation": "group"},
    )
    with pytest.raises(ConfigError, match="teach batch norm alone"):
        build_networks(config, torch.device("cpu"))
