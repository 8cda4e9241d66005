"""Model families, checkpoints, and the zoo of small trained models."""
