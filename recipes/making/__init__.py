"""What a recipe begins with: a model that comes as a package, SAEs, their labels, steering vectors."""
