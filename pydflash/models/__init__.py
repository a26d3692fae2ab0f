"""Models: one module an architecture, what they share, and what a file becomes when it is loaded."""

from pydflash.models.base import ModelConfig, Network
from pydflash.models.loading import ARCHITECTURES, Model, load_model

__all__ = ["ARCHITECTURES", "Model", "ModelConfig", "Network", "load_model"]
