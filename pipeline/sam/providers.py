"""What of ONNX Runtime runs here: a provider that is compiled in may still lack its libraries."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import torch
from onnx import TensorProto, helper

from pipeline.errors import first_line
from pipeline.sam.onnx import CPU, CUDA

_LOG_WARNING, _LOG_FATAL = 2, 4  # of ONNX Runtime's levels 0..4: its default, and while it is tried
_OPSET, _IR_VERSION = 17, 8  # old enough for every ONNX Runtime that samfed takes


def failing_providers() -> dict[str, str | None]:
    """Run a model of one node on each provider that samfed uses here: the CPU, and CUDA with a GPU.

    Returns:
        the reason why it does not run, by provider; None where it does.
    """
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    result = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])
    graph = helper.make_graph([helper.make_node("Neg", ["x"], ["y"])], "one", [value], [result])
    opset = [helper.make_opsetid("", _OPSET)]
    model = helper.make_model(graph, opset_imports=opset, ir_version=_IR_VERSION)
    wanted = (CPU, CUDA) if torch.cuda.is_available() else (CPU,)
    ort.set_default_logger_severity(_LOG_FATAL)  # what cannot be loaded is returned, not printed
    try:
        return {provider: _failure(model, provider) for provider in wanted}
    finally:
        ort.set_default_logger_severity(_LOG_WARNING)


def _failure(model: onnx.ModelProto, provider: str) -> str | None:
    if provider not in ort.get_available_providers():
        return "this build of onnxruntime is without it"
    options = ort.SessionOptions()
    options.log_severity_level = _LOG_FATAL
    try:
        session = ort.InferenceSession(
            model.SerializeToString(), options, providers=[provider], enable_fallback=0
        )
        if session.get_providers()[0] != provider:
            return "its libraries cannot be loaded"
        (answer,) = session.run(None, {"x": np.ones(1, np.float32)})
    except Exception as error:  # its errors share no base class but Exception
        return first_line(error)
    return None if answer[0] == -1 else f"it answers {answer[0]} instead of -1"
