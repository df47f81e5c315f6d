// What an operator is to the plugin: tables and launches. Python writes them to capa_kernels.h, from its own operators.
#pragma once

#include "cuda_driver.h"

#include <vector>

namespace capa
{

//! A view of an array of static storage.
template <typename T>
class Span
{
public:
    constexpr Span() = default;

    template <size_t N>
    constexpr Span(T const (&items)[N])
        : mData(items)
        , mSize(N)
    {
    }

    constexpr T const* begin() const
    {
        return mData;
    }

    constexpr T const* end() const
    {
        return mData + mSize;
    }

    constexpr T const& operator[](size_t index) const
    {
        return mData[index];
    }

    constexpr int32_t size() const
    {
        return static_cast<int32_t>(mSize);
    }

private:
    T const* mData = nullptr;
    size_t mSize = 0;
};

enum class Dtype
{
    kReal, //!< FP16, BF16 or FP32, the same throughout a call.
    kFp32,
    kInt32,
    kInt64
};

constexpr int32_t kMaxAxes = 5;

struct Tensor
{
    char const* name;
    Dtype dtype;
    int32_t rank;
    int32_t axes[kMaxAxes]; //!< The index of a size, or -n for n.
};

struct Attribute
{
    char const* name;
    bool isFloat;
};

union Value
{
    int32_t i;
    float f;
};

//! Which kernel: its name, and what it is compiled for as far as that matters to it.
struct Variant
{
    char const* kernel;
    char const* dtype;    //!< May be null.
    int64_t compiledSize; //!< May be 0.

    std::string name() const
    {
        std::string name = kernel;
        name += dtype ? std::string(".") + dtype : "";
        name += compiledSize ? "." + std::to_string(compiledSize) : "";
        return name;
    }
};

//! One run of an operator; or, without a driver, the question whether it could run.
struct Call
{
    Span<Kernel> kernels;
    int64_t const* sizes;
    Value const* attributes;
    char const* dtype;
    std::vector<void*> buffers; //!< Inputs, outputs, scratch.
    int image; //!< What `Block::image` is for the GPU.
    CudaDriver* driver;
    void* stream;
    std::string error;

    //! \return false, and `error` says why, if it went wrong.
    template <typename... Args>
    bool launch(Variant const& variant, Grid const& grid, Args... args)
    {
        std::string const name = variant.name();
        for (Kernel const& kernel : kernels)
        {
            if (name == kernel.variant)
            {
                std::vector<uint64_t> slots{slot(args)...};
                slots.resize(slots.size() + kernel.nullPointers);
                std::vector<void*> params;
                for (uint64_t& one : slots)
                {
                    params.push_back(&one);
                }
                error = driver ? driver->launch(kernel, block(kernel), grid, stream, params.data()) : "";
                error = error.empty() ? "" : "kernel " + name + ": " + error;
                return error.empty();
            }
        }
        error = "there is no kernel " + name;
        return false;
    }

private:
    Block const& block(Kernel const& kernel) const
    {
        int index = 0;
        while (index + 1 < kMaxBlocks && kernel.blocks[index + 1].warps && kernel.blocks[index + 1].image <= image)
        {
            ++index;
        }
        return kernel.blocks[index];
    }

    static uint64_t slot(void* pointer)
    {
        return reinterpret_cast<uintptr_t>(pointer);
    }

    static uint64_t slot(int64_t count)
    {
        return static_cast<uint32_t>(count);
    }

    static uint64_t slot(Value value)
    {
        return static_cast<uint32_t>(value.i);
    }
};

struct Operator
{
    char const* name;
    Span<char const*> sizes;
    Span<Tensor> inputs; //!< On the GPU.
    Span<Tensor> outputs;
    Span<int32_t> values; //!< Inputs on the host, [1], whose value is the size of this index.
    Span<Attribute> attributes;
    Span<int32_t> aligned; //!< Sizes that have to be multiples of 16.
    int32_t numScratch;
    void (*scratch)(int64_t const* sizes, int64_t* bytes);
    bool (*launch)(Call& call);
};

} // namespace capa
