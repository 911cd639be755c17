#include "kvtier/replay/simulation.h"

#include <gtest/gtest.h>

#include <list>
#include <random>
#include <set>
#include <vector>

#include "support/turns.h"

#include "kvtier/replay/belady.h"

namespace kvtier::replay {
namespace {

class Trace {
 public:
  void request(const std::vector<std::uint32_t>& blocks) {
    blocks_.insert(blocks_.end(), blocks.begin(), blocks.end());
    begins_.push_back(blocks_.size());
    at_us_.push_back(static_cast<std::int64_t>(at_us_.size()) * 1'000'000);
  }
  TraceView view() const { return {blocks_, begins_, at_us_}; }

 private:
  std::vector<std::uint32_t> blocks_;
  std::vector<std::uint64_t> begins_{0};
  std::vector<std::int64_t> at_us_;
};

SimulationOptions options_of(std::uint32_t host, Form form, std::string_view eviction = "lru") {
  SimulationOptions options;
  options.host_blocks = host;
  options.host_eviction = eviction;
  options.admission = Admission::second_use;
  options.form = form;
  return options;
}

TEST(Simulation, only_the_prefix_that_is_there_hits) {
  Trace trace;
  trace.request({0, 1, 2});
  trace.request({0, 1, 3, 4});
  trace.request({5, 1, 2});  // 1 and 2 are there, but nothing is before them
  for (const Form form : {Form::engine, Form::plain}) {
    const SimulationResult result = simulate(trace.view(), options_of(10, form));
    EXPECT_EQ(result.references, 10U);
    EXPECT_EQ(result.hits_host, 2U);
    EXPECT_EQ(result.host_of_request, (std::vector<std::uint32_t>{0, 2, 0}));
    EXPECT_EQ(result.evictions_host, 0U);
  }
}

// By hand, two blocks of cache: 0 is used again before 2 comes. LRU lets 1 go for it, FIFO 0.
TEST(Simulation, lru_and_fifo_by_hand) {
  Trace trace;
  for (const std::uint32_t block : {0U, 1U, 0U, 2U, 0U}) trace.request({block});
  EXPECT_EQ(simulate(trace.view(), options_of(2, Form::plain)).host_of_request,
            (std::vector<std::uint32_t>{0, 0, 1, 0, 1}));
  EXPECT_EQ(simulate(trace.view(), options_of(2, Form::plain, "fifo")).host_of_request,
            (std::vector<std::uint32_t>{0, 0, 1, 0, 0}));
}

// By hand, two blocks of host tier and one request ahead. Before 3 runs, 0 is read in the place of 1; 3 takes
// that of 2.
TEST(Simulation, look_ahead_reads_what_a_waiting_request_wants) {
  Trace trace;
  for (const std::uint32_t block : {0U, 1U, 2U, 3U, 0U}) trace.request({block});
  SimulationOptions options = options_of(2, Form::engine);
  options.disk_blocks = 10;
  EXPECT_EQ(simulate(trace.view(), options).disk_of_request, (std::vector<std::uint32_t>{0, 0, 0, 0, 1}));
  options.look_ahead = 1;
  const SimulationResult result = simulate(trace.view(), options);
  EXPECT_EQ(result.host_of_request, (std::vector<std::uint32_t>{0, 0, 0, 0, 1}));
  EXPECT_EQ(result.hits_disk, 0U);
  EXPECT_EQ(result.promotions, 1U);
  EXPECT_EQ(result.reads_hidden, 1U);
}

// By hand: 0 is still there when the request that wants it becomes known. LRU lets it go for 2,
// return-hazard lets 1 go.
TEST(Simulation, what_is_expected_stays) {
  Trace trace;
  for (const std::uint32_t block : {0U, 1U, 2U, 0U}) trace.request({block});
  for (const bool expects : {false, true}) {
    SimulationOptions options = options_of(2, Form::engine, expects ? "return-hazard" : "lru");
    options.look_ahead = 1;
    EXPECT_EQ(simulate(trace.view(), options).hits_host, expects ? 1U : 0U);
  }
}

// As many requests ahead as there are, and more.
TEST(Simulation, look_ahead_may_reach_beyond_the_trace) {
  Trace trace;
  for (const std::uint32_t block : {0U, 1U, 0U}) trace.request({block});
  SimulationOptions options = options_of(2, Form::engine);
  for (const std::uint32_t ahead : {3U, 100U}) {
    options.look_ahead = ahead;
    EXPECT_EQ(simulate(trace.view(), options).hits_host, 1U);
  }
}

// By hand: request 1 takes the place of 2, the oldest since the tail is touched first. Request 2 hits 0
// and 1.
TEST(Simulation, the_tail_of_a_prompt_goes_first) {
  Trace trace;
  trace.request({0, 1, 2});
  trace.request({3});
  trace.request({0, 1, 2});
  for (const Form form : {Form::engine, Form::plain}) {
    EXPECT_EQ(simulate(trace.view(), options_of(3, form)).host_of_request,
              (std::vector<std::uint32_t>{0, 0, 2}));
  }
}

// A block of a prefix that FIFO evicts before what hangs on it leaves orphans.
TEST(Simulation, orphans_are_reported) {
  Trace trace;
  trace.request({0});
  trace.request({0, 1, 2});
  trace.request({3});
  const SimulationResult fifo = simulate(trace.view(), options_of(3, Form::engine, "fifo"));
  EXPECT_EQ(fifo.orphans_host, 1U);
  EXPECT_EQ(simulate(trace.view(), options_of(3, Form::engine)).orphans_host, 0U);
}

TEST(Simulation, what_the_host_evicted_is_found_on_disk_and_promoted) {
  Trace trace;
  trace.request({0, 1});
  trace.request({2, 3});
  trace.request({0, 1});
  for (const Form form : {Form::engine, Form::plain}) {
    SimulationOptions options = options_of(2, form);
    options.disk_blocks = 10;
    options.block_bytes = 100;
    const SimulationResult result = simulate(trace.view(), options);
    EXPECT_EQ(result.hits_host, 0U);
    EXPECT_EQ(result.hits_disk, 2U);
    EXPECT_EQ(result.promotions, 2U);
    EXPECT_EQ(result.disk_blocks_written, 4U);
  }
}

TEST(Simulation, the_write_budget_is_kept) {
  Trace trace;
  for (std::uint32_t n = 0; n < 20; ++n) trace.request({n});
  for (const Form form : {Form::engine, Form::plain}) {
    SimulationOptions options = options_of(2, form);
    options.disk_blocks = 100;
    options.block_bytes = 100;
    options.write_bytes_per_day = 750;
    const SimulationResult result = simulate(trace.view(), options);
    EXPECT_EQ(result.disk_blocks_written, 7U);
    EXPECT_EQ(result.declined_budget, 13U);
  }
}

TEST(Simulation, a_full_drive_takes_on_second_use_what_it_refused_before_whole) {
  Trace trace;
  trace.request({0, 1});
  trace.request({2, 3, 4});
  trace.request({5});  // the host forgets
  trace.request({2, 3, 4});
  SimulationOptions options = options_of(3, Form::engine);
  options.disk_blocks = 3;
  options.block_bytes = 1;
  EXPECT_EQ(simulate(trace.view(), options).disk_blocks_written, 2 + 1 + 2U)
      << "2 fills the drive; 3 was not offered before, 4 hangs on it; the second time both are welcome";
}

TEST(Simulation, a_request_larger_than_the_host_keeps_its_head) {
  Trace trace;
  trace.request({0, 1, 2, 3, 4});
  trace.request({0, 1, 2, 3, 4});
  EXPECT_EQ(simulate(trace.view(), options_of(3, Form::engine)).hits_host, 3U);
}

TEST(Simulation, progress_may_end_it) {
  Trace trace;
  for (std::uint32_t n = 0; n < 5000; ++n) trace.request({n});
  SimulationOptions options = options_of(10, Form::engine);
  std::vector<std::size_t> told;
  options.progress = [&told](std::size_t done) {
    told.push_back(done);
    return done < 2048;
  };
  EXPECT_EQ(simulate(trace.view(), options).references, 2048U);
  EXPECT_EQ(told, (std::vector<std::size_t>{0, 1024, 2048}));
}

// Conversations that grow, as in real traffic.
Trace conversations(unsigned seed, int num_requests) {
  std::mt19937 random(seed);
  Trace trace;
  std::vector<std::vector<std::uint32_t>> talks;
  std::uint32_t next = 3;
  for (int r = 0; r < num_requests; ++r) {
    if (talks.empty() || random() % 3 == 0) talks.push_back({0, 1, 2});
    std::vector<std::uint32_t>& talk =
        talks[talks.size() - 1 - random() % std::min<std::size_t>(talks.size(), 12)];
    for (unsigned n = random() % 4 + 1; n > 0; --n) talk.push_back(next++);
    trace.request(talk);
  }
  return trace;
}

// The plain form of LRU, once more and naively.
std::uint64_t naive_lru(const TraceView& trace, std::size_t capacity) {
  std::list<std::uint32_t> order;  // oldest first
  std::uint64_t hits = 0;
  for (std::size_t r = 0; r < trace.num_requests(); ++r) {
    const std::set<std::uint32_t> inside(order.begin(), order.end());
    const auto blocks = trace.request(r);
    for (std::size_t i = 0; i < blocks.size() && inside.contains(blocks[i]); ++i) ++hits;
    for (std::size_t i = blocks.size(); i-- > 0;) {
      order.remove(blocks[i]);
      order.push_back(blocks[i]);
      if (order.size() > capacity) order.pop_front();
    }
  }
  return hits;
}

TEST(Simulation, plain_lru_agrees_with_a_naive_model) {
  for (unsigned seed = 0; seed < 10; ++seed) {
    const Trace trace = conversations(seed, 200);
    for (const std::uint32_t capacity : {5U, 40U, 150U}) {
      EXPECT_EQ(simulate(trace.view(), options_of(capacity, Form::plain)).hits_host,
                naive_lru(trace.view(), capacity));
    }
  }
}

TEST(Simulation, no_policy_is_above_belady_and_leaf_first_ones_leave_no_orphans) {
  for (unsigned seed = 0; seed < support::turns(10, 1); ++seed) {
    const Trace trace = conversations(seed, 300);
    for (const EvictionChoice& choice : eviction_choices()) {
      for (const std::uint32_t capacity : {5U, 40U, 150U}) {
        for (const Form form : {Form::engine, Form::plain}) {
          SCOPED_TRACE(choice.name);
          SimulationOptions options = options_of(capacity, form, choice.name);
          EXPECT_LE(simulate(trace.view(), options).hits_host, belady_hits(trace.view(), capacity));
          options.disk_blocks = 100;
          options.disk_eviction = choice.name;
          const SimulationResult both = simulate(trace.view(), options);
          EXPECT_LE(both.hits_host + both.hits_disk, belady_hits(trace.view(), capacity + 100));
          if (choice.leaf_first && form == Form::engine) {
            EXPECT_EQ(both.orphans_host + both.orphans_disk, 0U);
          }
        }
      }
    }
  }
}

TEST(Belady, by_hand) {
  Trace trace;
  trace.request({0, 1});
  trace.request({2});
  trace.request({0, 1});
  trace.request({2});
  EXPECT_EQ(belady_hits(trace.view(), 0), 0U);
  EXPECT_EQ(belady_hits(trace.view(), 1), 1U);  // 0 stays, or 2
  EXPECT_EQ(belady_hits(trace.view(), 2), 2U);  // 0 and 1 stay, and 2 passes by; then it is no worse
  EXPECT_EQ(belady_hits(trace.view(), 3), 3U);
}

}  // namespace
}  // namespace kvtier::replay
