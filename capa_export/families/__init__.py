"""One module per model family: its dimensions, tensor names, vision tower, positions and prompt format."""
