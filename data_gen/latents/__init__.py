"""Latents: which of them steer, what they stand for, and an SAE of one's own."""
