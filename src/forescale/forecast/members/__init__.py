"""Families of forecasters that the ensemble weighs; each is vectorised over many series."""
