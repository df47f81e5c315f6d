// The entry points of the library, which TensorRT asks for the makers of its plugins.

#include "NvInferVersion.h"

#ifndef TRT_MAJOR_ENTERPRISE
#define TRT_MAJOR_ENTERPRISE NV_TENSORRT_MAJOR
#define TRT_MINOR_ENTERPRISE NV_TENSORRT_MINOR
#endif
#if TRT_MAJOR_ENTERPRISE * 100 + TRT_MINOR_ENTERPRISE < 1003 || TRT_MAJOR_ENTERPRISE > 11
#error "these plugins need the headers of TensorRT 10.3 to 11"
#endif

#include "capa_plugin.h"

namespace capa
{
namespace
{

class Creator : public IPluginCreatorV3One
{
public:
    explicit Creator(Operator const& op)
        : mOperator(op)
        , mFields(fieldsOf(op, nullptr))
        , mCollection{static_cast<int32_t>(mFields.size()), mFields.data()}
    {
    }

    IPluginV3* createPlugin(
        AsciiChar const* /*name*/, PluginFieldCollection const* fc, TensorRTPhase /*phase*/) noexcept override
    {
        std::vector<Value> values;
        for (Attribute const& attribute : mOperator.attributes)
        {
            PluginField const* const end = fc->fields + fc->nbFields;
            PluginField const* const field = std::find_if(
                fc->fields, end, [&](PluginField const& one) { return attribute.name == std::string(one.name); });
            Value value{};
            if (field == end || !read(*field, attribute, value))
            {
                fail(mOperator,
                    std::string("needs one ") + (attribute.isFloat ? "float" : "int") + " as attribute "
                        + attribute.name);
                return nullptr;
            }
            values.push_back(value);
        }
        return new Plugin(mOperator, values);
    }

    PluginFieldCollection const* getFieldNames() noexcept override
    {
        return &mCollection;
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

private:
    static bool read(PluginField const& field, Attribute const& attribute, Value& value)
    {
        if (field.length != 1 || field.data == nullptr)
        {
            return false;
        }
        switch (field.type)
        {
        case PluginFieldType::kFLOAT32: value.f = *static_cast<float const*>(field.data); return attribute.isFloat;
        case PluginFieldType::kINT32: value.i = *static_cast<int32_t const*>(field.data); return !attribute.isFloat;
        case PluginFieldType::kINT64:
            value.i = static_cast<int32_t>(*static_cast<int64_t const*>(field.data));
            return !attribute.isFloat;
        default: return false;
        }
    }

    Operator const& mOperator;
    std::vector<PluginField> mFields;
    PluginFieldCollection mCollection;
};

} // namespace
} // namespace capa

#define CAPA_EXPORT extern "C" __attribute__((visibility("default")))

//! Version of the headers, 1003 for 10.3: TensorRT 11 and TensorRT-RTX lay out a logger otherwise than 10 does.
CAPA_EXPORT int32_t capaTensorRTHeaders()
{
    return TRT_MAJOR_ENTERPRISE * 100 + TRT_MINOR_ENTERPRISE;
}

CAPA_EXPORT void setLoggerFinder(nvinfer1::ILoggerFinder* finder)
{
    capa::gLoggerFinder = finder;
}

CAPA_EXPORT nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& nbCreators)
{
    static std::vector<nvinfer1::IPluginCreatorInterface*> const creators = [] {
        std::vector<nvinfer1::IPluginCreatorInterface*> all;
        for (capa::Operator const& op : capa::kOperators)
        {
            all.push_back(new capa::Creator(op)); // The registry keeps it for as long as there is a process.
        }
        return all;
    }();
    nbCreators = static_cast<int32_t>(creators.size());
    return creators.data();
}
