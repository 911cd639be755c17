#include "kvtier/core/status.h"

#include <gtest/gtest.h>

#include <memory>
#include <set>
#include <string>

namespace kvtier {
namespace {

TEST(Status, ok_is_the_default_and_says_nothing) {
  const Status status;
  EXPECT_TRUE(status.is_ok());
  EXPECT_TRUE(static_cast<bool>(status));
  EXPECT_EQ(status.code(), StatusCode::ok);
  EXPECT_EQ(status.native_code(), 0);
  EXPECT_EQ(status.message(), "");
  EXPECT_TRUE(Status(StatusCode::ok, "ignored").is_ok());
}

TEST(Status, a_failure_keeps_code_number_and_message_through_copies) {
  const Status copy = [] {
    const Status original = Status::device("broken", 700);
    return Status(original);
  }();
  EXPECT_FALSE(copy);
  EXPECT_EQ(copy.code(), StatusCode::device);
  EXPECT_EQ(copy.native_code(), 700);
  EXPECT_EQ(copy.message(), "broken");
}

TEST(Status, makers_make_their_own_code) {
  EXPECT_EQ(Status::invalid_argument("").code(), StatusCode::invalid_argument);
  EXPECT_EQ(Status::resource("", 12).code(), StatusCode::resource);
  EXPECT_EQ(Status::resource("", 12).native_code(), 12);
  EXPECT_EQ(Status::device("").code(), StatusCode::device);
  EXPECT_EQ(Status::unsupported("").code(), StatusCode::unsupported);
  EXPECT_EQ(Status::closed("").code(), StatusCode::closed);
  EXPECT_EQ(Status::timeout("").code(), StatusCode::timeout);
  EXPECT_EQ(Status::internal("").code(), StatusCode::internal);
}

TEST(Status, every_code_has_a_name_of_its_own) {
  std::set<std::string_view> names;
  for (int code = 0; code <= static_cast<int>(StatusCode::internal); ++code) {
    EXPECT_TRUE(names.insert(to_string(static_cast<StatusCode>(code))).second);
  }
  EXPECT_FALSE(names.contains("unknown"));
  EXPECT_EQ(to_string(static_cast<StatusCode>(200)), "unknown");
}

TEST(Status, return_if_error_returns_the_first_error) {
  int calls = 0;
  const auto twice = [&](const Status& first, const Status& second) -> Status {
    ++calls;
    KVTIER_RETURN_IF_ERROR(first);
    ++calls;
    KVTIER_RETURN_IF_ERROR(second);
    ++calls;
    return Status::ok();
  };
  EXPECT_TRUE(twice({}, {}));
  EXPECT_EQ(calls, 3);
  EXPECT_EQ(twice(Status::timeout("a"), Status::closed("b")).message(), "a");
  EXPECT_EQ(calls, 4);
}

// Not inlined: gcc 12 under a sanitizer warns of the Status that is not there.
[[gnu::noinline]] Result<std::unique_ptr<int>> five() { return std::make_unique<int>(5); }

TEST(Result, holds_a_value_or_the_status) {
  Result<std::unique_ptr<int>> good = five();
  ASSERT_TRUE(good);
  EXPECT_TRUE(good.status().is_ok());
  EXPECT_EQ(**good, 5);
  EXPECT_EQ(*std::move(good).value(), 5);

  const Result<std::string> bad(Status::resource("none", 12));
  EXPECT_FALSE(bad);
  EXPECT_EQ(bad.status().native_code(), 12);
}

#ifndef NDEBUG
TEST(ResultDeathTest, an_ok_status_is_no_result) {
  EXPECT_DEATH(static_cast<void>(Result<int>(Status::ok())),
               "broken invariant: a Result is made of a failure");
}

TEST(CheckDeathTest, a_broken_invariant_names_itself) {
  EXPECT_DEATH(KVTIER_CHECK(1 + 1 == 3), "broken invariant: 1 \\+ 1 == 3 .*status_test.cpp");
}
#endif

TEST(Check, a_kept_invariant_is_silent) { KVTIER_CHECK(1 + 1 == 2); }

}  // namespace
}  // namespace kvtier
