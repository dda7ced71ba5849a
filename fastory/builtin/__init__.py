"""The built-in story model: a drawn world, its training, its weights and example stories."""
