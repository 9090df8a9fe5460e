"""Making transcripts: steered-then-corrected, contrast and normal rows."""
