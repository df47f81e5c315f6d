"""Shows what every selector makes of one prompt: `capa-export explain`."""
