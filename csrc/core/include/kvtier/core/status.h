// Status and Result<T>: how a layer reports a failure (docs/architecture.md, "Errors").
//
// Three kinds are never mixed. An *outcome* (hit, miss, pending, declined) is an ordinary value of an
// enum. A *failure* of something below us (a full machine, a device error) is a Status. A *bug* is
// KVTIER_CHECK: it aborts in debug builds and throws std::logic_error in release, which the engine
// turns into its failed state. No other exception crosses a layer.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <variant>

namespace kvtier {

// The kinds of failure; each maps to one Python exception class (src/kvtier/errors.py).
enum class StatusCode : unsigned char {
  ok = 0,
  invalid_argument,  // ConfigError: the caller passed something that is not allowed
  resource,          // ResourceError: memory, descriptors or threads could not be had
  io,                // StorageError: a file or drive failed; native_code() is the errno
  device,            // DeviceError: a device call failed; native_code() is the driver's number
  corruption,        // CorruptionError: bytes are not what they claim to be
  unsupported,       // UnsupportedError: this build or machine cannot do it
  closed,            // ClosedError: the object was closed, or belongs to a parent process
  timeout,           // TimeoutError: a deadline ended the wait (never the operation)
  internal,          // InternalError: a bug in kvtier
};

std::string_view to_string(StatusCode code);

// The result of an operation that can fail. Ok costs one null pointer. Movable and copyable.
class [[nodiscard]] Status {
 public:
  Status() = default;
  Status(StatusCode code, std::string message, int native_code = 0);

  static Status ok() { return {}; }
  static Status invalid_argument(std::string m) { return {StatusCode::invalid_argument, std::move(m)}; }
  static Status resource(std::string m, int native = 0) {
    return {StatusCode::resource, std::move(m), native};
  }
  static Status io(std::string m, int native = 0) { return {StatusCode::io, std::move(m), native}; }
  static Status device(std::string m, int native = 0) { return {StatusCode::device, std::move(m), native}; }
  static Status unsupported(std::string m) { return {StatusCode::unsupported, std::move(m)}; }
  static Status closed(std::string m) { return {StatusCode::closed, std::move(m)}; }
  static Status timeout(std::string m) { return {StatusCode::timeout, std::move(m)}; }
  static Status internal(std::string m) { return {StatusCode::internal, std::move(m)}; }

  bool is_ok() const { return rep_ == nullptr; }
  explicit operator bool() const { return is_ok(); }
  StatusCode code() const { return rep_ ? rep_->code : StatusCode::ok; }
  // errno or the driver's error number where one exists, else 0.
  int native_code() const { return rep_ ? rep_->native_code : 0; }
  const std::string& message() const;

 private:
  struct Rep {
    StatusCode code;
    int native_code;
    std::string message;
  };
  std::shared_ptr<const Rep> rep_;
};

// Reports a broken invariant: aborts in debug builds, throws std::logic_error in release builds.
[[noreturn]] void report_bug(const char* condition, const char* file, int line);

// A T or the Status that says why there is none.
template <typename T>
class [[nodiscard]] Result {
 public:
  Result(T value) : state_(std::in_place_index<0>, std::move(value)) {}  // NOLINT: implicit by design
  // An ok Status says nothing about the value it should have come with: that is a bug.
  Result(Status status) : state_(std::in_place_index<1>, std::move(status)) {  // NOLINT
    if (std::get<1>(state_).is_ok()) report_bug("a Result is made of a failure", __FILE__, __LINE__);
  }

  bool is_ok() const { return state_.index() == 0; }
  explicit operator bool() const { return is_ok(); }
  Status status() const { return is_ok() ? Status::ok() : std::get<1>(state_); }
  T& value() & { return std::get<0>(state_); }
  const T& value() const& { return std::get<0>(state_); }
  T&& value() && { return std::get<0>(std::move(state_)); }
  T* operator->() { return &value(); }
  T& operator*() & { return value(); }

 private:
  std::variant<T, Status> state_;
};

}  // namespace kvtier

#define KVTIER_CHECK(condition) \
  (static_cast<bool>(condition) ? static_cast<void>(0) : ::kvtier::report_bug(#condition, __FILE__, __LINE__))

#define KVTIER_RETURN_IF_ERROR(expression)                                                      \
  do {                                                                                          \
    if (::kvtier::Status kvtier_status_ = (expression); !kvtier_status_) return kvtier_status_; \
  } while (false)
