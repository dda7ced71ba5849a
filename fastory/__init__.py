"""fastory: a list of captions in, a consistent sequence of pictures out."""

__version__ = "0.1.0"
