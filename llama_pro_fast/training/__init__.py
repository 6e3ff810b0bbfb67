"""A run: settled, looped, checkpointed, exported, reported."""
