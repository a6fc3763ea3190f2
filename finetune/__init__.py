"""Tools that make a folder of images ready for training."""
