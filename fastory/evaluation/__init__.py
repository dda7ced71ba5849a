"""Measures of drawn stories: pictures and captions in, rows of figures out."""
