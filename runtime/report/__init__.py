"""Records shown in a terminal."""
