"""The rule of shared images as training asks for it; it lives with the data, where the planner finds it too."""

from vlit.data.sharing import share_at_most

__all__ = ["share_at_most"]
