"""A bundle, and stand-ins for driver and TensorRT that move data."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from capa_export.bundle.store import Bundle
from capa_export.config.recipe import load_recipe
from tests.building import Building
from tests.models.shortened import first_layers

_DRIVER = """
#include <stdlib.h>
#include <string.h>
typedef unsigned long long address;
int cuInit(unsigned flags) { return 0; }
int cuDeviceGet(int *device, int ordinal) { *device = 0; return 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) {
    int sm = getenv("STANDIN_SM") ? atoi(getenv("STANDIN_SM")) : 87;
    *value = attribute == 75 ? sm / 10 : sm % 10;
    return 0;
}
int cuDevicePrimaryCtxRetain(void **context, int device) { *context = context; return 0; }
int cuCtxSetCurrent(void *context) { return context ? 0 : 201; }
int cuCtxSynchronize(void) { return 0; }
int cuStreamCreate(void **stream, unsigned flags) { *stream = stream; return 0; }
int cuStreamSynchronize(void *stream) { return stream ? 0 : 400; }
int cuMemAlloc_v2(address *memory, size_t size) {
    *memory = (address)aligned_alloc(256, (size + 255) / 256 * 256);
    return 0;
}
int cuMemFree_v2(address memory) { free((void *)memory); return 0; }
int cuMemsetD8_v2(address memory, unsigned char value, size_t size) { memset((void *)memory, value, size); return 0; }
int cuMemcpyHtoD_v2(address target, const void *source, size_t size) { memcpy((void *)target, source, size); return 0; }
int cuMemcpyDtoH_v2(void *target, address source, size_t size) { memcpy(target, (void *)source, size); return 0; }
"""


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Of a trained checkpoint, which plugins take, and whose weights can be inputs; no FFN is a scale."""
    folder = tmp_path_factory.mktemp("bundle")
    made = Bundle(folder / "out")
    Building.of(load_recipe("tiny-qwen25vl"), made, first_layers(folder / "checkpoint"), ffn=False).export()
    return made


@pytest.fixture(scope="module")
def device(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Variables of a process that takes this machine for an Orin; STANDIN_SM makes it another GPU."""
    if (compiler := shutil.which("cc")) is None:
        pytest.skip("needs a C compiler for the stand-in of the driver")
    folder = tmp_path_factory.mktemp("device")
    (folder / "cuda.c").write_text(_DRIVER)
    subprocess.run([compiler, "-shared", "-fPIC", "cuda.c", "-o", "libcuda.so.1"], cwd=folder, check=True)
    shutil.copyfile(Path(__file__).with_name("moving_tensorrt.py"), folder / "tensorrt.py")
    return {"LD_LIBRARY_PATH": str(folder), "PYTHONPATH": str(folder), "PYTHON": sys.executable}
