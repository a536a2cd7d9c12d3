"""What tests of figures share."""

from tests.visualization.fonts import only_base_font

__all__ = ["only_base_font"]
