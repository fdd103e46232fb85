"""Runs plans for real: the only package that acts on processes and devices."""
