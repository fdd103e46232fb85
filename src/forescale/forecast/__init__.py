"""From a history to calibrated quantiles of what comes next."""
