"""One file per family: its configuration, its projections around a kernel, its names in a checkpoint."""
