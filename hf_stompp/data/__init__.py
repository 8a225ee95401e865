"""Files of examples and of texts."""
