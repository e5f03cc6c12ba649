"""The command ``cuttlefish``, for people who have a checkpoint: see ``cuttlefish --help``."""
