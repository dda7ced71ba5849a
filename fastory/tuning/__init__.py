"""Tuning of causal mode on stories with pictures: the history encoder and low-rank updates, the base frozen."""
