"""Command lines that `--help` ends with."""

from collections.abc import Mapping
from types import MappingProxyType

__all__ = ["EXAMPLES", "epilog"]

EXAMPLES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "build": (
            "capa-export build -m tiny-qwen25vl -t onnx -o out/tiny",
            "capa-export build Qwen/Qwen2.5-VL-7B-Instruct --images photos -o out/7b",
            "capa-export build ./checkpoint --images photos --ratio 0.9 -t onnx -o out/7b",
            "capa-export build ./checkpoint --schedule divprune:0.5+capa@4:0.9 --dry-run",
        ),
        "calibrate": (
            "capa-export calibrate ./checkpoint --images photos -o out/7b",
            "capa-export calibrate --merge out/a out/b -o out/7b",
        ),
        "export": (
            "capa-export export ./checkpoint --schedule capa@3:0.75/full -o out/7b",
            "capa-export export ./checkpoint --calibration out/a -o out/b",
        ),
        "engine": (
            "capa-export engine out/7b -t rtx",
            "capa-export engine out/7b -t orin --weights external",
        ),
        "validate": (
            "capa-export validate out/7b --images photos --samples 4",
            "capa-export validate out/7b --engine rtx --strict --junit parity.xml",
        ),
        "compare": (
            "capa-export compare out/deployed out/candidate --images photos",
            "capa-export compare out/deployed out/candidate --gate gate.toml --json",
        ),
        "evaluate": (
            "capa-export evaluate -m tiny-qwen25vl -d questions.jsonl -o out/answers",
            "capa-export evaluate ./checkpoint -d questions.jsonl -o out/answers \\",
            "    --method capa@2:0.75 --method divprune:0.5+capa@4:0.9/full",
            "capa-export evaluate out/7b -d questions.jsonl -o out/answers --ratio 0.9",
        ),
        "explain": (
            'capa-export explain out/7b --image photo.jpg --prompt "What is this?"',
            'capa-export explain out/7b --image a.png --prompt "Why?" --method capa@2:0.9',
        ),
        "tune": ("capa-export tune ./checkpoint --budget 25% --images photos -o tuned.toml",),
        "run": (
            'capa-export run out/7b --image photo.jpg --prompt "What is this?"',
            'capa-export run out/7b --video clip.mp4 --fps 1 --prompt "What happens?"',
            "capa-export run out/7b --messages conversation.json --greedy --json",
        ),
        "inspect": ("capa-export inspect out/7b --verify",),
        "plan": (
            "capa-export plan Qwen/Qwen2.5-VL-7B-Instruct --schedule capa@3:0.75",
            "capa-export plan ./checkpoint --ratio 0.9 -t orin --memory 8GB",
        ),
        "doctor": ("capa-export doctor -t rtx", "capa-export doctor out/7b -t orin --memory 8GB"),
        "models": ("capa-export models --json",),
        "selectors": ("capa-export selectors --json",),
        "targets": ("capa-export targets --json",),
        "plugins build": ("capa-export plugins build --compute-capabilities 8.7 -o out/",),
    }
)
"""Command -> its examples; a line that begins with blanks goes on with the one before."""


def epilog(command: str) -> str:
    """The examples of a command as typer takes them, which does not wrap what stands below a backspace."""
    return "\n  ".join(["\b\nExamples:", *EXAMPLES[command]])
