"""Parses an ONNX file with TensorRT-RTX as it lies there: prints the first error, or nothing."""

import sys

import tensorrt_rtx as trt  # noqa: TID251 - a process of its own, which ends at once.


def main(path: str) -> int:
    """0 where it does."""
    network = trt.Builder(trt.Logger(trt.Logger.INTERNAL_ERROR)).create_network(0)
    parser = trt.OnnxParser(network, trt.Logger(trt.Logger.INTERNAL_ERROR))
    if parser.parse_from_file(path):
        return 0
    error = parser.get_error(0)
    lines = [line for line in error.desc().splitlines() if line.strip() and not line.startswith("Invalid Node")]
    print(f"{error.node_operator()} {error.node_name()}: {next(iter(lines), 'no reason given')}")
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
