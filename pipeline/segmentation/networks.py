"""Client networks by name, from segmentation-models-pytorch."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from pipeline import runtime  # noqa: F401  (before smp imports torchvision)

# isort: split
import safetensors
import safetensors.torch
import segmentation_models_pytorch as smp
import torch
from torch import Tensor, nn

from pipeline.config import Architecture, Config, NetworkConfig, Precision
from pipeline.errors import ConfigError, DataError

State = dict[str, Tensor]

_DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}

#: Class, and what it calls ``decoder_channels``: a list, one number, or nothing of the kind.
_ARCHITECTURES: dict[Architecture, tuple[Any, str | None]] = {
    "unet": (smp.Unet, "decoder_channels"),
    "fpn": (smp.FPN, None),
    "linknet": (smp.Linknet, None),
    "deeplabv3plus": (smp.DeepLabV3Plus, None),
    "segformer": (smp.Segformer, "decoder_segmentation_channels"),
}


def build_model(settings: Config, *, seed: int, network: NetworkConfig | None = None) -> nn.Module:
    """Build a network for ``settings``, with weights drawn from ``seed``.

    It maps (B, 3, S, S) float images, normalised by ``normalise``, to logits (B, K+1, S, S).

    Args:
        network: which one; the global one, ``settings.model``, if None.

    Raises:
        ConfigError: architecture, encoder and image size do not fit. DataError: bad weights.
    """
    config = network or settings.model
    build, _ = _ARCHITECTURES[config.architecture]
    arguments = smp_arguments(config, num_classes=settings.data.num_classes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            model: nn.Module = build(config.encoder, encoder_weights=None, **arguments)
        except Exception as error:  # smp and timm raise KeyError, ValueError, RuntimeError here
            message = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ConfigError(
                f"model: {config.architecture} with encoder '{config.encoder}' cannot be built "
                f"({message}); see segmentation-models-pytorch's list of encoders"
            ) from error
    if config.encoder_weights is not None:
        _load_encoder(model, config.encoder_weights)
    if config.normalisation == "group":
        model = with_group_norm(model)
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    _check_output(model, settings, config)
    return model


class GroupNorm(nn.GroupNorm):
    """Group norm (Wu & He, 2018) in a batch norm's place, with its weights and its activation.

    As many groups as divide the channels, 32 at most, of four channels or more: single channels
    would vanish where a map has shrunk to one pixel.
    """

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        channels = norm.num_features
        groups = math.gcd(channels, 32)
        while groups > 1 and channels // groups < 4:
            groups //= 2
        super().__init__(groups, channels, eps=norm.eps)
        self.load_state_dict({"weight": norm.weight, "bias": norm.bias})
        # timm's batch norm layers drop and activate too
        then: list[Any] = [norm.drop, norm.act] if hasattr(norm, "act") else []
        self.then = nn.ModuleList(then)

    def forward(self, images: Tensor) -> Tensor:
        """Normalise each image (B, C, H, W) by itself."""
        images = super().forward(images)
        for layer in self.then:
            images = layer(images)
        return images


def with_group_norm(network: nn.Module) -> nn.Module:
    """Return a network of which every batch norm layer is a group norm layer of the same weights.

    Parameters keep their names; batch norm's statistics are gone.
    """
    for name, module in list(network.named_modules()):
        if isinstance(module, nn.BatchNorm2d):
            network.set_submodule(name, GroupNorm(module))
    return network


def smp_arguments(config: NetworkConfig, *, num_classes: int) -> dict[str, Any]:
    """Return the arguments beside encoder and weights that segmentation-models-pytorch takes.

    Raises:
        ConfigError: there are not as many ``decoder_channels`` as the architecture needs.
    """
    _, channels = _ARCHITECTURES[config.architecture]
    widths = {} if channels is None else {channels: _decoder_channels(config)}
    return {"encoder_depth": config.encoder_depth, "classes": num_classes + 1, **widths}


def _decoder_channels(config: NetworkConfig) -> Any:
    """Return the decoder's widths as smp takes them: a list for U-Net, a number for SegFormer."""
    channels, depth = config.decoder_channels, config.encoder_depth
    single = config.architecture == "segformer"
    if len(channels) != (1 if single else depth):
        expected = "one for segformer" if single else f"one for each of model.encoder_depth={depth}"
        raise ConfigError(
            f"model.decoder_channels: found {len(channels)} values, expected {expected}"
        )
    return channels[0] if single else channels


