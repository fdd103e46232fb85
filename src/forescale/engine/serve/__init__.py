"""Serving: models in replica processes behind one gateway."""
