"""Which model is meant: a run by name or folder, or an exported file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pipeline.config import Config
from pipeline.disk import is_folder_name
from pipeline.errors import ConfigError, StageError
from pipeline.inference.model import Model

MODEL_FILE = "model.safetensors"  # of an exported folder


@dataclass(frozen=True)
class Choice:
    """What a user asks for."""

    model: str  # a run's name or folder, an exported folder, or an .onnx or .safetensors file
    client: str | None = None  # whose own model
    teacher: bool = False  # SAM, as the run's settings ask for it
    device: str = "auto"


def load_model(config: Config, choice: Choice) -> Model:
    """Load the model that is asked for; nothing but JSON, safetensors and ONNX is ever opened.

    Raises:
        ConfigError: there is no such model, or it cannot be run here. StageError: the run is not
        complete. CorruptStoreError, FormatError: a file is damaged, or of another version.
    """
    path = find_model(config, choice.model)
    if path.suffix == ".onnx":
        _refuse(choice, path)
        from pipeline.inference.onnx_model import OnnxModel

        return OnnxModel(path, device=choice.device)
    # here, as an exported ONNX model is used without torch
    from pipeline.federation.runs import RunFolder
    from pipeline.inference.torch_model import load_network, load_teacher_model

    if path.is_file():
        _refuse(choice, path)
        return load_network(path, device=choice.device)
    run = RunFolder(path)
    if choice.teacher:
        used = run.config().model_copy(update={"cache": config.cache})
        return load_teacher_model(used, device=choice.device)
    return load_network(run.weights_path(choice.client), device=choice.device)


def find_model(config: Config, name: str) -> Path:
    """Return a run's folder, or an exported file.

    Raises:
        ConfigError: it is neither.
    """
    path = Path(name)
    if not path.exists() and is_folder_name(name):
        path = config.cache.root / "runs" / name
    if (path / MODEL_FILE).is_file():
        return path / MODEL_FILE
    if path.is_dir():
        return path
    if not path.exists():
        raise StageError(
            f"{name}: no such run or file; expected a name or folder of {path.parent}, or what "
            "`samfed export` wrote"
        )
    if path.suffix not in (".onnx", ".safetensors"):
        raise ConfigError(
            f"{name}: not a model that can be opened; expected a run, or an .onnx or .safetensors "
            "file that `samfed export` wrote"
        )
    return path


def _refuse(choice: Choice, path: Path) -> None:
    if choice.client is not None or choice.teacher:
        raise ConfigError(f"{path}: --client and --teacher need a run, and this is one model")
