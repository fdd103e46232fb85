"""When memory is taken and given back: a record of storages while operators run.

Run on fake tensors it costs no memory; run with symbolic shapes it gives sizes as expressions over the
graph's symbols, so that one run answers for batches of every size.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import Any

import sympy
import torch
import torch.utils._pytree as pytree
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv
from torch.utils import _python_dispatch as dispatch
from torch.utils._python_dispatch import TorchDispatchMode

from forescale.graph.model import ModelGraph, Size

Note = Callable[[int, Any, bool], None]
"""Called with a storage's number, its size in bytes and whether it begins (or ends)."""


class StorageRecord(TorchDispatchMode):
    """Notes the begin and end of every storage that operators make while it is entered.

    Attributes:
        summing: set while autograd sums the gradients of a tensor that several operators read. It does that
            in place where nobody else holds the first one, but never while it is watched, as here: then the
            record does what autograd would have done.
    """

    def __init__(self, note: Note) -> None:
        super().__init__()
        self.summing = False
        self._unshared = _unshared_holders()
        self._note = note
        self._numbers: dict[int, int] = {}
        self._references: dict[int, weakref.ref[Any]] = {}
        self._count = 0

    def adopt(self, tensor: torch.Tensor) -> int:
        """Numbers the storage of a tensor that exists already, without noting that it begins."""
        return self._numbers.setdefault(_identity(tensor.untyped_storage()), -1 - len(self._numbers))

    def number(self, tensor: torch.Tensor) -> int:
        """The number of a tensor's storage; a storage not seen before begins now."""
        storage = tensor.untyped_storage()
        key = _identity(storage)
        if key not in self._numbers:
            self._numbers[key] = number = self._count
            self._count += 1
            self._watch(storage, key, number)
        return self._numbers[key]

    def _watch(self, storage: torch.UntypedStorage, key: int, number: int) -> None:
        size = storage.nbytes()
        self._note(number, size, True)

        def end(_: Any) -> None:
            del self._references[key]
            self._note(self._numbers.pop(key), size, False)

        self._references[key] = weakref.ref(storage, end)

    def _renew(self, tensor: torch.Tensor) -> None:
        """Notes a sum in place as an end and a begin: elsewhere the first gradient may belong to somebody."""
        storage = tensor.untyped_storage()
        self._note(self._numbers[_identity(storage)], storage.nbytes(), False)
        self._numbers[_identity(storage)] = self._count
        self._note(self._count, storage.nbytes(), True)
        self._count += 1

    def __torch_dispatch__(
        self,
        func: Any,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if self.summing and func is torch.ops.aten.add.Tensor and _holders(args[0]) == self._unshared:
            self._renew(args[0])
            return torch.ops.aten.add_.Tensor(*args)
        result = func(*args, **(kwargs or {}))
        for leaf in pytree.tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.number(leaf)
        return result


# These have no public names; the parameters are Any because the private ones have no types either.


def _identity(storage: Any) -> int:
    return storage._cdata


def _holders(tensor: Any, functions: Any = torch._C) -> tuple[int, int]:  # pyright: ignore[reportPrivateUsage]
    """How many hold the tensor and its storage."""
    return tensor._use_count(), functions._storage_Use_Count(_identity(tensor.untyped_storage()))


@cache
def _unshared_holders() -> tuple[int, int]:
    """What :func:`_holders` counts for a gradient that nobody but autograd holds."""
    counts: list[tuple[int, int]] = []
    without_modes: Any = dispatch._disable_current_modes  # pyright: ignore[reportPrivateUsage]

    class Count(TorchDispatchMode):
        def __torch_dispatch__(
            self,
            func: Any,
            types: Iterable[type],
            args: tuple[Any, ...] = (),
            kwargs: Mapping[str, Any] | None = None,
        ) -> Any:
            if func is torch.ops.aten.add.Tensor:
                counts.append(_holders(args[0]))
            return func(*args, **(kwargs or {}))

    with without_modes(), torch.enable_grad():
        read_twice = torch.ones(2, requires_grad=True) * 1
        left, right = read_twice * 2, read_twice * 3
        with Count():
            torch.autograd.backward([left, right], [torch.ones(2), torch.ones(2)])
    (count,) = counts
    return count


class SymbolicShapes:
    """Fake tensors whose shapes are the graph's symbols."""

    def __init__(self, graph: ModelGraph) -> None:
        self._environment = ShapeEnv()
        self.mode = FakeTensorMode(shape_env=self._environment, allow_non_fake_inputs=True)
        self.binding: dict[str, Any] = {}
        self._own: dict[Any, sympy.Symbol] = {}
        self._sizes: dict[Any, Size] = {}
        for name, example in graph.example.items():
            source = ConstantSource(name)
            symbol = self._environment.create_symbol(example, source, DimDynamic.DYNAMIC, None)
            self.binding[name] = self._environment.create_symintnode(symbol, hint=example, source=source)
            self._own[symbol] = sympy.Symbol(name, integer=True, positive=True)

    @property
    def general(self) -> bool:
        """Whether every operator could compute with symbols; some fix them to their example's values."""
        return not self._environment.replacements

    def size(self, value: Any) -> Size:
        """A size that operators computed, as an expression over the graph's symbols."""
        if isinstance(value, int):
            return value
        expression = value.node.expr
        if expression not in self._sizes:
            expanded = sympy.expand(expression.xreplace(self._own))
            self._sizes[expression] = int(expanded) if expanded.is_number else str(expanded)
        return self._sizes[expression]
