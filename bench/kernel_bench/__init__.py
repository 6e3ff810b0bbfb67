"""What bench/ops.py is made of.

shapes         the models' sizes, and every kernel of a training step at them
machine_code   a compiled kernel's registers, spills and widths of access
contestants    the ops to time, and who competes in them: elementwise, products; ops says what an op is made of
clocks         CUDA graphs and events, or the wall clock
timing         the race and its rows
report         table, targets, picture
"""
