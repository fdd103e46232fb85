"""What was measured of versions is known when nobody measures it any more."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from forescale.control.knowledge import Knowledge, Measured
from forescale.core.errors import InvalidInput
from version_states import version_state

SEEN = version_state(
    "digits",
    "3",
    is_ready=True,
    batch_times={1: ((1.0, 0.01), (12.5, 0.05)), 2: ((1.0, 0.008),)},
    load_s=0.5,
    model_bytes=1000,
)
FRESH = replace(SEEN, batch_times={}, load_s=None, model_bytes=None)


def test_what_is_measured_now_counts_and_else_what_was() -> None:
    knowledge = Knowledge()
    knowledge.look([SEEN])
    knowledge.look([FRESH])
    knowledge.look([replace(FRESH, version="4", load_s=2.0)])
    before = Measured(load_s=0.5, model_bytes=1000, batch_times=SEEN.batch_times)
    assert knowledge.measured(("digits", 3)) == before
    assert knowledge.measured(("digits", 4)) == Measured(load_s=2.0)
    assert knowledge.model_bytes == {("digits", 3): 1000}
    knowledge.look(
        [
            replace(
                FRESH,
                batch_times={1: ((9.0, 0.1), (20.0, 0.2)), 4: ((1.0, 0.005),)},
                load_s=0.25,
                model_bytes=10,
            )
        ]
    )
    assert knowledge.measured(("digits", 3)) == Measured(
        load_s=0.25,
        model_bytes=10,
        batch_times={1: ((1.0, 0.01), (9.0, 0.1), (20.0, 0.2)), 2: ((1.0, 0.008),), 4: ((1.0, 0.005),)},
    )


def test_another_process_goes_on_from_it() -> None:
    knowledge, later = Knowledge(), Knowledge()
    knowledge.look([SEEN, replace(SEEN, version="4", model_bytes=None)])
    later.look([replace(SEEN, version="4", model_bytes=7)])
    later.restore(knowledge.versions())
    assert later.measured(("digits", 3)) == knowledge.measured(("digits", 3))
    assert later.model_bytes == {("digits", 3): 1000, ("digits", 4): 7}


@pytest.mark.parametrize(
    "said",
    [
        None,
        [{}],
        ["digits"],
        [
            {
                "model": "digits",
                "version": 3,
                "load_s": None,
                "model_bytes": None,
                "batch_times": {"1": [[1.0]]},
            }
        ],
        [{"model": "digits", "version": 3, "load_s": "?", "model_bytes": None, "batch_times": {}}],
        [
            {
                "model": "digits",
                "version": 3,
                "load_s": None,
                "model_bytes": None,
                "batch_times": {"1": [[1.0, 0.0]]},
            }
        ],
        [{"model": "digits", "version": 3, "load_s": None, "model_bytes": None, "batch_times": [[1.0, 0.1]]}],
    ],
)
def test_nonsense_is_refused(said: Any) -> None:
    with pytest.raises(InvalidInput):
        Knowledge().restore(said)
