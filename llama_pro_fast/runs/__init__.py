"""The folder of a run: who holds it, its checkpoints, its metrics."""
