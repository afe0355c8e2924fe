// A call that passes its input on, until it is told to fail.

#include <atomic>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

static std::atomic<int> passes{-1};

extern "C" void fail_after(int calls) { passes = calls; }

static ffi::Error PassOn(ffi::Buffer<ffi::F32> x, ffi::ResultBuffer<ffi::F32> y) {
  if (passes >= 0 && passes-- == 0) return ffi::Error::Internal("the device said no");
  return ffi::Error::Success();
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(pass_on, PassOn,
                              ffi::Ffi::Bind().Arg<ffi::Buffer<ffi::F32>>().Ret<ffi::Buffer<ffi::F32>>());
