"""Pure tensor functions: packed attention, linear cross-entropy on supervised positions, splice."""
