// A directory for one test, removed with all that is in it.
#pragma once

#include <gtest/gtest.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <string>

namespace kvtier {

// On the drive: below $TMPDIR, else the current directory. /tmp may be memory, where direct I/O means
// nothing.
inline std::string drive_path() {
  const char* set = std::getenv("TMPDIR");
  return set != nullptr && *set != '\0' ? set : std::filesystem::current_path().string();
}

class TempDirectory {
 public:
  explicit TempDirectory(const std::string& below = drive_path()) : path_(below + "/kvtier-test-XXXXXX") {
    if (::mkdtemp(path_.data()) == nullptr) ADD_FAILURE() << "cannot make a directory below " << below;
  }
  ~TempDirectory() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }
  TempDirectory(const TempDirectory&) = delete;
  TempDirectory& operator=(const TempDirectory&) = delete;

  const std::string& path() const { return path_; }

 private:
  std::string path_;
};

}  // namespace kvtier
