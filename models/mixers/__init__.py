"""One file per family: its configuration, its projections around one kernel, and its names in a checkpoint."""
