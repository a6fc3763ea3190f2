"""The mathematics of diffusion, on tensors."""
