"""The training loop and its companions; knows nothing of diffusion."""
