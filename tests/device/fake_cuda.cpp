// What torch needs to know of CUDA before it takes fake CUDA tensors, which have shapes but no
// values: one device with one stream. fake_cuda.py loads it before torch.

#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

using c10::Device;
using c10::DeviceIndex;
using c10::DeviceType;
using c10::Stream;

struct CUDAHooks : at::CUDAHooksInterface {  // torch looks for it by this name
  CUDAHooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex getCurrentDevice() const override { return 0; }
};
namespace at {
REGISTER_CUDA_HOOKS(CUDAHooks);
}

// The backward pass asks for the stream of each tensor.
struct Guard : c10::impl::NoOpDeviceGuardImpl<DeviceType::CUDA> {
  Device getDevice() const override { return {DeviceType::CUDA, 0}; }
  Stream getStream(Device device) const noexcept override { return Stream(Stream::DEFAULT, device); }
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard);
