"""The embedded world: scenes of real handwritten digits, annotated in COCO's format, and its two tiny base models."""
