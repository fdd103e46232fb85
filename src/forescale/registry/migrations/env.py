"""How alembic runs the steps: inside the transaction that its caller began."""

from __future__ import annotations

from alembic import context

from forescale.registry.tables import METADATA

context.configure(connection=context.config.attributes["connection"], target_metadata=METADATA)
context.run_migrations()
