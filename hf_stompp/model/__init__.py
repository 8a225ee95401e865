"""A model on its way from float to packed: what becomes binary in it, loading and saving it, what it holds."""
