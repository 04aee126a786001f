"""Other libraries' attention poolers, run by `multi_view_pool` with the same parameters and the same outputs.

A pooler with few queries folds into one call of the op (`folding.py`). Each kind of pooler has a file with the same
six names: `recognises(module)`, by what the module owns; `ARGUMENTS`, of its forward; `obstacle(module)`, why this one
does not fold; `flops(module)`; `examples(module, generator)`, inputs to verify with; and `Fusion`, the class that runs
it. `fuse.py` walks a model, `classes.py` says what replacing means, `verify.py` compares, and `unfoldable.py` names
the kinds that never fold.
"""
from .fuse import FusedNames, fuse_attention_poolers, restore_attention_poolers

__all__ = ["FusedNames", "fuse_attention_poolers", "restore_attention_poolers"]
