"""Recipes: how instructions are made. One file a published method, registered in ``RECIPES``."""
