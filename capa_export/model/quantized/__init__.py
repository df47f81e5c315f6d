"""Published quantized checkpoints: a decoder a format, into one canonical form of a weight."""
