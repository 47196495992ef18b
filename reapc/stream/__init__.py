"""The layer-streamed forward pass: one layer in memory at a time."""

from reapc.stream.model import StreamedModel
from reapc.stream.run import HiddenStates, run_layers, states_of

__all__ = ["HiddenStates", "StreamedModel", "run_layers", "states_of"]
