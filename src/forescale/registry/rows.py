"""Versions as rows of their table, and back."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Row

from forescale.core.signature import signature_as_json, signature_from_json
from forescale.registry.records import Artifact, ModelVersion


def row_of(version: ModelVersion) -> dict[str, Any]:
    """What is inserted for a version."""
    return {
        "model": version.model,
        "number": version.number,
        "sha256": version.artifact.sha256,
        "size_bytes": version.artifact.size_bytes,
        "format": version.format,
        "signature": signature_as_json(version.signature),
        "options": dict(version.options),
        "metrics": dict(version.metrics),
        "created_at_s": version.created_at_s,
        "created_by": version.created_by,
        "commit": version.commit,
    }


def version_of(row: Row[Any]) -> ModelVersion:
    """The version that a row is of."""
    return ModelVersion(
        model=row.model,
        number=row.number,
        artifact=Artifact(sha256=row.sha256, size_bytes=row.size_bytes),
        format=row.format,
        signature=signature_from_json(row.signature),
        options=row.options,
        metrics=row.metrics,
        created_at_s=row.created_at_s,
        created_by=row.created_by,
        commit=row.commit,
    )
