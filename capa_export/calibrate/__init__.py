"""The calibration stage: which visual FFNs are linear, and how far activations reach."""
