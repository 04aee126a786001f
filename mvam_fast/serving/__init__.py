"""Running exported encoders."""
from .encoder import Encoder

__all__ = ["Encoder"]
