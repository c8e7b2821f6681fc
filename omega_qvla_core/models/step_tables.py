"""What an action head computes from the flow-matching time alone, kept from one chunk to the next.

Time embeddings and the modulation (scale, shift, gate) of every layer depend on the weights and the step, never on an
observation: at full size they are a quarter of the bytes that a step of Pi 0.5 reads. They are computed once per number
of steps, and again as soon as a weight that they come from has changed, moved or been replaced.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T")

# Tables of more numbers of steps than this are not kept at the same time.
MAX_ENTRIES = 4


@dataclass(frozen=True)
class _Source:
    """A tensor that a table was computed from; keeping an alias keeps its address from being given to another one."""

    alias: Tensor
    version: int

    def is_current(self, tensor: Tensor) -> bool:
        return (
            tensor.data_ptr() == self.alias.data_ptr()
            and tensor.dtype == self.alias.dtype
            and tensor.device == self.alias.device
            and tensor._version == self.version
        )


@dataclass(frozen=True)
class _Entry(Generic[T]):
    modules: tuple[nn.Module, ...]
    sources: tuple[_Source, ...]
    value: T

    def is_current(self, modules: tuple[nn.Module, ...], tensors: list[Tensor]) -> bool:
        return (
            len(modules) == len(self.modules)
            and all(found is known for found, known in zip(modules, self.modules))
            and len(tensors) == len(self.sources)
            and all(source.is_current(tensor) for source, tensor in zip(self.sources, tensors))
        )


class StepTables(Generic[T]):
    """Values by number of steps, valid for as long as the modules that they come from stay the same.

    A change is seen by the tensors' version counters, addresses, types and devices, and by the identity of the modules.
    Only a write through ``parameter.data`` escapes them; call ``clear`` after one.
    """

    def __init__(self) -> None:
        self._entries: dict[tuple[Any, ...], _Entry[T]] = {}

    def get(self, num_steps: int, sources: Iterable[nn.Module], compute: Callable[[], T]) -> T:
        """The value for ``num_steps``, computed if it is not known or no longer valid.

        Nothing is kept while gradients flow to a source, and while a source is watched by hooks: both want every call.

        Args:
            num_steps: Number of denoise steps.
            sources: Modules that ``compute`` calls.
            compute: Makes the value.
        """
        modules = tuple(module for source in sources for module in source.modules())
        tensors = [tensor for module in modules for tensor in (*_own(module._parameters), *_own(module._buffers))]
        if not _may_keep(modules, tensors):
            return compute()
        key = (num_steps, *_autocast_state(tensors))
        entry = self._entries.get(key)
        if entry is None or not entry.is_current(modules, tensors):
            # Not inference tensors, so that a caller outside inference mode can use them too.
            with torch.inference_mode(False), torch.no_grad():
                value = compute()
            entry = _Entry(modules, tuple(_Source(one.detach(), one._version) for one in tensors), value)
            if len(self._entries) >= MAX_ENTRIES:
                self._entries.clear()
            self._entries[key] = entry
        return entry.value

    def clear(self) -> None:
        """Forget everything."""
        self._entries.clear()

    def __deepcopy__(self, memo: dict[int, Any]) -> StepTables[T]:
        """A copied model starts with empty tables."""
        return StepTables()

    def __getstate__(self) -> dict[str, Any]:
        return {"_entries": {}}


def _own(tensors: dict[str, Tensor | None]) -> list[Tensor]:
    return [tensor for tensor in tensors.values() if tensor is not None]


def _may_keep(modules: tuple[nn.Module, ...], tensors: list[Tensor]) -> bool:
    if any(module._forward_hooks or module._forward_pre_hooks for module in modules):
        return False
    # Inference tensors have no version counter: a change in place could not be seen.
    if any(tensor.is_inference() for tensor in tensors):
        return False
    return not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors))


def _autocast_state(tensors: list[Tensor]) -> tuple[Any, ...]:
    device = tensors[0].device.type if tensors else "cpu"
    if not torch.is_autocast_enabled(device):
        return (None,)
    return (torch.get_autocast_dtype(device),)
