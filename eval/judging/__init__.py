"""Where attempts begin and how good each one is."""
