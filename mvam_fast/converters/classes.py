"""What replacing a pooler means: the module object stays, its class becomes a subclass that runs the fused op.

As `torch.nn.utils.parametrize` and FSDP do it. Parameters, buffers, submodules, hooks, mode, names, and every reference
that anybody holds to the module stay what they are, because they are; its own forward remains reachable by `super()`.
"""
from __future__ import annotations

import functools

from torch import nn


class FusedPooler:
    """Mixed in front of a pooler's own class. Subclasses, one for each kind of pooler, override `forward`."""

    def __reduce_ex__(self, protocol):
        """The class has no name to be imported by: copies and pickles name the two that it is made of."""
        own = vars(type(self)).get("own_class")
        if own is None:  # somebody else's subclass, which must know itself how it is copied
            return super().__reduce_ex__(protocol)
        return (_unfilled, (type(self).__bases__[0], own), *super().__reduce_ex__(protocol)[2:])


@functools.cache
def fused_class(fusion: type[FusedPooler], own: type[nn.Module]) -> type:
    """The subclass of `own` that runs as `fusion` says."""
    members = {"own_class": own, "__module__": fusion.__module__, "__doc__": fusion.__doc__}
    return type(f"Fused{own.__name__}", (fusion, own), members)


def own_class(module: nn.Module) -> type[nn.Module]:
    """The library's class of a fused pooler."""
    own = vars(type(module)).get("own_class")
    if own is None:
        raise RuntimeError(
            f"the class of a fused pooler was changed afterwards, to {type(module).__name__}; undo that change first"
        )
    return own


def _unfilled(fusion: type[FusedPooler], own: type[nn.Module]) -> nn.Module:
    fused = fused_class(fusion, own)
    return fused.__new__(fused)
