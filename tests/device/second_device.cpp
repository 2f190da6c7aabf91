// A second device for tests on a machine without a GPU. test_device.py builds this file.
//
// Its tensors are in ordinary memory, but for torch they belong to another device, which mixes with
// the CPU as little as CUDA does. The functions that make, copy and reshape tensors are registered
// here. All others go to `compute_on_cpu`, which refuses arguments on different devices.

#include <ATen/EmptyTensor.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/resize_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <cstdlib>
#include <cstring>

using at::IntArrayRef;
using at::Tensor;
using std::optional;

constexpr auto SECOND = c10::DeviceType::PrivateUse1;  // torch's name for a device of one's own

// Torch's idea of the device: one, with number 0 and one stream, which backward asks for.
struct Guard : c10::impl::NoOpDeviceGuardImpl<SECOND> {
  c10::Device getDevice() const override { return {SECOND, 0}; }
  c10::Stream getStream(c10::Device) const noexcept override { return c10::Stream(c10::Stream::DEFAULT, getDevice()); }
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

struct Hooks : at::PrivateUse1HooksInterface {
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
};
bool registered = (at::RegisterPrivateUse1HooksInterface(new Hooks), true);

struct Memory : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* memory = std::malloc(bytes);
    return {memory, memory, &std::free, c10::Device(SECOND, 0)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &std::free; }
  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }
};
Memory memory;
REGISTER_ALLOCATOR(SECOND, &memory);

// ---------------------------------------------------------------------- new tensors, and copies

Tensor empty(IntArrayRef size, optional<at::ScalarType> dtype, optional<at::Layout>, optional<at::Device>,
             optional<bool>, optional<at::MemoryFormat> format) {
  c10::DispatchKeySet keys(c10::DispatchKey::PrivateUse1);
  return at::detail::empty_generic(size, &memory, keys, c10::dtype_or_default(dtype), format);
}

Tensor empty_strided(IntArrayRef size, IntArrayRef stride, optional<at::ScalarType> dtype, optional<at::Layout>,
                     optional<at::Device>, optional<bool>) {
  c10::DispatchKeySet keys(c10::DispatchKey::PrivateUse1);
  return at::detail::empty_strided_generic(size, stride, &memory, keys, c10::dtype_or_default(dtype));
}

// Returns the same memory as a tensor of the CPU.
Tensor on_cpu(const Tensor& tensor) {
  auto options = at::TensorOptions(tensor.scalar_type());
  return at::from_blob(tensor.mutable_data_ptr(), tensor.sizes(), tensor.strides(), options);
}

Tensor copy_from(const Tensor& from, const Tensor& to, bool) {
  on_cpu(to).copy_(on_cpu(from));
  return to;
}

Tensor copy_from_and_resize(const Tensor& from, const Tensor& to) {
  at::native::resize_(to, from.sizes());
  return copy_from(from, to, false);
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, library) {
  library.impl("empty.memory_format", empty);
  library.impl("empty_strided", empty_strided);
  library.impl("_copy_from", copy_from);
  library.impl("_copy_from_and_resize", copy_from_and_resize);
  // These change how memory is seen, not what is in it, so torch's functions for the CPU serve.
  library.impl("as_strided", at::native::as_strided_tensorimpl);
  library.impl("view", at::native::view);
  library.impl("_reshape_alias", at::native::_reshape_alias);
  library.impl("unfold", at::native::unfold);
  library.impl("set_.source_Storage", at::native::set_);
  library.impl("set_.source_Storage_storage_offset", at::native::set_storage_cpu_);
}

// -------------------------------------------------------------------------- all other functions

// Raises RuntimeError for what CUDA refuses: tensors of both devices, a generator of the CPU.
void compute_on_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  std::string name = op.schema().name();
  bool indexing = name == "aten::index" || name == "aten::index_put_" || name == "aten::_index_put_impl_";
  int on_cpu = 0, on_second = 0;
  auto count = [&](const Tensor& tensor) {
    if (!tensor.defined()) return;
    on_second += tensor.device().type() == SECOND;
    on_cpu += tensor.is_cpu() && tensor.dim() > 0;  // a single number may be on the CPU
  };
  for (auto& argument : torch::jit::last(*stack, op.schema().arguments().size())) {
    if (argument.isTensor()) count(argument.toTensor());
    // A tensor of this device accepts indices on the CPU: a list of optional tensors, not counted.
    if (argument.isTensorList()) {
      for (const Tensor& tensor : argument.toTensorVector()) count(tensor);
    }
    TORCH_CHECK(!argument.isGenerator(), name, ": the generator is on the CPU");
  }
  TORCH_CHECK(on_cpu == 0 || on_second + indexing == 0, name, ": tensors on the CPU and on the second device");
  at::native::cpu_fallback(op, stack, /*error_on_views=*/true);
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, library) {
  library.fallback(torch::CppFunction::makeFromBoxedFunction<&compute_on_cpu>());
}
