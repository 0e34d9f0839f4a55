// device_status() of a build with CUDA. Loads and answers on a machine with neither GPU nor driver.
#include "cuda/host/device_status.h"

#include <cuda_runtime_api.h>

namespace fishleg {
namespace {

std::string version_text(int version) {  // CUDA's 13000 -> "13.0"
    return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

}  // namespace

DeviceStatus device_status() {
    int runtime = 0, driver = 0, devices = 0;
    cudaRuntimeGetVersion(&runtime);
    cudaDriverGetVersion(&driver);  // 0: no driver is installed
    if (driver == 0) {
        return {0, "this machine has no NVIDIA driver"};
    }
    const std::string versions =
        "runtime " + version_text(runtime) + ", driver for CUDA up to " + version_text(driver);
    if (const cudaError_t error = cudaGetDeviceCount(&devices); error != cudaSuccess) {
        cudaGetLastError();  // the error has been reported: leave none for the next caller to find
        return {0, std::string("CUDA says: ") + cudaGetErrorString(error) + " (" + versions + ")"};
    }
    if (devices == 0) {
        return {0, "no CUDA device is visible (" + versions + ")"};
    }
    return {devices, std::to_string(devices) + (devices == 1 ? " device" : " devices") + " (" + versions + ")"};
}

}  // namespace fishleg
