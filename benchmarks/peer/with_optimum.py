"""optimum-onnx."""

import sys
from pathlib import Path

from serve import main
from transformers4 import downgraded


def export(checkpoint: Path, out: Path) -> None:
    """Export as `optimum-cli export onnx` does."""
    from optimum.commands.optimum_cli import main as optimum

    sys.argv = ["optimum-cli", "export", "onnx", "-m", str(downgraded(checkpoint, out))]
    sys.argv += ["--task", "image-text-to-text", str(out)]
    optimum()


if __name__ == "__main__":
    main(export=export)
