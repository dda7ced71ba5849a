"""Conditioning: what attention reads, as data."""
