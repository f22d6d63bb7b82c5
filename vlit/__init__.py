"""vlit: any vision encoder + any connector + any language model -> a model that follows visual instructions."""

__version__ = "0.1.0"
