"""Pure decisions: which operators run on which device."""
