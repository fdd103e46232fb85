"""Which device runs which node of a cost graph: the published placement problem, beside our own pipelines."""
