"""Commands under the names that they had before this folder was split: each runs what it ran."""
