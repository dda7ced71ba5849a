"""The drawn world that the built-in model is trained on: its pictures, its captions and which scenes are held out."""
