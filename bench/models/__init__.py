"""``python -m bench models``: networks of others, accelerated: exact to what, in how many bytes, how fast."""
