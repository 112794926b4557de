// SPDX-License-Identifier: MIT
// The instruction sets that every kernel is compiled for, each in a namespace of its name.
#pragma once

#define MMATTN_EACH_ISA(declare) declare(portable) declare(avx2) declare(avx512) declare(avx512_bf16) declare(amx)
