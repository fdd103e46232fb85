"""What an object has learned, as a plain mapping, and back; and an object that goes on learning beside it.

A class lists the attributes that hold what it has learned in ``learned``: numpy arrays, numbers, or objects
(and tuples of them) that have such a list themselves. Everything else follows from its constructor.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any, TypeVar, cast

import numpy as np

from forescale.core.errors import InvalidInput

Snapshot = Mapping[str, Any]
Learner = TypeVar("Learner")


def snapshot(learner: Any) -> dict[str, Any]:
    """Copies of all that ``learner`` has learned: arrays and numbers, nested as it is."""
    return {name: _copied(getattr(learner, name)) for name in learner.learned}


def restore(learner: Any, state: Snapshot) -> None:
    """Go on from a snapshot of an object that was constructed alike.

    Raises:
        InvalidInput: it was constructed otherwise.
    """
    if set(state) != set(learner.learned):
        raise InvalidInput(f"this is no state of {type(learner).__name__}: it was saved by another version")
    for name in learner.learned:
        value = getattr(learner, name)
        if isinstance(value, np.ndarray):
            saved = np.asarray(state[name])
            if saved.shape != value.shape:
                raise InvalidInput(
                    f"the state has {saved.shape} values of {name.strip('_')}, not {value.shape}: "
                    "restore it into a forecaster constructed with the same arguments"
                )
            setattr(learner, name, saved.astype(value.dtype))
        elif isinstance(value, tuple):
            parts = cast(tuple[Any, ...], value)
            for part, saved in zip(parts, _parts(state[name], len(parts)), strict=True):
                restore(part, saved)
        elif hasattr(value, "learned"):
            restore(value, state[name])
        else:
            setattr(learner, name, state[name])


def fork(learner: Learner) -> Learner:
    """Another learner that has learned the same: whatever either learns from now on, the other does not."""
    return _forked(learner, {})


def as_json(state: Any) -> Any:
    """The same with arrays as JSON values: dtype, shape and base64 of the bytes."""
    if isinstance(state, np.ndarray):
        data = base64.b64encode(np.ascontiguousarray(state).tobytes()).decode()
        return {"dtype": state.dtype.str, "shape": list(state.shape), "base64": data}
    if isinstance(state, Mapping):
        return {name: as_json(value) for name, value in cast(Snapshot, state).items()}
    if isinstance(state, list | tuple):
        return [as_json(value) for value in cast(list[Any], state)]
    return state


def from_json(state: Any) -> Any:
    """What `as_json` was given."""
    if isinstance(state, Mapping):
        values = cast(Snapshot, state)
        if set(values) == {"dtype", "shape", "base64"}:
            array = np.frombuffer(base64.b64decode(values["base64"]), dtype=values["dtype"])
            return array.reshape(values["shape"]).copy()
        return {name: from_json(value) for name, value in values.items()}
    if isinstance(state, list | tuple):
        return [from_json(value) for value in cast(list[Any], state)]
    return state


def size_bytes(state: Any) -> int:
    """What the arrays of a snapshot take."""
    if isinstance(state, np.ndarray):
        return state.nbytes
    if isinstance(state, Mapping):
        return sum(map(size_bytes, cast(Snapshot, state).values()))
    return sum(map(size_bytes, cast(list[Any], state))) if isinstance(state, list) else 0


def _copied(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.copy()
    if isinstance(value, tuple):
        return [snapshot(part) for part in cast(tuple[Any, ...], value)]
    if hasattr(value, "learned"):
        return snapshot(value)
    return value


def _forked(learner: Any, twins: dict[int, Any]) -> Any:
    # Learners may know each other: of each there is one twin, and what no learner changes is shared.
    if id(learner) in twins:
        return twins[id(learner)]
    twin = twins[id(learner)] = object.__new__(type(learner))  # copy.copy takes ten times as long
    vars(twin).update(vars(learner))
    for name, value in vars(learner).items():
        if isinstance(value, np.ndarray):
            if name in learner.learned:
                setattr(twin, name, value.copy())
        elif isinstance(value, tuple):
            parts = cast(tuple[Any, ...], value)
            if any(hasattr(part, "learned") for part in parts):
                setattr(twin, name, tuple(_forked(part, twins) for part in parts))
        elif hasattr(value, "learned"):
            setattr(twin, name, _forked(value, twins))
    return twin


def _parts(saved: Any, count: int) -> list[Snapshot]:
    if len(saved) != count:
        raise InvalidInput(f"the state has {len(saved)} members, not {count}: construct the bank as it was")
    return list(saved)
