"""Building engines, per target, with and without plugins: seconds, peak memory, plan and layers.

python benchmarks/random_checkpoint.py qwen25vl-7b /tmp/qwen25vl-7b
python benchmarks/engine_build.py /tmp/qwen25vl-7b --weights external > benchmarks/results/engine-build-qwen25vl-7b.json

What it does not know goes to `export`, as --quantize int4. With --plugin-library FILE, which `capa-export plugins
build` writes, native plugins too. The bundle is not calibrated: its plugins are those of the layer that prunes. Needs
the checkpoint's size of free disk, and with embedded weights twice that.
"""

import argparse
import json
import os
import re
import sys
from datetime import datetime, timezone
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from real_size import CAPA_EXPORT, PREFLIGHT, export, machine, measured

_BUILT_HERE = ("rtx", "spark")
"""The other targets build on the device."""
_KEPT = ("seconds", "peak_memory_bytes", "bytes", "activation_bytes", "layers", "custom_layers", "weight_copies")


def _engines(bundle: Path, target: str, *options: str | Path) -> dict[str, Any]:
    """The whole command, and each engine as the manifest records it."""
    cost = measured([CAPA_EXPORT, "engine", bundle, "--target", target, *options], refusal=PREFLIGHT)
    if "refused" in cost:
        return cost
    manifest = json.loads((bundle / "capa_manifest.json").read_text(encoding="utf-8"))
    engines = manifest["stages"][f"engine/{target}"]["result"]["engines"]
    logs = bundle / "engines" / target
    kept = {
        name: {**{key: row[key] for key in _KEPT}, "weights_on_device": _weights_on_device(logs / f"{name}.log")}
        for name, row in engines.items()
    }
    return {**cost, "engines": kept}


def _weights_on_device(log: Path) -> int | None:
    """Bytes that TensorRT says the weights of an engine take."""
    said = re.findall(r"Total Weights Memory: (\d+) bytes", log.read_text(encoding="utf-8", errors="replace"))
    return int(said[-1]) if said else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="as random_checkpoint.py writes it")
    parser.add_argument("--model", default="qwen25vl", help="recipe")
    parser.add_argument("--weights", choices=("embedded", "joined", "external"), default="embedded")
    parser.add_argument("--targets", nargs="*", choices=_BUILT_HERE, default=_BUILT_HERE, help="may be none")
    parser.add_argument("--plugins", nargs="+", choices=("none", "python"), default=("none", "python"))
    parser.add_argument("--plugin-library", type=Path, help="for native plugins")
    arguments, options = parser.parse_known_args()

    checkpoint, library, weights = arguments.checkpoint.resolve(), arguments.plugin_library, arguments.weights
    result: dict[str, Any] = {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "machine": machine(),
        "command": " ".join(["benchmarks/engine_build.py", checkpoint.name, *sys.argv[2:]]),
        "load_before": round(os.getloadavg()[0], 1),
        "targets": {},
    }
    plugins: dict[str, list[str | Path]] = {kind: ["--plugins", kind] for kind in arguments.plugins}
    if library:
        plugins["native"] = ["--plugin-library", library.resolve()]
    with TemporaryDirectory(dir=checkpoint.parent, prefix="engine-build-") as folder:
        bundle = Path(folder) / "bundle"
        result["export"] = export(arguments.model, checkpoint, bundle, *options)
        written = [path for path in bundle.rglob("*") if path.is_file()]
        result["export"]["bytes"] = {str(path.relative_to(bundle)): path.stat().st_size for path in written}
        for target in arguments.targets:
            # A library for this machine is none for a device of another CPU.
            fitting = {kind: words for kind, words in plugins.items() if target == "rtx" or kind != "native"}
            result["targets"][target] = {
                kind: _engines(bundle, target, "--weights", weights, *words) for kind, words in fitting.items()
            }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
