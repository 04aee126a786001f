"""Running exported encoders and checkpoints."""
from .encoder import Encoder

__all__ = ["Encoder"]
