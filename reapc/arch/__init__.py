"""What a model is, from its config.json alone."""

from reapc.arch.config import load_config, model_spec
from reapc.arch.spec import LayerKind, LayerSpec, ModelSpec, TensorGroup, TensorSpec

__all__ = ["LayerKind", "LayerSpec", "ModelSpec", "TensorGroup", "TensorSpec", "load_config", "model_spec"]
