"""What a run has done, for people: a summary, curves, a page; of one run or of several side by side."""
