"""Model families, checkpoints, and the zoo of small trained models."""

from models.load import LoadedModel, load

__all__ = ["LoadedModel", "load"]
