"""What onnxruntime-genai needs to run a bundle whose visual tokens are chosen before the decoder."""
