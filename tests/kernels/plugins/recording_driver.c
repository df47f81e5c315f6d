// Stands in for libcuda.so.1: prints what is asked of it, and computes nothing. KERNELS lists the sizes in bytes of every
// kernel's parameters ("merge_rows 8 8 4;"), SM is the GPU's compute capability times ten, FAIL a function that fails.
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int result(char const* function)
{
    char const* failing = getenv("FAIL");
    return failing && strcmp(failing, function) == 0 ? 700 : 0;
}

int cuInit(unsigned flags)
{
    (void)flags;
    return result("cuInit");
}

int cuGetErrorString(int error, char const** text)
{
    (void)error;
    *text = "it was told to fail";
    return 0;
}

int cuCtxGetDevice(int* device)
{
    *device = 0;
    return result("cuCtxGetDevice");
}

int cuDeviceGetAttribute(int* value, int attribute, int device)
{
    (void)device;
    int const sm = atoi(getenv("SM"));
    *value = attribute == 75 ? sm / 10 : attribute == 76 ? sm % 10 : -1;
    return 0;
}

// A handle is the image itself, which starts with a header of 16 bytes that says how much follows.
int cuLibraryLoadData(void** library, void const* code, void* o, void* v, unsigned n, void* lo, void* lv, unsigned ln)
{
    (void)o, (void)v, (void)n, (void)lo, (void)lv, (void)ln;
    uint64_t size;
    memcpy(&size, (char const*)code + 8, sizeof size);
    uint32_t sum = 0;
    for (uint64_t index = 0; index < size + 16; ++index)
    {
        sum = sum * 31 + ((unsigned char const*)code)[index];
    }
    printf("load %u\n", sum);
    *library = (void*)code;
    return result("cuLibraryLoadData");
}

int cuLibraryGetKernel(void** kernel, void* library, char const* name)
{
    (void)library;
    *kernel = (void*)name;
    return result("cuLibraryGetKernel");
}

int cuKernelSetAttribute(int attribute, int value, void* kernel, int device)
{
    printf("attribute %d %d %s %d\n", attribute, value, (char const*)kernel, device);
    return result("cuKernelSetAttribute");
}

int cuLaunchKernel(void* kernel, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
    unsigned shared, void* stream, void** params, void** extra)
{
    printf("launch %s %u %u %u %u %u %u %u %zu %d", (char const*)kernel, gx, gy, gz, bx, by, bz, shared,
        (size_t)stream, extra != NULL);
    char* const kernels = strdup(getenv("KERNELS"));
    for (char* line = strtok(kernels, ";"); line; line = strtok(NULL, ";"))
    {
        size_t const length = strlen((char const*)kernel);
        if (strncmp(line, (char const*)kernel, length) || line[length] != ' ')
        {
            continue;
        }
        size_t index = 0;
        for (char* size = line + length; *size; ++index)
        {
            uint64_t value = 0;
            memcpy(&value, params[index], strtoul(size, &size, 10));
            printf(" %llu", (unsigned long long)value);
        }
    }
    free(kernels);
    printf("\n");
    return result("cuLaunchKernel");
}
