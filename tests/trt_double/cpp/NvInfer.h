// What examples/c/engine.cpp calls of TensorRT, with the names and types of its public headers (11.1), and behind it an engine
// of one float32 attention layer, [2, 3, 40, 32]: its plugins come out of the library, as TensorRT loads them, and its run is a
// launch of the library's fmha_d32_fp32.
#ifndef NV_INFER_H
#define NV_INFER_H

#include <dlfcn.h>

#include <cstdint>
#include <cstring>

using cudaStream_t = struct CUstream_st *;

namespace nvinfer1 {

enum class DataType : std::int32_t { kFLOAT = 0, kHALF = 1, kINT32 = 3, kBF16 = 7, kINT64 = 8 };
enum class TensorIOMode : std::int32_t { kNONE = 0, kINPUT = 1, kOUTPUT = 2 };
enum class OptProfileSelector : std::int32_t { kMIN = 0, kOPT = 1, kMAX = 2 };

struct Dims64 {
  std::int32_t nbDims;
  std::int64_t d[8];
};
using Dims = Dims64;

class ILogger {
 public:
  enum class Severity : std::int32_t { kINTERNAL_ERROR = 0, kERROR = 1, kWARNING = 2, kINFO = 3, kVERBOSE = 4 };
  virtual void log(Severity severity, const char *text) noexcept = 0;
  virtual ~ILogger() = default;
};

class IPluginRegistry {
 public:
  using PluginLibraryHandle = void *;
  void *library = nullptr;
  std::int32_t creators = 0;

  PluginLibraryHandle loadLibrary(const char *path) noexcept {
    library = dlopen(path, RTLD_NOW);
    const auto get = library ? reinterpret_cast<void *const *(*)(std::int32_t *)>(dlsym(library, "getCreators")) : nullptr;
    if (get == nullptr || dlsym(library, "setLoggerFinder") == nullptr) return nullptr;
    get(&creators);
    return creators > 0 ? library : nullptr;
  }
};

class IExecutionContext {
 public:
  IPluginRegistry &registry;
  void *addresses[4] = {};
  Dims shape{4, {-1, 3, -1, 32}};

  explicit IExecutionContext(IPluginRegistry &registry) : registry(registry) {}
  bool setInputShape(const char *, const Dims &dims) noexcept {
    shape = dims;
    return true;
  }
  Dims getTensorShape(const char *) const noexcept { return shape; }
  bool setTensorAddress(const char *name, void *data) noexcept {
    addresses[std::strcmp(name, "Out") == 0 ? 3 : name[0] == 'Q' ? 0 : name[0] == 'K' ? 1 : 2] = data;
    return true;
  }
  bool enqueueV3(cudaStream_t stream) noexcept {
    using Load = int (*)();
    using Launch = int (*)(cudaStream_t, void *, void *, void *, void *, void *, void *, float, int, int, int, int);
    const auto load = reinterpret_cast<Load>(dlsym(registry.library, "load_fmha_d32_fp32"));
    const auto launch = reinterpret_cast<Launch>(dlsym(registry.library, "fmha_d32_fp32"));
    // No two outputs of the layer are looked at: Q's memory does for the statistics.
    return load() == 0 && launch(stream, addresses[3], addresses[0], addresses[0], addresses[0], addresses[1], addresses[2],
                                 0.125f, static_cast<int>(shape.d[0]), 3, static_cast<int>(shape.d[2]), 0) == 0;
  }
};

class ICudaEngine {
 public:
  IPluginRegistry &registry;

  explicit ICudaEngine(IPluginRegistry &registry) : registry(registry) {}
  IExecutionContext *createExecutionContext() noexcept { return new IExecutionContext(registry); }
  std::int32_t getNbIOTensors() const noexcept { return 4; }
  const char *getIOTensorName(std::int32_t index) const noexcept {
    static const char *const names[] = {"Q", "K", "V", "Out"};
    return names[index];
  }
  TensorIOMode getTensorIOMode(const char *name) const noexcept {
    return std::strcmp(name, "Out") == 0 ? TensorIOMode::kOUTPUT : TensorIOMode::kINPUT;
  }
  Dims getProfileShape(const char *, std::int32_t, OptProfileSelector) const noexcept { return {4, {2, 3, 40, 32}}; }
  DataType getTensorDataType(const char *) const noexcept { return DataType::kFLOAT; }
};

class IRuntime {
 public:
  IPluginRegistry registry;

  IPluginRegistry &getPluginRegistry() noexcept { return registry; }
  // As TensorRT: no engine without the creator of its plugin.
  ICudaEngine *deserializeCudaEngine(const void *plan, std::size_t size) noexcept {
    const bool known = size >= 4 && std::memcmp(plan, "fmha", 4) == 0 && registry.creators > 0;
    return known ? new ICudaEngine(registry) : nullptr;
  }
};

inline IRuntime *createInferRuntime(ILogger &) { return new IRuntime; }

}  // namespace nvinfer1

#endif
