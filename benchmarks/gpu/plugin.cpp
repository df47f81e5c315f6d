// Runs a plugin of the library as TensorRT does, on tensors at addresses that the caller gives.
#include "NvInferRuntime.h"

#include <dlfcn.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <vector>

using namespace nvinfer1;

namespace
{

struct Log : ILogger
{
    void log(Severity severity, AsciiChar const* message) noexcept override
    {
        std::fprintf(stderr, "log %d %s\n", static_cast<int>(severity), message);
    }
} gLog;

struct LogFinder : ILoggerFinder
{
    ILogger* findLogger() override
    {
        return &gLog;
    }
} gLogFinder;

IPluginV3* create(char const* library, char const* name, PluginField const* fields, int numFields)
{
    void* const handle = dlopen(library, RTLD_NOW | RTLD_LOCAL);
    if (!handle)
    {
        std::fprintf(stderr, "%s\n", dlerror());
        return nullptr;
    }
    reinterpret_cast<void (*)(ILoggerFinder*)>(dlsym(handle, "setLoggerFinder"))(&gLogFinder);
    int32_t count = 0;
    auto* const* const creators
        = reinterpret_cast<IPluginCreatorInterface* const* (*)(int32_t&)>(dlsym(handle, "getCreators"))(count);
    PluginFieldCollection const collection{numFields, fields};
    for (int32_t index = 0; index < count; ++index)
    {
        auto* const creator = static_cast<IPluginCreatorV3One*>(creators[index]);
        if (!std::strcmp(name, creator->getPluginName()))
        {
            return creator->createPlugin("", &collection, TensorRTPhase::kRUNTIME);
        }
    }
    return nullptr;
}

} // namespace

struct TensorAt
{
    int type, rank;
    long dims[5];
    void* address;
};

//! Run one operator. \param attribute its only one, or null. \param allocate gives the workspace.
//! \return 0 if all went well.
extern "C" int run_plugin(char const* library, char const* name, char const* attribute, int isFloat, double value,
    TensorAt const* tensors, int numIn, int numOut, void* (*allocate)(size_t), void* stream)
{
    auto const asInt = static_cast<int32_t>(value);
    auto const asFloat = static_cast<float>(value);
    void const* const data = isFloat ? static_cast<void const*>(&asFloat) : &asInt;
    PluginField const field(attribute, data, isFloat ? PluginFieldType::kFLOAT32 : PluginFieldType::kINT32, 1);
    IPluginV3* const plugin = create(library, name, &field, attribute ? 1 : 0);
    if (!plugin)
    {
        return -1;
    }
    std::vector<PluginTensorDesc> descs;
    std::vector<DynamicPluginTensorDesc> dynamic;
    std::vector<void*> addresses;
    for (int index = 0; index < numIn + numOut; ++index)
    {
        PluginTensorDesc desc{};
        desc.type = static_cast<DataType>(tensors[index].type);
        desc.format = TensorFormat::kLINEAR;
        desc.dims.nbDims = tensors[index].rank;
        std::copy_n(tensors[index].dims, tensors[index].rank, desc.dims.d);
        descs.push_back(desc);
        dynamic.push_back({desc, desc.dims, desc.dims, desc.dims});
        addresses.push_back(tensors[index].address);
    }
    auto* const build = static_cast<IPluginV3OneBuild*>(plugin->getCapabilityInterface(PluginCapabilityType::kBUILD));
    int status = build->configurePlugin(dynamic.data(), numIn, dynamic.data() + numIn, numOut);
    size_t const bytes = build->getWorkspaceSize(dynamic.data(), numIn, dynamic.data() + numIn, numOut);
    auto* runtime = static_cast<IPluginV3OneRuntime*>(plugin->getCapabilityInterface(PluginCapabilityType::kRUNTIME));
    IPluginV3* const attached = runtime->attachToContext(nullptr);
    runtime = static_cast<IPluginV3OneRuntime*>(attached->getCapabilityInterface(PluginCapabilityType::kRUNTIME));
    status = status ? status : runtime->onShapeChange(descs.data(), numIn, descs.data() + numIn, numOut);
    status = status ? status
                    : runtime->enqueue(descs.data(), descs.data() + numIn, addresses.data(), addresses.data() + numIn,
                        bytes ? allocate(bytes) : nullptr, static_cast<cudaStream_t>(stream));
    delete attached;
    delete plugin;
    return status;
}
