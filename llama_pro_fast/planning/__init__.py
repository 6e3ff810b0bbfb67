"""What a run needs and costs, from the shapes alone, and the way to run that is chosen by it."""