def build_for_training(settings: Config, network: NetworkConfig, device: torch.device) -> nn.Module:
    """Build a network as a run trains it: from the run's seed, on ``device``, in its precision.

    Weights are float32 in any precision; ``logits_of`` computes in it.

    Raises:
        ConfigError, DataError: as ``build_model``.
    """
    model = build_model(settings, seed=settings.seed, network=network).to(device)
    model.computes_in = _DTYPES[settings.federate.precision]  # type: ignore[assignment]
    return model


@torch.inference_mode()
def _check_output(model: nn.Module, settings: Config, config: NetworkConfig) -> None:
    """Check sizes: some architectures need what their strides divide, or answer at another."""
    size = settings.data.image_size
    try:
        found = tuple(model.eval()(torch.zeros(1, 3, size, size)).shape[1:])
    except RuntimeError as error:
        message = str(error).splitlines()[0]
        raise ConfigError(
            f"model: {config.architecture} cannot take {size} px ({message})"
        ) from error
    expected = (settings.data.num_classes + 1, size, size)
    if found != expected:
        raise ConfigError(
            f"model: {config.architecture} of depth {config.encoder_depth} answers with {found} "
            f"for images of {size} px, expected {expected}; change model.encoder_depth"
        )


def _load_encoder(model: nn.Module, path: Path) -> None:
    """Load timm weights into the encoder; a classifier in the file is not used."""
    advice = "correct model.encoder_weights, or set it to null"
    if not path.is_file():
        raise DataError(f"{path}: no such file; {advice}")
    try:
        state = safetensors.torch.load_file(path)
    except safetensors.SafetensorError as error:
        raise DataError(f"{path}: not a readable safetensors file ({error}); {advice}") from error
    encoder: Any = model.encoder
    target: nn.Module = getattr(encoder, "model", encoder)
    wanted = target.state_dict()
    for name, value in wanted.items():
        if name not in state or state[name].shape != value.shape:
            raise DataError(
                f"{path}: '{name}' is missing or of another shape; expected the weights of the "
                "encoder that model.encoder names"
            )
    target.load_state_dict({name: state[name].to(wanted[name].dtype) for name in wanted})


def normalise(images: Tensor) -> Tensor:
    """Map images (B, 3, S, S) in 0..1 to the networks' range -1..1, channels last in memory."""
    return (images * 2 - 1).contiguous(memory_format=torch.channels_last)


def logits_of(model: nn.Module, images: Tensor) -> Tensor:
    """Return logits (B, K+1, S, S) float32, in the precision that the model was built to train in.

    Args:
        images: (B, 3, S, S) float32, as ``normalise`` returns them.
    """
    dtype = getattr(model, "computes_in", torch.float32)
    with torch.autocast(images.device.type, dtype=dtype, enabled=dtype != torch.float32):
        logits: Tensor = model(images)
    return logits.float()


def get_state(model: nn.Module) -> State:
    """Copy the model's parameters and buffers to the CPU."""
    return {name: value.detach().cpu().clone() for name, value in model.state_dict().items()}


@torch.inference_mode()
def predict_probabilities(model: nn.Module, images: Tensor, *, batch_size: int = 32) -> Tensor:
    """Return probabilities (N, K+1, S, S) float32 of uint8 images (N, 3, S, S), evaluation mode.

    They come in the precision that the model was built to train in, as targets do.
    """
    device = next(model.parameters()).device
    model.eval()
    parts = [
        logits_of(model, normalise(batch.to(device).float() / 255)).softmax(dim=1).cpu()
        for batch in images.split(batch_size)
    ]
    return torch.cat(parts)


@torch.inference_mode()
def predict_masks(model: nn.Module, images: Tensor) -> Tensor:
    """Return class indices (N, S, S) uint8 of uint8 images (N, 3, S, S), evaluation mode.

    They are computed in float32, whatever the model was built to train in, so that a score in a
    round is the score that ``evaluate`` finds.
    """
    device = next(model.parameters()).device
    model.eval()
    parts = (model(normalise(part.to(device).float() / 255)) for part in images.split(32))
    return torch.cat([part.max(dim=1).indices.to(torch.uint8).cpu() for part in parts])
