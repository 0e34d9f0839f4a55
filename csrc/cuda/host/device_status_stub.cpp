// device_status() of a build without CUDA.
#include "build_info.h"
#include "cuda/host/device_status.h"

namespace fishleg {

DeviceStatus device_status() {
    return {0, std::string("the extension is without CUDA: ") + build::no_cuda_reason};
}

}  // namespace fishleg
