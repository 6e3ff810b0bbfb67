"""What bench/ops.py is made of.

op             what an op is, the models' shapes, and the helpers its contestants share
elementwise    the ops that are one kernel: compiled and timed
products       the losses over the head, products with kernels between: timed
machine_code   a compiled kernel's registers, spills and widths of access
"""
