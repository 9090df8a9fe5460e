"""A tuned model at work: attacked, given by others, benchmarked, talked to, served."""
