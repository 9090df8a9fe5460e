"""The tiny world: a small language, two models and their SAEs, made from scratch."""
