// The sizes of an operator, from the shapes of its tensors.
#pragma once

#include "NvInferRuntime.h"

#include "capa_operator.h"

#include <algorithm>

namespace capa
{

class Sizes
{
public:
    //! A size that no tensor has is 1: a graph of one prompt has no batch.
    explicit Sizes(Operator const& op)
        : mOperator(op)
        , mValues(op.sizes.size(), 1)
        , mKnown(op.sizes.size(), false)
    {
    }

    //! Take the sizes of a call from a tensor of it. \return what is wrong with the shape, empty if nothing is.
    std::string bind(Tensor const& tensor, nvinfer1::Dims const& dims)
    {
        bool fits = dims.nbDims == tensor.rank;
        for (int32_t axis = 0; fits && axis < tensor.rank; ++axis)
        {
            int32_t const size = tensor.axes[axis];
            if (size >= 0 && !mKnown[size])
            {
                mValues[size] = dims.d[axis];
                mKnown[size] = true;
            }
            fits = dims.d[axis] == (size < 0 ? -size : mValues[size]);
        }
        return fits ? "" : std::string(tensor.name) + " has shape " + text(dims) + ", not " + expected(tensor);
    }

    //! Take limits of sizes from those of a tensor, which may be wider than those of the next.
    void grow(Tensor const& tensor, nvinfer1::Dims const& dims)
    {
        for (int32_t axis = 0; axis < std::min(dims.nbDims, tensor.rank); ++axis)
        {
            int32_t const size = tensor.axes[axis];
            if (size >= 0)
            {
                mValues[size] = std::max(mValues[size], int64_t{dims.d[axis]});
            }
        }
    }

    //! \return what the kernels cannot do, empty if nothing is.
    std::string check() const
    {
        for (int32_t const size : mOperator.aligned)
        {
            if (mValues[size] % 16)
            {
                return std::string(mOperator.sizes[size]) + " is " + std::to_string(mValues[size])
                    + ", not a multiple of 16";
            }
        }
        return "";
    }

    int64_t const* data() const
    {
        return mValues.data();
    }

private:
    static std::string text(nvinfer1::Dims const& dims)
    {
        std::string text;
        for (int32_t axis = 0; axis < dims.nbDims; ++axis)
        {
            text += (axis ? ", " : "") + std::to_string(dims.d[axis]);
        }
        return "[" + text + "]";
    }

    std::string expected(Tensor const& tensor) const
    {
        std::string text;
        for (int32_t axis = 0; axis < tensor.rank; ++axis)
        {
            int32_t const size = tensor.axes[axis];
            text += axis ? ", " : "";
            text += size < 0 ? std::to_string(-size)
                             : mOperator.sizes[size] + (mKnown[size] ? " = " + std::to_string(mValues[size]) : "");
        }
        return "[" + text + "]";
    }

    Operator const& mOperator;
    std::vector<int64_t> mValues;
    std::vector<bool> mKnown;
};

} // namespace capa
