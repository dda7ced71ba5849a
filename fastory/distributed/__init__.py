"""Where the frames of a round or the stories of a call are drawn: here, or in the processes of torchrun."""
