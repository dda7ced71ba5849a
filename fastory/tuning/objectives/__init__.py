"""What a tuning minimises, one file a term: denoising, imitation, paired stories, preservation."""
