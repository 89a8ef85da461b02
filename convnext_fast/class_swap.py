"""Another forward for a module that exists, by a subclass of its own class that takes the class's place.

Parameters, buffers, children, hooks and names stay where they are, so that optimizers, state dicts, copies, wrappers
and checks by ``isinstance`` or by class name find what they knew. The class goes by its original's name and module:
Hugging Face and FSDP policies compare names, and torch.fx takes modules of ``torch.nn`` for leaves.
"""

from __future__ import annotations

import copyreg
import functools
import inspect
import types
from collections.abc import Hashable
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Swap:
    """What a subclass of ours was made of; hashable and picklable."""

    original: type[nn.Module]
    mixin: type[Swapped]
    settings: Hashable


class Swapped:
    """What every such subclass has in front of its original class. See :func:`swap`.

    A subclass of this one has ``_convnext_fast_run(self, x)``, which is the new forward.
    """

    # The only attribute that our classes add, and looked up in classes: a module may have any other one itself.
    _convnext_fast_swap: Swap

    def __new__(cls, *args, **kwargs):
        """``type(module)(...)``, by which adapters build modules like ``module``, builds one of the original class."""
        if (args or kwargs) and "_convnext_fast_swap" in cls.__dict__:
            return cls._convnext_fast_swap.original(*args, **kwargs)
        return object.__new__(cls)

    def __init__(self, *args, **kwargs):
        """What is built, or built anew, is of the original class: nobody has looked at what it is set to."""
        if is_swapped(self):
            unswap(self)
            self.__init__(*args, **kwargs)
        else:
            super().__init__(*args, **kwargs)

    def __init_subclass__(cls, **kwargs):
        """What a library does with every subclass, such as to register its name, is not done with ours."""

    def __reduce_ex__(self, protocol):
        """Copies and pickles name the original class, and make the subclass anew."""
        reduced = super().__reduce_ex__(max(protocol, 2))
        if reduced[0] is not copyreg.__newobj__ or not is_swapped(self):
            return reduced
        return (_new, (swap_of(self),), *reduced[2:])

    def __prepare_scriptable__(self):
        raise RuntimeError(
            f"torch.jit.script compiles the source of forward, and this {type(self).__name__} runs on operators that "
            f"it does not know; call convnext_fast.restore(model) first (torch.jit.trace and torch.export need no such "
            f"call)"
        )


def is_swapped(module: nn.Module) -> bool:
    """Is the class of ``module`` one of ours, and not one that somebody derived from it (FSDP, parametrisation)?"""
    return "_convnext_fast_swap" in type(module).__dict__


def swap_of(module: Swapped) -> Swap:
    """Of a module that was swapped, whatever was derived from its class since."""
    return type(module)._convnext_fast_swap


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class that ``module`` has, or had before :func:`swap`."""
    return swap_of(module).original if is_swapped(module) else type(module)


def swap(module: nn.Module, mixin: type[Swapped], settings: Hashable = None) -> None:
    """Give ``module`` the forward of ``mixin``, which finds ``settings`` (hashable, picklable) by :func:`swap_of`."""
    module.__class__ = _swapped_class(Swap(original_class(module), mixin, settings))


def unswap(module: nn.Module) -> None:
    module.__class__ = original_class(module)


def both(kind: type[nn.Module], mixin: type[Swapped]) -> tuple[type[nn.Module], ...]:
    """``kind``, and what :func:`swap` makes of it with ``mixin`` and no settings."""
    return kind, _swapped_class(Swap(kind, mixin, None))


def forward_of(module: nn.Module):
    """The original ``forward(module, x)``."""
    return swap_of(module).original.forward


def only_argument(cls: type[nn.Module]) -> tuple[str, bool] | None:
    """What ``forward`` of ``cls`` calls the one argument that it needs, and whether it takes others.

    None where it needs more or less than one.
    """
    parameters = _parameters(cls.forward, follow_wrapped=False)
    wrapped = bool(parameters) and parameters[0].kind is inspect.Parameter.VAR_POSITIONAL
    if wrapped:  # by a decorator that hands on whatever it gets
        parameters = _parameters(cls.forward, follow_wrapped=True)[1:]
    else:
        parameters = parameters[1:]
    if not parameters or parameters[0].kind not in (parameters[0].POSITIONAL_OR_KEYWORD, parameters[0].POSITIONAL_ONLY):
        return None
    needed = [p for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    return (parameters[0].name, wrapped or len(parameters) > 1) if needed == parameters[:1] else None


def _parameters(function, follow_wrapped: bool) -> list[inspect.Parameter]:
    try:
        return list(inspect.signature(function, follow_wrapped=follow_wrapped).parameters.values())
    except (TypeError, ValueError):  # written in C, or no function
        return []


def _forward(self, x):
    made_of = getattr(type(self), "_convnext_fast_swap", None)
    if made_of is None:  # somebody kept this method, and the module is what it was
        return type(self).forward(self, x)
    return made_of.mixin._convnext_fast_run(self, x)


def _forward_with_others(self, x, *args, **kwargs):
    made_of = getattr(type(self), "_convnext_fast_swap", None)
    if made_of is None:
        return type(self).forward(self, x, *args, **kwargs)
    if args or kwargs:
        return made_of.original.forward(self, x, *args, **kwargs)
    return made_of.mixin._convnext_fast_run(self, x)


def _forward_like(original: type[nn.Module]) -> types.FunctionType:
    """The new forward, with the original's name for x: callers by keyword, exporters and tracers go by it."""
    name, others = only_argument(original)
    code = (_forward_with_others if others else _forward).__code__
    names = (code.co_varnames[0], name, *code.co_varnames[2:])
    qualified = f"{original.__qualname__}.forward"
    function = types.FunctionType(code.replace(co_varnames=names, co_name="forward"), globals(), "forward")
    function.__qualname__ = qualified
    function.__signature__ = inspect.signature(original.forward)
    return function


@functools.cache
def _swapped_class(made_of: Swap) -> type[nn.Module]:
    original = made_of.original
    body = {
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
        "_convnext_fast_swap": made_of,
        "forward": _forward_like(original),
    }
    bases = made_of.mixin, original
    return types.new_class(original.__name__, bases, exec_body=lambda namespace: namespace.update(body))


def _new(made_of: Swap) -> nn.Module:
    return object.__new__(_swapped_class(made_of))
