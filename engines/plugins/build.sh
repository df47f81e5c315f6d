#!/bin/sh
# Compiles the plugin library of this folder: ./build.sh TENSORRT_INCLUDE OUT.so, with $CXX or g++.
# It needs no CUDA toolkit, and links neither TensorRT nor the driver.
set -e
include=$1
out=$2
case $out in /*) ;; *) out=$PWD/$out ;; esac
case $include in /*) ;; *) include=$PWD/$include ;; esac
cd "$(dirname "$0")"
# The C++ runtime goes in, and what is not used of it out again: the device's, and its C library, may be older.
"${CXX:-g++}" -std=c++17 -O2 -fPIC -shared -Wall -Wextra -fvisibility=hidden -ffunction-sections \
    -static-libstdc++ -Wl,--gc-sections -Wl,--version-script,capa_plugins.map -Wl,--no-undefined \
    -Wl,-soname,libcapa_plugins.so -Istubs -isystem "$include" capa_plugin.cpp capa_kernels.s -o "$out" -ldl
