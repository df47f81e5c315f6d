// Runs plugins of the library as TensorRT does, on made-up addresses: enqueue LIBRARY < CALLS
//
//   call VisualScale
//   int min_keep_per_image 1        an attribute
//   in fp16 4 64                    a tensor, of this shape
//   out fp16 4 64
//   run
#include "NvInferRuntime.h"

#include <dlfcn.h>

#include <cstdio>
#include <iostream>
#include <map>
#include <sstream>
#include <string>
#include <vector>

using namespace nvinfer1;

namespace
{

struct Log : ILogger
{
    void log(Severity severity, AsciiChar const* message) noexcept override
    {
        std::printf("log %d %s\n", static_cast<int>(severity), message);
    }
} gLog;

struct LogFinder : ILoggerFinder
{
    ILogger* findLogger() override
    {
        return &gLog;
    }
} gLogFinder;

struct Request
{
    std::string op;
    std::map<std::string, int32_t> ints;
    std::map<std::string, float> floats;
    std::vector<PluginTensorDesc> in, out;
};

PluginTensorDesc parseTensor(std::istream& words)
{
    static std::map<std::string, DataType> const types = {{"fp16", DataType::kHALF}, {"bf16", DataType::kBF16},
        {"fp32", DataType::kFLOAT}, {"int64", DataType::kINT64}};
    PluginTensorDesc desc{};
    std::string type;
    words >> type;
    desc.type = types.at(type);
    desc.format = TensorFormat::kLINEAR;
    for (int64_t size; words >> size;)
    {
        desc.dims.d[desc.dims.nbDims++] = size;
    }
    return desc;
}

void run(Request& request, IPluginCreatorInterface* const* creators, int32_t count)
{
    std::vector<PluginField> fields;
    for (auto& [name, value] : request.ints)
    {
        fields.emplace_back(name.c_str(), &value, PluginFieldType::kINT32, 1);
    }
    for (auto& [name, value] : request.floats)
    {
        fields.emplace_back(name.c_str(), &value, PluginFieldType::kFLOAT32, 1);
    }
    PluginFieldCollection const collection{static_cast<int32_t>(fields.size()), fields.data()};
    IPluginV3* plugin = nullptr;
    for (int32_t index = 0; index < count; ++index)
    {
        auto* const creator = static_cast<IPluginCreatorV3One*>(creators[index]);
        if (request.op == creator->getPluginName())
        {
            plugin = creator->createPlugin("", &collection, TensorRTPhase::kRUNTIME);
        }
    }
    if (!plugin)
    {
        std::printf("none\n");
        return;
    }
    // As a deserialised plan does: from what the plugin wrote.
    auto* runtime
        = static_cast<IPluginV3OneRuntime*>(plugin->getCapabilityInterface(PluginCapabilityType::kRUNTIME));
    auto* const build = static_cast<IPluginV3OneBuild*>(plugin->getCapabilityInterface(PluginCapabilityType::kBUILD));
    for (int32_t index = 0; index < runtime->getFieldsToSerialize()->nbFields; ++index)
    {
        PluginField const& field = runtime->getFieldsToSerialize()->fields[index];
        std::printf("field %s %d %u\n", field.name, static_cast<int>(field.type), *static_cast<uint32_t const*>(field.data));
    }
    std::vector<DynamicPluginTensorDesc> all;
    for (auto const* descs : {&request.in, &request.out})
    {
        for (PluginTensorDesc const& desc : *descs)
        {
            all.push_back({desc, desc.dims, desc.dims, desc.dims});
        }
    }
    auto const numIn = static_cast<int32_t>(request.in.size());
    auto const numOut = static_cast<int32_t>(request.out.size());
    std::printf("configure %d\n", build->configurePlugin(all.data(), numIn, all.data() + numIn, numOut));
    std::printf("formats");
    for (int32_t index = 0; index < numIn + numOut; ++index)
    {
        std::printf(" %d", build->supportsFormatCombination(index, all.data(), numIn, numOut));
    }
    std::printf("\nworkspace %zu\n", build->getWorkspaceSize(all.data(), numIn, all.data() + numIn, numOut));
    std::vector<void const*> inputs;
    std::vector<void*> outputs;
    for (int32_t index = 0; index < numIn; ++index)
    {
        inputs.push_back(reinterpret_cast<void const*>((index + 1) * size_t{0x1000}));
    }
    for (int32_t index = 0; index < numOut; ++index)
    {
        outputs.push_back(reinterpret_cast<void*>((index + 1) * size_t{0x100000}));
    }
    IPluginV3* const attached = runtime->attachToContext(nullptr);
    runtime = static_cast<IPluginV3OneRuntime*>(attached->getCapabilityInterface(PluginCapabilityType::kRUNTIME));
    std::printf("enqueue %d\n",
        runtime->enqueue(request.in.data(), request.out.data(), inputs.data(), outputs.data(),
            reinterpret_cast<void*>(0x10000000), reinterpret_cast<cudaStream_t>(0x77)));
    delete attached;
    delete plugin;
}

} // namespace

int main(int, char** argv)
{
    void* const library = dlopen(argv[1], RTLD_NOW | RTLD_LOCAL);
    if (!library)
    {
        std::printf("%s\n", dlerror());
        return 1;
    }
    auto const find = reinterpret_cast<void (*)(ILoggerFinder*)>(dlsym(library, "setLoggerFinder"));
    auto const creators
        = reinterpret_cast<IPluginCreatorInterface* const* (*)(int32_t&)>(dlsym(library, "getCreators"));
    find(&gLogFinder);
    int32_t count = 0;
    IPluginCreatorInterface* const* const all = creators(count);
    Request request;
    for (std::string line, word; std::getline(std::cin, line);)
    {
        std::istringstream words(line);
        words >> word;
        std::string name;
        if (word == "call")
        {
            request = {};
            words >> request.op;
        }
        else if (word == "int" && words >> name)
        {
            words >> request.ints[name];
        }
        else if (word == "float" && words >> name)
        {
            words >> request.floats[name];
        }
        else if (word == "in" || word == "out")
        {
            (word == "in" ? request.in : request.out).push_back(parseTensor(words));
        }
        else if (word == "run")
        {
            run(request, all, count);
        }
    }
}
