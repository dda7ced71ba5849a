"""Runs: stories drawn from door to folder, and what a folder holds."""
