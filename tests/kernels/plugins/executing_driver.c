// Stands in for libcuda.so.1: device memory is memory of the host, a launch is a call of the function that
// `stand_in_run_with` was given, and what the driver would refuse fails. SM is the GPU's compute capability times ten.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

enum { kOk = 0, kInvalid = 1, kNoMemory = 2, kNoContext = 201, kNotFound = 500, kIllegalAddress = 700, kLaunchFailed = 719 };
enum { kMaxBuffers = 1024, kMaxFunctions = 256, kStream = 0x77, kContext = 0x1234 };
static size_t const kSpacing = (size_t)64 << 20; // So far apart that what runs past the end meets nothing.
static unsigned const kDefaultShared = 48 * 1024, kMostShared = 99 * 1024;

struct Buffer
{
    uint64_t address, size, uploaded;
};
static struct Buffer buffers[kMaxBuffers];
static int numBuffers;
static unsigned char* pool;

struct Function
{
    char const* image;
    char name[64];
    unsigned shared;
};
static struct Function functions[kMaxFunctions];
static int numFunctions;

static _Thread_local void* current;

typedef int (*Run)(char const* image, char const* name, unsigned const* dims, void** params);
static Run run;

void stand_in_run_with(Run function)
{
    run = function;
}

int stand_in_buffers(struct Buffer const** all)
{
    *all = buffers;
    return numBuffers;
}

static struct Buffer* find(uint64_t address, size_t size)
{
    for (int index = 0; index < numBuffers; ++index)
    {
        struct Buffer* const one = &buffers[index];
        if (address >= one->address && address + size <= one->address + one->size)
        {
            return one;
        }
    }
    fprintf(stderr, "no buffer holds %zu bytes at %#lx\n", size, (unsigned long)address);
    return NULL;
}

int cuInit(unsigned flags)
{
    return flags ? kInvalid : kOk;
}

int cuDriverGetVersion(int* version)
{
    *version = 13010;
    return kOk;
}

int cuDeviceGetCount(int* count)
{
    *count = 1;
    return kOk;
}

int cuDeviceGet(int* device, int ordinal)
{
    *device = 0;
    return ordinal ? kInvalid : kOk;
}

int cuDeviceGetName(char* name, int size, int device)
{
    (void)device;
    snprintf(name, (size_t)size, "Stand-in");
    return kOk;
}

int cuDeviceTotalMem_v2(size_t* size, int device)
{
    (void)device;
    *size = kMaxBuffers * kSpacing;
    return kOk;
}

int cuDeviceGetAttribute(int* value, int attribute, int device)
{
    (void)device;
    int const sm = atoi(getenv("SM"));
    *value = attribute == 75 ? sm / 10 : attribute == 76 ? sm % 10 : 0;
    return kOk;
}

int cuDevicePrimaryCtxRetain(void** context, int device)
{
    (void)device;
    *context = (void*)(uintptr_t)kContext;
    return kOk;
}

int cuCtxSetCurrent(void* context)
{
    current = context;
    return kOk;
}

int cuCtxGetCurrent(void** context)
{
    *context = current;
    return kOk;
}

int cuCtxGetDevice(int* device)
{
    *device = 0;
    return current ? kOk : kNoContext;
}

int cuStreamCreate(void** stream, unsigned flags)
{
    (void)flags;
    *stream = (void*)(uintptr_t)kStream;
    return current ? kOk : kNoContext;
}

int cuStreamDestroy_v2(void* stream)
{
    (void)stream;
    return kOk;
}

static int of_stream(void* stream)
{
    return !current ? kNoContext : stream == (void*)(uintptr_t)kStream ? kOk : kInvalid;
}

int cuStreamSynchronize(void* stream)
{
    return of_stream(stream);
}

