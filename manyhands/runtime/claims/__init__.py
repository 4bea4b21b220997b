"""What the native kernels compute of a model, a claim for each kind of part.

A claim writes its calls into a `Builder`, or raises `Unfit` with the reason: an unknown class, field or layout in
memory is no claim's, and its part is called as a module.
"""
