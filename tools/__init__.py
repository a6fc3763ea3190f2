"""Tools around the training scripts."""