int cuMemAlloc_v2(uint64_t* address, size_t size)
{
    if (!pool)
    {
        pool = mmap(NULL, kMaxBuffers * kSpacing, PROT_READ | PROT_WRITE,
            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    }
    if (pool == MAP_FAILED || numBuffers == kMaxBuffers || size > kSpacing)
    {
        return kNoMemory;
    }
    *address = (uint64_t)(uintptr_t)(pool + (size_t)numBuffers * kSpacing);
    buffers[numBuffers++] = (struct Buffer){*address, size, 0};
    return current ? kOk : kNoContext;
}

int cuMemFree_v2(uint64_t address)
{
    // Nothing is used again, so that what is used after it was freed is found.
    struct Buffer* const buffer = find(address, 0);
    if (!buffer || buffer->address != address)
    {
        return kInvalid;
    }
    buffer->size = 0;
    return kOk;
}

int cuMemGetInfo_v2(size_t* free, size_t* total)
{
    *free = *total = kMaxBuffers * kSpacing;
    return kOk;
}

int cuMemcpyHtoDAsync_v2(uint64_t target, void const* source, size_t size, void* stream)
{
    struct Buffer* const buffer = find(target, size);
    if (!buffer)
    {
        return kIllegalAddress;
    }
    memcpy((void*)(uintptr_t)target, source, size);
    buffer->uploaded = 1;
    return of_stream(stream);
}

int cuMemcpyDtoHAsync_v2(void* target, uint64_t source, size_t size, void* stream)
{
    if (!find(source, size))
    {
        return kIllegalAddress;
    }
    memcpy(target, (void const*)(uintptr_t)source, size);
    return of_stream(stream);
}

int cuModuleLoadData(void** module, void const* image)
{
    *module = strdup(image); // It is PTX, and the caller's no longer than this call.
    return current ? kOk : kNoContext;
}

static int add_function(void** function, char const* image, char const* name)
{
    struct Function* const one = &functions[numFunctions++];
    one->image = image;
    one->shared = kDefaultShared;
    snprintf(one->name, sizeof one->name, "%s", name);
    *function = one;
    return numFunctions < kMaxFunctions ? kOk : kNoMemory;
}

int cuModuleGetFunction(void** function, void* module, char const* name)
{
    return add_function(function, module, name);
}

static int allow_shared(struct Function* function, int attribute, int value)
{
    if (attribute != 8 || value < 0 || (unsigned)value > kMostShared)
    {
        return kInvalid;
    }
    function->shared = (unsigned)value;
    return kOk;
}

int cuFuncSetAttribute(void* function, int attribute, int value)
{
    return allow_shared(function, attribute, value);
}

int cuLibraryLoadData(void** library, void const* code, void* o, void* v, unsigned n, void* lo, void* lv, unsigned ln)
{
    (void)o, (void)v, (void)n, (void)lo, (void)lv, (void)ln;
    uint32_t magic;
    memcpy(&magic, code, sizeof magic);
    *library = (void*)code;
    return magic == 0xBA55ED50 && (uintptr_t)code % 8 == 0 ? kOk : kInvalid;
}

int cuLibraryGetKernel(void** kernel, void* library, char const* name)
{
    return add_function(kernel, library, name);
}

int cuKernelSetAttribute(int attribute, int value, void* kernel, int device)
{
    return device ? kInvalid : allow_shared(kernel, attribute, value);
}

int cuLaunchKernel(void* handle, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
    unsigned shared, void* stream, void** params, void** extra)
{
    struct Function const* const function = handle;
    int const is_grid = gx && gy && gz && gx < 1u << 31 && gy < 1u << 16 && gz < 1u << 16;
    if (!is_grid || bx > 1024 || by != 1 || bz != 1 || shared > function->shared || !params || extra)
    {
        fprintf(stderr, "%s: a grid of %u x %u x %u, %u threads, %u bytes\n", function->name, gx, gy, gz, bx, shared);
        return kInvalid;
    }
    unsigned const dims[] = {gx, gy, gz, bx, shared};
    int const status = of_stream(stream);
    return status ? status : run(function->image, function->name, dims, params) ? kLaunchFailed : kOk;
}

int cuGetErrorString(int error, char const** text)
{
    (void)error;
    *text = "the stand-in refused";
    return kOk;
}

// How the bindings of Python find the others; a name may stand for a later version of the function.
int cuGetProcAddress_v2(char const* name, void** function, int version, uint64_t flags, int* found)
{
    (void)version, (void)flags;
    static char const* const suffixes[] = {"_v2", ""};
    void* const self = dlopen("libcuda.so.1", RTLD_NOW | RTLD_NOLOAD);
    *function = NULL;
    for (int index = 0; index < 2 && !*function; ++index)
    {
        char full[128];
        snprintf(full, sizeof full, "%s%s", name, suffixes[index]);
        *function = dlsym(self, full);
    }
    if (found)
    {
        *found = *function ? 0 : 1;
    }
    return *function ? kOk : kNotFound;
}
