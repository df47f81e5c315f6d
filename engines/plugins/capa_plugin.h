// An operator as a TensorRT plugin: one class for all, told apart by their tables.
#pragma once

#include "NvInferRuntime.h"

#include "capa_kernels.h"
#include "capa_sizes.h"

#include <cstdio>

namespace capa
{

using namespace nvinfer1;

constexpr char const* kNamespace = "capa";
constexpr char const* kVersion = "1";
constexpr size_t kAlignment = 256;

inline ILoggerFinder* gLoggerFinder = nullptr;

inline void log(ILogger::Severity severity, std::string const& message)
{
    ILogger* const logger = gLoggerFinder ? gLoggerFinder->findLogger() : nullptr;
    if (logger)
    {
        logger->log(severity, message.c_str());
    }
    else
    {
        std::fprintf(stderr, "%s\n", message.c_str());
    }
}

inline int32_t fail(Operator const& op, std::string const& reason)
{
    log(ILogger::Severity::kERROR, std::string("capa::") + op.name + ": " + reason);
    return 1;
}

//! The image that a GPU runs, 0 if it is PTX. Cubins from 9.0 on are for their own GPU only; those before are for later
//! minor versions too, except that Orin (8.7) shares none with the others.
inline int imageFor(int capability)
{
    int best = 0;
    for (int const image : kImages)
    {
        bool const related = image / 10 == capability / 10 && image < capability && capability < 90;
        if (image == capability || (related && image != 87 && capability != 87))
        {
            best = std::max(best, image);
        }
    }
    return best;
}

inline void warnOfPtx(int capability)
{
    static std::once_flag once;
    std::call_once(once, [&] {
        log(ILogger::Severity::kWARNING,
            "capa: no kernel image for SM " + std::to_string(capability / 10) + "." + std::to_string(capability % 10)
                + ": the driver compiles PTX");
    });
}

inline size_t padded(size_t bytes)
{
    return (bytes + kAlignment - 1) / kAlignment * kAlignment;
}

inline DataType dataType(Dtype dtype, DataType real)
{
    switch (dtype)
    {
    case Dtype::kReal: return real;
    case Dtype::kFp32: return DataType::kFLOAT;
    case Dtype::kInt32: return DataType::kINT32;
    case Dtype::kInt64: return DataType::kINT64;
    }
    return real;
}

inline bool isReal(DataType type)
{
    return type == DataType::kHALF || type == DataType::kBF16 || type == DataType::kFLOAT;
}

//! The attributes as TensorRT takes them. \param values may be null.
inline std::vector<PluginField> fieldsOf(Operator const& op, Value const* values)
{
    std::vector<PluginField> fields;
    for (Attribute const& attribute : op.attributes)
    {
        auto const type = attribute.isFloat ? PluginFieldType::kFLOAT32 : PluginFieldType::kINT32;
        fields.emplace_back(attribute.name, values ? values + fields.size() : nullptr, type, 1);
    }
    return fields;
}

class Plugin : public IPluginV3, public IPluginV3OneCore, public IPluginV3OneBuild, public IPluginV3OneRuntime
{
public:
    Plugin(Operator const& op, std::vector<Value> const& attributes)
        : mOperator(op)
        , mAttributes(attributes)
        , mFields(fieldsOf(op, mAttributes.data()))
        , mCollection{static_cast<int32_t>(mFields.size()), mFields.data()}
    {
    }

    Plugin(Plugin const&) = delete;
    Plugin& operator=(Plugin const&) = delete;

    IPluginCapability* getCapabilityInterface(PluginCapabilityType type) noexcept override
    {
        switch (type)
        {
        case PluginCapabilityType::kCORE: return static_cast<IPluginV3OneCore*>(this);
        case PluginCapabilityType::kBUILD: return static_cast<IPluginV3OneBuild*>(this);
        case PluginCapabilityType::kRUNTIME: return static_cast<IPluginV3OneRuntime*>(this);
        }
        return nullptr;
    }

    IPluginV3* clone() noexcept override
    {
        return new Plugin(mOperator, mAttributes);
    }

    AsciiChar const* getPluginName() const noexcept override
    {
        return mOperator.name;
    }

    AsciiChar const* getPluginVersion() const noexcept override
    {
        return kVersion;
    }

    AsciiChar const* getPluginNamespace() const noexcept override
    {
        return kNamespace;
    }

