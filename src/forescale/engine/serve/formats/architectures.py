"""Architectures by name, without weights: of ``transformers`` or, as ``timm/NAME``, of ``timm``.

- ``BertForSequenceClassification``: a class of transformers; ``config`` is what its ``config.json`` says,
  with ``model_type``. The signature names arguments of forward and fields of what that returns.
- ``timm/resnet18``: ``config`` holds arguments of ``timm.create_model``. One input, one output.

What would fetch code or weights from elsewhere is refused.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, cast

from forescale.core.errors import InvalidInput, UntrustedModel
from forescale.core.signature import Signature
from forescale.engine.serve.formats import Order

if TYPE_CHECKING:
    from torch import Tensor, nn

_TIMM = "timm/"
# These name kernels, quantisers or classes that transformers would download and run.
_FETCHING = (
    "attn_implementation",
    "experts_implementation",
    "auto_map",
    "quantization_config",
    "custom_pipelines",
)
# These make timm load weights from elsewhere, some of them by unpickling.
_TIMM_FETCHING = ("pretrained", "checkpoint_path", "cache_dir")


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """How a model is made, and called with its inputs by name.

    ``build`` raises InvalidInput when there is no such architecture, or its library is missing.
    """

    build: Callable[[], nn.Module]
    forward: Callable[[nn.Module, Mapping[str, Tensor]], Mapping[str, Tensor]]


def architecture_of(order: Order, signature: Signature) -> Architecture:
    """The architecture that an order's options name; imports nothing.

    Raises:
        InvalidInput: the options do not say which, or the signature does not fit it.
        UntrustedModel: it would fetch code.
    """
    name, config = order.options.get("architecture"), order.options.get("config", {})
    if not isinstance(name, str) or not isinstance(config, dict):
        raise InvalidInput(
            "safetensors need the options architecture (a class of transformers, or timm/NAME) and config"
        )
    settings = cast(dict[str, Any], config)
    if name.startswith(_TIMM):
        return _timm(name.removeprefix(_TIMM), settings, signature)
    if "model_type" not in settings:
        raise InvalidInput(f"{name} needs the option config: what its config.json says, with model_type")
    if not order.trust:
        _refuse_fetching(settings)
    return Architecture(
        build=lambda: _transformer(name, settings), forward=lambda model, inputs: model(**inputs)
    )


def _refuse_fetching(config: object) -> None:
    if isinstance(config, Mapping):
        for key, value in cast(Mapping[str, object], config).items():
            if key.lstrip("_").startswith(_FETCHING):
                raise UntrustedModel(f"its config has {key}")
            _refuse_fetching(value)


def _transformer(name: str, config: Mapping[str, Any]) -> nn.Module:
    os.environ["HF_HUB_OFFLINE"] = "1"  # before the import: whatever else a config names, nothing is fetched
    try:
        import transformers
    except ImportError as error:
        raise InvalidInput("this format needs transformers: pip install transformers") from error
    architecture = getattr(transformers, name, None)
    if not isinstance(architecture, type) or not issubclass(architecture, transformers.PreTrainedModel):
        raise InvalidInput(f"{name!r} is no model of transformers")
    settings = {key: value for key, value in config.items() if key != "model_type"}
    return architecture(transformers.AutoConfig.for_model(config["model_type"], **settings))


def _timm(name: str, config: Mapping[str, Any], signature: Signature) -> Architecture:
    for key in config:
        if key.startswith(_TIMM_FETCHING):
            raise UntrustedModel(f"its config has {key}")
    if len(signature.inputs) != 1 or len(signature.outputs) != 1:
        raise InvalidInput(f"{_TIMM}{name} has one input and one output; give a signature like that")
    output = signature.outputs[0].name

    def build() -> nn.Module:
        os.environ["HF_HUB_OFFLINE"] = "1"
        try:
            timm = import_module("timm")  # it needs torchvision, too: nothing that all should install
        except ImportError as error:
            raise InvalidInput("this format needs timm: pip install timm") from error
        if not timm.is_model(name):  # neither does it look like a place to fetch one from
            raise InvalidInput(f"{name!r} is no model of timm")
        return timm.create_model(name, **config)

    return Architecture(build=build, forward=lambda model, inputs: {output: model(*inputs.values())})
