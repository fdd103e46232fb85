"""Training: stages in worker processes, schedules, live repartition, checkpoints."""
