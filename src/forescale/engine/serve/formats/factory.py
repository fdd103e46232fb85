"""Python code of yours: a function that makes the model, allowed by name where the server is started.

Options: ``factory``, ``package.module:function``, and ``arguments``, a mapping (optional). It is called as
``function(path, device, **arguments)`` with the artifact's path and ``"cpu"`` or ``"cuda:0"``, and returns a
function from NumPy arrays by input name to NumPy arrays by output name. Batches
run one by one, on a GPU too.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib import import_module

import numpy as np

from forescale.core.cluster import Device, DeviceKind
from forescale.core.errors import InvalidInput, UntrustedModel
from forescale.core.signature import Signature
from forescale.engine.serve.arrays import Array
from forescale.engine.serve.formats import Function, LoadedModel, Order, at_once, declared_signature

_NAME = re.compile(r"\w+(\.\w+)*:\w+")


def inspect(order: Order) -> Signature:
    """The signature that was given; nothing of the user's is imported."""
    _name(order)
    return declared_signature(order)


def load(order: Order, device: Device) -> LoadedModel:
    """Import the factory and call it.

    Raises:
        UntrustedModel: nobody allowed it.
    """
    declared = declared_signature(order)
    name = _name(order)
    if name not in order.factories:
        raise UntrustedModel(f"the factory {name} is not among those the server was started with")
    module, _, attribute = name.partition(":")
    try:
        make = getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise InvalidInput(f"there is no factory {name}: {error}") from error
    arguments = order.options.get("arguments", {})
    function: Function = make(order.path, "cuda:0" if device.kind is DeviceKind.CUDA else "cpu", **arguments)

    def run(inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        outputs = function(inputs)
        # The function may use its arrays again while ours are still being sent.
        return {name: np.array(array) for name, array in outputs.items()}

    return LoadedModel(signature=declared, run=at_once(run))


def _name(order: Order) -> str:
    name = order.options.get("factory")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise InvalidInput("a factory needs the option factory, of the form package.module:function")
    return name
