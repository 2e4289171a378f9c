// Which instruction set the passes of kernels.h use; torch.ops.ibkernels_cpu.instruction_set() tells.
#include <ATen/Version.h>
#include <torch/library.h>

#include <string>

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

TORCH_LIBRARY_FRAGMENT(ibkernels_cpu, m) {
  m.def("instruction_set() -> str", [] { return std::string(kernels().isa); });
}

}  // namespace ibkernels
