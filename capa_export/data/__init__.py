"""The pictures and questions that models are asked."""
