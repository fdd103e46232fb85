"""Steps from one shape of the tables to the next, in ``versions``; alembic takes them in order."""
