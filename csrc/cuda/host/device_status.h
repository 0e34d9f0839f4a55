// Can this build run on a CUDA device here, and if not, why not?
#pragma once

#include <string>

namespace fishleg {

struct DeviceStatus {
    int devices;         // CUDA devices that can be used; 0 if none
    std::string detail;  // what was found, or why there is nothing
};

// Asks the CUDA runtime, which initialises the driver: call it on demand, not at import, or a later fork()
// (a DataLoader's workers) inherits a driver that it cannot use.
DeviceStatus device_status();

}  // namespace fishleg