    int32_t getNbOutputs() const noexcept override
    {
        return mOperator.outputs.size();
    }

    int32_t getOutputDataTypes(DataType* outputTypes, int32_t nbOutputs, DataType const* inputTypes,
        int32_t nbInputs) const noexcept override
    {
        DataType real = DataType::kHALF;
        for (int32_t index = 0; index < std::min(nbInputs, mOperator.inputs.size()); ++index)
        {
            real = mOperator.inputs[index].dtype == Dtype::kReal ? inputTypes[index] : real;
        }
        for (int32_t index = 0; index < nbOutputs; ++index)
        {
            outputTypes[index] = dataType(mOperator.outputs[index].dtype, real);
        }
        return 0;
    }

    int32_t getOutputShapes(DimsExprs const* inputs, int32_t nbInputs, DimsExprs const* shapeInputs,
        int32_t nbShapeInputs, DimsExprs* outputs, int32_t nbOutputs, IExprBuilder& exprBuilder) noexcept override
    {
        if (nbInputs != mOperator.inputs.size() || nbShapeInputs != mOperator.values.size())
        {
            return fail(mOperator,
                "has " + std::to_string(nbInputs) + " inputs and " + std::to_string(nbShapeInputs)
                    + " shape inputs, not " + std::to_string(mOperator.inputs.size()) + " and "
                    + std::to_string(mOperator.values.size()));
        }
        std::vector<IDimensionExpr const*> sizes(mOperator.sizes.size(), nullptr);
        for (int32_t index = 0; index < nbInputs; ++index)
        {
            Tensor const& tensor = mOperator.inputs[index];
            if (inputs[index].nbDims != tensor.rank)
            {
                return fail(mOperator,
                    std::string(tensor.name) + " has " + std::to_string(inputs[index].nbDims) + " axes, not "
                        + std::to_string(tensor.rank));
            }
            for (int32_t axis = 0; axis < tensor.rank; ++axis)
            {
                if (tensor.axes[axis] >= 0)
                {
                    sizes[tensor.axes[axis]] = inputs[index].d[axis];
                }
            }
        }
        for (int32_t index = 0; index < nbShapeInputs; ++index)
        {
            sizes[mOperator.values[index]] = shapeInputs[index].d[0];
        }
        for (int32_t index = 0; index < nbOutputs; ++index)
        {
            Tensor const& tensor = mOperator.outputs[index];
            outputs[index].nbDims = tensor.rank;
            for (int32_t axis = 0; axis < tensor.rank; ++axis)
            {
                int32_t const size = tensor.axes[axis];
                outputs[index].d[axis] = size < 0 ? exprBuilder.constant(-size) : sizes[size];
            }
        }
        return 0;
    }

    bool supportsFormatCombination(
        int32_t pos, DynamicPluginTensorDesc const* inOut, int32_t nbInputs, int32_t /*nbOutputs*/) noexcept override
    {
        auto const dtype = [&](int32_t index) {
            return (index < nbInputs ? mOperator.inputs[index] : mOperator.outputs[index - nbInputs]).dtype;
        };
        PluginTensorDesc const& desc = inOut[pos].desc;
        DataType real = isReal(desc.type) ? desc.type : DataType::kHALF;
        for (int32_t index = pos - 1; index >= 0; --index)
        {
            real = dtype(index) == Dtype::kReal ? inOut[index].desc.type : real;
        }
        return desc.format == TensorFormat::kLINEAR && desc.type == dataType(dtype(pos), real);
    }

    int32_t configurePlugin(DynamicPluginTensorDesc const* in, int32_t nbInputs, DynamicPluginTensorDesc const* out,
        int32_t nbOutputs) noexcept override
    {
        Sizes const sizes = largest(in, nbInputs, out, nbOutputs);
        std::string error = sizes.check();
        if (error.empty())
        {
            Call call = makeCall(sizes, in, nbInputs, [](auto const& desc) { return desc.desc.type; });
            mOperator.launch(call);
            error = call.error;
        }
        return error.empty() ? 0 : fail(mOperator, error);
    }

