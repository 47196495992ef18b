"""What a model is, from its config.json alone."""

from reapc.arch.config import load_config, model_spec
from reapc.arch.spec import LayerSpec, ModelSpec, TensorSpec

__all__ = ["LayerSpec", "ModelSpec", "TensorSpec", "load_config", "model_spec"]
