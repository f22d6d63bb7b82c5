"""Weights of other systems, read into our parts and written from them."""
