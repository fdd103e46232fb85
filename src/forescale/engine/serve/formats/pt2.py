"""Archives of ``torch.export``: the model's operators and weights, without its source code."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import is_dataclass
from functools import cache
from types import UnionType
from typing import TYPE_CHECKING, Any, Union, get_args, get_origin, get_type_hints

from forescale.core.cluster import Device, DeviceKind
from forescale.core.errors import InvalidInput
from forescale.core.signature import Signature
from forescale.engine.serve.formats import LoadedModel, Order
from forescale.engine.serve.formats.archive import (
    Program,
    checked_program,
    checked_weights,
    names_of,
    signature,
    without_shapes,
)
from forescale.engine.serve.formats.packing import pack
from forescale.engine.serve.formats.transfer import runner

if TYPE_CHECKING:
    from torch import Tensor
    from torch.export import ExportedProgram

_PROGRAM = "models/model.json"
_TREES = ("data/weights/", "data/constants/")
_REMEMBERED = 10_000  # shapes of inputs
_NONSENSE = (KeyError, TypeError, ValueError, AttributeError, RuntimeError, AssertionError)


def inspect(order: Order) -> Signature:
    """Read from the archive's JSON alone, without torch; what ``load`` would refuse is refused here."""
    try:
        with zipfile.ZipFile(order.path) as archive:
            root = archive.namelist()[0].partition("/")[0]
            entries = [entry.removeprefix(f"{root}/") for entry in archive.namelist()]

            def read(entry: str) -> bytes:
                return archive.read(f"{root}/{entry}")

            program = json.loads(read(_PROGRAM))
            found, _ = signature(
                program if order.trust else checked_program(program), names_of(read, entries)
            )
    except (*_NONSENSE, zipfile.BadZipFile, IndexError, OSError) as error:
        raise _not_an_archive(order, error) from error
    return order.signature or found


def load(order: Order, device: Device) -> LoadedModel:
    """Deserialize with torch; ``order.trust`` decides whether pickles may be read."""
    import torch
    from torch.export.passes import move_to_device_pass
    from torch.export.pt2_archive import PT2ArchiveReader
    from torch.utils import _pytree as pytree

    try:
        with PT2ArchiveReader(str(order.path)) as archive:
            entries = archive.get_file_names()
            program: Program = json.loads(archive.read_bytes(_PROGRAM))
            names = names_of(archive.read_bytes, entries)
            if not order.trust:
                program = checked_program(program)
            found, rows = signature(program, names)
            exported = None if order.trust else _deserialize(archive, entries, without_shapes(program))
    except _NONSENSE as error:
        raise _not_an_archive(order, error) from error
    if exported is None:
        exported = torch.export.load(str(order.path))
    if device.kind is DeviceKind.CUDA:
        exported = move_to_device_pass(exported, "cuda:0")
    module = exported.module(check_guards=False)
    # Before weights are laid out: those have no storage of their own.
    state = {buffer.untyped_storage().data_ptr() for buffer in module.buffers()}
    if device.kind is DeviceKind.CPU:
        pack(module)
    in_spec = exported.call_spec.in_spec
    assert in_spec is not None
    declared = order.signature or found
    _compare(declared, found)
    inputs, outputs = ([spec.name for spec in specs] for specs in (declared.inputs, declared.outputs))
    is_plain = in_spec == pytree.tree_structure(((0,) * len(inputs), {}))
    checked: set[tuple[tuple[int, ...], ...]] = set()

    def compute(flat: Sequence[Tensor]) -> Sequence[Tensor]:
        args, kwargs = (flat, {}) if is_plain else pytree.tree_unflatten(flat, in_spec)
        # The program's own check of lengths takes as long as a small model: what passed it passes again.
        shapes = tuple(tensor.shape for tensor in flat)
        call = module.forward if shapes in checked else module
        found = pytree.tree_leaves(call(*args, **kwargs))
        if len(checked) < _REMEMBERED:
            checked.add(shapes)
        # Where an output is state, the next batch may change it before this one's outputs are copied.
        return [
            tensor.clone() if tensor.untyped_storage().data_ptr() in state else tensor for tensor in found
        ]

    run = runner(device, inputs, outputs, compute)
    return LoadedModel(signature=declared, run=run, least_rows=rows.least, most_rows=rows.most)


def _deserialize(archive: Any, entries: list[str], program: Program) -> ExportedProgram:
    """What ``torch.export.load`` does with a checked program and raw weights; no pickle is read."""
    from torch._export.serde import schema
    from torch._export.serde.serialize import ExportedProgramDeserializer
    from torch.export.pt2_archive._package import (
        _load_constants,  # pyright: ignore[reportPrivateUsage]
        _load_state_dict,  # pyright: ignore[reportPrivateUsage]
    )

    for tree, kind in zip(_TREES, ("weights", "constants"), strict=True):
        if f"{tree}model.pt" in entries:
            raise InvalidInput(f"its {kind} are in a layout older than torch 2.9: export it again")
        checked_weights(json.loads(archive.read_bytes(f"{tree}model_{kind}_config.json")))
    return ExportedProgramDeserializer().deserialize(
        _typed(schema.ExportedProgram, program),
        _load_state_dict(archive, "model"),
        _load_constants(archive, "model"),
    )


def _typed(kind: Any, data: Any) -> Any:
    """JSON as a dataclass of ``torch._export.serde.schema``.

    torch's own function asks for the same type hints again for every value: half of the time to load.
    """
    from torch._export.serde.union import _Union  # pyright: ignore[reportPrivateUsage]

    if data is None:
        return None
    args = get_args(kind)
    if get_origin(kind) in (Union, UnionType):
        return _typed(args[0], data)
    if get_origin(kind) is list:
        return [_typed(args[0], item) for item in data]
    if get_origin(kind) is dict:
        return {key: _typed(args[1], item) for key, item in data.items()}
    if not is_dataclass(kind):
        return float(data) if kind is float else data
    # What this torch does not know is left out, as torch does.
    hints = _hints(kind)
    fields = {name: _typed(hints[name], value) for name, value in data.items() if name in hints}
    make: Any = kind
    return make.create(**fields) if issubclass(make, _Union) else make(**fields)


@cache
def _hints(kind: type) -> Mapping[str, Any]:
    from torch._export.serde import schema

    return get_type_hints(kind, globalns=dict(vars(schema)))


def _compare(declared: Signature, found: Signature) -> None:
    """Refuse a signature that the program contradicts; names may differ, the order counts."""
    for side in ("inputs", "outputs"):
        specs, actual = getattr(declared, side), getattr(found, side)
        if [spec.datatype for spec in specs] != [spec.datatype for spec in actual]:
            raise InvalidInput(
                f"the model was registered with {side} {[spec.datatype for spec in specs]}, "
                f"but has {[spec.datatype for spec in actual]}"
            )


def _not_an_archive(order: Order, error: Exception) -> InvalidInput:
    return InvalidInput(
        f"{order.path.name} is no archive that torch.export.save of torch 2.9 or later wrote "
        f"({type(error).__name__}: {next(iter(str(error).splitlines()), '')[:200]})"
    )
