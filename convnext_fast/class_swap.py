"""Another forward for a module that exists, by a subclass of its own class that takes the class's place.

Parameters, buffers, children, hooks and names stay where they are, so that optimizers, state dicts, copies, wrappers
and checks by ``isinstance`` or by class name find what they knew. The class goes by its original's name and module:
Hugging Face and FSDP policies compare names, and torch.fx takes modules of ``torch.nn`` for leaves.
"""

from __future__ import annotations

import copyreg
import functools
import types

from torch import nn

Settings = tuple[tuple[str, object], ...]


class Swapped:
    """What every such subclass has in front of its original class. See :func:`swap`."""

    _original: type[nn.Module]
    _mixin: type[Swapped]
    _settings: Settings

    def __new__(cls, *args, **kwargs):
        """``type(module)(...)``, by which adapters build modules like ``module``, builds one of the original class."""
        if (args or kwargs) and "_original" in cls.__dict__:
            return cls._original(*args, **kwargs)
        return object.__new__(cls)

    def __reduce_ex__(self, protocol):
        """Copies and pickles name the original class, and make the subclass anew."""
        reduced = super().__reduce_ex__(max(protocol, 2))
        if reduced[0] is not copyreg.__newobj__ or not is_swapped(self):
            return reduced
        return (_new, (self._original, self._mixin, self._settings), *reduced[2:])

    def __prepare_scriptable__(self):
        raise RuntimeError(
            f"torch.jit.script compiles the source of forward, and this {type(self).__name__} runs on operators that "
            f"it does not know; call convnext_fast.restore(model) first (torch.jit.trace and torch.export need no such "
            f"call)"
        )


def is_swapped(module: nn.Module) -> bool:
    """Is the class of ``module`` one of ours, and not one that somebody derived from it (FSDP, parametrisation)?"""
    return "_original" in type(module).__dict__


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class that ``module`` has, or had before :func:`swap`."""
    return type(module).__dict__.get("_original", type(module))


def swap(module: nn.Module, mixin: type[Swapped], **settings) -> None:
    """Give ``module`` the forward of ``mixin``, and ``settings`` (hashable, picklable) as attributes of its class."""
    module.__class__ = _swapped_class(original_class(module), mixin, tuple(settings.items()))


def unswap(module: nn.Module) -> None:
    module.__class__ = original_class(module)


def both(kind: type[nn.Module], mixin: type[Swapped]) -> tuple[type[nn.Module], ...]:
    """``kind``, and what :func:`swap` makes of it with ``mixin`` and no settings."""
    return kind, _swapped_class(kind, mixin, ())


@functools.cache
def _swapped_class(original: type[nn.Module], mixin: type[Swapped], settings: Settings) -> type[nn.Module]:
    body = {
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
        "_original": original,
        "_mixin": mixin,
        "_settings": settings,
        **dict(settings),
    }
    return types.new_class(original.__name__, (mixin, original), exec_body=lambda namespace: namespace.update(body))


def _new(original: type[nn.Module], mixin: type[Swapped], settings: Settings) -> nn.Module:
    return object.__new__(_swapped_class(original, mixin, settings))
