"""Building engines, per target, with and without plugins: seconds, peak memory, plan and layers.

python benchmarks/random_checkpoint.py qwen25vl-7b /tmp/qwen25vl-7b
python benchmarks/engine_build.py /tmp/qwen25vl-7b --weights external > benchmarks/results/engine-build-qwen25vl-7b.json

With --plugin-library FILE, which `capa-export plugins build` writes, native plugins too. The bundle is not calibrated:
its plugins are those of the layer that prunes. Needs the checkpoint's size of free disk, and with embedded weights
twice that.
"""

import argparse
import json
import os
from datetime import datetime, timezone
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from real_size import CAPA_EXPORT, PREFLIGHT, export, machine, measured

_BUILT_HERE = ("rtx", "spark")
"""The other targets build on the device."""
_KEPT = ("seconds", "peak_memory_bytes", "bytes", "layers", "custom_layers", "weight_copies")


def _engines(bundle: Path, target: str, *options: str | Path) -> dict[str, Any]:
    """The whole command, and each engine as the manifest records it."""
    cost = measured([CAPA_EXPORT, "engine", bundle, "--target", target, *options], refusal=PREFLIGHT)
    if "refused" in cost:
        return cost
    manifest = json.loads((bundle / "capa_manifest.json").read_text(encoding="utf-8"))
    engines = manifest["stages"][f"engine/{target}"]["result"]["engines"]
    return {**cost, "engines": {name: {key: row[key] for key in _KEPT} for name, row in engines.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="as random_checkpoint.py writes it")
    parser.add_argument("--model", default="qwen25vl", help="recipe")
    parser.add_argument("--weights", choices=("embedded", "external"), default="embedded")
    parser.add_argument("--plugin-library", type=Path, help="for native plugins")
    arguments = parser.parse_args()

    checkpoint, library, weights = arguments.checkpoint.resolve(), arguments.plugin_library, arguments.weights
    result: dict[str, Any] = {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "machine": machine(),
        "command": f"benchmarks/engine_build.py {checkpoint.name} --model {arguments.model} --weights {weights}"
        + (" --plugin-library FILE" if library else ""),
        "load_before": round(os.getloadavg()[0], 1),
        "targets": {},
    }
    plugins: dict[str, list[str | Path]] = {"none": ["--plugins", "none"], "python": ["--plugins", "python"]}
    if library:
        plugins["native"] = ["--plugin-library", library.resolve()]
    with TemporaryDirectory(dir=checkpoint.parent, prefix="engine-build-") as folder:
        bundle = Path(folder) / "bundle"
        export(arguments.model, checkpoint, bundle)
        for target in _BUILT_HERE:
            # A library for this machine is none for a device of another CPU.
            fitting = {kind: options for kind, options in plugins.items() if target == "rtx" or kind != "native"}
            result["targets"][target] = {
                kind: _engines(bundle, target, "--weights", weights, *options) for kind, options in fitting.items()
            }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
