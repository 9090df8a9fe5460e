"""The ground floor: what a transcript, a steering and a model are, and how to train on them."""
