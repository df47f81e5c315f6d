"""The TensorRT engines: kits, the builder, and what would keep it from building."""