    size_t getWorkspaceSize(DynamicPluginTensorDesc const* inputs, int32_t nbInputs,
        DynamicPluginTensorDesc const* outputs, int32_t nbOutputs) const noexcept override
    {
        size_t total = 0;
        for (int64_t const bytes : scratchBytes(largest(inputs, nbInputs, outputs, nbOutputs)))
        {
            total += padded(static_cast<size_t>(bytes));
        }
        return total;
    }

    int32_t onShapeChange(PluginTensorDesc const* /*in*/, int32_t /*nbInputs*/, PluginTensorDesc const* /*out*/,
        int32_t /*nbOutputs*/) noexcept override
    {
        return 0;
    }

    int32_t enqueue(PluginTensorDesc const* inputDesc, PluginTensorDesc const* outputDesc, void const* const* inputs,
        void* const* outputs, void* workspace, cudaStream_t stream) noexcept override
    {
        int32_t const nbInputs = mOperator.inputs.size();
        int32_t const nbOutputs = mOperator.outputs.size();
        Sizes sizes(mOperator);
        std::string error;
        for (int32_t index = 0; index < nbInputs + nbOutputs && error.empty(); ++index)
        {
            error = index < nbInputs ? sizes.bind(mOperator.inputs[index], inputDesc[index].dims)
                                     : sizes.bind(mOperator.outputs[index - nbInputs], outputDesc[index - nbInputs].dims);
        }
        error = error.empty() ? sizes.check() : error;
        if (!error.empty())
        {
            return fail(mOperator, error);
        }
        Call call = makeCall(sizes, inputDesc, nbInputs, [](auto const& desc) { return desc.type; });
        for (int32_t index = 0; index < nbInputs; ++index)
        {
            call.buffers[index] = const_cast<void*>(inputs[index]);
        }
        std::copy_n(outputs, nbOutputs, &call.buffers[nbInputs]);
        auto* free = static_cast<unsigned char*>(workspace);
        int32_t buffer = nbInputs + nbOutputs;
        for (int64_t const bytes : scratchBytes(sizes))
        {
            call.buffers[buffer++] = free;
            free += padded(static_cast<size_t>(bytes));
        }
        call.driver = &CudaDriver::get();
        call.stream = stream;
        int capability = 0;
        error = call.driver->computeCapability(capability);
        if (!error.empty())
        {
            return fail(mOperator, error);
        }
        call.image = imageFor(capability);
        if (call.image == 0)
        {
            warnOfPtx(capability);
        }
        return mOperator.launch(call) ? 0 : fail(mOperator, call.error);
    }

    IPluginV3* attachToContext(IPluginResourceContext* /*context*/) noexcept override
    {
        return clone();
    }

    PluginFieldCollection const* getFieldsToSerialize() noexcept override
    {
        return &mCollection;
    }

private:
    Sizes largest(DynamicPluginTensorDesc const* in, int32_t nbInputs, DynamicPluginTensorDesc const* out,
        int32_t nbOutputs) const
    {
        Sizes sizes(mOperator);
        for (int32_t index = 0; index < nbInputs; ++index)
        {
            sizes.grow(mOperator.inputs[index], in[index].max);
        }
        for (int32_t index = 0; index < nbOutputs; ++index)
        {
            sizes.grow(mOperator.outputs[index], out[index].max);
        }
        return sizes;
    }

    template <typename Desc, typename Type>
    Call makeCall(Sizes const& sizes, Desc const* in, int32_t nbInputs, Type type) const
    {
        char const* dtype = "fp16";
        for (int32_t index = 0; index < nbInputs; ++index)
        {
            if (mOperator.inputs[index].dtype == Dtype::kReal)
            {
                DataType const real = type(in[index]);
                dtype = real == DataType::kBF16 ? "bf16" : real == DataType::kFLOAT ? "fp32" : "fp16";
            }
        }
        size_t const numBuffers = nbInputs + mOperator.outputs.size() + mOperator.numScratch;
        return {kKernels, sizes.data(), mAttributes.data(), dtype, std::vector<void*>(numBuffers), 0, nullptr, nullptr,
            ""};
    }

    std::vector<int64_t> scratchBytes(Sizes const& sizes) const
    {
        std::vector<int64_t> bytes(mOperator.numScratch);
        mOperator.scratch(sizes.data(), bytes.data());
        return bytes;
    }

    Operator const& mOperator;
    std::vector<Value> mAttributes;
    std::vector<PluginField> mFields;
    PluginFieldCollection mCollection;
};

} // namespace capa
