"""What Stable Diffusion is."""
