// The `cpu` device: the framework's pages are ordinary memory, and our own threads copy.
//
//   stream A: copy copy record ... --.                      .-- copy thread --.
//   stream B: wait copy record ... ---+-- ready streams ----+                 +-- events, synchronize()
//   stream C: ...                   --'   (round robin)     '-- copy thread --'
//
// Each stream is a queue. The copies at its head are cut into units of 256 KiB to 4 MiB, which any number of
// threads take one by one; the first item that is no copy waits until their last unit is done. So one batch
// uses all threads, and streams with work share them. Where the process may use at most two processors per
// copy thread, each thread is given its own share of them.
//
// Beyond what device.h says: a framework stream does not exist here, and StreamHandle{0} stands for the
// calling thread. Recording there completes at once; wait() and copy() on it block the caller, for nothing
// else could order what the caller does next. Every other handle that is not a stream of this device is
// refused. All host memory is alike: copies are asynchronous, registered or not. destroy_stream() does not
// wait; work that is left (against the contract) still runs. The destructor waits for all work.
//
// After fork() the child has no copy threads: every call reports `closed`, and the destructor leaks.
#pragma once

#include <memory>

#include "kvtier/platform/device.h"

namespace kvtier {

// Two threads (or fewer processors): enough for the memory bandwidth of most machines, and the rest is the
// framework's.
unsigned default_copy_threads();

struct CpuDeviceOptions {
  unsigned copy_threads = default_copy_threads();  // 1 to 64
};

// Always returns a device. Options that are not allowed, or threads that could not be had, are its sticky
// error: health() and every call say so.
std::unique_ptr<Device> make_cpu_device(const CpuDeviceOptions& options = {});

}  // namespace kvtier
