"""TensorRT plugins that run the kernels of the CAPA operators."""
