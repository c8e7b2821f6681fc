"""Memory and bookkeeping that the CPU engine's parts share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode


class Buffers:
    """Tensors that are written in every run, by name and shape; parts that run one after the other share them."""

    def __init__(self) -> None:
        self._tensors: dict[tuple[Any, ...], Tensor] = {}
        self._owned: list[Tensor] = []

    def get(self, name: str, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """The buffer of that name and shape, made at the first call; its content is left over from its last use."""
        key = (name, *shape, dtype)
        if key not in self._tensors:
            self._tensors[key] = torch.zeros(shape, dtype=dtype)
        return self._tensors[key]

    def own(self, *shape: int) -> Tensor:
        """A float32 buffer for the caller alone, whose content lasts."""
        self._owned.append(torch.zeros(shape))
        return self._owned[-1]

    def bytes(self) -> int:
        """Size of all buffers."""
        return sum(one.numel() * one.element_size() for one in (*self._tensors.values(), *self._owned))


@dataclass(frozen=True)
class _Module:
    """What a module held: compared before every run, so without a walk over the model."""

    module: nn.Module
    children: list[nn.Module | None]
    tensors: list[Tensor]
    state: list[tuple[int, int]]
    aliases: list[Tensor]

    @classmethod
    def of(cls, module: nn.Module) -> _Module:
        tensors = _own(module)
        state = [(one.data_ptr(), _version(one)) for one in tensors]
        # Aliases keep an address from being given to another tensor.
        return cls(module, [*module._modules.values()], tensors, state, [one.detach() for one in tensors])

    def is_current(self) -> bool:
        tensors = _own(self.module)
        return (
            [*self.module._modules.values()] == self.children
            and len(tensors) == len(self.tensors)
            and all(one is other for one, other in zip(tensors, self.tensors))
            and all((one.data_ptr(), _version(one)) == state for one, state in zip(tensors, self.state))
        )


class Watched:
    """State of a model's tensors and modules, to see whether an engine's copies of them are still true.

    A write through ``parameter.data`` escapes it, as it escapes torch's own version counters.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules = [_Module.of(module) for module in model.modules()]

    def is_current(self) -> bool:
        """Whether nothing has been written, moved or replaced since."""
        return all(one.is_current() for one in self._modules)

    def has_hooks(self) -> bool:
        """Whether someone wants to see the modules' calls."""
        return any(one.module._forward_hooks or one.module._forward_pre_hooks for one in self._modules)


class _Counter(TorchDispatchMode):
    """Counts operators, views included."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def count_operators(call: Callable[[], Any]) -> int:
    """Operators that torch dispatches during a call, views included."""
    # Composite operators are taken apart in inference mode as little as they are outside it with gradients off.
    with torch.inference_mode(False), torch.no_grad(), _Counter() as counter:
        call()
    return counter.count


def _own(module: nn.Module) -> list[Tensor]:
    return [one for one in (*module._parameters.values(), *module._buffers.values()) if one is not None]


def _version(tensor: Tensor) -> int:
    # Inference tensors have no version counter.
    return 0 if tensor.is_inference() else tensor._version
