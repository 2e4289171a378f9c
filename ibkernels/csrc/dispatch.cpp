// Which instruction set the passes of kernels.h use, and whether bfloat16 matrices are multiplied as such;
// torch.ops.ibkernels_cpu.instruction_set() and bfloat16_products() tell.
#include <ATen/Context.h>
#include <ATen/Version.h>
#include <ATen/native/CPUBlas.h>
#include <torch/library.h>

#include <exception>
#include <string>

#include "bfloat16.h"
#include "kernels.h"

namespace ibkernels {

// torch's own choice, made from the machine it runs on; ATEN_CPU_CAPABILITY=default|avx2 lowers it, for torch and for us.
const Kernels& kernels() {
  static const Kernels& chosen = []() -> const Kernels& {
#ifdef IBKERNELS_X86
    const std::string capability = at::get_cpu_capability();
    if (capability.starts_with("AVX512")) return kKernelsAvx512;
    if (capability.starts_with("AVX2")) return kKernelsAvx2;
#endif
    return kKernelsBaseline;
  }();
  return chosen;
}

// Where the instructions are missing, oneDNN's products of bfloat16 are made of float32's and slower than those.
bool has_bfloat16_products() {
#ifdef IBKERNELS_X86
  static const bool usable = [] {
    if (&kernels() != &kKernelsAvx512 || !__builtin_cpu_supports("avx512bf16")) return false;
    // A torch without oneDNN, or a oneDNN told to use less than AVX-512, says so by failing.
    const Scratch<uint16_t> a = scratch<uint16_t>(2), b = scratch<uint16_t>(2 * kPanel);
    std::fill_n(a.get(), 2, 0x3f80), std::fill_n(b.get(), 2 * kPanel, 0x3f80);  // ones
    float sum = 0.0f;
    try {
      at::native::cpublas::brgemm(1, 1, 2, 2, kPanel, 1, false, reinterpret_cast<const at::BFloat16*>(a.get()),
                                  reinterpret_cast<const at::BFloat16*>(b.get()), &sum);
      at::native::cpublas::brgemm_release();
    } catch (const std::exception&) {
      return false;
    }
    return sum == 2.0f;
  }();
  return usable && at::globalContext().userEnabledMkldnn();
#else
  return false;
#endif
}

TORCH_LIBRARY_FRAGMENT(ibkernels_cpu, m) {
  m.def("instruction_set() -> str", [] { return std::string(kernels().isa); });
  m.def("bfloat16_products() -> bool", [] { return has_bfloat16_products(); });
}

}  // namespace ibkernels
