"""Telling a pooler by what it owns and by how it is called, and why one may not be run in another way."""
from __future__ import annotations

import inspect
from collections.abc import Iterable

import torch
from torch import nn

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def owns(module: nn.Module, parameters: set[str], children: set[str]) -> bool:
    """Whether these are all the parameters and submodules that the module holds itself."""
    held = {name for name, value in module._parameters.items() if value is not None}
    kept = {name for name, value in module._modules.items() if value is not None}
    return held == parameters and kept == children


def called_otherwise(module: nn.Module, *arguments: str) -> str:
    """Why replacing the class's `forward(self, *arguments)` would not replace what is run; empty if it would."""
    if isinstance(module, torch.jit.ScriptModule):
        return "it is a TorchScript module"
    if "forward" in vars(module):
        return "its forward was replaced on the object, which the class does not govern"
    found = tuple(inspect.signature(type(module).forward).parameters)[1:]
    if found != arguments:
        return f"its forward takes ({', '.join(found)}), not ({', '.join(arguments)})"
    return ""


def passed_by(module: nn.Module, names: Iterable[str]) -> str:
    """Why the submodules `names`, which the fused pooler does not call, are missed; empty if none is."""
    for name in names:
        child = module.get_submodule(name)
        if "forward" in vars(child):
            return f"the forward of {name} was replaced on the object, and would not run"
        if any(getattr(child, hooks) for hooks in HOOKS):
            return f"{name} has hooks, which would not run"
    return ""


def not_linear(module: nn.Module, name: str) -> str:
    """Why the submodule `name` is more than its weight and bias; empty if it is a Linear."""
    child = module.get_submodule(name)
    if type(child).forward is not nn.Linear.forward:
        return f"{name} is a {type(child).__name__}, not a Linear"
    return ""
