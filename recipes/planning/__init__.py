"""What a run needs and costs: refused or said before it starts."""
