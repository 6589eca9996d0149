// Headers that most sources in csrc/cpu include, compiled once per CPU capability: parsing them takes longer than
// compiling most of these sources. Sources still include what they use: -DCMAKE_DISABLE_PRECOMPILE_HEADERS=ON checks it.
#pragma once

#include <ATen/MemoryOverlap.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <optional>
#include <tuple>
#include <vector>
