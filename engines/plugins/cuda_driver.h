// The part of CUDA's driver that launches kernels, opened at run time: a build machine may have none.
#pragma once

#include <dlfcn.h>

#include <cstddef>
#include <cstdint>
#include <mutex>
#include <set>
#include <string>
#include <tuple>
#include <unordered_map>

namespace capa
{

//! How one variant of a kernel is launched on a GPU.
struct Block
{
    int image; //!< Ten times the compute capability that the kernel is compiled for.
    uint32_t warps;
    uint32_t sharedBytes;
};

constexpr int kMaxBlocks = 10;

//! One variant of a kernel, for every GPU.
struct Kernel
{
    char const* variant;
    char const* symbol;         //!< In the images.
    unsigned char const* fatbin;
    int nullPointers;           //!< Triton's own parameters behind the kernel's, for memory that ours do not need.
    Block blocks[kMaxBlocks];   //!< The first is that of PTX; each also goes for the images up to the next.
};

struct Grid
{
    int64_t x, y, z;
};

class CudaDriver
{
public:
    //! The driver of this process; opened by the first call.
    static CudaDriver& get()
    {
        static CudaDriver driver;
        return driver;
    }

    //! Launch on the current context. \return what went wrong, empty if nothing did.
    std::string launch(Kernel const& kernel, Block const& block, Grid const& grid, void* stream, void** params)
    {
        // A kernel over nothing has nothing to do, but is an error to the driver.
        if (!grid.x || !grid.y || !grid.z)
        {
            return "";
        }
        void* function = nullptr;
        std::string const error = load(kernel, block.sharedBytes, function);
        if (!error.empty())
        {
            return error;
        }
        return describe("cuLaunchKernel",
            mLaunchKernel(function, static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y),
                static_cast<unsigned>(grid.z), 32 * block.warps, 1, 1, block.sharedBytes, stream, params, nullptr));
    }

    //! Compute capability of the current context's GPU, times ten. \return what went wrong, empty if nothing did.
    std::string computeCapability(int& capability)
    {
        if (!mError.empty())
        {
            return mError;
        }
        int device = 0;
        int major = 0;
        int minor = 0;
        std::string error = describe("cuCtxGetDevice", mCtxGetDevice(&device));
        if (error.empty())
        {
            error = describe("cuDeviceGetAttribute", mDeviceGetAttribute(&major, kComputeCapabilityMajor, device));
        }
        if (error.empty())
        {
            error = describe("cuDeviceGetAttribute", mDeviceGetAttribute(&minor, kComputeCapabilityMinor, device));
        }
        capability = 10 * major + minor;
        return error;
    }

private:
    // Of cuda.h, which comes with the toolkit.
    static constexpr int kComputeCapabilityMajor = 75;
    static constexpr int kComputeCapabilityMinor = 76;
    static constexpr int kMaxDynamicSharedSizeBytes = 8;
    static constexpr uint32_t kDefaultSharedBytes = 48 * 1024;

    CudaDriver()
    {
        void* const library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
        if (library == nullptr)
        {
            mError = std::string("no CUDA driver: ") + dlerror();
            return;
        }
        auto const find = [&](auto& function, char const* name) {
            function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(dlsym(library, name));
            if (function == nullptr && mError.empty())
            {
                mError = std::string("libcuda.so.1 has no ") + name + ": the driver is older than CUDA 12.0";
            }
        };
        find(mInit, "cuInit");
        find(mGetErrorString, "cuGetErrorString");
        find(mCtxGetDevice, "cuCtxGetDevice");
        find(mDeviceGetAttribute, "cuDeviceGetAttribute");
        find(mLibraryLoadData, "cuLibraryLoadData");
        find(mLibraryGetKernel, "cuLibraryGetKernel");
        find(mKernelSetAttribute, "cuKernelSetAttribute");
        find(mLaunchKernel, "cuLaunchKernel");
        if (mError.empty())
        {
            mError = describe("cuInit", mInit(0));
        }
    }

    //! The kernel's handle. It is good for every context: the driver loads the image into each when it is launched.
    std::string load(Kernel const& kernel, uint32_t sharedBytes, void*& function)
    {
        if (!mError.empty())
        {
            return mError;
        }
        std::lock_guard<std::mutex> const lock(mMutex);
        void*& handle = mHandles[&kernel];
        if (handle == nullptr)
        {
            void* library = nullptr;
            std::string error = describe("cuLibraryLoadData",
                mLibraryLoadData(&library, kernel.fatbin, nullptr, nullptr, 0, nullptr, nullptr, 0));
            if (error.empty())
            {
                error = describe("cuLibraryGetKernel", mLibraryGetKernel(&handle, library, kernel.symbol));
            }
            if (!error.empty())
            {
                return error;
            }
        }
        function = handle;
        return sharedBytes > kDefaultSharedBytes ? allowShared(kernel, sharedBytes, handle) : "";
    }

    //! Let a kernel have more shared memory than all GPUs have. Unlike the image, this is a matter of each GPU.
    std::string allowShared(Kernel const& kernel, uint32_t sharedBytes, void* handle)
    {
        int device = 0;
        std::string error = describe("cuCtxGetDevice", mCtxGetDevice(&device));
        if (!error.empty() || mAllowed.count({&kernel, device}))
        {
            return error;
        }
        error = describe("cuKernelSetAttribute",
            mKernelSetAttribute(kMaxDynamicSharedSizeBytes, static_cast<int>(sharedBytes), handle, device));
        if (error.empty())
        {
            mAllowed.insert({&kernel, device});
        }
        return error;
    }

    std::string describe(char const* call, int result) const
    {
        if (result == 0)
        {
            return "";
        }
        char const* reason = nullptr;
        mGetErrorString(result, &reason);
        return std::string(call) + ": " + (reason ? reason : "unknown error") + " (" + std::to_string(result) + ")";
    }

    std::string mError; //!< Why there is no driver.
    std::mutex mMutex;
    std::unordered_map<Kernel const*, void*> mHandles;
    std::set<std::tuple<Kernel const*, int>> mAllowed;

    int (*mInit)(unsigned) = nullptr;
    int (*mGetErrorString)(int, char const**) = nullptr;
    int (*mCtxGetDevice)(int*) = nullptr;
    int (*mDeviceGetAttribute)(int*, int, int) = nullptr;
    int (*mLibraryLoadData)(void**, void const*, void*, void*, unsigned, void*, void*, unsigned) = nullptr;
    int (*mLibraryGetKernel)(void**, void*, char const*) = nullptr;
    int (*mKernelSetAttribute)(int, int, void*, int) = nullptr;
    int (*mLaunchKernel)(void*, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void*, void**,
        void**) = nullptr;
};

} // namespace capa
