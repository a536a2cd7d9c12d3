"""What tests of the page share with those of its figures."""

from tests.visualization.fonts import only_base_font

__all__ = ["only_base_font"]
