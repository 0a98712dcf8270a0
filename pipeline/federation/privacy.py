"""Differential privacy of whole clients: clipped updates, Gaussian noise, and what they promise.

Adjacent are two federations that differ in one client, whose updates are zero in one of them. Every
update is clipped to the norm C, so that one client moves their sum by C at most; noise of standard
deviation z C hides that, once in the sum (``server``) or in each update (``client``; McMahan et
al., 2018; Geyer et al., 2017). ``docs/method.md`` has the argument, and what it leaves open.
"""

from __future__ import annotations

import hashlib
import math
import os
import secrets
from collections import Counter
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scipy.special import ndtri

from pipeline.config import Config, PrivacyConfig
from pipeline.disk import flush, naming
from pipeline.errors import ConfigError, CorruptStoreError
from pipeline.federation.schedule import participants
from pipeline.federation.updates import Updates
from pipeline.methods import METHODS
from pipeline.segmentation.networks import State

_KEY_BYTES = 32


def check_privacy(config: Config) -> None:
    """Check that the settings are covered by the argument, where there is to be privacy.

    Raises:
        ConfigError: one is not, or dp-accounting is not installed.
    """
    check_covered(config)
    if not config.privacy.on:
        return
    try:
        import dp_accounting  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            "privacy.mode: dp-accounting is not installed; run pip install 'samfed[privacy]'"
        ) from error


def check_covered(config: Config) -> None:
    """Check the settings alone, as a site does, which counts no epsilon.

    Raises:
        ConfigError: one is not covered.
    """
    mode, rule = config.privacy.mode, config.federate.aggregation
    traits = METHODS[config.federate.method]
    if not config.privacy.on:
        return
    reasons = {
        "no update to hide: choose a federate.method that trains": not traits.trains,
        "no bound for logits: leave model.clients empty": config.heterogeneous,
        f"no bound for aggregation {rule}: set federate.aggregation=fedavg": rule != "fedavg",
        "no bound for batch norm's statistics: set model.normalisation=group": (
            config.model.normalisation != "group"
        ),
    }
    for reason, found in reasons.items():
        if found:
            raise ConfigError(f"privacy.mode {mode} has {reason}")


def guarantee(config: Config, names: Sequence[str], rounds: int) -> dict[str, float]:
    """Return the epsilon that all clients have after so many rounds, and its delta.

    Who takes part is no secret, so that a client's epsilon is that of the k rounds in which it did:
    of k adaptive Gaussian mechanisms, which are one of multiplier z / sqrt(k) (Dong et al., 2022).
    Empty without privacy.
    """
    settings = config.privacy
    if not settings.on:
        return {}
    from dp_accounting import get_epsilon_gaussian

    asked = Counter(n for each in range(rounds) for n in participants(config, names, each + 1))
    multiplier = settings.noise_multiplier / math.sqrt(max(asked.values()))
    epsilon = float(get_epsilon_gaussian(multiplier, settings.delta))
    return {"epsilon": epsilon, "delta": settings.delta}


def noise_key(cache: Path) -> bytes:
    """Return this place's secret, from which all its noise is drawn; the first call makes it.

    Raises:
        CorruptStoreError: the file is no such secret.
    """
    path = cache / "noise.key"
    if not path.is_file():
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.samfed-tmp")
        with naming(path):
            file = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
            try:
                os.write(file, secrets.token_bytes(_KEY_BYTES))
                os.fsync(file)
            finally:
                os.close(file)
            with suppress(FileExistsError):  # another process was first
                os.link(temporary, path)
            temporary.unlink()
            flush(cache)
    key = path.read_bytes()
    if len(key) != _KEY_BYTES:
        raise CorruptStoreError(
            f"{path}: found {len(key)} bytes, expected {_KEY_BYTES}; delete it, and begin private "
            "runs anew"
        )
    return key


def clipped(update: State, before: State, *, trained: Collection[str], norm: float) -> State:
    """Return the change of the trained entries, float64, shortened to ``norm`` if it is longer."""
    change = {name: update[name].double() - before[name].double() for name in trained}
    length = math.sqrt(sum(float(value.square().sum()) for value in change.values()))
    factor = min(1.0, norm / length) if length else 1.0
    return {name: factor * value for name, value in change.items()}


@dataclass(frozen=True)
class Noise:
    """Gaussian noise that is a function of a secret key, of whose it is, and of what it hides.

    Who does not know the key cannot tell it from noise drawn by chance (SHAKE256, FIPS 202). A
    round that is repeated to the same change gets the same noise, which says no more than the first
    time; another change gets another.
    """

    key: bytes
    whose: str

    def into(self, change: State, deviation: float) -> State:
        """Return float64 entries with independent noise of a standard deviation."""
        digest = hashlib.sha256(repr((self.whose, deviation)).encode())
        for name in sorted(change):
            digest.update(name.encode() + change[name].numpy().tobytes())
        seed = self.key + digest.digest()
        return {
            name: value + deviation * _normal(seed + name.encode(), value.shape)
            for name, value in change.items()
        }


def private_update(
    update: State,
    before: State,
    *,
    trained: Collection[str],
    settings: PrivacyConfig,
    noise: Noise,
) -> State:
    """Return a client's weights with a clipped and noised change, other entries as before it."""
    change = clipped(update, before, trained=trained, norm=settings.clip_norm)
    return _moved(before, noise.into(change, _deviation(settings)))


def private_mean(
    updates: Updates, *, asked: int, trained: Collection[str], settings: PrivacyConfig, noise: Noise
) -> State:
    """Return the weights moved by the noised sum of clipped changes, over the clients ``asked``.

    An update that is missing counts as zero: were it left out of the count, each client would
    decide how much the others weigh.
    """
    before = updates.broadcast
    total = {name: torch.zeros_like(before[name], dtype=torch.float64) for name in trained}
    for client in updates.weights:
        update = updates.read(client)
        change = clipped(update, before, trained=trained, norm=settings.clip_norm)
        for name, value in change.items():
            total[name] += value
    total = noise.into(total, _deviation(settings))
    return _moved(before, {name: value / asked for name, value in total.items()})


def _deviation(settings: PrivacyConfig) -> float:
    return settings.noise_multiplier * settings.clip_norm


def _moved(before: State, change: State) -> State:
    moved = {n: (before[n].double() + value).to(before[n].dtype) for n, value in change.items()}
    return before | moved


def _normal(seed: bytes, shape: torch.Size) -> torch.Tensor:
    """Return standard normal float64 numbers: the quantiles of 52 random bits each."""
    content = hashlib.shake_256(seed).digest(8 * shape.numel())
    words = np.frombuffer(content, "<u8") >> np.uint64(12)
    return torch.from_numpy(ndtri((words + 0.5) * 2.0**-52)).reshape(shape)
