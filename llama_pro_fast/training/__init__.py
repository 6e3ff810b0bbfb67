"""A run: settled, looped, watched, exported."""
