"""Weights of other systems, read into our parts (:func:`initialise`) and written from them (``export_hf``)."""

from vlit.models.interop.initialise import initialise
from vlit.models.interop.llava import detect

__all__ = ["detect", "initialise"]
