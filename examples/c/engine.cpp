// An engine with pyfmha's plugin, run from C++, without Python.
//
//     g++ -std=c++17 -O2 -Iaot_out/c examples/c/engine.cpp -lnvinfer -ldl -o engine    # and -I, -L of TensorRT and CUDA
//     ./engine engine/fmha.engine aot_out/libpyfmha.so
//
// The same with NVIDIA's own program:
//
//     trtexec --loadEngine=engine/fmha.engine --dynamicPlugins=aot_out/libpyfmha.so
//
// The inputs are zeros of the first profile's optimum shapes. Exit code 0: it ran; 2: an error, said on stderr.
#include <NvInfer.h>

#include <cstdint>
#include <fstream>
#include <iostream>
#include <iterator>
#include <memory>
#include <string>
#include <vector>

#include "driver.h"

namespace {

class Logger : public nvinfer1::ILogger {
  void log(Severity severity, const char *text) noexcept override {
    if (severity <= Severity::kWARNING) std::cerr << text << '\n';
  }
};

[[noreturn]] void fail(const std::string &what) {
  std::cerr << "error: " << what << '\n';
  std::exit(2);
}

std::size_t bytes_of(const nvinfer1::Dims &shape, nvinfer1::DataType type) {
  using nvinfer1::DataType;
  std::size_t count = type == DataType::kHALF || type == DataType::kBF16 ? 2 : type == DataType::kINT64 ? 8 : 4;
  for (int i = 0; i < shape.nbDims; i++) count *= static_cast<std::size_t>(shape.d[i]);
  return count;
}

std::string words(const nvinfer1::Dims &shape) {
  std::string text = "[";
  for (int i = 0; i < shape.nbDims; i++) text += (i ? ", " : "") + std::to_string(shape.d[i]);
  return text + "]";
}

}  // namespace

int main(int count, char **arguments) {
  if (count != 3) fail("usage: engine ENGINE LIBRARY");
  const driver cuda = driver_open();
  Logger logger;
  const std::unique_ptr<nvinfer1::IRuntime> runtime{nvinfer1::createInferRuntime(logger)};
  if (!runtime) fail("TensorRT does not start");
  // The plugin's creators come out of the library; it stays loaded as long as the engine.
  if (runtime->getPluginRegistry().loadLibrary(arguments[2]) == nullptr)
    fail(std::string("no plugins in ") + arguments[2]);

  std::ifstream file(arguments[1], std::ios::binary);
  const std::vector<char> plan{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
  if (plan.empty()) fail(std::string("no engine in ") + arguments[1]);
  const std::unique_ptr<nvinfer1::ICudaEngine> engine{runtime->deserializeCudaEngine(plan.data(), plan.size())};
  if (!engine) fail(std::string(arguments[1]) + " cannot be loaded");
  const std::unique_ptr<nvinfer1::IExecutionContext> context{engine->createExecutionContext()};
  if (!context) fail("no execution context");

  std::vector<CUdeviceptr> memory;
  for (const auto mode : {nvinfer1::TensorIOMode::kINPUT, nvinfer1::TensorIOMode::kOUTPUT}) {
    for (int i = 0; i < engine->getNbIOTensors(); i++) {
      const char *name = engine->getIOTensorName(i);
      if (engine->getTensorIOMode(name) != mode) continue;
      const bool input = mode == nvinfer1::TensorIOMode::kINPUT;
      if (input) {
        const auto shape = engine->getProfileShape(name, 0, nvinfer1::OptProfileSelector::kOPT);
        if (!context->setInputShape(name, shape)) fail(std::string(name) + " cannot be " + words(shape));
      }
      const auto shape = context->getTensorShape(name);  // of an output, once all inputs have theirs
      const std::vector<char> zeros(bytes_of(shape, engine->getTensorDataType(name)));
      memory.push_back(0);
      driver_check(cuda.alloc(&memory.back(), zeros.size()), "cuMemAlloc");
      driver_check(cuda.to_device(memory.back(), zeros.data(), zeros.size()), "cuMemcpyHtoD");
      if (!context->setTensorAddress(name, reinterpret_cast<void *>(memory.back()))) fail(name);
      std::cout << (input ? "in  " : "out ") << name << ' ' << words(shape) << '\n';
    }
  }
  if (!context->enqueueV3(nullptr)) fail("the engine did not run");
  driver_check(cuda.wait(), "the engine");
  for (const CUdeviceptr pointer : memory) driver_check(cuda.free(pointer), "cuMemFree");
  std::cout << "ran\n";
  return 0;
}
