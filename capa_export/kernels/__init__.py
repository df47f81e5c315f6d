"""The GPU kernels of the CAPA operators, one file each, in Triton; importing it needs triton."""
