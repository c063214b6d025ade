"""The CUDA backend. CUDA C++ compiled at run time: Triton needs three times the instructions for a
weight, and a C compiler on the machine that serves."""
