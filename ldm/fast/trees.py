"""Trees of modules: the same weights in another tree, the old one unchanged."""
from collections.abc import Callable
from copy import copy
from typing import TypeVar, cast

import torch
from torch import Tensor, nn

Module = TypeVar("Module", bound=nn.Module)


def rebuilt(module: Module, rule: Callable[[nn.Module], nn.Module | None]) -> Module:
    """The same tree of modules over the same tensors; but rule(child), where not None, for each child. What
    stands in two places of the tree is one module in the new one, too."""
    known: dict[int, nn.Module] = {}

    def made(part: nn.Module) -> nn.Module:
        if id(part) not in known:
            known[id(part)] = rule(part) or copied(part)
        return known[id(part)]

    def copied(part: nn.Module) -> nn.Module:
        if hasattr(part, "_orig_mod"):              # it hands on all that is set here to the original
            raise TypeError("A network that is compiled cannot be rebuilt: apply this before torch.compile, "
                            "or to a pipeline that fast.optimize(…, compile=True) has not changed.")
        twin = copy(part)
        twin._modules = {name: None if child is None else made(child)
                         for name, child in part._modules.items()}
        return twin
    return cast(Module, copied(module))


def replaced(module: Module, path: str, child: nn.Module) -> Module:
    """The same tree over the same tensors, with `child` at a path such as "mid_block.attentions.0"."""
    name, _, rest = path.partition(".")
    twin = copy(module)
    twin._modules = {**module._modules,
                     name: replaced(module.get_submodule(name), rest, child) if rest else child}
    return twin


class Remembers(nn.Module):
    """Base of the modules that carry something from one call to the next."""


def refuse_gradients(module: nn.Module, name: str, *given: Tensor) -> None:
    """Raises an error where the call of what fast.`name` made should give gradients."""
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (*given, *module.parameters())):
        raise RuntimeError(f"What fast.{name} makes has no gradients: call it under torch.no_grad(), or use "
                           f"the module that it was made from.")
