"""Models: what a mode calls, of a checkpoint in PyTorch or of an export's sessions."""
