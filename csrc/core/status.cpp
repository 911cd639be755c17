#include "kvtier/core/status.h"

#include <cstdio>
#include <cstdlib>
#include <stdexcept>

namespace kvtier {

std::string_view to_string(StatusCode code) {
  switch (code) {
    case StatusCode::ok: return "ok";
    case StatusCode::invalid_argument: return "invalid_argument";
    case StatusCode::resource: return "resource";
    case StatusCode::io: return "io";
    case StatusCode::device: return "device";
    case StatusCode::corruption: return "corruption";
    case StatusCode::unsupported: return "unsupported";
    case StatusCode::closed: return "closed";
    case StatusCode::timeout: return "timeout";
    case StatusCode::internal: return "internal";
  }
  return "unknown";
}

Status::Status(StatusCode code, std::string message, int native_code) {
  if (code != StatusCode::ok) rep_ = std::make_shared<const Rep>(Rep{code, native_code, std::move(message)});
}

const std::string& Status::message() const {
  static const std::string kNone;
  return rep_ ? rep_->message : kNone;
}

void report_bug(const char* condition, const char* file, int line) {
#ifndef NDEBUG
  std::fprintf(stderr, "kvtier: broken invariant: %s (%s:%d)\n", condition, file, line);
  std::abort();
#else
  throw std::logic_error(std::string("kvtier: broken invariant: ") + condition + " (" + file + ":" +
                         std::to_string(line) + ")");
#endif
}

}  // namespace kvtier
