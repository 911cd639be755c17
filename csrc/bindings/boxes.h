// What Python objects own. Everything here is made and destroyed with the GIL held; the objects of the
// engine inside are destroyed without it, because their destructors take locks and wait for threads.
//
// The owners of attached tensors live in the EngineBox, not in the Pages: Python may drop everything while
// a transfer runs, and then the memory must stay until the engine has proved that no copy touches it.
#pragma once

#include <unordered_map>

#include "common.h"

#include "kvtier/engine/engine.h"

namespace kvtier::bindings {

struct EngineBox {
  EngineBox() = default;
  EngineBox(const EngineBox&) = delete;
  EngineBox& operator=(const EngineBox&) = delete;
  ~EngineBox();

  // The engine, or ClosedError in a forked child.
  Engine& get() const {
    origin.check();
    return *engine;
  }

  std::shared_ptr<HostMemory> memory;  // outlives the engine
  std::shared_ptr<Device> cpu;         // made at the first attach of CPU memory
  unsigned copy_threads = 0;           // 0: the device's default
  std::shared_ptr<Engine> engine;
  std::vector<std::shared_ptr<Device>> devices;  // outlive every Ticket, which may order streams later
  std::unordered_map<const Pages*, py::object> owners;
  Origin origin;
};

// A shared object of an engine, with the box that keeps the engine alive.
template <typename T>
class Held {
 public:
  Held(std::shared_ptr<EngineBox> box, std::shared_ptr<T> object)
      : box_(std::move(box)), object_(std::move(object)) {}
  Held(Held&&) = delete;
  ~Held() {
    if (box_->origin.inherited()) {
      leak(std::move(object_));
    } else {
      without_gil([this] { object_.reset(); });
    }
  }
  Held& operator=(Held&&) = delete;

  T& get() const {
    box_->origin.check();
    return *object_;
  }
  const std::shared_ptr<EngineBox>& box() const { return box_; }
  std::shared_ptr<T> shared() const {
    box_->origin.check();
    return object_;
  }

 private:
  std::shared_ptr<EngineBox> box_;
  std::shared_ptr<T> object_;
};

using TicketBox = Held<Ticket>;
using PagesBox = Held<Pages>;
using LeaseBox = Held<Lease>;
using ExpectationBox = Held<Expectation>;

}  // namespace kvtier::bindings
