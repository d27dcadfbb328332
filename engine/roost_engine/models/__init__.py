"""The computation of each model architecture."""
