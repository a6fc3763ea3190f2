"""Networks that adapt a model, and tools for their files."""
