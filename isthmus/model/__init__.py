"""The MLA decoder in torch: weights from a checkpoint, one forward for prefill and decode."""

from isthmus.model.load import load_model
from isthmus.model.model import Model
from isthmus.model.weights import Progress

__all__ = ["Model", "Progress", "load_model"]
