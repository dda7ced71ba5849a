"""Many stories, a run folder each: a queue that processes of this machine, or Ray's actors on many, draw."""
