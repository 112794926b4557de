// SPDX-License-Identifier: MIT
// The Python module mmattn_kernels._cpu. It knows no torch: tensors arrive as pointers, sizes and strides.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <string>
#include <vector>

#include "attention.h"
#if defined(__linux__) && defined(__x86_64__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace py = pybind11;
using namespace mmattn;

namespace {

using Matrix = std::tuple<uintptr_t, int64_t, int64_t, int64_t>;  // pointer and strides, see Strided

struct InstructionSet {
  const char* name;
  void (*attention_forward)(const Attention&);
  void (*attention_backward)(const Attention&);
};

bool have_amx() {
#if defined(MMATTN_X86) && defined(__linux__)
  unsigned eax = 7, ebx = 0, ecx = 0, edx = 0;
  __asm__("cpuid" : "+a"(eax), "=b"(ebx), "+c"(ecx), "=d"(edx));
  const bool cpu = (edx >> 22 & 1) && (edx >> 24 & 1);  // AMX-BF16, AMX-TILE
  // The kernel hands out the tile registers on request: ARCH_REQ_XCOMP_PERM for XFEATURE_XTILEDATA.
  return cpu && syscall(SYS_arch_prctl, 0x1023, 18) == 0;
#else
  return false;
#endif
}

#define MMATTN_SET(isa)                                   \
  InstructionSet {                                        \
    #isa, isa::attention_forward, isa::attention_backward \
  }

// What this CPU runs, slowest first.
std::vector<InstructionSet> detect() {
  std::vector<InstructionSet> sets{MMATTN_SET(portable)};
#if defined(MMATTN_X86)
  __builtin_cpu_init();
  if (!(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))) return sets;
  sets.push_back(MMATTN_SET(avx2));
  if (!(__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl")))
    return sets;
  sets.push_back(MMATTN_SET(avx512));
  if (__builtin_cpu_supports("avx512bf16") && have_amx()) sets.push_back(MMATTN_SET(amx));
#endif
  return sets;
}

const std::vector<InstructionSet>& sets() {
  static const std::vector<InstructionSet> found = detect();
  return found;
}

InstructionSet& active() {
  static InstructionSet set = sets().back();
  return set;
}

void use_instruction_set(const std::string& name) {
  std::string known;
  for (const InstructionSet& set : sets()) {
    if (name == set.name) {
      active() = set;
      return;
    }
    known += (known.empty() ? "" : ", ") + std::string(set.name);
  }
  throw py::value_error("instruction set is '" + name + "'; this CPU and build run " + known);
}

Strided strided(const Matrix& m) {
  return {reinterpret_cast<void*>(std::get<0>(m)), std::get<1>(m), std::get<2>(m), std::get<3>(m)};
}

// Each direction: (q, k, v, out[, d_out, d_q, d_k, d_v]), lse pointer, q_len, k_len.
using DirectionArgs = std::tuple<std::vector<Matrix>, uintptr_t, int64_t, int64_t>;

Attention unpack(const std::array<DirectionArgs, 2>& directions, int64_t batch, int64_t heads, int64_t dim,
                 int64_t frames, int64_t window, int64_t shift, float scale, bool is_bf16, int threads) {
  Attention p{{}, batch, heads, dim, frames, window, shift, scale, is_bf16, threads};
  for (int i = 0; i < 2; ++i) {
    const auto& [matrices, lse, q_len, k_len] = directions[i];
    Strided* const fields[] = {&p.directions[i].q,   &p.directions[i].k,     &p.directions[i].v,
                               &p.directions[i].out, &p.directions[i].d_out, &p.directions[i].d_q,
                               &p.directions[i].d_k, &p.directions[i].d_v};
    for (size_t j = 0; j < matrices.size(); ++j) *fields[j] = strided(matrices[j]);
    p.directions[i].lse = reinterpret_cast<float*>(lse);
    p.directions[i].q_len = q_len;
    p.directions[i].k_len = k_len;
  }
  return p;
}

template <void (*InstructionSet::*kKernel)(const Attention&)>
void run(const std::array<DirectionArgs, 2>& directions, int64_t batch, int64_t heads, int64_t dim, int64_t frames,
         int64_t window, int64_t shift, float scale, bool is_bf16, int threads) {
  const Attention p = unpack(directions, batch, heads, dim, frames, window, shift, scale, is_bf16, threads);
  const auto kernel = active().*kKernel;
  py::gil_scoped_release release;
  kernel(p);
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "CPU kernels of mmattn; see mmattn_kernels/cpu.";
  m.def("instruction_sets", [] {
    std::vector<std::string> names;
    for (const InstructionSet& set : sets()) names.push_back(set.name);
    return names;
  });
  m.def("instruction_set", [] { return std::string(active().name); });
  m.def("use_instruction_set", &use_instruction_set);
  m.def("attention_forward", &run<&InstructionSet::attention_forward>);
  m.def("attention_backward", &run<&InstructionSet::attention_backward>);
}
