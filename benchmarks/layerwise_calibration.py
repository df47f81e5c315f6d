"""Calibration at true size with one layer's weights in memory: seconds and peak memory.

python benchmarks/random_checkpoint.py qwen25vl-3b /tmp/qwen25vl-3b
python benchmarks/layerwise_calibration.py /tmp/qwen25vl-3b
"""

import argparse
import json
import os
import platform
import shutil
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from PIL import Image

from capa_export.base.progress import progress
from capa_export.base.toml import shipped
from capa_export.bundle.store import Bundle
from capa_export.calibrate.stage import calibrate
from capa_export.config.options import BuildOptions
from capa_export.config.recipe import load_recipe
from capa_export.model.memory import calibration_bytes
from capa_export.model.model import Model
from capa_export.model.sidecars import sidecars

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="Qwen2.5-VL of random weights; gets the tiny model's tokenizer")
    parser.add_argument("--pictures", type=int, default=4)
    parser.add_argument("--side", type=int, default=560, help="of a picture, in pixels")
    folder, pictures, side = vars(parser.parse_args()).values()

    tiny = shipped("graphs") / "checkpoints/tiny-qwen25vl"
    for path in {path for paths in sidecars(tiny).values() for path in paths} - {tiny / "config.json"}:
        shutil.copyfile(path, folder / path.name)
    config, known = (json.loads((place / "config.json").read_text()) for place in (folder, tiny))
    config |= {key: value for key, value in known.items() if key.endswith("_token_id")}
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    with TemporaryDirectory(dir=folder.parent) as scratch, progress() as report:
        for index in range(pictures):
            pixels = np.random.default_rng(index).integers(0, 255, (side, side, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(f"{scratch}/{index}.png")
        bundle = Bundle(Path(scratch) / "out")
        options = BuildOptions(images=Path(scratch), samples=pictures, layer_by_layer=True)
        model = Model(recipe=load_recipe("qwen25vl"), checkpoint=str(folder), report=report)
        calibration, stage = calibrate(model, bundle, options), bundle.stage("calibrate")
    assert all(np.isfinite(layer.alpha).all() for layer in calibration.layers)
    threads, load = os.environ.get("OMP_NUM_THREADS", os.cpu_count()), os.getloadavg()[0]
    checkpoint = model.source.checkpoint
    result = {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "machine": f"{platform.machine()}, {threads} thread(s), load {load:.1f} on {os.cpu_count()} cores, "
        f"torch {version('torch')}",
        "checkpoint": {"parameters": checkpoint.num_parameters, "GB": round(checkpoint.nbytes / 1e9, 2)},
        "pictures": {"count": pictures, "visual_tokens": calibration.layers[0].visual_tokens},
        "layer_by_layer": {name: stage[name] for name in ("seconds", "peak_memory_bytes")},
        "in_memory_estimate_bytes": calibration_bytes(checkpoint.num_parameters),
    }
    print(json.dumps(result, indent=2))
