"""Finding the attention poolers of a model, fusing them, and undoing it."""
from __future__ import annotations

import torch
from torch import nn

from . import (
    additive,
    attention_pool2d,
    attention_pool2d_timm,
    attention_pool_latent,
    attentional_pooler,
    siglip,
    siglip2,
    unfoldable,
)
from .classes import FusedPooler, fused_class, own_class
from .features import called_otherwise
from .verify import compare

_KINDS = (
    attentional_pooler, attention_pool_latent, siglip, siglip2, attention_pool2d, attention_pool2d_timm, additive,
)  # fmt: skip


class FusedNames(list):
    """Names of the poolers that were fused. `left_alone`: {name: reason} of those that were recognised and were not."""

    def __init__(self, names: list[str], left_alone: dict[str, str]):
        super().__init__(names)
        self.left_alone = left_alone


def fuse_attention_poolers(model: nn.Module, *, verify: bool = True, always: bool = False) -> FusedNames:
    """Run a model's attention poolers by `multi_view_pool`, in place: same parameters, same outputs, same gradients.

    Supported, each told by what it owns and how it is called, in whatever library or copy of one it lives:
        open_clip `AttentionalPooler`, with `nn.MultiheadAttention` or open_clip's own attention
        open_clip, OpenAI and timm `AttentionPool2d` (timm: with pool_type "token")
        timm `AttentionPoolLatent`
        transformers `SiglipMultiheadAttentionPoolingHead` and its copies, `Siglip2MultiheadAttentionPoolingHead`
        the additive attention of PVSE's PIE-Net, `MultiHeadSelfAttention` with w_1 and w_2 (only with `always`)

    Keys and values are no longer made for every token: key projections fold into the view codes, value projections act
    on what was pooled, and a LayerNorm inside the pooler goes into the kernel. A module object that is fused stays what
    it is, with its parameters, state-dict keys, hooks and mode, and becomes an instance of a subclass of its class;
    `restore_attention_poolers` turns it back. Models with fused poolers can be copied, pickled, compiled and exported.

    What does not fold at the time of a call, such as a mask that differs between heads, runs as the library runs it.
    docs/converters.md lists that, and what differs: second derivatives are refused, the gradient of key biases is
    exactly 0 instead of rounding noise around it, and a sample all of whose tokens are masked pools nothing.

    Args:
        model: any module; it may be a pooler itself, whose name is then "".
        verify: run every pooler, before and after, on random inputs in float64 and in its own precision, on its own
            device. Differences beyond rounding raise; the model is then as it was. Neither the random state, nor
            hooks, mode or buffers of the model notice.
        always: fuse also where it costs more floating-point operations a token than it saves: with H heads, Q
            queries, D-wide tokens and E-wide keys, 4·H·Q·D against 4·E·(D + Q), that is with more than about E views.
            The kernels take 64 views; with more the op runs as plain PyTorch (`last_backend()` tells).

    Returns:
        The names of the poolers fused by this call, as a list, a shared module under each of its names. Its attribute
        `left_alone` is a dictionary {name: reason} of poolers that were recognised and not fused.

    Raises:
        TypeError: model is not a module.
        RuntimeError: `verify` found a difference, told with the pooler's name; nothing was changed.
    """
    poolers = _modules(model)
    decisions: dict[nn.Module, tuple[type | None, str]] = {}
    for name, module in poolers:
        if module not in decisions:
            decisions[module] = _decide(name, module, verify, always)
    for module, (fused, _) in decisions.items():
        if fused is not None:
            module.__class__ = fused
    left_alone = {name: decisions[module][1] for name, module in poolers if decisions[module][1]}
    return FusedNames([name for name, module in poolers if decisions[module][0] is not None], left_alone)


def restore_attention_poolers(model: nn.Module) -> list[str]:
    """Undo `fuse_attention_poolers`: the very same modules, with the parameters they have now, run as before.

    Returns:
        The names of what was restored; none if nothing is fused.

    Raises:
        TypeError: model is not a module.
        RuntimeError: something else changed the class of a fused pooler afterwards (FSDP and parametrizations do).
    """
    fused = [(name, module) for name, module in _modules(model) if isinstance(module, FusedPooler)]
    originals = {module: own_class(module) for _, module in fused}
    for module, original in originals.items():
        module.__class__ = original
    return [name for name, _ in fused]


def _modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """All modules with all their names, in order."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is {type(model).__name__}; it must be a torch.nn.Module")
    return list(model.named_modules(remove_duplicate=False))


def _decide(name: str, module: nn.Module, verify: bool, always: bool) -> tuple[type | None, str]:
    """The class to fuse a module by, or why it is left alone, or neither if it is no pooler or fused already."""
    if isinstance(module, FusedPooler):
        return None, ""
    kind = next((kind for kind in _KINDS if kind.recognises(module)), None)
    if kind is None:
        return None, unfoldable.reason(module)
    if reason := called_otherwise(module, *kind.ARGUMENTS) or kind.obstacle(module):
        return None, reason
    cost = kind.flops(module)
    if cost.fused > cost.own and not always:
        return None, (
            f"folded into {cost.views} views it would take {cost.fused:,} floating-point operations a token instead of "
            f"{cost.own:,}; always=True fuses it all the same"
        )
    fused = fused_class(kind.Fusion, type(module))
    reason = ""
    if verify:
        with torch.device("cpu"):  # whatever the user's default is
            examples = kind.examples(module, torch.Generator().manual_seed(0))
        reason = compare(name, module, fused, examples)
    return (None, reason) if reason else (fused, "")
