"""Networks that use the layer, and networks of others made to use it."""
