"""Pure decisions about a run in progress: events in, commands out."""
