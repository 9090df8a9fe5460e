"""From transcripts to a trained adapter."""
